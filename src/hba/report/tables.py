"""Tables as LaTeX (booktabs), Markdown or for the terminal, by a file's suffix, and the table of `hba score`.

Every text comes from data (names of runs, tasks, models) and is escaped here and nowhere else. A cell may be bold; the
last row may be a summary, which stands below a rule. Notes stay with the table, so that a figure that is quoted or
uncertain is not shown without saying so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from rich import box
from rich.table import Table
from rich.text import Text

from hba.errors import InputError, nearest
from hba.evaluate.results import Metrics, Score, TaskScore
from hba.report import words
from hba.report.words import DASH, answered, count, figure, interval, not_scored
from hba.storage import atomic_write

DAGGER = "†"
W = TypeVar("W")
_TEX = {
    **{mark: f"\\{mark}" for mark in "&%$#_{}"},
    **{"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"},
    # Without a font encoding TeX sets other signs in the places of these three.
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"},
    **{DAGGER: r"$^\dagger$", DASH: "--"},
}
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|#!])")


class Cell(NamedTuple):
    """A text, escaped when it is written."""

    text: str
    bold: bool = False


class TextTable(NamedTuple):
    """`left` columns are of words and stand on the left, the others are of figures.

    `warnings` stand with the notes in a file, and alone in the terminal, whose reader has the documentation.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    summary: Sequence[Cell] | None = None
    notes: Sequence[str] = ()
    left: int = 1
    warnings: Sequence[str] = ()


def writer_of(path: Path, writers: Mapping[str, W]) -> W:
    """The writer for the suffix of `path`. Raises InputError for a suffix that none has."""
    if path.suffix not in writers:
        what = f"no table is written as {path.suffix or 'a file without suffix'!r}"
        raise InputError(what, where=str(path), fix=nearest(path.suffix, writers))
    return writers[path.suffix]


def write_table(table: TextTable, path: Path) -> None:
    """Write it to `path`, .md or .tex. Raises InputError for another suffix."""
    writer = writer_of(path, WRITERS)
    with atomic_write(path) as handle:
        handle.write(writer(table))


def to_markdown(table: TextTable) -> str:
    """A GitHub table below its caption, its notes behind it."""
    rule = "|" + "---|" * table.left + "---:|" * (len(table.head) - table.left)
    rows = [*table.rows, *([table.summary] if table.summary else [])]
    lines = [_markdown(table.caption), "", _markdown_row(map(Cell, table.head)), rule, *map(_markdown_row, rows)]
    notes = [f"- {_markdown(note)}" for note in (*table.notes, *table.warnings)]
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def to_latex(table: TextTable) -> str:
    """A table of booktabs with its caption above and its notes below; `\\input` takes it as it is."""
    columns = "l" * table.left + "r" * (len(table.head) - table.left)
    lines = [r"% needs \usepackage{booktabs}", r"\begin{table}", r"\centering", rf"\caption{{{_tex(table.caption)}}}"]
    lines += [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", _tex_row(map(Cell, table.head)), r"\midrule"]
    lines += map(_tex_row, table.rows)
    lines += [r"\midrule", _tex_row(table.summary)] if table.summary else []
    notes = [rf"\par\smallskip\footnotesize {_tex(note)}" for note in (*table.notes, *table.warnings)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", *notes, r"\end{table}"]) + "\n"


WRITERS: Mapping[str, Callable[[TextTable], str]] = {".md": to_markdown, ".tex": to_latex}


def to_terminal(table: TextTable, width: int = 80) -> Table:
    """For a terminal of `width` columns, in which heads are broken where they need to; a bold difference is green or
    red."""
    made = Table(title=Text(table.caption), title_justify="left", box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    made.add_column(table.head[0], overflow="fold")
    rows = [*table.rows, *([table.summary] if table.summary else [])]
    sizes = [max(len(cell.text) for cell in cells) for cells in zip(*rows, strict=True)] or [0] * len(table.head)
    fits = sum(max(size, len(head)) + 1 for size, head in zip(sizes, table.head, strict=True)) <= width
    for size, head in zip(sizes[1:], table.head[1:], strict=True):
        shown = head if fits or len(head) <= size else re.sub(r" |(?<=/)", "\n", head)
        made.add_column(shown, justify="right", no_wrap=True)
    for row in table.rows:
        made.add_row(*_texts(row))
    if table.summary:
        made.add_section()
        name, *cells = _texts(table.summary)
        made.add_row(Text(name.plain, style="bold"), *cells)
    made.caption, made.caption_justify = Text("\n".join(table.warnings)) if table.warnings else None, "left"
    return made


def _texts(cells: Sequence[Cell]) -> list[Text]:
    return [Text(text, style=("green" if text.startswith("+") else "red") if bold else "") for text, bold in cells]


def _markdown(text: str) -> str:
    return _MARKDOWN.sub(lambda found: "\\" + found[1], text)


def _markdown_row(cells: Iterable[Cell]) -> str:
    shown = (f"**{_markdown(cell.text)}**" if cell.bold else _markdown(cell.text) for cell in cells)
    return f"| {' | '.join(shown)} |"


def _tex(text: str) -> str:
    return "".join(_TEX.get(mark, mark) for mark in text)


def _tex_row(cells: Iterable[Cell]) -> str:
    return " & ".join(map(_tex_cell, cells)) + r" \\"


def _tex_cell(cell: Cell) -> str:
    text = _tex(cell.text)
    text = re.sub(r"^-(?=\d)", "$-$", text)  # a minus is longer than a hyphen
    return rf"\textbf{{{text}}}" if cell.bold else text


# The score table for the terminal: the summary of the page as a rich table.
#
# A task that was not scored says so, with the reason; no figure is made up. Every text from data is printed as it is,
# never read as rich markup.


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
