"""Batches of an atlas in the order of a plan, prepared by worker processes while the model computes.

The loader is a function of (atlas, plan, start): the same plan gives the same batches with any number of workers;
`start` continues in mid-epoch without decoding what came before. A sample whose medium cannot be read, or whose
decoding ends or hangs its worker (see `workers`), is left out of its batch and named in `Batch.quarantined`; any other
error is raised when the turn of its batch comes. Workers are as far ahead as the memory for it allows, whatever the
size of a batch; encoded samples are kept for the next epoch as far as memory allows. Where there is a GPU, batches lie
in pinned memory, from which they are copied while it computes.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import chain, islice
from typing import TypeAlias

import torch

from hba.atlas import Atlas
from hba.atlas.batch import Batch, Encoded, SampleEncoder, collate
from hba.atlas.config import LoaderConfig
from hba.atlas.sample import Quarantined
from hba.atlas.sampler import Indices
from hba.atlas.workers import Failure, Outcome, WorkerPool, encode_row, raise_failure

Outcomes: TypeAlias = Generator[Outcome, None, None]

MAX_ROWS_AHEAD = 256
"""rows that workers are given; how many of them lie ready is a matter of their bytes"""


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

    def put(self, row: int, outcome: Outcome) -> None:
        if isinstance(outcome, Encoded) and outcome.num_bytes <= self._limit and row not in self._items:
            self._items[row] = outcome
            self._held += outcome.num_bytes
            while self._held > self._limit:
                _, oldest = self._items.popitem(last=False)
                self._held -= oldest.num_bytes


def load_batches(
    atlas: Atlas, encoder: SampleEncoder, plan: Sequence[Indices], config: LoaderConfig, *, start: int = 0
) -> Iterator[Batch]:
    """Yield the batches of `plan` from number `start` on, in order.

    Raises ConfigError for workers elsewhere than on Linux, HbaError when workers die whatever they decode, and any
    error other than MediaError that encoding raises.
    """
    rows = map(int, chain.from_iterable(islice(plan, start, None)))
    workers = min(config.resolved_workers(), sum(map(len, islice(plan, start, None))))
    cache = _Cache(config.cache_megabytes)
    if workers:
        pool = WorkerPool(
            atlas,
            encoder,
            workers=workers,
            timeout_seconds=config.decode_timeout_seconds,
            ahead_bytes=config.prefetch_megabytes << 20,
        )
        outcomes = _prefetched(rows, pool, cache, MAX_ROWS_AHEAD if config.prefetch_megabytes else 2 * workers)
    else:
        outcomes = _in_turn(rows, atlas, encoder, cache)
    pinned = torch.cuda.is_available()
    with closing(outcomes):
        for batch in islice(plan, start, None):
            made = _assemble(islice(outcomes, len(batch)), encoder)
            for sample in made.quarantined:
                atlas.refuse(sample)
            yield made.pinned() if pinned else made


def _in_turn(rows: Iterator[int], atlas: Atlas, encoder: SampleEncoder, cache: _Cache) -> Outcomes:
    """The outcomes of `rows`, each encoded in this process when it is asked for."""
    for row in rows:
        outcome = cache.get(row) or encode_row(atlas, encoder, row)
        cache.put(row, outcome)
        yield outcome


def _prefetched(rows: Iterator[int], pool: WorkerPool, cache: _Cache, ahead: int) -> Outcomes:
    """The outcomes of `rows` in their order, while workers are up to `ahead` rows further."""
    coming: deque[int] = deque()
    wanted: Counter[int] = Counter()  # how often each row stands in `coming`, since a plan may repeat rows
    ready: dict[int, Outcome] = {}
    with pool:
        while True:
            for row in islice(rows, ahead - len(coming)):
                coming.append(row)
                wanted[row] += 1
                if wanted[row] == 1:
                    known = cache.get(row)
                    if known is not None:
                        ready[row] = known
                    else:
                        pool.request(row)
            if not coming:
                return
            row = coming.popleft()
            outcome = ready.pop(row, None) or pool.outcome(row)
            wanted[row] -= 1
            if wanted[row]:
                ready[row] = outcome
            else:
                del wanted[row]
                cache.put(row, outcome)
            yield outcome


def _assemble(outcomes: Iterable[Outcome], encoder: SampleEncoder) -> Batch:
    encoded: list[Encoded] = []
    quarantined: list[Quarantined] = []
    for outcome in outcomes:
        if isinstance(outcome, Failure):
            raise_failure(outcome)
        elif isinstance(outcome, Quarantined):
            quarantined.append(outcome)
        else:
            encoded.append(outcome)
    return collate(encoded, pad_token_id=encoder.pad_token_id, taxonomy=encoder.taxonomy, quarantined=quarantined)
