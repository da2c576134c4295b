"""The main job end to end on a laptop: mini-atlas, tiny backbone, the three stages, predictions, scores, reports, RL.

Every step is what its own command does, on the same code as a full-size run; only the recipes (`sft_tiny`, `qa_tiny`,
`bam_tiny`, `speak_tiny`, `rl_tiny`) and the data are small. Each step resumes or is skipped when its result stands, so
that a killed demo ends in the same metrics. What comes of RL is reported as it is, prompt by prompt on rows that were
not trained on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from hba.atlas import open_atlas
from hba.cli.options import configured, counted, tallied
from hba.config import inline_yaml
from hba.environment import usable_cores
from hba.errors import ConfigError
from hba.evaluate.compare import compare_runs
from hba.evaluate.config import GenerationConfig, PredictConfig
from hba.evaluate.predict import predict_run
from hba.evaluate.results import Metrics
from hba.evaluate.score import score_run
from hba.mini import build_mini_atlas
from hba.model.process import prepare_process
from hba.model.tiny import atlas_texts, build_tiny
from hba.report.comparison import Stages, stages, write_stages
from hba.report.page import write_report
from hba.report.rl import Change, changes
from hba.rl.config import AlgorithmName, RlConfig
from hba.rl.local import train_rl
from hba.run import QuarantineLog
from hba.storage import remove_abandoned
from hba.train.bam import train_bam
from hba.train.config import BamConfig, LmConfig, QaConfig, SftConfig
from hba.train.lm import train_lm
from hba.train.qa import train_qa
from hba.train.sft import train_sft
from hba.train.state import training_run

ALGORITHMS: tuple[AlgorithmName, ...] = ("grpo", "harpo")
STAGES = ("sft", "qa", "bam")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the demo made, the samples that it had to leave out, and the wall-clock seconds of each step.

    `metrics` and `report` are those of the third stage; `stages` holds each against the one before, `rl` what each
    RL algorithm changed on held-out prompts.
    """

    metrics: Metrics
    stages: Stages
    rl: dict[str, list[Change]]
    report: Path
    quarantined: list[dict[str, Any]]
    seconds: dict[str, float]

    def timing(self) -> str:
        """The seconds as one line."""
        parts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items())
        return f"{sum(self.seconds.values()):.0f} s ({parts})"


def run_demo(folder: Path, *, size: str, seed: int, overrides: Sequence[str] = ()) -> DemoResult:
    """Make everything below `folder`; run again after an interruption to go on.

    `overrides` change values of the recipes: train.epochs=2 of stage 1, qa.train.epochs=2, bam.train.epochs=2,
    speak.train.max_steps=9 and rl.train.max_steps=9 of the later ones. Raises InputError for a folder that holds a
    demo of another size, seed or recipe.
    """
    seconds: dict[str, float] = {}
    atlas, runs = folder / "atlas", [folder / name for name in STAGES]
    settings = _settings(folder, seed, overrides)
    prepare_process(seed)
    remove_abandoned(folder)

    def timed(name: str, work: Callable[..., T], *arguments: Any, **options: Any) -> T:
        started = time.perf_counter()
        result = work(*arguments, **options)
        seconds[name] = round(time.perf_counter() - started, 1)
        return result

    def train(name: str, config: Any, work: Callable[..., object]) -> None:
        with training_run(folder / name, config=config, command="demo", seed=seed) as run:
            work(config, run)

    def predict(run: Path) -> None:
        options = PredictConfig(generation=GenerationConfig(max_tokens=32))
        with tallied("predict") as told:
            predict_run(str(run), run, atlas=str(atlas), split="test", config=options, progress=told)

    def learn(name: str, config: RlConfig) -> None:
        train(name, config, train_rl)
        write_report(folder / name, atlas_root=atlas)

    with counted("mini-atlas") as told:
        timed("mini-atlas", build_mini_atlas, atlas, size=size, seed=seed, workers=usable_cores(), progress=told)
    timed("backbone", _make_backbone, folder / "tiny", atlas, seed)
    timed("sft", train, "sft", settings["sft"], train_sft)
    with counted("features") as told:
        timed("qa", train, "qa", settings["qa"], partial(train_qa, progress=told))
        timed("bam", train, "bam", settings["bam"], partial(train_bam, progress=told))
    for run in runs:
        timed(f"predict {run.name}", predict, run)
    metrics = timed("score", lambda: [score_run(run) for run in runs])[-1]
    compared = timed("compare", lambda: stages([compare_runs(a, b, seed=seed) for a, b in pairwise(runs)]))
    write_stages(compared, runs[-1])
    report = timed("report", lambda: [write_report(run, atlas_root=atlas) for run in runs])[-1]
    # The tiny model learns to think aloud, then GRPO and HARPO train it with the same budget.
    timed("speak", train, "speak", settings["speak"], train_lm)
    for name in ALGORITHMS:
        timed(f"rl {name}", learn, f"rl-{name}", replace(settings["rl"], algorithm=name))
    every = [*runs, folder / "speak", *(folder / f"rl-{name}" for name in ALGORITHMS)]
    left_out = {record["id"]: record for run in every for record in QuarantineLog(run).records()}
    return DemoResult(
        metrics=metrics,
        stages=compared,
        rl={name: changes(folder / f"rl-{name}") for name in ALGORITHMS},
        report=report,
        quarantined=list(left_out.values()),
        seconds=seconds,
    )


def _make_backbone(backbone: Path, atlas: Path, seed: int) -> None:
    if not (backbone / "config.json").is_file():
        build_tiny(backbone, atlas_texts(open_atlas(atlas, split="train")), seed=seed)


def _settings(folder: Path, seed: int, overrides: Sequence[str]) -> dict[str, Any]:
    """The bundled tiny recipes with `overrides`. Raises ConfigError for a key that the demo itself sets."""
    shared = {"atlas": str(folder / "atlas"), "train.seed": seed}
    features = shared | {"features.folder": str(folder / "features")}
    recipes: dict[str, tuple[type, dict[str, Any]]] = {
        "sft": (SftConfig, shared | {"model.name": str(folder / "tiny"), "answer_weight": 1.0}),
        "qa": (QaConfig, features | {"base": str(folder / "sft")}),
        "bam": (BamConfig, features | {"base": str(folder / "qa")}),
        "speak": (LmConfig, shared | {"model.name": str(folder / "sft")}),
        "rl": (RlConfig, shared | {"model.name": str(folder / "speak")}),
    }
    given: dict[str, list[str]] = {name: [] for name in recipes}
    for override in overrides:
        name = next((name for name in recipes if name != "sft" and override.startswith(f"{name}.")), "sft")
        plain = override.removeprefix(f"{name}.") if name != "sft" else override
        if plain.partition("=")[0].strip() in recipes[name][1]:
            key = override.partition("=")[0].strip()
            raise ConfigError(f"the demo itself sets {key}", where=override, fix="Use --run, --size and --seed.")
        given[name].append(plain)
    return {
        name: configured(kind, f"{name}_tiny", given[name], [f"{key}={inline_yaml(v)}" for key, v in own.items()])
        for name, (kind, own) in recipes.items()
    }
