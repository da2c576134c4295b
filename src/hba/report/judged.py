"""The judge's verdicts of a run as a page shows them: what was asked for, what was said, what the judge made of it.

Unjudged answers come first, then wrong and right ones, every dataset in turn; the choice depends on the files alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hba.evaluate.judge.judgements import Judgement
from hba.evaluate.predictions import Prediction
from hba.report.samples import spread

NUM_EACH = 8
VERDICTS: dict[bool | None, str] = {None: "unjudged", False: "incorrect", True: "correct"}


@dataclass(frozen=True, kw_only=True)
class JudgedAnswer:
    """One row of the page's table. `said` is the judge's reason, or why there is no verdict."""

    prediction: Prediction
    verdict: str
    said: str


@dataclass(frozen=True, kw_only=True)
class JudgedAnswers:
    """The table, and how many judgements of each verdict the run has."""

    rows: tuple[JudgedAnswer, ...]
    counts: Mapping[str, int]


def judged_answers(
    predictions: Sequence[Prediction], judgements: Mapping[str, Judgement], num_each: int = NUM_EACH
) -> JudgedAnswers:
    """At most `num_each` answers of each verdict."""
    rows, counts = [], {}
    for correct, verdict in VERDICTS.items():
        found = [p for p in predictions if p.id in judgements and judgements[p.id].correct is correct]
        counts[verdict] = len(found)
        for p in spread(sorted(found, key=lambda p: p.id), num_each):
            said = judgements[p.id].reason or judgements[p.id].error or ""
            rows.append(JudgedAnswer(prediction=p, verdict=verdict, said=said))
    return JudgedAnswers(rows=tuple(rows), counts=counts)
