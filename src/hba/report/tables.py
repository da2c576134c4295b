"""One description of a table, and its forms: for the terminal, as Markdown, LaTeX (booktabs) or CSV; and the score's.

Every text comes from data (names of runs, tasks, models) and is escaped here and nowhere else: no form reads it as its
own markup, and no terminal obeys its control characters. Notes stay with the table, so that a figure that is quoted or
uncertain is not shown without saying so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, TypeVar

from hba.errors import InputError, nearest
from hba.evaluate.results import Metrics
from hba.report import words
from hba.report.words import DASH, answered, count, figure, interval, not_scored
from hba.storage import write_data

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

DAGGER = "†"
BAR_CELLS = 16
STRONG = ("bold", "green", "red")  # what is bold where a file has no colours
W = TypeVar("W")


class Cell(NamedTuple):
    """A text in a style of rich; `note` stands small below it."""

    text: str
    style: str = ""
    note: str = ""


Row: TypeAlias = "Sequence[str | float | Cell]"


@dataclass(frozen=True, kw_only=True)
class Table:
    """What every form shows. A row that is empty is a rule; `summary` stands below a rule of its own.

    `align` has a letter a column, the last one for all that follow: l for words, r for figures, b for a share in [0, 1]
    that the terminal draws as a bar. A table without a `head` has no lines. `warnings` stand with the notes in a file,
    and alone in the terminal, whose reader has the documentation. A `tight` one breaks its head in a narrow terminal.
    """

    title: str
    head: Sequence[str] = ()
    rows: Sequence[Row]
    summary: Row | None = None
    notes: Sequence[str] = ()
    warnings: Sequence[str] = ()
    align: str = "lr"
    tight: bool = False

    def columns(self) -> str:
        """`align` with a letter for every column."""
        number = len(self.head or next(iter(self.rows), ()))
        return self.align[:number].ljust(number, self.align[-1])

    def texts(self, row: Row) -> list[Cell]:
        """The cells of a row."""
        return [cell if isinstance(cell, Cell) else Cell(str(cell)) for cell in row]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """For a terminal of that width: figures are never cut, words are folded."""
        from rich import box
        from rich.bar import Bar
        from rich.table import Table as RichTable
        from rich.text import Text

        def shown(cell: str | float | Cell) -> RenderableType:
            if isinstance(cell, float):
                return Bar(1, 0, cell, color="blue")
            text, style, note = cell if isinstance(cell, Cell) else Cell(cell)
            made = Text(_printable(text), style=style)
            return made.append(f"\n{note}", style="dim") if note else made

        made = RichTable(
            title=Text(self.title) if self.title else None,
            title_justify="left",
            box=box.SIMPLE_HEAD if self.head else None,
            show_header=bool(self.head),
            padding=0 if self.tight else (0, 1, 0, 0),
            pad_edge=False,
        )
        kinds, rows = self.columns(), [self.texts(row) for row in (*self.rows, self.summary or ()) if row]
        names = self.head or [""] * len(kinds)
        widest = [max((len(row[number].text) for row in rows), default=0) for number in range(len(kinds))]
        needed = 1 + sum(1 + max(len(name), size) for name, size in zip(names, widest, strict=True))  # with its edges
        for number, (kind, name, size) in enumerate(zip(kinds, names, widest, strict=True)):
            if self.tight and number and needed > options.max_width and len(name) > size:
                name = re.sub(r" |(?<=/)", "\n", name)
            if kind == "b":  # it alone may shrink: a narrow terminal takes bars, never figures
                made.add_column(Text(name), max_width=BAR_CELLS)
            elif kind == "l":
                made.add_column(Text(name), overflow="fold", no_wrap="b" in kinds)
            else:
                made.add_column(Text(name), justify="right", no_wrap=True)
        for row in self.rows:
            made.add_row(*map(shown, row)) if row else made.add_section()
        if self.summary:
            made.add_section()
            first, *others = self.texts(self.summary)
            made.add_row(*map(shown, [first._replace(style="bold"), *others]))
        made.caption, made.caption_justify = Text("\n".join(self.warnings)) if self.warnings else None, "left"
        yield made


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


# --- as files ---------------------------------------------------------------------------------------------------------


def writer_of(path: Path, writers: Mapping[str, W]) -> W:
    """The writer for the suffix of `path`. Raises InputError for a suffix that none has."""
    if path.suffix not in writers:
        what = f"no table is written as {path.suffix or 'a file without suffix'!r}"
        raise InputError(what, where=str(path), fix=nearest(path.suffix, writers))
    return writers[path.suffix]


def write_table(table: Table, path: Path) -> None:
    """Write it to `path`, .md or .tex. Raises InputError for another suffix."""
    write_data(path, writer_of(path, WRITERS)(table))


def to_markdown(table: Table) -> str:
    """A GitHub table below its title, its notes behind it."""
    mark = re.compile(r"([\\`*_{}\[\]<>|#!])")

    def plain(text: str) -> str:
        return mark.sub(r"\\\1", text)

    def line(row: Row) -> str:
        return f"| {' | '.join(_laid_out(table.texts(row), plain, '**{}**'))} |"

    rule = "|" + "".join("---|" if kind == "l" else "---:|" for kind in table.columns())
    rows = [line(row) for row in (*table.rows, table.summary or ()) if row]
    notes = [f"- {plain(note)}" for note in (*table.notes, *table.warnings)]
    title = [plain(table.title), ""] if table.title else []
    return "\n".join([*title, line(table.head), rule, *rows, *([""] if notes else []), *notes]) + "\n"


_TEX = {
    **{mark: f"\\{mark}" for mark in "&%$#_{}"},
    **{"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"},
    # Without a font encoding TeX sets other signs in the places of these three.
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"},
    **{DAGGER: r"$^\dagger$", DASH: "--"},
}


def to_latex(table: Table) -> str:
    """A table of booktabs with its title above and its notes below; `\\input` takes it as it is."""

    def plain(text: str) -> str:
        # A minus is longer than a hyphen.
        return re.sub(r"^-(?=\d)", "$-$", "".join(_TEX.get(mark, mark) for mark in text))

    def line(row: Row | None) -> str:
        return " & ".join(_laid_out(table.texts(row), plain, r"\textbf{{{}}}")) + r" \\" if row else r"\midrule"

    lines = [r"% needs \usepackage{booktabs}", r"\begin{table}", r"\centering", rf"\caption{{{plain(table.title)}}}"]
    lines += [rf"\begin{{tabular}}{{{table.columns()}}}", r"\toprule", line(table.head), r"\midrule"]
    lines += [*map(line, table.rows), *([r"\midrule", line(table.summary)] if table.summary else [])]
    notes = [rf"\par\smallskip\footnotesize {plain(note)}" for note in (*table.notes, *table.warnings)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", *notes, r"\end{table}"]) + "\n"


def _laid_out(cells: Iterable[Cell], plain: Callable[[str], str], strong: str) -> Iterator[str]:
    for text, style, note in cells:
        whole = plain(f"{text} ({note})" if note else text)
        yield strong.format(whole) if style in STRONG else whole


WRITERS: Mapping[str, Callable[[Table], str]] = {".md": to_markdown, ".tex": to_latex}


# --- the scores of a run ----------------------------------------------------------------------------------------------


def metrics_table(metrics: Metrics) -> Table:
    """The tasks with the mean over them last, and below what must be known of the figures.

    A task that was not scored says so, with the reason; no figure is made up.
    """
    total, said = metrics.aggregate, metrics.provenance
    title = ("Scores on synthetic data" if said.synthetic is True else "Scores") + (
        f" of {total.rows}" if total.n_missing else ""
    )
    title += f" ({said.unusual})" if said.unusual else ""
    title += " as the released scorer has them" if said.scoring and said.scoring.published else ""
    rows: list[Row] = []
    for key, task in metrics.tasks.items():
        reason = "" if task.score is not None else f", {not_scored(task)}"
        ends = f", {words.endings(task)}" if words.endings(task) else ""
        score = Cell(figure(task.score), {True: "green", False: "yellow", None: ""}[task.above_chance])
        counts = (answered(task), *map(count, (task.n_invalid, task.n_failed, task.n_quarantined)))
        name = f"{key:4} {task.title}{reason}{ends}"
        rows.append((name, score, interval(task.ci95), figure(task.chance), *counts))
    notes = words.warnings(metrics)
    if metrics.calibration:
        found = metrics.calibration.all
        notes.append(f"expected calibration error {figure(found.ece)} over {count(found.n)} probabilities")
    mean = (Cell(figure(metrics.mean.score), "bold"), interval(metrics.mean.ci95), "")
    counts = (answered(total), *map(count, (total.n_invalid, total.n_failed, total.n_quarantined)))
    return Table(
        title=f"{title}; {words.clusters(said)}",
        # 80 columns hold a task's name and its figures; the metrics' names are in the page and in metrics.json.
        head=("task", "score", "95% interval", "chance", "n", "invalid", "failed", "left out"),
        rows=rows,
        summary=("mean over scored tasks", *mean, *counts),
        warnings=notes,
    )


def breakdown_tables(metrics: Metrics) -> list[Table]:
    """A table a breakdown: one row a slice, one column a task."""
    tables = []
    for field, breakdown in metrics.breakdowns.items():
        keys = [key for key in metrics.tasks if key in breakdown.tasks]
        failed = any(part.n_failed for part in breakdown.slices.values())
        rows = []
        for name, part in breakdown.slices.items():
            scores = (figure(part.tasks[key].score, 2) if key in part.tasks else DASH for key in keys)
            counts = (count(part.n), *([count(part.n_failed)] if failed else []))
            rows.append((name, *counts, figure(part.accuracy, 2), *scores))
        head = (field, "n", *(["failed"] if failed else []), "right", *keys)
        tables.append(Table(title=f"By {field}", head=head, rows=rows))
    return tables


def unmapped_table(metrics: Metrics) -> Table | None:
    """The answers that mean no label, by dataset, with the most frequent ones; None where every answer means one."""
    rows = []
    for key, entry in metrics.aggregate.unmapped.items():
        said = "  ".join(f"{each.answer!r} ({each.n:,})" for each in entry.answers[:3])
        rows.append((key, count(entry.n), f"{entry.share:.0%}", said))
    title, head = "Answers that mean no label, and count as wrong", ("dataset", "n", "share", "most frequent")
    return Table(title=title, head=head, rows=rows, align="lrrl") if rows else None
