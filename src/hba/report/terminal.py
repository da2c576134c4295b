"""The score table for the terminal: the summary of the page as a rich table.

A task that was not scored says so, with the reason; no figure is made up. Every text from data is printed as it is,
never read as rich markup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from hba.report import words
from hba.report.load import Score, TaskScore, parse_metrics
from hba.report.words import count, figure, interval, not_scored, task_name

CHANCE_STYLES = {True: "green", False: "yellow", None: ""}


def metrics_table(metrics: Mapping[str, Any]) -> Table:
    """The tasks of a metrics.json as a table, with the mean over tasks last. A score is in [0, 1].

    Raises InputError naming the field when `metrics` is not of the shape of metrics.json.
    """
    parsed = parse_metrics(dict(metrics), where="metrics.json")
    synthetic = parsed.provenance.get("synthetic") is True
    title = ("Scores on synthetic data" if synthetic else "Scores") + f"; {words.clusters(parsed.provenance)}"
    # 80 columns hold a task's name and its figures; the metrics' names are in the page and in metrics.json.
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("task", overflow="fold")
    for name in ("score", "95% interval", "chance", "n", "invalid", "left out"):
        table.add_column(name, justify="right", no_wrap=True)
    for key, task in parsed.tasks.items():
        reason = "" if task.score is not None else f", {not_scored(task)}"
        table.add_row(Text(f"{key:4} {task_name(key)}{reason}"), *_figures(task))
    table.add_section()
    mean, counts = parsed.mean, parsed.counts
    totals = [count(counts.get(name)) for name in ("n", "n_invalid", "n_quarantined")]
    if parsed.calibration:
        found = parsed.calibration.all
        table.caption = f"expected calibration error {figure(found.ece)} over {count(found.n)} probabilities"
        table.caption_justify = "left"
    table.add_row(Text("mean over scored tasks", style="bold"), *_score(mean, "bold"), "", *totals)
    return table


def breakdown_tables(metrics: Mapping[str, Any]) -> list[Table]:
    """A table a breakdown of a metrics.json: one row a slice, one column a task."""
    parsed = parse_metrics(dict(metrics), where="metrics.json")
    tables = []
    for field, breakdown in parsed.breakdowns.items():
        keys = [key for key in parsed.tasks if key in breakdown.tasks]
        table = _plain_table(f"By {field}", (field, "n", "right", *keys))
        for name, part in breakdown.slices.items():
            scores = (figure(part.tasks[key].score, 2) if key in part.tasks else words.DASH for key in keys)
            table.add_row(*map(Text, (name, count(part.n), figure(part.accuracy, 2), *scores)))
        tables.append(table)
    return tables


def unmapped_table(metrics: Mapping[str, Any]) -> Table | None:
    """The answers that mean no label, by dataset, with the most frequent ones; None where every answer means one."""
    entries = metrics["aggregate"].get("unmapped") or {}
    if not entries:
        return None
    table = Table(title="Answers that mean no label, and count as wrong", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("dataset")
    table.add_column("n", justify="right")
    table.add_column("share", justify="right")
    table.add_column("most frequent", overflow="fold")
    for key, entry in entries.items():
        said = "  ".join(f"{each['answer']!r} ({each['n']:,})" for each in entry["answers"][:3])
        table.add_row(*map(Text, (key, count(entry["n"]), f"{entry['share']:.0%}", said)))
    return table


def _plain_table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(Text(columns[0]), overflow="fold")
    for name in columns[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _figures(task: TaskScore) -> list[Text]:
    counts = [count(value) for value in (task.n, task.n_invalid, task.n_quarantined)]
    return [*_score(task, CHANCE_STYLES[task.above_chance]), *map(Text, (figure(task.chance), *counts))]


def _score(score: Score, style: str) -> list[Text]:
    return [Text(figure(score.score), style=style), Text(interval(score.ci95))]
