"""Names of datasets on the Hugging Face hub: `org/name`, `org/name@revision`, `hf://datasets/org/name@revision`.

What exists on this machine is never taken for a name on the hub, and neither is a path below a folder that exists, so
that a mistyped path is reported as one; the form with `hf://` is always a name. Only `local_copy` asks the network.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from hba.errors import InputError

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


def local_copy(
    path: str | Path, splits: Sequence[str] | None = None, progress: Callable[[int, int], None] | None = None
) -> Path:
    """`path`; when it names a dataset on the hub, a folder of the cache with its rows and media, downloaded first.

    For what looks at every medium of whole splits. Raises what `download.download_atlas` raises.
    """
    wanted = hub_id_of(path)
    if wanted is None:
        return Path(path)
    from hba.atlas.download import cached_copy  # the hub's client takes as long to load as a small atlas to open

    return cached_copy(wanted, splits, progress)


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
