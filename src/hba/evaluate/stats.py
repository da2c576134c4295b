"""How sure a score is: bootstrap intervals, paired differences of two runs, chance levels.

Rows are resampled within their dataset (stratified), so that every resample has the datasets' own sizes. Rows
that share a group (a speaker, a video) are drawn together. Both are exact and never touch single rows:
clusters with equal confusion counts are one type, the number of draws of each type is multinomial, and the
metric is computed from the resampled counts of all resamples at once.

Limits: groups are drawn per dataset, so that a speaker who occurs in two datasets is taken for two; a
percentile interval of a handful of rows is too narrow; a free-form task has no interval without a judge.
Invariant: the same rows and seed give the same numbers, and one dataset's draws do not depend on the others.
Shape suffixes: M rows of one dataset, R resamples, E cells, K classes of a domain.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hba.errors import InputError
from hba.evaluate.confusion import Floats, Ints, Layout, Rows
from hba.evaluate.metrics import primary

LEVEL = 0.95
CHANCE_RESAMPLES = 1000
_DRAWS_AT_ONCE = 4_000_000

Interval = tuple[float, float]
Score = Callable[[Ints], Floats]


class Intervals(NamedTuple):
    """95 % intervals: per task, of the mean over tasks, and per dataset; None where nothing could be scored."""

    tasks: dict[str, Interval | None]
    mean: Interval | None
    datasets: dict[str, Interval | None]


class Difference(NamedTuple):
    """b minus a: the point estimate, its 95 % interval and the two-sided bootstrap p-value; None if undefined."""

    difference: float | None
    ci95: Interval | None
    p_value: float | None


class Chance(NamedTuple):
    """What can be reached without looking: per task, the mean over tasks, and per dataset."""

    tasks: dict[str, float | None]
    mean: float | None
    datasets: dict[str, float | None]


def bootstrap(
    rows: Rows,
    *,
    clusters: Sequence[str | None] | None = None,
    resamples: int = 2000,
    seed: int = 0,
    published: bool = False,
) -> Intervals:
    """95 % percentile intervals of every task score and of their mean, `resamples` draws.

    `published` scores as the released scripts do; `clusters` gives each row's group key or None (a group of
    its own). Raises InputError for a wrong length or fewer than 100 resamples.
    """
    scores = {}
    for code, score in _scored(rows, published):
        members_M, cells_M = _cells(rows, code)
        key, groups = rows.layout.classified[code], _groups(clusters, members_M, rows)
        counts = _resample(cells_M, _size(rows.layout, code), groups, resamples, _rng(seed, key))
        scores[key] = score(_as_confusion(rows.layout, code, counts))
    tasks, mean = _over_tasks(rows.layout, scores)
    return Intervals(
        {key: _interval(values) for key, values in tasks.items()},
        None if mean is None else _interval(mean),
        {key: _interval(values) for key, values in scores.items()},
    )


def paired_difference(
    a: Rows,
    b: Rows,
    *,
    clusters: Sequence[str | None] | None = None,
    resamples: int = 2000,
    seed: int = 0,
    published: bool = False,
) -> dict[str, Difference]:
    """Score of `b` minus score of `a` per task, and "mean": a paired bootstrap over the same rows.

    Both runs must hold the same rows in the same order (dataset and target are compared; InputError
    otherwise). The p-value is 2 min(P(d <= 0), P(d >= 0)) over resamples with one added to both counts, at
    most 1.
    """
    _check_paired(a, b)
    drawn: dict[str, Floats] = {}
    point: dict[str, Floats] = {}
    for code, score in _scored(a, published):
        layout, key = a.layout, a.layout.classified[code]
        members_M, cells_a = _cells(a, code)
        guesses = len(layout.indices[code]) + 1
        size = _size(layout, code)
        pairs_M = cells_a * guesses + b.local_cells(code, members_M) % guesses
        draws = _resample(pairs_M, size * guesses, _groups(clusters, members_M, a), resamples, _rng(seed, key))
        real = np.bincount(pairs_M, minlength=size * guesses)[None]
        drawn[key], point[key] = (
            score(_margin(x, layout, code, 1)) - score(_margin(x, layout, code, 0)) for x in (draws, real)
        )
    tasks, mean = _over_tasks(a.layout, drawn)
    points, point_mean = _over_tasks(a.layout, point)
    result = {key: _difference(points[key], tasks[key]) for key in tasks}
    if mean is not None and point_mean is not None:
        result["mean"] = _difference(point_mean, mean)
    return result


def chance(rows: Rows, *, resamples: int = CHANCE_RESAMPLES, seed: int = 0, published: bool = False) -> Chance:
    """The chance level of each dataset's task metric on these very targets; a task's is the mean of its datasets'.

    Of a dataset, the larger of (a) the expected score of answers drawn at random from the dataset's own label
    frequencies, independent of the row (mean of `resamples` simulations), and (b) the best score that one
    constant answer reaches (for weighted F1 the majority label; for mean weighted accuracy every label
    reaches 0.5).
    """
    levels: dict[str, Floats] = {}
    for code, score in _scored(rows, published):
        key = rows.layout.classified[code]
        guesses = len(rows.layout.indices[code]) + 1
        support_K = np.bincount(_cells(rows, code)[1] // guesses, minlength=guesses - 1)
        constant = np.zeros((guesses - 1, guesses - 1, guesses), dtype=np.int64)
        for label in range(guesses - 1):
            constant[label, :, label] = support_K
        random = np.zeros((resamples, guesses - 1, guesses), dtype=np.int64)
        rng = _rng(seed, key)
        for label, count in enumerate(support_K):
            random[:, label, :-1] = rng.multinomial(count, support_K / support_K.sum(), size=resamples)
        levels[key] = np.maximum(score(constant).max(keepdims=True), score(random).mean(keepdims=True))
    tasks, mean = _over_tasks(rows.layout, levels)
    return Chance(
        {key: _value(level) for key, level in tasks.items()},
        None if mean is None else _value(mean),
        {key: _value(level) for key, level in levels.items()},
    )


def _scored(rows: Rows, published: bool) -> list[tuple[int, Score]]:
    """The datasets with rows whose task has a metric that needs no judge."""
    taxonomy = rows.layout.taxonomy
    found = []
    for code in rows.scored_codes():
        task = taxonomy.dataset(rows.layout.classified[code]).task
        if task is not None and not taxonomy.tasks[task].judged:
            found.append((code, primary(taxonomy.tasks[task].metric, published)))
    return found


def _rng(seed: int, key: str) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(key.encode())])


def _cells(rows: Rows, code: int) -> tuple[Ints, Ints]:
    members_M = rows.members(code)
    return members_M, rows.local_cells(code, members_M)


def _size(layout: Layout, code: int) -> int:
    classes = len(layout.indices[code])
    return classes * (classes + 1)


def _as_confusion(layout: Layout, code: int, counts_RE: Ints) -> Ints:
    classes = len(layout.indices[code])
    return counts_RE.reshape(-1, classes, classes + 1)


def _margin(pairs: Ints, layout: Layout, code: int, keep: int) -> Ints:
    """Confusions [R, K, K + 1] of run a (keep 0) or run b (keep 1) from joint counts."""
    classes = len(layout.indices[code])
    joint = pairs.reshape(-1, classes, classes + 1, classes + 1)
    margin: Ints = joint.sum(2 if keep else 3)
    return margin


def _groups(clusters: Sequence[str | None] | None, members_M: Ints, rows: Rows) -> Ints | None:
    """Group number of each row, or None when every row stands alone."""
    if clusters is None:
        return None
    if len(clusters) != len(rows.cells):
        raise InputError(f"{len(clusters)} group keys for {len(rows.cells)} rows", fix="Give one key or None a row.")
    numbers: dict[Any, int] = {}
    keys = ((row, None) if clusters[row] is None else clusters[row] for row in members_M.tolist())
    groups = np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)
    return groups if len(numbers) < len(groups) else None


def _resample(cells_M: Ints, size: int, groups_M: Ints | None, resamples: int, rng: np.random.Generator) -> Ints:
    """Resampled counts [R, E]: as many clusters as there are, drawn with replacement."""
    if resamples < 100:
        raise InputError(f"{resamples} resamples give no interval", fix="Use 100 or more; 2000 is usual.")
    if groups_M is None:
        counts_E = np.bincount(cells_M, minlength=size)
        drawn = np.zeros((resamples, size), dtype=np.int64)
        used = np.flatnonzero(counts_E)  # most cells are empty and would cost a draw each
        drawn[:, used] = rng.multinomial(len(cells_M), counts_E[used] / len(cells_M), size=resamples)
        return drawn
    types_TE, frequency_T = _cluster_types(cells_M, size, groups_M)
    total = int(frequency_T.sum())
    block = max(1, _DRAWS_AT_ONCE // len(frequency_T))
    parts = []
    for start in range(0, resamples, block):
        draws = rng.multinomial(total, frequency_T / total, size=min(block, resamples - start))
        # Counts are far below 2**53, and the float product is much faster than the integer one.
        parts.append((draws.astype(float) @ types_TE.astype(float)).round().astype(np.int64))
    return np.concatenate(parts)


def _cluster_types(cells_M: Ints, size: int, groups_M: Ints) -> tuple[Ints, Ints]:
    """The distinct count vectors [T, E] of the clusters and how many clusters have each, [T]."""
    per_cluster = np.zeros((int(groups_M.max()) + 1, size), dtype=np.int64)
    np.add.at(per_cluster, (groups_M, cells_M), 1)
    types, frequency = np.unique(per_cluster, axis=0, return_counts=True)
    return types, frequency


def _over_tasks(layout: Layout, scores: Mapping[str, Floats]) -> tuple[dict[str, Floats], Floats | None]:
    """Task scores [R] as the mean of their datasets', and the mean over tasks [R] (None without a task).

    A dataset that is undefined in a resample (NaN) is left out of that resample's mean.
    """
    tasks = {}
    for task in layout.taxonomy.tasks.values():
        parts = [scores[key] for key in task.datasets if key in scores]
        if parts:
            tasks[task.key] = _nan_mean(parts)
    return tasks, _nan_mean(list(tasks.values())) if tasks else None


def _nan_mean(parts: Sequence[Floats]) -> Floats:
    stacked = np.stack(parts)
    known = ~np.isnan(stacked)
    count = known.sum(0)
    total = np.where(known, stacked, 0.0).sum(0)
    mean: Floats = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return mean


def _interval(values_R: Floats) -> Interval | None:
    known = values_R[~np.isnan(values_R)]
    if not known.size:
        return None
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _value(values: Floats) -> float | None:
    return None if np.isnan(values[0]) else float(values[0])


def _difference(point: Floats, drawn_R: Floats) -> Difference:
    known = drawn_R[~np.isnan(drawn_R)]
    if np.isnan(point[0]) or not known.size:
        return Difference(None, None, None)
    below, above = int((known <= 0).sum()) + 1, int((known >= 0).sum()) + 1
    return Difference(float(point[0]), _interval(drawn_R), min(1.0, 2 * min(below, above) / (known.size + 1)))


def _check_paired(a: Rows, b: Rows) -> None:
    guesses = a.layout.num_classes + 1
    same = a.layout is b.layout and len(a.cells) == len(b.cells)
    if same:
        start = a.layout.freeform_start
        truth = [np.where(r.cells < start, r.cells // guesses, -1 - (r.cells - start) // 3) for r in (a, b)]
        same = bool((truth[0] == truth[1]).all())
    if not same:
        fix = "Match the two runs by id first and keep the rows that both have."
        raise InputError("the two runs do not hold the same rows in the same order", fix=fix)
