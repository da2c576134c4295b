"""Sounds and clips as people's recorders, converters and downloads leave them, each with what is in it.

Every case is made in memory by PyAV, soundfile or a few bytes, and says what a reader that decodes everything hears or
sees: a sound lasts so many seconds, a clip shows frames of known numbers (each frame shows its number as eight bars).
A case with `refused` is one that no reader can serve whole; the text is what the refusal says. Where the ffmpeg of the
command line gives another value, `ffmpeg` tells why; everywhere else it must agree.
"""

from __future__ import annotations

import io
import struct
import subprocess
import tempfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import soundfile

RATE = 44_100
SECONDS = 3.2
FRAMES, FRAME_RATE, SIZE = 75, 25, (64, 48)
MP3_FRAMES = 124  # of a sound of SECONDS, padding included
NOT_READ = "format that is not read"


class Sound(NamedTuple):
    data: bytes
    seconds: float = 0.0
    refused: str = ""
    ffmpeg: str = ""


class Clip(NamedTuple):
    """`numbers`: of the frames, in order of presentation; `ticks`: when each is shown, in units of 1 / FRAME_RATE."""

    data: bytes
    numbers: list[int]
    ticks: list[int] | None = None
    refused: str = ""
    ffmpeg: str = ""


# --- how they are made ------------------------------------------------------------------------------------------------


class _Pipe(io.RawIOBase):
    """What a muxer writes to when it cannot go back to its header."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: Any) -> int:
        self.data += data
        return len(data)

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False


def picture(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """uint8 [H, W, 3]: eight bars, bright for the ones of the number, the lowest first, and a stripe that moves."""
    width, height = size
    bars = np.repeat([220 if number >> bit & 1 else 40 for bit in range(8)], width // 8)
    image = np.repeat(bars[None], height, 0)
    stripe = number * 3 % (height - 8)
    image[stripe : stripe + 4] = image[stripe : stripe + 4] // 2 + 30
    return np.stack([image] * 3, -1).astype(np.uint8)


def number_of(pixels: np.ndarray) -> int:
    """The number that a frame shows."""
    grey, bar = pixels.astype(float).mean(-1), pixels.shape[1] // 8
    return sum(int(np.median(grey[:, k * bar + 2 : (k + 1) * bar - 2]) > 128) << k for k in range(8))


def tone(seconds: float = SECONDS, rate: int = RATE, hertz: float = 440.0) -> np.ndarray:
    """A rising tone, float32 [T], so that every part of it is another."""
    at = np.arange(round(seconds * rate)) / rate
    return (0.4 * np.sin(2 * np.pi * (hertz + 60 * at) * at)).astype(np.float32)


def written(
    samples: np.ndarray, form: str, subtype: str | None = None, rate: int = RATE, endian: str = "FILE"
) -> bytes:
    """By libsndfile, in blocks: its Vorbis encoder overruns its stack otherwise."""
    file = io.BytesIO()
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    with soundfile.SoundFile(file, "w", RATE, channels, subtype, endian, form) as out:
        for at in range(0, len(samples), 100_000):
            out.write(samples[at : at + 100_000])
    return file.getvalue()


def _muxed(form: str, mux: dict[str, str] | None, fill: Callable[[Any], None], piped: bool) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        pipe, path = _Pipe(), Path(folder, "file")
        with av.open(pipe if piped else str(path), "w", format=form, options=mux or {}) as out:
            fill(out)
        return bytes(pipe.data) if piped else path.read_bytes()


def _feed(out: Any, stream: Any, samples: np.ndarray, start: float = 0.0) -> None:
    codec = stream.codec_context
    size = codec.frame_size or 1024
    resampler = av.AudioResampler(codec.format.name, codec.layout, stream.rate, frame_size=size)
    planes = np.ascontiguousarray(samples.T if samples.ndim > 1 else samples[None])
    frame = av.AudioFrame.from_ndarray(planes, "fltp", "mono" if samples.ndim == 1 else "stereo")
    frame.rate, frame.pts, frame.time_base = stream.rate, round(start * stream.rate), Fraction(1, stream.rate)
    for piece in [*resampler.resample(frame), *resampler.resample(None)]:
        out.mux(stream.encode(piece))
    out.mux(stream.encode())


def track(
    samples: np.ndarray, form: str, codec: str, rate: int = RATE, *, mux: dict[str, str] | None = None,
    piped: bool = False, bit_rate: int = 0, **options: str,
) -> bytes:  # fmt: skip
    """One sound track."""

    def fill(out: Any) -> None:
        layout = "mono" if samples.ndim == 1 else "stereo"
        stream = out.add_stream(codec, rate=rate, layout=layout, options=options)
        if bit_rate:
            stream.bit_rate = bit_rate
        _feed(out, stream, samples)

    return _muxed(form, mux, fill, piped)


def movie(
    form: str, codec: str, numbers: list[int] | range = range(FRAMES), *, pixels: str = "yuv420p", sound: str = "",
    size: tuple[int, int] = SIZE, mux: dict[str, str] | None = None, piped: bool = False, start: int = 0,
    ticks: list[int] | None = None, rate: int = FRAME_RATE, sound_start: float = 0.0, sound_seconds: float = 0.0,
    **options: str,
) -> bytes:  # fmt: skip
    """A clip of numbered frames, and a sound track if `sound` names its codec."""

    def fill(out: Any) -> None:
        video = out.add_stream(codec, rate=rate, options=options)
        video.width, video.height, video.pix_fmt = *size, pixels
        video.bit_rate = 1_000_000
        audio = out.add_stream(sound, rate=RATE, layout="mono") if sound else None
        if audio is not None:
            audio.bit_rate = 64_000
        for place, number in enumerate(numbers):
            frame = av.VideoFrame.from_ndarray(picture(number, size), format="rgb24")
            frame.pts, frame.time_base = (ticks[place] if ticks else place) + start, Fraction(1, rate)
            out.mux(video.encode(frame))
        out.mux(video.encode())
        if audio is not None:
            _feed(out, audio, tone(sound_seconds or len(numbers) / rate), sound_start)

    return _muxed(form, mux, fill, piped)


def several(form: str, streams: list[dict[str, Any]], default: int) -> bytes:
    """Streams of their own `codec` and `size`, or `rate` and `seconds`; the disposition of one says default."""

    def fill(out: Any) -> None:
        made = []
        for number, wanted in enumerate(streams):
            stream = out.add_stream(wanted["codec"], rate=wanted.get("rate", FRAME_RATE))
            if "size" in wanted:
                stream.width, stream.height = wanted["size"]
                stream.pix_fmt = wanted.get("pixels", "yuv420p")
            else:
                stream.layout = "mono"
            normal = av.stream.Disposition.default if number == default else 0
            stream.disposition = int(wanted.get("disposition", normal))
            made.append(stream)
        for stream, wanted in zip(made, streams, strict=True):
            if "size" not in wanted:
                _feed(out, stream, tone(wanted["seconds"], wanted["rate"]))
                continue
            for number in wanted["numbers"]:
                out.mux(stream.encode(av.VideoFrame.from_ndarray(picture(number, wanted["size"]), format="rgb24")))
            out.mux(stream.encode())

    return _muxed(form, None, fill, piped=False)


def patched(data: bytes, at: int, form: str, value: int) -> bytes:
    return data[:at] + struct.pack(form, value) + data[at + struct.calcsize(form) :]


def _wave(data_size: int | None = None, riff_size: int | None = None, subtype: str = "PCM_16") -> bytes:
    data = written(tone(), "WAV", subtype)
    if data_size is not None:
        data = patched(data, data.index(b"data") + 4, "<I", data_size)
    return data if riff_size is None else patched(data, 4, "<I", riff_size)


def _flac_total(data: bytes, total: int) -> bytes:
    (bits,) = struct.unpack_from(">Q", data, 18)
    return patched(data, 18, ">Q", bits & ~((1 << 36) - 1) | total)


def _pages(data: bytes) -> list[bytes]:
    pages, at = [], 0
    while at < len(data):
        end = at + 27 + data[at + 26] + sum(data[at + 27 : at + 27 + data[at + 26]])
        pages.append(data[at:end])
        at = end
    return pages


def _without_end_flag(data: bytes) -> bytes:
    *pages, last = _pages(data)
    page = bytearray(last)
    page[5] &= ~4
    page[22:26] = bytes(4)
    crc = 0
    for byte in page:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1 ^ 0x04C11DB7) & 0xFFFFFFFF if crc & 0x80000000 else crc << 1
    page[22:26] = struct.pack("<I", crc)
    return b"".join(pages) + bytes(page)


def _mp3(seconds: float = SECONDS, xing: bool = True, rate: int = RATE, tags: bool = False) -> bytes:
    mux = {"write_xing": str(int(xing)), "id3v2_version": "3" if tags else "0"}
    return track(tone(seconds, rate), "mp3", "libmp3lame", rate, mux=mux, bit_rate=64_000)


def _variable_mp3() -> bytes:
    """Silence, a tone, noise: what a reader guesses from the first frames is far from the truth."""
    noise = np.random.default_rng(0).normal(0, 0.1, 6 * RATE).astype(np.float32)
    samples = np.concatenate([np.zeros(2 * RATE, np.float32), tone(3.3), noise])
    mux = {"write_xing": "0", "id3v2_version": "0"}
    return track(samples, "mp3", "libmp3lame", mux=mux, flags="+qscale", global_quality=str(118 * 4))


# --- sounds -----------------------------------------------------------------------------------------------------------


def sounds() -> dict[str, Callable[[], Sound]]:
    """Every sound by its name; made when asked for."""
    whole, mp3_padded = SECONDS, MP3_FRAMES * 1152 / RATE
    noise = bytes(np.random.default_rng(1).integers(0, 256, 3000, dtype=np.uint8))
    cases: dict[str, Callable[[], Sound]] = {
        "wav": lambda: Sound(_wave(), whole),
        "wav, sizes right, data 36 too long": lambda: Sound(_wave(data_size=2 * round(whole * RATE) + 36), whole),
        "wav that promises a million bytes more": lambda: Sound(
            _wave(data_size=1_282_240, riff_size=1_282_276), refused="cut off: its header promises 1,282,284 bytes"
        ),
        "wav, cut": lambda: Sound(_wave()[:50_000], refused="cut off"),
        "wav, empty": lambda: Sound(written(tone()[:0], "WAV"), refused="0 samples"),
        "wav, empty, other parts behind": lambda: Sound(
            written(tone()[:0], "WAV") + b"LIST\4\0\0\0INFO",
            refused="0 samples",
            ffmpeg="hears the other part",
        ),
        "wav of odd length": lambda: Sound(written(tone()[:44_101], "WAV", "PCM_U8"), 44_101 / RATE),
        "wav of odd length, not padded": lambda: Sound(
            written(tone()[:44_101], "WAV", "PCM_U8").rstrip(b"\0"), 44_101 / RATE
        ),
        "wav, odd part in front, padded": lambda: Sound(_wave()[:36] + b"LIST\5\0\0\0INFOx\0" + _wave()[36:], whole),
        "wav, garbage behind": lambda: Sound(_wave() + noise, whole),
        "wav, two parts of sound": lambda: Sound(
            _wave() + b"data" + struct.pack("<I", 88_200) + _wave()[44 : 44 + 88_200],
            refused="in several parts",
            ffmpeg="reads the second alone",
        ),
        "wav, two files joined": lambda: Sound(_wave() * 2, refused="joined together", ffmpeg="reads the first alone"),
        "wav with mp3 inside": lambda: Sound(track(tone(), "wav", "libmp3lame"), mp3_padded),
        "wav, big endian": lambda: Sound(written(tone(), "WAV", "PCM_16", endian="BIG"), whole),
        "wav of gsm, an odd number of blocks": lambda: Sound(written(tone(), "WAV", "GSM610"), whole),
        "wav of gsm": lambda: Sound(written(tone(3.2 + 320 / RATE), "WAV", "GSM610"), whole + 320 / RATE),
        "rf64": lambda: Sound(written(tone(), "RF64", "PCM_16"), whole),
        "bw64": lambda: Sound(b"BW64" + written(tone(), "RF64", "PCM_16")[4:], whole),
        "rf64, never finished": lambda: Sound(
            (data := written(tone(), "RF64", "PCM_16"))[:20] + bytes(24) + data[44:],
            refused="0 samples",
            ffmpeg="0 samples",
        ),
        "w64": lambda: Sound(written(tone(), "W64", "PCM_16"), whole),
        "w64, cut": lambda: Sound(written(tone(), "W64", "PCM_16")[:50_000], refused="cut off"),
        "aiff": lambda: Sound(written(tone(), "AIFF", "PCM_16"), whole),
        "aiff, little endian": lambda: Sound(track(tone(), "aiff", "pcm_s16le"), whole),
        "aiff, cut": lambda: Sound(written(tone(), "AIFF", "PCM_16")[:50_000], refused="cut off"),
        "aiff from a pipe": lambda: Sound(
            track(tone(), "aiff", "pcm_s16be", piped=True), whole, ffmpeg="refuses a size of 0"
        ),
        "au from a pipe": lambda: Sound(track(tone(), "au", "pcm_s16be", piped=True), whole),
        "au, cut": lambda: Sound(written(tone(), "AU", "PCM_16")[:50_000], refused="cut off"),
        "caf from a pipe": lambda: Sound(track(tone(), "caf", "pcm_s16le", piped=True), whole),
        "caf of mu-law": lambda: Sound(track(tone(), "caf", "pcm_mulaw"), whole),
        "caf of alac": lambda: Sound(track(tone(), "caf", "alac"), whole),
        "nist": lambda: Sound(written(tone(), "NIST", "PCM_16"), whole),
        "nist, cut": lambda: Sound(written(tone(), "NIST", "PCM_16")[:50_000], refused="cut off"),
        "voc": lambda: Sound(written(tone(), "VOC", "PCM_16"), whole),
        "voc, cut": lambda: Sound(written(tone(), "VOC", "PCM_16")[:50_000], refused="cut off"),
        "flac": lambda: Sound(written(tone(), "FLAC"), whole),
        "flac from a pipe": lambda: Sound(track(tone(), "flac", "flac", piped=True), whole),
        "flac, no number of samples": lambda: Sound(_flac_total(written(tone(), "FLAC"), 0), whole),
        "flac, too few samples told": lambda: Sound(_flac_total(written(tone(), "FLAC"), 40_000), whole),
        "flac, more samples told": lambda: Sound(_flac_total(written(tone(), "FLAC"), 400_000), refused="cut off"),
        "flac, cut": lambda: Sound(written(tone(), "FLAC")[:50_000], refused="cut off"),
        "flac, cut, no number of samples": lambda: Sound(
            _flac_total(written(tone(), "FLAC"), 0)[:50_000], refused="cut off"
        ),
        "flac, damaged, no number of samples": lambda: Sound(
            patched(_flac_total(written(tone(), "FLAC"), 0), 50_000, "B", 7), refused="cannot be decoded"
        ),
        "flac, tags around it": lambda: Sound(
            b"ID3\4\0\0\0\0\0\x14" + bytes(20) + written(tone(), "FLAC") + b"TAG" + bytes(125), whole
        ),
        "flac, two files joined": lambda: Sound(written(tone(), "FLAC") * 2, 2 * whole, ffmpeg="loses some"),
        "flac in ogg": lambda: Sound(track(tone(), "ogg", "flac"), whole),
        "ogg": lambda: Sound(written(tone(), "OGG"), whole),
        "ogg without its end": lambda: Sound(_without_end_flag(written(tone(), "OGG")), 141_888 / RATE),
        "ogg, last page missing": lambda: Sound(b"".join(_pages(written(tone(), "OGG"))[:-1]), 110_144 / RATE),
        "ogg, cut within a page": lambda: Sound(written(tone(), "OGG")[:-500], refused="cut off"),
        "ogg, damaged page": lambda: Sound(
            patched(data := written(tone(), "OGG"), len(data) - 500, "B", 7), refused="corrupt", ffmpeg="leaves it out"
        ),
        "ogg, two files joined": lambda: Sound(written(tone(), "OGG") + written(tone(2), "OGG"), whole + 2),
        "ogg, garbage behind": lambda: Sound(written(tone(), "OGG") + noise, whole),
        "opus": lambda: Sound(track(tone(rate=48_000), "ogg", "libopus", 48_000), whole),
        "opus, last page missing": lambda: Sound(
            b"".join(_pages(track(tone(rate=48_000), "ogg", "libopus", 48_000))[:-1]), 143_688 / 48_000
        ),
        "opus, two files joined": lambda: Sound(
            track(tone(rate=48_000), "ogg", "libopus", 48_000) + track(tone(2, 48_000), "ogg", "libopus", 48_000),
            whole + 2,
        ),
        "mp3": lambda: Sound(_mp3(), whole),
        "mp3 of variable bit rate without a header": lambda: Sound(_variable_mp3(), 434 * 1152 / RATE),
        "mp3 of constant bit rate without a header": lambda: Sound(_mp3(xing=False), mp3_padded),
        "mp3 from a pipe": lambda: Sound(track(tone(), "mp3", "libmp3lame", piped=True), mp3_padded),
        "mp3, header tells one frame": lambda: Sound(
            patched(data := _mp3(), data.index(b"Info") + 8, ">I", 1), mp3_padded, ffmpeg="loses what the header pads"
        ),
        "mp3, header tells more frames": lambda: Sound(
            patched(data := _mp3(), data.index(b"Info") + 8, ">I", 400),
            refused="cut off: 124 of 400 frames",
            ffmpeg="believes what is there",
        ),
        "mp3, two files joined": lambda: Sound(_mp3() + _mp3(2), whole + 2, ffmpeg="keeps their padding"),
        "mp3, two files joined, without headers": lambda: Sound(_mp3(xing=False) * 2, 2 * mp3_padded),
        "mp3, tags between and behind": lambda: Sound(
            _mp3(tags=True) + _mp3(2, tags=True) + b"TAG" + bytes(125),
            whole + 2,
            ffmpeg="keeps their padding",
        ),
        "mp3, two rates joined": lambda: Sound(_mp3() + _mp3(2, rate=22_050), whole + 2, ffmpeg="keeps the first rate"),
        "mp3, tag behind": lambda: Sound(_mp3(xing=False) + b"TAG" + bytes(125), mp3_padded),
        "mp3, ape tag behind": lambda: Sound(
            _mp3(xing=False) + b"APETAGEX" + struct.pack("<IIII", 2000, 64, 1, 0) + bytes(8) + b"x" * 32, mp3_padded
        ),
        "mp3, garbage behind": lambda: Sound(_mp3() + noise, whole, ffmpeg="keeps the padding at the end"),
        "mp3, garbage behind, without a header": lambda: Sound(_mp3(xing=False) + b"garbage!" * 300, mp3_padded),
        "mp3, zeros behind": lambda: Sound(_mp3(xing=False) + bytes(5000), mp3_padded),
        "mp3, cut": lambda: Sound(_mp3()[:10_000], refused="cut off"),
        "mp3, cut, without a header": lambda: Sound(_mp3(xing=False)[:10_000], refused="cut off"),
        "mp3, hole in the middle": lambda: Sound(
            _mp3(xing=False)[:10_000] + noise + _mp3(xing=False)[10_000:], refused="corrupt", ffmpeg="passes over it"
        ),
        "mp2": lambda: Sound(track(tone(), "mp2", "mp2", bit_rate=128_000), 123 * 1152 / RATE),
        "aac": lambda: Sound(track(tone(), "adts", "aac"), 139 * 1024 / RATE),
        "aac, two files joined": lambda: Sound(track(tone(), "adts", "aac") * 2, 278 * 1024 / RATE),
        "aac, two rates joined": lambda: Sound(
            track(tone(), "adts", "aac") + track(tone(2, 22_050), "adts", "aac", 22_050),
            139 * 1024 / RATE + 45 * 1024 / 22_050,
        ),
        "aac, one channel, then two": lambda: Sound(
            track(tone(), "adts", "aac") + track(np.stack([tone()] * 2, 1), "adts", "aac"), 278 * 1024 / RATE
        ),
        "aac, garbage behind": lambda: Sound(track(tone(), "adts", "aac") + b"garbage" * 30, 139 * 1024 / RATE),
        "aac, cut": lambda: Sound(track(tone(), "adts", "aac")[:10_000], refused="cut off"),
        "m4a": lambda: Sound(track(tone(), "ipod", "aac"), 138 * 1024 / RATE),
        "m4a without an edit list": lambda: Sound(
            track(tone(), "ipod", "aac", mux={"use_editlist": "0"}), 139 * 1024 / RATE
        ),
        "m4a in fragments": lambda: Sound(
            track(tone(), "mp4", "aac", mux={"movflags": "frag_keyframe+empty_moov", "frag_duration": "500000"}),
            139 * 1024 / RATE,
        ),
        "m4a, cut": lambda: Sound(
            track(tone(), "ipod", "aac", mux={"movflags": "faststart"})[:-5000], refused="cut off: its header promises"
        ),
        "m4a whose table reaches beyond the end": lambda: Sound(
            patched(data := track(tone(), "ipod", "aac"), data.index(b"stco") + 12, ">I", 1 << 24),
            refused="its index reaches",
        ),
        "m4a of alac": lambda: Sound(track(tone(), "ipod", "alac"), whole),
        "mp4 of mp3": lambda: Sound(track(tone(), "mp4", "libmp3lame"), 141_743 / RATE),
        "mp4 of flac": lambda: Sound(track(tone(), "mp4", "flac", strict="-2"), whole),
        "3gp of amr": lambda: Sound(track(tone(rate=8000), "3gp", "libopencore_amrnb", 8000, bit_rate=12_200), 3.21375),
        "flv of aac": lambda: Sound(track(tone(), "flv", "aac"), 139 * 1024 / RATE),
        "ts of aac": lambda: Sound(track(tone(), "mpegts", "aac"), 139 * 1024 / RATE),
        "mp4 of opus": lambda: Sound(track(tone(rate=48_000), "mp4", "libopus", 48_000), 154_248 / 48_000),
        "avi of pcm": lambda: Sound(track(tone(), "avi", "pcm_s16le"), whole),
        "mkv of opus": lambda: Sound(track(tone(rate=48_000), "matroska", "libopus", 48_000), whole),
        "webm of opus from a pipe": lambda: Sound(
            track(tone(rate=48_000), "webm", "libopus", 48_000, piped=True), whole
        ),
        "mkv of mp3": lambda: Sound(track(tone(), "matroska", "libmp3lame"), whole, ffmpeg="old ones keep the padding"),
        "clip whose sound begins late": lambda: Sound(
            movie("mp4", "libx264", sound="aac", sound_start=0.7, sound_seconds=1), 45 * 1024 / RATE
        ),
        "clip whose sound ends early": lambda: Sound(
            movie("mp4", "libx264", sound="aac", sound_seconds=0.5), 22 * 1024 / RATE
        ),
        "clip of pcm, mov": lambda: Sound(movie("mov", "libx264", sound="pcm_s16le"), 3),
        "clip of pcm, mkv": lambda: Sound(movie("matroska", "libx264", sound="pcm_s16le"), 3),
        "clip of pcm, avi": lambda: Sound(movie("avi", "mpeg4", sound="pcm_s16le"), 3),
        "default language second": lambda: Sound(
            several("matroska", [{"codec": "flac", "rate": 16_000, "seconds": s} for s in (1, 2)], default=1), 2
        ),
        "default language first": lambda: Sound(
            several("matroska", [{"codec": "flac", "rate": 16_000, "seconds": s} for s in (1, 2)], default=0), 1
        ),
        "amr": lambda: Sound(track(tone(rate=8000), "amr", "libopencore_amrnb", 8000, bit_rate=12_200), 3.22),
        "ac3": lambda: Sound(track(tone(), "ac3", "ac3"), 92 * 1536 / RATE),
        "wavpack": lambda: Sound(track(tone(), "wv", "wavpack"), whole),
        "tta": lambda: Sound(track(tone(), "tta", "tta"), whole),
        "wma": lambda: Sound(track(tone(), "asf", "wmav2", bit_rate=64_000), 68 * 2048 / RATE),
        "real audio": lambda: Sound(track(tone(rate=8000), "rm", "real_144", 8000), 3.22),
        "nut": lambda: Sound(track(tone(), "nut", "aac"), refused=NOT_READ, ffmpeg="reads its own format"),
        "playlist": lambda: Sound(
            b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n/etc/hostname\n#EXT-X-ENDLIST\n",
            refused="cannot be decoded",
        ),
    }
    for size in (0, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF):
        riff = min(size + 36, 0xFFFFFFFF) if size else 0
        cases[f"wav of size {size:#x}"] = lambda s=size, r=riff: Sound(_wave(s, r), whole)
    for codec in ("pcm_s16le", "pcm_s24le", "pcm_f32le", "pcm_s16be", "pcm_mulaw", "pcm_u8", "alac"):
        cases[f"mov of {codec}"] = lambda c=codec: Sound(track(tone(), "mov", c), whole)
    return cases


# --- clips ------------------------------------------------------------------------------------------------------------

COVER = {"codec": "mjpeg", "size": (320, 320), "pixels": "yuvj420p", "numbers": [255]}
COVER["disposition"] = int(av.stream.Disposition.attached_pic)
MAIN: dict[str, Any] = {"codec": "libx264", "size": SIZE, "numbers": range(FRAMES)}
OPEN_GOP = {"x264-params": "open-gop=1:bframes=3:keyint=20:min-keyint=20:scenecut=0"}
LARGE = (320, 240)
UNEVEN = [0, 1, 2, 5, 9, 10, 30, 31, 32, 33, 34, 35, 60, 61, 62, 63, 90, 91, 92, 93, 94, 95, 96, 97, 98, 99, 100, 130]


def by_ffmpeg(data: bytes, suffix: str, *arguments: str) -> bytes:
    """What the ffmpeg of the command line makes of a clip. Raises FileNotFoundError where there is none."""
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder, "source"), Path(folder, f"made.{suffix}")
        source.write_bytes(data)
        command = ["ffmpeg", "-v", "error", "-i", str(source), *arguments, str(made)]
        subprocess.run(command, check=True, capture_output=True, timeout=600)
        return made.read_bytes()


def _packed(data: bytes) -> bytes:
    """An avi of MPEG-4 with single B-frames as DivX stores them: two frames in one chunk, then an empty one."""
    with av.open(io.BytesIO(data)) as source:
        chunks = [bytes(packet) for packet in source.demux(video=0) if packet.size]
    sign = b"\0\0\1\xb2DivX503b1393p\0"
    vop = b"\0\0\1\xb6"
    chunks[0] = chunks[0].replace(vop, sign + vop, 1)
    stored, at = [], 0
    while at < len(chunks):
        following = chunks[at + 1] if at + 1 < len(chunks) else b""
        is_b = following[:4] == vop and following[4] >> 6 == 2
        stored.append(chunks[at] + following if is_b else chunks[at])
        if is_b:
            stored.append(vop + b"\x40\x7f")  # "not coded"
        at += 2 if is_b else 1

    def fill(out: Any) -> None:
        stream = out.add_stream("mpeg4", rate=FRAME_RATE)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        for number, chunk in enumerate(stored):
            packet = av.Packet(chunk)
            packet.pts = packet.dts = number
            packet.time_base, packet.stream = Fraction(1, FRAME_RATE), stream
            packet.is_keyframe = number == 0
            out.mux(packet)

    return _muxed("avi", None, fill, piped=False)


def _trimmed(data: bytes, frames: int) -> bytes:
    """An mp4 whose edit list begins so many frames later, which need not be a keyframe."""
    at = data.index(b"elst") + 12
    duration, media_time = struct.unpack_from(">Ii", data, at)
    ticks = frames * 512  # of 1 / 12800 s, x264's; the movie's are milliseconds
    return patched(patched(data, at, ">I", duration - frames * 40), at + 4, ">i", media_time + ticks)


def clips() -> dict[str, Callable[[], Clip]]:
    """Every clip by its name; made when asked for."""
    everything = list(range(FRAMES))

    def whole(form: str, codec: str, **options: Any) -> Callable[[], Clip]:
        numbers = options.get("numbers", range(FRAMES))
        return lambda: Clip(movie(form, codec, **options), list(numbers), options.get("ticks"))

    short = {"numbers": range(20)}
    anchored = {"g": "12", "bf": "2"}
    cases: dict[str, Callable[[], Clip]] = {
        "mp4": whole("mp4", "libx264", g="12"),
        "mp4, open groups": whole("mp4", "libx264", **OPEN_GOP),
        "mp4 of mpeg4": whole("mp4", "mpeg4", **anchored),
        "mp4 of hevc, open groups": whole(
            "mp4", "libx265", **{"x265-params": "keyint=20:open-gop=1:bframes=4:log-level=none"}
        ),
        "mp4, uneven": whole("mp4", "libx264", numbers=range(len(UNEVEN)), ticks=UNEVEN, g="8"),
        "mp4, trimmed by an edit list": lambda: Clip(
            _trimmed(movie("mp4", "libx264", g="25", bf="2"), 33), everything[33:]
        ),
        "mp4 in fragments": whole("mp4", "libx264", g="12", mux={"movflags": "frag_keyframe+empty_moov"}),
        "mp4 in fragments, the first in its header": whole("mp4", "libx264", g="12", mux={"movflags": "frag_keyframe"}),
        "mp4 in fragments from a pipe": whole(
            "mp4", "libx264", g="12", sound="aac", piped=True, mux={"movflags": "frag_keyframe+empty_moov"}
        ),
        "mp4, one frame a fragment": whole("mp4", "libx264", g="12", mux={"movflags": "frag_every_frame+empty_moov"}),
        "mp4, late, with sound": whole("mp4", "libx264", g="12", sound="aac", start=20),
        "mp4 that calls every frame a keyframe": lambda: Clip(
            movie("mp4", "libx264", g="25").replace(b"stss", b"free"), everything
        ),
        "mp4 whose header tells ten times as long": lambda: Clip(
            patched(data := movie("mp4", "libx264", g="12"), data.index(b"mdhd") + 20, ">I", 384_000), everything
        ),
        "mp4, cut": lambda: Clip(
            movie("mp4", "libx264", mux={"movflags": "faststart"})[:-2000], [], refused="cut off: its header promises"
        ),
        "mp4 whose table reaches beyond the end": lambda: Clip(
            patched(data := movie("mp4", "libx264"), data.index(b"stco") + 12, ">I", 1 << 24),
            [],
            refused="its index reaches",
        ),
        "mp4, two files joined": lambda: Clip(
            movie("mp4", "libx264", g="12") * 2, [], refused="joined together", ffmpeg="reads the first alone"
        ),
        "mp4, cover first": lambda: Clip(several("mp4", [COVER, MAIN], default=1), everything),
        "mkv, cover first": lambda: Clip(several("matroska", [COVER, MAIN], default=1), everything),
        "m4a with a cover": lambda: Clip(
            several("mp4", [{"codec": "aac", "rate": RATE, "seconds": 1}, COVER], default=0),
            [],
            refused="no video track but a cover",
            ffmpeg="takes the cover",
        ),
        "mkv, default clip second": lambda: Clip(
            several("matroska", [MAIN | {"size": (128, 96), "numbers": range(100, 120)}, MAIN], default=1), everything
        ),
        "mkv, default clip first": lambda: Clip(
            several("matroska", [MAIN, MAIN | {"size": (128, 96), "numbers": range(100, 120)}], default=0), everything
        ),
        "ts, larger clip second": lambda: Clip(
            several("mpegts", [MAIN | {"size": (32, 32), "numbers": range(100, 120)}, MAIN], default=0), everything
        ),
        "mov with a time code": lambda: Clip(
            by_ffmpeg(movie("mp4", "libx264", g="12"), "mov", "-timecode", "01:00:00:00", "-c", "copy"), everything
        ),
        "mov of prores": whole("mov", "prores", pixels="yuv422p10le", **short),
        "mov of mjpeg": whole("mov", "mjpeg", pixels="yuvj420p"),
        "mov of svq1": whole("mov", "svq1", pixels="yuv410p", g="12"),
        "mov of qtrle": whole("mov", "qtrle", pixels="rgb24", g="12"),
        "mov of rpza": whole("mov", "rpza", pixels="rgb555le", g="6", **short),
        "3gp": whole("3gp", "h263", size=(176, 144), sound="aac", g="12"),
        "ts": whole("mpegts", "libx264", g="12"),
        "ts, open groups": whole("mpegts", "libx264", **OPEN_GOP),
        "ts, intra refresh": whole("mpegts", "libx264", **{"x264-params": "intra-refresh=1:keyint=30"}),
        "ts, large, with sound": whole(
            "mpegts", "libx264", numbers=range(250), size=LARGE, sound="aac", g="50", preset="ultrafast"
        ),
        "ts of mpeg2": whole("mpegts", "mpeg2video", **anchored),
        "ts of mpeg2, large, with sound": whole(
            "mpegts", "mpeg2video", numbers=range(250), size=LARGE, sound="mp2", g="50", bf="2"
        ),
        "ts of mpeg4": whole("mpegts", "mpeg4", **anchored),
        "ts of hevc, open groups": whole("mpegts", "libx265", **{"x265-params": "keyint=20:open-gop=1:log-level=none"}),
        "ts, late": whole("mpegts", "libx264", g="12", start=50),
        "ts, uneven": whole("mpegts", "libx264", numbers=range(len(UNEVEN)), ticks=UNEVEN, g="8"),
        "ts that begins anywhere": lambda: Clip(movie("mpegts", "libx264", **OPEN_GOP)[188 * 40 :], everything[20:]),
        "ts, two recordings joined": lambda: Clip(
            movie("mpegts", "libx264", range(40), g="12") + movie("mpegts", "libx264", range(100, 140), g="12"),
            [*range(40), *range(100, 140)],
        ),
        "ts of mpeg2, two recordings joined": lambda: Clip(
            movie("mpegts", "mpeg2video", range(40), **anchored)
            + movie("mpegts", "mpeg2video", range(100, 140), **anchored),
            [*range(40), *range(100, 140)],
        ),
        "ts, cut within a packet": lambda: Clip(movie("mpegts", "libx264")[:-1000], [], refused="cut off"),
        "m2ts": lambda: Clip(by_ffmpeg(movie("mp4", "libx264", g="12"), "m2ts", "-c", "copy"), everything),
        "mpg": whole("mpeg", "mpeg1video", sound="mp2", **anchored),
        "mpg, large": whole("mpeg", "mpeg1video", numbers=range(250), size=LARGE, sound="mp2", g="25", bf="2"),
        "mpg, two recordings joined": lambda: Clip(
            movie("mpeg", "mpeg1video", range(40), **anchored)
            + movie("mpeg", "mpeg1video", range(100, 140), **anchored),
            [*range(40), *range(100, 140)],
        ),
        "mpg, cut": lambda: Clip(movie("mpeg", "mpeg1video", sound="mp2")[:-1000], [], refused="cut off"),
        "vob": whole("vob", "mpeg2video", sound="ac3", **anchored),
        "flv": whole("flv", "flv", sound="libmp3lame", g="12"),
        "flv of h264": whole("flv", "libx264", sound="aac", g="12"),
        "flv from a pipe": whole("flv", "flv", sound="libmp3lame", g="12", piped=True),
        "flv of a screen": whole("flv", "flashsv", pixels="bgr24", g="12"),
        "flv, uneven": whole("flv", "flv", numbers=range(len(UNEVEN)), ticks=UNEVEN, g="8"),
        "flv, cut": lambda: Clip(movie("flv", "flv", sound="libmp3lame")[:-1000], [], refused="cut off"),
        "flv, two files joined": lambda: Clip(
            movie("flv", "flv") * 2, [], refused="joined together", ffmpeg="reads the first alone"
        ),
        "wmv": whole("asf", "wmv2", sound="wmav2", g="12"),
        "wmv of wmv1": whole("asf", "wmv1", g="12"),
        "wmv of h264": whole("asf", "libx264", sound="aac", g="12"),
        "wmv from a pipe": whole("asf", "wmv2", sound="wmav2", g="12", piped=True),
        "wmv, cut": lambda: Clip(movie("asf", "wmv2", sound="wmav2")[:-5000], [], refused="cut off"),
        "wmv, cut, from a pipe": lambda: Clip(
            movie("asf", "wmv2", sound="wmav2", piped=True)[:-5000], [], refused="cut off"
        ),
        "avi": lambda: Clip(movie("avi", "mpeg4", sound="libmp3lame", g="12"), everything, [0, *range(2, FRAMES + 1)]),
        "avi, b-frames": whole("avi", "mpeg4", **anchored),
        "avi, packed b-frames": lambda: Clip(
            _packed(movie("avi", "mpeg4", range(74), g="300", bf="1")), everything[:74]
        ),
        "avi of h264, b-frames": whole("avi", "libx264", **anchored),
        "avi from a pipe": whole("avi", "mpeg4", g="12", piped=True),
        "avi of mjpeg": whole("avi", "mjpeg", pixels="yuvj420p", sound="pcm_s16le"),
        "avi, not coded": whole("avi", "rawvideo", pixels="bgr24", **short),
        "avi of cinepak": whole("avi", "cinepak", pixels="rgb24", g="6", **short),
        "avi of video 1": whole("avi", "msvideo1", pixels="rgb555le", g="6", **short),
        "avi of a screen": whole("avi", "zmbv", pixels="bgr0", g="12"),
        "avi of dv": whole("avi", "dvvideo", size=(720, 576), **short),
        "avi, two files joined": lambda: Clip(
            movie("avi", "mpeg4", range(40), g="12") + movie("avi", "mpeg4", range(100, 140), g="12"),
            [*range(40), *range(100, 140)],
        ),
        "avi, cut": lambda: Clip(movie("avi", "mpeg4")[:-3000], [], refused="cut off"),
        "mkv, b-frames": whole("matroska", "mpeg4", **anchored),
        "mkv of mpeg2": whole("matroska", "mpeg2video", **anchored),
        "mkv of ffv1": whole("matroska", "ffv1", g="6", **short),
        "mkv of hevc, open groups": whole(
            "matroska", "libx265", **{"x265-params": "keyint=20:open-gop=1:log-level=none"}
        ),
        "mkv, late": whole("matroska", "libx264", g="12", start=50),
        "mkv, uneven": whole("matroska", "libx264", numbers=range(len(UNEVEN)), ticks=UNEVEN, g="8"),
        "mkv whose header tells ten times as long": lambda: Clip(
            patched(data := movie("matroska", "libx264", g="12"), data.index(b"\x44\x89\x88") + 3, ">d", 30_000.0),
            everything,
        ),
        "mkv, cut": lambda: Clip(movie("matroska", "libx264")[:-1000], [], refused="cut off"),
        "webm of vp8, hidden frames": whole(
            "webm",
            "libvpx",
            g="20",
            **{"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good", "cpu-used": "5"},
        ),
        "webm of vp9, hidden frames": whole(
            "webm",
            "libvpx-vp9",
            g="20",
            **{"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good", "cpu-used": "5"},
        ),
        "webm from a pipe": whole("webm", "libvpx", g="20", piped=True, deadline="realtime"),
        "ivf": whole("ivf", "libvpx", g="20", deadline="realtime"),
        "ivf, cut": lambda: Clip(movie("ivf", "libvpx", deadline="realtime")[:-5], [], refused="cut off"),
        "mxf": whole("mxf", "mpeg2video", **anchored),
        "mxf, cut": lambda: Clip(movie("mxf", "mpeg2video")[:-2000], [], refused="cut off"),
        "real video": whole("rm", "rv20", size=(176, 144), g="12"),
        "dv": whole("dv", "dvvideo", size=(720, 576), **short),
        "gif": whole("gif", "gif", pixels="rgb8", rate=10, **short),
        "gif, cut": lambda: Clip(movie("gif", "gif", range(20), pixels="rgb8", rate=10)[:-300], [], refused="cut off"),
        "apng": whole("apng", "apng", pixels="rgb24", rate=10, **short),
        "apng, cut": lambda: Clip(
            movie("apng", "apng", range(20), pixels="rgb24", rate=10)[:-300], [], refused="cut off"
        ),
        "webp": lambda: Clip(
            movie("webp", "libwebp_anim", range(20), pixels="bgra", lossless="1"),
            [],
            refused=NOT_READ,
        ),
        "bare h264": lambda: Clip(movie("h264", "libx264"), [], refused=NOT_READ, ffmpeg="reads it, cut or not"),
        "nut": lambda: Clip(movie("nut", "libx264"), [], refused=NOT_READ, ffmpeg="reads its own format"),
        "playlist": lambda: Clip(b"ffconcat version 1.0\nfile 'v.mp4'\n", [], refused=NOT_READ),
    }
    return cases


# --- what the ffmpeg of the command line says -------------------------------------------------------------------------


def _ffmpeg(data: bytes, *arguments: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "medium")
        path.write_bytes(data)
        command = ["ffmpeg", "-v", "quiet", "-i", str(path), *arguments, "-"]
        return subprocess.run(command, capture_output=True, timeout=600, check=False).stdout


def seconds_by_ffmpeg(data: bytes) -> float:
    """How long the sound is that ffmpeg decodes; 0 where it decodes none."""
    wave = _ffmpeg(data, "-vn", "-f", "wav", "-c:a", "pcm_f32le")
    if b"data" not in wave:
        return 0.0
    channels, rate = struct.unpack_from("<HI", wave, wave.index(b"fmt ") + 10)
    return (len(wave) - wave.index(b"data") - 8) // (4 * channels) / float(rate)


def frames_by_ffmpeg(data: bytes) -> list[np.ndarray]:
    """All frames that ffmpeg shows, uint8 [H, W, 3]."""
    stream = _ffmpeg(data, "-an", "-fps_mode", "passthrough", "-pix_fmt", "rgb24", "-c:v", "ppm", "-f", "image2pipe")
    frames, at = [], 0
    while at < len(stream):
        _, size, _, *_ = stream[at : at + 32].split(b"\n", 3)
        width, height = map(int, size.split())
        at = stream.index(b"\n255\n", at) + 5
        frames.append(np.frombuffer(stream, np.uint8, width * height * 3, at).reshape(height, width, 3))
        at += width * height * 3
    return frames
