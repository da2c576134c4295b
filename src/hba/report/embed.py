"""Media as data: URIs that a browser plays from inside the page.

Audio becomes 16-bit PCM wav at 16 kHz (browsers do not play ADPCM and other legacy wav), images JPEG. A video that
browsers play as it is (H.264 4:2:0 in mp4, VP8/VP9/AV1 in webm) and that is small passes through; any other becomes an
H.264 mp4 of its first seconds without sound. What is cut says so. A `Budget` bounds the bytes of a page: a medium that
does not fit is named instead of embedded. Encoders run on one thread, so that the same medium gives the same bytes.
"""

from __future__ import annotations

import base64
import io
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal, NamedTuple

import av
import numpy as np
from PIL import Image

from hba.atlas import media
from hba.atlas.sample import Field, Sample
from hba.atlas.source import check_source, head, open_container, video_track
from hba.atlas.video import read_frames
from hba.errors import MediaError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame

MAX_PAGE_BYTES = 8 << 20
MAX_MEDIUM_BYTES = 2 << 20
MAX_AUDIO_SECONDS = 20.0
MAX_VIDEO_SECONDS = 12.0
VIDEO_HEIGHT_PIXELS = 288
VIDEO_FRAMES_PER_SECOND = 15.0
IMAGE_PIXELS = 480
PIXEL_FORMATS = ("yuv420p", "yuvj420p")
PLAYABLE: dict[str, tuple[frozenset[str], frozenset[str]]] = {  # mime: video codecs, audio codecs
    "video/mp4": (frozenset({"h264"}), frozenset({"aac", "mp3"})),
    "video/webm": (frozenset({"vp8", "vp9", "av1"}), frozenset({"opus", "vorbis"})),
}
Kind = Literal["audio", "video", "image"]
FIELDS: tuple[tuple[Kind, Field], ...] = (("video", "videos"), ("audio", "audios"), ("image", "images"))


@dataclass(frozen=True, kw_only=True)
class Medium:
    """One medium of a card. `uri` is a data: URI, None when the medium is not embedded; `note` says how or why not."""

    kind: Kind
    uri: str | None
    note: str


class Encoded(NamedTuple):
    """Bytes that a browser plays, with what a reader should know about them."""

    mime: str
    data: bytes
    note: str


class Budget:
    """How many more bytes a page may take; counts them as they stand in the page, in base64."""

    def __init__(self, total_bytes: int = MAX_PAGE_BYTES, medium_bytes: int = MAX_MEDIUM_BYTES) -> None:
        self.left_bytes, self.medium_bytes = total_bytes, medium_bytes

    def take(self, encoded: Encoded) -> str | None:
        """The data: URI, or None when it does not fit any more."""
        length = 4 * -(-len(encoded.data) // 3)
        if length > self.left_bytes or length > self.medium_bytes:
            return None
        self.left_bytes -= length
        return f"data:{encoded.mime};base64,{base64.b64encode(encoded.data).decode()}"


def embed_media(sample: Sample, budget: Budget) -> tuple[Medium, ...]:
    """Every video, audio and image of a sample. One that cannot be read or does not fit has a note and no URI."""
    return tuple(
        _embed(sample, kind, name, index, budget) for kind, name in FIELDS for index in range(getattr(sample, name))
    )


def _embed(sample: Sample, kind: Kind, name: Field, index: int, budget: Budget) -> Medium:
    try:
        with sample.blamed(name):
            encoded = _encode(sample, kind, name, index, budget)
    except MediaError as error:
        return Medium(kind=kind, uri=None, note=f"cannot be shown: {error.what}")
    uri = budget.take(encoded)
    if uri is None:
        size = f"{len(encoded.data) / (1 << 20):.1f} MB"
        return Medium(kind=kind, uri=None, note=f"not embedded ({size}): the page holds a limited number of bytes")
    return Medium(kind=kind, uri=uri, note=encoded.note)


def _encode(sample: Sample, kind: Kind, name: Field, index: int, budget: Budget) -> Encoded:
    where = sample.place(name)
    source = sample.source.medium(sample.number, name, index, where=where)
    if kind == "audio":
        return encode_audio(media.load_audio(source, where=where, limits=media.DEFAULT_LIMITS))
    if kind == "image":
        return encode_image(media.load_image(source, where=where, limits=media.DEFAULT_LIMITS))
    return encode_video(source, where=where, max_bytes=budget.medium_bytes * 3 // 4)


def encode_audio(audio: media.Audio) -> Encoded:
    """16-bit PCM wav of at most MAX_AUDIO_SECONDS seconds."""
    kept = audio.samples[: int(MAX_AUDIO_SECONDS * audio.sample_rate)]
    pcm = np.round(np.clip(kept, -1.0, 1.0) * 32767).astype("<i2")
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as handle:
        handle.setnchannels(1)
        handle.setsampwidth(2)
        handle.setframerate(audio.sample_rate)
        handle.writeframes(pcm.tobytes())
    return Encoded(
        "audio/wav", buffer.getvalue(), _length_note(len(audio.samples) / audio.sample_rate, MAX_AUDIO_SECONDS)
    )


def encode_image(image: media.Image) -> Encoded:
    """JPEG of at most IMAGE_PIXELS pixels a side."""
    picture = Image.fromarray(image)
    picture.thumbnail((IMAGE_PIXELS, IMAGE_PIXELS))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82)
    return Encoded("image/jpeg", buffer.getvalue(), f"{image.shape[1]}×{image.shape[0]} pixels")


def _length_note(seconds: float, limit: float) -> str:
    return f"{seconds:.1f} s" if seconds <= limit else f"first {limit:.0f} s of {seconds:.0f} s"


def encode_video(source: media.Source, *, where: str, max_bytes: int) -> Encoded:
    """The video itself if browsers play it and it is at most `max_bytes`, else an H.264 excerpt without sound.

    Raises MediaError when it cannot be decoded.
    """
    with open_container(source, where=where) as container:
        stream = video_track(container, where)
        seconds = _seconds(container)
        mime = _playable_as(container, head(source, 64, where=where))
        size = check_source(source, where=where, limits=media.DEFAULT_LIMITS)
        if mime is not None and size <= max_bytes:
            # A header alone can look sound in a file that is cut off.
            if next(container.decode(stream), None) is None:
                raise MediaError("the video has no frame", where=where, fix="Replace the file.")
            return Encoded(mime, head(source, size, where=where), f"{seconds:.1f} s" if seconds else "length unknown")
        note = _excerpt_note(container, seconds)
    return Encoded("video/mp4", _encode_h264(_excerpt(source, where)), note)


def _seconds(container: InputContainer) -> float:
    return float(container.duration / av.time_base) if container.duration else 0.0


def _excerpt_note(container: InputContainer, seconds: float) -> str:
    silent = ", picture only" if container.streams.audio else ""
    return f"{_length_note(seconds, MAX_VIDEO_SECONDS)}, re-encoded for the page{silent}"


def _playable_as(container: InputContainer, first_bytes: bytes) -> str | None:
    webm = b"webm" in first_bytes
    mp4 = "mp4" in container.format.name and container.metadata.get("major_brand", "").strip() != "qt"
    mime = "video/webm" if webm else "video/mp4" if mp4 else None
    if mime is None:
        return None
    video_codecs, audio_codecs = PLAYABLE[mime]
    video_plays = all(
        stream.codec_context.codec.canonical_name in video_codecs and stream.codec_context.pix_fmt in PIXEL_FORMATS
        for stream in container.streams.video
    )
    audio_plays = all(stream.codec_context.codec.canonical_name in audio_codecs for stream in container.streams.audio)
    return mime if video_plays and audio_plays else None


def _excerpt(source: media.Source, where: str) -> list[VideoFrame]:
    """Frames of the first MAX_VIDEO_SECONDS, thinned in time, upright and made small; their pts are milliseconds."""
    frames: list[VideoFrame] = []
    for seconds, pixels in read_frames(source, where=where, frames_per_second=VIDEO_FRAMES_PER_SECOND):
        if seconds > MAX_VIDEO_SECONDS:
            break
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        scale = min(1.0, VIDEO_HEIGHT_PIXELS / frame.height)
        width, height = (max(2, round(side * scale / 2) * 2) for side in (frame.width, frame.height))
        small = frame.reformat(width=width, height=height, format="yuv420p")
        small.pts, small.time_base = round(seconds * 1000), Fraction(1, 1000)
        frames.append(small)
    if not frames:
        raise MediaError("the video has no frame", where=where, fix="Replace the file.")
    return frames


def _encode_h264(frames: Sequence[VideoFrame]) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        # x264's macroblock tree reads memory that nobody wrote: with it, one in four runs differs in a few bits.
        options = {"crf": "27", "x264-params": "mbtree=0"}
        stream = out.add_stream("libx264", rate=int(VIDEO_FRAMES_PER_SECOND), options=options)
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        stream.codec_context.thread_count = 1
        for frame in frames:
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return buffer.getvalue()
