"""Child processes that end with their parent, however it ends.

A worker that is waiting for work sees that its parent is gone; one that is busy, or hangs in a decoder, does not. On
Linux the kernel can be asked to kill it. It takes the end of the thread that started the child for the parent's end.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent, of id `parent`, ends; nothing elsewhere than on Linux."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it ended before the line above
