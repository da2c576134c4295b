"""The processes of a run, its ranks: how they share a model, and a step whatever each of them has of it.

A rank may have no sample where others have some: a batch can be smaller than the number of ranks, and a sample may turn
out to be unreadable. Nobody waits for it, and the gradient stays the sum over the samples of all ranks:

- Each rank adds up its own gradients, and all ranks add up theirs once a step (`add_up_gradients`). There is no hook in
  the backward pass that needs every rank; a rank with nothing contributes nothing.
- A sharded model (FSDP2) gathers every layer that it runs from all ranks. There a rank that has nothing while another
  has samples runs a copy of the other's micro-batch, whose loss counts nothing; so do ranks whose micro-batches run
  other layers, such as those of sound, which a clip may have or not (`turns`).

Before a step the ranks meet (`meet`): they say how many samples they will read, and whether one of them wishes to save
or to stop; after its last micro-batch, how many could be read. This and every other exchange of words goes over a group
of its own (gloo): it has no time limit, since a rank may load, compute features or write a model for hours, and it
notices at once that a rank has died.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from hba.errors import HbaError
from hba.model.omni import compile_layers, has_lora, liger_layers, recompute_layers
from hba.model.weights import give_precision
from hba.train.config import TrainConfig

# One model over many processes: each holds all of it, or a part of every parameter (FSDP2).
#
# A sharded model gathers one layer at a time while it computes. Training batches run the same layers on every rank (one
# modality signature each, or else as many `turns`), so that all ranks gather together; validation and saving do not,
# hence two contexts: `gathered` (each rank holds everything and may run what it likes) and `whole_weights` (the first
# rank's parameters are plain tensors, so that code which writes a checkpoint need not know of shards). Both do nothing
# to a whole model.
#
# Weights come from their files in parts, too: a model that will be sharded is loaded `mapped`, and each rank copies its
# own rows, layer by layer. No process holds the model whole.
#
# Where autocast computes in bfloat16, what it would round is gathered rounded, and nothing else is: a copy that it
# makes of a gathered weight is kept until its backward pass, for all layers together. Norms, embeddings and heads stay
# as they are stored, gradients are added up in float32: sharding changes no number beyond the order of sums.

ROUNDED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # whose weights and biases autocast casts


def prepare_model(
    model: nn.Module, accelerator: Accelerator, config: TrainConfig, *, pieces: bool = False
) -> nn.Module:
    """`model` on this process's device, in autocast where precision is mixed; with `sharding` over all processes.

    A model that each process holds whole is not wrapped: nothing of it waits for another process, and `Ranks` adds up
    the gradients. The optimizer is built after this: sharding replaces the parameters, and weights that were loaded as
    their files have them get their precision here. `activation_checkpointing` computes the layers of transformers
    models again in the backward pass instead of keeping what they computed; `kernels` and `compile` are about those of
    the language model. With `pieces` a pass asks the language head many times: it is gathered once, with the rest.
    """
    transformer = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if transformer is not None and config.activation_checkpointing:
        recompute_layers(transformer)
    if transformer is not None and config.kernels == "liger":
        liger_layers(transformer)
    if transformer is not None and config.compile:
        compile_layers(transformer)
    # "Evaluation" is Accelerate's word for: device and autocast alone, without DDP.
    # One process that was launched as many are has its one shard.
    if config.sharding != "full" or not distributed.is_initialized():
        prepared: nn.Module = accelerator.prepare_model(model, evaluation_mode=True)
        give_precision(prepared)
        if accelerator.num_processes > 1:  # built alike from one seed; that they are the same is not left to that
            for parameter in prepared.parameters():
                if parameter.requires_grad:
                    distributed.broadcast(parameter.data, src=0)
        return prepared
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for unit in units(model, mixed=accelerator.mixed_precision == "bf16", head=not pieces):
        kept = {"reduce_dtype": torch.float32, "cast_forward_inputs": False}
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if unit.rounded else None, **kept)  # type: ignore[arg-type]
        fully_shard(unit.module, mesh=mesh, mp_policy=policy)
        if isinstance(unit.module, nn.Embedding):  # its gradient does not depend on it
            unit.module.set_unshard_in_backward(False)  # type: ignore[operator]
    for stack in model.modules():
        if isinstance(stack, nn.ModuleList) and all(isinstance(layer, FSDPModule) for layer in stack):
            for below, layer in pairwise(stack):  # by itself FSDP would fetch a norm of the same layer first
                layer.set_modules_to_backward_prefetch([below])  # type: ignore[operator]
    # RL's first pass is a generation: the layers would take themselves for whole models, each for one of its own.
    if hasattr(model, "say"):  # not a head or adapters that train alone
        register_fsdp_forward_method(model, "say")
    sharded: nn.Module = accelerator.prepare_model(model, evaluation_mode=True)
    give_precision(sharded)  # of the own rows alone: until now the weights were mapped from their files
    return sharded


class Unit(NamedTuple):
    """What is gathered together, with `rounded` in bfloat16."""

    module: nn.Module
    rounded: bool


def units(model: nn.Module, *, mixed: bool, head: bool) -> Iterator[Unit]:
    """The parts in which a model is gathered, inner ones first, the rest of it last.

    They are the layers of all its stacks; the embeddings, and with `head` the language head, where the two are not one;
    and in `mixed` precision, within the layers, what trains and autocast does not round, such as norms.
    """
    for layer in [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]:
        precise = [part for part in layer.modules() if not isinstance(part, ROUNDED) and _trains_itself(part)]
        for part in reversed(precise if mixed else []):
            if part is not layer:
                yield Unit(part, False)
        yield Unit(layer, mixed and layer not in precise)
    transformer = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if transformer is not None and transformer.get_input_embeddings() is not None:
        words: Any = transformer.get_input_embeddings()
        speaks: Any = transformer.get_output_embeddings()
        if speaks is None or speaks.weight is not words.weight:
            yield Unit(words, False)
            if head and speaks is not None and speaks is not transformer:
                yield Unit(speaks, mixed)
    yield Unit(model, False)


def _trains_itself(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


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
        frozen.discard(id(model.transformer.lm_head.weight))  # type: ignore[union-attr]
    return {id(parameter) for parameter in model.parameters()} - frozen


# --- ranks ------------------------------------------------------------------------------------------------------------


PATIENCE = timedelta(days=7)
BUCKET_BYTES = 64 << 20  # gradients that are added up in one exchange
T = TypeVar("T")


B = TypeVar("B", bound=Sized)  # a micro-batch, as far as its place among the ranks goes: how many samples it has


class Meeting(NamedTuple):
    """What the ranks said: how many samples each of them has [R], the strongest wish of any of them, and kinds [R],
    equal for micro-batches that run the same layers of a model."""

    counts_R: list[int]
    wish: int
    kinds_R: list[int]

    @property
    def num_samples(self) -> int:
        """Samples over all ranks."""
        return sum(self.counts_R)


@dataclass(frozen=True)
class Turn(Generic[B]):
    """A micro-batch to run; `weight` is 1, or 0 for a copy of another rank's that only keeps the exchanges in step."""

    batch: B
    weight: float


class Ranks:
    """The processes of a run as one of them sees them. Made by all of them together."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.rank: int = accelerator.process_index
        self.world: int = accelerator.num_processes
        self.device: torch.device = accelerator.device
        self._patient: Any = None
        if self.world > 1:
            with _lost_rank_named():
                self._patient = distributed.new_group(backend="gloo", timeout=PATIENCE)

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that records and writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all ranks are here, however long that takes. Raises HbaError when one has ended."""
        if self.world > 1:
            with _lost_rank_named():
                distributed.barrier(group=self._patient)

    def gather(self, values: Sequence[T]) -> list[T]:
        """The values of all ranks, those of the first rank first. Raises HbaError when a rank has ended."""
        if self.world == 1:
            return list(values)
        found: list[Any] = [None] * self.world
        with _lost_rank_named():
            distributed.all_gather_object(found, list(values), group=self._patient)
        return [value for of_rank in found for value in of_rank]

    def collect(self, make: Callable[[], Sequence[T]]) -> list[T]:
        """What `make` gives on every rank, as `gather` does; an HbaError of one rank is raised on all of them."""
        own: Sequence[T] = ()
        failed: HbaError | None = None
        try:
            own = make()
        except HbaError as error:
            failed = error
        for told in self.gather([failed]):
            if told is not None:
                raise told from failed
        return self.gather(own)

    def told(self, value: T, by: int = 0) -> T:
        """The `value` of rank `by`; what the others give is not looked at. Raises HbaError when a rank has ended."""
        if self.world == 1:
            return value
        held = [value if self.rank == by else None]
        with _lost_rank_named():
            distributed.broadcast_object_list(held, src=by, group=self._patient)
        found: Any = held[0]
        return found  # type: ignore[no-any-return]

    def meet(self, count: int = 0, wish: int = 0, kind: int = 0) -> Meeting:
        """Tell all ranks how many samples this one has, a wish, and what kind of layers they run.

        Raises HbaError when a rank has ended.
        """
        if self.world == 1:
            return Meeting([count], wish, [kind])
        own = torch.tensor([count, wish, kind], dtype=torch.long)
        found = [torch.empty_like(own) for _ in range(self.world)]
        with _lost_rank_named():
            distributed.all_gather(found, own, group=self._patient)
        counts_R, wishes_R, kinds_R = zip(*(of_rank.tolist() for of_rank in found), strict=True)
        return Meeting(list(counts_R), max(wishes_R), list(kinds_R))

    def turns(
        self,
        batches: Iterable[B],
        model: nn.Module,
        portable: Callable[[B], B] = lambda batch: batch,
        inputs: Callable[[B], Iterable[str]] = lambda _: (),
    ) -> Iterator[Turn[B]]:
        """What this rank runs of a step: its micro-batches that have samples, and copies where `model` is sharded.

        `batches` are as many on every rank; each is taken when the one before has been run, and none is kept.
        `portable` makes of a micro-batch what can be sent to another rank; `inputs` names what a model is given of it,
        which tells what layers it runs. Raises HbaError when a rank has ended.
        """
        if not is_sharded(model):
            yield from (Turn(batch, 1.0) for batch in batches if len(batch))
            return
        for batch in batches:
            # Here ranks wait for one that is still loading: exchanges of tensors have a time limit.
            met = self.meet(len(batch), kind=zlib.crc32(" ".join(sorted(inputs(batch))).encode()))
            holding = [rank for rank, count in enumerate(met.counts_R) if count]
            for kind in sorted({met.kinds_R[rank] for rank in holding}):
                holders = [rank for rank in holding if met.kinds_R[rank] == kind]
                copy: B | None = None
                if len(holders) < self.world:
                    copy = self.told(portable(batch) if self.rank == holders[0] else None, by=holders[0])
                if self.rank in holders:
                    yield Turn(batch, 1.0)
                elif copy is not None:
                    yield Turn(copy, 0.0)

    def backward(self, loss: Tensor, model: nn.Module) -> None:
        """Add this rank's gradients of `loss`. In the end the gradient is that of the sum of all ranks' losses."""
        # A sharded model averages over the ranks in its backward pass; times their number that is the sum.
        self.accelerator.backward(loss * self.world if is_sharded(model) else loss)

    def add_up_gradients(self, model: nn.Module) -> None:
        """Make the gradients of every rank those of all ranks together; once a step, before clipping.

        A parameter without a gradient on some ranks has that of the others, one without any on all ranks stays so. A
        sharded model has done this in its backward passes. Raises HbaError when a rank has ended.
        """
        if self.world == 1 or is_sharded(model):
            return
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        touched = torch.tensor([parameter.grad is not None for parameter in trained], dtype=torch.uint8)
        with _lost_rank_named():
            distributed.all_reduce(touched, distributed.ReduceOp.MAX, group=self._patient)
        for bucket in _buckets([p for p, used in zip(trained, touched.tolist(), strict=True) if used]):
            flat = torch.cat([_gradient(parameter).reshape(-1) for parameter in bucket])
            with _lost_rank_named():
                distributed.all_reduce(flat)
            parts = torch.split(flat, [parameter.numel() for parameter in bucket])
            for parameter, part in zip(bucket, parts, strict=True):
                parameter.grad = part.view_as(parameter)

    def total(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all ranks."""
        summed: Tensor = self.accelerator.reduce(value, reduction="sum")
        return summed


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Runs of parameters of one type, of up to `BUCKET_BYTES`, a larger parameter alone."""
    bucket: list[nn.Parameter] = []
    held = 0
    for parameter in parameters:
        size = parameter.numel() * parameter.element_size()
        if bucket and (held + size > BUCKET_BYTES or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, held = [], 0
        bucket.append(parameter)
        held += size
    if bucket:
        yield bucket


def lost_rank(error: RuntimeError) -> HbaError | None:
    """What `error` means where it is that another rank cannot be reached; None for any other."""
    reason = str(error).partition("\n")[0]
    if not isinstance(error, distributed.DistError) and "gloo" not in reason:
        return None
    # Without the place in gloo's source in front, and the advice behind.
    reason = re.sub(r"^\[\S+\] |\. This is typically.*", "", reason)
    what = f"another process of this run has ended or cannot be reached ({reason})"
    return HbaError(what, fix="Its own messages say why; the same command goes on from the last checkpoint.")


@contextmanager
def _lost_rank_named() -> Iterator[None]:
    """Around exchanges between ranks."""
    try:
        yield
    except RuntimeError as error:
        lost = lost_rank(error)
        if lost is None:
            raise
        raise lost from error
