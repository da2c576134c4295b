"""Everything that hba writes goes through `atomic_write` or `AppendLog`; every path of a row through
`confined_path`.

Invariants: a file under its final name is whole; a log holds only whole lines, so that a killed run can go on
where it stopped; no path taken from data leads outside its root.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import IO, Any, NamedTuple

from hba.errors import HbaError, InputError, MediaError

_TAIL_BYTES = 1 << 16


class StorageError(InputError):
    """The disk refused a write (full, read-only, no permission)."""


class Line(NamedTuple):
    number: int  # 1-based
    record: dict[str, Any]


@contextmanager
def named_os_errors(path: Path) -> Iterator[None]:
    """Raise StorageError naming `path` for a disk that is full or read-only; other errors stay as they are."""
    try:
        yield
    except OSError as error:
        if error.errno in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EFBIG,
        ):  # EFBIG: the file-size limit of a batch system
            free = "Free some space and run the same command again; it resumes from the last whole file."
            raise StorageError(
                "no space left on the disk; nothing was half-written", where=str(path), fix=free
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise StorageError(
                f"cannot write ({error.strerror})", where=str(path), fix="Choose a writable folder."
            ) from error
        raise


@contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary neighbour of `path`; on success flush it to disk and rename it, on failure remove it.

    Raises StorageError when the disk is full or read-only; `path` then still holds what it held before.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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
                    _fsync(file)
            if path.exists():
                retired = path.with_name(f".{path.name}.{os.getpid()}.old")
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


def _fsync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity are refused (ValueError)."""
    with atomic_write(path) as handle:
        json.dump(value, handle, indent=2, ensure_ascii=False, allow_nan=False)
        handle.write("\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file. Raises InputError with file and line when it is missing or malformed."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError("no such file", where=str(path), fix="Check the path.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise InputError(
            f"not valid JSON ({error})", where=f"{path}{line}", fix="Repair or rewrite the file."
        ) from None


def read_jsonl(path: str | Path, expect: Callable[[dict[str, Any]], None] | None = None) -> Iterator[Line]:
    """Yield the objects of a JSONL file with their 1-based line numbers.

    Raises InputError naming file and line for a missing file, a malformed or truncated line, or a line that
    is not an object; `expect` may raise for a record that is not as its reader needs it.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError("no such file", where=str(path), fix="Check the path.")
    with path.open("rb") as handle:
        for number, raw in enumerate(handle, 1):
            if not raw.strip():
                continue
            try:
                record = json.loads(raw)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                fix = "Repair the line; if it is the last one, the file was cut off."
                raise InputError(f"not valid JSON ({error})", where=f"{path}:{number}", fix=fix) from None
            if not isinstance(record, dict):
                found = f"expected a JSON object, found {type(record).__name__}"
                raise InputError(found, where=f"{path}:{number}", fix="Write one object per line.")
            if expect is not None:
                expect(record)
            yield Line(number, record)


def _is_object(raw: bytes) -> bool:
    try:
        return isinstance(json.loads(raw), dict)
    except ValueError:
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
        line = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def confined_path(root: Path, relative: str, *, where: str) -> Path:
    """The file that `relative` names below `root` (already resolved), links followed.

    `where` names file, row and field in errors. Raises InputError for an absolute path, a '..' or a link that
    leads outside `root`; raises MediaError when the file does not exist.
    """
    check_relative(relative, where=where)
    path = root / relative
    try:
        resolved = path.resolve(strict=True)
    except (FileNotFoundError, NotADirectoryError):
        raise MediaError(f"no such file: {relative}", where=where, fix="Restore the file or remove the row.") from None
    except (OSError, RuntimeError) as error:
        raise MediaError(
            f"cannot open {relative} ({error})", where=where, fix="Restore the file or remove the row."
        ) from None
    if not resolved.is_relative_to(root):
        raise InputError(f"{relative} is a link out of {root}", where=where, fix="Copy the file into the atlas folder.")
    return resolved


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
        return hashlib.file_digest(handle, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(handle)


def _digest(handle: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while block := handle.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def json_sha256(value: Any) -> str:
    """Hex SHA-256 of a value's canonical JSON (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def cache_folder() -> Path:
    """Where hba keeps what can be made again: $HBA_CACHE, else hba below $XDG_CACHE_HOME, else ~/.cache/hba."""
    own, shared = os.environ.get("HBA_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else (Path(shared) if shared else Path.home() / ".cache") / "hba"


__all__ = [
    "AppendLog",
    "HbaError",
    "StorageError",
    "atomic_folder",
    "atomic_write",
    "cache_folder",
    "check_relative",
    "confined_path",
    "file_sha256",
    "json_sha256",
    "read_json",
    "read_jsonl",
    "write_json",
]
