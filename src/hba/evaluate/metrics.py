"""Published metrics from confusion counts, vectorised over any leading axes (datasets or bootstrap resamples).

How scores are computed; every field of metrics.json, where they are written, stands in `hba.evaluate.results`.

Per dataset the classes are those present in the ground truth. precision, recall, F1 per class; macro,
support-weighted and micro averages; a prediction outside the classes is wrong. Emotion adds the weighted
accuracy 0.5 (TP/P + TN/N) per class and its mean; sentiment adds accuracy and weighted F1 at 7, 5, 3 and 2
points. A task's score is the mean of its datasets' scores in the task's one metric. Names are those of the
released scripts.

Default and `published=True` differ in two places. Micro averages: each wrong answer costs a false positive,
so that they equal the accuracy; released, a class absent from the ground truth and an invalid answer cost
none, which inflates precision and F1. Weighted accuracy of a dataset with one class only: N is 0 and TN/N
says nothing, so it is TP/P alone; released, it is capped at 0.5. A score that is not defined is None, never 0
(released: 0). Shape suffixes as below: D datasets, C classes, P = C + 1 predictions, K classes of
one domain.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hba.errors import InputError, TaxonomyError, nearest
from hba.taxonomy import BUILTIN, SENTIMENT, Taxonomy, split

# Metrics of rows with several labels, from counts of distinct (true set, predicted set) pairs.
#
# As elsewhere the classes are those present in the ground truth, and a prediction that could not be read is wrong: it
# is the empty set, and never an exact match. Per dataset: macro F1 (mean over the labels present), micro F1 (all
# labels), example F1 (mean over rows of 2 |T and P| / (|T| + |P|), 1 if both are empty), subset accuracy (the sets are
# equal), Hamming loss, and the F1 of every label present. Shape suffixes: T pairs, L labels, R resamples.


Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
METRIC = "multilabel_macro_f1"


class Pair(NamedTuple):
    """A true and a predicted label set in canonical spelling; `predicted` is None for an invalid answer."""

    dataset: str
    true: str
    predicted: str | None


class Table:
    """The pairs of one dataset as indicator matrices."""

    def __init__(self, pairs: Sequence[Pair], labels: Sequence[str]) -> None:
        self.labels = tuple(labels)
        self.true_TL = _indicators([pair.true for pair in pairs], labels)
        self.guess_TL = _indicators([pair.predicted for pair in pairs], labels)
        self.equal_T = np.array([pair.true == pair.predicted for pair in pairs], dtype=bool)
        self.invalid_T = np.array([pair.predicted is None for pair in pairs], dtype=bool)

    def macro_f1(self, counts: Ints) -> Floats:
        """Macro F1 [...] of counts [..., T]; NaN where no row has a label."""
        f1, support = self._f1(counts)
        present = support > 0
        total: Floats = np.where(present, f1, 0.0).sum(-1)
        number = present.sum(-1)
        mean: Floats = np.divide(total, number, out=np.full(total.shape, np.nan), where=number > 0)
        return mean

    def _f1(self, counts: Ints) -> tuple[Floats, Ints]:
        """F1 and support of every label, each [..., L]."""
        both = counts @ (self.true_TL & self.guess_TL).astype(np.int64)
        support, claimed = counts @ self.true_TL.astype(np.int64), counts @ self.guess_TL.astype(np.int64)
        bottom = support + claimed
        return np.divide(2.0 * both, bottom, out=np.zeros(bottom.shape), where=bottom > 0), support

    def blind(self, counts_T: Ints) -> float:
        """The chance level of macro F1: the best constant set among those that are true somewhere and the set of all
        labels, or sets drawn from the true ones at random (at their expected counts)."""
        support_L = counts_T @ self.true_TL
        claimed_SL = np.concatenate([self.true_TL, np.ones((1, len(self.labels)), dtype=bool)])
        total = counts_T.sum()
        present = support_L > 0
        if not present.any():
            return float("nan")
        constant = [2 * support_L * row / np.maximum(support_L + total * row, 1) for row in claimed_SL]
        random = support_L / max(total, 1)  # F1 of independent draws: precision = recall = prevalence
        return max(float(f1[present].mean()) for f1 in (*constant, random))

    def metrics(self, counts_T: Ints) -> dict[str, Any]:
        """Every figure of one dataset."""
        rows = int(counts_T.sum())
        f1_L, support_L = self._f1(counts_T)
        both_T = (self.true_TL & self.guess_TL).sum(-1)
        sizes_T = self.true_TL.sum(-1) + self.guess_TL.sum(-1)
        example_T = np.where(self.invalid_T, 0.0, np.where(sizes_T > 0, 2 * both_T / np.maximum(sizes_T, 1), 1.0))
        hits, named = int(counts_T @ both_T), int(counts_T @ sizes_T)
        macro = self.macro_f1(counts_T)
        figures: dict[str, Any] = {
            "n": rows,
            "n_invalid": int(counts_T @ self.invalid_T),
            "macro_f1": None if np.isnan(macro) else float(macro),
            "micro_f1": 2 * hits / named if named else None,
            "example_f1": float(counts_T @ example_T) / rows,
            "subset_accuracy": int(counts_T @ self.equal_T) / rows,
            "hamming_loss": (named - 2 * hits) / (rows * len(self.labels)),
        }
        return figures | {f"{label}/class_f1": float(f1_L[i]) for i, label in enumerate(self.labels) if support_L[i]}


def _indicators(sets: Sequence[str | None], labels: Sequence[str]) -> npt.NDArray[np.bool_]:
    found = np.zeros((len(sets), len(labels)), dtype=bool)
    position = {label: i for i, label in enumerate(labels)}
    for row, said in enumerate(sets):
        for label in split(said) if said is not None else ():
            found[row, position[label]] = True
    return found


# Rows to confusion counts: every scored row becomes one integer, and one `bincount` gives every count there is.
#
# A row of a classification dataset becomes the cell (dataset, target, prediction) in the global class space,
# where one more prediction column holds invalid answers. A row of a free-form dataset becomes (dataset, wrong |
# right | none). Scores, intervals, chance levels and paired comparisons are all functions of these cells.
#
# Refused: lengths that differ (InputError), an unknown dataset or a target outside its dataset's domain
# (TaxonomyError naming the index). Never refused: a prediction. None, an unknown word or a class of another
# domain is a wrong answer.
#
# Shape suffixes: N rows, D classification datasets, C global classes, P = C + 1 predictions, K classes of one
# domain.


_WORDS = "Datasets and targets are str, predictions str or None."
WRONG, RIGHT, NO_ANSWER = 0, 1, 2


class Layout:
    """Where each dataset's cells lie for one taxonomy. Immutable."""

    def __init__(self, taxonomy: Taxonomy) -> None:
        self.taxonomy = taxonomy
        self.num_classes = taxonomy.num_classes
        datasets = taxonomy.datasets.values()
        self.classified = tuple(d.key for d in datasets if d.domain is not None)
        self.freeform = tuple(d.key for d in datasets if d.free_form)
        self.multilabel = frozenset(d.key for d in datasets if d.multilabel)
        self.block = self.num_classes * (self.num_classes + 1)
        self.freeform_start = len(self.classified) * self.block
        self.size = self.freeform_start + 3 * len(self.freeform)
        self.code = {key: i for i, key in enumerate(self.classified)}
        self.freeform_code = {key: i for i, key in enumerate(self.freeform)}
        names = taxonomy.class_names
        self.unambiguous = {name: i for i, name in enumerate(names) if names.count(name) == 1}
        self.indices = tuple(np.array(taxonomy.domains[self.domain(key)].indices) for key in self.classified)

    def domain(self, key: str) -> str:
        """The domain of a classification dataset."""
        return str(self.taxonomy.dataset(key).domain)

    def to_local(self, code: int) -> Ints:
        """Map a global prediction, [C + 1], to its position in the domain of dataset `code`; K for any other."""
        indices = self.indices[code]
        local = np.full(self.num_classes + 1, len(indices), dtype=np.int64)
        local[indices] = np.arange(len(indices))
        return local


@lru_cache(maxsize=8)
def layout_of(taxonomy: Taxonomy) -> Layout:
    """The layout of a taxonomy, made once."""
    return Layout(taxonomy)


class _CellTable(dict[tuple[str, str, "str | None"], int]):
    """(dataset, target, prediction) -> cell; a triple is resolved when it is first met."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.pairs: dict[Pair, int] = {}

    def __missing__(self, row: tuple[str, str, str | None]) -> int:
        dataset, target, prediction = row
        if not isinstance(target, str) or not (prediction is None or isinstance(prediction, str)):
            found = f"target {target!r} ({type(target).__name__}), prediction {prediction!r}"
            raise InputError(f"{found} ({type(prediction).__name__})", fix=_WORDS)
        layout = self.layout
        freeform = layout.freeform_code.get(dataset)
        if freeform is not None:  # not kept: free-form answers rarely repeat
            from hba.evaluate.answers import same_answer  # no rule of reading is compiled where all have labels

            said = NO_ANSWER if prediction is None else RIGHT if same_answer(prediction, target) else WRONG
            return layout.freeform_start + 3 * freeform + said
        if dataset in layout.multilabel:
            guessed = None if prediction is None else layout.taxonomy.canonical_label(dataset, prediction)
            pair = Pair(dataset, layout.taxonomy.require_label(dataset, target), guessed)
            cell = self[row] = layout.size + self.pairs.setdefault(pair, len(self.pairs))
            return cell
        truth = layout.taxonomy.global_index(dataset, target)
        guess = self._guess(dataset, prediction)
        cell = (layout.code[dataset] * layout.num_classes + truth) * (layout.num_classes + 1) + guess
        self[row] = cell
        return cell

    def _guess(self, dataset: str, prediction: str | None) -> int:
        invalid = self.layout.num_classes
        if prediction is None:
            return invalid
        label = self.layout.taxonomy.canonical_label(dataset, prediction)
        if label is not None:
            return self.layout.taxonomy.global_index(dataset, label)
        return self.layout.unambiguous.get(" ".join(prediction.lower().split()), invalid)


def _first_refused(triples: Iterable[Any], table: _CellTable) -> int:
    """Index of the row at which encoding stopped."""
    for index, row in enumerate(triples):
        try:
            table[row]
        except (TypeError, InputError):
            return index
    raise AssertionError("encoding stopped at a row that can be encoded")


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Scored rows as cells. `cells` [N] are int64: in [0, layout.size), or layout.size plus the number of a pair in
    `pairs` for a row of a multilabel dataset.

    `judged` names the free-form datasets whose cells say what a judge found, not whether the answer matched.
    """

    layout: Layout
    cells: Ints
    judged: frozenset[str] = frozenset()
    pairs: tuple[Pair, ...] = ()

    def counts(self) -> Ints:
        """How many rows lie in each cell, [layout.size + pairs]."""
        return np.bincount(self.cells, minlength=self.layout.size + len(self.pairs))

    def confusion(self) -> Ints:
        """Counts [D, C, P] of the classification datasets in the order of `layout.classified`."""
        c = self.layout.num_classes
        return self.counts()[: self.layout.freeform_start].reshape(-1, c, c + 1)

    def members(self, code: int) -> Ints:
        """Positions of the rows of classification dataset `code`."""
        return np.flatnonzero(self.cells // self.layout.block == code)

    def multilabel(self, key: str) -> tuple[Ints, Ints, Table]:
        """Of a multilabel dataset: positions of its rows [M], their cells [M] in its table of pairs, the table.

        The table is sorted, so that what is drawn from it does not depend on the order of the rows.
        """
        mine = [number for number, pair in enumerate(self.pairs) if pair.dataset == key]
        mine.sort(key=lambda number: (self.pairs[number].true, self.pairs[number].predicted or ""))
        cells_M = np.full(len(self.pairs), -1, dtype=np.int64)
        cells_M[mine] = np.arange(len(mine))
        rows_M = np.flatnonzero(self.cells >= self.layout.size)
        local_M = cells_M[self.cells[rows_M] - self.layout.size]
        table = Table([self.pairs[number] for number in mine], self.layout.taxonomy.dataset(key).labels)
        return rows_M[local_M >= 0], local_M[local_M >= 0], table

    def multilabel_keys(self) -> list[str]:
        """Multilabel datasets that have rows."""
        present = {
            self.pairs[cell].dataset
            for cell in np.unique(self.cells[self.cells >= self.layout.size] - self.layout.size).tolist()
        }
        return [key for key in self.layout.taxonomy.datasets if key in present]

    def local_cells(self, code: int, rows_M: Ints) -> Ints:
        """target * (K + 1) + prediction within the dataset's domain, for the given rows of dataset `code`."""
        local = self.layout.to_local(code)
        target_M, prediction_M = np.divmod(self.cells[rows_M] % self.layout.block, self.layout.num_classes + 1)
        return local[target_M] * (len(self.layout.indices[code]) + 1) + local[prediction_M]

    def right(self) -> npt.NDArray[np.bool_]:
        """Whether each row is right, [N]: the true label, or for a free-form row the right answer."""
        start, size = self.layout.freeform_start, self.layout.size
        truth_N, guess_N = np.divmod(self.cells % self.layout.block, self.layout.num_classes + 1)
        equal_T = np.array([pair.true == pair.predicted for pair in self.pairs] or [False])
        right: npt.NDArray[np.bool_] = np.select(
            [self.cells < start, self.cells < size],
            [truth_N == guess_N, (self.cells - start) % 3 == RIGHT],
            equal_T[np.maximum(self.cells - size, 0).clip(max=len(equal_T) - 1)],
        )
        return right

    def scored_codes(self) -> list[int]:
        """Classification datasets that have rows."""
        present = np.unique(self.cells[self.cells < self.layout.freeform_start] // self.layout.block)
        return [int(code) for code in present]


def encode(
    predictions: Sequence[str | None],
    targets: Sequence[str],
    datasets: Sequence[str],
    taxonomy: Taxonomy = BUILTIN,
) -> Rows:
    """Turn labels (free-form: answers) into cells. All three have N items.

    A prediction is read within its dataset's domain; a word that is a class of exactly one other domain keeps
    that class (wrong, and a false positive of that class in the aggregate), everything else is invalid.
    Raises InputError for unequal lengths or wrong types, TaxonomyError for a target outside its domain or an
    unknown dataset; both name the index.
    """
    check_lengths(predictions=predictions, targets=targets, datasets=datasets)
    layout = layout_of(taxonomy)
    table = _CellTable(layout)
    triples = zip(datasets, targets, predictions, strict=True)
    try:
        cells = np.fromiter(map(table.__getitem__, triples), np.int64, len(targets))
        return Rows(layout=layout, cells=cells, pairs=tuple(table.pairs))
    except TypeError as error:  # a list or dict, which no table can look up
        problem = InputError(f"not a word ({error})", fix=_WORDS)
    except InputError as error:
        problem = error
    index = _first_refused(zip(datasets, targets, predictions, strict=True), table)
    raise type(problem)(problem.what, where=f"index {index}", fix=problem.fix)


def check_lengths(**sequences: Sequence[Any]) -> None:
    """Raise InputError naming the lengths unless all are equal."""
    lengths = {name: len(items) for name, items in sequences.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} {count}" for name, count in lengths.items())
        raise InputError(f"lengths differ: {found}", fix="Give one item per row.")


# --- the published metrics --------------------------------------------------------------------------------------------


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
    METRIC: "macro_f1",
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
            if task.metric != METRIC:
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


# Free-form answers without a judge: exact match, and the accuracies of the released generation evaluation.
#
# Neither is the task score of the benchmark, which is the share that a judge finds right and stays unscored until one
# has spoken. Exact match compares answers as `answers.plain` leaves them; no answer is a wrong one. Invariant: every
# rate is a share of all rows, whatever could be read of them.


def generation_metrics(
    answers: Sequence[str | None], targets: Sequence[str], datasets: Sequence[str], tasks: Sequence[str]
) -> dict[str, float]:
    """The generation evaluation of the released SFT trainer, under its names (without the split in front).

    overall_accuracy and total_samples over all rows, {dataset}/accuracy and {dataset}/count, macro_accuracy (mean over
    datasets), task/{task}/accuracy by the row's own `task`. All four have N items; without rows there is only
    total_samples. Raises InputError for lengths that differ.
    """
    from hba.evaluate.answers import same_answer

    check_lengths(answers=answers, targets=targets, datasets=datasets, tasks=tasks)
    pairs = zip(answers, targets, strict=True)
    right = [answer is not None and same_answer(answer, target) for answer, target in pairs]
    if not right:
        return {"total_samples": 0}
    by_dataset, by_task = _shares(datasets, right), _shares(tasks, right)
    counts = Counter(datasets)
    found = {"overall_accuracy": sum(right) / len(right), "total_samples": float(len(right))}
    for key, share in by_dataset.items():
        found |= {f"{key}/accuracy": share, f"{key}/count": float(counts[key])}
    found["macro_accuracy"] = sum(by_dataset.values()) / len(by_dataset)
    return found | {f"task/{key}/accuracy": share for key, share in by_task.items()}


def majority_levels(targets: Sequence[str], datasets: Sequence[str]) -> dict[str, float]:
    """Per dataset the exact match of the best constant answer: the share of its most frequent target, in [0, 1]."""
    from hba.evaluate.answers import plain

    answers: dict[str, Counter[str]] = {}
    for key, target in zip(datasets, targets, strict=True):
        answers.setdefault(key, Counter())[plain(target)] += 1
    return {key: max(counts.values()) / counts.total() for key, counts in answers.items()}


def _shares(keys: Sequence[str], right: Sequence[bool]) -> dict[str, float]:
    rows, hits = Counter(keys), Counter(key for key, hit in zip(keys, right, strict=True) if hit)
    return {key: hits[key] / rows[key] for key in sorted(rows)}
