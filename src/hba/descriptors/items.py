"""Which descriptors an atlas lacks, an item for each medium, and the ledger of what has been extracted.

A row wants a descriptor of its sounds (or, without sounds, of the sound tracks of its clips), landmarks of its clips,
and a transcript when it has no `texts`. A medium that many rows and splits share is one item. A row that names
descriptors from elsewhere is left alone unless they are to be replaced; one that names ours is looked at again, so
that a changed medium or a newer extractor is noticed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path
from typing import Any, Literal, NamedTuple

from hba.atlas import open_atlas
from hba.atlas.names import find_files
from hba.atlas.rows import Row
from hba.descriptors import landmarks, sound
from hba.environment import now
from hba.errors import HbaError, InputError, nearest
from hba.storage import AppendLog, alone, check_relative, file_sha256, is_abandoned, read_jsonl, write_data

Kind = Literal["audio", "video", "transcript"]
RowField = Literal["ext_audio_feats", "ext_video_feats", "texts"]
FIELDS: dict[Kind, RowField] = {"audio": "ext_audio_feats", "video": "ext_video_feats", "transcript": "texts"}
FORMATS = ("pt", "safetensors")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to extract. None leaves a kind out."""

    audio: str | None
    """a key of opensmile.FEATURE_SETS"""
    video: Literal["holistic"] | None
    transcripts: str | None = None
    """folder or hub id of a speech recognition model"""
    out_format: str = "pt"
    frames_per_second: float | None = None
    """frames of a clip that landmarks are looked for in; None takes all"""
    replace: bool = False
    """also where a row names descriptors that were not written here; their files are overwritten"""

    def __post_init__(self) -> None:
        if self.out_format not in FORMATS:
            fix = nearest(self.out_format, FORMATS)
            raise InputError(f"unknown format {self.out_format!r}", where="--out-format", fix=fix)
        if self.video not in (None, "holistic"):
            fix = nearest(self.video, ("holistic", "none"))
            raise InputError(f"unknown video descriptor {self.video!r}", where="--video", fix=fix)
        if self.frames_per_second is not None and not self.frames_per_second > 0:
            raise InputError(f"is {self.frames_per_second}", where="--frames-per-second", fix="Name a positive number.")
        if not (self.audio or self.video or self.transcripts):
            raise InputError("nothing to extract", fix="Choose --audio, --video or --transcripts.")

    def extractors(self) -> dict[Kind, str]:
        """The extractor's name for each kind that is wanted. Raises HbaError when one is not installed."""
        found: dict[Kind, str] = {}
        if self.audio:
            found["audio"] = sound.opensmile_id(self.audio)
        if self.video:
            found["video"] = landmarks.extractor_id(self.frames_per_second)
        if self.transcripts:
            found["transcript"] = sound.transcriber_id(self.transcripts)
        return found

    def output(self, kind: Kind, medium: str) -> str:
        """The file of a medium's descriptor, relative to the atlas."""
        if kind == "transcript":
            return f"transcripts/{medium}.txt"
        folder = sound.feature_set(self.audio or "").folder if kind == "audio" else "pose"
        return f"{folder}/{medium}.{self.out_format}"


class Item(NamedTuple):
    """One medium to measure. `medium` and `output` are relative to `root`; `where` names a row that wants it."""

    kind: Kind
    root: str
    medium: str
    output: str
    extractor: str
    where: str

    @property
    def size_bytes(self) -> int:
        """Stored bytes of the medium; 0 when it is not there, which the extractor reports."""
        try:
            return Path(self.root, self.medium).stat().st_size
        except OSError:
            return 0


class Wanted(NamedTuple):
    """A field of a row that is to name `outputs`."""

    line: int
    field: RowField
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class RowFile:
    """One JSONL file as it was when it was read, and what its rows want."""

    path: Path
    split: str
    stamp: tuple[int, int]
    wanted: list[Wanted] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """The items by output, in the order of the rows, and the row files."""

    root: Path
    items: dict[str, Item]
    files: list[RowFile]


def stamp_of(path: Path) -> tuple[int, int]:
    """Size and time of a file, by which a change shows."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def make_plan(root: Path, splits: Iterable[str], settings: Settings, ours: Iterable[str]) -> Plan:
    """What `settings` ask for in the given splits; `ours` are outputs written here before.

    Raises InputError for a bad row, an unknown split, and for parquet shards, whose media are not files.
    """
    if not root.is_dir():
        raise InputError("no such folder", where=str(root), fix="Name the folder of an atlas.")
    root, extractors, known = root.resolve(), settings.extractors(), set(ours)
    plan = Plan(root, {}, [])
    for split in splits:
        found = find_files(root, split)
        if found.files[0].suffix != ".jsonl" or found.files[0].parent != root:
            fix = "Describe the atlas as JSONL with media files, then convert it."
            raise InputError("descriptors are extracted from JSONL atlases alone", where=str(found.files[0]), fix=fix)
        rows = RowFile(found.files[0], split, stamp_of(found.files[0]))
        plan.files.append(rows)
        atlas = open_atlas(rows.path)
        for number, sample in enumerate(atlas):
            row, line = atlas.row(number), int(sample.where.rpartition(":")[2])
            for kind, extractor in extractors.items():
                _add(plan, rows, row, line, kind, extractor, settings, known)
    return plan


def _add(
    plan: Plan, rows: RowFile, row: Row, line: int, kind: Kind, extractor: str, settings: Settings, ours: set[str]
) -> None:
    field_name, media = FIELDS[kind], media_of(row, kind)
    outputs = tuple(settings.output(kind, medium) for medium in media)
    present: tuple[str, ...] = getattr(row, field_name)
    if not outputs or (present and not settings.replace and not (present == outputs and ours.issuperset(outputs))):
        return
    rows.wanted.append(Wanted(line, field_name, outputs))
    for medium, output in zip(media, outputs, strict=True):
        where = f"{rows.path.name}:{line}, {medium}"
        check_relative(medium, where=where)
        plan.items.setdefault(output, Item(kind, str(plan.root), medium, output, extractor, where))


def media_of(row: Row, kind: Kind) -> tuple[str, ...]:
    """The media whose descriptors of `kind` belong to a row, in its order."""
    return row.videos if kind == "video" else row.audios or row.videos


# What has been extracted and what could not be: the folder `describe/` of an atlas.
#
# `manifest.jsonl` is append-only: an item is entered as started before it is worked on and as done after its file
# stands whole under its name, so that after kill -9 every file is known to be ours, and what is not done is done again.
# The last line of an output counts. `describe_failures.jsonl` names every item that failed and why; what succeeds later
# leaves it at the end of that run. One process at a time works on an atlas.


FOLDER = "describe"


class Extracted(NamedTuple):
    """What an extractor reports of a file that it wrote."""

    medium_bytes: int
    medium_mtime_ns: int
    medium_sha256: str
    output_bytes: int
    shapes: dict[str, list[int]]
    medium_seconds: float | None
    work_seconds: float


class Failed(NamedTuple):
    """Why there is no file for an item."""

    reason: str


class Ledger:
    """The manifest and the failures of an atlas; open it with `open_ledger`."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root / FOLDER
        self._manifest = AppendLog(self.folder / "manifest.jsonl")
        self._failures = AppendLog(self.failures_path)
        self._last = {line.record["output"]: line.record for line in read_jsonl(self._manifest.path)}
        self._failed = {line.record["output"]: line.record for line in read_jsonl(self.failures_path)}

    @property
    def failures_path(self) -> Path:
        """The file that names what failed."""
        return self.folder / "describe_failures.jsonl"

    def outputs(self) -> set[str]:
        """Every output that was ever started here, whole or not."""
        return set(self._last)

    def is_done(self, item: Item) -> bool:
        """Whether the item's file stands, by this extractor, from the medium as it is now.

        A medium of equal size and time is taken for unchanged; otherwise its SHA-256 decides.
        """
        record = self._last.get(item.output)
        if record is None or record["state"] != "done" or record["extractor"] != item.extractor:
            return False
        try:
            if (self.root / item.output).stat().st_size != record["output_bytes"]:
                return False
            medium = self.root / item.medium
            status = medium.stat()
            if (status.st_size, status.st_mtime_ns) == (record["medium_bytes"], record["medium_mtime_ns"]):
                return True
            return bool(status.st_size == record["medium_bytes"] and file_sha256(medium) == record["medium_sha256"])
        except OSError:
            return False

    def start(self, item: Item) -> None:
        """Enter an item before it is worked on, and remove what a killed run left half-written of it."""
        output = self.root / item.output
        for rest in output.parent.glob(f".{escape(output.name)}.*.tmp") if item.output in self._last else ():
            if is_abandoned(rest):
                rest.unlink(missing_ok=True)
        self._enter({"state": "started", "output": item.output})

    def finish(self, item: Item, result: Extracted) -> None:
        """Enter an item whose file stands."""
        about = {"kind": item.kind, "medium": item.medium, "extractor": item.extractor, "at": now()}
        self._enter({"state": "done", "output": item.output, **about, **result._asdict()})

    def _enter(self, record: dict[str, Any]) -> None:
        self._manifest.append(record)
        self._last[record["output"]] = record

    def fail(self, item: Item, reason: str) -> None:
        """Record why an item failed, unless the same is recorded already."""
        about = {"kind": item.kind, "medium": item.medium, "output": item.output, "extractor": item.extractor}
        record = {**about, "where": item.where, "reason": reason}
        if {**self._failed.get(item.output, {}), "at": None} != {**record, "at": None}:
            self._failed[item.output] = record | {"at": now()}
            self._failures.append(self._failed[item.output])

    def settle(self, mended: set[str]) -> None:
        """Take the `mended` outputs out of the failures, and leave one line for each that still fails."""
        for output in mended:
            self._failed.pop(output, None)
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in self._failed.values())
        if text != self.failures_path.read_text(encoding="utf-8"):
            self._failures.close()
            write_data(self.failures_path, text)
            self._failures = AppendLog(self.failures_path)

    def close(self) -> None:
        """Flush to the disk and close."""
        self._manifest.close()
        self._failures.close()


@contextmanager
def open_ledger(root: Path) -> Iterator[Ledger]:
    """The ledger of an atlas, locked against other processes. Raises HbaError when another one works on it."""
    fix = "Wait for it to end, or end it."
    busy = HbaError("another process extracts descriptors here", where=str(root / FOLDER), fix=fix)
    with alone(root / FOLDER / "lock", busy=busy), closing(Ledger(root)) as ledger:
        yield ledger
