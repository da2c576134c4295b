"""Cells to resampled scores: what intervals and paired tests have in common.

Rows are resampled within their dataset (stratified), so that every resample has the datasets' own sizes. Rows that
share a group (a speaker, a video) are drawn together. Both are exact and never touch single rows: rows, or groups, with
equal counts are one type, the number of draws of each type is multinomial, and the metric is computed from the
resampled counts of all resamples at once.

Limits: groups are drawn per dataset, so that a speaker who occurs in two datasets is taken for two. Invariant: the same
rows and seed give the same numbers, and one dataset's draws do not depend on the others. Shape suffixes: M rows of one
dataset, R resamples, E cells, T types, K classes of a domain.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hba.errors import InputError
from hba.evaluate.confusion import RIGHT, Floats, Ints, Layout, Rows
from hba.evaluate.metrics import primary
from hba.evaluate.multilabel import METRIC as MULTILABEL

LEVEL = 0.95
EXACT_MATCH = "exact_match"
_DRAWS_AT_ONCE = 4_000_000

Interval = tuple[float, float]
Score = Callable[[Ints], Floats]
Clusters = Sequence[str | None]


class Part(NamedTuple):
    """One dataset's rows as cells in [0, size), with the score of counts [..., size] -> [...]."""

    key: str
    metric: str
    members_M: Ints
    cells_M: Ints
    right_M: npt.NDArray[np.bool_]
    size: int
    score: Score
    in_task: bool
    """whether the score is the one of the dataset's task: not for free-form rows that no judge has seen"""


def parts(rows: Rows, published: bool = False) -> list[Part]:
    """The datasets with rows and with a score: those of a task, by its metric, and free-form ones by exact match."""
    return [*_classified(rows, published), *_free_form(rows), *_multilabel(rows)]


def _classified(rows: Rows, published: bool) -> list[Part]:
    layout, found = rows.layout, []
    for code in rows.scored_codes():
        key = layout.classified[code]
        task = layout.taxonomy.dataset(key).task
        if task is None or layout.taxonomy.tasks[task].judged:
            continue
        metric, classes = layout.taxonomy.tasks[task].metric, len(layout.indices[code])
        members_M = rows.members(code)
        cells_M = rows.local_cells(code, members_M)
        right_M = cells_M // (classes + 1) == cells_M % (classes + 1)
        score = partial(_of_confusion, classes=classes, score=primary(metric, published))
        found.append(Part(key, metric, members_M, cells_M, right_M, classes * (classes + 1), score, True))
    return found


def _of_confusion(counts: Ints, *, classes: int, score: Score) -> Floats:
    return score(counts.reshape(-1, classes, classes + 1))


def _free_form(rows: Rows) -> list[Part]:
    layout, found = rows.layout, []
    for number, key in enumerate(layout.freeform):
        start = layout.freeform_start + 3 * number
        members_M = np.flatnonzero((rows.cells >= start) & (rows.cells < start + 3))
        if len(members_M):
            task = layout.taxonomy.dataset(key).task
            judged = key in rows.judged and task is not None
            metric = layout.taxonomy.tasks[task].metric if judged and task else EXACT_MATCH
            cells_M = rows.cells[members_M] - start
            found.append(Part(key, metric, members_M, cells_M, cells_M == RIGHT, 3, _share_right, judged))
    return found


def _multilabel(rows: Rows) -> list[Part]:
    found = []
    for key in rows.multilabel_keys():
        members_M, cells_M, table = rows.multilabel(key)
        size = len(table.equal_T)
        score, right_M = table.macro_f1, table.equal_T[cells_M]
        found.append(Part(key, MULTILABEL, members_M, cells_M, right_M, size, score, True))
    return found


def _share_right(counts: Ints) -> Floats:
    share: Floats = counts[..., RIGHT] / counts.sum(-1)
    return share


def rng_of(seed: int, key: str) -> np.random.Generator:
    """The generator of one dataset's draws."""
    return np.random.default_rng([seed, zlib.crc32(key.encode())])


def groups_of(clusters: Clusters | None, members_M: Ints, rows: Rows) -> Ints | None:
    """Group number of each row [M], or None when every row stands alone. Raises InputError for a wrong length."""
    if clusters is None:
        return None
    if len(clusters) != len(rows.cells):
        raise InputError(f"{len(clusters)} group keys for {len(rows.cells)} rows", fix="Give one key or None a row.")
    numbers: dict[Any, int] = {}
    keys = ((row, None) if clusters[row] is None else clusters[row] for row in members_M.tolist())
    groups = np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)
    return groups if len(numbers) < len(groups) else None


def resample(
    columns: Sequence[tuple[Ints, int]], groups_M: Ints | None, resamples: int, rng: np.random.Generator
) -> list[Ints]:
    """Resampled counts [R, E] of each column (cells [M], E) over the same draws of rows, or of groups of rows.

    As many rows (groups) are drawn as there are, with replacement. Raises InputError for fewer than 100 resamples.
    """
    if resamples < 100:
        raise InputError(f"{resamples} resamples give no interval", fix="Use 100 or more; 2000 is usual.")
    counts_TE, frequency_T = _row_types(columns) if groups_M is None else _group_types(columns, groups_M)
    total = int(frequency_T.sum())
    block = max(1, _DRAWS_AT_ONCE // len(frequency_T))
    drawn = []
    for start in range(0, resamples, block):
        draws = rng.multinomial(total, frequency_T / total, size=min(block, resamples - start))
        # Counts are far below 2**53, and the float product is much faster than the integer one.
        drawn.append((draws.astype(float) @ counts_TE.astype(float)).round().astype(np.int64))
    edges = np.cumsum([size for _, size in columns])[:-1]
    return np.split(np.concatenate(drawn), edges, axis=1)


def _row_types(columns: Sequence[tuple[Ints, int]]) -> tuple[Ints, Ints]:
    """The distinct rows as counts [T, sum E] of one cell a column, and how many rows are each, [T]."""
    joint_M = np.zeros_like(columns[0][0])
    for cells_M, size in columns:
        joint_M = joint_M * size + cells_M
    _, first_T, frequency_T = np.unique(joint_M, return_index=True, return_counts=True)
    counts_TE = np.zeros((len(first_T), sum(size for _, size in columns)), dtype=np.int64)
    start = 0
    for cells_M, size in columns:
        counts_TE[np.arange(len(first_T)), start + cells_M[first_T]] = 1
        start += size
    return counts_TE, frequency_T


def _group_types(columns: Sequence[tuple[Ints, int]], groups_M: Ints) -> tuple[Ints, Ints]:
    """The distinct counts [T, sum E] of the groups and how many groups have each, [T]."""
    counts_GE = np.zeros((int(groups_M.max()) + 1, sum(size for _, size in columns)), dtype=np.int64)
    start = 0
    for cells_M, size in columns:
        np.add.at(counts_GE, (groups_M, start + cells_M), 1)
        start += size
    types_TE, frequency_T = np.unique(counts_GE, axis=0, return_counts=True)
    return types_TE, frequency_T


def over_tasks(layout: Layout, scores: Mapping[str, Floats]) -> tuple[dict[str, Floats], Floats | None]:
    """Task scores [R] as the mean of their datasets', and the mean over tasks [R] (None without a task).

    A dataset that is undefined in a resample (NaN) is left out of that resample's mean.
    """
    tasks = {}
    for task in layout.taxonomy.tasks.values():
        found = [scores[key] for key in task.datasets if key in scores]
        if found:
            tasks[task.key] = _nan_mean(found)
    return tasks, _nan_mean(list(tasks.values())) if tasks else None


def _nan_mean(scores: Sequence[Floats]) -> Floats:
    stacked = np.stack(scores)
    known = ~np.isnan(stacked)
    count = known.sum(0)
    total = np.where(known, stacked, 0.0).sum(0)
    mean: Floats = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return mean


def interval(values_R: Floats) -> Interval | None:
    """The 95 % percentile interval of resampled values; NaN are left out, None without any."""
    known = values_R[~np.isnan(values_R)]
    if not known.size:
        return None
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def value(values: Floats) -> float | None:
    """The first of `values`, None for NaN."""
    return None if np.isnan(values[0]) else float(values[0])
