"""The algorithms by name: whose advantages, and with which loss their papers go. Formulas and sources: docs/rl.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

Average = Literal["token", "sequence", "group", "constant"]
Ratio = Literal["token", "sequence"]
KlKind = Literal["k1", "k2", "k3"]
AlgorithmName = Literal[
    "grpo",
    "harpo",
    "dr_grpo",
    "rloo",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "gpg",
    "ema_grpo",
    "dapo",
    "gspo",
]


class Algorithm(NamedTuple):
    """What an algorithm stands for; a run may change each."""

    advantage: str
    average: Average = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    ratio: Ratio = "token"
    dynamic_sampling: bool = False


ALGORITHMS: Mapping[AlgorithmName, Algorithm] = {
    "grpo": Algorithm("grpo", average="sequence"),
    "harpo": Algorithm("harpo", average="sequence"),  # as GRPO's, so that the two differ in their advantages alone
    "dr_grpo": Algorithm("dr_grpo", average="constant"),
    "rloo": Algorithm("rloo", average="sequence"),
    "reinforce_pp": Algorithm("reinforce_pp"),
    "reinforce_pp_baseline": Algorithm("reinforce_pp_baseline"),
    "gpg": Algorithm("gpg"),
    "ema_grpo": Algorithm("ema_grpo"),
    "dapo": Algorithm("grpo", clip_high=0.28, dynamic_sampling=True),
    "gspo": Algorithm("grpo", average="sequence", clip_low=3e-4, clip_high=4e-4, ratio="sequence"),
}
