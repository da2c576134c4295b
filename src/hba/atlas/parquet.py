"""Rows of parquet shards whose media are embedded as bytes.

Opening reads the columns without media (from the index parts where there are some, see `embedded`), checks every row.
A medium of an indexed shard is a slice of the shard: a decoder reads the bytes that it needs, and no more. Without an
index, or from a compressed column, a row group is streamed up to the row, which is slow but takes little memory.
Ids, order and samples are those of the JSONL form; a shard that is cut off or of another schema is an InputError.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hba.atlas import embedded, media
from hba.atlas.columns import Columns, ColumnsBuilder
from hba.atlas.rows import label_of, signature_kinds, signature_of
from hba.atlas.sample import MEDIA_FIELDS, Field, Row, Sample
from hba.atlas.source import Slice
from hba.errors import InputError, MediaError
from hba.taxonomy import Taxonomy

_TEXT = ("problem", "answer", "dataset", "task", "modality_signature")
_OPTIONAL = ("class_label", "id")
_PLACES = tuple(f"{name}_{what}" for name in MEDIA_FIELDS for what in ("offsets", "sizes"))
EXTRA = "extra_json"
MEDIA_PATHS = "media_paths"  # what embedded media were called as files; for a conversion back
_FIX_SCHEMA = "Write the published schema; see the schema of a row in docs."


class ParquetStore:
    """The shards of one split, in order. Picklable; holds the rows without their media."""

    def __init__(self, shards: tuple[Path, ...], *, split: str, taxonomy: Taxonomy) -> None:
        """Read and check every row. Raises InputError naming shard, row and field, also for a split without rows."""
        self.shards = shards
        self.split = split
        self.root = shards[0].parent.resolve()
        self.taxonomy = taxonomy
        tables = [self._light(shard) for shard in shards]
        self._first = np.cumsum([0, *(table.num_rows for table in tables)])
        self._tables = [_uniform(table) for table in tables]
        if len(self) == 0:
            raise InputError(f"split {split!r} has no rows", where=str(shards[0]), fix="Write at least one row.")
        self.columns = self._checked()

    def __len__(self) -> int:
        return int(self._first[-1])

    def _light(self, shard: Path) -> pa.Table:
        table = embedded.read_index(shard)
        if table is None:
            with embedded.open_shard(shard) as file:
                _check_schema(file.schema_arrow, shard)
                names = [name for name in file.schema_arrow.names if name not in MEDIA_FIELDS]
                try:
                    table = file.read(columns=names, use_threads=False)
                except (pa.ArrowException, OSError) as error:
                    raise InputError(f"is damaged ({error})", where=str(shard), fix="Restore the shard.") from None
        _check_schema(table.schema, shard)
        return table

    def _checked(self) -> Columns:
        builder = ColumnsBuilder(self.taxonomy)
        for shard, table in enumerate(self._tables):
            self._check_table(shard, table, builder)
        self._check_ids()
        return builder.build()

    def _check_table(self, shard: int, table: pa.Table, builder: ColumnsBuilder) -> None:
        """Check the distinct values of each column; almost all rows say what another said before."""
        first = int(self._first[shard])
        for name in _TEXT:
            missing = pc.index(pc.is_null(table[name]), True).as_py()
            if missing >= 0:
                where = self.place(first + missing)
                raise InputError(f"field {name!r}: is missing", where=where, fix=_FIX_SCHEMA)
        label_codes, signatures = self._labels(first, table), self._signatures(first, table)
        counts = {name: _lengths(table, f"{name}_sizes") for name in ("images", "videos", "audios")}
        kinds = {"images": "image", "videos": "video", "audios": "audio"}
        columns: list[Any] = [table["dataset"].to_pylist(), signatures, label_codes.tolist()]
        chars = [pc.fill_null(pc.utf8_length(table[name]), 0).to_pylist() for name in ("problem", "answer")]
        numbers: list[list[int]] = []
        for name, values in counts.items():
            # An unindexed shard tells how many only when the row is read; the signature tells whether there are any.
            guess = [int(kinds[name] in signature_kinds(s)) for s in signatures] if values is None else values.tolist()
            numbers.append(guess)
        builder.extend(*columns, *chars, *numbers)

    def _labels(self, first: int, table: pa.Table) -> npt.NDArray[np.int16]:
        label = pc.fill_null(table["class_label"], "")
        free = [key for key, dataset in self.taxonomy.datasets.items() if dataset.domain is None]
        answer = pc.if_else(pc.is_in(table["dataset"], pa.array(free, pa.string())), "", table["answer"])
        said = pc.binary_join_element_wise(table["dataset"], label, answer, "\x1f").combine_chunks().dictionary_encode()
        codes_N = said.indices.to_numpy(zero_copy_only=False)
        examples = np.unique(codes_N, return_index=True)[1]
        labels = [label_of(self.row(first + int(i)), self.taxonomy, self.place(first + int(i))) for i in examples]
        class_codes: npt.NDArray[np.int16] = np.array([label.code for label in labels], np.int16)[codes_N]
        return class_codes

    def _signatures(self, first: int, table: pa.Table) -> list[str]:
        keys, sizes = [table["modality_signature"]], []
        for name in ("images", "videos", "audios"):
            lengths = _lengths(table, f"{name}_sizes")
            sizes.append(None if lengths is None else lengths > 0)
            if lengths is not None:
                keys.append(pa.array(np.where(lengths > 0, "1", "0")))
        said = pc.binary_join_element_wise(*[_flat(key) for key in keys], "\x1f").dictionary_encode()
        codes_N = said.indices.to_numpy(zero_copy_only=False)
        examples = np.unique(codes_N, return_index=True)[1]
        known = all(size is not None for size in sizes)
        names = [
            signature_of(self.row(first + int(i)), self.place(first + int(i)), check_media=known) for i in examples
        ]
        return [names[code] for code in codes_N]

    def _check_ids(self) -> None:
        ids = pa.chunked_array([chunk for table in self._tables for chunk in table["id"].chunks], pa.string())
        if ids.null_count == len(ids):
            return
        identities = [self._id(number, value) for number, value in enumerate(ids.to_pylist())]
        if len(set(identities)) == len(identities):
            return
        seen: dict[str, int] = {}
        for number, identity in enumerate(identities):
            first = seen.setdefault(identity, number)
            if first != number:
                what = f"field 'id': {identity!r} is also the id of {self.place(first)}"
                raise InputError(what, where=self.place(number), fix="Give every row its own id.")

    def _id(self, number: int, given: str | None) -> str:
        return given if given is not None else f"{self.split}/{number + 1}"

    def _at(self, number: int) -> tuple[int, int]:
        """Shard of a row, and the row's number in it."""
        shard = int(np.searchsorted(self._first, number, side="right")) - 1
        return shard, number - int(self._first[shard])

    def place(self, number: int) -> str:
        """'shard:row' of a row, the row counted from 1."""
        shard, local = self._at(number)
        return f"{self.shards[shard]}:{local + 1}"

    def _values(self, number: int) -> dict[str, Any]:
        shard, local = self._at(number)
        values: dict[str, Any] = self._tables[shard].slice(local, 1).to_pylist()[0]
        return values

    def row(self, number: int) -> Row:
        """Row `number`, 0-based, with one placeholder path for each medium that the index knows of."""
        return self._row(self._values(number))

    def _row(self, values: dict[str, Any]) -> Row:
        media_lists: dict[str, Any] = {
            name: tuple("-" for _ in values.get(f"{name}_sizes") or ()) for name in MEDIA_FIELDS
        }
        said: dict[str, Any] = {name: values[name] for name in (*_TEXT, *_OPTIONAL)}
        return Row(**said, **media_lists, texts=tuple(values.get("texts") or ()))

    def sample(self, number: int) -> Sample:
        """Row `number` with its label, place and extra fields. Reads media only from a shard without an index."""
        where, values = self.place(number), self._values(number)
        row = self._row(values)
        extra = {name: value for name, value in values.items() if name not in _KNOWN and value is not None}
        counts = {name: self._count(number, name, values) for name in MEDIA_FIELDS}
        return Sample(
            id=self._id(number, row.id),
            split=self.split,
            where=where,
            number=number,
            problem=row.problem,
            answer=row.answer,
            dataset=row.dataset,
            task=row.task,
            modality_signature=signature_of(row, where, check_media=False),
            label=label_of(row, self.taxonomy, where).name,
            texts=row.texts,
            extra=extra | msgspec.json.decode(values.get(EXTRA) or "{}"),
            source=self,
            **counts,
        )

    def _count(self, number: int, name: Field, values: dict[str, Any]) -> int:
        sizes = values.get(f"{name}_sizes")
        return len(sizes) if sizes is not None else len(self._streamed(number, name))

    def medium(self, number: int, name: Field, index: int, *, where: str) -> media.Source:
        """A medium as a slice of its shard, or as bytes. Raises MediaError when it is null."""
        shard, values = self._at(number)[0], self._values(number)
        offsets = values.get(f"{name}_offsets")
        if offsets is not None and offsets[index] >= 0:
            return Slice(self.shards[shard], offsets[index], values[f"{name}_sizes"][index])
        value = self._streamed(number, name)[index]
        if value is None:
            raise MediaError("is null", where=where, fix="Restore the medium, or remove the row.")
        return value

    def _streamed(self, number: int, name: Field) -> list[bytes | None]:
        """The media of a row by streaming its row group up to it."""
        shard, local = self._at(number)
        with embedded.open_shard(self.shards[shard]) as file:
            if name not in file.schema_arrow.names:
                return []
            group = 0
            while local >= file.metadata.row_group(group).num_rows:
                local -= file.metadata.row_group(group).num_rows
                group += 1
            try:
                for batch in file.iter_batches(batch_size=4, row_groups=[group], columns=[name], use_threads=False):
                    if local < batch.num_rows:
                        return batch.column(0)[local].as_py() or []
                    local -= batch.num_rows
            except (pa.ArrowException, OSError) as error:
                what = f"cannot be read ({type(error).__name__}): cut off or corrupt"
                raise MediaError(what, where=f"{self.place(number)}, {name}", fix="Restore the shard.") from None
        raise MediaError("is cut off", where=f"{self.place(number)}, {name}", fix="Restore the shard.")

    def audio_bytes(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Stored bytes of the sounds of each row; 0 from a shard without an index."""
        sizes_N = np.zeros(len(self), np.int64)
        for first, table in zip(self._first[:-1], self._tables, strict=True):
            if "audios_sizes" in table.schema.names:
                sizes = table["audios_sizes"].combine_chunks()
                rows = pc.list_parent_indices(sizes).to_numpy()
                np.add.at(sizes_N, int(first) + rows, pc.list_flatten(sizes).to_numpy())
        return sizes_N[numbers]

    def contents(self, numbers: npt.NDArray[np.integer]) -> Iterator[bytes]:
        """What the fingerprint of the given rows is made of: everything but media and their places."""
        for number in numbers:
            values = {k: v for k, v in self._values(int(number)).items() if not k.endswith("_offsets")}
            yield msgspec.json.encode(values, order="sorted")


_KNOWN = frozenset((*Row.__struct_fields__, *_PLACES, EXTRA, MEDIA_PATHS))


def _lengths(table: pa.Table, name: str) -> npt.NDArray[np.int64] | None:
    if name not in table.schema.names:
        return None
    lengths: npt.NDArray[np.int64] = pc.fill_null(pc.list_value_length(table[name]), 0).to_numpy()
    return lengths


def _flat(column: Any) -> Any:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _uniform(table: pa.Table) -> pa.Table:
    """The table with plain string columns, and nulls where optional ones are absent."""
    for name in (*_TEXT, *_OPTIONAL):
        if name in table.schema.names:
            table = table.set_column(table.schema.get_field_index(name), name, table[name].cast(pa.string()))
        else:
            table = table.append_column(name, pa.nulls(table.num_rows, pa.string()))
    return table.combine_chunks()


def _check_schema(schema: pa.Schema, shard: Path) -> None:
    for name in (*_TEXT, *_OPTIONAL, *MEDIA_FIELDS):
        position = schema.get_field_index(name)
        if position < 0:
            if name in _TEXT:
                raise InputError(f"column {name!r}: is missing", where=str(shard), fix=_FIX_SCHEMA)
            continue
        kind = schema.field(position).type
        if name in MEDIA_FIELDS:
            is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_null(kind)
            inner = kind.value_type if is_list and not pa.types.is_null(kind) else pa.binary()
            good = is_list and (pa.types.is_binary(inner) or pa.types.is_large_binary(inner) or pa.types.is_null(inner))
            expected = "list of binary"
        else:
            good = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind)
            good, expected = good or (name in _OPTIONAL and pa.types.is_null(kind)), "string"
        if not good:
            raise InputError(f"column {name!r}: expected {expected}, found {kind}", where=str(shard), fix=_FIX_SCHEMA)
