"""`hba score`, `hba report`: from predictions to numbers to a page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hba.cli.options import JsonFlag, answer, bold, say

if TYPE_CHECKING:
    from hba.evaluate.results import Metrics


def score_command(
    run: Annotated[Path, typer.Argument(help="Run folder with predictions.jsonl.")],
    resamples: Annotated[int, typer.Option(min=100, help="Bootstrap resamples for the intervals.")] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    by: Annotated[
        list[str] | None, typer.Option(help="Break scores down by this field; give it again for more.")
    ] = None,
    cluster: Annotated[
        str, typer.Option(help="Field whose equal values are drawn together: auto, none, or a field of the rows.")
    ] = "auto",
    atlas: Annotated[Path | None, typer.Option(help="Atlas with the row fields; the run's own by default.")] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Exit 0 although rows that the run was asked for have no prediction.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Compute the published metrics with 95% intervals and chance levels; writes metrics.json."""
    from hba.evaluate.score import score_run

    metrics = score_run(run, resamples=resamples, seed=seed, by=by or (), cluster=cluster, atlas=atlas)

    def show() -> None:
        from rich.console import Console

        from hba.report.terminal import breakdown_tables, metrics_table, unmapped_table

        for table in (metrics_table(metrics), unmapped_table(metrics), *breakdown_tables(metrics)):
            if table is not None:
                Console().print(table)

    answer(metrics.record(), as_json=json, show=show)
    _finish(run, metrics, partial)


def _finish(run: Path, metrics: Metrics, partial: bool) -> None:
    """Exit 1 when rows that were asked for are missing, unless that was allowed."""
    from hba.evaluate.predictions import MERGE

    if metrics.aggregate.other_rows:
        fix = "Predict into another folder with --run, or put back the predict.json of these predictions."
        what = "the predictions are of other rows than those that predict.json was written for"
        sys.stderr.write(f"{'warning' if partial else 'error'}: {what}. Fix: {fix}\n")
        if not partial:
            raise typer.Exit(1)
    if not metrics.aggregate.n_missing:
        return
    folder = run if run.is_dir() else run.parent
    shards = sorted(path.parent.name for path in folder.glob("shards/*/predictions.jsonl"))
    part = f"only {metrics.aggregate.rows} have a prediction, and these are the scores of a part"
    unmerged = f"; predictions of shards are not merged ({', '.join(shards[:8])})" if shards else ""
    fix = MERGE if shards else "Run the same `hba predict` command again: it answers the rest."
    if partial:
        sys.stderr.write(f"warning: {part}{unmerged}.\n")
        return
    sys.stderr.write(f"error: {part}{unmerged}. Fix: {fix} Or accept a part with --partial.\n")
    raise typer.Exit(1)


def report_command(
    run: Annotated[Path, typer.Argument(help="Run folder with metrics.json.")],
    atlas: Annotated[Path | None, typer.Option(help="Atlas folder, for samples that play in the page.")] = None,
    out: Annotated[Path | None, typer.Option(help="File to write; RUN/report.html by default.")] = None,
    json: JsonFlag = False,
) -> None:
    """Write one self-contained HTML page: scores, confusion, curves, samples, provenance."""
    from hba.report import write_report

    page = write_report(run, atlas_root=atlas, out=out)
    answer({"report": str(page)}, as_json=json, show=lambda: say(f"Wrote {bold(page)}."))
