"""Unpack a tar of media from an author that is not trusted.

Every member lands below the given folder, or the archive is refused: no absolute path, no '..', no device or pipe, no
link out. A link to a member that came before becomes a copy of it, so that no link ever lies on the disk and none can
lead a later member astray. Hidden files (those of macOS, too) are left out. Sizes are checked before a byte is written:
of a member, of all together against the size of the archive, and of headers, which Python would read into memory. An
archive that ends without its end mark is an error, though Python takes what it cannot read for the end.
"""

from __future__ import annotations

import gzip
import shutil
import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO, cast

from hba.atlas.source import DEFAULT_LIMITS
from hba.errors import InputError
from hba.storage import atomic_write

MAX_RATIO = 50
MIN_TOTAL_BYTES = 1 << 30
MAX_HEADER_BYTES = 16 << 20
_KEPT_BYTES = 1 << 16
_BLOCK = 512
_FIX_DAMAGED = "Delete it and download it again."
_FIX_REFUSED = "Do not use this archive; tell those who published it."


class _Counted:
    """A stream that hands out at most `left` bytes more, and remembers the last ones."""

    def __init__(self, stream: IO[bytes], where: str) -> None:
        self._stream, self._where = stream, where
        self.left = MAX_HEADER_BYTES
        self._tail, self._end = b"", 0

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise InputError("a header is larger than any honest one", where=self._where, fix=_FIX_REFUSED)
        self._tail = (self._tail + data)[-_KEPT_BYTES:]
        self._end += len(data)
        return data

    def is_end_mark(self, offset: int) -> bool:
        """Whether a block of zeros lies at `offset`."""
        start = offset - (self._end - len(self._tail))
        return self._tail[start : start + _BLOCK] == bytes(_BLOCK)


def unpack(archive: Path, folder: Path, *, max_bytes: int | None = None) -> int:
    """Unpack a .tar or .tar.gz into `folder`; returns the number of files. Files that are there are replaced.

    `max_bytes` bounds all members together; by default 50 times the archive, at least 1 GiB. Raises InputError for an
    archive that is damaged or refused (what came before the bad member is then there), StorageError when the disk is
    full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    where = archive.name
    total = max_bytes if max_bytes is not None else max(MAX_RATIO * archive.stat().st_size, MIN_TOTAL_BYTES)
    try:
        with archive.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            stream = _Counted(cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if packed else raw, where)
            return _unpack(stream, folder.resolve(), total, where)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        what = f"is damaged ({type(error).__name__})"
        raise InputError(what, where=where, fix=_FIX_DAMAGED) from None
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        what = f"needs {error.filename} as a file and as a folder"
        raise InputError(what, where=where, fix="Unpack into an empty folder.") from None


def _unpack(stream: _Counted, folder: Path, total: int, where: str) -> int:
    count = skipped = 0
    with tarfile.open(fileobj=cast(IO[bytes], stream), mode="r|") as tar:
        while True:
            stream.left = MAX_HEADER_BYTES + skipped
            member = tar.next()
            if member is None:
                break
            tar.members = []  # type: ignore[attr-defined]  # or the headers of all members pile up
            skipped = member.size
            total -= member.size
            if member.size > DEFAULT_LIMITS.max_bytes or total < 0:
                what = f"member {member.name!r} makes it unpack to more than is plausible"
                raise InputError(what, where=where, fix=_FIX_REFUSED)
            target = _target(folder, member.name, where)
            if target is None or member.isdir():
                continue
            stream.left = MAX_HEADER_BYTES + member.size
            _write(tar, member, folder, target, where)
            skipped = 0
            count += 1
        if not stream.is_end_mark(tar.offset):
            raise InputError("is cut off or damaged: it has no end mark", where=where, fix=_FIX_DAMAGED)
    return count


def _target(folder: Path, name: str, where: str) -> Path | None:
    """Where a member goes, None for a hidden file or the folder itself. Raises InputError when it is outside."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name or ":" in (pure.parts or ("",))[0]:
        raise InputError(f"member {name!r} leads outside the folder", where=where, fix=_FIX_REFUSED)
    if not pure.parts or any(part.startswith(".") for part in pure.parts):
        return None
    target = folder / pure
    if not target.parent.resolve().is_relative_to(folder):  # a link that was there before
        raise InputError(f"member {name!r} leads outside the folder", where=where, fix=_FIX_REFUSED)
    return target


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path, target: Path, where: str) -> None:
    if member.isreg():
        data = tar.extractfile(member)
    elif member.issym() or member.islnk():
        data = _linked(member, folder, where).open("rb")
    else:
        raise InputError(f"member {member.name!r} is a device or a pipe", where=where, fix=_FIX_REFUSED)
    if data is None:
        raise InputError(f"member {member.name!r} cannot be read", where=where, fix=_FIX_DAMAGED)
    with data, atomic_write(target, "wb") as out:
        shutil.copyfileobj(data, out, 1 << 20)


def _linked(member: tarfile.TarInfo, folder: Path, where: str) -> Path:
    """The file, unpacked before, that a link means: relative to its own folder, or to the root for a hard link."""
    parts: list[str] = [] if member.islnk() else list(PurePosixPath(member.name).parent.parts)
    link = PurePosixPath(member.linkname)
    for part in link.parts:
        if part == ".." and parts:
            parts.pop()
        else:
            parts.append(part)  # '..' above the root stays, and is refused
    target = None if link.is_absolute() else _target(folder, "/".join(parts), where)
    if target is None or not target.is_file() or target.is_symlink():
        what = f"link {member.name!r} leads to {member.linkname!r}, which is no file of the archive before it"
        raise InputError(what, where=where, fix=_FIX_REFUSED)
    return target
