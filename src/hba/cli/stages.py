"""`hba train qa`, `hba train bam`: the stages that stand on an earlier one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hba.cli.options import AllowQuarantined, ConfigOption, JsonFlag, Overrides, recipe_path, trained, training
from hba.errors import InputError

QA_EXAMPLE = "Example: hba train qa --config qa_tiny --from runs/sft --run runs/qa atlas=runs/mini"
BAM_EXAMPLE = "Example: hba train bam --config bam_tiny --from runs/qa --dataset daicwoz --run runs/bam atlas=runs/mini"

From = Annotated[str | None, typer.Option("--from", help="Run folder or checkpoint that the stage stands on.")]


def qa_command(
    overrides: Overrides = None,
    config: ConfigOption = None,
    base: From = None,
    run: Annotated[Path, typer.Option(help="Run folder; an unfinished one is resumed.")] = Path("runs/qa"),
    allow_quarantined: AllowQuarantined = 0,
    json: JsonFlag = False,
) -> None:
    """Stage 2: lm_head learns to answer free-form rows; backbone and heads stay as they are."""
    from hba.cli.progress import counted
    from hba.config import load_config
    from hba.train.config import QaConfig

    settings = load_config(QaConfig, recipe_path(config), [*(overrides or []), *_key("base", base)])
    from hba.train.qa import train_qa

    with training(run, settings, "train qa") as folder, counted("features") as told:
        progress = train_qa(settings, folder, told)
        quarantined = folder.quarantine.records()
    trained(run, progress, quarantined, allow_quarantined, as_json=json)


def bam_command(
    overrides: Overrides = None,
    config: ConfigOption = None,
    base: From = None,
    dataset: Annotated[
        list[str] | None, typer.Option(help="Dataset that gets adapters; give it again for more.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Adapt every dataset that has descriptors.")] = False,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Leave samples whose descriptors are missing unchanged.")
    ] = False,
    run: Annotated[Path, typer.Option(help="Run folder; an unfinished one is resumed.")] = Path("runs/bam"),
    allow_quarantined: AllowQuarantined = 0,
    json: JsonFlag = False,
) -> None:
    """Stage 3: adapters over openSMILE and landmark descriptors, dataset by dataset."""
    from hba.cli.progress import counted
    from hba.config import load_config
    from hba.train.config import BamConfig

    if every and dataset:
        raise InputError("--all and --dataset exclude each other", where="hba train bam", fix="Give one of them.")
    chosen = [*_key("base", base), *_key("datasets", f"[{','.join(dataset)}]" if dataset else None)]
    chosen += _key("datasets", "null" if every else None) + _key("descriptors.allow_missing", allow_missing or None)
    settings = load_config(BamConfig, recipe_path(config), [*(overrides or []), *chosen])
    if settings.datasets is None and not every:
        raise InputError("no dataset is named", where="hba train bam", fix="Give --dataset KEY, or --all.")
    from hba.train.bam import train_bam

    with training(run, settings, "train bam") as folder, counted("features") as told:
        progress = train_bam(settings, folder, told)
        quarantined = folder.quarantine.records()
    trained(run, progress, quarantined, allow_quarantined, as_json=json)


def _key(name: str, value: object) -> list[str]:
    """`name=value` as an override; nothing for None."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return [] if value is None else [f"{name}={text}"]
