"""Do probabilities mean what they say? Expected calibration error and the bins of a reliability plot.

Of every prediction that has probabilities: confidence is the probability of the label that was given, right whether it
is the target. ECE = sum over bins of n_bin / n |accuracy - confidence|, over 15 bins of equal width (Guo et al. 2017).
It is too high where rows are few, so that n stands beside it. Brier score and log loss are those of the whole
distribution. A prediction without probabilities is left out, never taken for certain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hba.evaluate.confusion import Floats
from hba.evaluate.predictions import Prediction

NUM_BINS = 15
_SMALLEST = 1e-12  # a probability of 0 for the truth would make the log loss of a run infinite


class _Rows(NamedTuple):
    confidence_N: Floats
    right_N: Floats
    brier_N: Floats
    log_loss_N: Floats


def calibration(predictions: Sequence[Prediction]) -> dict[str, Any] | None:
    """{"all": ..., "datasets": {key: ...}} with n, ece, brier, log_loss, accuracy, confidence and, for all, the bins.

    A bin is {low, high, n, confidence, accuracy}; empty bins are left out. None when no prediction has probabilities.
    """
    told = [p for p in predictions if p.probs and p.label in p.probs]
    if not told:
        return None
    rows = _rows(told)
    codes = np.array([p.dataset for p in told], dtype=object)
    datasets = {key: _figures(_Rows(*(column[codes == key] for column in rows))) for key in sorted(set(codes.tolist()))}
    return {"all": _figures(rows) | {"bins": _bins(rows)}, "datasets": datasets}


def _rows(told: Sequence[Prediction]) -> _Rows:
    def column(values: Sequence[float]) -> Floats:
        return np.array(values, dtype=float)

    probs = [p.probs or {} for p in told]
    targets = [p.target for p in told]
    return _Rows(
        column([of[str(p.label)] for of, p in zip(probs, told, strict=True)]),
        column([p.label == p.target for p in told]),
        column([_brier(of, target) for of, target in zip(probs, targets, strict=True)]),
        column([-math.log(max(of.get(t, 0.0), _SMALLEST)) for of, t in zip(probs, targets, strict=True)]),
    )


def _brier(probs: Mapping[str, float], target: str) -> float:
    return sum((p - (label == target)) ** 2 for label, p in probs.items()) + (target not in probs)


def _figures(rows: _Rows) -> dict[str, Any]:
    bins = _bins(rows)
    total = len(rows.confidence_N)
    return {
        "n": total,
        "ece": sum(each["n"] / total * abs(each["accuracy"] - each["confidence"]) for each in bins),
        "brier": float(rows.brier_N.mean()),
        "log_loss": float(rows.log_loss_N.mean()),
        "accuracy": float(rows.right_N.mean()),
        "confidence": float(rows.confidence_N.mean()),
    }


def _bins(rows: _Rows) -> list[dict[str, Any]]:
    """Bins (low, high] of equal width; 0 belongs to the first."""
    numbers_N = np.clip(np.ceil(rows.confidence_N * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    found = []
    for number in np.unique(numbers_N).tolist():
        inside_N = numbers_N == number
        found.append(
            {
                "low": number / NUM_BINS,
                "high": (number + 1) / NUM_BINS,
                "n": int(inside_N.sum()),
                "confidence": float(rows.confidence_N[inside_N].mean()),
                "accuracy": float(rows.right_N[inside_N].mean()),
            }
        )
    return found
