"""The rows of an RL run, and its prompts: batch after batch in the order of the plan, each replicated once a rollout.

The place in the plan is all the state there is. Past its end the plan begins anew: dynamic sampling may take more
batches than its steps were planned for. A batch is shared out over the ranks as in training, in as many micro-batches
on each, of which some may be empty. Where a step makes more updates than it takes batches, a batch is cut into pieces
first, and each piece is shared out: an update is over the same prompts on any number of ranks. Replicates of a sample
are encoded once and collated as rows of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from hba.atlas import Atlas, open_atlas
from hba.batch.config import LoaderConfig
from hba.batch.encode import Batch, Encoder
from hba.batch.loader import load_batches
from hba.batch.sampler import Indices, MixConfig, input_tokens, subsample
from hba.rl.config import RlConfig
from hba.rl.rollout import Place, Prompts
from hba.train.config import TrainConfig
from hba.train.loop import share, training_plan


class PromptFeed:
    """Gives this rank's micro-batches of one plan batch after the other; `position` counts plan batches given."""

    def __init__(
        self,
        atlas: Atlas,
        encoder: Encoder,
        mix: MixConfig,
        train: TrainConfig,
        loader: LoaderConfig,
        *,
        replicates: int,
        new_tokens: int = 0,
        rank: int,
        world: int,
        updates: int = 1,
        position: int = 0,
    ) -> None:
        """`updates` are those of a step, which takes `train.accumulation` plan batches. `new_tokens` are those of the
        longest response, which `train.device_tokens` counts with the prompt, for each of the `replicates`."""
        whole = replace(train, accumulation=1, device_batch_size=None, device_tokens=None)
        tokens_N = (input_tokens(atlas, encoder.config) + new_tokens) * replicates
        plan = training_plan(atlas.columns, atlas.estimated_tokens, mix, whole, rank=0, world=1)
        pieces = -(-updates // train.accumulation)
        self._rows: list[Indices] = []  # of each micro-batch
        self._prompts: list[Indices] = []  # the same rows as numbers of prompts in their plan batch
        self._pieces: list[list[range]] = []  # of each plan batch: which micro-batches are its pieces
        for number, batch in enumerate(plan.micro_batches):
            self._pieces.append([])
            for piece in np.array_split(np.arange(len(batch)), min(pieces, len(batch))):
                parts = share(piece, train, (rank + number) % world, world, tokens_N[batch[piece]])
                self._pieces[-1].append(range(len(self._rows), len(self._rows) + len(parts)))
                self._rows += [batch[part] for part in parts]
                self._prompts += parts
        self._replicates = replicates
        self._atlas, self._encoder, self._loader = atlas, encoder, loader
        self.position = position
        self._batches = self._from(position)

    def __len__(self) -> int:
        """Batches of the plan, all epochs together."""
        return len(self._pieces)

    def take(self) -> list[list[Prompts]]:
        """The pieces of the next plan batch, the micro-batches of each, as many on every rank.

        What cannot be read is in the `quarantined` of its batch.
        """
        pieces = []
        for piece in self._pieces[self.position % len(self)]:
            batches = [(number, next(self._batches)) for number in piece]
            pieces.append([Prompts(batch, self._places(batch, number)) for number, batch in batches])
        self.position += 1
        if self.position % len(self) == 0:
            self._batches = self._from(self.position)
        return pieces

    def _places(self, batch: Batch, micro_batch: int) -> tuple[Place, ...]:
        """Where each row of `batch` comes from: the rows of the plan in their order, but for those not read."""
        planned = zip(self._prompts[micro_batch], self._atlas.numbers[self._rows[micro_batch]], strict=True)
        copies = ((int(prompt), number) for prompt, number in planned for _ in range(self._replicates))
        return tuple(
            Place(self.position, next(prompt for prompt, number in copies if number == sample.number))
            for sample in batch.samples
        )

    def _from(self, position: int) -> Iterator[Batch]:
        start = self._pieces[position % len(self)][0].start
        replicated = [np.repeat(rows, self._replicates) for rows in self._rows]
        return load_batches(self._atlas, self._encoder, replicated, self._loader, start=start)


# The rows of an RL run, the same for every engine: prompts to train on, and a sample of held-out ones to watch.


def training_rows(config: RlConfig) -> Atlas:
    """The rows whose prompts are trained on."""
    return open_atlas(config.atlas, split=config.train_split).with_answers().filter(datasets=config.datasets)


def validation_rows(config: RlConfig) -> Atlas:
    """The rows of the evaluations, a stratified sample where the config limits their number."""
    found = open_atlas(config.atlas, split=config.validation_split).with_answers()
    return sample_of(found.filter(datasets=config.datasets), config)


def sample_of(atlas: Atlas, config: RlConfig) -> Atlas:
    """Those of the rows `atlas` that an evaluation asks."""
    if config.validation_rows is None or config.validation_rows >= len(atlas):
        return atlas
    return atlas.select(subsample(atlas.columns, config.validation_rows, seed=config.train.seed))
