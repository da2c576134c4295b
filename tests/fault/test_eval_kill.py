"""`hba eval suite.yaml`, killed while it judges and while it scores: the same command ends with the same numbers."""

import json
import signal
import subprocess
import sys

# An entry point that ends itself by SIGKILL: at the write number `count` of a file `name`, before it happens. An append
# is a write, so is the rename of a file that is written whole.
KILLED = """\
import os, signal, sys
from pathlib import Path
from hba import storage
from hba.cli import main

name, left = sys.argv[1], int(sys.argv[2])

def counted(real, path):
    def call(*arguments):
        global left
        if Path(path(*arguments)).name == name:
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)
    return call

storage.AppendLog.append = counted(storage.AppendLog.append, lambda log, record: log.path)
Path.replace = counted(Path.replace, lambda temporary, place: place)
sys.argv = ["hba", *sys.argv[3:]]
main()
"""
SUITE = """\
atlas: {atlas}
run: {run}
per_dataset: 2
judge: j
judge_url: {judge}
settings:
  often: {{model: majority}}
  chance: {{model: random}}
"""
KILLS = (("judgements.jsonl", 3), ("judge.json", 1), ("metrics.json", 2), ("suite.json", 1))


def suite(tmp_path, atlas, name, judge):
    file = tmp_path / f"{name}.yaml"
    file.write_text(SUITE.format(atlas=atlas, run=tmp_path / name, judge=judge.url))
    return file


def numbers(found):
    settings = {name: each["metrics"]["tasks"] for name, each in found["settings"].items()}
    entries = [row for row in found["leaderboard"]["entries"] if not row["published"]]
    return settings, found["differences"], [(row["name"], row["mean"], row["mean_rank"]) for row in entries]


def test_killed_while_judging_and_scoring_a_suite_ends_with_the_same_numbers(
    hba, mini_atlas, tmp_path, chat_server, monkeypatch
):
    judge = chat_server("judge")
    monkeypatch.setenv("HBA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "killed.py").write_text(KILLED)
    file = suite(tmp_path, mini_atlas, "killed", judge)
    for name, count in KILLS:
        command = [sys.executable, tmp_path / "killed.py", name, str(count), "eval", file]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240)
        assert done.returncode == -signal.SIGKILL, (name, done.stderr)
        assert not (tmp_path / "killed" / "suite.json").exists(), name
    code, out, err = hba("eval", file, "--json")
    assert code == 0, err
    found, asked = json.loads(out), judge.stats()["answered"]
    assert all(each["left"] == 0 and each["judged"] == 0 for each in found["ahead"])
    verdicts = sum(each["judged"]["verdicts"] for each in found["settings"].values())
    assert verdicts > 0 and asked <= verdicts + 8  # what was under way when it was killed is asked again, nothing else
    monkeypatch.setenv("HBA_CACHE", str(tmp_path / "another"))
    straight = hba("eval", suite(tmp_path, mini_atlas, "straight", judge), "--json")
    assert straight[0] == 0 and numbers(found) == numbers(json.loads(straight[1]))
