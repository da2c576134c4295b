"""What features are computed with: anything between a sample and its features makes them stale, nothing else."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import hba
from hba.storage import begun
from hba.train.features import Claims, code_between, code_from, start_cache

ROOT = Path(hba.__file__).parent
BEGIN = ("batch/loader.py", "batch/encode.py", "model/omni.py")


def code(root):
    return code_from(root, [root / name for name in BEGIN])


def test_a_change_of_what_a_sample_passes_through_makes_features_stale(tmp_path):
    root = Path(shutil.copytree(ROOT, tmp_path / "hba", ignore=shutil.ignore_patterns("__pycache__")))
    before = code(root)

    def after(name, text):
        file = root / name
        whole = file.read_text()
        file.write_text(whole + text)
        found = code(root)
        file.write_text(whole)
        return found

    for name in ("batch/prompt", "atlas/video", "atlas/audio", "batch/encode", "batch/loader"):
        assert after(f"{name}.py", "\n\nADDED = 1\n").source != before.source, name
    assert after("atlas/video.py", "\n\n# A comment.\n") == before
    for name in ("evaluate/score.py", "rl/rewards.py", "cli/train.py"):
        assert after(name, "\n\nADDED = 1\n") == before, name


def test_packages_that_see_a_sample_s_numbers_count_and_no_others():
    packages = code_between().packages
    assert {"torch", "numpy", "transformers", "av", "soundfile", "soxr"} <= packages.keys()
    assert not {"httpx", "rich", "typer"} & packages.keys()
    assert code_between() == code_between()


def test_a_card_that_says_something_else_removes_the_shards_and_gives_another_key(tmp_path, caplog):
    key = start_cache(tmp_path, {"model": "a", "packages": {"av": "1"}})
    (tmp_path / "shard_00000.safetensors").write_bytes(b"")
    assert start_cache(tmp_path, {"model": "a", "packages": {"av": "1"}}) == key
    assert (tmp_path / "shard_00000.safetensors").exists()
    assert start_cache(tmp_path, {"model": "a", "packages": {"av": "2"}}) != key
    assert not (tmp_path / "shard_00000.safetensors").exists()
    assert "another packages" in caplog.text


def test_what_a_killed_process_had_begun_of_a_shard_is_removed_and_nothing_else(tmp_path):
    start_cache(tmp_path, {"model": "a"})
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    shard = tmp_path / "shard_00000.safetensors"
    own = begun(shard)
    of_the_dead = own.with_name(own.name.replace(f"-{os.getpid()}-", f"-{ended.pid}-"))
    for path in (own, of_the_dead, shard):
        path.write_bytes(b"half")
    start_cache(tmp_path, {"model": "a"})
    assert own.exists() and shard.exists() and not of_the_dead.exists()


def test_a_shard_is_one_process_s_until_that_ends(tmp_path):
    """Here a fork stands for another rank: record locks belong to a process."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        Claims(tmp_path).take(0)
        os.write(told, b"1")
        signal.pause()
    os.read(ready, 1)
    with Claims(tmp_path) as claims:
        assert not claims.take(0)
        assert claims.take(1)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert claims.take(0)
        claims.free(0)
