"""Which model is meant by its name, and what of it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from hba.atlas.names import hub_id_of
from hba.config import option
from hba.errors import ConfigError, InputError

Strategy = Literal["heads", "lora", "full"]
Dtype: TypeAlias = Literal["auto", "float32", "bfloat16"]
Attention: TypeAlias = Literal["sdpa", "eager", "flash_attention_2"]
Quantization: TypeAlias = Literal["none", "int8", "nf4"]
AsTrained: TypeAlias = Literal["auto", "none", "int8", "nf4"]  # auto: what the card of the checkpoint says

# What keys that several stages have say of themselves.
FROZEN_DTYPE = "number format of frozen weights. auto: bfloat16 on a GPU that computes in it, else float32"
ATTENTION = (
    "which code computes attention. sdpa is PyTorch's own; flash_attention_2 needs a GPU and the package flash-attn"
)
AS_TRAINED = "load the frozen backbone in 8 bits (int8), 4 bits (nf4) or neither (none). auto: as it was trained"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which backbone, what of it is trained, in what precision. LoRA defaults are those of the paper's SFT."""

    name: str = option(doc="the model to start from: a hub id such as Qwen/Qwen2.5-Omni-7B, or a folder")
    strategy: Strategy = option(
        "lora",
        "what is trained. heads: the classification heads alone; lora: LoRA layers and heads; full: every weight",
    )
    dtype: Dtype = option("auto", FROZEN_DTYPE)
    attention: Attention = option("sdpa", ATTENTION)
    quantization: Quantization = option(
        "none", "load the frozen linear layers of the language model in 8 bits (int8) or 4 bits (nf4, as in QLoRA)"
    )
    lora_r: Annotated[int, Field(ge=1)] = option(32, "rank of LoRA: the width of its added layers")
    lora_alpha: Annotated[int, Field(ge=1)] = option(
        64, "scale of LoRA: its output is multiplied by lora_alpha / lora_r"
    )
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = option(
        0.05, "share of the inputs of LoRA that training sets to zero, 0..1"
    )
    lora_targets: tuple[str, ...] | None = option(
        None, "linear layers of the language model that get LoRA, by name or pattern (q_proj, 2[0-7].mlp.*). null: all"
    )
    lora_rank_pattern: dict[str, Annotated[int, Field(ge=1)]] | None = option(
        None, "layers with a rank of their own, by name or pattern, such as {q_proj: 8}"
    )
    lora_dora: bool = option(False, "use DoRA: the length of each weight's rows is trained beside LoRA")

    def __post_init__(self) -> None:
        """Raises ConfigError for LoRA on no layer."""
        if self.lora_targets == ():
            fix = "Name layers such as q_proj, leave it out for all, or use model.strategy=heads."
            raise ConfigError("no layer would have LoRA", where="model.lora_targets", fix=fix)


def require_bitsandbytes(asked: str, *, of_it: bool, where: str) -> None:
    """Raise ConfigError where what is `asked` for by `where` is done by bitsandbytes, which is not installed."""
    if of_it and find_spec("bitsandbytes") is None:
        fix = "pip install 'human-behavior-atlas[quantization]'"
        raise ConfigError(f"{asked} needs bitsandbytes, which is not installed", where=where, fix=fix)


def require_gpu_package(key: str, asked: str, module: str, package: str, other: str) -> None:
    """Raise ConfigError where what is `asked` for by `key` needs a GPU, or a package, that is not there."""
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(f"{asked} needs a GPU, and there is none", where=key, fix=f"Use {key}={other}.")
    if find_spec(module) is None:
        fix = f"pip install {package}, or use {key}={other}."
        raise ConfigError(f"{asked} needs {package}, which is not installed", where=key, fix=fix)


def computes_bfloat16(capability: tuple[int, int] | None) -> bool:
    """Whether a GPU of that CUDA compute capability computes in bfloat16 itself (8.0, Ampere, and later); None: no GPU.

    Earlier ones (V100, T4) convert to float32 and back at every step: torch calls that supported, and it is slower
    than float32.
    """
    return capability is not None and capability >= (8, 0)


# What the name of a model means: a folder on this machine, or an id of the hub such as Qwen/Qwen2.5-Omni-7B.
#
# The rule is that of atlases (`hba.atlas.names`): a path below a folder that exists is never taken for an id, so that a
# mistyped run is reported as one instead of being looked up on the hub.


ACCEPTED = (
    "a run folder, a checkpoint, a folder with a Hugging Face model, or a hub id such as Qwen/Qwen2.5-Omni-7B (a path"
    " below a folder that exists is none)"
)


def require_place(name: str | Path, *, also: str = "") -> None:
    """Raise InputError when `name` is neither a folder on this machine nor may be an id of the hub.

    `also` is what else would be accepted where it is asked for.
    """
    if not Path(name).is_dir() and hub_id_of(name) is None:
        raise InputError("no such folder", where=str(name), fix=f"Give {ACCEPTED}{also}.")
