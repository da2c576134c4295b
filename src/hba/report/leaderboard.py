"""A leaderboard as a rich table, HTML, Markdown, LaTeX or CSV: the same rows, marks and notes in each.

A published row carries a dagger and its source wherever it is shown; the best score of a ranked task is bold, and
nothing of a row that is not ranked.
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
from hba.report.words import DASH, count, figure, interval
from hba.storage import atomic_write

PUBLISHED_NOTE = f"{DAGGER} published, quoted and not measured here"
NAME_WIDTH, GAP = 15, 2
ENDS = ("mean", "rank", "failed", "n")


def leaderboard_tables(board: Leaderboard, width: int) -> Group:
    """For a terminal of `width` columns, with two decimals; tasks that do not fit stand in a table below."""
    tables = []
    for number, keys in enumerate(_blocks(board, width)):
        title = None if number else _caption(board)
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("#", justify="right", no_wrap=True)
        table.add_column("model", overflow="fold", min_width=NAME_WIDTH)
        for name in (*keys, *(() if number else ENDS)):
            table.add_column(name, justify="right", no_wrap=True)
        before: Entry | None = None
        for entry in board.entries:
            if before is not None and before.rank is not None and entry.rank is None:
                table.add_section()
            before = entry
            name = Text(_name(entry), style="dim" if entry.published else "")
            cells = [_terminal_cell(board, entry, key) for key in keys]
            table.add_row(Text(_rank(entry)), name, *cells, *map(Text, () if number else _ends(entry)))
        tables.append(table)
    return Group(*tables, *map(Text, _notes(board)))


def _blocks(board: Leaderboard, width: int) -> list[list[str]]:
    """The tasks of each table. The first has room for the mean, the rank and n as well, every one for the model."""
    fixed = NAME_WIDTH + 2 * GAP + 4
    ends = sum(GAP + max(len(name), *(len(_ends(entry)[i]) for entry in board.entries)) for i, name in enumerate(ENDS))
    blocks: list[list[str]] = [[]]
    left = width - fixed - ends
    for key in board.tasks:
        cells = [_terminal_cell(board, entry, key).plain for entry in board.entries]
        size = GAP + max(len(key), *(len(line) for cell in cells for line in cell.split("\n")))
        if size > left and blocks[-1]:
            blocks.append([])
            left = width - fixed
        blocks[-1].append(key)
        left -= size
    return blocks


def _ends(entry: Entry) -> tuple[str, ...]:
    return figure(entry.mean, 2), figure(entry.mean_rank, 2), count(entry.num_failed), count(entry.num_rows)


def _terminal_cell(board: Leaderboard, entry: Entry, key: str) -> Text:
    style = "bold" if _best(board, entry, key) else "dim" if entry.published else ""
    cell = Text(figure(entry.scores.get(key), 2), style=style)
    return cell.append(f"\n{interval(entry.ci95[key], 2)}", style="dim") if key in entry.ci95 else cell


def write_leaderboard(board: Leaderboard, path: Path) -> None:
    """Write the table to `path`; its suffix says how: .html, .md, .tex or .csv. Raises InputError for another."""
    writer = writer_of(path, WRITERS)
    with atomic_write(path) as handle:
        handle.write(writer(board))


def text_table(board: Leaderboard) -> TextTable:
    """For LaTeX and Markdown: three decimals, with the interval behind a measured score."""
    rows = []
    for entry in board.entries:
        names = (Cell(_rank(entry)), Cell(_name(entry)))
        ends = (Cell(figure(entry.mean)), Cell(figure(entry.mean_rank, 2)), Cell(count(entry.num_rows)))
        scores = (Cell(_with_interval(entry, key), _best(board, entry, key)) for key in board.tasks)
        rows.append([*names, *scores, Cell(count(entry.num_failed)), *ends])
    head = ("#", "model", *board.tasks, "failed", "mean", "mean rank", "n")
    return TextTable(_caption(board), head, rows, notes=_notes(board), left=2)


def _with_interval(entry: Entry, key: str) -> str:
    reach = f" ({interval(entry.ci95[key])})" if key in entry.ci95 else ""
    return figure(entry.scores.get(key)) + reach


def to_csv(board: Leaderboard) -> str:
    """One line a row with scores, intervals and rows as numbers, empty where there is none."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    ends = [name for key in board.tasks for name in (key, f"{key}_low", f"{key}_high", f"{key}_n")]
    head = ["rank", "model", "published", "source", "synthetic", *ends, "n", "n_failed", "mean", "mean_rank", "notes"]
    writer.writerow(head)
    for entry in board.entries:
        cells: list[object] = []
        for key in board.tasks:
            cells += [entry.scores.get(key), *(entry.ci95.get(key) or (None, None)), entry.n.get(key)]
        row = [entry.rank, _spelled(entry.name), entry.published, _spelled(entry.source), entry.synthetic, *cells]
        ends_of = [entry.num_rows, entry.num_failed, entry.mean, entry.mean_rank, "; ".join(entry.notes)]
        writer.writerow([*row, *ends_of])
    return out.getvalue()


def to_html(board: Leaderboard) -> str:
    """A page that loads nothing."""
    template = environment().get_template("leaderboard.html.jinja")
    rows = []
    for entry in board.entries:
        cells = [(figure(entry.scores.get(key)), _best(board, entry, key)) for key in board.tasks]
        rows.append((entry, _rank(entry), _name(entry), cells))
    return template.render(style=style("style.css"), board=board, rows=rows, notes=_notes(board), title=_caption(board))


WRITERS: dict[str, Callable[[Leaderboard], str]] = {
    ".html": to_html,
    ".md": lambda board: to_markdown(text_table(board)),
    ".tex": lambda board: to_latex(text_table(board)),
    ".csv": to_csv,
}


def _best(board: Leaderboard, entry: Entry, key: str) -> bool:
    ranked = [other.scores[key] for other in board.entries if other.rank is not None and key in other.scores]
    return entry.rank is not None and key in entry.scores and entry.scores[key] == max(ranked)


def _rank(entry: Entry) -> str:
    return DASH if entry.rank is None else str(entry.rank)


def _name(entry: Entry) -> str:
    return f"{entry.name} {DAGGER}" if entry.published else entry.name


def _caption(board: Leaderboard) -> str:
    ranked = any(entry.rank is not None for entry in board.entries)
    return f"Leaderboard, ranked over {', '.join(board.ranked_tasks)}" if ranked else "Leaderboard; nothing is ranked"


def _notes(board: Leaderboard) -> list[str]:
    sources = sorted({entry.source for entry in board.entries if entry.published})
    found = [*board.warnings]
    found += [f"{PUBLISHED_NOTE} ({'; '.join(sources)})"] if sources else []
    shared = {note for entry in board.entries if entry.published for note in entry.notes}
    found += [f"{entry.name}: {note}" for entry in board.entries for note in entry.notes if note not in shared]
    return found + [f"Skipped: {each}" for each in board.skipped]


def _spelled(text: str) -> str:
    """A text that no spreadsheet takes for a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text
