"""A leaderboard as a rich table, HTML, Markdown, LaTeX or CSV: the same rows, marks and notes in each.

A published row carries a dagger and its source wherever it is shown; the best score of a ranked task is bold.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from hba.evaluate.leaderboard import Entry, Leaderboard
from hba.report.html import environment, style
from hba.report.tables import DAGGER, Cell, TextTable, to_latex, to_markdown, writer_of
from hba.report.words import DASH, figure
from hba.storage import atomic_write

PUBLISHED_NOTE = f"{DAGGER} published, quoted and not measured here"


def leaderboard_table(board: Leaderboard) -> Group:
    """For the terminal: two decimals, so that ten tasks fit into 80 columns."""
    table = Table(title=_caption(board), title_justify="left", box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("#", justify="right")
    table.add_column("model", overflow="fold", min_width=15)
    for name in (*board.tasks, "mean", "rank"):
        table.add_column(name, justify="right", no_wrap=True)
    for entry in board.entries:
        style = "dim" if entry.published else ""
        scores = (
            Text(figure(entry.scores.get(key), 2), style="bold" if _best(board, entry, key) else style)
            for key in board.tasks
        )
        ends = (figure(entry.mean, 2), figure(entry.mean_rank, 2))
        table.add_row(Text(_rank(entry)), Text(_name(entry), style=style), *scores, *map(Text, ends))
    return Group(table, *map(Text, _notes(board)))


def write_leaderboard(board: Leaderboard, path: Path) -> None:
    """Write the table to `path`; its suffix says how: .html, .md, .tex or .csv. Raises InputError for another."""
    writer = writer_of(path, WRITERS)
    with atomic_write(path) as handle:
        handle.write(writer(board))


def text_table(board: Leaderboard) -> TextTable:
    """For LaTeX and Markdown: three decimals."""
    rows = []
    for entry in board.entries:
        names = (Cell(_rank(entry)), Cell(_name(entry)))
        ends = (Cell(figure(entry.mean)), Cell(figure(entry.mean_rank, 2)))
        rows.append([*names, *(Cell(text, best) for text, best in _cells(board, entry)), *ends])
    head = ("#", "model", *board.tasks, "mean", "mean rank")
    return TextTable(_caption(board), head, rows, notes=_notes(board), left=2)


def to_csv(board: Leaderboard) -> str:
    """One line a row with scores and intervals as numbers, empty where there is none."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    ends = [name for key in board.tasks for name in (key, f"{key}_low", f"{key}_high")]
    writer.writerow(["rank", "model", "published", "source", "synthetic", *ends, "mean", "mean_rank", "notes"])
    for entry in board.entries:
        cells: list[object] = []
        for key in board.tasks:
            cells += [entry.scores.get(key), *(entry.ci95.get(key) or (None, None))]
        row = [entry.rank, _spelled(entry.name), entry.published, _spelled(entry.source), entry.synthetic, *cells]
        writer.writerow([*row, entry.mean, entry.mean_rank, "; ".join(entry.notes)])
    return out.getvalue()


def to_html(board: Leaderboard) -> str:
    """A page that loads nothing."""
    template = environment().get_template("leaderboard.html.jinja")
    rows = [(entry, _rank(entry), _name(entry), list(_cells(board, entry))) for entry in board.entries]
    return template.render(style=style("style.css"), board=board, rows=rows, notes=_notes(board), title=_caption(board))


WRITERS: dict[str, Callable[[Leaderboard], str]] = {
    ".html": to_html,
    ".md": lambda board: to_markdown(text_table(board)),
    ".tex": lambda board: to_latex(text_table(board)),
    ".csv": to_csv,
}


def _cells(board: Leaderboard, entry: Entry) -> list[tuple[str, bool]]:
    return [(figure(entry.scores.get(key)), _best(board, entry, key)) for key in board.tasks]


def _best(board: Leaderboard, entry: Entry, key: str) -> bool:
    ranked = [other.scores[key] for other in board.entries if other.rank is not None and key in other.scores]
    return entry.rank is not None and key in entry.scores and entry.scores[key] == max(ranked)


def _rank(entry: Entry) -> str:
    return DASH if entry.rank is None else str(entry.rank)


def _name(entry: Entry) -> str:
    return f"{entry.name} {DAGGER}" if entry.published else entry.name


def _caption(board: Leaderboard) -> str:
    return f"Leaderboard, ranked over {', '.join(board.ranked_tasks)}"


def _notes(board: Leaderboard) -> list[str]:
    sources = sorted({entry.source for entry in board.entries if entry.published})
    found = [*board.warnings]
    found += [f"{PUBLISHED_NOTE} ({'; '.join(sources)})"] if sources else []
    shared = {note for entry in board.entries if entry.published for note in entry.notes}
    return found + [f"{entry.name}: {note}" for entry in board.entries for note in entry.notes if note not in shared]


def _spelled(text: str) -> str:
    """A text that no spreadsheet takes for a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text
