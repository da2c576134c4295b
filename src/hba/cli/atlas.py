"""`hba atlas`: make, check, look at, download, convert, describe and prepare atlases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import typer

from hba.cli.options import (
    ATLAS_HELP,
    ROWS_HELP,
    AllowQuarantined,
    Commands,
    JsonFlag,
    Splits,
    Workers,
    answer,
    beside,
    bold,
    configured,
    counted,
    finish,
    flag,
    keys_such_as,
    number,
    takes,
    written,
)
from hba.environment import require_extra, usable_cores
from hba.errors import InputError
from hba.storage import cache_folder, plural

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hba.descriptors.describe import Summary

DESCRIBE_EXAMPLE = "Example: hba atlas describe data/atlas --audio compare --video holistic --workers 8"
DOWNLOAD_EXAMPLE = "Example: hba atlas download HumanBehaviorAtlas/human_behavior_atlas data/hba --split test"
PREPARE_EXAMPLE = "Example: hba atlas prepare data/hba model=Qwen/Qwen2.5-Omni-7B encode.num_frames=8"
MAX_FAILURES = 20
MAX_MISSING = 5


class AtlasCommands(Commands):
    """`hba atlas`, in the order in which a person needs them."""

    PANELS: ClassVar[dict[str, tuple[str, ...]]] = {
        "Get an atlas": ("mini", "download", "build"),
        "Look at it": ("info", "validate"),
        "Change it": ("convert", "describe", "prepare"),
    }
    OPTIONS: ClassVar[dict[str, dict[str, tuple[str, ...]]]] = {
        "describe": {
            "What to extract": ("audio", "video", "transcripts", "frames_per_second", "out_format", "replace"),
        },
        "build": {
            "The table of labels": (
                *("labels", "file_column", "label_column", "group_column", "transcript_column", "split_column"),
            ),
            "The rows": ("dataset", "question", "choices", "allow_unlabelled", "seed"),
        },
    }


atlas_app = typer.Typer(cls=AtlasCommands, no_args_is_help=True, help="Make, download and check atlases.")


@atlas_app.command("convert", epilog="Example: hba atlas convert runs/mini runs/mini-parquet --to parquet")
def convert_command(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Atlas folder, or one file of rows.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.")],
    to: Annotated[
        Literal["parquet", "jsonl"], typer.Option(help="parquet: media in shards. jsonl: media as files.")
    ] = ...,  # type: ignore[assignment]
    split: Splits = None,
    shard_megabytes: Annotated[int, number("MB of media in one shard.", least=1)] = 512,
    workers: Workers = usable_cores(),
    allow_quarantined: AllowQuarantined = 0,
    json: JsonFlag = False,
) -> None:
    """Convert an atlas to parquet shards, or back to files.

    Every sound, clip and picture is checked. Run it again to resume.
    """
    from hba.atlas.convert import convert_atlas

    with counted("convert") as progress:
        converted = convert_atlas(
            source,
            out,
            to=to,
            splits=split,
            shard_bytes=shard_megabytes << 20,
            workers=workers,
            progress=progress,
        )
    unreadable = [record for result in converted for record in result.unreadable]
    rows = {result.split: result.rows for result in converted}
    media = sum(part.media for result in converted for part in result.parts)
    values = {"out": str(out), "rows": rows, "media": media, "quarantined": len(unreadable)}
    text = f"Converted {plural(sum(rows.values()), 'row')} and {plural(media, 'medium|media')} into {bold(out)}."
    answer(values, text, as_json=json)
    finish(unreadable, allow_quarantined)


@atlas_app.command("describe", epilog=DESCRIBE_EXAMPLE)
def describe_command(
    root: Annotated[Path | None, typer.Argument(metavar="ATLAS", help="Folder of a JSONL atlas.")] = None,
    split: Splits = None,
    audio: Annotated[
        str, takes("NAME", "openSMILE features: compare (6,373 values), compare-lld, egemaps or none.")
    ] = "compare",
    video: Annotated[str, takes("NAME", "MediaPipe landmarks: holistic (pose, face and hands) or none.")] = "holistic",
    transcripts: Annotated[
        str | None, takes("MODEL", "Transcribe rows without texts with this speech recognition model.", default="none")
    ] = None,
    frames_per_second: Annotated[
        float | None, takes("N", "Look for landmarks in N frames a second.", default="every frame")
    ] = None,
    workers: Workers = usable_cores(),
    executor: Annotated[str, takes("NAME", "Where to run: processes (this machine) or ray (a cluster).")] = "processes",
    out_format: Annotated[str, takes("NAME", "Form of the files: pt (as published) or safetensors.")] = "pt",
    replace: Annotated[bool, flag("--replace", "Also extract for rows that name other descriptors.")] = False,
    allow_failed: Annotated[int, number("Accept up to N media that failed (else exit code 2).")] = 0,
    setup: Annotated[bool, flag("--setup", "First install MediaPipe into an environment of its own.")] = False,
    json: JsonFlag = False,
) -> None:
    """Extract descriptors (openSMILE, MediaPipe) and transcripts.

    The rows then name the new files. Run it again to resume.
    """
    if root is not None:
        require_extra("train", "hba atlas describe")
    from hba.descriptors import landmarks
    from hba.descriptors.describe import describe
    from hba.descriptors.items import Settings

    if setup:
        folder = str(landmarks.set_up())
        if root is None:
            return answer({"environment": folder}, f"MediaPipe is in {bold(folder)}.", as_json=json)
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
    answer(done.to_json(), lambda: _described(done), as_json=json)
    for failure in done.failures[:MAX_FAILURES]:
        beside(f"failed {failure['where']}: {failure['reason']}")
    if len(done.failures) > MAX_FAILURES:
        beside(f"and {len(done.failures) - MAX_FAILURES} more in {done.failures_file}")
    if len(done.failures) > allow_failed:
        fix = f"Repair the media and run it again, or accept this: --allow-failed {len(done.failures)}."
        beside(f"error: {plural(len(done.failures), 'medium|media')} failed; everything else is done. Fix: {fix}")
        raise typer.Exit(2)
    return None


def _described(done: Summary) -> Iterator[str]:
    for kind in sorted({*done.extracted, *done.kept, *done.failed}):
        counts = (
            f"{done.extracted.get(kind, 0)} extracted, {done.kept.get(kind, 0)} kept, {done.failed.get(kind, 0)} failed"
        )
        rate = done.to_json()["real_time_factor"].get(kind)
        yield f"{kind}: {counts}" + (f", {rate:g} x real time for one worker" if rate else "")
    linked = ", ".join(f"{count} of {split}" for split, count in done.rows_linked.items())
    yield f"rows that gained: {linked} in {bold(done.root)}"


@atlas_app.command("download", epilog=DOWNLOAD_EXAMPLE)
def download_command(
    repo: Annotated[str, typer.Argument(help="Dataset on the hub: org/name, or org/name@revision.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    split: Splits = None,
    revision: Annotated[str | None, takes("NAME", "Branch, tag or commit.", default="main")] = None,
    workers: Annotated[int, number("Number of files at a time.", least=1)] = 8,
    json: JsonFlag = False,
) -> None:
    """Download an atlas from the Hugging Face hub and unpack it.

    Run it again to resume. Next: hba atlas validate OUT.
    """
    from hba.atlas.hub import download_atlas

    with counted("download") as progress:
        done = download_atlas(repo, out, splits=split, revision=revision, workers=workers, progress=progress)
    if done.missing:
        named = ", ".join(done.missing[:MAX_MISSING]) + (", ..." if len(done.missing) > MAX_MISSING else "")
        beside(f"{plural(len(done.missing), 'medium|media', 'is|are')} named by rows and not in the dataset: {named}")
    said = f"{plural(done.rows, 'row')} ({', '.join(done.splits)}) of {done.repo}: in {bold(out)}."
    then = f"Commit {done.revision}. Next: hba atlas validate {bold(out)}"
    answer(done._asdict() | {"path": str(out)}, lambda: [said, then], as_json=json)


@atlas_app.command("prepare", epilog=PREPARE_EXAMPLE)
def prepare_command(
    atlas: Annotated[str, typer.Argument(help=ATLAS_HELP)],
    overrides: Annotated[list[str] | None, keys_such_as("encode.num_frames=8")] = None,
    split: Splits = None,
    allow_quarantined: AllowQuarantined = 0,
    json: JsonFlag = False,
) -> None:
    """Decode all clips and sounds once, so that training reads them faster.

    Runs with loader.decode_once=true use them. Run it again to resume.
    """
    require_extra("train", "hba atlas prepare")
    from hba.batch.config import PrepareConfig

    settings = configured(PrepareConfig, None, overrides)
    from hba.atlas import open_atlas
    from hba.atlas.info import splits_at
    from hba.batch.loader import prepare
    from hba.model import checkpoint
    from hba.model.checkpoint import load_processor

    processor = load_processor(str(checkpoint.resolve(settings.model) or settings.model))
    opened = [open_atlas(atlas, split=name) for name in split or splits_at(atlas)]
    for rows in opened:
        with counted(f"prepare {rows.split}") as progress:
            decoded = prepare(rows, processor, settings.encode, settings.loader, progress)
    left_out = [record._asdict() for rows in opened for record in rows.quarantine]
    counts = {rows.split: len(rows) for rows in opened}
    values = {"folder": str(decoded.folder), "rows": counts, "media": len(decoded), "bytes": decoded.num_bytes}
    text = f"{len(decoded):,} decoded media ({decoded.num_bytes / 1e9:.2f} GB) are in {bold(decoded.folder)}."
    answer(values | {"quarantined": len(left_out)}, text, as_json=json)
    finish(left_out, allow_quarantined)


@atlas_app.command("mini", epilog="Example: hba atlas mini runs/mini --size small --seed 0")
def mini_command(
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    size: Annotated[str, takes("NAME", "tiny (made in seconds) or small (what the demo trains on).")] = "small",
    seed: Annotated[int, takes("N", "The same seed gives the same bytes.")] = 0,
    workers: Workers = usable_cores(),
    json: JsonFlag = False,
) -> None:
    """Make a small synthetic atlas to try things on.

    It has sounds, clips, texts and descriptors, and labels that a model can learn.
    """
    from dataclasses import asdict

    from hba.mini import build_mini_atlas

    with counted("mini-atlas") as progress:
        summary = build_mini_atlas(out, size=size, seed=seed, workers=workers, progress=progress)
    values = asdict(summary) | {"path": str(out)}
    answer(values, f"Made the synthetic mini-atlas in {bold(out)}.", as_json=json)


BUILD_EXAMPLE = "Example: hba atlas build recordings/ data/mine --labels labels.csv --group-column speaker"


@atlas_app.command("build", epilog=BUILD_EXAMPLE)
def build_command(
    folder: Annotated[Path | None, typer.Argument(help="Folder with clips, sounds, pictures or texts.")] = None,
    out: Annotated[Path | None, typer.Argument(help="Folder to make.")] = None,
    labels: Annotated[
        Path | None,
        takes(
            "FILE", "Table of labels, one line a file: CSV, TSV or JSONL.", default="labels are the names of folders"
        ),
    ] = None,
    file_column: Annotated[str | None, takes("NAME", "Column of file names.")] = None,
    label_column: Annotated[str | None, takes("NAME", "Column of labels.")] = None,
    group_column: Annotated[str | None, takes("NAME", "Column of speakers; each stays in one split.")] = None,
    transcript_column: Annotated[str | None, takes("NAME", "Column of spoken words.")] = None,
    split_column: Annotated[str | None, takes("NAME", "Column of splits.")] = None,
    layout: Annotated[
        str | None, takes("NAME", "Read a known corpus in its own layout, such as cremad; see --list.")
    ] = None,
    dataset: Annotated[str | None, takes("NAME", "Key of the new dataset.", default="the folder's name")] = None,
    question: Annotated[str | None, takes("TEXT", "Question of every row.", default="made of the labels")] = None,
    choices: Annotated[str | None, takes("LABELS", "Answers to choose from, such as happy,sad,neutral.")] = None,
    allow_unlabelled: Annotated[
        bool, flag("--allow-unlabelled", "Keep files without a label, as rows to predict.")
    ] = False,
    seed: Annotated[int, takes("N", "Seed that deals files into splits.")] = 0,
    known: Annotated[bool, flag("--list", "List the corpora that --layout knows.")] = False,
    allow_broken: Annotated[int, number("Accept up to N files that cannot be read (else exit code 2).")] = 0,
    json: JsonFlag = False,
) -> None:
    """Make an atlas of your own files.

    Labels come from a table, from the names of folders, or from the layout of a known corpus.
    """
    import shlex
    from dataclasses import asdict

    from hba.atlas.build import LAYOUTS, build_atlas

    if known:
        about = {name: (make.__doc__ or "").splitlines()[0] for name, make in LAYOUTS.items()}
        answer(about, "\n".join(f"{bold(name)}  {text}" for name, text in about.items()), as_json=json)
        return
    offered = [name.strip() for name in (choices or "").split(",") if name.strip()]
    if folder is None or out is None:
        raise InputError("two folders are needed", where="hba atlas build", fix="Write hba atlas build FOLDER OUT.")
    columns = {"file": file_column, "label": label_column, "group": group_column}
    columns |= {"transcript": transcript_column, "split": split_column}
    how: dict[str, Any] = {"labels": labels, "columns": columns, "layout": layout, "dataset": dataset}
    how |= {"question": question, "choices": offered, "unlabelled": allow_unlabelled}
    with counted("files") as progress:
        built = build_atlas(folder, out, seed=seed, progress=progress, **how)

    def show() -> Iterator[str]:
        rows = ", ".join(f"{split} {count:,}" for split, count in built.splits.items())
        kinds = ", ".join(f"{label} {count:,}" for label, count in built.labels.items())
        groups = built.groups
        grouped = "no groups are known" if groups is None else f"{plural(groups, 'group')}, each in one split"
        domain = "answers in words" if built.domain == "None" else f"labels as domain {built.domain}"
        yield f"Made {bold(out)}: dataset {built.dataset} of task {built.task}, {domain}."
        yield f"Rows: {rows}; {grouped}."
        yield from [f"Labels: {kinds}."] if kinds else []
        if built.unlabelled:
            files = plural(built.unlabelled, "file")
            yield f"Without a label: {files}, to predict; training and scores leave them out."
        yield "Next:"
        made, run = shlex.quote(str(out)), f"runs/{built.dataset}"
        yield f"  hba atlas validate {made}"
        if kinds:  # what a laptop can train, and what a GPU should
            yield f"  hba tiny {run}-tiny --atlas {made}"
            yield f"  hba train sft --config sft_tiny --run {run} atlas={made} model.name={run}-tiny"
            yield f"  hba train sft --config sft --run {run} atlas={made}   # instead of both, on a GPU"
        if "test" in built.splits and kinds:
            yield f"  hba eval {run} --atlas {made}"
        else:
            split = "" if "test" in built.splits else f" --split {next(iter(built.splits))}"
            yield f"  hba predict MODEL --atlas {made}{split} --run {run}-predictions"

    answer(asdict(built), show, as_json=json)
    for name, reason in built.unreadable.items():
        beside(f"error: {name}: {reason}")
    if len(built.unreadable) > allow_broken:
        files = plural(len(built.unreadable), "file", "is|are")
        fix = f"Go on without, or mend what is wrong, remove {out} and build again."
        beside(f"error: {files} left out of {out}; all others are in it. Fix: {fix}")
        raise typer.Exit(2)


@atlas_app.command("validate", epilog="Example: hba atlas validate runs/mini --out runs/validate")
def validate_command(
    atlas: Annotated[Path, typer.Argument(help=ROWS_HELP)],
    split: Splits = None,
    out: Annotated[Path | None, takes("FOLDER", "Folder for validate.html and validate.json; makes it resume.")] = None,
    quick: Annotated[bool, flag("--quick", "Read only the headers of media; decode nothing.")] = False,
    release: Annotated[bool, flag("--release", "Expect the counts of the published release.")] = False,
    fresh: Annotated[bool, flag("--fresh", "Check again what was found good before.")] = False,
    workers: Workers = usable_cores(),
    json: JsonFlag = False,
) -> None:
    """Check every row and medium, and that nothing is in two splits.

    Exit code 1: something is wrong.
    """
    from hba.atlas.validate import validate_atlas

    how: dict[str, Any] = {"splits": split, "quick": quick, "release": release, "fresh": fresh, "workers": workers}
    with counted("validate") as progress:
        result = validate_atlas(atlas, out=out, progress=progress, **how)
    from hba.report.atlas import show_validation, write_validation

    if out is not None:
        write_validation(result, out / "validate.html")

    def show() -> Iterator[RenderableType]:
        yield from show_validation(result)
        if out is not None:
            yield f"Wrote {bold(out)}: validate.html, validate.json."

    answer(result.to_json(), show, as_json=json)
    if not result.ok:
        raise typer.Exit(1)


@atlas_app.command("info", epilog="Example: hba atlas info runs/mini --durations --out runs/mini.html")
def info_command(
    atlas: Annotated[Path, typer.Argument(help=ROWS_HELP)],
    split: Splits = None,
    durations: Annotated[bool, flag("--durations", "Also say how long sounds and clips last.")] = False,
    out: Annotated[Path | None, takes("FILE", "HTML page to write.")] = None,
    cache: Annotated[
        Path | None, takes("FOLDER", "Where durations are kept.", default="$HBA_CACHE or ~/.cache/hba")
    ] = None,
    workers: Workers = usable_cores(),
    json: JsonFlag = False,
) -> None:
    """Count rows by dataset, task, label, modality and split."""
    from hba.atlas.info import atlas_info

    if durations:
        folder = cache or cache_folder()
        with counted("durations") as progress:
            info = atlas_info(atlas, splits=split, durations=True, cache=folder, workers=workers, progress=progress)
    else:
        info = atlas_info(atlas, splits=split)
    from hba.report.atlas import show_info, write_info

    if out is not None:
        write_info(info, out)
    files = [] if out is None else [out]
    answer(info.to_json(), lambda: (*show_info(info), *written(*files)), as_json=json)
