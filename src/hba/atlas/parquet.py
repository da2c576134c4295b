"""Rows of parquet shards whose media are embedded as bytes.

Opening reads the columns without media (from the index parts where there are some) and checks every row
(see `tables`). A medium of an indexed shard is a slice of the shard: a decoder reads the bytes that it needs, and no
more. Without an index it is found by the pages of its column (see `pages`), and no medium is read for what rows say.
Ids, order, samples and fingerprint are those of the JSONL form that the shards were made from; a shard that is cut off,
of another schema or changed after it was opened is an InputError.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import weakref
import zlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hba.atlas.pages import DamagedPageError, KeptPages, Read, ShardPages, Value, is_list
from hba.atlas.rows import (
    KINDS,
    MEDIA_FIELDS,
    NAME_FIELDS,
    UNNAMED,
    Columns,
    Field,
    Quarantined,
    Row,
    RowChecker,
    Said,
    Sample,
    canonical,
    check_paths,
    make_columns,
    signature_kinds,
)
from hba.atlas.source import PLACES, Slice, Source, checksums_of, read_bytes
from hba.errors import HbaError, InputError, MediaError
from hba.storage import atomic_write, machine_fault, patiently
from hba.taxonomy import Taxonomy

# The checks of rows that lie in Arrow tables, column by column.
#
# They are those of `rows.RowChecker`. Almost every row says what another said before, so that it looks at one example
# of each combination; the row that an error names is the first of its kind. A null in `{field}_sizes` says that the
# media of a row are not known before they are read; its signature is then trusted for their number, and checked when
# they are. Arrays leave pyarrow by DLPack, and no value of Python enters it: `to_numpy`, `pa.array` and scalar
# arguments import pandas where it is installed, which takes longer than all the checks.


TEXT = ("problem", "dataset", "task", "modality_signature")
OPTIONAL = ("answer", "class_label", "id")
MEDIA_PATHS = "media_paths"
"""what embedded media were called as files: a struct of field to list of paths"""
_SUSPECT = r"^/|^$|\.\.|[:\\\x00\n]"
FIX_SCHEMA = "Write the published schema; see the schema of a row in docs."

_STRINGS = (pa.string(), pa.large_string(), pa.string_view(), pa.null())
_BINARIES = (pa.binary(), pa.large_binary(), pa.binary_view(), pa.null())


def check_schema(schema: pa.Schema, shard: Path) -> None:
    """Raise InputError naming the column when one is missing or of another type than the published schema says."""
    for name in (*TEXT, *OPTIONAL, *MEDIA_FIELDS, "texts", MEDIA_PATHS):
        if len(places := schema.get_all_field_indices(name)) > 1:
            raise InputError(f"column {name!r}: is there {len(places)} times", where=str(shard), fix=FIX_SCHEMA)
        position = schema.get_field_index(name)
        if position < 0 and name in TEXT:
            raise InputError(f"column {name!r}: is missing", where=str(shard), fix=FIX_SCHEMA)
        if position >= 0:
            kind = schema.field(position).type
            expected, good = _expected(name, kind)
            if not good:
                what = f"column {name!r}: expected {expected}, found {kind}"
                raise InputError(what, where=str(shard), fix=FIX_SCHEMA)


def _expected(name: str, kind: pa.DataType) -> tuple[str, bool]:
    types = pa.types
    if name in TEXT or name in OPTIONAL:
        good = kind in _STRINGS[:3] or types.is_dictionary(kind)
        return "string", good or (name in OPTIONAL and types.is_null(kind))
    if types.is_null(kind):
        return "", True
    if name == MEDIA_PATHS:
        good = types.is_struct(kind) and all(is_list(f.type) and f.type.value_type in _STRINGS for f in kind)
        return "lists of string by field", good
    if name == "texts":
        return "list of string", is_list(kind) and kind.value_type in _STRINGS
    return "list of binary, or of structs {bytes, path}", _holds_bytes(kind.value_type if is_list(kind) else kind)


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        position = kind.get_field_index("bytes")
        return position >= 0 and kind.field(position).type in _BINARIES
    return kind in _BINARIES


def uniform(table: pa.Table) -> pa.Table:
    """The table with plain string columns, names as a reader sees them (`taxonomy.visible`), and nulls where
    optional columns and sizes are absent."""
    for name in (*TEXT, *OPTIONAL):
        position = table.schema.get_field_index(name)
        if position < 0:
            table = table.append_column(name, pa.nulls(table.num_rows, pa.string()))
        elif table.schema.field(position).type != pa.string():
            table = table.set_column(position, name, table[name].cast(pa.string()))
    position = table.schema.get_field_index("texts")
    if position >= 0 and table.schema.field(position).type != pa.list_(pa.string()):
        table = table.set_column(position, "texts", table["texts"].cast(pa.list_(pa.string())))
    for name in NAME_FIELDS:
        if not pc.all(pc.string_is_ascii(table[name])).as_py():
            seen = pc.replace_substring_regex(pc.utf8_normalize(table[name], "NFKC"), r"\p{Cf}", "")
            table = table.set_column(table.schema.get_field_index(name), name, pc.utf8_trim_whitespace(seen))
    for name in MEDIA_FIELDS:
        if f"{name}_sizes" not in table.schema.names:
            table = table.append_column(f"{name}_sizes", pa.nulls(table.num_rows, pa.list_(pa.int64())))
    return table


def check_tables(tables: list[pa.Table], store: ParquetStore) -> Columns:
    """Check the rows of the tables of a store, in order. Raises InputError naming the row and the field."""
    place = lambda line: store.place(line - 1)  # noqa: E731 -- one word of its own
    checker = RowChecker(store.taxonomy, split=store.split, place=place)
    table = pa.concat_tables([each.select([*TEXT, *OPTIONAL, *(f"{name}_sizes" for name in KINDS)]) for each in tables])
    for name in TEXT:
        if table[name].null_count:
            where = store.place(pc.index(pc.is_null(table[name]), True).as_py())
            raise InputError(f"field {name!r}: is missing", where=where, fix=FIX_SCHEMA)
    counts_KN = [numbers_of(pc.list_value_length(table[f"{name}_sizes"]), null=-1) for name in KINDS]
    datasets, dataset_codes_N = _encoded(table["dataset"])
    known = [store.taxonomy.datasets.get(name) for name in datasets]
    free_N = np.array([dataset is not None and dataset.free_form for dataset in known])[dataset_codes_N]
    key_N = dataset_codes_N
    for name in ("class_label", "answer", "modality_signature"):
        values, codes_N = _encoded(table[name])
        if name == "answer":  # of free-form rows, which hardly ever repeat, it counts whether there is one
            said_N = np.array([value is not None for value in values], np.int64)[codes_N]
            codes_N = np.where(free_N, said_N, codes_N)
        key_N = key_N * (len(values) + 1) + codes_N
    for counts_N in counts_KN:
        key_N = key_N * 3 + np.sign(counts_N) + 1
    _, examples, codes_N = np.unique(key_N, return_index=True, return_inverse=True)
    found = {}
    for number in sorted(examples.tolist()):
        media_known = all(counts_N[number] >= 0 for counts_N in counts_KN)
        found[number] = checker.meaning(store.row(number), number + 1, media_known=media_known)
    signatures = tuple(dict.fromkeys(signature for signature, _ in found.values()))
    said = [found[number] for number in examples.tolist()]
    signature_codes_N = np.array([signatures.index(signature) for signature, _ in said])[codes_N]
    label_codes_N = np.array([label for _, label in said])[codes_N]
    for kind, counts_N in zip(KINDS.values(), counts_KN, strict=True):
        there = np.array([kind in signature_kinds(signature) for signature in signatures], np.int64)
        np.copyto(counts_N, there[signature_codes_N], where=counts_N < 0)
    _check_ids(table["id"], checker)
    _check_texts(tables, store)
    chars_KN = [numbers_of(pc.utf8_length(table[name])) for name in ("problem", "answer")]
    values_KN = (dataset_codes_N, signature_codes_N, label_codes_N, *chars_KN, *counts_KN)
    return make_columns(store.taxonomy, tuple(datasets), signatures, np.stack(values_KN).astype(np.int32))


def _check_ids(ids: pa.ChunkedArray, checker: RowChecker) -> None:
    if ids.null_count == len(ids):
        return
    lengths_N = numbers_of(pc.utf8_length(pc.utf8_trim_whitespace(ids)), null=1)
    if lengths_N.min() == 0 or ids.null_count or pc.count_distinct(ids).as_py() < len(ids):
        for line, given in enumerate(ids.to_pylist(), 1):
            checker.check_id(given, line)


def _check_texts(tables: list[pa.Table], store: ParquetStore) -> None:
    first = 0
    for table in tables:
        position = table.schema.get_field_index("texts")
        texts = table.column(position).combine_chunks() if position >= 0 else None
        if texts is not None and not pa.types.is_null(texts.type) and len(texts.flatten()):
            suspect = pc.match_substring_regex(pc.list_flatten(texts), _SUSPECT)
            for local in pc.filter(pc.list_parent_indices(texts), pc.fill_null(suspect, True)).to_pylist():
                check_paths(store.row(first + local), store.place(first + local))
        first += table.num_rows


def numbers_of(column: pa.ChunkedArray | pa.Array, null: int = 0) -> npt.NDArray[np.int64]:
    """A column of integers; `null` stands for nulls."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    values = pa.Array.from_buffers(array.type, len(array), [None, array.buffers()[1]], offset=array.offset)
    numbers_N: npt.NDArray[np.int64] = np.from_dlpack(values).astype(np.int64)
    if array.null_count:
        numbers_N[np.from_dlpack(array.is_null().cast(pa.int8())).astype(bool)] = null
    return numbers_N


def _encoded(column: pa.ChunkedArray) -> tuple[list[Any], npt.NDArray[np.int64]]:
    """Distinct values, null among them, in the order of first sight, and the code of each row."""
    codes = column.combine_chunks().dictionary_encode(null_encoding="encode")
    return codes.dictionary.to_pylist(), numbers_of(codes.indices)


# Where the media embedded in a parquet shard lie, so that one row costs the bytes of one row.
#
# Parquet cannot be read by row: a reader decodes a whole column chunk, often gigabytes, to serve one clip. But a column
# that is not compressed holds each value as it is, in one piece. An index part beside a shard (`index/<name of the
# shard>.arrow`) holds the rows without their media, and for each medium its offset and size in the shard, and the
# CRC-32 of every 128 KiB of it: an Arrow stream, which opens ten times as fast as parquet, and the CRC-32 of the
# stream. A part carries a stamp of its shard, and one that does not fit, or is damaged, is an error. A value that lies
# in pieces (a compressed column) has the offset -1. Without an index part, `ShardMedia` finds a medium when it is asked
# for.


_VERSION = 3
_CRC_BYTES = 4
TAIL_BYTES = 1 << 16
_META = b"hba"
IS_NULL = "is null"


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


def read_light(file: pq.ParquetFile, shard: Path) -> pa.Table:
    """The columns of an opened shard without its media. Raises InputError when it is damaged or of another schema."""
    check_schema(file.schema_arrow, shard)
    names = [name for name in file.schema_arrow.names if name not in MEDIA_FIELDS]
    try:
        table = file.read(columns=names, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(error, shard) from None
    for name in names:
        try:
            table[name].validate(full=True)  # text that is not UTF-8, which Arrow reads as it is
        except pa.ArrowInvalid as error:
            what = f"column {name!r}: is damaged ({error})"
            raise InputError(what, where=str(shard), fix="Restore the shard.") from None
    return table


def _damaged(error: Exception, shard: Path) -> HbaError:
    damaged = InputError(f"is damaged ({error})", where=str(shard), fix="Restore the shard.")
    return machine_fault(error, str(shard)) or damaged


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
            raise _damaged(error, shard) from None
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
        self._shard = shard
        raw = patiently(lambda: shard.open("rb", buffering=0), str(shard))
        # Whoever drops it closes its file at once: what follows knows nothing of `self`, and is in no circle with it.
        weakref.finalize(self, raw.close)

        def fetch(start: int, size: int) -> None:
            if remote is not None:
                remote.fetch(start, start + size)

        def read(start: int, size: int) -> bytes:
            fetch(start, size)
            return patiently(partial(os.pread, raw.fileno(), size, start), str(shard))

        self._fetch = fetch
        file, size = open_shard(shard, remote), patiently(shard.stat, str(shard)).st_size
        with _damage_named(str(shard)):
            self._pages = ShardPages(file, read, size, kept, None if remote is None else fetch)

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
            raise MediaError(IS_NULL, where=where, fix="Restore the medium, or remove the row.")
        if value.data is not None:
            return bytes(value.data)
        self._fetch(value.offset, value.size)
        return Slice(self._shard, value.offset, value.size)


@contextmanager
def _damage_named(where: str) -> Iterator[None]:
    try:
        yield
    except (DamagedPageError, pa.ArrowException, OSError) as error:
        what = f"cannot be read ({error or type(error).__name__}): cut off or corrupt"
        raise machine_fault(error, where) or MediaError(what, where=where, fix="Restore the shard.") from None


# --- the store --------------------------------------------------------------------------------------------------------


EXTRA = "extra_json"
_PLACES = tuple(f"{name}_{what}" for name in MEDIA_FIELDS for what in PLACES)
_NOT_SIZES = frozenset(name for name in _PLACES if not name.endswith("_sizes"))
_KNOWN = frozenset((*Row.__struct_fields__, *_PLACES, EXTRA, MEDIA_PATHS))
_BLOCK_ROWS = 4096
_OPEN_SHARDS = 8
_OF_THIS_PROCESS = ("_tables", "_columns", "_opened", "_kept", "_lock")


class ParquetStore:
    """The shards of one split, in order. Picklable; holds the rows without their media."""

    def __init__(
        self,
        shards: tuple[Path, ...],
        *,
        split: str,
        taxonomy: Taxonomy,
        remote: Mapping[Path, Remote] = MappingProxyType({}),
    ) -> None:
        """Read and check every row; `remote` fetches the shards that are not whole on this machine.

        Raises InputError naming shard, row and field, also for a split without rows.
        """
        self.shards = shards
        self._remote = dict(remote)
        self.split = split
        self.root = shards[0].parent.resolve()
        self.taxonomy = taxonomy
        self._stamps = [stamp(shard) for shard in shards]
        tables = self._tables
        self._first = np.cumsum([0, *(table.num_rows for table in tables)])
        if len(self) == 0:
            raise InputError(f"split {split!r} has no rows", where=str(shards[0]), fix="Write at least one row.")
        self.columns = check_tables(tables, self)

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getstate__(self) -> dict[str, Any]:
        # A process that gets the atlas reads the rows again: faster than to send them, and only when it needs them.
        return {name: value for name, value in self.__dict__.items() if name not in _OF_THIS_PROCESS}

    @cached_property
    def _tables(self) -> list[pa.Table]:
        return [self._light(shard, stamp) for shard, stamp in zip(self.shards, self._stamps, strict=True)]

    @cached_property
    def _columns(self) -> list[dict[str, pa.Array]]:
        """The columns of each shard in one piece each: quicker to pick from than a table."""
        return [{name: _whole(table[name]) for name in table.schema.names} for table in self._tables]

    def open_shard(self, shard: Path, *, buffer_bytes: int = 0) -> pq.ParquetFile:
        """One of the shards, opened. Raises InputError when it is not a whole parquet file."""
        return open_shard(shard, self._remote.get(shard), buffer_bytes=buffer_bytes)

    def check_text(self, numbers: npt.NDArray[np.integer]) -> None:
        """Read what the shards of the given rows say themselves, where an index part is read in their place.

        Raises InputError when one is damaged.
        """
        for shard in sorted({self._at(int(number))[0] for number in numbers}):
            with self.open_shard(self.shards[shard]) as file:
                read_light(file, self.shards[shard])

    def _light(self, shard: Path, known: str) -> pa.Table:
        """The columns of a shard without its media. Raises InputError when it is damaged or is not as it was."""
        table = read_index(shard, known)
        if table is None:
            with self.open_shard(shard) as file:
                table = read_light(file, shard)
                for name in set(MEDIA_FIELDS) - set(file.schema_arrow.names):
                    table = table.append_column(f"{name}_sizes", _empty_lists(table.num_rows))
            if stamp(shard) != known:
                raise InputError("was changed after it was opened", where=str(shard), fix="Open the atlas again.")
        check_schema(table.schema, shard)
        return uniform(table)

    def _id(self, number: int, given: str | None) -> str:
        return given if given is not None else f"{self.split}/{number + 1}"

    def _at(self, number: int) -> tuple[int, int]:
        """Shard of a row, and the row's number in it."""
        shard = int(np.searchsorted(self._first, number, side="right")) - 1
        return shard, number - int(self._first[shard])

    def place(self, number: int) -> str:
        """'shard:row' of a row, the row counted from 1."""
        shard, local = self._at(number)
        return f"{self.shards[shard]}:{local + 1}"

    def _values(self, number: int, *, paths: bool = True) -> dict[str, Any]:
        shard, local = self._at(number)
        columns = self._columns[shard].items()
        left_out = _NOT_SIZES if paths else _NOT_SIZES | {MEDIA_PATHS}
        return {name: column[local].as_py() for name, column in columns if name not in left_out}

    def row(self, number: int) -> Row:
        """Row `number`, 0-based; '-' stands for the path of a medium whose shard does not tell it."""
        return self._row(number, self._values(number))

    def _row(self, number: int, values: dict[str, Any]) -> Row:
        paths = self._paths(number, values)
        lists: dict[str, Any] = {
            name: paths.get(name, tuple(UNNAMED for _ in values[f"{name}_sizes"] or ())) for name in MEDIA_FIELDS
        }
        said: dict[str, Any] = {name: values[name] for name in (*TEXT, *OPTIONAL)}
        row = Row(**said, **lists, texts=tuple(values.get("texts") or ()))
        if paths or row.texts:
            check_paths(row, self.place(number))
        return row

    def _paths(self, number: int, values: dict[str, Any]) -> dict[str, tuple[str, ...]]:
        """The paths that the media of a row had as files, by field, where the shard tells all of them."""
        paths: dict[str, tuple[str, ...]] = {}
        for name, said in (values.get(MEDIA_PATHS) or {}).items():
            if said and None not in said:
                paths[name] = tuple(said)
                sizes = values.get(f"{name}_sizes")
                if sizes is not None and len(sizes) != len(said):
                    what = f"names {len(said)} {name}, but the row has {len(sizes)}"
                    where = f"{self.place(number)}, {MEDIA_PATHS}"
                    raise InputError(what, where=where, fix="Convert the shard again.")
        return paths

    def _extra(self, number: int, values: dict[str, Any]) -> dict[str, Any]:
        said = {name: value for name, value in values.items() if name not in _KNOWN and value is not None}
        try:
            return said | msgspec.json.decode(values.get(EXTRA) or "{}", type=dict[str, Any])
        except (msgspec.DecodeError, TypeError, RecursionError) as error:
            where = f"{self.place(number)}, {EXTRA}"
            raise InputError(f"cannot be read ({error})", where=where, fix="Convert the shard again.") from None

    def _said(self, number: int, values: dict[str, Any]) -> Said:
        return Said(self._id(number, values["id"]), self._row(number, values), self._extra(number, values))

    def sample(self, number: int, refused: dict[str, Quarantined]) -> Sample:
        """Row `number` with its label, place and extra fields. Reads media only from a shard without an index."""
        values = self._values(number, paths=False)
        counts: dict[str, int] = {name: self._count(number, name, values) for name in MEDIA_FIELDS}
        about = {"split": self.split, "number": number, "source": self, "refused": refused, **counts}
        return Sample.of(self._said(number, values), self.taxonomy, self.place(number), **about)

    def _count(self, number: int, name: Field, values: dict[str, Any]) -> int:
        sizes = values[f"{name}_sizes"]
        if sizes is not None:
            return len(sizes)
        shard, local = self._at(number)
        try:
            with self._lock:
                return self._media_of(shard).count(local, name, where=f"{self.place(number)}, {name}")
        except MediaError:  # which is raised again when the medium is asked for
            return 1

    def medium(self, number: int, name: Field, index: int, *, where: str) -> Source:
        """A medium as a slice of its shard, or as bytes. Raises MediaError when it is null."""
        shard, local = self._at(number)
        columns = self._columns[shard]
        if f"{name}_offsets" in columns:
            offset, size, crcs = (columns[f"{name}_{what}"][local][index].as_py() for what in PLACES)
            if offset >= 0:
                remote = self._remote.get(self.shards[shard])
                if remote is not None:
                    remote.fetch(offset, offset + size)
                return Slice(self.shards[shard], offset, size, crcs)
        with self._lock:
            return self._media_of(shard).medium(local, name, index, where=where)

    def _media_of(self, shard: int) -> ShardMedia:
        """The media of a shard without an index; a few shards are open at a time."""
        opened = self._opened.pop(shard, None)
        if opened is None:
            path = self.shards[shard]
            if stamp(path) != self._stamps[shard]:
                raise InputError("was changed after it was opened", where=str(path), fix="Open the atlas again.")
            opened = ShardMedia(path, self._kept, self._remote.get(path))
            while len(self._opened) >= _OPEN_SHARDS:
                self._opened.pop(next(iter(self._opened)))
        self._opened[shard] = opened
        return opened

    @cached_property
    def _opened(self) -> dict[int, ShardMedia]:
        return {}

    @cached_property
    def _kept(self) -> KeptPages:
        return KeptPages()

    @cached_property
    def _lock(self) -> AbstractContextManager[bool]:
        return threading.RLock()

    def audio_bytes(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Stored bytes of the sounds of each row; 0 from a shard without an index."""
        sizes_N = np.zeros(len(self), np.int64)
        for first, table in zip(self._first[:-1], self._tables, strict=True):
            sizes = table["audios_sizes"].combine_chunks()
            rows = numbers_of(pc.list_parent_indices(sizes))
            np.add.at(sizes_N, int(first) + rows, numbers_of(sizes.flatten()))
        return sizes_N[numbers]

    def ids(self, numbers: npt.NDArray[np.integer]) -> list[str]:
        """The ids of the given rows."""
        given = pa.chunked_array([chunk for table in self._tables for chunk in table["id"].chunks], pa.string())
        if given.null_count == len(given):
            return [self._id(int(number), None) for number in numbers]
        return [self._id(int(n), each) for n, each in zip(numbers, given.take(numbers).to_pylist(), strict=True)]

    def said(self, numbers: npt.NDArray[np.integer]) -> Iterator[Said]:
        """What each of the given rows says; media whose paths are not told have the placeholder of `row`."""
        return (self._said(number, values) for number, values in self._blocks(numbers))

    def contents(self, numbers: npt.NDArray[np.integer]) -> Iterator[bytes]:
        """What the fingerprint of the given rows is made of; media whose paths are not told are left out."""
        for number, values in self._blocks(numbers):
            unnamed: dict[str, Any] = dict.fromkeys(MEDIA_FIELDS)
            said = values | unnamed | self._paths(number, values)
            yield canonical(self._id(number, values["id"]), said, self._extra(number, values))

    def _blocks(self, numbers: npt.NDArray[np.integer]) -> Iterator[tuple[int, dict[str, Any]]]:
        """The given rows with their values but for the places of media, taken from their tables in blocks."""
        shard_N = np.searchsorted(self._first, numbers, side="right") - 1
        for block in np.array_split(np.arange(len(numbers)), max(1, len(numbers) // _BLOCK_ROWS)):
            for part in np.split(block, np.flatnonzero(np.diff(shard_N[block])) + 1):
                if len(part):
                    shard, chosen = int(shard_N[part[0]]), numbers[part]
                    left_out = [name for name in self._tables[shard].schema.names if name in _NOT_SIZES]
                    table = self._tables[shard].drop_columns(left_out).take(chosen - self._first[shard])
                    yield from zip(map(int, chosen), table.to_pylist(), strict=True)


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _empty_lists(length: int) -> pa.Array:
    # Not pa.array or pa.scalar, which import pandas (see tables).
    offsets = pa.py_buffer(bytes(4 * (length + 1)))
    return pa.Array.from_buffers(pa.list_(pa.int64()), length, [None, offsets], children=[pa.nulls(0, pa.int64())])
