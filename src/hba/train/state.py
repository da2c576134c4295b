"""Training checkpoints: everything that a killed run needs to go on as if nothing had happened, and when one is due.

`checkpoints/step_N/` holds the whole model (see model/checkpoint.py), one file a rank of the optimizer's state (see
optimizer_state.py), and `trainer_state.json`. All ranks write into one folder, which appears in one rename, so that a
half-written checkpoint cannot be found. `best.json` names the best step; folders that are neither last nor best are
removed after the new one stands. Random numbers need no state: the loop seeds them anew at every step.

Each validation writes a checkpoint. `Saving` says when one is due besides: every so many steps or minutes, and when the
machine is about to take the processes away (SIGTERM, and SIGUSR1, which SLURM can send ahead of it).
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from hba.errors import StoppedError
from hba.storage import atomic_folder, read_json, remove_abandoned, write_json
from hba.train.optimizer_state import save_optimizer
from hba.train.ranks import Ranks
from hba.train.sharding import whole_weights
from hba.train.start import STOPPING

STEP_FOLDER = re.compile(r"step_(\d+)")
NOTHING, SAVE, STOP = range(3)  # what a rank may wish between two steps, the strongest last


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is. `step` counts optimizer steps done, `score` is the validation mean at the best step.

    Where no task of a validation has a score, the best step is the last one, without a score. `loss_sum` is that of the
    `loss_samples` since the last log line, so that a run which was saved between two lines logs what it would have.
    """

    step: int = 0
    samples_seen: int = 0
    best_step: int | None = None
    best_score: float | None = None
    loss_sum: float = 0.0
    loss_samples: int = 0

    def validated(self, score: float | None) -> Progress:
        """With the score of a validation at this step, which may be the best so far; None if no task has one."""
        if self.best_score is None or (score is not None and score > self.best_score):
            return replace(self, best_step=self.step, best_score=score)
        return self


class Saving:
    """When a checkpoint is due besides those of validations. A context manager around the steps of a run.

    Within, SIGTERM and SIGUSR1 become a wish to stop, which all ranks hear of before the next step. Signals are left
    alone in another thread than the main one, where Python cannot take them.
    """

    def __init__(self, every: int | str | None) -> None:
        """`every` is a number of steps, a text such as '30min', or None."""
        self._steps = every if isinstance(every, int) else None
        self._seconds = 60 * float(every.removesuffix("min")) if isinstance(every, str) else None
        self._saved_at = time.monotonic()
        self._process = os.getpid()
        self._before: dict[signal.Signals, Any] = {}
        self._stopped_by: signal.Signals | None = None

    def __enter__(self) -> Saving:
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._note) for each in STOPPING}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def wish(self, step: int) -> int:
        """What this rank wishes after `step` steps of the run: NOTHING, SAVE or STOP."""
        if self._stopped_by is not None:
            return STOP
        by_steps = self._steps is not None and step % self._steps == 0
        by_time = self._seconds is not None and time.monotonic() - self._saved_at >= self._seconds
        return SAVE if by_steps or by_time else NOTHING

    def saved(self) -> None:
        """A checkpoint was written: the minutes count from here."""
        self._saved_at = time.monotonic()

    def stopped(self, progress: Progress, total: int) -> StoppedError:
        """The error with which all ranks end, after the checkpoint of `progress` was written."""
        by = "a signal to another process" if self._stopped_by is None else self._stopped_by.name
        kept = f"its checkpoint is written ({progress.step} of {total} steps)" if progress.step else "no step was done"
        return StoppedError(f"stopped by {by}; {kept}", fix="Run the same command again to go on.")

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._process:  # worker processes inherit the handler
            self._stopped_by = signal.Signals(number)


def save_state(
    folder: Path,
    progress: Progress,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    save_model: Callable[[Path], None],
    ranks: Ranks,
) -> None:
    """Write `folder/step_N`, then `best.json` if this step is the best, then drop what is neither last nor best.

    Called by all ranks; `save_model` runs on the first, where the parameters of `model` are whole. Raises StorageError
    when the disk is full; the earlier checkpoints then still stand.
    """
    with _shared_folder(folder / f"step_{progress.step}", ranks) as new, _writers_raise_os_errors():
        save_optimizer(new, model, optimizer, rank=ranks.rank, world=ranks.world)
        with whole_weights(model, ranks.accelerator):
            if ranks.is_first:
                save_model(new)
        if ranks.is_first:
            write_json(new / "trainer_state.json", asdict(progress))
    if ranks.is_first:
        settle(folder, progress)
    ranks.wait()


def settle(folder: Path, progress: Progress) -> None:
    """Name the best step in best.json and drop what is neither last nor best.

    Done after each save, and again by a run that resumes: it may have been killed before.
    """
    best = {"step": progress.best_step, "score": progress.best_score}
    named = folder / "best.json"
    if progress.best_step is not None and (not named.is_file() or read_json(named) != best):
        write_json(named, best)
    for step, path in steps(folder):
        if step not in (progress.step, progress.best_step):
            shutil.rmtree(path)


@contextmanager
def _shared_folder(path: Path, ranks: Ranks) -> Iterator[Path]:
    """An `atomic_folder` of the first rank that all ranks fill; it becomes `path` once all have finished."""
    if ranks.is_first:
        remove_abandoned(path.parent)
        with atomic_folder(path) as new:
            yield ranks.told(new)
            ranks.wait()
    else:
        yield ranks.told(path)
        ranks.wait()


@contextmanager
def _writers_raise_os_errors() -> Iterator[None]:
    """torch and safetensors tell of a full disk in errors of their own; raise the OSError behind them."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        code = _errno(error)
        if code is None:
            raise
        raise OSError(code, os.strerror(code)) from error


def _errno(error: BaseException | None) -> int | None:
    while error is not None:
        if isinstance(error, OSError):
            return error.errno
        if isinstance(error, SafetensorError) and (match := re.search(r"os error (\d+)", str(error))):
            return int(match[1])
        error = error.__cause__ or error.__context__
    return None


def steps(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints of a run, oldest first."""
    found = [(int(m[1]), p) for p in folder.glob("step_*") if (m := STEP_FOLDER.fullmatch(p.name))]
    return sorted(found)


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of a run, or None."""
    found = steps(folder)
    return found[-1][1] if found else None


def read_progress(checkpoint: Path) -> Progress:
    """How far the run was when `checkpoint` was written."""
    return Progress(**read_json(checkpoint / "trainer_state.json"))
