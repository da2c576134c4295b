"""One piece of work in a forked process that may crash, hang or eat memory (used by fault_campaign.py).

The process may take `MEMORY_BYTES` of addresses more than it begins with, and `SECONDS` of time; what became of it, its
peak of resident memory and its time come back in a `Verdict`. Linux only.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

SECONDS = 30.0
MEMORY_BYTES = 1_500 << 20


class Verdict(NamedTuple):
    """`kind` is 'done' with a `value`, or 'crashed', 'hung', 'failed' (an error that is not hba's) with a `reason`."""

    kind: str
    value: Any
    reason: str
    seconds: float
    megabytes: float


def status_bytes(name: str) -> int:
    """A figure of /proc/self/status: VmSize, VmRSS, VmHWM."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) << 10


def limit_memory() -> None:
    """Let this process take no more than MEMORY_BYTES beyond what it has."""
    limit = status_bytes("VmSize") + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


class Peak:
    """Peak of resident memory since its creation, beyond what was resident then."""

    def __init__(self) -> None:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._before = status_bytes("VmRSS")

    def megabytes(self) -> float:
        """The peak so far."""
        return max(0, status_bytes("VmHWM") - self._before) / (1 << 20)


def silence() -> None:
    """Send what decoders in C print about damage to nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def run(work: Callable[[], Any], seconds: float = SECONDS) -> Verdict:
    """Do the work in a process of its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(work, sender), daemon=True)
    start = time.monotonic()
    process.start()
    sender.close()
    try:
        answer = receiver.recv() if receiver.poll(seconds) else None
    except EOFError:
        answer = "ended"
    spent = time.monotonic() - start
    if answer is None:
        process.kill()
    process.join()
    receiver.close()
    code = process.exitcode or 0
    process.close()
    if answer is None:
        return Verdict("hung", None, f"takes longer than {seconds:g} s", spent, 0.0)
    if answer == "ended":
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return Verdict("crashed", None, f"the process ends with {name}", spent, 0.0)
    kind, value, reason, megabytes = answer
    return Verdict(kind, value, reason, spent, megabytes)


def _child(work: Callable[[], Any], sender: Any) -> None:
    limit_memory()
    silence()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    peak = Peak()
    try:
        answer = ("done", work(), "")
    except Exception as error:  # noqa: BLE001 - any error that is not hba's is a finding of the campaign
        at = traceback.extract_tb(error.__traceback__)[-1]
        answer = ("failed", None, f"{type(error).__name__}: {error} ({at.filename}:{at.lineno})")
    sender.send((*answer, peak.megabytes()))
