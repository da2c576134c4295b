"""`hba train`: one command a training stage. A config is checked before torch is imported, which takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hba.cli.options import AllowQuarantined, ConfigOption, JsonFlag, Overrides, recipe_path, trained, training

train_app = typer.Typer(no_args_is_help=True, help="Train OmniSapiens, one command a stage.")


SFT_EXAMPLE = "Example: hba train sft --config sft_tiny --run runs/sft atlas=runs/mini model.name=runs/tiny"


@train_app.command("sft", epilog=SFT_EXAMPLE)
def sft_command(
    overrides: Overrides = None,
    config: ConfigOption = None,
    run: Annotated[Path, typer.Option(help="Run folder; an unfinished one is resumed.")] = Path("runs/sft"),
    allow_quarantined: AllowQuarantined = 0,
    json: JsonFlag = False,
) -> None:
    """Stage 1: LoRA (or everything) and one classification head a domain."""
    from hba.config import load_config
    from hba.train.config import SftConfig

    settings = load_config(SftConfig, recipe_path(config), overrides or [])
    from hba.train.sft import train_sft

    with training(run, settings, "train sft") as folder:
        progress = train_sft(settings, folder)
        quarantined = folder.quarantine.records()
    trained(run, progress, quarantined, allow_quarantined, as_json=json)


LM_EXAMPLE = "Example: hba train lm --config lm_tiny --run runs/lm atlas=runs/mini model.name=runs/tiny"


@train_app.command("lm", epilog=LM_EXAMPLE)
def lm_command(
    overrides: Overrides = None,
    config: ConfigOption = None,
    run: Annotated[Path, typer.Option(help="Run folder; an unfinished one is resumed.")] = Path("runs/lm"),
    allow_quarantined: AllowQuarantined = 0,
    json: JsonFlag = False,
) -> None:
    """Generative SFT: any chat model learns to answer in words."""
    from hba.config import load_config
    from hba.train.config import LmConfig

    settings = load_config(LmConfig, recipe_path(config), overrides or [])
    from hba.train.lm import train_lm

    with training(run, settings, "train lm") as folder:
        progress = train_lm(settings, folder)
        quarantined = folder.quarantine.records()
    trained(run, progress, quarantined, allow_quarantined, best="validation loss", sign=-1, as_json=json)
