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

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from hba.environment import hba_version
from hba.errors import InputError, nearest
from hba.evaluate.answers import published_label
from hba.evaluate.judge.scores import Verdicts, add_judged, judged_rows
from hba.evaluate.metrics import Floats, Rows, encode, generation_metrics, majority_levels, mean_of, score_rows
from hba.evaluate.predictions import Prediction, answered_by
from hba.evaluate.results import (
    FILE,
    MAX_FAILED,
    Aggregate,
    Breakdown,
    Calibration,
    ClusterSummary,
    Counts,
    DatasetScore,
    Failure,
    Metrics,
    Provenance,
    Reading,
    Score,
    Scoring,
    Slice,
    TaskScore,
    Unmapped,
    convert,
)
from hba.evaluate.runs import ASKED, LeftOut, Run, answers_sha256, open_run
from hba.evaluate.statistics import EXACT_MATCH, LEVEL, Clusters, bootstrap, chance, parts, units_of
from hba.storage import plural, write_json
from hba.taxonomy import BUILTIN, Task, Taxonomy

# Scores of parts of the data: by modality, by language, and by any field of the rows (fairness).
#
# A slice is scored as if it were all there is, with the tasks' own metrics and bootstrap intervals; a task of which too
# many rows failed in a slice has no score there. `gap` is the distance between the best and the worst slice of a task
# among those with at least MIN_ROWS rows of it; smaller ones are shown, and would make a gap of noise. Slices may
# differ in what is asked of them (datasets, labels), so that a gap is a question and not yet an answer.


MIN_ROWS = 20
UNKNOWN = "(not given)"


def breakdown(
    rows: Rows, values: Sequence[str | None], *, failed: Sequence[bool], clusters: Clusters | None, **how: Any
) -> Breakdown:
    """The slices of the rows, each scored alone with `how` of `bootstrap`.

    `values` [N] gives each row's slice; None is a slice of its own. `failed` [N] says which rows ended in an error:
    they are wrong, and not among the invalid answers. The mean of a slice is over its tasks that count in the run's.
    """
    named_N = np.array([UNKNOWN if value is None else value for value in values], dtype=object)
    failed_N = np.array(failed, dtype=bool)
    found, scores = {}, defaultdict[str, list[float]](list)
    for name in sorted(set(named_N.tolist())):
        members_M = np.flatnonzero(named_N == name)
        groups = None if clusters is None else [clusters[i] for i in members_M.tolist()]
        part = replace(rows, cells=rows.cells[members_M])
        found[name] = _slice(part, failed_N[members_M], clusters=groups, **how)
        for key, task in found[name].tasks.items():
            if task.score is not None and task.n >= MIN_ROWS:
                scores[key].append(task.score)
    gaps = {key: max(several) - min(several) for key, several in scores.items() if len(several) > 1}
    return Breakdown(slices=found, gaps=gaps)


def _slice(rows: Rows, failed_N: np.ndarray[Any, np.dtype[np.bool_]], *, published: bool, **how: Any) -> Slice:
    scored, intervals = score_rows(rows, published), bootstrap(rows, published=published, **how)
    # The datasets of which too many rows failed.
    over = {part.key for part in parts(rows, published) if failed_N[part.members_M].mean() > MAX_FAILED}
    tasks: dict[str, TaskScore] = {}
    counted = []
    for task in rows.layout.taxonomy.tasks.values():
        keys = [key for key in task.datasets if scored["datasets"].get(key, {}).get("n")]
        if not keys:
            continue
        of_task = scored["tasks"].get(task.key)
        # The cells of a judged dataset hold verdicts, and their share of right ones is what `score_rows` counts.
        counts = of_task is not None or all(key in rows.judged for key in keys)
        score = of_task["score"] if of_task else mean_of([scored["datasets"][key][EXACT_MATCH] for key in keys])
        alone = intervals.datasets.get(keys[0]) if len(keys) == 1 else None
        ci95 = intervals.tasks.get(task.key) if counts else alone
        if any(key in over for key in keys):
            score = ci95 = None
        n, metric = sum(scored["datasets"][key]["n"] for key in keys), task.metric if counts else EXACT_MATCH
        tasks[task.key] = TaskScore(score=score, ci95=ci95, n=n, metric=metric)
        counted += [score] if counts else []
    n_failed, few = int(failed_N.sum()), failed_N.mean() <= MAX_FAILED
    return Slice(
        n=len(rows.cells),
        n_invalid=scored["aggregate"]["n_invalid"] - n_failed,
        n_failed=n_failed,
        accuracy=float(rows.right().mean()) if few else None,
        mean=mean_of(counted) if few else None,
        tasks=tasks,
    )


# What could not be mapped: answers to labelled rows that mean no label, by dataset, with the most frequent of them.
#
# Such an answer counts as wrong. A synonym that the taxonomy lacks shows here, and so does a model that never answers
# in the form it was asked for; neither should pass for a model that errs.


SHOWN = 5
LONGEST = 80


def unmapped(predictions: Sequence[Prediction], taxonomy: Taxonomy = BUILTIN) -> dict[str, Any]:
    """{dataset: {"n", "share", "answers": [{"answer", "n"}]}} of datasets with an answer that means no label.

    `share` is of all rows of the dataset, 0..1. Samples that failed gave no answer and are not among them. `answers`
    are the extracted ones, the most frequent first, at most SHOWN, cut to LONGEST characters.
    """
    rows: Counter[str] = Counter()
    said: dict[str, Counter[str]] = {}
    for prediction in predictions:
        if taxonomy.dataset(prediction.dataset).free_form:
            continue
        rows[prediction.dataset] += 1
        if prediction.label is None and not prediction.failed:
            line = " ".join((prediction.answer or "").split())
            line = line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"
            said.setdefault(prediction.dataset, Counter())[line] += 1
    found = {}
    for key, answers in sorted(said.items()):
        shown = [{"answer": text, "n": count} for text, count in _ranked(answers)[:SHOWN]]
        found[key] = {"n": answers.total(), "share": answers.total() / rows[key], "answers": shown}
    return found


def _ranked(counts: Counter[str]) -> list[tuple[str, int]]:
    """The most frequent first, equally frequent ones by name."""
    return sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))


# What a field says of every predicted sample: for slices, fairness and clusters.
#
# `dataset`, `task`, `split`, `language`, `modality` and `group` come from the predictions and the taxonomy. Any other
# name, and `group` where no prediction has one, is a field of the atlas' rows, read from the atlas that the run
# recorded or the one that is given. Refused: a field that no row has, and rows of another fingerprint than the run's.


PUBLISHED_FIELDS = ("class_label", "modality_signature", "answer", "problem")
PREDICTED = ("dataset", "task", "split", "language", "modality", "group")


def field_values(
    field: str, predictions: Sequence[Prediction], taxonomy: Taxonomy, *, run: Run, atlas: Path | None = None
) -> list[str | None]:
    """The value of `field` for every prediction as text, None where a row does not have it.

    `task` is the benchmark's task key (EMO). Raises InputError when no row has the field, naming those that there are.
    """
    if field in PREDICTED:
        of_dataset = field in ("task", "language")
        said: list[str | None] = [getattr(taxonomy.dataset(p.dataset) if of_dataset else p, field) for p in predictions]
        if any(said):
            return said
        if field != "group":  # where the taxonomy tells none, it is a field like any other
            fix = "Predict again with this version, or name a field of the rows."
            raise InputError(f"no prediction says its {field}", where=str(run.folder), fix=fix)
    place = atlas or (run.asked.get("data") or {}).get("path")
    if not place:
        fix = "Say with --atlas where the rows are."
        what = f"the run does not record the atlas that has the field {field!r}"
        raise InputError(what, where=str(run.root / ASKED), fix=fix)
    opened = run.rows(place)
    wanted, found, names = {p.id for p in predictions}, {}, set(PREDICTED)
    for key, row, extra in opened.said():
        if key in wanted:
            fields = {**extra, **{name: getattr(row, name) for name in PUBLISHED_FIELDS}}
            names |= fields.keys()
            found[key] = None if fields.get(field) in (None, "") else str(fields[field])
    values = [found.get(p.id) for p in predictions]
    if not any(value is not None for value in values):
        raise InputError(f"no row has the field {field!r}", where=str(place), fix=nearest(field, sorted(names)))
    return values


# Do probabilities mean what they say? Expected calibration error and the bins of a reliability plot.
#
# Of every prediction that has probabilities: confidence is the probability of the label that was given, right whether
# it is the target. ECE = sum over bins of n_bin / n |accuracy - confidence|, over 15 bins of equal width (Guo et al.
# 2017). It is too high where rows are few, so that n stands beside it. Brier score and log loss are those of the whole
# distribution. A prediction without probabilities is left out, never taken for certain.


NUM_BINS = 15
_SMALLEST = 1e-12  # a probability of 0 for the truth would make the log loss of a run infinite


def calibration(predictions: Sequence[Prediction]) -> dict[str, Any] | None:
    """{"all": ..., "datasets": {key: ...}} with n, ece, brier, log_loss, accuracy, confidence and, for all, the bins.

    A bin is {low, high, n, confidence, accuracy}; empty bins are left out. None when no prediction has probabilities.
    """
    told = [p for p in predictions if p.probs and p.label in p.probs]
    if not told:
        return None
    rows_4N = np.array([_outcome(p, p.probs or {}) for p in told]).T.copy()
    codes = np.array([p.dataset for p in told], dtype=object)
    datasets = {key: _figures(rows_4N[:, codes == key]) for key in sorted(set(codes.tolist()))}
    return {"all": _figures(rows_4N) | {"bins": _bins(rows_4N)}, "datasets": datasets}


def _outcome(p: Prediction, probs: Mapping[str, float]) -> tuple[float, bool, float, float]:
    """Confidence, whether it is right, Brier score and log loss of one prediction."""
    brier = sum((share - (label == p.truth)) ** 2 for label, share in probs.items()) + (p.truth not in probs)
    return probs[str(p.label)], p.label == p.truth, brier, -math.log(max(probs.get(p.truth, 0.0), _SMALLEST))


def _figures(rows_4N: Floats) -> dict[str, Any]:
    total = rows_4N.shape[1]
    confidence, accuracy, brier, log_loss = (float(column_N.mean()) for column_N in rows_4N)
    ece = sum(each["n"] / total * abs(each["accuracy"] - each["confidence"]) for each in _bins(rows_4N))
    found = {"n": total, "ece": ece, "brier": brier, "log_loss": log_loss}
    return found | {"accuracy": accuracy, "confidence": confidence}


def _bins(rows_4N: Floats) -> list[dict[str, Any]]:
    """Bins (low, high] of equal width; 0 belongs to the first."""
    confidence_N, right_N, *_ = rows_4N
    numbers_N = np.clip(np.ceil(confidence_N * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    found = []
    for number in np.unique(numbers_N).tolist():
        inside_N = numbers_N == number
        found.append(
            {
                "low": number / NUM_BINS,
                "high": (number + 1) / NUM_BINS,
                "n": int(inside_N.sum()),
                "confidence": float(confidence_N[inside_N].mean()),
                "accuracy": float(right_N[inside_N].mean()),
            }
        )
    return found


# --- the score of a run -----------------------------------------------------------------------------------------------


JUDGED_NOTE = "not scored (needs a judge)"
EMPTY_NOTE = "not scored: no row with a defined score"
AUTO_CLUSTERS, NO_CLUSTERS = "auto", "none"
SHOWN_FAILURES = 5
PUBLISHED_READING = "published"


@dataclass(frozen=True, kw_only=True)
class Missing:
    """Rows without a prediction, by dataset ("" where a quarantine does not name it), and how many were asked for."""

    quarantined: Counter[str]
    skipped: Counter[str]
    asked: Mapping[str, int]
    total: int | None
    other_rows: bool


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
    with what `taxonomy.yaml` of the folder adds. `by` names fields to break scores down by, `cluster` the one whose
    equal values make rows one group (auto, none, or a field); they are read from the rows of `atlas`, by default the
    run's. Verdicts of judgements.jsonl are used.
    Raises InputError naming file, line and field for bad input, StorageError for a full disk.
    """
    opened = open_run(run, taxonomy)
    predictions = opened.predictions
    skipped: Counter[str] = Counter(opened.asked.get("skipped") or {})
    if not predictions:
        rows = plural(skipped.total(), "row", "is|are")
        what = f"{rows} of heads that were not trained" if skipped else "the file is empty"
        fix = "Run `hba predict` on rows that the model can answer."
        if opened.unlabelled:
            what = f"no row has an answer to compare with ({plural(len(opened.unlabelled), 'row')})"
            fix = "Their predictions are in answers.csv; write 'answer' in the rows to score them."
        raise InputError(f"no prediction to score: {what}", where=str(opened.predictions_path), fix=fix)
    metrics = _scored(
        predictions,
        opened.taxonomy,
        cluster,
        by,
        read=partial(field_values, predictions=predictions, taxonomy=opened.taxonomy, run=opened, atlas=atlas),
        verdicts=opened.verdicts,
        unanswered=_unanswered(opened, None if quarantine is None else Path(quarantine), skipped, atlas),
        how={"resamples": resamples, "seed": seed, "published": published},
    )
    unlabelled = dict(sorted(Counter(p.dataset for p in opened.unlabelled).items()))
    metrics = replace(metrics, aggregate=replace(metrics.aggregate, unlabelled=unlabelled))
    said = _provenance(opened, metrics.provenance)
    metrics = replace(metrics, provenance=replace(said, **(provenance or {})))
    write_json(opened.folder / FILE, metrics.record())
    return metrics


def _scored(
    predictions: Sequence[Prediction],
    taxonomy: Taxonomy,
    cluster: str,
    by: Sequence[str],
    *,
    read: Callable[[str], Sequence[str | None]],
    verdicts: Verdicts,
    unanswered: Missing,
    how: dict[str, Any],
) -> Metrics:
    """Scores, intervals, chance levels, breakdowns, calibration; the provenance says no more than `how`.

    `read` gives the values of a row field, `verdicts` are those of a judge on the free-form rows, by id.
    """
    published: bool = how["published"]
    rows = rows_of(predictions, taxonomy)
    found = score_rows(rows, published)
    if verdicts:
        rows = judged_rows(rows, predictions, verdicts)
        add_judged(found, predictions, verdicts, taxonomy, published=published)
    clusters = _clusters(predictions, cluster, read)
    free_form = [p for p in predictions if taxonomy.dataset(p.dataset).free_form]
    said = ([getattr(p, name) for p in free_form] for name in ("spoken", "target", "dataset", "task"))
    errors = Counter(p.error for p in predictions if p.failed and p.error)
    levels = chance(rows, seed=how["seed"], published=published).datasets
    levels |= majority_levels([p.truth for p in free_form], [p.dataset for p in free_form])
    datasets = _datasets(predictions, found["datasets"], levels, units_of(rows, clusters), unanswered)
    tasks = _tasks(taxonomy, found["tasks"], datasets)
    scored = {key: task for key, task in tasks.items() if task.score is not None}
    intervals = bootstrap(rows, clusters=clusters, tasks=scored.keys(), **how)
    slices = {
        name: breakdown(rows, values, clusters=clusters, failed=[p.failed for p in predictions], **how)
        for name, values in _slices(predictions, by, taxonomy, read).items()
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
        breakdowns=slices,
        calibration=convert(calibration(predictions), Calibration | None, "calibration"),  # type: ignore[arg-type]
        unmapped=convert(unmapped(predictions, taxonomy), dict[str, Unmapped], "unmapped"),
        free_form=generation_metrics(*said) if free_form else None,
        failures=tuple(Failure(error=error, n=n) for error, n in _ranked(errors)[:SHOWN_FAILURES]),
        readings=_readings(predictions, scored, mean, taxonomy, published=published),
        rules=dict(Counter(p.rule for p in predictions if p.rule is not None).most_common()),
        figures={key: value for key, value in found["aggregate"].items() if key not in ("mean", "n", "n_invalid")},
    )
    return Metrics(
        tasks={key: replace(task, ci95=intervals.tasks.get(key)) for key, task in tasks.items()},
        datasets=datasets,
        aggregate=aggregate,
        provenance=Provenance(scoring=Scoring(level=LEVEL, clusters=_described(clusters, cluster, datasets), **how)),
    )


def rows_of(predictions: Sequence[Prediction], taxonomy: Taxonomy = BUILTIN) -> Rows:
    """Predictions as the cells that scores, intervals and comparisons are made of; no label, or no answer, is wrong."""
    answers = [p.spoken if taxonomy.dataset(p.dataset).free_form else p.label for p in predictions]
    return encode(answers, [p.truth for p in predictions], [p.dataset for p in predictions], taxonomy)


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
    rows = encode(strict, [p.truth for p in labelled], [p.dataset for p in labelled], taxonomy)
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
    unanswered: Missing,
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
    return f"not scored: {'all' if failed == rows else f'{failed:,} of'} {plural(rows, 'row')} failed"


def _unscored_note(task: Task, counted: Counts) -> str:
    if counted.n_missing and not counted.n:
        return f"not scored: none of {plural(counted.n_asked or 0, 'row')} was answered"
    if counted.n_skipped and not counted.n:
        return f"not scored ({plural(counted.n_skipped, 'row')} that the model is not trained to answer)"
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


def _unanswered(run: Run, quarantine: Path | None, skipped: Counter[str], atlas: Path | None) -> Missing:
    """What predict.json and quarantine.jsonl say of the rows that have no prediction."""
    left_out = _asked_for(run, run.left_out(quarantine), atlas)
    return Missing(
        quarantined=Counter(entry.dataset or "" for entry in left_out),
        skipped=skipped,
        asked=run.asked.get("asked") or {},
        total=run.num_asked,
        other_rows=run.other_rows,
    )


def left_out_of(run: Run, atlas: Path | None = None) -> list[LeftOut]:
    """What a run left out of the rows that it was to predict."""
    return _asked_for(run, run.left_out(), atlas)


def _asked_for(run: Run, entries: list[LeftOut], atlas: Path | None) -> list[LeftOut]:
    """Those of `entries` that were to be predicted: a training in the same folder meets other rows of the split.

    The atlas says which they are. Where it cannot be opened, no dataset has more left out than it has rows unanswered.
    """
    if not entries or run.config is None or "data" not in run.asked:
        return entries
    place = atlas or Path(str(run.asked["data"].get("path")))
    if place.is_dir():
        try:
            ids = {sample.id for sample in run.rows(place)}
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
    predictions: Sequence[Prediction], cluster: str, read: Callable[[str], Sequence[str | None]]
) -> Sequence[str | None] | None:
    """The group of each row, None when rows are drawn alone."""
    if cluster == NO_CLUSTERS:
        return None
    if cluster == AUTO_CLUSTERS:
        groups: Sequence[str | None] = [p.group for p in predictions]
        return groups if any(groups) else None
    return read(cluster)


def _described(
    clusters: Sequence[str | None] | None, cluster: str, datasets: Mapping[str, DatasetScore]
) -> ClusterSummary | None:
    """What rows were drawn together by; `few` names datasets whose interval rests on fewer than SCANT groups."""
    if clusters is None:
        return None
    return ClusterSummary(
        field="group" if cluster == AUTO_CLUSTERS else cluster,
        groups=len({group for group in clusters if group is not None}),
        rows=sum(group is not None for group in clusters),
        few=tuple(sorted(key for key, entry in datasets.items() if entry.scant)),
    )


def _slices(
    predictions: Sequence[Prediction],
    by: Sequence[str],
    taxonomy: Taxonomy,
    read: Callable[[str], Sequence[str | None]],
) -> dict[str, Sequence[str | None]]:
    """The values of modality and language where there is more than one, and of every field that was asked for."""
    found: dict[str, Sequence[str | None]] = {
        "modality": [p.modality for p in predictions],
        "language": [taxonomy.dataset(p.dataset).language for p in predictions],
    }
    found = {name: values for name, values in found.items() if len(set(values)) > 1}
    return found | {field: read(field) for field in by}


# --------------------------------------------------------------------------------------------------------- provenance


def _provenance(run: Run, how: Provenance) -> Provenance:
    """`how` the figures were computed, with what the run's records say of model, backend, seed and data."""
    model = run.asked.get("model")
    return replace(
        how,
        hba_version=hba_version(),
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
