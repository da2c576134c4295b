"""Open the atlas: one `Atlas` of `Sample`s, whatever form the data lies in.

`open_atlas` reads and checks every row before it returns, so that a bad row stops a run at its start and not in its
third hour; media are opened only when a sample is asked for them. An atlas is immutable, picklable for worker processes
and holds no decoded media. `filter` makes a view that shares everything with its origin.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
import numpy.typing as npt

from hba.atlas.jsonl import JsonlStore
from hba.atlas.names import Split, find_files, hub_id_of, parse_split, read_card
from hba.atlas.rows import SIGNATURES, UNLABELLED, Columns, MediaSource, Quarantined, Row, Said, Sample
from hba.errors import InputError, nearest
from hba.storage import plural
from hba.taxonomy import Taxonomy, of_folder, visible

__all__ = ["Atlas", "Columns", "Quarantined", "Row", "Sample", "data_record", "open_atlas"]

Rows = npt.NDArray[np.int64]
_log = logging.getLogger(__name__)

# Rough sizes of a model's input, used to put samples of similar length into one batch; only their order matters.
_CHARS_PER_TOKEN = 3
_TOKENS_PER_IMAGE, _TOKENS_PER_VIDEO = 256, 1024
_AUDIO_BYTES_PER_TOKEN = 1280  # 25 tokens for a second of 16 kHz, 16-bit sound


class Store(MediaSource, Protocol):
    """What an atlas asks of the form in which the data lies."""

    root: Path
    split: str
    taxonomy: Taxonomy
    columns: Columns

    def __len__(self) -> int: ...

    def sample(self, number: int, refused: dict[str, Quarantined]) -> Sample:
        """Row `number`, 0-based, as a sample that records in `refused` when a medium cannot be read."""
        ...

    def row(self, number: int) -> Row:
        """Row `number` as published; where media are embedded, a placeholder stands for each path."""
        ...

    def ids(self, numbers: Rows) -> list[str]:
        """The ids of the given rows."""
        ...

    def said(self, numbers: Rows) -> Iterator[Said]:
        """What each of the given rows says; reads no medium."""
        ...

    def audio_bytes(self, numbers: Rows) -> Rows:
        """Stored bytes of the sounds of each of the given rows."""
        ...

    def contents(self, numbers: Rows) -> Iterator[bytes]:
        """What the fingerprint of the given rows is made of."""
        ...


class Atlas:
    """An immutable sequence of samples: the rows `rows` of a store. Make one with `open_atlas`."""

    def __init__(self, store: Store, rows: Rows, refused: dict[str, Quarantined] | None = None) -> None:
        """`refused` is the quarantine of the atlas that this one is a view of."""
        self._store = store
        self._rows = rows
        self._refused = {} if refused is None else refused

    @property
    def quarantine(self) -> list[Quarantined]:
        """The samples that could not be read so far, by this atlas, a view of it or a loader over it, each once."""
        return list(self._refused.values())

    def refuse(self, sample: Quarantined) -> None:
        """Record a sample that could not be read in another process."""
        self._refused[sample.id] = sample

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Atlas: ...
    def __getitem__(self, index: int | slice) -> Sample | Atlas:
        """Sample `index` (negative counts from the end), or a view of a slice. Raises IndexError."""
        if isinstance(index, slice):
            return self._view(self._rows[index])
        return self._sample(int(self._rows[index]))

    @cached_property
    def ids(self) -> list[str]:
        """The id of every row, in order. Builds no sample and reads no medium."""
        return self._store.ids(self._rows)

    def said(self) -> Iterator[Said]:
        """What every row says, in order: id, published fields, extra fields. Builds no sample and reads no medium."""
        return self._store.said(self._rows)

    def __iter__(self) -> Iterator[Sample]:
        return (self._sample(int(number)) for number in self._rows)

    def _sample(self, number: int) -> Sample:
        return self._store.sample(number, self._refused)

    def _view(self, rows: Rows) -> Atlas:
        return Atlas(self._store, rows, self._refused)

    def row(self, index: int) -> Row:
        """Row `index` with the published fields as they are stored."""
        return self._store.row(int(self._rows[index]))

    def select(self, rows: Rows) -> Atlas:
        """A view of the given row numbers of this atlas, in their order, such as `sampler.subsample` gives."""
        return self._view(self._rows[rows])

    def __repr__(self) -> str:
        return f"Atlas({str(self.root)!r}, split={self.split!r}, {plural(len(self), 'row')})"

    @property
    def numbers(self) -> Rows:
        """The number of every row in the whole split [N], 0-based."""
        return self._rows.copy()

    @property
    def split(self) -> str:
        """Name of the split, without its slice."""
        return self._store.split

    @property
    def root(self) -> Path:
        """The folder of the rows, links resolved."""
        return self._store.root

    @property
    def taxonomy(self) -> Taxonomy:
        """The tasks, datasets and labels that the rows were checked against."""
        return self._store.taxonomy

    @cached_property
    def columns(self) -> Columns:
        """Codes, lengths and media counts of every row, without touching the rows."""
        return self._store.columns.select(self._rows)

    @cached_property
    def estimated_tokens(self) -> npt.NDArray[np.int64]:
        """Rough input length of every row [N], for batches of similar length. Looks at the size of every sound."""
        columns = self.columns
        media = columns.num_images * _TOKENS_PER_IMAGE + columns.num_videos * _TOKENS_PER_VIDEO
        if columns.num_audios.any():
            media = media + self.audio_bytes // _AUDIO_BYTES_PER_TOKEN
        return (columns.problem_chars // _CHARS_PER_TOKEN + media).astype(np.int64)

    @cached_property
    def audio_bytes(self) -> npt.NDArray[np.int64]:
        """Stored bytes of every row's sounds [N], a stand-in for their length. Looks at each file once, opens none."""
        return self._store.audio_bytes(self._rows)

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the rows in their order (of what the rows say, not of the media that they name)."""
        digest = hashlib.sha256()
        for content in self._store.contents(self._rows):
            digest.update(hashlib.sha256(content).digest())
        return digest.hexdigest()

    @cached_property
    def card(self) -> dict[str, Any]:
        """What `atlas.json` beside the rows says; empty where there is none. Raises InputError when it is no card."""
        return read_card(self.root)

    @property
    def synthetic(self) -> bool:
        """Whether the data was generated, as the mini-atlas is, and says nothing about people."""
        return bool(self.card.get("synthetic", False))

    @cached_property
    def answered(self) -> npt.NDArray[np.bool_]:
        """Whether each row says what is right [N]."""
        answered_N: npt.NDArray[np.bool_] = self.columns.label_codes != UNLABELLED
        return answered_N

    def with_answers(self) -> Atlas:
        """A view of the rows that have an answer, which alone can be trained on; what is left out is said once.

        Raises InputError when there is none."""
        if not self.answered.any():
            fix = "Write 'answer' in the rows; `hba predict` takes them as they are."
            what = f"none of the {len(self):,} rows of split {self.split!r} has an answer"
            raise InputError(what, where=str(self.root), fix=fix)
        left_out = len(self) - int(self.answered.sum())
        if not left_out:
            return self
        _tell(self.split, left_out)
        return self._view(self._rows[self.answered])

    def filter(
        self,
        *,
        tasks: Iterable[str] | None = None,
        datasets: Iterable[str] | None = None,
        modalities: Iterable[str] | None = None,
    ) -> Atlas:
        """A view of the rows of the given task keys (EMO), dataset keys and modality signatures (text_audio).

        None selects all. Raises InputError for a name that is unknown and when nothing is left.
        """
        columns, taxonomy = self.columns, self.taxonomy
        keep_N = np.ones(len(self), bool)
        chosen = (
            ("tasks", tasks, taxonomy.tasks, columns.tasks, columns.task_codes),
            ("datasets", datasets, taxonomy.datasets, columns.datasets, columns.dataset_codes),
            ("modalities", modalities, SIGNATURES.values(), columns.signatures, columns.signature_codes),
        )
        for kind, names, known, vocabulary, codes_N in chosen:
            if names is not None:
                wanted = _checked_names(kind, names, known)
                keep_N &= np.isin(codes_N, [code for code, name in enumerate(vocabulary) if name in wanted])
        if not keep_N.any():
            what = f"no row of split {self.split!r} is left by the filter"
            there = f"of {', '.join(columns.datasets)} and the modalities {', '.join(columns.signatures)}"
            raise InputError(what, where=str(self.root), fix=f"Choose from what it has: {there}.")
        return self._view(self._rows[keep_N])


@cache
def _tell(split: str, left_out: int) -> None:
    """Once, and by one of the processes of a launcher."""
    if os.environ.get("RANK", "0") == "0":
        _log.warning("%d rows of split %r have no answer and are left out", left_out, split)


def data_record(path: str, atlas: Atlas) -> dict[str, Any]:
    """What environment.json and predict.json say of the data."""
    return {"path": path, "fingerprint": atlas.fingerprint, "synthetic": atlas.synthetic, "rows": len(atlas)}


def _checked_names(kind: str, names: Iterable[str], known: Iterable[str]) -> set[str]:
    wanted, known = set(map(visible, [names] if isinstance(names, str) else names)), set(known)
    for name in sorted(wanted - known):
        raise InputError(f"unknown name {name!r} in {kind}", fix=nearest(name, known))
    return wanted


def _open_store(path: str | Path, wanted: Split | None, taxonomy: Taxonomy | None) -> Store:
    hub_id = hub_id_of(path)
    if hub_id is not None:
        from hba.atlas.hub import open_hub

        return open_hub(hub_id, wanted, taxonomy)
    found = find_files(Path(path), wanted.name if wanted else None)
    taxonomy = taxonomy or of_folder(found.files[0].parent)
    if found.files[0].suffix == ".jsonl":
        return JsonlStore(found.files[0], split=found.name, taxonomy=taxonomy)
    from hba.atlas.parquet import ParquetStore  # pyarrow takes as long to load as a small atlas to open

    return ParquetStore(found.files, split=found.name, taxonomy=taxonomy)


def open_atlas(path: str | Path, split: str | None = None, *, taxonomy: Taxonomy | None = None) -> Atlas:
    """Open one split of the atlas at `path`: a folder, one JSONL file, one parquet shard, or a dataset on the hub.

    A dataset on the Hugging Face hub is named 'org/name' or 'org/name@revision' (see `hub`).

    `split` is a name, or a slice of one: 'train', 'train[:1000]' (rows), 'train[:10%]'; a single file needs none.
    Rows are checked against `taxonomy`; by default the published one with what `taxonomy.yaml` beside the rows adds.
    Every row is checked, media are not opened. Raises InputError naming file, line and field for a bad row, and
    when the split is missing, empty, or its slice selects nothing.
    """
    wanted = parse_split(split) if split is not None else None
    store = _open_store(path, wanted, taxonomy)
    rows = np.arange(len(store), dtype=np.int64)
    if wanted is not None:
        selected = wanted.rows(len(store))
        rows = rows[selected.start : selected.stop]
        if len(rows) == 0:
            what = f"split {split!r} selects none of {len(store):,} rows"
            raise InputError(what, where=str(store.root), fix="Choose a larger slice.")
    return Atlas(store, rows)
