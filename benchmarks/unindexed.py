"""A shard without an index part, as other programs write it: what opening, planning and the first prediction cost.

    python benchmarks/unindexed.py [MEGABYTES]

Makes shards of 2,000 MB (sounds of 1 MB, row groups of 100 rows, the default of `datasets` for sounds) in two layouts:
as `datasets` 4 writes them (structs, not packed, with a page index) and as pyarrow does by default, and older releases
with it (lists of bytes, snappy, a row group in one page). 40 rows are asked for: the first ones, and some drawn from
the whole shard. Prints seconds and the bytes read as a ratio to the bytes of the rows asked for; the limits are 0.1 for
ids and planning, 3 up to the first prediction and for all of them. The peer reads the row group of each row by Arrow.
At the end the whole shard is validated by two processes: the share of the main one bounds what more of them can bring.
"""

from __future__ import annotations

import json
import resource
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from hba.atlas import Atlas, Sample, open_atlas
from hba.atlas.validate import validate_atlas
from hba.batch.config import EncodeConfig, LoaderConfig
from hba.batch.encode import Encoded, Encoder
from hba.batch.loader import load_batches
from hba.evaluate.backends.interface import evaluation_plan
from hba.evaluate.predict import sample_groups

ROWS, GROUP_ROWS, SOUND_BYTES = 40, 100, 1_000_000
IDS_AT_MOST, BYTES_AT_MOST = 0.1, 3.0
LAYOUTS: dict[str, dict[str, Any]] = {
    "datasets 4": {"compression": "none", "use_dictionary": False, "write_page_index": True},
    "pyarrow's default": {},
}


class Sounds(Encoder):
    """Decodes the sound of a row; no processor, whose time is not asked for here."""

    pad_token_id = 0

    def encode(self, sample: Sample) -> Encoded:
        seconds = sum(audio.seconds for audio in sample.load_audios())
        return Encoded(sample=sample, input_ids_T=torch.full((4,), round(seconds)))


def noise(seed: int) -> bytes:
    """A wav of SOUND_BYTES."""
    samples = np.random.default_rng(seed).integers(-3000, 3000, (SOUND_BYTES - 44) // 2).astype("<i2").tobytes()
    wave = (b"WAVE", b"fmt ", 16, 1, 1, 16_000, 32_000, 2, 16, b"data")
    header = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", len(samples) + 36, *wave, len(samples))
    return header + samples


def write(path: Path, layout: str, num_rows: int) -> None:
    """The shard, a row group at a time."""
    structs = layout == "datasets 4"
    media = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if structs else pa.list_(pa.binary())
    text = ("problem", "answer", "dataset", "task", "modality_signature")
    schema = pa.schema([*(pa.field(name, pa.string()) for name in text), pa.field("audios", media)])
    with pq.ParquetWriter(path, schema, **LAYOUTS[layout]) as writer:
        for first in range(0, num_rows, GROUP_ROWS):
            rows = range(first, min(first + GROUP_ROWS, num_rows))
            said = {"answer": "anger", "dataset": "cremad", "task": "emotion_cls", "modality_signature": "text_audio"}
            columns: dict[str, Any] = {name: [value] * len(rows) for name, value in said.items()}
            columns["problem"] = [f"How does speaker {row} feel? " + "Listen to the voice. " * 20 for row in rows]
            sounds = [noise(row) for row in rows]
            columns["audios"] = [{"bytes": s, "path": "a.wav"} for s in sounds] if structs else [[s] for s in sounds]
            writer.write_table(pa.table(columns, schema))


def bytes_read() -> int:
    """By this process so far."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


@contextmanager
def measured(layout: str, rows: str, what: str, asked: int, limit: float | None) -> Iterator[None]:
    """Prints what happens within."""
    before, started = bytes_read(), time.perf_counter()
    yield
    ratio = (bytes_read() - before) / asked
    record: dict[str, Any] = {"layout": layout, "rows": rows, "measured": what}
    record |= {"seconds": round(time.perf_counter() - started, 3), "read_per_byte_asked_for": round(ratio, 3)}
    record |= {} if limit is None else {"at_most": limit, "holds": ratio <= limit}
    print(json.dumps(record), flush=True)


def predict(atlas: Atlas, layout: str, rows: str, chosen: np.ndarray[Any, Any], asked: int) -> None:
    """The way of `hba predict`: ids, groups, a plan, batches."""
    view = atlas.select(chosen)
    with measured(layout, rows, "ids, groups and plan", asked, IDS_AT_MOST):
        assert len(set(view.ids)) == len(view)
        sample_groups(view)
        plan = evaluation_plan(view, np.arange(len(view)), 4)
    stream = load_batches(view, Sounds(None, EncodeConfig()), plan, LoaderConfig(workers=0, cache_megabytes=0))
    with measured(layout, rows, "up to the first batch", asked, BYTES_AT_MOST):
        assert len(next(stream)) == 4
    with measured(layout, rows, "all batches", asked, BYTES_AT_MOST):
        assert sum(len(batch) for batch in stream) == len(chosen) - 4


def by_arrow(shard: Path, rows: np.ndarray[Any, Any]) -> None:
    """The peer: the row group of each row, as a reader without pages must."""
    with pq.ParquetFile(shard, pre_buffer=False) as file:
        for row in rows[:8]:
            file.read_row_group(int(row) // GROUP_ROWS, columns=["audios"], use_threads=False)


def main() -> None:
    """Both layouts, rows in order and drawn."""
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    num_rows = megabytes * 1_000_000 // SOUND_BYTES
    asked = ROWS * SOUND_BYTES
    with tempfile.TemporaryDirectory() as folder:
        for layout in LAYOUTS:
            shard = Path(folder, "test-00000-of-00001.parquet")
            write(shard, layout, num_rows)
            with measured(layout, "all", "opening", asked, IDS_AT_MOST):
                atlas = open_atlas(folder, split="test")
            drawn = np.sort(np.random.default_rng(0).choice(num_rows, ROWS, replace=False))
            for rows, chosen in (("the first", np.arange(ROWS)), ("drawn", drawn)):
                predict(atlas, layout, rows, chosen, asked)
            with measured(layout, "drawn", "8 rows by Arrow", asked * 8 // ROWS, None):
                by_arrow(shard, drawn)
            share = checking(folder)
            print(json.dumps({"layout": layout, "measured": "validation", "share_of_the_main_process": share}))


def checking(folder: str) -> float:
    """Share of the main process in the processor time of a validation by two workers."""
    before = [time.process_time(), _of_children()]
    validate_atlas(folder, workers=2)
    ours, theirs = time.process_time() - before[0], _of_children() - before[1]
    return round(ours / (ours + theirs), 3)


def _of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
