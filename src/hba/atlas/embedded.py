"""Where the media embedded in a parquet shard lie, so that one row costs the bytes of one row.

Parquet cannot be read by row: a reader decodes a whole column chunk, often gigabytes, to serve one clip. But a column
that is not compressed holds each value as it is, in one piece. An index part beside a shard (`index/<name of the
shard>.arrow`) holds the rows without their media, and for each medium its offset and size in the shard, and the CRC-32
of every 128 KiB of it: an Arrow stream, which opens ten times as fast as parquet, and the CRC-32 of the stream. A part
carries a stamp of its shard, and one that does not fit, or is damaged, is an error. A value that lies in pieces (a
compressed column) has the offset -1. Without an index part, `ShardMedia` finds a medium when it is asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from hba.atlas.pages import DamagedPageError, KeptPages, Read, ShardPages, Value
from hba.atlas.sample import MEDIA_FIELDS, Field
from hba.atlas.slices import PLACES, Slice, Source, checksums_of, read_bytes
from hba.errors import InputError, MediaError
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
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
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
    with open_shard(shard) as file, shard.open("rb", buffering=0) as raw:
        tables: list[pa.Table] = []
        read: Read = lambda start, size: os.pread(raw.fileno(), size, start)  # noqa: E731 -- one line of its own
        first = 0
        try:
            pages = ShardPages(file, read, shard.stat().st_size, KeptPages())
            for group in range(file.num_row_groups):
                tables.append(_group_index(file, group, first, pages, read))
                first += tables[-1].num_rows
        except (DamagedPageError, pa.ArrowException, OSError) as error:
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


def _group_index(file: pq.ParquetFile, group: int, first: int, pages: ShardPages, read: Read) -> pa.Table:
    """The index of a row group, whose first row has the number `first` in the shard."""
    names = file.schema_arrow.names
    light = file.read_row_group(group, columns=[n for n in names if n not in MEDIA_FIELDS], use_threads=False)
    for name in MEDIA_FIELDS:
        found: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
        for row in range(first, first + light.num_rows):
            media = pages.media(row, name)
            found[0].append([value.offset if value is not None and value.size else -1 for value in media])
            found[1].append([0 if value is None else value.size for value in media])
            found[2].append([b"" if value is None else checksums_of(_bytes_of(value, read)) for value in media])
        for what, column, kind in zip(PLACES, found, (pa.int64(), pa.int64(), pa.binary()), strict=True):
            light = light.append_column(f"{name}_{what}", pa.array(column, pa.list_(kind)))
    return light


def _bytes_of(value: Value, read: Read) -> memoryview:
    return value.data if value.data is not None else memoryview(read(value.offset, value.size))


class ShardMedia:
    """The media of a shard without an index part, each found when it is asked for (see `pages`)."""

    def __init__(self, shard: Path, kept: KeptPages, remote: Remote | None = None) -> None:
        """Raises InputError when it is not a whole parquet file."""
        self._shard, self._remote = shard, remote
        self._raw = patiently(lambda: shard.open("rb", buffering=0), str(shard))
        file, size = open_shard(shard, remote), patiently(shard.stat, str(shard)).st_size
        with _damage_named(str(shard)):
            self._pages = ShardPages(file, self._read, size, kept, None if remote is None else self._announce)

    def _read(self, start: int, size: int) -> bytes:
        if self._remote is not None:
            self._remote.fetch(start, start + size)
        return patiently(partial(os.pread, self._raw.fileno(), size, start), str(self._shard))

    def _announce(self, start: int, size: int) -> None:
        if self._remote is not None:
            self._remote.fetch(start, start + size)

    def count(self, row: int, name: Field, *, where: str) -> int:
        """How many media a row (of the shard) has in a field. Raises MediaError naming `where` for a damaged shard."""
        with _damage_named(where):
            return self._pages.count(row, name)

    def medium(self, row: int, name: Field, index: int, *, where: str) -> Source:
        """A medium, as a slice of the shard or as bytes. Raises MediaError when it is null or damaged."""
        with _damage_named(where):
            media = self._pages.media(row, name)
        value = media[index] if index < len(media) else None
        if value is None:
            raise MediaError("is null", where=where, fix="Restore the medium, or remove the row.")
        if value.data is not None:
            return bytes(value.data)
        if self._remote is not None:
            self._remote.fetch(value.offset, value.offset + value.size)
        return Slice(self._shard, value.offset, value.size)


@contextmanager
def _damage_named(where: str) -> Iterator[None]:
    try:
        yield
    except (DamagedPageError, pa.ArrowException, OSError) as error:
        what = f"cannot be read ({error or type(error).__name__}): cut off or corrupt"
        raise machine_fault(error, where) or MediaError(what, where=where, fix="Restore the shard.") from None
