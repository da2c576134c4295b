"""Writes a part of an atlas as JSONL lines and media files, the inverse of `shards`.

A medium gets the path that it had before it was embedded, or one made of its field, split and row. A path is used once
for one content: rows that share a file share it again, and two contents under one name are an error, never a mixture.
No path leads out of the folder. Every file is read back and compared; the lines of a part appear after all its files.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from hba.atlas.records import Record
from hba.atlas.sample import MEDIA_FIELDS, Field
from hba.atlas.shards import STAGING, Summary
from hba.errors import HbaError, InputError
from hba.storage import atomic_write, check_relative, file_sha256, named_os_errors, read_json, write_json, writer_name
from hba.taxonomy import FILE as TAXONOMY_FILE

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
