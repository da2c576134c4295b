"""Parity of the answer extraction with the released one, and where the default differs on purpose."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hba.evaluate.answers import extract

DATA = Path(__file__).with_name("data")
REWARDS = json.loads((DATA / "rewards.json").read_text(encoding="utf-8"))
HELPERS = json.loads((DATA / "rewards" / "helpers.json").read_text(encoding="utf-8"))
RELEASED = [
    *zip(REWARDS["inputs"]["responses"], REWARDS["expected"]["extracted_published"], strict=True),
    *zip(HELPERS["inputs"]["extract_and_format"], HELPERS["expected"]["extracted"], strict=True),
]
# Text -> what is right, where the released extraction is not.
CORRECTED = {
    r"<think>first \boxed{sad} then</think>\boxed{anger}": "anger",
    r"\boxed{anger} \boxed{sad}": "sad",
    r"<think>x</think>\boxed{\text{ptsd}}": r"\text{ptsd}",
    r"<think>The speaker frowns and talks fast.</think>\boxed{\text{anger}}": r"\text{anger}",
    r"<think>The speaker frowns and talks fast.</think>\boxed{happy} or rather \boxed{anger}": "anger",
    "<think>seen [1] and [2]</think>anger": "anger",
    "<think>The speaker frowns and talks fast.</think>< answer > anger < / answer >": "anger",
    "<think>The speaker frowns and talks fast.</think>boxed{anger}": "boxed{anger}",
}


def test_both_families_are_there() -> None:
    assert len(RELEASED) == 50
    assert set(CORRECTED) <= {text for text, _ in RELEASED}


@pytest.mark.parametrize(("text", "expected"), RELEASED)
def test_published_extraction_to_the_character(text: str, expected: str) -> None:
    assert extract(text, published=True) == expected


@pytest.mark.parametrize(("text", "released"), RELEASED)
def test_default_extraction_corrects_only_what_is_listed(text: str, released: str) -> None:
    assert extract(text) == CORRECTED.get(text, released.lower().strip())


def test_one_extractor_serves_where_the_reference_had_three() -> None:
    golden = json.loads((DATA / "extras" / "answer_extraction.json").read_text(encoding="utf-8"))
    texts, expected = golden["inputs"]["texts"], golden["expected"]
    for text, *released in zip(texts, expected["sft_generation_eval"], expected["judge_input"], strict=True):
        right = {"\\boxed{a} \\boxed{b}": "b", "<answer>a<b</answer>": "a<b"}.get(text)
        assert extract(text) in ([right] if right else [answer.lower().strip() for answer in released])
