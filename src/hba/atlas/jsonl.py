"""Rows of a JSONL file whose media are files beside it, or are fetched to lie beside it.

Opening reads the file once, checks every line and keeps only where each line begins, 16 bytes a row; a row is parsed
again when it is asked for. Nothing is decoded. Media are named by paths relative to the folder of the file; a path that
leaves it, by name or through a link, is refused. A file that changes after it was opened is an error, never a mixture.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from hba.atlas.rows import (
    KNOWN_FIELDS,
    MEDIA_FIELDS,
    Columns,
    Field,
    Quarantined,
    Row,
    RowChecker,
    Said,
    Sample,
    canonical,
    decode_fields,
    decode_row,
)
from hba.atlas.source import Source, opened
from hba.errors import InputError
from hba.storage import confined_path, patiently
from hba.taxonomy import Taxonomy

MAX_LINE_BYTES = 64 << 20
_BLOCK_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"


def read_lines(path: Path, file: str) -> Iterator[tuple[int, int, bytes | InputError]]:
    """The lines of a file, which messages call `file`, that hold something: number (from 1), the byte at which the line
    begins (behind a byte order mark), and its text, or why it has none."""
    number = at = 0
    with opened(path, where=file) as handle:
        while raw := handle.readline(MAX_LINE_BYTES):
            number += 1
            start, at = at, at + len(raw)
            if number == 1 and raw.startswith(_BOM):
                raw, start = raw.removeprefix(_BOM), len(_BOM)
            if len(raw) < MAX_LINE_BYTES or raw.endswith(b"\n"):
                if raw and not raw.isspace():
                    yield number, start, raw
                continue
            while raw and not raw.endswith(b"\n"):
                raw = handle.readline(MAX_LINE_BYTES)
                at += len(raw)
            fix = "Write one JSON object per line."
            what = f"is longer than {MAX_LINE_BYTES:,} bytes"
            yield number, start, InputError(what, where=f"{file}:{number}", fix=fix)


class RemoteFiles(Protocol):
    """Media of which only those that were read are on this machine."""

    def fetch(self, path: str, *, where: str) -> Path:
        """The file of a medium that a row names. Raises MediaError when there is none."""
        ...

    def sizes(self, paths: Sequence[str]) -> list[int]:
        """Bytes of each medium, 0 of one that is not there."""
        ...


class JsonlStore:
    """One JSONL file. `split` names its rows that carry no id: '{split}/{line}'. Picklable; holds no open media."""

    def __init__(self, path: Path, *, split: str, taxonomy: Taxonomy, remote: RemoteFiles | None = None) -> None:
        """Read and check every line; `remote` has the media that are not files beside it. Raises InputError naming
        file, line and field, also for a file without rows."""
        self.path, self._remote = path, remote
        self.split = split
        self.root = path.parent.resolve()
        self.taxonomy = taxonomy
        self._starts: npt.NDArray[np.int64]
        self._lines: npt.NDArray[np.int64]
        self.columns = self._index()
        self._handle: IO[bytes] | None = None

    def __len__(self) -> int:
        return len(self._lines)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}

    def _index(self) -> Columns:
        name = str(self.path)
        checker = RowChecker(self.taxonomy, split=self.split, place=lambda line: f"{name}:{line}")
        starts, lines = array("q"), array("q")
        status = patiently(self.path.stat, name)
        for line, start, text in read_lines(self.path, name):
            if isinstance(text, InputError):
                raise text
            checker.check(decode_row(text, name, line), line)
            starts.append(start)
            lines.append(line)
        self._stamp = (status.st_size, status.st_mtime_ns)
        if not lines:
            raise InputError(f"split {self.split!r} has no rows", where=name, fix="Write at least one row.")
        starts.append(status.st_size)
        self._starts, self._lines = np.frombuffer(starts, np.int64), np.frombuffer(lines, np.int64)
        return checker.columns()

    def raw(self, number: int) -> bytes:
        """The JSON of row `number`, without the line end. Raises InputError when the file has changed."""
        if self._handle is None:
            self._handle = self._reopen()
        start, stop = int(self._starts[number]), int(self._starts[number + 1])
        return self._read(self._handle.fileno(), stop - start, start).split(b"\n", 1)[0]

    def _read(self, descriptor: int, size: int, start: int) -> bytes:
        return patiently(partial(os.pread, descriptor, size, start), str(self.path))

    def _raws(self, numbers: npt.NDArray[np.integer]) -> Iterator[bytes]:
        """What `raw` gives for each of many rows; ascending rows are read in blocks."""
        if len(numbers) and np.all(np.diff(numbers) > 0):
            starts, stops = self._starts[numbers].tolist(), self._starts[numbers + 1].tolist()
            self.raw(int(numbers[0]))  # opens the file
            descriptor = self._handle.fileno() if self._handle is not None else -1
            first, block = 0, b""
            for start, stop in zip(starts, stops, strict=True):
                if stop > first + len(block):
                    first, block = start, self._read(descriptor, max(_BLOCK_BYTES, stop - start), start)
                yield block[start - first : stop - first].split(b"\n", 1)[0]
        else:
            yield from (self.raw(int(number)) for number in numbers)

    def _reopen(self) -> IO[bytes]:
        try:
            handle = patiently(lambda: self.path.open("rb"), str(self.path))
        except OSError as error:
            raise InputError(f"cannot be read ({error.strerror})", where=str(self.path), fix="Restore it.") from None
        status = os.fstat(handle.fileno())
        if self._stamp != (status.st_size, status.st_mtime_ns):
            handle.close()
            raise InputError("was changed after it was opened", where=str(self.path), fix="Open the atlas again.")
        return handle

    def place(self, number: int) -> str:
        """'file:line' of a row."""
        return f"{self.path}:{self._lines[number]}"

    def _id(self, number: int, given: str | None) -> str:
        return given if given is not None else f"{self.split}/{self._lines[number]}"

    def row(self, number: int) -> Row:
        """Row `number`, 0-based."""
        return decode_row(self.raw(number), str(self.path), int(self._lines[number]))

    def ids(self, numbers: npt.NDArray[np.integer]) -> list[str]:
        """The ids of the given rows."""
        given = (_named.decode(raw).id for raw in self._raws(numbers))
        return [self._id(int(number), each) for number, each in zip(numbers, given, strict=True)]

    def said(self, numbers: npt.NDArray[np.integer]) -> Iterator[Said]:
        """What each of the given rows says."""
        return map(self._said, map(int, numbers), self._raws(numbers))

    def _said(self, number: int, raw: bytes) -> Said:
        row = decode_row(raw, str(self.path), int(self._lines[number]))
        return Said(self._id(number, row.id), row, _extra(decode_fields(raw, self.place(number))))

    def sample(self, number: int, refused: dict[str, Quarantined]) -> Sample:
        """Row `number` with its label, place and extra fields; opens no medium."""
        said = self._said(number, self.raw(number))
        counts: dict[str, int] = {name: len(getattr(said.row, name)) for name in MEDIA_FIELDS}
        about = {"split": self.split, "number": number, "source": self, "refused": refused, **counts}
        return Sample.of(said, self.taxonomy, self.place(number), **about)

    def medium(self, number: int, name: Field, index: int, *, where: str) -> Source:
        """The file of a medium. Raises MediaError when it does not exist or is a link out of the atlas folder."""
        path: str = getattr(self.row(number), name)[index]
        if self._remote is not None:
            return self._remote.fetch(path, where=where)
        return confined_path(self.root, path, where=where)

    def audio_bytes(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Stored bytes of the sounds of each row, a stand-in for their length; missing files count as none."""
        sizes_N = np.zeros(len(numbers), np.int64)
        rows = np.flatnonzero(self.columns.num_audios[numbers])
        sounds = [_sounds.decode(raw).audios for raw in self._raws(numbers[rows])]
        paths = [path for each in sounds for path in each]
        owners = rows.repeat([len(each) for each in sounds])
        folder, remote = f"{self.root}/", self._remote
        np.add.at(sizes_N, owners, _sizes([folder + path for path in paths]) if remote is None else remote.sizes(paths))
        return sizes_N

    def contents(self, numbers: npt.NDArray[np.integer]) -> Iterator[bytes]:
        """What the fingerprint of the given rows is made of."""
        for number, raw in zip(map(int, numbers), self._raws(numbers), strict=True):
            fields = decode_fields(raw, self.place(number))
            yield canonical(self._id(number, fields.get("id")), fields, _extra(fields))


class _Sounds(msgspec.Struct):
    audios: list[str] = []


class _Named(msgspec.Struct):
    id: str | None = None


def _extra(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in KNOWN_FIELDS}


_sounds, _named = msgspec.json.Decoder(_Sounds), msgspec.json.Decoder(_Named)


def _sizes(paths: list[str]) -> list[int]:
    stat = os.stat
    try:
        return [stat(path).st_size for path in paths]
    except OSError:
        return [size_of(path) or 0 for path in paths]


def size_of(path: str | Path) -> int | None:
    """Bytes of a file, None when it is not there. Raises MachineError when its storage is away: it is no short file."""
    try:
        return patiently(partial(os.stat, path), str(path)).st_size
    except OSError:
        return None
