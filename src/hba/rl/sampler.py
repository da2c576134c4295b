"""Who draws responses: the policy itself, or a server that is given its weights. Training and evaluations share them.

A sampler is renewed before it draws: it must answer with the weights that the policy has now. What it says of the
tokens it drew (`logps`) is compared with the policy that trains. Each draw has a seed of its own, made of its place in
the run and its number: what is drawn depends neither on the number of processes nor on what shares a batch with it.

Shapes: B rows of a batch, L response tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from hashlib import sha256
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from hba.atlas.batch import Batch
from hba.model.chat import ChatModel


class Place(NamedTuple):
    """Which prompt of a run: number `prompt` of the batch `batch` of its plan. Of an evaluation: row `prompt`."""

    batch: int
    prompt: int


Key: TypeAlias = tuple[Place, int]  # of a rollout: its prompt, and the number of the draw


def keys_of(places: Sequence[Place]) -> list[Key]:
    """The keys of one draw for each of the rows at `places`."""
    seen: Counter[Place] = Counter()
    keys = []
    for place in places:
        keys.append((place, seen[place]))
        seen[place] += 1
    return keys


class Prompts(NamedTuple):
    """Prompts to be answered; `places` are those of the rows, in which copies of a prompt lie next to each other."""

    batch: Batch
    places: tuple[Place, ...]

    def __len__(self) -> int:
        """Rows."""
        return len(self.places)


class Draws(NamedTuple):
    """What is drawn. `name` tells draws of a run apart: they are seeded by it, by the place and by their number."""

    name: str
    max_new_tokens: int
    temperature: float  # 0 is greedy
    per_row: int = 1  # responses to each row

    def seed_of(self, place: Place) -> bytes:
        """Of all draws at a place."""
        return sha256(f"{self.name}/{place.batch}/{place.prompt}".encode()).digest()


class Drawn(NamedTuple):
    """The responses to a batch, row after row as many as were asked for; the end token is part of a response."""

    tokens: list[Tensor]  # [L] each
    logps: list[Tensor]  # of these tokens, as the sampler says; empty for greedy ones of the policy

    @property
    def lengths(self) -> list[int]:
        """In tokens."""
        return [len(tokens_L) for tokens_L in self.tokens]


class Sampler(Protocol):
    """Draws responses to the rows of batches."""

    def renew(self, version: int) -> None:
        """Take over the policy's weights; those of one `version` are the same. Called by all ranks together."""
        ...

    def draw(self, prompts: Sequence[Prompts], draws: Draws) -> list[Drawn]:
        """Responses to each batch of `prompts`."""
        ...

    def close(self) -> None:
        """Nothing is drawn any more."""
        ...


class PolicySampler:
    """The policy answers itself, through transformers' `generate`, in the precision in which it trains."""

    def __init__(self, policy: ChatModel, autocast: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        self._policy, self._autocast = policy, autocast

    def renew(self, version: int) -> None:
        """The weights are the policy's own."""

    def draw(self, prompts: Sequence[Prompts], draws: Draws) -> list[Drawn]:
        """A batch after the other."""
        return [self._one(each, draws) for each in prompts]

    def _one(self, prompts: Prompts, draws: Draws) -> Drawn:
        options: dict[str, Any] = {"max_new_tokens": draws.max_new_tokens, "temperature": draws.temperature}
        uniforms_BRL = torch.from_numpy(_uniforms(prompts.places, draws))
        with self._autocast():
            rounds = [
                self._policy.generate(prompts.batch, **options, uniforms_BL=uniforms_BRL[:, number])
                for number in range(draws.per_row)
            ]
        said = [one for row in zip(*rounds, strict=True) for one in row]
        return Drawn([torch.tensor(one.ids) for one in said], [torch.tensor(one.logps) for one in said])

    def close(self) -> None:
        """Nothing is open."""


def _uniforms(places: Sequence[Place], draws: Draws) -> np.ndarray[tuple[int, int, int], np.dtype[np.float64]]:
    """Numbers in [0, 1) [B, per_row, L] that decide the draws; draw n at a place has the same wherever it is made."""
    keys = keys_of([place for place in places for _ in range(draws.per_row)])
    seeds = [np.random.SeedSequence([number, *draws.seed_of(place)]) for place, number in keys]
    numbers_NL = np.stack([np.random.default_rng(seed).random(draws.max_new_tokens) for seed in seeds])
    return numbers_NL.reshape(len(places), draws.per_row, draws.max_new_tokens)


def texts_of(drawn: Drawn, policy: ChatModel) -> list[str]:
    """The responses as text, without special tokens."""
    texts: list[str] = policy.processor.tokenizer.batch_decode(drawn.tokens, skip_special_tokens=True)
    return texts


def padded(rows: Sequence[Tensor], value: float) -> Tensor:
    """Rows of different lengths as one tensor [B, L], padded on the right."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
