"""Row files (JSONL, parquet, parquet with an index) and seeded ways to damage them (used by fault_campaign.py).

`RowFiles` holds the intact forms of one small atlas whose rows carry flac sounds. `damaged` gives any number of damaged
copies, the same for the same seed. `reference_rows` reads a damaged file with plain json or pyarrow: what the atlas
serves is that of the intact file or, where no checksum tells, what the damaged bytes say; anything else is wrong.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

import fault_media
from hba.atlas import open_atlas
from hba.atlas.convert import convert_to_parquet
from hba.atlas.parquet import index_path

ROWS = 24
TEXT = ("problem", "answer", "dataset", "task", "modality_signature")
SHARD = "train-00000-of-00001.parquet"
_CYCLE = {
    "jsonl": (
        *("flip 1", "cut", "types", "utf-8", "missing", "deep", "numbers", "duplicate", "nul", "flip 10", "empty"),
        *("random", "prefix", "flip 1000", "joined", "utf-16", "flip 1", "types", "cut"),
    ),
    "parquet": (
        *("flip 1", "cut", "types", "utf-8", "missing", "footer", "null", "duplicate", "flip 10", "empty", "random"),
        *("prefix", "flip 1000", "joined", "footer flip", "flip 1", "types", "cut", "footer"),
    ),
    "indexed": (
        *("flip 1", "cut", "index flip", "index cut", "footer", "flip 10", "index swap", "flip 1000", "empty"),
        *("prefix", "random", "joined", "footer flip", "index flip"),
    ),
}
_WRONG = (3, None, True, 1.5, {"a": 1}, [1, 2], [["a"]], [None], -(2**70))


class DamagedFile(NamedTuple):
    """`files` by their path in the atlas folder."""

    number: int
    kind: str
    corruption: str
    files: dict[str, bytes]

    @property
    def may_alter(self) -> bool:
        """Whether no reader could tell: text and plain parquet have no checksum, and of equal keys the last counts."""
        return self.kind != "indexed" and (self.corruption in fault_media.FLIPS or self.corruption == "duplicate")


class RowFiles:
    """The intact forms. `folder` is left with the sounds and the JSONL."""

    def __init__(self, folder: Path) -> None:
        rng = np.random.default_rng(0)
        self.sounds: dict[str, bytes] = {}
        self.rows: list[dict[str, Any]] = []
        for number in range(ROWS):
            file = io.BytesIO()
            soundfile.write(file, rng.normal(0, 0.1, 4_000), 16_000, format="FLAC")
            self.sounds[f"{number}.flac"] = file.getvalue()
            row = {"problem": f"How does speaker {number} feel? Ünï", "answer": "anger", "dataset": "cremad"}
            row |= {"task": "emotion_cls", "modality_signature": "text_audio", "class_label": "anger"}
            self.rows.append(row | {"audios": [f"{number}.flac"], "id": f"row {number}", "speaker": {"age": number}})
        folder.mkdir(parents=True)
        for name, data in self.sounds.items():
            (folder / name).write_bytes(data)
        jsonl = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows).encode()
        (folder / "train.jsonl").write_bytes(jsonl)
        (shard,) = convert_to_parquet(open_atlas(folder, "train"), folder / "indexed")
        self._index_name = index_path(shard).relative_to(shard.parent).as_posix()
        self.intact: dict[str, dict[str, bytes]] = {
            "jsonl": {"train.jsonl": jsonl, **self.sounds},
            "parquet": {SHARD: _parquet(self.table())},
            "indexed": {SHARD: shard.read_bytes(), self._index_name: index_path(shard).read_bytes()},
        }

    def table(self) -> pa.Table:
        """The rows as published: plain columns, media as bytes."""
        columns: dict[str, Any] = {name: [row[name] for row in self.rows] for name in (*TEXT, "class_label", "id")}
        columns["audios"] = pa.array([[self.sounds[row["audios"][0]]] for row in self.rows], pa.list_(pa.binary()))
        return pa.table(columns)

    def damaged(self, count: int, seed: int) -> Iterator[DamagedFile]:
        """`count` damaged atlases, half of them JSONL."""
        kinds = ("jsonl", "parquet", "jsonl", "indexed")
        met = dict.fromkeys(kinds, 0)
        for number in range(count):
            kind, rng = kinds[number % len(kinds)], random.Random(f"{seed}/rows/{number}")
            corruption = _CYCLE[kind][met[kind] % len(_CYCLE[kind])]
            met[kind] += 1
            yield DamagedFile(number, kind, corruption, self._damage(kind, corruption, rng))

    def _damage(self, kind: str, corruption: str, rng: random.Random) -> dict[str, bytes]:
        files = dict(self.intact[kind])
        name, crafted = next(iter(files)), _crafted(self, kind, corruption, rng)
        if crafted is not None:
            return files | {name: crafted}
        if corruption.startswith("index "):
            name, corruption = self._index_name, corruption.removeprefix("index ")
        data = files[name]
        simple: dict[str, Callable[[], bytes]] = {
            "flip": lambda: fault_media.flip(data, rng.choice((1, 10)), rng),
            "cut": lambda: data[: rng.randrange(1, len(data))],
            "swap": lambda: data[:-1] + bytes([data[-1] ^ 1]) if rng.random() < 0.5 else data[::-1],
            "empty": lambda: b"",
            "random": lambda: rng.randbytes(rng.randrange(1, 20_000)),
            "prefix": lambda: rng.randbytes(rng.choice((1, 7, 4096))) + data,
            "joined": lambda: data + data,
            "utf-16": lambda: data.decode().encode("utf-16"),
            "footer": lambda: _cut_footer(data, rng),
            "footer flip": lambda: _flip_footer(data, rng),
        }
        bits = fault_media.FLIPS.get(corruption)
        return files | {name: fault_media.flip(data, bits, rng) if bits else simple[corruption]()}


def _parquet(table: pa.Table) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, row_group_size=8)
    return out.getvalue()


def _cut_footer(data: bytes, rng: random.Random) -> bytes:
    """A footer that is cut, or of an absurd length."""
    if rng.random() < 0.5:
        return data[: -rng.randrange(1, 400)]
    length = rng.choice((0, 1, len(data), 0x7FFFFFFF, 0xFFFFFFFF))
    return data[:-8] + length.to_bytes(4, "little") + b"PAR1"


def _flip_footer(data: bytes, rng: random.Random) -> bytes:
    """Bits flipped in the footer alone, which says where everything lies."""
    footer = int.from_bytes(data[-8:-4], "little") + 8
    return data[:-footer] + fault_media.flip(data[-footer:-8], rng.choice((1, 5, 20)), rng) + data[-8:]


def _crafted(files: RowFiles, kind: str, corruption: str, rng: random.Random) -> bytes | None:
    """Damage that needs to know the rows; None for the kinds of damage that do not."""
    if kind == "jsonl" and corruption in _LINES:
        lines = files.intact["jsonl"]["train.jsonl"].splitlines(keepends=True)
        at = rng.randrange(ROWS)
        lines[at] = _LINES[corruption](files.rows[at], rng)
        return b"".join(lines)
    if kind == "parquet" and corruption in _TABLES:
        return _parquet(_TABLES[corruption](files.table(), rng))
    return None


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _insert(row: dict[str, Any], text: bytes) -> bytes:
    """The row with raw bytes as the value of one more field."""
    return _line(row)[:-2] + b', "note": ' + text + b"}\n"


def _types(row: dict[str, Any], rng: random.Random) -> bytes:
    return _line(row | {rng.choice((*TEXT, "audios", "class_label")): rng.choice((_WRONG[0], *_WRONG[2:]))})


def _missing(row: dict[str, Any], rng: random.Random) -> bytes:
    gone = rng.choice(TEXT)
    return _line({name: value for name, value in row.items() if name != gone})


def _duplicate(row: dict[str, Any], rng: random.Random) -> bytes:
    repeated = rng.choice(
        (b'"answer": "fear"', b'"audios": []', b'"id": "row 1"', b'"class_label": "fear", "answer": "fear"')
    )
    return _line(row)[:-2] + b", " + repeated + b"}\n"


_LINES: dict[str, Callable[[dict[str, Any], random.Random], bytes]] = {
    "types": _types,
    "missing": _missing,
    "duplicate": _duplicate,
    "utf-8": lambda row, rng: _insert(row, rng.choice((b'"\xff\xfe"', b'"\xc0\x80"', b'"\\ud800"', b'"\xed\xa0\x80"'))),
    "deep": lambda row, rng: _insert(row, b"[" * 100_000 + b"]" * rng.choice((0, 100_000))),
    "numbers": lambda row, rng: _insert(row, rng.choice((b"1e400", b"9" * 5000, b"NaN", b"-Infinity", b"1e", b"01"))),
    "nul": lambda row, rng: rng.choice(
        (_insert(row, b'"\0"'), _line(row | {"audios": ["0.flac\0"]}), b"\0" * 4096 + b"\n")
    ),
}


def _set(table: pa.Table, name: str, column: Any) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, column)


def _wrong_column(table: pa.Table, rng: random.Random) -> pa.Table:
    name = rng.choice((*TEXT, "audios", "class_label", "id"))
    wrong: list[Any] = [
        pa.array(range(ROWS)),
        pa.array([[1]] * ROWS),
        pa.array([{"a": 1}] * ROWS),
        pa.array([b"\xff"] * ROWS),
        pa.array([["a"]] * ROWS),
        pa.array([1.5] * ROWS).cast(pa.float32()),
    ]
    return _set(table, name, rng.choice(wrong))


def _nulls(table: pa.Table, rng: random.Random) -> pa.Table:
    name = rng.choice((*TEXT, "audios"))
    values = table[name].to_pylist()
    values[rng.randrange(ROWS)] = rng.choice((None, [None])) if name == "audios" else None
    return _set(table, name, pa.array(values, table[name].type))


def _invalid_text(table: pa.Table, rng: random.Random) -> pa.Table:
    name = rng.choice((*TEXT, "id"))
    values = [value.encode() for value in table[name].to_pylist()]
    values[rng.randrange(ROWS)] = b"\xff\xfe\xc0"
    return _set(table, name, pa.array(values, pa.binary()).view(pa.string()))


def _duplicates(table: pa.Table, rng: random.Random) -> pa.Table:
    if rng.random() < 0.5:
        return _set(table, "id", pa.array(["row 1"] * ROWS))
    return table.append_column("answer", pa.array(["fear"] * ROWS))


_TABLES: dict[str, Callable[[pa.Table, random.Random], pa.Table]] = {
    "types": _wrong_column,
    "null": _nulls,
    "utf-8": _invalid_text,
    "duplicate": _duplicates,
    "missing": lambda table, rng: table.drop_columns([rng.choice(TEXT)]),
}


def reference_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a file as plain json or pyarrow reads them. Raises what those raise."""
    jsonl = folder / "train.jsonl"
    if jsonl.is_file():
        rows = [
            json.loads(line) for line in jsonl.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()
        ]
        for row in rows:
            row["audios"] = [(folder / path).read_bytes() for path in row.get("audios", ())]
        return rows
    return pq.ParquetFile(folder / SHARD).read(use_threads=False).to_pylist()
