"""The score table for the terminal: the summary of the page as a rich table.

A task that was not scored says so, with the reason; no figure is made up. Every text from data is printed as it is,
never read as rich markup.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from hba.evaluate.results import Metrics, Score, TaskScore
from hba.report import words
from hba.report.words import answered, count, figure, interval, not_scored

CHANCE_STYLES = {True: "green", False: "yellow", None: ""}


def metrics_table(metrics: Metrics) -> Table:
    """The tasks as a table, with the mean over tasks last, and below it what must be known of the figures."""
    synthetic = metrics.provenance.synthetic is True
    total = metrics.aggregate
    title = ("Scores on synthetic data" if synthetic else "Scores") + (f" of {total.rows}" if total.n_missing else "")
    title += f" ({metrics.provenance.unusual})" if metrics.provenance.unusual else ""
    # 80 columns hold a task's name and its figures; the metrics' names are in the page and in metrics.json.
    table = Table(
        title=Text(f"{title}; {words.clusters(metrics.provenance)}"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("task", overflow="fold")
    for name in ("score", "95% interval", "chance", "n", "invalid", "failed", "left out"):
        table.add_column(name, justify="right", no_wrap=True)
    for key, task in metrics.tasks.items():
        reason = "" if task.score is not None else f", {not_scored(task)}"
        ends = f", {words.endings(task)}" if words.endings(task) else ""
        table.add_row(Text(f"{key:4} {task.title}{reason}{ends}"), *_figures(task))
    table.add_section()
    notes = words.warnings(metrics)
    if metrics.calibration:
        found = metrics.calibration.all
        notes.append(f"expected calibration error {figure(found.ece)} over {count(found.n)} probabilities")
    table.caption, table.caption_justify = Text("\n".join(notes)) if notes else None, "left"
    counts = (answered(total), *map(count, (total.n_invalid, total.n_failed, total.n_quarantined)))
    table.add_row(Text("mean over scored tasks", style="bold"), *_score(metrics.mean, "bold"), "", *counts)
    return table


def breakdown_tables(metrics: Metrics) -> list[Table]:
    """A table a breakdown: one row a slice, one column a task."""
    tables = []
    for field, breakdown in metrics.breakdowns.items():
        keys = [key for key in metrics.tasks if key in breakdown.tasks]
        failed = any(part.n_failed for part in breakdown.slices.values())
        table = _plain_table(f"By {field}", (field, "n", *(["failed"] if failed else []), "right", *keys))
        for name, part in breakdown.slices.items():
            scores = (figure(part.tasks[key].score, 2) if key in part.tasks else words.DASH for key in keys)
            counts = (count(part.n), *([count(part.n_failed)] if failed else []))
            table.add_row(*map(Text, (name, *counts, figure(part.accuracy, 2), *scores)))
        tables.append(table)
    return tables


def unmapped_table(metrics: Metrics) -> Table | None:
    """The answers that mean no label, by dataset, with the most frequent ones; None where every answer means one."""
    entries = metrics.aggregate.unmapped
    if not entries:
        return None
    table = Table(title="Answers that mean no label, and count as wrong", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("dataset")
    table.add_column("n", justify="right")
    table.add_column("share", justify="right")
    table.add_column("most frequent", overflow="fold")
    for key, entry in entries.items():
        said = "  ".join(f"{each.answer!r} ({each.n:,})" for each in entry.answers[:3])
        table.add_row(*map(Text, (key, count(entry.n), f"{entry.share:.0%}", said)))
    return table


def _plain_table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(Text(columns[0]), overflow="fold")
    for name in columns[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _figures(task: TaskScore) -> list[Text]:
    counts = (answered(task), *map(count, (task.n_invalid, task.n_failed, task.n_quarantined)))
    return [*_score(task, CHANCE_STYLES[task.above_chance]), *map(Text, (figure(task.chance), *counts))]


def _score(score: Score, style: str) -> list[Text]:
    return [Text(figure(score.score), style=style), Text(interval(score.ci95))]
