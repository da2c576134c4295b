"""An atlas as parquet shards with embedded media that can be read by row.

The shards follow the published layout (`train-00000-of-00012.parquet`), so that any parquet reader opens them. Media
columns are stored plain, text columns compressed, and an index part beside each shard says where each medium lies (see
`embedded`). A shard is done when its index part is there: an interrupted conversion goes on with the first shard that
is not. Every shard is read back through its index and compared with what was written into it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from hba.atlas import Atlas
from hba.atlas.embedded import index_path, read_index, write_index
from hba.atlas.parquet import EXTRA
from hba.atlas.sample import MEDIA_FIELDS, Sample
from hba.atlas.source import DEFAULT_LIMITS, Slice, check_source, read_bytes
from hba.errors import HbaError, InputError
from hba.storage import atomic_write

SHARD_BYTES = 512 << 20
GROUP_BYTES = 64 << 20
_TEXT = ("id", "problem", "answer", "dataset", "task", "class_label", "modality_signature", EXTRA)
_SCHEMA = pa.schema(
    [pa.field(name, pa.string()) for name in _TEXT]
    + [pa.field("texts", pa.list_(pa.string()))]
    + [pa.field(name, pa.list_(pa.binary())) for name in MEDIA_FIELDS]
)


def convert_to_parquet(
    atlas: Atlas,
    out: str | Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write the rows of `atlas` to shards of about `shard_bytes` in the folder `out`; returns the shards.

    Ids, order and media stay as they are. Shards that are there and whole are kept. `progress(done, total)` is told of
    each shard. Raises MediaError for a medium that is missing, InputError when `out` holds other shards of the split.
    """
    out = Path(out)
    bounds = _plan(atlas, shard_bytes)
    total = len(bounds) - 1
    jobs = [(out / f"{atlas.split}-{i:05d}-of-{total:05d}.parquet", *pair) for i, pair in enumerate(pairwise(bounds))]
    others = set(out.glob(f"{atlas.split}-*-of-*.parquet")) - {path for path, _, _ in jobs}
    if others:
        what = f"holds other shards of split {atlas.split!r}"
        raise InputError(what, where=str(out), fix="Choose an empty folder, or the same shard size.")
    for done, _ in enumerate(_each(partial(_write_shard, atlas), jobs, workers), 1):
        if progress is not None:
            progress(done, total)
    return [path for path, _, _ in jobs]


def _each(
    job: Callable[[tuple[Path, int, int]], None], jobs: list[tuple[Path, int, int]], workers: int
) -> Iterator[None]:
    if workers <= 1:
        yield from map(job, jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(job, jobs)


def _plan(atlas: Atlas, shard_bytes: int) -> list[int]:
    """Row numbers at which shards begin, and the end."""
    bounds, held = [0], 0
    for number, sample in enumerate(atlas):
        size = sum(_sizes(sample))
        if held and held + size > shard_bytes:
            bounds.append(number)
            held = 0
        held += size
    return [*bounds, len(atlas)]


def _sizes(sample: Sample) -> Iterator[int]:
    for name in MEDIA_FIELDS:
        for index in range(getattr(sample, name)):
            source = sample.source.medium(sample.number, name, index, where=sample.place(name))
            yield check_source(source, where=sample.place(name), limits=DEFAULT_LIMITS)


def _write_shard(atlas: Atlas, job: tuple[Path, int, int]) -> None:
    path, start, stop = job
    if path.is_file() and index_path(path).is_file() and read_index(path) is not None:
        return
    digest = hashlib.sha256()
    compression = dict.fromkeys(_TEXT, "zstd") | {"texts.list.element": "zstd"}
    compression |= {f"{name}.list.element": "none" for name in MEDIA_FIELDS}
    with (
        atomic_write(path, "wb") as handle,
        pq.ParquetWriter(handle, _SCHEMA, compression=compression, use_dictionary=["dataset", "task"]) as writer,
    ):
        rows: list[dict[str, Any]] = []
        held = 0
        for number in range(start, stop):
            record = _record(atlas, number)
            for name in MEDIA_FIELDS:
                for medium in record[name]:
                    digest.update(hashlib.sha256(medium).digest())
                    held += len(medium)
            rows.append(record)
            if held >= GROUP_BYTES:
                writer.write_table(pa.Table.from_pylist(rows, _SCHEMA))
                rows, held = [], 0
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, _SCHEMA))
    write_index(path)
    if _read_back(path) != digest.hexdigest():
        index_path(path).unlink()
        raise HbaError("reads back differently", where=str(path), fix="Check the disk and convert again.")


def _record(atlas: Atlas, number: int) -> dict[str, Any]:
    sample, row = atlas[number], atlas.row(number)
    record: dict[str, Any] = {name: getattr(row, name) for name in _TEXT if name not in ("id", EXTRA)}
    record |= {"id": sample.id, "texts": list(row.texts)}
    record[EXTRA] = msgspec.json.encode(sample.extra).decode() if sample.extra else None
    for name in MEDIA_FIELDS:
        where = sample.place(name)
        sources = [sample.source.medium(sample.number, name, i, where=where) for i in range(getattr(sample, name))]
        record[name] = [read_bytes(source) for source in sources]
    return record


def _read_back(shard: Path) -> str:
    """Digest of all media of a shard as its index finds them."""
    digest = hashlib.sha256()
    table = read_index(shard)
    for values in table.to_pylist() if table is not None else ():
        for name in MEDIA_FIELDS:
            for offset, size in zip(values[f"{name}_offsets"], values[f"{name}_sizes"], strict=True):
                digest.update(hashlib.sha256(read_bytes(Slice(shard, offset, size)) if size else b"").digest())
    return digest.hexdigest()
