"""Probe many media in parallel, each once, and remember what was found: a survey that is killed goes on where it was.

What is found of a good file is one line of an append-only log, keyed by path, size and modification time; a file that
has changed since is probed again, and so is one that was refused, since it may have been restored. A file that crashes
or stalls its decoder is refused like a broken one. No link is followed out of the atlas.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeAlias

import msgspec

from hba.atlas.probe import Facts, probe
from hba.atlas.rowfiles import Embedded, MediumName, embedded_medium
from hba.atlas.rowscan import Catalogue
from hba.atlas.sample import Field
from hba.atlas.slices import Slice, Source
from hba.atlas.source import RESTORE
from hba.errors import InputError, MachineError, MediaError
from hba.parallel import Died, each
from hba.storage import AppendLog, confined_path, patiently

VERSION = 1  # of the facts: raise it whenever the same file gives others
LEAST_SECONDS = 120.0  # before a file counts as stalled; long clips get more
BYTES_PER_SECOND = 200_000  # slower than any decoder that is still at work
UNKNOWN, LARGE_BYTES = -1, 256 << 20


class Refused(msgspec.Struct, frozen=True, gc=False):
    """Why a medium has no facts; `code` is one of `findings.CODES`."""

    code: str
    what: str
    fix: str


Outcome: TypeAlias = Facts | Refused


class Medium(NamedTuple):
    """A medium that is there, with what tells whether it has changed."""

    number: int
    field: Field
    source: Source | Embedded
    key: str
    num_bytes: int  # UNKNOWN for embedded media without a known place
    mtime_ns: int
    hashed: bool = False


class _Record(msgspec.Struct, kw_only=True, gc=False, omit_defaults=True):
    """One line of the log."""

    key: str
    field: Field
    num_bytes: int
    mtime_ns: int
    version: int
    quick: bool = False
    facts: Facts


class Locator:
    """Finds the media that rows name. Remembers folders, since a release has hundreds of thousands of files."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._prefix = f"{self.root}{os.sep}"
        self._folders: dict[str, str | None] = {}
        self._times: dict[Path, int] = {}

    def locate(self, number: int, field: Field, name: MediumName, where: str) -> Medium | Refused:
        """The medium, or why it cannot be reached."""
        if isinstance(name, Slice):
            key = f"{name.path}[{name.offset}:{name.offset + name.size}]"
            return Medium(number, field, name, key, name.size, self._shard_time(name.path))
        if isinstance(name, Embedded):
            key = f"{name.shard}[{name.row}, {name.name}, {name.entry}]"
            return Medium(number, field, name, key, UNKNOWN, self._shard_time(name.shard))
        try:
            path, status = self._plain(name) or self._careful(name, where)
        except MediaError as error:
            return Refused("media-missing", error.what, error.fix)
        except InputError as error:
            return Refused("media-outside", error.what, error.fix)
        if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
            what = "is empty (0 bytes)" if stat.S_ISREG(status.st_mode) else "is not a regular file"
            return Refused("media-missing", what, RESTORE)
        return Medium(number, field, path, str(path), status.st_size, status.st_mtime_ns)

    def _shard_time(self, shard: Path) -> int:
        if shard not in self._times:
            self._times[shard] = patiently(shard.stat, str(shard)).st_mtime_ns
        return self._times[shard]

    def _plain(self, name: str) -> tuple[Path, os.stat_result] | None:
        """The file, when its folder is in the atlas and it is no link; else None."""
        folder, _, base = name.rpartition("/")
        if folder not in self._folders:
            real = os.path.realpath(self._prefix + folder)
            self._folders[folder] = real if f"{real}{os.sep}".startswith(self._prefix) else None
        place = self._folders[folder]
        if place is None or base in ("", ".", ".."):
            return None
        path = f"{place}{os.sep}{base}"
        try:
            status = os.lstat(path)
        except OSError:
            return None
        return None if stat.S_ISLNK(status.st_mode) else (Path(path), status)

    def _careful(self, name: str, where: str) -> tuple[Path, os.stat_result]:
        path = confined_path(self.root, name, where=where)
        try:
            return path, patiently(path.stat, where)
        except OSError as error:
            raise MediaError(f"cannot be read ({error.strerror})", where=where, fix=RESTORE) from None


def locate(catalogue: Catalogue) -> tuple[list[Medium], dict[int, Outcome]]:
    """The media that are there, and why others are not."""
    locator = Locator(catalogue.root)
    media: list[Medium] = []
    refused: dict[int, Outcome] = {}
    for number, use in enumerate(catalogue.uses):
        found = locator.locate(number, use.field, use.name, catalogue.where(use.places[0], use.field))
        if isinstance(found, Refused):
            refused[number] = found
        else:
            media.append(found)
    return media, refused


def survey(
    media: Sequence[Medium],
    *,
    log: Path | None,
    quick: bool,
    workers: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, Outcome]:
    """What was found of each medium, by its number. `log` is the file that remembers, None for none.

    `progress(done, total)` is told of each medium. Raises InputError when `log` holds something else.
    """
    found: dict[int, Outcome] = {}
    with ExitStack() as stack:
        appended = stack.enter_context(AppendLog(log)) if log is not None else None  # first: it cuts a torn line
        known = _read(log) if log is not None else {}
        for medium in media:
            recalled = _recall(known, medium, quick)
            if recalled is not None:
                found[medium.number] = recalled
        todo = [medium for medium in media if medium.number not in found]
        if progress is not None:
            progress(len(found), len(media))
        for medium, result in _probed(todo, quick=quick, workers=workers):
            found[medium.number] = result
            if appended is not None and isinstance(result, Facts):
                appended.append(msgspec.to_builtins(_record(medium, result, quick)))
            if progress is not None:
                progress(len(found), len(media))
    return found


def _probed(
    media: Sequence[Medium], *, quick: bool, workers: int, again: bool = False
) -> Iterator[tuple[Medium, Outcome]]:
    """What was found of each. Those whose process was killed are tried again one at a time, when more memory is free.

    Raises MachineError when it is killed then, too.
    """
    killed: list[Medium] = []
    count = min(workers, len(media))
    for medium, result in each(partial(_probe, quick=quick), media, workers=count, patience=_patience):
        if isinstance(result, Died) and result.killed:
            if again:
                fix = "Free memory, then run the same command again: what was found is kept."
                raise MachineError(f"the process that decodes it {result.reason}", where=medium.key, fix=fix)
            killed.append(medium)
        elif isinstance(result, Died):
            yield medium, Refused("media-crash", f"{result.reason} while it was decoded", RESTORE)
        else:
            yield medium, result
    if killed:
        yield from _probed(killed, quick=quick, workers=1, again=True)


def _probe(medium: Medium, *, quick: bool) -> Outcome:
    source = medium.source
    try:
        if isinstance(source, Embedded):
            source = embedded_medium(source)
    except MediaError as error:
        return Refused("media-missing", error.what, error.fix)
    except InputError as error:  # of the shard
        return Refused("media-missing", f"cannot be read: its shard {error.what}", error.fix)
    try:
        return probe(source, medium.field, where="", quick=quick, hashed=medium.hashed)
    except MediaError as error:
        return Refused("media-broken", error.what, error.fix)


def _patience(medium: Medium) -> float:
    num_bytes = LARGE_BYTES if medium.num_bytes == UNKNOWN else medium.num_bytes
    return LEAST_SECONDS + num_bytes / BYTES_PER_SECOND


def _record(medium: Medium, facts: Facts, quick: bool) -> _Record:
    return _Record(
        key=medium.key,
        field=medium.field,
        num_bytes=medium.num_bytes,
        mtime_ns=medium.mtime_ns,
        version=VERSION,
        quick=quick,
        facts=facts,
    )


def _read(log: Path) -> dict[tuple[str, Field], _Record]:
    decoder = msgspec.json.Decoder(_Record)
    known: dict[tuple[str, Field], _Record] = {}
    with log.open("rb") as handle:
        for line, raw in enumerate(handle, 1):
            try:
                record = decoder.decode(raw)
            except msgspec.DecodeError as error:
                fix = "Name another folder, or delete the file."
                raise InputError(f"is no log of surveyed media ({error})", where=f"{log}:{line}", fix=fix) from None
            known[record.key, record.field] = record
    return known


def _recall(known: dict[tuple[str, Field], _Record], medium: Medium, quick: bool) -> Facts | None:
    record = known.get((medium.key, medium.field))
    if record is None or record.version != VERSION or (record.quick and not quick):
        return None
    if (record.num_bytes, record.mtime_ns) != (medium.num_bytes, medium.mtime_ns):
        return None
    return None if medium.hashed and record.facts.sha256 is None else record.facts
