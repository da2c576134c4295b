"""The bytes of a medium: a file, a part of a larger file, or bytes at hand; read as a decoder asks, and checked.

A medium that is embedded in a shard has no checksum that the file system would know of, so its slice carries one for
every 128 KiB. What is read is checked, what is not read costs nothing: eight frames of a long clip do not read all of
it. A changed bit is a MediaError that names the place, never another frame or another word. Storage that is away is
waited for, and then a MachineError (see `storage.patiently`): no fault of the medium.
"""

from __future__ import annotations

import errno
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias, cast

from hba.errors import MachineError, MediaError
from hba.storage import patiently

CHECKED_BYTES = 1 << 17
"""bytes of a medium that share a checksum: what a decoder reads at once, so that it checks what it reads and no more"""


class Slice(NamedTuple):
    """`size` bytes of the file `path` from byte `offset` on, read when needed: a medium embedded in a larger file.

    `checksums`: the CRC-32 of every CHECKED_BYTES of it, four bytes each, little-endian; empty where there are none.
    """

    path: Path
    offset: int
    size: int
    checksums: bytes = b""


PLACES = ("offsets", "sizes", "checksums")
"""what the index part of a shard tells of the media of a field, as columns of lists: `{field}_offsets`, ..."""

Source: TypeAlias = Path | bytes | Slice


class _SliceFile(io.RawIOBase):
    """A read-only file over a slice; only what a decoder asks for is read, in whole blocks where they are checked.

    A block that differs from its checksum, or that cannot be had, ends the file and sets `damaged` or `fault`: an
    exception would be lost in a decoder, which would serve the beginning as the whole.
    """

    def __init__(self, part: Slice, where: str) -> None:
        self._part, self._at, self._where = part, 0, where
        self._block, self._number = memoryview(b""), -1
        self.damaged: int | None = None
        """the first byte of the medium that may be wrong"""
        self.fault: MachineError | None = None
        self._file = patiently(partial(part.path.open, "rb", buffering=0), where)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._part.size}[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, "seek before the start")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = max(min(len(buffer), self._part.size - self._at), 0)
        checked = bool(self._part.checksums) and wanted > 0
        data = self._checked()[:wanted] if checked else memoryview(self._read(wanted, self._at))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _checked(self) -> memoryview:
        """What follows in the block of the present position; nothing when it differs from its checksum."""
        number, within = divmod(self._at, CHECKED_BYTES)
        if number != self._number:
            start = number * CHECKED_BYTES
            size = min(CHECKED_BYTES, self._part.size - start)
            block = self._read(size, start)
            if self.fault is None and not _is_sound(block, number, self._part.checksums):
                self.damaged = start if self.damaged is None else self.damaged
                return memoryview(b"")
            self._block, self._number = memoryview(block), number
        return self._block[within:]

    def _read(self, size: int, start: int) -> bytes:
        if self.fault is None:
            try:
                return patiently(partial(os.pread, self._file.fileno(), size, self._part.offset + start), self._where)
            except MachineError as fault:
                self.fault = fault
        return b""

    def close(self) -> None:
        self._file.close()
        super().close()


def checksums_of(medium: bytes | memoryview) -> bytes:
    """The checksums of a medium, as a Slice carries them."""
    blocks = (medium[at : at + CHECKED_BYTES] for at in range(0, len(medium), CHECKED_BYTES))
    return b"".join(zlib.crc32(block).to_bytes(4, "little") for block in blocks)


def _is_sound(block: bytes, number: int, checksums: bytes) -> bool:
    return zlib.crc32(block).to_bytes(4, "little") == checksums[4 * number : 4 * number + 4]


def _flipped(at: int, where: str) -> MediaError:
    what = f"differs from its checksum after byte {at:,}: it was changed on the disk"
    return MediaError(what, where=where, fix="Restore the shard from its source, or convert again.")


@contextmanager
def opened(source: Source, *, where: str) -> Iterator[BinaryIO]:
    """What the decoders read: a binary file without a name, since they would go by the suffix of one.

    Raises OSError when it cannot be opened, and in the end, whatever became of it, MachineError when a part of it could
    not be had, MediaError when something that was read differs from its checksum; both name `where`.
    """
    if isinstance(source, bytes):
        yield io.BytesIO(source)
        return
    part = source if isinstance(source, Slice) else Slice(source, 0, patiently(source.stat, where).st_size)
    with _SliceFile(part, where) as raw:
        try:
            yield cast(BinaryIO, io.BufferedReader(raw, 1 << 16))
        finally:
            if raw.fault is not None:
                raise raw.fault from None
            if raw.damaged is not None:
                raise _flipped(raw.damaged, where) from None


def _part(part: Slice) -> bytes:
    with part.path.open("rb", buffering=0) as file:
        return os.pread(file.fileno(), part.size, part.offset)


def read_bytes(source: Source, *, where: str = "") -> bytes:
    """All bytes of a source.

    Raises OSError when its file cannot be read, MachineError when its storage is away, MediaError when a checksum
    differs.
    """
    if isinstance(source, bytes):
        return source
    if isinstance(source, Path):
        return patiently(source.read_bytes, where or str(source))
    data = patiently(partial(_part, source), where or str(source.path))
    if source.checksums and checksums_of(memoryview(data)) != source.checksums:
        starts = range(0, source.size, CHECKED_BYTES)
        blocks = ((at, data[at : at + CHECKED_BYTES], number) for number, at in enumerate(starts))
        bad = next(at for at, block, number in blocks if not _is_sound(block, number, source.checksums))
        raise _flipped(bad, where)
    return data
