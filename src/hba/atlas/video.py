"""N evenly spaced frames of a clip, by seeking, exact to the frame.

The clip is cut into N equal segments; the frame served for each is the one on screen at the segment's centre: the last
whose presentation time is not after it (see `frames`). A clip with fewer frames than N serves some of them more than
once. The frames are those of a full decode, pixel for pixel, turned upright where the clip says so. A clip that is cut
off, or whose frames on the way to a target are damaged, is refused with a MediaError; nothing is filled in.

`read_frames` serves all frames, one after the other, to extractors that follow a person through a clip: they cannot be
held at once (a minute of full HD takes 10 GB).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from hba.atlas.frames import (
    DamagedError,
    Shown,
    TimesError,
    decode_at,
    decode_keyframes,
    decode_through,
    every_frame,
    open_clip,
    timeline_of,
)
from hba.atlas.slices import Source
from hba.atlas.source import CONVERT, DEFAULT_LIMITS, Limits
from hba.errors import InputError, MediaError

Frames: TypeAlias = Literal["exact", "nearest_keyframe"]
"""which frame stands for a time: the one on screen, or the keyframe nearest to it, which is faster"""

_HALF_A_TICK = 1e-4  # seconds; times of frames are rounded to ticks of the container


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


def load_video(
    source: Source, num_frames: int, *, where: str, limits: Limits = DEFAULT_LIMITS, frames: Frames = "exact"
) -> Video:
    """Decode `num_frames` evenly spaced frames of the clip's video track, or the keyframes nearest to them.

    Raises MediaError naming `where` when the source is empty, cut off, corrupt, without video or beyond `limits`;
    InputError when `num_frames` is not positive.
    """
    if num_frames < 1:
        raise InputError(f"num_frames is {num_frames}", where=where, fix="Ask for at least one frame.")
    shown: list[Shown] | None = None
    with open_clip(source, where=where, limits=limits) as clip:
        timeline = timeline_of(clip)
        if timeline.entered:
            decode = decode_at if frames == "exact" else decode_keyframes
            # Some containers mark keyframes that are none (intra refresh): a decode from the start tells.
            with suppress(DamagedError, TimesError):
                shown = decode(clip, timeline, timeline.centres(num_frames))
    if shown is None and not timeline.times:
        with open_clip(source, where=where, limits=limits) as clip:
            timeline = timeline_of(clip, whole=True)
    while shown is None:
        with open_clip(source, where=where, limits=limits) as clip:
            try:
                shown = decode_through(clip, timeline, num_frames)
            except TimesError as error:
                timeline = timeline.shown_at(error.times)
    if len({frame.pixels.shape for frame in shown}) > 1:
        raise MediaError("changes its resolution", where=where, fix="Re-encode the clip at one resolution.")
    times_N = np.array([float(frame.pts * timeline.base) for frame in shown])
    return Video(np.stack([frame.pixels for frame in shown]), times_N, timeline.seconds)


class TimedFrame(NamedTuple):
    """uint8 [H, W, 3] RGB, upright, and when it is shown after the first."""

    seconds: float
    pixels: npt.NDArray[np.uint8]


def read_frames(
    source: Source, *, where: str, frames_per_second: float | None = None, limits: Limits = DEFAULT_LIMITS
) -> Iterator[TimedFrame]:
    """Yield the frames of the clip's video track in order.

    All of them, or those on a grid of `frames_per_second` (never more than there are). Raises MediaError when the clip
    is empty, cut off, corrupt, without video, or beyond `limits`, at the latest after its last frame: who writes a file
    writes it after that.
    """
    with open_clip(source, where=where, limits=limits) as clip:
        timeline = timeline_of(clip, whole=True)
    with open_clip(source, where=where, limits=limits) as clip:
        first: int | None = None
        due = 0.0
        try:
            for timed in every_frame(clip, timeline):
                first = timed.pts if first is None else first
                shown = float((timed.pts - first) * timeline.base)
                if frames_per_second is None:
                    yield TimedFrame(shown, clip.pixels(timed.frame))
                elif shown >= due - _HALF_A_TICK:
                    yield TimedFrame(shown, clip.pixels(timed.frame))
                    due = (int((shown + _HALF_A_TICK) * frames_per_second) + 1) / frames_per_second
        except TimesError:
            raise MediaError("has frames whose times go back", where=where, fix=CONVERT) from None
