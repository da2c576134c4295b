"""How far scores move between runs that should be the same: seeds, prompts, or samplings of one model.

Two sources of uncertainty are kept apart, since they shrink by different means. `sd` and `ci95_runs` (Student's t over
the K runs) say what another seed or prompt would give on these rows; `ci95_rows` (the bootstrap of `stats`, with the
same draws of rows for every run) says what other rows would give these runs on average. `agreement` is the share of
rows that all runs answer alike, right or wrong. Refused: fewer than two runs, and rows that are not the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np

from hba.errors import InputError
from hba.evaluate.confusion import Floats, Rows
from hba.evaluate.predictions import Prediction
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
from hba.evaluate.runs import load_run, match, matched_rows


@dataclass(frozen=True, kw_only=True)
class Spread:
    """One task over K runs; None where a score is not defined. `sd` is the sample standard deviation."""

    metric: str
    scores: list[float | None]
    mean: float | None
    sd: float | None
    ci95_runs: Interval | None
    ci95_rows: Interval | None
    agreement: float
    n: int


@dataclass(frozen=True, kw_only=True)
class Variance:
    """`hba compare --seeds`: tasks, and the mean over those that are scored."""

    runs: list[str]
    tasks: dict[str, Spread]
    mean: Spread | None
    num_rows: int
    left_out: list[int]


def run_variance(
    folders: Sequence[Path], *, allow_other_data: bool = False, resamples: int = 2000, seed: int = 0
) -> Variance:
    """Spread of the scores of two or more run folders over the rows that all have answered."""
    if len(folders) < 2:
        raise InputError("one run has no spread", fix="Give two or more runs of the same model.")
    runs = [load_run(folder) for folder in folders]
    matched = match(runs, allow_other_data=allow_other_data)
    rows = matched_rows(runs, matched)
    alike = _alike(matched.predictions)
    clusters = [p.group for p in matched.predictions[0]]
    found = [
        _of_dataset(mine, clusters, rows[0], resamples, seed)
        for mine in zip(*(parts(run) for run in rows), strict=True)
    ]
    tasks = {}
    for task in runs[0].taxonomy.tasks.values():
        mine = [each for each in found if each.part.key in task.datasets]
        if mine:
            tasks[task.key] = _spread(mine, rows[0], alike)
    scored = [each for each in found if each.part.in_task]
    mean = _spread(scored, rows[0], alike) if scored else None
    names = [run.name for run in runs]
    return Variance(runs=names, tasks=tasks, mean=mean, num_rows=len(alike), left_out=matched.left_out)


class _Dataset(NamedTuple):
    """One dataset in every run: real scores [K], resampled mean over the runs [R]."""

    part: Part
    scores_K: Floats
    drawn_R: Floats


def _alike(runs: Sequence[Sequence[Prediction]]) -> Floats:
    same = [len({p.label or (p.answer or "").strip().lower() for p in row}) == 1 for row in zip(*runs, strict=True)]
    return np.array(same, dtype=float)


def _of_dataset(mine: Sequence[Part], clusters: Clusters, rows: Rows, resamples: int, seed: int) -> _Dataset:
    first = mine[0]
    groups_M = groups_of(clusters, first.members_M, rows)
    columns = [(part.cells_M, part.size) for part in mine]
    drawn = resample(columns, groups_M, resamples, rng_of(seed, first.key))
    mean_R = np.mean([part.score(counts) for part, counts in zip(mine, drawn, strict=True)], axis=0)
    real = [part.score(np.bincount(part.cells_M, minlength=part.size)[None])[0] for part in mine]
    return _Dataset(first, np.array(real), mean_R)


def _spread(found: Sequence[_Dataset], rows: Rows, alike_N: Floats) -> Spread:
    drawn_R, scores_K = (
        over_tasks(rows.layout, {each.part.key: getattr(each, name) for each in found})[1]
        for name in ("drawn_R", "scores_K")
    )
    assert drawn_R is not None and scores_K is not None
    scores = [value(scores_K[k : k + 1]) for k in range(len(scores_K))]
    known = [score for score in scores if score is not None]
    members_M = np.concatenate([each.part.members_M for each in found])
    return Spread(
        metric=found[0].part.metric,
        scores=scores,
        mean=fmean(known) if known else None,
        sd=stdev(known) if len(known) > 1 else None,
        ci95_runs=_student(known),
        ci95_rows=interval(drawn_R),
        agreement=float(alike_N[members_M].mean()),
        n=len(members_M),
    )


def _student(scores: Sequence[float]) -> Interval | None:
    """mean +- t_{0.975, K-1} sd / sqrt(K)."""
    if len(scores) < 2:
        return None
    from scipy.special import stdtrit

    half = float(stdtrit(len(scores) - 1, 0.975)) * stdev(scores) / math.sqrt(len(scores))
    return fmean(scores) - half, fmean(scores) + half
