"""What this machine can run and what it lacks, as checks for `hba doctor`.

Every check imports or asks the real thing, since a version that is right on paper can still fail to load. Refuses
to touch the network unless asked (`online=True`) and to show a token: only whether there is one. What is said about
the 7B model is an estimate and labelled so.

Invariant: `diagnose` always returns every check; what is broken is a result, not an exception.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from packaging.requirements import Requirement

from hba.environment import (
    DISTRIBUTION,
    EXTRAS,
    install_fix,
    installed_version,
    is_installed,
    memory_bytes,
    usable_cores,
)
from hba.model.config import computes_bfloat16

if TYPE_CHECKING:
    from rich.table import Table

Status = Literal["ok", "warn", "missing"]
GIB = 2**30
# Estimates for Qwen2.5-Omni-7B on one GPU, bfloat16, short clips; LoRA adds optimizer states and stored activations.
INFERENCE_7B_GIB = 20
LORA_7B_GIB = 40
WEIGHTS_7B_GIB = 25
DEMO_GIB = 4
ONLINE_SECONDS = 5.0
CODECS = ("h264", "hevc", "vp8", "vp9", "aac", "mp3", "libx264")
AUDIO_FORMATS = ("WAV", "FLAC", "MP3", "OGG")
OMNI_CLASSES = ("Qwen2_5OmniThinkerForConditionalGeneration", "Qwen2_5OmniProcessor")
NO_HUB = "Check the network or proxy; local folders work without the hub."
REINSTALL = "Run `make install`, or `pip install -c constraints-cpu.txt -e .`."
# What a package with compiled parts raises when it is not there, does not load, or does not fit another one.
BROKEN = (ImportError, OSError, RuntimeError, AttributeError)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One finding. `required` tells what hba cannot do without from what only some commands need."""

    name: str
    status: Status
    detail: str
    fix: str = ""
    required: bool = True


def diagnose(*, online: bool = False) -> list[Check]:
    """All checks, in reading order; `online` also tries to reach the hub, for at most 5 s."""
    checks = [check_python(), check_requirements(), *(probe(*each) for each in PACKAGES)]
    checks += [check_cores(), check_memory(), check_disk(), *map(check_extra, extras())]
    checks += [probe("landmarks", "hba.descriptors.landmarks", lambda module: module.check_landmarks()), check_token()]
    return [*checks, check_hub()] if online else checks


def healthy(checks: Iterable[Check]) -> bool:
    """Whether everything that hba needs is there."""
    return not any(check.required and check.status == "missing" for check in checks)


def to_json(checks: Sequence[Check]) -> dict[str, Any]:
    """`{"healthy": bool, "checks": [{"name", "status", "detail", "fix", "required"}]}`."""
    return {"healthy": healthy(checks), "checks": [asdict(check) for check in checks]}


def checks_table(checks: Sequence[Check]) -> Table:
    """The checks as a table for a terminal."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("", "check", "finding", box=None, pad_edge=False)
    colours = {"ok": "green", "warn": "yellow", "missing": "red", "optional": "dim"}
    for check in checks:
        label = "optional" if check.status == "missing" and not check.required else check.status
        fix = f"\n[dim]{escape(check.fix)}[/dim]" if check.fix else ""
        table.add_row(f"[{colours[label]}]{label}[/]", escape(check.name), f"{escape(check.detail)}{fix}")
    return table


def check_python() -> Check:
    """Python is one of those that hba supports."""
    detail = f"{platform.python_version()} at {sys.executable}"
    if (3, 11) <= sys.version_info[:2] <= (3, 14):
        return Check(name="python", status="ok", detail=detail)
    return Check(name="python", status="missing", detail=detail, fix="Use Python 3.11, 3.12, 3.13 or 3.14.")


def check_requirements() -> Check:
    """Every declared dependency is installed, in a version within its range."""
    lacking = unmet(declared()) if installed_version(DISTRIBUTION) else [f"{DISTRIBUTION} is not installed"]
    if lacking:
        return Check(name="packages", status="missing", detail="; ".join(lacking), fix=REINSTALL)
    return Check(name="packages", status="ok", detail="every dependency is installed in a version that fits")


def declared(extra: str = "") -> list[Requirement]:
    """What this package requires here, or what its extra `extra` adds to that."""
    lines = (metadata.requires(DISTRIBUTION) or []) if installed_version(DISTRIBUTION) else []
    found = [Requirement(line) for line in lines]
    base = [r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]
    if not extra:
        return base
    named = [r for r in found if r.marker and r not in base and r.marker.evaluate({"extra": extra})]
    within = [each for r in named if r.name == DISTRIBUTION for inner in sorted(r.extras) for each in declared(inner)]
    return [*within, *(r for r in named if r.name != DISTRIBUTION)]


def extras() -> list[str]:
    """The optional extras of this package."""
    known = metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") if installed_version(DISTRIBUTION) else []
    return sorted(known or [])


def unmet(requirements: Iterable[Requirement]) -> list[str]:
    """Those requirements that this environment does not meet, each with what it has."""
    lacking = []
    for requirement in requirements:
        version = installed_version(requirement.name)
        if version is None:
            lacking.append(f"{requirement.name}{requirement.specifier} is not installed")
        elif not requirement.specifier.contains(version, prereleases=True):
            lacking.append(f"{requirement.name} is {version}, needed {requirement.specifier}")
    return lacking


def probe(name: str, package: str, look: Callable[[Any], Check]) -> Check:
    """The check that `look` makes of an imported package, or that it does not load.

    What a light install lacks is no fault of it.
    """
    if package in EXTRAS["train"] and not is_installed(package):
        detail = "not installed: for training, and for models in this process"
        return Check(name=name, status="missing", detail=detail, fix=install_fix("train"), required=False)
    try:
        return look(importlib.import_module(package))
    except BROKEN as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Check(name=name, status="missing", detail=f"{package} does not load: {reason}", fix=REINSTALL)


def formats(name: str, has: str, wanted: Sequence[str], known: Container[str], package: str) -> Check:
    """Whether a media library, described as `has`, knows all `wanted` formats."""
    lacking = [item for item in wanted if item not in known]
    if not lacking:
        return Check(name=name, status="ok", detail=f"{has}: {', '.join(wanted)}")
    fix = f"Install it from its wheel: pip install --force-reinstall --only-binary :all: {package}."
    return Check(name=name, status="missing", detail=f"{has} lacks {', '.join(lacking)}", fix=fix)


def fits_7b(gpu_gib: float) -> str:
    """What of Qwen2.5-Omni-7B one GPU with `gpu_gib` GiB can do, by estimate."""
    if gpu_gib >= LORA_7B_GIB:
        return f"7B: inference and LoRA fit (estimate: {INFERENCE_7B_GIB} and {LORA_7B_GIB} GiB in bfloat16)"
    if gpu_gib >= INFERENCE_7B_GIB:
        return f"7B: inference fits, LoRA does not on one GPU (estimate: {LORA_7B_GIB} GiB)"
    return f"7B: does not fit (estimate: {INFERENCE_7B_GIB} GiB for inference)"


def check_cores() -> Check:
    """Cores that this process may use."""
    cores = usable_cores()
    return Check(name="cores", status="ok", detail=f"{cores} usable of {os.cpu_count()}")


def check_memory() -> Check:
    """Main memory, or the container's share of it."""
    gib = memory_bytes() / GIB
    if gib >= DEMO_GIB:
        return Check(name="memory", status="ok", detail=f"{gib:.1f} GiB")
    return Check(name="memory", status="warn", detail=f"{gib:.1f} GiB; the demo may need {DEMO_GIB}")


def check_disk(folder: Path = Path()) -> Check:
    """Free space where runs are written."""
    free = shutil.disk_usage(folder).free / GIB
    detail = f"{free:.1f} GiB free at {folder.resolve()}"
    if free < 1:
        return Check(name="disk", status="missing", detail=f"{detail}; the demo needs 1 GiB", fix="Free some space.")
    if free < WEIGHTS_7B_GIB:
        detail += f"; the weights of 7B do not fit (estimate: {WEIGHTS_7B_GIB} GiB)"
        return Check(name="disk", status="warn", detail=detail)
    return Check(name="disk", status="ok", detail=detail)


def check_extra(extra: str) -> Check:
    """Whether the packages of an optional extra are installed."""
    name, lacking = f"extra [{extra}]", unmet(declared(extra))
    if not lacking:
        return Check(name=name, status="ok", detail="installed", required=False)
    return Check(name=name, status="missing", detail="; ".join(lacking), fix=install_fix(extra), required=False)


def _torch(torch: Any) -> Check:
    """With what CUDA it was built, and whether bfloat16 is fast here."""
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    bf16 = computes_bfloat16(torch.cuda.get_device_capability() if torch.cuda.is_available() else None)
    use = "computes in bfloat16" if bf16 else "computes in float32 (no GPU with bfloat16)"
    return Check(name="torch", status="ok", detail=f"{torch.__version__}, {built}, {use}")


def _torchvision(torchvision: Any) -> Check:
    torchvision.ops.nms  # noqa: B018 -- an operator of the compiled part, which fails with a torch of another release
    return Check(name="torchvision", status="ok", detail=f"{torchvision.__version__}, loads beside this torch")


def _transformers(transformers: Any) -> Check:
    for name in OMNI_CLASSES:
        getattr(transformers, name)  # loads the class and all that it imports
    return Check(name="transformers", status="ok", detail=f"{transformers.__version__} with Qwen2.5-Omni")


def _video(av: Any) -> Check:
    """PyAV decodes the atlas's codecs and encodes the mini-atlas's (libx264)."""
    return formats(
        "video", f"PyAV {av.__version__} with FFmpeg {av.ffmpeg_version_info}", CODECS, av.codecs_available, "av"
    )


def _audio(soundfile: Any) -> Check:
    has = f"soundfile {soundfile.__version__} with libsndfile {soundfile.__libsndfile_version__}"
    return formats("audio", has, AUDIO_FORMATS, soundfile.available_formats(), "soundfile")


def _gpu(torch: Any) -> Check:
    """Each GPU's memory and whether the 7B model fits."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cards = [torch.cuda.get_device_properties(index) for index in range(count)]
    if not cards:
        detail = "none usable: the demo and tiny models run, 7B does not"
        return Check(name="gpu", status="warn", detail=detail, required=False)
    largest = max(card.total_memory for card in cards) / GIB
    shown = ", ".join(f"{card.name} {card.total_memory / GIB:.0f} GiB" for card in cards)
    fits: Status = "ok" if largest >= INFERENCE_7B_GIB else "warn"
    return Check(name="gpu", status=fits, detail=f"{shown}; {fits_7b(largest)}", required=False)


PACKAGES: tuple[tuple[str, str, Callable[[Any], Check]], ...] = (
    ("torch", "torch", _torch),
    ("torchvision", "torchvision", _torchvision),
    ("transformers", "transformers", _transformers),
    ("video", "av", _video),
    ("audio", "soundfile", _audio),
    ("gpu", "torch", _gpu),
)
"""what must load, by the name of its check"""


def check_token() -> Check:
    """Whether there is a hub token, in HF_TOKEN or from a login; its value is never shown."""

    def look(hub: Any) -> Check:
        if hub.get_token():
            return Check(name="hub token", status="ok", detail="present", required=False)
        detail = "none; public repositories work, gated ones do not"
        return Check(name="hub token", status="warn", detail=detail, fix="hf auth login", required=False)

    return probe("hub token", "huggingface_hub", look)


def check_hub() -> Check:
    """Whether the hub (HF_ENDPOINT, if set) answers within 5 s."""

    def look(constants: Any) -> Check:
        from hba.remote.request import shown

        address = shown(constants.ENDPOINT)  # what doctor says is pasted into issues
        try:
            with urllib.request.urlopen(constants.ENDPOINT, timeout=ONLINE_SECONDS) as answer:  # noqa: S310
                status = answer.status
        except urllib.error.HTTPError as error:  # it answered, if only to say no
            status = error.code
        except (OSError, ValueError) as error:
            return Check(name="hub", status="missing", detail=f"{address}: {error}", fix=NO_HUB, required=False)
        return Check(name="hub", status="ok", detail=f"{address} answers ({status})", required=False)

    return probe("hub", "huggingface_hub.constants", look)
