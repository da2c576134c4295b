"""Metrics of rows with several labels, from counts of distinct (true set, predicted set) pairs.

As elsewhere the classes are those present in the ground truth, and a prediction that could not be read is wrong: it is
the empty set, and never an exact match. Per dataset: macro F1 (mean over the labels present), micro F1 (all labels),
example F1 (mean over rows of 2 |T and P| / (|T| + |P|), 1 if both are empty), subset accuracy (the sets are equal),
Hamming loss, and the F1 of every label present. Shape suffixes: T pairs, L labels, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hba.labelsets import split

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
