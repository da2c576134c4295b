"""What could not be mapped: answers to labelled rows that mean no label, by dataset, with the most frequent of them.

Such an answer counts as wrong. A synonym that the taxonomy lacks shows here, and so does a model that never answers in
the form it was asked for; neither should pass for a model that errs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from hba.evaluate.predictions import Prediction
from hba.taxonomy import BUILTIN, Taxonomy

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
            said.setdefault(prediction.dataset, Counter())[_shortened(prediction.answer or "")] += 1
    return {key: _entry(answers, rows[key]) for key, answers in sorted(said.items())}


def _entry(answers: Counter[str], rows: int) -> dict[str, Any]:
    ranked = sorted(answers.items(), key=lambda entry: (-entry[1], entry[0]))[:SHOWN]
    total = answers.total()
    return {"n": total, "share": total / rows, "answers": [{"answer": text, "n": count} for text, count in ranked]}


def _shortened(answer: str) -> str:
    line = " ".join(answer.split())
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"
