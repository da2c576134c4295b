"""Batches of an atlas in the order of a plan, prepared by worker processes while the model computes.

The loader is a function of (atlas, plan, start): the same plan gives the same batches with any number of workers;
`start` continues in mid-epoch without decoding what came before. A sample whose medium cannot be read is left out of
its batch and named in `Batch.quarantined`; any other error ends the run.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from hba.atlas import Atlas
from hba.atlas.batch import Batch, Encoded, Encoder, collate
from hba.atlas.sample import Quarantined
from hba.atlas.sampler import Indices
from hba.config import option
from hba.errors import MediaError


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """Where batches are prepared."""

    workers: int = option(
        -1, "worker processes; 0 prepares in the main process, -1 is one a spare core, at most 8", affects_result=False
    )
    prefetch: int = option(4, "batches that each worker prepares ahead", affects_result=False)
    cache_megabytes: int = option(256, "encoded samples that a worker keeps, 0 for none", affects_result=False)

    def resolved_workers(self) -> int:
        """Number of worker processes on this machine."""
        return min(8, max(0, (os.cpu_count() or 1) - 1)) if self.workers < 0 else self.workers


class _Batches(Dataset[Batch]):
    """Item k is batch k of the plan, encoded and collated."""

    def __init__(self, atlas: Atlas, encoder: Encoder, plan: Sequence[Indices], cache: _Cache) -> None:
        self.atlas, self.encoder, self.plan, self.cache = atlas, encoder, plan, cache

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, number: int) -> Batch:
        encoded: list[Encoded] = []
        quarantined: list[Quarantined] = []
        for row in map(int, self.plan[number]):
            sample = self.atlas[row]
            try:
                encoded.append(self.cache.get(row) or self.cache.put(row, self.encoder.encode(sample)))
            except MediaError as error:
                quarantined.append(sample.quarantined(error))
        encoder = self.encoder
        return collate(
            encoded, pad_token_id=encoder.pad_token_id, taxonomy=encoder.taxonomy, quarantined=quarantined
        )


class _Cache:
    """Least recently used encoded samples, bounded by their bytes."""

    def __init__(self, megabytes: int) -> None:
        self._limit = megabytes << 20
        self._held = 0
        self._items: OrderedDict[int, Encoded] = OrderedDict()

    def get(self, row: int) -> Encoded | None:
        if row in self._items:
            self._items.move_to_end(row)
        return self._items.get(row)

    def put(self, row: int, encoded: Encoded) -> Encoded:
        if encoded.num_bytes <= self._limit:
            self._items[row] = encoded
            self._held += encoded.num_bytes
            while self._held > self._limit:
                _, oldest = self._items.popitem(last=False)
                self._held -= oldest.num_bytes
        return encoded


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)


def _single(batches: list[Batch]) -> Batch:
    return batches[0]


def load_batches(
    atlas: Atlas, encoder: Encoder, plan: Sequence[Indices], config: LoaderConfig, *, start: int = 0
) -> Iterator[Batch]:
    """Yield the batches of `plan` from number `start` on, in order."""
    workers = min(config.resolved_workers(), max(0, len(plan) - start))
    options: dict[str, Any] = {"prefetch_factor": config.prefetch} if workers else {}
    dataset = _Batches(atlas, encoder, plan, _Cache(config.cache_megabytes))
    loader = DataLoader(
        dataset,
        batch_size=1,
        sampler=range(start, len(plan)),
        num_workers=workers,
        collate_fn=_single,
        worker_init_fn=_start_worker,
        pin_memory=False,
        **options,
    )
    yield from loader
