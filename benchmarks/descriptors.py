"""What descriptor extraction costs: seconds of media for a second of work, and what a second process brings.

Run: python benchmarks/descriptors.py [--sounds 48] [--seconds 10] [--repeats 5]
Everything is generated but the portrait for landmarks, which the environment of MediaPipe carries (left out when it is
not set up). Medians; ratios compare runs of one session. Both counts of processes pay their start, which is measured on
a few items and taken off, since a release has 100,000 of them. On a machine that others use, processor seconds
say more than wall time: if a second process costs no more of them for the same work, it doubles the rate on free cores.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import soundfile

from hba.descriptors import pool
from hba.descriptors.describe import describe
from hba.descriptors.items import Settings
from hba.descriptors.landmarks import environment_folder
from hba.parallel import AHEAD

CLIP_FRAMES, CLIP_RATE, CLIPS = 25, 25, 20


def write_rows(root: Path, field: str, media: list[str]) -> None:
    about = {"problem": "How?", "answer": "anger", "dataset": "cremad", "task": "x_cls"}
    signature = {"audios": "text_audio", "videos": "text_video"}[field]
    rows = [{**about, "modality_signature": signature, field: [medium]} for medium in media]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_sounds(root: Path, count: int, seconds: float) -> None:
    rng = np.random.default_rng(0)
    root.mkdir()
    for i in range(count):
        time_T = np.arange(round(16_000 * seconds)) / 16_000
        voiced = np.sign(np.sin(2 * np.pi * (120 + i) * time_T)) * (1 + np.sin(8 * time_T)) * 0.1
        soundfile.write(root / f"{i}.wav", voiced + rng.normal(0, 0.01, len(time_T)), 16_000)
    write_rows(root, "audios", [f"{i}.wav" for i in range(count)])


def make_clips(root: Path, picture: np.ndarray, count: int) -> None:
    root.mkdir()
    for i in range(count):
        with av.open(str(root / f"{i}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=CLIP_RATE)
            stream.height, stream.width, stream.pix_fmt = (*picture.shape[:2], "yuv420p")
            for shift in range(CLIP_FRAMES):
                moved = np.ascontiguousarray(np.roll(picture, i + 2 * shift, axis=1))
                container.mux(stream.encode(av.VideoFrame.from_ndarray(moved, format="rgb24")))
            container.mux(stream.encode())
    write_rows(root, "videos", [f"{i}.mp4" for i in range(count)])


class Cost(NamedTuple):
    """Wall and processor seconds; the latter without MediaPipe, which ends with its owner and is not accounted."""

    wall: float
    processor: float


def processor_seconds() -> float:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in usage)


def timed(source: Path, settings: Settings, workers: int, rows: int | None = None) -> Cost:
    """One run on a fresh copy, of the first `rows` alone if given."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "atlas"
        shutil.copytree(source, root)
        if rows is not None:
            lines = (root / "train.jsonl").read_text().splitlines(keepends=True)
            (root / "train.jsonl").write_text("".join(lines[:rows]))
        start, used = time.perf_counter(), processor_seconds()
        summary = describe(root, settings, workers=workers)
        assert not summary.failed, summary.failures
        return Cost(time.perf_counter() - start, processor_seconds() - used)


def bench(name: str, source: Path, settings: Settings, count: int, seconds: float, repeats: int) -> None:
    """`count` media of `seconds` each. Runs with one and two processes alternate: a busy machine hits both alike."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    spent: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(repeats):
        for workers in rates:
            few = workers * AHEAD  # so many that no process is left without
            start = timed(source, settings, workers, rows=few)
            whole, media = timed(source, settings, workers), (count - few) * seconds
            rates[workers].append(media / (whole.wall - start.wall))
            spent[workers].append((whole.processor - start.processor) / media)
    one, two = (statistics.median(values) for values in rates.values())
    speed_up = statistics.median(b / a for a, b in zip(*rates.values(), strict=True))
    print(
        f"{name}: {one:.1f} x real time with one process, {two:.1f} x with two: {speed_up:.2f}x, medians of {repeats}"
    )
    if settings.audio:
        per_second = [1000 * statistics.median(values) for values in spent.values()]
        ratio = statistics.median(b / a for a, b in zip(*spent.values(), strict=True))
        shown = f"{per_second[0]:.1f} ms a second of sound with one process, {per_second[1]:.1f} ms with two"
        print(f"  processor time: {shown}: {ratio:.2f}x")


def bench_pool() -> None:
    rng = np.random.default_rng(0)
    for shape in ((1, 6373), (250, 543 * 3)):
        x_TD = rng.normal(size=shape).astype(np.float32)
        for mode in ("meanstd", "meanstdp25p75"):
            times = []
            for _ in range(5):
                start = time.perf_counter()
                pool(x_TD, mode, "l2")
                times.append(time.perf_counter() - start)
            print(f"pool {list(shape)} {mode}: {1000 * statistics.median(times):.2f} ms")


def main() -> None:
    """Run all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sounds", type=int, default=72, help="number of sounds")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a sound")
    parser.add_argument("--repeats", type=int, default=5, help="runs of which the median is taken")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    bench_pool()
    with tempfile.TemporaryDirectory() as folder:
        sounds = Path(folder) / "sounds"
        make_sounds(sounds, options.sounds, options.seconds)
        for audio in ("compare", "egemaps"):
            settings = Settings(audio=audio, video=None)
            bench(f"openSMILE {audio}", sounds, settings, options.sounds, options.seconds, options.repeats)
        portraits = list(environment_folder().glob("lib/*/site-packages/matplotlib/mpl-data/sample_data/grace*.jpg"))
        if not portraits:
            print("landmarks: not measured; run `hba atlas describe --setup` first")
            return
        from hba.atlas.media import load_image

        clips = Path(folder) / "clips"
        make_clips(clips, load_image(portraits[0], where="portrait"), CLIPS)
        settings = Settings(audio=None, video="holistic")
        bench(
            "MediaPipe, 25 frames of 512 x 600 a second",
            clips,
            settings,
            CLIPS,
            CLIP_FRAMES / CLIP_RATE,
            options.repeats,
        )


if __name__ == "__main__":
    main()
