"""Which rows of a split are predicted, and which media of theirs reach the model.

A selection makes another atlas with another fingerprint, so that its predictions cannot be taken for those of the whole
split. An ablation leaves media out and takes their tags away; the prompt keeps its text, in which the question stands,
and with it a transcript where the row has one. "Audio alone" is therefore the question with the sound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hba.atlas import Atlas, open_atlas
from hba.atlas.config import EncodeConfig
from hba.atlas.mixing import subsample
from hba.atlas.prompt import Modality
from hba.errors import InputError, nearest

CHANNELS: dict[str, tuple[Modality, ...]] = {"text": (), "audio": ("audio",), "video": ("image", "video")}


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What of a split is predicted; None leaves everything in.

    The rows of `datasets` alone; at most `per_dataset` rows of each dataset, drawn so that its labels keep their shares
    (a dataset with fewer rows gives all); then the first `limit` rows. `channels` are those of CHANNELS that reach the
    model.
    """

    limit: int | None = None
    per_dataset: int | None = None
    channels: tuple[str, ...] | None = None
    datasets: tuple[str, ...] | None = None

    def rows(self, atlas: Atlas, seed: int = 0) -> Atlas:
        """The chosen rows of `atlas`, in their order. The same seed draws the same rows."""
        if self.datasets is not None:
            atlas = atlas.filter(datasets=self.datasets)
        if self.per_dataset is not None:
            codes_N = atlas.columns.dataset_codes
            chosen = []
            for code in np.unique(codes_N):
                rows = np.flatnonzero(codes_N == code)
                if len(rows) > self.per_dataset:
                    of_dataset = atlas.columns.select(rows)
                    rows = rows[subsample(of_dataset, self.per_dataset, seed=seed, by=("label",))]
                chosen.append(rows)
            atlas = atlas.select(np.sort(np.concatenate(chosen)))
        return atlas if self.limit is None else atlas[: self.limit]

    def media(self, encode: EncodeConfig) -> EncodeConfig:
        """`encode` with the media of the chosen channels alone. Raises InputError for an unknown channel."""
        return encode if self.channels is None else replace(encode, modalities=reaching(self.channels))


EVERYTHING = Selection()


def predicted_rows(facts: Mapping[str, Any], place: str, split: str) -> Atlas:
    """The rows of `split` of the atlas at `place` that a run was asked to predict; `facts` are its predict.json.

    Raises InputError when their fingerprint is not the one that the run recorded.
    """
    atlas = Selection(**facts.get("selection") or {}).rows(open_atlas(place, split=split))
    if (facts.get("data") or {}).get("fingerprint") not in (None, atlas.fingerprint):
        fix = "Say with --atlas which one it was."
        raise InputError("is not the atlas that was predicted (another fingerprint)", where=place, fix=fix)
    return atlas


def reaching(channels: Sequence[str]) -> tuple[Modality, ...]:
    """The media modalities of the channels text, audio and video; video is everything that is seen, text none.

    Raises InputError for another name.
    """
    for name in channels:
        if name not in CHANNELS:
            raise InputError(f"unknown modality {name!r}", where="--modalities", fix=nearest(name, CHANNELS))
    kept = {modality for name in channels for modality in CHANNELS[name]}
    order: tuple[Modality, ...] = ("image", "video", "audio")
    return tuple(modality for modality in order if modality in kept)
