"""Which samples meet in which batch: a pure function of (seed, epoch).

Every batch holds samples of one modality signature and of similar length, so that little of it is padding and every
rank runs the same towers. Nothing is decoded to plan: lengths are estimated from the rows. Every sample occurs exactly
once an epoch; a run that resumes at batch k of an epoch sees exactly the batches that it had not seen.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hba.errors import ConfigError

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


def padding_share(batches: list[Indices], lengths_N: npt.NDArray[np.integer]) -> float:
    """Share of a plan's token slots that would be padding, 0..1."""
    used = sum(int(lengths_N[b].sum()) for b in batches)
    slots = sum(int(lengths_N[b].max()) * len(b) for b in batches)
    return 1.0 - used / slots if slots else 0.0
