"""`hba score`: predictions.jsonl and quarantine.jsonl of a run become its metrics.json.

Every prediction counts. An answer that could not be mapped is wrong (n_invalid); a sample that failed without
an output is wrong (n_failed); a quarantined sample, whose medium could not be read, is left out and counted
(n_quarantined), and so is a row whose head was not trained (n_skipped). A task whose answers need a judge has score
null until judgements.jsonl of the folder has a verdict on each of them, never a default verdict.

Refused: a missing or malformed file, and a run without a single row to score. metrics.json is written whole
or not at all. Invariant: the same predictions in any order and the same seed give the same file apart from
`created_at`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hba.errors import InputError
from hba.evaluate.calibration import calibration
from hba.evaluate.confusion import Rows, encode
from hba.evaluate.fields import field_values
from hba.evaluate.freeform import generation_metrics, majority_levels
from hba.evaluate.judge.scores import Verdicts, add_judged, judge_record, judged_rows, read_verdicts
from hba.evaluate.metrics import mean_of, score_rows
from hba.evaluate.predictions import Prediction, read_predictions
from hba.evaluate.provenance import provenance_of, run_record
from hba.evaluate.slices import breakdown
from hba.evaluate.stats import LEVEL, Chance, Intervals, bootstrap, chance
from hba.evaluate.unmapped import unmapped
from hba.storage import read_jsonl, write_json
from hba.taxonomy import BUILTIN, Taxonomy, of_folder

JUDGED_NOTE = "not scored (needs a judge)"
SKIPPED_NOTE = "not scored ({n_skipped} rows that the model is not trained to answer)"
EMPTY_NOTE = "not scored: no row with a defined score"
COUNTS = ("n", "n_invalid", "n_failed", "n_quarantined", "n_skipped")
AUTO_CLUSTERS, NO_CLUSTERS = "auto", "none"
FEW_GROUPS = 10


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """How a run is scored. `cluster` names the field whose equal values make rows one group: auto, none, or a field."""

    resamples: int = 2000
    seed: int = 0
    published: bool = False
    cluster: str = AUTO_CLUSTERS
    by: tuple[str, ...] = ()


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
) -> dict[str, Any]:
    """Score a run folder, or one predictions file, write metrics.json beside the predictions and return it.

    `quarantine` defaults to quarantine.jsonl of the same folder if it exists. `provenance` overrides what
    predict.json and environment.json of the folder say. Labels are those of `taxonomy`, by default the published one
    with what `taxonomy.yaml` of the folder adds. `by` names fields to break scores down by; they and `cluster` (see
    ScoreOptions) are read from the rows of `atlas`, by default the run's. Verdicts of judgements.jsonl are used.
    Raises InputError naming file, line and field for bad input, StorageError for a full disk.
    """
    path = _predictions_path(Path(run))
    options = ScoreOptions(resamples=resamples, seed=seed, published=published, cluster=cluster, by=tuple(by))
    folder = path.parent
    taxonomy = taxonomy or of_folder(folder)
    predictions = read_predictions(path, taxonomy)
    skipped: Counter[str] = Counter(run_record(folder / "predict.json").get("skipped") or {})
    if not predictions:
        what = f"all {skipped.total():,} rows are of heads that were not trained" if skipped else "the file is empty"
        fix = "Run `hba predict` on rows that the model can answer."
        raise InputError(f"no prediction to score: {what}", where=str(path), fix=fix)
    left_out = Path(quarantine) if quarantine is not None else folder / "quarantine.jsonl"
    quarantined = _quarantine(left_out, quarantine is not None, predictions, taxonomy)
    read = partial(field_values, predictions=predictions, taxonomy=taxonomy, folder=folder, atlas=atlas)
    verdicts = read_verdicts(folder, predictions, taxonomy)
    metrics = score_predictions(predictions, options=options, taxonomy=taxonomy, read=read, verdicts=verdicts)
    _add_counts(metrics, Counter(p.dataset for p in predictions if p.failed), quarantined, skipped, taxonomy)
    metrics["aggregate"]["unmapped"] = unmapped(predictions, taxonomy)
    how = {"scoring": metrics.pop("scoring")} | ({"judge": judge_record(folder)} if verdicts else {})
    metrics["provenance"] = provenance_of(folder, predictions, provenance or {}) | how
    write_json(folder / "metrics.json", metrics)
    return metrics


def score_predictions(
    predictions: Sequence[Prediction],
    *,
    options: ScoreOptions | None = None,
    taxonomy: Taxonomy = BUILTIN,
    read: Callable[[str], Sequence[str | None]] | None = None,
    verdicts: Verdicts | None = None,
) -> dict[str, Any]:
    """metrics.json of `predictions` without provenance and quarantine; "scoring" says how it was made.

    Scores, intervals, chance levels, breakdowns, calibration. `read` gives the values of a row field; without it only
    what the predictions themselves say is used. `verdicts` are those of a judge on the free-form rows, by id.
    """
    options = options or ScoreOptions()
    rows = rows_of(predictions, taxonomy)
    metrics = score_rows(rows, options.published)
    if verdicts:
        rows = judged_rows(rows, predictions, verdicts)
        add_judged(metrics, predictions, verdicts, taxonomy, published=options.published)
    clusters = _clusters(predictions, options.cluster, read)
    how: dict[str, Any] = {"resamples": options.resamples, "seed": options.seed, "published": options.published}
    intervals = bootstrap(rows, clusters=clusters, **how)
    _add_statistics(metrics, intervals, chance(rows, seed=options.seed, published=options.published))
    _add_free_form(metrics, [p for p in predictions if taxonomy.dataset(p.dataset).free_form])
    slices = _slices(predictions, options.by, taxonomy, read)
    metrics["aggregate"] |= {
        "breakdowns": {name: breakdown(rows, values, clusters=clusters, **how) for name, values in slices.items()},
        "calibration": calibration(predictions),
    }
    metrics["scoring"] = how | {"level": LEVEL, "clusters": _described(predictions, clusters, options.cluster)}
    return metrics


def _clusters(
    predictions: Sequence[Prediction], cluster: str, read: Callable[[str], Sequence[str | None]] | None
) -> Sequence[str | None] | None:
    """The group of each row, None when rows are drawn alone."""
    if cluster == NO_CLUSTERS:
        return None
    if cluster == AUTO_CLUSTERS or read is None:
        groups: Sequence[str | None] = [p.group for p in predictions]
        return groups if any(groups) else None
    return read(cluster)


def _described(
    predictions: Sequence[Prediction], clusters: Sequence[str | None] | None, cluster: str
) -> dict[str, Any] | None:
    """What rows were drawn together by; `few` names datasets whose interval rests on fewer than FEW_GROUPS groups."""
    if clusters is None:
        return None
    drawn: dict[str, set[str]] = {}
    for number, (prediction, group) in enumerate(zip(predictions, clusters, strict=True)):
        drawn.setdefault(prediction.dataset, set()).add(str(number) if group is None else f"group {group}")
    return {
        "field": "group" if cluster == AUTO_CLUSTERS else cluster,
        "groups": len({group for group in clusters if group is not None}),
        "rows": sum(group is not None for group in clusters),
        "few": sorted(key for key, groups in drawn.items() if len(groups) < FEW_GROUPS),
    }


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


def rows_of(predictions: Sequence[Prediction], taxonomy: Taxonomy = BUILTIN) -> Rows:
    """Predictions as the cells that scores, intervals and comparisons are made of."""
    answers = [_scored_answer(p, taxonomy) for p in predictions]
    return encode(answers, [p.target for p in predictions], [p.dataset for p in predictions], taxonomy)


def _predictions_path(run: Path) -> Path:
    return run / "predictions.jsonl" if run.is_dir() else run


def _scored_answer(prediction: Prediction, taxonomy: Taxonomy) -> str | None:
    """The label of a classification row, the answer of a free-form one; None counts as wrong."""
    if not taxonomy.dataset(prediction.dataset).free_form:
        return prediction.label
    return prediction.answer if (prediction.answer or "").strip() else None


def _quarantine(path: Path, required: bool, predictions: Sequence[Prediction], taxonomy: Taxonomy) -> Counter[str]:
    """Quarantined samples per dataset, "" for a dataset that the line does not name.

    Training may have written to the same file: only samples of the predicted splits count. A sample that has a
    prediction is no longer in quarantine.
    """
    found: dict[str, str] = {}
    if not required and not path.is_file():
        return Counter()
    predicted, splits = {p.id for p in predictions}, {p.split for p in predictions}
    for number, record in read_jsonl(path):
        sample, dataset, split = record.get("id"), record.get("dataset", ""), record.get("split")
        if not isinstance(sample, str):
            fix = "Write the id of the sample that was left out."
            raise InputError(f"expected str, found {sample!r}", where=f"{path}:{number}, id", fix=fix)
        if dataset and dataset not in taxonomy.datasets:
            where = f"{path}:{number}, dataset"
            raise InputError(f"unknown dataset {dataset!r}", where=where, fix="Use a dataset of the taxonomy.")
        if sample not in predicted and (split is None or split in splits):
            found[sample] = dataset
    return Counter(found.values())


def _add_statistics(metrics: dict[str, Any], intervals: Intervals, level: Chance) -> None:
    for key, task in metrics["tasks"].items():
        task["ci95"], task["chance"] = _as_list(intervals.tasks.get(key)), level.tasks.get(key)
    for key, entry in metrics["datasets"].items():
        entry["chance"] = level.datasets.get(key)
    metrics["aggregate"]["mean"] |= {"ci95": _as_list(intervals.mean), "chance": level.mean}


def _add_free_form(metrics: dict[str, Any], predictions: Sequence[Prediction]) -> None:
    """What free-form rows say without a judge: exact match beside its majority level, and the released accuracies."""
    if not predictions:
        return
    columns = {name: [getattr(p, name) for p in predictions] for name in ("answer", "target", "dataset", "task")}
    for key, level in majority_levels(columns["target"], columns["dataset"]).items():
        metrics["datasets"][key]["chance"] = level
    scored = [task for task in metrics["tasks"].values() if task["score"] is not None]
    for task in scored:
        if task["chance"] is None:
            task["chance"] = mean_of([metrics["datasets"][key]["chance"] for key in task["datasets"]])
    metrics["aggregate"]["mean"]["chance"] = mean_of([task["chance"] for task in scored])
    said = [answer if (answer or "").strip() else None for answer in columns["answer"]]
    metrics["aggregate"]["free_form"] = generation_metrics(said, columns["target"], columns["dataset"], columns["task"])


def _as_list(interval: Iterable[float] | None) -> list[float] | None:
    return None if interval is None else list(interval)


def _add_counts(
    metrics: dict[str, Any],
    failed: Counter[str],
    quarantined: Counter[str],
    skipped: Counter[str],
    taxonomy: Taxonomy,
) -> None:
    """Add what could not be scored, per dataset, task and in all, and the tasks that have no score."""
    datasets = metrics["datasets"]
    for key in filter(None, [*quarantined, *skipped]):
        datasets.setdefault(key, {"n": 0, "n_invalid": 0, "chance": None})
    for key, entry in datasets.items():
        entry |= {"n_failed": failed[key], "n_quarantined": quarantined[key], "n_skipped": skipped[key]}
        entry["n_invalid"] -= failed[key]  # a failed sample gave no answer that could be invalid
        entry["invalid_share"] = entry["n_invalid"] / entry["n"] if entry["n"] else None
    tasks = {}
    for task in taxonomy.tasks.values():
        keys = [key for key in task.datasets if key in datasets]
        if keys:
            nothing = {"score": None, "metric": task.metric, "ci95": None, "chance": None, "datasets": keys}
            entry = tasks[task.key] = metrics["tasks"].get(task.key, nothing) | {"datasets": keys}
            entry |= {
                name: sum(datasets[key][name] for key in keys)
                for name in COUNTS
            }
            if entry["score"] is None:
                skips = entry["n_skipped"] and not entry["n"]
                note = SKIPPED_NOTE.format(**entry) if skips else JUDGED_NOTE if task.judged else EMPTY_NOTE
                entry.setdefault("note", note)
    metrics["tasks"] = tasks
    aggregate = metrics["aggregate"]
    for name in COUNTS:
        aggregate[name] = sum(entry[name] for entry in datasets.values())
    aggregate["n_quarantined"] += quarantined[""]
    aggregate["n_quarantined_unassigned"] = quarantined[""]
