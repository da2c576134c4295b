"""Whole rows with the bytes of their media, in order, whatever form they come from: what a conversion moves.

Media files are read as they are, embedded media by streaming their shards, which costs the same with any compression
and with any row groups, one row in memory at a time. Nothing is decoded and nothing is judged (an empty file is handed
on as one), but a shard whose checksums differ is refused. A medium whose bytes cannot be had is None, and the row says
why.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa

from hba.atlas import Atlas
from hba.atlas.jsonl import size_of
from hba.atlas.pages import entries
from hba.atlas.parquet import EXTRA, ParquetStore
from hba.atlas.sample import MEDIA_FIELDS, Field, Quarantined, Row, Sample
from hba.atlas.slices import Source, read_bytes
from hba.atlas.source import DEFAULT_LIMITS, RESTORE, check_source
from hba.atlas.tables import MEDIA_PATHS
from hba.errors import InputError, MediaError
from hba.storage import machine_fault

TEXT_FIELDS = ("problem", "answer", "dataset", "task", "class_label", "modality_signature")
_BATCH_ROWS = 1  # a clip may have hundreds of megabytes
_BUFFER_BYTES = 1 << 20
_NO_FIELD = frozenset((*Row.__struct_fields__, EXTRA, MEDIA_PATHS))


@dataclass(frozen=True, kw_only=True)
class Record:
    """One row. `fields` are the published ones that are text, `paths` what its media are called as files."""

    id: str
    number: int
    """in its split, 0-based"""
    where: str
    fields: dict[str, str | None]
    texts: list[str]
    extra: dict[str, Any]
    media: dict[Field, list[bytes | None]]
    paths: dict[Field, list[str | None]]
    unreadable: list[Quarantined]


def read_records(atlas: Atlas, start: int, stop: int) -> Iterator[Record]:
    """Yield the rows `start` to `stop` of an atlas. Raises InputError when a shard is damaged."""
    source = atlas[start].source
    if isinstance(source, ParquetStore):
        numbers = atlas.numbers[start:stop].tolist()
        stream = _ShardStream(source)
        for number in numbers:
            yield _from_shard(source, number, stream.row(number))
    else:
        for index in range(start, stop):
            yield _from_files(atlas[index], atlas.row(index))


def media_bytes(atlas: Atlas) -> list[int]:
    """About how many bytes the media of each row take, without reading them; what is missing takes none."""
    source = atlas[0].source
    if isinstance(source, ParquetStore):
        sizes = [size for shard in source.shards for size in _shard_sizes(source, shard)]
        return [sizes[number] for number in atlas.numbers.tolist()]
    return [
        sum(size_of(atlas.root / path) or 0 for name in MEDIA_FIELDS for path in getattr(atlas.row(index), name))
        for index in range(len(atlas))
    ]


def _from_files(sample: Sample, row: Row) -> Record:
    media: dict[Field, list[bytes | None]] = {name: [] for name in MEDIA_FIELDS}
    unreadable: list[Quarantined] = []
    for name in MEDIA_FIELDS:
        where = sample.place(name)
        for index in range(getattr(sample, name)):
            try:
                media[name].append(_read(sample.source.medium(sample.number, name, index, where=where), where))
            except MediaError as error:
                media[name].append(None)
                unreadable.append(sample.quarantined(error))
    return Record(
        id=sample.id,
        number=sample.number,
        where=sample.where,
        fields={name: getattr(row, name) for name in TEXT_FIELDS},
        texts=list(row.texts),
        extra=dict(sample.extra),
        media=media,
        paths={name: list(getattr(row, name)) for name in MEDIA_FIELDS},
        unreadable=unreadable,
    )


def _read(source: Source, where: str) -> bytes:
    if isinstance(source, Path) and source.is_file() and source.stat().st_size == 0:
        return b""  # no sound or clip, but as it is
    check_source(source, where=where, limits=DEFAULT_LIMITS)
    try:
        return read_bytes(source, where=where)
    except OSError as error:
        raise MediaError(f"cannot be read ({error.strerror})", where=where, fix=RESTORE) from None


def _from_shard(store: ParquetStore, number: int, values: dict[str, Any]) -> Record:
    where = store.place(number)
    identity = values.get("id") or f"{store.split}/{number + 1}"
    named = values.get(MEDIA_PATHS) or {}
    media: dict[Field, list[bytes | None]] = {}
    paths: dict[Field, list[str | None]] = {}
    for name in MEDIA_FIELDS:
        media[name] = entries(values.get(name))
        known = list(named.get(name) or ())
        paths[name] = known if len(known) == len(media[name]) else [None] * len(media[name])
    missing = [name for name in MEDIA_FIELDS if None in media[name]]
    extra = {name: value for name, value in values.items() if name not in _NO_FIELD and value is not None}
    return Record(
        id=identity,
        number=number,
        where=where,
        fields={name: values.get(name) for name in TEXT_FIELDS},
        texts=list(values.get("texts") or ()),
        extra=extra | msgspec.json.decode(values.get(EXTRA) or "{}"),
        media=media,
        paths=paths,
        unreadable=[
            Quarantined(identity, store.split, values["dataset"], f"{where}, {name}", name, "is null")
            for name in missing
        ],
    )


class _ShardStream:
    """Reads shards forward; a row that lies behind the last one starts the stream anew."""

    def __init__(self, store: ParquetStore) -> None:
        self._store, self._shards = store, store.shards
        self._ends = list(accumulate(_num_rows(store, shard) for shard in store.shards))
        self._rows: Iterator[tuple[int, dict[str, Any]]] = iter(())
        self._last = -1
        self._end = -1

    def row(self, number: int) -> dict[str, Any]:
        """All columns of a row, the number of which counts over all shards. Raises InputError for a damaged shard."""
        if not self._last < number < self._end:
            shard = next(k for k, end in enumerate(self._ends) if number < end)
            first = self._ends[shard - 1] if shard else 0
            self._rows = _rows_from(self._store, self._shards[shard], first, number)
            self._end = self._ends[shard]
        for at, values in self._rows:
            if at == number:
                self._last = number
                return values
        raise InputError(f"holds no row {number}", where=str(self._shards[0].parent), fix="Restore the shards.")


def _rows_from(store: ParquetStore, shard: Path, first: int, number: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a shard, whose first row has the number `first`, from the row group of `number` on."""
    try:
        with store.open_shard(shard, buffer_bytes=_BUFFER_BYTES) as file:
            groups = range(file.num_row_groups)
            sizes = [file.metadata.row_group(group).num_rows for group in groups]
            starts = [first + sum(sizes[:group]) for group in groups]
            wanted = [group for group in groups if starts[group] + sizes[group] > number]
            at = starts[wanted[0]]
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, row_groups=wanted, use_threads=False):
                for values in batch.to_pylist():
                    yield at, values
                    at += 1
    except (pa.ArrowException, OSError) as error:
        damaged = InputError(f"is damaged ({error})", where=str(shard), fix="Restore the shard.")
        raise machine_fault(error, str(shard)) or damaged from None


def _num_rows(store: ParquetStore, shard: Path) -> int:
    with store.open_shard(shard) as file:
        return int(file.metadata.num_rows)


def _shard_sizes(store: ParquetStore, shard: Path) -> Iterator[int]:
    """For each row of a shard the mean size of the media of its row group."""
    with store.open_shard(shard) as file:
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            columns = [group.column(k) for k in range(group.num_columns)]
            total = sum(c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] in MEDIA_FIELDS)
            yield from [total // max(1, group.num_rows)] * group.num_rows
