"""Parity of judge accuracy with the released script, and where the default differs on purpose."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hba.evaluate.judge.scores import judge_accuracy

GOLDEN = json.loads((Path(__file__).with_name("data") / "extras" / "judge_accuracy.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("dataset", GOLDEN["expected"]["accuracy"])
@pytest.mark.parametrize("published", [True, False])
def test_accuracy_per_dataset(dataset: str, published: bool) -> None:
    verdicts = [row["graded_result"] for row in GOLDEN["inputs"]["graded"] if row["dataset"] == dataset]
    expected = GOLDEN["expected"]["accuracy"][dataset]
    assert judge_accuracy(verdicts, published=published) == pytest.approx(expected, abs=1e-12)


def test_a_missing_verdict_leaves_no_score_and_the_released_script_drops_the_row() -> None:
    assert judge_accuracy([True, None, False]) is None
    assert judge_accuracy([True, None, False], published=True) == 0.5
    assert judge_accuracy([None], published=True) is None
