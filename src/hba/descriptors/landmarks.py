"""MediaPipe's holistic landmarks of a clip: pose, face and hands of one person, frame by frame.

MediaPipe runs in an environment of its own, as a child process that lives as long as its owner and is
told where a clip begins, so that no clip's result depends on the one before. Saved as published: {pose, face,
left_hand, right_hand}, each [T, P, (x, y, confidence)]. In a frame where a part is not seen its points are (0, 0) with
confidence 0, which says so; a clip in which nobody is seen at all is a MediaError and gets no file.

Shapes: T frames, P points (33 pose, 468 face, 21 for each hand).
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hba.atlas.media import Image
from hba.errors import HbaError, MediaError
from hba.storage import cache_folder, file_sha256, read_json, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from hba.doctor import Check


# The environment of its own in which MediaPipe runs, and the script that runs there.
#
# mediapipe 0.10.21 is the last release whose wheel carries the models; it declares numpy < 2 and protobuf < 5, which
# hba's own environment cannot meet. `set_up` makes a venv below the user's cache with exact versions (landmarks.txt),
# installed without their declared dependencies: those bring jax, a second OpenCV that needs X libraries, and 600 MB.
# The last file written marks an environment as whole; one without it is made anew. docs/decisions.md gives the reasons.


MEDIAPIPE = "0.10.21"
REQUIREMENTS = Path(__file__).with_name("landmarks.txt")
SCRIPT = Path(__file__).with_name("holistic_script.py")
SET_UP = "Run `hba atlas describe --setup` (400 MB, once), or pass --video none."
_MARK = "hba.json"


def _interpreter() -> tuple[str, str]:
    """(version, executable) of the Python that has MediaPipe's wheels: this one, or else an older one of the PATH that
    runs: what pyenv lays there for a version that is not chosen does not."""
    if sys.version_info < (3, 13):
        return "{}.{}".format(*sys.version_info), sys.executable
    for version in ("3.12", "3.11"):
        path = shutil.which(f"python{version}")
        if path and subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0:  # noqa: S603
            return version, path
    return "3.12", ""


def environment_folder() -> Path:
    """The folder of the environment for its Python and these requirements, there or not."""
    return cache_folder() / f"mediapipe-{MEDIAPIPE}-py{_interpreter()[0]}-{file_sha256(REQUIREMENTS)[:8]}"


def python_of_environment() -> Path:
    """The interpreter that has MediaPipe. Raises HbaError when the environment is not set up."""
    folder = environment_folder()
    python = folder / "bin" / "python"
    if not (folder / _MARK).is_file() or not python.exists():
        raise HbaError("the environment for MediaPipe landmarks is not set up", where=str(folder), fix=SET_UP)
    return python


def set_up() -> Path:
    """Make the environment unless it stands, and return its folder. Raises HbaError with the installer's last words."""
    folder = environment_folder()
    if (folder / _MARK).is_file():
        return folder
    version, executable = _interpreter()
    if not executable:
        what = f"MediaPipe {MEDIAPIPE} has wheels for Python 3.11 and 3.12, and this is {sys.version.split()[0]}"
        fix = f"Install Python {version} beside it, so that `python{version}` is on the PATH, or pass --video none."
        raise HbaError(what, where=sys.executable, fix=fix)
    folder.parent.mkdir(parents=True, exist_ok=True)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-deps"]
    _run([executable, "-m", "venv", "--clear", str(folder)], "Install the venv module of this Python.")
    _run([*pip, "-r", str(REQUIREMENTS)], "Check the network or the package index; wheels are needed.")
    _run([str(python), "-I", str(SCRIPT), "--check"], "mediapipe has wheels for Linux x86-64 and macOS only.")
    write_json(folder / _MARK, {"mediapipe": MEDIAPIPE, "requirements": file_sha256(REQUIREMENTS)})
    return folder


def _run(command: list[str], fix: str) -> None:
    # PYTHONPATH and the like belong to the caller's environment.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)  # noqa: S603
    if done.returncode != 0:
        said = " ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-3:])
        what = f"cannot set up the environment for landmarks: {said or f'exit code {done.returncode}'}"
        raise HbaError(what, where=" ".join(command[:4]), fix=fix)


def check_landmarks() -> Check:
    """What `hba doctor` says of the environment."""
    from hba.doctor import Check

    name, folder = "landmarks", environment_folder()
    if not (folder / _MARK).is_file():
        return Check(name=name, status="missing", detail="not set up", fix=SET_UP, required=False)
    version = read_json(folder / _MARK)["mediapipe"]
    return Check(name=name, status="ok", detail=f"mediapipe {version} in {folder}", required=False)


# --- landmarks of a clip ----------------------------------------------------------------------------------------------


POINTS = {"pose": 33, "face": 468, "left_hand": 21, "right_hand": 21}
_NUM_POINTS = sum(POINTS.values())
_FRAME_BYTES = _NUM_POINTS * 3 * 4
_HEADER = struct.Struct("<II")
_WARNING = re.compile(r"[IW]\d{4} |(INFO|WARNING): ")
_END_SECONDS = 5.0


def extractor_id(frames_per_second: float | None) -> str:
    """What the manifest calls this extractor."""
    rate = "every frame" if frames_per_second is None else f"{frames_per_second:g} frames a second"
    return f"mediapipe {MEDIAPIPE} holistic complexity 1, {rate}"


class Holistic:
    """The child process with MediaPipe. Raises HbaError when its environment is missing or it does not start."""

    def __init__(self) -> None:
        python = python_of_environment()
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        self._process = subprocess.Popen(  # noqa: S603
            [str(python), "-I", str(SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
        )
        self._said: deque[bytes] = deque(maxlen=20)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        assert self._process.stdin and self._process.stdout
        self._in, self._out = self._process.stdin, self._process.stdout
        version = self._out.readline().decode(errors="replace").strip()
        if version != MEDIAPIPE:
            self._wait()
            what = f"MediaPipe does not start in its environment: {version or self._last_words()}"
            raise HbaError(what, where=str(python), fix=f"Remove its folder. {SET_UP}")

    def _wait(self) -> None:
        """Let it end by itself, so that its exit code tells why."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)
        self._listener.join(_END_SECONDS)
        self.close()

    def _listen(self) -> None:
        assert self._process.stderr
        self._said.extend(self._process.stderr)

    def _last_words(self) -> str:
        """How it ended, and its last line that is no mere warning of its libraries."""
        said = [line.decode(errors="replace").strip() for line in list(self._said)]
        last = next((line for line in reversed(said) if line and not _WARNING.match(line)), "without a word")
        return f"exit code {self._process.poll()}, {last[:300]}"

    def extract(self, frames: Iterable[Image], *, where: str) -> dict[str, Tensor]:
        """The landmarks of `frames` (uint8 [H, W, 3] RGB), float32 [T, P, 3] by part, x and y in 0..1 of the frame.

        Raises MediaError when nobody is seen in any frame or MediaPipe fails on one; it can then not be used again.
        """
        import torch

        points_T = [self._ask(frame, first=number == 0, where=where) for number, frame in enumerate(frames)]
        if not points_T:
            raise MediaError("holds no frames", where=where, fix="Restore the file, or leave the sample out.")
        points_TPC = np.stack(points_T)
        if not np.isfinite(points_TPC).all():
            raise MediaError("MediaPipe gave NaN or infinite values", where=where, fix="Leave the sample out.")
        if not points_TPC[:, :, 2].any():
            what = f"MediaPipe sees nobody in any of {len(points_TPC):,} frames"
            raise MediaError(what, where=where, fix="Leave the sample out, or pass --video none.")
        split = np.split(points_TPC, np.cumsum(list(POINTS.values()))[:-1], axis=1)
        return {name: torch.from_numpy(part.copy()) for name, part in zip(POINTS, split, strict=True)}

    def _ask(self, frame: Image, *, first: bool, where: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        height, width, _ = frame.shape
        try:
            if first:
                self._in.write(_HEADER.pack(0, 0))
            self._in.write(_HEADER.pack(height, width))
            self._in.write(np.ascontiguousarray(frame, np.uint8).tobytes())
            self._in.flush()
            data = self._out.read(_FRAME_BYTES)
        except (BrokenPipeError, ConnectionResetError):
            data = b""
        if len(data) < _FRAME_BYTES:
            self._wait()
            raise MediaError(f"MediaPipe ended: {self._last_words()}", where=where, fix="Leave the sample out.")
        return np.frombuffer(data, "<f4").reshape(_NUM_POINTS, 3)

    @property
    def alive(self) -> bool:
        """Whether the process can take another clip."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait(_END_SECONDS)
        with suppress(BrokenPipeError):  # what lay ready for it is lost with it
            self._in.close()
        self._out.close()
