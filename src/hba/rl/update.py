"""The update: from rollouts with advantages to new weights.

The loss of a step is a weighted sum over its response tokens, of all processes together (`losses.token_weights`), so
that micro-batches and ranks change nothing but memory. Where a step makes one update the old policy is the policy
itself: ratios are 1, nothing is clipped, and the gradient is that of REINFORCE with the advantages. With several
updates a step, each over a part of its prompts, the probabilities before the first are kept.

Shapes: B rows (rollouts) of a micro-batch, L response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hba.atlas.batch import Batch
from hba.errors import HbaError
from hba.rl.losses import importance_weights, kl_divergence, surrogate, token_weights
from hba.rl.rollout import Probabilities, Rollouts, probabilities
from hba.rl.telemetry import Outcome

if TYPE_CHECKING:
    from hba.rl.local import Setup


@dataclass(kw_only=True)
class _Part:
    """A micro-batch on its way through the update; `outcomes` are its rows."""

    batch: Batch
    outcomes: Sequence[Outcome]
    advantages_B: Tensor
    weights_B: Tensor  # of one token of the row, in the loss of the update
    sampler_logps_BL: Tensor | None  # None: the policy sampled itself
    old_logps_BL: Tensor | None = None  # None: those of the update itself
    reference_logps_BL: Tensor | None = None


class Updated(NamedTuple):
    """Of a step: its policy loss and the gradient norm before clipping, both means over its updates."""

    loss: float
    grad_norm: float


def update(
    setup: Setup,
    sampled: Sequence[Rollouts],
    own: Sequence[Outcome],
    everyone: Sequence[Outcome],
    first: int,
    rate: float,
) -> Updated:
    """Update the policy on this rank's rollouts `sampled`, whose outcomes are `own`.

    `everyone` are those of all ranks, `own` from number `first` on; `rate` scales the learning rates. Fills in what the
    outcomes say of the update. Raises HbaError naming the samples when loss or gradient are not finite.
    """
    config = setup.config.loss
    parts = _parts(setup, sampled, own, everyone, first)
    count = min(config.updates, len(parts))
    with torch.no_grad():
        for part in parts:
            if setup.reference is not None:
                part.reference_logps_BL = setup.reference(part.batch, setup.config.rollout.temperature)
            if count > 1:
                part.old_logps_BL = _probabilities(setup, part).logps_BL
                part.weights_B = part.weights_B * count
    done = [_one_update(setup, parts[start::count], rate) for start in range(count)]
    return Updated(sum(u.loss for u in done) / count, sum(u.grad_norm for u in done) / count)


def _parts(
    setup: Setup, sampled: Sequence[Rollouts], own: Sequence[Outcome], everyone: Sequence[Outcome], first: int
) -> list[_Part]:
    device = setup.accelerator.device
    numbers: dict[str, int] = {}
    weights_N = token_weights(
        torch.tensor([outcome.tokens for outcome in everyone]),
        torch.tensor([numbers.setdefault(outcome.group, len(numbers)) for outcome in everyone]),
        average=setup.algorithm.average,
        max_tokens=setup.config.rollout.max_new_tokens,
    )[first : first + len(own)].to(device)
    advantages_N = torch.tensor([outcome.advantage for outcome in own], dtype=torch.float32, device=device)
    parts, start = [], 0
    for rollouts in sampled:
        rows = slice(start, start + len(rollouts.batch))
        parts.append(
            _Part(
                batch=rollouts.batch.to(device),
                outcomes=own[rows],
                advantages_B=advantages_N[rows],
                weights_B=weights_N[rows],
                sampler_logps_BL=None if rollouts.sampler_logps_BL is None else rollouts.sampler_logps_BL.to(device),
            )
        )
        start = rows.stop
    return parts


def _one_update(setup: Setup, parts: Sequence[_Part], rate: float) -> Updated:
    accelerator, total = setup.accelerator, 0.0
    for part in parts:
        if accelerator.num_processes == 1 and part.reference_logps_BL is None and not bool(part.advantages_B.any()):
            continue  # no gradient; several processes run all of theirs, so that none waits for another
        loss = _loss(setup, part)
        _require_finite(loss, "loss", part.outcomes)
        setup.ranks.backward(loss, setup.model)  # the weights are those of the sum over all ranks
        total += float(loss.detach())
    setup.ranks.add_up_gradients(setup.model)
    grad_norm = accelerator.clip_grad_norm_(setup.policy.parameters(), setup.config.train.max_grad_norm)
    grad_norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
    _require_finite(grad_norm, "gradient", [outcome for part in parts for outcome in part.outcomes])
    for group in setup.optimizer.param_groups:
        group["lr"] = group["peak"] * rate
    setup.optimizer.step()
    setup.optimizer.zero_grad(set_to_none=True)
    return Updated(float(accelerator.reduce(torch.tensor(total, device=accelerator.device))), float(grad_norm))


def _loss(setup: Setup, part: _Part) -> Tensor:
    """The share of a micro-batch in the loss; its outcomes learn of entropy, KL and clipping."""
    config, algorithm = setup.config.loss, setup.algorithm
    new = _probabilities(setup, part)
    old_BL = new.logps_BL.detach() if part.old_logps_BL is None else part.old_logps_BL
    terms = surrogate(
        new.logps_BL,
        old_BL,
        part.advantages_B,
        new.mask_BL,
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        ratio=algorithm.ratio,
    )
    loss_BL, reported = terms.loss_NL, {"entropy": new.entropy_BL, "clipped": terms.clipped_NL.float()}
    if part.sampler_logps_BL is not None:
        reported["sampler_gap"] = (old_BL - part.sampler_logps_BL).abs()
        if config.importance_cap is not None:
            reported["importance"] = importance_weights(
                old_BL, part.sampler_logps_BL, new.mask_BL, config.importance_cap
            )
            loss_BL = loss_BL * reported["importance"]
    if part.reference_logps_BL is not None:
        loss_BL = loss_BL + config.kl_weight * kl_divergence(new.logps_BL, part.reference_logps_BL, config.kl)
        reported["kl"] = kl_divergence(new.logps_BL.detach(), part.reference_logps_BL, "k3")
    for name, value_BL in reported.items():
        means = (value_BL.detach() * new.mask_BL).sum(1) / new.mask_BL.sum(1).clamp_min(1)
        for outcome, mean in zip(part.outcomes, means.tolist(), strict=True):
            setattr(outcome, name, mean)
    return (loss_BL * new.mask_BL * part.weights_B.unsqueeze(1)).sum()


def _probabilities(setup: Setup, part: _Part) -> Probabilities:
    return probabilities(setup.model, setup.policy, part.batch, setup.config.rollout.temperature)


def _require_finite(value: Tensor, name: str, outcomes: Sequence[Outcome]) -> None:
    if not bool(torch.isfinite(value)):
        ids = ", ".join(dict.fromkeys(outcome.id for outcome in outcomes))
        fix = "Look at these samples; lower the learning rate; the last checkpoint is good."
        raise HbaError(f"{name} is {float(value.detach())}", where=f"samples {ids}", fix=fix)
