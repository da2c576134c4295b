"""docs/tour.md against real commands: a walk names every file of the package that its command enters, and no other."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hba

SOURCE = Path(hba.__file__).parent
TOUR = SOURCE.parents[1] / "docs" / "tour.md"
ENTERED = Path(__file__).parents[1] / "servers" / "entered.py"
WALKS = {"Three steps of training": 40, "Four predictions": 40, "The score": 20, "The report": 20}  # files at most


def named(title):
    """The files of a walk in the document, each once or more."""
    section = TOUR.read_text(encoding="utf-8").split(f"## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"`([\w/]+\.(?:py|html\.jinja))`", section)


@pytest.fixture(scope="module")
def entered(tmp_path_factory, mini_atlas, backbone):
    folder = tmp_path_factory.mktemp("tour")
    sft = [f"atlas={mini_atlas}", f"model.name={backbone}", "train.max_steps=3", "train.validate_every=3"]
    commands = {
        "Three steps of training": ["train", "sft", "--config", "sft_tiny", "--run", "s", *sft],
        "Four predictions": ["predict", "s", "--atlas", str(mini_atlas), "--run", "p", "--limit", "4"],
        "The score": ["score", "p", "--partial"],
        "The report": ["report", "p"],
    }
    found = {}
    for title, command in commands.items():
        out = folder / "entered.json"
        workers = ["loader.workers=0"] if command[0] in ("train", "predict") else []
        env = {**os.environ, "PYTHONPATH": str(SOURCE.parent)}
        done = subprocess.run(
            [sys.executable, ENTERED, out, *command, *workers], cwd=folder, env=env, capture_output=True, text=True
        )
        assert out.is_file(), done.stderr
        assert done.returncode == 0, done.stdout + done.stderr
        found[title] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("title", WALKS)
def test_a_walk_names_every_file_that_its_command_enters(entered, title):
    assert sorted(set(named(title))) == entered[title]


@pytest.mark.parametrize("title", WALKS)
def test_a_walk_stays_short(entered, title):
    assert len(entered[title]) <= WALKS[title]
