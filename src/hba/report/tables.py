"""A table in words, as LaTeX (booktabs) or Markdown, or for the terminal: what a file is written in goes by its suffix.

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
from hba.report.words import DASH
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
