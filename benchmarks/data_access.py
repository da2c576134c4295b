"""What it costs to open an atlas of 100,000 rows, to plan an epoch of it, and to take its fingerprint.

    python benchmarks/data_access.py [--folder DIR]

Rows and small media files are generated; the same rows are opened as JSONL and as parquet shards, each in processes of
their own, and the medians of five are printed: wall time, CPU time in brackets, memory above that of a process that has
imported the package. Opening checks every row; for parquet it includes the import of pyarrow. The plan includes looking
at the size of every sound. See `random_access.py` for rows of large media and `video_frames.py` for clips.
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
from typing import Any

from hba.atlas import open_atlas
from hba.batch.sampler import plan_batches

REPEATS = 5
ROWS_100K = 100_000
STEPS = ("open", "plan", "fingerprint")


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
        from hba.atlas.convert import convert_to_parquet  # the other processes must not find pyarrow loaded

        convert_to_parquet(open_atlas(folder, "train"), folder / "parquet", shard_bytes=200_000)
    for form in ("", "parquet"):
        runs = [json.loads(_child("open", str(folder / form))) for _ in range(REPEATS)]
        middle = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        times = ", ".join(f"{name} {middle[name]:.3f} s ({middle[f'{name}_cpu']:.3f})" for name in STEPS)
        print(f"100,000 rows, {form or 'jsonl'}: {times}, {middle['memory']:.0f} MB")


def _peak_kilobytes() -> int:
    # Not ru_maxrss: a child process inherits its parent's.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def _child(*arguments: str) -> str:
    return subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True).stdout


def child_open(folder: str) -> None:
    """Measure one opening, in a process of its own."""
    before, times = _peak_kilobytes(), {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        result = call()
        times[name], times[f"{name}_cpu"] = time.perf_counter() - wall, time.process_time() - cpu
        return result

    atlas = timed("open", lambda: open_atlas(folder, "train"))
    times["memory"] = (_peak_kilobytes() - before) / 1024
    codes = atlas.columns.signature_codes
    timed("plan", lambda: plan_batches(codes, atlas.estimated_tokens, batch_size=16, seed=0, epoch=0))
    timed("fingerprint", lambda: atlas.fingerprint)
    print(json.dumps(times))


def main() -> None:
    """Measure both forms, or one opening in a child process."""
    if sys.argv[1:2] == ["open"]:
        return child_open(sys.argv[2])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to keep the generated data; a temporary folder if left out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        bench_open(options.folder or Path(temporary))
    return None


if __name__ == "__main__":
    main()
