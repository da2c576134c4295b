"""`hba merge`, `hba push`: a trained model for others to use."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hba.cli.options import JsonFlag, answer, bold, say

MERGE_EXAMPLE = "Example: hba merge runs/sft models/omnisapiens"
PUSH_EXAMPLE = "Example: hba push runs/sft my-org/omnisapiens --license apache-2.0"


class Precision(StrEnum):
    """Precisions of written weights."""

    bfloat16 = "bfloat16"
    float32 = "float32"


class Pooling(StrEnum):
    """Statistics over time that adapters read."""

    none = "none"
    mean = "mean"
    meanstd = "meanstd"
    meanstdp25p75 = "meanstdp25p75"


def merge_command(
    run: Annotated[Path, typer.Argument(help="Run folder (its best checkpoint), checkpoint, or released state dict.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    dtype: Annotated[Precision, typer.Option(help="Precision of the weights.")] = Precision.bfloat16,
    backbone: Annotated[
        str | None, typer.Option(help="RUN is a checkpoint that the authors released, on this backbone.")
    ] = None,
    onto: Annotated[
        str | None, typer.Option(help="RUN holds adapters that the authors released: put them on this checkpoint.")
    ] = None,
    adapters_of: Annotated[str | None, typer.Option(help="Dataset of released adapters.")] = None,
    pooling: Annotated[Pooling, typer.Option(help="How released adapters pool descriptors.")] = Pooling.meanstd,
    lora_alpha: Annotated[
        int, typer.Option(min=1, help="With --backbone: LoRA scale numerator, 64 as published.")
    ] = 64,
    json: JsonFlag = False,
) -> None:
    """Fold LoRA into one full model that plain transformers and vLLM load; heads and adapters lie beside it."""
    from hba.model.checkpoint import resolve_dtype
    from hba.model.merge import merge_checkpoint, merge_released
    from hba.model.released import Release
    from hba.process import prepare_process
    from hba.rl.verl.merge import is_verl_run, merge_verl_run

    prepare_process(seed=0)
    if is_verl_run(run):
        merge_verl_run(run, out, dtype=resolve_dtype(dtype.value))
    elif backbone is None and onto is None:
        merge_checkpoint(run, out, dtype=dtype.value)
    else:
        release = Release(
            backbone=backbone, onto=onto, lora_alpha=lora_alpha, dataset=adapters_of, pooling=pooling.value
        )
        merge_released(run, out, release, dtype=dtype.value)
    answer({"model": str(out)}, as_json=json, show=lambda: say(f"Wrote a full model to {bold(out)}."))


def push_command(
    run: Annotated[Path, typer.Argument(help="Scored run folder.")],
    repo: Annotated[str, typer.Argument(help="Model on the hub (org/name), or a new folder (./, / or file://).")],
    license_id: Annotated[str, typer.Option("--license", help="Licence of the weights, such as apache-2.0.")] = ...,  # type: ignore[assignment]
    merge: Annotated[bool, typer.Option("--merge", help="Fold LoRA in first.")] = False,
    private: Annotated[bool, typer.Option("--private", help="A new model on the hub is private.")] = False,
    json: JsonFlag = False,
) -> None:
    """Send a run's best model to the hub, with a card of its data, figures, intervals and limits."""
    from hba.process import prepare_process
    from hba.push import push_run

    prepare_process(seed=0)
    done = push_run(run, repo, license_id=license_id, merge=merge, private=private)
    values = {"place": done.place, "files": done.files}
    answer(values, as_json=json, show=lambda: say(f"Sent {done.files} files to {bold(done.place)}."))
