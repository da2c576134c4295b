"""HARPO's advantages: which groups and tasks have weak signals in the batch, and in the steps before it.

The moving averages belong to the object, never to the module, and to every checkpoint: `state_dict` is plain JSON, and
a run that is killed and resumed goes on with the same factors. Shapes: N rollouts, K groups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hba.rl.groups import EPS, Floats, Groups, Ints, Names, grouped, rows_of

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
