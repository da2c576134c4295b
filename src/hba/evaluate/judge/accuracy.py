"""Judge accuracy: the share of a dataset's answers that the judge found correct.

Every row counts: an empty or failed answer is wrong without a judge, and a row without a verdict is unknown. One
unknown row leaves the dataset without a score; what is known then are bounds, all unknown ones wrong or all right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

METRIC = "llm_judge_accuracy"
Verdict = bool | None


def judge_accuracy(verdicts: Sequence[Verdict], *, published: bool = False) -> float | None:
    """Share of True in [0, 1]; None if a verdict is missing, or if there is none at all.

    `published=True` leaves rows without a verdict out of numerator and denominator, as the released script does.
    """
    known = [verdict for verdict in verdicts if verdict is not None]
    if not known or (len(known) < len(verdicts) and not published):
        return None
    return sum(known) / len(known)


def bounds(verdicts: Sequence[Verdict]) -> tuple[float, float] | None:
    """The accuracy if every missing verdict were False, and if every one were True; None without rows."""
    if not verdicts:
        return None
    right, unknown = sum(v is True for v in verdicts), sum(v is None for v in verdicts)
    return right / len(verdicts), (right + unknown) / len(verdicts)


def by_dataset(verdicts: Mapping[str, Sequence[Verdict]]) -> dict[str, dict[str, Any]]:
    """Per dataset: the accuracy, its bounds if verdicts are missing, and the counts n_judged and n_unjudged."""
    found: dict[str, dict[str, Any]] = {}
    for key, values in verdicts.items():
        unknown = sum(value is None for value in values)
        found[key] = {METRIC: judge_accuracy(values), "n_judged": len(values) - unknown, "n_unjudged": unknown}
        if unknown:
            found[key][f"{METRIC}_bounds"] = list(bounds(values) or ())
    return found


def resampled(
    right_M: Sequence[bool], groups: Sequence[str | None], *, resamples: int, rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Accuracy in each of `resamples` bootstrap draws [R]; rows that share a group (not None) are drawn together."""
    numbers: dict[object, int] = {}
    keys = [(i, None) if group is None else group for i, group in enumerate(groups)]
    of_row = np.array([numbers.setdefault(key, len(numbers)) for key in keys])
    size_G = np.bincount(of_row).astype(float)
    right_G = np.bincount(of_row, weights=np.asarray(right_M, float))
    # Groups that are alike are one type, so that a draw is a multinomial over few types.
    types_T2, frequency_T = np.unique(np.stack([right_G, size_G], 1), axis=0, return_counts=True)
    draws_RT = rng.multinomial(len(numbers), frequency_T / len(numbers), size=resamples)
    right_R, rows_R = (draws_RT @ types_T2).T
    shares: npt.NDArray[np.float64] = right_R / rows_R
    return shares
