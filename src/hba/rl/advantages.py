"""Advantages: from the rewards of grouped rollouts to the weight that each rollout has in the policy gradient.

`rewards` [N] are those of one batch, `groups` [N] name the prompt that each rollout answers, `tasks` [N] its task. The
estimators without memory are functions; those that carry averages from step to step (`Harpo`, `EmaGrpo`) are objects
whose state is plain JSON and belongs into every checkpoint.

A group whose rewards are all equal has no signal: its advantages are 0 under every estimator but REINFORCE++, whose
baseline is the whole batch. Formulas, sources and advice: docs/rl.md. Shapes: N rollouts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from hba.errors import InputError, nearest
from hba.rl.rewards import load_function

# The rollouts of a batch by prompt and by task: what every advantage estimator starts from.
#
# Everything is float64 numpy over group sums, so that order, interleaving and number of groups do not matter. A group
# whose rewards are all equal has no signal, and its centred rewards are exactly 0. Shapes: N rollouts, K groups.


Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]
Names: TypeAlias = Sequence[Any] | npt.NDArray[Any]

EPS = 1e-6
SIGNAL = 1e-9  # rewards of a group that differ by less are equal: float noise is no signal


class Groups(NamedTuple):
    """The statistics of one batch by group."""

    index_N: Ints  # the group of each rollout, 0..K-1
    size_K: Floats
    std_K: Floats  # population
    informative_K: npt.NDArray[np.bool_]  # rewards are not all equal
    alone_N: npt.NDArray[np.bool_]  # the only rollout of its group
    centred_N: Floats  # reward minus the mean of its group, exactly 0 in a group without signal


def grouped(rewards: npt.ArrayLike, groups: Names) -> Groups:
    """Statistics of `rewards` [N] by group.

    Raises InputError for lists of unequal length and for rewards that are not finite.
    """
    rewards_N = np.asarray(rewards, np.float64)
    if len(groups) != len(rewards_N):
        raise InputError(f"{len(rewards_N)} rewards, but {len(groups)} groups", fix="Give one group for each reward.")
    if not np.isfinite(rewards_N).all():
        first = int(np.flatnonzero(~np.isfinite(rewards_N))[0])
        raise InputError(f"reward {first} is {rewards_N[first]}", where="advantages", fix="Give finite rewards.")
    index_N, count = codes(groups)
    size_K = np.bincount(index_N, minlength=count).astype(np.float64)
    mean_K = np.bincount(index_N, rewards_N, count) / np.maximum(size_K, 1)
    centred_N = rewards_N - mean_K[index_N]
    std_K = np.sqrt(np.bincount(index_N, centred_N**2, count) / np.maximum(size_K, 1))
    informative_K = np.zeros(count, np.bool_)
    informative_K[index_N[np.abs(centred_N) > SIGNAL]] = True
    centred_N = np.where(informative_K[index_N], centred_N, 0.0)
    return Groups(index_N, size_K, std_K, informative_K, size_K[index_N] == 1, centred_N)


def codes(names: Names) -> tuple[Ints, int]:
    """A number for each name in order of appearance, and how many there are."""
    numbers: dict[Any, int] = {}
    codes_N = np.fromiter((numbers.setdefault(name, len(numbers)) for name in names), np.int64, len(names))
    return codes_N, len(numbers)


def rows_of(tasks: Names, count: int) -> dict[str, Ints]:
    """The rollouts of each task, by its name."""
    if len(tasks) != count:
        raise InputError(f"{count} rewards, but {len(tasks)} tasks", fix="Give one task for each reward.")
    codes_N, number = codes(tasks)
    names = {int(code): str(name) for code, name in zip(codes_N, tasks, strict=True)}
    return {names[code]: np.flatnonzero(codes_N == code) for code in range(number)}


# HARPO's advantages: which groups and tasks have weak signals in the batch, and in the steps before it.
#
# The moving averages belong to the object, never to the module, and to every checkpoint: `state_dict` is plain JSON,
# and a run that is killed and resumed goes on with the same factors. Shapes: N rollouts, K groups.


Clamp = tuple[float, float]


class TaskFactor(NamedTuple):
    """What HARPO did to one task in one step."""

    signal: float  # moving average of mean |A|
    task_factor: float  # s_m
    sample_factor: float  # mean of s_g over the groups with signal
    groups: int  # in the batch
    informative_groups: int


class Harpo:
    """HARPO: A = s_m * s_g * (r - mean_g) / std_g (OmniSapiens 2.0, arXiv 2602.10635).

    The signal of a group is p_g = mean |A| of its rollouts, that of a task p_m the same over the task's rollouts, with
    a moving average across steps. A task whose signal is below the others' is amplified, log s_m = moving average of
    (log geomean p - log p_m), and within a task so is a group, s_g = geomean p / p_g where the task has two groups or
    more. Both factors are clamped.

    Groups without signal are left out of the geometric means, where a single one, at `eps`, would drag the factors of
    all others to the clamp; so is a task that has no others in the batch. To p_m they count as what they are, rollouts
    without signal: a task that is rarely solved is heard by its factor. `published=True` takes all into every mean, and
    passes the reward of a group of one, scaled to 0..1 over the batch, on as its advantage, where ours is 0.
    """

    def __init__(
        self,
        published: bool = False,
        *,
        beta_signal: float = 0.95,
        beta_factor: float = 0.95,
        task_clamp: Clamp = (0.5, 4.0),
        sample_clamp: Clamp = (0.5, 3.0),
        eps: float = EPS,
    ) -> None:
        self.published = published
        self.beta_signal, self.beta_factor = beta_signal, beta_factor
        self.task_clamp, self.sample_clamp, self.eps = task_clamp, sample_clamp, eps
        self._signal: dict[str, float] = {}
        self._log_factor: dict[str, float] = {}
        self.factors: dict[str, TaskFactor] = {}  # of the last step, for the log

    def __call__(self, rewards: npt.ArrayLike, groups: Names, tasks: Names) -> Floats:
        """Advantages [N]; the averages move by one step. Raises InputError for lists of unequal length."""
        rewards_N = _scaled(rewards, self.eps) if self.published else np.asarray(rewards, np.float64)
        batch = grouped(rewards_N, groups)
        advantage_N: Floats = batch.centred_N / np.maximum(batch.std_K, self.eps)[batch.index_N]
        if self.published:  # a group of one keeps its reward
            advantage_N = np.where(batch.alone_N, rewards_N, advantage_N)
        count = len(batch.size_K)
        signal_K = np.bincount(batch.index_N, np.abs(advantage_N), count) / np.maximum(batch.size_K, 1)
        counted_K = np.ones(count, np.bool_) if self.published else batch.informative_K
        rows = rows_of(tasks, len(advantage_N))
        present = {task: mine[counted_K[batch.index_N[mine]]] for task, mine in rows.items()}
        present = {task: mine for task, mine in present.items() if len(mine)}
        self._observe({task: float(np.abs(advantage_N[rows[task]]).mean()) for task in present})
        factor_N = np.ones_like(advantage_N)
        self.factors = {}
        for task, mine in present.items():
            task_factor = float(np.clip(math.exp(self._log_factor[task]), *self.task_clamp))
            sample_factor_N = self._sample_factors(signal_K, batch.index_N[mine])
            factor_N[mine] = task_factor * sample_factor_N
            self.factors[task] = self._described(task, task_factor, sample_factor_N, batch, rows[task], mine)
        return advantage_N * factor_N

    def _observe(self, signal: Mapping[str, float]) -> None:
        """Move the averages by the signals of the tasks of one batch; those of other tasks stay."""
        for task, now in signal.items():
            now = max(now, self.eps)
            before = self._signal.get(task, now)
            self._signal[task] = self.beta_signal * before + (1 - self.beta_signal) * now
        logs = {task: math.log(max(self._signal[task], self.eps)) for task in signal}
        for task, log in logs.items():
            apart = sum(logs.values()) / len(logs) - log
            before = self._log_factor.get(task, 0.0)
            self._log_factor[task] = self.beta_factor * before + (1 - self.beta_factor) * apart

    def _sample_factors(self, signal_K: Floats, index_N: Ints) -> Floats:
        """The factor of each of a task's counted rollouts, whose groups are `index_N`."""
        mine_K, inverse_N = np.unique(index_N, return_inverse=True)
        if len(mine_K) < 2:
            return np.ones(len(index_N))
        logs_K = np.log(np.maximum(signal_K[mine_K], self.eps))
        factor_K = np.clip(np.exp(logs_K.mean() - logs_K), *self.sample_clamp)
        factors_N: Floats = factor_K[inverse_N]
        return factors_N

    def _described(
        self, task: str, task_factor: float, sample_factor_N: Floats, batch: Groups, rows: Ints, counted: Ints
    ) -> TaskFactor:
        all_K = np.unique(batch.index_N[rows])
        informative = int(batch.informative_K[all_K].sum())
        mean = float(sample_factor_N.mean()) if len(counted) else 1.0
        return TaskFactor(self._signal[task], task_factor, mean, len(all_K), informative)

    def state_dict(self) -> dict[str, Any]:
        """The averages of every task seen so far, as JSON."""
        return {"signal": dict(self._signal), "log_factor": dict(self._log_factor)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._signal = {task: float(value) for task, value in state["signal"].items()}
        self._log_factor = {task: float(value) for task, value in state["log_factor"].items()}


def _scaled(rewards: npt.ArrayLike, eps: float) -> Floats:
    """The release's min-max scaling over the batch: it matters next to `eps`, and to groups of one."""
    rewards_N = np.asarray(rewards, np.float64)
    low, high = (rewards_N.min(), rewards_N.max()) if len(rewards_N) else (0.0, 0.0)
    return (rewards_N - low) / (high - low) if high - low > eps else np.zeros_like(rewards_N)


# --- estimators -------------------------------------------------------------------------------------------------------


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
