"""`hba train`, `hba transfer`, `hba fit`: one command a training stage, the protocol of transfer, room on a GPU.

A config is checked before torch is imported, which takes seconds.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias, get_args

import typer

from hba.cli.options import (
    AllowQuarantined,
    BaseUrl,
    Commands,
    ConfigOption,
    JsonFlag,
    Overrides,
    answer,
    beside,
    bold,
    configured,
    counted,
    finish,
    flag,
    is_first,
    number,
    served,
    takes,
    tallied,
)
from hba.environment import require_extra
from hba.errors import InputError
from hba.storage import plural

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hba.fit import Fit
    from hba.run import RunFolder

SFT_EXAMPLE = "Example: hba train sft --config sft_tiny --run runs/sft atlas=runs/mini model.name=runs/tiny"
FIRST = "\nBefore:  hba atlas mini runs/mini\nand:     hba tiny runs/tiny --atlas runs/mini"
LM_EXAMPLE = "Example: hba train lm --config lm_tiny --run runs/lm atlas=runs/mini model.name=runs/tiny"
QA_EXAMPLE = "Example: hba train qa --config qa_tiny --from runs/sft --run runs/qa atlas=runs/mini"
BAM_EXAMPLE = "Example: hba train bam --config bam_tiny --from runs/qa --dataset daicwoz --run runs/bam atlas=runs/mini"
RL_EXAMPLE = "Example: hba train rl --algorithm harpo --config rl_tiny atlas=runs/mini model.name=runs/speak"
FIT_EXAMPLE = "Example: hba fit Qwen/Qwen2.5-Omni-7B --gpu 24 --config sft"
TRANSFER_EXAMPLE = "Example: hba transfer --config sft_tiny --run runs/transfer atlas=runs/mini model.name=runs/tiny"
FITTED = "gpu.json"  # of a run folder: what --gpu chose
Fitted: TypeAlias = dict[str, Any] | None
RunOption = takes("FOLDER", "Run folder to write, or to resume.")

OnGpu = Annotated[
    str | None, takes("GPU", "Choose settings that fit on this GPU, such as h100, or on these GB: 24.", "--gpu")
]
From = Annotated[str | None, takes("RUN", "Run folder or checkpoint of the stage before.", "--from")]


class Stages(Commands):
    """`hba train`, in the order of the stages."""

    PANELS: ClassVar[dict[str, tuple[str, ...]]] = {
        "OmniSapiens, in three stages": ("sft", "qa", "bam"),
        "A model that answers in words": ("lm", "rl"),
    }
    OPTIONS: ClassVar[dict[str, dict[str, tuple[str, ...]]]] = {"rl": {"The model": ("base_url",)}}


train_app = typer.Typer(cls=Stages, no_args_is_help=True, help="Train OmniSapiens or another chat model.")


def _fitted(kind: type[Any], config: str | None, given: list[str], run: Path, gpu: str | None) -> tuple[Any, Fitted]:
    """The config of a run that has to fit on `gpu`, and what was chosen; a run that goes on keeps what it began with.

    Keys that are typed win.
    """
    from hba.storage import read_json

    settings = configured(kind, config, given)
    typed = [override.partition("=")[0].strip() for override in given]
    kept: Fitted = read_json(run / FITTED) if (run / FITTED).is_file() else None
    if kept is None or gpu not in (None, kept["gpu"]):
        if gpu is None:
            return settings, None
        from hba.atlas import open_atlas
        from hba.batch.sampler import input_tokens
        from hba.fit import find_gpu, recipe_for

        card, processes = find_gpu(gpu), int(os.environ.get("WORLD_SIZE", "1"))
        rows = open_atlas(settings.atlas, split=settings.train_split).with_answers().filter(datasets=settings.datasets)
        longest = int(input_tokens(rows, settings.encode).max(initial=1))
        found = recipe_for(settings.model.name, settings, card, gpus=processes, tokens=longest, typed=typed)
        kept = {"gpu": gpu, "keys": found.keys}
        if is_first():
            chosen = f"sets {found.words}" if found.keys else "fits as it is"
            room = f"{found.total:,.1f} of {found.usable:,.1f} GB by count, {longest:,} tokens the longest"
            sys.stderr.write(f"--gpu {gpu}: {chosen} ({room}).\n")
    chosen_keys = [f"{key}={str(value).lower()}" for key, value in kept["keys"].items() if key not in typed]
    return configured(kind, config, [*chosen_keys, *given]), kept


@contextmanager
def _training(run: Path, settings: Any, command: str, fitted: Fitted = None) -> Iterator[RunFolder]:
    """The folder of a training run, made or resumed; says which it is, and how to choose another, before it trains."""
    from hba.storage import write_json
    from hba.train.state import training_run

    resumed = (run / "config.yaml").is_file()
    with training_run(run, config=settings, command=command, seed=settings.train.seed) as folder:
        if folder.is_main:
            state = "goes on with the run in it" if resumed else "new"
            sys.stderr.write(f"Run folder: {run} ({state}; --run chooses another).\n")
            if fitted is not None:
                write_json(run / FITTED, fitted)
        yield folder


def _train(
    work: Callable[..., Any],
    settings: Any,
    run: Path,
    command: str,
    allowed: int,
    as_json: bool,
    *,
    fitted: Fitted = None,
    features: bool = False,
    best: str = "validation mean",
    sign: int = 1,
) -> None:
    """Train and answer. `work` takes settings and folder, with `features` also a bar for them; `best` says what the
    best checkpoint is best in, `sign` which way."""
    with _training(run, settings, command, fitted) as folder:
        if features:
            with counted("features") as told:
                progress = work(settings, folder, told)
        else:
            progress = work(settings, folder)
        quarantined = folder.quarantine.records()
    shown = ("step", "samples_seen", "best_step", "best_score")
    result = {"run": str(run), **{name: getattr(progress, name) for name in shown}, "quarantined": len(quarantined)}
    text = f"Trained {plural(progress.step, 'step')} in {bold(run)}"
    if progress.best_score is None:
        text += "; no task of the validation has a score."
    else:
        text += f": best {best} {sign * progress.best_score:.3f} at step {progress.best_step}."
    answer(result, text, as_json=as_json)
    finish(quarantined, allowed)


@train_app.command("sft", epilog=SFT_EXAMPLE + FIRST)
def sft_command(
    overrides: Overrides = None,
    config: ConfigOption = None,
    run: Annotated[Path, RunOption] = Path("runs/sft"),
    gpu: OnGpu = None,
    allow_quarantined: AllowQuarantined = 0,
    json: JsonFlag = False,
) -> None:
    """Stage 1: train LoRA (or all weights) and one head for each domain of labels.

    Run it again to resume. Next: hba predict RUN --atlas ATLAS, or stage 2, hba train qa.
    """
    require_extra("train", "hba train sft")
    from hba.train.config import SftConfig

    settings, fitted = _fitted(SftConfig, config, overrides or [], run, gpu)
    from hba.train.sft import train_sft

    _train(train_sft, settings, run, "train sft", allow_quarantined, json, fitted=fitted)


@train_app.command("lm", epilog=LM_EXAMPLE + FIRST)
def lm_command(
    overrides: Overrides = None,
    config: ConfigOption = None,
    run: Annotated[Path, RunOption] = Path("runs/lm"),
    gpu: OnGpu = None,
    allow_quarantined: AllowQuarantined = 0,
    json: JsonFlag = False,
) -> None:
    """Teach any chat model to answer in words.

    Run it again to resume. Next: hba predict RUN --atlas ATLAS, or hba train rl.
    """
    require_extra("train", "hba train lm")
    from hba.train.config import LmConfig

    settings, fitted = _fitted(LmConfig, config, overrides or [], run, gpu)
    from hba.train.lm import train_lm

    told: dict[str, Any] = {"fitted": fitted, "best": "validation loss", "sign": -1}
    _train(train_lm, settings, run, "train lm", allow_quarantined, json, **told)


@train_app.command("rl", epilog=RL_EXAMPLE)
def rl_command(
    overrides: Overrides = None,
    config: ConfigOption = None,
    algorithm: Annotated[
        str | None,
        takes("NAME", "grpo, harpo, dr_grpo, rloo, reinforce_pp, gpg, ema_grpo, dapo or gspo.", default="the recipe's"),
    ] = None,
    base_url: BaseUrl = None,
    run: Annotated[Path, RunOption] = Path("runs/rl"),
    engine: Annotated[
        Literal["local", "verl"], typer.Option(help="local: this machine. verl: a cluster, by Ray.")
    ] = "local",
    dry_run: Annotated[bool, flag("--dry-run", "Print the config for verl; start nothing.")] = False,
    gpu: OnGpu = None,
    allow_quarantined: AllowQuarantined = 0,
    json: JsonFlag = False,
) -> None:
    """Train a model that answers in words by reinforcement learning.

    The algorithms are explained in docs/rl.md. Run it again to resume. Next: hba predict RUN --atlas ATLAS.
    """
    require_extra("train", "hba train rl")
    from hba.rl.config import RlConfig

    given = [*served(base_url), *(overrides or []), *_key("algorithm", algorithm)]
    if gpu is not None and engine != "local":
        raise InputError("--gpu is for the local engine", where="hba train rl", fix="Leave out --gpu or --engine verl.")
    settings, fitted = _fitted(RlConfig, config, given, run, gpu)
    if dry_run and engine != "verl":
        raise InputError("--dry-run shows verl's config", where="hba train rl", fix="Add --engine verl.")
    if dry_run:
        from hba.config import dump_yaml
        from hba.rl.verl.config import nested, translate
        from hba.rl.verl.launch import place_of

        keys = translate(settings, place_of(settings, run))

        def show() -> tuple[()]:
            typer.echo(dump_yaml(nested(keys)), nl=False)  # as it is, to be piped
            return ()

        return answer(keys, show, as_json=json)
    if engine == "local":
        from hba.rl.local import train_rl

        told_best: dict[str, Any] = {"fitted": fitted, "best": "greedy reward"}
        return _train(train_rl, settings, run, "train rl", allow_quarantined, json, **told_best)
    from hba.rl.verl.launch import train_on_verl

    with _training(run, settings, "train rl --engine verl") as folder, counted("steps on verl") as told:
        steps = train_on_verl(settings, folder, told, beside)
        quarantined = folder.quarantine.records()
    result = {"run": str(run), "step": steps, "quarantined": len(quarantined)}
    answer(result, f"Trained {plural(steps, 'step')}: hba merge {run} MODEL makes the model.", as_json=json)
    return finish(quarantined, allow_quarantined)


# The stages that stand on an earlier one.


@train_app.command("qa", epilog=QA_EXAMPLE)
def qa_command(
    overrides: Overrides = None,
    config: ConfigOption = None,
    base: From = None,
    run: Annotated[Path, RunOption] = Path("runs/qa"),
    allow_quarantined: AllowQuarantined = 0,
    json: JsonFlag = False,
) -> None:
    """Stage 2: train the output layer to answer free-form rows.

    Backbone and heads stay as they are. Run it again to resume. Next: hba train bam.
    """
    require_extra("train", "hba train qa")
    from hba.train.config import QaConfig

    settings = configured(QaConfig, config, overrides, _key("base", base))
    from hba.train.qa import train_qa

    _train(train_qa, settings, run, "train qa", allow_quarantined, json, features=True)


@train_app.command("bam", epilog=BAM_EXAMPLE)
def bam_command(
    overrides: Overrides = None,
    config: ConfigOption = None,
    base: From = None,
    dataset: Annotated[list[str] | None, takes("DATASET", "Train adapters for this dataset. Repeat for more.")] = None,
    every: Annotated[bool, flag("--all", "Train adapters for every dataset that has descriptors.")] = False,
    allow_missing: Annotated[
        bool, flag("--allow-missing", "Accept rows without descriptors; they get no adapter.")
    ] = False,
    run: Annotated[Path, RunOption] = Path("runs/bam"),
    allow_quarantined: AllowQuarantined = 0,
    json: JsonFlag = False,
) -> None:
    """Stage 3: train adapters (BAM) that read descriptors, dataset by dataset.

    Run it again to resume. Next: hba predict RUN --atlas ATLAS. Descriptors come from hba atlas describe.
    """
    require_extra("train", "hba train bam")
    from hba.train.config import BamConfig

    if every and dataset:
        raise InputError("--all and --dataset exclude each other", where="hba train bam", fix="Give one of them.")
    chosen = [*_key("base", base), *_key("datasets", f"[{','.join(dataset)}]" if dataset else None)]
    chosen += _key("datasets", "null" if every else None) + _key("descriptors.allow_missing", allow_missing or None)
    settings = configured(BamConfig, config, overrides, chosen)
    if settings.datasets is None and not every:
        raise InputError("no dataset is named", where="hba train bam", fix="Give --dataset KEY, or --all.")
    from hba.train.bam import train_bam

    _train(train_bam, settings, run, "train bam", allow_quarantined, json, features=True)


def _key(name: str, value: object) -> list[str]:
    """`name=value` as an override; nothing for None."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return [] if value is None else [f"{name}={text}"]


def transfer_command(
    overrides: Overrides = None,
    config: ConfigOption = None,
    run: Annotated[Path, takes("FOLDER", "Folder of all its runs, to write or to resume.")] = Path("runs/transfer"),
    heldout: Annotated[
        list[str] | None, takes("DATASET", "Dataset to hold out. Repeat for more.", default="those of the paper")
    ] = None,
    allow_quarantined: AllowQuarantined = 0,
    json: JsonFlag = False,
) -> None:
    """Measure what pretraining gives to datasets that were held out of it.

    It pretrains without them, fine-tunes on each, and compares with no pretraining. Run it again to resume.
    """
    require_extra("train", "hba transfer")
    from hba.train.config import SftConfig

    settings = configured(SftConfig, config, overrides)
    from hba.train.transfer import run_transfer

    result = run_transfer(run, settings, heldout=heldout or None, progress=tallied)
    if result is None:  # another rank reports
        return
    from hba.report.comparison import transfer_table
    from hba.report.tables import write_table

    table = transfer_table(result)
    write_table(table, run / "transfer.md")
    answer(result.record(), lambda: [table], as_json=json)
    finish(result.quarantined, allow_quarantined)


# --- before anything is trained: whether it has room ------------------------------------------------------------------


FitStage = Literal["sft", "lm", "qa", "bam", "rl", "predict"]


def fit_command(
    model: Annotated[str, typer.Argument(help="Backbone: a folder, or org/name on the hub. No weights are read.")],
    overrides: Overrides = None,
    gpu: Annotated[str, takes("GPU", "GPU, such as h100 or rtx4090, or its memory in GB: 24.")] = ...,  # type: ignore[assignment]
    gpus: Annotated[int, number("Number of GPUs.", least=1)] = 1,
    config: ConfigOption = None,
    stage: Annotated[
        FitStage | None,
        takes("STAGE", "What is to run: sft, lm, qa, bam, rl or predict.", default="as --config is named, or sft"),
    ] = None,
    atlas: Annotated[
        str | None, takes("ATLAS", "Take lengths from this atlas, and tell the hours of an epoch.")
    ] = None,
    tokens: Annotated[int, number("Without --atlas: tokens of a row, media included.", least=1)] = 1024,
    json: JsonFlag = False,
) -> None:
    """Tell whether a run fits on a GPU, and how long an epoch takes.

    It also says what takes the memory, and what to change. Exit code 1: the run does not fit.
    """
    require_extra("train", "hba fit")
    known = get_args(FitStage)
    named = Path(config).stem.partition("_")[0] if config is not None else "sft"
    chosen = stage or named
    if chosen not in known:
        what = f"the name of {config} does not say which stage it is for"
        raise InputError(what, where="--stage", fix=f"Give one of {', '.join(known)}.")
    place = [f"{'base' if chosen in ('qa', 'bam') else 'model.name'}={model}", f"atlas={atlas or 'none'}"]
    place = [] if chosen == "predict" else place
    settings = configured(_stage_config(chosen), config, [*place, *(overrides or [])])
    from hba.fit import find_gpu, fit_run

    card = find_gpu(gpu)
    lengths, rows = [tokens], None
    if atlas is not None:
        from hba.atlas import open_atlas
        from hba.batch.config import EncodeConfig
        from hba.batch.sampler import input_tokens

        opened = open_atlas(atlas, split=getattr(settings, "train_split", "test"))
        opened = opened if chosen == "predict" else opened.with_answers()
        # Later stages take the encoding of the run that they stand on.
        lengths = input_tokens(opened, getattr(settings, "encode", EncodeConfig())).tolist()
        rows = len(opened)
    found = fit_run(model, chosen, settings, card, gpus=gpus, tokens=lengths, rows=rows)
    answer(found.record(), lambda: _fit(found), as_json=json)
    if not found.fits:
        raise typer.Exit(1)


def _stage_config(stage: str) -> type[Any]:
    from hba.evaluate.config import PredictConfig
    from hba.rl.config import RlConfig
    from hba.train.config import BamConfig, LmConfig, QaConfig, SftConfig

    kinds: dict[str, type[Any]] = {"sft": SftConfig, "lm": LmConfig, "qa": QaConfig, "bam": BamConfig}
    return (kinds | {"rl": RlConfig, "predict": PredictConfig})[stage]


def _fit(found: Fit) -> Iterator[RenderableType]:
    from hba.report.tables import Table

    many = f"{found.gpus} GPUs" if found.gpus > 1 else "one GPU"
    parts = [(part, f"{size:,.1f}") for part, size in found.parts.items()]
    whole = [("together", f"{found.total:,.1f}"), ("there is room for", f"{found.usable:,.1f}")]
    yield Table(
        title=f"{found.stage} of {found.model} on {many} of {found.gpu.gigabytes:g} GB",
        head=(f"{found.samples} x {found.tokens:,} tokens at once on a GPU", "GB"),
        rows=[*parts, (), *whole],
    )
    if found.fits:
        yield f"It fits. The most at once: {bold(found.setting)}."
    else:
        yield "It does not fit."
        yield from (f"  Try {bold(change)}" for change in found.changes)
        if not found.changes:
            yield "  No setting known here makes it fit: take a smaller model or a larger GPU."
    epoch = "" if found.epoch_hours is None else f", {found.epoch_hours:,.1f} hours an epoch"
    assumed = f"{found.gpu.name}: {found.gpu.tflops:g} TFLOP/s as stated, of which 35 % are assumed"
    if found.sampling_share:
        epoch += f", {found.sampling_share:.0%} of the time drawing responses, each of the greatest length"
    yield f"About {found.samples_per_second:,.1f} samples a second{epoch} ({assumed})."
