"""Training checkpoints: everything that a killed run needs to go on as if nothing had happened, and when one is due.

`checkpoints/step_N/` holds the whole model (see model/checkpoint.py), one file a rank of the optimizer's state (see
optimizer_state.py), and `trainer_state.json`. All ranks write into one folder, which appears in one rename, so that a
half-written checkpoint cannot be found. `best.json` names the best step; folders that are neither last nor best are
removed after the new one stands. Random numbers need no state: the loop seeds them anew at every step.

Each validation writes a checkpoint. `Saving` says when one is due besides: every so many steps or minutes, and when the
machine is about to take the processes away (SIGTERM, and SIGUSR1, which SLURM can send ahead of it).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hba.errors import InputError, StoppedError
from hba.model.weights import Piece, tensor_piece, write_file
from hba.run import RunFolder
from hba.storage import atomic_folder, plural, read_json, remove_abandoned, write_json
from hba.train.ranks import Ranks, whole_weights

# The optimizer's state as safetensors, one file a rank, restored on any number of ranks. Nothing is pickled.
#
# `optimizer-RANK-of-WORLD.safetensors` holds, for every parameter that has had a gradient, `NAME/step` and the rows of
# `NAME/exp_avg` and `NAME/exp_avg_sq` that belong to the rank (sharding splits dimension 0); its header says where they
# begin. A rank that resumes reads the rows that are its own now, from whichever files hold them. A model that every
# rank holds whole is written by the first alone. Torch's functions of this purpose would give a parameter that has had
# no gradient yet a first step, and read a checkpoint of which a part is missing (docs/decisions.md).


_TABLES = {"qmap1": "dynamic", "qmap2": "udynamic"}  # of bitsandbytes, the same for all parameters, in no file


def save_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, rank: int, world: int) -> None:
    """Write this rank's part of the state of `optimizer`, whose parameters are those of `model`, into `folder`; main
    memory has a part of one moment at a time."""
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    if not sharded and rank:
        return
    pieces: list[Piece] = []
    first_rows: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if key in _TABLES:
                continue
            first_rows[name] = _first_row(parameter)
            held = _local(value) if isinstance(value, Tensor) else torch.tensor(value)  # bitsandbytes counts in ints
            pieces.append(tensor_piece(f"{name}/{key}", held))
    file = f"optimizer-{rank:05}-of-{world if sharded else 1:05}.safetensors"
    write_file(folder / file, pieces, {"first_rows": json.dumps(first_rows)})


def restore_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put the state of `optimizer` back as `save_optimizer` wrote it, by however many ranks.

    Raises InputError when a file is damaged or missing, or the state is that of other parameters.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    parts: dict[str, list[tuple[Any, int]]] = {}  # of each parameter: files in the order of their rows, and the first
    with ExitStack() as stack:
        try:
            for path in _files(folder):
                file = stack.enter_context(safe_open(path, framework="pt"))
                for name, first in json.loads(file.metadata()["first_rows"]).items():
                    parts.setdefault(name, []).append((file, first))
            if strange := sorted(parts.keys() - trained.keys()):
                fix = "Resume with the strategy that the run was started with."
                what = f"the optimizer state is of parameters that do not train: {', '.join(strange[:5])}"
                raise InputError(what, where=str(folder), fix=fix)
            for name, held in parts.items():
                if not isinstance(optimizer, torch.optim.AdamW):
                    optimizer.state[trained[name]] = _in_8_bits(name, trained[name], held[0][0], optimizer)
                    continue
                moments = {key: _moment(f"{name}/{key}", trained[name], held) for key in ("exp_avg", "exp_avg_sq")}
                step = held[0][0].get_tensor(f"{name}/step").to(trained[name].device)
                optimizer.state[trained[name]] = {"step": step, **moments}
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise _damaged(folder, str(error).splitlines()[0]) from error


def _in_8_bits(name: str, parameter: nn.Parameter, file: Any, optimizer: Any) -> dict[str, Any]:
    """The state that bitsandbytes keeps of a parameter, which is never split: small ones have moments in float32."""
    keys = {key.removeprefix(f"{name}/") for key in file.keys() if key.startswith(f"{name}/")}  # noqa: SIM118
    state: dict[str, Any] = {key: file.get_tensor(f"{name}/{key}").to(parameter.device) for key in keys}
    state["step"] = int(state["step"])
    if state["state1"].dtype is torch.uint8:
        state |= {key: optimizer.name2qmap[table].to(parameter.device) for key, table in _TABLES.items()}
    for moment in ("state1", "state2"):
        if state[moment].shape != parameter.shape:
            raise ValueError(f"{name}/{moment} is {list(state[moment].shape)}, expected {list(parameter.shape)}")
        # A paged optimizer has memory of its own kind.
        state[moment] = optimizer.get_state_buffer(parameter, dtype=state[moment].dtype).copy_(state[moment])
    return state


def _moment(key: str, parameter: nn.Parameter, held: list[tuple[Any, int]]) -> Tensor:
    """The rows of a moment that belong to this rank. Raises ValueError where the files do not have them all."""
    local = _local(parameter)
    if not local.ndim:
        whole: Tensor = held[0][0].get_tensor(key)
        return whole.to(local.device)
    begin, rows = _first_row(parameter), []
    for file, first in held:
        kept = file.get_slice(key)
        start, stop = (min(max(at - first, 0), kept.get_shape()[0]) for at in (begin, begin + len(local)))
        rows.append(kept[start:stop])
    found = torch.cat(rows)
    if found.shape != local.shape:
        raise ValueError(f"{len(found)} of {len(local)} rows of {key}")
    found = found.to(local.device)
    if not isinstance(parameter, DTensor):
        return found
    where = (parameter.device_mesh, parameter.placements)
    return DTensor.from_local(found, *where, run_check=False, shape=parameter.shape, stride=parameter.stride())


def _first_row(parameter: Tensor) -> int:
    """Of those of the whole parameter that this rank holds. Sharding deals equal chunks; the last may be smaller."""
    if not isinstance(parameter, DTensor):
        return 0
    mesh = parameter.device_mesh
    return min(mesh.get_local_rank() * -(-parameter.shape[0] // mesh.size()), parameter.shape[0])


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _files(folder: Path) -> list[Path]:
    """The files of all ranks that wrote, in their order. Raises InputError naming those that are not there."""
    worlds = {int(path.stem[-5:]) for path in folder.glob("optimizer-*.safetensors")}
    if len(worlds) != 1:
        raise _damaged(folder, "no file optimizer-*" if not worlds else "files of several saves")
    (world,) = worlds
    files = [folder / f"optimizer-{rank:05}-of-{world:05}.safetensors" for rank in range(world)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise _damaged(folder, f"no file {', '.join(missing)}")
    return files


def _damaged(folder: Path, what: str) -> InputError:
    fix = f"Remove {folder.name}; the run then goes on from the checkpoint before, or from its start."
    return InputError(f"not the optimizer state of a run, or damaged ({what})", where=str(folder), fix=fix)


# Opening the run folder of a training command, so that a start which is refused leaves nothing behind.
#
# `RunFolder` records the config before data and model are opened. If one of those is refused (no such atlas, a bad row,
# no such backbone), a folder that stayed would hold a run that never began, and would refuse the corrected command for
# its other config. A run that has begun is never touched: its first log line, checkpoint or board keeps it.
#
# SIGTERM and SIGUSR1 end the command with an exit code that says so, wherever it is; during the steps of the loop they
# are a wish instead (see `state.Saving`), and a checkpoint is written first.


STOPPING = (signal.SIGTERM, signal.SIGUSR1)  # a launcher's or a scheduler's; SIGUSR1 as SLURM's --signal sends it ahead
RECORDS = {".lock", "config.yaml", "environment.json", "gpu.json"}


@contextmanager
def training_run(path: Path, *, config: Any, command: str, seed: int) -> Iterator[RunFolder]:
    """`RunFolder.open`; on an InputError before training began, what this command made is removed again.

    Raises HbaError where an exchange between the processes of the run fails since one has ended.
    """
    before: set[str] = set()
    with suppress(FileNotFoundError, NotADirectoryError):
        before = {file.name for file in path.iterdir()}
    made = next((parent for parent in [*reversed(path.parents), path] if not parent.exists()), None)
    with _stoppable(), RunFolder.open(path, config=config, command=command, seed=seed) as run:
        if run.is_main:  # the first rank makes the folder, and may have removed it before another comes here
            remove_abandoned(path)
        try:
            yield run
        except InputError:
            if run.is_main:
                added = {file.name for file in path.iterdir()} - before
                if "config.yaml" in added and added <= RECORDS:
                    _remove([path / name for name in added], path, made)
            raise
        except RuntimeError as error:
            from hba.train.ranks import lost_rank  # torch, which has raised it

            lost = lost_rank(error)
            if lost is None:
                raise
            raise lost from error


def _remove(files: list[Path], path: Path, made: Path | None) -> None:
    for file in files:
        file.unlink()
    if made is not None:
        for folder in [path, *path.parents]:
            with suppress(OSError):  # another process may have put something there meanwhile
                folder.rmdir()
            if folder == made:
                return


@contextmanager
def _stoppable() -> Iterator[None]:
    """Within, the signals that stop a run raise StoppedError; forked workers, which inherit this, do not heed them."""
    process = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() == process:
            what = f"stopped by {signal.Signals(number).name}"
            raise StoppedError(what, fix="Run the same command again to go on.")

    if threading.current_thread() is not threading.main_thread():  # where Python cannot take signals
        yield
        return
    before = {each: signal.signal(each, stop) for each in STOPPING}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


# --- training checkpoints ---------------------------------------------------------------------------------------------


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
        done = f"{progress.step} of {plural(total, 'step')}"
        kept = f"its checkpoint is written ({done})" if progress.step else "no step was done"
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
