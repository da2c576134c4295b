"""What has been extracted and what could not be: the folder `describe/` of an atlas.

`manifest.jsonl` is append-only: an item is entered as started before it is worked on and as done after its file stands
whole under its name, so that after kill -9 every file is known to be ours, and what is not done is done again. The last
line of an output counts. `describe_failures.jsonl` names every item that failed and why; what succeeds later leaves it
at the end of that run. One process at a time works on an atlas.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

from hba.descriptors.items import Item
from hba.environment import now
from hba.errors import HbaError
from hba.storage import AppendLog, StorageError, atomic_write, file_sha256, is_abandoned, read_jsonl

FOLDER = "describe"


class Extracted(NamedTuple):
    """What an extractor reports of a file that it wrote."""

    medium_bytes: int
    medium_mtime_ns: int
    medium_sha256: str
    output_bytes: int
    shapes: dict[str, list[int]]
    medium_seconds: float | None
    work_seconds: float


class Failed(NamedTuple):
    """Why there is no file for an item."""

    reason: str


class Ledger:
    """The manifest and the failures of an atlas; open it with `open_ledger`."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root / FOLDER
        self._manifest = AppendLog(self.folder / "manifest.jsonl")
        self._failures = AppendLog(self.failures_path)
        self._last = {line.record["output"]: line.record for line in read_jsonl(self._manifest.path)}
        self._failed = {line.record["output"]: line.record for line in read_jsonl(self.failures_path)}

    @property
    def failures_path(self) -> Path:
        """The file that names what failed."""
        return self.folder / "describe_failures.jsonl"

    def outputs(self) -> set[str]:
        """Every output that was ever started here, whole or not."""
        return set(self._last)

    def is_done(self, item: Item) -> bool:
        """Whether the item's file stands, by this extractor, from the medium as it is now.

        A medium of equal size and time is taken for unchanged; otherwise its SHA-256 decides.
        """
        record = self._last.get(item.output)
        if record is None or record["state"] != "done" or record["extractor"] != item.extractor:
            return False
        try:
            if (self.root / item.output).stat().st_size != record["output_bytes"]:
                return False
            medium = self.root / item.medium
            status = medium.stat()
            if (status.st_size, status.st_mtime_ns) == (record["medium_bytes"], record["medium_mtime_ns"]):
                return True
            return bool(status.st_size == record["medium_bytes"] and file_sha256(medium) == record["medium_sha256"])
        except OSError:
            return False

    def start(self, item: Item) -> None:
        """Enter an item before it is worked on, and remove what a killed run left half-written of it."""
        output = self.root / item.output
        for rest in output.parent.glob(f".{escape(output.name)}.*.tmp") if item.output in self._last else ():
            if is_abandoned(rest):
                rest.unlink(missing_ok=True)
        self._enter({"state": "started", "output": item.output})

    def finish(self, item: Item, result: Extracted) -> None:
        """Enter an item whose file stands."""
        about = {"kind": item.kind, "medium": item.medium, "extractor": item.extractor, "at": now()}
        self._enter({"state": "done", "output": item.output, **about, **result._asdict()})

    def _enter(self, record: dict[str, Any]) -> None:
        self._manifest.append(record)
        self._last[record["output"]] = record

    def fail(self, item: Item, reason: str) -> None:
        """Record why an item failed, unless the same is recorded already."""
        about = {"kind": item.kind, "medium": item.medium, "output": item.output, "extractor": item.extractor}
        record = {**about, "where": item.where, "reason": reason}
        if {**self._failed.get(item.output, {}), "at": None} != {**record, "at": None}:
            self._failed[item.output] = record | {"at": now()}
            self._failures.append(self._failed[item.output])

    def settle(self, mended: set[str]) -> None:
        """Take the `mended` outputs out of the failures, and leave one line for each that still fails."""
        for output in mended:
            self._failed.pop(output, None)
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in self._failed.values())
        if text != self.failures_path.read_text(encoding="utf-8"):
            self._failures.close()
            with atomic_write(self.failures_path) as handle:
                handle.write(text)
            self._failures = AppendLog(self.failures_path)

    def close(self) -> None:
        """Flush to the disk and close."""
        self._manifest.close()
        self._failures.close()


@contextmanager
def open_ledger(root: Path) -> Iterator[Ledger]:
    """The ledger of an atlas, locked against other processes. Raises HbaError when another one works on it."""
    with _locked(root / FOLDER / "lock"):
        ledger = Ledger(root)
        try:
            yield ledger
        finally:
            ledger.close()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        fix = "Choose an atlas in a writable folder."
        raise StorageError(f"cannot write ({error.strerror})", where=str(path.parent), fix=fix) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        what, fix = "another process extracts descriptors here", "Wait for it to end, or end it."
        raise HbaError(what, where=str(path.parent), fix=fix) from None
    finally:
        os.close(descriptor)  # which drops the lock; the system does it when the process is killed
