"""What access to the data costs: opening an index, frames of a clip, a shuffled row of a parquet shard.

Run: python benchmarks/data_access.py [--folder DIR] [--gigabytes 1]
Everything is generated; ratios are of medians of five. Rows hold random bytes in the place of clips, and a read touches
all bytes of the row, so that the layouts are compared by what they make a reader do and not by a decoder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hba.atlas import open_atlas
from hba.atlas.convert import convert_to_parquet
from hba.atlas.media import load_video
from hba.atlas.sampler import plan_batches
from hba.atlas.source import read_bytes

REPEATS = 5
ROWS_100K = 100_000


def median_seconds(call: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median wall time of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def make_row(number: int, media: dict[str, list[str]], signature: str) -> dict[str, object]:
    text = {"problem": f"What does the person in the clip feel, and why? Answer in one word. {number} " * 4}
    names = {"answer": "anger", "dataset": "cremad", "task": "emotion_cls", "class_label": "anger"}
    return text | names | media | {"modality_signature": signature}


def bench_open(folder: Path) -> None:
    """Opening 100,000 rows and planning an epoch; each in its own process, for its memory."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "train.jsonl").exists():
        with (folder / "train.jsonl").open("w") as file:
            for i in range(ROWS_100K):
                media = {"videos": [f"v/{i}.mp4"], "audios": [f"a/{i}.wav"], "ext_video_feats": [f"p/{i}.pt"]}
                file.write(json.dumps(make_row(i, media, "text_video_audio")) + "\n")
        for name in ("v/{}.mp4", "a/{}.wav", "p/{}.pt"):
            (folder / name).parent.mkdir()
            for i in range(ROWS_100K):
                (folder / name.format(i)).write_bytes(b"%d" % i)
        convert_to_parquet(open_atlas(folder, "train"), folder / "parquet", shard_bytes=200_000)
    for form in ("", "parquet"):
        runs = [json.loads(_child("open", str(folder / form))) for _ in range(REPEATS)]
        seconds, cpu, plan, memory = (statistics.median(r[k] for r in runs) for k in ("open", "cpu", "plan", "memory"))
        print(
            f"open 100,000 rows, {form or 'jsonl'}: {seconds:.2f} s ({cpu:.2f} s of CPU), {memory:.0f} MB more; "
            f"plan of an epoch {plan:.3f} s"
        )


def _peak_kilobytes() -> int:
    # Not ru_maxrss: a child process inherits its parent's.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def _child(*arguments: str) -> str:
    return subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True).stdout


def child_open(folder: str) -> None:
    """Measure one opening, in a process of its own."""
    import hba.atlas.parquet  # noqa: F401

    before = _peak_kilobytes()
    start, cpu = time.perf_counter(), time.process_time()
    atlas = open_atlas(folder, "train")
    opened, cpu = time.perf_counter() - start, time.process_time() - cpu
    memory = (_peak_kilobytes() - before) / 1024
    start = time.perf_counter()
    plan_batches(atlas.columns.signature_codes, atlas.estimated_tokens, batch_size=16, seed=0, epoch=0)
    print(json.dumps({"open": opened, "cpu": cpu, "plan": time.perf_counter() - start, "memory": memory}))


def bench_frames(folder: Path) -> None:
    """8 frames of a 60 s clip by seeking against a full decode, both with one thread."""
    rng = np.random.default_rng(0)
    base = rng.integers(0, 255, (45, 80, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    for gop in (50, 250):
        path = folder / f"gop{gop}.mp4"
        if not path.exists():
            with av.open(str(path), "w") as out:
                stream = out.add_stream("libx264", rate=25, options={"g": str(gop)})
                stream.width, stream.height = 640, 360
                for i in range(1500):
                    noise = rng.integers(0, 12, base.shape, dtype=np.uint8)
                    pixels = np.roll(base, 3 * i, axis=1) // 2 + noise
                    out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
                out.mux(stream.encode())

        def full(path: Path = path) -> None:
            with av.open(str(path)) as container:
                container.streams.video[0].codec_context.thread_count = 1
                for _ in container.decode(video=0):
                    pass

        whole, seeking = median_seconds(full), median_seconds(lambda path=path: load_video(path, 8, where="bench"))
        print(f"8 frames, keyframe every {gop}: {seeking:.3f} s; full decode {whole:.3f} s; {whole / seeking:.1f}x")


def bench_shards(folder: Path, gigabytes: float) -> None:
    """Shuffled rows of parquet in several layouts."""
    row_bytes = 2_500_000
    num_rows = int(gigabytes * 1e9 / row_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    if not (folder / "train.jsonl").exists():
        for i in range(num_rows):
            (folder / f"{i}.bin").write_bytes(rng.bytes(row_bytes))
        lines = [json.dumps(make_row(i, {"videos": [f"{i}.bin"]}, "text_video")) for i in range(num_rows)]
        (folder / "train.jsonl").write_text("\n".join(lines))
        convert_to_parquet(open_atlas(folder, "train"), folder / "indexed")
        _other_layouts(folder, num_rows)
    whole = folder / "whole.parquet"
    order = rng.permutation(num_rows)
    per_row = {"whole shard into memory for a row, as published": _timed(lambda i: _from_table(whole, i), order[:3])}
    for rows in (1, 8, 64):
        file = pq.ParquetFile(folder / f"groups{rows}.parquet")
        per_row[f"row group of {rows}, no index"] = _timed(lambda i, f=file, n=rows: _from_group(f, i, n), order[:20])
    for name, path in (("indexed shard", folder / "indexed"), ("jsonl and files", folder)):
        atlas = open_atlas(path, "train")
        per_row[name] = _timed(lambda i, a=atlas: len(read_bytes(a[i].source.medium(i, "videos", 0, where=""))), order)
    indexed = per_row["indexed shard"]
    for name, seconds in per_row.items():
        print(f"shuffled row of 2.5 MB, {name}: {1000 * seconds:.2f} ms; indexed is {seconds / indexed:.1f}x as fast")
    footers = {rows: (folder / f"groups{rows}.parquet").stat().st_size - num_rows * row_bytes for rows in (1, 8, 64)}
    print("bytes beside the media, by rows in a group:", footers)
    print("memory of reading every indexed row in order:", _child("walk", str(folder / "indexed")).strip(), "MB")


def _other_layouts(folder: Path, num_rows: int) -> None:
    for name, rows in (("whole", num_rows), ("groups1", 1), ("groups8", 8), ("groups64", 64)):
        writer = None
        for start in range(0, num_rows, rows):
            media = [[(folder / f"{i}.bin").read_bytes()] for i in range(start, min(start + rows, num_rows))]
            table = pa.table({"videos": pa.array(media, pa.list_(pa.large_binary()))})
            writer = writer or pq.ParquetWriter(folder / f"{name}.parquet", table.schema)
            writer.write_table(table)
        if writer is not None:
            writer.close()


def _from_table(path: Path, row: int) -> int:
    return len(pq.read_table(path)["videos"][row][0].as_py())


def _from_group(file: pq.ParquetFile, row: int, rows: int) -> int:
    group = file.read_row_group(row // rows, columns=["videos"])
    return len(group["videos"][row % rows][0].as_py())


def _timed(read: Callable[[int], int], rows: np.ndarray) -> float:
    """Median over repeats of the mean seconds a row."""
    return median_seconds(lambda: [read(int(row)) for row in rows]) / len(rows)


def child_walk(folder: str) -> None:
    """Peak memory, above that of the start, of reading every row."""
    atlas = open_atlas(folder, "train")
    before = _peak_kilobytes()
    for number, sample in enumerate(atlas):
        read_bytes(sample.source.medium(number, "videos", 0, where=""))
    print((_peak_kilobytes() - before) // 1024)


def main() -> None:
    """Run all, or one measurement of a child process."""
    if sys.argv[1:2] == ["open"]:
        return child_open(sys.argv[2])
    if sys.argv[1:2] == ["walk"]:
        return child_walk(sys.argv[2])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to keep the generated data; a temporary folder if left out")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the parquet set")
    parser.add_argument("--only", nargs="*", choices=("frames", "open", "shards"), help="measure these alone")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        parts = options.only or ("frames", "open", "shards")
        if "frames" in parts:
            bench_frames(folder)
        if "open" in parts:
            bench_open(folder / "open")
        if "shards" in parts:
            bench_shards(folder / "shards", options.gigabytes)
    return None


if __name__ == "__main__":
    main()
