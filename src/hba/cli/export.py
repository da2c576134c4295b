"""`hba export`: the benchmark as tasks of other harnesses, and results as a table of others' trackers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hba.cli.options import JsonFlag, answer, bold, say

LMMS_EXAMPLE = "Example: hba export lmms-eval runs/lmms --atlas runs/mini"
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
