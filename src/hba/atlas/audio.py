"""Sound to 16 kHz mono float32.

wav, aiff, au, ogg and mp3 whose header is right go through libsndfile, everything else through PyAV (FFmpeg), which is
also asked where libsndfile gives up; content decides, never the suffix. What was decoded to the end is what there is: a
length in a header is a hint. A sound is decoded block by block, so that memory is that of the result. It is served
whole or refused: a file that was cut off, or that a decoder had to patch, is a MediaError, never silence. What carries
no checksum and no length (a bare mp3 cut between two frames) cannot be told from a shorter one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import av
import av.error
import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from hba.atlas.source import (
    CONVERT,
    DEFAULT_LIMITS,
    RESTORE,
    Limits,
    Source,
    check_index,
    check_reaches_end,
    check_source,
    check_whole,
    is_judged_by_end,
    ogg_files,
    open_container,
    opened,
    packet_end,
    read_bytes,
    readable,
    sound_track,
)
from hba.errors import MediaError, NoSoundTrackError

if TYPE_CHECKING:
    from av.audio.frame import AudioFrame
    from av.audio.stream import AudioStream
    from av.container import InputContainer
    from av.packet import Packet

SAMPLE_RATE = 16_000
BLOCK_SECONDS = 20
Samples: TypeAlias = npt.NDArray[np.float32]

_LIBSNDFILE_MAGIC = (b"RIFF", b"RF64", b"RIFX", b"OggS", b"FORM", b"caff", b".snd", b"riff", b"NIST", b"Creative Voice")
_PATCHED = re.compile(r"lacks an end-of-stream|Junk after the last page|Corrupted bitstream|reports a hole|lost sync")
# Decoders of these check what they decode only if they are asked to.
_CHECKED = {"flac": {"err_detect": "crccheck+explode"}}
# The number of samples in the header of these is that of the encoder, who knew it if it is not 0.
_COUNTED = frozenset({"flac", "tta", "wv"})
# Whether these are whole is known before; FFmpeg takes a last packet that is shorter than others for damage.
_PLAIN = frozenset({"wav", "w64", "aiff", "au", "caf"})
_STREAMS = frozenset({"mpegts", "mpeg"})  # recordings begin anywhere
_TYPES = {"flt": "f4", "dbl": "f8", "s16": "i2", "s32": "i4", "u8": "u1"}
_SCALES = {"s16": 2.0**-15, "s32": 2.0**-31, "u8": 2.0**-7}
_MPEG_RATES = ((11025, 12000, 8000), (), (22050, 24000, 16000), (44100, 48000, 32000))  # by version: 2.5, none, 2, 1
_MPEG_KBITS = {
    (1, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (1, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (2, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_FRAMES_TOLD = [bytes([flags]) for flags in range(1, 16, 2)]  # flags of a first frame that tells their number
_FRAMES_IN_A_ROW = 4  # so many do not come about by chance


@dataclass(frozen=True)
class Audio:
    """`samples`: float32 [T] in about -1..1, mono, `sample_rate` a second."""

    samples: Samples
    sample_rate: int = SAMPLE_RATE

    @property
    def seconds(self) -> float:
        """Length in seconds."""
        return len(self.samples) / self.sample_rate


class _Decoder(Protocol):
    def __call__(self, source: Source, where: str, limits: Limits) -> Iterator[Samples]: ...


class _TooLongError(MediaError):
    """A limit, which another decoder would meet as well."""


def load_audio(source: Source, *, where: str, limits: Limits = DEFAULT_LIMITS) -> Audio:
    """Decode the default sound track of a file or bytes to 16 kHz mono; channels are averaged.

    Raises MediaError naming `where` when the source is empty, truncated, corrupt, silent by lack of samples, holds NaN
    or infinity, or exceeds `limits`.
    """
    size = check_source(source, where=where, limits=limits)
    check_whole(source, size, where=where)
    parts = list(_whole_blocks(source, size, where, limits))
    samples_T = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    _check_seconds(len(samples_T) / SAMPLE_RATE, where, limits)
    if samples_T.size == 0:
        raise MediaError("holds no sound (0 samples)", where=where, fix=RESTORE)
    if not np.isfinite(samples_T).all():
        raise MediaError("holds NaN or infinite samples", where=where, fix=RESTORE)
    return Audio(samples_T)


def _whole_blocks(source: Source, size: int, where: str, limits: Limits) -> Iterator[Samples]:
    """The sound in blocks at SAMPLE_RATE, of the first decoder that finds it whole."""
    start = _head_behind_tags(source, where)
    avi = start[:4] == b"RIFF" and start[8:12] == b"AVI "
    track = partial(_track_blocks, size=size)
    if _mpeg_frame_bytes(start) is not None:
        return _mp3_blocks(source, where, limits)
    if start.startswith(b"OggS"):
        return _first_whole([_sndfile_blocks, partial(_ogg_blocks, size=size)], source, where, limits)
    if start.startswith(b"fLaC"):
        return _flac_blocks(source, where, limits, size=size)
    if start.startswith(_LIBSNDFILE_MAGIC) and not avi:
        return _first_whole([_sndfile_blocks, track], source, where, limits)
    return track(source, where, limits)


def _first_whole(decoders: Sequence[_Decoder], source: Source, where: str, limits: Limits) -> Iterator[Samples]:
    """What the first decoder gives that does not find the source damaged; the refusal of the first if all do."""
    refusal: MediaError | None = None
    for decode in decoders:
        try:
            return iter(list(decode(source, where, limits)))
        except (_TooLongError, NoSoundTrackError):
            raise
        except MediaError as error:
            refusal = refusal or error
    raise refusal or MediaError("holds no sound (0 samples)", where=where, fix=RESTORE)


def _head_behind_tags(source: Source, where: str) -> bytes:
    """The first bytes behind ID3 tags."""
    with readable(source, where=where) as file:
        at = 0
        while length := _id3_bytes(start := file.read(14)):
            at += length
            file.seek(at)
        return start


def _resampler(rate: int) -> soxr.ResampleStream:
    return soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32")


def _check_rate(rate: int, channels: int, where: str) -> None:
    if not 1_000 <= rate <= 768_000 or not 1 <= channels <= 64:
        raise MediaError(f"declares {channels} channels at {rate} Hz", where=where, fix=RESTORE)


def _check_seconds(seconds: float, where: str, limits: Limits) -> None:
    if seconds > limits.max_audio_seconds:
        fix = "Cut it into parts, or raise Limits.max_audio_seconds."
        what = f"lasts more than the limit of {limits.max_audio_seconds:,.0f} s"
        raise _TooLongError(what, where=where, fix=fix)


def _sndfile_blocks(source: Source, where: str, limits: Limits) -> Iterator[Samples]:
    try:
        with opened(source, where=where) as raw, soundfile.SoundFile(raw) as file:
            _check_rate(file.samplerate, file.channels, where)
            if file.subtype == "GSM610":  # the byte behind an odd number of them is taken for another block
                raise MediaError("holds GSM sound, whose length is not read right here", where=where, fix=CONVERT)
            known_length = file.frames < 1 << 60
            _check_seconds(file.frames / file.samplerate if known_length else 0.0, where, limits)
            resampler, frames = _resampler(file.samplerate), 0
            # Not `file.blocks`: it pads a short read with whatever lies in memory.
            while len(block_TC := file.read(BLOCK_SECONDS * file.samplerate, dtype="float32", always_2d=True)):
                frames += len(block_TC)
                _check_seconds(frames / file.samplerate, where, limits)
                yield resampler.resample_chunk(mean_of_channels(block_TC.T))
            if _PATCHED.search(file.extra_info) or (known_length and frames != file.frames):
                what = f"is cut off or corrupt: {frames:,} of {file.frames:,} frames decode"
                raise MediaError(what, where=where, fix=RESTORE)
            if not frames:
                raise MediaError("holds no sound (0 samples)", where=where, fix=RESTORE)
            yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)
    except soundfile.SoundFileError as error:
        reason = re.sub(r"^Error opening <.*?>: ", "", str(error)).removeprefix("Error : ").rstrip(".")
        what = f"cannot be decoded ({reason}): cut off or corrupt"
        raise MediaError(what, where=where, fix=RESTORE) from None


def _ogg_blocks(source: Source, where: str, limits: Limits, *, size: int) -> Iterator[Samples]:
    """Ogg that libsndfile does not take for whole: another codec, no end, files chained or other bytes behind it."""
    files = ogg_files(source, size, where=where)
    if files == [(0, size)]:
        yield from _track_blocks(source, where, limits, size=size)
        return
    data = read_bytes(source, where=where)
    for start, end in files:
        part = data[start:end]
        yield from _first_whole([_sndfile_blocks, partial(_ogg_blocks, size=len(part))], part, where, limits)


def _flac_blocks(source: Source, where: str, limits: Limits, *, size: int) -> Iterator[Samples]:
    """FLAC by PyAV, which reads on where the header ends too early, but leaves out frames that are damaged.

    So where the header does not tell how many samples there are, libsndfile has to find as many.
    """
    with open_container(source, where=where, limits=limits) as container:
        stream = sound_track(container, where)
        declared = stream.duration or 0  # in samples
        found = 0

        def counted() -> Iterator[_Block]:
            nonlocal found
            for block in _decoded(container, stream, where):
                found += len(block.samples_T)
                yield block

        blocks = list(_resampled(counted(), where, limits))
    if found == declared:
        yield from blocks
        return
    data = read_bytes(source, where=where)
    begins = [match.start() for match in re.finditer(rb"fLaC[\x00\x80]\x00\x00\x22", data)]
    if len(begins) > 1:
        for start, end in pairwise([*begins, size]):
            yield from _flac_blocks(data[start:end], where, limits, size=end - start)
        return
    place = begins[0] + 21  # of the 36 bits with the number of samples
    told = (data[place] & 0xF0) << 32 | found
    yield from _sndfile_blocks(data[:place] + told.to_bytes(5, "big") + data[place + 5 :], where, limits)


def _track_blocks(
    source: Source, where: str, limits: Limits, *, size: int, form: str | None = None
) -> Iterator[Samples]:
    """By PyAV; `form` names the container where the content is known and too short to tell."""
    with open_container(source, where=where, limits=limits, form=form) as container:
        stream = sound_track(container, where)
        if container.format.name == "mp3" and form is None:
            raise MediaError("begins with bytes that are no mp3", where=where, fix=RESTORE)
        check_index(stream, size, where)
        yield from _resampled(_decoded(container, stream, where), where, limits)


def _resampled(blocks: Iterator[_Block], where: str, limits: Limits) -> Iterator[Samples]:
    """Blocks at SAMPLE_RATE. Raises MediaError where there are none, or more than the limit."""
    first = next(blocks, None)
    if first is None:
        raise MediaError("holds no sound (0 samples)", where=where, fix=RESTORE)
    rate, resampler, seconds = first.rate, _resampler(first.rate), 0.0
    for block in chain([first], blocks):
        if block.rate != rate:  # streams that were joined
            yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)
            rate, resampler = block.rate, _resampler(block.rate)
        seconds += len(block.samples_T) / rate
        _check_seconds(seconds, where, limits)
        yield resampler.resample_chunk(block.samples_T)
    yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)


class _Block(NamedTuple):
    rate: int
    samples_T: Samples


def _decoded(container: InputContainer, stream: AudioStream, where: str) -> Iterator[_Block]:
    """Mono blocks of the track at its own rate; MediaError at the first packet that is missing or damaged."""
    form = container.format.name
    stream.codec_context.options = _CHECKED.get(stream.codec_context.name, {})
    held: list[AudioFrame] = []
    held_kind: tuple[int, str, int] | None = None
    packets = samples = held_samples = 0
    end_seconds, judged = float("-inf"), is_judged_by_end(container)
    suspect: int | None = None
    for packet in container.demux():
        if judged:
            end_seconds = max(end_seconds, packet_end(packet))
        if packet.stream is not stream:
            continue
        # Where recordings were joined, times go back, and what a transport stream takes for a loss is none.
        joined = suspect is not None and packet.pts is not None and packet.pts < suspect
        corrupt = packet.is_corrupt and form not in _PLAIN
        if (suspect is not None and not joined) or (corrupt and (form != "mpegts" or packet.pts is None)):
            raise MediaError(f"is cut off or corrupt at packet {packets:,}", where=where, fix=RESTORE)
        suspect = packet.pts if corrupt else None
        try:
            # The stream's own decoder: `packet.decode` is typed for every kind of stream.
            frames = stream.decode(packet)
        except av.error.InvalidDataError:
            if _is_foreign(packet, form) or (form in _STREAMS and not samples):
                continue
            raise
        packets += packet.size > 0
        for frame in frames:
            if frame.is_corrupt:
                raise MediaError(f"is corrupt at packet {packets:,}", where=where, fix=RESTORE)
            kind, count = (frame.sample_rate, frame.format.name, frame.layout.nb_channels), frame.samples
            if held and (kind != held_kind or held_samples > BLOCK_SECONDS * kind[0]):
                yield _mono(held, where)
                held, held_samples = [], 0
            held.append(frame)
            held_kind = kind
            held_samples += count
            samples += count
    if held and form in _COUNTED and stream.duration and stream.time_base:
        declared = round(stream.duration * stream.time_base * held[-1].sample_rate)
        if samples < declared:
            what = f"is cut off: {samples:,} of {declared:,} samples are there"
            raise MediaError(what, where=where, fix=RESTORE)
    if held:
        yield _mono(held, where)
    check_reaches_end(container, end_seconds, where)


def _is_foreign(packet: Packet[Any], form: str) -> bool:
    """Whether a packet of a bare mp3 or aac is a tag or other bytes between or behind its frames."""
    return form in ("mp3", "aac") and bytes(memoryview(packet)[:2]) < b"\xff\xe0"


def _mono(frames: list[AudioFrame], where: str) -> _Block:
    """Frames of one form as a block of float32; joined first, since each step costs as much for a frame as for many."""
    form, channels, rate = frames[0].format, frames[0].layout.nb_channels, frames[0].sample_rate
    _check_rate(rate, channels, where)
    if form.name.rstrip("p") not in _TYPES:
        to_float = av.AudioResampler(format="fltp")
        frames = [plain for frame in frames for plain in to_float.resample(frame)]
        form = frames[0].format
    kind = form.name.rstrip("p")
    # Not frame.to_ndarray, whose stacking takes longer than the decoder of a frame of FLAC.
    held = channels if not form.is_planar else 1
    buffers = [
        [np.frombuffer(memoryview(plane), _TYPES[kind], frame.samples * held) for plane in frame.planes]
        for frame in frames
    ]
    planes = [np.concatenate(each) for each in zip(*buffers, strict=True)]
    samples_CT: npt.NDArray[Any] = planes[0].reshape(-1, channels).T if held > 1 else np.asarray(planes)
    if kind in _SCALES:
        samples_CT = samples_CT.astype(np.float32)
        if kind == "u8":
            samples_CT -= 128
        samples_CT *= np.float32(_SCALES[kind])
    return _Block(rate, mean_of_channels(samples_CT))


def mean_of_channels(samples_CT: npt.NDArray[Any]) -> Samples:
    """The mean over channels, float32 [T]: what numpy's own gives, to the bit, in a twentieth of its time.

    numpy adds the few channels of each sample by itself where they lie next to each other. From eight on it adds them
    in another order, and is left to it.
    """
    channels = len(samples_CT)
    if channels >= 8:
        return np.asarray(samples_CT.mean(axis=0, dtype=np.float32), np.float32)
    sum_T = np.zeros(samples_CT.shape[1], np.float32)
    for one_T in samples_CT:
        sum_T += one_T.astype(np.float32, copy=False)
    sum_T /= np.float32(channels)
    return sum_T


# --- mp3 --------------------------------------------------------------------------------------------------------------


class _Mp3Part(NamedTuple):
    """Bytes of an mp3 that are decoded by themselves; `informed`: its first frame tells what its encoder padded."""

    start: int
    end: int
    informed: bool


def _mp3_blocks(source: Source, where: str, limits: Limits) -> Iterator[Samples]:
    data = read_bytes(source, where=where)
    for start, end, informed in _mp3_parts(data, where):
        part = data[start:end]
        track = partial(_track_blocks, size=len(part), form="mp3")
        # libsndfile stops where it guesses the end from the first frame, if that does not tell.
        yield from _first_whole([_sndfile_blocks, track] if informed else [track], part, where, limits)


def _mp3_parts(data: bytes, where: str) -> list[_Mp3Part]:
    """The files that an mp3 was joined from, as far as their first frames tell (Xing), without tags and other bytes.

    All frames are counted. Raises MediaError when the last is cut off, when bytes between two frames are neither of a
    frame nor a tag nor zero, or when fewer frames are there than a first frame tells.
    """
    told: dict[int, int] = {}
    for sign in (b"Xing", b"Info"):
        at = -1
        while (at := data.find(sign, at + 1)) >= 0:
            told |= {at - offset: at for offset in (36, 21, 13)}
    lengths: dict[bytes, int | None] = {}
    parts: list[_Mp3Part] = []
    size, at, start, declared, frames = len(data), 0, -1, 0, 0
    while at <= size:
        key = data[at : at + 3]
        if key not in lengths:
            lengths[key] = _mpeg_frame_bytes(data[at : at + 4])
        length = lengths[key]
        if start >= 0 and (length is None or at in told):
            if declared > frames + 1:
                what = f"is cut off: {frames:,} of {declared:,} frames are there"
                raise MediaError(what, where=where, fix=RESTORE)
            if declared and frames > declared + 1:  # more were written, or another file without such a frame follows
                start, declared = start + (lengths[data[start : start + 3]] or 0), 0
            parts.append(_Mp3Part(start, at, declared > 0))
            start = -1
        if length is None:
            following = _behind_other_bytes(data, at, where) if at < size else None
            if following is None and at < size and frames < min(_FRAMES_IN_A_ROW, declared or size):
                raise MediaError(f"is corrupt at byte {at:,}", where=where, fix=RESTORE)
            if following is None:
                break
            at = following
            continue
        if at + length > size:
            what = f"is cut off: its last frame has {size - at:,} of {length:,} bytes"
            raise MediaError(what, where=where, fix=RESTORE)
        if start < 0:
            start, declared, frames = at, _declared_frames(data, at, told), 0
            frames -= declared > 0  # the frame that tells is none of them
        frames += 1
        at += length or size - at  # of a bit rate that no table knows: only a decoder finds the next frame
    return parts


def _declared_frames(data: bytes, at: int, told: Mapping[int, int]) -> int:
    """How many frames a first frame promises; 0 when it says nothing."""
    place = told.get(at, len(data))
    return int.from_bytes(data[place + 8 : place + 12], "big") if data[place + 7 : place + 8] in _FRAMES_TOLD else 0


def _behind_other_bytes(data: bytes, at: int, where: str) -> int | None:
    """Where the next frame of an mp3 begins behind tags and padding; None where none follows."""
    if length := _id3_bytes(data[at : at + 14]):
        return at + length
    if data.startswith(b"TAG", at):
        return at + 128
    if data.startswith(b"APETAGEX", at):
        return at + 32 + int.from_bytes(data[at + 12 : at + 16], "little")
    stripped = len(data) - len(data[at:].lstrip(b"\0"))
    if stripped > at and (stripped == len(data) or _mpeg_frame_bytes(data[stripped : stripped + 4])):
        return stripped
    if len(data) - at < 4 and data[at] == 0xFF:
        raise MediaError("is cut off within its last frame", where=where, fix=RESTORE)
    found = at
    while (found := data.find(b"\xff", found + 1)) >= 0:
        end, row = found, 0
        while row < _FRAMES_IN_A_ROW and (step := _mpeg_frame_bytes(data[end : end + 4])):
            end, row = end + step, row + 1
        if row == _FRAMES_IN_A_ROW:
            raise MediaError(f"is corrupt at byte {at:,}", where=where, fix=RESTORE)
    return None


def _id3_bytes(start: bytes) -> int:
    """Length of the ID3 tag that begins here, 0 where none does."""
    if start[:3] != b"ID3" or len(start) < 10:
        return 0
    length = sum((byte & 0x7F) << shift for byte, shift in zip(start[6:10], (21, 14, 7, 0), strict=True))
    return 10 + length + (10 if start[5] & 0x10 else 0)


def _mpeg_frame_bytes(header: bytes) -> int | None:
    """Length of the frame with this header of four bytes, 0 where it does not tell; None for what is no header."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE0 != 0xE0:
        return None
    version, layer, bits = header[1] >> 3 & 3, 4 - (header[1] >> 1 & 3), header[2]
    if version == 1 or layer == 4 or bits >> 4 == 15 or bits >> 2 & 3 == 3:
        return None
    if bits >> 4 == 0:
        return 0
    rate = _MPEG_RATES[version][bits >> 2 & 3]
    kbits = _MPEG_KBITS[1 if version == 3 else 2, layer][(bits >> 4) - 1]
    padding = bits >> 1 & 1
    if layer == 1:
        return (12 * kbits * 1000 // rate + padding) * 4
    return (72 if layer == 3 and version != 3 else 144) * kbits * 1000 // rate + padding
