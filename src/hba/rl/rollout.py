"""Rollouts: who draws several responses to each prompt, and the batch on which their probabilities are computed again.

The loader replicates a sample before it is collated, one row a rollout, since transformers' `num_return_sequences`
mixes up the patches of videos. Prompts are padded on the left, so that responses begin at one position; a response is
put behind its prompt and padded on the right. Media tokens are never sampled, and have no probability when the update
looks at the same tokens: the two distributions are the same.

A distribution over the vocabulary is made for `CHUNK_VALUES` / V response tokens at a time, and again for its gradient:
one of a whole batch, in float32, would be the largest thing in memory by far.

Shapes: B rows (rollouts) of a batch, P prompt tokens, L response tokens, T = P + L, N response tokens of a batch,
C of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from hashlib import sha256
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hba.batch.encode import IGNORED, Batch
from hba.model.generate import media_token_ids
from hba.model.heads import CHUNK_VALUES
from hba.model.omni import Head, OmniSapiens
from hba.storage import room

# Who draws responses: the policy itself, or a server that is given its weights. Training and evaluations share them.
#
# A sampler is renewed before it draws: it must answer with the weights that the policy has now. What it says of the
# tokens it drew (`logps`) is compared with the policy that trains. Each draw has a seed of its own, made of its place
# in the run and its number: what is drawn depends neither on the number of processes nor on what shares a batch with
# it.
#
# Shapes: B rows of a batch, L response tokens.


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
    size_key: str = "train.device_batch_size"  # which says how many rows are drawn at once

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

    def __init__(self, policy: OmniSapiens, autocast: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        self._policy, self._autocast = policy, autocast

    def renew(self, version: int) -> None:
        """The weights are the policy's own."""

    def draw(self, prompts: Sequence[Prompts], draws: Draws) -> list[Drawn]:
        """A batch after the other."""
        return [self._one(each, draws) for each in prompts]

    def _one(self, prompts: Prompts, draws: Draws) -> Drawn:
        options: dict[str, Any] = {"max_new_tokens": draws.max_new_tokens, "temperature": draws.temperature}
        uniforms_BRL = torch.from_numpy(_uniforms(prompts.places, draws))
        fewer = [f"a lower {draws.size_key}"] if len(set(prompts.places)) > 1 else []
        with room(prompts.batch, lambda: [*fewer, "a lower rollout.max_new_tokens"]), self._autocast():
            batch = prompts.batch.to(self._policy.device)  # one at a time: a step has many, each with its media
            rounds = [
                self._policy.say(batch, **options, uniforms_BL=uniforms_BRL[:, number])
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


def texts_of(drawn: Drawn, policy: OmniSapiens) -> list[str]:
    """The responses as text, without special tokens."""
    texts: list[str] = policy.processor.tokenizer.batch_decode(drawn.tokens, skip_special_tokens=True)
    return texts


def padded(rows: Sequence[Tensor], value: float) -> Tensor:
    """Rows of different lengths as one tensor [B, L], padded on the right."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


# --- rollouts ---------------------------------------------------------------------------------------------------------


class Rollouts(NamedTuple):
    """The responses to a batch of prompts, one a row."""

    batch: Batch  # prompts and responses; labels_BT marks the response tokens
    keys: list[Key]
    texts: list[str]
    lengths: list[int]  # tokens, the end token included
    sampler_logps_BL: Tensor  # of the response tokens, as the sampler says

    def __len__(self) -> int:
        """Rollouts."""
        return len(self.keys)


class Probabilities(NamedTuple):
    """What a policy says about the response tokens of a batch; 0 behind the end of a response."""

    logps_BL: Tensor
    entropy_BL: Tensor
    mask_BL: Tensor  # 1 at response tokens, float


def roll_out(sampler: Sampler, policy: OmniSapiens, prompts: Sequence[Prompts], draws: Draws) -> list[Rollouts]:
    """Sample one response for each row of each batch of `prompts`."""
    pad = policy.processor.tokenizer.pad_token_id or 0
    return [
        Rollouts(
            batch=with_responses(each.batch, drawn.tokens, pad),
            keys=keys_of(each.places),
            texts=texts_of(drawn, policy),
            lengths=drawn.lengths,
            sampler_logps_BL=padded(drawn.logps, 0.0),
        )
        for each, drawn in zip(prompts, sampler.draw(prompts, draws), strict=True)
    ]


def with_responses(prompts: Batch, responses: Sequence[Tensor], pad_token_id: int) -> Batch:
    """`prompts` with the token ids of a response behind each row, to be looked at in one forward pass."""
    ids_BP = prompts.inputs["input_ids"]
    response_BL = padded(responses, pad_token_id).to(ids_BP)
    mask_BL = padded([torch.ones(len(ids)) for ids in responses], 0.0).to(ids_BP)
    inputs = dict(prompts.inputs)
    for name, value in prompts.inputs.items():
        if name.endswith("token_type_ids"):  # 0 for text
            inputs[name] = torch.cat([value, torch.zeros_like(response_BL)], 1)
    inputs["input_ids"] = torch.cat([ids_BP, response_BL], 1)
    inputs["attention_mask"] = torch.cat([prompts.inputs["attention_mask"], mask_BL], 1)
    unlabelled_BP = torch.full_like(ids_BP, IGNORED)
    labels_BT = torch.cat([unlabelled_BP, torch.where(mask_BL.bool(), response_BL, IGNORED)], 1)
    return replace(prompts, inputs=inputs, labels_BT=labels_BT)


def probabilities(model: nn.Module, policy: OmniSapiens, batch: Batch, temperature: float) -> Probabilities:
    """Log-probabilities and entropies of the response tokens of `batch` at the temperature of the sampling.

    `model` is `policy` as it is prepared for training, perhaps wrapped for several processes.
    """
    labels_BT = batch.labels_BT
    assert labels_BT is not None  # with_responses gives them
    marked_BT = labels_BT != IGNORED
    read = partial(
        of_tokens,
        ids_N=labels_BT[marked_BT],
        banned=media_token_ids(policy.transformer.config, policy.processor),
        temperature=temperature,
        vocabulary=len(policy.transformer.get_output_embeddings().weight),
    )
    chosen_N, entropy_N = model(batch, read).answer_logits_NV.unbind(-1)
    start = int(marked_BT.any(0).nonzero()[0])
    mask_BL = marked_BT[:, start:]
    zeros_BL = torch.zeros(mask_BL.shape, dtype=chosen_N.dtype, device=chosen_N.device)
    logps_BL = zeros_BL.masked_scatter(mask_BL, chosen_N)
    return Probabilities(logps_BL, zeros_BL.masked_scatter(mask_BL, entropy_N), mask_BL.to(chosen_N.dtype))


def of_tokens(
    states_NH: Tensor, head: Head, *, ids_N: Tensor, banned: Sequence[int], temperature: float, vocabulary: int
) -> Tensor:
    """Log-probability of each token and entropy of its distribution [N, 2]; the entropy has no gradient."""

    def of_chunk(states_CH: Tensor, ids_C: Tensor) -> Tensor:
        logits_CV = head(states_CH).float() / temperature
        logps_CV = torch.log_softmax(logits_CV.index_fill(-1, banned_ids, -torch.inf), -1)
        certain_CV = logps_CV.detach()
        entropy_C = -(certain_CV.exp() * certain_CV.clamp_min(torch.finfo(certain_CV.dtype).min)).sum(-1)
        return torch.stack([logps_CV.gather(-1, ids_C.unsqueeze(-1)).squeeze(-1), entropy_C], -1)

    banned_ids = torch.tensor(banned, dtype=torch.long, device=states_NH.device)
    size = max(1, CHUNK_VALUES // vocabulary)
    if len(states_NH) <= size:
        return of_chunk(states_NH, ids_N)
    chunks = zip(torch.split(states_NH, size), torch.split(ids_N, size), strict=True)
    return torch.cat([checkpoint(of_chunk, states_CH, ids_C, use_reentrant=False) for states_CH, ids_C in chunks])
