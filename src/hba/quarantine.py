"""quarantine.jsonl: the samples that a run left out, each once, with the place and the reason.

A sample is quarantined, never replaced. The log is append-only and deduplicated by id, so that a resumed run names the
same samples as an uninterrupted one. The ranks of a run share the file: whoever adds a sample has it alone, and looks
first at what the others have added.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from hba.atlas.sample import Quarantined
from hba.errors import InputError
from hba.storage import AppendLog, alone, read_jsonl


class QuarantineLog:
    """The quarantine of one run folder; the file is made with the first sample."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "quarantine.jsonl"
        self._log: AppendLog | None = None
        self._known: set[str] = set()
        self._num_read = 0  # bytes of the file that `_known` is of

    def add(self, sample: Quarantined) -> None:
        """Record a sample unless it is there already. Raises StorageError on a full disk."""
        if sample.id in self._known:
            return
        with alone(self.path):
            if self._log is None:
                self._log = AppendLog(self.path)
                self.records()  # names a line that is none of a quarantine
            self._read_new()
            if sample.id not in self._known:
                self._log.append(sample._asdict())
                self._read_new()

    def _read_new(self) -> None:
        with self.path.open("rb") as handle:
            handle.seek(self._num_read)
            self._known |= {json.loads(line)["id"] for line in handle}
            self._num_read = handle.tell()

    def add_all(self, samples: Iterable[Quarantined]) -> None:
        """Record each sample that is not there already."""
        for sample in samples:
            self.add(sample)

    def records(self, split: str | None = None) -> list[dict[str, Any]]:
        """What has been left out so far, in one split or in all, other ranks and earlier sessions included.

        Raises InputError naming file, line and field for a line that is none of a quarantine.
        """
        found: list[dict[str, Any]] = []
        lines = read_jsonl(self.path) if self.path.is_file() else ()
        for line in lines:
            missing = [name for name in ("id", "split") if not isinstance(line.record.get(name), str)]
            if missing:
                where = f"{self.path}:{line.number}, {missing[0]}"
                raise InputError("expected a text", where=where, fix="Repair the line, or remove it.")
            if split is None or line.record["split"] == split:
                found.append(line.record)
        return found

    def close(self) -> None:
        """Flush to the disk and close."""
        if self._log is not None:
            self._log.close()
            self._log = None

    def __enter__(self) -> QuarantineLog:
        if self.path.is_file():
            AppendLog(self.path).close()  # cuts off a line that a kill left torn, before anyone reads it
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
