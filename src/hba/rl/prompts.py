"""The prompts of a run, batch after batch in the order of the training plan, each replicated once a rollout.

The place in the plan is all the state there is. Past its end the plan begins anew: dynamic sampling may take more
batches than its steps were planned for. Replicates of a sample are encoded once and collated as rows of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import numpy as np

from hba.atlas import Atlas
from hba.atlas.batch import Batch, SampleEncoder
from hba.atlas.config import LoaderConfig
from hba.atlas.loader import load_batches
from hba.atlas.mixing import MixConfig
from hba.train.config import TrainConfig
from hba.train.plan import training_plan


class PromptFeed:
    """Gives this rank's micro-batches of one plan batch after the other; `position` counts plan batches given."""

    def __init__(
        self,
        atlas: Atlas,
        encoder: SampleEncoder,
        mix: MixConfig,
        train: TrainConfig,
        loader: LoaderConfig,
        *,
        replicates: int,
        rank: int,
        world: int,
        position: int = 0,
    ) -> None:
        single = replace(train, accumulation=1)  # the plan's steps are its batches
        plan = training_plan(atlas.columns, atlas.estimated_tokens, mix, single, rank=rank, world=world)
        self._replicated = [np.repeat(rows, replicates) for rows in plan.micro_batches]
        self._starts = plan.starts
        self._atlas, self._encoder, self._loader = atlas, encoder, loader
        self.position = position
        self._batches = self._from(position)

    def __len__(self) -> int:
        """Batches of the plan, all epochs together."""
        return len(self._starts) - 1

    def take(self) -> list[Batch]:
        """The micro-batches of the next plan batch. What cannot be read is in their `quarantined`."""
        number = self.position % len(self)
        self.position += 1
        wanted = self._starts[number + 1] - self._starts[number]
        taken = list(islice(self._batches, wanted))
        if self.position % len(self) == 0:
            self._batches = self._from(self.position)
        return taken

    def _from(self, position: int) -> Iterator[Batch]:
        start = self._starts[position % len(self)]
        return load_batches(self._atlas, self._encoder, self._replicated, self._loader, start=start)
