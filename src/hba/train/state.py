"""Training checkpoints: everything that a killed run needs to go on as if nothing had happened.

`checkpoints/step_N/` holds the whole model (see model/checkpoint.py), one file a rank of the optimizer's state (see
optimizer_state.py), and `trainer_state.json`. All ranks write into one folder, which appears in one rename, so that a
half-written checkpoint cannot be found. `best.json` names the best step; folders that are neither last nor best are
removed after the new one stands. Random numbers need no state: the loop seeds them anew at every step.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import nn

from hba.abandoned import remove_abandoned
from hba.storage import atomic_folder, read_json, write_json
from hba.train.optimizer_state import save_optimizer
from hba.train.sharding import whole_weights

STEP_FOLDER = re.compile(r"step_(\d+)")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is. `step` counts optimizer steps done, `score` is the validation mean at the best step."""

    step: int = 0
    samples_seen: int = 0
    best_step: int | None = None
    best_score: float | None = None


def save_state(
    folder: Path,
    progress: Progress,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    save_model: Callable[[Path], None],
    accelerator: Accelerator,
) -> None:
    """Write `folder/step_N`, then `best.json` if this step is the best, then drop what is neither last nor best.

    Called by all ranks; `save_model` runs on the first, where the parameters of `model` are whole. Raises StorageError
    when the disk is full; the earlier checkpoints then still stand.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    with _shared_folder(folder / f"step_{progress.step}", accelerator) as new, _writers_raise_os_errors():
        save_optimizer(new, model, optimizer, rank=rank, world=world)
        with whole_weights(model, accelerator):
            if accelerator.is_main_process:
                save_model(new)
        if accelerator.is_main_process:
            write_json(new / "trainer_state.json", asdict(progress))
    if accelerator.is_main_process:
        settle(folder, progress)
    accelerator.wait_for_everyone()


def settle(folder: Path, progress: Progress) -> None:
    """Name the best step in best.json and drop what is neither last nor best.

    Done after each save, and again by a run that resumes: it may have been killed before.
    """
    best = {"step": progress.best_step, "score": progress.best_score}
    named = folder / "best.json"
    if not named.is_file() or read_json(named) != best:
        write_json(named, best)
    for step, path in steps(folder):
        if step not in (progress.step, progress.best_step):
            shutil.rmtree(path)


@contextmanager
def _shared_folder(path: Path, accelerator: Accelerator) -> Iterator[Path]:
    """An `atomic_folder` of the first rank that all ranks fill; it becomes `path` once all have finished."""
    if accelerator.is_main_process:
        remove_abandoned(path.parent)
        with atomic_folder(path) as new:
            broadcast_object_list([str(new)])
            yield new
            accelerator.wait_for_everyone()
    else:
        (name,) = broadcast_object_list([None])
        yield Path(name)
        accelerator.wait_for_everyone()


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
