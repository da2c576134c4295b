"""What the machine or its storage lacks is no fault of the data: no sample is left out, the run says so and stops.

The faults are real: descriptors that run out, a process that is killed, memory that is limited, the kernel's own EIO
(the first byte of a process's memory), folders without permission, a folder that is gone.
"""

import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import killing
import numpy as np
import pytest
import soundfile
import torch

from hba import storage
from hba.atlas import open_atlas
from hba.atlas.media import load_audio, load_image, load_video
from hba.atlas.probe import locate, survey
from hba.atlas.scan import read_catalogue
from hba.atlas.source import Slice, opened, read_bytes
from hba.batch.config import EncodeConfig, LoaderConfig
from hba.batch.encode import Encoded, Encoder
from hba.batch.loader import load_batches
from hba.errors import MachineError, MediaError
from hba.storage import begun, confined_path, is_abandoned, patiently, remove_abandoned

VICTIM = 5
PLAN = [np.arange(k, k + 4) for k in range(0, 16, 4)]
MEMORY = Path("/proc/self/mem")  # reading its first byte gives EIO
UNREADABLE = Slice(MEMORY, 0, 4096)


class Fated(Encoder):
    """Encodes a row as its number, after `fate` was called."""

    pad_token_id = 0

    def __init__(self, fate):
        super().__init__(None, EncodeConfig())
        self.fate = fate

    def encode(self, sample):
        self.fate(sample)
        return Encoded(sample=sample, input_ids_T=torch.full((2,), sample.number))


@pytest.fixture
def atlas(mini_atlas):
    return open_atlas(mini_atlas, split="train")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setenv("HBA_STORAGE_PATIENCE", "0.3")


def load(atlas, fate, workers=2, plan=PLAN, **options):
    return list(load_batches(atlas, Fated(fate), plan, LoaderConfig(workers=workers, **options)))


def numbers(batches):
    return [sample.number for batch in batches for sample in batch.samples]


# --- processes that are killed ---------------------------------------------------------------------------------------


def _killed():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_row_whose_workers_are_killed_stops_the_run_and_is_not_blamed(atlas, workers, caplog):
    message = r"worker processes were ended \d times, last by SIGKILL, perhaps for want of memory"
    with pytest.raises(MachineError, match=message) as caught:
        load(atlas, lambda sample: _killed() if sample.number == VICTIM else None, workers)
    assert caught.value.where == atlas[VICTIM].where and caught.value.exit_code == 1
    assert not atlas.quarantine
    assert len([r for r in caplog.records if "going on with" in r.message]) == workers - 1


def test_a_worker_that_is_killed_once_is_done_without(atlas, tmp_path, caplog):
    def once(sample):
        if sample.number == VICTIM and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            _killed()

    with caplog.at_level(logging.WARNING):
        batches = load(atlas, once)
    assert numbers(batches) == list(range(16)) and not any(b.quarantined for b in batches)
    assert f"killed at {atlas[VICTIM].where}, perhaps for want of memory: going on with 1." in caplog.text


def test_a_medium_whose_process_is_killed_twice_stops_a_survey_and_is_not_blamed(mini_atlas, tmp_path, monkeypatch):
    media, _ = locate(read_catalogue(mini_atlas, ["test"], None))
    monkeypatch.setattr("hba.atlas.probe._probe", killing.probe)  # a module that its processes import quickly
    monkeypatch.setenv("KILLED_TIMES", f"1 {tmp_path}")
    assert len(survey(media[:3], log=None, quick=True, workers=2)) == 3
    monkeypatch.setenv("KILLED_TIMES", f"9 {tmp_path}")
    with pytest.raises(MachineError, match=r"was killed \(SIGKILL\).*Fix: Free memory"):
        survey(media[:3], log=None, quick=True, workers=2)


# --- descriptors -----------------------------------------------------------------------------------------------------


@pytest.fixture
def few_files():
    """Lets this process, and those that it forks, open a number of files more than it has open."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def limit(more):
        highest = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
        while (copy := os.dup(0)) < highest:
            copies.append(copy)
        os.close(copy)
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + more, before[1]))

    copies = []
    yield limit
    for copy in copies:
        os.close(copy)
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_rows_that_are_ready_take_no_descriptor(atlas, few_files):
    assert atlas[0].id  # the atlas opens its file
    few_files(12)
    plan = [np.array([k % len(atlas)]) for k in range(200)]
    stream = load_batches(atlas, Fated(lambda sample: None), plan, LoaderConfig(workers=2, cache_megabytes=0))
    next(stream)
    time.sleep(0.5)  # the workers are done with all that they may be ahead
    assert sum(len(batch.samples) for batch in stream) == 199
    assert not atlas.quarantine


def test_a_worker_without_descriptors_is_no_fault_of_its_row(atlas):
    def without(sample):
        if sample.number == VICTIM:
            resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
        sample.load_audios(), sample.load_videos(2)

    with pytest.raises(MachineError, match=r"may open no more files .*Fix: Raise the limit \(`ulimit -n"):
        load(atlas, without)
    assert not atlas.quarantine


def test_as_many_workers_start_as_there_are_descriptors_for(atlas, few_files, caplog):
    assert atlas[0].id
    few_files(9)
    batches = load(atlas, lambda sample: None, workers=8)
    assert numbers(batches) == list(range(16))
    assert "A worker process cannot start ([Errno 24] Too many open files): going on with" in caplog.text
    few_files(1)
    with pytest.raises(MachineError, match="a worker process: this process may open no more files"):
        load(atlas, lambda sample: None, workers=8)


# --- memory ----------------------------------------------------------------------------------------------------------

LITTLE_MEMORY = """
    import resource, sys
    from hba.atlas.media import load_image, load_video, load_descriptor
    from hba.errors import MachineError, MediaError
    from pathlib import Path
    kind, path = sys.argv[1], Path(sys.argv[2])
    load = {"image": load_image, "descriptor": load_descriptor}[kind]
    load(path, where="row 1")  # imports what it needs
    used = next(int(l.split()[1]) << 10 for l in open("/proc/self/status") if l.startswith("VmSize"))
    resource.setrlimit(resource.RLIMIT_AS, (used + (40 << 20), used + (40 << 20)))
    try:
        load(Path(sys.argv[3]), where="row 2")
    except MachineError as error:
        print("machine", error)
    except MemoryError:
        print("memory")
    except MediaError as error:
        print("medium", error)
"""


def test_memory_that_is_short_is_no_fault_of_a_medium(tmp_path):
    import PIL.Image

    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    PIL.Image.new("RGB", (5000, 5000)).save(tmp_path / "large.png")
    torch.save(torch.zeros(8), tmp_path / "small.pt")
    torch.save(torch.zeros(20_000_000), tmp_path / "large.pt")
    for kind, suffix in (("image", "png"), ("descriptor", "pt")):
        command = [sys.executable, "-c", textwrap.dedent(LITTLE_MEMORY), kind]
        media = [str(tmp_path / f"{size}.{suffix}") for size in ("small", "large")]
        done = subprocess.run([*command, *media], capture_output=True, text=True, timeout=600, check=True)
        assert done.stdout.startswith(("machine row 2: memory is short", "memory")), (kind, done.stdout, done.stderr)


def test_a_row_for_which_there_is_no_memory_stops_the_run(atlas):
    def greedy(sample):
        if sample.number == VICTIM:
            resource.setrlimit(resource.RLIMIT_AS, (1 << 20, 1 << 20))
            np.ones(1 << 28)

    with pytest.raises(MachineError, match="memory is short") as caught:
        load(atlas, greedy)
    assert caught.value.where == atlas[VICTIM].where and not atlas.quarantine


# --- disks and file servers ------------------------------------------------------------------------------------------


def test_a_disk_that_gives_errors_stops_the_run_with_the_place(atlas):
    where = atlas[VICTIM].place("audios")
    for workers in (0, 2):
        with pytest.raises(MachineError, match=r"cannot be read \(Input/output error\): its storage does") as caught:
            load(atlas, lambda s: read_bytes(UNREADABLE, where=where) if s.number == VICTIM else None, workers)
        assert caught.value.where == where and not atlas.quarantine


@pytest.mark.parametrize("decode", [load_audio, lambda s, where: load_video(s, 2, where=where), load_image])
def test_a_file_of_which_a_part_cannot_be_had_is_never_served_in_part(tmp_path, decode, monkeypatch):
    """Decoders take the end of what they are given for the end of the sound."""
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "a.wav", rng.normal(0, 0.1, 320_000), 16_000)
    source, read = tmp_path / "a.wav", os.pread

    def flaky(descriptor, size, start):
        return read(descriptor, size, start) if start < 100_000 else read(memory, size, 0)

    with MEMORY.open("rb") as file:
        memory = file.fileno()
        monkeypatch.setattr("hba.atlas.source.os.pread", flaky)
        with pytest.raises(MachineError, match="row 1: cannot be read") if decode is load_audio else suppressed():
            decode(source, where="row 1")
        with pytest.raises(MachineError, match="row 1: cannot be read"), opened(source, where="row 1") as handle:
            assert len(handle.read()) < 640_000
    monkeypatch.undo()
    assert len(load_audio(source, where="row 1").samples) == 320_000


def suppressed():
    return pytest.raises((MachineError, MediaError))


def test_what_comes_back_in_time_is_waited_for(monkeypatch):
    monkeypatch.setenv("HBA_STORAGE_PATIENCE", "30")
    began = time.monotonic()

    def read():
        if time.monotonic() - began < 0.6:
            with MEMORY.open("rb") as file:
                return os.pread(file.fileno(), 10, 0)
        return b"whole"

    assert patiently(read, "a place") == b"whole"


def test_time_that_a_row_waits_for_storage_does_not_count_as_decoding(atlas):
    def slow(sample):
        if sample.number == VICTIM:
            with storage.CLOCK.waiting():
                time.sleep(4)

    assert numbers(load(atlas, slow, decode_timeout_seconds=1.5)) == list(range(16))


def test_a_read_that_never_ends_stops_the_run(atlas):
    def silent(sample):
        if sample.number == VICTIM:
            with storage.CLOCK.waiting(longest_seconds=0.3):
                time.sleep(600)

    with pytest.raises(MachineError, match="storage has not answered") as caught:
        load(atlas, silent)
    assert caught.value.where == atlas[VICTIM].where and not atlas.quarantine


AS_NOBODY = """
    import os, sys
    sys.path[:0] = {path!r}
    import hba.atlas.media, soundfile
    if os.getuid() == 0:
        os.setgid(65534), os.setuid(65534)
    from hba import open_atlas
    from hba.errors import MachineError
    try:
        open_atlas(sys.argv[1], split="train")[0].load_audios()
    except MachineError as error:
        print(error)
"""


def test_a_folder_that_may_not_be_read_is_no_fault_of_its_files(tmp_path):
    folder = tmp_path / "atlas"
    (folder / "closed").mkdir(parents=True)
    soundfile.write(folder / "closed" / "a.wav", np.zeros(8000), 16_000)
    row = {"problem": "How?", "answer": "anger", "dataset": "cremad", "task": "emotion_cls"}
    row |= {"audios": ["closed/a.wav"], "modality_signature": "text_audio"}
    (folder / "train.jsonl").write_text(json.dumps(row))
    for parent in [folder, *folder.parents]:
        if parent.owner() == Path.home().owner() and parent.is_relative_to("/tmp"):
            parent.chmod(parent.stat().st_mode | 0o055)
    (folder / "closed").chmod(0)
    try:
        code = textwrap.dedent(AS_NOBODY).format(path=sys.path)
        done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=600)
    finally:
        (folder / "closed").chmod(0o755)
    assert "train.jsonl:1, audios: cannot be read (Permission denied). Fix: Give yourself the right" in done.stdout


def test_an_atlas_that_is_gone_is_no_fault_of_its_rows(mini_atlas, tmp_path):
    shutil.copytree(mini_atlas, tmp_path / "atlas")
    atlas = open_atlas(tmp_path / "atlas", split="train").filter(modalities=["text_audio"])
    assert atlas[0].load_audios()
    (tmp_path / "atlas").rename(tmp_path / "unmounted")
    with pytest.raises(MachineError, match=r"is gone\. Fix: Mount or restore it"):
        atlas[1].load_audios()
    with pytest.raises(MediaError, match="no such file"):
        confined_path(tmp_path.resolve(), "a.wav", where="row 1")
    assert not atlas.quarantine


# --- what other processes are writing --------------------------------------------------------------------------------


def test_only_what_a_dead_process_of_this_machine_had_begun_is_removed(tmp_path):
    living = begun(tmp_path / "a.bin")
    dead = tmp_path / living.name.replace(f"-{os.getpid()}-", "-4194304-")
    machine, boot, _, start = living.name.split(".")[-2].split("-")
    of_a_dead_one_with_our_id = tmp_path / living.name.replace(f"-{start}.", "-1.")
    untold = tmp_path / living.name.replace(f"-{start}.", "-0.")  # where the system does not say when it began
    elsewhere = tmp_path / dead.name.replace(machine, "0" * 8)
    restarted = tmp_path / dead.name.replace(boot, "1" * 8)
    older = tmp_path / f"{restarted.name.replace('a.bin', 'b.bin')}"
    named_by_id_alone = tmp_path / ".a.bin.4194304.tmp"
    for path in (living, dead, elsewhere, restarted, older, named_by_id_alone, of_a_dead_one_with_our_id, untold):
        path.write_bytes(b"half")
    os.utime(older, (1, 1)), os.utime(elsewhere, (1, 1))
    assert is_abandoned(dead) and not is_abandoned(living)
    remove_abandoned(tmp_path)
    assert set(tmp_path.iterdir()) == {living, elsewhere, restarted, named_by_id_alone, untold}


def test_what_another_user_has_left_ends_nobody(tmp_path):
    """As in a cache that several share: an explorer would not start beside what was left of another's."""
    shared = tmp_path / "shared"
    dead = shared / begun(shared / "a").name.replace(f"-{os.getpid()}-", "-4194304-")
    (dead / "clips").mkdir(parents=True)
    shared.chmod(0o755), dead.chmod(0o500)
    another = "os.geteuid() or os.setuid(65534)"  # for root no folder is closed
    code = f"import os; from pathlib import Path; from hba.storage import *; {another}; remove_abandoned(Path())"
    try:
        subprocess.run([sys.executable, "-c", code], cwd=shared, check=True, timeout=600)
        assert is_abandoned(dead) and dead.is_dir()
    finally:
        dead.chmod(0o700)


# --- machines other than Linux ---------------------------------------------------------------------------------------

ELSEWHERE = """
import ctypes, errno, os, resource, signal, socket
LINUX = {
    os: ("fdatasync", "sched_getaffinity", "sched_setaffinity", "posix_fadvise", "posix_fallocate", "copy_file_range",
         "memfd_create", "eventfd", "splice", "pidfd_open", "getrandom", "O_DIRECT", "O_TMPFILE", "O_PATH"),
    errno: ("EREMOTEIO", "ENOMEDIUM", "ECOMM", "EUCLEAN", "EREMCHG", "EKEYEXPIRED", "EL2HLT"),
    signal: ("SIGPWR", "SIGSTKFLT", "SIGPOLL", "SIGRTMIN", "SIGRTMAX"),
    resource: ("prlimit",),
    socket: ("SO_PEERCRED", "TCP_USER_TIMEOUT"),
}
for module, names in LINUX.items():
    for name in filter(module.__dict__.__contains__, names):
        delattr(module, name)

class Library(ctypes.CDLL):
    def __getattr__(self, name):
        if name == "prctl":
            raise AttributeError(name)
        return super().__getattr__(name)

ctypes.CDLL = Library
"""


@pytest.fixture
def elsewhere(tmp_path):
    """The environment of commands whose Python lacks what Linux alone has, their worker processes' too."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(ELSEWHERE)
    path = os.pathsep.join([str(tmp_path / "site"), str(Path(storage.__file__).parents[1])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def hba(*arguments):
    return [sys.executable, "-m", "hba", *map(str, arguments)]


def test_what_linux_alone_has_is_done_without(mini_atlas, backbone, tmp_path, elsewhere):
    given = [f"atlas={mini_atlas}", f"model.name={backbone}", "train.epochs=1", "datasets=[mmsd]"]
    commands = [
        hba("atlas", "convert", mini_atlas, tmp_path / "shards", "--to", "parquet", "--workers", 2),
        hba("train", "sft", "--config", "sft_tiny", "--run", tmp_path / "sft", *given),
        hba("train", "sft", "--config", "sft_tiny", "--run", tmp_path / "refused", *given, "loader.workers=2"),
    ]
    done = [subprocess.run(each, env=elsewhere, capture_output=True, text=True, check=False) for each in commands]
    assert [each.returncode for each in done] == [0, 0, 2], [each.stderr for each in done]
    assert "worker processes need Linux" in done[2].stderr and "Use loader.workers=0" in done[2].stderr


def test_workers_end_with_a_killed_command_without_the_kernels_help(tmp_path, elsewhere):
    command = hba("atlas", "mini", tmp_path / "atlas", "--size", "small", "--workers", 2)
    main = subprocess.Popen(command, env=elsewhere, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    children = Path(f"/proc/{main.pid}/task/{main.pid}/children")

    def workers():
        pids = [pid for pid in children.read_text().split() if Path(f"/proc/{pid}").exists()]
        return [pid for pid in pids if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    left = []
    try:
        deadline = time.monotonic() + 900
        while not list(tmp_path.rglob("*.wav")):  # both work, and hold the ends of each other's pipes
            assert main.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        left = workers()
        assert len(left) == 2
    finally:
        main.kill()
        main.wait()
    deadline = time.monotonic() + 300
    while left := [pid for pid in left if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


@pytest.mark.parametrize("arguments", [["--help"], ["doctor"], ["train", "sft"]])
def test_windows_is_told_what_to_do_instead(arguments):
    """The real door of the command, on a Python that says it is Windows' and has no locks."""
    code = "import runpy, sys; sys.platform = 'win32'; sys.modules['fcntl'] = None; "
    code += "runpy.run_module('hba', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: hba does not run on Windows") and "wsl --install" in done.stderr
