"""A probe of a medium whose process is killed, as often as KILLED_TIMES says ('times folder')."""

import os
import signal
from pathlib import Path

from hba.atlas.probe import Facts, Medium


def probe(medium: Medium, *, quick: bool) -> Facts:
    """Facts, unless this medium has not been killed often enough."""
    times, folder = os.environ["KILLED_TIMES"].split(" ", 1)
    marks = Path(folder, f"{medium.number}-{times}")
    killed = len(list(marks.parent.glob(f"{marks.name}-*")))
    if killed < int(times):
        Path(f"{marks}-{killed}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return Facts()
