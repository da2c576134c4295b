"""Reads a run folder into frozen dataclasses, checked field by field.

`metrics.json` is required; the other files of a run folder are optional, and a missing one is None, which the page
shows as a named empty state. A file that is present but malformed is an InputError naming file, line and field: a
report never leaves out silently what it could not read. NaN means 'not scored' and becomes None.

Invariant: what this module returns depends on the files alone, so that the same run gives the same page.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from hba.errors import InputError
from hba.evaluate.judge.judgements import FILE as JUDGED
from hba.evaluate.judge.judgements import Judgement, read_judgements
from hba.evaluate.predictions import Prediction, read_predictions
from hba.report.stages import Stages, read_stages
from hba.storage import read_json, read_jsonl
from hba.taxonomy import BUILTIN, Taxonomy

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Score:
    """A figure in [0, 1] with its 95 % interval; None where nothing was scored."""

    score: float | None = None
    ci95: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class TaskScore(Score):
    """One task of metrics.json; `chance` is what guessing scores under the same metric, in [0, 1]."""

    metric: str
    n: int
    chance: float | None = None
    n_invalid: int | None = None
    n_failed: int | None = None
    n_quarantined: int | None = None
    note: str | None = None
    datasets: tuple[str, ...] = ()

    @property
    def above_chance(self) -> bool | None:
        """Whether the whole interval lies above chance; None when score, interval or chance is missing."""
        if self.score is None or self.ci95 is None or self.chance is None:
            return None
        return self.ci95[0] > self.chance


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Part of the rows, scored alone; `accuracy` is the share of right rows."""

    n: int
    accuracy: float
    tasks: dict[str, TaskScore]
    n_invalid: int = 0
    mean: float | None = None


@dataclass(frozen=True, kw_only=True)
class Breakdown:
    """The slices of one field, and per task the distance between the best and the worst of them."""

    slices: dict[str, Slice]
    gaps: dict[str, float]

    @property
    def tasks(self) -> set[str]:
        """The tasks that any slice has."""
        return {key for part in self.slices.values() for key in part.tasks}


@dataclass(frozen=True, kw_only=True)
class Bin:
    """The predictions whose confidence lies in (low, high]."""

    low: float
    high: float
    n: int
    confidence: float
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """How probabilities fit outcomes; see `evaluate.calibration`."""

    n: int
    ece: float
    brier: float
    log_loss: float
    accuracy: float
    confidence: float
    bins: tuple[Bin, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Calibration over all predictions with probabilities, with its bins, and per dataset."""

    all: Calibrated
    datasets: dict[str, Calibrated]


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """metrics.json. `datasets` holds every figure of a dataset under its published name,
    `counts` the totals n, n_invalid, n_failed, n_quarantined as far as they are given."""

    tasks: Mapping[str, TaskScore]
    datasets: Mapping[str, Mapping[str, Any]]
    mean: Score
    counts: Mapping[str, int]
    provenance: Mapping[str, Any]
    breakdowns: Mapping[str, Breakdown] = dataclasses.field(default_factory=dict)
    calibration: Calibration | None = None


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """One line of quarantine.jsonl: a sample that was left out, its place and the reason."""

    id: str
    where: str
    field: str
    reason: str
    split: str | None = None


@dataclass(frozen=True, kw_only=True)
class Event:
    """One line of log.jsonl; `metrics` maps task keys (and 'mean') to validation scores in [0, 1]."""

    step: int
    kind: str
    loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    metrics: dict[str, float | None] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run folder; None marks an optional file that is not there."""

    name: str
    metrics: Metrics
    config: str | None
    environment: Mapping[str, Any] | None
    predict: Mapping[str, Any] | None
    events: tuple[Event, ...] | None
    predictions: tuple[Prediction, ...] | None
    quarantine: tuple[LeftOut, ...] | None
    judgements: Mapping[str, Judgement] | None = None
    stages: Stages | None = None

    @property
    def synthetic(self) -> bool | None:
        """Whether any of the data were generated, None when no file of the run says."""
        said = [self.metrics.provenance, *self._data()]
        flags = [flag for record in said if isinstance(flag := record.get("synthetic"), bool)]
        return any(flags) if flags else None

    @property
    def atlas_path(self) -> str | None:
        """Where the evaluated atlas lay, as the run recorded it."""
        return next((path for data in self._data() if isinstance(path := data.get("path"), str)), None)

    @property
    def data_fingerprint(self) -> str | None:
        """The hash of the evaluated rows, as the run recorded it."""
        return next((text for data in self._data() if isinstance(text := data.get("fingerprint"), str)), None)

    def _data(self) -> list[Mapping[str, Any]]:
        records = [record.get("data") for record in (self.predict, self.environment) if record is not None]
        return [record for record in records if isinstance(record, dict)]


def load_run(run: Path, taxonomy: Taxonomy = BUILTIN) -> Run:
    """Read the run folder `run`.

    Raises InputError when the folder or its metrics.json is missing, or when a file of it is malformed.
    """
    if not run.is_dir():
        raise InputError("no such run folder", where=str(run), fix="Give the folder that `hba predict` wrote.")
    predictions = _predictions(run / "predictions.jsonl", taxonomy)
    return Run(
        name=run.resolve().name,
        metrics=load_metrics(run / "metrics.json", taxonomy),
        config=_text(run / "config.yaml"),
        environment=_object(run / "environment.json"),
        predict=_object(run / "predict.json"),
        events=_events(run / "log.jsonl"),
        predictions=predictions,
        judgements=read_judgements(run / JUDGED) if (run / JUDGED).is_file() else None,
        quarantine=_quarantine(run / "quarantine.jsonl", {p.id for p in predictions or ()}),
        stages=read_stages(run),
    )


def load_metrics(path: Path, taxonomy: Taxonomy = BUILTIN) -> Metrics:
    """Read metrics.json. Raises InputError naming the field that is missing or of the wrong type."""
    if not path.is_file():
        raise InputError("no metrics.json in the run folder", where=str(path), fix="Run `hba score` on it first.")
    return parse_metrics(read_json(path), where=str(path), taxonomy=taxonomy)


def parse_metrics(raw: Any, *, where: str, taxonomy: Taxonomy = BUILTIN) -> Metrics:
    """Check the content of a metrics.json; `where` names it in errors. Tasks come in the taxonomy's order.

    Raises InputError naming the field that is missing or of the wrong type.
    """
    top = _mapping(_without_nan(raw), where, "the file")
    for key in ("tasks", "datasets", "aggregate", "provenance"):
        if key not in top:
            raise InputError(f"field {key!r} is missing", where=where, fix="Run `hba score` again.")
    tasks = _mapping(top["tasks"], where, "'tasks'")
    order = [key for key in taxonomy.tasks if key in tasks] + sorted(set(tasks).difference(taxonomy.tasks))
    datasets = _mapping(top["datasets"], where, "'datasets'")
    aggregate = _mapping(top["aggregate"], where, "'aggregate'")
    return Metrics(
        tasks={key: _convert(tasks[key], TaskScore, f"{where}, tasks.{key}") for key in order},
        datasets={key: _convert(value, dict[str, Any], f"{where}, datasets.{key}") for key, value in datasets.items()},
        mean=_convert(aggregate.get("mean", {}), Score, f"{where}, aggregate.mean"),
        counts={key: value for key, value in aggregate.items() if isinstance(value, int)},
        provenance=_mapping(top["provenance"], where, "'provenance'"),
        breakdowns=_convert(aggregate.get("breakdowns") or {}, dict[str, Breakdown], f"{where}, aggregate.breakdowns"),
        calibration=_convert(aggregate.get("calibration"), Calibration | None, f"{where}, aggregate.calibration"),  # type: ignore[arg-type]
    )


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, list) else value


def _mapping(value: Any, where: str, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{name} must be an object, found {type(value).__name__}", where=where)
    return value


def _convert(value: Any, kind: type[T], where: str) -> T:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise InputError(str(error), where=where, fix="Write the file again with the command it came from.") from None


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def _object(path: Path) -> Mapping[str, Any] | None:
    return _mapping(read_json(path), str(path), "the file") if path.is_file() else None


def _predictions(path: Path, taxonomy: Taxonomy) -> tuple[Prediction, ...] | None:
    if not path.is_file():
        return None
    return tuple(read_predictions(path, taxonomy))


def _quarantine(path: Path, predicted: set[str]) -> tuple[LeftOut, ...] | None:
    if not path.is_file():
        return None
    found: dict[str, LeftOut] = {}
    for number, record in read_jsonl(path):
        entry = _convert(record, LeftOut, f"{path}:{number}")
        if entry.id not in predicted:  # as the scorer has it: what was answered after all is not left out
            found.setdefault(entry.id, entry)
    return tuple(found.values())


def _events(path: Path) -> tuple[Event, ...] | None:
    """The last event of every (kind, step): a resumed run logs again what it repeats after its checkpoint."""
    if not path.is_file():
        return None
    lines = (_convert(_without_nan(record), Event, f"{path}:{number}") for number, record in read_jsonl(path))
    last = {(event.kind, event.step): event for event in lines}
    return tuple(sorted(last.values(), key=lambda event: (event.step, event.kind)))
