"""A leaderboard as a rich table, HTML, Markdown, LaTeX or CSV: the same rows, marks and notes in each.

A published row carries a dagger and its source wherever it is shown; the best score of a ranked task is bold.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from pathlib import Path

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from hba.errors import InputError, nearest
from hba.evaluate.leaderboard import Entry, Leaderboard
from hba.report.html import environment, style
from hba.report.words import DASH, figure
from hba.storage import atomic_write

DAGGER = "†"
PUBLISHED_NOTE = f"{DAGGER} published, quoted and not measured here"
_TEX = re.compile(r"[&%$#_{}~^\\]")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|#!])")


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
    if path.suffix not in WRITERS:
        fix = nearest(path.suffix, WRITERS)
        raise InputError(f"no table is written as {path.suffix or 'a file without suffix'!r}", where=str(path), fix=fix)
    with atomic_write(path) as handle:
        handle.write(WRITERS[path.suffix](board))


def to_markdown(board: Leaderboard) -> str:
    """A GitHub table with its notes below."""
    lines = ["| # | model | " + " | ".join((*board.tasks, "mean", "mean rank")) + " |"]
    lines.append("|---|---|" + "---:|" * (len(board.tasks) + 2))
    for entry in board.entries:
        scores = (f"**{text}**" if best else text for text, best in _cells(board, entry))
        cells = (_rank(entry), _MARKDOWN.sub(r"\\\1", _name(entry)), *scores, figure(entry.mean))
        lines.append("| " + " | ".join((*cells, figure(entry.mean_rank, 2))) + " |")
    return "\n".join([*lines, "", *(f"- {_MARKDOWN.sub(_escaped, note)}" for note in _notes(board))]) + "\n"


def to_latex(board: Leaderboard) -> str:
    """A booktabs table."""
    head = " & ".join(_tex(text) for text in ("#", "Model", *board.tasks, "Mean", "Mean rank"))
    lines = [rf"\begin{{tabular}}{{rl{'r' * (len(board.tasks) + 2)}}}", r"\toprule", head + r" \\", r"\midrule"]
    for entry in board.entries:
        scores = (rf"\textbf{{{text}}}" if best else _tex(text) for text, best in _cells(board, entry))
        ends = (figure(entry.mean), figure(entry.mean_rank, 2))
        lines.append(" & ".join((_tex(_rank(entry)), _tex(_name(entry)), *scores, *map(_tex, ends))) + r" \\")
    notes = (f"% {note}" for note in _notes(board))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", *notes]) + "\n"


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
    ".md": to_markdown,
    ".tex": to_latex,
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


def _escaped(found: re.Match[str]) -> str:
    return "\\" + found[1]


def _tex(text: str) -> str:
    names = {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}
    plain = _TEX.sub(lambda found: names.get(found[0], "\\" + found[0]), text)
    return plain.replace(DAGGER, r"$^\dagger$").replace(DASH, "--")


def _spelled(text: str) -> str:
    """A text that no spreadsheet takes for a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text
