"""`hba demo`, `hba tiny`, `hba doctor`: what a newcomer types first."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from hba.cli.options import JsonFlag, Overrides, answer, bold, finish, say


def demo_command(
    overrides: Overrides = None,
    run: Annotated[Path, typer.Option(help="Folder for everything that the demo makes.")] = Path("runs/demo"),
    size: Annotated[str, typer.Option(help="Size of the mini-atlas: tiny or small.")] = "small",
    seed: Annotated[int, typer.Option(help="Seed of data, weights and order.")] = 0,
    json: JsonFlag = False,
) -> None:
    """Make a synthetic mini-atlas, train a tiny OmniSapiens in three stages and by RL, score and report. Resumes."""
    from hba.demo import run_demo

    result = run_demo(run, size=size, seed=seed, overrides=overrides or [])

    def show() -> None:
        from rich.console import Console

        from hba.report.rl import changes_table
        from hba.report.stages import stages_table
        from hba.report.terminal import metrics_table

        Console().print(metrics_table(result.metrics))
        Console().print(stages_table(result.stages))
        Console().print(changes_table(result.rl))
        say("The mini-atlas is synthetic: these scores say that the system works, not how well people are understood.")
        say(f"Report: {bold(result.report)}   Time: {result.timing()}")

    values = {
        "metrics": result.metrics.record(),
        "stages": asdict(result.stages),
        "rl": {name: [asdict(change) for change in found] for name, found in result.rl.items()},
        "report": str(result.report),
        "seconds": result.seconds,
    }
    answer(values, as_json=json, show=show)
    finish(result.quarantined, allowed=0)


def tiny_command(
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    atlas: Annotated[str, typer.Option(help="Atlas that trains the tokenizer.")] = ...,  # type: ignore[assignment]
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
    json: JsonFlag = False,
) -> None:
    """Make a tiny backbone: the real Qwen2.5-Omni classes with small dimensions and random weights."""
    from hba.atlas import open_atlas
    from hba.model.tiny import atlas_texts, build_tiny
    from hba.process import prepare_process

    prepare_process(seed)
    build_tiny(out, atlas_texts(open_atlas(atlas, split="train")), seed=seed)
    answer({"model": str(out)}, as_json=json, show=lambda: say(f"Made a tiny backbone in {bold(out)}."))


def doctor_command(
    online: Annotated[bool, typer.Option("--online", help="Also try to reach the Hugging Face hub.")] = False,
    json: JsonFlag = False,
) -> None:
    """Say what this machine can run and what is missing."""
    from hba.doctor import checks_table, diagnose, to_json

    checks = diagnose(online=online)

    def show() -> None:
        from rich.console import Console

        Console().print(checks_table(checks))

    answer(to_json(checks), as_json=json, show=show)
    if any(check.required and check.status == "missing" for check in checks):
        raise typer.Exit(1)
