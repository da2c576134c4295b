"""The bytes of a medium: where they come from, how large they may be, whether they are whole; opening a container.

A source is a file or the bytes of one. Everything that a decoder trusts is checked here first: a source is a regular,
non-empty file within `Limits`; no part of it that its header promises lies beyond its end; and its container and codecs
are known ones, so that a playlist dressed up as a clip never makes the decoder open other files or the network. A
number that a writer could not know (a pipe, a recorder that was switched off) is none. Refusals are MediaErrors that
name the place.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple, TypeAlias, TypeVar, cast

from hba.errors import MachineError, MediaError, NoSoundTrackError
from hba.storage import machine_fault, patiently

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream


# The bytes of a medium: a file, a part of a larger file, or bytes at hand; read as a decoder asks, and checked.
#
# A medium that is embedded in a shard has no checksum that the file system would know of, so its slice carries one for
# every 128 KiB. What is read is checked, what is not read costs nothing: eight frames of a long clip do not read all of
# it. A changed bit is a MediaError that names the place, never another frame or another word. Storage that is away is
# waited for, and then a MachineError (see `storage.patiently`): no fault of the medium.


CHECKED_BYTES = 1 << 17
"""bytes of a medium that share a checksum: what a decoder reads at once, so that it checks what it reads and no more"""


class Slice(NamedTuple):
    """`size` bytes of the file `path` from byte `offset` on, read when needed: a medium embedded in a larger file.

    `checksums`: the CRC-32 of every CHECKED_BYTES of it, four bytes each, little-endian; empty where there are none.
    """

    path: Path
    offset: int
    size: int
    checksums: bytes = b""


PLACES = ("offsets", "sizes", "checksums")
"""what the index part of a shard tells of the media of a field, as columns of lists: `{field}_offsets`, ..."""

Source: TypeAlias = Path | bytes | Slice
Frames: TypeAlias = Literal["exact", "nearest_keyframe"]
"""which frame stands for a time: the one on screen, or the keyframe nearest to it, which is faster"""


class SizedFile(io.RawIOBase):
    """A read-only file of `size` bytes, of which a subclass gets what is asked for; `file` is closed with it."""

    def __init__(self, size: int, file: BinaryIO | io.RawIOBase) -> None:
        self._size, self._file, self._at = size, file, 0

    def get(self, wanted: int) -> bytes | memoryview:
        """At most `wanted` bytes from the present position `_at` on."""
        raise NotImplementedError

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, "seek before the start")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self.get(max(min(len(buffer), self._size - self._at), 0))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


class _SliceFile(SizedFile):
    """A read-only file over a slice; only what a decoder asks for is read, in whole blocks where they are checked.

    A block that differs from its checksum, or that cannot be had, ends the file and sets `damaged` or `fault`: an
    exception would be lost in a decoder, which would serve the beginning as the whole.
    """

    def __init__(self, part: Slice, where: str) -> None:
        super().__init__(part.size, patiently(lambda: part.path.open("rb", buffering=0), where))
        self._part, self._where = part, where
        self._block, self._number = memoryview(b""), -1
        self.damaged: int | None = None
        """the first byte of the medium that may be wrong"""
        self.fault: MachineError | None = None

    def get(self, wanted: int) -> bytes | memoryview:
        checked = bool(self._part.checksums) and wanted > 0
        return self._checked()[:wanted] if checked else self._read(wanted, self._at)

    def _checked(self) -> memoryview:
        """What follows in the block of the present position; nothing when it differs from its checksum."""
        number, within = divmod(self._at, CHECKED_BYTES)
        if number != self._number:
            start = number * CHECKED_BYTES
            size = min(CHECKED_BYTES, self._part.size - start)
            block = self._read(size, start)
            if self.fault is None and not _is_sound(block, number, self._part.checksums):
                self.damaged = start if self.damaged is None else self.damaged
                return memoryview(b"")
            self._block, self._number = memoryview(block), number
        return self._block[within:]

    def _read(self, size: int, start: int) -> bytes:
        if self.fault is None:
            try:
                return patiently(partial(os.pread, self._file.fileno(), size, self._part.offset + start), self._where)
            except MachineError as fault:
                self.fault = fault
        return b""


def checksums_of(medium: bytes | memoryview) -> bytes:
    """The checksums of a medium, as a Slice carries them."""
    blocks = (medium[at : at + CHECKED_BYTES] for at in range(0, len(medium), CHECKED_BYTES))
    return b"".join(zlib.crc32(block).to_bytes(4, "little") for block in blocks)


def _is_sound(block: bytes, number: int, checksums: bytes) -> bool:
    return zlib.crc32(block).to_bytes(4, "little") == checksums[4 * number : 4 * number + 4]


def _flipped(at: int, where: str) -> MediaError:
    what = f"differs from its checksum after byte {at:,}: it was changed on the disk"
    return MediaError(what, where=where, fix="Restore the shard from its source, or convert again.")


@contextmanager
def opened(source: Source, *, where: str) -> Iterator[BinaryIO]:
    """What the decoders read: a binary file without a name, since they would go by the suffix of one.

    Raises OSError when it cannot be opened, and in the end, whatever became of it, MachineError when a part of it could
    not be had, MediaError when something that was read differs from its checksum; both name `where`.
    """
    if isinstance(source, bytes):
        yield io.BytesIO(source)
        return
    part = source if isinstance(source, Slice) else Slice(source, 0, patiently(source.stat, where).st_size)
    with _SliceFile(part, where) as raw:
        try:
            yield cast(BinaryIO, io.BufferedReader(raw, 1 << 16))
        finally:
            if raw.fault is not None:
                raise raw.fault from None
            if raw.damaged is not None:
                raise _flipped(raw.damaged, where) from None


def _part(part: Slice) -> bytes:
    with part.path.open("rb", buffering=0) as file:
        return os.pread(file.fileno(), part.size, part.offset)


def read_bytes(source: Source, *, where: str = "") -> bytes:
    """All bytes of a source.

    Raises OSError when its file cannot be read, MachineError when its storage is away, MediaError when a checksum
    differs.
    """
    if isinstance(source, bytes):
        return source
    if isinstance(source, Path):
        return patiently(source.read_bytes, where or str(source))
    data = patiently(partial(_part, source), where or str(source.path))
    if source.checksums and checksums_of(memoryview(data)) != source.checksums:
        starts = range(0, source.size, CHECKED_BYTES)
        blocks = ((at, data[at : at + CHECKED_BYTES], number) for number, at in enumerate(starts))
        bad = next(at for at, block, number in blocks if not _is_sound(block, number, source.checksums))
        raise _flipped(bad, where)
    return data


# --- sources and their limits -----------------------------------------------------------------------------------------


_Track = TypeVar("_Track", "AudioStream", "VideoStream")


SHORTEST_AUDIO_SECONDS = 0.03
"""of a shorter sound models make no token: it would be asked about and not be there"""
RESTORE = "Restore the file from its source, or remove the row."
CONVERT = "Convert it, for example with: ffmpeg -i FILE OUT.mp4 (docs/data.md lists the formats that are read)."
DEMUXERS = (
    *("mov", "mp4", "m4a", "3gp", "matroska", "webm", "avi", "flv", "asf", "mpeg", "mpegts", "ogg", "mxf", "rm", "dv"),
    *("wav", "w64", "aiff", "au", "caf", "flac", "mp3", "aac", "loas", "ac3", "eac3", "amr", "wv", "tta"),
    *("voc", "nistsphere", "gif", "apng", "ivf"),
)
"""containers that are opened: none names other files, and in almost all it shows that they were cut off"""
_VIDEO_CODECS = (
    *("h264", "hevc", "av1", "libdav1d", "vp8", "vp9", "vp6", "vp6f", "theora", "mpeg1video", "mpeg2video", "mpeg4"),
    *("msmpeg4v1", "msmpeg4v2", "msmpeg4", "wmv1", "wmv2", "wmv3", "vc1", "h263", "h263p", "flv", "flashsv", "rv10"),
    *("rv20", "rv30", "rv40", "svq1", "svq3", "cinepak", "indeo3", "indeo4", "indeo5", "msvideo1", "msrle", "rpza"),
    *("qtrle", "smc", "zmbv", "camtasia", "mjpeg", "mjpegb", "prores", "dnxhd", "dvvideo", "cfhd", "ffv1", "huffyuv"),
    *("ffvhuff", "utvideo", "rawvideo", "v210", "png", "apng", "gif"),
)
_SOUND_CODECS = (
    *("aac", "aac_latm", "mp1float", "mp2float", "mp3float", "mp1", "mp2", "mp3", "ac3", "eac3", "dca", "flac", "alac"),
    *("vorbis", "opus", "libopus", "speex", "wmav1", "wmav2", "wmapro", "wmalossless", "wmavoice", "amrnb", "amrwb"),
    *("libopencore_amrnb", "libopencore_amrwb", "cook", "sipr", "real_144", "real_288", "nellymoser", "wavpack", "tta"),
    *("shorten", "gsm", "gsm_ms", "g722", "g726", "g726le", "qdm2", "qdmc", "dvaudio", "s302m"),
    *("adpcm_ima_wav", "adpcm_ima_qt", "adpcm_ms", "adpcm_swf", "adpcm_yamaha", "adpcm_sbpro_2", "adpcm_sbpro_3"),
    *("adpcm_sbpro_4", "pcm_alaw", "pcm_mulaw", "pcm_s8", "pcm_u8", "pcm_s16le", "pcm_s16be", "pcm_s24le", "pcm_s24be"),
    *("pcm_s32le", "pcm_s32be", "pcm_u16le", "pcm_u16be", "pcm_u24le", "pcm_u24be", "pcm_u32le", "pcm_u32be"),
    *("pcm_f32le", "pcm_f32be", "pcm_f64le", "pcm_f64be", "pcm_dvd", "pcm_bluray", "pcm_s16le_planar"),
)
CODECS = frozenset(_VIDEO_CODECS + _SOUND_CODECS)
"""decoders that are run, by FFmpeg's names"""

# The header of these tells how long they last and nothing of their structure shows whether they are whole.
_DECLARING = frozenset({"ogg", "rm", "mxf"})
# The header of these may be corrupt while all is there.
_DECLARED = ("mov", "matroska")
_UNKNOWN_SIZE = 0x7FFF0000
"""a size from here on is that of a writer to a pipe, who cannot know it (0x7ffff000, 0x80000000, 0xffffffff)"""


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


def require_audible(seconds: float, where: str) -> None:
    """Raise MediaError for a sound that is shorter than SHORTEST_AUDIO_SECONDS."""
    if seconds < SHORTEST_AUDIO_SECONDS:
        least = f"{1000 * SHORTEST_AUDIO_SECONDS:g} ms, from which on there is a token of sound"
        raise MediaError(f"lasts {1000 * seconds:.1f} ms, less than the {least}", where=where, fix=RESTORE)


def head(source: Source, size: int, *, where: str) -> bytes:
    """The first `size` bytes. Raises MediaError when they cannot be read."""
    if isinstance(source, bytes):
        return source[:size]
    with readable(source, where=where) as handle:
        return handle.read(size)


@contextmanager
def readable(source: Source, *, where: str) -> Iterator[BinaryIO]:
    """The opened source; a MediaError where it cannot be opened or read."""
    try:
        with opened(source, where=where) as file:
            yield file
    except OSError as error:
        raise MediaError(f"cannot be read ({error.strerror})", where=where, fix=RESTORE) from None


# --- whether a file is whole ------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """A part of a container: its name, and where its content begins and ends as its header has it."""

    name: bytes
    start: int
    end: int


_BOXES = (b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"free", b"skip", b"wide", b"pnot", b"sidx", b"mfra", b"uuid")
_W64 = b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00"
_ASF, _ASF_DATA = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c"), bytes.fromhex("3626b2758e66cf11a6d900aa0062ce6c")
_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_ASF_INDEX = bytes.fromhex("90080033b1e5cf1189f400a0c90349cb")
_EBML = b"\x1a\x45\xdf\xa3"
_JOINED = b"another file"
_MXF = b"\x06\x0e\x2b\x34"
_TS_PACKETS = ((188, 0), (192, 4), (204, 0))  # size, and where its sync byte lies
_BIT_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def check_whole(source: Source, size: int, *, where: str) -> None:
    """Raise MediaError when the parts of a file reach beyond its end, or when another file follows in it.

    What a header says of a size is taken for a promise unless the writer could not know it. Nothing is decoded, and of
    the parts only the headers are read.
    """
    with readable(source, where=where) as file:
        start = file.read(64)
        file.seek(0)
        if start.startswith(_EBML):
            _check_matroska(file, size, where)
        elif start[4:8] in _BOXES:
            _check_boxes(file, size, where)
        elif start[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and start[8:12] == b"WAVE":
            _check_wave(file, start, size, where)
        elif start.startswith(_W64):
            whole = int.from_bytes(start[16:24], "little")
            _check_content(_chunks(file, size, 40, 16, "<Q", inclusive=True, align=8), b"data", whole, size, where)
        elif start.startswith(b"FORM") and start[8:11] == b"AIF":
            whole = 8 + int.from_bytes(start[4:8], "big")
            _check_content(_chunks(file, size, 12, 4, ">I", align=2), b"SSND", whole, size, where)
        elif start.startswith(b"caff"):
            _check_content(_chunks(file, size, 8, 4, ">Q"), b"data", 0, size, where)
        elif start.startswith(b".snd"):
            offset, length = struct.unpack_from(">II", start, 4)
            _check_content([_Part(b"data", offset, offset + length)], b"data", 0, size, where)
        elif start.startswith(b"NIST_1A"):
            _check_sphere(file, size, where)
        elif start.startswith(_ASF):
            _check_asf(file, size, where)
        elif start[:4] == b"RIFF" and start[8:12] == b"AVI ":
            # Many writers count the first eight bytes, too.
            parts = [part._replace(end=part.end - 8) for part in _chunks(file, size, 0, 4, "<I", align=2)]
            _check_content(parts, b"RIFF", 0, size, where)
        elif start.startswith(b"OggS"):
            _check_pages(file, size, where)
        else:
            walk = next((walk for sign, walk in _WALKS.items() if start.startswith(sign)), _transport_packets)
            for part in walk(file, size):
                if part.name == _JOINED:
                    raise _joined(where)
                if part.end > size:
                    raise _cut(part.end, size, where)


def _bytes(file: BinaryIO, at: int, count: int = -1) -> bytes:
    file.seek(at)
    return file.read(count)


def _joined(where: str) -> MediaError:
    return MediaError("holds several files joined together", where=where, fix="Cut it into its parts.")


def _cut(end: int, size: int, where: str) -> MediaError:
    what = f"is cut off: its header promises {end:,} bytes, {size:,} are there"
    return MediaError(what, where=where, fix=RESTORE)


def _chunks(
    file: BinaryIO, size: int, at: int, name_bytes: int, form: str, *, inclusive: bool = False, align: int = 1
) -> Iterator[_Part]:
    """The chunks of a RIFF-like file from byte `at` on: a name, a size (which may count the header), the content."""
    header_bytes = name_bytes + struct.calcsize(form)
    while at + header_bytes <= size:
        header = _bytes(file, at, header_bytes)
        (length,) = struct.unpack_from(form, header, name_bytes)
        start = at + header_bytes
        end = max(at + length, start) if inclusive else start + length
        yield _Part(header[:name_bytes], start, end)
        at = end + -end % align


def _check_content(parts: Sequence[_Part] | Iterator[_Part], name: bytes, whole: int, size: int, where: str) -> None:
    """Raise MediaError when the part `name` ends beyond the file, unless its size was unknown to the writer.

    `whole`: the end of the file as an outer header has it. Where that is right, the size of the part is a slip.
    """
    for part in parts:
        if part.name[: len(name)] == name:
            known = part.start < part.end < part.start + _UNKNOWN_SIZE
            if known and part.end > size and abs(whole - size) > 8:
                raise _cut(part.end, size, where)
            if not known:
                return


def _check_wave(file: BinaryIO, start: bytes, size: int, where: str) -> None:
    order = ">" if start[:4] == b"RIFX" else "<"
    riff_end = 8 + struct.unpack_from(f"{order}I", start, 4)[0]
    data = 0
    for part in _chunks(file, size, 12, 4, f"{order}I", align=2):
        if part.name == b"ds64":
            riff_size, data_size = struct.unpack("<QQ", _bytes(file, part.start, 16))
            if 0 < data_size < _UNKNOWN_SIZE:
                _check_content([_Part(b"data", size, size + max(0, 8 + riff_size - size))], b"data", 0, size, where)
            return
        if part.name == b"data":
            data += 1
            _check_content([part], b"data", riff_end, size, where)
            if part.end == part.start and _is_all_chunks(file, size, part.start, f"{order}I"):
                raise MediaError("holds no sound (0 samples)", where=where, fix=RESTORE)
            if not part.start < part.end < part.start + _UNKNOWN_SIZE:
                return
    if data > 1:
        raise MediaError("holds its sound in several parts", where=where, fix=CONVERT)
    if riff_end < size - 12:
        behind = _bytes(file, riff_end + riff_end % 2, 12)
        if behind[:4] == start[:4] and behind[8:] == b"WAVE":
            raise _joined(where)


def _is_all_chunks(file: BinaryIO, size: int, at: int, form: str) -> bool:
    """Whether what follows byte `at` is other chunks, not sound whose size was never written."""
    parts = list(_chunks(file, size, at, 4, form, align=2))
    named = all(part.name.isascii() and part.name.strip().isalnum() for part in parts)
    return bool(parts) and named and parts[-1].end >= size


def _check_boxes(file: BinaryIO, size: int, where: str) -> None:
    """mp4 and mov: the boxes of the file."""
    at, names = 0, []
    while at + 8 <= size:
        header = _bytes(file, at, 16)
        length, name = struct.unpack_from(">I4s", header)
        if name not in _BOXES:
            return  # something behind the file: the decoder judges
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        if length == 0:
            return  # reaches to the end, wherever that is
        names.append(name)
        at += max(length, 8)
    if at > size and names:
        raise _cut(at, size, where)
    if names.count(b"moov") > 1 and b"moof" not in names:
        raise _joined(where)


def _check_matroska(file: BinaryIO, size: int, where: str) -> None:
    start = file.read(4096)
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
        raise _cut(end, size, where)
    if _bytes(file, end, 4) == _EBML:
        raise _joined(where)
    while position < end:  # clusters and other parts, a few seconds of media each
        part = _bytes(file, position, 12)
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


def _check_pages(file: BinaryIO, size: int, where: str, *, checked: bool = False) -> list[tuple[int, int]]:
    """Ogg: where each of its chained files begins and ends.

    Raises MediaError when the last page is not whole; with `checked`, also for one that is damaged or missing.
    """
    at, begins, before = 0, [0], True
    numbers: dict[bytes, int] = {}
    while True:
        page = _bytes(file, at, 27)
        if len(page) < 27 or page[:4] != b"OggS":
            break  # the end, or something behind the file
        sizes = file.read(page[26])
        end = at + 27 + page[26] + sum(sizes)
        if end > size:
            raise _cut(end, size, where)
        first = bool(page[5] & 2)
        if first and not before:
            begins.append(at)
        before = first
        if checked:
            number = int.from_bytes(page[18:22], "little")
            expected = numbers.get(page[14:18], number - 1) + 1
            body = page[:22] + bytes(4) + page[26:] + sizes + file.read(sum(sizes))
            if page[22:26] != _page_checksum(body) or (number != expected and not first):
                raise MediaError(f"is corrupt at byte {at:,}", where=where, fix=RESTORE)
            numbers[page[14:18]] = number
        at = end
    if 0 < len(page) < 27 and page[:4] == b"OggS"[: len(page)]:
        raise _cut(at + 27, size, where)
    return list(pairwise([*begins, at]))


def _page_checksum(page: bytes) -> bytes:
    """CRC-32 of an Ogg page, which is zlib's with the bits of every byte, and of the result, in the other order."""
    crc = zlib.crc32(page.translate(_BIT_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return crc.to_bytes(4, "big").translate(_BIT_REVERSED)


def ogg_files(source: Source, size: int, *, where: str) -> list[tuple[int, int]]:
    """Where each of the files that are chained in an Ogg file begins and ends; other bytes may follow.

    Raises MediaError when a page is cut off, damaged or missing, which demuxers pass over.
    """
    with readable(source, where=where) as file:
        return _check_pages(file, size, where, checked=True)


def _check_sphere(file: BinaryIO, size: int, where: str) -> None:
    """NIST SPHERE: its header is text. What is compressed is left to the decoder."""
    lines = file.read(1024).decode("ascii", "replace").split("\n")
    told = {line.split(" ")[0]: line.split(" ")[-1] for line in lines if line.count(" ") >= 2}
    numbers = [lines[1].strip(), told.get("sample_count", ""), told.get("sample_n_bytes", "")]
    numbers.append(told.get("channel_count", "1"))
    if all(number.isdigit() for number in numbers) and "," not in told.get("sample_coding", ""):
        header_bytes, samples, sample_bytes, channels = map(int, numbers)
        if (end := header_bytes + samples * sample_bytes * channels) > size:
            raise _cut(end, size, where)


def _check_asf(file: BinaryIO, size: int, where: str) -> None:
    """ASF (wmv, wma): its data are packets of one size."""
    start = file.read(8192)
    for part in _chunks(file, size, 0, 16, "<Q", inclusive=True):
        if part.name == _ASF_DATA:
            if part.end > size:
                raise _cut(part.end, size, where)
            at = start.find(_ASF_PROPERTIES)
            (packet_bytes,) = struct.unpack_from("<I", start, at + 92) if 0 <= at <= len(start) - 96 else (0,)
            rest = (size - part.start - 26) % packet_bytes if packet_bytes else 0
            indexed = _ASF_INDEX in _bytes(file, max(part.start, size - (1 << 16)))
            if part.end <= part.start + 26 and rest and not indexed:  # written to a pipe
                raise _cut(size + packet_bytes - rest, size, where)
            return


def _flv_tags(file: BinaryIO, size: int) -> Iterator[_Part]:
    at = int.from_bytes(_bytes(file, 5, 4), "big") + 4
    while at < size:
        header = _bytes(file, at, 11)
        if header[0] & 0x1F not in (8, 9, 18):
            if header[:4] == b"FLV\1":
                yield _Part(_JOINED, at, at)
            return  # something behind the file
        end = at + 11 + int.from_bytes(header[1:4], "big")
        yield _Part(header[:1], at, end)
        at = end + 4


def _program_packets(file: BinaryIO, size: int) -> Iterator[_Part]:
    """MPEG program streams (mpg, vob)."""
    at = 0
    while at < size:
        header = _bytes(file, at, 14)
        if header[:3] != b"\0\0\1"[: len(header)] or header[3:4] == b"\xb9":
            return  # the end, or something that only a decoder finds its way through
        if header[3:4] == b"\xba":
            mpeg2 = header[4:5] >= b"\x40"
            end = at + 14 + (header[13] & 7 if mpeg2 and len(header) > 13 else 0) if mpeg2 else at + 12
        else:
            length = int.from_bytes(header[4:6], "big")
            if length == 0 and len(header) > 5:
                return
            end = at + 6 + length
        yield _Part(header[3:4], at, end)
        at = end


def _ivf_frames(file: BinaryIO, size: int) -> Iterator[_Part]:
    at = int.from_bytes(_bytes(file, 6, 2), "little")
    while at < size:
        end = at + 12 + int.from_bytes(_bytes(file, at, 4), "little")
        yield _Part(b"", at, end)
        at = end


def _png_chunks(file: BinaryIO, size: int) -> Iterator[_Part]:
    at = 8
    while at < size:
        header = _bytes(file, at, 8)
        end = at + 12 + int.from_bytes(header[:4], "big")
        yield _Part(header[4:], at, end)
        if header[4:] == b"IEND":
            return
        at = end
    yield _Part(b"IEND", at, at + 12)


def _gif_blocks(file: BinaryIO, size: int) -> Iterator[_Part]:
    flags = _bytes(file, 10, 1)[0]
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    while at < size:
        header = _bytes(file, at, 10)
        if header[:1] == b"\x2c" and len(header) == 10:  # an image: colours, code size, data
            at += 11 + (3 << (header[9] & 7) + 1 if header[9] & 0x80 else 0)
        elif header[:1] == b"\x21":
            at += 2
        else:
            return  # the trailer, or something behind the file
        while at < size:  # sub-blocks, up to an empty one
            length = _bytes(file, at, 1)[0]
            at += 1 + length
            if length == 0:
                break
        else:
            at = size + 1
        yield _Part(header[:1], 0, at)


def _voc_blocks(file: BinaryIO, size: int) -> Iterator[_Part]:
    at = int.from_bytes(_bytes(file, 20, 2), "little")
    while at < size:
        header = _bytes(file, at, 4)
        if header[:1] == b"\0":
            return
        end = at + 4 + int.from_bytes(header[1:4], "little")
        yield _Part(header[:1], at, end)
        at = end


def _mxf_parts(file: BinaryIO, size: int) -> Iterator[_Part]:
    """Key, length, value; the length in the form of ASN.1."""
    at = 0
    while at < size:
        header = _bytes(file, at, 25)
        if header[:4] != _MXF[: len(header)]:
            return
        length, width = (header[16], 0) if len(header) > 16 else (0, 0)
        if length & 0x80:
            width = length & 0x7F
            length = int.from_bytes(header[17 : 17 + width], "big")
        end = at + 17 + width + length
        yield _Part(header[:16], at, end)
        at = end


def _transport_packets(file: BinaryIO, size: int) -> Iterator[_Part]:
    """MPEG transport streams are made of packets of one size, DV of frames of one: the last of them."""
    for packet_bytes, sync in _TS_PACKETS:
        block = _bytes(file, 0, 3 * packet_bytes)
        if len(block) == 3 * packet_bytes and block[sync::packet_bytes] == b"GGG":
            yield _Part(b"", size - size % packet_bytes, size + -size % packet_bytes)
            return
    if block[:3] == b"\x1f\x07\0":
        yield _Part(b"", 0, size + -size % (144_000 if block[3] & 0x80 else 120_000))


_WALKS: Mapping[bytes, Callable[[BinaryIO, int], Iterator[_Part]]] = {
    b"FLV\1": _flv_tags,
    b"\0\0\1\xba": _program_packets,
    b"DKIF": _ivf_frames,
    b"\x89PNG": _png_chunks,
    b"GIF8": _gif_blocks,
    b"Creative Voice File": _voc_blocks,
    _MXF: _mxf_parts,
}


# --- its container ----------------------------------------------------------------------------------------------------


@contextmanager
def open_container(
    source: Source, *, where: str, limits: Limits = DEFAULT_LIMITS, form: str | None = None
) -> Iterator[InputContainer]:
    """The opened container of a file that is whole.

    Any decoder error inside becomes a MediaError, a want of memory a MachineError. `form`: its format, where the
    content has told already.
    """
    import av
    import av.error

    size = check_source(source, where=where, limits=limits)
    options = {"format_whitelist": ",".join(DEMUXERS), "protocol_whitelist": "file", "codec_whitelist": _WHITELIST}
    opening = True
    try:
        check_whole(source, size, where=where)
        with (
            opened(source, where=where) as file,
            av.open(file, "r", format=form, options=options, metadata_errors="replace") as container,
        ):
            opening = False
            yield container
    except (av.error.FFmpegError, EOFError, OSError, MemoryError) as error:
        fault = machine_fault(error, where) if isinstance(error, MemoryError) else None
        if fault is not None:
            raise fault from None
        if opening and isinstance(error, av.error.ArgumentError):  # what FFmpeg says to a format that it may not open
            raise MediaError("is in a format that is not read", where=where, fix=CONVERT) from None
        reason = getattr(error, "strerror", None) or str(error)
        raise MediaError(f"cannot be decoded ({reason}): cut off or corrupt", where=where, fix=RESTORE) from None


_WHITELIST = ",".join(sorted(CODECS))


def video_track(container: InputContainer, where: str) -> VideoStream:
    """The clip: the default video track, or the largest, the first of several. Cover pictures and thumbnails are none.

    Raises MediaError when there is no such track, or when it cannot be decoded.
    """
    from av.stream import Disposition

    none = (Disposition.attached_pic, Disposition.timed_thumbnails, Disposition.still_image)
    clips = [track for track in container.streams.video if not any(each in track.disposition for each in none)]
    if not clips:
        what = "has no video track but a cover picture" if container.streams.video else "has no video track"
        raise MediaError(what, where=where, fix="Remove the entry, or restore the file.")
    return _best(clips, lambda codec: codec.width * codec.height, where)


def sound_track(container: InputContainer, where: str) -> AudioStream:
    """The sound: the default track, or the one of most channels, the first of several.

    Raises NoSoundTrackError when there is none, MediaError when it cannot be decoded.
    """
    if not container.streams.audio:
        raise NoSoundTrackError("has no sound track", where=where, fix="Remove the entry, or restore the file.")
    return _best(container.streams.audio, lambda codec: codec.channels, where)


def _best(tracks: Sequence[_Track], size: Callable[[Any], int], where: str) -> _Track:
    from av.stream import Disposition

    def preference(track: _Track) -> tuple[bool, int]:
        codec = track.codec_context
        return Disposition.default in track.disposition, 0 if codec is None else size(codec)

    stream = max(tracks, key=preference)
    kind = "video" if stream.type == "video" else "sound"
    if stream.codec_context is None:
        raise MediaError(f"has a {kind} track of an unknown codec", where=where, fix=RESTORE)
    if stream.codec_context.codec.name not in CODECS:
        what = f"has a {kind} track of a codec that is not read ({stream.codec_context.codec.name})"
        raise MediaError(what, where=where, fix=CONVERT)
    return stream


def check_index(stream: VideoStream | AudioStream, size: int, where: str) -> None:
    """Raise MediaError when the container's table of samples (mp4, mov) reaches beyond the end of the file."""
    last_byte = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
    if last_byte > size:
        what = f"is cut off: its index reaches to byte {last_byte:,} of {size:,}"
        raise MediaError(what, where=where, fix=RESTORE)


def packet_end(packet: Packet[Any]) -> float:
    """Presentation time in seconds at which a packet ends; -inf for a packet without a time."""
    if packet.pts is None:
        return float("-inf")
    base = packet.time_base  # not multiplied as a fraction, which takes longer than to read the packet
    return (packet.pts + (packet.duration or 0)) * base.numerator / base.denominator


def is_judged_by_end(container: InputContainer) -> bool:
    """Whether `check_reaches_end` can refuse it."""
    return container.format.name in _DECLARING or container.format.name.startswith(_DECLARED)


def check_reaches_end(container: InputContainer, end_seconds: float, where: str) -> None:
    """Raise MediaError when the last packet ends far beyond the end that the header declares, or well before it.

    The second counts only where nothing but the header tells that something is missing (see `check_whole`).
    """
    import av

    if container.duration is None:
        return
    declared = max(container.start_time or 0, 0) / av.time_base + container.duration / av.time_base
    # Headers round; half a second or two per cent is what honest muxers are off by.
    if container.format.name in _DECLARING and end_seconds < declared - max(0.5, 0.02 * declared):
        found = max(end_seconds, 0.0)
        what = f"is cut off: holds {found:.1f} s of the {declared:.1f} s that its header declares"
        raise MediaError(what, where=where, fix=RESTORE)
    if container.format.name.startswith(_DECLARED) and end_seconds > 2 * declared + 60:
        what = f"has a corrupt header: declares {declared:.1f} s, holds {end_seconds:,.1f} s"
        raise MediaError(what, where=where, fix=RESTORE)
