"""Runs side by side, as tables in any form: comparisons, training stages, transfer, the leaderboard.

Bold is a difference that is significant at 5 %, after Holm's correction where it is a task's.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.text import Text

from hba.errors import InputError
from hba.evaluate.compare import MEAN, Comparison, Difference, SeedComparison, SeedDifference, Spread, Variance
from hba.evaluate.leaderboard import DEFAULT_TABLES, Entry, Leaderboard, build_leaderboard
from hba.evaluate.results import SCANT, Metrics, convert
from hba.evaluate.runs import open_run
from hba.evaluate.statistics import EXACT_MATCH, holm
from hba.report import words
from hba.report.tables import DAGGER, Cell, Row, Table, to_latex, to_markdown, writer_of
from hba.report.words import DASH, count, figure, interval, metric_name, scant
from hba.storage import atomic_folder, plural, read_json, to_csv, write_data, write_json

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

    from hba.evaluate.bundle import Shown
    from hba.train.transfer import Scored, TransferResult


LEVEL = 0.05
NOTE = "Intervals are of 95% by the paired bootstrap; p is corrected over the tasks (Holm), that of the mean is not."
SEEDS = "Intervals are of 95% over rows and runs (Student's t); p is corrected over the tasks (Holm), not for the mean."
SPREAD = "95% over runs: what another seed or prompt would give on these rows; over rows: what other rows would give."
Line = TypeVar("Line", Difference, SeedDifference, Spread)
K = TypeVar("K")


def comparison(found: Comparison) -> Table:
    """B minus A per task."""

    def cells(key: str, line: Difference) -> Row:
        return (*_difference(key, line), f"{count(line.gained)}/{count(line.lost)}")

    return _compared(
        found,
        title=f"B ({found.b}) minus A ({found.a}): {_rows(found)}; {_grouped(found)}",
        head=("task", "A", "B", "B-A", "95% interval", "p (Holm)", "won/lost", "failed"),
        lines=(found.paired.tasks, found.paired.mean),
        cells=cells,
        num_a=1,
        notes=[f"{NOTE} Bold: p below {LEVEL}."],
    )


def suite_table(names: Sequence[str], found: Mapping[str, Comparison], baseline: str, own: Metrics) -> Table:
    """A line a setting: its mean and that of each task, and what it differs by from the `baseline`, over the rows that
    both answered. `found` has the comparison of every other setting with it, `own` are the scores of the baseline over
    all its rows. p-values are those of the mean, corrected over settings."""
    scored = [key for key, task in own.tasks.items() if task.score is not None]
    tasks = list(dict.fromkeys([*scored, *(key for each in found.values() for key in each.paired.tasks)]))
    means = {name: each.paired.mean for name, each in found.items()}
    tested = {name: mean.p_value for name, mean in means.items() if mean is not None and mean.p_value is not None}
    corrected = dict(zip(tested, holm([p for p in tested.values() if p is not None]), strict=True))
    rows: list[Row] = []
    for name in names:
        if name == baseline:
            shown = [figure(own.tasks[key].score if key in own.tasks else None) for key in tasks]
            rows.append((name, figure(own.mean.score), DASH, "", "", *shown, count(own.aggregate.n_failed)))
            continue
        each, mean = found[name], means[name]
        p_value = corrected.get(name)
        line: Row = (DASH, Cell(DASH), "", DASH)
        if mean is not None:
            line = (figure(mean.b), *_tested(mean, p_value))
        rows.append((name, *line, *(_signed(each.paired.tasks.get(key)) for key in tasks), count(each.failed[MEAN][1])))
    said = f"Each setting against {baseline} on the rows that both answered; tasks: score (difference)."
    notes = [
        f"{said} {baseline} itself: over all its rows.",
        "Intervals are of 95% by the paired bootstrap; p is that of the mean, corrected over the settings (Holm).",
    ]
    of = {name: sum(_in_mean(line) for line in each.paired.tasks.values()) for name, each in found.items()}
    warnings = [
        f"{name}: the mean is over {plural(number, 'task')}, that of {baseline} over {len(scored):,}."
        for name, number in of.items()
        if number != len(scored)
    ]
    warnings += [
        f"{name}: {count(each.num_rows)} rows in common with {baseline}, which answered {count(own.aggregate.n)}."
        for name, each in found.items()
        if own.aggregate.n and each.num_rows != own.aggregate.n
    ]
    warnings += [
        f"{name}: {key} is not compared: {line.note}."
        for name, each in found.items()
        for key, line in each.paired.tasks.items()
        if line.note
    ]
    head = ("setting", "mean", f"minus {baseline}", "95% interval", "p (Holm)", *tasks, "failed")
    return Table(title="", head=head, rows=rows, notes=notes, warnings=warnings, tight=True)


def _in_mean(line: Difference) -> bool:
    return line.b is not None and line.metric != EXACT_MATCH


@dataclass(frozen=True)
class SuiteTables:
    """A suite's table for the terminal: what settings differ by, and the tasks in as many tables as the width wants."""

    whole: Table
    baseline: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """The tables; figures stand whole beside the name of their setting."""
        lines = [self.whole.texts(row) for row in self.whole.rows]
        head = ("setting", "mean", "difference", "95% interval", "p (Holm)", "failed")
        rows: list[Row] = [(*line[:5], line[-1]) for line in lines]
        title = f"Each setting against {self.baseline}, on the rows that both answered"
        yield Table(title=title, head=head, rows=rows, warnings=self.whole.warnings, tight=True)
        room = options.max_width - NAME_WIDTH - GAP
        sizes = {
            place: GAP + max(len(self.whole.head[place]), *(len(line[place].text) for line in lines))
            for place in range(5, len(self.whole.head) - 1)
        }
        for places in filter(None, _fitting(sizes, room, room)):
            names = [self.whole.head[place] for place in places]
            cells: list[Row] = [(line[0], *(line[place] for place in places)) for line in lines]
            yield Table(title="", head=("setting", *names), rows=cells)


def _fitting(sizes: Mapping[K, int], first: int, room: int) -> list[list[K]]:
    """Columns of these sizes in as many tables as they want: of the `first` one's room, then of `room` each."""
    left, blocks = first, [list[K]()]
    for key, size in sizes.items():
        if size > left and blocks[-1]:
            blocks.append([])
            left = room
        blocks[-1].append(key)
        left -= size
    return blocks


def _signed(line: Difference | None) -> str:
    if line is None or line.difference is None:
        return DASH
    return f"{figure(line.b)} ({line.difference:+.3f})"


def seed_comparison(found: SeedComparison) -> Table:
    """The mean of B's runs minus that of A's, per task."""

    def cells(key: str, line: SeedDifference) -> Row:
        return (*_difference(key, line), figure(line.sd_a), figure(line.sd_b))

    return _compared(
        found,
        title=f"B ({len(found.b)} runs) minus A ({len(found.a)} runs): {_rows(found)}; {_grouped(found)}",
        head=("task", "A", "B", "B-A", "95% interval", "p (Holm)", "sd of A", "sd of B", "failed"),
        lines=(found.tasks, found.mean),
        cells=cells,
        num_a=len(found.a),
        notes=[f"A: {', '.join(found.a)}. B: {', '.join(found.b)}.", f"{SEEDS} Bold: p below {LEVEL}."],
    )


def variance(found: Variance) -> Table:
    """Mean and spread per task."""

    def cells(_: str, line: Spread) -> Row:
        return (figure(line.mean), figure(line.sd), *map(interval, (line.ci95_runs, line.ci95_rows)),
                figure(line.agreement))  # fmt: skip

    return _compared(
        found,
        title=f"{len(found.runs)} runs over {_rows(found)}",
        head=("task", "mean", "sd of runs", "95% over runs", "95% over rows", "same answer", "failed"),
        lines=(found.tasks, found.mean),
        cells=cells,
        num_a=len(found.runs),
        notes=[f"Runs: {', '.join(found.runs)}.", SPREAD],
    )


def _compared(
    found: Comparison | SeedComparison | Variance,
    *,
    title: str,
    head: Sequence[str],
    lines: tuple[Mapping[str, Line], Line | None],
    cells: Callable[[str, Line], Row],
    num_a: int,
    notes: Sequence[str],
) -> Table:
    """A line a task and one for the mean, each with what `cells` says of it; the first `num_a` of the runs are A's."""
    tasks, mean = lines

    def row(key: str, line: Line) -> Row:
        name = _name(key, line.metric) if key != MEAN else "mean"
        sides = [side for side in (found.failed[key][:num_a], found.failed[key][num_a:]) if side]
        return (name, *cells(key, line), "/".join(count(sum(side)) for side in sides))

    named: dict[str, Line] = {**tasks, **({} if mean is None else {"the mean": mean})}
    few: dict[str, float] = {
        key: line.n_independent for key, line in tasks.items() if line.n_independent < SCANT and not line.note
    }
    return Table(
        title=title,
        head=head,
        rows=[row(key, line) for key, line in tasks.items()],
        summary=row(MEAN, mean) if mean else None,
        notes=notes,
        # What is not compared, and what rests on too little.
        warnings=[
            *(f"{key} is not compared: {line.note}." for key, line in named.items() if line.note),
            *([scant(few)] if few else []),
        ],
        tight=True,
    )


def _rows(found: Comparison | SeedComparison | Variance) -> str:
    asked = f" of {count(found.num_asked)} asked" if found.num_asked and found.num_asked > found.num_rows else ""
    left_out = f", {count(sum(found.left_out))} left out that not all runs answered" if sum(found.left_out) else ""
    return f"{count(found.num_rows)} common rows{asked}{left_out}"


def _grouped(found: Comparison | SeedComparison) -> str:
    return "rows of one group drawn together" if found.clustered_by else "rows independent"


def _name(key: str, metric: str) -> str:
    """The task, with its metric where that is not the benchmark's own."""
    return f"{key} ({metric_name(metric)})" if metric == EXACT_MATCH else key


def _difference(key: str, line: Difference | SeedDifference) -> Row:
    return (figure(line.a), figure(line.b), *_tested(line, line.p_value if key == MEAN else line.p_holm))


def _tested(line: Difference | SeedDifference, p_value: float | None) -> Row:
    p_text = DASH if p_value is None else "<0.001" if p_value < 0.001 else figure(p_value)
    signed = DASH if line.difference is None else f"{line.difference:+.3f}"
    return (Cell(signed, _style(line.difference, p_value)), interval(line.ci95), p_text)


def _style(difference: float | None, p_value: float | None) -> str:
    """The colour of a significant difference."""
    sure = p_value is not None and p_value < LEVEL and difference is not None
    return ("green" if f"{difference:+.3f}"[0] == "+" else "red") if sure else ""


def flips_table(found: Comparison, limit: int) -> Table:
    """The first `limit` rows that changed sides, for the terminal."""
    rows = [
        (flip.id, flip.dataset, flip.target, flip.a or DASH, Cell(flip.b or DASH, "green" if flip.gained else "red"))
        for flip in found.flips[:limit]
    ]
    title = f"{plural(len(found.flips), 'row')} changed sides"
    return Table(title=title, head=("id", "dataset", "target", "A", "B"), rows=rows, align="l", tight=True)


# --- training stages: the score of each, and its difference from the stage before with an interval --------------------
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

    def steps(lines: Sequence[Difference], of_mean: bool) -> tuple[Step, ...]:
        later = [
            Step(
                score=line.b,
                difference=line.difference,
                ci95=line.ci95,
                p_value=line.p_value if of_mean else line.p_holm,
                same=line.difference == 0 and line.gained == line.lost == 0,
            )
            for line in lines
        ]
        return (Step(score=lines[0].a), *later)

    rows = {
        _name(key, first.metric): steps([each.paired.tasks[key] for each in found], of_mean=False)
        for key, first in found[0].paired.tasks.items()
    }
    if found[0].paired.mean is not None:
        means = [each.paired.mean for each in found if each.paired.mean is not None]
        rows["mean over tasks"] = steps(means, of_mean=True)
    return Stages(names=(found[0].a, *(each.b for each in found)), rows=rows, num_rows=found[0].num_rows)


def write_stages(found: Stages, run: Path) -> None:
    """Write stages.json into the run folder."""
    write_json(run / FILE, asdict(found))


def read_stages(run: Path) -> Stages | None:
    """stages.json of a run folder, None without one. Raises InputError when it is malformed."""
    path = run / FILE
    return convert(read_json(path), Stages, str(path)) if path.is_file() else None


def stages_table(found: Stages) -> Table:
    """One column a stage, each but the first with its difference; a sure one is coloured."""
    rows = []
    for name, (first, *later) in found.rows.items():
        cells: list[str | Cell] = [name, figure(first.score)]
        for step in later:
            cells += [figure(step.score), Cell(step.text, _style(step.difference or None, step.p_value))]
        rows.append(cells)
    head = ["task", found.names[0], *(head for name in found.names[1:] for head in (name, "difference"))]
    title = f"Stage by stage; {count(found.num_rows)} common rows, differences with their 95% intervals"
    return Table(title=title, head=head, rows=rows)


# --- transfer: pretrained against not pretrained on each held-out dataset, beside the published figures ---------------


HEAD = ("dataset", "task", "metric", "n", "epochs", "pretrained", "direct", "difference", "p", f"published {DAGGER}")
TRANSFER_NOTE = f"{DAGGER} pretrained / direct of the 7B models in the paper, quoted and not measured here"
SYNTHETIC = "Synthetic data: these figures say that the protocol runs, not what the atlas is worth."


def transfer_table(result: TransferResult) -> Table:
    """A row a dataset, with what must be known of the figures."""

    def scored(found: Scored) -> str:
        return f"{figure(found.score)} ({interval(found.ci95)})"

    rows = []
    for row in result.rows:
        starts = (scored(row.pretrained), scored(row.direct), scored(row.difference), figure(row.p_value))
        published = " / ".join(map(figure, row.published.values())) if row.published else DASH
        rows.append((row.dataset, row.task, metric_name(row.metric), str(row.n), str(row.epochs), *starts, published))
    absent = [f"Not in this atlas: {', '.join(result.not_in_atlas)}."] if result.not_in_atlas else []
    warnings = [TRANSFER_NOTE, *absent, *([SYNTHETIC] if result.synthetic else [])]
    return Table(title="", head=HEAD, rows=rows, warnings=warnings, align="l", tight=True)


# --- the leaderboard: the same rows, marks and notes in the terminal, HTML, Markdown, LaTeX and CSV -------------------
#
# A published row carries a dagger and its source wherever it is shown; the best score of a ranked task is bold, and
# nothing of a row that is not ranked.


PUBLISHED_NOTE = f"{DAGGER} published, quoted and not measured here"
NAME_WIDTH, GAP = 15, 2
ENDS = ("mean", "rank", "failed", "n")


@dataclass(frozen=True)
class LeaderboardTables:
    """For the terminal, with two decimals; tasks that its width has no room for stand in a table below."""

    board: Leaderboard

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """The tables, and the notes."""
        yield from _blocks(self.board, options.max_width)
        yield from map(Text, _marks(self.board))


def _blocks(board: Leaderboard, width: int) -> Iterator[Table]:
    cells = {key: [_score(board, entry, key, 2) for entry in board.entries] for key in board.tasks}
    ends = [
        (figure(entry.mean, 2), figure(entry.mean_rank, 2), count(entry.num_failed), count(entry.num_rows))
        for entry in board.entries
    ]
    # The first table has room for the mean, the rank and the counts as well, every one for the model.
    room = width - NAME_WIDTH - 2 * GAP - 4
    left = room - sum(GAP + max(map(len, column)) for column in zip(ENDS, *ends, strict=True))
    sizes = {
        key: GAP + max(len(key), *(max(len(cell.text), len(cell.note)) for cell in mine)) for key, mine in cells.items()
    }
    for number, keys in enumerate(_fitting(sizes, left, room)):
        rows: list[Row] = []
        for place, entry in enumerate(board.entries):
            if place and board.entries[place - 1].rank is not None and entry.rank is None:
                rows.append(())
            name = Cell(_row_name(entry), "dim" if entry.published else "")
            rows.append((_rank(entry), name, *(cells[key][place] for key in keys), *(() if number else ends[place])))
        head = ("#", "model", *keys, *(() if number else ENDS))
        title = "" if number else _title(board)
        yield Table(title=title, head=head, rows=rows, align="rlr")


def write_leaderboard(board: Leaderboard, path: Path) -> None:
    """Write the table to `path`; its suffix says how: .html, .md, .tex or .csv. Raises InputError for another."""
    write_data(path, writer_of(path, WRITERS)(board))


def write_site(shown: Shown, site: Path, render: Callable[..., str], *, max_quarantined: float) -> Leaderboard:
    """Write a static site into `site`: index.html with the board, NAME.html with the report of each bundle, and the
    bundles themselves. Pages load nothing from elsewhere and show nothing that is not in a bundle. It appears whole or
    not at all; a bundle of which no page can be made is moved to the refused ones. `render` is the report's."""
    from hba.evaluate.bundle import MALFORMED, malformed

    how: dict[str, Any] = {"tables": DEFAULT_TABLES, "allow_other_data": True, "max_quarantined": max_quarantined}
    pages: dict[str, str] = {}
    for name, folder in list(shown.runs.items()):
        try:
            build_leaderboard([folder], **how)
            pages[name] = render(open_run(folder), alone=True, notes=shown.notes[name])
        except (InputError, *MALFORMED) as error:
            del shown.runs[name]
            bundle = shown.bundles[name]
            said = f"{bundle}: {error.what}" if isinstance(error, InputError) else str(malformed(bundle, error))
            shown.refused.append(said)
    if not shown.runs:
        what = f"no bundle can be shown: {'; '.join(shown.refused)}"
        raise InputError(what, where=str(site), fix="Ask for others.")
    names = {folder: name for name, folder in shown.runs.items()}
    board = build_leaderboard(list(names), names=names, **how)
    for number, entry in enumerate(board.entries):
        if not entry.published:
            unverified = tuple(f"not verified: {note}" for note in shown.notes[entry.name])
            board.entries[number] = replace(entry, notes=(*entry.notes, *unverified))
    if site.is_dir():
        site.rmdir()
    with atomic_folder(site) as making:
        for name, page in pages.items():
            write_data(making / f"{name}.html", page)
            shutil.copyfile(shown.bundles[name], making / f"{name}.zip")
        write_data(making / "index.html", _html(board, {name: (f"{name}.html", f"{name}.zip") for name in shown.runs}))
    return board


def text_table(board: Leaderboard) -> Table:
    """For LaTeX and Markdown: three decimals, with the interval behind a measured score."""
    rows: list[Row] = []
    for entry in board.entries:
        scores = [_score(board, entry, key, 3) for key in board.tasks]
        ends = (count(entry.num_failed), figure(entry.mean), figure(entry.mean_rank, 2), count(entry.num_rows))
        rows.append((_rank(entry), _row_name(entry), *scores, *ends))
    head = ("#", "model", *board.tasks, "failed", "mean", "mean rank", "n")
    return Table(title=_title(board), head=head, rows=rows, notes=_marks(board), align="llr")


def _score(board: Leaderboard, entry: Entry, key: str, decimals: int) -> Cell:
    ranked = [other.scores[key] for other in board.entries if other.rank is not None and key in other.scores]
    best = entry.rank is not None and key in entry.scores and entry.scores[key] == max(ranked)
    reach = interval(entry.ci95[key], decimals) if key in entry.ci95 else ""
    return Cell(figure(entry.scores.get(key), decimals), "bold" if best else "dim" if entry.published else "", reach)


def _csv(board: Leaderboard) -> str:
    """Scores, intervals and rows as numbers."""
    figures = [name for key in board.tasks for name in (key, f"{key}_low", f"{key}_high", f"{key}_n")]
    head = ["rank", "model", "published", "source", "synthetic", *figures, "n", "n_failed", "mean", "mean_rank"]
    rows = []
    for entry in board.entries:
        row: list[object] = [entry.rank, entry.name, entry.published, entry.source, entry.synthetic]
        for key in board.tasks:
            row += [entry.scores.get(key), *(entry.ci95.get(key) or (None, None)), entry.n.get(key)]
        ends = [entry.num_rows, entry.num_failed, entry.mean, entry.mean_rank]
        rows.append([*row, *ends, "; ".join(entry.notes)])
    return to_csv([*head, "notes"], rows)


def _html(board: Leaderboard, links: Mapping[str, tuple[str, str]] | None = None) -> str:
    """A page that loads nothing; `links` are the page and the bundle of a run by its name."""
    cells = [[_score(board, entry, key, 3) for key in board.tasks] for entry in board.entries]
    rows = [(entry, _rank(entry), _row_name(entry), mine) for entry, mine in zip(board.entries, cells, strict=True)]
    values: dict[str, Any] = {"board": board, "rows": rows, "notes": _marks(board), "links": links or {}}
    return words.page("leaderboard.html.jinja", title=_title(board), **values)


WRITERS: dict[str, Callable[[Leaderboard], str]] = {
    ".html": _html,
    ".md": lambda board: to_markdown(text_table(board)),
    ".tex": lambda board: to_latex(text_table(board)),
    ".csv": _csv,
}


def _rank(entry: Entry) -> str:
    return DASH if entry.rank is None else str(entry.rank)


def _row_name(entry: Entry) -> str:
    return f"{entry.name} {DAGGER}" if entry.published else entry.name


def _title(board: Leaderboard) -> str:
    ranked = any(entry.rank is not None for entry in board.entries)
    return f"Leaderboard, ranked over {', '.join(board.ranked_tasks)}" if ranked else "Leaderboard; nothing is ranked"


def _marks(board: Leaderboard) -> list[str]:
    sources = sorted({entry.source for entry in board.entries if entry.published})
    found = [*board.warnings]
    found += [f"{PUBLISHED_NOTE} ({'; '.join(sources)})"] if sources else []
    shared = {note for entry in board.entries if entry.published for note in entry.notes}
    found += [f"{entry.name}: {note}" for entry in board.entries for note in entry.notes if note not in shared]
    return found + [f"Skipped: {each}" for each in board.skipped]
