"""Clips and sounds that were decoded once, kept on the disk for later epochs, other ranks and other runs.

Nine tenths of what a clip costs is its codec, in every epoch again. `DecodedCache` keeps what the decoders made of a
medium under a key of the medium's identity, of what was asked of it, and of the code and the libraries that decoded
it: whatever changes one of them is decoded anew. What comes out is what decoding gives, to the bit; an entry that
differs from its checksum is found and decoded again. A medium that cannot be decoded has no entry: it is refused each
time, as without. What the disk lacks is never the fault of a medium: it is said once, and media are decoded.

The folder holds `index`, records of one size, and `segment-N`, the entries behind each other. Under one lock a process
appends an entry and then its record, so that what a killed one leaves is bytes that no record names, and a process
that misses an entry sees what others have kept meanwhile. The bound is for all of them together. Where it is reached,
segments that nobody has read for a day make room; if there are none, nothing more is kept, since a cache that drops
what an epoch asks for next has no hits at all.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
import platform
import re
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import av
import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from hba.atlas import audio, source, video
from hba.atlas.media import DEFAULT_LIMITS, Audio, Frames, Limits, Source, Video, load_audio, load_video
from hba.atlas.source import Slice
from hba.errors import HbaError
from hba.storage import CLOCK, StorageError, alone, file_sha256, json_sha256, named_os_errors

Arrays = dict[str, npt.NDArray[Any]]

SEGMENT_BYTES = 1 << 30
"""a segment takes no more entries beyond this, or beyond an eighth of the bound"""
IDLE_SECONDS = 24 * 3600.0
"""a segment that nobody has read for so long makes room"""
_TOUCH_SECONDS = 3600.0  # a segment that is read says so in its time this often
_REST_SECONDS = 600.0  # after what the disk has refused, before the next attempt
_KEY_BYTES = 32
_PLACE = struct.Struct("<QQQI")  # segment, offset, size, CRC-32 of the entry
_RECORD_BYTES = _KEY_BYTES + _PLACE.size + 4  # and a CRC-32 of the record
_OWN = re.compile(r"index|segment-\d+")
_FULL, _REFUSED, _DAMAGED = range(3)

_log = logging.getLogger(__name__)


class Resize(Protocol):
    """What makes frames [N, H, W, 3] smaller before they are kept; `key` tells what decides the outcome."""

    key: dict[str, Any]

    def __call__(self, frames: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]: ...


class CacheFullError(StorageError):
    """The bound of a cache is reached, and nothing in it is idle."""


class _Place(NamedTuple):
    """Where the bytes of an entry lie, and their CRC-32."""

    segment: int
    offset: int
    size: int
    checksum: int


class DecodedCache:
    """Decoded media in a folder, shared by processes. Picklable; holds no open file.

    `resize` makes frames smaller before they are kept. `strict`: what the disk refuses, and a full cache, are raised,
    not said once.
    """

    def __init__(self, folder: Path, max_bytes: int, *, resize: Resize | None = None, strict: bool = False) -> None:
        """Raises StorageError when the folder cannot be made or read."""
        self.folder, self.max_bytes, self.resize, self.strict = folder, max_bytes, resize, strict
        self._places: dict[bytes, bytes] = {}  # packed: each process holds all of them
        self._last_segment = 0
        self._read_bytes = 0  # of the index
        self._touched: dict[int, float] = {}
        self._resting_until = 0.0
        self._said = _said(folder)
        try:
            with named_os_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
                self._refresh()
        except OSError as error:
            fix = "Name another folder with loader.decoded_folder."
            raise StorageError(f"cannot be used ({error.strerror})", where=str(folder), fix=fix) from None

    def __reduce__(self) -> Any:
        return partial(DecodedCache, resize=self.resize, strict=self.strict), (self.folder, self.max_bytes)

    def __len__(self) -> int:
        """Entries that are there, those of other processes included."""
        self._refresh()
        there = self._sizes()
        return sum(self._segment(_PLACE.unpack(place)[0]).name in there for place in self._places.values())

    @property
    def num_bytes(self) -> int:
        """What lies in the folder."""
        return sum(self._sizes().values())

    def audio(self, source: Source, *, where: str, limits: Limits = DEFAULT_LIMITS) -> Audio:
        """As `media.load_audio`."""

        def decode() -> Arrays:
            return {"samples": load_audio(source, where=where, limits=limits).samples}

        return Audio(self._once(source, {"audio": asdict(limits)}, decode)["samples"])

    def video(
        self,
        source: Source,
        num_frames: int,
        *,
        where: str,
        limits: Limits = DEFAULT_LIMITS,
        frames: Frames = "exact",
        fps: float | None = None,
    ) -> Video:
        """As `media.load_video`, its frames made smaller by `resize`."""
        resize = self.resize

        def decode() -> Arrays:
            clip = load_video(source, num_frames, where=where, limits=limits, frames=frames, fps=fps)
            shown = clip.frames if resize is None else resize(clip.frames)
            return {"frames": shown, "times": clip.timestamps_seconds, "seconds": np.array([clip.duration_seconds])}

        asked = {"video": asdict(limits), "num_frames": num_frames, "frames": frames, "fps": fps}
        found = self._once(source, asked | {"resize": None if resize is None else resize.key}, decode)
        return Video(found["frames"], found["times"], float(found["seconds"][0]))

    def _once(self, source: Source, asked: dict[str, Any], decode: Callable[[], Arrays]) -> Arrays:
        identity = identity_of(source)
        if identity is None:
            return decode()
        key = bytes.fromhex(json_sha256([decoders(), identity, asked]))
        found: Arrays | None = None
        with self._guarded():
            found = self._get(key)
        if found is not None:
            return found
        made = decode()
        if time.monotonic() >= self._resting_until and identity_of(source) == identity:
            with self._guarded():
                self._put(key, made)
        return made

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Time with the cache is no work on a sample, and what the disk refuses is no fault of one."""
        try:
            with CLOCK.waiting(), named_os_errors(self.folder):
                yield
        except (OSError, StorageError) as error:
            if self.strict:
                raise
            self._resting_until = time.monotonic() + _REST_SECONDS
            reason = error.what if isinstance(error, HbaError) else error.strerror or str(error)
            told = "Decoded media can no longer be kept in %s (%s): the others are decoded each time."
            self._say(_FULL if isinstance(error, CacheFullError) else _REFUSED, told, reason)

    def _say(self, number: int, text: str, *values: str) -> None:
        if not self._said[number]:
            self._said[number] = 1
            if os.environ.get("LOCAL_RANK", "0") == "0":  # of the ranks of a machine one speaks
                _log.warning(text, self.folder, *values)

    # --- files --------------------------------------------------------------------------------------------------------

    def _segment(self, number: int) -> Path:
        return self.folder / f"segment-{number}"

    def _sizes(self) -> dict[str, int]:
        """Bytes of the files of the cache, by name."""
        with os.scandir(self.folder) as files:
            return {file.name: file.stat().st_size for file in files if _OWN.fullmatch(file.name)}

    def _refresh(self) -> None:
        """Read the records that were appended since the last time; all of them where the index is another one."""
        try:
            with (self.folder / "index").open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if size < self._read_bytes:
                    self._places, self._read_bytes = {}, 0
                file.seek(self._read_bytes)
                fresh = file.read()
        except FileNotFoundError:
            self._places, self._read_bytes = {}, 0
            return
        for at in range(0, len(fresh) - _RECORD_BYTES + 1, _RECORD_BYTES):
            raw = fresh[at : at + _RECORD_BYTES]
            if zlib.crc32(raw[:-4]).to_bytes(4, "little") == raw[-4:]:
                self._places[raw[:_KEY_BYTES]] = raw[_KEY_BYTES:-4]
                self._last_segment = max(self._last_segment, _PLACE.unpack(raw[_KEY_BYTES:-4])[0])
        self._read_bytes += len(fresh) - len(fresh) % _RECORD_BYTES

    def _get(self, key: bytes) -> Arrays | None:
        """What is kept under a key, None where nothing whole is."""
        from safetensors.numpy import load

        for _ in range(2):  # what has gone, or is damaged, another process may have kept anew
            if key not in self._places:
                self._refresh()
            place = self._places.pop(key, None)
            if place is None:
                return None
            data = self._bytes(_Place(*_PLACE.unpack(place)))
            if data is not None:
                self._places[key] = place
                arrays: Arrays = load(data)
                return arrays
        return None

    def _bytes(self, place: _Place) -> bytes | None:
        path, now = self._segment(place.segment), time.monotonic()
        try:
            with path.open("rb", buffering=0) as file:
                data = os.pread(file.fileno(), place.size, place.offset)
        except FileNotFoundError:  # it has made room
            return None
        if now - self._touched.get(place.segment, -_TOUCH_SECONDS) >= _TOUCH_SECONDS:
            self._touched[place.segment] = now
            with suppress(OSError):  # a folder that may only be read
                os.utime(path)
        if len(data) == place.size and zlib.crc32(data) == place.checksum:
            return data
        self._say(_DAMAGED, "A decoded medium in %s differs from its checksum: such ones are decoded again.")
        return None

    def _put(self, key: bytes, arrays: Arrays) -> None:
        from safetensors.numpy import save

        data = save(arrays)
        with alone(self.folder / "lock"):
            self._refresh()
            if key in self._places:  # another process was faster
                return
            number = self._room_for(len(data) + _RECORD_BYTES)
            index = self.folder / "index"
            torn = index.stat().st_size % _RECORD_BYTES if index.exists() else 0
            if torn:  # by a process that was killed
                os.truncate(index, index.stat().st_size - torn)
            offset = _append(self._segment(number), data)
            record = key + _PLACE.pack(number, offset, len(data), zlib.crc32(data))
            _append(index, record + zlib.crc32(record).to_bytes(4, "little"))

    def _room_for(self, size: int) -> int:
        """The number of a segment that takes so many bytes more; idle ones make room. Raises CacheFullError."""
        sizes = self._sizes()
        held = sum(sizes.values())
        numbers = {int(name.removeprefix("segment-")): name for name in sizes if name.startswith("segment-")}
        if size <= self.max_bytes:
            idle = {number: (self.folder / name).stat().st_mtime for number, name in numbers.items()}
            for number in sorted(idle, key=lambda number: idle[number]):
                if held + size <= self.max_bytes or time.time() - idle[number] < IDLE_SECONDS:
                    break
                (self.folder / numbers[number]).unlink()
                held -= sizes[numbers[number]]
        if held + size > self.max_bytes:
            what = f"the cache of decoded media is full: it holds {held / 1e9:.3g} of {self.max_bytes / 1e9:.3g} GB"
            fix = "Raise loader.decoded_gigabytes, or remove the folder: all in it can be made again."
            raise CacheFullError(what, where=str(self.folder), fix=fix)
        last = max([self._last_segment, *numbers])
        full = sizes.get(f"segment-{last}", 0) + size > min(SEGMENT_BYTES, self.max_bytes // 8)
        return last + (full or not self._segment(last).exists())


def _append(path: Path, data: bytes) -> int:
    """Put `data` behind what a file holds; where that was. What the disk does not take whole is taken back."""
    with path.open("ab", buffering=0) as file:
        end = os.fstat(file.fileno()).st_size
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            with suppress(OSError):
                os.ftruncate(file.fileno(), end)
            raise
    return end


def identity_of(source: Source) -> list[Any] | None:
    """What tells whether a medium has changed: its bytes; or its place, with its checksums, or its size and time.

    Checksums of 32 bits alone would not tell 100,000 sounds of one length apart. None for a medium that is not there,
    or cannot be asked: its decoder says why.
    """
    if isinstance(source, bytes):
        return ["bytes", hashlib.sha256(source).hexdigest()]
    path, part = (source.path, [source.offset, source.size]) if isinstance(source, Slice) else (source, [])
    place = [os.path.realpath(path), *part]
    if isinstance(source, Slice) and source.checksums:
        return ["checksums", *place, hashlib.sha256(source.checksums).hexdigest()]
    try:
        status = path.stat()
    except OSError:
        return None
    return ["time", *place, status.st_size, status.st_mtime_ns]


@cache
def _said(folder: Path) -> mmap.mmap:
    """Which warnings about a folder were given, by this process or those that it forked: each is given once."""
    return mmap.mmap(-1, 3)


@cache
def decoders() -> str:
    """A hash of the code and of the libraries on which decoded frames and samples depend."""
    code = [file_sha256(str(module.__file__)) for module in (source, audio, video)]
    libraries = {name: list(version) for name, version in av.library_versions.items()}
    sound = (soundfile.__version__, soundfile.__libsndfile_version__, soxr.__version__, np.__version__)
    about = {"av": av.__version__, "ffmpeg": libraries, "sound": sound, "machine": platform.machine()}
    return json_sha256({"code": code, **about})
