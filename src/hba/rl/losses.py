"""The policy loss: clipped importance ratios times advantages, averaged over tokens, sequences or groups.

A loss is a sum over rollouts of per-token terms with weights that `token_weights` gives for a whole batch, so that
micro-batches of it add up to exactly the loss of the batch, whatever their size. Log-probabilities are those of the
sampled tokens; positions beyond a response have mask 0 and touch neither value nor gradient.

Sources: PPO (arXiv 1707.06347) for the clipped surrogate, DAPO (arXiv 2503.14476) for the higher upper clip and the
token average, Dr. GRPO (arXiv 2503.20783) for the constant divisor, GSPO (arXiv 2507.18071) for the sequence ratio,
Schulman's note "Approximating KL divergence" for k1 to k3, Yao et al. 2025, "Your efficient RL framework secretly
brings you off-policy RL training", for the truncated importance weights. Shapes: N rollouts, L response tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hba.errors import InputError
from hba.rl.config import Average, KlKind, Ratio

MAX_LOG_RATIO = 20.0  # exp of more is no ratio of policies that are near each other, and overflows in half precision


class Surrogate(NamedTuple):
    """Per-token terms of the policy loss, and what was clipped."""

    loss_NL: Tensor  # to be minimised
    clipped_NL: Tensor  # bool: the clip decided, so that the token has no gradient


def surrogate(
    new_logps_NL: Tensor,
    old_logps_NL: Tensor,
    advantages_N: Tensor,
    mask_NL: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ratio: Ratio = "token",
) -> Surrogate:
    """-min(w A, clip(w, 1 - clip_low, 1 + clip_high) A) of every token, w = pi / pi_old.

    With `ratio="sequence"` (GSPO) w is the geometric mean over the response's tokens, the same for all of them.
    `old_logps_NL` has no gradient.
    """
    difference_NL = torch.where(mask_NL.bool(), new_logps_NL - old_logps_NL.detach(), 0.0)
    if ratio == "sequence":
        lengths_N1 = mask_NL.sum(1, keepdim=True).clamp_min(1)
        difference_NL = (difference_NL.sum(1, keepdim=True) / lengths_N1).expand_as(difference_NL)
    ratio_NL = difference_NL.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    advantages_N1 = advantages_N.unsqueeze(1)
    free_NL = ratio_NL * advantages_N1
    bounded_NL = ratio_NL.clamp(1 - clip_low, 1 + clip_high) * advantages_N1
    clipped_NL = (bounded_NL < free_NL) & mask_NL.bool()
    return Surrogate(-torch.minimum(free_NL, bounded_NL), clipped_NL)


def importance_weights(policy_logps_NL: Tensor, sampler_logps_NL: Tensor, mask_NL: Tensor, cap: float) -> Tensor:
    """min(pi / mu, cap) of every token [N, L], without a gradient, 1 beyond a response: truncated importance sampling.

    pi is the policy that learns, before the step's updates, mu the distribution from which the sampler drew (the same
    weights in another implementation). Ionides 2008; for RL with a separate sampler Yao et al. 2025.
    """
    difference_NL = torch.where(mask_NL.bool(), policy_logps_NL.detach() - sampler_logps_NL, 0.0)
    return difference_NL.clamp(max=MAX_LOG_RATIO).exp().clamp(max=cap)


def kl_divergence(new_logps_NL: Tensor, reference_logps_NL: Tensor, kind: KlKind = "k3") -> Tensor:
    """Estimates of KL(pi || pi_ref) [N, L] from tokens sampled of pi, d = log pi - log pi_ref.

    k1 = d (unbiased, of either sign), k2 = d^2 / 2, k3 = exp(-d) - 1 + d (unbiased, never negative; that of GRPO).
    """
    difference_NL = new_logps_NL - reference_logps_NL.detach()
    if kind == "k1":
        return difference_NL
    if kind == "k2":
        return difference_NL**2 / 2
    return torch.expm1((-difference_NL).clamp(max=MAX_LOG_RATIO)) + difference_NL


def token_weights(lengths_N: Tensor, groups_N: Tensor, *, average: Average, max_tokens: int) -> Tensor:
    """The weight [N] of each token of each rollout in the loss of the whole batch; all tokens together weigh 1.

    token: every token the same (DAPO). sequence: every rollout the same, then its tokens (GRPO). group: every prompt
    the same, then its tokens (DAPO's average a prompt). constant: divided by N * max_tokens whatever the lengths
    (Dr. GRPO), so that all together weigh less than 1. Lengths are those of all rollouts, also of those whose advantage
    is 0 and which need no forward pass. Raises InputError for a batch without a token.
    """
    lengths_N = lengths_N.to(torch.float32)
    if not float(lengths_N.sum()):
        raise InputError("a batch without response tokens", fix="Raise rollout.max_new_tokens.")
    count = len(lengths_N)
    if average == "token":
        return torch.ones_like(lengths_N) / lengths_N.sum()
    if average == "constant":
        return torch.ones_like(lengths_N) / (count * max_tokens)
    if average == "sequence":
        return 1.0 / (lengths_N.clamp_min(1) * count)
    codes_N = torch.unique(groups_N, return_inverse=True)[1]
    tokens_K = torch.zeros(int(codes_N.max()) + 1).scatter_add_(0, codes_N, lengths_N)
    return 1.0 / (tokens_K[codes_N].clamp_min(1) * len(tokens_K))
