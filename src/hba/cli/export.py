"""`hba export`: the benchmark as tasks of other harnesses, and results as a table of others' trackers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hba.cli.options import JsonFlag, answer, bold, say

LMMS_EXAMPLE = "Example: hba export lmms-eval runs/lmms --atlas runs/mini"
WANDB_EXAMPLE = "Example: hba export wandb runs/demo/sft --project atlas --offline"
INSPECT_EXAMPLE = "Example: hba export inspect runs/inspect --atlas runs/mini"

export_app = typer.Typer(no_args_is_help=True, help="The atlas as tasks of lmms-eval or Inspect, results for W&B.")

Out = Annotated[Path, typer.Argument(help="Folder to write.")]
AtlasOption = Annotated[str, typer.Option(help="Atlas folder with media files.")]
Split = Annotated[str, typer.Option(help="Split to export; slices such as test[:100] work.")]


@export_app.command("lmms-eval", epilog=LMMS_EXAMPLE)
def lmms_eval_command(
    out: Out,
    atlas: AtlasOption = ...,  # type: ignore[assignment]
    split: Split = "test",
    json: JsonFlag = False,
) -> None:
    """Write lmms-eval task definitions that ask, read and score as hba does."""
    from hba.export.lmms_eval import export_lmms_eval

    counts = export_lmms_eval(atlas, split, out)
    text = f"{sum(counts.values()):,} rows of {len(counts)} tasks in {bold(out)}. Run: "
    command = f"python -m lmms_eval --include_path {out} --tasks hba --model MODEL"
    answer({"out": str(out), "rows": counts, "command": command}, as_json=json, show=lambda: say(text + command))


@export_app.command("inspect", epilog=INSPECT_EXAMPLE)
def inspect_command(
    out: Out,
    atlas: AtlasOption = ...,  # type: ignore[assignment]
    split: Split = "test",
    json: JsonFlag = False,
) -> None:
    """Write Inspect tasks that ask, read and score as hba does."""
    from hba.export.inspect_ai import export_inspect

    counts = export_inspect(atlas, split, out)
    text = f"{sum(counts.values()):,} rows of {len(counts)} tasks in {bold(out)}. Run: "
    command = f"cd {out} && inspect eval hba_tasks.py --model MODEL"
    answer({"out": str(out), "rows": counts, "command": command}, as_json=json, show=lambda: say(text + command))


@export_app.command("wandb", epilog=WANDB_EXAMPLE)
def wandb_command(
    run: Annotated[Path, typer.Argument(help="Scored run folder.")],
    project: Annotated[str, typer.Option(help="W&B project.")] = ...,  # type: ignore[assignment]
    offline: Annotated[
        bool, typer.Option("--offline", help="Write into the run folder; `wandb sync` sends it.")
    ] = False,
    predictions: Annotated[bool, typer.Option("--predictions", help="Also log every prediction.")] = False,
    json: JsonFlag = False,
) -> None:
    """Log a scored run to Weights & Biases as tables of tasks and datasets."""
    from hba.export.wandb_table import log_tables

    place = log_tables(run, project=project, offline=offline, predictions=predictions)
    answer({"run": str(run), "wandb": place}, as_json=json, show=lambda: say(f"Logged to {bold(place)}."))
