"""What is true of one medium: its length, rate, size, shape, and whether all of it decodes.

`probe` reads a medium in one pass and returns `Facts`, or raises the MediaError with which training would refuse it. By
default every frame and sample is decoded, so that a file that is cut off or corrupt anywhere is found; `quick` reads
headers alone, which finds what is missing, empty or of another kind, and no more. Nothing decoded is kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import av
import msgspec
import numpy as np
import soundfile

from hba.atlas import media
from hba.atlas.frames import Clip, Timeline, TimesError, every_frame, open_clip, timeline_of
from hba.atlas.sample import Field
from hba.atlas.slices import Source, opened
from hba.atlas.source import (
    DEFAULT_LIMITS,
    RESTORE,
    Limits,
    check_source,
    open_container,
    require_audible,
    sound_track,
)
from hba.errors import MediaError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

VISUAL_PARTS = ("pose", "face", "left_hand", "right_hand")
_BLOCK_BYTES = 1 << 20
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
    digest = hashlib.sha256()
    if isinstance(source, bytes):
        digest.update(source)
    else:
        try:
            for block in _blocks(source, where):
                digest.update(block)
        except OSError as error:
            raise MediaError(f"cannot be read ({error.strerror})", where=where, fix=RESTORE) from None
    return digest.hexdigest()


def _blocks(source: Any, where: str) -> Iterator[bytes]:
    with opened(source, where=where) as file:
        while block := file.read(_BLOCK_BYTES):
            yield block


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
    facts: Facts | None = None
    while facts is None:
        with open_clip(source, where=where, limits=limits) as clip:
            try:
                facts = _decoded(clip, timeline, header)
            except TimesError:
                timeline = timeline.shown_at()
    return facts


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
