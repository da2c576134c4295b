"""quarantine.jsonl: the samples that a run left out, each once, with the place and the reason.

A sample is quarantined, never replaced. The log is append-only and deduplicated by id, so that a resumed run names the
same samples as an uninterrupted one.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from hba.atlas.sample import Quarantined
from hba.storage import AppendLog, read_jsonl


class QuarantineLog:
    """The quarantine of one run folder. Use as a context manager."""

    def __init__(self, folder: Path) -> None:
        path = folder / "quarantine.jsonl"
        self._log = AppendLog(path)
        self._records = {line.record["id"]: line.record for line in read_jsonl(path)}

    def add(self, sample: Quarantined) -> None:
        """Record a sample unless it is there already."""
        if sample.id not in self._records:
            self._records[sample.id] = sample._asdict()
            self._log.append(sample._asdict())

    def records(self, split: str | None = None) -> list[dict[str, Any]]:
        """What has been left out so far, in one split or in all."""
        return [r for r in self._records.values() if split is None or r["split"] == split]

    def __enter__(self) -> QuarantineLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._log.close()
