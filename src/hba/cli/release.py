"""`hba merge`: a trained model for others to use."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from hba.cli.options import JsonFlag, answer, bold, say

MERGE_EXAMPLE = "Example: hba merge runs/sft models/omnisapiens"


class Precision(str, Enum):
    """Precisions of written weights."""

    bfloat16 = "bfloat16"
    float32 = "float32"


def merge_command(
    run: Annotated[Path, typer.Argument(help="Run folder (its best checkpoint), checkpoint, or released state dict.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    dtype: Annotated[Precision, typer.Option(help="Precision of the weights.")] = Precision.bfloat16,
    backbone: Annotated[
        str | None, typer.Option(help="RUN is a checkpoint that the authors released, on this backbone.")
    ] = None,
    lora_alpha: Annotated[
        int, typer.Option(min=1, help="With --backbone: LoRA scale numerator, 64 as published.")
    ] = 64,
    json: JsonFlag = False,
) -> None:
    """Fold LoRA into one full model that plain transformers and vLLM load; heads and adapters lie beside it."""
    from hba.model.merge import merge_checkpoint, merge_released
    from hba.process import prepare_process

    prepare_process(seed=0)
    if backbone is None:
        merge_checkpoint(run, out, dtype=dtype.value)
    else:
        merge_released(run, out, dtype=dtype.value, backbone=backbone, lora_alpha=lora_alpha)
    answer({"model": str(out)}, as_json=json, show=lambda: say(f"Wrote a full model to {bold(out)}."))
