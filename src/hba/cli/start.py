"""`hba demo`, `hba tiny`, `hba doctor`, `hba explore`: what a newcomer types first."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hba.cli.options import ATLAS_HELP, Host, JsonFlag, Overrides, Port, answer, bold, finish, flag, takes
from hba.environment import require_extra
from hba.errors import InputError
from hba.storage import cache_folder, unwinding

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hba.evaluate.desk import Desk


def demo_command(
    overrides: Overrides = None,
    run: Annotated[Path, takes("FOLDER", "Folder for all that it makes.")] = Path("runs/demo"),
    size: Annotated[str, takes("NAME", "Size of its data: tiny or small.")] = "small",
    seed: Annotated[int, takes("N", "Seed of data, weights and order.")] = 0,
    json: JsonFlag = False,
) -> None:
    """Show every step on made-up data: train a tiny OmniSapiens, score it, report.

    It takes minutes on a laptop without a GPU. Run it again to resume.
    """
    require_extra("train", "hba demo")
    from hba.cli.demo import run_demo

    result = run_demo(run, size=size, seed=seed, overrides=overrides or [])

    def show() -> Iterator[RenderableType]:
        from hba.report.comparison import stages_table
        from hba.report.rl import changes_table
        from hba.report.tables import metrics_table

        yield from (metrics_table(result.metrics), stages_table(result.stages), changes_table(result.rl))
        yield "The mini-atlas is synthetic: these scores say that the system works, not how well people are understood."
        yield f"Report: {bold(result.report)}   Time: {result.timing()}"
        clip = next(iter(sorted((run / "atlas").rglob("*.mp4"))), "clip.mp4")
        yield "Try what it made:"
        yield f"  hba ask {bold(run / 'sft')} {bold(clip)}"
        yield f"  hba eval {bold(run / 'sft')} --atlas {bold(run / 'atlas')} --run {bold(run / 'eval')}"
        yield f"  hba explore --atlas {bold(run / 'atlas')} --runs {bold(run)}"

    values = {
        "metrics": result.metrics.record(),
        "stages": asdict(result.stages),
        "rl": {name: [asdict(change) for change in found] for name, found in result.rl.items()},
        "report": str(result.report),
        "seconds": result.seconds,
    }
    answer(values, show, as_json=json)
    finish(result.quarantined, allowed=0)


def tiny_command(
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    atlas: Annotated[str, takes("ATLAS", "Atlas whose texts train its tokenizer.")] = ...,  # type: ignore[assignment]
    family: Annotated[
        str, takes("NAME", "Family of models, such as gemma4; docs/models.md lists them.")
    ] = "qwen2.5-omni",
    seed: Annotated[int, takes("N", "Seed of the weights.")] = 0,
    json: JsonFlag = False,
) -> None:
    """Make a tiny backbone to try training on a laptop.

    It has the classes of the real family, small layers, and random weights.
    """
    require_extra("train", "hba tiny")
    from hba.atlas import open_atlas
    from hba.model.process import prepare_process
    from hba.model.tiny import atlas_texts, build_tiny

    prepare_process(seed)
    build_tiny(out, atlas_texts(open_atlas(atlas, split="train")), seed=seed, family=family)
    answer({"model": str(out)}, f"Made a tiny backbone in {bold(out)}.", as_json=json)


def doctor_command(
    online: Annotated[bool, flag("--online", "Also try to reach the Hugging Face hub.")] = False,
    json: JsonFlag = False,
) -> None:
    """Say what this machine can run and what is missing.

    Exit code 1: something that hba needs is missing.
    """
    from hba.doctor import checks_table, diagnose, to_json

    checks = diagnose(online=online)
    answer(to_json(checks), lambda: [checks_table(checks)], as_json=json)
    if any(check.required and check.status == "missing" for check in checks):
        raise typer.Exit(1)


def explore_command(
    atlas: Annotated[Path | None, takes("ATLAS", ATLAS_HELP, default="runs alone")] = None,
    runs: Annotated[Path, takes("FOLDER", "Folder in which to look for run folders.")] = Path("runs"),
    host: Host = "127.0.0.1",
    port: Port = 8377,
    cache: Annotated[
        Path | None, takes("FOLDER", "Where the index is kept.", default="$HBA_CACHE or ~/.cache/hba")
    ] = None,
    browser: Annotated[
        bool | None, typer.Option(help="Open the page in a browser.", show_default="if there is a screen")
    ] = None,
    models: Annotated[str | None, takes("MODELS", "Models to try on your own clips, such as runs/sft,runs/qa.")] = None,
    keep: Annotated[Path | None, takes("FOLDER", "Keep the clips and your labels in this folder, as an atlas.")] = None,
    no_token: Annotated[bool, flag("--no-token", "Answer every user of this machine, without a token.")] = False,
    json: JsonFlag = False,
) -> None:
    """See and hear data, predictions and mistakes in your browser.

    Ctrl-C ends it.
    """
    from hba.explorer.server import bind, create_app, has_screen, is_loopback, open_browser, serve

    names = [name.strip() for name in (models or "").split(",") if name.strip()]
    if keep is not None and not names:
        raise InputError("--keep is for the Try page", where="hba explore", fix="Name --models, too.")
    bound = bind(host, port, with_token=not no_token)
    with unwinding(), ExitStack() as opened:
        opened.enter_context(bound.socket)
        app = create_app(
            atlas=atlas,
            runs=runs,
            cache_folder=cache or cache_folder(),
            token=bound.token,
            only_loopback=is_loopback(host),
            models=_desks(names, opened),
            keep=keep,
        )
        opened.callback(app.state.explorer.close)
        answer({"url": bound.url}, f"Open [bold]{bound.url}[/bold] (Ctrl-C ends it).", as_json=json)
        sys.stdout.flush()
        if browser if browser is not None else (not json and has_screen()):
            open_browser(bound, app.state.explorer.folder)
        serve(bound, app)


def _desks(names: list[str], opened: ExitStack) -> dict[str, Desk]:
    """The models of the Try page, open until `opened` ends."""
    if not names:
        return {}
    require_extra("train", "a model in this process")
    from hba.evaluate.desk import Desk

    return {name: opened.enter_context(closing(Desk(name, folder=cache_folder() / "serve"))) for name in names}
