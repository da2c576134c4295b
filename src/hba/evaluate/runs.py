"""A run folder, read back: predictions, metrics, log, quarantine, verdicts, and what was asked of whom.

Everybody who reads a run that is done reads it here. A file is read when it is first asked for. One that may be absent
is then None or empty; one that is there and malformed is an InputError naming file, line and field. The share of a run
that one of its processes predicted (`shards/i-of-N`) is a run, too, whose records are those of the whole run.

Invariant: what is read depends on the files alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hba.errors import InputError
from hba.evaluate.predictions import JUDGE_SETTINGS, JUDGEMENTS, Prediction, answered_by, ids_sha256, read_predictions
from hba.evaluate.predictions import PREDICTIONS as PREDICTIONS
from hba.evaluate.results import FILE as METRICS
from hba.evaluate.results import Metrics, convert, read_metrics, without_nan
from hba.storage import json_sha256, read_json, read_jsonl
from hba.taxonomy import Taxonomy, of_folder

if TYPE_CHECKING:
    from hba.atlas import Atlas
    from hba.evaluate.judge.items import Judgement
    from hba.evaluate.judge.scores import Verdicts

QUARANTINE, LOG, ASKED = "quarantine.jsonl", "log.jsonl", "predict.json"


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """One line of quarantine.jsonl: a sample that was left out, its place and the reason. A dataset may be unnamed."""

    id: str
    dataset: str | None = None
    split: str | None = None
    where: str = ""
    field: str = ""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Event:
    """One line of log.jsonl; `metrics` maps task keys (and 'mean') to validation scores in [0, 1]."""

    step: int
    kind: str
    loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)


def open_run(place: str | Path, taxonomy: Taxonomy | None = None) -> Run:
    """The run at `place`, a folder or a predictions file in it; labels are those of `taxonomy`, by default the run's.

    Reads nothing yet. Raises InputError when there is no such place.
    """
    path = Path(place)
    if not path.exists():
        raise InputError("no such run folder", where=str(path), fix="Run `hba predict` first, or check the path.")
    return Run(path, path / PREDICTIONS, taxonomy) if path.is_dir() else Run(path.parent, path, taxonomy)


class Run:
    """One run folder; see `open_run`."""

    def __init__(self, folder: Path, predictions_path: Path, taxonomy: Taxonomy | None = None) -> None:
        self.folder = folder
        self.predictions_path = predictions_path
        self._taxonomy = taxonomy

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    def has(self, file: str) -> bool:
        """Whether the folder has a file of that name."""
        return (self.folder / file).is_file()

    @cached_property
    def root(self) -> Path:
        """Where the run's records lie: the folder itself, of a shard's folder that of the whole run."""
        whole = self.folder.resolve().parent.parent
        of_shard = self.folder.resolve().parent.name == "shards" and (whole / ASKED).is_file()
        return whole if of_shard and not self.has(ASKED) else self.folder

    @cached_property
    def taxonomy(self) -> Taxonomy:
        """The taxonomy that the run was predicted with."""
        return self._taxonomy or of_folder(self.root)

    @cached_property
    def predictions(self) -> list[Prediction]:
        """Every prediction of a row with an answer. Raises InputError when there is no such file, or for a line that is
        not as it should be."""
        return [p for p in self._every if p.target is not None]

    @property
    def unlabelled(self) -> list[Prediction]:
        """The predictions of rows without an answer, which nothing can be compared with."""
        return [p for p in self._every if p.target is None]

    @cached_property
    def _every(self) -> list[Prediction]:
        return read_predictions(self.predictions_path, self.taxonomy)

    @cached_property
    def metrics(self) -> Metrics:
        """metrics.json. Raises InputError when the run is not scored, or the file malformed.

        A file of an older version does not say which rows were asked for; predict.json does.
        """
        found = read_metrics(self.folder / METRICS, self.taxonomy)
        said, total = found.provenance, found.aggregate
        if said.asked_split is None and self.asked:
            rows, selection = (self.asked.get("data") or {}).get("rows"), self.asked.get("selection")
            said = replace(said, asked_split=self.asked.get("split"), selection=selection, data_rows=rows)
        if total.n_asked is None and total.n:
            total = replace(total, n_asked=self.num_asked)
        return replace(found, provenance=said, aggregate=total)

    @cached_property
    def asked(self) -> Mapping[str, Any]:
        """predict.json: what was asked of which model; empty without one."""
        return self._record(ASKED) or {}

    @cached_property
    def num_asked(self) -> int | None:
        """How many rows were to be answered: those that were chosen, without what the model is not trained to answer.

        None where the run does not say.
        """
        if self.asked.get("asked") is not None:
            return sum(map(int, self.asked["asked"].values()))
        rows = (self.asked.get("data") or {}).get("rows")
        return None if rows is None else int(rows) - sum((self.asked.get("skipped") or {}).values())

    @cached_property
    def other_rows(self) -> bool:
        """Whether the answered rows are not those that were to be answered, though no fewer.

        False where the run does not say which they were, and where rows are missing, which counts tell.
        """
        wanted, answered = self.asked.get("asked_ids"), {p.id for p in self.predictions}
        if self.num_asked is None:
            return False
        missing = self.num_asked - len(answered)
        left_out = {entry.id for entry in self.left_out()}
        if missing > 0 and len(left_out) == missing:
            answered |= left_out
        elif missing > 0:  # a part; or a training in the same folder has left out other rows of the split
            return False
        return missing < 0 or (wanted is not None and ids_sha256(answered) != wanted)

    @cached_property
    def stale(self) -> bool:
        """Whether the predictions are no longer those that were scored; also where they can no longer be read."""
        scored = self.metrics.provenance.answers_sha256
        if scored is None or not self.predictions_path.is_file():
            return False
        try:
            return answers_sha256(self.predictions) != scored
        except InputError:
            return True

    def rows(self, place: str | Path | None = None, split: str | None = None) -> Atlas:
        """The rows that it was asked to predict: of the atlas at `place`, by default where it lay.

        Raises InputError when their fingerprint is not the one that the run recorded.
        """
        from hba.atlas import open_atlas  # which reading a run back needs for nothing else
        from hba.evaluate.predict import Selection

        data = self.asked.get("data") or {}
        place = str(place or data.get("path"))
        split = split or self.asked.get("split") or "+".join(sorted({p.split for p in self._every}))
        found = Selection(**self.asked.get("selection") or {}).rows(open_atlas(place, split=split))
        if data.get("fingerprint") not in (None, found.fingerprint):
            fix = "Say with --atlas which one it was."
            raise InputError("is not the atlas that was predicted (another fingerprint)", where=place, fix=fix)
        return found

    @cached_property
    def environment(self) -> Mapping[str, Any] | None:
        """environment.json: seed, data, machine."""
        return self._record("environment.json")

    @cached_property
    def data(self) -> Mapping[str, Any]:
        """The record of the evaluated rows (path, fingerprint, rows, synthetic); else of those that were trained on."""
        return self.asked.get("data") or (self.environment or {}).get("data") or {}

    @cached_property
    def fingerprint(self) -> str | None:
        """The hash of the evaluated rows, as the run recorded it."""
        return self.data.get("fingerprint")

    @cached_property
    def config(self) -> str | None:
        """The text of config.yaml."""
        path = self.root / "config.yaml"
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None

    @cached_property
    def events(self) -> tuple[Event, ...] | None:
        """The last event of every (kind, step): a resumed run logs again what it repeats after its checkpoint."""
        path = self.folder / LOG
        if not path.is_file():
            return None
        lines = (convert(without_nan(record), Event, f"{path}:{number}") for number, record in read_jsonl(path))
        last = {(event.kind, event.step): event for event in lines}
        return tuple(sorted(last.values(), key=lambda event: (event.step, event.kind)))

    @cached_property
    def quarantine(self) -> tuple[LeftOut, ...] | None:
        """What was left out, in training and prediction; a sample that was answered after all is not."""
        path = self.folder / QUARANTINE
        if not path.is_file():
            return None
        answered = {p.id for p in self._every} if self.predictions_path.is_file() else set()
        return tuple(entry for entry in read_quarantine(path) if entry.id not in answered)

    def left_out(self, file: Path | None = None) -> list[LeftOut]:
        """What quarantine.jsonl, or another such `file`, has of the predicted splits, and nobody has answered.

        Raises InputError naming file, line and field, also for a dataset that the taxonomy does not have.
        """
        path = self.folder / QUARANTINE if file is None else file
        entries = read_quarantine(path, self.taxonomy) if file is not None or path.is_file() else []
        answered, splits = {p.id for p in self._every}, {p.split for p in self._every}
        return [e for e in entries if e.id not in answered and (e.split is None or e.split in splits)]

    @cached_property
    def judgements(self) -> dict[str, Judgement] | None:
        """The judge's verdicts by id."""
        if not self.has(JUDGEMENTS):
            return None
        from hba.evaluate.judge.items import read_judgements  # few runs are judged

        return read_judgements(self.folder / JUDGEMENTS)

    @cached_property
    def verdicts(self) -> Verdicts:
        """The verdict on every free-form prediction; see `read_verdicts`."""
        from hba.evaluate.judge.scores import read_verdicts

        return read_verdicts(self.folder, self.predictions, self.taxonomy)

    @cached_property
    def judge(self) -> dict[str, Any] | None:
        """Who judged, which versions answered, and what of the requests these refused; None if nobody did."""
        if not self.has(JUDGE_SETTINGS) or self.judgements is None:
            return None
        return {**read_json(self.folder / JUDGE_SETTINGS), **answered_by(self.judgements.values())}

    @property
    def synthetic(self) -> bool | None:
        """Whether any of the data were generated, None when no file of the run says."""
        said = [self.metrics.provenance.synthetic, *(data.get("synthetic") for data in self._data())]
        flags = [flag for flag in said if isinstance(flag, bool)]
        return any(flags) if flags else None

    @property
    def atlas_path(self) -> str | None:
        """Where the evaluated atlas lay, as the run recorded it."""
        return next((path for data in self._data() if isinstance(path := data.get("path"), str)), None)

    def _data(self) -> list[Mapping[str, Any]]:
        return [record["data"] for record in (self.asked, self.environment or {}) if record.get("data")]

    def _record(self, name: str) -> Mapping[str, Any] | None:
        path = self.root / name
        if not path.is_file():
            return None
        facts = read_json(path)
        if not isinstance(facts, dict) or not isinstance(facts.get("data") or {}, dict):
            fix = "Restore or remove the file."
            raise InputError("expected an object with an object `data`", where=str(path), fix=fix)
        return facts


def answers_sha256(predictions: Iterable[Prediction]) -> str:
    """Hash of what is scored, whatever the order of the lines and the time they took."""
    return json_sha256(sorted((p.id, p.dataset, p.target, str(p.label), str(p.answer)) for p in predictions))


def read_quarantine(path: Path, taxonomy: Taxonomy | None = None) -> list[LeftOut]:
    """The lines of a quarantine.jsonl, each sample once. Raises InputError naming file, line and field.

    With a `taxonomy` a dataset that it does not have is refused.
    """
    found: dict[str, LeftOut] = {}
    for number, record in read_jsonl(path):
        if not isinstance(record.get("id"), str):
            fix = "Write the id of the sample that was left out."
            raise InputError(f"expected str, found {record.get('id')!r}", where=f"{path}:{number}, id", fix=fix)
        entry = convert(record, LeftOut, f"{path}:{number}")
        if entry.dataset and taxonomy is not None and entry.dataset not in taxonomy.datasets:
            where = f"{path}:{number}, dataset"
            raise InputError(f"unknown dataset {entry.dataset!r}", where=where, fix="Use a dataset of the taxonomy.")
        found.setdefault(entry.id, entry)
    return list(found.values())
