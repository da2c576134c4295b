"""Comparisons of runs in words: one line a task, the mean last; for the terminal, LaTeX and Markdown alike.

Bold is a difference that is significant at 5 %, after Holm's correction where it is a task's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from hba.evaluate.compare import MEAN, Comparison, Difference, SeedComparison, SeedDifference, Spread, Variance
from hba.evaluate.results import SCANT
from hba.evaluate.statistics import EXACT_MATCH
from hba.report.tables import Cell, TextTable
from hba.report.words import DASH, count, figure, interval, metric_name, scant

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
