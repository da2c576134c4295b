"""An atlas from one form into another: parquet shards with embedded media, or JSONL with media files.

Rows, ids, order, labels, extra fields and the bytes of every medium stay as they are, also what its file was called.
The work is cut into parts (shards) that processes take in any order. A part is checked before it appears, and appears
in one rename; a conversion that was killed goes on with the parts that are missing; `convert.json` comes last. A
medium that cannot be read stays unreadable in the new form, so that its sample is quarantined there as here, and is
named. Shards follow the published layout (`train-00000-of-00012.parquet`), so that any parquet reader opens them.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from hba.atlas import Atlas, open_atlas
from hba.atlas.jsonl import size_of
from hba.atlas.names import present_splits
from hba.atlas.pages import entries
from hba.atlas.parquet import EXTRA, MEDIA_PATHS, ParquetStore, index_path, read_index, write_index
from hba.atlas.rows import MEDIA_FIELDS, Columns, Field, Quarantined, Row, Sample
from hba.atlas.source import DEFAULT_LIMITS, PLACES, RESTORE, Slice, Source, check_source, read_bytes
from hba.environment import now
from hba.errors import HbaError, InputError, MediaError
from hba.parallel import Died, die_with_parent, each
from hba.storage import (
    atomic_write,
    check_relative,
    file_sha256,
    json_sha256,
    machine_fault,
    named_os_errors,
    read_json,
    remove_abandoned,
    write_json,
    writer_name,
)
from hba.taxonomy import FILE as TAXONOMY_FILE

# Whole rows with the bytes of their media, in order, whatever form they come from: what a conversion moves.
#
# Media files are read as they are, embedded media by streaming their shards, which costs the same with any compression
# and with any row groups, one row in memory at a time. Nothing is decoded and nothing is judged (an empty file is
# handed on as one), but a shard whose checksums differ is refused. A medium whose bytes cannot be had is None, and the
# row says why.


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


# Writes one parquet shard whose media can be read by row, and checks it before anyone can see it.
#
# Media columns are stored plain, text columns compressed; the index part beside the shard says where each medium lies
# (`parquet`). The shard is made in a hidden folder, read back through its index, compared with what went in,
# medium by medium, and only then renamed to its place, after its index part and its summary.


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


# Writes a part of an atlas as JSONL lines and media files, the inverse of the part above.
#
# A medium gets the path that it had before it was embedded, or one made of its field, split and row. A path is used
# once for one content: rows that share a file share it again, and two contents under one name are an error, never a
# mixture. No path leads out of the folder. Every file is read back and compared; the lines of a part appear after all
# its files.


RESERVED = ("atlas.json", "convert.json", TAXONOMY_FILE)
_SIGNATURES = (
    *((b"RIFF", 0, b"WAVE", 8, ".wav"), (b"RIFF", 0, b"AVI ", 8, ".avi"), (b"RIFF", 0, b"WEBP", 8, ".webp")),
    *((b"ftyp", 4, b"", 0, ".mp4"), (b"fLaC", 0, b"", 0, ".flac"), (b"OggS", 0, b"", 0, ".ogg")),
    *((b"ID3", 0, b"", 0, ".mp3"), (b"\xff\xfb", 0, b"", 0, ".mp3"), (b"\xff\xf3", 0, b"", 0, ".mp3")),
    *((b"\xff\xf1", 0, b"", 0, ".aac"), (b"FORM", 0, b"AIF", 8, ".aiff"), (b"#!AMR", 0, b"", 0, ".amr")),
    *((b"\x1a\x45\xdf\xa3", 0, b"", 0, ".mkv"), (b"FLV", 0, b"", 0, ".flv"), (b"\0\0\1\xba", 0, b"", 0, ".mpg")),
    *((b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", 0, b"", 0, ".wmv"), (b"GIF8", 0, b"", 0, ".gif")),
    *((b"\x89PNG", 0, b"", 0, ".png"), (b"\xff\xd8\xff", 0, b"", 0, ".jpg"), (b"PK\x03\x04", 0, b"", 0, ".pt")),
)


class Part(NamedTuple):
    """A run of rows of a split: part `number` of `total`."""

    out: Path
    split: str
    number: int
    total: int

    @property
    def lines(self) -> Path:
        """Where its lines lie until all parts are there."""
        return self.out / STAGING / f"{self.split}-{self.number:05d}-of-{self.total:05d}.jsonl"


def read_part(part: Part, origin: str) -> Summary | None:
    """The summary of a part that is whole and was made from `origin`; None when there is none."""
    where = part.lines.with_suffix(".json")
    if not part.lines.is_file() or not where.is_file():
        return None
    summary = msgspec.convert(read_json(where), Summary)
    return summary if summary.origin == origin else None


def write_part(part: Part, records: Iterable[Record], origin: str, first_line: int) -> Summary:
    """Write the media of some rows, then their lines, the first of which will be line `first_line` of the split.

    Raises InputError for a path that leads out of the folder, is reserved, or is that of another content already;
    HbaError when a file reads back differently; StorageError when the disk is full.
    """
    lines: list[bytes] = []
    count = size = named = 0
    unreadable: dict[str, dict[str, Any]] = {}
    for line, record in enumerate(records, first_line):
        for name in MEDIA_FIELDS:
            for index, medium in enumerate(record.media[name]):
                named += record.paths[name][index] is None
                path = record.paths[name][index] = _path(part, record, name, index)
                count += 1
                if medium is not None:
                    size += len(medium)
                    _place(part.out, path, medium, where=f"{record.where}, {name}")
        for left_out in record.unreadable:
            unreadable.setdefault(left_out.id, left_out._asdict())
        lines.append(_line(record, implied=f"{part.split}/{line}"))
    os.sync()  # once a part: a sync of each file takes longer than all the rest
    with atomic_write(part.lines, "wb") as handle:
        handle.writelines(lines)
    summary = Summary(
        file=part.lines.name,
        origin=origin,
        rows=len(lines),
        media=count,
        media_bytes=size,
        named=named,
        sha256=file_sha256(part.lines),
        unreadable=list(unreadable.values()),
    )
    write_json(part.lines.with_suffix(".json"), msgspec.to_builtins(summary))
    return summary


def _line(record: Record, *, implied: str) -> bytes:
    """The row as JSON with the fields and in the order of the published rows; an id that is implied is left out."""
    fields = dict(record.fields)
    label = fields.pop("class_label")
    lists: dict[str, Any] = {name: record.paths[name] for name in MEDIA_FIELDS}
    row: dict[str, Any] = {} if record.id == implied else {"id": record.id}
    row |= {"problem": fields.pop("problem"), "answer": fields.pop("answer")}
    row |= {name: lists.pop(name) for name in ("images", "videos", "audios")} | {"texts": record.texts}
    row |= fields | lists | ({} if label is None else {"class_label": label})
    return msgspec.json.encode(row | record.extra) + b"\n"


def _path(part: Part, record: Record, name: Field, index: int) -> str:
    known = record.paths[name][index]
    if known is None:
        ending = _ending(record.media[name][index] or b"")
        return f"{name}/{part.split}-{record.number:06d}-{index}{ending}"
    where = f"{record.where}, {name}"
    check_relative(known, where=where)
    if known in RESERVED or known.endswith(".jsonl") or known.split("/")[0] == STAGING:
        raise InputError(f"path {known!r} is reserved", where=where, fix="Rename the medium.")
    return known


def _ending(data: bytes) -> str:
    for first, at, second, then, ending in _SIGNATURES:
        if data[at : at + len(first)] == first and data[then : then + len(second)] == second:
            return ending
    return ".bin"


def _place(out: Path, relative: str, data: bytes, *, where: str) -> None:
    """Write a file unless it is there with the same content."""
    path = out / relative
    digest = hashlib.sha256(data).hexdigest()
    temporary = out / STAGING / f"{digest}.{writer_name()}"
    with named_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.parent.resolve().is_relative_to(out.resolve()):
            raise InputError(f"{relative} leads out of {out}", where=where, fix="Choose an empty folder.")
        if not path.exists():
            try:
                temporary.write_bytes(data)
                _move(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        found = file_sha256(path)
    if found != digest:
        what = f"{relative} is there with another content"
        raise HbaError(what, where=where, fix="Choose an empty folder; if this is one, two media have one name.")


def _move(temporary: Path, path: Path) -> None:
    """Give a file its name unless another process has used it."""
    try:
        os.link(temporary, path)  # a rename would replace what is there
    except FileExistsError:
        return
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):  # a file system without links
            raise
        temporary.replace(path)


# --- the conversion ---------------------------------------------------------------------------------------------------


Form = Literal["parquet", "jsonl"]
OnProgress = Callable[[int, int], None]

SHARD_BYTES = 512 << 20
LAYOUT = 3  # of what is written; another number makes a conversion start anew
MANIFEST = "convert.json"
BESIDE = ("atlas.json", TAXONOMY_FILE)
# A part that is slower than this per byte is given up: its process hangs.
_PATIENCE_SECONDS, _PATIENCE_BYTES_PER_SECOND = 1800.0, 50_000


class _Job(NamedTuple):
    """Rows `start` to `stop` of a split: part `number` of `total`."""

    number: int
    total: int
    start: int
    stop: int
    bytes: int
    origin: str


class Converted(NamedTuple):
    """One split in its new form."""

    split: str
    parts: Sequence[Summary]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(part.rows for part in self.parts)

    @property
    def unreadable(self) -> list[dict[str, Any]]:
        """Quarantine records of the samples with a medium that could not be read."""
        return [record for part in self.parts for record in part.unreadable]


def convert_atlas(
    path: str | Path,
    out: str | Path,
    *,
    to: Form,
    splits: Sequence[str] | None = None,
    shard_bytes: int = SHARD_BYTES,
    workers: int = 1,
    progress: OnProgress | None = None,
) -> list[Converted]:
    """Convert the splits of the atlas at `path` (all by default) into the folder `out`, and write its convert.json.

    Going on with a conversion that was interrupted takes the same call. `progress(done, total)` counts parts. Raises
    InputError for bad rows, when `out` is the source itself or holds another conversion; HbaError when a part reads
    back differently or another process converts into `out`; StorageError when the disk is full.
    """
    out = Path(out)
    names = list(present_splits(Path(path))) if splits is None else list(splits)
    opened = [open_atlas(path, name) for name in names]
    if out.exists() and any(atlas.root == out.resolve() for atlas in opened):
        raise InputError("is the source itself", where=str(out), fix="Name another folder.")
    with _locked(out):
        plans = [_plan(atlas, shard_bytes) for atlas in opened]
        for atlas, plan in zip(opened, plans, strict=True):
            _refuse_others(atlas, out, to, plan)
        _copy_beside(opened[0].root, out)
        total, before = sum(map(len, plans)), 0
        converted = []
        for atlas, plan in zip(opened, plans, strict=True):
            tell = None if progress is None else partial(_tell, progress, before, total)
            converted.append(_convert(atlas, out, to, plan, workers, tell))
            before += len(plan)
        for atlas, result in zip(opened, converted, strict=True):
            if to == "jsonl":
                _join(out, result)
            _compare(atlas, open_atlas(out, atlas.split, taxonomy=atlas.taxonomy), result)
        _write_manifest(path, out, to, opened, converted)
        shutil.rmtree(out / STAGING)
    return converted


def convert_to_parquet(
    atlas: Atlas,
    out: str | Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    workers: int = 1,
    progress: OnProgress | None = None,
) -> list[Path]:
    """Write the rows of `atlas`, which may be a view, to shards of about `shard_bytes` in `out`; returns the shards.

    Shards that are there, whole and of the same rows are kept. Raises what `convert_atlas` raises.
    """
    out = Path(out)
    with _locked(out):
        plan = _plan(atlas, shard_bytes)
        _refuse_others(atlas, out, "parquet", plan)
        converted = _convert(atlas, out, "parquet", plan, workers, progress)
        shutil.rmtree(out / STAGING)
    return [out / part.file for part in converted.parts]


def _tell(progress: OnProgress, before: int, total: int, done: int, _: int) -> None:
    progress(before + done, total)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keep other processes from converting into `out`; the system lets go of the lock when this one is killed."""
    (out / STAGING).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out / STAGING, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        fix = "Wait for it to end, or end it."
        raise HbaError("another process converts into this folder", where=str(out), fix=fix) from None
    finally:
        os.close(descriptor)
        for folder in (out, index_path(out / "shard").parent):
            remove_abandoned(folder)  # of workers that outlived their killed process by a moment
        with suppress(OSError):  # not empty: the work is not done
            (out / STAGING).rmdir()


def _plan(atlas: Atlas, shard_bytes: int) -> list[_Job]:
    """Parts of about `shard_bytes` of media, at least one row each."""
    bounds, sums, held = [0], [], 0
    for number, size in enumerate(media_bytes(atlas)):
        if number > bounds[-1] and held + size > shard_bytes:
            bounds.append(number)
            sums.append(held)
            held = 0
        held += size
    sums.append(held)
    data = [LAYOUT, atlas.fingerprint, atlas.split]
    return [
        _Job(number, len(sums), start, stop, held, json_sha256([*data, start, stop, held]))
        for number, ((start, stop), held) in enumerate(zip(pairwise([*bounds, len(atlas)]), sums, strict=True))
    ]


def _convert(
    atlas: Atlas, out: Path, to: Form, plan: Sequence[_Job], workers: int, progress: OnProgress | None
) -> Converted:
    function = partial(_to_parquet if to == "parquet" else _to_jsonl, atlas, out)
    parts: dict[int, Summary] = {}
    for job, summary in _each(function, plan, workers):
        parts[job.number] = summary
        if progress is not None:
            progress(len(parts), len(plan))
    return Converted(atlas.split, [parts[job.number] for job in plan])


def _each(
    function: Callable[[_Job], Summary | HbaError], plan: Sequence[_Job], workers: int
) -> Iterator[tuple[_Job, Summary]]:
    if workers <= 1 or len(plan) == 1:
        results: Iterator[tuple[_Job, Summary | HbaError | Died]] = ((job, function(job)) for job in plan)
    else:
        results = iter(each(function, plan, workers=min(workers, len(plan)), patience=_patience))
    for job, result in results:
        if isinstance(result, HbaError):
            raise result
        if isinstance(result, Died):
            fix = "Run the command again; it goes on with the parts that are missing."
            raise HbaError(f"the process that wrote part {job.number} {result.reason}", fix=fix)
        yield job, result


def _patience(job: _Job) -> float:
    return _PATIENCE_SECONDS + job.bytes / _PATIENCE_BYTES_PER_SECOND


def _to_parquet(atlas: Atlas, out: Path, job: _Job) -> Summary | HbaError:
    _end_with_main()
    path = out / f"{atlas.split}-{job.number:05d}-of-{job.total:05d}.parquet"
    try:
        done = read_summary(path, job.origin)
        return done or write_shard(path, read_records(atlas, job.start, job.stop), job.origin)
    except HbaError as error:  # travels as it is, where a raised one comes back as a text
        return error


def _to_jsonl(atlas: Atlas, out: Path, job: _Job) -> Summary | HbaError:
    _end_with_main()
    part = Part(out, atlas.split, job.number, job.total)
    try:
        done = read_part(part, job.origin)
        return done or write_part(part, read_records(atlas, job.start, job.stop), job.origin, job.start + 1)
    except HbaError as error:  # as above
        return error


def _end_with_main() -> None:
    """Leave nothing that still writes when the main process is killed."""
    main = parent_process()
    if main is not None and main.pid is not None:
        die_with_parent(main.pid)


def _refuse_others(atlas: Atlas, out: Path, to: Form, plan: Sequence[_Job]) -> None:
    """Raise InputError when `out` holds the split in another form or another cut."""
    here = {out / f"{atlas.split}-{job.number:05d}-of-{job.total:05d}.parquet" for job in plan}
    shards = set(out.glob(f"{atlas.split}-*-of-*.parquet"))
    others = shards - here if to == "parquet" else shards
    fix = "Choose an empty folder, or convert the same data with the same shard size."
    if others or (to == "parquet" and (out / f"{atlas.split}.jsonl").exists()):
        raise InputError(f"holds other shards or rows of split {atlas.split!r}", where=str(out), fix=fix)


def _copy_beside(root: Path, out: Path) -> None:
    """Copy what an atlas says of itself."""
    for name in BESIDE:
        if (root / name).is_file():
            with atomic_write(out / name, "wb") as handle:
                handle.write((root / name).read_bytes())


def _join(out: Path, converted: Converted) -> None:
    """The lines of all parts as the rows of the split."""
    with atomic_write(out / f"{converted.split}.jsonl", "wb") as handle:
        for part in converted.parts:
            handle.write((out / STAGING / part.file).read_bytes())


def _compare(before: Atlas, after: Atlas, converted: Converted) -> None:
    """Raise HbaError unless the two say the same of every row; media without a path have got one."""
    if any(part.named for part in converted.parts):
        same = all(map(np.array_equal, _named(before.columns), _named(after.columns)))
    else:
        same = before.fingerprint == after.fingerprint
    if not same:
        what = f"split {before.split!r} reads back differently"
        raise HbaError(what, where=str(after.root), fix="Convert into an empty folder; this is a defect.")


def _named(columns: Columns) -> list[npt.NDArray[Any]]:
    """What the columns say, whatever order their names are in."""
    pairs = (
        (columns.datasets, columns.dataset_codes),
        (columns.tasks, columns.task_codes),
        (columns.signatures, columns.signature_codes),
    )
    names = [np.array(vocabulary)[codes] for vocabulary, codes in pairs]
    return [*names, columns.label_codes, columns.problem_chars, columns.answer_chars]


def _write_manifest(
    path: str | Path, out: Path, to: Form, opened: Sequence[Atlas], converted: Sequence[Converted]
) -> None:
    splits = {
        result.split: {
            "rows": result.rows,
            "fingerprint": atlas.fingerprint,
            "parts": msgspec.to_builtins(result.parts),
        }
        for atlas, result in zip(opened, converted, strict=True)
    }
    write_json(out / MANIFEST, {"from": str(path), "to": to, "layout": LAYOUT, "created_at": now(), "splits": splits})
