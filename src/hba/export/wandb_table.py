"""`hba export wandb`: a scored run as tables of Weights & Biases: tasks, datasets, and the predictions on request.

Figures are those of metrics.json, unrounded; what is not scored is empty and never 0. The run's origin (model, data,
whether it is synthetic) is in the W&B run's config.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from hba.errors import InputError
from hba.evaluate.results import Metrics
from hba.evaluate.runs import open_run
from hba.run import wandb_run

ORIGIN = ("model", "backend", "split", "data_fingerprint", "synthetic", "seed", "hba_version", "answers_sha256")
TASK_COLUMNS = (
    *("task", "name", "metric", "score", "low", "high", "chance"),
    *("n", "n_asked", "n_invalid", "n_failed", "n_quarantined"),
)
PREDICTION_COLUMNS = ("id", "dataset", "target", "answer", "label", "error", "modality", "group")


class Table(NamedTuple):
    """Rows under named columns."""

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]


def tables_of(run: Path, *, predictions: bool = False) -> dict[str, Table]:
    """The tables of a scored run folder by name. Raises InputError for an unscored or malformed one."""
    opened = open_run(run)
    metrics = opened.metrics
    found = {"tasks": _tasks(metrics), "datasets": _datasets(metrics)}
    if predictions:
        rows = [tuple(getattr(p, name) for name in PREDICTION_COLUMNS) for p in opened.predictions]
        found["predictions"] = Table(PREDICTION_COLUMNS, rows)
    return found


def log_tables(run: Path, *, project: str, offline: bool = False, predictions: bool = False) -> str:
    """Log the tables of a run to its W&B run, that of its training if it has one; return where it can be seen, or its
    folder when offline.

    Raises InputError when wandb is not installed.
    """
    tables = tables_of(run, predictions=predictions)
    provenance = open_run(run).metrics.provenance
    try:
        import wandb
    except ImportError:
        raise InputError("wandb is not installed", fix="pip install 'human-behavior-atlas[wandb]'") from None
    config = {name: getattr(provenance, name) for name in ORIGIN}
    options: dict[str, Any] = {"mode": "offline" if offline else None, "dir": str(run)}
    board = wandb.init(project=project, resume="allow", config=config, **options, **wandb_run(run))
    board.log(
        {name: wandb.Table(columns=list(t.columns), data=[list(row) for row in t.rows]) for name, t in tables.items()}
    )
    board.summary.update({f"score/{row[0]}": row[3] for row in tables["tasks"].rows if row[3] is not None})
    place = str(board.dir if offline else board.url)
    board.finish()
    return place


def _tasks(metrics: Metrics) -> Table:
    rows: list[tuple[Any, ...]] = []
    for key, task in metrics.tasks.items():
        low, high = task.ci95 or (None, None)
        counts = (task.n, task.n_asked, task.n_invalid, task.n_failed, task.n_quarantined)
        rows.append((key, task.title, task.metric, task.score, low, high, task.chance, *counts))
    low, high = metrics.mean.ci95 or (None, None)
    total = metrics.aggregate
    totals = (total.n, total.n_asked, total.n_invalid, total.n_failed, total.n_quarantined)
    rows.append(("mean", "mean over tasks", "mean", metrics.mean.score, low, high, None, *totals))
    return Table(TASK_COLUMNS, rows)


def _datasets(metrics: Metrics) -> Table:
    rows = [
        (key, name, value)
        for key, entry in metrics.record()["datasets"].items()
        for name, value in entry.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    ]
    return Table(("dataset", "figure", "value"), rows)
