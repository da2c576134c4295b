"""The atlas behind the pages: opened split by split in the background, its rows laid into the search index.

The index is keyed by the files of the rows (name, size, modification time): an atlas that has changed is indexed anew,
an unchanged one opens at once. Explorers of one atlas share the index; one of them fills it, and when it ends, another
goes on. Pages can be read while it grows and say how far it is. Durations come last, from the
headers that `hba atlas info --durations` reads and remembers, too. A dataset on the hub is looked at as its branch was
at the start; its media are fetched when a page shows them, so that their durations stay unknown.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from hba.atlas import Atlas, Sample, open_atlas
from hba.atlas.hub_id import hub_id_of
from hba.atlas.info import row_seconds, splits_at
from hba.atlas.split import find_files, no_split, present_splits
from hba.errors import HbaError, InputError
from hba.explorer.database import ROWS_VERSION, Database
from hba.explorer.query import SAMPLE_COLUMNS
from hba.taxonomy import Taxonomy

CHUNK = 5000
NO_TASK = "no task"


@dataclass(frozen=True)
class State:
    """How far the index is; `error` says why it went no further."""

    done: int
    total: int
    ready: bool
    error: str | None = None


def located(atlas: str | Path) -> str | Path:
    """The folder, or the dataset on the hub at the commit that it has now. Raises InputError when it has none."""
    hub_id = hub_id_of(atlas)
    if hub_id is None:
        return Path(atlas)
    from hba.atlas.hub_client import list_repo  # takes as long to load as a small atlas to open

    repo = list_repo(hub_id).repo
    return f"hf://datasets/{repo.id}@{repo.commit}"


def index_name(root: str | Path) -> str:
    """File name of the index of the atlas at `root`, as `located` says it: another one whenever its rows have changed.

    Those of a dataset on the hub change with its commit, those of a folder with a file.
    """
    stamps: list[Any] = [ROWS_VERSION, str(root.resolve() if isinstance(root, Path) else root)]
    if isinstance(root, Path):
        for split in present_splits(root):
            for file in find_files(root, split).files:
                status = file.stat()
                stamps.append([file.name, status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:24] + ".sqlite"


class AtlasIndex:
    """The rows of one atlas. `start` begins opening and indexing in a thread; everything else may be called at once."""

    def __init__(self, root: str | Path, database: Database, headers: Path) -> None:
        """`root` as `located` says it; `headers` is the folder that remembers the headers of media."""
        self.root, self._database, self._headers = root, database, headers
        self.splits = splits_at(root)
        self._atlases: dict[str, Atlas] = {}
        self._opening = threading.Lock()
        self._thread = threading.Thread(target=self._build, name="index", daemon=True)
        self._error: str | None = None
        self._known: tuple[int, dict[str, list[str]]] | None = None
        """how many rows the values of the filters were taken from, and these"""

    def start(self) -> None:
        """Open and index what has not been."""
        self._thread.start()

    def wait(self, seconds: float | None = None) -> None:
        """Wait until the thread of `start` has ended."""
        self._thread.join(seconds)

    @property
    def state(self) -> State:
        """How far the index is."""
        facts = self._facts()
        ready = facts.get("ready") == "1"
        done = int(facts.get("rows", 0))
        return State(done, int(facts.get("total", done)), ready, self._error)

    def atlas(self, split: str) -> Atlas:
        """The opened split. Raises InputError for a split that is not there, or whose rows are bad."""
        if split not in self.splits:
            raise no_split(split, self.splits, where=str(self.root))
        with self._opening:
            if split not in self._atlases:
                self._atlases[split] = open_atlas(self.root, split)
            return self._atlases[split]

    def sample(self, split: str, number: int) -> Sample:
        """Row `number` of a split. Raises InputError when it is not there."""
        atlas = self.atlas(split)
        if not 0 <= number < len(atlas):
            raise InputError(f"no row {number}", where=f"split {split}", fix=f"Choose one below {len(atlas):,}.")
        return atlas[number]

    @property
    def quarantine(self) -> list[Any]:
        """The samples whose media could not be read since the server started."""
        return [record for atlas in self._atlases.values() for record in atlas.quarantine]

    def known_values(self) -> dict[str, list[str]]:
        """What the filters offer: the values of split, dataset, task, label and signature that occur, in order."""
        done = self.state.done
        if self._known is None or self._known[0] != done:
            self._known = (done, {name: list(_distinct(self._database, name)) for name in SAMPLE_COLUMNS})
        return self._known[1]

    def _facts(self) -> dict[str, str]:
        return {row["key"]: row["value"] for row in self._database.all("SELECT key, value FROM rows.fact")}

    def _note(self, **facts: object) -> None:
        values = [(key, str(value)) for key, value in facts.items()]
        self._database.write("INSERT OR REPLACE INTO rows.fact VALUES (?, ?)", values)

    def _build(self) -> None:
        try:
            with self._database.indexing():
                if not self.state.ready:
                    self._index_rows()
                if isinstance(self.root, Path) and self._facts().get("durations") != "1":
                    self._index_durations(self.root)
        except HbaError as error:
            self._error = str(error)

    def _index_rows(self) -> None:
        atlases = {split: self.atlas(split) for split in self.splits}
        self._locked(partial(self._note, total=sum(map(len, atlases.values()))))
        rows = (_record(split, sample, atlas.taxonomy) for split, atlas in atlases.items() for sample in atlas)
        done = self._database.number("SELECT count(*) FROM rows.sample")  # of an index that was interrupted
        for _ in islice(rows, done):
            pass
        while chunk := [(done + i, *row) for i, row in enumerate(islice(rows, CHUNK))]:
            done += len(chunk)
            self._locked(partial(self._insert, chunk, done))
        self._locked(partial(self._note, ready=1))

    def _insert(self, chunk: list[tuple[Any, ...]], done: int) -> None:
        holes = ", ".join("?" * len(chunk[0]))
        self._database.write(f"INSERT INTO rows.sample VALUES ({holes}, NULL)", chunk)  # noqa: S608  no text of anyone's
        words = ((row[0], f"{row[3]}\n{row[8]}\n{row[9]}") for row in chunk)
        self._database.write("INSERT INTO rows.sample_text(rowid, words) VALUES (?, ?)", words)
        self._note(rows=done)

    def _index_durations(self, root: Path) -> None:
        update = "UPDATE rows.sample SET seconds = ? WHERE split = ? AND number = ?"
        for split in self.splits:
            found = row_seconds(root, split, cache=self._headers)
            values = [(seconds, split, number) for number, seconds in enumerate(found)]
            self._locked(partial(self._database.write, update, values))
        self._locked(partial(self._note, durations=1))

    def _locked(self, work: Callable[[], None]) -> None:
        with self._database.writing, self._database.connection:
            work()


def _record(split: str, sample: Sample, taxonomy: Taxonomy) -> tuple[Any, ...]:
    task = taxonomy.dataset(sample.dataset).task or NO_TASK
    media = (sample.images, sample.videos, sample.audios, sample.ext_video_feats, sample.ext_audio_feats)
    words = (sample.label, sample.modality_signature, sample.problem, sample.target)
    return (split, sample.number, sample.id, sample.dataset, task, *words, *media)


def _distinct(database: Database, column: str) -> Iterator[str]:
    query = f"SELECT DISTINCT {column} AS value FROM rows.sample WHERE {column} IS NOT NULL ORDER BY 1"  # noqa: S608
    return (row["value"] for row in database.all(query))
