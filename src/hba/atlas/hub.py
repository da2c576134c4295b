"""An atlas on the Hugging Face hub: opened as one store, of which only what is needed is fetched, or downloaded.

Three forms of a release are known: parquet shards, JSONL with media folders, JSONL with tars of the media. The files of
other splits are never asked for. Media in folders and in shards are fetched when a sample is read, one by one; tars
when the atlas is opened. Samples, ids and order are those of the same files in a local folder. The commit stands in
`Atlas.root` (`.../snapshots/<commit>` or `.../<commit>`) and so in the provenance of every run.
"""

from __future__ import annotations

import gzip
import posixpath
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Literal, NamedTuple, TypeVar, cast

from hba.atlas.hub_client import Listing, NotInRepoError, Repo, list_repo, remote_shards
from hba.atlas.jsonl import JsonlStore, size_of
from hba.atlas.names import Bound, HubId, Split, check_shards, no_split, parse_hub_id, split_of
from hba.atlas.parquet import ParquetStore, index_path
from hba.atlas.rows import MEDIA_FIELDS
from hba.atlas.source import DEFAULT_LIMITS
from hba.errors import InputError, MediaError
from hba.storage import StorageError, alone, atomic_write, json_sha256, read_json, write_json
from hba.taxonomy import PUBLISHED, Taxonomy, of_folder

BESIDE = ("atlas.json", "taxonomy.yaml")
_TARS = (".tar", ".tar.gz", ".tgz")
_ALIASES = {"val": "validation", "valid": "validation", "dev": "validation"}


class Layout(NamedTuple):
    """The files of one split in a dataset, and the form that they have."""

    split: str
    form: Literal["parquet", "jsonl", "tar"]
    rows: tuple[str, ...]
    beside: tuple[str, ...]
    tars: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """The folder of the rows in the dataset; paths of media are relative to it."""
        return PurePosixPath(self.rows[0]).parent.as_posix()


def splits_of(names: Iterable[str]) -> list[str]:
    """The splits that a dataset has: the published ones, or others where there is none of those."""
    found = {split for split in map(_split_at, names) if split is not None}
    return [name for name in PUBLISHED["splits_jsonl"] if name in found] or sorted(found)


def layout_of(listing: Listing, split: str | None) -> Layout:
    """The files of a split. Raises InputError when it is not there (listing those that are) or is not whole."""
    repo, names = listing
    known = ", ".join(splits_of(names)) or "no .jsonl and no .parquet file"
    if split is None:
        raise InputError("no split was named", where=str(repo), fix=f"Choose one of: {known}.")
    rows = sorted(name for name in names if _split_at(name) == split)
    if not rows:
        raise no_split(split, splits_of(names), where=str(repo))
    shards = [name for name in rows if name.endswith(".parquet")]
    chosen = shards or rows
    several = len(chosen) > 1 and (not shards or any("-of-" not in name for name in shards))
    if several or len({PurePosixPath(name).parent for name in chosen}) > 1:
        what = f"split {split!r} is ambiguous: {', '.join(chosen)}"
        raise InputError(what, where=str(repo), fix="Download the files that you mean, and open their folder.")
    folder = PurePosixPath(chosen[0]).parent
    beside = tuple(name for name in (str(folder / name) for name in BESIDE) if name in names)
    if shards:
        check_shards(tuple(Path(str(repo)) / name for name in shards))
        indexed = (index_path(Path(name)).as_posix() for name in shards)
        return Layout(split, "parquet", tuple(shards), (*beside, *(name for name in indexed if name in names)))
    tars = tuple(sorted(name for name in names if name.endswith(_TARS) and not _is_of_other_split(name, split)))
    return Layout(split, "tar" if tars else "jsonl", tuple(rows), beside, tars)


def _split_at(name: str) -> str | None:
    path = PurePosixPath(name)
    visible = not path.name.startswith(".") and path.parent.as_posix() in (".", "data")
    return split_of(Path(path.name)) if visible else None


def _is_of_other_split(tar: str, split: str) -> bool:
    """Whether the name of a tar says that it holds the media of another split, as train_media.tar.gz does for test."""
    words = re.split(r"[^a-z0-9]+", tar.lower())
    said = {_ALIASES.get(word, word) for word in words} & set(PUBLISHED["splits_jsonl"])
    return bool(said) and split not in said


def open_hub(name: HubId, wanted: Split | None, taxonomy: Taxonomy | None) -> JsonlStore | ParquetStore:
    """Open a split of a dataset on the hub; its rows, and its tars, are downloaded first, if they are not there.

    Raises InputError when the dataset, revision or split is not there or needs permission, when the hub cannot be
    reached, and for a bad row; StorageError when the disk is full.
    """
    listing = list_repo(name)
    layout = layout_of(listing, wanted.name if wanted else None)
    if layout.form == "tar":
        path = unpacked_split(listing, layout, wanted, taxonomy)
        return JsonlStore(path, split=layout.split, taxonomy=taxonomy or of_folder(path.parent))
    if layout.form == "parquet":
        return _open_shards(listing.repo, layout, taxonomy)
    path = [listing.repo.fetch(file) for file in (*layout.beside, *layout.rows)][-1]
    files = HubFiles(listing.repo, layout.folder, path.parent.resolve())
    return JsonlStore(path, split=layout.split, taxonomy=taxonomy or of_folder(path.parent), remote=files)


def open_rows(name: HubId, wanted: Split) -> JsonlStore | ParquetStore:
    """As `open_hub`, for who reads no medium: tars are not downloaded."""
    return open_hub(name, Split(wanted.name, Bound(0, False), Bound(0, False)), None)


def _open_shards(repo: Repo, layout: Layout, taxonomy: Taxonomy | None) -> ParquetStore:
    """Shards whose media are fetched when they are read; those that another program has fetched are used as is."""
    whole = repo.cached((*layout.beside, *layout.rows))
    if whole is not None:
        files = tuple(whole[len(layout.beside) :])
        return ParquetStore(files, split=layout.split, taxonomy=taxonomy or of_folder(files[0].parent))
    folder = repo.home(repo.commit)
    for name in layout.beside:
        repo.fetch(name, folder)
    remote = {shard.path: shard for shard in remote_shards(repo, layout.rows, folder.resolve())}
    files = tuple(remote)
    return ParquetStore(files, split=layout.split, taxonomy=taxonomy or of_folder(files[0].parent), remote=remote)


def media_paths(store: JsonlStore, rows: Iterable[int], fields: Iterable[str] = MEDIA_FIELDS) -> list[str]:
    """The distinct paths of all media of the given rows, in their order."""
    paths: dict[str, None] = {}
    for number in rows:
        row = store.row(number)
        for name in fields:
            paths.update(dict.fromkeys(getattr(row, name)))
    return list(paths)


class HubFiles(NamedTuple):
    """The media of a dataset on the hub that rows name relative to `folder` in it, fetched when they are read."""

    repo: Repo
    folder: str
    root: Path
    """where fetched ones lie, by the same names"""

    def _name(self, path: str) -> str:
        return (PurePosixPath(self.folder) / path).as_posix()

    def fetch(self, path: str, *, where: str) -> Path:
        """The file of a medium. Raises MediaError when the dataset has no such file, MachineError when the hub cannot
        be reached: that is no fault of the sample."""
        try:
            return self.repo.fetch(self._name(path))
        except NotInRepoError:
            what = f"the dataset {self.repo} has no file {path}"
            raise MediaError(what, where=where, fix="Tell its authors, or remove the row.") from None

    def sizes(self, paths: Sequence[str]) -> list[int]:
        """Bytes of each medium, as the hub says of those that are not here yet; 0 where it has none."""
        sizes = {path: size_of(self.root / path) for path in paths}
        unknown = {self._name(path): path for path, size in sizes.items() if size is None}
        sizes |= {unknown[name]: info.size for name, info in self.repo.infos(unknown).items()}
        return [sizes[path] or 0 for path in paths]


# Unpack a tar of media from an author that is not trusted.
#
# Every member lands below the given folder, or the archive is refused: no absolute path, no '..', no device or pipe, no
# link out. A link to a member that came before becomes a copy of it, so that no link ever lies on the disk and none can
# lead a later member astray. Hidden files (those of macOS, too) are left out. Sizes are checked before a byte is
# written: of a member, of all together against the size of the archive, and of headers, which Python would read into
# memory. An archive that ends without its end mark is an error, though Python takes what it cannot read for the end.


MAX_RATIO = 50
MIN_TOTAL_BYTES = 1 << 30
MAX_HEADER_BYTES = 16 << 20
_KEPT_BYTES = 1 << 16
_BLOCK = 512
_FIX_DAMAGED = "Delete it and download it again."
_FIX_REFUSED = "Do not use this archive, and tell those who published it."


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
    beside = "" if member.islnk() else posixpath.dirname(member.name)
    name = posixpath.normpath(posixpath.join(beside, member.linkname))  # '..' above the root stays, and is refused
    target = None if member.linkname.startswith("/") else _target(folder, name, where)
    if target is None or not target.is_file() or target.is_symlink():
        what = f"link {member.name!r} leads to {member.linkname!r}, which is no file of the archive before it"
        raise InputError(what, where=where, fix=_FIX_REFUSED)
    return target


# Download an atlas from the hub into a folder that opens like any other: rows, media as files, tars unpacked.
#
# Everything can be killed at any time and started again. A file is under its name only when it is whole; a tar has left
# its marker only when all its members are there, and is deleted then. The folder remembers the commit that it was begun
# with and goes on with that one. One process works on a folder at a time; another that wants it waits.


WORKERS = 8
_OWN = ".hub"
_FEW = 5000

R = TypeVar("R")
OnProgress = Callable[[int, int], None]


class Downloaded(NamedTuple):
    """What a folder holds now. `missing` are the media that rows name and the dataset does not have."""

    path: Path
    repo: str
    revision: str  # the commit
    splits: tuple[str, ...]
    rows: int
    missing: tuple[str, ...]


def download_atlas(
    repo: str,
    out: str | Path,
    *,
    splits: Sequence[str] | None = None,
    revision: str | None = None,
    workers: int = WORKERS,
    progress: OnProgress | None = None,
) -> Downloaded:
    """Download splits (all by default) of the dataset `repo`, org/name, into the folder `out`.

    Goes on with what an earlier call began, at the same commit. `progress(done, total)` is told of each file of the
    split at work. Raises InputError when the dataset, revision or split is not there or needs permission, when the hub
    cannot be reached, for a bad row, and when `out` holds something else; StorageError when the disk is full.
    """
    out = Path(out)
    wanted = parse_hub_id(repo)
    wanted = HubId(wanted.repo, revision or wanted.revision)
    begun = _begun(out, wanted)
    listing = list_repo(wanted if begun is None else HubId(wanted.repo, wanted.revision or begun))
    commit = listing.repo.commit
    if begun not in (None, commit):
        what = f"holds commit {begun}, not {commit}"
        raise InputError(what, where=str(out), fix="Choose another folder, or name that commit.")
    chosen = tuple(splits or splits_of(listing.names))
    layouts = [layout_of(listing, split) for split in chosen or (None,)]
    rows, missing = 0, list[str]()
    with _locked(out):
        write_json(out / _OWN / "state.json", {"repo": wanted.repo, "commit": commit})
        for layout in layouts:
            names = (*layout.beside, *layout.rows)
            fetch = partial(listing.repo.fetch, folder=out)
            files = tuple(_in_threads(fetch, names, workers, progress))[len(layout.beside) :]
            taxonomy = of_folder(files[0].parent)
            if layout.form == "parquet":
                rows += len(ParquetStore(files, split=layout.split, taxonomy=taxonomy))
                continue
            store = JsonlStore(files[0], split=layout.split, taxonomy=taxonomy)
            rows += len(store)
            missing += _fetch_media(listing, layout, store, range(len(store)), out, workers, progress)
    return Downloaded(out, wanted.repo, commit, tuple(layout.split for layout in layouts), rows, tuple(missing))


def local_copy(wanted: HubId, splits: Sequence[str] | None, progress: OnProgress | None) -> Path:
    """A folder of the cache with the rows and media of a dataset, downloaded first. Raises as `download_atlas`."""
    repo = list_repo(wanted).repo
    out = repo.home("copies") / repo.commit
    return download_atlas(repo.id, out, splits=splits, revision=repo.commit, progress=progress).path


def unpacked_split(listing: Listing, layout: Layout, wanted: Split | None, taxonomy: Taxonomy | None) -> Path:
    """The JSONL of a split of a tar release in the cache, with at least the media of the wanted rows beside it."""
    with alone(listing.repo.home("listings") / "lock"):
        repo = _unpacked_as(listing)
    folder = repo.home(repo.commit)
    with _locked(folder):
        paths = [repo.fetch(name, folder) for name in (*layout.beside, *layout.rows)]
        store = JsonlStore(paths[-1], split=layout.split, taxonomy=taxonomy or of_folder(paths[-1].parent))
        rows = wanted.rows(len(store)) if wanted else range(len(store))
        _fetch_media(Listing(repo, listing.names), layout, store, rows, folder, WORKERS, None)
    return paths[-1]


def _unpacked_as(listing: Listing) -> Repo:
    """The commit in whose folder the media go: this one, or an earlier one that had the same files."""
    repo, names = listing
    note = repo.home(repo.commit) / _OWN / "files.json"
    if note.is_file():
        return Repo(repo.id, read_json(note)["commit"])
    matters = sorted(name for name in names if not name.startswith(".") and not name.endswith(".md"))
    if len(matters) > _FEW:
        return repo
    key = json_sha256({name: info.blob for name, info in repo.infos(matters).items()})
    earlier = [read_json(path) for path in sorted(note.parent.parent.parent.glob(f"*/{_OWN}/{note.name}"))]
    commit = next((known["commit"] for known in earlier if known["key"] == key), repo.commit)
    write_json(note, {"key": key, "commit": commit})
    return Repo(repo.id, commit)


def _begun(out: Path, wanted: HubId) -> str | None:
    """The commit that `out` was begun with, None for a new folder. Raises InputError when it holds something else."""
    state = out / _OWN / "state.json"
    if not state.is_file():
        if out.exists() and (not out.is_dir() or any(path.name != _OWN for path in out.iterdir())):
            raise InputError("holds something else", where=str(out), fix="Choose a new or an empty folder.")
        return None
    known = read_json(state)
    if known["repo"] != wanted.repo:
        raise InputError(f"holds {known['repo']}", where=str(out), fix="Choose another folder.")
    return str(known["commit"])


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone in `folder`; what a killed process left half-downloaded is gone."""
    own = folder / _OWN
    with alone(own / "lock"):
        for place in (folder, own):
            for torn in (place / ".cache" / "huggingface").rglob("*.incomplete"):
                torn.unlink()
        yield


def _fetch_media(
    listing: Listing,
    layout: Layout,
    store: JsonlStore,
    rows: range,
    folder: Path,
    workers: int,
    progress: OnProgress | None,
) -> list[str]:
    """Put the media of `rows` below `folder`; returns the names of those that the dataset does not have."""
    within = PurePosixPath(layout.folder)
    names = {(within / path).as_posix() for path in media_paths(store, rows)}
    texts = {(within / path).as_posix() for path in media_paths(store, rows, ("texts",))}
    names |= texts & listing.names  # nothing reads them, so that one which is not there is no loss
    absent = _absent(folder, sorted(names))
    single = absent if layout.form == "jsonl" else [name for name in absent if name in listing.names]
    list(_in_threads(partial(_fetch_if_there, listing.repo, folder), single, workers, progress))
    absent = _absent(folder, absent)
    for tar in _likeliest_first(layout.tars, absent):
        if not absent:
            break
        _fetch_tar(listing.repo, tar, folder)
        absent = _absent(folder, absent)
    return absent


def _absent(folder: Path, names: Iterable[str]) -> list[str]:
    return [name for name in names if not (folder / name).is_file()]


def _fetch_if_there(repo: Repo, folder: Path, name: str) -> bool:
    try:
        repo.fetch(name, folder)
    except NotInRepoError:
        return False
    return True


def _likeliest_first(tars: Sequence[str], absent: Iterable[str]) -> list[str]:
    """The tars, those first that are named like a folder of what is absent."""
    folders = {part for name in absent for part in PurePosixPath(name).parts[:-1]}

    def is_unlikely(tar: str) -> bool:
        stem = PurePosixPath(tar).name.split(".")[0]
        return not any(stem.startswith(folder) or folder.startswith(stem) for folder in folders)

    return sorted(tars, key=lambda tar: (is_unlikely(tar), tar))


def _fetch_tar(repo: Repo, tar: str, folder: Path) -> None:
    """Download a tar, unpack it where it lies in the dataset, mark it as done and delete it."""
    own = folder / _OWN
    marker = own / "unpacked" / f"{tar}.json"
    if marker.is_file():
        (own / tar).unlink(missing_ok=True)  # killed between the two
        return
    archive = repo.fetch(tar, own)
    try:
        count = unpack(archive, folder / PurePosixPath(tar).parent)
    except InputError as error:
        if not isinstance(error, StorageError):
            archive.unlink()  # a damaged one is fetched again; a refused one has no business here
        raise
    write_json(marker, {"files": count})
    archive.unlink()


def _in_threads(
    work: Callable[[str], R], names: Sequence[str], workers: int, progress: OnProgress | None
) -> Iterator[R]:
    """Results in the order of `names`. The first error stops what has not begun."""
    pool = ThreadPoolExecutor(workers)
    try:
        for done, result in enumerate(pool.map(work, names), 1):
            if progress is not None:
                progress(done, len(names))
            yield result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
