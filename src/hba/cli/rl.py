"""`hba train rl`: the local engine, or verl on a cluster."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hba.cli.options import (
    AllowQuarantined,
    BaseUrl,
    ConfigOption,
    JsonFlag,
    Overrides,
    answer,
    finish,
    recipe_path,
    say,
    say_beside,
    served,
    trained,
    training,
)

if TYPE_CHECKING:
    from hba.rl.config import RlConfig

RL_EXAMPLE = "Example: hba train rl --algorithm harpo --config rl_tiny atlas=runs/mini model.name=runs/speak"


class Engine(StrEnum):
    """Who runs the steps."""

    local = "local"
    verl = "verl"


def rl_command(
    overrides: Overrides = None,
    config: ConfigOption = None,
    algorithm: Annotated[
        str | None,
        typer.Option(help="grpo, harpo, dr_grpo, rloo, reinforce_pp, gpg, ema_grpo, dapo, gspo: docs/rl.md."),
    ] = None,
    base_url: BaseUrl = None,
    run: Annotated[Path, typer.Option(help="Run folder; an unfinished one is resumed.")] = Path("runs/rl"),
    engine: Annotated[Engine, typer.Option(help="local: this machine; verl: Ray, FSDP and vLLM.")] = Engine.local,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With verl: show its config and start nothing.")] = False,
    allow_quarantined: AllowQuarantined = 0,
    json: JsonFlag = False,
) -> None:
    """Reinforcement learning of a model that speaks: GRPO, HARPO and their rivals."""
    from hba.config import load_config
    from hba.errors import InputError
    from hba.rl.config import RlConfig

    chosen = [] if algorithm is None else [f"algorithm={algorithm}"]
    settings = load_config(RlConfig, recipe_path(config), [*served(base_url), *(overrides or []), *chosen])
    if dry_run and engine is not Engine.verl:
        raise InputError("--dry-run shows verl's config", where="hba train rl", fix="Add --engine verl.")
    if dry_run:
        _show_verl(settings, run, as_json=json)
    elif engine is Engine.verl:
        _on_verl(settings, run, allow_quarantined, as_json=json)
    else:
        _here(settings, run, allow_quarantined, as_json=json)


def _here(settings: RlConfig, run: Path, allow_quarantined: int, *, as_json: bool) -> None:
    from hba.rl.local import train_rl

    with training(run, settings, "train rl") as folder:
        progress = train_rl(settings, folder)
        quarantined = folder.quarantine.records()
    trained(run, progress, quarantined, allow_quarantined, best="greedy reward", as_json=as_json)


def _show_verl(settings: RlConfig, run: Path, *, as_json: bool) -> None:
    from hba import yaml_core
    from hba.rl.verl.config import nested, translate
    from hba.rl.verl.launch import place_of

    keys = translate(settings, place_of(settings, run))
    answer(keys, as_json=as_json, show=lambda: typer.echo(yaml_core.dump(nested(keys)), nl=False))


def _on_verl(settings: RlConfig, run: Path, allow_quarantined: int, *, as_json: bool) -> None:
    from hba.cli.progress import counted
    from hba.rl.verl.launch import train_on_verl

    with training(run, settings, "train rl --engine verl") as folder, counted("steps on verl") as told:
        steps = train_on_verl(settings, folder, told, say_beside)
        quarantined = folder.quarantine.records()
    then = f"hba merge {run} MODEL makes the model"
    result = {"run": str(run), "step": steps, "quarantined": len(quarantined)}
    answer(result, as_json=as_json, show=lambda: say(f"Trained {steps} steps: {then}."))
    finish(quarantined, allow_quarantined)
