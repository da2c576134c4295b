"""The environment of MediaPipe when it is missing, broken, or ends in the middle of a clip."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from hba.descriptors.describe import describe
from hba.descriptors.items import Settings
from hba.descriptors.landmarks import Holistic, check_landmarks, environment_folder, python_of_environment, set_up
from hba.errors import HbaError, MediaError
from hba.storage import write_json

GREY = np.full((8, 8, 3), 127, np.uint8)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HBA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def stand_in(script: str) -> None:
    """An environment whose interpreter is this script for sh; `python` in it is the one of the test."""
    python = environment_folder() / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\npython={sys.executable}\n{script}\n")
    python.chmod(0o755)
    write_json(environment_folder() / "hba.json", {"mediapipe": "0.10.21"})


def test_without_the_environment_nothing_begins_and_the_fix_is_named(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}\n")
    with pytest.raises(HbaError, match=r"not set up.*hba atlas describe --setup"):
        describe(tmp_path, Settings(audio=None, video="holistic"))
    assert not (tmp_path / "describe").exists()
    assert (check_landmarks().status, check_landmarks().required) == ("missing", False)


def test_an_environment_that_was_left_half_made_does_not_count(cache: Path) -> None:
    stand_in("exit 0")
    assert python_of_environment().exists()
    (environment_folder() / "hba.json").unlink()
    with pytest.raises(HbaError, match="not set up"):
        python_of_environment()


def test_a_failing_installer_is_quoted_and_leaves_no_mark(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(HbaError, match=r"cannot set up.*No matching distribution"):
        set_up()
    assert not (environment_folder() / "hba.json").exists()


@pytest.mark.parametrize("there", ["python3.11", None])
def test_a_python_without_wheels_uses_an_older_one_or_says_which_to_install(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str | None
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 14, 0, "final", 0))
    monkeypatch.setenv("PATH", str(tmp_path))
    if there:
        (tmp_path / there).write_text("#!/bin/sh\necho called $* >&2; [ $1 = -c ]\n")
        (tmp_path / there).chmod(0o755)
    if there == "python3.11":  # beside what a manager of versions lays there for one that is not chosen
        (tmp_path / "python3.12").write_text("#!/bin/sh\nexit 127\n")
        (tmp_path / "python3.12").chmod(0o755)
    said = r"called -m venv" if there else r"wheels for Python 3\.11 and 3\.12"
    with pytest.raises(HbaError, match=said) as raised:
        set_up()
    assert there or "Install Python 3.12 beside it" in str(raised.value)


def test_a_broken_mediapipe_is_said_with_its_last_words(cache: Path) -> None:
    stand_in('echo "W0000 a mere warning" >&2; echo "ImportError: libEGL.so.1" >&2; exit 3')
    with pytest.raises(HbaError, match=r"does not start.*exit code 3, ImportError: libEGL.so.1.*--setup"):
        Holistic()


def test_a_mediapipe_that_ends_in_a_clip_fails_that_clip(cache: Path) -> None:
    stand_in("echo 0.10.21; head -c 20 > /dev/null; exit 7")
    holistic = Holistic()
    with pytest.raises(MediaError, match=r"row 1: MediaPipe ended: exit code 7"):
        holistic.extract([GREY, GREY], where="row 1")
    assert not holistic.alive


def test_landmarks_that_are_not_numbers_are_refused(cache: Path) -> None:
    answer = "import struct,sys; sys.stdout.buffer.write(struct.pack('<f', float('nan')) * 1629)"
    stand_in(f'echo 0.10.21; head -c 100 > /dev/null; exec "$python" -c "{answer}"')
    with pytest.raises(MediaError, match="row 2: MediaPipe gave NaN"):
        Holistic().extract([GREY], where="row 2")
