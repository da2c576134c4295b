"""Advantages: from the rewards of grouped rollouts to the weight that each rollout has in the policy gradient.

`rewards` [N] are those of one batch, `groups` [N] name the prompt that each rollout answers, `tasks` [N] its task. The
estimators without memory are functions; those that carry averages from step to step (`Harpo`, `EmaGrpo`) are objects
whose state is plain JSON and belongs into every checkpoint.

A group whose rewards are all equal has no signal: its advantages are 0 under every estimator but REINFORCE++, whose
baseline is the whole batch. Formulas, sources and advice: docs/rl.md. Shapes: N rollouts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hba.errors import InputError, nearest
from hba.rl.groups import EPS, Floats, Names, grouped, rows_of
from hba.rl.harpo import Harpo
from hba.rl.own import load_function

__all__ = [
    "Advantage",
    "EmaGrpo",
    "Harpo",
    "build_advantage",
    "dr_grpo",
    "gpg",
    "grpo",
    "informative",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "rloo",
]


def grpo(rewards: npt.ArrayLike, groups: Names, *, published: bool = False) -> Floats:
    """GRPO: A = (r - mean_g) / std_g, population std (Shao et al. 2024, arXiv 2402.03300, section 4.1.2).

    A group of one has nothing to be compared with: A = 0. `published` passes its reward on as the advantage.
    """
    batch = grouped(rewards, groups)
    normalised_N: Floats = batch.centred_N / np.maximum(batch.std_K, EPS)[batch.index_N]
    return np.where(batch.alone_N, np.asarray(rewards, np.float64), normalised_N) if published else normalised_N


def dr_grpo(rewards: npt.ArrayLike, groups: Names) -> Floats:
    """Dr. GRPO: A = r - mean_g; the std would favour prompts of little spread (arXiv 2503.20783, section 3.2)."""
    return grouped(rewards, groups).centred_N


def rloo(rewards: npt.ArrayLike, groups: Names) -> Floats:
    """RLOO: A = r - mean of the group's other rollouts = (r - mean_g) * G / (G - 1) (arXiv 2402.14740, section 3.2).

    A group of one rollout has no others: A = 0.
    """
    batch = grouped(rewards, groups)
    factor_K = batch.size_K / np.maximum(batch.size_K - 1, 1)
    left_out: Floats = batch.centred_N * factor_K[batch.index_N]
    return left_out


def reinforce_pp(rewards: npt.ArrayLike, groups: Names) -> Floats:
    """REINFORCE++: A = (r - mean) / std over the whole batch, whatever the groups (Hu 2025, arXiv 2501.03262)."""
    grouped(rewards, groups)  # checks
    return _whitened(np.asarray(rewards, np.float64))


def reinforce_pp_baseline(rewards: npt.ArrayLike, groups: Names) -> Floats:
    """REINFORCE++ with baseline: r - mean_g, then normalised by mean and std over the batch (arXiv 2501.03262).

    The mean over the batch is 0 by construction, so that groups without signal keep A = 0.
    """
    return _whitened(grouped(rewards, groups).centred_N)


def gpg(rewards: npt.ArrayLike, groups: Names) -> Floats:
    """GPG: A = alpha * (r - mean_g), alpha = groups / groups with signal (Chu et al. 2025, arXiv 2504.02546).

    The factor makes up for the groups that give no gradient; the published F_norm is 1.
    """
    batch = grouped(rewards, groups)
    alpha = len(batch.informative_K) / max(1, int(batch.informative_K.sum()))
    return batch.centred_N * alpha


def informative(rewards: npt.ArrayLike, groups: Names) -> npt.NDArray[np.bool_]:
    """DAPO's dynamic sampling: True [N] for rollouts of groups whose rewards differ (arXiv 2503.14476, section 3.2)."""
    batch = grouped(rewards, groups)
    kept_N: npt.NDArray[np.bool_] = batch.informative_K[batch.index_N]
    return kept_N


class EmaGrpo:
    """EMA-GRPO: A = (r - mean_g) / sigma_m, sigma_m the task's moving spread of rewards (arXiv 2512.03043).

    m1 and m2 follow the mean of r and r^2 of a task's rollouts with decay `beta`; sigma_m = sqrt(m2 - m1^2).
    """

    def __init__(self, *, beta: float = 0.99, eps: float = EPS) -> None:
        self.beta, self.eps = beta, eps
        self._moments: dict[str, tuple[float, float]] = {}

    def __call__(self, rewards: npt.ArrayLike, groups: Names, tasks: Names) -> Floats:
        """Advantages [N]; the averages move by one step."""
        batch, rewards_N = grouped(rewards, groups), np.asarray(rewards, np.float64)
        sigma_N = np.ones_like(rewards_N)
        for name, rows in rows_of(tasks, len(rewards_N)).items():
            mine = rewards_N[rows]
            now = float(mine.mean()), float((mine**2).mean())
            before = self._moments.get(name, now)
            first, second = (self.beta * old + (1 - self.beta) * new for old, new in zip(before, now, strict=True))
            self._moments[name] = first, second
            sigma_N[rows] = max(np.sqrt(max(second - first**2, 0.0)), self.eps)
        return batch.centred_N / sigma_N

    def state_dict(self) -> dict[str, Any]:
        """The averages, as JSON."""
        return {"moments": {task: list(pair) for task, pair in self._moments.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._moments = {task: (float(first), float(second)) for task, (first, second) in state["moments"].items()}


class Advantage(Protocol):
    """What the engine calls every step, with its memory."""

    def __call__(self, rewards: npt.ArrayLike, groups: Names, tasks: Names) -> Floats:
        """Advantages [N]."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        ...


class Memoryless:
    """An estimator without memory as an `Advantage`."""

    def __init__(self, function: Callable[..., Floats]) -> None:
        self._function = function

    def __call__(self, rewards: npt.ArrayLike, groups: Names, tasks: Names) -> Floats:
        """Advantages [N]; tasks do not count."""
        return self._function(rewards, groups)

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to take."""


class OwnAdvantage(Memoryless):
    """A function of the user's own as an `Advantage`, called with arrays `rewards`, `groups` and `tasks` [N].

    What it gives is checked before it reaches the loss; a memory that it keeps is in no checkpoint.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(load_function(name, key="loss.advantage", known=[*MEMORYLESS, "harpo", "ema_grpo"]))

    def __call__(self, rewards: npt.ArrayLike, groups: Names, tasks: Names) -> Floats:
        """Advantages [N]. Raises InputError for another number of them, or one that is not finite."""
        rewards_N = np.asarray(rewards, np.float64)
        given = self._function(rewards=rewards_N, groups=np.asarray(groups), tasks=np.asarray(tasks))
        values_N = np.asarray(given, np.float64)
        if values_N.shape != rewards_N.shape or not np.isfinite(values_N).all():
            found = f"shape {values_N.shape}, {int((~np.isfinite(values_N)).sum())} not finite"
            fix = "Return a finite number for each reward, in their order."
            raise InputError(f"expected {len(rewards_N)} finite advantages, found {found}", where=self.name, fix=fix)
        return values_N


MEMORYLESS: Mapping[str, Callable[[npt.ArrayLike, Names], Floats]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
    "gpg": gpg,
}


def build_advantage(name: str, *, published: bool = False) -> Advantage:
    """The estimator of that name, or a function of the user's own. Raises InputError listing the names.

    `published` is for those that the release has: harpo and grpo.
    """
    if ":" in name:
        return OwnAdvantage(name)
    if name == "harpo":
        return Harpo(published=published)
    if name == "grpo":
        return Memoryless(partial(grpo, published=published))
    if name == "ema_grpo":
        return EmaGrpo()
    if name not in MEMORYLESS:
        raise InputError(f"no advantage estimator {name!r}", fix=nearest(name, [*MEMORYLESS, "harpo", "ema_grpo"]))
    return Memoryless(MEMORYLESS[name])


def _whitened(values_N: Floats) -> Floats:
    centred_N: Floats = values_N - values_N.mean() if len(values_N) else values_N
    return centred_N / max(float(np.sqrt((centred_N**2).mean())) if len(values_N) else 1.0, EPS)
