"""The rows of one file, JSONL or parquet shard, one after the other, the bad ones included.

Where opening an atlas stops at the first line that is wrong, this hands on every line as it is stored, or what is
wrong with it, so that a check can name them all. A row of a shard comes as the JSON that it would be in JSONL, so that
one set of checks serves both; its embedded media come as slices of the shard, as its index part tells.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import msgspec

from hba.atlas.jsonl import MAX_LINE_BYTES
from hba.atlas.sample import MEDIA_FIELDS, Field, Row
from hba.atlas.slices import PLACES, Slice, Source, opened
from hba.errors import InputError, MediaError
from hba.storage import machine_fault

if TYPE_CHECKING:
    import pyarrow as pa

    from hba.atlas.embedded import ShardMedia

_BOM = b"\xef\xbb\xbf"
_BATCH_ROWS = 1024
EMBEDDED = "-"  # stands for the path of an embedded medium


class Embedded(NamedTuple):
    """A medium of a shard without an index part, or in a compressed column: whoever wants its bytes looks for them."""

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
    from hba.atlas.tables import check_schema

    table = embedded.read_index(shard)
    if table is not None:
        yield from _encoded(table, shard, 0)
        return
    with embedded.open_shard(shard) as file:
        check_schema(file.schema_arrow, shard)
        names = [name for name in file.schema_arrow.names if name not in MEDIA_FIELDS]
        first = 0
        try:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=names, use_threads=False):
                yield from _encoded(batch, shard, first)
                first += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            damaged = InputError(f"is damaged ({error})", where=str(shard), fix="Restore the shard.")
            raise machine_fault(error, str(shard)) or damaged from None


def embedded_medium(medium: Embedded) -> Source:
    """The bytes of a medium of a shard without an index, or in a compressed column. Raises MediaError."""
    return _media_of(medium.shard).medium(medium.row, medium.name, medium.entry, where="")


@lru_cache(maxsize=4)
def _media_of(shard: Path) -> ShardMedia:
    """The media of a shard, open while they are read: processes that check them go from row to row."""
    from hba.atlas.embedded import ShardMedia
    from hba.atlas.pages import KeptPages

    return ShardMedia(shard, KeptPages())


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
        try:
            count = _media_of(shard).count(row, name, where="")
        except MediaError:  # which is raised again when the medium is looked at
            count = 1
        return [Embedded(shard, row, name, index) for index in range(count)]
    return [
        Slice(shard, offset, size, crcs) if offset >= 0 else Embedded(shard, row, name, index)
        for index, (offset, size, crcs) in enumerate(zip(offsets, sizes, checksums, strict=True))
    ]
