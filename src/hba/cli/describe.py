"""`hba atlas describe`: extract descriptors and transcripts, and name them in the rows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hba.cli.options import JsonFlag, answer, bold, say
from hba.environment import usable_cores

if TYPE_CHECKING:
    from hba.descriptors.describe import Summary

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
    from hba.cli.progress import counted
    from hba.descriptors import landmark_env
    from hba.descriptors.describe import describe
    from hba.descriptors.items import Settings
    from hba.errors import InputError

    if setup:
        folder = str(landmark_env.set_up())
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
