"""Are two runs different? Paired tests over the same rows, corrected for the number of tasks.

A task whose score is an accuracy over one dataset of independent rows is tested exactly (McNemar); every other one by a
paired bootstrap of its own metric, clustered where rows share a group. P-values of the tasks are corrected by Holm.
Refused: rows that are not the same. Invariant: swapping the runs turns the signs and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from hba.errors import InputError
from hba.evaluate.confusion import Floats, Ints, Rows
from hba.evaluate.resample import (
    Clusters,
    Interval,
    Part,
    groups_of,
    interval,
    over_tasks,
    parts,
    resample,
    rng_of,
    value,
)

ACCURACIES = ("exact_match", "llm_judge_accuracy")


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Run b minus run a in one metric; None where a score is not defined. `test` is 'mcnemar' or 'bootstrap'.

    `gained` rows are wrong in a and right in b, `lost` the other way round. `p_holm` is the p-value corrected over the
    tasks; None for a dataset and for the mean.
    """

    metric: str
    a: float | None
    b: float | None
    difference: float | None
    ci95: Interval | None
    p_value: float | None
    test: str
    n: int
    gained: int
    lost: int
    p_holm: float | None = None


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Differences per task, of the mean over scored tasks, and per dataset.

    A task of free-form rows that no judge has seen is compared by exact match and does not enter the mean.
    """

    tasks: Mapping[str, Difference]
    mean: Difference | None
    datasets: Mapping[str, Difference]


def paired_difference(
    a: Rows,
    b: Rows,
    *,
    clusters: Clusters | None = None,
    resamples: int = 2000,
    seed: int = 0,
    published: bool = False,
) -> Paired:
    """Compare two runs over the same rows in the same order; 95 % intervals over `resamples` draws.

    `clusters` gives each row's group key, None for a row of its own. The bootstrap p-value is
    2 min(P(d <= 0), P(d >= 0)) over resamples with one added to both counts, at most 1. Raises InputError when dataset
    or target of a row differ, and as `stats.bootstrap` does.
    """
    _check_same_rows(a, b)
    compared = [
        _compared(of_a, of_b, groups_of(clusters, of_a.members_M, a), resamples, seed)
        for of_a, of_b in zip(parts(a, published), parts(b, published), strict=True)
    ]
    datasets = {each.a.key: _difference([each], a) for each in compared}
    tasks = {}
    for task in a.layout.taxonomy.tasks.values():
        mine = [each for each in compared if each.a.key in task.datasets]
        if mine:
            tasks[task.key] = _difference(mine, a)
    scored = [each for each in compared if each.a.in_task]
    mean = replace(_difference(scored, a), metric="mean over tasks") if scored else None
    return Paired(tasks=_with_holm(tasks), mean=mean, datasets=datasets)


class _Compared(NamedTuple):
    """One dataset in both runs: their scores on the real rows [1], the resampled differences [R]."""

    a: Part
    b: Part
    score_a: Floats
    score_b: Floats
    drawn_R: Floats
    independent: bool


def _compared(a: Part, b: Part, groups_M: Ints | None, resamples: int, seed: int) -> _Compared:
    # Types of rows are drawn in the order of their cells: the same order of the two runs, whichever is called a.
    cells_a, cells_b = a.cells_M.tolist(), b.cells_M.tolist()
    turned = sorted(zip(cells_a, cells_b, strict=True)) > sorted(zip(cells_b, cells_a, strict=True))
    pair = [b, a] if turned else [a, b]
    drawn = resample([(part.cells_M, part.size) for part in pair], groups_M, resamples, rng_of(seed, a.key))
    counts_a, counts_b = reversed(drawn) if turned else drawn
    real_a, real_b = (part.score(np.bincount(part.cells_M, minlength=part.size)[None]) for part in (a, b))
    return _Compared(a, b, real_a, real_b, b.score(counts_b) - a.score(counts_a), groups_M is None)


def _difference(found: Sequence[_Compared], rows: Rows) -> Difference:
    """One line of the comparison, of the datasets `found`: a dataset, a task or the mean over tasks."""

    def mean(name: str) -> Floats:
        # A dataset that is of no task stands for itself.
        scores = over_tasks(rows.layout, {each.a.key: getattr(each, name) for each in found})[1]
        return getattr(found[0], name) if scores is None else scores

    first, drawn_R = found[0], mean("drawn_R")
    score_a, score_b = value(mean("score_a")), value(mean("score_b"))
    gained = sum(int((~each.a.right_M & each.b.right_M).sum()) for each in found)
    lost = sum(int((each.a.right_M & ~each.b.right_M).sum()) for each in found)
    exact = len(found) == 1 and first.independent and first.a.metric in ACCURACIES
    known_R = drawn_R[~np.isnan(drawn_R)]
    defined = score_a is not None and score_b is not None and known_R.size > 0
    p_value = (mcnemar(gained, lost) if exact else _bootstrap_p(known_R)) if defined else None
    return Difference(
        metric=first.a.metric,
        a=score_a,
        b=score_b,
        difference=score_b - score_a if score_a is not None and score_b is not None else None,
        ci95=interval(drawn_R) if defined else None,
        p_value=p_value,
        test="mcnemar" if exact else "bootstrap",
        n=sum(len(each.a.members_M) for each in found),
        gained=gained,
        lost=lost,
    )


def _bootstrap_p(drawn_R: Floats) -> float:
    below, above = int((drawn_R <= 0).sum()) + 1, int((drawn_R >= 0).sum()) + 1
    return min(1.0, 2 * min(below, above) / (drawn_R.size + 1))


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided McNemar p-value of the rows that changed sides: 2 P(X <= min) for X ~ Bin(n, 1/2), at most 1."""
    changed, fewer = gained + lost, min(gained, lost)
    at_1 = math.lgamma(changed + 1) - changed * math.log(2)
    tail = math.fsum(math.exp(at_1 - math.lgamma(k + 1) - math.lgamma(changed - k + 1)) for k in range(fewer + 1))
    return min(1.0, 2 * tail)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the j-th smallest of m is multiplied by m - j + 1, made monotone, at most 1."""
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def _with_holm(tasks: dict[str, Difference]) -> dict[str, Difference]:
    tested = {key: found.p_value for key, found in tasks.items() if found.p_value is not None}
    corrected = dict(zip(tested, holm(list(tested.values())), strict=True))
    return {key: replace(found, p_holm=corrected.get(key)) for key, found in tasks.items()}


def _check_same_rows(a: Rows, b: Rows) -> None:
    guesses = a.layout.num_classes + 1
    same = a.layout is b.layout and len(a.cells) == len(b.cells) and a.judged == b.judged
    if same:
        start, size = a.layout.freeform_start, a.layout.size
        other = [np.where(r.cells < size, -1 - (r.cells - start) // 3, -size) for r in (a, b)]
        truth = [np.where(r.cells < start, r.cells // guesses, x) for r, x in zip((a, b), other, strict=True)]
        same = bool((truth[0] == truth[1]).all()) and _true_sets(a) == _true_sets(b)
    if not same:
        fix = "Match the two runs by id first and keep the rows that both have."
        raise InputError("the two runs do not hold the same rows in the same order", fix=fix)


def _true_sets(rows: Rows) -> list[tuple[str, str]]:
    """Dataset and true labels of every multilabel row."""
    pairs = (rows.pairs[cell - rows.layout.size] for cell in rows.cells[rows.cells >= rows.layout.size].tolist())
    return [(pair.dataset, pair.true) for pair in pairs]
