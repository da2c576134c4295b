"""Media of a parquet shard that has no index part, read by the row: the pages of a column, as the format lays them out.

Parquet readers decode a whole row group, often hundreds of megabytes, to serve one clip. Below the row groups a column
lies in pages, and the values of an uncompressed page lie in it as they are. So a row costs what its medium takes, and
what must be read to find it: the headers of the pages before it, and the levels of its page, which say to which row
each value belongs. Writers that do not say how large a page may become (pyarrow, by default) put a whole row group into
one page, packed by Snappy. Of such a page only what is asked for is unpacked, as long as it holds media that do not get
smaller (`_Snappy`). Any other packed page must be read whole; those of the rows last asked for are kept, so that rows
that are read in their order cost each page once: quick to read in order, and slow to read at random.

Columns are lists of bytes, or of structs {bytes, path} as `datasets` writes them, or one of these a row. What uses an
encoding that is unknown here is read by Arrow, a row group at a time. A shard that is cut off, or contradicts itself,
is a DamagedPageError, never another row's medium.
"""

from __future__ import annotations

import struct
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

KEPT_BYTES = 128 << 20
"""of pages that were read last; the last page of each column is kept, whatever its size"""
_WHOLE_BYTES = 1 << 20  # a page of this size is read at once, a larger one value by value
_HEADER_BYTES, _LONGEST_HEADER = 512, 1 << 20
_UNPACKED, _SNAPPY = 0, 1
_CODECS = {1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}
_DATA, _DICTIONARY, _DATA_2 = 0, 2, 3
_PLAIN_DICTIONARY, _RLE_DICTIONARY = 2, 8
_ENCODINGS = {0, 2, 3, 4, 8}  # plain, those by a dictionary, and what levels are written in
_DEEPEST = 16
_MOST_SLOTS = 1 << 24  # more than any page has; a few bytes can claim as many as they like

Read = Callable[[int, int], bytes]
"""`size` bytes of the shard from byte `start` on; fewer at its end"""
Announce = Callable[[int, int], None]
"""told that `size` bytes from `start` on will be read in many small pieces, so that they may be fetched at once"""
Levels = npt.NDArray[np.uint8]


class DamagedPageError(Exception):
    """The bytes are not those of a whole parquet file."""


class Value(NamedTuple):
    """The bytes of a medium: `offset` where they lie as they are in the shard, else -1; `data` if they are at hand."""

    size: int
    offset: int = -1
    data: memoryview | None = None


class MediaColumn(NamedTuple):
    """The leaf column that holds the bytes of a field: its number in the shard, and what its levels mean."""

    number: int
    entry_level: int
    """the definition level from which on there is an entry in the list of the row"""
    value_level: int
    """that of an entry which is not null"""
    repeated: bool
    arrow: str
    """the name by which Arrow reads it"""


def media_column(file: pq.ParquetFile, name: str) -> MediaColumn | None:
    """The column of bytes of a field of an opened shard, None where the shard has no such field.

    A column of one medium a row is a list of at most one: there a null is no entry.
    """
    position = file.schema_arrow.get_field_index(name)
    if position < 0 or pa.types.is_null(file.schema_arrow.field(position).type):
        return None
    kind = file.schema_arrow.field(position)
    listed = is_list(kind.type)
    inner = kind.type.value_type if listed else kind.type
    for number in range(len(file.schema)):
        column = file.schema.column(number)
        path = column.path.split(".")
        if path[0] != name or (pa.types.is_struct(inner) and path[-1] != "bytes"):
            continue
        if column.physical_type != "BYTE_ARRAY":  # a list of nulls, of which nothing is stored
            return None
        levels = column.max_definition_level
        entry = int(kind.nullable) + 1 if listed else levels
        return MediaColumn(number, entry, levels, column.max_repetition_level > 0, column.path)
    return None


def is_list(kind: pa.DataType) -> bool:
    """Whether a column holds a list a row, of any of Arrow's kinds."""
    types = pa.types
    tests = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view)
    return any(test(kind) for test in tests)


class _Group(NamedTuple):
    """A row group as the footer of a shard tells: its first row, its rows, and the metadata of its columns."""

    first: int
    rows: int
    columns: list[Any]


def _groups(read: Read, size: int) -> list[_Group]:
    """The row groups of a shard of `size` bytes. Arrow's own view of them ends the process where one is damaged."""
    tail = read(max(0, size - 8), 8)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != b"PAR1" or length > size - 8:
        raise DamagedPageError("has no whole footer")
    groups: list[_Group] = []
    first = 0
    try:
        footer, _ = _struct(read(size - 8 - length, length), 0)
        for group in footer[4]:
            groups.append(_Group(first, group[3], [column[3] for column in group[1]]))
            first += group[3]
    except (IndexError, KeyError, TypeError) as error:
        raise DamagedPageError("has no whole footer") from error
    return groups


class ShardPages:
    """The media of one shard, by row.

    `file` is it opened, `read` reads of its `size` bytes, `kept` holds pages, of all shards.
    """

    def __init__(
        self, file: pq.ParquetFile, read: Read, size: int, kept: KeptPages, announce: Announce | None = None
    ) -> None:
        """Raises DamagedPageError when its footer is damaged."""
        self._file, self._read, self._kept, self._announce = file, read, kept, announce
        self._own = object()  # in the keys of its pages, which outlive it: another shard may get its `id`
        self._columns: dict[str, MediaColumn | None] = {}
        self._chunks: dict[tuple[int, str], _Chunk] = {}
        self._groups = _groups(read, size)
        self._firsts = np.array([group.first for group in self._groups], np.int64)

    def _group(self, row: int) -> int:
        return int(np.searchsorted(self._firsts, row, side="right")) - 1

    def _chunk(self, row: int, name: str) -> tuple[_Chunk | None, int]:
        """The column chunk of a row of the shard, None where there is no such column; and the row's number in it."""
        number = self._group(row)
        group = self._groups[number]
        if name not in self._columns:
            self._columns[name] = media_column(self._file, name)
        column = self._columns[name]
        if column is None:
            return None, row - group.first
        chunk = self._chunks.get((number, name))
        if chunk is None:
            keep = partial(self._kept.get, (self._own, number, name))
            try:
                chunk = _Chunk(column, group.columns[column.number], group.rows, self._read, keep, self._announce)
            except (IndexError, KeyError, TypeError) as error:
                raise DamagedPageError("a column chunk lies nowhere") from error
            self._chunks[number, name] = chunk
        return chunk, row - group.first

    def count(self, row: int, name: str) -> int:
        """How many media a row has in a field. Reads no more than it must. Raises DamagedPageError."""
        chunk, local = self._chunk(row, name)
        if chunk is None:
            return 0
        return chunk.count(local) if chunk.is_known else len(self.media(row, name))

    def media(self, row: int, name: str) -> list[Value | None]:
        """The media of a row in a field; None for a null. Raises DamagedPageError."""
        chunk, local = self._chunk(row, name)
        if chunk is None:
            return []
        if chunk.is_known:
            return chunk.media(local)
        values = chunk.keep(-1, lambda: _by_arrow(self._file, self._group(row), chunk.column))
        return [None if value is None else Value(len(value), data=memoryview(value)) for value in values[local]]


def _by_arrow(file: pq.ParquetFile, group: int, column: MediaColumn) -> list[list[bytes | None]]:
    """The media of a field of a whole row group, for each row."""
    rows: list[list[bytes | None]] = []
    for batch in file.iter_batches(batch_size=16, row_groups=[group], columns=[column.arrow], use_threads=False):
        rows += [entries(value) for value in batch.column(0).to_pylist()]
    return rows


def entries(value: Any) -> list[bytes | None]:
    """What Arrow gives for a row of a media column, as a list of bytes."""
    listed = isinstance(value, list)
    found = [each.get("bytes") if isinstance(each, dict) else each for each in (value if listed else [value])]
    return found if listed else [each for each in found if each is not None]


class KeptPages:
    """Pages that were read last, bounded by their bytes. The last one of each column stays, whatever its size."""

    def __init__(self, limit: int = KEPT_BYTES) -> None:
        self._limit = limit
        self._held = 0
        self._pages: OrderedDict[tuple[object, int], Any] = OrderedDict()
        self._last: dict[object, tuple[object, int]] = {}

    def get(self, column: tuple[object, int, str], offset: int, load: Callable[[], Any]) -> Any:
        """The page at `offset` of a column of a row group, read by `load` if it is not kept."""
        key = (column, offset)
        if key not in self._pages:
            page = load()
            self._last[column[2]] = key
            self._pages[key] = page
            self._held += _size(page)
            for old in list(self._pages):
                if self._held <= self._limit:
                    break
                if old not in self._last.values():
                    self._held -= _size(self._pages.pop(old))
        else:
            self._pages.move_to_end(key)
            self._last[column[2]] = key
        return self._pages[key]


def _size(page: Any) -> int:
    if isinstance(page, list):  # by Arrow: of each row
        return sum(len(value or b"") for values in page for value in values)
    return len(page)


@dataclass
class _Page:
    """A page, and which of its chunk's slots it holds: one for each entry of a row's list, one for an empty list."""

    body: int
    size: int
    unpacked: int
    first: int
    slots: int
    encoding: int
    kind: int
    packed: bool
    crc: int | None
    nulls: int | None
    levels: tuple[int, int] = (0, 0)
    """of a page of version 2: bytes of its repetition and its definition levels"""


@dataclass
class _Content:
    """What the levels of a page say: for each slot whether there is an entry, and which value it has (-1: null)."""

    repeats: Levels
    entries: npt.NDArray[np.bool_]
    values: npt.NDArray[np.int64]
    codes: npt.NDArray[np.int64] | None
    """of a page whose values stand in the dictionary: the number of each there"""
    plain: _Plain | None


class _Chunk:
    """A column of a row group."""

    def __init__(
        self,
        column: MediaColumn,
        about: dict[int, Any],
        num_rows: int,
        read: Read,
        keep: Callable[[int, Callable[[], Any]], Any],
        announce: Announce | None,
    ) -> None:
        """`about` is the metadata of the chunk in the footer; `keep` gives the page at an offset, read or kept."""
        self.column, self._read, self._num_rows, self.keep, self._announce = column, read, num_rows, keep, announce
        self._codec, self._num_slots = about[4], about[5]
        dictionary = about.get(11) or about[9]  # where it begins, if there is one: some writers say 0
        self._at = min(about[9], dictionary)
        self._end = self._at + about[7]
        if self._at < 0 or self._end < self._at or self._num_slots < num_rows:
            raise DamagedPageError("a column chunk lies nowhere")
        self._dictionary: _Page | None = None
        self._dictionary_values: _Plain | None = None
        self._pages: list[_Page] = []
        self._contents: dict[int, _Content] = {}
        self._all_there = about.get(12, {}).get(3) == 0
        self.is_known = self._codec in (_UNPACKED, *_CODECS) and set(about[2]) <= _ENCODINGS

    @property
    def _is_flat(self) -> bool:
        """Whether each row has one slot."""
        return not self.column.repeated or self._num_slots == self._num_rows

    def count(self, row: int) -> int:
        if self._is_flat and self._all_there:
            return 1
        page = self._page_of(self._slots(row)[0])
        if self._is_flat and page.nulls == 0:
            return 1
        return len(self.media(row))

    def media(self, row: int) -> list[Value | None]:
        found: list[Value | None] = []
        first, last = self._slots(row)
        for slot in range(first, last):
            page = self._page_of(slot)
            content = self._content(page)
            at = slot - page.first
            if content.entries[at]:
                number = int(content.values[at])
                found.append(None if number < 0 else self._value(content, number))
        return found

    def _slots(self, row: int) -> tuple[int, int]:
        """The slots of a row."""
        if self._is_flat:
            return row, row + 1
        starts = self._row_starts
        return int(starts[row]), int(starts[row + 1])

    @cached_property
    def _row_starts(self) -> npt.NDArray[np.int64]:
        """Where the slots of each row of lists begin, and where the last ones end, by the levels of all pages."""
        while self._next() is not None:
            pass
        repeats = [self._content(page).repeats for page in self._pages]
        starts = np.flatnonzero(np.concatenate(repeats) == 0) if repeats else np.zeros(0, np.int64)
        if len(starts) != self._num_rows:
            raise DamagedPageError("the lists of a column are not as many as its rows")
        return np.append(starts, self._num_slots)

    def _page_of(self, slot: int) -> _Page:
        while not self._pages or self._pages[-1].first + self._pages[-1].slots <= slot:
            if self._next() is None:
                raise DamagedPageError("a column chunk ends before its last row")
        return self._pages[int(np.searchsorted([page.first for page in self._pages], slot, side="right")) - 1]

    def _next(self) -> _Page | None:
        """The next page of data, None at the end of the chunk."""
        while self._at < self._end:
            page = self._header()
            self._at = page.body + page.size
            if self._at > self._end or min(page.size, page.unpacked, page.slots) < 0 or page.slots > _MOST_SLOTS:
                raise DamagedPageError("a page lies beyond its column")
            if page.kind == _DICTIONARY:
                self._dictionary = page
            elif page.kind in (_DATA, _DATA_2) and page.slots:  # writers leave empty ones
                page.first = self._pages[-1].first + self._pages[-1].slots if self._pages else 0
                if page.first + page.slots > self._num_slots:
                    raise DamagedPageError("a column holds more than it says")
                self._pages.append(page)
                return page
        return None

    def _header(self) -> _Page:
        size = _HEADER_BYTES
        while True:
            data = self._read(self._at, min(size, self._end - self._at))
            try:
                said, length = _struct(data, 0)
                break
            except IndexError:
                if len(data) < size or size >= _LONGEST_HEADER:
                    raise DamagedPageError("the header of a page is cut off") from None
                size *= 8
        try:
            return _page(said, self._at + length, packed=self._codec != _UNPACKED)
        except (KeyError, TypeError) as error:
            raise DamagedPageError("the header of a page is not whole") from error

    def _content(self, page: _Page) -> _Content:
        content = self._contents.get(page.first)
        if content is None:
            content = self._contents[page.first] = self._decoded(page)
        return content

    def _body(self, page: _Page) -> _Bytes:
        """The unpacked body of a page: at hand where it must be read whole, else read as it is asked for."""
        size, offset = (page.unpacked, -1) if page.packed else (page.size, page.body)
        at_hand = page.packed or page.crc is not None
        if not at_hand and page.size > _WHOLE_BYTES:
            return _Bytes(size, offset, lambda at, size: memoryview(self._read(page.body + at, size)))

        def part(at: int, size: int) -> memoryview:
            return memoryview(self.keep(page.body, lambda: self._unpacked(page)))[at : at + size]

        if page.packed and page.crc is None and page.kind != _DATA_2 and self._codec == _SNAPPY and size > _WHOLE_BYTES:
            if self._announce is not None:
                self._announce(page.body, page.size)
            part = _Snappy(self._read, page.body, page.size, size, otherwise=part).part
        return _Bytes(size, offset, part, at_hand)

    def _unpacked(self, page: _Page) -> bytes:
        data = self._read(page.body, page.size)
        if len(data) < page.size:
            raise DamagedPageError("a page is cut off")
        if page.crc is not None and zlib.crc32(data) != page.crc & 0xFFFFFFFF:
            raise DamagedPageError("a page differs from its checksum")
        if not page.packed:
            return data
        levels = sum(page.levels)
        if levels > len(data) or page.unpacked < levels:
            raise DamagedPageError("the levels of a page are longer than the page")
        try:
            packed = pa.py_buffer(data)[levels:] if levels else data
            codec = pa.Codec(_CODECS[self._codec])
            body: bytes = codec.decompress(packed, page.unpacked - levels, asbytes=True)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DamagedPageError("a page cannot be unpacked") from error
        return data[:levels] + body if levels else body

    def _decoded(self, page: _Page) -> _Content:
        body = self._body(page)
        column, slots, at = self.column, page.slots, 0
        found = []
        lengths = page.levels if page.kind == _DATA_2 else (None, None)
        for highest, length in zip((int(column.repeated), column.value_level), lengths, strict=True):
            if highest == 0 or slots == 0:
                found.append(np.zeros(slots, np.uint8))
                at += length or 0
                continue
            if length is None:
                (length,) = struct.unpack("<I", body.exactly(at, 4))
                at += 4
            found.append(_levels(body.exactly(at, length), highest.bit_length(), slots).astype(np.uint8))
            at += length
        repeats, defined = found
        there = defined == column.value_level
        values = np.where(there, np.cumsum(there) - 1, -1)
        codes = None
        if page.encoding in (_PLAIN_DICTIONARY, _RLE_DICTIONARY):
            if self._dictionary is None:
                raise DamagedPageError("a page has no dictionary")
            coded = body.exactly(at, body.size - at)
            width = coded[0] if len(coded) else 0
            if width > 32:
                raise DamagedPageError("a page has codes of no width")
            codes = _levels(coded[1:], width, int(there.sum())) if there.any() else np.zeros(0, np.int64)
        return _Content(
            repeats=repeats,
            entries=defined >= column.entry_level,
            values=values,
            codes=codes,
            plain=None if codes is not None else _Plain(body, at),
        )

    def _value(self, content: _Content, number: int) -> Value:
        if content.plain is not None:
            return content.plain.value(number)
        if self._dictionary is None or content.codes is None:
            raise DamagedPageError("a page has no dictionary")
        if self._dictionary_values is None:
            self._dictionary_values = _Plain(self._body(self._dictionary), 0)
        code = int(content.codes[number])
        if code >= self._dictionary.slots:
            raise DamagedPageError("a code is beyond its dictionary")
        return self._dictionary_values.value(code)


def _page(said: dict[int, Any], body: int, *, packed: bool) -> _Page:
    kind = said[1]
    about = said.get({_DATA: 5, _DICTIONARY: 7, _DATA_2: 8}.get(kind, -1), {1: 0, 2: 0})
    page = _Page(
        body=body,
        size=said[3],
        unpacked=said[2],
        first=0,
        slots=about[1],
        encoding=about[4 if kind == _DATA_2 else 2],
        kind=kind,
        packed=packed,
        crc=said.get(4),
        nulls=about.get(5, {}).get(3) if kind == _DATA else None,
    )
    if kind == _DATA_2:
        page.packed = packed and about.get(7, True)
        page.nulls, page.levels = about[2], (about[6], about[5])
        if min(page.levels) < 0:
            raise DamagedPageError("a page has levels of no length")
    return page


@dataclass
class _Bytes:
    """The unpacked body of a page. `offset` is its place in the shard, -1 where it is packed there."""

    size: int
    offset: int
    part: Callable[[int, int], memoryview]
    at_hand: bool = False

    def exactly(self, at: int, size: int) -> memoryview:
        if at < 0 or size < 0 or at + size > self.size:
            raise DamagedPageError("a page is shorter than what it holds")
        data = self.part(at, size)
        if len(data) != size:
            raise DamagedPageError("a page is cut off")
        return data


class _Snappy:
    """A page packed by Snappy, of which parts are unpacked.

    Snappy packs 64 KiB at a time, each for itself, into copies of what came before in them and into literal bytes with
    their number in front. To find a block one goes from number to number; media that are packed already are literal
    throughout, so that this costs next to nothing. Where there are many copies, or one that reaches beyond its block
    (the format allows it), the page is read as a whole: `otherwise` gives the part then.
    """

    BLOCK = 1 << 16

    def __init__(
        self, read: Read, start: int, size: int, unpacked: int, otherwise: Callable[[int, int], memoryview]
    ) -> None:
        self._read, self._end, self._size, self._otherwise = read, start + size, unpacked, otherwise
        self._window, self._window_at = b"", start
        said, length = self._varint(start)
        self._at, self._done, self._elements = start + length, 0, 0
        self._blocks = [self._at]
        self._literals: list[tuple[int, int, int]] = []  # unpacked from, to, and where the bytes lie
        self._is_plain = said == unpacked
        self._last: tuple[int, bytes] = (-1, b"")

    def part(self, at: int, size: int) -> memoryview:
        if self._is_plain:
            self._is_plain = self._walk(min(self._size, -(-(at + size) // self.BLOCK) * self.BLOCK))
        if not self._is_plain:
            return self._otherwise(at, size)
        if size <= 8:  # the length of a value: not worth a block
            before = bisect_right(self._literals, (at, self._size, 0))
            start, stop, place = self._literals[before - 1] if before else (0, 0, 0)
            if start <= at and at + size <= stop:
                return memoryview(self._read(place + at - start, size))
        first, last = at // self.BLOCK, -(-(at + size) // self.BLOCK)
        base = self._blocks[first]
        packed = self._read(base, self._blocks[last] - base)
        cuts = [place - base for place in self._blocks[first : last + 1]]
        blocks = [self._block(first + k, packed[a:b]) for k, (a, b) in enumerate(pairwise(cuts))]
        return memoryview(b"".join(blocks))[at - first * self.BLOCK :][:size]

    def _block(self, number: int, packed: bytes) -> bytes:
        if self._last[0] != number:
            size = min(self.BLOCK, self._size - number * self.BLOCK)
            head = bytes((size & 127 | 128, size >> 7 & 127 | 128, size >> 14))
            try:
                self._last = (number, pa.Codec("snappy").decompress(head + packed, size, asbytes=True))
            except (pa.ArrowException, OSError, ValueError) as error:
                raise DamagedPageError("a page cannot be unpacked") from error
        return self._last[1]

    def _walk(self, to: int) -> bool:
        """Find the blocks up to `to`; whether the page can be read by blocks so far."""
        while self._done < to:
            data = self._peek(self._at)
            if not data:
                raise DamagedPageError("a page is cut off")
            kind, number = data[0] & 3, data[0] >> 2
            extra = (max(0, number - 59), 1, 2, 4)[kind]
            value = int.from_bytes(data[1 : 1 + extra], "little")
            within = self._done % self.BLOCK
            if kind == 0:
                length = (value if extra else number) + 1
                self._literals.append((self._done, self._done + length, self._at + 1 + extra))
                self._at += length
            else:
                length = (number & 7) + 4 if kind == 1 else number + 1
                back = (number >> 3) << 8 | value if kind == 1 else value
                if not 0 < back <= within:
                    return False
            self._at += 1 + extra
            self._done += length
            self._elements += 1
            if within + length > self.BLOCK or self._at > self._end or self._elements > 4096 + (self._done >> 9):
                return False
            if self._done % self.BLOCK == 0 or self._done == self._size:
                self._blocks.append(self._at)
        return True

    def _peek(self, at: int) -> bytes:
        """The next bytes, enough for the head of an element."""
        ahead = at - self._window_at
        if ahead < 0 or ahead + 8 > len(self._window):
            self._window, self._window_at = self._read(at, min(256, self._end - at)), at
            ahead = 0
        return self._window[ahead : ahead + 8]

    def _varint(self, at: int) -> tuple[int, int]:
        try:
            return _varint(self._peek(at), 0)
        except IndexError:
            raise DamagedPageError("a page is cut off") from None


@dataclass
class _Plain:
    """Values that follow each other, each behind its length in four bytes."""

    body: _Bytes
    start: int
    starts: list[int] = field(default_factory=list)
    next: int = -1

    def value(self, number: int) -> Value:
        at = self.start if self.next < 0 else self.next
        while len(self.starts) <= number:
            self.starts.append(at)
            (size,) = struct.unpack("<I", self.body.exactly(at, 4))
            at += 4 + size
            if at > self.body.size:
                raise DamagedPageError("a value is longer than its page")
        self.next = at
        start = self.starts[number]
        end = self.starts[number + 1] if number + 1 < len(self.starts) else at
        size = end - start - 4
        offset = -1 if self.body.offset < 0 else self.body.offset + start + 4
        return Value(size, offset, self.body.exactly(start + 4, size) if self.body.at_hand else None)


def _levels(data: memoryview, width: int, count: int) -> npt.NDArray[np.int64]:
    """`count` numbers of `width` bits in the hybrid of runs and packed groups of eight. Raises DamagedPageError."""
    found: list[npt.NDArray[np.int64]] = []
    have, at, size = 0, 0, (width + 7) // 8
    try:
        while have < count:
            head, at = _varint(data, at)
            if head & 1:
                groups = head >> 1
                if at + groups * width > len(data) or not groups:
                    raise DamagedPageError("the levels of a page are cut off")
                bits = np.unpackbits(np.frombuffer(data[at : at + groups * width], np.uint8), bitorder="little")
                found.append(bits.reshape(8 * groups, width).astype(np.int64) @ (1 << np.arange(width, dtype=np.int64)))
                at += groups * width
                have += 8 * groups
            else:
                run = head >> 1
                if at + size > len(data) or not run:
                    raise DamagedPageError("the levels of a page are cut off")
                found.append(np.full(min(run, count - have), int.from_bytes(data[at : at + size], "little"), np.int64))
                at += size
                have += run
    except IndexError:
        raise DamagedPageError("the levels of a page are cut off") from None
    return np.concatenate(found)[:count] if found else np.zeros(0, np.int64)


def _varint(data: memoryview | bytes, at: int) -> tuple[int, int]:
    """A number of variable length, and where it ends. Raises IndexError at the end of the data."""
    number = shift = 0
    while True:
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return number, at
        if shift > 63:
            raise DamagedPageError("a number has no end")


def _struct(data: bytes, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """A struct of Thrift's compact protocol, by the numbers of its fields, and where it ends.

    Raises IndexError at the end of the data, DamagedPageError for what is no struct.
    """
    if depth > _DEEPEST:
        raise DamagedPageError("a header is nested too deep")
    fields: dict[int, Any] = {}
    number = 0
    while head := data[at]:
        at += 1
        if head >> 4:
            number += head >> 4
        else:
            said, at = _varint(data, at)
            number = (said >> 1) ^ -(said & 1)
        kind = head & 15
        if kind in (1, 2):  # true, false: the value is the kind
            fields[number] = kind == 1
        else:
            fields[number], at = _thrift(data, at, kind, depth)
    return fields, at + 1


def _thrift(data: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (1, 2, 3):
        return data[at], at + 1
    if kind in (4, 5, 6):
        said, at = _varint(data, at)
        return (said >> 1) ^ -(said & 1), at
    if kind == 7:
        data[at + 7]  # it is there
        return None, at + 8
    if kind == 8:
        size, at = _varint(data, at)
        if size:
            data[at + size - 1]  # it is there
        return data[at : at + size], at + size
    if kind in (9, 10):
        head = data[at]
        size, at = (head >> 4, at + 1) if head >> 4 < 15 else _varint(data, at + 1)
        items = []
        for _ in range(size):
            item, at = _thrift(data, at, head & 15, depth + 1)
            items.append(item)
        return items, at
    if kind == 12:
        return _struct(data, at, depth + 1)
    raise DamagedPageError("a header holds what it cannot")
