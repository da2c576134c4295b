"""The environment of its own in which MediaPipe runs, and the script that runs there.

mediapipe 0.10.21 is the last release whose wheel carries the models; it declares numpy < 2 and protobuf < 5, which
hba's own environment cannot meet. `set_up` makes a venv below the user's cache with exact versions (landmarks.txt),
installed without their declared dependencies: those bring jax, a second OpenCV that needs X libraries, and 600 MB.
The last file written marks an environment as whole; one without it is made anew. docs/decisions.md gives the reasons.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hba.errors import HbaError
from hba.storage import cache_folder, file_sha256, read_json, write_json

if TYPE_CHECKING:
    from hba.doctor import Check

MEDIAPIPE = "0.10.21"
REQUIREMENTS = Path(__file__).with_name("landmarks.txt")
SCRIPT = Path(__file__).with_name("holistic_script.py")
SET_UP = "Run `hba atlas describe --setup` (400 MB, once), or pass --video none."
_MARK = "hba.json"


def _interpreter() -> tuple[str, str]:
    """(version, executable) of the Python that has MediaPipe's wheels: this one, or else an older one of the PATH."""
    own = "{}.{}".format(*sys.version_info)
    others = ((version, shutil.which(f"python{version}")) for version in ("3.12", "3.11"))
    found = next(((version, path) for version, path in others if path), ("3.12", ""))
    return (own, sys.executable) if sys.version_info < (3, 13) else found


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
