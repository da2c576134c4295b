"""What a training loop asks of a shuffled row, through `datasets` and the atlas: 8 frames of a clip, 2 s of sound.

    python benchmarks/decoded_access.py [--rows 60] [--folder DIR] [--peer-python PYTHON]

Rows hold a clip of a minute and a short sound in parquet shards: those of `hba atlas convert` for the atlas, the same
values in row groups of 8 for `datasets.load_dataset`, which PYTHON must be able to import beside hba. Both decode with
hba's decoders, `datasets` from the bytes that it gives, so that the difference is the access alone. Cold: no file is in
the page cache. Medians of five; a time of the process's own CPU is in brackets.
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

import numpy as np

REPEATS, NUM_FRAMES, RATE = 5, 8, 16_000
KINDS = ("atlas", "datasets")


def prepare(folder: Path, num_rows: int) -> None:
    """The rows as JSONL, as indexed shards and as a plain shard."""
    import pyarrow.parquet as pq
    import soundfile

    from hba.atlas import open_atlas
    from hba.atlas.convert import convert_to_parquet
    from video_frames import make_clip

    make_clip(folder / "clip.mp4", 60, 50)
    soundfile.write(folder / "sound.wav", np.random.default_rng(0).normal(0, 0.1, 2 * RATE), RATE)
    said = {"problem": "How?", "answer": "anger", "dataset": "cremad", "task": "emotion_cls", "class_label": "anger"}
    media = {"videos": ["clip.mp4"], "audios": ["sound.wav"], "modality_signature": "text_video_audio"}
    (folder / "train.jsonl").write_text((json.dumps(said | media) + "\n") * num_rows)
    (folder / "plain").mkdir()
    shards = convert_to_parquet(open_atlas(folder, "train"), folder / "atlas", shard_bytes=200_000_000)
    for shard in shards:
        table = pq.read_table(shard, columns=["problem", "videos", "audios"])
        plain = folder / "plain" / shard.name
        pq.write_table(table, plain, row_group_size=8, compression="none", use_dictionary=False)


def reader(kind: str, folder: Path) -> Callable[[int], object]:
    """A function that gives the frames and the sound of a row."""
    from hba.atlas.media import load_audio, load_video

    if kind == "atlas":
        from hba.atlas import open_atlas

        atlas = open_atlas(folder / "atlas", "train")

        def sample(row: int) -> object:
            found = atlas[row]
            return found.load_videos(NUM_FRAMES), found.load_audios()

        return sample
    from random_access import open_datasets

    table = open_datasets(folder / "plain")

    def decoded(row: int) -> object:
        values = table[row]
        return load_video(values["videos"][0], NUM_FRAMES, where="row"), load_audio(values["audios"][0], where="row")

    return decoded


def measure(kind: str, folder: Path, num_rows: int) -> dict[str, float]:
    """Median samples a second, cold and warm, by the clock and by CPU time."""
    from random_access import drop_cache

    read = reader(kind, folder)
    read(0)
    runs: dict[str, list[float]] = {}
    for run in range(REPEATS):
        rows = np.random.default_rng(run).permutation(num_rows).tolist()
        drop_cache(folder)
        for name in ("cold", "warm"):
            wall, cpu = time.perf_counter(), time.process_time()
            for row in rows:
                read(row)
            runs.setdefault(name, []).append(num_rows / (time.perf_counter() - wall))
            runs.setdefault(f"{name}_cpu", []).append(num_rows / (time.process_time() - cpu))
    return {name: statistics.median(values) for name, values in runs.items()}


def main() -> None:
    """Compare both, each in a process of its own."""
    if sys.argv[1:2] == ["measure"]:
        print(json.dumps(measure(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--folder", type=Path, help="where to write the shards; a temporary folder if left out")
    parser.add_argument("--peer-python", default=sys.executable, help="a Python that can import datasets and hba")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        prepare(Path(temporary), options.rows)
        found = {}
        for kind in KINDS:
            command = [options.peer_python, __file__, "measure", kind, temporary, str(options.rows)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[kind] = json.loads(output.splitlines()[-1])
            print(line(kind, found[kind], "samples/s"))
        ratio = {name: found["atlas"][name] / found["datasets"][name] for name in found["atlas"]}
        print(line("ratio", ratio, "x"))


def line(title: str, values: dict[str, float], unit: str) -> str:
    """One line of results."""
    said = (f"{name} {values[name]:.2f} ({values[f'{name}_cpu']:.2f}) {unit}" for name in ("cold", "warm"))
    return f"{title:>9}: {', '.join(said)}"


if __name__ == "__main__":
    main()
