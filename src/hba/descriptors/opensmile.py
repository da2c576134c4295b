"""openSMILE on one sound: ComParE 2016 functionals or low-level descriptors, or eGeMAPSv02 functionals.

The sound is what every other part of hba hears, 16 kHz mono, from an audio file or the sound track of a clip. A sound
that openSMILE cannot measure (25 ms give nothing but NaN and a warning) is a MediaError, never a file of NaN or zeros.
Saved as {'features'}, as published: [D] for functionals, [T, D] for a sequence of one value each 10 ms.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hba.atlas.audio import Audio
from hba.environment import installed_version
from hba.errors import HbaError, InputError, MediaError, nearest

if TYPE_CHECKING:
    from torch import Tensor

INSTALL = "pip install 'human-behavior-atlas[descriptors]'"


class FeatureSet(NamedTuple):
    """A set and level in openSMILE's own names, how many values it has, and the folder for its files."""

    set_name: str
    level: str
    num_values: int
    folder: str


FEATURE_SETS = {
    "compare": FeatureSet("ComParE_2016", "Functionals", 6373, "opensmile"),
    "compare-lld": FeatureSet("ComParE_2016", "LowLevelDescriptors", 65, "opensmile_lld"),
    "egemaps": FeatureSet("eGeMAPSv02", "Functionals", 88, "opensmile_egemaps"),
}


def feature_set(name: str) -> FeatureSet:
    """The feature set of a command-line name. Raises InputError listing the names."""
    if name not in FEATURE_SETS:
        raise InputError(f"unknown audio descriptor {name!r}", where="--audio", fix=nearest(name, FEATURE_SETS))
    return FEATURE_SETS[name]


def extractor_id(name: str) -> str:
    """What the manifest calls this extractor: two files of equal id and equal sound are equal.

    Raises HbaError when openSMILE is not installed, InputError for an unknown `name`.
    """
    chosen, version = feature_set(name), installed_version("opensmile")
    if version is None:
        raise HbaError("opensmile is not installed", where="--audio", fix=f"{INSTALL}, or pass --audio none.")
    return f"opensmile {version} {chosen.set_name} {chosen.level} 16 kHz mono"


class Opensmile:
    """openSMILE set up for one feature set, a key of FEATURE_SETS. Raises HbaError when it does not load."""

    def __init__(self, name: str) -> None:
        self._set = feature_set(name)
        try:
            import opensmile  # type: ignore[import-untyped,unused-ignore]
        except (ImportError, OSError) as error:
            raise HbaError(f"opensmile does not load ({error})", where="--audio", fix=INSTALL) from None
        self._smile = opensmile.Smile(
            feature_set=opensmile.FeatureSet[self._set.set_name],
            feature_level=opensmile.FeatureLevel[self._set.level],
        )

    def extract(self, audio: Audio, *, where: str) -> dict[str, Tensor]:
        """{'features': float32 [D] or [T, D]}. Raises MediaError when any value is NaN, infinite or missing."""
        import torch

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns that it fills with NaN, which is an error here
            values_TD = self._smile.process_signal(audio.samples, audio.sample_rate).to_numpy(np.float32)
        if values_TD.ndim != 2 or values_TD.shape[1] != self._set.num_values or not len(values_TD):
            what = f"openSMILE gave the shape {list(values_TD.shape)}, expected [T, {self._set.num_values}]"
            raise MediaError(what, where=where, fix="Install the opensmile release of the constraints file.")
        gaps = int((~np.isfinite(values_TD)).sum())
        if gaps:
            what = f"cannot be measured: {gaps:,} of {values_TD.size:,} openSMILE values are NaN or infinite"
            raise MediaError(f"{what} ({audio.seconds:.3f} s of sound)", where=where, fix="Leave the sample out.")
        features = values_TD[0] if self._set.level == "Functionals" else values_TD
        return {"features": torch.from_numpy(features.copy())}
