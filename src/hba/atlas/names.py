"""What names mean: which rows and files a split is, and which dataset of the hub an atlas is.

`train`, `train[:1000]` (rows), `train[:10%]` (per cent), `test[-50:]`: as in Hugging Face datasets, with bounds beyond
the split clipped and per cent rounded to the nearest row. A split that is not there is an error that lists those that
are; another file is never taken in its place.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from hba.errors import InputError, nearest
from hba.storage import read_json
from hba.taxonomy import PUBLISHED, visible

_SPEC = re.compile(r"(?P<name>\w[\w.-]*)(\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?", re.ASCII)
CARD = "atlas.json"
NO_ROWS = (
    "Write one JSON object a line into test.jsonl (train.jsonl, validation.jsonl) of that folder, with the paths of "
    "its media (docs/data.md says the fields), or let `hba atlas build FOLDER OUT` make the rows of a folder of media."
)
_SHARD = re.compile(r"(?P<name>\w[\w.-]*?)(-\d+-of-\d+)?\.parquet", re.ASCII)
_PUBLISHED_NAMES: dict[str, str] = {file: split for split, file in PUBLISHED["splits_jsonl"].items()}


class Bound(NamedTuple):
    """One end of a slice, in rows or in per cent; negative counts from the end."""

    value: int
    per_cent: bool

    def row(self, total: int) -> int:
        """The row number, clipped to 0..total."""
        row = round(self.value * total / 100) if self.per_cent else self.value
        return min(max(row + total if self.value < 0 else row, 0), total)


class Split(NamedTuple):
    """A split name and the slice of it, if any."""

    name: str
    start: Bound | None = None
    stop: Bound | None = None

    def rows(self, total: int) -> range:
        """The row numbers that the slice selects of `total` rows."""
        return range(self.start.row(total) if self.start else 0, self.stop.row(total) if self.stop else total)


class SplitFiles(NamedTuple):
    """The files of one split: one JSONL, or parquet shards in order."""

    name: str
    files: tuple[Path, ...]


def parse_split(spec: str) -> Split:
    """Read 'name', 'name[a:b]' or 'name[a%:b%]'. Raises InputError for anything else, also for mixed units."""
    match = _SPEC.fullmatch(visible(spec))
    fix = "Write a split as train, train[:1000] for rows, or train[:10%] for per cent."
    if match is None:
        raise InputError(f"cannot read the split {spec!r}", fix=fix)
    bounds = [_bound(match[side]) for side in ("start", "stop")]
    units = {bound.per_cent for bound in bounds if bound is not None}
    if len(units) > 1:
        raise InputError(f"the split {spec!r} mixes rows and per cent", fix=fix)
    if any(bound is not None and bound.per_cent and abs(bound.value) > 100 for bound in bounds):
        raise InputError(f"the split {spec!r} asks for more than 100 %", fix=fix)
    return Split(match["name"], *bounds)


def _bound(text: str | None) -> Bound | None:
    return None if text is None else Bound(int(text.removesuffix("%")), text.endswith("%"))


def find_files(path: Path, name: str | None) -> SplitFiles:
    """The files of split `name` at `path`, a folder or one JSONL or parquet file.

    Raises InputError when there is none (listing the splits that are), when the name is ambiguous, or when a file
    belongs to another split than the one asked for.
    """
    if path.is_file():
        own = split_of(path)
        if own is None:
            fix = "Name a folder, a .jsonl or a .parquet."
            raise InputError("is neither .jsonl nor .parquet", where=str(path), fix=fix)
        if name not in (None, own) and own in PUBLISHED["splits_jsonl"]:
            raise InputError(f"holds split {own!r}, not {name!r}", where=str(path), fix="Name the folder instead.")
        return SplitFiles(name or own, (path,))
    if not path.is_dir():
        raise InputError("no such file or folder", where=str(path), fix="Check the path.")
    present = _present(path)
    if name is None:
        raise InputError("no split was named", where=str(path), fix=f"Choose one of: {', '.join(present) or 'none'}.")
    if name not in present:
        raise no_split(name, present, where=str(path))
    files = present[name]
    if len(files) > 1 and any(file.suffix != ".parquet" or "-of-" not in file.name for file in files):
        listed = ", ".join(file.name for file in files)
        raise InputError(f"split {name!r} is ambiguous: {listed}", where=str(path), fix="Name one of the files.")
    check_shards(files)
    return SplitFiles(name, files)


def no_split(name: str, present: Collection[str], *, where: str) -> InputError:
    """The error of a split that is not among those `present` at a place."""
    keys = "It is --split of a command, train_split and validation_split of a training, fit_split of a baseline."
    fix = f"{nearest(name, present)} {keys}" if present else NO_ROWS
    return InputError(f"has no split {name!r}", where=where, fix=fix)


def present_splits(path: Path) -> tuple[str, ...]:
    """The splits at `path`, a folder or one file: the published ones in their order, then others by name.

    Raises InputError when there is none.
    """
    found = [find_files(path, None).name] if not path.is_dir() else sorted(_present(path))
    names = [name for name in found if _SPEC.fullmatch(name)]  # others ('train (copy)') are no split
    if not names:
        raise InputError("holds no split", where=str(path), fix=NO_ROWS)
    published = list(PUBLISHED["splits_jsonl"])
    return tuple(sorted(names, key=lambda name: (published.index(name) if name in published else len(published), name)))


def read_card(folder: Path) -> dict[str, Any]:
    """What `atlas.json` beside the rows says; empty where there is none. Raises InputError when it is no card."""
    path = folder / CARD
    card = read_json(path) if path.is_file() else {}
    if not isinstance(card, dict) or not isinstance(card.get("synthetic", False), bool):
        raise InputError("'synthetic': expected true or false", where=str(path), fix="Repair the file.")
    return card


def split_of(file: Path) -> str | None:
    """The split whose rows a file holds, by its name; None for files of other kinds."""
    if file.suffix == ".jsonl":
        return _PUBLISHED_NAMES.get(file.name, file.stem)
    match = _SHARD.fullmatch(file.name)
    return match["name"] if match else None


def _present(folder: Path) -> dict[str, tuple[Path, ...]]:
    found: dict[str, tuple[Path, ...]] = {}
    for place in (folder, folder / "data"):
        for file in sorted(place.iterdir()) if place.is_dir() else ():
            name = split_of(file) if file.is_file() and not file.name.startswith(".") else None
            if name is not None:
                found[name] = (*found.get(name, ()), file)
    return found


def check_shards(files: tuple[Path, ...]) -> None:
    """Raise InputError unless shards that are numbered are all there, in order."""
    for number, file in enumerate(files):
        match = re.search(r"-(\d+)-of-(\d+)\.parquet$", file.name)
        if match and (int(match[1]) != number or int(match[2]) != len(files)):
            what = f"shard {number} of {int(match[2])} is missing, or shards of several versions are mixed"
            raise InputError(what, where=str(file.parent), fix="Restore the missing shards.")


# Names of datasets on the Hugging Face hub: `org/name`, `org/name@revision`, `hf://datasets/org/name@revision`.
#
# What exists on this machine is never taken for a name on the hub, and neither is a path below a folder that exists, so
# that a mistyped path is reported as one; the form with `hf://` is always a name. Nothing here asks the network.


_SCHEME = re.compile(r"hf:/{1,2}datasets/")  # a Path keeps one slash of the two
_NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
_FILES = (".jsonl", ".json", ".parquet", ".yaml", ".git")


class HubId(NamedTuple):
    """A dataset on the hub; without a revision, the newest commit of its main branch."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def hub_id_of(path: str | Path) -> HubId | None:
    """The dataset that `path` names, None when it is, or is meant to be, a path on this machine."""
    text = os.fspath(path)
    if not _SCHEME.match(text) and (Path(text).exists() or Path(text).parent.is_dir()):
        return None
    return _parsed(text)


def parse_hub_id(text: str) -> HubId:
    """The dataset that `text` names, whatever lies on this machine. Raises InputError when it is no such name."""
    found = _parsed(text)
    if found is None:
        raise InputError(f"{text!r} is not a dataset on the hub", fix="Write org/name or org/name@revision.")
    return found


def _parsed(text: str) -> HubId | None:
    match = _NAME.fullmatch(_SCHEME.sub("", text, count=1))
    if match is None or match["repo"].endswith(_FILES) or "--" in match["repo"] or ".." in match["repo"]:
        return None
    return HubId(match["repo"], match["revision"])
