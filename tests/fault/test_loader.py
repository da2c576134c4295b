"""Workers that crash, hang and fail: the bad sample is named, the epoch goes on, no batch is lost, doubled or moved."""

import gc
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hba.atlas import open_atlas
from hba.batch.config import EncodeConfig, LoaderConfig
from hba.batch.encode import Encoded, Encoder
from hba.batch.loader import DEATHS_WITHOUT_RESULT, load_batches
from hba.config import load_config
from hba.errors import ConfigError, HbaError, InputError, MediaError
from hba.run import RunFolder
from hba.train.config import SftConfig
from hba.train.sft import train_sft

VICTIM = 5
PLAN = [np.arange(k, k + 4) for k in range(0, 24, 4)]


class TinyEncoder(Encoder):
    """Encodes a row as its number; `fate` is called first, and `log` holds a line for every call."""

    def __init__(self, log, fate=None):
        super().__init__(None, EncodeConfig())
        self.log, self.fate = log, fate

    pad_token_id = 0

    def encode(self, sample):
        with self.log.open("a") as log:
            log.write(f"{sample.number}\n")
        if self.fate is not None:
            self.fate(sample)
        ids = torch.full((1 + sample.number % 3,), sample.number)
        pixels = torch.full((2, 3), float(sample.number))
        return Encoded(sample=sample, input_ids_T=ids, media={"pixel_values": pixels})


@pytest.fixture
def atlas(mini_atlas):
    return open_atlas(mini_atlas, split="train")


@pytest.fixture
def batches(atlas, tmp_path):
    """The batches of a plan, and how often each row was encoded."""

    def load(fate=None, plan=PLAN, workers=2, start=0, **options):
        log = tmp_path / f"{time.monotonic_ns()}.log"
        log.touch()
        config = LoaderConfig(workers=workers, **options)
        found = list(load_batches(atlas, TinyEncoder(log, fate), plan, config, start=start))
        calls = [int(line) for line in log.read_text().split()]
        return found, {row: calls.count(row) for row in set(calls)}

    return load


def numbers(batch):
    return [sample.number for sample in batch.samples]


def loaders():
    """The workers of loaders that are there."""
    return [child for child in multiprocessing.active_children() if child.name == "hba-loader"]


def equal(one, other):
    return (
        [s.id for s in one.samples] == [s.id for s in other.samples]
        and one.inputs.keys() == other.inputs.keys()
        and all(torch.equal(one.inputs[name], other.inputs[name]) for name in one.inputs)
        and torch.equal(one.class_index_B, other.class_index_B)
        and one.quarantined == other.quarantined
    )


def broken(sample):
    if sample.number % 7 == VICTIM:
        raise MediaError("is empty (0 bytes)", where=f"{sample.where}, audios", fix="Restore it.")


# --- the same batches, whoever prepares them -------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("cache_megabytes", [0, 256])
def test_workers_change_nothing(batches, workers, cache_megabytes):
    rng = np.random.default_rng(workers)
    plan = [rng.integers(0, 20, rng.integers(1, 9)) for _ in range(30)]  # rows repeat, within a batch, too
    alone, _ = batches(broken, plan, workers=0, start=3)
    together, _ = batches(broken, plan, workers=workers, start=3, prefetch_megabytes=1, cache_megabytes=cache_megabytes)
    assert len(together) == 27 and all(map(equal, together, alone))
    assert sum(len(batch.quarantined) for batch in together) > 0


def test_real_samples_come_back_bit_for_bit(atlas, model):
    encoder = Encoder(model.processor, EncodeConfig(num_frames=2, max_pixels=3136))
    plan = [np.array([0, 7]), np.array([31, 4, 2]), np.array([7])]
    alone = list(load_batches(atlas, encoder, plan, LoaderConfig(workers=0)))
    together = list(load_batches(atlas, encoder, plan, LoaderConfig(workers=1)))
    assert all(map(equal, together, alone))
    assert together[0].samples[0].source is atlas[0].source  # the store is shared, not copied with each sample


@pytest.mark.parametrize("workers", [0, 2])
def test_encoded_samples_are_kept_for_the_next_epoch(batches, workers):
    found, calls = batches(plan=PLAN * 3, workers=workers)
    assert len(found) == 18 and set(calls.values()) == {1}
    _, calls = batches(plan=PLAN * 3, workers=workers, cache_megabytes=0, prefetch_megabytes=0)
    assert set(calls.values()) == {3}


@pytest.mark.parametrize("size", [1, 8])
def test_workers_are_ahead_by_bytes_whatever_the_size_of_a_batch(atlas, tmp_path, size):
    """Of 1 MB rows, 16 lie ready; each worker holds one more at either end of its socket."""

    class Large(TinyEncoder):
        def encode(self, sample):
            return replace(super().encode(sample), media={"pixel_values": torch.zeros(1 << 18)})

    log, plan = tmp_path / "log", [np.arange(start, start + size) for start in range(0, 64, size)]
    config = LoaderConfig(workers=2, prefetch_megabytes=16, cache_megabytes=0)
    batches = load_batches(atlas, Large(log), plan, config)
    next(batches)
    deadline = time.monotonic() + 600
    while (ahead := len(log.read_text().split()) - size) < 16:
        assert time.monotonic() < deadline, ahead
        time.sleep(0.02)
    time.sleep(0.5)
    assert len(log.read_text().split()) - size <= 16 + 2 * 3
    batches.close()


def test_nothing_is_left_behind(atlas, tmp_path):
    assert atlas[0].id  # the atlas opens its file
    gc.collect()  # what others left
    before = set(Path("/proc/self/fd").iterdir())
    stream = load_batches(atlas, TinyEncoder(tmp_path / "log"), PLAN, LoaderConfig(workers=2))
    next(stream)
    assert len(loaders()) == 2
    stream.close()
    assert not loaders()
    assert set(Path("/proc/self/fd").iterdir()) <= before


# --- samples that take their worker along ----------------------------------------------------------------------------


def _kill(number):
    os.kill(os.getpid(), number)


def _catastrophic_regex():
    re.match(r"(a+)+$", "a" * 64 + "b")  # for ever, without letting go of the interpreter


ENDS = {
    "segmentation fault": (lambda: _kill(signal.SIGSEGV), "decoding ends its process: SIGSEGV"),
    "abort": (os.abort, "decoding ends its process: SIGABRT"),
    "exit": (lambda: os._exit(3), "decoding ends its process: exit code 3"),
    "clean exit": (lambda: os._exit(0), "decoding ends its process: exit code 0"),
    "sys.exit": (lambda: sys.exit(4), "decoding ends its process: exit code 4"),
    "hang": (lambda: time.sleep(1000), "decoding takes longer than 1.5 s"),
    "hang with the interpreter locked": (_catastrophic_regex, "decoding takes longer than 1.5 s"),
}


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_sample_that_ends_its_worker_is_quarantined(batches, atlas, name, workers):
    end, reason = ENDS[name]
    seconds = 1.5 if "hang" in name else 600.0  # a fork counts, too, and this process may be large
    whole, _ = batches(plan=PLAN * 2, workers=0)
    found, calls = batches(
        lambda sample: end() if sample.number == VICTIM else None,
        PLAN * 2,
        workers,
        decode_timeout_seconds=seconds,
    )
    assert [numbers(b) for b in found] == [[n for n in numbers(b) if n != VICTIM] for b in whole]
    hit = [k for k, batch in enumerate(PLAN * 2) if VICTIM in batch]
    assert all(equal(a, b) for k, (a, b) in enumerate(zip(found, whole, strict=True)) if k not in hit)
    for k, batch in enumerate(found):
        assert [q.id for q in batch.quarantined] == ([atlas[VICTIM].id] if k in hit else [])
    record = found[hit[0]].quarantined[0]
    assert record in atlas.quarantine
    assert record.reason == f"{reason} (2 attempts)" and record.where == atlas[VICTIM].where
    assert calls[VICTIM] == 2  # tried again once, and in the second epoch not at all


def test_many_samples_that_crash_are_told_apart(batches):
    bad = {4, 5, 6, *range(8, 30, 2)}  # more deaths than end a run in which no sample is ever finished
    plan = [np.arange(k, k + 6) for k in range(0, 30, 6)]
    found, _ = batches(lambda sample: os._exit(1) if sample.number in bad else None, plan, workers=1)
    assert [n for batch in found for n in numbers(batch)] == [n for n in range(30) if n not in bad]
    assert len([q for batch in found for q in batch.quarantined]) == len(bad) > DEATHS_WITHOUT_RESULT / 2


def test_a_sample_whose_worker_is_killed_once_is_served(batches, tmp_path):
    def killed_once(sample):
        if sample.number == VICTIM and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            _kill(signal.SIGKILL)

    found, calls = batches(killed_once)
    assert [n for batch in found for n in numbers(batch)] == list(range(24))
    assert not any(batch.quarantined for batch in found) and calls[VICTIM] == 2


def test_workers_that_die_whatever_they_decode_end_the_run(batches):
    with pytest.raises(HbaError, match=r"20 worker processes failed and no sample was finished; last: .*SIGSEGV"):
        batches(lambda sample: _kill(signal.SIGSEGV))
    assert not loaders()


# --- errors that are not the medium's --------------------------------------------------------------------------------


class LocalError(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} {two}")


def _input_error():
    raise InputError("field 'x': is wrong", where="f.jsonl:6", fix="Repair it.")


def _bug():
    return {}["no such key"]


def _error_that_cannot_travel():
    raise LocalError(1, 2)


ERRORS = {
    "input": (_input_error, InputError, "f.jsonl:6: field 'x': is wrong. Fix: Repair it."),
    "bug": (_bug, KeyError, "'no such key'"),
    "foreign": (_error_that_cannot_travel, RuntimeError, "LocalError: 1 2"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_other_errors_end_the_run_when_their_batch_comes(atlas, tmp_path, name):
    fail, kind, message = ERRORS[name]
    encoder = TinyEncoder(tmp_path / "log", lambda sample: fail() if sample.number == 9 else None)
    stream = load_batches(atlas, encoder, PLAN, LoaderConfig(workers=2))
    assert numbers(next(stream)) == [0, 1, 2, 3] and numbers(next(stream)) == [4, 5, 6, 7]
    with pytest.raises(kind) as caught:
        next(stream)
    assert str(caught.value) == message
    assert fail.__name__ in str(caught.value.__cause__)  # the traceback of the worker
    assert not loaders()


BAD_SETTINGS = ["workers=-2", "prefetch_megabytes=-1", "cache_megabytes=-1", "decode_timeout_seconds=0"]


@pytest.mark.parametrize("bad", BAD_SETTINGS)
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ConfigError, match=f"key 'loader.{bad.partition('=')[0]}': expected"):
        load_config(SftConfig, None, ["atlas=x", f"loader.{bad}"])


# --- kill -9 ---------------------------------------------------------------------------------------------------------

ORPHANS = """
import sys, time
from pathlib import Path
import numpy as np, multiprocessing
from hba.atlas import open_atlas
from hba.batch.encode import Encoder
from hba.batch.config import EncodeConfig
from hba.batch.loader import load_batches
from hba.batch.config import LoaderConfig
from hba.batch.loader import DEATHS_WITHOUT_RESULT

class Slow(Encoder):
    pad_token_id = 0
    def encode(self, sample):
        Path(sys.argv[2], str(__import__("os").getpid())).touch()
        time.sleep(1000)

atlas = open_atlas(sys.argv[1], split="train")
list(load_batches(atlas, Slow(None, EncodeConfig()), [np.arange(8)], LoaderConfig(workers=2)))
"""


def test_workers_die_with_their_parent(mini_atlas, tmp_path):
    script = tmp_path / "orphans.py"  # has no __main__ guard, as many scripts
    script.write_text(ORPHANS)
    (tmp_path / "pids").mkdir()
    parent = subprocess.Popen([sys.executable, script, mini_atlas, tmp_path / "pids"])
    _wait_until(lambda: len(list((tmp_path / "pids").iterdir())) == 2 or parent.poll() is not None, seconds=600)
    workers = [path.name for path in (tmp_path / "pids").iterdir()]
    assert len(workers) == 2 and all(Path("/proc", pid).exists() for pid in workers)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    _wait_until(lambda: not any(_alive(pid) for pid in workers), seconds=300)


def _alive(pid):
    try:
        return Path("/proc", pid, "stat").read_text().rsplit(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _wait_until(done, seconds):
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- a run -----------------------------------------------------------------------------------------------------------


def test_training_goes_on_without_the_sample_that_kills(tmp_path, mini_atlas, backbone, monkeypatch):
    encode = Encoder.encode
    (victim,) = [s.id for s in open_atlas(mini_atlas, split="train").filter(datasets=["tess"])][:1]

    def deadly(self, sample):
        if sample.id == victim:
            _kill(signal.SIGSEGV)
        return encode(self, sample)

    monkeypatch.setattr(Encoder, "encode", deadly)  # workers are forks of this process
    config = load_config(
        SftConfig,
        None,
        [
            *(f"atlas={mini_atlas}", f"model.name={backbone}", "model.strategy=full", "datasets=[tess]"),
            *("train.epochs=2", "train.batch_size=4", "encode.max_pixels=3136", "loader.workers=1"),
        ],
    )
    with RunFolder.open(tmp_path / "run", config=config, command="train sft", seed=0) as run:
        progress = train_sft(config, run)
        (record,) = run.quarantine.records()
    assert record["id"] == victim and "SIGSEGV" in record["reason"]
    rows = len(open_atlas(mini_atlas, split="train").filter(datasets=["tess"]))
    assert progress.samples_seen == 2 * (rows - 1)
