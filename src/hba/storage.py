"""Everything that hba writes goes through `atomic_write` or `AppendLog`; every path of a row through `confined_path`;
what is read of media through `patiently`.

Invariants: a file under its final name is whole; a log holds only whole lines, so that a killed run can go on
where it stopped; no path taken from data leads outside its root; what a disk, a file server or the machine lacks is
waited for and then a MachineError, never a fault of the data.
"""

from __future__ import annotations

import csv
import errno
import fcntl
import hashlib
import io
import json
import mmap
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, TypeVar

from hba.errors import HbaError, InputError, MachineError, MediaError

T = TypeVar("T")

_TAIL_BYTES = 1 << 16
_SHORT = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN, errno.ENOSPC, errno.EDQUOT))
_REFUSED = frozenset((errno.EACCES, errno.EPERM))
AWAY = frozenset(
    getattr(errno, name)
    for name in (
        *("EIO", "EREMOTEIO", "ESTALE", "ENXIO", "ENODEV", "ENOMEDIUM", "EBUSY", "EUCLEAN", "ENOLINK", "ECOMM"),
        *("ETIMEDOUT", "ENETDOWN", "ENETUNREACH", "ENETRESET", "EHOSTDOWN", "EHOSTUNREACH", "ESHUTDOWN", "EPROTO"),
        *("ENOTCONN", "ECONNRESET", "ECONNABORTED", "ECONNREFUSED", "EREMCHG", "EKEYEXPIRED", "EL2HLT"),
    )
    if hasattr(errno, name)
)
"""numbers of errors of a disk, a file server or a network that may pass by themselves"""
_PATIENCE = "HBA_STORAGE_PATIENCE"
_PATIENCE_SECONDS = 60.0
_LONGEST_PAUSE = 15.0
SILENT_SECONDS = 900.0
"""a single read that takes longer will never end: a file server that is gone holds its readers for ever"""
_PLENTY_BYTES = 256 << 20
_NAMED = 5  # samples in a message
_AGAIN = "Then run the same command again; it goes on where it stopped."


class StorageError(InputError):
    """The disk refused a write (full, read-only, no permission)."""


class Clock:
    """Since when a process is at an item, and how long of that it waited for storage, for the process that watches it.

    Four numbers in memory that both may share: start of the item (0: at none), seconds that it waited, start of the
    present wait (0: none), and when the present wait has lasted too long.
    """

    SIZE = 32

    def __init__(self) -> None:
        self.share(memoryview(bytearray(self.SIZE)))

    def share(self, memory: memoryview) -> None:
        """Use `memory`, at least SIZE bytes of it."""
        self._cells = memory[: self.SIZE].cast("B").cast("d")

    def start(self) -> None:
        """An item begins."""
        self._cells[1], self._cells[2], self._cells[0] = 0.0, 0.0, time.monotonic()

    def stop(self) -> None:
        """No item is worked on."""
        self._cells[0] = 0.0

    @contextmanager
    def waiting(self, longest_seconds: float = SILENT_SECONDS) -> Iterator[None]:
        """Time within does not count as work on the item."""
        if self._cells[2]:
            yield
            return
        now = time.monotonic()
        self._cells[3], self._cells[2] = now + longest_seconds, now
        try:
            yield
        finally:
            self._cells[1] += time.monotonic() - self._cells[2]
            self._cells[2] = 0.0

    @property
    def seconds(self) -> float:
        """How long the present item has been worked on."""
        start = self._cells[0]
        return time.monotonic() - start - self.waited if start else 0.0

    @property
    def waited(self) -> float:
        """How long the process has waited for storage since the present item began."""
        since = self._cells[2]
        return self._cells[1] + (time.monotonic() - since if since else 0.0)

    @property
    def is_stuck(self) -> bool:
        """Whether the process waits for a read that will never end."""
        return bool(self._cells[2]) and time.monotonic() > self._cells[3]


CLOCK = Clock()
"""that of this process; nobody watches it until its memory is shared"""


def pauses() -> Iterator[float]:
    """Seconds to wait before each new attempt at something that may pass by itself, until a minute has gone by.

    HBA_STORAGE_PATIENCE is another number of seconds.
    """
    try:
        end = time.monotonic() + float(os.environ.get(_PATIENCE) or _PATIENCE_SECONDS)
    except ValueError:
        raise InputError("is not a number of seconds", where=_PATIENCE, fix="Write one, such as 600.") from None
    pause = 0.25
    while (left := end - time.monotonic()) > 0:
        yield min(pause, left)
        pause = min(2 * pause, _LONGEST_PAUSE)


def patiently(read: Callable[[], T], where: str) -> T:
    """What `read` gives, tried again while storage is away or the machine short of something. The clock stands still.

    Raises MachineError naming `where` when that does not pass, at once where permission is lacking; any other OSError
    (no such file, a folder) as it is.
    """
    waits: Iterator[float] | None = None
    while True:
        try:
            with CLOCK.waiting():
                return read()
        except (OSError, MemoryError) as error:
            fault = machine_fault(error, where)
            if fault is None:
                raise
            waits = pauses() if waits is None else waits
            pause = None if getattr(error, "errno", None) in _REFUSED else next(waits, None)
            if pause is None:
                raise fault from error
        with CLOCK.waiting():
            time.sleep(pause)


def machine_fault(error: BaseException, where: str) -> MachineError | None:
    """What the machine or its storage lacks, where that is what `error` says; None where the data may be the cause."""
    number, said = getattr(error, "errno", None), getattr(error, "strerror", None) or str(error)
    if isinstance(error, MachineError):
        return error
    if number in _REFUSED and isinstance(error, OSError):
        fix = f"Give yourself the right to read it (chmod, chown). {_AGAIN}"
        return MachineError(f"cannot be read ({said})", where=where, fix=fix)
    if number in (errno.EMFILE, errno.ENFILE):
        fix = f"Raise the limit (`ulimit -n 65536`), or use fewer workers. {_AGAIN}"
        return MachineError(f"this process may open no more files ({said})", where=where, fix=fix)
    no_memory = isinstance(error, MemoryError) or number == errno.ENOMEM or "allocate memory" in said
    if no_memory and _memory_is_short():
        return MachineError("memory is short", where=where, fix=f"Free memory, or use fewer workers. {_AGAIN}")
    if number in _SHORT and number != errno.ENOMEM and isinstance(error, OSError):
        return MachineError(f"the machine is short of something ({said})", where=where, fix=f"Free some. {_AGAIN}")
    if number in AWAY and isinstance(error, OSError):
        fix = f"Check the disk, or the file server and its mount. {_AGAIN}"
        return MachineError(f"cannot be read ({said}): its storage does not answer", where=where, fix=fix)
    return None


# CUDA and its libraries, main memory, and a file that cannot be mapped, in the words of torch.
_NO_MEMORY = ("out of memory", "ALLOC_FAILED", "DefaultCPUAllocator", "Cannot allocate memory")


def lacks_memory(error: BaseException) -> bool:
    """Whether torch, or Python, had no memory for what a device was to compute."""
    if isinstance(error, (MemoryError, OSError)):
        return isinstance(error, MemoryError) or error.errno == errno.ENOMEM
    of_torch = type(error).__name__ == "OutOfMemoryError" or any(said in str(error) for said in _NO_MEMORY)
    return isinstance(error, RuntimeError) and of_torch


@contextmanager
def room(batch: Any, keys: Callable[[], Sequence[str]] = tuple, *, what: str = "", fix: str = "") -> Iterator[None]:
    """Around what a device computes of `batch`, or without one of `what`. Raises MachineError where it has no room.

    The error names the samples, the longest of them in tokens, what was in use, and which of `keys` to set; `fix`
    stands behind.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not lacks_memory(error):
            raise
        where = ""
        if batch is not None:
            tokens_B = getattr(batch, "num_tokens", None)  # features of a frozen backbone have no tokens any more
            lengths = "" if tokens_B is None else f" of up to {int(tokens_B.max()):,} tokens"
            what = f"a {what or 'batch'} of {plural(len(batch), 'sample')}{lengths}"
            ids = dict.fromkeys(getattr(sample, "id", str(sample)) for sample in batch.samples)
            where = f"samples {', '.join([*ids][:_NAMED])}"
        advice = f"Use {' or '.join(keys())}; " if keys() else ""
        advice = f"{advice}`hba fit MODEL --gpu GB` tells what fits. {fix}".rstrip()
        raise MachineError(f"no room for {what}{_in_use()}", where=where, fix=advice) from None


def halved(key: str, batch: Any) -> Callable[[], list[str]]:
    """For `room`: `key` at half of the samples that were tried, where there are several."""
    return lambda: [f"{key}={len(batch) // 2}"] if len(batch) > 1 else []


def _in_use() -> str:
    """What of the GPU's memory tensors have had at once, where torch has one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return ""
    used, size = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[1]
    return f" ({used / 2**30:.1f} of {size / 2**30:.1f} GiB of {torch.cuda.get_device_name()} were in use)"


def _memory_is_short() -> bool:
    """Whether not even a plenty of it is to be had; a medium for which that is too little is no honest one."""
    try:
        mmap.mmap(-1, _PLENTY_BYTES).close()
    except (OSError, MemoryError):
        return True
    return False


def begun(path: Path) -> Path:
    """The name under which `path` is written until it is whole: it tells the process, and the machine that it is on."""
    return path.with_name(f".{path.name}.{writer_name()}.tmp")


def writer_name() -> str:
    """A name of this process that no other has on any machine, 'machine-boot-process-start'."""
    return f"{_machine()}-{_boot()}-{os.getpid()}-{_started(os.getpid())}"


@cache
def _machine() -> str:
    # Processes of another container have other ids.
    space = Path("/proc/self/ns/pid")
    inside = space.stat().st_ino if space.exists() else 0
    return hashlib.sha256(f"{socket.gethostname()} {inside}".encode()).hexdigest()[:8]


@cache
def _boot() -> str:
    told = Path("/proc/sys/kernel/random/boot_id")
    return hashlib.sha256(told.read_bytes()).hexdigest()[:8] if told.is_file() else "0"


_BEGUN = re.compile(r"\..+\.([0-9a-f]{8})-([0-9a-f]+)-(\d+)-(\d+)\.tmp")
_OLD_SECONDS = 7 * 24 * 3600.0


def is_abandoned(path: Path) -> bool:
    """Whether `path` is what a process of this machine, which no longer lives, had begun to write.

    Of another machine that shares the disk nobody can tell. What is a week old and from before a restart is.
    """
    match = _BEGUN.fullmatch(path.name)
    if match is None or match[1] != _machine():
        return False
    if match[2] != _boot():
        return time.time() - path.lstat().st_mtime > _OLD_SECONDS
    process_id, began = int(match[3]), int(match[4])
    if not _lives(process_id):
        return True
    now = _started(process_id)
    return 0 not in (began, now) and began != now  # where nothing is told, it may be the same


def remove_abandoned(folder: Path) -> None:
    """Remove files and folders that a process of this machine which no longer lives had begun to write there.

    What another user has left stays, and what another process removes at the same time is left to it.
    """
    for path in folder.glob(".*.tmp"):
        with suppress(FileNotFoundError, PermissionError):
            if is_abandoned(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def unwinding() -> Iterator[None]:
    """Within, SIGTERM and SIGHUP end the main thread as Ctrl-C does: what is open is closed, temporary folders go.

    One that somebody handles, or that is ignored (nohup), stays as it is; other threads change nothing.
    """

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    ours = [signal.SIGTERM, signal.SIGHUP] if threading.current_thread() is threading.main_thread() else []
    ours = [each for each in ours if signal.getsignal(each) is signal.SIG_DFL]
    try:
        for each in ours:
            signal.signal(each, end)
        yield
    finally:
        for each in ours:
            signal.signal(each, signal.SIG_DFL)


@contextmanager
def temporary_folder(what: str) -> Iterator[Path]:
    """A private folder `hba-{what}-...` among the temporary ones, gone afterwards, also where a signal ends it."""
    with unwinding(), tempfile.TemporaryDirectory(prefix=f"hba-{what}-") as place:
        yield Path(place).resolve()


def _started(process_id: int) -> int:
    """When a process began, in ticks since the system did; 0 where that is not told. Ids are given out again."""
    try:
        told = Path(f"/proc/{process_id}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # of another user, on some machines
        return 0
    return int(told.rpartition(b")")[2].split()[19])  # the name in brackets may hold anything


def _lives(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return True


class Line(NamedTuple):
    number: int  # 1-based
    record: dict[str, Any]


@contextmanager
def named_os_errors(path: Path) -> Iterator[None]:
    """Raise StorageError naming `path` for a disk that is full or read-only; other errors stay as they are."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # EFBIG: the file-size limit of a batch system
            what = "no space left on the disk; nothing was half-written"
            fix = "Free some space and run the same command again; it resumes from the last whole file."
            raise StorageError(what, where=str(path), fix=fix) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            what, fix = f"cannot write ({error.strerror})", "Choose a writable folder."
            raise StorageError(what, where=str(path), fix=fix) from error
        raise


class Lock:
    """Held by one process and thread at a time; the kernel frees it when the process ends, kill -9 included.

    A forked child lets go of its copy: it may outlive its parent, and must not keep others out.
    """

    def __init__(self, path: Path, *, patience_seconds: float | None = None) -> None:
        """Take the lock `path`, a folder, or a file that is made if need be; nothing that it holds is changed.

        Waits while another holds it, for as long as that takes or for `patience_seconds`; then raises BlockingIOError.
        Raises StorageError when it cannot be made or locked.
        """
        self._descriptor: int | None = None
        with named_os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor, path, patience_seconds)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        _LOCKS.add(self)

    def close(self) -> None:
        """Let others have it."""
        if self._descriptor is not None:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            self.forget()

    def forget(self) -> None:
        """Close this process's copy; another that shares it goes on holding it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


_LOCKS: weakref.WeakSet[Lock] = weakref.WeakSet()


def _forget_locks() -> None:
    for lock in _LOCKS:
        lock.forget()


os.register_at_fork(after_in_child=_forget_locks)


def _lock(descriptor: int, path: Path, patience_seconds: float | None) -> None:
    end = time.monotonic() + (patience_seconds or 0.0)
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if patience_seconds is None else fcntl.LOCK_NB))
        except BlockingIOError:
            if time.monotonic() >= end:
                raise
            time.sleep(0.02)
        except OSError as error:
            fix = "Choose a folder on a file system with locks."
            raise StorageError(f"cannot lock ({error.strerror})", where=str(path), fix=fix) from None


@contextmanager
def alone(path: Path, *, busy: HbaError | None = None) -> Iterator[None]:
    """Hold the `Lock` of `path`; where another holds it, wait for that to end, or raise `busy`."""
    try:
        lock = Lock(path, patience_seconds=None if busy is None else 0.0)
    except BlockingIOError:
        raise busy or AssertionError from None
    with closing(lock):
        yield


@contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary neighbour of `path`; on success flush it to disk and rename it, on failure remove it.

    Raises StorageError when the disk is full or read-only; `path` then still holds what it held before.
    """
    path = Path(path)
    temporary = begun(path)
    encoding = None if "b" in mode else "utf-8"
    with named_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open(mode, encoding=encoding) as handle:
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Fill a temporary neighbour folder that becomes `path` in one rename; removed on failure.

    Raises StorageError when the disk is full. An existing `path` is replaced only after the new folder is
    whole. Its files have the mode of any new file, whatever wrote them.
    """
    path = Path(path)
    temporary = begun(path)
    with named_os_errors(path):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            mode = _mode_of_new_files(temporary)
            for file in temporary.rglob("*"):
                if file.is_file():
                    # safetensors makes its files for their owner alone; one that is linked has the mode it was given.
                    about = file.stat()
                    if about.st_nlink == 1:
                        file.chmod(about.st_mode & 0o777 | mode)
                    with file.open("rb") as handle:
                        os.fsync(handle.fileno())
            if path.exists():
                retired = temporary.with_suffix(".old")
                path.rename(retired)
                temporary.rename(path)
                shutil.rmtree(retired)
            else:
                temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _mode_of_new_files(folder: Path) -> int:
    """The mode that this process gives a file in `folder` (the umask cannot be read without changing it)."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    return mode


def write_data(path: str | Path, data: str | bytes) -> None:
    """Write a text or bytes, atomically."""
    with atomic_write(path, "w" if isinstance(data, str) else "wb") as handle:
        handle.write(data)


def write_jsonl(path: str | Path, records: Iterable[dict[str, Any]]) -> None:
    """Write one record a line, atomically. NaN and infinity are refused (ValueError)."""
    with atomic_write(path) as handle:
        handle.writelines(map(json_line, records))


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity are refused (ValueError)."""
    with atomic_write(path) as handle:
        json.dump(value, handle, indent=2, ensure_ascii=False, allow_nan=False)
        handle.write("\n")


UNREADABLE = (ValueError, RecursionError)
"""what `json.loads` raises of bytes: no JSON, no UTF-8, a number of thousands of digits, brackets without end"""


def read_json(path: str | Path) -> Any:
    """Read a JSON file. Raises InputError with file and line when it is missing or malformed."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError("no such file", where=str(path), fix="Check the path.") from None
    except UNREADABLE as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        what, fix = f"not valid JSON ({error})", "Repair or rewrite the file."
        raise InputError(what, where=f"{path}{line}", fix=fix) from None


def read_jsonl(path: str | Path, *, growing: bool = False) -> Iterator[Line]:
    """Yield the objects of a JSONL file with their 1-based line numbers.

    Of a `growing` file, which another process writes, a last line without its end is left for the next time, and one
    that is not there yet has no lines. Raises InputError naming file and line for a missing file, a malformed or
    truncated line, or a line that is not an object.
    """
    path = Path(path)
    if not path.is_file():
        if growing:
            return
        raise InputError("no such file", where=str(path), fix="Check the path.")
    with path.open("rb") as handle:
        for number, raw in enumerate(handle, 1):
            if not raw.strip() or (growing and not raw.endswith(b"\n")):
                continue
            try:
                record = json.loads(raw)
            except UNREADABLE as error:
                fix = "Repair the line; if it is the last one, the file was cut off."
                raise InputError(f"not valid JSON ({error})", where=f"{path}:{number}", fix=fix) from None
            if not isinstance(record, dict):
                found = f"expected a JSON object, found {type(record).__name__}"
                raise InputError(found, where=f"{path}:{number}", fix="Write one object per line.")
            yield Line(number, record)


def json_line(record: dict[str, Any]) -> str:
    """One record as one line of JSONL. NaN is refused (ValueError)."""
    return whole(json.dumps(record, ensure_ascii=False, allow_nan=False)) + "\n"


FORMULA = ("=", "+", "-", "@")  # what spreadsheets read as the beginning of one


def to_csv(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """One line a row, figures as numbers, empty where there is none. No spreadsheet takes a text for a formula."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    for row in rows:
        writer.writerow([f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell for cell in row])
    return out.getvalue()


def plural(number: int, noun: str, verb: str = "") -> str:
    """A number with its noun, and with its verb where one is given: '1 sample', '2 samples', '1 sample was'.

    `noun` is the singular, or both as 'medium|media'; `verb` is both as 'was|were'.
    """
    one, _, many = noun.partition("|")
    said = f"{number:,} {one if number == 1 else many or one + 's'}"
    first, _, second = verb.partition("|")
    return f"{said} {first if number == 1 else second}" if verb else said


def whole(text: str) -> str:
    """`text` with half a surrogate pair, which no file and no request can carry, replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _is_object(raw: bytes) -> bool:
    try:
        return isinstance(json.loads(raw), dict)
    except UNREADABLE:
        return False


class AppendLog:
    """An append-only JSONL file that survives kill -9: a torn last line is cut off when the log is opened again.

    A line that the disk refuses is taken back, so that the file holds whole lines at any time but that of a
    kill. Raises StorageError when the disk is full or read-only.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with named_os_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = self.path.open("ab", buffering=0)  # a buffer would write a refused line again later
            self._mend_last_line()

    def _mend_last_line(self) -> None:
        """Cut a last line that was torn off; end one that is whole and lacks only its newline."""
        with self.path.open("rb") as handle:
            end = position = handle.seek(0, os.SEEK_END)
            whole = 0
            while position > 0 and not whole:
                start = max(0, position - _TAIL_BYTES)
                handle.seek(start)
                newline = handle.read(position - start).rfind(b"\n")
                position, whole = start, start + newline + 1 if newline >= 0 else 0
            handle.seek(whole)
            tail = handle.read()
        if whole < end:
            if _is_object(tail):
                self._handle.write(b"\n")
            else:
                os.truncate(self.path, whole)

    def append(self, record: dict[str, Any]) -> None:
        """Add one record as one line and hand it to the operating system. NaN is refused (ValueError)."""
        line = json_line(record).encode()
        with named_os_errors(self.path):
            written = 0
            try:
                while written < len(line):
                    written += self._handle.write(line[written:])
            except OSError:
                size = os.fstat(self._handle.fileno()).st_size
                os.ftruncate(self._handle.fileno(), size - written)
                raise

    def close(self) -> None:
        """Flush to the disk and close."""
        if not self._handle.closed:
            with named_os_errors(self.path):
                try:
                    os.fsync(self._handle.fileno())
                finally:
                    self._handle.close()

    def __enter__(self) -> AppendLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def confined_path(root: Path, relative: str, *, where: str) -> Path:
    """The file that `relative` names below `root` (already resolved), links followed as far as `roots_of` lets them.

    `where` names file, row and field in errors. Raises InputError for an absolute path, a '..' or a link that leads
    anywhere else; MediaError when the file does not exist; MachineError when storage is away.
    """
    check_relative(relative, where=where)
    path, restore = root / relative, "Restore the file or remove the row."
    try:
        resolved = patiently(partial(path.resolve, strict=True), where)
    except (FileNotFoundError, NotADirectoryError):
        if not root.is_dir():
            raise MachineError(f"{root} is gone", where=where, fix=f"Mount or restore it. {_AGAIN}") from None
        raise MediaError(f"no such file: {relative}", where=where, fix=restore) from None
    except (OSError, RuntimeError) as error:
        raise MediaError(f"cannot open {relative} ({error})", where=where, fix=restore) from None
    if not resolved.is_relative_to(root) and not any(map(resolved.is_relative_to, roots_of(root))):
        raise InputError(f"{relative} is a link out of {root}", where=where, fix="Copy the file into the atlas folder.")
    return resolved


def roots_of(folder: Path) -> tuple[Path, ...]:
    """Where links below a resolved folder may lead: into it, and from a snapshot of the hub's cache to its contents.

    The cache keeps contents apart from the snapshots that name them: in `blobs` of the dataset, and what several
    datasets share in `blobs` of the cache.
    """
    found = [folder]
    for snapshot in (folder, *folder.parents):
        repo = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and _HUB_FOLDER.fullmatch(repo.name):
            shared = repo.parent / "blobs"
            own = [repo / "blobs", *([shared] if (shared / ".huggingface-shared-blobs").is_file() else [])]
            found += [blobs for blobs in own if blobs.is_dir() and not blobs.is_symlink()]
    return tuple(found)


_HUB_FOLDER = re.compile(r"(datasets|models|spaces)--.+")


def check_relative(relative: str, *, where: str) -> None:
    """Raise InputError unless `relative` is a plain path below its root (not absolute, no '..', no NUL)."""
    pure = PurePosixPath(relative.replace("\\", "/"))
    drive = len(relative) > 1 and relative[1] == ":"
    if not relative or pure.is_absolute() or ".." in pure.parts or drive or "\0" in relative:
        fix = "Use a path relative to the folder of the JSONL, without '..'."
        raise InputError(f"path {relative!r} leaves the atlas folder", where=where, fix=fix)


def file_sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def json_sha256(value: Any) -> str:
    """Hex SHA-256 of a value's canonical JSON (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def cache_folder() -> Path:
    """Where hba keeps what can be made again: $HBA_CACHE, else hba below $XDG_CACHE_HOME, else ~/.cache/hba."""
    own, shared = os.environ.get("HBA_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else (Path(shared) if shared else Path.home() / ".cache") / "hba"
