"""`hba compare` and `hba leaderboard`: whether runs differ, how far they spread, which is best at what."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from hba.cli.options import JsonFlag, answer, say_written
from hba.errors import InputError


class _Options(NamedTuple):
    allow_other_data: bool
    resamples: int
    seed: int


class _Answer(NamedTuple):
    """How a comparison is answered: the files that are written, and --json."""

    out: list[Path]
    as_json: bool


AllowOtherData = Annotated[
    bool, typer.Option("--allow-other-data", help="Compare the common rows of runs on different data.")
]


def compare_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUNS...", help="Run folders with predictions.jsonl.")],
    seeds: Annotated[
        bool, typer.Option("--seeds", help="The runs are one model with other seeds or prompts: show their spread.")
    ] = False,
    allow_other_data: AllowOtherData = False,
    out: Annotated[list[Path] | None, typer.Option(help="File to write: .md or .tex; may be repeated.")] = None,
    flips: Annotated[int, typer.Option(min=0, help="Print so many of the samples that changed sides.")] = 0,
    resamples: Annotated[int, typer.Option(min=100, help="Bootstrap resamples.")] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    json: JsonFlag = False,
) -> None:
    """Test B against A over the same samples (two runs), or show the spread of several (--seeds)."""
    from hba.report.tables import WRITERS, writer_of

    options, how = _Options(allow_other_data, resamples, seed), _Answer(out or [], json)
    for path in how.out:
        writer_of(path, WRITERS)  # refused before minutes of resampling
    if seeds:
        _show_variance(runs, options, how)
    elif len(runs) == 2:
        _show_comparison(runs[0], runs[1], options, flips, how)
    else:
        fix = "Give A and B, or say with --seeds that all are one model."
        raise InputError(f"{len(runs)} runs to compare, expected 2", fix=fix)


def _show_comparison(a: Path, b: Path, options: _Options, flips: int, how: _Answer) -> None:
    from hba.evaluate.runs import compare_runs
    from hba.report.comparison import comparison
    from hba.report.tables import write_table

    found = compare_runs(a, b, **options._asdict())
    table = comparison(found)
    for path in how.out:
        write_table(table, path)

    def show() -> None:
        from rich.console import Console

        from hba.report.compare_terminal import flips_table, terminal_table

        Console().print(terminal_table(table))
        if flips:
            Console().print(flips_table(found, flips))
        say_written(how.out)

    answer(found.record(), as_json=how.as_json, show=show)


def _show_variance(runs: list[Path], options: _Options, how: _Answer) -> None:
    from dataclasses import asdict

    from hba.evaluate.variance import run_variance
    from hba.report.comparison import variance
    from hba.report.tables import write_table

    found = run_variance(runs, **options._asdict())
    table = variance(found)
    for path in how.out:
        write_table(table, path)

    def show() -> None:
        from rich.console import Console

        from hba.report.compare_terminal import terminal_table

        Console().print(terminal_table(table))
        say_written(how.out)

    answer(asdict(found), as_json=how.as_json, show=show)


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
        say_written(out or ())

    answer(board.record(), as_json=json, show=show)
