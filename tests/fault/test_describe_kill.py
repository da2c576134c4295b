"""kill -9 of `hba atlas describe` at random points: nothing lost, nothing doubled, the same bytes as without."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from holding import held

from hba.descriptors.describe import run
from hba.errors import MachineError
from hba.parallel import Died

pytest.importorskip("opensmile", reason="opensmile is not installed: pip install 'human-behavior-atlas[descriptors]'")
NUM_SOUNDS, NUM_ROWS, KILLS = 60, 90, 5


def make_atlas(root: Path) -> Path:
    rng = np.random.default_rng(0)
    (root / "a").mkdir(parents=True)
    for i in range(NUM_SOUNDS):
        soundfile.write(root / "a" / f"{i}.wav", rng.normal(0, 0.1, 6000), 16_000)
    about = {"problem": "How?", "answer": "anger", "dataset": "cremad", "task": "x_cls"}
    rows = [
        {**about, "modality_signature": "text_audio", "audios": [f"a/{i % NUM_SOUNDS}.wav"], "id": f"r{i}"}
        for i in range(NUM_ROWS)
    ]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def start(root: Path, environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "hba", "atlas", "describe", str(root), "--video", "none", "--workers", "2"]
    given: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    return subprocess.Popen([*command, "--audio", "egemaps"], start_new_session=True, **given)


def entries(root: Path) -> list[dict[str, Any]]:
    """The whole lines of the manifest, which may be torn at its end while nobody works on it."""
    manifest = root / "describe" / "manifest.jsonl"
    data = manifest.read_bytes() if manifest.is_file() else b""
    return [json.loads(line) for line in data.split(b"\n")[:-1]]


def num_done(root: Path) -> int:
    return sum(entry["state"] == "done" for entry in entries(root))


def digests(root: Path) -> dict[str, str]:
    files = [p for p in sorted((root / "opensmile_egemaps").rglob("*")) if p.is_file()]
    found = {}
    for path in files:
        with suppress(FileNotFoundError):  # what a process that was killed had begun may go while this looks
            found[str(path.relative_to(root))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def is_there(group: int) -> bool:
    """Whether a process of a group lives."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def kill_after(root: Path, new_items: int, moment: float, started: list[int], *, everyone: bool) -> None:
    """Start a run and kill it `moment` seconds after so many more items are done, before it has written its rows."""
    before_the_end = held(root.parent, str(root / "train.jsonl"))
    aim, process = min(num_done(root) + new_items, NUM_SOUNDS), start(root, before_the_end)
    started.append(process.pid)
    while num_done(root) < aim:
        assert process.poll() is None
        time.sleep(0.002)
    time.sleep(moment)
    assert process.poll() is None
    if everyone:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()  # its workers are left to find out by themselves
    process.wait()


@pytest.mark.slow
def test_kill_9_at_random_points(tmp_path: Path) -> None:
    undisturbed, root = make_atlas(tmp_path / "undisturbed"), make_atlas(tmp_path / "atlas")
    assert start(undisturbed).wait() == 0
    before = (root / "train.jsonl").read_bytes()
    chance, started = random.Random(1), list[int]()
    for attempt in range(KILLS):
        kill_after(root, chance.randint(0, 12), chance.uniform(0, 0.1), started, everyone=attempt % 2 == 0)
        assert (root / "train.jsonl").read_bytes() == before  # rows are written last
        done = {entry["output"] for entry in entries(root) if entry["state"] == "done"}
        assert done <= set(digests(root))  # what is entered as done stands whole under its name
        for name in digests(root):
            if not Path(name).name.startswith("."):
                assert torch.load(root / name, weights_only=True)["features"].shape == (88,)
    deadline = time.monotonic() + 600
    while any(map(is_there, started)):  # what a worker that is still there had begun is not cleared away
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert start(root).wait() == 0
    assert digests(root) == digests(undisturbed)  # every file, once, and no leftovers
    assert (root / "train.jsonl").read_bytes() == (undisturbed / "train.jsonl").read_bytes()
    rows = [json.loads(line) for line in (root / "train.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"r{i}" for i in range(NUM_ROWS)]
    assert all(len(row["ext_audio_feats"]) == 1 for row in rows)
    times = Counter(entry["output"] for entry in entries(root) if entry["state"] == "done")
    assert set(times.values()) == {1}  # no finished item was worked on again
    assert len(times) == NUM_SOUNDS
    (kept,) = (root / "describe").glob("train.*.jsonl")
    assert kept.read_bytes() == before


def test_a_crash_of_the_extractor_costs_one_item(tmp_path: Path) -> None:
    """A worker killed in the middle of an item: the item is recorded, the others are done."""
    root = make_atlas(tmp_path / "atlas")
    process = start(root, held(tmp_path, "*/opensmile_egemaps/a/20.wav.pt"))  # an item that is not done
    while not (begun := list(root.rglob(".20.wav.pt.*.tmp"))):
        assert process.poll() is None
        time.sleep(0.002)
    os.kill(int(begun[0].name.split(".")[-2].split("-")[2]), signal.SIGKILL)  # the process that is at it
    assert process.wait() == 2
    lines = (root / "describe" / "describe_failures.jsonl").read_text().splitlines()
    (failed,) = [json.loads(line) for line in lines]
    assert "was killed (SIGKILL)" in failed["reason"]
    linked = [json.loads(line).get("ext_audio_feats") for line in (root / "train.jsonl").read_text().splitlines()]
    assert linked.count(None) in (1, 2)  # a sound stands in one or two rows
    begun[0].with_name(begun[0].name.replace(".20.", ".0.")).write_bytes(b"half")  # of an item that is done
    assert start(root).wait() == 0
    assert len(digests(root)) == NUM_SOUNDS
    assert (root / "describe" / "describe_failures.jsonl").read_text() == ""


def troubled(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 5:
        raise ValueError("no")
    return number * number


def away(number: int) -> int:
    raise MachineError("storage is away", where=f"medium {number}")


@pytest.mark.parametrize("executor", ["processes", "ray"])
def test_what_the_machine_lacks_ends_the_run_and_is_no_fault_of_the_item(executor: str) -> None:
    if executor == "ray":
        ray = pytest.importorskip("ray", reason="ray is not installed: pip install ray")
        ray.cloudpickle.register_pickle_by_value(sys.modules[away.__module__])
    with pytest.raises(MachineError, match="medium 3: storage is away"):
        list(run(away, [3], executor=executor, workers=1, patience=lambda _: 300.0))


@pytest.mark.parametrize("executor", ["processes", "ray"])
def test_both_executors_lose_one_item_to_a_crash_and_go_on(executor: str) -> None:
    if executor == "ray":
        ray = pytest.importorskip("ray", reason="ray is not installed: pip install ray")
        ray.cloudpickle.register_pickle_by_value(sys.modules[troubled.__module__])  # its workers cannot import tests
    done = {d.item: d.result for d in run(troubled, range(9), executor=executor, workers=2, patience=lambda _: 300.0)}
    lost = {number: done.pop(number) for number in (3, 5)}
    assert done == {number: number * number for number in (0, 1, 2, 4, 6, 7, 8)}
    assert isinstance(lost[3], Died)
    assert lost[5] == Died("raised ValueError: no")
