"""Opening the run folder of a training command, so that a start which is refused leaves nothing behind.

`RunFolder` records the config before data and model are opened. If one of those is refused (no such atlas, a bad row,
no such backbone), a folder that stayed would hold a run that never began, and would refuse the corrected command for
its other config. A run that has begun is never touched: its first log line, checkpoint or board keeps it.

SIGTERM and SIGUSR1 end the command with an exit code that says so, wherever it is; during the steps of the loop they
are a wish instead (see `state.Saving`), and a checkpoint is written first.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from hba.errors import InputError, StoppedError
from hba.run import RunFolder
from hba.storage import remove_abandoned

STOPPING = (signal.SIGTERM, signal.SIGUSR1)  # a launcher's or a scheduler's; SIGUSR1 as SLURM's --signal sends it ahead
RECORDS = {".lock", "config.yaml", "environment.json"}


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
