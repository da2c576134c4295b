"""The path of backends that take tensor batches: plan them by signature and length, load them, ask the model.

The plan depends on the rows alone, never on what is done already nor on how many processes share it: a batch that is
done in part is computed whole, so that its padding, and with it the last bits of every number, are those of an
uninterrupted run of one process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import replace

from hba.atlas import Atlas
from hba.atlas.batch import Batch, SampleEncoder
from hba.atlas.config import LoaderConfig
from hba.atlas.loader import load_batches
from hba.atlas.sampler import Indices, plan_batches
from hba.evaluate.backends.interface import Answered, Output, Result


def batched_answers(
    atlas: Atlas,
    batches: Sequence[Indices],
    done: Set[str],
    *,
    encoder: SampleEncoder,
    answer: Callable[[Batch], Sequence[Output]],
    loader: LoaderConfig,
) -> Iterator[Result]:
    """The results of `batches` of an `evaluation_plan`; `answer` gives one output a sample, in the batch's order.

    Time and input tokens are measured here unless `answer` gives them.
    """
    if done:
        batches = [batch for batch in batches if any(atlas.ids[int(row)] not in done for row in batch)]
    for batch in load_batches(atlas, encoder, batches, loader):
        yield from batch.quarantined
        if not len(batch):
            continue
        started = time.perf_counter()
        outputs = answer(batch)
        seconds = (time.perf_counter() - started) / len(batch)
        tokens_B = batch.num_tokens.tolist()
        for sample, output, tokens_in in zip(batch.samples, outputs, tokens_B, strict=True):
            if sample.id not in done:
                measured = {"tokens_in": tokens_in, "seconds": seconds}
                missing = {name: value for name, value in measured.items() if getattr(output, name) is None}
                yield Answered(sample, replace(output, **missing))


def evaluation_plan(atlas: Atlas, rows: Indices, batch_size: int) -> list[Indices]:
    """Batches of the given rows, grouped by signature and length, in a fixed order."""
    columns = atlas.columns
    lengths_N = atlas.estimated_tokens[rows]
    batches = plan_batches(
        columns.signature_codes[rows], lengths_N, batch_size=batch_size, seed=0, epoch=0, shuffle=False
    )
    return [rows[batch] for batch in batches]
