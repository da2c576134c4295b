"""N evenly spaced frames of a clip, by seeking, exact to the frame.

The clip is cut into N equal segments; the frame served for each is the one on screen at the segment's centre: the last
whose presentation time is not after it (see `frames`). A clip with fewer frames than N serves some of them more than
once. The frames are those of a full decode, pixel for pixel, turned upright where the clip says so. A clip that is cut
off, or whose frames on the way to a target are damaged, is refused with a MediaError; nothing is filled in.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import av
import av.error
import numpy as np
import numpy.typing as npt

from hba.atlas.frames import DamagedError, decode_at, decode_keyframes, decode_through
from hba.atlas.slices import Source
from hba.atlas.source import (
    DEFAULT_LIMITS,
    RESTORE,
    Limits,
    check_reaches_end,
    check_source,
    open_container,
    video_track,
)
from hba.errors import InputError, MediaError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

Frames: TypeAlias = Literal["exact", "nearest_keyframe"]
"""which frame stands for a time: the one on screen, or the keyframe nearest to it, which is faster"""


@dataclass(frozen=True)
class Video:
    """`frames`: uint8 [N, H, W, 3] RGB; `timestamps_seconds`: float64 [N], when each frame is shown in the clip."""

    frames: npt.NDArray[np.uint8]
    timestamps_seconds: npt.NDArray[np.float64]
    duration_seconds: float

    @property
    def rate_hz(self) -> float:
        """Frames a second, as they are spread over the clip."""
        return len(self.frames) / self.duration_seconds


class _Span(NamedTuple):
    """Extent of the video track, in ticks of `base` seconds."""

    start: int
    length: int
    base: Fraction


def load_video(
    source: Source, num_frames: int, *, where: str, limits: Limits = DEFAULT_LIMITS, frames: Frames = "exact"
) -> Video:
    """Decode `num_frames` evenly spaced frames of the first video track, or the keyframes nearest to them.

    Raises MediaError naming `where` when the source is empty, cut off, corrupt, without video or beyond `limits`;
    InputError when `num_frames` is not positive.
    """
    if num_frames < 1:
        raise InputError(f"num_frames is {num_frames}", where=where, fix="Ask for at least one frame.")
    size = check_source(source, where=where, limits=limits)
    with open_container(source, where=where, limits=limits) as container:
        stream = _stream(container, where, limits)
        span = _span(container, stream, size, where, limits)
        targets = [span.start + (2 * i + 1) * span.length // (2 * num_frames) for i in range(num_frames)]
        decode = decode_at if frames == "exact" else decode_keyframes
        try:
            shown = decode(container, stream, targets, where=where, limits=limits)
        except DamagedError:
            shown = None
    if shown is None:
        # Some containers mark keyframes that are none (intra refresh): only a decode from the start is exact there.
        with open_container(source, where=where, limits=limits) as container:
            stream = _stream(container, where, limits)
            shown = decode_through(container, stream, targets, where=where, limits=limits)
    if len({frame.pixels.shape for frame in shown}) > 1:
        raise MediaError("changes its resolution", where=where, fix="Re-encode the clip at one resolution.")
    times_N = np.array([float(frame.pts * span.base) for frame in shown])
    return Video(np.stack([frame.pixels for frame in shown]), times_N, float(span.length * span.base))


def _stream(container: InputContainer, where: str, limits: Limits) -> VideoStream:
    stream = video_track(container, where)
    pixels = stream.codec_context.width * stream.codec_context.height
    if pixels > limits.max_pixels:
        what = f"has frames of {pixels:,} pixels, more than the limit of {limits.max_pixels:,}"
        raise MediaError(what, where=where, fix="Scale the clip down, or raise Limits.max_pixels.")
    stream.codec_context.options = {"max_pixels": str(limits.max_pixels)}
    stream.codec_context.thread_count = 1  # clips are decoded in parallel by worker processes
    return stream


def _span(container: InputContainer, stream: VideoStream, size: int, where: str, limits: Limits) -> _Span:
    """The track's extent. Raises MediaError when the file ends before it, or when it is longer than the limit."""
    if stream.time_base is None:
        raise MediaError("carries no timestamps", where=where, fix=RESTORE)
    start = stream.start_time or 0
    if stream.duration and _is_indexed(stream):
        length = stream.duration
        last_byte = max(entry.pos + entry.size for entry in stream.index_entries)
        if last_byte > size:
            what = f"is cut off: its index reaches to byte {last_byte:,} of {size:,}"
            raise MediaError(what, where=where, fix=RESTORE)
    else:
        length = _measured_end(container, stream, where) - start
    seconds = float(length * stream.time_base)
    if length <= 0:
        raise MediaError("holds no frames", where=where, fix=RESTORE)
    if seconds > limits.max_video_seconds:
        what = f"lasts {seconds:,.0f} s, more than the limit of {limits.max_video_seconds:,.0f} s"
        raise MediaError(what, where=where, fix="Cut it into parts, or raise Limits.max_video_seconds.")
    return _Span(start, length, stream.time_base)


def _is_indexed(stream: VideoStream) -> bool:
    """Whether the container names the place of every frame (mp4, mov), so that a cut shows without reading on."""
    return 0 < stream.frames <= len(stream.index_entries)


def _measured_end(container: InputContainer, stream: VideoStream, where: str) -> int:
    """End of the video track in ticks, from the packets of the file's last seconds (nothing is decoded)."""
    if container.duration:
        try:
            container.seek((container.start_time or 0) + container.duration - av.time_base)
        except av.error.FFmpegError:
            container.seek(0)  # no index: every packet is read, still without decoding
    ends: dict[int, int] = {}  # by track, in its ticks, since times are slow to convert
    for packet in container.demux():
        if packet.pts is None:
            continue
        if packet.is_corrupt:
            raise MediaError("is cut off or corrupt near its end", where=where, fix=RESTORE)
        end = packet.pts + (packet.duration or 1)
        if end > ends.get(packet.stream_index, -1):
            ends[packet.stream_index] = end
    bases = [track.time_base for track in container.streams]
    end_seconds = max((float(end * (bases[track] or 0)) for track, end in ends.items()), default=float("-inf"))
    check_reaches_end(container, end_seconds, where)
    return ends.get(stream.index, -1)
