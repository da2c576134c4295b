"""Which rows an epoch trains on, and which of them meet in a batch: pure functions of (seed, epoch).

Every batch holds samples of one modality signature and of similar length, so that little of it is padding and every
rank runs the same towers. Nothing is decoded to plan: lengths are estimated from the rows. Every sample occurs exactly
once an epoch; a run that resumes at batch k of an epoch sees exactly the batches that it had not seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field

from hba.atlas.rows import Columns
from hba.config import option
from hba.errors import ConfigError, InputError, nearest

if TYPE_CHECKING:
    from hba.atlas import Atlas
    from hba.batch.config import EncodeConfig

Indices = npt.NDArray[np.int64]

# Samples are sorted by length only within a window of this many batches, so that batches stay mixed in everything else.
SORT_WINDOW_BATCHES = 50


def plan_batches(
    signature_codes_N: npt.NDArray[np.integer],
    lengths_N: npt.NDArray[np.integer],
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    shuffle: bool = True,
) -> list[Indices]:
    """Batches of row numbers for one epoch, each of one signature and at most `batch_size` rows.

    `signature_codes_N` and `lengths_N` describe the rows; with `shuffle` off rows keep their order within a signature
    (evaluation) but are still grouped by length. Raises ConfigError when batch_size is not positive.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}", fix="Use a batch size of at least 1.")
    rng = np.random.default_rng([seed, epoch])
    batches: list[Indices] = []
    for code in np.unique(signature_codes_N):
        rows = np.flatnonzero(signature_codes_N == code)
        if shuffle:
            rng.shuffle(rows)
        window = batch_size * SORT_WINDOW_BATCHES if shuffle else len(rows)
        for start in range(0, len(rows), window):
            chunk = rows[start : start + window]
            chunk = chunk[np.argsort(lengths_N[chunk], kind="stable")]
            batches.extend(chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size))
    if shuffle:
        order = rng.permutation(len(batches))
        batches = [batches[i] for i in order]
    return batches


_CHARS_PER_TOKEN, _TEMPLATE_TOKENS = 3, 64
_PIXELS_PER_TOKEN = 28 * 28
_FRAMES_PER_STEP = 2  # that share their tokens
_TOKENS_PER_SECOND, _BYTES_PER_SECOND = 25, 32_000  # of sound, 16 kHz and 16 bits
_CLIP_SECONDS = 10


def input_tokens(rows: Atlas, encode: EncodeConfig) -> Indices:
    """What each of `rows` is to the model, in tokens [N]; nothing is decoded, so that it is an estimate.

    Pictures and clips are reckoned at their largest size, texts at three characters a token, both rather too much. A
    sound is as long as its bytes say: too much for stereo or higher rates, too little for compressed sound; that of a
    clip (`encode.sound_of_clips`), whose length no row says, is taken for ten seconds. By the numbers of Qwen2.5-Omni.
    """
    columns, kinds = rows.columns, encode.modalities
    picture = encode.max_pixels // _PIXELS_PER_TOKEN
    tokens_N = columns.problem_chars.astype(np.int64) // _CHARS_PER_TOKEN + _TEMPLATE_TOKENS
    if "image" in kinds:
        tokens_N += columns.num_images * picture
    if "video" in kinds:
        frame = encode.pixels_of(encode.num_frames) // _PIXELS_PER_TOKEN
        tokens_N += columns.num_videos * (frame * encode.num_frames // _FRAMES_PER_STEP)
    if "audio" in kinds and encode.sound_of_clips != "off":
        tokens_N += columns.num_videos * (columns.num_audios == 0) * (_TOKENS_PER_SECOND * _CLIP_SECONDS)
    if "audio" in kinds and columns.num_audios.any():
        heard = int(encode.heard_seconds * _TOKENS_PER_SECOND) * columns.num_audios.astype(np.int64)
        tokens_N += np.minimum(rows.audio_bytes * _TOKENS_PER_SECOND // _BYTES_PER_SECOND, heard)
    return np.minimum(tokens_N, encode.max_tokens)


def padding_share(batches: list[Indices], lengths_N: npt.NDArray[np.integer]) -> float:
    """Share of a plan's token slots that would be padding, 0..1."""
    used = sum(int(lengths_N[b].sum()) for b in batches)
    slots = sum(int(lengths_N[b].max()) * len(b) for b in batches)
    return 1.0 - used / slots if slots else 0.0


# Which rows an epoch trains on, and how often: a pure function of (columns, config, seed, epoch).
#
# By default every row once. Datasets can be mixed by temperature (share proportional to size^(1/T)) or by explicit
# weights, and the classes of a dataset balanced; a row then occurs as often as its share of the epoch asks for. Rows
# are dealt, not drawn: the rows of a dataset come round in full before one repeats, also across epochs, so that no row
# is left out by chance. The rows of an epoch go to `sampler.plan_batches`, which orders them.
#
# Shapes: N rows of the atlas, M rows of an epoch, K cells (datasets, or classes of datasets).


# Streams of random numbers that must not be the same: of the subsample, of the shares' rounding, of the rows' order.
_SUBSAMPLE, _ROUNDING, _ORDER = 1, 2, 3
_STRATA = {"dataset": "dataset_codes", "label": "label_codes", "task": "task_codes", "modality": "signature_codes"}


@dataclass(frozen=True, kw_only=True)
class MixConfig:
    """How often the rows of each dataset and class are trained on. The default is every row once an epoch."""

    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = option(
        1.0, "evens out datasets: each has a share of rows^(1/T). 1: as the data are; larger: more even"
    )
    weights: dict[str, float] | None = option(
        None,
        "share of each dataset in an epoch, such as {tess: 2, mmsd: 1}, instead of a temperature. 0 leaves one out",
    )
    class_balanced: bool = option(False, "train every class of a dataset equally often")
    epoch_size: Annotated[int, Field(ge=1)] | None = option(None, "rows in an epoch. null: as many as there are")
    subsample: Annotated[float, Field(gt=0, le=1)] | None = option(
        None,
        "train on this share of the rows, 0..1: the same rows every epoch, drawn from each dataset and label alike",
    )

    def __post_init__(self) -> None:
        if self.weights is None:
            return
        wrong = [name for name, weight in self.weights.items() if not 0 <= weight < math.inf]
        if wrong:
            fix = "Use weights of 0 and more."
            raise ConfigError(f"key 'mix.weights': {wrong[0]} is {self.weights[wrong[0]]}", fix=fix)
        if not any(self.weights.values()):
            fix = "Give at least one dataset a positive weight."
            raise ConfigError("key 'mix.weights': no dataset has a positive weight", fix=fix)
        if self.temperature != 1:
            fix = "Set one of the two."
            raise ConfigError("both 'mix.weights' and 'mix.temperature' say how datasets are mixed", fix=fix)


class _Cells(NamedTuple):
    """A partition of the rows into parts that are sampled evenly, each with its share of an epoch (sum 1)."""

    rows: list[Indices]
    shares_K: npt.NDArray[np.float64]


def epoch_rows(columns: Columns, config: MixConfig, *, seed: int, epoch: int) -> Indices:
    """Numbers of the rows of one epoch [M], in no particular order; rows repeat where the mix asks for it.

    Over any number of epochs each dataset (each class, when they are balanced) has its share to within one row an
    epoch. Raises ConfigError for weights that name an unknown dataset, one without rows, or not all that are there.
    """
    rows = np.arange(len(columns), dtype=np.int64)
    if config.subsample is not None:
        rows = subsample(columns, config.subsample, seed=seed)
    if config.temperature == 1 and config.weights is None and not config.class_balanced and config.epoch_size is None:
        return rows
    cells = _cells(columns, rows, config)
    total = len(rows) if config.epoch_size is None else config.epoch_size
    # Where an epoch starts in the round of each cell is what the epochs before took.
    quotas = np.array([_quotas(cells.shares_K, total, seed, before) for before in range(epoch + 1)])
    starts_K, quotas_K = quotas[:-1].sum(0), quotas[-1]
    deals = enumerate(zip(cells.rows, starts_K, quotas_K, strict=True))
    return np.concatenate([_dealt(*deal, seed=[seed, _ORDER, k]) for k, deal in deals])


def subsample(columns: Columns, size: int | float, *, seed: int, by: Sequence[str] = ("dataset", "label")) -> Indices:
    """Row numbers, ascending, of a random sample in which every stratum keeps its share to within one row.

    `size` is a number of rows (int) or a share, 0..1 (float); strata are the combinations of `by`, of dataset, label,
    task and modality. A smaller sample of the same seed is a part of a larger one. Raises InputError for a size that
    is out of range and for an unknown stratum.
    """
    count = round(size * len(columns)) if isinstance(size, float) else size
    if not 1 <= count <= len(columns):
        what = f"a sample of {size} out of {len(columns):,} rows is {count} rows"
        raise InputError(what, fix=f"Ask for 1 to {len(columns):,} rows, or for a share between 0 and 1.")
    rng = np.random.default_rng([seed, _SUBSAMPLE])
    strata_N, sizes = _groups([_codes(columns, name) for name in by], len(columns))
    order = rng.permutation(len(columns))
    order = order[np.argsort(strata_N[order], kind="stable")]  # stratum by stratum, in random order within
    ranks = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    # Each stratum's rows are spread evenly over 0..1, so that whatever is below a limit has every stratum's share.
    position = (ranks + np.repeat(rng.random(len(sizes)), sizes)) / np.repeat(sizes, sizes)
    return np.sort(order[np.argsort(position, kind="stable")[:count]]).astype(np.int64)


def _codes(columns: Columns, name: str) -> npt.NDArray[Any]:
    if name not in _STRATA:
        raise InputError(f"unknown stratum {name!r}", fix=nearest(name, _STRATA))
    codes: npt.NDArray[Any] = getattr(columns, _STRATA[name])
    return codes


def _groups(keys: Sequence[npt.NDArray[Any]], count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The number of each row's group, groups being the combinations of `keys`, and the size of each group."""
    group_N = np.zeros(count, np.int64)
    for key_N in keys:
        codes_N = np.unique(key_N, return_inverse=True)[1]
        group_N = np.unique(group_N * (int(codes_N.max()) + 1) + codes_N, return_inverse=True)[1]
    return group_N, np.bincount(group_N)


def _cells(columns: Columns, rows: Indices, config: MixConfig) -> _Cells:
    dataset_codes_N = columns.dataset_codes[rows]
    present, sizes = np.unique(dataset_codes_N, return_counts=True)
    names = [columns.datasets[code] for code in present]
    evened = np.exp((np.log(sizes) - np.log(sizes.max())) / config.temperature)  # sizes^(1/T) would overflow
    raw = evened if config.weights is None else _weights(config.weights, names)
    shares = dict(zip(present.tolist(), raw / raw.sum(), strict=True))
    keys = [dataset_codes_N, columns.label_codes[rows]] if config.class_balanced else [dataset_codes_N]
    group_N, group_sizes = _groups(keys, len(rows))
    by_group = np.split(rows[np.argsort(group_N, kind="stable")], np.cumsum(group_sizes)[:-1])
    owners = [int(columns.dataset_codes[group[0]]) for group in by_group]
    chosen = [(group, shares[owner] / owners.count(owner)) for group, owner in zip(by_group, owners, strict=True)]
    chosen = [(group, share) for group, share in chosen if share > 0]
    return _Cells([group for group, _ in chosen], np.array([share for _, share in chosen]))


def _weights(weights: dict[str, float], names: Sequence[str]) -> npt.NDArray[np.float64]:
    """The weights of the datasets `names`, which must all have one, and no other."""
    for name in weights:
        if name not in names:
            raise ConfigError(f"key 'mix.weights': there is no row of dataset {name!r}", fix=nearest(name, names))
    missing = [name for name in names if name not in weights]
    if missing:
        fix = "Give every dataset a weight; 0 leaves it out."
        raise ConfigError(f"key 'mix.weights': none for {', '.join(missing)}", fix=fix)
    return np.array([weights[name] for name in names], np.float64)


def _quotas(shares_K: npt.NDArray[np.float64], total: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Rows of each cell in an epoch: share times total, rounded up or down at random, `total` in all."""
    offset = np.random.default_rng([seed, _ROUNDING, epoch]).random()
    edges = np.floor(np.cumsum(shares_K) * total + offset).astype(np.int64)
    edges[-1] = total
    return np.diff(edges, prepend=0)


def _dealt(rows: Indices, start: int, count: int, *, seed: Sequence[int]) -> Indices:
    """`count` of an endless deal of `rows` from position `start` on; each round has its own order."""

    def shuffled(number: int) -> Indices:
        return np.random.default_rng([*seed, number]).permutation(rows)

    number, at = divmod(int(start), len(rows))
    rest = shuffled(number)[at : at + count]
    rounds, left = divmod(int(count) - len(rest), len(rows))
    return np.concatenate([rest, np.tile(rows, rounds), shuffled(number + 1 + rounds)[:left]])
