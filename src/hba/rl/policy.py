"""The policy of an RL run, and the reference that it may be kept near to.

The policy is any chat model that speaks: a run or checkpoint of generative training, or a published model. What a
LoRA run compares itself with is itself with its layers switched off, which costs no memory; a run that trains
everything holds a frozen copy. Dropout is off: probabilities of the update must be those of the sampling.

All of them compute in one precision, that of training (autocast over the weights as they are kept): a difference of
log-probabilities is then one of policies and not of roundings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hba.atlas.batch import Batch
from hba.errors import InputError
from hba.model import chat, checkpoint
from hba.model.chat import ChatModel
from hba.model.config import ModelConfig
from hba.rl.rollout import probabilities

Reference = Callable[[Batch, float], Tensor]  # (batch, temperature) -> log-probabilities [B, L]


def build_policy(
    config: ModelConfig, resume: Path | None, *, freeze_towers: bool, mapped: bool = False
) -> ChatModel:
    """The model to train, from the config's name or the checkpoint that a run resumes at.

    With strategy full and `freeze_towers`, the layers of the language model train and nothing else does; `mapped` as in
    `chat.load`.
    """
    # Weights that train keep float32 masters; the configured dtype is for those that do not.
    dtype = "float32" if config.strategy == "full" else config.dtype
    name = config.name if resume is None else resume
    policy = chat.prepare(chat.load(name, dtype=dtype, attention=config.attention, mapped=mapped), config)
    if config.strategy == "full" and freeze_towers:
        trained = language_layers(policy)
        for name_, parameter in policy.transformer.named_parameters():
            parameter.requires_grad = name_.startswith(trained)
    for module in policy.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return policy


def language_layers(policy: ChatModel) -> tuple[str, str]:
    """Name prefixes of the language model's layers and of its final norm."""
    words = policy.transformer.get_input_embeddings()
    owner = next(name for name, module in policy.transformer.named_modules() if module is words).rpartition(".")[0]
    prefix = f"{owner}." if owner else ""
    return f"{prefix}layers.", f"{prefix}norm."


def build_reference(config: ModelConfig, policy: ChatModel, accelerator: Accelerator) -> Reference:
    """The policy as it was when the run began, whatever a resumed one has learned since.

    Raises InputError for a run that goes on with LoRA layers which it was given: without them it is another model.
    """
    if config.strategy == "lora":
        folder = checkpoint.resolve(config.name)
        if folder is not None and checkpoint.read_card(folder)["strategy"] == "lora":
            fix = "Merge it first (hba merge) and start from the merged model, or set loss.kl_weight=0."
            raise InputError("a model with LoRA layers has no reference to switch to", where=config.name, fix=fix)
        return lambda batch, temperature: _without_lora(policy, batch, temperature, accelerator)
    frozen = chat.load(config.name, dtype="float32", attention=config.attention)
    if accelerator.mixed_precision == "bf16":
        _round_once(frozen)
    frozen = frozen.to(accelerator.device).eval().requires_grad_(False)
    return lambda batch, temperature: _looked_at(frozen, batch, temperature, accelerator)


def _round_once(model: ChatModel) -> None:
    """Keep in bfloat16 what autocast would round in each pass: half the memory, and the same numbers."""
    words = model.transformer.get_input_embeddings().weight  # never rounded; a language head may share it
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.weight is not words:
            module.to(torch.bfloat16)


def _without_lora(policy: ChatModel, batch: Batch, temperature: float, accelerator: Accelerator) -> Tensor:
    with _adapters_off(policy):
        return _looked_at(policy, batch, temperature, accelerator)


@contextmanager
def _adapters_off(policy: ChatModel) -> Iterator[None]:
    policy.transformer.disable_adapters()
    try:
        yield
    finally:
        policy.transformer.enable_adapters()


@torch.no_grad()
def _looked_at(model: ChatModel, batch: Batch, temperature: float, accelerator: Accelerator) -> Tensor:
    with accelerator.autocast():
        return probabilities(model, model, batch, temperature).logps_BL
