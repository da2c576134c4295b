"""Where a medium comes from, how large it may be, and the one way to open its container.

A source is a file or the bytes of one. Everything that a decoder trusts is checked here first: a source is a regular,
non-empty file within `Limits`, and a container is one of a few known formats, so that a playlist dressed up as a clip
never makes the decoder open other files or the network. Every refusal is a MediaError that names the place.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import av
import av.error

from hba.atlas.slices import Slice, Source, opened
from hba.errors import MediaError
from hba.storage import machine_fault, patiently

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream

_Track = TypeVar("_Track", "AudioStream", "VideoStream")


RESTORE = "Restore the file from its source, or remove the row."
# These carry no duration; the decoder guesses one from the bit rate.
_ESTIMATED = ("aac", "mp3")
_DEMUXERS = "mov,mp4,m4a,3gp,matroska,webm,avi,mpegts,mp3,aac,ogg,wav,flac"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one medium may cost at most; beyond it the medium is refused with a MediaError."""

    max_bytes: int = 2 << 30
    """bytes of the file as it is stored"""
    max_pixels: int = 36_000_000
    """pixels of one frame or image (8K video is 33 million)"""
    max_audio_seconds: float = 4 * 3600.0
    """length of one sound track; one hour at 16 kHz takes 230 MB"""
    max_video_seconds: float = 4 * 3600.0
    """length of one clip"""
    max_descriptor_bytes: int = 1 << 30
    """bytes of all tensors of one descriptor"""


DEFAULT_LIMITS = Limits()


def check_source(source: Source, *, where: str, limits: Limits) -> int:
    """Size of the source in bytes. Raises MediaError unless it is a non-empty regular file within the limits."""
    if isinstance(source, Slice):
        size = source.size
        if source.offset < 0 or size < 0 or source.offset + size > _file_size(source.path, where):
            what = f"lies beyond the end of {source.path.name}"
            raise MediaError(what, where=where, fix="Restore the shard, or index it again.")
    else:
        size = len(source) if isinstance(source, bytes) else _file_size(source, where)
    if size == 0:
        raise MediaError("is empty (0 bytes)", where=where, fix=RESTORE)
    if size > limits.max_bytes:
        fix = "Shorten or re-encode it, or raise Limits.max_bytes."
        raise MediaError(f"has {size:,} bytes, more than the limit of {limits.max_bytes:,}", where=where, fix=fix)
    return size


def _file_size(path: Path, where: str) -> int:
    try:
        status = patiently(path.stat, where)
    except OSError as error:
        raise MediaError(f"cannot be read ({error.strerror})", where=where, fix=RESTORE) from None
    if not stat.S_ISREG(status.st_mode):
        # A pipe or device would block a worker for ever.
        raise MediaError(f"{path.name} is not a regular file", where=where, fix=RESTORE)
    return status.st_size


def head(source: Source, size: int, *, where: str) -> bytes:
    """The first `size` bytes. Raises MediaError when they cannot be read."""
    if isinstance(source, bytes):
        return source[:size]
    try:
        with opened(source, where=where) as handle:
            return handle.read(size)
    except OSError as error:
        raise MediaError(f"cannot be read ({error.strerror})", where=where, fix=RESTORE) from None


def _check_matroska(source: Source, size: int, where: str) -> None:
    """Raise MediaError when parts of a Matroska or WebM file are longer than the file, or another file follows."""
    start = head(source, 4096, where=where)
    if start[:4] != b"\x1a\x45\xdf\xa3":
        return
    position, length = _vint(start, 4)
    position += length
    if start[position : position + 4] != b"\x18\x53\x80\x67":
        return  # something between header and segment: the decoder judges
    before = position + 4
    position, length = _vint(start, before)
    # All bits set: written to a pipe, of unknown length.
    unknown = length == (1 << (7 * (position - before))) - 1
    end = size if unknown else position + length
    if end > size:
        what = f"is cut off: its header declares {end:,} bytes, {size:,} are there"
        raise MediaError(what, where=where, fix=RESTORE)
    with opened(source, where=where) as file:
        file.seek(end)
        if file.read(4) == start[:4]:
            raise MediaError("holds several files joined together", where=where, fix="Cut it into its parts.")
        while position < end:  # clusters and other parts, a few seconds of media each
            file.seek(position)
            part = file.read(12)
            width, _ = _vint(part, 0)
            body, length = _vint(part, width)
            if length == (1 << (7 * (body - width))) - 1:
                return  # a part of unknown length ends where the next begins, which only a decoder finds
            position += body + length
            if position > end:
                what = f"is cut off or corrupt: a part ends at byte {position:,} of {end:,}"
                raise MediaError(what, where=where, fix=RESTORE)


def _vint(data: bytes, at: int) -> tuple[int, int]:
    """EBML: where a variable-length number ends, and its value."""
    first = data[at] if at < len(data) else 0
    width = 9 - first.bit_length()
    value = int.from_bytes(data[at : at + width], "big") & ((1 << (7 * width)) - 1)
    return at + width, value


@contextmanager
def open_container(source: Source, *, where: str, limits: Limits = DEFAULT_LIMITS) -> Iterator[InputContainer]:
    """The opened container; any decoder error inside becomes a MediaError, a want of memory a MachineError."""
    _check_matroska(source, check_source(source, where=where, limits=limits), where)
    options = {"format_whitelist": _DEMUXERS, "protocol_whitelist": "file"}
    try:
        with (
            opened(source, where=where) as file,
            av.open(file, "r", options=options, metadata_errors="replace") as container,
        ):
            yield container
    except (av.error.FFmpegError, EOFError, OSError, MemoryError) as error:
        fault = machine_fault(error, where) if isinstance(error, MemoryError) else None
        if fault is not None:
            raise fault from None
        reason = getattr(error, "strerror", None) or str(error)
        raise MediaError(f"cannot be decoded ({reason}): cut off or corrupt", where=where, fix=RESTORE) from None


def video_track(container: InputContainer, where: str) -> VideoStream:
    """The first video track. Raises MediaError when there is none, or none that can be decoded."""
    if not container.streams.video:
        raise MediaError("has no video track", where=where, fix="Remove the entry, or restore the file.")
    return _decodable(container.streams.video[0], where)


def sound_track(container: InputContainer, where: str) -> AudioStream:
    """The first sound track. Raises MediaError when there is none, or none that can be decoded."""
    if not container.streams.audio:
        raise MediaError("has no sound track", where=where, fix="Remove the entry, or restore the file.")
    return _decodable(container.streams.audio[0], where)


def _decodable(stream: _Track, where: str) -> _Track:
    if stream.codec_context is None:
        kind = "video" if stream.type == "video" else "sound"
        raise MediaError(f"has a {kind} track of an unknown codec", where=where, fix=RESTORE)
    return stream


def packet_end(packet: Packet[Any]) -> float:
    """Presentation time in seconds at which a packet ends; -inf for a packet without a time."""
    if packet.pts is None:
        return float("-inf")
    base = packet.time_base  # not multiplied as a fraction, which takes longer than to read the packet
    return (packet.pts + (packet.duration or 0)) * base.numerator / base.denominator


def check_reaches_end(container: InputContainer, end_seconds: float, where: str) -> None:
    """Raise MediaError when the last packet ends well before the end that the header declares, or far beyond it."""
    if container.duration is None or container.format.name in _ESTIMATED:
        return
    declared = ((container.start_time or 0) + container.duration) / av.time_base
    # Headers round; half a second or two per cent is what honest muxers are off by.
    if end_seconds < declared - max(0.5, 0.02 * declared):
        found = max(end_seconds, 0.0)
        what = f"is cut off: holds {found:.1f} s of the {declared:.1f} s that its header declares"
        raise MediaError(what, where=where, fix=RESTORE)
    if end_seconds > 2 * declared + 60:
        what = f"has a corrupt header: declares {declared:.1f} s, holds {end_seconds:,.1f} s"
        raise MediaError(what, where=where, fix=RESTORE)
