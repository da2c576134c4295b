"""The processes of a run, its ranks, and how they share a step whatever each of them has of it.

A rank may have no sample where others have some: a batch can be smaller than the number of ranks, and a sample may turn
out to be unreadable. Nobody waits for it, and the gradient stays the sum over the samples of all ranks:

- Each rank adds up its own gradients, and all ranks add up theirs once a step (`add_up_gradients`). There is no hook in
  the backward pass that needs every rank; a rank with nothing contributes nothing.
- A sharded model (FSDP2) gathers every layer that it runs from all ranks. There a rank that has nothing while another
  has samples runs a copy of the other's micro-batch, whose loss counts nothing (`turns`).

Before a step the ranks meet once: they say how many samples each micro-batch has, and whether one of them wishes to
save or to stop (`meet`). This and every other exchange of words goes over a group of its own (gloo): it has no time
limit, since a rank may compute features or write a model for hours, and it notices at once that a rank has died.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, distributed, nn

from hba.errors import HbaError
from hba.train.sharding import is_sharded

PATIENCE = timedelta(days=7)
BUCKET_BYTES = 64 << 20  # gradients that are added up in one exchange
T = TypeVar("T")


class Countable(Protocol):
    """A micro-batch, as far as its place among the ranks goes."""

    def __len__(self) -> int:
        """Number of samples."""
        ...


B = TypeVar("B", bound=Countable)


class Meeting(NamedTuple):
    """What all ranks hold of a step, [R][M] samples of rank and micro-batch, and the strongest wish of any of them."""

    counts_RM: list[list[int]]
    wish: int

    @property
    def num_samples(self) -> int:
        """Samples of the step, over all ranks."""
        return sum(map(sum, self.counts_RM))


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

    def meet(self, counts: Sequence[int], wish: int = 0) -> Meeting:
        """Tell all ranks how many samples this one's micro-batches of a step have (as many on every rank), and a wish.

        Raises HbaError when a rank has ended.
        """
        if self.world == 1:
            return Meeting([list(counts)], wish)
        own = torch.tensor([*counts, wish], dtype=torch.long)
        found = [torch.empty_like(own) for _ in range(self.world)]
        with _lost_rank_named():
            distributed.all_gather(found, own, group=self._patient)
        said = [of_rank.tolist() for of_rank in found]
        return Meeting([numbers[:-1] for numbers in said], max(numbers[-1] for numbers in said))

    def turns(
        self, batches: Sequence[B], met: Meeting, model: nn.Module, portable: Callable[[B], B] = lambda batch: batch
    ) -> list[Turn[B]]:
        """What this rank runs of a step: its micro-batches that have samples, and copies where `model` is sharded.

        `portable` makes of a micro-batch what can be sent to another rank.
        """
        turns: list[Turn[B]] = []
        for place, batch in enumerate(batches):
            holders = [rank for rank, counts_M in enumerate(met.counts_RM) if counts_M[place]]
            copy: B | None = None
            if is_sharded(model) and 0 < len(holders) < self.world:
                copy = self.told(portable(batch) if self.rank == holders[0] else None, by=holders[0])
            if len(batch):
                turns.append(Turn(batch, 1.0))
            elif copy is not None:
                turns.append(Turn(copy, 0.0))
        return turns

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
