"""Small intact media of every kind that an atlas holds, and seeded ways to damage them (used by fault_campaign.py).

`make_media` encodes one medium a kind. `damaged` gives any number of damaged ones, the same for the same seed: flipped
bits, cuts, another container under the name, headers that claim the absurd (`fault_headers`), joined files, garbage in
front, random bytes, pickles that run code. Each says which intact content it may still show, if any.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import av
import numpy as np
import PIL.Image
import safetensors.torch
import soundfile
import torch

import fault_headers

SIZE = (272, 144)
FRAMES, FRAME_RATE, RATE = 20, 10, 16_000
FIELDS = {"wav": "audios", "flac": "audios", "mp3": "audios", "ogg": "audios", "m4a": "audios", "opus": "audios"}
FIELDS |= {"mp4": "videos", "mkv": "videos", "vp8": "videos", "vp9": "videos", "png": "images", "jpg": "images"}
FIELDS |= {"pt": "ext_audio_feats", "safetensors": "ext_video_feats"}
SUFFIX = {"opus": "webm", "vp8": "webm", "vp9": "webm"}
# What carries a checksum of its content: served although altered is a fault of the reader. (The CRC of a page of ogg is
# checked by the decoder; torch checks those of a zip; h264, vp8, vp9, aac, opus, mp3, jpg and wav carry none.)
CHECKSUMMED = ("flac", "ogg", "png", "pt")
CHAINED = ("mp3", "ogg")  # several files, one behind the other, are served so
FLIPS = {"flip 1": 1, "flip 10": 10, "flip 1000": 1000}
_CYCLE = (
    *("flip 1", "cut", "header", "flip 10", "random", "joined", "prefix", "flip 1000", "container", "empty"),
    *("header", "cut", "flip 1", "header", "flip 10", "cut", "header", "flip 1", "prefix"),
)


class Damaged(NamedTuple):
    """A medium named as a `kind`; `may_show` are the kinds of intact content that it still holds in full."""

    number: int
    kind: str
    corruption: str
    data: bytes
    may_show: tuple[str, ...]

    @property
    def may_alter(self) -> bool:
        """Whether no reader could tell: bits flipped in coded data that carries no checksum, another unit of time."""
        return self.corruption == "times" or (self.corruption in FLIPS and self.kind not in CHECKSUMMED)


def make_media() -> dict[str, bytes]:
    """One intact medium of each kind."""
    rng = np.random.default_rng(0)
    sound_T = (0.3 * np.sin(np.arange(RATE) / 9) + rng.normal(0, 0.05, RATE)).astype(np.float32)
    sounds = {"wav": ("WAV", "PCM_16"), "flac": ("FLAC", "PCM_16"), "mp3": ("MP3", None), "ogg": ("OGG", "VORBIS")}
    media = {kind: _sound(sound_T, *form) for kind, form in sounds.items()}
    media |= {"m4a": _track(sound_T, "ipod", "aac"), "opus": _track(sound_T, "webm", "libopus")}
    frames = [_picture(rng, i) for i in range(FRAMES)]
    media["mp4"] = _clip(frames, "mp4", "libx264", g="8", bf="2")
    media["mkv"] = _clip(frames, "matroska", "libx264", g="8", bf="2")
    media["vp8"] = _clip(frames, "webm", "libvpx", g="8", deadline="realtime")
    media["vp9"] = _clip(frames, "webm", "libvpx-vp9", g="8", deadline="realtime")
    for kind, form in (("png", "PNG"), ("jpg", "JPEG")):
        file = io.BytesIO()
        PIL.Image.fromarray(frames[0]).save(file, form)
        media[kind] = file.getvalue()
    file = io.BytesIO()
    torch.manual_seed(0)
    tensors = {"pose": torch.rand(7, 3), "audio": torch.rand(40, 25)}
    torch.save(tensors, file)
    return media | {"pt": file.getvalue(), "safetensors": safetensors.torch.save(tensors)}


def _sound(sound_T: np.ndarray, form: str, subtype: str | None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, sound_T, RATE, format=form, subtype=subtype)
    return file.getvalue()


def _track(sound_T: np.ndarray, form: str, codec: str) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=form) as out:
        stream: Any = out.add_stream(codec, rate=48_000, layout="mono")
        resampler = av.AudioResampler(stream.codec_context.format or "fltp", "mono", 48_000, frame_size=960)
        frame = av.AudioFrame.from_ndarray(sound_T[None], "fltp", "mono")
        frame.rate, frame.pts, frame.time_base = RATE, 0, Fraction(1, RATE)
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            out.mux(stream.encode(piece))
        out.mux(stream.encode())
    return file.getvalue()


def _picture(rng: np.random.Generator, number: int) -> np.ndarray:
    width, height = SIZE
    rows, columns = np.mgrid[:height, :width]
    base = np.stack([rows + 5 * number, columns - 7 * number, rows * columns // 50 + 9 * number], axis=-1) % 200
    return np.asarray(base + rng.integers(0, 40, (height, width, 1)), np.uint8)


def _clip(frames: list[np.ndarray], form: str, codec: str, **options: str) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=form) as out:
        stream: Any = out.add_stream(codec, rate=FRAME_RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        stream.bit_rate = 300_000
        for pixels in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode())
    return file.getvalue()


def damaged(media: dict[str, bytes], count: int, seed: int) -> Iterator[Damaged]:
    """`count` damaged media, the kinds in turn."""
    kinds, met = list(media), dict.fromkeys(media, 0)
    for number in range(count):
        kind, corruption = kinds[number % len(kinds)], _CYCLE[number // len(kinds) % len(_CYCLE)]
        rng = random.Random(f"{seed}/{number}")
        turn = met[kind]
        if corruption == "header":
            met[kind] += 1
            if kind == "pt" and turn % 2 == 0:
                code = fault_headers.code_pickles()
                yield Damaged(number, kind, "code", code[turn // 2 % len(code)], ())
                continue
            patches = fault_headers.PATCHES[kind]
            corruption = "times" if patches[turn % len(patches)] is fault_headers.RETIMED else corruption
        data, may_show = _damage(media, kind, corruption, turn, rng)
        yield Damaged(number, kind, corruption, data, may_show)


def _damage(
    media: dict[str, bytes], kind: str, corruption: str, turn: int, rng: random.Random
) -> tuple[bytes, tuple[str, ...]]:
    data = media[kind]
    if corruption in FLIPS:
        return flip(data, FLIPS[corruption], rng), (kind,)
    if corruption == "container":
        other = rng.choice([name for name in media if name != kind])
        return media[other], (other,)  # the content decides, not the name: the other medium may be served as it is
    if corruption == "joined":
        other = rng.choice([kind, *media])
        twice = (f"{kind} twice",) if other == kind and kind in CHAINED else ()
        return data + media[other], (kind, *twice)
    if corruption in ("header", "times"):
        patches = fault_headers.PATCHES[kind]
        return patches[turn % len(patches)](data), (kind,)
    simple: dict[str, Callable[[], bytes]] = {
        "empty": lambda: b"",
        "cut": lambda: data[: rng.randrange(1, len(data))],
        "random": lambda: rng.randbytes(rng.randrange(1, 20_000)),
        "prefix": lambda: rng.randbytes(rng.choice((1, 7, 128, 4096))) + data,
    }
    return simple[corruption](), (kind,)


def flip(data: bytes, bits: int, rng: random.Random) -> bytes:
    """`data` with that many different bits flipped (at most a half)."""
    changed = bytearray(data)
    for at in rng.sample(range(8 * len(data)), min(bits, 4 * len(data))):
        changed[at // 8] ^= 1 << at % 8
    return bytes(changed)
