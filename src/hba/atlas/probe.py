"""What is true of one medium (length, rate, size, shape, whether all of it decodes), and of all media of an atlas.

`probe` reads a medium in one pass and returns `Facts`, or raises the MediaError with which training would refuse it. By
default every frame and sample is decoded, so that a file that is cut off or corrupt anywhere is found; `quick` reads
headers alone, which finds what is missing, empty or of another kind, and no more. Nothing decoded is kept.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

import av
import msgspec
import numpy as np
import soundfile

from hba.atlas import media
from hba.atlas.rows import Field
from hba.atlas.scan import Catalogue, Embedded, MediumName, embedded_medium
from hba.atlas.source import (
    DEFAULT_LIMITS,
    RESTORE,
    Limits,
    Slice,
    Source,
    check_source,
    open_container,
    opened,
    readable,
    require_audible,
    sound_track,
)
from hba.atlas.video import Clip, Timeline, every_frame, open_clip, read_clip, timeline_of
from hba.errors import InputError, MachineError, MediaError
from hba.parallel import Died, each
from hba.storage import AppendLog, confined_path, patiently

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream


VISUAL_PARTS = ("pose", "face", "left_hand", "right_hand")
_GUESSED = ("MP3", "MPEG", "FLAC")  # libsndfile's names of formats whose length it takes from a header as it stands
_BARE = ("mp3", "aac", "ac3", "eac3", "amr", "loas")
_RESHAPE = "Extract the descriptor again."


class Facts(msgspec.Struct, kw_only=True, frozen=True, gc=False, omit_defaults=True):
    """What was found; None where it does not apply or was not looked at."""

    seconds: float | None = None
    sample_rate: int | None = None
    channels: int | None = None
    frames: int | None = None
    frames_per_second: float | None = None
    width: int | None = None
    height: int | None = None
    shapes: dict[str, list[int]] | None = None
    """of a descriptor: shape by name of the tensor, '' for a bare one"""
    blank: bool = False
    """silence from end to end, or frames of one colour throughout"""
    sha256: str | None = None


def probe(
    source: Source, field: Field, *, where: str, quick: bool, hashed: bool, limits: Limits = DEFAULT_LIMITS
) -> Facts:
    """The facts of a medium of a row's `field`; `hashed` adds the SHA-256 of its bytes.

    Raises MediaError naming `where` when the medium is missing, empty, cut off, corrupt, of another kind or shape, or
    exceeds `limits`.
    """
    check_source(source, where=where, limits=limits)
    if field == "audios":
        facts = _audio(source, where, quick, limits)
    elif field == "videos":
        facts = _video(source, where, quick, limits)
    elif field == "images":
        facts = _image(source, where, limits)
    else:
        facts = Facts() if quick else _descriptor(source, field, where, limits)
    return msgspec.structs.replace(facts, sha256=content_sha256(source, where=where)) if hashed else facts


def content_sha256(source: Source, *, where: str) -> str:
    """Hex SHA-256 of the bytes of a source. Raises MediaError when they cannot be read."""
    with readable(source, where=where) as file:
        return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()


def _audio(source: Source, where: str, quick: bool, limits: Limits) -> Facts:
    header = _sound_header(source, where, limits)
    if quick:
        return header
    audio = media.load_audio(source, where=where, limits=limits)
    require_audible(audio.seconds, where)
    return msgspec.structs.replace(header, seconds=round(audio.seconds, 3), blank=not audio.samples.any())


def _sound_header(source: Source, where: str, limits: Limits) -> Facts:
    try:
        with opened(source, where=where) as raw, soundfile.SoundFile(raw) as file:
            if file.format not in _GUESSED:
                seconds = file.frames / file.samplerate if 0 < file.frames < 1 << 60 and file.samplerate else None
                return Facts(seconds=_rounded(seconds), sample_rate=file.samplerate, channels=file.channels)
    except soundfile.SoundFileError:
        pass  # a track of a container, or nothing that is known: the container says which
    with open_container(source, where=where, limits=limits) as container:
        stream = sound_track(container, where)
        seconds = container.duration / av.time_base if container.duration else None
        if container.format.name in _BARE and stream.time_base:
            # Without a header, FFmpeg guesses from the bit rate of the first frames.
            ticks = sum(packet.duration or 0 for packet in container.demux(stream))
            seconds = float(ticks * stream.time_base)
        codec = stream.codec_context
        return Facts(seconds=_rounded(seconds), sample_rate=codec.sample_rate, channels=codec.channels)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def _image(source: Source, where: str, limits: Limits) -> Facts:
    image_HWC = media.load_image(source, where=where, limits=limits)
    height, width, _ = image_HWC.shape
    return Facts(width=width, height=height, blank=bool((image_HWC == image_HWC[0, 0]).all()))


def _video(source: Source, where: str, quick: bool, limits: Limits) -> Facts:
    with open_clip(source, where=where, limits=limits) as clip:
        header = _video_header(clip.container, clip.stream)
        if quick:
            if header.seconds is not None and header.seconds > limits.max_video_seconds:
                what = f"lasts {header.seconds:,.0f} s, more than the limit of {limits.max_video_seconds:,.0f} s"
                raise MediaError(what, where=where, fix="Cut it into parts, or raise Limits.max_video_seconds.")
            return header
        timeline = timeline_of(clip, whole=True)
    decoded = partial(_decoded, header=header)
    return read_clip(source, decoded, where=where, limits=limits, timeline=timeline)[0]


def _video_header(container: InputContainer, stream: VideoStream) -> Facts:
    seconds = container.duration / av.time_base if container.duration else None
    if stream.duration and stream.time_base:
        seconds = float(stream.duration * stream.time_base)
    rate = stream.average_rate or stream.guessed_rate
    return Facts(
        seconds=_rounded(seconds),
        frames=stream.frames or None,
        frames_per_second=round(float(rate), 3) if rate else None,
        width=stream.codec_context.width,
        height=stream.codec_context.height,
    )


def _decoded(clip: Clip, timeline: Timeline, header: Facts) -> Facts:
    """The facts after a decode of every frame. Raises MediaError at the first one that is missing or damaged."""
    frames, blank = 0, True
    for timed in every_frame(clip, timeline):
        frame = timed.frame
        if (frame.width, frame.height) != (header.width, header.height):
            what = f"changes its resolution at frame {frames:,}: {frame.width}x{frame.height}"
            raise MediaError(what, where=clip.where, fix="Re-encode the clip at one resolution.")
        blank = blank and _is_blank(frame)
        frames += 1
    if frames == 0:
        raise MediaError("holds no frames", where=clip.where, fix=RESTORE)
    return msgspec.structs.replace(header, frames=frames, seconds=_rounded(timeline.seconds), blank=blank)


def _is_blank(frame: VideoFrame) -> bool:
    """Whether the first plane (brightness in almost all clips) is the same everywhere."""
    plane = frame.planes[0]
    lines = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)[:, : plane.width]
    return bool(lines.min() == lines.max())


def _descriptor(source: Source, field: Field, where: str, limits: Limits) -> Facts:
    value = media.load_descriptor(source, where=where, limits=limits)
    tensors = value if isinstance(value, dict) else {"": value}
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    check = _check_heard if field == "ext_audio_feats" else _check_seen
    check(shapes, where)
    return Facts(shapes=shapes)


def _check_heard(shapes: dict[str, list[int]], where: str) -> None:
    """Raise MediaError unless the descriptor is [D] or [T, D], bare or named 'features'."""
    shape = shapes.get("", shapes.get("features"))
    if shape is None:
        what = f"expected a tensor or 'features', found {', '.join(map(repr, shapes))}"
        raise MediaError(what, where=where, fix="Save the features as a tensor, or as {'features': tensor}.")
    if len(shape) not in (1, 2):
        raise MediaError(f"expected the shape [D] or [T, D], found {shape}", where=where, fix=_RESHAPE)


def _check_seen(shapes: dict[str, list[int]], where: str) -> None:
    """Raise MediaError unless named parts are [frames, points, 3] for one number of frames; bare ones have frames."""
    for name, shape in shapes.items():
        landmarks = name in VISUAL_PARTS
        if (landmarks and (len(shape) != 3 or shape[2] != 3)) or len(shape) < 2:
            expected = "[frames, points, 3]" if landmarks else "[frames, ...]"
            label = f"{name!r}: " if name else ""
            raise MediaError(f"{label}expected the shape {expected}, found {shape}", where=where, fix=_RESHAPE)
    lengths = {shape[0] for shape in shapes.values()}
    if len(lengths) > 1:
        found = ", ".join(f"{name!r} {shape[0]}" for name, shape in shapes.items())
        raise MediaError(f"parts differ in their number of frames: {found}", where=where, fix=_RESHAPE)


# Many media in parallel, each once, remembered: a survey that is killed goes on where it was.
#
# What is found of a good file is one line of an append-only log, keyed by path, size and modification time; a file that
# has changed since is probed again, and so is one that was refused, since it may have been restored. A file that
# crashes or stalls its decoder is refused like a broken one. No link is followed out of the atlas.


VERSION = 1  # of the facts: raise it whenever the same file gives others
LEAST_SECONDS = 120.0  # before a file counts as stalled; long clips get more
BYTES_PER_SECOND = 200_000  # slower than any decoder that is still at work
UNKNOWN, LARGE_BYTES = -1, 256 << 20


class Refused(msgspec.Struct, frozen=True, gc=False):
    """Why a medium has no facts; `code` is one of `scan.CODES`."""

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


class _Record(msgspec.Struct, kw_only=True, gc=False, omit_defaults=True):
    """One line of the log."""

    key: str
    field: Field
    num_bytes: int
    mtime_ns: int
    version: int
    quick: bool = False
    facts: Facts

    def tells(self, medium: Medium, quick: bool) -> bool:
        """Whether it says of the medium as it is now what is asked for."""
        same = (self.num_bytes, self.mtime_ns, self.version) == (medium.num_bytes, medium.mtime_ns, VERSION)
        return same and self.quick <= quick and (self.facts.sha256 is not None or not medium.hashed)


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
            record = known.get((medium.key, medium.field))
            if record is not None and record.tells(medium, quick):
                found[medium.number] = record.facts
        todo = [medium for medium in media if medium.number not in found]
        if progress is not None:
            progress(len(found), len(media))
        for medium, result in _probed(todo, quick=quick, workers=workers):
            found[medium.number] = result
            if appended is not None and isinstance(result, Facts):
                about = {name: getattr(medium, name) for name in ("key", "field", "num_bytes", "mtime_ns")}
                record = _Record(**about, version=VERSION, quick=quick, facts=result)
                appended.append(msgspec.to_builtins(record))
            if progress is not None:
                progress(len(found), len(media))
    return found


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
