"""Where the media embedded in a parquet shard lie, so that one row costs the bytes of one row.

Parquet cannot be read by row: a reader decodes a whole column chunk, often gigabytes, to serve one clip. But a column
that is neither compressed nor dictionary-encoded holds each value as it is, in one piece. An index part beside a shard
(`index/<name of the shard>.arrow`) holds the rows without their media, and for each medium its offset and size in the
shard, and the CRC-32 of every 128 KiB of it: an Arrow stream, which opens ten times as fast as parquet, and the
CRC-32 of the stream. Every offset was found by reading the
shard back and comparing the bytes; a part carries a stamp of its shard, and one that does not fit, or is damaged, is an
error. A value that lies in pieces (a compressed column) has the offset -1.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from hba.atlas.sample import MEDIA_FIELDS
from hba.atlas.slices import PLACES, Slice, checksums_of, read_bytes
from hba.errors import InputError
from hba.storage import atomic_write, machine_fault, patiently

_VERSION = 3
_CRC_BYTES = 4
TAIL_BYTES = 1 << 16
_META = b"hba"


def index_path(shard: Path) -> Path:
    """The index part of a shard."""
    return shard.parent / "index" / f"{shard.name}.arrow"


class Remote(Protocol):
    """A shard of which only a part is on this machine."""

    def open(self) -> BinaryIO:
        """A file that fetches what is read from it."""
        ...

    def fetch(self, start: int, stop: int) -> None:
        """Have these bytes of the shard in its file."""
        ...


def open_shard(shard: Path, remote: Remote | None = None, *, buffer_bytes: int = 0) -> pq.ParquetFile:
    """The opened shard; `remote` fetches what is read of it. Raises InputError when it is not a whole parquet file."""
    options: dict[str, Any] = {"pre_buffer": False, "page_checksum_verification": True, "buffer_size": buffer_bytes}

    def opened() -> pq.ParquetFile:
        return pq.ParquetFile(shard if remote is None else pa.PythonFile(remote.open(), mode="r"), **options)

    try:
        return patiently(opened, str(shard))
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        what = f"is not a whole parquet file ({reason})"
        raise InputError(what, where=str(shard), fix="Download or convert the shard again.") from None


def stamp(shard: Path) -> str:
    """What tells a shard from another: its size and a hash of its end, which holds the places of everything in it."""
    size = patiently(shard.stat, str(shard)).st_size
    tail = read_bytes(Slice(shard, max(0, size - TAIL_BYTES), min(size, TAIL_BYTES)))
    return f"{size}:{hashlib.sha256(tail).hexdigest()}"


def write_index(shard: Path) -> Path:
    """Read a shard once, row group by row group, and write its index part. Raises InputError for a damaged shard."""
    with open_shard(shard) as file, shard.open("rb") as raw:
        with mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                tables = [_group_index(file, group, data) for group in range(file.num_row_groups)]
            except (pa.ArrowException, OSError) as error:
                damaged = InputError(f"is damaged ({error})", where=str(shard), fix="Restore the shard.")
                raise machine_fault(error, str(shard)) or damaged from None
        schema = file.schema_arrow
    if not tables:
        tables = [pa.schema([field for field in schema if field.name not in MEDIA_FIELDS]).empty_table()]
    table = pa.concat_tables(tables)
    table = table.replace_schema_metadata({_META: json.dumps({"version": _VERSION, "stamp": stamp(shard)})})
    path = index_path(shard)
    stream = pa.BufferOutputStream()
    with pa.ipc.new_stream(stream, table.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        writer.write_table(table.combine_chunks())
    content = stream.getvalue()
    with atomic_write(path, "wb") as handle:
        handle.write(content)
        handle.write(zlib.crc32(content).to_bytes(_CRC_BYTES, "little"))
    return path


def read_index(shard: Path, shard_stamp: str | None = None) -> pa.Table | None:
    """The index part of a shard, None when there is none. `shard_stamp`: the stamp of the shard, if it is known.

    Raises InputError when the part is damaged, or belongs to another shard than the one that is there.
    """
    path = index_path(shard)
    fix = "Delete it; the shard can be indexed again."
    try:
        data = memoryview(patiently(path.read_bytes, str(path)))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", where=str(path), fix=fix) from None
    content, crc = data[:-_CRC_BYTES], data[-_CRC_BYTES:]
    try:
        if zlib.crc32(content) != int.from_bytes(crc, "little"):
            raise ValueError("its checksum differs")
        table = pa.ipc.open_stream(pa.py_buffer(content)).read_all()
        table.validate(full=True)
        meta = json.loads((table.schema.metadata or {}).get(_META, b"{}"))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"is damaged ({error})", where=str(path), fix=fix) from None
    if meta.get("version") != _VERSION:
        what = f"is of format {meta.get('version')}, this hba reads format {_VERSION}"
        fix = f"Delete {path.parent}, then convert the shards again: hba atlas convert OLD NEW --to parquet."
        raise InputError(what, where=str(path), fix=fix)
    if meta.get("stamp") != (shard_stamp or stamp(shard)):
        raise InputError(f"was not made from {shard.name} as it is now", where=str(path), fix=fix)
    return table


def _group_index(file: pq.ParquetFile, group: int, data: mmap.mmap) -> pa.Table:
    names = file.schema_arrow.names
    light = file.read_row_group(group, columns=[n for n in names if n not in MEDIA_FIELDS], use_threads=False)
    for name in MEDIA_FIELDS:
        if name in names:
            places = _places(file, group, name, data)
        else:
            places = _Places([[]] * light.num_rows, [[]] * light.num_rows, [[]] * light.num_rows)
        for what, column, kind in zip(PLACES, places, (pa.int64(), pa.int64(), pa.binary()), strict=True):
            light = light.append_column(f"{name}_{what}", pa.array(column, pa.list_(kind)))
    return light


class _Places(NamedTuple):
    """Where the media of a field lie, by row of a group."""

    offsets: list[list[int]]
    sizes: list[list[int]]
    checksums: list[list[bytes]]


def _places(file: pq.ParquetFile, group: int, name: str, data: mmap.mmap) -> _Places:
    at, stop = _chunk(file, group, name)
    found = _Places([], [], [])
    # One batch of a few rows at a time: a group may hold gigabytes.
    for batch in file.iter_batches(batch_size=8, row_groups=[group], columns=[name], use_threads=False):
        for values in batch.column(0).to_pylist():
            places, at = _locate(values or (), data, at, stop)
            found.offsets.append(places)
            found.sizes.append([len(value or b"") for value in values or ()])
            found.checksums.append([checksums_of(value or b"") for value in values or ()])
    return found


def _chunk(file: pq.ParquetFile, group: int, name: str) -> tuple[int, int]:
    """First and last byte of a column's data in a row group; an empty range when it is compressed."""
    metadata = file.metadata.row_group(group)
    for number in range(metadata.num_columns):
        column = metadata.column(number)
        if column.path_in_schema.split(".")[0] == name and column.compression == "UNCOMPRESSED":
            start = column.data_page_offset
            if column.has_dictionary_page and column.dictionary_page_offset:
                start = min(start, column.dictionary_page_offset)
            return start, start + column.total_compressed_size
    return 0, 0


def _locate(values: Sequence[bytes | None], data: mmap.mmap, at: int, stop: int) -> tuple[list[int], int]:
    """Offsets of values that follow each other from `at` on, each compared byte by byte; -1 where not found."""
    places: list[int] = []
    for value in values:
        if not value:
            places.append(-1)
            continue
        sign = len(value).to_bytes(4, "little")  # parquet's plain encoding: length, then the bytes
        found = data.find(sign + value[:256], at, stop)
        while found >= 0 and data[found + 4 : found + 4 + len(value)] != value:
            found = data.find(sign + value[:256], found + 1, stop)
        places.append(found + 4 if found >= 0 else -1)
        at = found + 4 + len(value) if found >= 0 else at
    return places, at
