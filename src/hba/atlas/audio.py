"""Sound to 16 kHz mono float32.

wav, flac, mp3, ogg and aiff go through libsndfile, tracks of m4a, aac, mp4, mkv, webm through PyAV; content decides,
never the suffix. A sound is decoded block by block, so that memory is that of the result. It is served whole
or refused: a file that holds less than its header declares, or that a decoder had to patch, is a MediaError, never
silence. What carries no checksum and no length (a bare mp3 cut between two frames) cannot be told from a shorter one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import av
import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from hba.atlas.slices import Source, opened
from hba.atlas.source import (
    DEFAULT_LIMITS,
    RESTORE,
    Limits,
    check_reaches_end,
    check_source,
    head,
    open_container,
    packet_end,
    sound_track,
)
from hba.errors import MediaError

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.container import InputContainer

SAMPLE_RATE = 16_000
BLOCK_SECONDS = 20
Samples = npt.NDArray[np.float32]

_LIBSNDFILE_MAGIC = (b"RIFF", b"RF64", b"RIFX", b"fLaC", b"OggS", b"FORM", b"caff", b"ID3", b".snd", b"riff")
_PATCHED = re.compile(r"lacks an end-of-stream|Junk after the last page|Corrupted bitstream|reports a hole|lost sync")
# Writers to a pipe cannot know the length and declare the largest one.
_CUT_WAV = re.compile(r"^\s*data : (?!4294967295|-1|0 )\d+ \(should be \d+\)", re.M)


@dataclass(frozen=True)
class Audio:
    """`samples`: float32 [T] in about -1..1, mono, `sample_rate` a second."""

    samples: Samples
    sample_rate: int = SAMPLE_RATE

    @property
    def seconds(self) -> float:
        """Length in seconds."""
        return len(self.samples) / self.sample_rate


def load_audio(source: Source, *, where: str, limits: Limits = DEFAULT_LIMITS) -> Audio:
    """Decode the (first) sound track of a file or bytes to 16 kHz mono; channels are averaged.

    Raises MediaError naming `where` when the source is empty, truncated, corrupt, silent by lack of samples, holds NaN
    or infinity, or exceeds `limits`.
    """
    check_source(source, where=where, limits=limits)
    decode = _sndfile_blocks if _is_sndfile(head(source, 12, where=where)) else _track_blocks
    samples_T = _joined(decode(source, where, limits))
    if samples_T.size == 0:
        raise MediaError("holds no sound (0 samples)", where=where, fix=RESTORE)
    if not np.isfinite(samples_T).all():
        raise MediaError("holds NaN or infinite samples", where=where, fix=RESTORE)
    return Audio(samples_T)


def _is_sndfile(start: bytes) -> bool:
    # Both mp3 and raw aac start with eleven set bits; the layer bits are zero in aac alone.
    mpeg = len(start) > 1 and start[0] == 0xFF and start[1] & 0xE0 == 0xE0 and start[1] & 0x06 != 0
    avi = start[:4] == b"RIFF" and start[8:12] == b"AVI "
    return (mpeg or start.startswith(_LIBSNDFILE_MAGIC)) and not avi


def _joined(blocks: Iterator[Samples]) -> Samples:
    parts = list(blocks)
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def _resampler(rate: int) -> soxr.ResampleStream:
    return soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32")


def _check_rate(rate: int, channels: int, where: str) -> None:
    if not 1_000 <= rate <= 768_000 or not 1 <= channels <= 64:
        raise MediaError(f"declares {channels} channels at {rate} Hz", where=where, fix=RESTORE)


def _check_seconds(seconds: float, where: str, limits: Limits) -> None:
    if seconds > limits.max_audio_seconds:
        fix = "Cut it into parts, or raise Limits.max_audio_seconds."
        what = f"lasts more than the limit of {limits.max_audio_seconds:,.0f} s"
        raise MediaError(what, where=where, fix=fix)


def _sndfile_blocks(source: Source, where: str, limits: Limits) -> Iterator[Samples]:
    try:
        with opened(source, where=where) as raw, soundfile.SoundFile(raw) as file:
            _check_rate(file.samplerate, file.channels, where)
            known_length = file.frames < 1 << 60
            _check_seconds(file.frames / file.samplerate if known_length else 0.0, where, limits)
            if _CUT_WAV.search(file.extra_info):
                raise MediaError("is cut off: holds less sound than its header declares", where=where, fix=RESTORE)
            resampler, frames = _resampler(file.samplerate), 0
            # Not `file.blocks`: it pads a short read with whatever lies in memory.
            while len(block_TC := file.read(BLOCK_SECONDS * file.samplerate, dtype="float32", always_2d=True)):
                frames += len(block_TC)
                _check_seconds(frames / file.samplerate, where, limits)
                yield resampler.resample_chunk(block_TC.mean(axis=1))
            if _PATCHED.search(file.extra_info) or (known_length and frames != file.frames):
                what = f"is cut off or corrupt: {frames:,} of {file.frames:,} frames decode"
                raise MediaError(what, where=where, fix=RESTORE)
            yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)
    except soundfile.SoundFileError as error:
        what = f"cannot be decoded ({str(error).removeprefix('Error : ')}): cut off or corrupt"
        raise MediaError(what, where=where, fix=RESTORE) from None


def _track_blocks(source: Source, where: str, limits: Limits) -> Iterator[Samples]:
    with open_container(source, where=where, limits=limits) as container:
        stream = sound_track(container, where)
        if container.format.name == "mp3":  # one that begins as mp3 does went to libsndfile
            raise MediaError("begins with bytes that are no mp3", where=where, fix=RESTORE)
        rate = stream.codec_context.sample_rate
        _check_rate(rate, stream.codec_context.channels, where)
        resampler, frames = _resampler(rate), 0
        for block_T in _decoded(container, stream, where):
            frames += len(block_T)
            _check_seconds(frames / rate, where, limits)
            yield resampler.resample_chunk(block_T)
        yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)


def _decoded(container: InputContainer, stream: AudioStream, where: str) -> Iterator[Samples]:
    """Mono blocks of the track at its own rate; MediaError at the first packet that is missing or damaged."""
    to_float = av.AudioResampler(format="fltp")  # planes of float, whatever the codec's own sample format
    rate, packets, end_seconds = stream.codec_context.sample_rate, 0, float("-inf")
    for packet in container.demux():
        end_seconds = max(end_seconds, packet_end(packet))
        if packet.stream is not stream:
            continue
        # The stream's own decoder: `packet.decode` is typed for every kind of stream.
        packets += packet.size > 0
        if packet.is_corrupt:
            raise MediaError(f"is cut off or corrupt at packet {packets:,}", where=where, fix=RESTORE)
        for frame in stream.decode(packet):
            if frame.is_corrupt or frame.sample_rate != rate:
                raise MediaError(f"is corrupt at packet {packets:,}", where=where, fix=RESTORE)
            for plain in to_float.resample(frame):
                yield plain.to_ndarray().mean(axis=0, dtype=np.float32)
    if stream.frames and packets < stream.frames:
        what = f"is cut off: {packets:,} of {stream.frames:,} packets are there"
        raise MediaError(what, where=where, fix=RESTORE)
    check_reaches_end(container, end_seconds, where)
