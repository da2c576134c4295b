"""A dataset on the Hugging Face hub at one commit: what files it has, and getting them, shards in parts.

The revision is resolved to a commit once; everything after is asked for at that commit, so that files of two revisions
never mix. What may pass by itself (a dropped connection, an overloaded server) is tried again: briefly when a dataset
is opened, for `storage.pauses` once it is known; a hub that is away then is a MachineError, no fault of a sample. All
else is an InputError. Both have a fix and never repeat what the server or the library said, since that may hold a
token. Downloads do not count as time at a sample. Offline (HF_HUB_OFFLINE=1) the commit and the list of files are those
of the last time; without that, no old answer is used.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar, cast
from urllib.parse import quote

import httpx
from huggingface_hub import (
    HfApi,
    cached_assets_path,
    constants,
    get_session,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile, RepoFolder
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, but not in its __all__
    build_hf_headers,
    hf_raise_for_status,
)

from hba.atlas import parquet
from hba.atlas.names import HubId
from hba.atlas.rows import MEDIA_FIELDS
from hba.atlas.source import SizedFile
from hba.errors import HbaError, InputError, MachineError
from hba.remote.request import proxies_checked, shown
from hba.storage import AWAY, CLOCK, StorageError, alone, machine_fault, pauses, read_json, write_json

T = TypeVar("T")

_PAUSES = (1.0, 2.0, 4.0)
_LONGEST_PAUSE = 300.0
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
# The hub may leave files out of the list in a dataset's description when there are more than this.
_SURELY_LISTED = 40_000
_FOLDERS = ("", "data", "index", "data/index")
_PATHS_A_QUESTION = 500
_FIX_AGAIN = "Run the same again: what is complete is kept."


class NotInRepoError(InputError):
    """The dataset has no such file at this commit."""


class FileInfo(NamedTuple):
    """Size of a file in bytes, and what identifies its contents."""

    size: int
    blob: str


@dataclass(frozen=True)
class Repo:
    """A dataset at one commit. Picklable; opens a connection only when it is asked for something."""

    id: str
    commit: str

    def __str__(self) -> str:
        return f"{self.id}@{self.commit[:12]}"

    def fetch(self, name: str, folder: Path | None = None) -> Path:
        """The file `name` on this machine: below `folder`, or in the cache that all programs share.

        A file that is there already costs no request. Raises NotInRepoError, InputError, StorageError (full disk),
        MachineError (the hub is away).
        """

        def download() -> str:
            return hf_hub_download(self.id, name, repo_type="dataset", revision=self.commit, local_dir=folder)

        return Path(_ask(download, f"{self}/{name}", self.id, known=True))

    def cached(self, names: Iterable[str]) -> list[Path] | None:
        """The files in the cache that all programs share, None unless all are there."""
        found = [try_to_load_from_cache(self.id, n, revision=self.commit, repo_type="dataset") for n in names]
        paths = [Path(path) for path in found if isinstance(path, str)]
        return paths if len(paths) == len(found) else None

    def fetch_part(self, name: str, path: Path, start: int, stop: int) -> None:
        """Write the bytes `start` to `stop` of the file `name` to the same place of `path`, and have them on the disk.

        Raises NotInRepoError, InputError, StorageError (full disk), MachineError (the hub is away).
        """
        url = hf_hub_url(self.id, name, repo_type="dataset", revision=self.commit)

        def download() -> None:
            headers = build_hf_headers() | {"Range": f"bytes={start}-{stop - 1}"}
            timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
            answer = get_session().get(url, headers=headers, timeout=timeout, follow_redirects=True)
            hf_raise_for_status(answer)
            said = answer.headers.get("Content-Range", "")
            if answer.status_code != 206 or not said.startswith(f"bytes {start}-{stop - 1}/"):
                raise InputError("the hub gave another part than asked for", where=f"{self}/{name}", fix=_FIX_AGAIN)
            if len(answer.content) != stop - start:
                raise OSError("cut off")  # without a number: tried again
            with path.open("r+b", buffering=0) as file:
                file.seek(start)
                rest = memoryview(answer.content)
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())

        _ask(download, f"{self}/{name}", self.id, known=True)

    def infos(self, names: Iterable[str]) -> dict[str, FileInfo]:
        """Size and identity of those of the files that the dataset has. Raises InputError."""
        wanted, found = list(names), dict[str, FileInfo]()
        for start in range(0, len(wanted), _PATHS_A_QUESTION):
            part = wanted[start : start + _PATHS_A_QUESTION]
            ask = partial(HfApi().get_paths_info, self.id, part, revision=self.commit, repo_type="dataset")
            for entry in _ask(ask, str(self), self.id, known=True):
                if isinstance(entry, RepoFile):
                    lfs = entry.lfs.sha256 if entry.lfs is not None else None
                    found[entry.path] = FileInfo(entry.size, lfs or entry.blob_id)
        return found

    def home(self, part: str) -> Path:
        """A folder of the assets cache for what is made from this dataset."""
        return _home(self.id, part)


class Listing(NamedTuple):
    """A dataset at one commit and the files that it has."""

    repo: Repo
    names: frozenset[str]


def list_repo(wanted: HubId) -> Listing:
    """Resolve the revision and list the files; of a very large dataset, those in the folders that hold rows.

    Raises InputError when the dataset or revision does not exist, needs permission, or the hub cannot be reached.
    """
    revision = wanted.revision or constants.DEFAULT_REVISION
    home = _home(wanted.repo, "listings")
    saved = home / f"{quote(revision, safe='')}.json"
    pinned = len(revision) == 40 and all(c in "0123456789abcdef" for c in revision)
    if saved.is_file() and (pinned or constants.HF_HUB_OFFLINE):
        known = read_json(saved)
        return Listing(Repo(wanted.repo, known["commit"]), frozenset(known["names"]))
    api = HfApi()
    info = _ask(lambda: api.dataset_info(wanted.repo, revision=revision), str(wanted), wanted.repo)
    repo = Repo(wanted.repo, str(info.sha))
    names = {file.rfilename for file in info.siblings or ()}
    if len(names) > _SURELY_LISTED:
        names |= set(_names_in_folders(repo))
    with alone(home / "lock"):
        for path in {saved, home / f"{repo.commit}.json"}:
            write_json(path, {"commit": repo.commit, "names": sorted(names)})
    return Listing(repo, frozenset(names))


def _names_in_folders(repo: Repo) -> list[str]:
    found: list[str] = []
    seen = {""}
    for folder in _FOLDERS:
        if folder in seen:
            entries = _ask(partial(_entries, repo, folder), str(repo), repo.id)
            found += [entry.path for entry in entries if isinstance(entry, RepoFile)]
            seen |= {entry.path for entry in entries if not isinstance(entry, RepoFile)}
    return found


def _entries(repo: Repo, folder: str) -> list[RepoFile | RepoFolder]:
    return list(HfApi().list_repo_tree(repo.id, folder or None, revision=repo.commit, repo_type="dataset"))


def _home(repo_id: str, part: str) -> Path:
    return Path(cached_assets_path("hba", repo_id, part, assets_dir=constants.HF_ASSETS_CACHE))


def _ask(call: Callable[[], T], where: str, repo: str, *, known: bool = False) -> T:
    """What `call` gives, tried again after what may pass by itself.

    Raises InputError; of a dataset that is `known`, MachineError where the hub is away.
    """
    with CLOCK.waiting(float("inf")):  # the client has limits of its own
        for pause in chain(pauses() if known else _PAUSES, (None,)):
            try:
                with proxies_checked():
                    return call()
            except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
                cause = _cause(error)
                if pause is None or not _may_pass(cause, known=known):
                    raise _explained(cause, where, repo, known=known) from None
                wait = max(pause, _asked_to_wait(cause))
            time.sleep(wait)
    raise AssertionError("unreachable")


def _cause(error: BaseException) -> BaseException:
    """What went wrong below the library's 'not found in the cache either'."""
    kinds = (HfHubHTTPError, httpx.HTTPError, OfflineModeIsEnabled)
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, kinds):
        cause = cause.__cause__
    return cause or error


def _status(error: BaseException) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _may_pass(error: BaseException, *, known: bool) -> bool:
    if isinstance(error, HfHubHTTPError):
        return _status(error) in _TRANSIENT
    if isinstance(error, httpx.TransportError):
        return known or not isinstance(error, httpx.ConnectError)
    if not isinstance(error, OSError) or isinstance(error, OfflineModeIsEnabled):
        return False
    # A size that is not the announced one is an OSError without a number.
    return error.errno is None or (known and error.errno in AWAY)


def _asked_to_wait(error: BaseException) -> float:
    told = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return min(float(told), _LONGEST_PAUSE) if told.isdigit() else 0.0


def _explained(error: BaseException, where: str, repo: str, *, known: bool) -> HbaError:
    failed = MachineError if known and _may_pass(error, known=known) else InputError
    page, status = f"{shown(constants.ENDPOINT)}/datasets/{repo}", _status(error)
    if isinstance(error, RemoteEntryNotFoundError):
        return NotInRepoError("no such file in the dataset", where=where, fix=f"See {page}/tree/main for what it has.")
    if isinstance(error, RevisionNotFoundError):
        return InputError("no such revision", where=where, fix=f"Choose a branch, tag or commit of {page}/commits.")
    if isinstance(error, GatedRepoError) or status == 403:
        fix = f"Accept the terms at {page}, then run `hf auth login` with a token of that account."
        return InputError("the dataset asks for its terms to be accepted", where=where, fix=fix)
    if status in (401, 404):
        what = f"is no path on this machine and no dataset that you may see on the hub (status {status})"
        fix = "Check the path or the name; if the dataset is private, run `hf auth login`."
        return InputError(what, where=where, fix=fix)
    if status is not None:
        return failed(f"the hub answered with status {status}", where=where, fix=f"Wait a little. {_FIX_AGAIN}")
    if isinstance(error, OfflineModeIsEnabled):
        fix = "Unset HF_HUB_OFFLINE, or check the path."
        return InputError("is not on this machine, and HF_HUB_OFFLINE forbids the hub", where=where, fix=fix)
    if isinstance(error, httpx.HTTPError):
        fix = f"Check the path and the network. {_FIX_AGAIN} With HF_HUB_OFFLINE=1 what was downloaded before is used."
        what = f"is not on this machine, and the hub at {shown(constants.ENDPOINT)} cannot be reached"
        return failed(what, where=where, fix=fix)
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        fix = f"Free some space, or set HF_HOME to a larger disk. {_FIX_AGAIN}"
        return StorageError("no space left on the disk", where=where, fix=fix)
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StorageError("the download folder cannot be written", where=where, fix="Set HF_HOME to another folder.")
    broken = failed(f"the download broke off ({type(error).__name__})", where=where, fix=_FIX_AGAIN)
    return machine_fault(error, where) or broken


# Parquet shards on the hub, of which only what is asked for is fetched: the columns of rows, then media one by one.
#
# A shard has a file of its full size in the cache that is filled block by block; a second file says which blocks are
# there. Blocks are written and synced before they are marked, so that a killed process leaves nothing that looks whole,
# and two processes that fetch the same block write the same bytes. Whoever reads must `fetch` first: `open` does.


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
        with _marks(self.path).open("r+b", buffering=0) as marks:
            first, last = start // BLOCK_BYTES, -(-min(stop, self.size) // BLOCK_BYTES)
            there = os.pread(marks.fileno(), last - first, first)
            for begin, end in _gaps(there, first):
                self.repo.fetch_part(self.name, self.path, begin * BLOCK_BYTES, min(end * BLOCK_BYTES, self.size))
                os.pwrite(marks.fileno(), b"\1" * (end - begin), begin)

    def open(self) -> BinaryIO:
        """A file that fetches what is read from it."""
        return cast(BinaryIO, _RemoteFile(self))


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


class _RemoteFile(SizedFile):
    def __init__(self, shard: RemoteShard) -> None:
        super().__init__(shard.size, shard.path.open("rb", buffering=0))
        self._shard = shard

    def get(self, wanted: int) -> bytes:
        self._shard.fetch(self._at, self._at + wanted)
        return os.pread(self._file.fileno(), wanted, self._at)


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
    shard.fetch(max(0, shard.size - parquet.TAIL_BYTES), shard.size)
    if not parquet.index_path(shard.path).is_file():
        with parquet.open_shard(shard.path, shard) as file:
            for name in file.schema_arrow.names:
                if name not in MEDIA_FIELDS:
                    file.read(columns=[name], use_threads=False)
