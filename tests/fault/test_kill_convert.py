"""A conversion killed at any time goes on with what is missing, and ends with what an uninterrupted one makes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from holding import held, release

from hba.atlas import open_atlas
from hba.atlas.convert import convert_atlas

MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    """40 rows of a megabyte each; the bytes need not be media, since a conversion decodes nothing."""
    folder = tmp_path_factory.mktemp("kill") / "atlas"
    (folder / "a").mkdir(parents=True)
    rng = random.Random(0)
    row = {"problem": "How?", "answer": "anger", "dataset": "cremad", "task": "t", "modality_signature": "text_audio"}
    with (folder / "train.jsonl").open("w") as lines:
        for k in range(40):
            (folder / f"a/{k}.wav").write_bytes(rng.randbytes(MEGABYTE))
            lines.write(json.dumps(row | {"audios": [f"a/{k}.wav"]}) + "\n")
    return folder


def whole(folder):
    """Every file with its bytes, but for the time in the manifest."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "convert.json"
    }


@pytest.mark.parametrize("to", ["parquet", "jsonl"])
def test_killed_and_resumed_equals_uninterrupted(atlas, tmp_path, to):
    source = atlas
    if to == "jsonl":
        source = tmp_path / "shards"
        convert_atlas(atlas, source, to="parquet", shard_bytes=3 * MEGABYTE)
    straight, out = tmp_path / "straight", tmp_path / "killed"
    convert_atlas(source, straight, to=to, shard_bytes=3 * MEGABYTE)
    command = [sys.executable, "-m", "hba", "atlas", "convert", source, out, "--to", to, "--shard-megabytes", "3"]
    command += ["--workers", "2"]
    pattern = "*.parquet" if to == "parquet" else ".convert/*.json"
    finished = {}
    in_the_middle = held(tmp_path, f"{out}/{'convert.json' if to == 'parquet' else 'train.jsonl'}")  # which come last
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for parts in (1, 5):
        process = subprocess.Popen(list(map(str, command)), env=in_the_middle, **quiet)
        deadline = time.monotonic() + 600
        while len(list(out.glob(pattern))) < parts:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(random.Random(parts).random() * 0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (out / "convert.json").exists() and not (out / "train.jsonl").exists()
        for path, changed in finished.items():
            assert path.stat().st_mtime_ns == changed  # what was done is not done again
        finished = {path: path.stat().st_mtime_ns for path in out.glob(pattern)}
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    assert whole(out) == whole(straight)
    assert open_atlas(out, "train").fingerprint == open_atlas(atlas, "train").fingerprint


def test_two_conversions_into_one_folder(atlas, tmp_path):
    command = [sys.executable, "-m", "hba", "atlas", "convert", str(atlas), str(tmp_path / "out"), "--to", "parquet"]
    command += ["--shard-megabytes", "1"]
    there = held(tmp_path, f"{tmp_path / 'out'}/convert.json")  # which comes last
    first = subprocess.Popen(command, env=there, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while not list(Path(tmp_path / "out").glob("*.parquet")):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    second = subprocess.run(command, capture_output=True, text=True)
    release(tmp_path)
    assert first.wait() == 0
    assert second.returncode == 1 and "another process converts into this folder" in second.stderr
