"""The frames on screen at given times, decoded from the nearest keyframes.

Targets that share a keyframe are reached in one pass, so that no frame is decoded twice and a clip with few keyframes
costs no more than a full decode. In h264, frames that no other frame refers to are not decoded on the way. Invariant:
the result is that of a full decode. Times are integers in ticks of the stream, so that no rounding picks a neighbour.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import av.error
import numpy as np
import numpy.typing as npt
from av.video.reformatter import VideoReformatter

from hba.atlas.source import RESTORE, Limits
from hba.errors import MediaError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream


class DamagedError(MediaError):
    """A frame cannot be decoded from the keyframe that the container points to."""


class Shown(NamedTuple):
    """A frame and its presentation time in ticks; `pixels` is uint8 [H, W, 3] RGB."""

    pts: int
    pixels: npt.NDArray[np.uint8]


class _Clip(NamedTuple):
    """An opened clip, and one converter for all its frames: to set one up takes as long as to use it."""

    container: InputContainer
    stream: VideoStream
    where: str
    limits: Limits
    converter: VideoReformatter

    def pixels(self, frame: VideoFrame) -> npt.NDArray[np.uint8]:
        """The frame as uint8 [H, W, 3] RGB, upright. Raises MediaError when it is larger than the limit."""
        if frame.width * frame.height > self.limits.max_pixels:
            what = f"has a frame of {frame.width}x{frame.height}, more than {self.limits.max_pixels:,} pixels"
            raise MediaError(what, where=self.where, fix="Scale the clip down, or raise Limits.max_pixels.")
        rgb = self.converter.reformat(frame, format="rgb24", threads=1)  # one thread, as the decoder
        pixels_HWC = np.asarray(rgb.to_ndarray(), np.uint8)
        quarters = round(frame.rotation / 90)  # phones store portrait clips lying on their side
        return np.ascontiguousarray(np.rot90(pixels_HWC, quarters)) if quarters % 4 else pixels_HWC

    def damaged(self, ticks: int | None) -> DamagedError:
        """The error for a frame that is missing or corrupt."""
        base = self.stream.time_base
        at = f" at {float(ticks * base):.2f} s" if ticks is not None and base else ""
        return DamagedError(f"cannot be decoded{at}: cut off or corrupt", where=self.where, fix=RESTORE)


class _Keyframe(NamedTuple):
    pts: int
    seek_ticks: int  # a seek to here lands on it
    packet: Packet[VideoStream]


class _Group(NamedTuple):
    """Targets that are reached from one keyframe; None stands for the start of the file, without a seek."""

    keyframe: _Keyframe | None
    targets: list[int]


def decode_at(
    container: InputContainer, stream: VideoStream, targets: Sequence[int], *, where: str, limits: Limits
) -> list[Shown]:
    """The frame on screen at each of `targets` (ascending ticks): the last one shown at or before it.

    Raises DamagedError when a frame on the way is corrupt or missing, MediaError when a frame exceeds the limits.
    """
    # Only h264 marks for certain which frames no other frame refers to.
    skip = stream.codec_context.name == "h264"
    clip = _Clip(container, stream, where, limits, VideoReformatter())
    shown: list[Shown] = []
    for group in _groups(container, stream, targets):
        if group.keyframe is not None:
            container.seek(group.keyframe.seek_ticks, stream=stream)
        else:
            container.seek(0)
        shown.extend(_Pass(clip, group, skip=skip).run())
    return shown


def decode_through(
    container: InputContainer, stream: VideoStream, targets: Sequence[int], *, where: str, limits: Limits
) -> list[Shown]:
    """As `decode_at`, on a container just opened, by decoding every frame from the start."""
    clip = _Clip(container, stream, where, limits, VideoReformatter())
    return _Pass(clip, _Group(None, list(targets)), skip=False).run()


def decode_keyframes(
    container: InputContainer, stream: VideoStream, targets: Sequence[int], *, where: str, limits: Limits
) -> list[Shown]:
    """For each of `targets` the keyframe that is nearest in time; nothing else is decoded.

    Where the container cannot seek, the frames are those of `decode_at`. Raises what `decode_at` raises.
    """
    clip = _Clip(container, stream, where, limits, VideoReformatter())
    shown: dict[int, Shown] = {}
    nearest: list[int] = []
    for target in targets:
        try:
            found = _keyframe_before(container, stream, target)
        except av.error.FFmpegError:
            found = None
        if found is None:
            return decode_at(container, stream, targets, where=where, limits=limits)
        after = _keyframe_after(container, stream, target)
        if after is not None and after.pts - target < target - found.pts:
            found = after
        if found.pts not in shown:
            shown[found.pts] = _alone(clip, found)
        nearest.append(found.pts)
    return [shown[pts] for pts in nearest]


def _groups(container: InputContainer, stream: VideoStream, targets: Sequence[int]) -> list[_Group]:
    try:
        first, last = (_keyframe_before(container, stream, target) for target in (targets[0], targets[-1]))
        keyframes = [first, *_between(container, stream, targets[1:-1], first, last), last][: len(targets)]
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
    container: InputContainer,
    stream: VideoStream,
    targets: Sequence[int],
    first: _Keyframe | None,
    last: _Keyframe | None,
) -> list[_Keyframe | None]:
    """The keyframe before each target, of which `first` and `last` are those of the targets around them.

    By halves, since all targets between two that share a keyframe share it too: a short clip takes two seeks.
    """
    if not targets or first is None or last is None:
        return [None] * len(targets)
    if first.pts == last.pts:
        return [first] * len(targets)
    half = len(targets) // 2
    middle = _keyframe_before(container, stream, targets[half])
    before = _between(container, stream, targets[:half], first, middle)
    return [*before, middle, *_between(container, stream, targets[half + 1 :], middle, last)]


def _keyframe_before(container: InputContainer, stream: VideoStream, target: int) -> _Keyframe | None:
    """The last keyframe shown at or before `target`, found by demuxing one packet; None if no seek leads to one."""
    ticks, step = target, int(1 / stream.time_base) if stream.time_base else 1
    for _ in range(12):
        container.seek(ticks, stream=stream)
        packet = next((p for p in container.demux(stream) if p.pts is not None), None)
        if packet is not None and packet.pts is not None and packet.pts <= target:
            return _Keyframe(packet.pts, ticks, packet)
        # Containers index decoding times, which run ahead of presentation: this keyframe is shown too late.
        earlier = ticks if packet is None or packet.dts is None else min(ticks, packet.dts)
        ticks, step = earlier - step, step * 2
    return None


def _keyframe_after(container: InputContainer, stream: VideoStream, target: int) -> _Keyframe | None:
    """A keyframe shown after `target` that a seek leads to, if there is one."""
    try:
        container.seek(target, stream=stream, backward=False)
        packet = next((p for p in container.demux(stream) if p.pts is not None), None)
    except av.error.FFmpegError:
        return None
    if packet is None or packet.pts is None or not packet.is_keyframe or packet.pts <= target:
        return None
    return _Keyframe(packet.pts, target, packet)


def _alone(clip: _Clip, keyframe: _Keyframe) -> Shown:
    """A keyframe, decoded from its packet and nothing else."""
    codec, packet = clip.stream.codec_context, keyframe.packet
    codec.skip_frame = "DEFAULT"
    try:
        frames = [*packet.decode(), *codec.decode(None)]
    except av.error.FFmpegError as error:
        raise DamagedError(f"cannot be decoded ({error.strerror})", where=clip.where, fix=RESTORE) from None
    codec.flush_buffers()  # the decoder was told of an end that is none
    if packet.is_corrupt or len(frames) != 1 or frames[0].is_corrupt or frames[0].pts != keyframe.pts:
        raise clip.damaged(keyframe.pts)
    return Shown(keyframe.pts, clip.pixels(frames[0]))


class _Pass:
    """One forward decode that serves the targets of a group."""

    def __init__(self, clip: _Clip, group: _Group, *, skip: bool) -> None:
        self.clip, self.stream, self.skip = clip, clip.stream, skip
        self.targets = group.targets
        self.first_pts = group.keyframe.pts if group.keyframe else None
        self.expected: list[int] = []  # with `skip`: for each target, the time of its frame as the packets tell it

    def run(self) -> list[Shown]:
        frames = self._frames()
        shown: list[Shown] = []
        current: VideoFrame | None = None
        following = next(frames, None)
        for number, target in enumerate(self.targets):
            while following is not None and (current is None or _pts(following) <= target):
                current, following = following, next(frames, None)
            if current is None or (self.skip and _pts(current) != self.expected[number]):
                raise self.clip.damaged(target)
            reuse = shown and shown[-1].pts == current.pts
            shown.append(shown[-1] if reuse else Shown(_pts(current), self.clip.pixels(current)))
        return shown

    def _frames(self) -> Iterator[VideoFrame]:
        """Decoded frames from the keyframe on, in order of presentation; some that no target needs are left out."""
        codec = self.stream.codec_context
        try:
            for packet, needless in self._packets():
                codec.skip_frame = "NONREF" if needless else "DEFAULT"
                if packet.is_corrupt:
                    raise self.clip.damaged(packet.pts)
                for frame in packet.decode():
                    # Frames shown before the keyframe but stored after it refer to frames that were not read.
                    leading = self.first_pts is not None and frame.pts is not None and frame.pts < self.first_pts
                    if not leading:
                        if frame.is_corrupt or frame.pts is None:
                            raise self.clip.damaged(frame.pts)
                        yield frame
        except av.error.FFmpegError as error:
            raise DamagedError(f"cannot be decoded ({error.strerror})", where=self.clip.where, fix=RESTORE) from None

    def _packets(self) -> Iterator[tuple[Packet[VideoStream], bool]]:
        """Packets in stored order, and whether the packet's own frame (not those that refer to it) is needless."""
        packets = self.clip.container.demux(self.stream)
        if not self.skip:
            yield from ((packet, False) for packet in packets)
            return
        pending: Packet[VideoStream] | None = None
        times: list[int] = []
        for target in self.targets:
            segment, pending = _until(packets, target, pending)
            times += [p.pts for p in segment if p.pts is not None and self._is_shown(p)]
            best = max((t for t in times if t <= target), default=min(times, default=target))
            self.expected.append(best)
            times = [t for t in times if t >= best]
            yield from ((p, p.pts is not None and p.pts < best) for p in segment)
        if pending is not None:
            yield pending, False
        yield from ((packet, False) for packet in packets)

    def _is_shown(self, packet: Packet[VideoStream]) -> bool:
        early = self.first_pts is not None and packet.pts is not None and packet.pts < self.first_pts
        return not (early or packet.is_discard)


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


def _pts(frame: VideoFrame) -> int:
    return frame.pts if frame.pts is not None else 0
