"""Who draws responses: the policy itself, or a server that is given its weights. Training and evaluations share them.

A sampler is renewed before it draws: it must answer with the weights that the policy has now. What it says of the
tokens it drew (`logps`) is compared with the policy; the policy has nothing to say about its own draws.

Shapes: B rows of a batch, L response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hba.atlas.batch import Batch
from hba.model.chat import ChatModel


class Draws(NamedTuple):
    """What is drawn. `name` tells draws of a run apart: a server seeds itself by it and by the sample."""

    name: str
    max_new_tokens: int
    temperature: float  # 0 is greedy
    per_row: int = 1  # responses to each row


class Drawn(NamedTuple):
    """The responses to a batch, row after row as many as were asked for; the end token is part of a response."""

    tokens: list[Tensor]  # [L] each
    logps: list[Tensor] | None  # of these tokens, as the server says; None from the policy itself

    @property
    def lengths(self) -> list[int]:
        """In tokens."""
        return [len(tokens_L) for tokens_L in self.tokens]


class Sampler(Protocol):
    """Draws responses to the rows of batches."""

    def renew(self, version: int) -> None:
        """Take over the policy's weights; those of one `version` are the same. Called by all ranks together."""
        ...

    def draw(self, prompts: Sequence[Batch], draws: Draws) -> list[Drawn]:
        """Responses to each batch of `prompts`."""
        ...

    def close(self) -> None:
        """Nothing is drawn any more."""
        ...


class PolicySampler:
    """The policy answers itself, through transformers' `generate`; draws come from torch's random numbers."""

    def __init__(self, policy: ChatModel) -> None:
        self._policy = policy

    def renew(self, version: int) -> None:
        """The weights are the policy's own."""

    def draw(self, prompts: Sequence[Batch], draws: Draws) -> list[Drawn]:
        """A batch after the other."""
        return [self._one(batch, draws) for batch in prompts]

    def _one(self, batch: Batch, draws: Draws) -> Drawn:
        rounds = [
            self._policy.generate(batch, max_new_tokens=draws.max_new_tokens, temperature=draws.temperature)
            for _ in range(draws.per_row)
        ]
        return Drawn([torch.tensor(said.ids) for row in zip(*rounds, strict=True) for said in row], None)

    def close(self) -> None:
        """Nothing is open."""


def texts_of(drawn: Drawn, policy: ChatModel) -> list[str]:
    """The responses as text, without special tokens."""
    texts: list[str] = policy.processor.tokenizer.batch_decode(drawn.tokens, skip_special_tokens=True)
    return texts


def padded(rows: Sequence[Tensor], value: float) -> Tensor:
    """Rows of different lengths as one tensor [B, L], padded on the right."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
