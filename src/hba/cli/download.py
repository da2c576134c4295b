"""`hba atlas download`: an atlas from the Hugging Face hub into a folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hba.cli.options import JsonFlag, answer, bold, say

DOWNLOAD_EXAMPLE = "Example: hba atlas download HumanBehaviorAtlas/human_behavior_atlas data/hba --split test"
_NAMED = 5


def download_command(
    repo: Annotated[str, typer.Argument(help="Dataset on the hub: org/name, or org/name@revision.")],
    out: Annotated[Path, typer.Argument(help="New folder, or one that an earlier call began.")],
    split: Annotated[
        list[str] | None, typer.Option("--split", help="A split; repeat the option for more. All by default.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit; main by default.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Files at a time.")] = 8,
    json: JsonFlag = False,
) -> None:
    """Download an atlas: its rows, its media, its tars unpacked. Run it again to resume."""
    from hba.atlas.download import download_atlas
    from hba.cli.progress import counted

    with counted("download") as progress:
        done = download_atlas(repo, out, splits=split, revision=revision, workers=workers, progress=progress)
    if done.missing:
        named = ", ".join(done.missing[:_NAMED]) + (", ..." if len(done.missing) > _NAMED else "")
        sys.stderr.write(f"{len(done.missing)} media are named by rows and not in the dataset: {named}\n")
    values = done._asdict() | {"path": str(out)}

    def show() -> None:
        say(f"{done.rows:,} rows ({', '.join(done.splits)}) of {done.repo} are in {bold(out)}.")
        say(f"Commit {done.revision}. Next: hba atlas validate {bold(out)}")

    answer(values, as_json=json, show=show)
