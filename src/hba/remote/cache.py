"""Replies by the content hash of their requests: what was asked and answered once is not asked again.

A folder of append-only segments. Each process appends to a segment of its own (the first that no other process has
locked) and reads all, so that several commands share a cache. A line that a kill tore is cut off by the next owner of
its segment and ignored by everyone else. The key hashes provider, URL, body and draw; keys of services are in neither,
nor is any part of a request stored.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from hba.remote.request import Reply
from hba.storage import AppendLog, named_os_errors

KEPT = ("text", "finish", "tokens_in", "tokens_out", "model")


class _Place(NamedTuple):
    segment: Path
    offset: int
    length: int


class ResponseCache:
    """The cache in `folder`; its memory is an index of keys, replies stay on disk. Used as a context manager."""

    def __init__(self, folder: Path) -> None:
        with named_os_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._lock, segment = _own_segment(folder)
        self._log = AppendLog(segment)
        self._end = segment.stat().st_size
        self._places: dict[str, _Place] = {}
        for path in sorted(folder.glob("segment-*.jsonl")):
            self._places |= _index(path)

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: str) -> Reply | None:
        """The reply to the request of that hash, or None."""
        place = self._places.get(key)
        if place is None:
            return None
        with place.segment.open("rb") as handle:
            handle.seek(place.offset)
            record = _record(handle.read(place.length))
        if record is None or record["key"] != key:  # the segment was replaced under us
            return None
        left_out = tuple(record.get("left_out", ()))
        return Reply(cached=True, left_out=left_out, **{name: record[name] for name in KEPT})

    def put(self, key: str, reply: Reply) -> None:
        """Keep a reply. Raises StorageError on a full disk."""
        kept = asdict(reply)
        left_out = {"left_out": list(reply.left_out)} if reply.left_out else {}
        self._log.append({"key": key} | {name: kept[name] for name in KEPT} | left_out)
        end = self._log.path.stat().st_size
        self._places[key] = _Place(self._log.path, self._end, end - self._end)
        self._end = end

    def close(self) -> None:
        """Flush to the disk and give the segment free."""
        self._log.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> ResponseCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _own_segment(folder: Path) -> tuple[int, Path]:
    """The first segment that no process has locked, with the descriptor that holds its lock."""
    number = 0
    while True:
        segment = folder / f"segment-{number}.jsonl"
        with named_os_errors(segment):
            descriptor = os.open(segment, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            number += 1
        else:
            return descriptor, segment


def _record(raw: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(record, dict) and isinstance(record.get("key"), str) and set(KEPT) <= record.keys()
    return record if whole else None


def _index(segment: Path) -> dict[str, _Place]:
    places, offset = {}, 0
    with segment.open("rb") as handle:
        for raw in handle:
            if (record := _record(raw)) is not None:
                places[str(record["key"])] = _Place(segment, offset, len(raw))
            offset += len(raw)
    return places
