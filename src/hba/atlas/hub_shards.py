"""Parquet shards on the hub, of which only what is asked for is fetched: the columns of rows, then media one by one.

A shard has a file of its full size in the cache that is filled block by block; a second file says which blocks are
there. Blocks are written and synced before they are marked, so that a killed process leaves nothing that looks whole,
and two processes that fetch the same block write the same bytes. Whoever reads must `fetch` first: `open` does.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from hba.atlas import embedded
from hba.atlas.hub_client import Repo
from hba.atlas.sample import MEDIA_FIELDS

BLOCK_BYTES = 1 << 17
_REQUEST_BYTES = 16 << 20
_AT_ONCE = 8


@dataclass(frozen=True)
class RemoteShard:
    """The shard `name` of a dataset and the file `path` that is filled with it. Picklable; holds nothing open."""

    repo: Repo
    name: str
    path: Path
    size: int

    def fetch(self, start: int, stop: int) -> None:
        """Have the bytes `start` to `stop` in the file. Raises InputError, StorageError when the disk is full."""
        with self._marks.open("r+b", buffering=0) as marks:
            first, last = start // BLOCK_BYTES, -(-min(stop, self.size) // BLOCK_BYTES)
            there = os.pread(marks.fileno(), last - first, first)
            for begin, end in _gaps(there, first):
                self.repo.fetch_part(self.name, self.path, begin * BLOCK_BYTES, min(end * BLOCK_BYTES, self.size))
                os.pwrite(marks.fileno(), b"\1" * (end - begin), begin)

    def open(self) -> BinaryIO:
        """A file that fetches what is read from it."""
        return cast(BinaryIO, _RemoteFile(self))

    @property
    def _marks(self) -> Path:
        return _marks(self.path)


def _marks(path: Path) -> Path:
    return path.with_name(f".{path.name}.blocks")


def _gaps(there: bytes, first: int) -> Iterator[tuple[int, int]]:
    """Runs of blocks that are not there, none longer than a request."""
    longest, number = _REQUEST_BYTES // BLOCK_BYTES, 0
    while (number := there.find(b"\0", number)) >= 0:
        end = there.find(b"\1", number)
        end = min(end if end >= 0 else len(there), number + longest)
        yield first + number, first + end
        number = end


class _RemoteFile(io.RawIOBase):
    def __init__(self, shard: RemoteShard) -> None:
        self._shard, self._at = shard, 0
        self._file = shard.path.open("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._shard.size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = max(min(len(buffer), self._shard.size - self._at), 0)
        self._shard.fetch(self._at, self._at + wanted)
        data = os.pread(self._file.fileno(), wanted, self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def remote_shards(repo: Repo, names: Sequence[str], folder: Path) -> tuple[RemoteShard, ...]:
    """The shards, to be filled below `folder`, with what opening an atlas reads of them: all but the media.

    Their index parts, where there are any, must be there. Raises InputError, StorageError.
    """
    paths = {name: folder / name for name in names}
    sizes = {name: path.stat().st_size for name, path in paths.items() if _marks(path).is_file()}
    unknown = [name for name in names if name not in sizes]
    sizes |= {name: info.size for name, info in repo.infos(unknown).items()} if unknown else {}
    shards = tuple(RemoteShard(repo, name, paths[name], sizes[name]) for name in names)
    for shard in shards:
        _prepare(shard)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(_fetch_rows, shards))
    return shards


def _prepare(shard: RemoteShard) -> None:
    shard.path.parent.mkdir(parents=True, exist_ok=True)
    for path, size in ((shard.path, shard.size), (_marks(shard.path), -(-shard.size // BLOCK_BYTES))):
        with path.open("ab") as file:
            file.truncate(size)


def _fetch_rows(shard: RemoteShard) -> None:
    shard.fetch(max(0, shard.size - embedded.TAIL_BYTES), shard.size)
    if not embedded.index_path(shard.path).is_file():
        with embedded.open_shard(shard.path, shard) as file:
            for name in file.schema_arrow.names:
                if name not in MEDIA_FIELDS:
                    file.read(columns=[name], use_threads=False)
