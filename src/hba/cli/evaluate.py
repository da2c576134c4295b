"""`hba predict`, `hba score`, `hba report`: from a model to numbers to a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hba.cli.options import AllowQuarantined, JsonFlag, Overrides, answer, bold, finish, say
from hba.errors import InputError


def predict_command(
    model: Annotated[str, typer.Argument(help="Run folder, checkpoint, or Hugging Face model.")],
    overrides: Overrides = None,
    atlas: Annotated[str, typer.Option(help="Atlas folder or hub id.")] = ...,  # type: ignore[assignment]
    split: Annotated[str, typer.Option(help="Split to predict; slices such as test[:100] work.")] = "test",
    backend: Annotated[str | None, typer.Option(help="How the model answers; heads for a checkpoint.")] = None,
    run: Annotated[Path | None, typer.Option(help="Run folder to write; the model's own by default.")] = None,
    allow_quarantined: AllowQuarantined = 0,
    json: JsonFlag = False,
) -> None:
    """Answer every sample of a split; resumes where it stopped."""
    from hba.cli.progress import counted
    from hba.config import load_config
    from hba.evaluate.config import PredictConfig
    from hba.evaluate.predict import predict_run

    settings = load_config(PredictConfig, None, overrides or [])
    folder = run or _run_folder(model)
    with counted("predict") as progress:
        summary = predict_run(
            model, folder, atlas=atlas, split=split, config=settings, progress=progress, backend=backend
        )
    text = f"{summary.predicted} predictions in {bold(folder)}; {summary.skipped} rows have no head."
    result = {
        "run": str(folder),
        "predicted": summary.predicted,
        "skipped": summary.skipped,
        "quarantined": len(summary.quarantined),
    }
    answer(result, as_json=json, show=lambda: say(text))
    finish(summary.quarantined, allow_quarantined)


def _run_folder(model: str) -> Path:
    """Where predictions go without --run: the model's own run folder, and no other place is guessed."""
    if not (Path(model) / "checkpoints").is_dir():
        fix = "Check the path, or say with --run where the predictions go."
        raise InputError("no run folder of a training", where=model, fix=fix)
    return Path(model)


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
    json: JsonFlag = False,
) -> None:
    """Compute the published metrics with 95% intervals and chance levels; writes metrics.json."""
    from hba.evaluate.score import score_run

    metrics = score_run(run, resamples=resamples, seed=seed, by=by or (), cluster=cluster, atlas=atlas)

    def show() -> None:
        from rich.console import Console

        from hba.report.terminal import breakdown_tables, metrics_table

        for table in (metrics_table(metrics), *breakdown_tables(metrics)):
            Console().print(table)

    answer(metrics, as_json=json, show=show)


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
