"""Answer extraction: order of the forms, nesting, reasoning, and any text at all."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hba.errors import TaxonomyError
from hba.evaluate.answers import extract, plain, same_answer, to_label

steady = settings(deadline=None, derandomize=True)
PIECES = [
    "\\boxed{",
    "\\boxed {",
    "}",
    "{",
    "[",
    "]",
    "<answer>",
    "</answer>",
    "<think>",
    "</think>",
    "\\",
    "a",
    " ",
]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Anger ", "anger"),
        (r"\boxed{Anger}", "anger"),
        (r"\boxed{a} then \boxed{b}", "b"),
        (r"\boxed{x_{1}+{y}} and", "x_{1}+{y}"),
        (r"\boxed{\text{anger}}", r"\text{anger}"),
        (r"\boxed{\boxed{sad}}", "sad"),
        (r"\boxed{a \} b}", r"a \} b"),
        (r"\boxed{a / b}", "a / b"),
        (r"\boxed{}", ""),
        (r"\boxed{sad} or \boxed{ }", ""),
        (r"\boxed{sad} or \boxed{ang", "sad"),
        (r"{ \boxed{sad}", "sad"),
        (r"} \boxed{sad}", "sad"),
        (r"[happy] but \boxed{sad}", "sad"),
        ("I say [sad] or [happy]", "happy"),
        ("<answer>[sad]</answer>", "sad"),
        ("<answer> Sad </answer> done", "sad"),
        ("<answer>sad</answer><answer>happy</answer>", "happy"),
        ("<answer>sad", "<answer>sad"),
        ("<think>[1] says</think>fear", "fear"),
        ("<think>a</think> fear", "fear"),
        ("[1] </think> fear", "fear"),
        (r"<think>\boxed{sad}</think>", "sad"),
        ("<think>only thoughts</think>", "<think>only thoughts</think>"),
        ("", ""),
    ],
)
def test_extract(text: str, answer: str) -> None:
    assert extract(text) == answer


@steady
@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES)).map("".join)))
def test_any_text_gives_a_clean_answer(text: str) -> None:
    answer = extract(text)
    assert answer == answer.strip()
    assert isinstance(extract(text, published=True), str)
    assert to_label("cremad", text) in {
        None,
        "anger",
        "disgust",
        "fear",
        "happy",
        "neutral",
        "calm",
        "sad",
        "surprise",
    }


@steady
@given(st.text(alphabet="abc {}", max_size=30), st.text(max_size=30))
def test_a_balanced_box_at_the_end_is_given_back(inside: str, before: str) -> None:
    balanced = inside.replace("{", "").replace("}", "").replace(" ", "{b}")
    assert extract(f"{before}\n\\boxed{{{balanced}}}") == balanced


@pytest.mark.parametrize("piece", ["\\boxed{", "[", "<answer>", "<think>", "{", "\\", "<", "</think>", "< "])
def test_long_broken_output_takes_linear_time(piece: str) -> None:
    text = piece * (400_000 // len(piece))
    start = time.process_time()
    extract(text)
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("dataset", "text", "label"),
    [
        ("cremad", "<think>loud</think>\\boxed{Angry}", "anger"),
        ("cremad", "\\boxed{\\text{Anger}}", "anger"),
        ("cremad", "**Anger**.", "anger"),
        ("ptsd_in_the_wild", "No PTSD!", "no ptsd"),
        ("mmpsy_anxiety", "no  anxiety", "no anxiety"),
        ("mmsd", "Yes", "sarcasm"),
        ("urfunny", "'humor'", "humour"),
        ("mosei_senti", "\\boxed{neutral}", "neutral"),
        ("mosei_senti", "\\boxed{anger}", None),
        ("cremad", "anger or sad", None),
        ("cremad", "not anger", None),
        ("ptsd_in_the_wild", "true", None),
        ("cremad", "\\boxed{}", None),
        ("cremad", "", None),
        ("siq2", "\\boxed{anger}", None),
    ],
)
def test_to_label_maps_or_says_none(dataset: str, text: str, label: str | None) -> None:
    assert to_label(dataset, text) == label


def test_to_label_refuses_an_unknown_dataset() -> None:
    with pytest.raises(TaxonomyError, match="Did you mean 'cremad'"):
        to_label("cremadd", "anger")


@pytest.mark.parametrize(
    ("answer", "target", "same"),
    [
        ("The person is rowing a boat.", "person is rowing boat", True),
        ("ＳＨＥ  is\u00a0late!", "she is late", True),
        ("他很生气。", "他很生气", True),
        ("don't know", "dont know", True),
        ("rowing", "rowing a boat", False),
        ("a", "the", False),
        ("👍", "👎", False),
        ("", "late", False),
    ],
)
def test_exact_match_is_normalised_and_nothing_more(answer: str, target: str, same: bool) -> None:
    assert same_answer(answer, target) is same


@steady
@given(st.text())
def test_plain_text_is_its_own_plain_text(text: str) -> None:
    once = plain(text)
    assert same_answer(once, text)
    assert once == once.strip()
