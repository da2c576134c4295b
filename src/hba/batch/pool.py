"""A descriptor [T, D] to one vector, as the adapters of stage 3 read it.

Statistics over time (mean, population standard deviation, quartiles), then an optional norm over the whole vector. A
descriptor without frames, with NaN or infinity, or of another form than its mode needs is an InputError; no gap is
ever filled with zeros. `published=True` repeats the released scripts to the number: quartiles that are always one of
the values (of two frames both are the smaller one), landmark parts of a wrong shape left out and those of two columns
among parts of three, vectors padded and cut.

Shapes: T frames, D values a frame, F values of the pooled vector, P points, N samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from hba.config import option
from hba.errors import InputError, MediaError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from hba.atlas.media import Descriptor
    from hba.atlas.rows import Sample


Vector: TypeAlias = npt.NDArray[np.float32]
Values: TypeAlias = "npt.ArrayLike | Tensor"
_Doubles: TypeAlias = npt.NDArray[np.float64]

MODES = ("none", "mean", "meanstd", "meanstdp25p75")
NORMS = ("l2", "zscore")
PARTS = ("pose", "face", "left_hand", "right_hand")

_SMALLEST_NORM = 1e-6  # as released; below it a vector is scaled by a million instead of by its own size
_AGAIN = "Extract the descriptor again, or leave the sample out."


def pool(x: Values, mode: str, norm: str | None = None, published: bool = False) -> Vector:
    """Pool `x` [T, D] (or [D], one frame) to float32 [F].

    `mode` none (one frame alone, F = D), mean (D), meanstd (mean and population standard deviation, 2 D) or
    meanstdp25p75 (also the 25th and 75th percentile, 4 D; linear interpolation, or with `published` the
    max(1, floor(q T))-th smallest value). `norm` over the pooled vector: None, l2 (f / |f|) or zscore
    ((f - mean f) / std f), each divisor at least 1e-6. Raises InputError for an unknown mode or norm, an empty or
    non-finite descriptor, another number of dimensions, and several frames under mode none.
    """
    if mode not in MODES:
        raise InputError(f"unknown pooling mode {mode!r}", fix=nearest(mode, MODES))
    if norm is not None and norm not in NORMS:
        raise InputError(f"unknown norm {norm!r}", fix=f"{nearest(str(norm), NORMS)} None leaves it out.")
    x_TD = _frames(x)
    if mode == "none" and len(x_TD) > 1:
        fix = "Choose the mode mean, meanstd or meanstdp25p75."
        raise InputError(f"mode 'none' needs one frame, found {len(x_TD)}", fix=fix)
    parts = [x_TD.mean(axis=0)]
    if mode in ("meanstd", "meanstdp25p75"):
        parts.append(x_TD.std(axis=0))
    if mode == "meanstdp25p75":
        parts.extend(_quartiles(x_TD, published))
    return _single(_normed(np.concatenate(parts), norm))


def _array(x: Values) -> _Doubles:
    # A tensor may have a type that NumPy lacks (bfloat16) or carry a gradient.
    plain: Any = x.detach().double().cpu().numpy() if hasattr(x, "detach") else x
    try:
        array: _Doubles = np.asarray(plain, np.float64)
    except (ValueError, TypeError):
        raise InputError(f"expected numbers [T, D], found {type(x).__name__}", fix=_AGAIN) from None
    return array


def _frames(x: Values) -> _Doubles:
    array = _array(x)
    if array.ndim not in (1, 2):
        raise InputError(f"expected the shape [T, D] or [D], found {list(array.shape)}", fix=_AGAIN)
    if array.size == 0:
        raise InputError(f"the descriptor is empty, shape {list(array.shape)}", fix=_AGAIN)
    if not np.isfinite(array).all():
        raise InputError("the descriptor holds NaN or infinite values", fix=_AGAIN)
    return np.atleast_2d(array)


def _quartiles(x_TD: _Doubles, published: bool) -> list[_Doubles]:
    if not published:
        return list(np.percentile(x_TD, (25, 75), axis=0))
    sorted_TD = np.sort(x_TD, axis=0)
    return [sorted_TD[max(1, int(q * len(x_TD))) - 1] for q in (0.25, 0.75)]


def _normed(f_F: _Doubles, norm: str | None) -> _Doubles:
    centred_F = f_F - f_F.mean() if norm == "zscore" else f_F
    size = {None: 1.0, "l2": float(np.linalg.norm(f_F)), "zscore": float(f_F.std())}[norm]
    return np.asarray(centred_F / max(size, _SMALLEST_NORM), np.float64)


def _single(f_F: _Doubles) -> Vector:
    with np.errstate(over="ignore"):
        single = f_F.astype(np.float32)
    if not np.isfinite(single).all():
        raise InputError("the pooled descriptor exceeds the range of float32", fix=_AGAIN)
    return single


def flatten_landmarks(parts: Mapping[str, Values], *, confidence: bool = True, published: bool = False) -> Vector:
    """Landmarks {pose, face, left_hand, right_hand}, each [T, P, (x, y, confidence)], to float32 [T, D].

    The parts follow each other in that order; D = 3 (with `confidence`) or 2 values for each point. Parts of two
    columns, [T, P, (x, y)], are taken where no confidence is asked for. Raises InputError for a part that is missing or
    has another shape (with `published` it is left out, which changes D), for different numbers of frames, for NaN or
    infinity, and when nothing is there. With `published` a part of two columns stays one, whatever is asked for.
    """
    columns = (2, 3) if published or not confidence else (3,)
    flat_TD = []
    for name in PARTS:
        part_TPC = _array(parts[name]) if name in parts else None
        if part_TPC is not None and part_TPC.ndim == 3 and part_TPC.shape[2] in columns and part_TPC.size:
            kept_TPC = part_TPC if confidence else part_TPC[:, :, :2]
            flat_TD.append(kept_TPC.reshape(len(kept_TPC), -1))
        elif not published:
            found = "is missing" if part_TPC is None else f"has shape {list(part_TPC.shape)}, not [T, points, 3]"
            bare = part_TPC is not None and part_TPC.ndim == 3 and part_TPC.shape[2] == 2
            fix = "Set descriptors.confidence=false: there is none in the file." if bare else _AGAIN
            raise InputError(f"landmarks: {name!r} {found}", fix=fix)
    if not flat_TD:
        raise InputError(f"landmarks: none of {', '.join(PARTS)} is there", fix=_AGAIN)
    if len({len(part) for part in flat_TD}) > 1:
        frames = ", ".join(str(len(part)) for part in flat_TD)
        raise InputError(f"landmarks: the parts differ in their number of frames ({frames})", fix=_AGAIN)
    return _single(_frames(np.concatenate(flat_TD, axis=1)))


def sequence(
    descriptor: Values | Mapping[str, Values], *, where: str = "", confidence: bool = True, published: bool = False
) -> Vector:
    """A loaded descriptor (a tensor, {'features'} or landmarks) as float32 [T, D], ready for `pool`.

    Raises InputError naming `where` when it is none of these, empty or not finite.
    """
    try:
        if not isinstance(descriptor, Mapping):
            return _single(_frames(descriptor))
        if "features" in descriptor:
            return _single(_frames(descriptor["features"]))
        return flatten_landmarks(descriptor, confidence=confidence, published=published)
    except InputError as error:
        raise InputError(error.what, where=where, fix=error.fix) from None


def stack(vectors: Sequence[Values], dim: int, *, published: bool = False) -> Vector:
    """Pooled vectors as float32 [N, dim].

    Raises InputError naming the position of a vector that does not have `dim` finite values; with `published` one
    that is too short ends in zeros and one that is too long is cut, without a word, as released.
    """
    rows = [_single(_frames(vector).reshape(-1)) for vector in vectors]
    for number, row in enumerate(rows):
        if len(row) != dim and not published:
            fix = "Extract all descriptors of a dataset with the same settings."
            raise InputError(f"descriptor {number} has {len(row)} values, expected {dim}", fix=fix)
    out_ND = np.zeros((len(rows), dim), np.float32)
    for number, row in enumerate(rows):
        out_ND[number, : len(row)] = row[:dim]
    return out_ND


# The pooled descriptors of a sample, as stage 3 reads them: one vector a modality, missing where it has none.
#
# A row that has a medium but no descriptor of it misses one: its sample is refused by name, unless `allow_missing` lets
# it go unchanged. A row without the medium misses nothing. Nothing is filled with zeros.


Mode = Literal["none", "mean", "meanstd", "meanstdp25p75"]
Norm = Literal["l2", "zscore"]


class Source(NamedTuple):
    """Where a modality's descriptors lie, and the medium that they describe."""

    field: Literal["ext_video_feats", "ext_audio_feats"]
    medium: Literal["videos", "audios"]


SOURCES = {"video": Source("ext_video_feats", "videos"), "audio": Source("ext_audio_feats", "audios")}


@dataclass(frozen=True, kw_only=True)
class DescriptorConfig:
    """How the descriptors [T, D] of a sample become one vector a modality."""

    mode: Mode = option(
        "meanstd",
        "statistics over time that describe a sample: means, with standard deviations, with quartiles. none: for "
        "single frames",
    )
    norm: Norm | None = option(
        None, "scale each sample's pooled vector: to length 1 (l2), or to mean 0 and variance 1 (zscore). null: do not"
    )
    confidence: bool = option(True, "keep the confidence that MediaPipe gives for each landmark")
    published: bool = option(False, "compute quartiles and landmarks as the released scripts do, their errors included")
    allow_missing: bool = option(
        False, "let samples without descriptors pass, unchanged by the adapter. false: they are an error"
    )


def missing(sample: Sample) -> list[str]:
    """The modalities of which a sample has the medium but no descriptor."""
    return [name for name, (field, medium) in SOURCES.items() if getattr(sample, medium) and not getattr(sample, field)]


def pooled_descriptors(
    sample: Sample, config: DescriptorConfig, dims: Mapping[str, int] | None = None
) -> dict[str, Tensor]:
    """{'video': [F], 'audio': [F]}, float32, without a modality that the sample has no descriptor of.

    Several descriptors of one modality are averaged after pooling. Raises MediaError naming the place when one is
    missing (unless allowed), cannot be read or cannot be pooled, or gives another size than its adapter reads (`dims`).
    """
    for name in missing(sample) if not config.allow_missing else ():
        fix = "Run `hba atlas describe`, or leave such samples unchanged with --allow-missing."
        raise MediaError(f"has no {name} descriptor", where=sample.place(SOURCES[name].field), fix=fix)
    import torch

    found = {}
    for name, (field, _) in SOURCES.items():
        with sample.blamed(field):
            vectors = [_vector(loaded, config, sample.place(field)) for loaded in sample.load_descriptors(field)]
            if vectors:
                found[name] = torch.stack(vectors).mean(0)
        if found.get(name) is not None and dims is not None and len(found[name]) != dims.get(name, len(found[name])):
            raise MediaError(unlike(len(found[name]), dims[name]), where=sample.place(field), fix=ALIKE)
    return found


ALIKE = "Extract all descriptors of a dataset with the same settings."


def unlike(size: int, expected: int) -> str:
    """What is wrong with a pooled descriptor of another size than those of its dataset."""
    return f"the pooled descriptor has {size} values, those of its dataset have {expected}"


def _vector(loaded: Descriptor, config: DescriptorConfig, where: str) -> Tensor:
    import torch

    try:
        frames_TD = sequence(loaded, where=where, confidence=config.confidence, published=config.published)
        return torch.from_numpy(pool(frames_TD, config.mode, config.norm, config.published))
    except InputError as error:
        raise MediaError(error.what, where=where, fix=error.fix) from None
