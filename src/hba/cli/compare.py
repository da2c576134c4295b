"""`hba compare`: whether two runs differ, and how far several runs of one model spread."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from hba.cli.options import JsonFlag, answer
from hba.errors import InputError


class _Options(NamedTuple):
    allow_other_data: bool
    resamples: int
    seed: int


AllowOtherData = Annotated[
    bool, typer.Option("--allow-other-data", help="Compare the common rows of runs on different data.")
]


def compare_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUNS...", help="Run folders with predictions.jsonl.")],
    seeds: Annotated[
        bool, typer.Option("--seeds", help="The runs are one model with other seeds or prompts: show their spread.")
    ] = False,
    allow_other_data: AllowOtherData = False,
    flips: Annotated[int, typer.Option(min=0, help="Print so many of the samples that changed sides.")] = 0,
    resamples: Annotated[int, typer.Option(min=100, help="Bootstrap resamples.")] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    json: JsonFlag = False,
) -> None:
    """Test B against A over the same samples (two runs), or show the spread of several (--seeds)."""
    options = _Options(allow_other_data, resamples, seed)
    if seeds:
        _show_variance(runs, options, json)
    elif len(runs) == 2:
        _show_comparison(runs[0], runs[1], options, flips, json)
    else:
        fix = "Give A and B, or say with --seeds that all are one model."
        raise InputError(f"{len(runs)} runs to compare, expected 2", fix=fix)


def _show_comparison(a: Path, b: Path, options: _Options, flips: int, as_json: bool) -> None:
    from hba.evaluate.runs import compare_runs

    found = compare_runs(a, b, **options._asdict())

    def show() -> None:
        from rich.console import Console

        from hba.report.compare_terminal import comparison_table, flips_table

        Console().print(comparison_table(found))
        if flips:
            Console().print(flips_table(found, flips))

    answer(found.record(), as_json=as_json, show=show)


def _show_variance(runs: list[Path], options: _Options, as_json: bool) -> None:
    from dataclasses import asdict

    from hba.evaluate.variance import run_variance

    found = run_variance(runs, **options._asdict())

    def show() -> None:
        from rich.console import Console

        from hba.report.compare_terminal import variance_table

        Console().print(variance_table(found))

    answer(asdict(found), as_json=as_json, show=show)
