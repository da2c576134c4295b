"""Training checkpoints: everything that a killed run needs to go on as if nothing had happened.

`checkpoints/step_N/` holds the model (see model/checkpoint.py), `optimizer.pt` (tensors only, loaded with
weights_only=True), and `trainer_state.json`. A folder appears in one rename, so that a half-written checkpoint cannot
be found. `best.json` names the best step; folders that are neither last nor best are removed after the new one stands.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from hba.errors import InputError
from hba.process import remove_abandoned
from hba.storage import atomic_folder, read_json, write_json

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
    optimizer: torch.optim.Optimizer,
    save_model: Callable[[Path], None],
    device: torch.device,
) -> None:
    """Write `folder/step_N`, then `best.json` if this step is the best, then drop what is neither last nor best.

    Raises StorageError when the disk is full; the earlier checkpoints then still stand.
    """
    remove_abandoned(folder)
    with atomic_folder(folder / f"step_{progress.step}") as new, _writers_raise_os_errors():
        save_model(new)
        with (new / "optimizer.pt").open("wb") as file:
            torch.save({"optimizer": optimizer.state_dict(), "rng": _rng_state(device)}, file)
        write_json(new / "trainer_state.json", asdict(progress))
    if progress.best_step == progress.step:
        write_json(folder / "best.json", {"step": progress.step, "score": progress.best_score})
    for step, path in steps(folder):
        if step not in (progress.step, progress.best_step):
            shutil.rmtree(path)


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


def restore_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Put optimizer and random state back as they were at `checkpoint`.

    Raises InputError when the file is damaged or holds anything but tensors; nothing of it is executed.
    """
    path = checkpoint / "optimizer.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        fix = f"Remove {checkpoint.name}; the run then goes on from the checkpoint before, or from its start."
        raise InputError("not the optimizer state of a run, or damaged", where=str(path), fix=fix) from error
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"]["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["rng"]["cuda"], device)


def _rng_state(device: torch.device) -> dict[str, Any]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state
