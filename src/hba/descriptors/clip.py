"""Every frame of a clip, one after the other, for extractors that follow a person through it.

Where training takes a few frames by seeking (`hba.atlas.video`), an extractor needs them in order and cannot hold them
all: a minute of full HD takes 10 GB. The clip is served to its end or refused with a MediaError, at the latest after
its last frame; who writes a file writes it after that.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from hba.atlas.media import Image
from hba.atlas.slices import Source
from hba.atlas.source import DEFAULT_LIMITS, RESTORE, Limits, check_reaches_end, open_container, packet_end, video_track
from hba.errors import MediaError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

_HALF_A_TICK = 1e-4  # seconds; times of frames are rounded to ticks of the container


def read_frames(
    source: Source, *, where: str, frames_per_second: float | None = None, limits: Limits = DEFAULT_LIMITS
) -> Iterator[Image]:
    """Yield the frames of the first video track, uint8 [H, W, 3] RGB, upright.

    All of them, or those on a grid of `frames_per_second` (never more than there are). Raises MediaError when the clip
    is empty, cut off, corrupt, without video, or beyond `limits`.
    """
    with open_container(source, where=where, limits=limits) as container:
        stream = video_track(container, where)
        stream.codec_context.options = {"max_pixels": str(limits.max_pixels)}
        stream.codec_context.thread_count = 1  # clips are read in parallel by worker processes
        first, due = None, 0.0
        for frame in _decoded(container, stream, where, limits):
            first = frame.time if first is None else first
            shown = frame.time - first
            if shown > limits.max_video_seconds:
                what = f"lasts more than the limit of {limits.max_video_seconds:,.0f} s"
                raise MediaError(what, where=where, fix="Cut it into parts, or raise Limits.max_video_seconds.")
            if frames_per_second is None:
                yield _pixels(frame)
            elif shown >= due - _HALF_A_TICK:
                yield _pixels(frame)
                due = (int((shown + _HALF_A_TICK) * frames_per_second) + 1) / frames_per_second


def _decoded(container: InputContainer, stream: VideoStream, where: str, limits: Limits) -> Iterator[VideoFrame]:
    """Whole frames in order of presentation; MediaError at the first that is missing, damaged or too large."""
    packets, num_frames, end = 0, 0, float("-inf")
    for packet in container.demux():
        end = max(end, packet_end(packet))
        if packet.is_corrupt:
            raise MediaError(f"is cut off or corrupt at packet {packets:,}", where=where, fix=RESTORE)
        if packet.stream is not stream:
            continue
        packets += packet.size > 0
        # The stream's own decoder: `packet.decode` is typed for every kind of stream.
        for frame in stream.decode(packet):
            if frame.is_corrupt or frame.time is None:
                raise MediaError(f"cannot be decoded at frame {num_frames:,}", where=where, fix=RESTORE)
            if frame.width * frame.height > limits.max_pixels:
                what = f"has a frame of {frame.width}x{frame.height}, more than {limits.max_pixels:,} pixels"
                raise MediaError(what, where=where, fix="Scale the clip down, or raise Limits.max_pixels.")
            num_frames += 1
            yield frame
    if num_frames == 0:
        raise MediaError("holds no frames", where=where, fix=RESTORE)
    if container.format.name.startswith("mov") and packets < stream.frames:
        what = f"is cut off: {packets:,} of {stream.frames:,} frames are there"
        raise MediaError(what, where=where, fix=RESTORE)
    check_reaches_end(container, end, where)


def _pixels(frame: VideoFrame) -> Image:
    pixels_HWC = np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
    # Phones store portrait clips lying on their side.
    return np.ascontiguousarray(np.rot90(pixels_HWC, round(frame.rotation / 90) % 4))
