"""What a run ran on: versions, commit, hardware. Facts for environment.json, for a reader who repeats the run.

Refuses to record secrets: no environment variable, user or host name is read into it. Imports nothing heavy: package
versions come from their metadata, GPUs from the driver's own tool, so that opening a run folder costs milliseconds.
At the end stands how child processes end with their parent, which the system decides, too.

Invariant: everything here can be written as JSON; what cannot be found out is None or left out, never guessed.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

from hba.errors import InputError

DISTRIBUTION = "human-behavior-atlas"
PACKAGES = (
    *("torch", "torchvision", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "huggingface_hub"),
    *("numpy", "pyarrow", "msgspec", "av", "soundfile", "soxr", "pillow", "pydantic"),
    *("bitsandbytes", "tensorboard", "wandb", "vllm", "verl", "ray", "opensmile", "mediapipe"),
)
EXTRAS = {"train": ("torch", "torchvision", "transformers", "peft", "accelerate", "tensorboard")}
"""what a light install lacks, by the extra that brings it"""
COMMAND_SECONDS = 10.0


def environment(*, command: str, seed: int | None) -> dict[str, Any]:
    """The content of environment.json, without the data; `seed` is None where no chance decides anything."""
    return {
        "hba_version": hba_version(),
        "git_commit": git_commit(),
        "command": command,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cpu_cores": usable_cores(),
        "gpus": gpus(),
        "packages": package_versions(),
        "seed": seed,
        "data": None,
        "started_at": now(),
    }


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def hba_version() -> str | None:
    """The installed version of this package, None when it runs without being installed."""
    return installed_version(DISTRIBUTION)


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, from its metadata, or None."""
    from importlib import metadata  # 12 ms, which `hba --help` does without

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def is_installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    try:
        return find_spec(package) is not None
    except (ModuleNotFoundError, ValueError):  # an import that is barred, or half of one
        return False


def require_extra(extra: str, who: str, *, also: str = "") -> None:
    """Raises InputError, with what to type, unless the packages of an extra (one of EXTRAS) can be imported.

    `who` needs them, `also` is another way out.
    """
    missing = next((name for name in EXTRAS[extra] if not is_installed(name)), None)
    if missing is not None:
        raise InputError(f"{who} needs {missing}, which is not installed", fix=f"{install_fix(extra)}{also}.")


def install_fix(extra: str) -> str:
    """What to type for an extra of this package."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"


def package_versions() -> dict[str, str]:
    """Versions of those of PACKAGES that are installed; none of them is imported."""
    found = {name: installed_version(name) for name in PACKAGES}
    return {name: version for name, version in found.items() if version is not None}


def git_commit() -> str | None:
    """The commit that this package is checked out at, '-dirty' behind it when files were changed, else None."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return None
    lines = _output("git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return lines[0] if lines else None


def gpus() -> list[str]:
    """Name and memory of each NVIDIA GPU, such as 'NVIDIA A100-SXM4-40GB, 40960 MiB'."""
    return _output("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")


def cpu_model() -> str | None:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, None) or platform.processor() or None


def usable_cores() -> int:
    """Cores that are this process's share: how many workers and threads it may have, at least one.

    Those that it may run on (taskset, a batch system), no more than the quota of its container or job, divided by the
    processes that torchrun or accelerate started on this machine (LOCAL_WORLD_SIZE).
    """
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    for quota, period in _cpu_quotas():
        if quota.isdigit() and period.isdigit() and int(period):
            cores = min(cores, int(quota) / int(period))
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, int(cores / max(1, int(ranks) if ranks.isdigit() else 1)))


def memory_bytes() -> int:
    """Main memory that this process may use: the machine's, or its container's limit where that is lower."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [*_cgroup_texts("", "memory.max"), *_cgroup_texts("memory", "memory.limit_in_bytes")]
    return min([total, *(int(text) for text in limits if text.isdigit())])


def _cpu_quotas() -> Iterator[tuple[str, str]]:
    """(quota, period) of every control group that this process is in; a quota that is no number is none."""
    for text in _cgroup_texts("", "cpu.max"):
        quota, _, period = text.partition(" ")
        yield quota, period
    quotas, periods = (_cgroup_texts("cpu", f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    yield from zip(quotas, periods, strict=False)


CGROUPS, CGROUPS_OF_PROCESS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def _cgroup_texts(controller: str, name: str) -> Iterator[str]:
    """The file `name` of this process's control group and of all above it; `controller` '' is version 2."""
    lines = CGROUPS_OF_PROCESS.read_text(encoding="utf-8").splitlines() if CGROUPS_OF_PROCESS.is_file() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            root = CGROUPS / controller
            own = PurePosixPath(path.lstrip("/"))
            for folder in (own, *own.parents):  # inside a container the path may be that outside: then the root counts
                file = root / folder / name
                if file.is_file():
                    yield file.read_text(encoding="ascii").strip()


def _output(name: str, *arguments: str) -> list[str]:
    """The lines that a command prints; none when it is not installed or fails: the fact is then unknown."""
    program = shutil.which(name)
    if program is None:
        return []
    try:
        done = subprocess.run(  # noqa: S603 -- a fixed command, no shell, no input of a user
            [program, *arguments], capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


# Child processes that end with their parent, however it ends.
#
# A worker that is waiting for work sees that its parent is gone; one that is busy, or hangs in a decoder, does not. On
# Linux the kernel can be asked to kill it. It takes the end of the thread that started the child for the parent's end.
# Elsewhere a thread of the child looks whether the parent is there.


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
