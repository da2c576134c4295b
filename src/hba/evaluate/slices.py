"""Scores of parts of the data: by modality, by language, and by any field of the rows (fairness).

A slice is scored as if it were all there is, with the tasks' own metrics and bootstrap intervals; a task of which too
many rows failed in a slice has no score there. `gap` is the distance between the best and the worst slice of a task
among those with at least MIN_ROWS rows of it; smaller ones are shown, and would make a gap of noise. Slices may differ
in what is asked of them (datasets, labels), so that a gap is a question and not yet an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hba.evaluate.confusion import Rows
from hba.evaluate.metrics import mean_of, score_rows
from hba.evaluate.results import MAX_FAILED
from hba.evaluate.statistics import EXACT_MATCH, Clusters, bootstrap, parts

MIN_ROWS = 20
UNKNOWN = "(not given)"


def breakdown(
    rows: Rows,
    values: Sequence[str | None],
    *,
    failed: Sequence[bool] | None = None,
    clusters: Clusters | None = None,
    resamples: int = 2000,
    seed: int = 0,
    published: bool = False,
) -> dict[str, Any]:
    """{"slices": {value: {n, n_invalid, n_failed, accuracy, mean, tasks: {key: {score, ci95, n}}}}, "gaps": {task: x}}.

    `values` [N] gives each row's slice; None is a slice of its own. `failed` [N] says which rows ended in an error:
    they are wrong, and not among the invalid answers. Scores lie in [0, 1]; accuracy is the share of right rows
    whatever their task. `mean` is over the tasks of the slice that count in the run's own mean.
    """
    found = {}
    named_N = np.array([UNKNOWN if value is None else value for value in values], dtype=object)
    failed_N = np.zeros(len(rows.cells), dtype=bool) if failed is None else np.array(failed, dtype=bool)
    for name in sorted(set(named_N.tolist())):
        members_M = np.flatnonzero(named_N == name)
        part = replace(rows, cells=rows.cells[members_M])
        groups = None if clusters is None else [clusters[i] for i in members_M.tolist()]
        how: dict[str, Any] = {"clusters": groups, "resamples": resamples, "seed": seed, "published": published}
        found[name] = _slice(part, failed_N[members_M], **how)
    return {"slices": found, "gaps": _gaps(found)}


def _slice(rows: Rows, failed_N: np.ndarray[Any, np.dtype[np.bool_]], *, published: bool, **how: Any) -> dict[str, Any]:
    scored = score_rows(rows, published)
    intervals = bootstrap(rows, published=published, **how)
    taxonomy, tasks, counted = rows.layout.taxonomy, {}, []
    over = _over(rows, failed_N, published)
    for task in taxonomy.tasks.values():
        keys = [key for key in task.datasets if scored["datasets"].get(key, {}).get("n")]
        if not keys:
            continue
        n = sum(scored["datasets"][key]["n"] for key in keys)
        metric = task.metric
        if task.key in scored["tasks"]:
            score, ci95, counts = scored["tasks"][task.key]["score"], intervals.tasks.get(task.key), True
        else:
            # The cells of a judged dataset hold verdicts, and their share of right ones is what `score_rows` counts.
            counts = all(key in rows.judged for key in keys)
            metric = metric if counts else EXACT_MATCH
            score = mean_of([scored["datasets"][key][EXACT_MATCH] for key in keys])
            alone = intervals.datasets.get(keys[0]) if len(keys) == 1 else None
            ci95 = intervals.tasks.get(task.key) if counts else alone
        if any(key in over for key in keys):
            score = ci95 = None
        tasks[task.key] = {"score": score, "ci95": ci95 and list(ci95), "n": n, "metric": metric}
        counted += [score] if counts else []
    invalid = scored["aggregate"]["n_invalid"] - int(failed_N.sum())
    few = failed_N.mean() <= MAX_FAILED
    return {
        "n": len(rows.cells),
        "n_invalid": invalid,
        "n_failed": int(failed_N.sum()),
        "accuracy": float(rows.right().mean()) if few else None,
        "mean": mean_of(counted) if few else None,
        "tasks": tasks,
    }


def _over(rows: Rows, failed_N: np.ndarray[Any, np.dtype[np.bool_]], published: bool) -> set[str]:
    """The datasets of which more than MAX_FAILED of the rows failed."""
    return {part.key for part in parts(rows, published) if failed_N[part.members_M].mean() > MAX_FAILED}


def _gaps(found: dict[str, Any]) -> dict[str, float]:
    scores: dict[str, list[float]] = {}
    for entry in found.values():
        for key, task in entry["tasks"].items():
            if task["score"] is not None and task["n"] >= MIN_ROWS:
                scores.setdefault(key, []).append(task["score"])
    return {key: max(values) - min(values) for key, values in scores.items() if len(values) > 1}
