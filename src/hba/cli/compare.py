"""`hba compare` and `hba leaderboard`: whether runs differ, how far they spread, which is best at what."""

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


def leaderboard_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUNS...", help="Scored run folders.")],
    out: Annotated[
        list[Path] | None, typer.Option(help="File to write: .html, .md, .tex or .csv; may be repeated.")
    ] = None,
    published: Annotated[
        list[str] | None, typer.Option(help="Published table to show, none for no table; may be repeated.")
    ] = None,
    tasks: Annotated[str, typer.Option(help="Tasks to rank by, such as EMO,SEN; those that all runs have.")] = "",
    max_quarantined: Annotated[
        float, typer.Option(min=0, max=1, help="Share of samples that a ranked run may have left out.")
    ] = 0.01,
    allow_other_data: Annotated[
        bool, typer.Option("--allow-other-data", help="Rank runs on different data, marked as such.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Rank scored runs by task and mean rank, beside the published results."""
    from hba.evaluate.leaderboard import DEFAULT_TABLES, build_leaderboard

    tables = DEFAULT_TABLES if published is None else [name for name in published if name != "none"]
    board = build_leaderboard(
        runs,
        tables=tables,
        tasks=[key.strip() for key in tasks.split(",") if key.strip()],
        allow_other_data=allow_other_data,
        max_quarantined=max_quarantined,
    )
    for path in out or ():
        from hba.report.leaderboard import write_leaderboard

        write_leaderboard(board, path)

    def show() -> None:
        from rich.console import Console

        from hba.report.leaderboard import leaderboard_table

        Console().print(leaderboard_table(board))

    answer(board.record(), as_json=json, show=show)
