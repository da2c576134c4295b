"""metrics.json as types: what `hba score` returns and writes, and what everybody reads.

The report, the explorer, the leaderboard, the model card and the exports take their figures from here and parse nothing
themselves. In the file the figures of a dataset stand under their published names beside its counts; here they are in
`figures`. A file of an older version is read as far as it goes: what it does not say is None. A file of another shape
is refused, naming the field. NaN means 'not scored' and becomes None.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from hba.errors import InputError
from hba.evaluate.predictions import CUT, FILTERED, ended_by
from hba.storage import plural, read_json
from hba.taxonomy import BUILTIN, Taxonomy

FILE, TEST = "metrics.json", "test"
MAX_FAILED = 0.05  # a larger share of failed rows says more of a server than of a model
SCANT = 10  # independent rows, or groups, below which an interval is not to be trusted
T = TypeVar("T")
Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Score:
    """A figure in [0, 1] with its 95 % interval, and what guessing scores under the same metric; None is 'unknown'."""

    score: float | None = None
    ci95: Interval | None = None
    chance: float | None = None

    @property
    def above_chance(self) -> bool | None:
        """Whether the whole interval lies above chance; None when score, interval or chance is missing."""
        if self.score is None or self.ci95 is None or self.chance is None:
            return None
        return self.ci95[0] > self.chance


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What became of the rows. A count that an older file does not have is None.

    `n` rows have a prediction. Of these `n_invalid` answers mean no label and `n_failed` rows ended in an error; both
    are wrong. Rows without a prediction: `n_quarantined` could not be read, `n_skipped` the model is not trained to
    answer. `n_asked` rows were to be answered (skipped ones are not among them), None where the run does not say.
    `finish` counts how answers ended, by the reason that the server or the generation gave, as far as it is known.
    """

    n: int = 0
    n_invalid: int | None = None
    n_failed: int | None = None
    n_quarantined: int | None = None
    n_skipped: int | None = None
    n_asked: int | None = None
    finish: Mapping[str, int] = field(default_factory=dict)

    @property
    def n_missing(self) -> int:
        """Rows that were asked for and have neither a prediction nor a place in the quarantine."""
        return 0 if self.n_asked is None else max(0, self.n_asked - self.n - (self.n_quarantined or 0))

    @property
    def rows(self) -> str:
        """In words: '1,012 rows', or '337 of 1,012 rows' where some that were asked for have no prediction."""
        return f"{self.n:,} of {self.n_asked:,} rows" if self.n_missing else plural(self.n, "row")

    @property
    def n_cut(self) -> int:
        """Answers that were cut off at a limit of length."""
        return ended_by(CUT, self.finish)

    @property
    def n_filtered(self) -> int:
        """Answers that a filter stopped."""
        return ended_by(FILTERED, self.finish)

    @property
    def failed_share(self) -> float:
        """The share of the predicted rows that ended in an error, 0..1."""
        return (self.n_failed or 0) / self.n if self.n else 0.0


@dataclass(frozen=True, kw_only=True)
class TaskScore(Score, Counts):
    """One task; `note` says why it has no score. `name` is that of the taxonomy, empty where a file has none."""

    metric: str
    n: int
    name: str = ""
    datasets: tuple[str, ...] = ()
    note: str | None = None

    @property
    def title(self) -> str:
        """The task in words: its name, else its datasets."""
        return self.name or ", ".join(self.datasets)


@dataclass(frozen=True, kw_only=True)
class DatasetScore(Counts):
    """One dataset: its figures under their published names, and the chance level of its task's metric.

    `n_independent` is how many rows, or groups of even size, its interval rests on.
    """

    chance: float | None = None
    invalid_share: float | None = None
    n_independent: float | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def scant(self) -> bool:
        """Whether its interval rests on so few independent rows that it is not to be trusted."""
        return self.n_independent is not None and self.n_independent < SCANT


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Part of the rows, scored alone; `accuracy` is the share of right rows."""

    n: int
    accuracy: float | None
    tasks: dict[str, TaskScore]
    n_invalid: int = 0
    n_failed: int = 0
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
class Answer:
    """An answer that means no label, and how many rows have it."""

    answer: str
    n: int


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An error that ended rows, and how many."""

    error: str
    n: int


@dataclass(frozen=True, kw_only=True)
class Unmapped:
    """The answers of one dataset that mean no label: how many, their share of its rows, and the most frequent ones."""

    n: int
    share: float
    answers: tuple[Answer, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The scores of the same outputs read in another way, such as by the published extraction."""

    mean: float | None = None
    n_invalid: int = 0
    tasks: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Aggregate(Counts):
    """Everything that is over all rows. `figures` are the twelve published averages of the classification rows.

    `mean` is over the scored tasks. With `other_rows` the predictions are of other rows than the run was asked
    for, though of no fewer. `readings` are by name, `rules` how many answers each rule of `answers` read; `failures`
    are the most frequent errors of failed rows. `unlabelled` are the rows without an answer by dataset: they are
    predicted, and in no score.
    """

    mean: Score = Score()
    other_rows: bool | None = None
    n_quarantined_unassigned: int = 0
    unlabelled: dict[str, int] = field(default_factory=dict)
    breakdowns: dict[str, Breakdown] = field(default_factory=dict)
    calibration: Calibration | None = None
    unmapped: dict[str, Unmapped] = field(default_factory=dict)
    free_form: dict[str, float] | None = None
    failures: tuple[Failure, ...] = ()
    readings: dict[str, Reading] = field(default_factory=dict)
    rules: dict[str, int] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ClusterSummary:
    """What rows were drawn together by; `few` names the datasets whose interval rests on few groups."""

    field: str
    groups: int
    rows: int
    few: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How the figures were computed; `clusters` is None when rows were drawn alone."""

    resamples: int
    seed: int
    published: bool
    level: float
    clusters: ClusterSummary | None = None


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where the figures come from; None is unknown.

    `split` is that of the predictions; `asked_split`, `selection` and `data_rows` say which rows were to be predicted
    and how many, skipped ones included, as predict.json has it. `answered_by` counts the versions that a service said
    have answered, `left_out` what of the requests it refused. `judge` is judge.json of the run, with the same two of
    the judge, where one has spoken.
    """

    hba_version: str | None = None
    data_fingerprint: str | None = None
    data_rows: int | None = None
    split: str | None = None
    asked_split: str | None = None
    selection: dict[str, Any] | None = None
    model: str | None = None
    backend: str | None = None
    seed: int | None = None
    synthetic: bool | None = None
    created_at: str | None = None
    answers_sha256: str | None = None
    command: str | None = None
    scoring: Scoring | None = None
    answered_by: dict[str, int] | None = None
    left_out: dict[str, int] | None = None
    judge: dict[str, Any] | None = None

    @property
    def scope(self) -> str:
        """The split, and what of it was predicted where that is not all: a pilot must not pass for a result."""
        named = {
            "datasets": "only {}",
            "per_dataset": "at most {} of each dataset",
            "limit": "the first {}",
            "channels": "media given: {}",
        }
        selection = self.selection or {}
        given = {key: selection[key] for key in named if selection.get(key) is not None}
        listed = {key: ", ".join(map(str, v)) if isinstance(v, list | tuple) else v for key, v in given.items()}
        shown = {key: plural(said, "row") if isinstance(said, int) else said for key, said in listed.items()}
        split = str(self.asked_split or self.split)
        return "; ".join([split, *(named[key].format(value) for key, value in shown.items())])

    @property
    def unusual(self) -> str:
        """The scope where it is not the whole test split, to stand beside a figure; empty where it is or is unknown."""
        return "" if self.scope in (TEST, "None") else self.scope


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """The file: tasks in the order of the taxonomy, datasets, what is over all rows, and where it comes from."""

    tasks: Mapping[str, TaskScore]
    datasets: Mapping[str, DatasetScore]
    aggregate: Aggregate
    provenance: Provenance

    @property
    def mean(self) -> Score:
        """The headline: the mean over the scored tasks."""
        return self.aggregate.mean

    @property
    def scant(self) -> list[str]:
        """The datasets whose interval rests on so few independent rows, or groups, that it is not to be trusted."""
        return [key for key, entry in self.datasets.items() if entry.scant]

    @property
    def breakdowns(self) -> Mapping[str, Breakdown]:
        """Scores of parts of the rows, by the field that tells them apart."""
        return self.aggregate.breakdowns

    @property
    def calibration(self) -> Calibration | None:
        """None when no prediction has probabilities."""
        return self.aggregate.calibration

    def record(self) -> dict[str, Any]:
        """As the JSON of metrics.json. What is optional and not there, such as a note, is left out."""
        tasks = {key: _pruned(dataclasses.asdict(task)) for key, task in self.tasks.items()}
        datasets = {key: _flat(entry) for key, entry in self.datasets.items()}
        provenance = dataclasses.asdict(self.provenance)
        for name in ("command", "judge"):
            if provenance[name] is None:
                del provenance[name]
        found = {"tasks": tasks, "datasets": datasets, "aggregate": _flat(self.aggregate), "provenance": provenance}
        plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(found))
        return plain


# Left out of the file where they say nothing: None, "" or empty.
_OPTIONAL = frozenset(
    {"name", "note", "finish", "other_rows", "failures", "readings", "rules", "free_form", "figures", "unlabelled"}
    | {f"n_{name}" for name in ("invalid", "failed", "quarantined", "skipped")}
)


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if key not in _OPTIONAL or item not in (None, "", {}, ())}
        return {key: _pruned(item) for key, item in kept.items()}
    return [_pruned(item) for item in value] if isinstance(value, (list, tuple)) else value


def _flat(entry: DatasetScore | Aggregate) -> dict[str, Any]:
    """The figures under their own names, beside the counts."""
    record = dataclasses.asdict(entry)
    figures = record.pop("figures")
    return {**figures, **_pruned(record)}


def read_metrics(path: Path, taxonomy: Taxonomy = BUILTIN) -> Metrics:
    """Read metrics.json. Raises InputError naming the field that is missing or of the wrong type."""
    if not path.is_file():
        before = "" if (path.parent / "predictions.jsonl").is_file() else "`hba predict`, then "
        fix = f"Run {before}`hba score` on it first."
        raise InputError("no metrics.json in the run folder", where=str(path), fix=fix)
    return parse_metrics(read_json(path), where=str(path), taxonomy=taxonomy)


def parse_metrics(raw: Any, *, where: str, taxonomy: Taxonomy = BUILTIN) -> Metrics:
    """Check the content of a metrics.json; `where` names it in errors. Tasks come in the taxonomy's order.

    Raises InputError naming the field that is missing or of the wrong type.
    """
    top = _mapping(without_nan(raw), where, "the file")
    for key in ("tasks", "datasets", "aggregate", "provenance"):
        if key not in top:
            raise InputError(f"field {key!r} is missing", where=where, fix="Run `hba score` again.")
    tasks = {key: _task(key, entry, where, taxonomy) for key, entry in _mapping(top["tasks"], where, "'tasks'").items()}
    order = [key for key in taxonomy.tasks if key in tasks] + sorted(set(tasks).difference(taxonomy.tasks))
    datasets = _mapping(top["datasets"], where, "'datasets'")
    return Metrics(
        tasks={key: tasks[key] for key in order},
        datasets={key: _nested(value, DatasetScore, f"{where}, datasets.{key}") for key, value in datasets.items()},
        aggregate=_aggregate(_mapping(top["aggregate"], where, "'aggregate'"), where),
        provenance=convert(_mapping(top["provenance"], where, "'provenance'"), Provenance, f"{where}, provenance"),
    )


def _task(key: str, entry: Any, where: str, taxonomy: Taxonomy) -> TaskScore:
    task = convert(entry, TaskScore, f"{where}, tasks.{key}")
    known = taxonomy.tasks.get(key)
    return task if task.name or known is None else dataclasses.replace(task, name=known.name)


def _aggregate(raw: dict[str, Any], where: str) -> Aggregate:
    # Named one by one, so that an error says which part is wrong.
    kinds: dict[str, Any] = {"mean": Score, "breakdowns": dict[str, Breakdown], "calibration": Calibration | None}
    for name, kind in kinds.items():
        if raw.get(name) is not None:
            convert(raw[name], kind, f"{where}, aggregate.{name}")
    return _nested({key: value for key, value in raw.items() if value is not None}, Aggregate, f"{where}, aggregate")


def _nested(value: Any, kind: type[T], where: str) -> T:
    """A dataclass whose `figures` stand beside its other fields in the file."""
    value = _mapping(value, where, "it")
    names = {each.name for each in dataclasses.fields(kind)} - {"figures"}  # type: ignore[arg-type]
    figures = {key: item for key, item in value.items() if key not in names}
    return convert({**{key: value[key] for key in value if key in names}, "figures": figures}, kind, where)


def without_nan(value: Any) -> Any:
    """A JSON value with None in the place of NaN and infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return [without_nan(item) for item in value] if isinstance(value, list) else value


def _mapping(value: Any, where: str, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{name} must be an object, found {type(value).__name__}", where=where)
    return value


def convert(value: Any, kind: type[T], where: str) -> T:
    """`value`, plain JSON, as a `kind`. Raises InputError saying what is wrong with it; `where` names its place."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise InputError(str(error), where=where, fix="Write the file again with the command it came from.") from None
