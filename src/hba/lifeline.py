"""Child processes that end with their parent, however it ends.

A worker that is waiting for work sees that its parent is gone; one that is busy, or hangs in a decoder, does not. On
Linux the kernel can be asked to kill it. It takes the end of the thread that started the child for the parent's end.
Elsewhere a thread of the child looks whether the parent is there.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time

_PR_SET_PDEATHSIG = 1
_LOOK_SECONDS = 0.5


def kernel_ends_children() -> bool:
    """Whether the kernel can be asked to: Linux."""
    return hasattr(ctypes.CDLL(None), "prctl")


def die_with_parent(parent: int) -> None:
    """Have this process killed when its parent, of id `parent`, ends."""
    if kernel_ends_children():
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), name="hba-lifeline", daemon=True).start()
    if os.getppid() != parent:
        os._exit(1)  # it ended before the line above


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)
