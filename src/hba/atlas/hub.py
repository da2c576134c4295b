"""An atlas on the Hugging Face hub, as one store: which of its files a split needs, and reading them.

Three forms of a release are known: parquet shards, JSONL with media folders, JSONL with tars of the media. The files of
other splits are never asked for. Media in folders and in shards are fetched when a sample is read, one by one; tars
when the atlas is opened. Samples, ids and order are those of the same files in a local folder. The commit stands in
`Atlas.root` (`.../snapshots/<commit>` or `.../<commit>`) and so in the provenance of every run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from hba.atlas.embedded import index_path
from hba.atlas.hub_client import Listing, NotInRepoError, Repo, list_repo
from hba.atlas.hub_id import HubId
from hba.atlas.hub_shards import remote_shards
from hba.atlas.jsonl import JsonlStore, size_of
from hba.atlas.parquet import ParquetStore
from hba.atlas.sample import MEDIA_FIELDS, Field, Row, Said, Sample
from hba.atlas.slices import Source
from hba.atlas.split import Bound, Split, check_shards, no_split, split_of
from hba.errors import InputError, MediaError
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


def open_hub(name: HubId, wanted: Split | None, taxonomy: Taxonomy | None) -> HubStore | JsonlStore | ParquetStore:
    """Open a split of a dataset on the hub; its rows, and its tars, are downloaded first, if they are not there.

    Raises InputError when the dataset, revision or split is not there or needs permission, when the hub cannot be
    reached, and for a bad row; StorageError when the disk is full.
    """
    listing = list_repo(name)
    layout = layout_of(listing, wanted.name if wanted else None)
    if layout.form == "tar":
        from hba.atlas.download import unpacked_split

        path = unpacked_split(listing, layout, wanted, taxonomy)
        return JsonlStore(path, split=layout.split, taxonomy=taxonomy or of_folder(path.parent))
    if layout.form == "parquet":
        return _open_shards(listing.repo, layout, taxonomy)
    path = [listing.repo.fetch(file) for file in (*layout.beside, *layout.rows)][-1]
    rows = JsonlStore(path, split=layout.split, taxonomy=taxonomy or of_folder(path.parent))
    return HubStore(listing.repo, layout, rows)


def open_rows(name: HubId, wanted: Split, taxonomy: Taxonomy | None) -> HubStore | JsonlStore | ParquetStore:
    """As `open_hub`, for who reads no medium: tars are not downloaded."""
    return open_hub(name, Split(wanted.name, Bound(0, False), Bound(0, False)), taxonomy)


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


class HubStore:
    """The rows of a JSONL file whose media are fetched when they are read. Picklable; holds no open connection."""

    def __init__(self, repo: Repo, layout: Layout, rows: JsonlStore) -> None:
        self.repo, self._folder, self._rows = repo, layout.folder, rows
        self.root, self.split, self.taxonomy, self.columns = rows.root, rows.split, rows.taxonomy, rows.columns

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, number: int) -> Row:
        """Row `number`, 0-based."""
        return self._rows.row(number)

    def ids(self, numbers: npt.NDArray[np.int64]) -> list[str]:
        """The ids of the given rows."""
        return self._rows.ids(numbers)

    def said(self, numbers: npt.NDArray[np.int64]) -> Iterator[Said]:
        """What each of the given rows says; fetches no medium."""
        return self._rows.said(numbers)

    def sample(self, number: int) -> Sample:
        """Row `number` as a sample; fetches no medium."""
        return replace(self._rows.sample(number), source=self)

    def _name(self, path: str) -> str:
        """The name in the dataset of a medium that a row names."""
        return (PurePosixPath(self._folder) / path).as_posix()

    def medium(self, number: int, name: Field, index: int, *, where: str) -> Source:
        """The file of a medium, fetched if it is not there. Raises MediaError when the dataset has no such file.

        Raises MachineError when the hub cannot be reached: that is no fault of the sample.
        """
        paths: tuple[str, ...] = getattr(self.row(number), name)
        try:
            return self.repo.fetch(self._name(paths[index]))
        except NotInRepoError:
            what = f"the dataset {self.repo} has no file {paths[index]}"
            raise MediaError(what, where=where, fix="Tell its authors, or remove the row.") from None

    def audio_bytes(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Stored bytes of the sounds of each row; asks the hub for the sizes of those that are not here yet."""
        sounds = {int(i): self.row(int(i)).audios for i in numbers if self.columns.num_audios[i]}
        sizes = {path: size_of(self.root / path) for paths in sounds.values() for path in paths}
        unknown = {self._name(path): path for path, size in sizes.items() if size is None}
        for name, info in self.repo.infos(unknown).items():
            sizes[unknown[name]] = info.size
        return np.array([sum(sizes[path] or 0 for path in sounds.get(int(i), ())) for i in numbers], np.int64)

    def contents(self, numbers: npt.NDArray[np.integer[Any]]) -> Iterator[bytes]:
        """What the fingerprint of the given rows is made of."""
        return self._rows.contents(numbers)
