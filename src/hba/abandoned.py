"""What killed processes had begun to write, and its removal: names of `storage` that end in a process's id and .tmp."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

_BEGUN = re.compile(r"\..+\.(\d+)\.tmp")  # as storage names what is not yet whole


def remove_abandoned(folder: Path) -> None:
    """Remove files and folders that a process which no longer lives had begun to write into `folder`."""
    for begun in folder.glob(".*.tmp"):
        match = _BEGUN.fullmatch(begun.name)
        if match and not _lives(int(match[1])):
            shutil.rmtree(begun) if begun.is_dir() else begun.unlink()


def _lives(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return True
