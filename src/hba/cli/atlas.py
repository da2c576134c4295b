"""`hba atlas`: make and look at atlases."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from hba.cli.options import JsonFlag, answer, bold, say

atlas_app = typer.Typer(no_args_is_help=True, help="Make, open and check atlases.")


@atlas_app.command("mini", epilog="Example: hba atlas mini runs/mini --size small --seed 0")
def mini_command(
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    size: Annotated[str, typer.Option(help="tiny (seconds, for a look) or small (what the demo trains on).")] = "small",
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = os.cpu_count() or 1,
    json: JsonFlag = False,
) -> None:
    """Make a synthetic mini-atlas: real audio, video and descriptor files with learnable labels."""
    from dataclasses import asdict

    from hba.atlas.mini import build_mini_atlas
    from hba.cli.progress import counted

    with counted("mini-atlas") as progress:
        summary = build_mini_atlas(out, size=size, seed=seed, workers=workers, progress=progress)
    values = asdict(summary) | {"path": str(out)}
    answer(values, as_json=json, show=lambda: say(f"Made the synthetic mini-atlas in {bold(out)}."))
