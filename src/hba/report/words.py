"""How figures and names are put into words, the same on the page and in the terminal.

A missing figure is a dash, never a zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hba.taxonomy import TASKS

if TYPE_CHECKING:
    from hba.report.load import TaskScore

DASH = "–"
METRIC_NAMES = {
    "binary_weighted_f1": "weighted F1, 2 classes",
    "mean_weighted_accuracy": "mean weighted accuracy",
    "weighted_f1": "weighted F1",
    "llm_judge_accuracy": "judge accuracy",
    "emotion_weighted_accuracy_mean": "weighted accuracy",
    "macro_f1": "macro F1",
}


def figure(value: float | None, decimals: int = 3) -> str:
    """A figure with fixed decimals."""
    return DASH if value is None else f"{value:.{decimals}f}"


def interval(ci95: tuple[float, float] | None, decimals: int = 3) -> str:
    """An interval as 'low–high'."""
    return DASH if ci95 is None else f"{ci95[0]:.{decimals}f}–{ci95[1]:.{decimals}f}"


def count(value: int | None) -> str:
    """A count with thousands separators."""
    return DASH if value is None else f"{value:,}"


def plural(number: int, noun: str) -> str:
    """'1 sample', '2 samples'."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def metric_name(metric: str) -> str:
    """The metric of metrics.json in words; a metric that is not the paper's keeps its own name."""
    return METRIC_NAMES.get(metric, metric.replace("_", " "))


def task_name(key: str) -> str:
    """The task's name in the taxonomy, empty for a task of the user's own."""
    return TASKS[key].name if key in TASKS else ""


def clusters(provenance: Mapping[str, Any]) -> str:
    """What the intervals took for independent."""
    scoring = provenance.get("scoring")
    if not isinstance(scoring, dict) or "clusters" not in scoring:
        return "intervals as recorded"
    drawn = scoring["clusters"]
    if drawn is None:
        return "rows drawn alone"
    few = f"; few groups in {', '.join(drawn['few'])}" if drawn["few"] else ""
    return f"rows of one {drawn['field']} drawn together ({plural(drawn['groups'], 'group')}{few})"


def not_scored(task: TaskScore) -> str:
    """Why a task has no score."""
    return task.note or "not scored"
