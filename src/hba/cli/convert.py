"""`hba atlas convert`: from media files to parquet shards, and back."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hba.cli.options import AllowQuarantined, JsonFlag, answer, bold, finish, say
from hba.environment import usable_cores

CONVERT_EXAMPLE = "Example: hba atlas convert runs/mini runs/mini-parquet --to parquet"


class Form(StrEnum):
    """Forms that an atlas can be converted into."""

    parquet = "parquet"
    jsonl = "jsonl"


def convert_command(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Atlas folder, or one file of rows.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make; an unfinished conversion goes on.")],
    to: Annotated[Form, typer.Option(help="Shards with embedded media, or lines with media files.")] = ...,  # type: ignore[assignment]
    split: Annotated[
        list[str] | None, typer.Option("--split", help="A split; repeat the option for more. All by default.")
    ] = None,
    shard_megabytes: Annotated[int, typer.Option(min=1, help="Media in one shard.")] = 512,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = usable_cores(),
    allow_quarantined: AllowQuarantined = 0,
    json: JsonFlag = False,
) -> None:
    """Convert an atlas into another form, every medium checked; resumes where it stopped."""
    from hba.atlas.convert import convert_atlas
    from hba.cli.progress import counted

    with counted("convert") as progress:
        converted = convert_atlas(
            source,
            out,
            to=to.value,
            splits=split,
            shard_bytes=shard_megabytes << 20,
            workers=workers,
            progress=progress,
        )
    unreadable = [record for result in converted for record in result.unreadable]
    rows = {result.split: result.rows for result in converted}
    media = sum(part.media for result in converted for part in result.parts)
    values = {"out": str(out), "rows": rows, "media": media, "quarantined": len(unreadable)}
    text = f"Converted {sum(rows.values()):,} rows and {media:,} media into {bold(out)}."
    answer(values, as_json=json, show=lambda: say(text))
    finish(unreadable, allow_quarantined)
