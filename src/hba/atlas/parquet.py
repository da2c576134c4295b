"""Rows of parquet shards whose media are embedded as bytes.

Opening reads the columns without media (from the index parts where there are some, see `embedded`) and checks every row
(see `tables`). A medium of an indexed shard is a slice of the shard: a decoder reads the bytes that it needs, and no
more. Without an index it is found by the pages of its column (see `pages`), and no medium is read for what rows say.
Ids, order, samples and fingerprint are those of the JSONL form that the shards were made from; a shard that is cut off,
of another schema or changed after it was opened is an InputError.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hba.atlas import embedded, media
from hba.atlas.pages import KeptPages
from hba.atlas.rows import canonical, check_paths, label_of, signature_of
from hba.atlas.sample import MEDIA_FIELDS, Field, Row, Said, Sample
from hba.atlas.slices import PLACES, Slice
from hba.atlas.tables import MEDIA_PATHS, OPTIONAL, TEXT, Places, check_schema, check_tables, numbers_of, uniform
from hba.errors import InputError, MediaError
from hba.storage import machine_fault
from hba.taxonomy import Taxonomy

EXTRA = "extra_json"
UNNAMED = "-"
"""stands for the path of a medium whose shard does not tell it"""
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
        remote: Mapping[Path, embedded.Remote] = MappingProxyType({}),
    ) -> None:
        """Read and check every row; `remote` fetches the shards that are not whole on this machine.

        Raises InputError naming shard, row and field, also for a split without rows.
        """
        self.shards = shards
        self._remote = dict(remote)
        self.split = split
        self.root = shards[0].parent.resolve()
        self.taxonomy = taxonomy
        self._stamps = [embedded.stamp(shard) for shard in shards]
        tables = self._tables
        self._first = np.cumsum([0, *(table.num_rows for table in tables)])
        if len(self) == 0:
            raise InputError(f"split {split!r} has no rows", where=str(shards[0]), fix="Write at least one row.")
        self.columns = check_tables(tables, Places(self.place, self.row, self._id), taxonomy)

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
        return embedded.open_shard(shard, self._remote.get(shard), buffer_bytes=buffer_bytes)

    def _light(self, shard: Path, stamp: str) -> pa.Table:
        """The columns of a shard without its media. Raises InputError when it is damaged or is not as it was."""
        table = embedded.read_index(shard, stamp)
        if table is None:
            with self.open_shard(shard) as file:
                check_schema(file.schema_arrow, shard)
                names = [name for name in file.schema_arrow.names if name not in MEDIA_FIELDS]
                try:
                    table = file.read(columns=names, use_threads=False)
                except (pa.ArrowException, OSError) as error:
                    damaged = InputError(f"is damaged ({error})", where=str(shard), fix="Restore the shard.")
                    raise machine_fault(error, str(shard)) or damaged from None
                _check_values(table, shard)
                for name in set(MEDIA_FIELDS) - set(file.schema_arrow.names):
                    table = table.append_column(f"{name}_sizes", _empty_lists(table.num_rows))
            if embedded.stamp(shard) != stamp:
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

    def sample(self, number: int) -> Sample:
        """Row `number` with its label, place and extra fields. Reads media only from a shard without an index."""
        where, values = self.place(number), self._values(number, paths=False)
        row = self._row(number, values)
        counts: dict[str, Any] = {name: self._count(number, name, values) for name in MEDIA_FIELDS}
        return Sample(
            id=self._id(number, row.id),
            split=self.split,
            where=where,
            number=number,
            problem=row.problem,
            answer=row.answer,
            dataset=row.dataset,
            task=row.task,
            modality_signature=signature_of(row, where, check_media=False),
            label=label_of(row, self.taxonomy, where).name,
            texts=row.texts,
            extra=self._extra(number, values),
            source=self,
            **counts,
        )

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

    def medium(self, number: int, name: Field, index: int, *, where: str) -> media.Source:
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

    def _media_of(self, shard: int) -> embedded.ShardMedia:
        """The media of a shard without an index; a few shards are open at a time."""
        opened = self._opened.pop(shard, None)
        if opened is None:
            path = self.shards[shard]
            if embedded.stamp(path) != self._stamps[shard]:
                raise InputError("was changed after it was opened", where=str(path), fix="Open the atlas again.")
            opened = embedded.ShardMedia(path, self._kept, self._remote.get(path))
            while len(self._opened) >= _OPEN_SHARDS:
                self._opened.pop(next(iter(self._opened)))
        self._opened[shard] = opened
        return opened

    @cached_property
    def _opened(self) -> dict[int, embedded.ShardMedia]:
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
        for number, values in self._blocks(numbers):
            yield Said(self._id(number, values["id"]), self._row(number, values), self._extra(number, values))

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


def _check_values(table: pa.Table, shard: Path) -> None:
    """Raise InputError for text that is not UTF-8, which Arrow reads as it is."""
    for name in table.schema.names:
        try:
            table[name].validate(full=True)
        except pa.ArrowInvalid as error:
            what = f"column {name!r}: is damaged ({error})"
            raise InputError(what, where=str(shard), fix="Restore the shard.") from None


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _empty_lists(length: int) -> pa.Array:
    # Not pa.array or pa.scalar, which import pandas (see tables).
    offsets = pa.py_buffer(bytes(4 * (length + 1)))
    return pa.Array.from_buffers(pa.list_(pa.int64()), length, [None, offsets], children=[pa.nulls(0, pa.int64())])
