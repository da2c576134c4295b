"""Comparisons of runs for the terminal: one line a task, the mean last."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from hba.evaluate.compare import Difference
from hba.evaluate.resample import EXACT_MATCH
from hba.evaluate.runs import Comparison
from hba.evaluate.variance import Spread, Variance
from hba.report.words import DASH, count, figure, interval, metric_name

LEVEL = 0.05


def comparison_table(found: Comparison) -> Table:
    """B minus A per task; a difference that Holm's correction leaves significant at 5 % is coloured."""
    rows = f"{count(found.num_rows)} common rows"
    left_out = f", {count(sum(found.left_out))} of one run only left out" if sum(found.left_out) else ""
    grouped = "rows of one group drawn together" if found.clustered_by else "rows independent"
    table = _table(f"B ({found.b}) minus A ({found.a}): {rows}{left_out}; {grouped}")
    table.add_column("task", overflow="fold")
    for name in ("A", "B", "B-A", "95% interval", "p (Holm)", "won/lost"):
        table.add_column(name, justify="right", no_wrap=True)
    for key, line in found.paired.tasks.items():
        table.add_row(Text(_name(key, line.metric)), *_difference(line, line.p_holm))
    if found.paired.mean:
        table.add_section()
        table.add_row(Text("mean", style="bold"), *_difference(found.paired.mean, found.paired.mean.p_value))
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


def variance_table(found: Variance) -> Table:
    """Mean and spread per task."""
    table = _table(f"{len(found.runs)} runs over {count(found.num_rows)} common rows")
    table.add_column("task", overflow="fold")
    for name in ("mean", "sd of runs", "95% over runs", "95% over rows", "same answer"):
        table.add_column(name, justify="right", no_wrap=True)
    for key, line in found.tasks.items():
        table.add_row(Text(_name(key, line.metric)), *_spread(line))
    if found.mean:
        table.add_section()
        table.add_row(Text("mean", style="bold"), *_spread(found.mean))
    return table


def _table(title: str) -> Table:
    return Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=0, pad_edge=False)


def _name(key: str, metric: str) -> str:
    """The task, with its metric where that is not the benchmark's own."""
    return f"{key} ({metric_name(metric)})" if metric == EXACT_MATCH else key


def _difference(line: Difference, p_value: float | None) -> list[Text]:
    sure = p_value is not None and p_value < LEVEL and line.difference is not None
    style = ("green" if (line.difference or 0) > 0 else "red") if sure else ""
    signed = DASH if line.difference is None else f"{line.difference:+.3f}"
    p_text = DASH if p_value is None else "<0.001" if p_value < 0.001 else figure(p_value)
    sides = f"{count(line.gained)}/{count(line.lost)}"
    plain = (interval(line.ci95), p_text, sides)
    return [Text(figure(line.a)), Text(figure(line.b)), Text(signed, style=style), *map(Text, plain)]


def _spread(line: Spread) -> list[Text]:
    figures = (figure(line.mean), figure(line.sd), interval(line.ci95_runs), interval(line.ci95_rows))
    return [Text(text) for text in (*figures, figure(line.agreement))]
