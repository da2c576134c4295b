"""Writing that is whole or not there, logs that survive a kill, paths that stay inside their root."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hba.errors import InputError, MachineError, MediaError
from hba.storage import (
    AppendLog,
    StorageError,
    atomic_folder,
    atomic_write,
    check_relative,
    confined_path,
    file_sha256,
    halved,
    json_sha256,
    read_json,
    read_jsonl,
    room,
    temporary_folder,
    write_json,
)

CAN_MOUNT = (
    shutil.which("unshare") is not None
    and subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"],
        capture_output=True,
    ).returncode
    == 0
)


def limited(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in `folder` in a process whose files may not grow beyond 64 KiB."""
    head = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
    return subprocess.run(
        [sys.executable, "-c", head + textwrap.dedent(code)], cwd=folder, capture_output=True, text=True, timeout=900
    )


def on_a_full_disk(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a 64 KiB file system of its own, mounted over `folder`."""
    script = folder.with_suffix(".py")
    script.write_text(textwrap.dedent(code))
    mounted = f"mount -t tmpfs -o size=64k none '{folder}' && cd '{folder}' && '{sys.executable}' '{script}'"
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mounted]
    return subprocess.run(unshare, capture_output=True, text=True, timeout=900)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


WRITE_TOO_MUCH = """
    import os
    from hba.storage import StorageError, atomic_folder, atomic_write, write_json
    write_json("kept.json", {"old": 1})
    def refused(action):
        try:
            action()
        except StorageError as error:
            assert "no space left" in str(error) and "Fix:" in str(error) and error.exit_code == 2, error
            return
        raise SystemExit("not refused")
    def text():
        with atomic_write("kept.json") as handle:
            handle.write("x" * 200_000)
    def data():
        with atomic_write("new.bin", "wb") as handle:
            handle.write(bytes(200_000))
    def folder():
        with atomic_folder("checkpoint") as path:
            (path / "small").write_text("x")
            (path / "weights").write_bytes(bytes(200_000))
    for action in (text, data, folder):
        refused(action)
    assert os.listdir() == ["kept.json"], os.listdir()
    assert open("kept.json").read().split() == ["{", '"old":', "1", "}"]
    print("whole")
"""

APPEND_TOO_MUCH = """
    import json
    from hba.storage import AppendLog, StorageError
    count = 0
    log = AppendLog("log.jsonl")
    try:
        while True:
            log.append({"id": count, "text": "y" * 997})
            count += 1
    except StorageError as error:
        assert "log.jsonl" in error.where
    lines = open("log.jsonl").read()
    assert lines.endswith("\\n") and [json.loads(x)["id"] for x in lines.splitlines()] == list(range(count))
    log.close()
    assert open("log.jsonl").read() == lines
    assert 30 < count < 66
    print("whole")
"""


@pytest.mark.parametrize("code", [WRITE_TOO_MUCH, APPEND_TOO_MUCH], ids=["atomic", "append"])
def test_nothing_is_half_written_at_the_file_size_limit(tmp_path: Path, code: str) -> None:
    done = limited(tmp_path, code)
    assert (done.stdout, done.returncode) == ("whole\n", 0), done.stderr


@pytest.mark.skipif(not CAN_MOUNT, reason="this system does not let a user mount a file system of their own")
@pytest.mark.parametrize("code", [WRITE_TOO_MUCH, APPEND_TOO_MUCH], ids=["atomic", "append"])
def test_nothing_is_half_written_on_a_full_disk(tmp_path: Path, code: str) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    done = on_a_full_disk(folder, code)
    assert (done.stdout, done.returncode) == ("whole\n", 0), done.stderr


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(OSError, match="file"), atomic_write(blocked / "x.json"):
        pass
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        with pytest.raises(StorageError, match="cannot write"), atomic_write(tmp_path / "x"):
            pass
        tmp_path.chmod(0o700)


def test_a_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(ZeroDivisionError), atomic_write(path) as handle:
        handle.write("half")
        raise ZeroDivisionError
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"score": float("nan")})
    assert read_json(path) == {"old": 1}
    assert names(tmp_path) == ["a.json"]


def test_a_folder_is_replaced_only_by_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    for step in (1, 2):
        with atomic_folder(path) as folder:
            (folder / "step").write_text(str(step))
    assert (path / "step").read_text() == "2"
    with pytest.raises(ZeroDivisionError), atomic_folder(path) as folder:
        (folder / "step").write_text("3")
        raise ZeroDivisionError
    assert (path / "step").read_text() == "2"
    assert names(tmp_path) == ["checkpoint"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_weights_have_the_mode_of_other_files(tmp_path: Path, umask: int, mode: int) -> None:
    private = tmp_path / "base.safetensors"
    private.touch(mode=0o600)
    before = os.umask(umask)
    try:
        with atomic_folder(tmp_path / "step") as folder:
            save_file({"weight": torch.zeros(2)}, folder / "model.safetensors")
            (folder / "adapters").mkdir()
            save_file({"weight": torch.zeros(2)}, folder / "adapters" / "tess.safetensors")
            (folder / "hba.json").write_text("{}")
            os.link(private, folder / "linked.safetensors")
    finally:
        os.umask(before)
    found = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "step").rglob("*") if file.is_file()}
    assert found.pop("linked.safetensors") == 0o600
    assert found == dict.fromkeys(("model.safetensors", "tess.safetensors", "hba.json"), mode)


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    code = f"""
        import os, signal
        from hba.storage import atomic_write
        with atomic_write({str(path)!r}) as handle:
            handle.write("half")
            handle.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)]).returncode == -9
    assert read_json(path) == {"old": 1}


def test_log_goes_on_behind_its_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "log.jsonl"
    with AppendLog(path) as log:
        log.append({"a": "ü"})
    with path.open("ab") as handle:
        handle.write(b'{"a": "torn')
    with AppendLog(path) as log:
        log.append({"a": 2})
    assert [line.record for line in read_jsonl(path)] == [{"a": "ü"}, {"a": 2}]


@pytest.mark.parametrize("text", ['{"a": ' + "[" * 100_000, '{"a": ' + "1" * 5000 + "}"], ids=["deep", "a long number"])
def test_json_of_a_stranger_ends_in_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match="not valid JSON"):
        read_json(tmp_path / "a.json")
    with pytest.raises(InputError, match="not valid JSON"):
        list(read_jsonl(tmp_path / "a.json"))


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 65_537, 200_000])
def test_a_torn_line_of_any_length_is_cut(tmp_path: Path, size: int) -> None:
    for whole in (b"", b'{"a": 1}\n', b'{"a": "' + b"x" * 70_000 + b'"}\n'):
        path = tmp_path / "log.jsonl"
        path.write_bytes(whole + b"{" * size)
        AppendLog(path).close()
        assert path.read_bytes() == whole


def test_a_whole_line_without_its_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}')
    with AppendLog(path) as log:
        log.append({"a": 3})
    assert [line.record["a"] for line in read_jsonl(path)] == [1, 2, 3]


def test_a_log_refuses_nan_and_keeps_nothing_of_it(tmp_path: Path) -> None:
    with AppendLog(tmp_path / "log.jsonl") as log:
        log.append({"a": 1})
        with pytest.raises(ValueError, match="JSON"):
            log.append({"a": float("nan")})
    assert len(list(read_jsonl(tmp_path / "log.jsonl"))) == 1


def test_five_kills_in_the_middle_of_writing_leave_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    code = f"""
        from hba.storage import AppendLog, read_jsonl
        log = AppendLog({str(path)!r})
        start = sum(1 for _ in read_jsonl({str(path)!r}))
        for i in range(start, 10**9):
            log.append({{"i": i, "text": "z" * (i * 7919 % 5000)}})
    """
    for kill in range(5):
        target = (path.stat().st_size if path.exists() else 0) + 200_000 + 77_777 * kill
        with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)]) as writer:
            while not path.exists() or path.stat().st_size < target:
                assert writer.poll() is None
                time.sleep(0.001)
            writer.kill()
    AppendLog(path).close()
    numbers = [line.record["i"] for line in read_jsonl(path)]
    assert numbers == list(range(len(numbers)))
    assert len(numbers) > 100


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (b'{"a": 1}\n{"a": \n', 2, "not valid JSON"),
        (b'{"a": 1}\n\n[1]\n', 3, "expected a JSON object, found list"),
        (b"\xff\xfe\n", 1, "not valid JSON"),
        (b'{"a": 1}\n{"a"', 2, "cut off"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, content: bytes, line: int, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        list(read_jsonl(path))
    assert caught.value.where == f"{path}:{line}"


def test_missing_and_malformed_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_json(tmp_path / "x.json")
    with pytest.raises(InputError, match="no such file"):
        list(read_jsonl(tmp_path))
    (tmp_path / "x.json").write_text('{\n"a": }')
    with pytest.raises(InputError, match=r"x\.json:2"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../x", "a/../../x", "a\\..\\x", "C:\\x", "c:/x", "\\\\host\\x", "", "a\0b"]
)
def test_a_path_that_leaves_its_folder_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(InputError, match=r"rows.jsonl:3, audios: .*leaves the atlas folder"):
        check_relative(path, where="rows.jsonl:3, audios")
    with pytest.raises(InputError, match="leaves the atlas folder"):
        confined_path(tmp_path.resolve(), path, where="x")


def test_links_may_point_inside_their_root_only(tmp_path: Path) -> None:
    root = (tmp_path / "atlas").resolve()
    (root / "media").mkdir(parents=True)
    (tmp_path / "secret").write_text("s")
    (root / "media" / "a.wav").write_text("a")
    (root / "inside").symlink_to("media/a.wav")
    (root / "outside").symlink_to("../secret")
    (root / "folder").symlink_to(tmp_path)
    (root / "loop").symlink_to("loop")
    assert confined_path(root, "media/a.wav", where="x") == root / "media" / "a.wav"
    assert confined_path(root, "inside", where="x") == root / "media" / "a.wav"
    for path in ("outside", "folder/secret"):
        with pytest.raises(InputError, match=r"row 2: .*link out of"):
            confined_path(root, path, where="row 2")
    for path in ("loop", "none", "media/a.wav/x"):
        with pytest.raises(MediaError, match="row 2: "):
            confined_path(root, path, where="row 2")


def test_links_of_a_hub_snapshot_lead_to_its_own_contents_only(tmp_path: Path) -> None:
    cache = (tmp_path / "hub").resolve()
    ours, theirs = cache / "datasets--org--ours", cache / "datasets--org--theirs"
    root = ours / "snapshots" / "abc" / "data"
    for folder in (root, ours / "blobs", theirs / "blobs", cache / "blobs" / "0a", cache / "private"):
        folder.mkdir(parents=True)
        (folder / "1").write_text("1")
    (ours / "blobs" / "shared").symlink_to("../../blobs/0a/1")
    (ours / "blobs" / "private").symlink_to("../../private/1")
    for name in ("1", "shared", "private"):
        (root / f"{name}.wav").symlink_to(f"../../../blobs/{name}")
    (root / "theirs.wav").symlink_to(f"../../../../{theirs.name}/blobs/1")
    assert confined_path(root, "1.wav", where="x") == ours / "blobs" / "1"
    for path in ("theirs.wav", "private.wav", "shared.wav"):  # nothing says yet that the folder is the shared one
        with pytest.raises(InputError, match="link out of"):
            confined_path(root, path, where="x")
    (cache / "blobs" / ".huggingface-shared-blobs").write_text("1\n")
    assert confined_path(root, "shared.wav", where="x") == cache / "blobs" / "0a" / "1"
    (ours / "blobs").rename(ours / "moved")
    (ours / "blobs").symlink_to(tmp_path)
    (tmp_path / "1").write_text("secret")
    with pytest.raises(InputError, match="link out of"):
        confined_path(root, "1.wav", where="x")


def test_hashes(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    (tmp_path / "x").write_bytes(data)
    assert file_sha256(tmp_path / "x") == hashlib.sha256(data).hexdigest()
    assert json_sha256({"b": 1, "a": [1]}) == json_sha256(json.loads('{"a":[1],  "b":1}'))
    assert json_sha256({"a": 1}) != json_sha256({"a": 2})


def test_a_growing_file_is_read_as_far_as_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    assert list(read_jsonl(path, growing=True)) == []
    path.write_text('{"step": 1}\n{"step": 2')
    assert [line.record for line in read_jsonl(path, growing=True)] == [{"step": 1}]
    with pytest.raises(InputError, match=r"log\.jsonl:2"):
        list(read_jsonl(path))
    path.write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(InputError, match=r"log\.jsonl:1"):
        list(read_jsonl(path, growing=True))


@dataclass(frozen=True)
class Held:
    """A batch of samples on a device."""

    samples: tuple

    num_tokens = torch.tensor([7, 90])

    def __len__(self):
        return len(self.samples)


def test_what_a_device_has_no_room_for_is_named_with_what_to_change():
    batch = Held(("train/1", "train/1", "train/2"))
    with pytest.raises(MachineError) as told, room(batch, halved("batch_size", batch), fix="It goes on."):
        torch.empty(1 << 56)  # no machine has that
    assert told.value.what == "no room for a batch of 3 samples of up to 90 tokens"
    assert told.value.where == "samples train/1, train/2" and told.value.fix.startswith("Use batch_size=1; `hba fit")
    assert told.value.fix.endswith("It goes on.") and halved("batch_size", Held(("train/1",)))() == []
    with pytest.raises(MachineError, match=r"^no room for the step\. Fix: `hba fit"), room(None, what="the step"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    for short in (
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ):
        with pytest.raises(MachineError, match=r"^no room for the step"), room(None, what="the step"):
            raise short
    with pytest.raises(FileNotFoundError), room(batch):
        raise FileNotFoundError("model.safetensors")
    with pytest.raises(RuntimeError, match="shapes"), room(batch):
        raise RuntimeError("shapes do not match")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_temporary_folder_goes_also_where_a_signal_ends_the_command(number: signal.Signals) -> None:
    places = []
    before = signal.signal(number, signal.SIG_DFL)  # whatever the tests were started with
    try:
        with pytest.raises(SystemExit) as stopped, temporary_folder("test") as place:
            places.append(place)
            (place / "clip.mp4").touch()
            os.kill(os.getpid(), number)
            time.sleep(60)
        assert stopped.value.code == 128 + number and not places[0].exists()
        assert signal.getsignal(number) is signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN)  # as nohup has it
        with temporary_folder("test"):
            assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)
