"""The counts of a run while it goes on, for whoever shows them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from hba.evaluate.predictions import Prediction
from hba.evaluate.results import Counts
from hba.remote.cost import Meter


@dataclass(kw_only=True)
class Tally:
    """What a run has done so far. Tokens and `fresh` count this session alone, everything else the whole run."""

    total: int
    done: int = 0  # predictions and quarantined samples
    failed: int = 0
    reasons: Counter[str] = field(default_factory=Counter)  # why samples failed
    invalid: int = 0  # answers of labelled rows that mean no label
    quarantined: int = 0
    unanswered: Counter[str] = field(default_factory=Counter)  # rows that the service left open, by the reason
    finish: Counter[str] = field(default_factory=Counter)  # how answers ended
    fresh: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    meter: Meter | None = None

    def add(self, prediction: Prediction, *, labelled: bool, fresh: bool) -> None:
        """Count a prediction; `fresh` says that it was made in this session, `labelled` that a label was asked for."""
        self.done += 1
        self.failed += prediction.failed
        self.reasons.update([prediction.error] if prediction.failed and prediction.error is not None else [])
        self.finish.update([prediction.finish] if prediction.finish else [])
        self.invalid += labelled and prediction.label is None and not prediction.failed
        if fresh:
            self.fresh += 1
            self.tokens_in += prediction.tokens_in or 0
            self.tokens_out += prediction.tokens_out or 0

    @property
    def endings(self) -> Counts:
        """How answers ended, to be counted as in metrics.json."""
        return Counts(finish=self.finish)

    def quarantine(self) -> None:
        """Count a sample that was left out."""
        self.done += 1
        self.quarantined += 1
        self.fresh += 1
