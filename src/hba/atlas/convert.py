"""An atlas from one form into another: parquet shards with embedded media, or JSONL with media files.

Rows, ids, order, labels, extra fields and the bytes of every medium stay as they are, also what its file was called.
The work is cut into parts (shards) that processes take in any order. A part is checked before it appears, and appears
in one rename; a conversion that was killed goes on with the parts that are missing; `convert.json` comes last. Nothing
is decoded and nothing is judged: an empty file stays one, and a medium that cannot be read stays unreadable in the new
form, so that its sample is quarantined there as here, and is named. But a shard whose checksums differ is refused.
Shards follow the published layout (`train-00000-of-00012.parquet`), so that any parquet reader opens them.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import pairwise
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
from hba.atlas.names import CARD, present_splits
from hba.atlas.parquet import EXTRA, IS_NULL, MEDIA_PATHS, ParquetStore, index_path, read_index, write_index
from hba.atlas.rows import MEDIA_FIELDS, UNNAMED, Columns, Field, Quarantined, Row, Sample
from hba.atlas.source import DEFAULT_LIMITS, PLACES, RESTORE, Slice, Source, check_source, read_bytes
from hba.environment import die_with_parent, now
from hba.errors import HbaError, InputError, MediaError
from hba.parallel import Died, each
from hba.storage import (
    alone,
    atomic_write,
    check_relative,
    file_sha256,
    json_sha256,
    named_os_errors,
    read_json,
    remove_abandoned,
    write_data,
    write_json,
    writer_name,
)
from hba.taxonomy import FILE as TAXONOMY_FILE

TEXT_FIELDS = ("problem", "answer", "dataset", "task", "class_label", "modality_signature")
STAGING = ".convert"
Form = Literal["parquet", "jsonl"]
OnProgress = Callable[[int, int], None]


class Record(NamedTuple):
    """A row with the bytes of its media, None for those that cannot be had, and what they are called as files."""

    sample: Sample
    row: Row
    media: dict[str, list[bytes | None]]
    paths: dict[str, list[str | None]]
    unreadable: list[Quarantined]


def read_records(atlas: Atlas, start: int, stop: int) -> Iterator[Record]:
    """Yield the rows `start` to `stop` of an atlas, one in memory at a time. Raises InputError for a damaged shard."""
    store = atlas[start].source
    if isinstance(store, ParquetStore):
        store.check_text(atlas.numbers[start:stop])
    for index in range(start, stop):
        sample, row = atlas[index], atlas.row(index)
        media: dict[str, list[bytes | None]] = {name: [] for name in MEDIA_FIELDS}
        unreadable: list[Quarantined] = []
        for name in MEDIA_FIELDS:
            where = sample.place(name)
            for number in range(getattr(sample, name)):
                try:
                    media[name].append(_read(store.medium(sample.number, name, number, where=where), where))
                except MediaError as error:
                    if isinstance(store, ParquetStore) and error.what != IS_NULL:
                        raise InputError(error.what, where=error.where, fix="Restore the shard.") from None
                    media[name].append(None)
                    unreadable.append(sample.quarantined(error))
        paths: dict[str, list[str | None]] = {name: list(getattr(row, name)) for name in MEDIA_FIELDS}
        if isinstance(store, ParquetStore):
            for field, known in paths.items():
                told = UNNAMED not in known and len(known) == len(media[field])
                paths[field] = known if told else [None] * len(media[field])
        yield Record(sample, row, media, paths, unreadable)


def _read(source: Source, where: str) -> bytes:
    try:
        if isinstance(source, Path):
            if source.is_file() and source.stat().st_size == 0:
                return b""  # no sound or clip, but as it is
            check_source(source, where=where, limits=DEFAULT_LIMITS)
        return read_bytes(source, where=where)
    except OSError as error:
        raise MediaError(f"cannot be read ({error.strerror})", where=where, fix=RESTORE) from None


def media_bytes(atlas: Atlas) -> list[int]:
    """About how many bytes the media of each row take, without reading them; what is missing takes none."""
    store = atlas[0].source
    if not isinstance(store, ParquetStore):
        return [
            sum(size_of(atlas.root / path) or 0 for name in MEDIA_FIELDS for path in getattr(row, name))
            for row in map(atlas.row, range(len(atlas)))
        ]
    sizes: list[int] = []  # for each row the mean of its row group
    for shard in store.shards:
        with store.open_shard(shard) as file:
            for number in range(file.num_row_groups):
                group = file.metadata.row_group(number)
                columns = [group.column(k) for k in range(group.num_columns)]
                media = [column for column in columns if column.path_in_schema.split(".")[0] in MEDIA_FIELDS]
                total = sum(column.total_uncompressed_size for column in media)
                sizes += [total // max(1, group.num_rows)] * group.num_rows
    return [sizes[number] for number in atlas.numbers.tolist()]


# --- a part -----------------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """Rows `start` to `stop` of a split: part `number` of `total` of what it becomes in `out`."""

    out: Path
    split: str
    to: Form
    number: int
    total: int
    start: int
    stop: int
    bytes: int
    origin: str
    """tells which rows of which data it is made from"""

    @property
    def path(self) -> Path:
        """Where it lies: a shard, or lines that wait until all parts are there."""
        name = f"{self.split}-{self.number:05d}-of-{self.total:05d}"
        return self.out / f"{name}.parquet" if self.to == "parquet" else self.out / STAGING / f"{name}.jsonl"

    @property
    def summary(self) -> Path:
        """Where its summary lies."""
        return (index_path(self.path) if self.to == "parquet" else self.path).with_suffix(".json")


class Summary(msgspec.Struct, kw_only=True, frozen=True):
    """What a part holds."""

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


def make_part(atlas: Atlas, part: Part) -> Summary | HbaError:
    """Make a part, unless it is there, whole and of the same rows. An error is returned, since it travels as it is."""
    main = parent_process()
    if main is not None and main.pid is not None:
        die_with_parent(main.pid)  # nothing still writes when the main process is killed
    try:
        there = [part.path, part.summary, *([index_path(part.path)] if part.to == "parquet" else [])]
        if all(map(Path.is_file, there)) and (part.to == "jsonl" or read_index(part.path) is not None):
            summary = msgspec.convert(read_json(part.summary), Summary)
            if summary.origin == part.origin:
                return summary
        tally = _Tally(part)
        write = _write_shard if part.to == "parquet" else _write_lines
        return write(part, map(tally.counted, read_records(atlas, part.start, part.stop)), tally)
    except HbaError as error:
        return error


class _Tally:
    """Counts what goes into a part."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.rows = self.media = self.bytes = self.named = 0
        self.unreadable: dict[str, Quarantined] = {}

    def counted(self, record: Record) -> Record:
        self.rows += 1
        for name in MEDIA_FIELDS:
            self.media += len(record.media[name])
            self.named += self.part.to == "jsonl" and record.paths[name].count(None)
            self.bytes += sum(len(medium or b"") for medium in record.media[name])
        for left_out in record.unreadable:
            self.unreadable.setdefault(left_out.id, left_out)
        return record

    def write_summary(self, file: Path) -> Summary:
        """Of the part as it lies in `file`."""
        summary = Summary(
            file=self.part.path.name,
            origin=self.part.origin,
            rows=self.rows,
            media=self.media,
            media_bytes=self.bytes,
            named=self.named,
            sha256=file_sha256(file),
            unreadable=[left_out._asdict() for left_out in self.unreadable.values()],
        )
        write_json(self.part.summary, msgspec.to_builtins(summary))
        return summary


# A shard whose media can be read by row. Media columns are stored plain, text columns compressed; the index part beside
# the shard says where each medium lies (`parquet`). It is made in a hidden folder, read back through its index,
# compared with what went in, medium by medium, and only then renamed to its place, after index part and summary.

GROUP_BYTES = 16 << 20  # what a reader without the index part reads to serve a row
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


def _write_shard(part: Part, records: Iterable[Record], tally: _Tally) -> Summary:
    """Write, check and place one shard. Raises HbaError when it reads back differently, StorageError on a full disk."""
    path = part.path
    staged = part.out / STAGING / writer_name() / path.name
    texts: list[dict[str, Any]] = []
    hashes: list[str] = []
    with atomic_write(staged, "wb") as handle, pq.ParquetWriter(handle, _SCHEMA, **_OPTIONS) as writer:
        rows: list[dict[str, Any]] = []
        written = 0
        for record in records:
            text: dict[str, Any] = {name: getattr(record.row, name) for name in TEXT_FIELDS}
            text |= {"id": record.sample.id, "texts": list(record.row.texts), MEDIA_PATHS: record.paths}
            extra = record.sample.extra
            text[EXTRA] = msgspec.json.encode(extra).decode() if extra else None
            texts.append(text)
            rows.append({**text, **record.media})
            hashes += [_hash_of(medium or b"") for name in MEDIA_FIELDS for medium in record.media[name]]
            if tally.bytes - written >= GROUP_BYTES:
                writer.write_table(pa.Table.from_pylist(rows, _SCHEMA))
                rows, written = [], tally.bytes
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, _SCHEMA))
    write_index(staged)
    table = read_index(staged)
    found: list[dict[str, Any]] = table.to_pylist() if table is not None else []
    read: list[str] = []  # an index does not tell an empty medium from a null
    for values in found:
        for name in MEDIA_FIELDS:
            for offset, size, crcs in zip(*(values.pop(f"{name}_{what}") for what in PLACES), strict=True):
                medium = Slice(staged, offset, size, crcs) if offset >= 0 else b""
                read.append(_hash_of(read_bytes(medium, where=str(staged))))
    if (found, read) != (texts, hashes):
        raise HbaError("reads back differently", where=str(staged), fix="Check the disk and convert again.")
    summary = tally.write_summary(staged)
    index_path(staged).replace(index_path(path))
    staged.replace(path)
    return summary


def _hash_of(medium: bytes) -> str:
    return hashlib.sha256(medium).hexdigest()


# JSONL lines and media files. A medium gets the path that it had before it was embedded, or one made of its field,
# split and row. A path is used once for one content: rows that share a file share it again, and two contents under one
# name are an error, never a mixture. No path leads out of the folder. Every file is read back and compared; the lines
# of a part appear after all its files.

RESERVED = (CARD, "convert.json", TAXONOMY_FILE)
_SIGNATURES = (
    *((b"RIFF", 0, b"WAVE", 8, ".wav"), (b"RIFF", 0, b"AVI ", 8, ".avi"), (b"RIFF", 0, b"WEBP", 8, ".webp")),
    *((b"ftyp", 4, b"", 0, ".mp4"), (b"fLaC", 0, b"", 0, ".flac"), (b"OggS", 0, b"", 0, ".ogg")),
    *((b"ID3", 0, b"", 0, ".mp3"), (b"\xff\xfb", 0, b"", 0, ".mp3"), (b"\xff\xf3", 0, b"", 0, ".mp3")),
    *((b"\xff\xf1", 0, b"", 0, ".aac"), (b"FORM", 0, b"AIF", 8, ".aiff"), (b"#!AMR", 0, b"", 0, ".amr")),
    *((b"\x1a\x45\xdf\xa3", 0, b"", 0, ".mkv"), (b"FLV", 0, b"", 0, ".flv"), (b"\0\0\1\xba", 0, b"", 0, ".mpg")),
    *((b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", 0, b"", 0, ".wmv"), (b"GIF8", 0, b"", 0, ".gif")),
    *((b"\x89PNG", 0, b"", 0, ".png"), (b"\xff\xd8\xff", 0, b"", 0, ".jpg"), (b"PK\x03\x04", 0, b"", 0, ".pt")),
)


def _write_lines(part: Part, records: Iterable[Record], tally: _Tally) -> Summary:
    """Write the media of some rows, then their lines.

    Raises InputError for a path that leads out of the folder, is reserved, or is that of another content already;
    HbaError when a file reads back differently; StorageError when the disk is full.
    """
    lines: list[bytes] = []
    for line, record in enumerate(records, part.start + 1):
        for name in MEDIA_FIELDS:
            for index, medium in enumerate(record.media[name]):
                path = record.paths[name][index] = _path(part, record, name, index)
                if medium is not None:
                    _place(part.out, path, medium, where=record.sample.place(name))
        lines.append(_line(record, implied=f"{part.split}/{line}"))
    os.sync()  # once a part: a sync of each file takes longer than all the rest
    write_data(part.path, b"".join(lines))
    return tally.write_summary(part.path)


def _line(record: Record, *, implied: str) -> bytes:
    """The row as JSON with the fields and in the order of the published rows; an id that is implied is left out."""
    fields = {name: getattr(record.row, name) for name in TEXT_FIELDS}
    label = fields.pop("class_label")
    lists: dict[str, Any] = dict(record.paths)
    row: dict[str, Any] = {} if record.sample.id == implied else {"id": record.sample.id}
    row |= {"problem": fields.pop("problem"), "answer": fields.pop("answer")}
    row |= {name: lists.pop(name) for name in ("images", "videos", "audios")} | {"texts": record.row.texts}
    row |= fields | lists | ({} if label is None else {"class_label": label})
    return msgspec.json.encode(row | dict(record.sample.extra)) + b"\n"


def _path(part: Part, record: Record, name: Field, index: int) -> str:
    known = record.paths[name][index]
    if known is None:
        ending = _ending(record.media[name][index] or b"")
        return f"{name}/{part.split}-{record.sample.number:06d}-{index}{ending}"
    where = record.sample.place(name)
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
    digest = _hash_of(data)
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


SHARD_BYTES = 512 << 20
LAYOUT = 3  # of what is written; another number makes a conversion start anew
MANIFEST = "convert.json"
BESIDE = (CARD, TAXONOMY_FILE)
# A part that is slower than this per byte is given up: its process hangs.
_PATIENCE_SECONDS, _PATIENCE_BYTES_PER_SECOND = 1800.0, 50_000


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
        plans = [_plan(atlas, out, to, shard_bytes) for atlas in opened]
        for atlas, plan in zip(opened, plans, strict=True):
            _refuse_others(atlas, out, to, plan)
        for name in BESIDE:  # what an atlas says of itself
            if (opened[0].root / name).is_file():
                write_data(out / name, (opened[0].root / name).read_bytes())
        total, before, converted = sum(map(len, plans)), 0, []
        for atlas, plan in zip(opened, plans, strict=True):
            tell = None if progress is None else partial(_tell, progress, before, total)
            converted.append(_convert(atlas, plan, workers, tell))
            before += len(plan)
        for atlas, result in zip(opened, converted, strict=True):
            if to == "jsonl":  # the lines of all parts are the rows of the split
                with atomic_write(out / f"{result.split}.jsonl", "wb") as handle:
                    for part in result.parts:
                        handle.write((out / STAGING / part.file).read_bytes())
            _compare(atlas, open_atlas(out, atlas.split, taxonomy=atlas.taxonomy), result)
        about = {
            result.split: {
                "rows": result.rows,
                "fingerprint": atlas.fingerprint,
                "parts": msgspec.to_builtins(result.parts),
            }
            for atlas, result in zip(opened, converted, strict=True)
        }
        manifest = {"from": str(path), "to": to, "layout": LAYOUT, "created_at": now(), "splits": about}
        write_json(out / MANIFEST, manifest)
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
        plan = _plan(atlas, out, "parquet", shard_bytes)
        _refuse_others(atlas, out, "parquet", plan)
        converted = _convert(atlas, plan, workers, progress)
        shutil.rmtree(out / STAGING)
    return [out / part.file for part in converted.parts]


def _tell(progress: OnProgress, before: int, total: int, done: int, _: int) -> None:
    progress(before + done, total)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keep other processes from converting into `out`; the system lets go of the lock when this one is killed."""
    (out / STAGING).mkdir(parents=True, exist_ok=True)
    fix = "Wait for it to end, or end it."
    with alone(out / STAGING, busy=HbaError("another process converts into this folder", where=str(out), fix=fix)):
        try:
            yield
        finally:
            for folder in (out, index_path(out / "shard").parent):
                remove_abandoned(folder)  # of workers that outlived their killed process by a moment
            with suppress(OSError):  # not empty: the work is not done
                (out / STAGING).rmdir()


def _plan(atlas: Atlas, out: Path, to: Form, shard_bytes: int) -> list[Part]:
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
        Part(out, atlas.split, to, number, len(sums), start, stop, held, json_sha256([*data, start, stop, held]))
        for number, ((start, stop), held) in enumerate(zip(pairwise([*bounds, len(atlas)]), sums, strict=True))
    ]


def _convert(atlas: Atlas, plan: Sequence[Part], workers: int, progress: OnProgress | None) -> Converted:
    make = partial(make_part, atlas)
    if workers <= 1 or len(plan) == 1:
        results: Iterator[tuple[Part, Summary | HbaError | Died]] = ((part, make(part)) for part in plan)
    else:
        results = iter(each(make, plan, workers=min(workers, len(plan)), patience=_patience))
    parts: dict[int, Summary] = {}
    for part, result in results:
        if isinstance(result, HbaError):
            raise result
        if isinstance(result, Died):
            fix = "Run the command again; it goes on with the parts that are missing."
            raise HbaError(f"the process that wrote part {part.number} {result.reason}", fix=fix)
        parts[part.number] = result
        if progress is not None:
            progress(len(parts), len(plan))
    return Converted(atlas.split, [parts[part.number] for part in plan])


def _patience(part: Part) -> float:
    return _PATIENCE_SECONDS + part.bytes / _PATIENCE_BYTES_PER_SECOND


def _refuse_others(atlas: Atlas, out: Path, to: Form, plan: Sequence[Part]) -> None:
    """Raise InputError when `out` holds the split in another form or another cut."""
    others = set(out.glob(f"{atlas.split}-*-of-*.parquet")) - {part.path for part in plan}
    if others or (to == "parquet" and (out / f"{atlas.split}.jsonl").exists()):
        fix = "Choose an empty folder, or convert the same data with the same shard size."
        raise InputError(f"holds other shards or rows of split {atlas.split!r}", where=str(out), fix=fix)


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
