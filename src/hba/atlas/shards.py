"""Writes one parquet shard whose media can be read by row, and checks it before anyone can see it.

Media columns are stored plain, text columns compressed; the index part beside the shard says where each medium lies
(see `embedded`). The shard is made in a hidden folder, read back through its index, compared with what went in, medium
by medium, and only then renamed to its place, after its index part and its summary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from hba.atlas.embedded import index_path, read_index, write_index
from hba.atlas.parquet import EXTRA
from hba.atlas.records import TEXT_FIELDS, Record
from hba.atlas.sample import MEDIA_FIELDS, Quarantined
from hba.atlas.slices import PLACES, Slice, read_bytes
from hba.atlas.tables import MEDIA_PATHS
from hba.errors import HbaError
from hba.storage import atomic_write, file_sha256, read_json, write_json, writer_name

GROUP_BYTES = 16 << 20  # what a reader without the index part reads to serve a row
STAGING = ".convert"
_TEXT = ("id", *TEXT_FIELDS, EXTRA)
_SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.string()) for name in _TEXT),
        pa.field("texts", pa.list_(pa.string())),
        *(pa.field(name, pa.list_(pa.binary())) for name in MEDIA_FIELDS),
        pa.field(MEDIA_PATHS, pa.struct([pa.field(name, pa.list_(pa.string())) for name in MEDIA_FIELDS])),
    ]
)
_COMPRESSION = dict.fromkeys(_TEXT, "zstd") | {"texts.list.element": "zstd"}
_COMPRESSION |= {f"{MEDIA_PATHS}.{name}.list.element": "zstd" for name in MEDIA_FIELDS}
_COMPRESSION |= {f"{name}.list.element": "none" for name in MEDIA_FIELDS}
_OPTIONS: dict[str, Any] = {
    "compression": _COMPRESSION,
    "use_dictionary": ["dataset", "task"],
    "write_statistics": list(_COMPRESSION.keys() - {f"{name}.list.element" for name in MEDIA_FIELDS}),
    "write_page_checksum": True,  # so that a conversion from these shards notices bytes that have changed
}


class Summary(msgspec.Struct, kw_only=True, frozen=True):
    """What a part of a conversion holds. `origin` tells which rows of which data it was made from."""

    file: str
    origin: str
    rows: int
    media: int
    media_bytes: int
    named: int = 0
    """media that had no path and were given one"""
    sha256: str
    """of the file; the media of JSONL are files of their own"""
    unreadable: list[dict[str, Any]]


class _Tally:
    """Counts and hashes what goes into a part."""

    def __init__(self) -> None:
        self.hashes: list[str | None] = []
        self.bytes = 0
        self.rows: list[dict[str, Any]] = []
        self.unreadable: dict[str, Quarantined] = {}

    def add(self, record: Record) -> None:
        for name in MEDIA_FIELDS:
            for medium in record.media[name]:
                self.hashes.append(None if medium is None else hashlib.sha256(medium).hexdigest())
                self.bytes += len(medium or b"")
        for left_out in record.unreadable:
            self.unreadable.setdefault(left_out.id, left_out)


def summary_path(path: Path) -> Path:
    """Where the summary of a shard lies."""
    return index_path(path).with_suffix(".json")


def read_summary(path: Path, origin: str) -> Summary | None:
    """The summary of a shard that is whole and was made from `origin`; None when there is none."""
    where = summary_path(path)
    if not path.is_file() or not index_path(path).is_file() or not where.is_file() or read_index(path) is None:
        return None
    summary = msgspec.convert(read_json(where), Summary)
    return summary if summary.origin == origin else None


def write_shard(path: Path, records: Iterable[Record], origin: str) -> Summary:
    """Write, check and place one shard. Raises HbaError when it reads back differently, StorageError on a full disk."""
    staged = path.parent / STAGING / writer_name() / path.name
    tally = _Tally()
    with atomic_write(staged, "wb") as handle, pq.ParquetWriter(handle, _SCHEMA, **_OPTIONS) as writer:
        rows: list[dict[str, Any]] = []
        written = 0
        for record in records:
            tally.add(record)
            rows.append(_row(record))
            tally.rows.append({name: value for name, value in rows[-1].items() if name not in MEDIA_FIELDS})
            if tally.bytes - written >= GROUP_BYTES:
                writer.write_table(pa.Table.from_pylist(rows, _SCHEMA))
                rows, written = [], tally.bytes
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, _SCHEMA))
    _check(staged, tally)
    summary = Summary(
        file=path.name,
        origin=origin,
        rows=len(tally.rows),
        media=len(tally.hashes),
        media_bytes=tally.bytes,
        sha256=file_sha256(staged),
        unreadable=[left_out._asdict() for left_out in tally.unreadable.values()],
    )
    write_json(summary_path(path), msgspec.to_builtins(summary))
    index_path(staged).replace(index_path(path))
    staged.replace(path)
    return summary


def _row(record: Record) -> dict[str, Any]:
    row: dict[str, Any] = {"id": record.id, **record.fields, "texts": record.texts} | dict(record.media.items())
    row[EXTRA] = msgspec.json.encode(record.extra).decode() if record.extra else None
    row[MEDIA_PATHS] = record.paths
    return row


def _check(shard: Path, tally: _Tally) -> None:
    """Raise HbaError unless every row, and every medium as the index finds it, is what was written."""
    write_index(shard)
    table = read_index(shard)
    found: list[dict[str, Any]] = table.to_pylist() if table is not None else []
    hashes: list[str | None] = []
    for values in found:
        for name in MEDIA_FIELDS:
            for offset, size, crcs in zip(*(values.pop(f"{name}_{what}") for what in PLACES), strict=True):
                data = read_bytes(Slice(shard, offset, size, crcs), where=str(shard)) if offset >= 0 else b""
                hashes.append(hashlib.sha256(data).hexdigest())
    empty = hashlib.sha256(b"").hexdigest()  # an index does not tell an empty medium from a null
    if found != tally.rows or hashes != [each or empty for each in tally.hashes]:
        raise HbaError("reads back differently", where=str(shard), fix="Check the disk and convert again.")
