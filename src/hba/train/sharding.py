"""One model over many processes: each holds all of it, or a part of every parameter (FSDP2).

A sharded model gathers one layer at a time while it computes. Training batches run the same layers on every rank (one
modality signature each), so that all ranks gather together; validation and saving do not, hence two contexts:
`gathered` (each rank holds everything and may run what it likes) and `whole_weights` (the first rank's parameters are
plain tensors, so that code which writes a checkpoint need not know of shards). Both do nothing to a whole model.

Weights come from their files in parts, too: a model that will be sharded is loaded `mapped`, and each rank copies its
own rows, layer by layer. No process holds the model whole.

No mixed-precision policy is set: parameters are gathered as they are stored, and autocast casts them as it does on one
device, so that sharding changes no number beyond the order of sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from hba.model.omni import has_lora
from hba.model.weights import give_precision


def prepare_model(
    model: nn.Module, accelerator: Accelerator, *, shard: bool, checkpoint_activations: bool
) -> nn.Module:
    """`model` on this process's device, in autocast where precision is mixed; with `shard` over all processes.

    A model that each process holds whole is not wrapped: nothing of it waits for another process, and `Ranks` adds up
    the gradients. The optimizer is built after this: sharding replaces the parameters, and weights that were loaded as
    their files have them get their precision here. `checkpoint_activations` computes the layers of transformers models
    again in the backward pass instead of keeping what they computed.
    """
    if checkpoint_activations:
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and module.supports_gradient_checkpointing:
                module.gradient_checkpointing_enable({"use_reentrant": False})
    # "Evaluation" is Accelerate's word for: device and autocast alone, without DDP.
    if not shard or not distributed.is_initialized():  # one process that was launched as many are has its one shard
        prepared: nn.Module = accelerator.prepare_model(model, evaluation_mode=True)
        give_precision(prepared)
        if accelerator.num_processes > 1:  # built alike from one seed; that they are the same is not left to that
            for parameter in prepared.parameters():
                if parameter.requires_grad:
                    distributed.broadcast(parameter.data, src=0)
        return prepared
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):  # transformers' name for a decoder or encoder layer
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # RL's first pass is a generation: the layers would take themselves for whole models, each for one of its own.
    register_fsdp_forward_method(model, "generate")
    sharded: nn.Module = accelerator.prepare_model(model, evaluation_mode=True)
    give_precision(sharded)  # of the own rows alone: until now the weights were mapped from their files
    return sharded


def is_sharded(model: nn.Module) -> bool:
    """Whether the parameters of `model` are split over the processes."""
    return isinstance(model, FSDPModule)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """While open, every rank holds all parameters, and forward passes of the ranks need not agree.

    Opened and closed by all ranks together. A device must have room for the parameters (no gradients, no optimizer).
    """
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            # The outermost part is needed first in the backward pass: it stays gathered in between.
            part.set_reshard_after_forward(part is not model, recurse=False)


@contextmanager
def whole_weights(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """While open, what a checkpoint holds of `model` is whole tensors in main memory on the first rank.

    Weights that it does not hold, such as those below LoRA, stay in parts: they are not gathered. No forward passes.
    Opened by all ranks together, since gathering needs them all; the others keep their shards.
    """
    main = accelerator.is_main_process
    written = _written(model)
    whole: dict[int, nn.Parameter | None] = {}  # tied parameters stay tied
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if isinstance(parameter, DTensor) and id(parameter) in written:
                if id(parameter) not in whole:
                    full: Tensor = parameter.full_tensor().detach()  # a collective: in the same order on every rank
                    whole[id(parameter)] = nn.Parameter(full.cpu(), parameter.requires_grad) if main else None
                replaced.append((module, name, parameter))
    try:
        for module, name, parameter in replaced if main else ():
            module._parameters[name] = whole[id(parameter)]
        yield
    finally:
        for module, name, parameter in replaced:
            module._parameters[name] = parameter


def _written(model: nn.Module) -> set[int]:
    """The parameters that a checkpoint of `model` holds, by id.

    A transformers model is written whole where it trains without LoRA, frozen parts included; of one with LoRA, or
    whose heads alone train, what trains is written, and an lm_head of its own (stage 2).
    """
    frozen: set[int] = set()
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            named = dict(module.named_parameters())
            if has_lora(module) or not any(parameter.requires_grad for parameter in named.values()):
                frozen |= {id(parameter) for parameter in named.values() if not parameter.requires_grad}
            break  # what it is made of are models of transformers, too
    if getattr(model, "own_lm_head", False):
        frozen.discard(id(model.thinker.lm_head.weight))  # type: ignore[union-attr]
    return {id(parameter) for parameter in model.parameters()} - frozen
