"""How `--dry-run` of `hba predict` and `hba judge` is answered."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from hba.cli.options import answer
from hba.evaluate.estimate import Estimate


def show_estimate(expected: Estimate, verb: str, *, as_json: bool) -> None:
    """Answer a command with what it would do; `verb` is what is left to do with the rows."""
    answer(expected.record(), as_json=as_json, show=lambda: _show(expected, verb))


def _show(expected: Estimate, verb: str) -> None:
    table = Table(title="Dry run: nothing was asked", title_justify="left", show_header=False, box=None)
    for dataset, count in expected.datasets.items():
        table.add_row(dataset, f"{count:,} rows")
    table.add_row(f"left to {verb}", f"{expected.left:,} of {expected.rows:,} rows")
    if expected.requests_at_most > expected.left:
        again = f"{expected.requests_at_most // expected.left} a row, since useless replies are asked for again"
        table.add_row("requests", f"{expected.left:,}; {expected.requests_at_most:,} at most, {again}")
    how = "as measured on this folder's records" if expected.measured else "roughly; records in it would measure it"
    table.add_row("tokens in", f"{expected.tokens_in:,} {how}")
    table.add_row("tokens out", f"{expected.tokens_out_at_most:,}" + ("" if expected.measured else " at most"))
    table.add_row("cost", _cost(expected))
    Console().print(table)


def _cost(expected: Estimate) -> str:
    cost = expected.cost_usd_at_most
    if cost is None:
        return f"unknown: {expected.note}"
    once = ""
    if expected.requests_at_most > expected.left and not expected.measured:
        once = f" (${cost * expected.left / expected.requests_at_most:,.2f} with one request a row)"
    return f"${cost:,.2f} at most{once}, {expected.note}"
