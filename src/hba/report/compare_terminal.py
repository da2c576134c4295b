"""Comparisons of runs for the terminal: one line a task, the mean last."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from hba.evaluate.runs import Comparison
from hba.report.tables import Cell, TextTable
from hba.report.words import DASH, count


def terminal_table(found: TextTable) -> Table:
    """The table without its notes, which the documentation has; a bold difference is green or red."""
    table = _table(found.caption)
    table.add_column(found.head[0], overflow="fold")
    for head in found.head[1:]:
        table.add_column(head, justify="right", no_wrap=True)
    for row in found.rows:
        table.add_row(*_texts(row))
    if found.summary:
        table.add_section()
        name, *cells = _texts(found.summary)
        table.add_row(Text(name.plain, style="bold"), *cells)
    return table


def flips_table(found: Comparison, limit: int) -> Table:
    """The first `limit` rows that changed sides."""
    table = _table(f"{count(len(found.flips))} rows changed sides")
    for name in ("id", "dataset", "target", "A", "B"):
        table.add_column(name, overflow="fold")
    for flip in found.flips[:limit]:
        style = "green" if flip.gained else "red"
        said = (Text(text or DASH) for text in (flip.id, flip.dataset, flip.target, flip.a))
        table.add_row(*said, Text(flip.b or DASH, style=style))
    return table


def _table(title: str) -> Table:
    return Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=0, pad_edge=False)


def _texts(cells: Sequence[Cell]) -> list[Text]:
    return [Text(text, style=("green" if text.startswith("+") else "red") if bold else "") for text, bold in cells]
