"""`hba atlas`: make and look at atlases."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from hba.cli.convert import CONVERT_EXAMPLE, convert_command
from hba.cli.describe import DESCRIBE_EXAMPLE, describe_command
from hba.cli.download import DOWNLOAD_EXAMPLE, download_command
from hba.cli.options import JsonFlag, answer, bold, say
from hba.environment import usable_cores
from hba.storage import cache_folder

atlas_app = typer.Typer(no_args_is_help=True, help="Make, open and check atlases.")
atlas_app.command("convert", epilog=CONVERT_EXAMPLE)(convert_command)
atlas_app.command("describe", epilog=DESCRIBE_EXAMPLE)(describe_command)
atlas_app.command("download", epilog=DOWNLOAD_EXAMPLE)(download_command)


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

    from hba.atlas.mini import build_mini_atlas
    from hba.cli.progress import counted

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
    from hba.cli.progress import counted

    check = partial(validate_atlas, atlas, splits=split, out=out, workers=workers)
    with counted("validate") as progress:
        result = check(quick=quick, release=release, fresh=fresh, progress=progress)

    def show() -> None:
        from rich.console import Console

        from hba.report.atlas_terminal import show_validation

        Console().print(*show_validation(result), sep="\n")

    if out is not None:
        from hba.report.atlas_page import write_validation

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
    from hba.cli.progress import counted

    if durations:
        folder = cache or cache_folder()
        with counted("durations") as progress:
            info = atlas_info(atlas, splits=split, durations=True, cache=folder, workers=workers, progress=progress)
    else:
        info = atlas_info(atlas, splits=split)

    def show() -> None:
        from rich.console import Console

        from hba.report.atlas_terminal import show_info

        Console().print(*show_info(info), sep="\n")

    if out is not None:
        from hba.report.atlas_page import write_info

        write_info(info, out)
    answer(info.to_json(), as_json=json, show=show)
    if out is not None and not json:
        say(f"Wrote {bold(out)}.")
