"""The update: from rollouts with advantages to new weights.

The loss of an update is a weighted sum over its response tokens, of all processes together (`losses.token_weights`), so
that micro-batches and ranks change nothing but memory; a rank may have none of them (`hba.train.ranks`). Where a step
makes one update the old policy is the policy itself: ratios are 1, nothing is clipped, and the gradient is that of
REINFORCE with the advantages. With several updates a step, each over a part of its prompts, the probabilities before
the first are kept.

Rollouts without signal have no gradient. They are looked at all the same, for their entropy and their distance from the
reference, and they count where the algorithm averages over all rollouts.

Shapes: B rows (rollouts) of a micro-batch, L response tokens, N rollouts of an update on all ranks.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hba.atlas.batch import Batch
from hba.errors import HbaError
from hba.rl.losses import importance_weights, kl_divergence, surrogate, token_weights
from hba.rl.rollout import Probabilities, Rollouts, probabilities
from hba.rl.sampler import Key
from hba.rl.telemetry import Outcome
from hba.train.loop import portable
from hba.train.ranks import Turn
from hba.train.sharding import is_sharded

if TYPE_CHECKING:
    from hba.rl.local import Setup

Pieces: TypeAlias = Sequence[Sequence[Rollouts | None]]  # of a step: the micro-batches of each, None for an empty one


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A micro-batch on its way through the update. Rows that are left out of it (`dapo`) have neither outcome nor
    weight; a part without any outcome is not run."""

    batch: Batch | None
    outcomes: Sequence[Outcome | None]
    advantages_B: Tensor
    weights_B: Tensor  # of one token of the row, in the loss of the update
    sampler_logps_BL: Tensor
    update: int
    old_logps_BL: Tensor | None = None  # None: those of the update itself
    reference_logps_BL: Tensor | None = None

    def __len__(self) -> int:
        """Rollouts that take part."""
        return sum(outcome is not None for outcome in self.outcomes)

    def for_another_rank(self) -> _Part:
        """What another rank needs to run the same passes."""
        assert self.batch is not None
        return replace(self.to(torch.device("cpu")), batch=portable(self.batch).to("cpu"), outcomes=())

    def to(self, device: torch.device) -> _Part:
        """The same with its tensors on `device`."""
        assert self.batch is not None
        return replace(
            self,
            batch=self.batch.to(device),
            advantages_B=self.advantages_B.to(device),
            weights_B=self.weights_B.to(device),
            sampler_logps_BL=self.sampler_logps_BL.to(device),
        )


class Updated(NamedTuple):
    """Of a step: its policy loss and the gradient norm before clipping, both means over its updates."""

    loss: float
    grad_norm: float


def update(setup: Setup, pieces: Pieces, everyone: Sequence[Outcome], rate: float) -> Updated:
    """Update the policy on the rollouts in `pieces`, those of this rank.

    `everyone` are the outcomes of all ranks that take part, in one order; this rank's learn what the update says of
    them. `rate` scales the learning rates. Raises HbaError naming the samples when loss or gradient are not finite.
    """
    config, device = setup.config.loss, setup.accelerator.device
    updates = min(config.updates, len(pieces))
    of_update: dict[int, list[Outcome]] = defaultdict(list)
    for outcome in everyone:
        of_update[outcome.piece * updates // len(pieces)].append(outcome)
    parts = _parts(setup, pieces, of_update, updates)
    met = setup.ranks.meet([len(part) for part in parts])
    turns = [
        Turn(turn.batch.to(device), turn.weight)
        for turn in setup.ranks.turns(parts, met, setup.policy, _Part.for_another_rank)
    ]
    if setup.reference is not None or len(of_update) > 1:
        turns = [Turn(_looked_ahead(setup, turn.batch, old=len(of_update) > 1), turn.weight) for turn in turns]
    done = [
        _one_update(setup, [turn for turn in turns if turn.batch.update == number], of_update[number], rate)
        for number in sorted(of_update)
    ]
    return Updated(sum(u.loss for u in done) / len(done), sum(u.grad_norm for u in done) / len(done))


def _parts(setup: Setup, pieces: Pieces, of_update: Mapping[int, Sequence[Outcome]], updates: int) -> list[_Part]:
    """The micro-batches of this rank, with what the outcomes of all ranks make of theirs."""
    known: dict[Key, Outcome] = {}
    weights: dict[Key, float] = {}
    for outcomes in of_update.values():
        numbers: dict[str, int] = {}
        weights_N = token_weights(
            torch.tensor([outcome.tokens for outcome in outcomes]),
            torch.tensor([numbers.setdefault(outcome.group, len(numbers)) for outcome in outcomes]),
            average=setup.algorithm.average,
            max_tokens=setup.config.rollout.max_new_tokens,
        )
        known |= {outcome.key: outcome for outcome in outcomes}
        weights |= dict(zip((outcome.key for outcome in outcomes), weights_N.tolist(), strict=True))
    parts = []
    for piece, rollouts in ((number, each) for number, micro in enumerate(pieces) for each in micro):
        keys = [] if rollouts is None else rollouts.keys
        rows = [known.get(key) for key in keys]
        parts.append(
            _Part(
                batch=None if rollouts is None else rollouts.batch,
                outcomes=rows,
                advantages_B=torch.tensor([0.0 if row is None else row.advantage for row in rows]),
                weights_B=torch.tensor([weights.get(key, 0.0) for key in keys]),
                sampler_logps_BL=torch.zeros(0, 0) if rollouts is None else rollouts.sampler_logps_BL,
                update=piece * updates // len(pieces),
            )
        )
    return parts


@torch.no_grad()
def _looked_ahead(setup: Setup, part: _Part, *, old: bool) -> _Part:
    """The part with the probabilities of the reference and, with `old`, those before the step."""
    assert part.batch is not None
    temperature = setup.config.rollout.temperature
    if setup.reference is not None:
        part = replace(part, reference_logps_BL=setup.reference(part.batch, temperature))
    return replace(part, old_logps_BL=_probabilities(setup, part).logps_BL) if old else part


def _one_update(setup: Setup, turns: Sequence[Turn[_Part]], outcomes: Sequence[Outcome], rate: float) -> Updated:
    """One optimizer step over `outcomes`, those of all ranks; nothing moves where none of them has a gradient."""
    ranks, accelerator, policy = setup.ranks, setup.accelerator, setup.policy
    losses: list[Tensor] = []
    learned: list[_Learned] = []
    for turn in turns:
        # Sharded ranks go through their layers together, backwards too.
        signal = setup.reference is not None or any(row and row.advantage for row in turn.batch.outcomes)
        silent = not signal and not is_sharded(policy)
        with torch.no_grad() if silent else nullcontext():
            loss, about = _loss(setup, turn.batch)
            loss = loss * turn.weight
        if not silent:
            ranks.backward(loss, policy)
        losses.append(loss.detach())
        learned.append(about)
    ranks.add_up_gradients(policy)
    norm = accelerator.clip_grad_norm_(policy.parameters(), setup.config.train.max_grad_norm)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    summed = ranks.total(torch.stack(losses).sum() if losses else torch.zeros((), device=accelerator.device))
    # Here the host waits for the device; in the micro-batches nothing of ours makes it.
    mean, grad_norm = torch.stack([summed.float(), norm.float()]).tolist()
    for about in learned:
        about.tell()
    for name, value in (("loss", mean), ("gradient", grad_norm)):
        if not math.isfinite(value):
            ids = ", ".join(dict.fromkeys(outcome.id for outcome in outcomes))
            fix = "Look at these samples; lower the learning rate; the last checkpoint is good."
            raise HbaError(f"{name} is {value}", where=f"samples {ids}", fix=fix)
    if setup.reference is not None or any(outcome.advantage for outcome in outcomes):
        for group in setup.optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        setup.optimizer.step()
    setup.optimizer.zero_grad(set_to_none=True)
    return Updated(mean, grad_norm)


class _Learned(NamedTuple):
    """What an update says of the rollouts of a micro-batch: by name a mean over the tokens of each, on the device."""

    outcomes: Sequence[Outcome | None]
    means_B: Mapping[str, Tensor]

    def tell(self) -> None:
        """Let the outcomes know."""
        for name, values_B in self.means_B.items() if self.outcomes else ():
            for outcome, value in zip(self.outcomes, values_B.tolist(), strict=True):
                if outcome is not None:
                    setattr(outcome, name, value)


def _loss(setup: Setup, part: _Part) -> tuple[Tensor, _Learned]:
    """The share of a micro-batch in the loss, and what its outcomes learn: entropy, KL, clipping."""
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
    reported["sampler_gap"] = (old_BL - part.sampler_logps_BL).abs()
    if config.importance_cap is not None:
        reported["importance"] = importance_weights(old_BL, part.sampler_logps_BL, new.mask_BL, config.importance_cap)
        loss_BL = loss_BL * reported["importance"]
    if part.reference_logps_BL is not None:
        loss_BL = loss_BL + config.kl_weight * kl_divergence(new.logps_BL, part.reference_logps_BL, config.kl)
        reported["kl"] = kl_divergence(new.logps_BL.detach(), part.reference_logps_BL, "k3")
    tokens_B = new.mask_BL.sum(1).clamp_min(1)
    means = {name: (value_BL.detach() * new.mask_BL).sum(1) / tokens_B for name, value_BL in reported.items()}
    return (loss_BL * new.mask_BL * part.weights_B.unsqueeze(1)).sum(), _Learned(part.outcomes, means)


def _probabilities(setup: Setup, part: _Part) -> Probabilities:
    assert part.batch is not None  # only parts with rollouts have a turn
    return probabilities(setup.model, setup.policy, part.batch, setup.config.rollout.temperature)
