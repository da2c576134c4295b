"""Opening the run folder of a training command, so that a start which is refused leaves nothing behind.

`RunFolder` records the config before data and model are opened. If one of those is refused (no such atlas, a bad row,
no such backbone), a folder that stayed would hold a run that never began, and would refuse the corrected command for
its other config. A run that has begun is never touched: its first log line, checkpoint or board keeps it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hba.errors import InputError
from hba.run import RunFolder
from hba.storage import remove_abandoned

RECORDS = {".lock", "config.yaml", "environment.json"}


@contextmanager
def training_run(path: Path, *, config: Any, command: str, seed: int) -> Iterator[RunFolder]:
    """`RunFolder.open`; on an InputError before training began, what this command made is removed again."""
    before = {file.name for file in path.iterdir()} if path.is_dir() else set()
    made = next((parent for parent in [*reversed(path.parents), path] if not parent.exists()), None)
    with RunFolder.open(path, config=config, command=command, seed=seed) as run:
        remove_abandoned(path)
        try:
            yield run
        except InputError:
            added = {file.name for file in path.iterdir()} - before
            if run.is_main and "config.yaml" in added and added <= RECORDS:
                _remove([path / name for name in added], path, made)
            raise


def _remove(files: list[Path], path: Path, made: Path | None) -> None:
    for file in files:
        file.unlink()
    if made is not None:
        for folder in [path, *path.parents]:
            with suppress(OSError):  # another process may have put something there meanwhile
                folder.rmdir()
            if folder == made:
                return
