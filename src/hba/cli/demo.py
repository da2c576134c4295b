"""The main job end to end on a laptop: mini-atlas, tiny backbone, the three stages, predictions, scores, reports, RL.

Every step is what its own command does, on the same code as a full-size run; only the recipes (`sft_tiny`, `qa_tiny`,
`bam_tiny`, `speak_tiny`, `rl_tiny`) and the data are small. Each step resumes or is skipped when its result stands, so
that a killed demo ends in the same metrics.
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
from hba.cli.options import counted, recipe_path, tallied
from hba.config import inline_yaml, load_config
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
from hba.run import QuarantineLog, RunFolder
from hba.storage import remove_abandoned
from hba.train.bam import train_bam
from hba.train.config import BamConfig, LmConfig, QaConfig, SftConfig
from hba.train.lm import train_lm
from hba.train.qa import train_qa
from hba.train.sft import train_sft
from hba.train.state import training_run

# The last part of the demo: the tiny model learns to think aloud, then GRPO and HARPO train it with the same budget.
#
# Every step is what its own command does (`hba train lm`, `hba train rl`, `hba report`), by the recipes `speak_tiny`
# and `rl_tiny`. What comes of it is reported as it is, prompt by prompt on rows that were not trained on.


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


# --- the demo ---------------------------------------------------------------------------------------------------------


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


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """The configs of the three stages, of the model that speaks, and of RL."""

    sft: SftConfig
    qa: QaConfig
    bam: BamConfig
    speak: LmConfig
    rl: RlConfig


def run_demo(folder: Path, *, size: str, seed: int, overrides: Sequence[str] = ()) -> DemoResult:
    """Make everything below `folder`; run again after an interruption to go on.

    `overrides` change values of the recipes: train.epochs=2 of stage 1, qa.train.epochs=2, bam.train.epochs=2,
    speak.train.max_steps=9 and rl.train.max_steps=9 of the later ones. Raises InputError for a folder that holds a
    demo of another size, seed or recipe.
    """
    seconds: dict[str, float] = {}
    atlas, backbone = folder / "atlas", folder / "tiny"
    runs = {name: folder / name for name in ("sft", "qa", "bam")}
    settings = _settings(folder, seed, overrides)
    prepare_process(seed)
    remove_abandoned(folder)

    def timed(name: str, work: Callable[[], T]) -> T:
        started = time.perf_counter()
        result = work()
        seconds[name] = round(time.perf_counter() - started, 1)
        return result

    timed("mini-atlas", lambda: _make_atlas(atlas, size, seed))
    timed("backbone", lambda: _make_backbone(backbone, atlas, seed))
    timed("sft", lambda: _train(runs["sft"], settings.sft, seed, train_sft))
    with counted("features") as told:
        timed("qa", lambda: _train(runs["qa"], settings.qa, seed, partial(train_qa, progress=told)))
        timed("bam", lambda: _train(runs["bam"], settings.bam, seed, partial(train_bam, progress=told)))
    for name, run in runs.items():
        timed(f"predict {name}", partial(_predict, run, atlas))
    metrics = timed("score", lambda: [score_run(run) for run in runs.values()])[-1]
    pairs = pairwise(runs.values())
    compared = timed("compare", lambda: stages([compare_runs(before, after, seed=seed) for before, after in pairs]))
    write_stages(compared, runs["bam"])
    report = timed("report", lambda: [write_report(run, atlas_root=atlas) for run in runs.values()])[-1]
    learned = run_rl(folder, settings.speak, settings.rl, seed, timed)
    all_runs = [*runs.values(), folder / "speak", *(folder / f"rl-{name}" for name in learned)]
    left_out = {record["id"]: record for run in all_runs for record in QuarantineLog(run).records()}
    return DemoResult(
        metrics=metrics,
        stages=compared,
        rl=learned,
        report=report,
        quarantined=list(left_out.values()),
        seconds=seconds,
    )


def _settings(folder: Path, seed: int, overrides: Sequence[str]) -> _Settings:
    """The bundled tiny recipes with `overrides`. Raises ConfigError for a key that the demo itself sets."""
    atlas, features = str(folder / "atlas"), str(folder / "features")
    own: dict[str, dict[str, Any]] = {
        "": {"atlas": atlas, "model.name": str(folder / "tiny"), "train.seed": seed, "answer_weight": 1.0},
        "qa.": {"atlas": atlas, "base": str(folder / "sft"), "train.seed": seed, "features.folder": features},
        "bam.": {"atlas": atlas, "base": str(folder / "qa"), "train.seed": seed, "features.folder": features},
        "speak.": {"atlas": atlas, "model.name": str(folder / "sft"), "train.seed": seed},
        "rl.": {"atlas": atlas, "model.name": str(folder / "speak"), "train.seed": seed},
    }
    given: dict[str, list[str]] = {prefix: [] for prefix in own}
    for override in overrides:
        prefix = next((prefix for prefix in own if prefix and override.startswith(prefix)), "")
        key = override.partition("=")[0].strip()
        if key.removeprefix(prefix) in own[prefix]:
            raise ConfigError(f"the demo itself sets {key}", where=override, fix="Use --run, --size and --seed.")
        given[prefix].append(override.removeprefix(prefix))
    for prefix, values in own.items():
        given[prefix] += [f"{key}={inline_yaml(value)}" for key, value in values.items()]
    return _Settings(
        sft=load_config(SftConfig, recipe_path("sft_tiny"), given[""]),
        qa=load_config(QaConfig, recipe_path("qa_tiny"), given["qa."]),
        bam=load_config(BamConfig, recipe_path("bam_tiny"), given["bam."]),
        speak=load_config(LmConfig, recipe_path("speak_tiny"), given["speak."]),
        rl=load_config(RlConfig, recipe_path("rl_tiny"), given["rl."]),
    )


def _make_atlas(atlas: Path, size: str, seed: int) -> None:
    with counted("mini-atlas") as progress:
        build_mini_atlas(atlas, size=size, seed=seed, workers=usable_cores(), progress=progress)


def _make_backbone(backbone: Path, atlas: Path, seed: int) -> None:
    if not (backbone / "config.json").is_file():
        build_tiny(backbone, atlas_texts(open_atlas(atlas, split="train")), seed=seed)


def _train(run: Path, settings: Any, seed: int, work: Callable[[Any, RunFolder], object]) -> None:
    with training_run(run, config=settings, command="demo", seed=seed) as opened:
        work(settings, opened)


def _predict(run: Path, atlas: Path) -> None:
    options = PredictConfig(generation=GenerationConfig(max_tokens=32))
    with tallied("predict") as progress:
        predict_run(str(run), run, atlas=str(atlas), split="test", config=options, progress=progress)
