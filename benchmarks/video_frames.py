"""8 frames of a clip by seeking against a decode of the whole clip, one thread each.

    python benchmarks/video_frames.py [--folder DIR]

Clips of 640x360 h264 are generated; times are medians of five, taken in turn, so that a busy machine slows all alike.
`x` says how many times as long the whole decode takes: of wall time and, in brackets, of the process's CPU time. The
whole decode is measured bare (no frame is converted) and as a reader that converts the same 8 frames to RGB. Every
exact frame is compared with that of the whole decode.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

from hba.atlas.media import load_video

REPEATS, NUM_FRAMES, RATE = 5, 8, 25


class Times(NamedTuple):
    """Median seconds."""

    wall: float
    cpu: float


def make_clip(path: Path, seconds: int, gop: int) -> None:
    """A clip with motion and noise, with a keyframe every `gop` frames."""
    rng = np.random.default_rng(0)
    base = rng.integers(0, 255, (45, 80, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=RATE, options={"g": str(gop)})
        stream.width, stream.height = 640, 360
        for i in range(RATE * seconds):
            pixels = np.roll(base, 3 * i, axis=1) // 2 + rng.integers(0, 12, base.shape, dtype=np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode())


def decode_all(path: Path, wanted: frozenset[int] = frozenset()) -> dict[int, np.ndarray]:
    """Every frame decoded; those of the `wanted` times, in milliseconds, as RGB."""
    found = {}
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        for frame in container.decode(video=0):
            if wanted and (at := round(frame.time * 1000)) in wanted:
                found[at] = frame.to_ndarray(format="rgb24")
    return found


def measure(*calls: Callable[[], object]) -> list[Times]:
    """Median times of calls that take turns."""
    runs: list[list[Times]] = [[] for _ in calls]
    for _ in range(REPEATS):
        for call, times in zip(calls, runs, strict=True):
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            times.append(Times(time.perf_counter() - wall, time.process_time() - cpu))
    return [Times(statistics.median(t.wall for t in each), statistics.median(t.cpu for t in each)) for each in runs]


def compare(path: Path) -> None:
    """One line of ratios."""
    exact = load_video(path, NUM_FRAMES, where=str(path))
    times = [round(seconds * 1000) for seconds in exact.timestamps_seconds]
    wanted = frozenset(times)
    reference = decode_all(path, wanted)
    if not all(np.array_equal(reference[at], frame) for at, frame in zip(times, exact.frames, strict=True)):
        raise SystemExit(f"{path.name}: frames differ from those of the whole decode")
    bare, reading, seeking, keyframes = measure(
        lambda: decode_all(path),
        lambda: decode_all(path, wanted),
        lambda: load_video(path, NUM_FRAMES, where=str(path)),
        lambda: load_video(path, NUM_FRAMES, where=str(path), frames="nearest_keyframe"),
    )
    ratios = [
        f"{name} {whole.wall / ours.wall:5.1f}x ({whole.cpu / ours.cpu:5.1f}x)"
        for name, whole, ours in (
            ("exact: bare", bare, seeking),
            ("reading", reading, seeking),
            ("nearest keyframe: bare", bare, keyframes),
        )
    ]
    print(f"{path.name:>14}  exact {seeking.wall:.3f} s ({seeking.cpu:.3f}), whole {bare.wall:.3f} s   ", *ratios)


def main() -> None:
    """Measure clips of several lengths, keyframe distances and containers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to keep the clips; a temporary folder if left out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for seconds, gop in ((60, 50), (60, 250), (10, 250), (5, 250), (2, 250)):
            for suffix in ("mp4", "mkv"):
                path = folder / f"{seconds}s_g{gop}.{suffix}"
                if not path.exists():
                    make_clip(path, seconds, gop)
                compare(path)


if __name__ == "__main__":
    main()
