"""How sure a score is, and what guessing reaches: bootstrap intervals and chance levels.

Limits: a percentile interval of a handful of rows, or of a handful of groups, is too narrow; a free-form dataset has
the interval of its exact match until a judge has spoken. Shape suffixes as in `resample`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hba.evaluate.confusion import Floats, Rows
from hba.evaluate.resample import (
    LEVEL,
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

__all__ = ["LEVEL", "Chance", "Intervals", "bootstrap", "chance"]

CHANCE_RESAMPLES = 1000


class Intervals(NamedTuple):
    """95 % intervals: per task, of the mean over tasks, and per dataset; None where nothing could be scored."""

    tasks: dict[str, Interval | None]
    mean: Interval | None
    datasets: dict[str, Interval | None]


class Chance(NamedTuple):
    """What can be reached without looking: per task, the mean over tasks, and per dataset."""

    tasks: dict[str, float | None]
    mean: float | None
    datasets: dict[str, float | None]


def bootstrap(
    rows: Rows,
    *,
    clusters: Clusters | None = None,
    resamples: int = 2000,
    seed: int = 0,
    published: bool = False,
) -> Intervals:
    """95 % percentile intervals of every task score and of their mean, `resamples` draws.

    `published` scores as the released scripts do; `clusters` gives each row's group key or None (a group of
    its own). Raises InputError for a wrong length or fewer than 100 resamples.
    """
    scores, found = {}, parts(rows, published)
    for part in found:
        groups_M = groups_of(clusters, part.members_M, rows)
        (counts,) = resample([(part.cells_M, part.size)], groups_M, resamples, rng_of(seed, part.key))
        scores[part.key] = part.score(counts)
    tasks, mean = over_tasks(rows.layout, _of_tasks(found, scores))
    return Intervals(
        {key: interval(values) for key, values in tasks.items()},
        None if mean is None else interval(mean),
        {key: interval(values) for key, values in scores.items()},
    )


def chance(rows: Rows, *, resamples: int = CHANCE_RESAMPLES, seed: int = 0, published: bool = False) -> Chance:
    """The chance level of each dataset's task metric on these very targets; a task's is the mean of its datasets'.

    Of a dataset, the larger of (a) the expected score of answers drawn at random from the dataset's own label
    frequencies, independent of the row (mean of `resamples` simulations), and (b) the best score that one
    constant answer reaches (for weighted F1 the majority label; for mean weighted accuracy every label
    reaches 0.5). Free-form datasets have none here: cells do not hold their targets.
    """
    levels: dict[str, Floats] = {}
    for part in parts(rows, published):
        if part.key in rows.layout.multilabel:
            counts_T = np.bincount(part.cells_M, minlength=part.size)
            levels[part.key] = np.array([rows.multilabel(part.key)[2].blind(counts_T)])
        if part.key not in rows.layout.code:
            continue
        guesses = len(rows.layout.indices[rows.layout.code[part.key]]) + 1
        support_K = np.bincount(part.cells_M // guesses, minlength=guesses - 1)
        constant = np.zeros((guesses - 1, guesses - 1, guesses), dtype=np.int64)
        for label in range(guesses - 1):
            constant[label, :, label] = support_K
        random = np.zeros((resamples, guesses - 1, guesses), dtype=np.int64)
        rng = rng_of(seed, part.key)
        for label, count in enumerate(support_K):
            random[:, label, :-1] = rng.multinomial(count, support_K / support_K.sum(), size=resamples)
        blind = part.score(constant).max(keepdims=True), part.score(random).mean(keepdims=True)
        levels[part.key] = np.maximum(*blind)
    tasks, mean = over_tasks(rows.layout, levels)
    return Chance(
        {key: value(level) for key, level in tasks.items()},
        None if mean is None else value(mean),
        {key: value(level) for key, level in levels.items()},
    )


def _of_tasks(found: Sequence[Part], scores: dict[str, Floats]) -> dict[str, Floats]:
    return {part.key: scores[part.key] for part in found if part.in_task}
