"""Scores of parts of the data: by modality, by language, and by any field of the rows (fairness).

A slice is scored as if it were all there is, with the tasks' own metrics and bootstrap intervals. `gap` is the distance
between the best and the worst slice of a task among those with at least MIN_ROWS rows of it; smaller ones are shown,
and would make a gap of noise. Slices may differ in what is asked of them (datasets, labels), so that a gap is a
question and not yet an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hba.evaluate.confusion import Rows
from hba.evaluate.metrics import score_rows
from hba.evaluate.resample import EXACT_MATCH, Clusters
from hba.evaluate.stats import bootstrap

MIN_ROWS = 20
UNKNOWN = "(not given)"


def breakdown(
    rows: Rows,
    values: Sequence[str | None],
    *,
    clusters: Clusters | None = None,
    resamples: int = 2000,
    seed: int = 0,
    published: bool = False,
) -> dict[str, Any]:
    """{"slices": {value: {n, n_invalid, accuracy, mean, tasks: {key: {score, ci95, n}}}}, "gaps": {task: gap}}.

    `values` [N] gives each row's slice; None is a slice of its own. Scores lie in [0, 1]; accuracy is the share of
    right rows whatever their task.
    """
    found = {}
    named_N = np.array([UNKNOWN if value is None else value for value in values], dtype=object)
    for name in sorted(set(named_N.tolist())):
        members_M = np.flatnonzero(named_N == name)
        part = replace(rows, cells=rows.cells[members_M])
        groups = None if clusters is None else [clusters[i] for i in members_M.tolist()]
        found[name] = _slice(part, groups, resamples=resamples, seed=seed, published=published)
    return {"slices": found, "gaps": _gaps(found)}


def _slice(rows: Rows, clusters: Clusters | None, *, resamples: int, seed: int, published: bool) -> dict[str, Any]:
    scored = score_rows(rows, published)
    intervals = bootstrap(rows, clusters=clusters, resamples=resamples, seed=seed, published=published)
    tasks = {
        key: {
            "score": task["score"],
            "ci95": _as_list(intervals.tasks.get(key)),
            "n": task["n"],
            "metric": task["metric"],
        }
        for key, task in scored["tasks"].items()
    }
    return {
        "n": len(rows.cells),
        "n_invalid": scored["aggregate"]["n_invalid"],
        "accuracy": float(rows.right().mean()),
        "mean": scored["aggregate"]["mean"]["score"],
        "tasks": tasks | _free_form(rows, scored, intervals.datasets),
    }


def _free_form(rows: Rows, scored: dict[str, Any], intervals: dict[str, Any]) -> dict[str, Any]:
    """Free-form tasks of one dataset: share of right answers by the judge, or by exact match where none has spoken."""
    taxonomy = rows.layout.taxonomy
    found = {}
    for key, entry in scored["datasets"].items():
        task = taxonomy.dataset(key).task
        if key in rows.layout.freeform_code and task and entry["n"]:
            metric = taxonomy.tasks[task].metric if key in rows.judged else EXACT_MATCH
            # The cells of a judged dataset hold verdicts, and their share of right ones is what `score_rows` counts.
            figures = {"score": entry[EXACT_MATCH], "ci95": _as_list(intervals.get(key)), "n": entry["n"]}
            found[task] = figures | {"metric": metric}
    return found


def _gaps(found: dict[str, Any]) -> dict[str, float]:
    scores: dict[str, list[float]] = {}
    for entry in found.values():
        for key, task in entry["tasks"].items():
            if task["score"] is not None and task["n"] >= MIN_ROWS:
                scores.setdefault(key, []).append(task["score"])
    return {key: max(values) - min(values) for key, values in scores.items() if len(values) > 1}


def _as_list(ci95: Sequence[float] | None) -> list[float] | None:
    return None if ci95 is None else list(ci95)
