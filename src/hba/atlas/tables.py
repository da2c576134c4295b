"""The checks of rows that lie in Arrow tables, column by column.

They are those of `rows`: strict types, known dataset, label and signature, ids that occur once, paths that stay in the
atlas. Almost every row says what another said before, so that only one example of each combination is looked at; the
row that an error names is the first of its kind. A null in `{field}_sizes` says that the media of a row are not known
before they are read; its signature is then trusted for their number, and checked when they are.
Arrays leave pyarrow by DLPack, and no value of Python enters it: `to_numpy`, `pa.array` and scalar arguments import
pandas where it is installed, which takes longer than all the checks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hba.atlas.columns import Columns, make_columns
from hba.atlas.pages import is_list
from hba.atlas.rows import NAME_FIELDS, check_paths, label_of, signature_kinds, signature_of
from hba.atlas.sample import MEDIA_FIELDS, Row
from hba.errors import InputError
from hba.taxonomy import Taxonomy

TEXT = ("problem", "answer", "dataset", "task", "modality_signature")
OPTIONAL = ("class_label", "id")
MEDIA_PATHS = "media_paths"
"""what embedded media were called as files: a struct of field to list of paths"""
_KINDS = {"images": "image", "videos": "video", "audios": "audio"}
_SUSPECT = r"^/|^$|\.\.|[:\\\x00\n]"
FIX_SCHEMA = "Write the published schema; see the schema of a row in docs."

_STRINGS = (pa.string(), pa.large_string(), pa.string_view(), pa.null())
_BINARIES = (pa.binary(), pa.large_binary(), pa.binary_view(), pa.null())

Integers = npt.NDArray[np.integer[Any]]


class Places(NamedTuple):
    """How the checks name a row and look at it, by its number."""

    place: Callable[[int], str]
    row: Callable[[int], Row]
    identity: Callable[[int, str | None], str]


def check_schema(schema: pa.Schema, shard: Path) -> None:
    """Raise InputError naming the column when one is missing or of another type than the published schema says."""
    for name in (*TEXT, *OPTIONAL, *MEDIA_FIELDS, "texts", MEDIA_PATHS):
        position = schema.get_field_index(name)
        if position < 0 and name in TEXT:
            raise InputError(f"column {name!r}: is missing", where=str(shard), fix=FIX_SCHEMA)
        if position >= 0:
            kind = schema.field(position).type
            expected, good = _expected(name, kind)
            if not good:
                what = f"column {name!r}: expected {expected}, found {kind}"
                raise InputError(what, where=str(shard), fix=FIX_SCHEMA)


def _expected(name: str, kind: pa.DataType) -> tuple[str, bool]:
    types = pa.types
    if name in TEXT or name in OPTIONAL:
        good = kind in _STRINGS[:3] or types.is_dictionary(kind)
        return "string", good or (name in OPTIONAL and types.is_null(kind))
    if types.is_null(kind):
        return "", True
    if name == MEDIA_PATHS:
        good = types.is_struct(kind) and all(is_list(f.type) and f.type.value_type in _STRINGS for f in kind)
        return "lists of string by field", good
    if name == "texts":
        return "list of string", is_list(kind) and kind.value_type in _STRINGS
    return "list of binary, or of structs {bytes, path}", _holds_bytes(kind.value_type if is_list(kind) else kind)


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        position = kind.get_field_index("bytes")
        return position >= 0 and kind.field(position).type in _BINARIES
    return kind in _BINARIES


def _null(kind: pa.DataType) -> bool:
    return bool(pa.types.is_null(kind))


def uniform(table: pa.Table) -> pa.Table:
    """The table with plain string columns, names as a reader sees them (see `labelsets.visible`), and nulls where
    optional columns and sizes are absent."""
    for name in (*TEXT, *OPTIONAL):
        position = table.schema.get_field_index(name)
        if position < 0:
            table = table.append_column(name, pa.nulls(table.num_rows, pa.string()))
        elif table.schema.field(position).type != pa.string():
            table = table.set_column(position, name, table[name].cast(pa.string()))
    position = table.schema.get_field_index("texts")
    if position >= 0 and table.schema.field(position).type != pa.list_(pa.string()):
        table = table.set_column(position, "texts", table["texts"].cast(pa.list_(pa.string())))
    for name in NAME_FIELDS:
        if not pc.all(pc.string_is_ascii(table[name])).as_py():
            seen = pc.replace_substring_regex(pc.utf8_normalize(table[name], "NFKC"), r"\p{Cf}", "")
            table = table.set_column(table.schema.get_field_index(name), name, pc.utf8_trim_whitespace(seen))
    for name in MEDIA_FIELDS:
        if f"{name}_sizes" not in table.schema.names:
            table = table.append_column(f"{name}_sizes", pa.nulls(table.num_rows, pa.list_(pa.int64())))
    return table


def check_tables(tables: list[pa.Table], places: Places, taxonomy: Taxonomy) -> Columns:
    """Check the rows of tables made by `uniform`, in order. Raises InputError naming the row and the field."""
    names = [*TEXT, *OPTIONAL, *(f"{name}_sizes" for name in _KINDS)]
    table = pa.concat_tables([each.select(names) for each in tables])
    for name in TEXT:
        if table[name].null_count:
            where = places.place(pc.index(pc.is_null(table[name]), True).as_py())
            raise InputError(f"field {name!r}: is missing", where=where, fix=FIX_SCHEMA)
    label_codes_N = _labels(table, places, taxonomy)
    counts_KN = [_counts(table, name) for name in _KINDS]
    signatures, signature_codes_N = _signatures(table, counts_KN, places)
    for kind, counts_N in zip(_KINDS.values(), counts_KN, strict=True):
        there = np.array([kind in signature_kinds(signature) for signature in signatures], np.int64)
        np.copyto(counts_N, there[signature_codes_N], where=counts_N < 0)
    _check_ids(table["id"], places)
    _check_texts(tables, places)
    datasets, dataset_codes_N = _encoded(table["dataset"])
    chars_KN = [numbers_of(pc.utf8_length(table[name])) for name in ("problem", "answer")]
    codes_KN = [dataset_codes_N, signature_codes_N, label_codes_N]
    values_KN = np.stack([np.asarray(each, np.int32) for each in (*codes_KN, *chars_KN, *counts_KN)])
    return make_columns(taxonomy, tuple(datasets), tuple(signatures), values_KN)


def numbers_of(column: pa.ChunkedArray | pa.Array, null: int = 0) -> npt.NDArray[np.int64]:
    """A column of integers; `null` stands for nulls."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    values = pa.Array.from_buffers(array.type, len(array), [None, array.buffers()[1]], offset=array.offset)
    numbers_N: npt.NDArray[np.int64] = np.from_dlpack(values).astype(np.int64)
    if array.null_count:
        numbers_N[np.from_dlpack(array.is_null().cast(pa.int8())).astype(bool)] = null
    return numbers_N


def _encoded(column: pa.ChunkedArray) -> tuple[list[Any], npt.NDArray[np.int64]]:
    """Distinct values, null among them, in the order of first sight, and the code of each row."""
    codes = column.combine_chunks().dictionary_encode(null_encoding="encode")
    return codes.dictionary.to_pylist(), numbers_of(codes.indices)


def _examples(codes_N: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The first row of each distinct code, ascending, and for each row the number of its example."""
    _, first, inverse_N = np.unique(codes_N, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return first[order], rank[inverse_N]


def _counts(table: pa.Table, name: str) -> npt.NDArray[np.int64]:
    """Media of a field in each row, -1 where that is not known."""
    return numbers_of(pc.list_value_length(table[f"{name}_sizes"]), null=-1)


def _labels(table: pa.Table, places: Places, taxonomy: Taxonomy) -> Integers:
    datasets, dataset_codes_N = _encoded(table["dataset"])
    known = [taxonomy.datasets.get(name) for name in datasets]
    free = np.array([dataset is not None and dataset.free_form for dataset in known])
    key_N = dataset_codes_N
    for name in ("class_label", "answer"):
        values, codes_N = _encoded(table[name])
        # Free-form answers hardly ever repeat, and name no label.
        said_N = np.where(free[dataset_codes_N], 0, codes_N) if name == "answer" else codes_N
        key_N = key_N * len(values) + said_N
    examples, codes_N = _examples(key_N)
    labels = [label_of(places.row(int(i)), taxonomy, places.place(int(i))).code for i in examples]
    class_codes_N: Integers = np.array(labels, np.int16)[codes_N]
    return class_codes_N


def _signatures(table: pa.Table, counts_KN: list[npt.NDArray[np.int64]], places: Places) -> tuple[list[str], Integers]:
    """The distinct signatures in the order of first sight, and the code of each row."""
    _, said_N = _encoded(table["modality_signature"])
    key_N = said_N
    for counts_N in counts_KN:
        key_N = key_N * 3 + np.sign(counts_N) + 1
    examples, codes_N = _examples(key_N)
    names = []
    for i in map(int, examples):
        known = all(counts_N[i] >= 0 for counts_N in counts_KN)
        names.append(signature_of(places.row(i), places.place(i), check_media=known))
    signatures = list(dict.fromkeys(names))
    return signatures, np.array([signatures.index(name) for name in names], np.int16)[codes_N]


def _check_ids(ids: pa.ChunkedArray, places: Places) -> None:
    if ids.null_count == len(ids):
        return
    blank = np.flatnonzero(numbers_of(pc.utf8_length(pc.utf8_trim_whitespace(ids)), null=-1) == 0)
    if len(blank):
        where = places.place(int(blank[0]))
        raise InputError("field 'id': is empty", where=where, fix="Remove it, or give every row its own.")
    if ids.null_count == 0 and pc.count_distinct(ids).as_py() == len(ids):
        return
    seen: dict[str, int] = {}
    for number, given in enumerate(ids.to_pylist()):
        identity = places.identity(number, given)
        first = seen.setdefault(identity, number)
        if first != number:
            what = f"field 'id': {identity!r} is also the id of {places.place(first)}"
            raise InputError(what, where=places.place(number), fix="Give every row its own id.")


def _check_texts(tables: list[pa.Table], places: Places) -> None:
    first = 0
    for table in tables:
        if "texts" in table.schema.names and not _null(table.schema.field("texts").type):
            texts = table["texts"].combine_chunks()
            if len(texts.flatten()) == 0:
                continue
            suspect = pc.match_substring_regex(pc.list_flatten(texts), _SUSPECT)
            for local in pc.filter(pc.list_parent_indices(texts), pc.fill_null(suspect, True)).to_pylist():
                check_paths(places.row(first + local), places.place(first + local))
        first += table.num_rows
