"""`hba score`: predictions.jsonl and quarantine.jsonl of a run become its metrics.json.

Every prediction counts. An answer that could not be mapped is wrong (n_invalid); a sample that failed without
an output is wrong (n_failed); a quarantined sample, whose medium could not be read, is left out and counted
(n_quarantined). A task whose answers need a judge has score null, never a default verdict.

Refused: a missing or malformed file, and a run without a single row to score. metrics.json is written whole
or not at all. Invariant: the same predictions in any order and the same seed give the same file apart from
`created_at`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hba import __version__
from hba.errors import InputError
from hba.evaluate.confusion import Rows, encode
from hba.evaluate.freeform import generation_metrics, majority_levels
from hba.evaluate.metrics import score_rows
from hba.evaluate.predictions import Prediction, read_predictions
from hba.evaluate.stats import LEVEL, Chance, Intervals, bootstrap, chance
from hba.storage import json_sha256, read_json, read_jsonl, write_json
from hba.taxonomy import BUILTIN, Taxonomy, of_folder

JUDGED_NOTE = "not scored: free-form answers need a judge"
EMPTY_NOTE = "not scored: no row with a defined score"
PROVENANCE_KEYS = ("hba_version", "data_fingerprint", "split", "model", "seed", "created_at", "synthetic")


def score_run(
    run: str | Path,
    *,
    quarantine: str | Path | None = None,
    provenance: Mapping[str, Any] | None = None,
    resamples: int = 2000,
    seed: int = 0,
    published: bool = False,
    taxonomy: Taxonomy | None = None,
) -> dict[str, Any]:
    """Score a run folder, or one predictions file, write metrics.json beside the predictions and return it.

    `quarantine` defaults to quarantine.jsonl of the same folder if it exists. `provenance` overrides what
    predict.json and environment.json of the folder say. Intervals are 95 % bootstrap percentiles over `resamples`
    draws, clustered where predictions carry a `group`. Labels are those of `taxonomy`, by default the published one
    with what `taxonomy.yaml` of the folder adds.
    Raises InputError naming file, line and field for bad input, StorageError for a full disk.
    """
    path = _predictions_path(Path(run))
    folder = path.parent
    taxonomy = taxonomy or of_folder(folder)
    predictions = read_predictions(path, taxonomy)
    if not predictions:
        fix = "Run `hba predict` on a split that has rows."
        raise InputError("no prediction to score: the file is empty", where=str(path), fix=fix)
    left_out = Path(quarantine) if quarantine is not None else folder / "quarantine.jsonl"
    quarantined = _quarantine(left_out, quarantine is not None, predictions, taxonomy)
    metrics = score_predictions(predictions, resamples=resamples, seed=seed, published=published, taxonomy=taxonomy)
    _add_counts(metrics, Counter(p.dataset for p in predictions if p.failed), quarantined, taxonomy)
    how = {"resamples": resamples, "seed": seed, "published": published, "level": LEVEL}
    metrics["provenance"] = _provenance(folder, predictions, provenance or {}) | {"scoring": how}
    write_json(folder / "metrics.json", metrics)
    return metrics


def score_predictions(
    predictions: Sequence[Prediction],
    *,
    resamples: int = 2000,
    seed: int = 0,
    published: bool = False,
    taxonomy: Taxonomy = BUILTIN,
) -> dict[str, Any]:
    """metrics.json of `predictions` without provenance and quarantine: scores, intervals, chance levels."""
    rows = rows_of(predictions, taxonomy)
    metrics = score_rows(rows, published)
    groups = [p.group for p in predictions]
    clusters = groups if any(groups) else None
    intervals = bootstrap(rows, clusters=clusters, resamples=resamples, seed=seed, published=published)
    _add_statistics(metrics, intervals, chance(rows, seed=seed, published=published))
    _add_free_form(metrics, [p for p in predictions if taxonomy.dataset(p.dataset).domain is None])
    return metrics


def rows_of(predictions: Sequence[Prediction], taxonomy: Taxonomy = BUILTIN) -> Rows:
    """Predictions as the cells that scores, intervals and comparisons are made of."""
    answers = [_scored_answer(p, taxonomy) for p in predictions]
    return encode(answers, [p.target for p in predictions], [p.dataset for p in predictions], taxonomy)


def _predictions_path(run: Path) -> Path:
    return run / "predictions.jsonl" if run.is_dir() else run


def _scored_answer(prediction: Prediction, taxonomy: Taxonomy) -> str | None:
    """The label of a classification row, the answer of a free-form one; None counts as wrong."""
    if taxonomy.dataset(prediction.dataset).domain is not None:
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
    said = [answer if (answer or "").strip() else None for answer in columns["answer"]]
    metrics["aggregate"]["free_form"] = generation_metrics(said, columns["target"], columns["dataset"], columns["task"])


def _as_list(interval: Iterable[float] | None) -> list[float] | None:
    return None if interval is None else list(interval)


def _add_counts(metrics: dict[str, Any], failed: Counter[str], quarantined: Counter[str], taxonomy: Taxonomy) -> None:
    """Add what could not be scored, per dataset, task and in all, and the tasks that have no score."""
    datasets = metrics["datasets"]
    for key in filter(None, quarantined):
        datasets.setdefault(key, {"n": 0, "n_invalid": 0, "chance": None})
    for key, entry in datasets.items():
        entry["n_failed"], entry["n_quarantined"] = failed[key], quarantined[key]
        entry["n_invalid"] -= failed[key]  # a failed sample gave no answer that could be invalid
    tasks = {}
    for task in taxonomy.tasks.values():
        keys = [key for key in task.datasets if key in datasets]
        if keys:
            nothing = {"score": None, "metric": task.metric, "ci95": None, "chance": None, "datasets": keys}
            entry = tasks[task.key] = metrics["tasks"].get(task.key, nothing) | {"datasets": keys}
            entry |= {
                name: sum(datasets[key][name] for key in keys)
                for name in ("n", "n_invalid", "n_failed", "n_quarantined")
            }
            if entry["score"] is None:
                entry["note"] = JUDGED_NOTE if task.judged else EMPTY_NOTE
    metrics["tasks"] = tasks
    aggregate = metrics["aggregate"]
    for name in ("n", "n_invalid", "n_failed", "n_quarantined"):
        aggregate[name] = sum(entry[name] for entry in datasets.values())
    aggregate["n_quarantined"] += quarantined[""]
    aggregate["n_quarantined_unassigned"] = quarantined[""]


def _fingerprint(predictions: Sequence[Prediction]) -> str:
    """Hash of what was scored, whatever the order of the lines and the time they took."""
    return json_sha256(sorted((p.id, p.dataset, p.target, str(p.label), str(p.answer)) for p in predictions))


def run_facts(folder: Path) -> dict[str, Any]:
    """What predict.json and environment.json of a run folder say of model, backend, seed and data; None if unknown.

    Raises InputError for a malformed file.
    """
    environment, predict = (_facts(folder / name) for name in ("environment.json", "predict.json"))
    data = predict.get("data") or environment.get("data") or {}
    model = predict.get("model")
    return {
        "data_fingerprint": data.get("fingerprint"),
        # A local model by its folder's name: where a run lies must not change its metrics.json.
        "model": Path(model).name if isinstance(model, str) and Path(model).is_dir() else model,
        "backend": predict.get("backend"),
        "seed": environment.get("seed"),
        "synthetic": data.get("synthetic"),
    }


def _provenance(folder: Path, predictions: Sequence[Prediction], given: Mapping[str, Any]) -> dict[str, Any]:
    """What is known about the run; the keys of the contract are always there, null if unknown."""
    found = {
        "hba_version": __version__,
        "split": "+".join(sorted({p.split for p in predictions})),
        "created_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "answers_sha256": _fingerprint(predictions),
    }
    return dict.fromkeys(PROVENANCE_KEYS) | run_facts(folder) | found | dict(given)


def _facts(path: Path) -> dict[str, Any]:
    """environment.json or predict.json of the run, empty without one."""
    facts = read_json(path) if path.is_file() else {}
    if not isinstance(facts, dict) or not isinstance(facts.get("data") or {}, dict):
        raise InputError("expected an object with an object `data`", where=str(path), fix="Restore or remove the file.")
    return facts
