"""Download an atlas from the hub into a folder that opens like any other: rows, media as files, tars unpacked.

Everything can be killed at any time and started again. A file is under its name only when it is whole; a tar has left
its marker only when all its members are there, and is deleted then. The folder remembers the commit that it was begun
with and goes on with that one. One process works on a folder at a time; another that wants it waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeVar

from hba.atlas.hub import Layout, layout_of, media_paths, splits_of
from hba.atlas.hub_client import Listing, NotInRepoError, Repo, list_repo
from hba.atlas.hub_id import HubId, parse_hub_id
from hba.atlas.jsonl import JsonlStore
from hba.atlas.parquet import ParquetStore
from hba.atlas.split import Split
from hba.atlas.untar import unpack
from hba.errors import InputError
from hba.storage import StorageError, alone, json_sha256, read_json, write_json
from hba.taxonomy import Taxonomy, of_folder

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
            paths = _fetch_all(listing.repo, (*layout.beside, *layout.rows), out, workers, progress)
            files = tuple(paths[len(layout.beside) :])
            taxonomy = of_folder(files[0].parent)
            if layout.form == "parquet":
                rows += len(ParquetStore(files, split=layout.split, taxonomy=taxonomy))
                continue
            store = JsonlStore(files[0], split=layout.split, taxonomy=taxonomy)
            rows += len(store)
            missing += _fetch_media(listing, layout, store, range(len(store)), out, workers, progress)
    return Downloaded(out, wanted.repo, commit, tuple(layout.split for layout in layouts), rows, tuple(missing))


def cached_copy(wanted: HubId, splits: Sequence[str] | None, progress: OnProgress | None) -> Path:
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


def _fetch_all(repo: Repo, names: Sequence[str], folder: Path, workers: int, progress: OnProgress | None) -> list[Path]:
    def fetch(name: str) -> Path:
        return repo.fetch(name, folder)

    return list(_in_threads(fetch, names, workers, progress))


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
