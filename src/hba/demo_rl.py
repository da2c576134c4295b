"""The last part of the demo: the tiny model learns to think aloud, then GRPO and HARPO train it with the same budget.

Every step is what its own command does (`hba train lm`, `hba train rl`, `hba report`), by the recipes `speak_tiny` and
`rl_tiny`. What comes of it is reported as it is, prompt by prompt on rows that were not trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hba.report import write_report
from hba.report.rl import Change, changes
from hba.rl.algorithms import AlgorithmName
from hba.rl.config import RlConfig
from hba.rl.local import train_rl
from hba.train.config import LmConfig
from hba.train.lm import train_lm
from hba.train.start import training_run

ALGORITHMS: tuple[AlgorithmName, ...] = ("grpo", "harpo")


def run_rl(
    folder: Path, speak: LmConfig, rl: RlConfig, seed: int, timed: Callable[[str, Callable[[], Any]], Any]
) -> dict[str, list[Change]]:
    """Make or resume `speak`, `rl-grpo` and `rl-harpo` below `folder`, with reports; what each algorithm changed."""

    def base() -> None:
        with training_run(folder / "speak", config=speak, command="demo", seed=seed) as run:
            train_lm(speak, run)

    def learn(name: AlgorithmName) -> None:
        config = replace(rl, algorithm=name)
        with training_run(folder / f"rl-{name}", config=config, command="demo", seed=seed) as run:
            train_rl(config, run)
        write_report(folder / f"rl-{name}", atlas_root=folder / "atlas")

    timed("speak", base)
    for name in ALGORITHMS:
        timed(f"rl {name}", partial(learn, name))
    return {name: changes(folder / f"rl-{name}") for name in ALGORITHMS}
