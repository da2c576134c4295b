"""The rollouts of a batch by prompt and by task: what every advantage estimator starts from.

Everything is float64 numpy over group sums, so that order, interleaving and number of groups do not matter. A group
whose rewards are all equal has no signal, and its centred rewards are exactly 0. Shapes: N rollouts, K groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from hba.errors import InputError

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
        raise InputError(f"{len(rewards_N)} rewards, but {len(groups)} groups", fix="Give one group a rollout.")
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
        raise InputError(f"{count} rewards, but {len(tasks)} tasks", fix="Give one task a rollout.")
    codes_N, number = codes(tasks)
    names = {int(code): str(name) for code, name in zip(codes_N, tasks, strict=True)}
    return {names[code]: np.flatnonzero(codes_N == code) for code in range(number)}
