"""`hba atlas`: make, convert, download, describe, check and look at atlases."""

from __future__ import annotations

import sys
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hba.cli.options import AllowQuarantined, JsonFlag, Overrides, answer, bold, finish, say
from hba.environment import usable_cores
from hba.storage import cache_folder

if TYPE_CHECKING:
    from hba.descriptors.describe import Summary


# `hba atlas convert`: from media files to parquet shards, and back.


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
    from hba.cli.options import counted

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


# `hba atlas describe`: extract descriptors and transcripts, and name them in the rows.


DESCRIBE_EXAMPLE = "Example: hba atlas describe data/atlas --audio compare --video holistic --workers 8"
_SHOWN = 20


def describe_command(
    root: Annotated[Path | None, typer.Argument(help="Folder of a JSONL atlas.")] = None,
    split: Annotated[list[str] | None, typer.Option(help="A split; repeat for several. All when left out.")] = None,
    audio: Annotated[str, typer.Option(help="compare (6,373 values), compare-lld, egemaps or none.")] = "compare",
    video: Annotated[str, typer.Option(help="holistic (MediaPipe pose, face and hands) or none.")] = "holistic",
    transcripts: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Also transcribe rows without texts, with this model.")
    ] = None,
    frames_per_second: Annotated[
        float | None, typer.Option(help="Look for landmarks in so many frames a second; in every one when left out.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = usable_cores(),
    executor: Annotated[str, typer.Option(help="processes (this machine) or ray (a cluster).")] = "processes",
    out_format: Annotated[str, typer.Option(help="pt (as published) or safetensors.")] = "pt",
    replace: Annotated[bool, typer.Option("--replace", help="Also where rows name other descriptors.")] = False,
    allow_failed: Annotated[int, typer.Option(min=0, help="Exit 0 although up to so many media failed.")] = 0,
    setup: Annotated[bool, typer.Option("--setup", help="First install MediaPipe in its own environment.")] = False,
    json: JsonFlag = False,
) -> None:
    """Extract openSMILE features, landmarks and transcripts, and name them in the rows. Resumes when killed."""
    from hba.cli.options import counted
    from hba.descriptors import landmarks
    from hba.descriptors.describe import describe
    from hba.descriptors.items import Settings
    from hba.errors import InputError

    if setup:
        folder = str(landmarks.set_up())
        if root is None:
            return answer({"environment": folder}, as_json=json, show=lambda: say(f"MediaPipe is in {bold(folder)}."))
    if root is None:
        raise InputError("no atlas was named", fix=f"Name its folder. {DESCRIBE_EXAMPLE}")
    settings = Settings(
        audio=None if audio == "none" else audio,
        video=None if video == "none" else video,  # type: ignore[arg-type]  # Settings checks the name
        transcripts=transcripts,
        out_format=out_format,
        frames_per_second=frames_per_second,
        replace=replace,
    )
    with counted("describe") as progress:
        done = describe(root, settings, splits=split or None, workers=workers, executor=executor, progress=progress)
    answer(done.to_json(), as_json=json, show=lambda: _show(done))
    return _finish(done, allow_failed)


def _show(done: Summary) -> None:
    for kind in sorted({*done.extracted, *done.kept, *done.failed}):
        counts = (
            f"{done.extracted.get(kind, 0)} extracted, {done.kept.get(kind, 0)} kept, {done.failed.get(kind, 0)} failed"
        )
        rate = done.to_json()["real_time_factor"].get(kind)
        say(f"{kind}: {counts}" + (f", {rate:g} x real time for one worker" if rate else ""))
    linked = ", ".join(f"{count} of {split}" for split, count in done.rows_linked.items())
    say(f"rows that gained: {linked} in {bold(done.root)}")


def _finish(done: Summary, allowed: int) -> None:
    """Name what failed on standard error; exit 2 when that is more than `allowed`."""
    for failure in done.failures[:_SHOWN]:
        sys.stderr.write(f"failed {failure['where']}: {failure['reason']}\n")
    if len(done.failures) > _SHOWN:
        sys.stderr.write(f"and {len(done.failures) - _SHOWN} more in {done.failures_file}\n")
    if len(done.failures) > allowed:
        fix = f"Repair the media and run it again, or accept this with --allow-failed {len(done.failures)}."
        sys.stderr.write(f"error: {len(done.failures)} media failed; everything else is done. Fix: {fix}\n")
        raise typer.Exit(2)


# `hba atlas prepare`: decode once what training and prediction read in every epoch.


PREPARE_EXAMPLE = "Example: hba atlas prepare data/hba model=Qwen/Qwen2.5-Omni-7B encode.num_frames=8"


def prepare_command(
    atlas: Annotated[str, typer.Argument(help="Atlas folder, or hub id of a release.")],
    overrides: Overrides = None,
    split: Annotated[
        list[str] | None, typer.Option("--split", help="A split; repeat the option for more. All by default.")
    ] = None,
    allow_quarantined: AllowQuarantined = 0,
    json: JsonFlag = False,
) -> None:
    """Decode all clips and sounds once and keep them, for runs with loader.decode_once=true. Resumes when killed."""
    from hba.batch.config import PrepareConfig
    from hba.cli.options import counted
    from hba.config import load_config

    settings = load_config(PrepareConfig, None, overrides or [])
    from hba.atlas import open_atlas
    from hba.atlas.info import splits_at
    from hba.batch.loader import prepare
    from hba.model import checkpoint
    from hba.model.chat import load_processor

    processor = load_processor(str(checkpoint.resolve(settings.model) or settings.model))
    opened = [open_atlas(atlas, split=name) for name in split or splits_at(atlas)]
    for rows in opened:
        with counted(f"prepare {rows.split}") as progress:
            decoded = prepare(rows, processor, settings.encode, settings.loader, progress)
    left_out = [record._asdict() for rows in opened for record in rows.quarantine]
    counts = {rows.split: len(rows) for rows in opened}
    values = {"folder": str(decoded.folder), "rows": counts, "media": len(decoded), "bytes": decoded.num_bytes}
    text = f"{len(decoded):,} decoded media ({decoded.num_bytes / 1e9:.2f} GB) are in {bold(decoded.folder)}."
    answer(values | {"quarantined": len(left_out)}, as_json=json, show=lambda: say(text))
    finish(left_out, allow_quarantined)


# `hba atlas download`: an atlas from the Hugging Face hub into a folder.


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
    from hba.atlas.hub import download_atlas
    from hba.cli.options import counted

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


# --- the other commands -----------------------------------------------------------------------------------------------


atlas_app = typer.Typer(no_args_is_help=True, help="Make, open and check atlases.")
atlas_app.command("convert", epilog=CONVERT_EXAMPLE)(convert_command)
atlas_app.command("describe", epilog=DESCRIBE_EXAMPLE)(describe_command)
atlas_app.command("download", epilog=DOWNLOAD_EXAMPLE)(download_command)
atlas_app.command("prepare", epilog=PREPARE_EXAMPLE)(prepare_command)


@atlas_app.command("mini", epilog="Example: hba atlas mini runs/mini --size small --seed 0")
def mini_command(
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    size: Annotated[str, typer.Option(help="tiny (seconds, for a look) or small (what the demo trains on).")] = "small",
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = usable_cores(),
    json: JsonFlag = False,
) -> None:
    """Make a synthetic mini-atlas: real audio, video and descriptor files with learnable labels."""
    from dataclasses import asdict

    from hba.cli.options import counted
    from hba.mini import build_mini_atlas

    with counted("mini-atlas") as progress:
        summary = build_mini_atlas(out, size=size, seed=seed, workers=workers, progress=progress)
    values = asdict(summary) | {"path": str(out)}
    answer(values, as_json=json, show=lambda: say(f"Made the synthetic mini-atlas in {bold(out)}."))


Splits = Annotated[
    list[str] | None, typer.Option("--split", help="A split; repeat the option for more. All by default.")
]
Workers = Annotated[int, typer.Option(min=1, help="Processes.")]


@atlas_app.command("validate", epilog="Example: hba atlas validate runs/mini --out runs/validate")
def validate_command(
    atlas: Annotated[Path, typer.Argument(help="Atlas folder, one file of rows, or org/name on the hub.")],
    split: Splits = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for validate.json, validate.html and the log that resumes.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Read headers of media; decode nothing.")] = False,
    release: Annotated[bool, typer.Option("--release", help="Expect the counts of the published release.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Check again what an earlier run found good.")] = False,
    workers: Workers = usable_cores(),
    json: JsonFlag = False,
) -> None:
    """Check every row, every medium and the separation of the splits; exit 1 when something is wrong."""
    from hba.atlas.validate import validate_atlas
    from hba.cli.options import counted

    check = partial(validate_atlas, atlas, splits=split, out=out, workers=workers)
    with counted("validate") as progress:
        result = check(quick=quick, release=release, fresh=fresh, progress=progress)

    def show() -> None:
        from rich.console import Console

        from hba.report.atlas import show_validation

        Console().print(*show_validation(result), sep="\n")

    if out is not None:
        from hba.report.atlas import write_validation

        write_validation(result, out / "validate.html")
    answer(result.to_json(), as_json=json, show=show)
    if out is not None and not json:
        say(f"Wrote {bold(out)}: validate.html, validate.json.")
    if not result.ok:
        raise typer.Exit(1)


@atlas_app.command("info", epilog="Example: hba atlas info runs/mini --durations --out runs/mini.html")
def info_command(
    atlas: Annotated[Path, typer.Argument(help="Atlas folder, one file of rows, or org/name on the hub.")],
    split: Splits = None,
    durations: Annotated[
        bool, typer.Option("--durations", help="Also read the headers of all sounds and clips.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="HTML page to write.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Where headers are kept; else $HBA_CACHE or ~/.cache/hba.")] = None,
    workers: Workers = usable_cores(),
    json: JsonFlag = False,
) -> None:
    """Count rows by dataset, task, label, modality and split; with --durations, how long they last."""
    from hba.atlas.info import atlas_info
    from hba.cli.options import counted

    if durations:
        folder = cache or cache_folder()
        with counted("durations") as progress:
            info = atlas_info(atlas, splits=split, durations=True, cache=folder, workers=workers, progress=progress)
    else:
        info = atlas_info(atlas, splits=split)

    def show() -> None:
        from rich.console import Console

        from hba.report.atlas import show_info

        Console().print(*show_info(info), sep="\n")

    if out is not None:
        from hba.report.atlas import write_info

        write_info(info, out)
    answer(info.to_json(), as_json=json, show=show)
    if out is not None and not json:
        say(f"Wrote {bold(out)}.")
