"""One model over many processes: each holds all of it, or a part of every parameter (FSDP2).

A sharded model gathers one layer at a time while it computes. Training batches run the same layers on every rank (one
modality signature each), so that all ranks gather together; validation and saving do not, hence two contexts:
`gathered` (each rank holds everything and may run what it likes) and `whole_weights` (the first rank's parameters are
plain tensors, so that code which writes a checkpoint need not know of shards). Both do nothing to a whole model.

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


def prepare_model(
    model: nn.Module, accelerator: Accelerator, *, shard: bool, checkpoint_activations: bool
) -> nn.Module:
    """`model` on this process's device, in autocast where precision is mixed; with `shard` over all processes.

    A model that each process holds whole is not wrapped: nothing of it waits for another process, and `Ranks` adds up
    the gradients. The optimizer is built after this: sharding replaces the parameters. `checkpoint_activations`
    computes the layers of transformers models again in the backward pass instead of keeping what they computed.
    """
    if checkpoint_activations:
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and module.supports_gradient_checkpointing:
                module.gradient_checkpointing_enable({"use_reentrant": False})
    # "Evaluation" is Accelerate's word for: device and autocast alone, without DDP.
    if not shard or accelerator.num_processes == 1:
        prepared: nn.Module = accelerator.prepare_model(model, evaluation_mode=True)
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
    """While open, the parameters of `model` on the first rank are whole tensors in main memory; no forward passes.

    Opened by all ranks together, since gathering needs them all; the others keep their shards.
    """
    main = accelerator.is_main_process
    whole: dict[int, nn.Parameter | None] = {}  # tied parameters stay tied
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if isinstance(parameter, DTensor):
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
