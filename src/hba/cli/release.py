"""`hba merge`, `hba push`, `hba export`: a trained model, the benchmark and results for others to use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from hba.cli.options import SCORED_HELP, SLICES, Commands, JsonFlag, answer, bold, flag, number, takes
from hba.environment import require_extra
from hba.storage import plural

LMMS_EXAMPLE = "Example: hba export lmms-eval runs/lmms --atlas runs/mini"
WANDB_EXAMPLE = "Example: hba export wandb runs/demo/sft --project atlas --offline"
INSPECT_EXAMPLE = "Example: hba export inspect runs/inspect --atlas runs/mini"


def merge_command(
    run: Annotated[
        Path, typer.Argument(help="Run folder (its best checkpoint), checkpoint, or file that the authors released.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    dtype: Annotated[Literal["bfloat16", "float32"], typer.Option(help="Precision of the weights.")] = "bfloat16",
    backbone: Annotated[str | None, takes("MODEL", "RUN is a released checkpoint of this backbone.")] = None,
    onto: Annotated[str | None, takes("MODEL", "RUN holds released adapters: put them on this model.")] = None,
    adapters_of: Annotated[str | None, takes("DATASET", "With --onto: dataset of the adapters.")] = None,
    pooling: Annotated[
        Literal["none", "mean", "meanstd", "meanstdp25p75"],
        takes("NAME", "With --onto: how they pool descriptors: none, mean, meanstd or meanstdp25p75."),
    ] = "meanstd",
    lora_alpha: Annotated[int, number("With --backbone: its lora_alpha.", least=1)] = 64,
    json: JsonFlag = False,
) -> None:
    """Make one full model of a trained run, which transformers and vLLM load.

    LoRA is folded in; heads and adapters lie beside it.
    """
    require_extra("train", "hba merge")
    from hba.model.checkpoint import resolve_dtype
    from hba.model.merge import merge_checkpoint, merge_released
    from hba.model.process import prepare_process
    from hba.model.released import Release
    from hba.rl.verl.launch import is_verl_run, merge_verl_run

    prepare_process(seed=0)
    if is_verl_run(run):
        merge_verl_run(run, out, dtype=resolve_dtype(dtype))
    elif backbone is None and onto is None:
        merge_checkpoint(run, out, dtype=dtype)
    else:
        release = Release(backbone=backbone, onto=onto, lora_alpha=lora_alpha, dataset=adapters_of, pooling=pooling)
        merge_released(run, out, release, dtype=dtype)
    answer({"model": str(out)}, f"Wrote a full model to {bold(out)}.", as_json=json)


def push_command(
    run: Annotated[Path, typer.Argument(help=SCORED_HELP)],
    repo: Annotated[str, typer.Argument(help="Model on the hub, org/name, or a new folder (./, / or file://).")],
    license_id: Annotated[str, takes("NAME", "Licence of the weights, such as apache-2.0.", "--license")] = ...,  # type: ignore[assignment]
    merge: Annotated[bool, flag("--merge", "Fold LoRA in first, as hba merge does.")] = False,
    private: Annotated[bool, flag("--private", "Make a new model on the hub private.")] = False,
    json: JsonFlag = False,
) -> None:
    """Send a run's best model to the Hugging Face hub, with a model card.

    The card tells data, scores, intervals and limits.
    """
    require_extra("train", "hba push")
    from hba.export.push import push_run
    from hba.model.process import prepare_process

    prepare_process(seed=0)
    done = push_run(run, repo, license_id=license_id, merge=merge, private=private)
    answer(done._asdict(), f"Sent {plural(done.files, 'file')} to {bold(done.place)}.", as_json=json)


# `hba export`: the benchmark as tasks of other harnesses, and results as a table of others' trackers.


export_app = typer.Typer(
    cls=Commands, no_args_is_help=True, help="Write an atlas or results for lmms-eval, Inspect or Weights & Biases."
)

Out = Annotated[Path, typer.Argument(help="Folder to make.")]
AtlasOption = Annotated[str, takes("ATLAS", "Atlas: a folder with media as files.")]
Split = Annotated[str, takes("SPLIT", f"Split to write. {SLICES}")]


@export_app.command("lmms-eval", epilog=LMMS_EXAMPLE)
def lmms_eval_command(
    out: Out,
    atlas: AtlasOption = ...,  # type: ignore[assignment]
    split: Split = "test",
    json: JsonFlag = False,
) -> None:
    """Write tasks for lmms-eval that ask, read and score as hba does."""
    from hba.export.harnesses import export_lmms_eval

    command = f"python -m lmms_eval --include_path {out} --tasks hba --model MODEL"
    _exported(export_lmms_eval(atlas, split, out), out, command, json)


@export_app.command("inspect", epilog=INSPECT_EXAMPLE)
def inspect_command(
    out: Out,
    atlas: AtlasOption = ...,  # type: ignore[assignment]
    split: Split = "test",
    json: JsonFlag = False,
) -> None:
    """Write tasks for Inspect that ask, read and score as hba does."""
    from hba.export.harnesses import export_inspect

    _exported(export_inspect(atlas, split, out), out, f"cd {out} && inspect eval hba_tasks.py --model MODEL", json)


def _exported(counts: dict[str, int], out: Path, command: str, as_json: bool) -> None:
    text = f"{plural(sum(counts.values()), 'row')} of {plural(len(counts), 'task')} in {bold(out)}. Run: {command}"
    answer({"out": str(out), "rows": counts, "command": command}, text, as_json=as_json)


@export_app.command("wandb", epilog=WANDB_EXAMPLE)
def wandb_command(
    run: Annotated[Path, typer.Argument(help=SCORED_HELP)],
    project: Annotated[str, takes("NAME", "Project at W&B.")] = ...,  # type: ignore[assignment]
    offline: Annotated[bool, flag("--offline", "Write into the run folder; send it later with wandb sync.")] = False,
    predictions: Annotated[bool, flag("--predictions", "Also send every prediction.")] = False,
    json: JsonFlag = False,
) -> None:
    """Send the scores of a run to Weights & Biases, as tables."""
    from hba.export.wandb_table import log_tables

    place = log_tables(run, project=project, offline=offline, predictions=predictions)
    answer({"run": str(run), "wandb": place}, f"Logged to {bold(place)}.", as_json=json)
