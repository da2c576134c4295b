"""The rows of one file, JSONL or parquet shard, one after the other, the bad ones included.

Where opening an atlas stops at the first line that is wrong, this hands on every line as it is stored, or what is
wrong with it, so that a check can name them all. A row of a shard comes as the JSON that it would be in JSONL, so that
one set of checks serves both; its embedded media come as slices of the shard, as its index part tells.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import msgspec

from hba.atlas.jsonl import MAX_LINE_BYTES
from hba.atlas.sample import MEDIA_FIELDS, Field, Row
from hba.atlas.slices import PLACES, Slice, opened
from hba.errors import InputError
from hba.storage import machine_fault

if TYPE_CHECKING:
    import pyarrow as pa

_BOM = b"\xef\xbb\xbf"
_BATCH_ROWS = 1024
EMBEDDED = "-"  # stands for the path of an embedded medium


class Embedded(NamedTuple):
    """A medium of a shard without an index part, or in a compressed column: it is found by reading up to it."""

    shard: Path
    row: int
    name: Field
    entry: int


MediumName: TypeAlias = str | Slice | Embedded
"""a path relative to the folder of the rows, or where a medium lies in a shard"""


class RawRow(NamedTuple):
    """One row as it is stored, or what is wrong with its line; `embedded` holds the media of a row of a shard."""

    line: int
    text: bytes | InputError
    embedded: dict[Field, list[MediumName]] | None = None

    def medium(self, name: Field, index: int, path: str) -> MediumName:
        """Where medium `index` of a field lies, which the row calls `path`."""
        return path if self.embedded is None else self.embedded[name][index]


def read_rows(path: Path, file: str) -> Iterator[RawRow]:
    """Yield every row of a file, which messages call `file`. Raises InputError when the whole file cannot be read."""
    try:
        yield from _lines(path, file) if path.suffix == ".jsonl" else _shard_rows(path)
    except OSError as error:
        refused = InputError(f"cannot be read ({error.strerror})", where=file, fix="Restore the file.")
        raise machine_fault(error, file) or refused from None


def _lines(path: Path, file: str) -> Iterator[RawRow]:
    with opened(path, where=file) as handle:
        line = 0
        while raw := handle.readline(MAX_LINE_BYTES):
            line += 1
            if len(raw) == MAX_LINE_BYTES and not raw.endswith(b"\n"):
                while raw and not raw.endswith(b"\n"):
                    raw = handle.readline(MAX_LINE_BYTES)
                what = f"is longer than {MAX_LINE_BYTES:,} bytes"
                fix = "Write one JSON object per line."
                yield RawRow(line, InputError(what, where=f"{file}:{line}", fix=fix))
                continue
            text = raw.removeprefix(_BOM) if line == 1 else raw
            if text and not text.isspace():
                yield RawRow(line, text)


def _shard_rows(shard: Path) -> Iterator[RawRow]:
    import pyarrow as pa

    from hba.atlas import embedded

    table = embedded.read_index(shard)
    if table is not None:
        yield from _encoded(table, shard, 0)
        return
    with embedded.open_shard(shard) as file:
        first = 0
        try:
            # Media come along, a few rows at a time: without an index nothing else tells how many a row has.
            for batch in file.iter_batches(batch_size=8, use_threads=False):
                yield from _encoded(batch, shard, first)
                first += batch.num_rows
        except pa.ArrowException as error:
            raise InputError(f"is damaged ({error})", where=str(shard), fix="Restore the shard.") from None


def stream_media(shard: Path, wanted: Collection[Embedded]) -> Iterator[tuple[Embedded, bytes | None]]:
    """Yield the bytes of the wanted media of one shard in the order of its rows; None stands for a null.

    The shard is read once, a few rows at a time. Raises InputError when it is damaged, after what lies before.
    """
    import pyarrow as pa

    from hba.atlas import embedded

    names = sorted({medium.name for medium in wanted})
    with embedded.open_shard(shard) as file:
        row = 0
        try:
            for batch in file.iter_batches(batch_size=4, columns=names, use_threads=False):
                for local in range(batch.num_rows):
                    for name in names:
                        for entry, value in enumerate(batch.column(name)[local].as_py() or ()):
                            medium = Embedded(shard, row + local, name, entry)
                            if medium in wanted:
                                yield medium, value
                row += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            damaged = InputError(f"is damaged ({error})", where=str(shard), fix="Restore the shard.")
            raise machine_fault(error, str(shard)) or damaged from None


def _encoded(table: pa.Table | pa.RecordBatch, shard: Path, first: int) -> Iterator[RawRow]:
    for start in range(0, table.num_rows, _BATCH_ROWS):
        for local, values in enumerate(table.slice(start, _BATCH_ROWS).to_pylist(), first + start):
            places = {name: _places(values, name, shard, local) for name in MEDIA_FIELDS}
            said = {name: values[name] for name in Row.__struct_fields__ if values.get(name) is not None}
            said |= {name: [EMBEDDED] * len(media) for name, media in places.items()}
            yield RawRow(local + 1, msgspec.json.encode(said, enc_hook=repr), places)


def _places(values: dict[str, Any], name: Field, shard: Path, row: int) -> list[MediumName]:
    offsets, sizes, checksums = (values.get(f"{name}_{what}") for what in PLACES)
    if offsets is None or sizes is None or checksums is None:
        return [Embedded(shard, row, name, index) for index in range(len(values.get(name) or ()))]
    return [
        Slice(shard, offset, size, crcs) if offset >= 0 else Embedded(shard, row, name, index)
        for index, (offset, size, crcs) in enumerate(zip(offsets, sizes, checksums, strict=True))
    ]
