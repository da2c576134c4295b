"""`hba train`: one command a training stage. A config is checked before torch is imported, which takes seconds."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hba.cli.options import (
    AllowQuarantined,
    BaseUrl,
    ConfigOption,
    JsonFlag,
    Overrides,
    answer,
    bold,
    finish,
    recipe_path,
    say,
    say_beside,
    served,
    trained,
    training,
)
from hba.errors import InputError

if TYPE_CHECKING:
    from hba.fit import Fit
    from hba.rl.config import RlConfig


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


# `hba train qa`, `hba train bam`: the stages that stand on an earlier one.


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
    from hba.cli.options import counted
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
    from hba.cli.options import counted
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


# `hba train rl`: the local engine, or verl on a cluster.


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
    from hba.config import dump_yaml
    from hba.rl.verl.config import nested, translate
    from hba.rl.verl.launch import place_of

    keys = translate(settings, place_of(settings, run))
    answer(keys, as_json=as_json, show=lambda: typer.echo(dump_yaml(nested(keys)), nl=False))


def _on_verl(settings: RlConfig, run: Path, allow_quarantined: int, *, as_json: bool) -> None:
    from hba.cli.options import counted
    from hba.rl.verl.launch import train_on_verl

    with training(run, settings, "train rl --engine verl") as folder, counted("steps on verl") as told:
        steps = train_on_verl(settings, folder, told, say_beside)
        quarantined = folder.quarantine.records()
    then = f"hba merge {run} MODEL makes the model"
    result = {"run": str(run), "step": steps, "quarantined": len(quarantined)}
    answer(result, as_json=as_json, show=lambda: say(f"Trained {steps} steps: {then}."))
    finish(quarantined, allow_quarantined)


# `hba transfer`: the paper's protocol of held-out datasets.


TRANSFER_EXAMPLE = "Example: hba transfer --config sft_tiny --run runs/transfer atlas=runs/mini model.name=runs/tiny"


def transfer_command(
    overrides: Overrides = None,
    config: ConfigOption = None,
    run: Annotated[Path, typer.Option(help="Folder of all runs; an unfinished one is resumed.")] = Path(
        "runs/transfer"
    ),
    heldout: Annotated[
        list[str] | None, typer.Option(help="Dataset to hold out; repeat it. Those of the paper by default.")
    ] = None,
    allow_quarantined: AllowQuarantined = 0,
    json: JsonFlag = False,
) -> None:
    """Pretrain without the held-out datasets, fine-tune on each, compare with no pretraining."""
    from hba.cli.options import tallied
    from hba.config import load_config
    from hba.train.config import SftConfig

    settings = load_config(SftConfig, recipe_path(config), overrides or [])
    from hba.train.transfer import run_transfer

    result = run_transfer(run, settings, heldout=heldout or None, progress=tallied)
    if result is None:  # another rank reports
        return
    from hba.report.comparison import transfer_markdown, transfer_table
    from hba.storage import atomic_write

    with atomic_write(run / "transfer.md") as handle:
        handle.write(transfer_markdown(result))

    def show() -> None:
        from rich.console import Console

        Console().print(transfer_table(result))

    answer(result.record(), as_json=json, show=show)
    finish(result.quarantined, allow_quarantined)


# `hba fit`: before anything is trained, whether it has room.


FIT_EXAMPLE = "Example: hba fit Qwen/Qwen2.5-Omni-7B --gpu 24 --config sft"


class FitStage(StrEnum):
    """What is to run: the stages of training, or `hba predict`."""

    sft = "sft"
    lm = "lm"
    qa = "qa"
    bam = "bam"
    rl = "rl"
    predict = "predict"


def fit_command(
    model: Annotated[str, typer.Argument(help="Backbone: a hub id or a folder. Its config is read, no weights.")],
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option(help="A GPU such as h100 or rtx4090, or its memory in GB: 24.")] = ...,  # type: ignore[assignment]
    gpus: Annotated[int, typer.Option(min=1, help="How many of them.")] = 1,
    config: ConfigOption = None,
    stage: Annotated[
        FitStage | None, typer.Option(help="What is to run; by default what the name of --config begins with, or sft.")
    ] = None,
    atlas: Annotated[str | None, typer.Option(help="Atlas whose rows give lengths and the time of an epoch.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Without --atlas: tokens of a prompt, media included.")] = 1024,
    json: JsonFlag = False,
) -> None:
    """Tell whether a run fits on a GPU, what takes the memory, and how long an epoch is. Exit code 1: it does not."""
    from hba.config import load_config

    known = [each.value for each in FitStage]
    named = Path(config).stem.partition("_")[0] if config is not None else "sft"
    chosen = stage.value if stage is not None else named
    if chosen not in known:
        what = f"the name of {config} does not say which stage it is for"
        raise InputError(what, where="--stage", fix=f"Give one of {', '.join(known)}.")
    place = [f"{'base' if chosen in ('qa', 'bam') else 'model.name'}={model}", f"atlas={atlas or 'none'}"]
    place = [] if chosen == "predict" else place
    settings = load_config(_stage_config(chosen), recipe_path(config), [*place, *(overrides or [])])
    from hba.fit import find_gpu, fit_run

    card = find_gpu(gpu)
    lengths, rows = [tokens], None
    if atlas is not None:
        from hba.atlas import open_atlas

        opened = open_atlas(atlas, split=getattr(settings, "train_split", "test"))
        lengths, rows = opened.estimated_tokens.tolist(), len(opened)
    found = fit_run(model, chosen, settings, card, gpus=gpus, tokens=lengths, rows=rows)
    answer(found.record(), as_json=json, show=lambda: _show_fit(found))
    if not found.fits:
        raise typer.Exit(1)


def _stage_config(stage: str) -> type[Any]:
    from hba.evaluate.config import PredictConfig
    from hba.rl.config import RlConfig
    from hba.train.config import BamConfig, LmConfig, QaConfig, SftConfig

    kinds: dict[str, type[Any]] = {"sft": SftConfig, "lm": LmConfig, "qa": QaConfig, "bam": BamConfig}
    return (kinds | {"rl": RlConfig, "predict": PredictConfig})[stage]


def _show_fit(found: Fit) -> None:
    from rich.console import Console
    from rich.table import Table

    key = {"predict": "batch_size", "qa": "features.batch_size", "bam": "features.batch_size"}
    batch = key.get(found.stage, "train.device_batch_size")
    many = f"{found.gpus} GPUs" if found.gpus > 1 else "one GPU"
    table = Table(title=f"{found.stage} of {found.model} on {many} of {found.gpu.gigabytes:g} GB", title_justify="left")
    table.add_column(f"{found.samples} x {found.tokens:,} tokens at once on a GPU")
    table.add_column("GB", justify="right")
    for part, size in found.parts.items():
        table.add_row(part, f"{size:,.1f}")
    table.add_section()
    table.add_row("together", f"{found.total:,.1f}")
    table.add_row("there is room for", f"{found.usable:,.1f}")
    Console().print(table)
    if found.fits:
        say(f"It fits. The most at once: {bold(f'{batch}={found.largest}')}.")
    else:
        say("It does not fit.")
        for change in found.changes:
            say(f"  Try {bold(change)}")
        if not found.changes:
            say("  No setting known here makes it fit: take a smaller model or a larger GPU.")
    epoch = "" if found.epoch_hours is None else f", {found.epoch_hours:,.1f} hours an epoch"
    assumed = f"{found.gpu.name}: {found.gpu.tflops:g} TFLOP/s as stated, of which 35 % are assumed"
    say(f"About {found.samples_per_second:,.1f} samples a second{epoch} ({assumed}).")
