"""Which samples a rank trains on at which step: a pure function of (rows, mix, config, rank, number of ranks).

Invariants: the samples of an optimizer step are the same for any number of ranks and any `device_batch_size`; every
rank has as many micro-batches a step, and those at the same place have the same modalities. Where a batch has fewer
samples than there are places for, some micro-batches are empty (see `ranks`): no number of rows or ranks is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hba.atlas.columns import Columns
from hba.atlas.mixing import MixConfig, epoch_rows
from hba.atlas.sampler import Indices, plan_batches

if TYPE_CHECKING:
    from hba.train.config import TrainConfig


class Plan(NamedTuple):
    """What one rank runs: its micro-batches, and the number of each optimizer step's first, with one end more."""

    micro_batches: list[Indices]
    starts: list[int]


def num_steps(plan: Plan, config: TrainConfig) -> int:
    """The optimizer steps that are run: those of the plan, or the first `max_steps`."""
    planned = len(plan.starts) - 1
    return planned if config.max_steps is None else min(planned, config.max_steps)


def planned_rows(
    columns: Columns, lengths_N: Indices, mix: MixConfig, config: TrainConfig, groups_N: Indices | None = None
) -> Indices:
    """The rows that a run trains on, over all ranks and epochs, up to its last step; repeated ones repeat."""
    plan = training_plan(columns, lengths_N, mix, config, groups_N, rank=0, world=1)
    return np.concatenate(plan.micro_batches[: plan.starts[num_steps(plan, config)]])


def training_plan(
    columns: Columns,
    lengths_N: Indices,
    mix: MixConfig,
    config: TrainConfig,
    groups_N: Indices | None = None,
    *,
    rank: int,
    world: int,
) -> Plan:
    """This rank's share of the whole run, all epochs in a row. The batches are the same for any number of ranks.

    A batch has one modality signature, so that all ranks run the same layers at the same time; `groups_N` may divide
    the rows further.
    """
    codes_N = columns.signature_codes.astype(np.int64)
    if groups_N is not None:
        codes_N = codes_N + groups_N * len(columns.signatures)
    batches: list[Indices] = []
    for epoch in range(config.epochs):
        rows = epoch_rows(columns, mix, seed=config.seed, epoch=epoch)
        codes_M, size = codes_N[rows], config.batch_size
        planned = plan_batches(codes_M, lengths_N[rows], batch_size=size, seed=config.seed, epoch=epoch)
        batches += [rows[batch] for batch in planned]
    limit = config.device_batch_size
    shares = [share(batch, limit, (rank + number) % world, world) for number, batch in enumerate(batches)]
    ends = np.cumsum([len(parts) for parts in shares])
    starts = [0, *ends[config.accumulation - 1 :: config.accumulation].tolist()]
    if starts[-1] != ends[-1]:
        starts.append(int(ends[-1]))
    return Plan([part for parts in shares for part in parts], starts)


def share(batch: Indices, limit: int | None, place: int, world: int) -> list[Indices]:
    """A rank's samples of a batch, in as many parts on every rank; a part may be empty.

    A batch is sorted by length. It is cut into pieces that are dealt over the ranks in its order, so that a piece is
    padded little and ranks run pieces of similar length at the same time. A rank's `place` changes from batch to batch:
    no rank always has the longest pieces, or always those that a remainder leaves empty.
    """
    parts = 1 if limit is None else -(-len(batch) // (world * limit))
    size, longer = divmod(len(batch), parts * world)  # so many pieces, the first ones, have one sample more
    starts = [piece * size + min(piece, longer) for piece in range(place, parts * world, world)]
    pieces = range(place, parts * world, world)
    return [batch[start : start + size + (piece < longer)] for start, piece in zip(starts, pieces, strict=True)]
