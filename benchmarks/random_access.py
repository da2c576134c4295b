"""What one shuffled row costs in each layout of embedded media: samples a second, bytes read, memory.

    python benchmarks/random_access.py [--gigabytes 4] [--folder DIR] [--peer-python PYTHON] [--only LAYOUT ...]

Rows hold random bytes of 0.5 to 4.5 MB in the place of clips, in shards of about 500 MB as published. A layout is
written, measured in a process of its own and removed again. A read takes all bytes of its row. Cold: every file is
dropped from the page cache before each of the five runs; `read` is what came from the disk for a row, by its own size.
Warm: the same rows again. Sample: the row as one item of the dataset, ready to decode, warm; only the atlas gives it
without the bytes. The index checks what it reads (CRC-32), the others do not. Memory is the peak above that of the
start, mapped pages of files included. Lance and `datasets` are measured with PYTHON, where they can be imported.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

REPEATS = 5
SECONDS_A_RUN = 6.0
ROWS_A_RUN = 60
MEAN_BYTES = 2_500_000
SHARD_ROWS = 200
SCHEMA = pa.schema([pa.field("id", pa.string()), pa.field("videos", pa.list_(pa.binary()))])
Read = Callable[[int], int]
# Layout: rows in a row group, rows in a data page (0: as the writer likes).
GROUPS = {"groups of 64": 64, "groups of 8": 8, "groups of 1": 1, "page index": SHARD_ROWS, "whole shard": SHARD_ROWS}
LAYOUTS = (*GROUPS, "blocks of 8", "datasets", "lance", "files", "indexed")
PEERS = {"datasets": "datasets", "lance": "lance"}
PLAIN = "groups of 8"


def sizes_of(num_rows: int) -> list[int]:
    """Bytes of each row."""
    return np.random.default_rng(0).integers(MEAN_BYTES // 5, MEAN_BYTES * 9 // 5, num_rows).tolist()


def contents(num_rows: int) -> Iterator[bytes]:
    """The medium of each row: cut from a pool, since random bytes are slow to make."""
    pool = np.random.default_rng(1).bytes(32 << 20)
    for number, size in enumerate(sizes_of(num_rows)):
        at = number * 7919 % (len(pool) - size)
        yield number.to_bytes(8, "little") + pool[at + 8 : at + size]


def shard_tables(num_rows: int) -> Iterator[tuple[int, Iterator[pa.Table]]]:
    """For each shard its number and its rows as tables of one row."""
    media = contents(num_rows)
    for shard in range(0, num_rows, SHARD_ROWS):
        rows = range(shard, min(shard + SHARD_ROWS, num_rows))
        yield (
            shard // SHARD_ROWS,
            (pa.table({"id": [f"{i}"], "videos": [[next(media)]]}, SCHEMA) for i in rows),
        )


def write_plain(folder: Path, num_rows: int, group: int, *, page_index: bool) -> None:
    """Parquet shards with `group` rows in a row group."""
    options: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_page_index": page_index}
    for shard, tables in shard_tables(num_rows):
        path = folder / f"train-{shard:05d}.parquet"
        with pq.ParquetWriter(path, SCHEMA, data_page_size=1 if page_index else None, **options) as writer:
            held: list[pa.Table] = []
            for table in tables:
                held.append(table)
                if len(held) == group:
                    writer.write_table(pa.concat_tables(held), row_group_size=group)
                    held = []
            if held:
                writer.write_table(pa.concat_tables(held), row_group_size=group)


def write_files(folder: Path, num_rows: int) -> None:
    """JSONL and one file a medium."""
    said = {"problem": "How?", "answer": "anger", "dataset": "cremad", "task": "emotion_cls", "class_label": "anger"}
    with (folder / "train.jsonl").open("w") as lines:
        for number, medium in enumerate(contents(num_rows)):
            (folder / f"{number}.bin").write_bytes(medium)
            lines.write(json.dumps({**said, "videos": [f"{number}.bin"], "modality_signature": "text_video"}) + "\n")


def build(layout: str, folder: Path, num_rows: int, peer_python: str) -> None:
    """Write a layout into `folder`."""
    if layout in GROUPS:
        write_plain(folder, num_rows, GROUPS[layout], page_index=layout == "page index")
    elif layout == "blocks of 8" or layout == "datasets":
        write_plain(folder, num_rows, GROUPS[PLAIN], page_index=False)
    elif layout == "files":
        write_files(folder, num_rows)
    elif layout == "indexed":
        from hba.atlas import open_atlas
        from hba.atlas.convert import convert_to_parquet

        write_files(folder, num_rows)
        convert_to_parquet(open_atlas(folder, "train"), folder / "parquet")
        for path in (*folder.glob("*.bin"), folder / "train.jsonl"):
            path.unlink()
    if layout in PEERS:
        subprocess.run([peer_python, __file__, "prepare", layout, str(folder), str(num_rows)], check=True)


def prepare(layout: str, folder: Path, num_rows: int) -> None:
    """What a peer writes itself, with the peer's Python."""
    if layout == "datasets":
        open_datasets(folder)
        return
    import lance

    blob = pa.schema([pa.field("id", pa.string()), pa.field("videos", pa.large_binary())])
    batches = (
        pa.record_batch({"id": [f"{number}"], "videos": [medium]}, blob)
        for number, medium in enumerate(contents(num_rows))
    )
    stream = pa.RecordBatchReader.from_batches(blob, batches)
    lance.write_dataset(stream, folder / "lance", max_rows_per_file=SHARD_ROWS)


def open_datasets(folder: Path) -> Any:
    """The shards as a `datasets.Dataset`, whose cache lies in the folder too."""
    import datasets

    datasets.disable_progress_bars()
    files = sorted(map(str, folder.glob("*.parquet")))
    return datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(folder / "cache"))


def reader(layout: str, folder: Path) -> Read:
    """A function that reads all bytes of a row and says how many they are."""
    if layout in ("files", "indexed"):
        return atlas_reader(folder / "parquet" if layout == "indexed" else folder)
    if layout == "datasets":
        table = open_datasets(folder)
        return lambda row: touch(table[row]["videos"][0])
    if layout == "lance":
        import lance

        dataset = lance.dataset(folder / "lance")
        return lambda row: touch(dataset.take([row], columns=["videos"])["videos"][0].as_py())
    shards = sorted(folder.glob("*.parquet"))
    if layout == "whole shard":
        return lambda row: whole(shards[row // SHARD_ROWS], row % SHARD_ROWS)
    files = [pq.ParquetFile(shard, pre_buffer=False) for shard in shards]
    if layout == "page index":
        return lambda row: by_pages(files[row // SHARD_ROWS], row % SHARD_ROWS)
    group = GROUPS.get(layout, GROUPS[PLAIN])
    return lambda row: by_group(files[row // SHARD_ROWS], row % SHARD_ROWS, group)


def atlas_item(folder: Path) -> Callable[[int], object]:
    """The sample, with its media found and not read."""
    from hba.atlas import open_atlas

    atlas = open_atlas(folder, "train")

    def item(row: int) -> object:
        sample = atlas[row]
        return sample.source.medium(sample.number, "videos", 0, where=sample.where)

    return item


def atlas_reader(folder: Path) -> Read:
    """Through the atlas, as a loader reads."""
    from hba.atlas import open_atlas
    from hba.atlas.source import read_bytes

    atlas = open_atlas(folder, "train")

    def read(row: int) -> int:
        sample = atlas[row]
        return touch(read_bytes(sample.source.medium(sample.number, "videos", 0, where=sample.where)))

    return read


def touch(medium: bytes) -> int:
    """Look at every page of the bytes, which may be mapped."""
    return len(medium) + 0 * sum(medium[::4096])


def whole(shard: Path, row: int) -> int:
    """The whole shard into memory, for one row; into pandas, where it is there, as the published loader does."""
    try:
        import pandas as pd
    except ImportError:
        return touch(pq.read_table(shard)["videos"][row].as_py()[0])
    return touch(pd.read_parquet(shard)["videos"][row][0])


def by_group(file: pq.ParquetFile, row: int, group: int) -> int:
    """The row group of the row."""
    found = file.read_row_group(row // group, columns=["videos"], use_threads=False)
    return touch(found["videos"][row % group].as_py()[0])


def by_pages(file: pq.ParquetFile, row: int) -> int:
    """As far as pyarrow goes with a page index: no call skips to a page, so that pages are read up to the row."""
    for number, batch in enumerate(file.iter_batches(batch_size=1, columns=["videos"], use_threads=False)):
        if number == row:
            return touch(batch.column(0)[0].as_py()[0])
    raise IndexError(row)


def drop_cache(folder: Path) -> None:
    """Drop the pages of every file of a layout."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def disk_bytes() -> int:
    """Bytes that this process made the disk read."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


def peak_megabytes() -> float:
    """Not ru_maxrss: a child process inherits its parent's."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def orders(layout: str, num_rows: int, run: int) -> list[int]:
    """Rows in the order of reading. Blocks: all rows of one group after the other."""
    rng = np.random.default_rng(100 + run)
    if layout == "blocks of 8":
        groups = rng.permutation(num_rows // 8)
        return [int(8 * g + i) for g in groups for i in rng.permutation(8)]
    return rng.permutation(num_rows).tolist()


def blocks_reader(folder: Path) -> Read:
    """Keeps the last row group, since the next row is in it."""
    files = [pq.ParquetFile(shard, pre_buffer=False) for shard in sorted(folder.glob("*.parquet"))]
    held: dict[int, Any] = {}

    def read(row: int) -> int:
        if row // 8 not in held:
            held.clear()
            file = files[row // SHARD_ROWS]
            held[row // 8] = file.read_row_group(row % SHARD_ROWS // 8, columns=["videos"], use_threads=False)
        return touch(held[row // 8]["videos"][row % 8].as_py()[0])

    return read


def measure(layout: str, folder: Path, num_rows: int) -> dict[str, float]:
    """Medians of cold and warm runs of one layout."""
    read = blocks_reader(folder) if layout == "blocks of 8" else reader(layout, folder)
    item = atlas_item(folder / "parquet" if layout == "indexed" else folder) if layout in ("files", "indexed") else read
    before, sizes = peak_megabytes(), sizes_of(num_rows)
    runs: dict[str, list[float]] = {"cold": [], "warm": [], "sample": [], "read": []}
    for run in range(REPEATS):
        drop_cache(folder)
        rows, done, at, start = orders(layout, num_rows, run), 0, disk_bytes(), time.perf_counter()
        while done < min(ROWS_A_RUN, len(rows)) and time.perf_counter() - start < SECONDS_A_RUN:
            if read(rows[done]) != sizes[rows[done]]:
                raise SystemExit(f"{layout}: row {rows[done]} has another size")
            done += 1
        runs["cold"].append(done / (time.perf_counter() - start))
        runs["read"].append((disk_bytes() - at) / sum(sizes[row] for row in rows[:done]))
        for name, call in (("warm", read), ("sample", item)):
            start = time.perf_counter()
            for row in rows[:done]:
                call(row)
            runs[name].append(done / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in runs.items()} | {"peak": peak_megabytes() - before}


def available(layout: str, python: str) -> bool:
    """Whether the package that a layout needs is there."""
    if layout not in PEERS:
        return True
    return subprocess.run([python, "-c", f"import {PEERS[layout]}"], capture_output=True).returncode == 0


def compare(options: argparse.Namespace, root: Path) -> None:
    """Write, measure and remove one layout after the other; print the table."""
    num_rows = max(SHARD_ROWS, int(options.gigabytes * 1e9 / MEAN_BYTES))
    print(f"{num_rows} rows, {sum(sizes_of(num_rows)) / 1e9:.1f} GB")
    results: dict[str, dict[str, float]] = {}
    for layout in options.only or LAYOUTS:
        python = options.peer_python if layout in PEERS else sys.executable
        if not available(layout, python):
            print(f"{layout}: not measured, {PEERS[layout]} is not installed", flush=True)
            continue
        folder = root / layout.replace(" ", "_")
        folder.mkdir(parents=True)
        try:
            start = time.perf_counter()
            build(layout, folder, num_rows, options.peer_python)
            seconds = time.perf_counter() - start
            kilobytes = sum(path.stat().st_blocks for path in folder.rglob("*")) / 2
            command = [python, __file__, "measure", layout, str(folder), str(num_rows)]
            answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results[layout] = json.loads(answer.splitlines()[-1]) | {"build": seconds, "disk": kilobytes / 1e6}
            print(json.dumps({layout: {k: round(v, 2) for k, v in results[layout].items()}}), flush=True)
        finally:
            shutil.rmtree(folder)
    table(results)


def table(results: dict[str, dict[str, float]]) -> None:
    """The results as Markdown, with what the indexed slices are faster by."""
    base = results.get("indexed")
    names = ("cold", "warm", "sample")
    print("\n| layout | cold rows/s | warm rows/s | samples/s | read | peak MB | indexed is (cold, warm, sample) |")
    print("|---|---|---|---|---|---|---|")
    for layout, r in results.items():
        times = ", ".join(f"{base[name] / r[name]:.1f}x" for name in names) if base else ""
        speeds = " | ".join(f"{r[name]:,.0f}" if r[name] >= 20 else f"{r[name]:.1f}" for name in names)
        print(f"| {layout} | {speeds} | {r['read']:.2f} | {r['peak']:.0f} | {times} |")
    if base and "datasets" in results:
        print("\nAsked for: 2x `datasets` in samples/s. Warm, copying the bytes of a row alone, that cannot be had:")
        print("both are bound by one copy in memory, and the index checks what it copies (docs/decisions.md).")


def main() -> None:
    """Compare all, or do the part of a child process."""
    if sys.argv[1:2] in (["prepare"], ["measure"]):
        job, layout, folder, num_rows = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
        if job == "prepare":
            prepare(layout, folder, num_rows)
        else:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            print(json.dumps(measure(layout, folder, num_rows)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write the layouts; a temporary folder if left out")
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the set")
    parser.add_argument("--peer-python", default=sys.executable, help="a Python that can import lance and datasets")
    parser.add_argument("--only", nargs="*", choices=LAYOUTS, help="measure these alone")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as root:
        compare(options, Path(root))


if __name__ == "__main__":
    main()
