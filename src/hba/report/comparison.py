"""Runs side by side, as tables in any form: comparisons, training stages, transfer, the leaderboard.

Bold is a difference that is significant at 5 %, after Holm's correction where it is a task's.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from hba.errors import InputError
from hba.evaluate.compare import MEAN, Comparison, Difference, SeedComparison, SeedDifference, Spread, Variance
from hba.evaluate.leaderboard import Entry, Leaderboard
from hba.evaluate.results import SCANT
from hba.evaluate.statistics import EXACT_MATCH
from hba.report.html import environment, style
from hba.report.tables import DAGGER, Cell, TextTable, to_latex, to_markdown, writer_of
from hba.report.words import DASH, count, figure, interval, metric_name, scant
from hba.storage import atomic_write, read_json, write_json

if TYPE_CHECKING:
    from hba.evaluate.compare import Comparison
    from hba.train.transfer import Scored, TransferResult


LEVEL = 0.05
NOTE = "Intervals are of 95% by the paired bootstrap; p is corrected over the tasks (Holm), that of the mean is not."
SEEDS = "Intervals are of 95% over rows and runs (Student's t); p is corrected over the tasks (Holm), not for the mean."
SPREAD = "95% over runs: what another seed or prompt would give on these rows; over rows: what other rows would give."


def comparison(found: Comparison) -> TextTable:
    """B minus A per task."""
    grouped = "rows of one group drawn together" if found.clustered_by else "rows independent"
    mean = found.paired.mean
    return TextTable(
        caption=f"B ({found.b}) minus A ({found.a}): {_rows(found)}; {grouped}",
        head=("task", "A", "B", "B-A", "95% interval", "p (Holm)", "won/lost", "failed"),
        rows=[
            [*_difference(_name(key, line.metric), line, line.p_holm), _failed(found.failed[key], 1)]
            for key, line in found.paired.tasks.items()
        ],
        summary=[*_difference("mean", mean, mean.p_value), _failed(found.failed[MEAN], 1)] if mean else None,
        notes=[f"{NOTE} Bold: p below {LEVEL}."],
        warnings=_warnings(found.paired.tasks, found.paired.mean),
    )


def seed_comparison(found: SeedComparison) -> TextTable:
    """The mean of B's runs minus that of A's, per task."""
    grouped = "rows of one group drawn together" if found.clustered_by else "rows independent"
    return TextTable(
        caption=f"B ({len(found.b)} runs) minus A ({len(found.a)} runs): {_rows(found)}; {grouped}",
        head=("task", "A", "B", "B-A", "95% interval", "p (Holm)", "sd of A", "sd of B", "failed"),
        rows=[
            [*_seeds(_name(key, line.metric), line, line.p_holm), _failed(found.failed[key], len(found.a))]
            for key, line in found.tasks.items()
        ],
        summary=[*_seeds("mean", found.mean, found.mean.p_value), _failed(found.failed[MEAN], len(found.a))]
        if found.mean
        else None,
        notes=[f"A: {', '.join(found.a)}. B: {', '.join(found.b)}.", f"{SEEDS} Bold: p below {LEVEL}."],
        warnings=_warnings(found.tasks, found.mean),
    )


def variance(found: Variance) -> TextTable:
    """Mean and spread per task."""
    return TextTable(
        caption=f"{len(found.runs)} runs over {_rows(found)}",
        head=("task", "mean", "sd of runs", "95% over runs", "95% over rows", "same answer", "failed"),
        rows=[
            [*_spread(_name(key, line.metric), line), Cell(count(sum(found.failed[key])))]
            for key, line in found.tasks.items()
        ],
        summary=[*_spread("mean", found.mean), Cell(count(sum(found.failed[MEAN])))] if found.mean else None,
        notes=[f"Runs: {', '.join(found.runs)}.", SPREAD],
        warnings=_warnings(found.tasks, found.mean),
    )


def _rows(found: Comparison | SeedComparison | Variance) -> str:
    asked = f" of {count(found.num_asked)} asked" if found.num_asked and found.num_asked > found.num_rows else ""
    left_out = f", {count(sum(found.left_out))} left out that not all runs answered" if sum(found.left_out) else ""
    return f"{count(found.num_rows)} common rows{asked}{left_out}"


Line = Difference | SeedDifference | Spread


def _warnings(lines: Mapping[str, Line], mean: Line | None) -> list[str]:
    """What is not compared, and what rests on too little."""
    named = {**lines, **({} if mean is None else {"the mean": mean})}
    found = [f"{key} is not compared: {line.note}." for key, line in named.items() if line.note]
    few = {key: line.n_independent for key, line in lines.items() if line.n_independent < SCANT and not line.note}
    return [*found, *([scant(few)] if few else [])]


def _name(key: str, metric: str) -> str:
    """The task, with its metric where that is not the benchmark's own."""
    return f"{key} ({metric_name(metric)})" if metric == EXACT_MATCH else key


def _difference(name: str, line: Difference, p_value: float | None) -> list[Cell]:
    return [*_start(name, line, p_value), Cell(f"{count(line.gained)}/{count(line.lost)}")]


def _seeds(name: str, line: SeedDifference, p_value: float | None) -> list[Cell]:
    return [*_start(name, line, p_value), Cell(figure(line.sd_a)), Cell(figure(line.sd_b))]


def _failed(rows: Sequence[int], num_a: int) -> Cell:
    """The rows that failed on either side."""
    return Cell(f"{count(sum(rows[:num_a]))}/{count(sum(rows[num_a:]))}")


def _start(name: str, line: Difference | SeedDifference, p_value: float | None) -> list[Cell]:
    sure = p_value is not None and p_value < LEVEL and line.difference is not None
    signed = DASH if line.difference is None else f"{line.difference:+.3f}"
    p_text = DASH if p_value is None else "<0.001" if p_value < 0.001 else figure(p_value)
    return [
        *map(Cell, (name, figure(line.a), figure(line.b))),
        Cell(signed, sure),
        *map(Cell, (interval(line.ci95), p_text)),
    ]


def _spread(name: str, line: Spread) -> list[Cell]:
    figures = (figure(line.mean), figure(line.sd), interval(line.ci95_runs), interval(line.ci95_rows))
    return [Cell(text) for text in (name, *figures, figure(line.agreement))]


def flips_table(found: Comparison, limit: int) -> Table:
    """The first `limit` rows that changed sides, for the terminal."""
    title = f"{count(len(found.flips))} rows changed sides"
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for name in ("id", "dataset", "target", "A", "B"):
        table.add_column(name, overflow="fold")
    for flip in found.flips[:limit]:
        style = "green" if flip.gained else "red"
        said = (Text(text or DASH) for text in (flip.id, flip.dataset, flip.target, flip.a))
        table.add_row(*said, Text(flip.b or DASH, style=style))
    return table


# Training stages side by side: the score of each, and its difference from the stage before with an interval.
#
# `stages.json` lies in the run folder of the last stage; the terminal and the page show the same `Stages`. A difference
# counts as sure when Holm's correction over the tasks leaves it below 5 %.


FILE = "stages.json"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One task in one stage; the difference is from the stage before, None in the first. Scores are in [0, 1]."""

    score: float | None
    difference: float | None = None
    ci95: tuple[float, float] | None = None
    p_value: float | None = None
    same: bool = False

    @property
    def sure(self) -> bool:
        """Whether the difference is significant."""
        return self.p_value is not None and self.p_value < LEVEL and bool(self.difference)

    @property
    def text(self) -> str:
        """The difference for people: '=' where no sample changed."""
        if self.same:
            return "="
        return DASH if self.difference is None else f"{self.difference:+.3f} ({interval(self.ci95, 2)})"


@dataclass(frozen=True, kw_only=True)
class Stages:
    """The stages in their order; a row for each task by its name, the mean over tasks last."""

    names: tuple[str, ...]
    rows: dict[str, tuple[Step, ...]]
    num_rows: int


def stages(found: Sequence[Comparison]) -> Stages:
    """The columns of a chain of comparisons, each of a run with the next."""
    rows = {}
    for key, first in found[0].paired.tasks.items():
        name = f"{key} ({metric_name(first.metric)})" if first.metric == EXACT_MATCH else key
        lines = [each.paired.tasks[key] for each in found]
        rows[name] = (Step(score=first.a), *(_step(line, line.p_holm) for line in lines))
    means = [each.paired.mean for each in found]
    if means[0] is not None:
        rows["mean over tasks"] = (Step(score=means[0].a), *(_step(m, m.p_value) for m in means if m is not None))
    return Stages(names=(found[0].a, *(each.b for each in found)), rows=rows, num_rows=found[0].num_rows)


def _step(line: Difference, p_value: float | None) -> Step:
    same = line.difference == 0 and line.gained == line.lost == 0
    return Step(score=line.b, difference=line.difference, ci95=line.ci95, p_value=p_value, same=same)


def write_stages(found: Stages, run: Path) -> None:
    """Write stages.json into the run folder."""
    write_json(run / FILE, asdict(found))


def read_stages(run: Path) -> Stages | None:
    """stages.json of a run folder, None without one. Raises InputError when it is malformed."""
    path = run / FILE
    if not path.is_file():
        return None
    record = read_json(path)
    try:
        rows = {name: tuple(map(_read_step, steps)) for name, steps in record["rows"].items()}
        return Stages(names=tuple(record["names"]), rows=rows, num_rows=int(record["num_rows"]))
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        fix = "Run `hba demo` again, or remove the file."
        raise InputError("not the stages of a run", where=str(path), fix=fix) from None


def _read_step(record: dict[str, Any]) -> Step:
    reach = record["ci95"]
    return Step(**{**record, "ci95": None if reach is None else (float(reach[0]), float(reach[1]))})


def stages_table(found: Stages) -> Table:
    """One column a stage, each but the first with its difference; a sure one is coloured."""
    title = f"Stage by stage; {count(found.num_rows)} common rows, differences with their 95% intervals"
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("task", overflow="fold")
    for number, name in enumerate(found.names):
        table.add_column(name, justify="right", no_wrap=True)
        if number:
            table.add_column("difference", justify="right", no_wrap=True)
    for name, (first, *later) in found.rows.items():
        cells = [Text(figure(first.score))]
        for step in later:
            style = ("green" if (step.difference or 0) > 0 else "red") if step.sure else ""
            cells += [Text(figure(step.score)), Text(step.text, style=style)]
        table.add_row(Text(name), *cells)
    return table


# The transfer table: pretrained against not pretrained on each held-out dataset, beside the published figures.


HEAD = ("dataset", "task", "metric", "n", "epochs", "pretrained", "direct", "difference", "p", "published †")
TRANSFER_NOTE = "† pretrained / direct of the 7B models in the paper, quoted and not measured here"
SYNTHETIC = "Synthetic data: these figures say that the protocol runs, not what the atlas is worth."


def transfer_table(result: TransferResult) -> Group:
    """For the terminal."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for name in HEAD:
        table.add_column(name, overflow="fold")
    for cells in _transfer_rows(result):
        table.add_row(*map(Text, cells))
    return Group(table, *map(Text, _notes(result)))


def transfer_markdown(result: TransferResult) -> str:
    """A GitHub table with its notes."""
    lines = [HEAD, ["---"] * len(HEAD), *_transfer_rows(result)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return "\n\n".join([table, *_notes(result)]) + "\n"


def _transfer_rows(result: TransferResult) -> list[list[str]]:
    return [
        [
            row.dataset,
            row.task,
            metric_name(row.metric),
            str(row.n),
            str(row.epochs),
            _scored(row.pretrained),
            _scored(row.direct),
            _scored(row.difference),
            figure(row.p_value),
            " / ".join(figure(value) for value in row.published.values()) if row.published else figure(None),
        ]
        for row in result.rows
    ]


def _scored(scored: Scored) -> str:
    return f"{figure(scored.score)} ({interval(scored.ci95)})"


def _notes(result: TransferResult) -> list[str]:
    absent = [f"Not in this atlas: {', '.join(result.not_in_atlas)}."] if result.not_in_atlas else []
    return [TRANSFER_NOTE, *absent, *([SYNTHETIC] if result.synthetic else [])]


# A leaderboard as a rich table, HTML, Markdown, LaTeX or CSV: the same rows, marks and notes in each.
#
# A published row carries a dagger and its source wherever it is shown; the best score of a ranked task is bold, and
# nothing of a row that is not ranked.


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
            name = Text(_row_name(entry), style="dim" if entry.published else "")
            cells = [_terminal_cell(board, entry, key) for key in keys]
            table.add_row(Text(_rank(entry)), name, *cells, *map(Text, () if number else _ends(entry)))
        tables.append(table)
    return Group(*tables, *map(Text, _marks(board)))


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
        names = (Cell(_rank(entry)), Cell(_row_name(entry)))
        ends = (Cell(figure(entry.mean)), Cell(figure(entry.mean_rank, 2)), Cell(count(entry.num_rows)))
        scores = (Cell(_with_interval(entry, key), _best(board, entry, key)) for key in board.tasks)
        rows.append([*names, *scores, Cell(count(entry.num_failed)), *ends])
    head = ("#", "model", *board.tasks, "failed", "mean", "mean rank", "n")
    return TextTable(_caption(board), head, rows, notes=_marks(board), left=2)


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
        rows.append((entry, _rank(entry), _row_name(entry), cells))
    return template.render(style=style("style.css"), board=board, rows=rows, notes=_marks(board), title=_caption(board))


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


def _row_name(entry: Entry) -> str:
    return f"{entry.name} {DAGGER}" if entry.published else entry.name


def _caption(board: Leaderboard) -> str:
    ranked = any(entry.rank is not None for entry in board.entries)
    return f"Leaderboard, ranked over {', '.join(board.ranked_tasks)}" if ranked else "Leaderboard; nothing is ranked"


def _marks(board: Leaderboard) -> list[str]:
    sources = sorted({entry.source for entry in board.entries if entry.published})
    found = [*board.warnings]
    found += [f"{PUBLISHED_NOTE} ({'; '.join(sources)})"] if sources else []
    shared = {note for entry in board.entries if entry.published for note in entry.notes}
    found += [f"{entry.name}: {note}" for entry in board.entries for note in entry.notes if note not in shared]
    return found + [f"Skipped: {each}" for each in board.skipped]


def _spelled(text: str) -> str:
    """A text that no spreadsheet takes for a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text
