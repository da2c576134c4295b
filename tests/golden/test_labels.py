"""Parity of the way from raw answers to the 25 global classes with the released label-map builder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hba.errors import TaxonomyError
from hba.evaluate.answers import to_label
from hba.taxonomy import BUILTIN, DATASETS, DOMAINS, NUM_CLASSES, canonical_label, global_index

DATA = Path(__file__).with_name("data") / "label_map"
RESOLVE = json.loads((DATA / "resolve.json").read_text(encoding="utf-8"))
PAIRS = list(zip(RESOLVE["inputs"]["pairs"], RESOLVE["expected"]["results"], strict=True))
BUILD = json.loads((DATA / "build.json").read_text(encoding="utf-8"))
# The builder raises on these; both are plain spellings of a label.
ACCEPTED_HERE = {
    ("mosei_senti", "weakly  positive"): "weakly positive",
    ("urfunny", "not humor"): "not humour",
}


@pytest.mark.parametrize(("pair", "expected"), PAIRS, ids=lambda value: str(value)[:60])
def test_raw_answer_to_label_and_index(pair: dict[str, str], expected: dict[str, Any]) -> None:
    dataset, answer = pair["dataset"], pair["answer"]
    if dataset not in DATASETS:
        with pytest.raises(TaxonomyError, match=r"Choose one of: .*cremad.*taxonomy.yaml beside the rows"):
            canonical_label(dataset, answer)
    elif "error" in expected and (dataset, answer) not in ACCEPTED_HERE:
        assert canonical_label(dataset, answer) is None
        with pytest.raises(TaxonomyError, match="Choose one of: "):
            global_index(dataset, answer)
    else:
        label = expected.get("label") or ACCEPTED_HERE[dataset, answer]
        assert canonical_label(dataset, answer) == label
        assert to_label(dataset, f"<think>so</think>\\boxed{{{answer}}}") == label
        if "index" in expected:
            assert global_index(dataset, answer) == expected["index"]
            assert expected["domain"] == DATASETS[dataset].domain


def test_whole_label_map() -> None:
    rows = {(r["dataset"], r["answer"]) for r in BUILD["inputs"]["jsonl_rows"] if r["dataset"] in DATASETS}
    built = {
        f"{dataset}_{answer}": global_index(dataset, answer)
        for dataset, answer in rows
        if canonical_label(dataset, answer) is not None
    }
    expected = BUILD["expected"]["label_mapping"]
    assert {key: built[key] for key in expected} == expected
    assert BUILD["expected"]["num_classes"] == NUM_CLASSES


def test_free_form_datasets_have_no_label() -> None:
    assert [key for key, dataset in DATASETS.items() if dataset.domain is None] == [
        "intentqa",
        "mimeqa",
        "siq2",
    ]
    assert canonical_label("siq2", "anger") is None
    assert to_label("siq2", "\\boxed{anger}") is None


def test_global_indices_never_change() -> None:
    """Part of the released checkpoints."""
    emotions = "anger disgust fear happy neutral calm sad surprise"
    binary = "ptsd", "depression", "anxiety"
    assert BUILTIN.class_names == (
        *("highly negative", "negative", "weakly negative", "neutral"),
        *("weakly positive", "positive", "highly positive", *emotions.split()),
        *(label for name in binary for label in (f"no {name}", name)),
        *("not sarcasm", "sarcasm", "not humour", "humour"),
    )
    assert [index for domain in DOMAINS.values() for index in domain.indices] == list(range(25))
