"""`hba score`: predictions.jsonl and quarantine.jsonl of a run become its metrics.json.

Every prediction counts. An answer that could not be mapped is wrong (n_invalid); a sample that failed without
an output is wrong (n_failed); a quarantined sample, whose medium could not be read, is left out and counted
(n_quarantined), and so is a row whose head was not trained (n_skipped). A task whose answers need a judge has score
null until judgements.jsonl of the folder has a verdict on each of them, never a default verdict; so has a task of which
more than MAX_FAILED of a dataset's rows failed: that is the score of a server, not of a model. The predictions are
compared with the rows that the run was to answer: their number (n_asked) and their ids (other_rows).

Refused: a missing or malformed file, and a run without a single row to score. metrics.json is written whole
or not at all. Invariant: the same predictions in any order and the same seed give the same file apart from
`created_at`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from hba import __version__
from hba.errors import InputError
from hba.evaluate.answers import published_label
from hba.evaluate.calibration import calibration
from hba.evaluate.confusion import Rows, encode
from hba.evaluate.fields import field_values
from hba.evaluate.freeform import generation_metrics, majority_levels
from hba.evaluate.judge.scores import Verdicts, add_judged, judged_rows
from hba.evaluate.metrics import mean_of, score_rows
from hba.evaluate.predictions import Prediction, answered_by
from hba.evaluate.results import (
    FILE,
    MAX_FAILED,
    Aggregate,
    Breakdown,
    Calibration,
    Clusters,
    Counts,
    DatasetScore,
    Failure,
    Metrics,
    Provenance,
    Reading,
    Score,
    Scoring,
    TaskScore,
    Unmapped,
    convert,
)
from hba.evaluate.runs import QUARANTINE, LeftOut, Run, answers_sha256, open_run, read_quarantine
from hba.evaluate.slices import breakdown
from hba.evaluate.statistics import LEVEL, bootstrap, chance, units_of
from hba.evaluate.unmapped import unmapped
from hba.storage import write_json
from hba.taxonomy import BUILTIN, Task, Taxonomy

JUDGED_NOTE = "not scored (needs a judge)"
SKIPPED_NOTE = "not scored ({n_skipped} rows that the model is not trained to answer)"
EMPTY_NOTE = "not scored: no row with a defined score"
AUTO_CLUSTERS, NO_CLUSTERS = "auto", "none"
SHOWN_FAILURES = 5
PUBLISHED_READING = "published"


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """How a run is scored. `cluster` names the field whose equal values make rows one group: auto, none, or a field."""

    resamples: int = 2000
    seed: int = 0
    published: bool = False
    cluster: str = AUTO_CLUSTERS
    by: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Unanswered:
    """Rows without a prediction, by dataset ("" where a quarantine does not name it), and how many were asked for."""

    quarantined: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    asked: Mapping[str, int] = field(default_factory=dict)
    total: int | None = None
    other_rows: bool = False


def score_run(
    run: str | Path,
    *,
    quarantine: str | Path | None = None,
    provenance: Mapping[str, Any] | None = None,
    resamples: int = 2000,
    seed: int = 0,
    published: bool = False,
    cluster: str = AUTO_CLUSTERS,
    by: Sequence[str] = (),
    atlas: Path | None = None,
    taxonomy: Taxonomy | None = None,
) -> Metrics:
    """Score a run folder, or one predictions file, write metrics.json beside the predictions and return it.

    `quarantine` defaults to quarantine.jsonl of the same folder if it exists. `provenance` overrides what
    predict.json and environment.json of the folder say. Labels are those of `taxonomy`, by default the published one
    with what `taxonomy.yaml` of the folder adds. `by` names fields to break scores down by; they and `cluster` (see
    ScoreOptions) are read from the rows of `atlas`, by default the run's. Verdicts of judgements.jsonl are used.
    Raises InputError naming file, line and field for bad input, StorageError for a full disk.
    """
    opened = open_run(run, taxonomy)
    options = ScoreOptions(resamples=resamples, seed=seed, published=published, cluster=cluster, by=tuple(by))
    predictions = opened.predictions
    skipped: Counter[str] = Counter(opened.asked.get("skipped") or {})
    if not predictions:
        what = f"all {skipped.total():,} rows are of heads that were not trained" if skipped else "the file is empty"
        fix = "Run `hba predict` on rows that the model can answer."
        raise InputError(f"no prediction to score: {what}", where=str(opened.predictions_path), fix=fix)
    metrics = score_predictions(
        predictions,
        options=options,
        taxonomy=opened.taxonomy,
        read=partial(field_values, predictions=predictions, taxonomy=opened.taxonomy, run=opened, atlas=atlas),
        verdicts=opened.verdicts,
        unanswered=_unanswered(opened, None if quarantine is None else Path(quarantine), skipped, atlas),
    )
    said = _provenance(opened, metrics.provenance)
    metrics = replace(metrics, provenance=replace(said, **(provenance or {})))
    write_json(opened.folder / FILE, metrics.record())
    return metrics


def score_predictions(
    predictions: Sequence[Prediction],
    *,
    options: ScoreOptions | None = None,
    taxonomy: Taxonomy = BUILTIN,
    read: Callable[[str], Sequence[str | None]] | None = None,
    verdicts: Verdicts | None = None,
    unanswered: Unanswered | None = None,
) -> Metrics:
    """The metrics of `predictions`, whose provenance says no more than how they were computed.

    Scores, intervals, chance levels, breakdowns, calibration. `read` gives the values of a row field; without it only
    what the predictions themselves say is used. `verdicts` are those of a judge on the free-form rows, by id.
    """
    options, unanswered = options or ScoreOptions(), unanswered or Unanswered()
    rows = rows_of(predictions, taxonomy)
    found = score_rows(rows, options.published)
    if verdicts:
        rows = judged_rows(rows, predictions, verdicts)
        add_judged(found, predictions, verdicts, taxonomy, published=options.published)
    how: dict[str, Any] = {"resamples": options.resamples, "seed": options.seed, "published": options.published}
    clusters = _clusters(predictions, options.cluster, read)
    free_form = [p for p in predictions if taxonomy.dataset(p.dataset).free_form]
    levels = chance(rows, seed=options.seed, published=options.published).datasets
    levels |= majority_levels([p.target for p in free_form], [p.dataset for p in free_form])
    datasets = _datasets(predictions, found["datasets"], levels, units_of(rows, clusters), unanswered)
    tasks = _tasks(taxonomy, found["tasks"], datasets)
    scored = {key: task for key, task in tasks.items() if task.score is not None}
    intervals = bootstrap(rows, clusters=clusters, tasks=scored.keys(), **how)
    parts = {
        name: breakdown(rows, values, clusters=clusters, failed=[p.failed for p in predictions], **how)
        for name, values in _slices(predictions, options.by, taxonomy, read).items()
    }
    total = _sum(datasets.values(), Aggregate)
    levels_of_tasks = [task.chance for task in scored.values()]
    mean = Score(
        score=mean_of([task.score for task in scored.values()]),
        ci95=intervals.mean,
        chance=None if None in levels_of_tasks else mean_of(levels_of_tasks),
    )
    if total.failed_share > MAX_FAILED:
        mean = Score()
    aggregate = replace(
        total,
        n_asked=unanswered.total,
        other_rows=unanswered.other_rows or None,
        n_quarantined=(total.n_quarantined or 0) + unanswered.quarantined[""],
        n_quarantined_unassigned=unanswered.quarantined[""],
        mean=mean,
        breakdowns=convert(parts, dict[str, Breakdown], "breakdowns"),
        calibration=convert(calibration(predictions), Calibration | None, "calibration"),  # type: ignore[arg-type]
        unmapped=convert(unmapped(predictions, taxonomy), dict[str, Unmapped], "unmapped"),
        free_form=_generation(free_form) if free_form else None,
        failures=_failures(predictions),
        readings=_readings(predictions, scored, mean, taxonomy, published=options.published),
        rules=dict(Counter(p.rule for p in predictions if p.rule is not None).most_common()),
        figures={key: value for key, value in found["aggregate"].items() if key not in ("mean", "n", "n_invalid")},
    )
    return Metrics(
        tasks={key: replace(task, ci95=intervals.tasks.get(key)) for key, task in tasks.items()},
        datasets=datasets,
        aggregate=aggregate,
        provenance=Provenance(
            scoring=Scoring(level=LEVEL, clusters=_described(clusters, options.cluster, datasets), **how)
        ),
    )


def rows_of(predictions: Sequence[Prediction], taxonomy: Taxonomy = BUILTIN) -> Rows:
    """Predictions as the cells that scores, intervals and comparisons are made of."""
    answers = [_scored_answer(p, taxonomy) for p in predictions]
    return encode(answers, [p.target for p in predictions], [p.dataset for p in predictions], taxonomy)


def _scored_answer(prediction: Prediction, taxonomy: Taxonomy) -> str | None:
    """The label of a classification row, the answer of a free-form one; None counts as wrong."""
    if not taxonomy.dataset(prediction.dataset).free_form:
        return prediction.label
    return prediction.answer if (prediction.answer or "").strip() else None


def _readings(
    predictions: Sequence[Prediction],
    scored: Mapping[str, TaskScore],
    mean: Score,
    taxonomy: Taxonomy,
    *,
    published: bool,
) -> dict[str, Reading]:
    """The scores of the same answers in words by the strict published reading; none where no answer is in words.

    It has a mean where the run's own is over the same tasks: no judge has seen these answers.
    """
    labelled = [p for p in predictions if not taxonomy.dataset(p.dataset).free_form]
    if all(p.output is None or p.probs is not None for p in labelled):
        return {}
    strict = [
        p.label if p.output is None or p.probs is not None else published_label(p.dataset, p.output, taxonomy)
        for p in labelled
    ]
    rows = encode(strict, [p.target for p in labelled], [p.dataset for p in labelled], taxonomy)
    scores = {key: task["score"] for key, task in score_rows(rows, published)["tasks"].items()}
    scores = {key: score for key, score in scores.items() if key in scored}
    same = mean.score is not None and scores.keys() == scored.keys()
    invalid = sum(label is None and not p.failed for p, label in zip(labelled, strict, strict=True))
    return {
        PUBLISHED_READING: Reading(
            mean=mean_of(list(scores.values())) if same else None, n_invalid=invalid, tasks=scores
        )
    }


# ---------------------------------------------------------------------------------------------------------- counts


def _datasets(
    predictions: Sequence[Prediction],
    figures: Mapping[str, Mapping[str, Any]],
    levels: Mapping[str, float | None],
    units: Mapping[str, float],
    unanswered: Unanswered,
) -> dict[str, DatasetScore]:
    """Every dataset with its figures and what became of its rows, those without a prediction included."""
    failed = Counter(p.dataset for p in predictions if p.failed)
    finish: dict[str, Counter[str]] = {}
    for p in predictions:
        if p.finish is not None:
            finish.setdefault(p.dataset, Counter())[p.finish] += 1
    found = {}
    without = (*unanswered.quarantined, *unanswered.skipped, *unanswered.asked)
    for key in dict.fromkeys([*figures, *filter(None, without)]):
        of = dict(figures.get(key, {}))
        n, invalid = of.pop("n", 0), of.pop("n_invalid", 0) - failed[key]  # a failed sample gave no answer
        found[key] = DatasetScore(
            n=n,
            n_invalid=invalid,
            n_failed=failed[key],
            n_quarantined=unanswered.quarantined[key],
            n_skipped=unanswered.skipped[key],
            n_asked=unanswered.asked.get(key, 0) if unanswered.asked else None,
            finish=dict(sorted(finish.get(key, Counter()).items())),
            invalid_share=invalid / n if n else None,
            chance=levels.get(key),
            n_independent=units.get(key),
            figures=of,
        )
    return found


def _tasks(
    taxonomy: Taxonomy, scores: Mapping[str, Mapping[str, Any]], datasets: Mapping[str, DatasetScore]
) -> dict[str, TaskScore]:
    """Every task that has a dataset: its score, or why it has none."""
    found = {}
    for task in taxonomy.tasks.values():
        mine = {key: datasets[key] for key in task.datasets if key in datasets}
        if mine:
            counted = _sum(mine.values(), Counts)
            scored = scores.get(task.key, {})
            note = _failed_note(mine) or scored.get("note")
            value = None if note else scored.get("score")
            levels = [entry.chance for entry in mine.values() if entry.n]
            found[task.key] = TaskScore(
                **{name: getattr(counted, name) for name in Counts.__dataclass_fields__},
                metric=task.metric,
                name=task.name,
                datasets=tuple(mine),
                score=value,
                chance=None if value is None else mean_of(levels),
                note=None if value is not None else note or _unscored_note(task, counted),
            )
    return found


def _failed_note(datasets: Mapping[str, DatasetScore]) -> str | None:
    """Why the rows that failed leave a task without a score; None if they are few."""
    over = [key for key, entry in datasets.items() if entry.failed_share > MAX_FAILED]
    if not over:
        return None
    failed, rows = (sum(getattr(datasets[key], name) or 0 for key in over) for name in ("n_failed", "n"))
    return f"not scored: {'all' if failed == rows else f'{failed:,} of'} {rows:,} rows failed"


def _unscored_note(task: Task, counted: Counts) -> str:
    if counted.n_missing and not counted.n:
        return f"not scored: none of {counted.n_asked:,} rows was answered"
    if counted.n_skipped and not counted.n:
        return SKIPPED_NOTE.format(n_skipped=counted.n_skipped)
    return JUDGED_NOTE if task.judged else EMPTY_NOTE


C = TypeVar("C", bound=Counts)


def _sum(entries: Iterable[Counts], kind: type[C]) -> C:
    """The counts of several datasets together; what one of them does not know is unknown."""
    entries = list(entries)
    totals: dict[str, Any] = {}
    for name in ("n", "n_invalid", "n_failed", "n_quarantined", "n_skipped", "n_asked"):
        values = [getattr(entry, name) for entry in entries]
        totals[name] = None if None in values else sum(values)
    finish: Counter[str] = sum((Counter(entry.finish) for entry in entries), Counter())
    return kind(**totals, finish=dict(sorted(finish.items())))


def _failures(predictions: Sequence[Prediction]) -> tuple[Failure, ...]:
    errors = Counter(p.error for p in predictions if p.failed and p.error)
    ranked = sorted(errors.items(), key=lambda entry: (-entry[1], entry[0]))[:SHOWN_FAILURES]
    return tuple(Failure(error=error, n=n) for error, n in ranked)


def _unanswered(run: Run, quarantine: Path | None, skipped: Counter[str], atlas: Path | None) -> Unanswered:
    """What predict.json and quarantine.jsonl say of the rows that have no prediction."""
    path = run.folder / QUARANTINE if quarantine is None else quarantine
    entries = read_quarantine(path, run.taxonomy) if quarantine is not None or path.is_file() else []
    predicted, splits = {p.id for p in run.predictions}, {p.split for p in run.predictions}
    mine = [e for e in entries if e.id not in predicted and (e.split is None or e.split in splits)]
    left_out = Counter(e.dataset or "" for e in _asked_for(run, mine, atlas))
    return Unanswered(
        quarantined=left_out,
        skipped=skipped,
        asked=run.asked.get("asked") or {},
        total=run.num_asked,
        other_rows=run.other_rows,
    )


def _asked_for(run: Run, entries: list[LeftOut], atlas: Path | None) -> list[LeftOut]:
    """Those of `entries` that were to be predicted: a training in the same folder meets other rows of the split.

    The atlas says which they are. Where it cannot be opened, no dataset has more left out than it has rows unanswered.
    """
    if not entries or run.config is None or "data" not in run.asked:
        return entries
    place = atlas or Path(str(run.asked["data"].get("path")))
    if place.is_dir():
        from hba.evaluate.selection import predicted_rows  # opens the atlas, which scoring needs for nothing else

        try:
            rows = predicted_rows(run.asked, str(place), str(run.asked.get("split")))
            ids = {sample.id for sample in rows}
            return [entry for entry in entries if entry.id in ids]
        except InputError:
            pass  # moved, or another atlas by now
    asked: Mapping[str, int] = run.asked.get("asked") or {}
    room = Counter(asked) - Counter(p.dataset for p in run.predictions)
    kept = []
    for entry in entries:
        known = entry.dataset in asked
        if not known or room[entry.dataset or ""] > 0:
            kept.append(entry)
            room[entry.dataset or ""] -= known
    return kept


# -------------------------------------------------------------------------------------------------- groups and slices


def _clusters(
    predictions: Sequence[Prediction],
    cluster: str,
    read: Callable[[str], Sequence[str | None]] | None,
) -> Sequence[str | None] | None:
    """The group of each row, None when rows are drawn alone."""
    if cluster == NO_CLUSTERS:
        return None
    if cluster == AUTO_CLUSTERS or read is None:
        groups: Sequence[str | None] = [p.group for p in predictions]
        return groups if any(groups) else None
    return read(cluster)


def _described(
    clusters: Sequence[str | None] | None, cluster: str, datasets: Mapping[str, DatasetScore]
) -> Clusters | None:
    """What rows were drawn together by; `few` names datasets whose interval rests on fewer than SCANT groups."""
    if clusters is None:
        return None
    return Clusters(
        field="group" if cluster == AUTO_CLUSTERS else cluster,
        groups=len({group for group in clusters if group is not None}),
        rows=sum(group is not None for group in clusters),
        few=tuple(sorted(key for key, entry in datasets.items() if entry.scant)),
    )


def _slices(
    predictions: Sequence[Prediction],
    by: Sequence[str],
    taxonomy: Taxonomy,
    read: Callable[[str], Sequence[str | None]] | None,
) -> dict[str, Sequence[str | None]]:
    """The values of modality and language where there is more than one, and of every field that was asked for."""
    found: dict[str, Sequence[str | None]] = {
        "modality": [p.modality for p in predictions],
        "language": [taxonomy.dataset(p.dataset).language for p in predictions],
    }
    found = {name: values for name, values in found.items() if len(set(values)) > 1}
    return found | {field: read(field) for field in by if read is not None}


def _generation(free_form: Sequence[Prediction]) -> dict[str, float]:
    """The accuracies of the released generation evaluation."""
    said = [p.answer if (p.answer or "").strip() else None for p in free_form]
    columns = ([getattr(p, name) for p in free_form] for name in ("target", "dataset", "task"))
    return generation_metrics(said, *columns)


# --------------------------------------------------------------------------------------------------------- provenance


def _provenance(run: Run, how: Provenance) -> Provenance:
    """`how` the figures were computed, with what the run's records say of model, backend, seed and data."""
    model = run.asked.get("model")
    return replace(
        how,
        hba_version=__version__,
        data_fingerprint=run.fingerprint,
        data_rows=(run.asked.get("data") or {}).get("rows"),
        split="+".join(sorted({p.split for p in run.predictions})),
        asked_split=run.asked.get("split"),
        selection=run.asked.get("selection"),
        # A local model by its folder's name: where a run lies must not change its metrics.json.
        model=Path(model).name if isinstance(model, str) and Path(model).is_dir() else model,
        backend=run.asked.get("backend"),
        seed=(run.environment or {}).get("seed"),
        synthetic=run.data.get("synthetic"),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        answers_sha256=answers_sha256(run.predictions),
        **answered_by(run.predictions),
        judge=run.judge if run.verdicts else None,
    )
