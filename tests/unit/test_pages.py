"""Media by the pages of a column: those that Arrow reads, for every layout that Arrow writes, and no more is read."""

from __future__ import annotations

import os
import random
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hba.atlas.pages import DamagedPageError, KeptPages, ShardPages, Value, entries
from hba.atlas.parquet import open_shard, read_index, write_index
from hba.errors import InputError

BYTES = pa.struct([("path", pa.string()), ("bytes", pa.binary())])
KINDS = {
    "list": pa.list_(pa.binary()),
    "large list": pa.large_list(pa.large_binary()),
    "list of structs": pa.list_(BYTES),
    "one a row": pa.binary(),
    "struct": BYTES,
    "list of views": pa.list_(pa.binary_view()),
    "list that is never null": pa.list_(pa.field("element", pa.binary(), nullable=False)),
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "default": {},
    "as datasets writes": {"compression": "none", "use_dictionary": False, "write_page_index": True},
    "plain with checksums": {"compression": "none", "use_dictionary": False, "write_page_checksum": True},
    "small pages": {"data_page_size": 300, "write_batch_size": 3, "use_dictionary": False, "compression": "none"},
    "small packed pages": {"data_page_size": 300, "write_batch_size": 3, "use_dictionary": False},
    "version 2": {"data_page_version": "2.0", "data_page_size": 300, "write_batch_size": 3, "compression": "zstd"},
    "version 2, plain": {"data_page_version": "2.0", "compression": "none", "use_dictionary": False},
    "dictionary that grows too large": {"dictionary_pagesize_limit": 200, "write_batch_size": 4, "compression": "gzip"},
    "brotli": {"compression": "brotli", "row_group_size": 7, "write_page_checksum": True},
    "lz4": {"compression": "lz4"},
    "other encoding": {"use_dictionary": False, "column_encoding": "DELTA_LENGTH_BYTE_ARRAY"},
}


def values(kind: pa.DataType, seed: int, rows: int = 40) -> list[Any]:
    """Rows of a column, some null or empty, some with many entries, some entries null or empty, some equal."""
    rng = random.Random(seed)

    def medium() -> Any:
        data = rng.choice([None, b"", b"same again", rng.randbytes(rng.randint(1, 300)), rng.randbytes(60)])
        wrapped = kind.value_type if hasattr(kind, "value_type") else kind
        if pa.types.is_struct(wrapped):
            return rng.choice([None, {"path": "a", "bytes": data}])
        required = hasattr(kind, "value_field") and not kind.value_field.nullable
        return b"" if required and data is None else data

    if not hasattr(kind, "value_type"):
        return [medium() for _ in range(rows)]
    longest = 1 if seed % 3 == 0 else 9  # lists of one, too, which have fewer questions to answer
    return [rng.choice([None, [], *([[medium() for _ in range(rng.randint(1, longest))]] * 4)]) for _ in range(rows)]


def written(folder: Path, kind: pa.DataType, layout: dict[str, Any], rows: list[Any]) -> Path:
    table = pa.table({"id": [str(k) for k in range(len(rows))], "audios": pa.array(rows, kind)})
    encoding = layout.get("column_encoding")
    if encoding:
        pq.write_table(table, folder / "names.parquet")
        names = [c.path for c in pq.ParquetFile(folder / "names.parquet").schema if c.path.startswith("audios")]
        wanted = {name: encoding for name in names if name.endswith(("bytes", "element", "audios"))}
        layout = {**layout, "column_encoding": wanted}
    pq.write_table(table, folder / "a.parquet", **layout)
    return folder / "a.parquet"


class Reader:
    """Reads a file and counts the bytes."""

    def __init__(self, path: Path) -> None:
        self.path, self.bytes = path, 0

    def __call__(self, start: int, size: int) -> bytes:
        with self.path.open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, start)
        self.bytes += len(data)
        return data


def opened(path: Path, limit: int = 1 << 20) -> tuple[ShardPages, Reader]:
    read = Reader(path)
    return ShardPages(open_shard(path), read, path.stat().st_size, KeptPages(limit)), read


def data_of(value: Value | None, path: Path) -> bytes | None:
    if value is None:
        return None
    found = path.read_bytes()[value.offset : value.offset + value.size] if value.offset >= 0 else None
    if value.data is not None:
        assert found in (None, bytes(value.data))
        return bytes(value.data)
    assert found is not None
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_those_that_arrow_reads(tmp_path: Path, kind: str, layout: str) -> None:
    for seed in range(4):
        path = written(tmp_path, KINDS[kind], LAYOUTS[layout], values(KINDS[kind], seed))
        expected = [entries(row) for row in pq.read_table(path)["audios"].to_pylist()]
        pages, _ = opened(path, limit=random.Random(seed).choice([0, 1 << 20]))
        order = random.Random(seed).sample(range(len(expected)), len(expected))
        for row in [*order, *order[:5]]:
            assert pages.count(row, "audios") == len(expected[row])
            assert [data_of(value, path) for value in pages.media(row, "audios")] == expected[row]
        assert pages.media(0, "videos") == [] and pages.count(0, "videos") == 0


@pytest.mark.parametrize("layout", ["default", "as datasets writes", "plain with checksums"])
def test_an_index_holds_what_the_pages_say(tmp_path: Path, layout: str) -> None:
    rows = values(KINDS["list of structs"], seed=1)
    path = written(tmp_path, KINDS["list of structs"], LAYOUTS[layout], rows)
    write_index(path)
    index = read_index(path)
    assert index is not None
    whole = path.read_bytes()
    places = (index[f"audios_{what}"].to_pylist() for what in ("offsets", "sizes"))
    for row, offsets, sizes in zip(rows, *places, strict=True):
        found = entries(row)
        assert sizes == [len(medium or b"") for medium in found]
        for medium, offset, size in zip(found, offsets, sizes, strict=True):
            assert offset == -1 if not medium or layout == "default" else whole[offset : offset + size] == medium


def test_a_row_costs_what_its_medium_takes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [[rng.bytes(200_000)] for _ in range(60)]
    path = written(tmp_path, KINDS["list"], LAYOUTS["as datasets writes"], rows)
    pages, read = opened(path)
    read.bytes = 0  # of the footer
    assert [pages.count(row, "audios") for row in range(60)] == [1] * 60 and read.bytes == 0  # the footer says it
    value = pages.media(50, "audios")[0]
    assert data_of(value, path) == rows[50][0] and read.bytes < 5_000


def test_packed_pages_are_read_once_in_the_order_of_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    table = {"audios": [[rng.bytes(30_000)] for _ in range(60)], "videos": [[rng.bytes(30_000)] for _ in range(60)]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet", row_group_size=20)
    pages, read = opened(tmp_path / "a.parquet", limit=0)
    for row, name in product(range(60), table):
        assert [bytes(v.data or b"") for v in pages.media(row, name) if v is not None] == table[name][row]
    assert read.bytes < 1.05 * (tmp_path / "a.parquet").stat().st_size


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_damaged_shard_is_refused_or_read_and_never_anything_else(tmp_path: Path, layout: str) -> None:
    rng = random.Random(0)
    good = written(tmp_path, KINDS["list"], LAYOUTS[layout], values(KINDS["list"], 1)).read_bytes()
    refused = 0
    for trial in range(150):
        data = bytearray(good)
        for _ in range(rng.choice([1, 1, 8])):
            data[rng.randrange(4, len(data) - 8)] = rng.choice([0, 255, rng.randrange(256)])
        bad = tmp_path / f"{trial}.parquet"
        bad.write_bytes(data)
        try:
            pages, _ = opened(bad)
            for row in range(40):
                pages.count(row, "audios"), pages.media(row, "audios")
        except (DamagedPageError, InputError, pa.ArrowException, OSError):
            refused += 1
        bad.unlink()
    assert refused > 10


def noisy(rng: np.random.Generator, size: int, silence: float) -> bytes:
    """Media that do not get smaller, with a share of silence that does."""
    data = bytearray(rng.bytes(size))
    for at in range(0, size, 50_000):
        data[at : at + int(50_000 * silence)] = bytes(int(50_000 * silence))
    return bytes(data[:size])


@pytest.mark.parametrize("silence", [0.0, 0.02, 0.3, 0.95])
@pytest.mark.parametrize("dictionary", [True, False])
def test_a_large_packed_page_is_unpacked_in_parts(tmp_path: Path, silence: float, dictionary: bool) -> None:
    rng = np.random.default_rng(0)
    rows = [[noisy(rng, int(size), silence)] for size in rng.integers(1, 400_000, 60)]
    pq.write_table(pa.table({"audios": rows}), tmp_path / "a.parquet", use_dictionary=dictionary)
    pages, read = opened(tmp_path / "a.parquet")
    for row in rng.permutation(60):
        assert [bytes(v.data or b"") for v in pages.media(int(row), "audios") if v is not None] == rows[row]
    if silence < 0.1:
        assert read.bytes < sum(len(row[0]) + 2 * (1 << 16) for row in rows)  # in whole blocks
        pages, read = opened(tmp_path / "a.parquet")
        assert [bytes(v.data or b"") for v in pages.media(57, "audios") if v is not None] == rows[57]
        assert read.bytes < len(rows[57][0]) + 0.04 * (tmp_path / "a.parquet").stat().st_size


def test_a_large_packed_page_that_is_damaged_is_refused_or_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [[noisy(rng, 200_000, 0.02)] for _ in range(10)]
    pq.write_table(pa.table({"audios": rows}), tmp_path / "a.parquet")
    good = (tmp_path / "a.parquet").read_bytes()
    pages, _ = opened(tmp_path / "a.parquet")
    chunk = pages._chunk(0, "audios")[0]
    assert chunk is not None
    chunk.media(9)
    dictionary = chunk._dictionary
    assert dictionary is not None
    snappy = [dictionary.body + k for k in (0, 1, 2, 3, 4, 5)] + rng.integers(0, len(good) - 200, 60).tolist()
    for at in snappy:
        data = bytearray(good)
        data[at] ^= int(rng.integers(1, 255))
        (tmp_path / "bad.parquet").write_bytes(data)
        try:
            pages, _ = opened(tmp_path / "bad.parquet")
            for row in range(10):
                pages.media(row, "audios")
        except (DamagedPageError, InputError, pa.ArrowException, OSError):
            pass
