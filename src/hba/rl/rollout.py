"""Rollouts: several sampled responses to each prompt, and the batch on which their probabilities are computed again.

The loader replicates a sample before it is collated, one row a rollout, since transformers' `num_return_sequences`
mixes up the patches of videos. Prompts are padded on the left, so that responses begin at one position; a response is
put behind its prompt and padded on the right. Media tokens are never sampled, and have no probability when the update
looks at the same tokens: the two distributions are the same.

Shapes: B rows (rollouts) of a batch, P prompt tokens, L response tokens, T = P + L, N response tokens of a batch,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hba.atlas.batch import IGNORED, Batch
from hba.model.chat import ChatModel
from hba.model.generate import media_token_ids
from hba.rl.sampler import Draws, Sampler, padded, texts_of


class Rollouts(NamedTuple):
    """The responses to a batch of prompts, one a row."""

    batch: Batch  # prompts and responses; labels_BT marks the response tokens
    texts: list[str]
    lengths: list[int]  # tokens, the end token included
    sampler_logps_BL: Tensor | None  # as the server says; None where the policy sampled


class Probabilities(NamedTuple):
    """What a policy says about the response tokens of a batch; 0 behind the end of a response."""

    logps_BL: Tensor
    entropy_BL: Tensor
    mask_BL: Tensor  # 1 at response tokens, float


def roll_out(sampler: Sampler, policy: ChatModel, prompts: Sequence[Batch], draws: Draws) -> list[Rollouts]:
    """Sample one response for each row of each batch of `prompts`."""
    pad = policy.processor.tokenizer.pad_token_id or 0
    return [
        Rollouts(
            batch=with_responses(batch, drawn.tokens, pad),
            texts=texts_of(drawn, policy),
            lengths=drawn.lengths,
            sampler_logps_BL=None if drawn.logps is None else padded(drawn.logps, 0.0),
        )
        for batch, drawn in zip(prompts, sampler.draw(prompts, draws), strict=True)
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


def probabilities(model: nn.Module, policy: ChatModel, batch: Batch, temperature: float) -> Probabilities:
    """Log-probabilities and entropies of the response tokens of `batch` at the temperature of the sampling.

    `model` is `policy` as it is prepared for training, perhaps wrapped for several processes.
    """
    labels_BT = batch.labels_BT
    assert labels_BT is not None  # with_responses gives them
    logits_NV = model(batch).float() / temperature
    banned = media_token_ids(policy.transformer.config, policy.processor)
    logits_NV[:, banned] = -torch.inf
    logps_NV = torch.log_softmax(logits_NV, -1)
    marked_BT = labels_BT != IGNORED
    chosen_N = logps_NV.gather(-1, labels_BT[marked_BT].unsqueeze(-1)).squeeze(-1)
    certain_NV = logps_NV.detach()
    entropy_N = -(certain_NV.exp() * certain_NV.clamp_min(torch.finfo(certain_NV.dtype).min)).sum(-1)
    start = int(marked_BT.any(0).nonzero()[0])
    mask_BL = marked_BT[:, start:]
    zeros_BL = torch.zeros(mask_BL.shape, dtype=chosen_N.dtype, device=chosen_N.device)
    logps_BL = zeros_BL.masked_scatter(mask_BL, chosen_N)
    return Probabilities(logps_BL, zeros_BL.masked_scatter(mask_BL, entropy_N), mask_BL.to(chosen_N.dtype))
