"""Which samples a rank trains on at which step: a pure function of (rows, mix, config, rank, number of ranks).

Invariants: the samples of an optimizer step are the same for any number of ranks and any `device_batch_size`; every
rank has as many micro-batches a step, none of them empty, and those at the same place have the same modalities.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hba.atlas.columns import Columns
from hba.atlas.mixing import MixConfig, epoch_rows
from hba.atlas.sampler import Indices, plan_batches
from hba.errors import ConfigError

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
    the rows further. Raises ConfigError for a batch of fewer samples than ranks.
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
    smallest = min(map(len, batches))
    if smallest < world:
        fix = "Use fewer processes or a batch size that does not leave so small a rest."
        raise ConfigError(f"a batch of {smallest} samples cannot be split over {world} processes", fix=fix)
    shares = [_share(batch, config.device_batch_size, rank, world) for batch in batches]
    ends = np.cumsum([len(share) for share in shares])
    starts = [0, *ends[config.accumulation - 1 :: config.accumulation].tolist()]
    if starts[-1] != ends[-1]:
        starts.append(int(ends[-1]))
    return Plan([part for share in shares for part in share], starts)


def _share(batch: Indices, limit: int | None, rank: int, world: int) -> list[Indices]:
    """A rank's samples of a batch, in as many parts on every rank, none empty."""
    parts = 1 if limit is None else min(-(-len(batch) // (world * limit)), len(batch) // world)
    return [batch[start :: parts * world] for start in range(rank, parts * world, world)]
