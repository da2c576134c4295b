"""N evenly spaced frames of a clip, by seeking, exact to the frame.

The clip is cut into N equal segments; the frame served for each is the one on screen at the segment's centre: the last
whose presentation time is not after it. A clip with fewer frames than N serves some of them more than
once. The frames are those of a full decode, pixel for pixel, turned upright where the clip says so. A clip that is cut
off, or whose frames on the way to a target are damaged, is refused with a MediaError; nothing is filled in.

`read_frames` serves all frames, one after the other, to extractors that follow a person through a clip: they cannot be
held at once (a minute of full HD takes 10 GB).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, dropwhile, pairwise
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import av
import av.error
import numpy as np
import numpy.typing as npt
from av.video.reformatter import VideoReformatter

from hba.atlas.source import (
    CONVERT,
    DEFAULT_LIMITS,
    RESTORE,
    Frames,
    Limits,
    Source,
    check_index,
    check_reaches_end,
    check_source,
    open_container,
    packet_end,
    video_track,
)
from hba.errors import InputError, MediaError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream


T = TypeVar("T")

# A clip's timeline, and the frames on screen at given times, decoded from the nearest keyframes.
#
# Targets that share a keyframe are reached in one pass, so that no frame is decoded twice and a clip with few keyframes
# costs no more than a full decode. In h264, frames that no other frame refers to are not decoded on the way. Invariant:
# the result is that of a full decode; what depends on a frame that was not decoded is never served. Decoding begins at
# a keyframe, and the decoder must say that it is one. Where times are missing or go back, or a codec does not tell its
# keyframes, decoding begins at the start. Times are integers in ticks of the stream, so that no rounding picks a
# neighbour.


# Their decoders tell for certain which frames are keyframes, and their containers' times can be trusted so far that
# only the end needs to be looked at.
_ENTERED = frozenset(
    ("h264", "hevc", "av1", "libdav1d", "vp8", "vp9", "mpeg1video", "mpeg2video", "mpeg4", "msmpeg4v1", "msmpeg4v2")
    + ("msmpeg4", "wmv1", "wmv2", "wmv3", "vc1", "h263", "flv", "theora", "mjpeg", "prores", "dnxhd", "dvvideo", "cfhd")
    + ("ffv1", "huffyuv", "ffvhuff", "utvideo", "rawvideo", "png")
)
_TRUSTED = ("mov", "matroska")
# A pause of so many seconds between two frames of a transport stream is where recordings were joined (as in ffmpeg).
_GAP_SECONDS = 10
_STREAMS = ("mpegts", "mpeg")
_EVEN_STEPS = 32


class DamagedError(MediaError):
    """A frame cannot be decoded from the keyframe that the container points to."""


class TimesError(Exception):
    """Frames are not shown when the timeline has it, but at `times`, if they are known. Never leaves `load_video`."""

    def __init__(self, times: tuple[int, ...] = ()) -> None:
        super().__init__(times)
        self.times = times


class Shown(NamedTuple):
    """A frame and its presentation time in ticks; `pixels` is uint8 [H, W, 3] RGB."""

    pts: int
    pixels: npt.NDArray[np.uint8]


class Timed(NamedTuple):
    """A decoded frame and its presentation time in ticks."""

    pts: int
    frame: VideoFrame


class Timeline(NamedTuple):
    """Extent of the video track, in ticks of `base` seconds, and its frames' times, if all packets were read."""

    start: int
    length: int
    base: Fraction
    entered: bool
    """whether decoding may begin at any keyframe"""
    step: int = 1
    """usual distance of two frames"""
    carried: bool = True
    """whether frames carry their own times; else each is shown when the packet is due that brought it out"""
    gap: int | None = None
    """a longer pause than this between two frames is where recordings were joined"""
    first_pts: int | None = None
    """of the first keyframe, where packets in front of it may show nothing; None where the file begins with one"""
    times: tuple[int, ...] = ()
    """when each frame is shown, in order, as far as packets tell"""
    places: Mapping[int | None, tuple[int, int | None]] = {}
    """number and presentation time of each packet, by its decoding time"""

    @property
    def seconds(self) -> float:
        """Length in seconds."""
        return float(self.length * self.base)

    def shown_at(self, times: tuple[int, ...] = ()) -> Timeline:
        """The timeline of frames that do not carry their times, or not the right ones; `times` where they are known."""
        times = times or self.times
        length = times[-1] + self.step - times[0]
        return self._replace(entered=False, carried=False, start=times[0], length=length, times=times)

    def centres(self, count: int) -> list[int]:
        """Ticks at the centres of as many equal segments."""
        return [self.start + (2 * i + 1) * self.length // (2 * count) for i in range(count)]


class _Clock:
    """Times that only go on: what is missing, goes back or leaps comes a step after the last instead, as in ffmpeg."""

    def __init__(self, timeline: Timeline) -> None:
        self.step, self.gap = timeline.step, timeline.gap
        self.before: int | None = None
        self.shift = 0

    def at(self, ticks: int | None) -> int:
        """The time of what comes next."""
        if self.before is None:
            now = ticks or 0
        elif ticks is None:
            now = self.before + self.step
        else:
            now = ticks + self.shift
            if now < self.before - 2 * self.step or (self.gap is not None and now > self.before + self.gap):
                self.shift += self.before + self.step - now
                now = self.before + self.step
            now = max(now, self.before + 1)
        self.before = now
        return now


class Clip(NamedTuple):
    """An opened clip, and one converter for all its frames: to set one up takes as long as to use it."""

    container: InputContainer
    stream: VideoStream
    where: str
    limits: Limits
    size: int
    converter: VideoReformatter

    def pixels(self, frame: VideoFrame) -> npt.NDArray[np.uint8]:
        """The frame as uint8 [H, W, 3] RGB, upright. Raises MediaError when it is larger than the limit."""
        if frame.width * frame.height > self.limits.max_pixels:
            what = f"has a frame of {frame.width}x{frame.height}, more than {self.limits.max_pixels:,} pixels"
            raise MediaError(what, where=self.where, fix="Scale the clip down, or raise Limits.max_pixels.")
        rgb = self.converter.reformat(frame, format="rgb24", threads=1)  # one thread, as the decoder
        return self._upright(np.asarray(rgb.to_ndarray(), np.uint8), frame)

    def _upright(self, pixels_HWC: npt.NDArray[np.uint8], frame: VideoFrame) -> npt.NDArray[np.uint8]:
        """Turned and mirrored as the container's display matrix says: phones store portrait clips on their side."""
        matrix: Any = frame.side_data.get("DISPLAYMATRIX")
        if matrix is None:
            return pixels_HWC
        a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), np.int32) / 65536
        if not (a or b) or not (c or d):
            return pixels_HWC  # all zeros: nobody wrote it
        # A point (x, y) of the stored frame is shown at (a x + c y, b x + d y), y pointing down.
        across, along = abs(a) + abs(d), abs(b) + abs(c)
        if min(across, along) > 0.02 * max(across, along):
            raise MediaError("is rotated by another angle than 90, 180 or 270 degrees", where=self.where, fix=CONVERT)
        if along > across:
            pixels_HWC = pixels_HWC.transpose(1, 0, 2)
            a, d = c, b
        return np.ascontiguousarray(pixels_HWC[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])

    def damaged(self, ticks: int | None) -> DamagedError:
        """The error for a frame that is missing or corrupt."""
        base = self.stream.time_base
        at = f" at {float(ticks * base):.2f} s" if ticks is not None and base else ""
        return DamagedError(f"cannot be decoded{at}: cut off or corrupt", where=self.where, fix=RESTORE)

    def undecodable(self, error: av.error.FFmpegError) -> DamagedError:
        """The error for what the decoder refuses."""
        return DamagedError(f"cannot be decoded ({error.strerror})", where=self.where, fix=RESTORE)


@contextmanager
def open_clip(source: Source, *, where: str, limits: Limits) -> Iterator[Clip]:
    """The clip of a file, ready to be decoded. Raises MediaError when there is none, or when it exceeds `limits`."""
    size = check_source(source, where=where, limits=limits)
    with open_container(source, where=where, limits=limits) as container:
        stream = video_track(container, where)
        pixels = stream.codec_context.width * stream.codec_context.height
        if pixels > limits.max_pixels:
            what = f"has frames of {pixels:,} pixels, more than the limit of {limits.max_pixels:,}"
            raise MediaError(what, where=where, fix="Scale the clip down, or raise Limits.max_pixels.")
        stream.codec_context.options = {"max_pixels": str(limits.max_pixels)}
        stream.codec_context.thread_count = 1  # clips are decoded in parallel by worker processes
        yield Clip(container, stream, where, limits, size, VideoReformatter())


# --- when frames are shown --------------------------------------------------------------------------------------------


def timeline_of(clip: Clip, *, whole: bool = False) -> Timeline:
    """The clip's extent and times. Raises MediaError when the file ends before it, or it is longer than the limit.

    mp4 and Matroska are taken at their word as far as their last seconds bear it out. Of everything else, and with
    `whole` of these, every packet is read, and none decoded.
    """
    stream, name = clip.stream, clip.container.format.name
    if stream.time_base is None:
        raise MediaError("carries no timestamps", where=clip.where, fix=RESTORE)
    found: Timeline | None = None
    if name.startswith(_TRUSTED) and not whole:
        start, entered = stream.start_time or 0, stream.codec_context.name in _ENTERED
        indexed = 0 < stream.frames <= len(stream.index_entries)
        if indexed:
            check_index(stream, clip.size, clip.where)
        if indexed and stream.duration and _is_even(stream):
            found = Timeline(start, stream.duration, stream.time_base, entered)
        elif (length := _tail_end(clip, start)) is not None:
            found = Timeline(start, length, stream.time_base, entered)
        else:
            clip.container.seek(0)
    found = found or _scanned(clip)
    if found.length <= 0:
        raise MediaError("holds no frames", where=clip.where, fix=RESTORE)
    if found.seconds > clip.limits.max_video_seconds:
        what = f"lasts {found.seconds:,.0f} s, more than the limit of {clip.limits.max_video_seconds:,.0f} s"
        raise MediaError(what, where=clip.where, fix="Cut it into parts, or raise Limits.max_video_seconds.")
    return found


def _is_even(stream: VideoStream) -> bool:
    """Whether frames are evenly spaced at the end and, so spaced, last as long as the header has it."""
    entries = stream.index_entries
    last = [entry.timestamp for entry in entries[-_EVEN_STEPS:]]
    if len(last) < 2 or not stream.duration:
        return False
    steps = [after - before for before, after in pairwise(last)]
    step = (last[-1] - last[0]) / len(steps)
    even = max(steps) - min(steps) <= max(1, 0.01 * step)
    return even and abs(entries[-1].timestamp - entries[0].timestamp + step - stream.duration) <= 2 * step


def _tail_end(clip: Clip, start: int) -> int | None:
    """Length of the track in ticks by the packets of the file's last second; None where they carry no times."""
    container, stream = clip.container, clip.stream
    base = stream.time_base or Fraction(1)
    try:
        container.seek(int(((container.duration or 0) / av.time_base - 1) / base), stream=stream)
    except av.error.FFmpegError:
        container.seek(0)  # no index: every packet is read, still without decoding
    ends = _ends(clip)
    if ends is not None and stream.index not in ends:  # other tracks last longer
        container.seek(0)
        ends = _ends(clip)
    if ends is None:
        return None
    bases = [track.time_base for track in container.streams]
    end_seconds = max((float(end * (bases[track] or 0)) for track, end in ends.items()), default=float("-inf"))
    check_reaches_end(container, end_seconds, clip.where)
    return ends.get(stream.index, start) - start


def _ends(clip: Clip) -> dict[int, int] | None:
    """By track, where the last of its packets ends, in its ticks; None where packets of the clip carry no times."""
    ends: dict[int, int] = {}
    for packet in clip.container.demux():
        if packet.size == 0 or packet.is_discard:
            continue
        if packet.is_corrupt:
            raise MediaError("is cut off or corrupt near its end", where=clip.where, fix=RESTORE)
        if packet.pts is None:
            if packet.stream_index == clip.stream.index:
                return None
            continue
        end = packet.pts + (packet.duration or 1)
        if end > ends.get(packet.stream_index, -1):
            ends[packet.stream_index] = end
    return ends


class _Stored(NamedTuple):
    """What a packet says of its frame."""

    pts: int | None
    dts: int | None
    duration: int
    is_keyframe: bool
    is_discard: bool
    """whether its frame is decoded and not shown (an edit list begins behind its keyframe)"""


def _scanned(clip: Clip) -> Timeline:
    """The timeline by all packets of the file."""
    stream, name = clip.stream, clip.container.format.name
    base = stream.time_base or Fraction(1)
    stored: list[_Stored] = []
    end_seconds = float("-inf")
    cut: set[int] = set()  # tracks whose last packet is damaged
    for packet in clip.container.demux():
        if not packet.size:
            continue
        end_seconds = max(end_seconds, packet_end(packet))
        (cut.add if packet.is_corrupt else cut.discard)(packet.stream_index)
        if packet.stream_index == stream.index:
            known = _Stored(packet.pts, packet.dts, packet.duration or 0, packet.is_keyframe, packet.is_discard)
            stored.append(known)
    if name == "avi" and stream.codec_context.has_b_frames:  # it has no presentation times; FFmpeg guesses
        stored = [packet._replace(pts=None) for packet in stored]
    if cut:
        raise MediaError("is cut off or corrupt at its end", where=clip.where, fix=RESTORE)
    check_reaches_end(clip.container, end_seconds, clip.where)
    first = next((number for number, packet in enumerate(stored) if packet.is_keyframe), 0)
    stored = [packet for packet in stored[first:] if not packet.is_discard]  # a recording may begin anywhere
    if not stored:
        return Timeline(0, 0, base, entered=False)
    first_pts = stored[0].pts if first or name in _STREAMS else None
    gap = int(_GAP_SECONDS / base) if name in _STREAMS else None
    pts = [packet.pts for packet in stored if packet.pts is not None]
    carried = len(stored) == len(pts) == len(set(pts)) and not _turns([packet.dts for packet in stored], gap)
    entered = carried and stream.codec_context.name in _ENTERED
    found = Timeline(0, 0, base, entered, _step(clip, stored), carried, gap, first_pts)
    clock = _Clock(found)
    times = tuple(sorted(pts) if carried else (clock.at(packet.dts) for packet in stored))
    start = max(times[0], first_pts) if carried and name in _STREAMS and first_pts is not None else times[0]
    last = max(stored, key=lambda packet: packet.pts or 0) if carried else stored[-1]
    return found._replace(
        start=start,
        length=times[-1] + (last.duration or found.step) - start,
        times=times,
        places={packet.dts: (number, packet.pts) for number, packet in enumerate(stored)} if carried else {},
    )


def _turns(dts: Sequence[int | None], gap: int | None) -> bool:
    """Whether decoding times are missing, go back, or leap. Matroska leaves out the first."""
    known = list(dropwhile(lambda each: each is None, dts))
    steps = ((before, after) for before, after in pairwise(known))
    return not known or any(
        before is None or after is None or after <= before or (gap is not None and after - before > gap)
        for before, after in steps
    )


def _step(clip: Clip, stored: Sequence[_Stored]) -> int:
    """Usual distance of two frames in ticks."""
    durations = [packet.duration for packet in stored if packet.duration > 0]
    rate = clip.stream.average_rate or clip.stream.guessed_rate or 25
    return max(1, round(median(durations) if durations else 1 / (rate * (clip.stream.time_base or Fraction(1)))))


# --- frames -----------------------------------------------------------------------------------------------------------


def every_frame(clip: Clip, timeline: Timeline) -> Iterator[Timed]:
    """All frames of a clip just opened, in order of presentation.

    Raises DamagedError at the first that is not whole, TimesError where frames carry times that go back.
    """
    clock = _Clock(timeline)
    begun = timeline.first_pts is None
    for packet in clip.container.demux(clip.stream):
        begun = begun or packet.is_keyframe or packet.size == 0
        if not begun:
            continue
        # Where recordings were joined, what a transport stream takes for a loss is none.
        if packet.is_corrupt and (timeline.carried or clip.container.format.name != "mpegts"):
            raise clip.damaged(packet.pts)
        try:
            frames = packet.decode()
        except av.error.FFmpegError as error:
            raise clip.undecodable(error) from None
        for frame in frames:
            # Frames shown before the first keyframe but stored after it refer to frames that are not in the file.
            leading = timeline.first_pts is not None and frame.pts is not None and frame.pts < timeline.first_pts
            if frame.is_corrupt and leading:
                continue
            if frame.is_corrupt:
                raise clip.damaged(frame.pts)
            if not timeline.carried:
                yield Timed(clock.at(frame.dts), frame)
            elif frame.pts is None or (clock.before is not None and frame.pts <= clock.before):
                raise TimesError
            else:
                clock.before = frame.pts
                yield Timed(frame.pts, frame)


def decode_through(clip: Clip, timeline: Timeline, count: int) -> list[Shown]:
    """The frames on screen at the centres of `count` equal segments, on a clip just opened, from its start on.

    Raises TimesError when other frames are: then times that frames carry go back, or packets told too little.
    """
    frames = every_frame(clip, timeline)
    if timeline.carried:
        return _on_screen(clip, frames, timeline.centres(count))
    times: list[int] = []

    def foretold() -> Iterator[Timed]:
        for number, timed in enumerate(frames):
            times.append(timed.pts)
            late = number - len(timeline.times) + 1
            yield Timed(timeline.times[-1] + late * timeline.step if late > 0 else timeline.times[number], timed.frame)

    passing = foretold()
    shown = _on_screen(clip, passing, timeline.centres(count))
    for _ in passing:  # only the last frame tells when it ends
        pass
    real = timeline.shown_at(tuple(times))
    numbers = [bisect_left(timeline.times, frame.pts) for frame in shown]
    if numbers != [max(0, bisect_right(times, centre) - 1) for centre in real.centres(count)]:
        raise TimesError(real.times)
    return [frame._replace(pts=times[number]) for frame, number in zip(shown, numbers, strict=True)]


def _on_screen(clip: Clip, frames: Iterator[Timed], targets: Sequence[int]) -> list[Shown]:
    """For each of `targets` (ascending) the last frame shown at or before it, or the first of all."""
    shown: list[Shown] = []
    current: Timed | None = None
    following = next(frames, None)
    for target in targets:
        while following is not None and (current is None or following.pts <= target):
            current, following = following, next(frames, None)
        if current is None:
            raise clip.damaged(target)
        reuse = shown and shown[-1].pts == current.pts
        shown.append(shown[-1] if reuse else Shown(current.pts, clip.pixels(current.frame)))
    return shown


class _Keyframe(NamedTuple):
    pts: int
    seek_ticks: int  # a seek to here lands on it, or before it
    packet: Packet[VideoStream]


class _Group(NamedTuple):
    """Targets that are reached from one keyframe; None stands for the start of the file, without a seek."""

    keyframe: _Keyframe | None
    targets: list[int]


def decode_at(clip: Clip, timeline: Timeline, targets: Sequence[int]) -> list[Shown]:
    """The frame on screen at each of `targets` (ascending ticks): the last one shown at or before it.

    Raises DamagedError when a frame on the way is corrupt or missing, MediaError when a frame exceeds the limits.
    """
    shown: list[Shown] = []
    for group in _groups(clip, targets):
        if group.keyframe is None:
            clip.container.seek(0)
            shown += _on_screen(clip, every_frame(clip, timeline), group.targets)
        else:
            shown += _Pass(clip, timeline, group.keyframe, group.targets).run()
    return shown


def decode_keyframes(clip: Clip, timeline: Timeline, targets: Sequence[int]) -> list[Shown]:
    """For each of `targets` the keyframe that is nearest in time; nothing else is decoded.

    Where the container cannot seek, the frames are those of `decode_at`. Raises what `decode_at` raises.
    """
    shown: dict[int, Shown] = {}
    nearest: list[int] = []
    for target in targets:
        try:
            found = _keyframe_before(clip, target)
        except av.error.FFmpegError:
            found = None
        if found is None:
            return decode_at(clip, timeline, targets)
        after = _keyframe_after(clip, target)
        if after is not None and after.pts - target < target - found.pts:
            found = after
        if found.pts not in shown:
            shown[found.pts] = _alone(clip, found)
        nearest.append(found.pts)
    return [shown[pts] for pts in nearest]


def _groups(clip: Clip, targets: Sequence[int]) -> list[_Group]:
    try:
        first, last = (_keyframe_before(clip, target) for target in (targets[0], targets[-1]))
        keyframes = [first, *_between(clip, targets[1:-1], first, last), last][: len(targets)]
    except av.error.FFmpegError:
        keyframes = [None]
    groups: list[_Group] = []
    for target, keyframe in zip(targets, keyframes, strict=False):
        if keyframe is None:  # the container cannot seek here: one pass over everything
            return [_Group(None, list(targets))]
        if groups and groups[-1].keyframe is not None and groups[-1].keyframe.pts == keyframe.pts:
            groups[-1].targets.append(target)
        else:
            groups.append(_Group(keyframe, [target]))
    return groups


def _between(
    clip: Clip, targets: Sequence[int], first: _Keyframe | None, last: _Keyframe | None
) -> list[_Keyframe | None]:
    """The keyframe before each target, of which `first` and `last` are those of the targets around them.

    By halves, since all targets between two that share a keyframe share it too: a short clip takes two seeks.
    """
    if not targets or first is None or last is None:
        return [None] * len(targets)
    if first.pts == last.pts:
        return [first] * len(targets)
    half = len(targets) // 2
    middle = _keyframe_before(clip, targets[half])
    before = _between(clip, targets[:half], first, middle)
    return [*before, middle, *_between(clip, targets[half + 1 :], middle, last)]


def _keyframe_before(clip: Clip, target: int) -> _Keyframe | None:
    """A keyframe shown at or before `target`, the last if the index is right; None if no seek leads to one."""
    ticks, step = target, int(1 / clip.stream.time_base) if clip.stream.time_base else 1
    for _ in range(12):
        clip.container.seek(ticks, stream=clip.stream)
        earliest = ticks
        for packet in clip.container.demux(clip.stream):
            if packet.dts is not None:
                earliest = min(earliest, packet.dts)
            if packet.pts is not None and packet.is_keyframe:
                if packet.pts <= target:
                    return _Keyframe(packet.pts, ticks, packet)
                break
        # Containers index decoding times, which run ahead of presentation, or times of frames that are no keyframes.
        ticks, step = earliest - step, step * 2
    return None


def _keyframe_after(clip: Clip, target: int) -> _Keyframe | None:
    """A keyframe shown after `target` that a seek leads to, if there is one."""
    try:
        clip.container.seek(target, stream=clip.stream, backward=False)
        packet = next((p for p in clip.container.demux(clip.stream) if p.pts is not None), None)
    except av.error.FFmpegError:
        return None
    if packet is None or packet.pts is None or not packet.is_keyframe or packet.pts <= target:
        return None
    return _Keyframe(packet.pts, target, packet)


def _alone(clip: Clip, keyframe: _Keyframe) -> Shown:
    """A keyframe, decoded from its packet and nothing else."""
    codec, packet = clip.stream.codec_context, keyframe.packet
    codec.skip_frame = "DEFAULT"
    try:
        frames = [*packet.decode(), *codec.decode(None)]
    except av.error.FFmpegError as error:
        raise clip.undecodable(error) from None
    codec.flush_buffers()  # the decoder was told of an end that is none
    if packet.is_corrupt or len(frames) != 1 or not _is_begun_by(frames[0], keyframe):
        raise clip.damaged(keyframe.pts)
    return Shown(keyframe.pts, clip.pixels(frames[0]))


def _is_begun_by(frame: VideoFrame, keyframe: _Keyframe) -> bool:
    """Whether the first frame that was decoded is that of the keyframe, and the decoder takes it for one, too."""
    return frame.pts == keyframe.pts and frame.key_frame and not frame.is_corrupt


class _Pass:
    """One forward decode from a keyframe that serves the targets of a group."""

    def __init__(self, clip: Clip, timeline: Timeline, keyframe: _Keyframe, targets: list[int]) -> None:
        self.clip, self.timeline, self.keyframe, self.targets = clip, timeline, keyframe, targets
        # Only h264 marks for certain which frames no other frame refers to.
        self.skip = clip.stream.codec_context.name == "h264"
        self.expected: list[int] = []  # with `skip`: for each target, the time of its frame as the packets tell it

    def run(self) -> list[Shown]:
        shown = _on_screen(self.clip, self._frames(), self.targets)
        for number, frame in enumerate(shown):
            if self.skip and frame.pts != self.expected[number]:
                raise self.clip.damaged(self.targets[number])
        return shown

    def _frames(self) -> Iterator[Timed]:
        """Decoded frames from the keyframe on, in order of presentation; some that no target needs are left out."""
        codec = self.clip.stream.codec_context
        before: int | None = None
        try:
            for packet, needless in self._packets():
                codec.skip_frame = "NONREF" if needless else "DEFAULT"
                if packet.is_corrupt:
                    raise self.clip.damaged(packet.pts)
                for frame in packet.decode():
                    # Frames shown before the keyframe but stored after it refer to frames that were not read.
                    if frame.pts is not None and frame.pts < self.keyframe.pts:
                        continue
                    first = before is None and not self.keyframe.packet.is_discard
                    whole = _is_begun_by(frame, self.keyframe) if first else not frame.is_corrupt
                    if not whole or frame.pts is None or (before is not None and frame.pts <= before):
                        raise self.clip.damaged(frame.pts)
                    before = frame.pts
                    yield Timed(frame.pts, frame)
        except av.error.FFmpegError as error:
            raise self.clip.undecodable(error) from None

    def _stored(self) -> Iterator[Packet[VideoStream]]:
        """The packets from the keyframe on, in stored order, each with the times that it has when all are read."""
        self.clip.container.seek(self.keyframe.seek_ticks, stream=self.clip.stream)
        packets, begin = self.clip.container.demux(self.clip.stream), self.keyframe.pts
        first = next((packet for packet in packets if packet.is_keyframe and packet.pts == begin), None)
        if first is None:
            raise self.clip.damaged(begin)
        places = self.timeline.places
        if not places:
            yield first
            yield from packets
            return
        number: int | None = None
        for packet in chain([first], packets):
            if packet.size and not packet.is_discard:
                # Times that a container leaves out are guessed from those before, which a seek forgets.
                place, pts = places.get(packet.dts, (-1, None))
                if pts != packet.pts or place < 0 or (number is not None and place != number + 1):
                    raise self.clip.damaged(packet.pts)
                number = place
            yield packet

    def _packets(self) -> Iterator[tuple[Packet[VideoStream], bool]]:
        """Packets in stored order, and whether the packet's own frame (not those that refer to it) is needless."""
        packets = self._stored()
        if not self.skip:
            yield from ((packet, False) for packet in packets)
            return
        pending: Packet[VideoStream] | None = None
        times: list[int] = []
        for target in self.targets:
            segment, pending = _until(packets, target, pending)
            times += [p.pts for p in segment if p.pts is not None and not p.is_discard and p.pts >= self.keyframe.pts]
            best = max((t for t in times if t <= target), default=min(times, default=target))
            self.expected.append(best)
            times = [t for t in times if t >= best]
            yield from ((p, p.pts is not None and p.pts < best) for p in segment)
        if pending is not None:
            yield pending, False
        yield from ((packet, False) for packet in packets)


def _until(
    packets: Iterator[Packet[VideoStream]], target: int, pending: Packet[VideoStream] | None
) -> tuple[list[Packet[VideoStream]], Packet[VideoStream] | None]:
    """The packets that may be shown by `target`, and the first one beyond (None at the end of the file)."""
    segment: list[Packet[VideoStream]] = []
    packet = pending if pending is not None else next(packets, None)
    # A frame is never shown before it is decoded. Matroska leaves out the decoding times of the first packets; the end
    # of the file is a packet without any time.
    while packet is not None and packet.pts is not None and (packet.dts is None or packet.dts <= target):
        segment.append(packet)
        packet = next(packets, None)
    return segment, packet


# --- the frames that are asked for ------------------------------------------------------------------------------------


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


def frames_at(fps: float, seconds: float, most: int) -> int:
    """How many frames a clip of `seconds` has at `fps` frames a second: an even number, 2 at least and `most` at most.

    As Qwen's own tools count: what does not make a pair is left out.
    """
    return max(2, min(most, int(seconds * fps + _HALF_A_TICK) // 2 * 2))


def load_video(
    source: Source,
    num_frames: int,
    *,
    where: str,
    limits: Limits = DEFAULT_LIMITS,
    frames: Frames = "exact",
    fps: float | None = None,
) -> Video:
    """Decode `num_frames` evenly spaced frames of the clip's video track, or the keyframes nearest to them.

    With `fps`, so many a second (see `frames_at`), and `num_frames` at most. Raises MediaError naming `where` when the
    source is empty, cut off, corrupt, without video or beyond `limits`; InputError when `num_frames` is not positive.
    """
    if num_frames < 1:
        raise InputError(f"num_frames is {num_frames}", where=where, fix="Ask for at least one frame.")
    shown: list[Shown] | None = None

    def count(timeline: Timeline) -> int:
        return num_frames if fps is None else frames_at(fps, timeline.seconds, num_frames)

    def through(clip: Clip, timeline: Timeline) -> list[Shown]:
        return decode_through(clip, timeline, count(timeline))

    with open_clip(source, where=where, limits=limits) as clip:
        timeline = timeline_of(clip)
        if timeline.entered:
            decode = decode_at if frames == "exact" else decode_keyframes
            # Some containers mark keyframes that are none (intra refresh): a decode from the start tells.
            with suppress(DamagedError, TimesError):
                shown = decode(clip, timeline, timeline.centres(count(timeline)))
    if shown is None:
        known = timeline if timeline.times else None
        served, timeline = read_clip(source, through, where=where, limits=limits, timeline=known)
    else:
        served = shown
    if len({frame.pixels.shape for frame in served}) > 1:
        raise MediaError("changes its resolution", where=where, fix="Re-encode the clip at one resolution.")
    times_N = np.array([float(frame.pts * timeline.base) for frame in served])
    return Video(np.stack([frame.pixels for frame in served]), times_N, timeline.seconds)


def read_clip(
    source: Source,
    read: Callable[[Clip, Timeline], T],
    *,
    where: str,
    limits: Limits,
    timeline: Timeline | None = None,
) -> tuple[T, Timeline]:
    """What `read` makes of a clip from its start on, and the timeline by which it did.

    That is `timeline`, or one by all packets; where frames turn out to be shown at other times, `read` begins again
    with those. Raises MediaError when the clip is cut off or beyond `limits`, and what `read` raises.
    """
    if timeline is None:
        with open_clip(source, where=where, limits=limits) as clip:
            timeline = timeline_of(clip, whole=True)
    while True:
        with open_clip(source, where=where, limits=limits) as clip:
            try:
                return read(clip, timeline), timeline
            except TimesError as error:
                timeline = timeline.shown_at(error.times)


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
