"""The main job end to end on a laptop: mini-atlas, tiny backbone, SFT, predictions, scores, report.

Every step is what its own command does, on the same code as a full-size run; only the recipe (`sft_tiny`) and the data
are small. Each step resumes or is skipped when its result stands, so that a killed demo ends in the same metrics.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hba.atlas import open_atlas
from hba.atlas.mini import build_mini_atlas
from hba.cli.options import recipe_path
from hba.cli.progress import counted, tallied
from hba.config import load_config
from hba.errors import ConfigError
from hba.evaluate.config import PredictConfig
from hba.evaluate.predict import predict_run
from hba.evaluate.score import score_run
from hba.model.tiny import atlas_texts, build_tiny
from hba.process import prepare_process, remove_abandoned
from hba.quarantine import QuarantineLog
from hba.report import write_report
from hba.train.sft import SftConfig, train_sft
from hba.train.start import training_run
from hba.yaml_core import dump_inline

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the demo made, the samples that it had to leave out, and the wall-clock seconds of each step."""

    metrics: dict[str, Any]
    report: Path
    quarantined: list[dict[str, Any]]
    seconds: dict[str, float]

    def timing(self) -> str:
        """The seconds as one line."""
        parts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items())
        return f"{sum(self.seconds.values()):.0f} s ({parts})"


def run_demo(folder: Path, *, size: str, seed: int, overrides: Sequence[str] = ()) -> DemoResult:
    """Make everything below `folder`; run again after an interruption to go on.

    `overrides` change values of the recipe, such as train.epochs=2. Raises InputError for a folder that holds a demo
    of another size, seed or recipe.
    """
    seconds: dict[str, float] = {}
    atlas, backbone, run = folder / "atlas", folder / "tiny", folder / "sft"
    settings = _settings(atlas, backbone, seed, overrides)
    prepare_process(seed)
    remove_abandoned(folder)

    def timed(name: str, work: Callable[[], T]) -> T:
        started = time.perf_counter()
        result = work()
        seconds[name] = round(time.perf_counter() - started, 1)
        return result

    timed("mini-atlas", lambda: _make_atlas(atlas, size, seed))
    timed("backbone", lambda: _make_backbone(backbone, atlas, seed))
    timed("train", lambda: _train(run, settings, seed))
    timed("predict", lambda: _predict(run, atlas))
    metrics = timed("score", lambda: score_run(run))
    report = timed("report", lambda: write_report(run, atlas_root=atlas))
    left_out = QuarantineLog(run).records()
    return DemoResult(metrics=metrics, report=report, quarantined=left_out, seconds=seconds)


def _settings(atlas: Path, backbone: Path, seed: int, overrides: Sequence[str]) -> SftConfig:
    own = {"atlas": str(atlas), "model.name": str(backbone), "train.seed": seed}
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key in own:
            raise ConfigError(f"the demo itself sets {key}", where=override, fix="Use --run, --size and --seed.")
    given = [*overrides, *(f"{key}={dump_inline(value)}" for key, value in own.items())]
    return load_config(SftConfig, recipe_path("sft_tiny"), given)


def _make_atlas(atlas: Path, size: str, seed: int) -> None:
    with counted("mini-atlas") as progress:
        build_mini_atlas(atlas, size=size, seed=seed, workers=os.cpu_count() or 1, progress=progress)


def _make_backbone(backbone: Path, atlas: Path, seed: int) -> None:
    if not (backbone / "config.json").is_file():
        build_tiny(backbone, atlas_texts(open_atlas(atlas, split="train")), seed=seed)


def _train(run: Path, settings: SftConfig, seed: int) -> None:
    with training_run(run, config=settings, command="demo", seed=seed) as opened:
        train_sft(settings, opened)


def _predict(run: Path, atlas: Path) -> None:
    with tallied("predict") as progress:
        predict_run(str(run), run, atlas=str(atlas), split="test", config=PredictConfig(), progress=progress)
