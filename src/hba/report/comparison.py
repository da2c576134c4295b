"""Comparisons of runs in words: one line a task, the mean last; for the terminal, LaTeX and Markdown alike.

Bold is a difference that is significant at 5 %, after Holm's correction where it is a task's.
"""

from __future__ import annotations

from hba.evaluate.compare import Difference
from hba.evaluate.resample import EXACT_MATCH
from hba.evaluate.runs import Comparison
from hba.evaluate.variance import Spread, Variance
from hba.report.tables import Cell, TextTable
from hba.report.words import DASH, count, figure, interval, metric_name

LEVEL = 0.05
NOTE = "Intervals are of 95% by the paired bootstrap; p is corrected over the tasks (Holm), that of the mean is not."
SPREAD = "95% over runs: what another seed or prompt would give on these rows; over rows: what other rows would give."


def comparison(found: Comparison) -> TextTable:
    """B minus A per task."""
    rows = f"{count(found.num_rows)} common rows"
    left_out = f", {count(sum(found.left_out))} of one run only left out" if sum(found.left_out) else ""
    grouped = "rows of one group drawn together" if found.clustered_by else "rows independent"
    mean = found.paired.mean
    return TextTable(
        caption=f"B ({found.b}) minus A ({found.a}): {rows}{left_out}; {grouped}",
        head=("task", "A", "B", "B-A", "95% interval", "p (Holm)", "won/lost"),
        rows=[_difference(_name(key, line.metric), line, line.p_holm) for key, line in found.paired.tasks.items()],
        summary=_difference("mean", mean, mean.p_value) if mean else None,
        notes=[f"{NOTE} Bold: p below {LEVEL}."],
    )


def variance(found: Variance) -> TextTable:
    """Mean and spread per task."""
    return TextTable(
        caption=f"{len(found.runs)} runs over {count(found.num_rows)} common rows",
        head=("task", "mean", "sd of runs", "95% over runs", "95% over rows", "same answer"),
        rows=[_spread(_name(key, line.metric), line) for key, line in found.tasks.items()],
        summary=_spread("mean", found.mean) if found.mean else None,
        notes=[f"Runs: {', '.join(found.runs)}.", SPREAD],
    )


def _name(key: str, metric: str) -> str:
    """The task, with its metric where that is not the benchmark's own."""
    return f"{key} ({metric_name(metric)})" if metric == EXACT_MATCH else key


def _difference(name: str, line: Difference, p_value: float | None) -> list[Cell]:
    sure = p_value is not None and p_value < LEVEL and line.difference is not None
    signed = DASH if line.difference is None else f"{line.difference:+.3f}"
    p_text = DASH if p_value is None else "<0.001" if p_value < 0.001 else figure(p_value)
    plain = (interval(line.ci95), p_text, f"{count(line.gained)}/{count(line.lost)}")
    return [*map(Cell, (name, figure(line.a), figure(line.b))), Cell(signed, sure), *map(Cell, plain)]


def _spread(name: str, line: Spread) -> list[Cell]:
    figures = (figure(line.mean), figure(line.sd), interval(line.ci95_runs), interval(line.ci95_rows))
    return [Cell(text) for text in (name, *figures, figure(line.agreement))]
