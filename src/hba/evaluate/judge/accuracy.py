"""Judge accuracy: the share of a dataset's answers that the judge found correct.

Every row counts: an empty or failed answer is wrong without a judge, and a row without a verdict is unknown. One
unknown row leaves the dataset without a score; what is known then are bounds, all unknown ones wrong or all right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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


def by_dataset(verdicts: Mapping[str, Sequence[Verdict]], *, published: bool = False) -> dict[str, dict[str, Any]]:
    """Per dataset: the accuracy, its bounds if verdicts are missing, and the counts n_judged and n_unjudged."""
    found: dict[str, dict[str, Any]] = {}
    for key, values in verdicts.items():
        unknown = sum(value is None for value in values)
        found[key] = {METRIC: judge_accuracy(values, published=published)}
        found[key] |= {"n_judged": len(values) - unknown, "n_unjudged": unknown}
        if unknown:
            found[key][f"{METRIC}_bounds"] = list(bounds(values) or ())
    return found
