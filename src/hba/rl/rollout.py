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
from dataclasses import dataclass, replace
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from hba.atlas.batch import IGNORED, Batch
from hba.config import option
from hba.model.chat import ChatModel
from hba.model.generate import generate_tokens, media_token_ids


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How responses are sampled. Defaults are those of the published runs."""

    per_prompt: Annotated[int, Field(ge=1)] = option(5, "responses sampled for each prompt")
    max_new_tokens: Annotated[int, Field(ge=1)] = option(2048, "longest response, in tokens")
    temperature: Annotated[float, Field(gt=0)] = option(1.0, "of the sampling, and of the policy that is trained")


class Rollouts(NamedTuple):
    """The responses to a batch of prompts, one a row."""

    batch: Batch  # prompts and responses; labels_BT marks the response tokens
    texts: list[str]
    lengths: list[int]  # tokens, the end token included


class Probabilities(NamedTuple):
    """What a policy says about the response tokens of a batch; 0 behind the end of a response."""

    logps_BL: Tensor
    entropy_BL: Tensor
    mask_BL: Tensor  # 1 at response tokens, float


def roll_out(policy: ChatModel, prompts: Batch, config: RolloutConfig) -> Rollouts:
    """Sample one response for each row of `prompts`."""
    said = generate_tokens(
        policy.transformer,
        policy.processor,
        prompts.inputs,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
    )
    rows = [ids_L[:length].cpu() for ids_L, length in zip(said.ids_BL, said.lengths, strict=True)]
    texts = policy.processor.tokenizer.batch_decode(rows, skip_special_tokens=True)
    return Rollouts(with_responses(prompts, rows, policy.processor.tokenizer.pad_token_id or 0), texts, said.lengths)


def with_responses(prompts: Batch, responses: Sequence[Tensor], pad_token_id: int) -> Batch:
    """`prompts` with the token ids of a response behind each row, to be looked at in one forward pass."""
    ids_BP = prompts.inputs["input_ids"]
    response_BL = ids_BP.new_full((len(responses), max(map(len, responses))), pad_token_id)
    mask_BL = torch.zeros_like(response_BL)
    for row_L, kept_L, ids in zip(response_BL, mask_BL, responses, strict=True):
        row_L[: len(ids)] = ids.to(row_L)
        kept_L[: len(ids)] = 1
    inputs = dict(prompts.inputs)
    for name, value in prompts.inputs.items():
        if value.shape == ids_BP.shape and name != "attention_mask":  # kinds of tokens, 0 for text
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
