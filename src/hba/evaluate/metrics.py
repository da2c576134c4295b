"""Published metrics from confusion counts, vectorised over any leading axes (datasets or bootstrap resamples).

Per dataset the classes are those present in the ground truth. precision, recall, F1 per class; macro,
support-weighted and micro averages; a prediction outside the classes is wrong. Emotion adds the weighted
accuracy 0.5 (TP/P + TN/N) per class and its mean; sentiment adds accuracy and weighted F1 at 7, 5, 3 and 2
points. A task's score is the mean of its datasets' scores in the task's one metric. Names are those of the
released scripts.

Default and `published=True` differ in two places. Micro averages: each wrong answer costs a false positive,
so that they equal the accuracy; released, a class absent from the ground truth and an invalid answer cost
none, which inflates precision and F1. Weighted accuracy of a dataset with one class only: N is 0 and TN/N
says nothing, so it is TP/P alone; released, it is capped at 0.5. A score that is not defined is None, never 0
(released: 0). Shape suffixes as in `confusion`: D datasets, C classes, P = C + 1 predictions, K classes of
one domain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hba.errors import TaxonomyError, nearest
from hba.evaluate.confusion import (
    NO_ANSWER,
    RIGHT,
    Floats,
    Ints,
    Layout,
    Rows,
    encode,
    encode_indices,
    pooled_confusion,
)
from hba.evaluate.multilabel import METRIC as MULTILABEL
from hba.metric_fit import SENTIMENT
from hba.taxonomy import BUILTIN, Taxonomy

EMOTION = "emotion"
WEIGHTED_ACCURACY = "mean_weighted_accuracy"
# Group of each of the seven points, highly negative to highly positive; None: left out of the ground truth.
SENTIMENT_GROUPS: Mapping[int, tuple[int | None, ...]] = {
    7: (0, 1, 2, 3, 4, 5, 6),
    5: (0, 1, 1, 2, 3, 3, 4),
    3: (0, 0, 0, 1, 2, 2, 2),
    2: (0, 0, 0, None, 1, 1, 1),
}
PRIMARY_NAMES = {
    "binary_weighted_f1": "F1w2",
    WEIGHTED_ACCURACY: "emotion_weighted_accuracy_mean",
    "weighted_f1": "weighted_f1",
    MULTILABEL: "macro_f1",
}


class OneVsRest(NamedTuple):
    """Counts of each class against all others, each [..., C]: right (TP), support (P), predicted (TP + FP)."""

    right: Ints
    support: Ints
    predicted: Ints


def one_vs_rest(confusion: Ints) -> OneVsRest:
    """Counts from a confusion [..., C, C + 1] (target, prediction; the last column is invalid)."""
    classes = confusion.shape[-2]
    right = np.diagonal(confusion[..., :classes], axis1=-2, axis2=-1)
    return OneVsRest(right, confusion.sum(-1), confusion[..., :classes].sum(-2))


def _ratio(numerator: Any, denominator: Any, empty: float = 0.0) -> Floats:
    """numerator / denominator, `empty` where the denominator is 0."""
    top, bottom = np.broadcast_arrays(np.asarray(numerator, float), np.asarray(denominator, float))
    quotient: Floats = np.divide(top, bottom, out=np.full(top.shape, empty), where=bottom != 0)
    return quotient


def weighted_f1(confusion: Ints) -> Floats:
    """Support-weighted F1, [...], in [0, 1]; NaN without rows. F1 = 2 TP / (P + predicted)."""
    right, support, predicted = one_vs_rest(confusion)
    f1 = _ratio(2 * right, support + predicted)
    return _ratio((f1 * support).sum(-1), support.sum(-1), np.nan)


def accuracy(confusion: Ints) -> Floats:
    """Share of right rows, [...], in [0, 1]; NaN without rows."""
    return _ratio(one_vs_rest(confusion).right.sum(-1), confusion.sum((-1, -2)), np.nan)


def emotion_weighted_accuracy(confusion: Ints, published: bool = False) -> Floats:
    """0.5 (TP/P + TN/N) per class, [..., C]; NaN for a class without support. With N = 0: TP/P (published:
    0.5 TP/P).
    """
    right, support, predicted = one_vs_rest(confusion)
    others = support.sum(-1, keepdims=True) - support
    recall = _ratio(right, support, np.nan)
    rejection = _ratio(others - (predicted - right), others)
    both = 0.5 * (recall + rejection)
    return both if published else np.where(others > 0, both, recall)


def mean_weighted_accuracy(confusion: Ints, published: bool = False) -> Floats:
    """Mean of `emotion_weighted_accuracy` over the classes present, [...]; NaN without rows."""
    values = emotion_weighted_accuracy(confusion, published)
    present = ~np.isnan(values)
    return _ratio(np.where(present, values, 0.0).sum(-1), present.sum(-1), np.nan)


def sentiment_points(confusion: Ints, points: int) -> Ints:
    """The 7-point confusion [..., 7, 8] at 7, 5, 3 or 2 points, [..., points, points + 1].

    At 2 points, rows whose target is neutral are left out and a neutral prediction counts as invalid, hence
    wrong.
    """
    groups = SENTIMENT_GROUPS[points]
    of_target = np.zeros((points, 7), dtype=np.int64)
    of_prediction = np.zeros((8, points + 1), dtype=np.int64)
    of_prediction[7, points] = 1
    for position, group in enumerate(groups):
        of_prediction[position, points if group is None else group] = 1
        if group is not None:
            of_target[group, position] = 1
    return of_target @ confusion @ of_prediction


def binary_weighted_f1(confusion: Ints) -> Floats:
    """Weighted F1 at 2 points from the 7-point confusion, [...]; NaN if every target is neutral."""
    return weighted_f1(sentiment_points(confusion, 2))


def primary(metric: str, published: bool = False) -> Callable[[Ints], Floats]:
    """The function [..., K, K + 1] -> [...] of a task's metric. TaxonomyError for a metric without one."""
    functions: dict[str, Callable[[Ints], Floats]] = {
        "binary_weighted_f1": lambda x: np.nan_to_num(binary_weighted_f1(x)) if published else binary_weighted_f1(x),
        WEIGHTED_ACCURACY: lambda x: mean_weighted_accuracy(x, published),
        "weighted_f1": weighted_f1,
    }
    if metric not in functions:
        raise TaxonomyError(f"no confusion metric {metric!r}", fix=nearest(metric, functions))
    return functions[metric]


def averages(confusion: Ints, published: bool = False) -> dict[str, float | None]:
    """The twelve published averages {macro,weighted,micro}_{precision,recall,f1,accuracy} of one confusion [C, P]."""
    right, support, predicted = one_vs_rest(confusion)
    present = support > 0
    per_class = {
        "precision": _ratio(right, predicted),
        "recall": _ratio(right, support),
        "f1": _ratio(2 * right, support + predicted),
    }
    per_class["accuracy"] = per_class["recall"]
    hits, rows = right.sum(), support.sum()
    claimed = predicted[present].sum() if published else rows
    micro = {
        "precision": _ratio(hits, claimed),
        "recall": _ratio(hits, rows),
        "f1": _ratio(2 * hits, rows + claimed),
    }
    micro["accuracy"] = micro["recall"]
    result = {f"macro_{name}": _ratio((x * present).sum(), present.sum()) for name, x in per_class.items()}
    result |= {f"weighted_{name}": _ratio((x * support).sum(), rows) for name, x in per_class.items()}
    result |= {f"micro_{name}": x for name, x in micro.items()}
    return {name: float(value) if rows else None for name, value in result.items()}


def class_report(confusion: Ints) -> list[dict[str, float]]:
    """Per class of one confusion [C, P]: precision, recall, f1, tp, fp, fn, count; 0 where undefined."""
    right, support, predicted = one_vs_rest(confusion)
    columns = {
        "precision": _ratio(right, predicted), "recall": _ratio(right, support),
        "f1": _ratio(2 * right, support + predicted),
        "tp": right, "fp": predicted - right, "fn": support - right, "count": support,
    }  # fmt: skip
    return [{name: values[i].item() for name, values in columns.items()} for i in range(len(right))]


def local_confusion(layout: Layout, code: int, confusion_CP: Ints) -> Ints:
    """The confusion [K, K + 1] of dataset `code` in its own domain; the last column holds every other prediction."""
    indices = layout.indices[code]
    rows = confusion_CP[indices]
    inside = rows[:, indices]
    return np.concatenate([inside, rows.sum(-1, keepdims=True) - inside.sum(-1, keepdims=True)], axis=-1)


def _dataset_metrics(layout: Layout, code: int, confusion_CP: Ints, published: bool) -> dict[str, Any]:
    local = local_confusion(layout, code, confusion_CP)
    taxonomy, key = layout.taxonomy, layout.classified[code]
    domain, task = taxonomy.domains[layout.domain(key)], taxonomy.dataset(key).task
    result: dict[str, Any] = {"n": int(local.sum()), "n_invalid": int(local[:, -1].sum())}
    result |= averages(confusion_CP, published)
    right, support, predicted = one_vs_rest(local)
    f1 = _ratio(2 * right, support + predicted)
    present = [(i, label) for i, label in enumerate(domain.labels) if support[i]]
    result |= {f"{label}/class_f1": float(f1[i]) for i, label in present}
    if domain.name == EMOTION or (task and taxonomy.tasks[task].metric == WEIGHTED_ACCURACY):
        values = emotion_weighted_accuracy(local, published)
        result["emotion_weighted_accuracy_mean"] = _known(mean_weighted_accuracy(local, published))
        result |= {f"{label}/emotion_weighted_accuracy": float(values[i]) for i, label in present}
    if domain.name == SENTIMENT:
        for points in SENTIMENT_GROUPS:
            grouped = sentiment_points(local, points)
            result[f"ACC{points}"] = _known(accuracy(grouped), published)
            result[f"F1w{points}"] = _known(weighted_f1(grouped), published)
    return result


def _known(value: Any, published: bool = False) -> float | None:
    """A float, or None for NaN (published: 0.0)."""
    return float(value) if not np.isnan(value) else (0.0 if published else None)


def freeform_metrics(counts_3: Ints) -> dict[str, Any]:
    """Of one free-form dataset [wrong, right, none]: exact_match by `answers.plain`, n, n_invalid (no answer)."""
    total = int(counts_3.sum())
    return {"n": total, "n_invalid": int(counts_3[NO_ANSWER]), "exact_match": int(counts_3[RIGHT]) / total}


def score_rows(rows: Rows, published: bool = False) -> dict[str, Any]:
    """`score` of rows that are already encoded."""
    layout, confusion = rows.layout, rows.confusion()
    datasets = {
        layout.classified[code]: _dataset_metrics(layout, code, confusion[code], published)
        for code in rows.scored_codes()
    }
    for key in rows.multilabel_keys():
        _, cells_M, table = rows.multilabel(key)
        datasets[key] = table.metrics(np.bincount(cells_M, minlength=len(table.equal_T)))
    tasks = task_scores(layout.taxonomy, datasets)
    aggregate: dict[str, Any] = dict(averages(confusion.sum(0), published))
    aggregate["mean"] = {"score": mean_of([task["score"] for task in tasks.values()])}
    counts_Q3 = rows.counts()[layout.freeform_start : layout.size].reshape(-1, 3)
    datasets |= {key: freeform_metrics(c) for key, c in zip(layout.freeform, counts_Q3, strict=True) if c.any()}
    aggregate |= {name: sum(entry[name] for entry in datasets.values()) for name in ("n", "n_invalid")}
    return {"tasks": tasks, "datasets": datasets, "aggregate": aggregate}


def task_scores(taxonomy: Taxonomy, datasets: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """{task: {score, metric, n, datasets}} for every task with rows that needs no judge; score None if undefined."""
    tasks = {}
    for task in taxonomy.tasks.values():
        keys = [key for key in task.datasets if key in datasets]
        if keys and not task.judged:
            if task.metric != MULTILABEL:
                primary(task.metric)
            values = [datasets[key][PRIMARY_NAMES[task.metric]] for key in keys]
            rows = sum(datasets[key]["n"] for key in keys)
            tasks[task.key] = {"score": mean_of(values), "metric": task.metric, "n": rows, "datasets": keys}
    return tasks


def mean_of(values: Sequence[float | None]) -> float | None:
    """Mean of the values that are known; None if none is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def score(
    predictions: Sequence[str | None],
    targets: Sequence[str],
    datasets: Sequence[str],
    published: bool = False,
    taxonomy: Taxonomy = BUILTIN,
) -> dict[str, Any]:
    """metrics.json of N rows, {"tasks", "datasets", "aggregate"}, without the tasks that need a judge.

    `predictions` are labels (raw or canonical, read within the row's dataset), None for an invalid answer;
    for a free-form dataset they are answers, of which only `exact_match` is reported. Scores lie in [0, 1];
    `aggregate` pools the classification rows, its "mean" {"score"} is over the task scores. Raises InputError
    for unequal lengths and TaxonomyError for an unknown dataset or a target outside its domain, naming the
    index.
    """
    return score_rows(encode(predictions, targets, datasets, taxonomy), published)


def score_indices(
    predictions: Sequence[int],
    targets: Sequence[int],
    datasets: Sequence[str] | None,
    published: bool = False,
    taxonomy: Taxonomy = BUILTIN,
) -> dict[str, Any]:
    """`score` of global class indices; a prediction outside 0..C-1, such as -1, is invalid. Raises as `score` does.

    With `datasets=None` only the aggregate is given, with the twelve averages and no mean over tasks.
    """
    if datasets is None:
        pooled = averages(pooled_confusion(predictions, targets, taxonomy), published)
        return {"tasks": {}, "datasets": {}, "aggregate": pooled}
    return score_rows(encode_indices(predictions, targets, datasets, taxonomy), published)
