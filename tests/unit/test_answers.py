"""How answers are read: the order of the rules, nesting, thinking, any text at all, and a corpus of real-shaped answers
with the label that a person reads.

`answers/tuned.jsonl` was there while the rules were made. `answers/held_out.jsonl` was written before the first of them
and not looked at until they were done. `answers/real.jsonl` is what a chat model of 135M parameters said, greedily;
`answers/sampled.jsonl` what it said at temperature 0.8, much of it nonsense, of which three answers are read as a label
where a person reads none (`misread`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from growth import grows_linearly
from hypothesis import given, settings
from hypothesis import strategies as st

from hba.errors import TaxonomyError
from hba.evaluate.answers import RULES, extract, plain, published_label, read, same_answer, to_label
from hba.taxonomy import BUILTIN

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
        (r"\boxed{sad} or \boxed{ }", "sad"),
        (r"\boxed{sad} \boxed{answer}", "sad"),
        (r"\boxed{sad} or \boxed{ang", "sad"),
        (r"{ \boxed{sad}", "sad"),
        (r"} \boxed{sad}", "sad"),
        (r"[happy] but \boxed{sad}", "sad"),
        ("I say [sad] or [happy]", "happy"),
        ("At [00:05] he smiles. happy", "at [00:05] he smiles. happy"),
        ("<answer>sad</answer> [1]", "sad"),
        ('{"answer": "Sad"}', "sad"),
        ("Final answer: sad", "sad"),
        ("<answer>[sad]</answer>", "sad"),
        ("<answer> Sad </answer> done", "sad"),
        ("<answer>sad</answer><answer>happy</answer>", "happy"),
        ("<answer>sad", "<answer>sad"),
        ("<think>[1] says</think>fear", "fear"),
        ("<think>a</think> fear", "fear"),
        ("[1] </think> fear", "fear"),
        (r"<think>\boxed{sad}</think>", "sad"),
        (r"<think>was it \boxed{sad}? No,", r"<think>was it \boxed{sad}? no,"),
        (r"<thinking>\boxed{sad}?</thinking>happy", "happy"),
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
@given(st.text(alphabet="abc {}", min_size=1, max_size=30), st.text(max_size=30))
def test_a_balanced_box_at_the_end_is_given_back(inside: str, before: str) -> None:
    balanced = inside.replace("{", "a").replace("}", "a").replace(" ", "{b}")
    assert extract(f"{before}\n\\boxed{{{balanced}}}") == balanced


@pytest.mark.parametrize(
    "piece",
    ["\\boxed{", "[", "<answer>", "<think>", "{", "\\", "<", "</think>", "< ", '{"a":', "not ", "sad, ", "no no "]
    + ["answer: ", "the emotion is ", '"', "没有", "表现出", "therefore ", "sad or happy ", "`", "~~", "\n", " "],
)
def test_long_broken_output_takes_linear_time(piece: str) -> None:
    def read_out(letters: int) -> None:
        text = piece * (letters // len(piece))
        extract(text)
        to_label("cremad", text)
        to_label("daicwoz", text + "depression")

    assert grows_linearly(read_out, 25_000)


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
        ("ptsd_in_the_wild", "true", "ptsd"),
        ("cremad", "\\boxed{}", None),
        ("cremad", "", None),
        ("siq2", "\\boxed{anger}", None),
    ],
)
def test_to_label_maps_or_says_none(dataset: str, text: str, label: str | None) -> None:
    assert to_label(dataset, text) == label


CUT = [
    ("<think>it could be <answer>happy</answer> but", None, "happy"),
    ("<think>was it \\boxed{happy}? No,", None, None),
    ("Okay, let me see. Is it \\boxed{happy}? No,", None, "happy"),
    ("嗯，用户问的是情绪。他很 happy", None, "happy"),
    ("A ver, parece happy pero", None, None),
    ("He laughs, so he is happy. But wait", None, "happy"),
    ("Okay, he laughs.</think>\\boxed{happy} since he", "happy", "happy"),
    ("<think>he laughs</think> The emotion is happy. He", "happy", "happy"),
    ("happy", "happy", "happy"),
    ('{"answer": "happy", "reason": "he', "happy", "happy"),
    ("The emotion is happy. The speaker laughs at his own joke, and the", "happy", "happy"),
]


@pytest.mark.parametrize(("text", "cut", "whole"), CUT)
def test_what_was_cut_off_while_it_thought_has_no_label(text: str, cut: str | None, whole: str | None) -> None:
    assert read(text, "cremad", cut=True).label == cut
    assert read(text, "cremad").label == whole


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


CORPUS = Path(__file__).with_name("answers")
STYLES = {"terse", "sentence", "cot", "json", "markup", "chatty"}


def corpus(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (CORPUS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_corpus_covers_every_task_style_and_language() -> None:
    rows = [*corpus("tuned"), *corpus("held_out"), *corpus("real"), *corpus("sampled")]
    assert len(rows) > 850
    assert {row["style"] for row in rows} == STYLES
    assert {row["language"] for row in rows} == {"en", "zh", "es"}
    tasks = {BUILTIN.dataset(row["dataset"]).task for row in rows}
    assert tasks == set(BUILTIN.tasks)


@pytest.mark.parametrize(("name", "least"), [("tuned", 0.99), ("held_out", 0.99), ("real", 0.95), ("sampled", 0.8)])
def test_no_answer_of_the_corpus_is_read_as_another_label_than_a_person_reads(name: str, least: float) -> None:
    """Precision is 1; recall is of the answers in which a person reads a label."""
    rows = [row for row in corpus(name) if "answer" not in row]
    found = [read(row["text"], row["dataset"], prompt=row.get("prompt")) for row in rows]
    wrong = {r["text"]: f for r, f in zip(rows, found, strict=True) if f.label not in (None, r["label"])}
    assert wrong.keys() == {row["text"] for row in rows if row.get("misread")}
    labelled = [f.label for r, f in zip(rows, found, strict=True) if r["label"] is not None]
    assert sum(label is not None for label in labelled) / len(labelled) >= least


@pytest.mark.parametrize("name", ["tuned", "held_out"])
def test_free_form_answers_are_found_where_they_stand(name: str) -> None:
    for row in corpus(name):
        if "answer" in row:
            assert read(row["text"], row["dataset"]).answer == row["answer"]


def test_every_rule_reads_some_answer_and_none_other_does() -> None:
    rows = [*corpus("tuned"), *corpus("held_out")]
    assert {read(row["text"], row["dataset"], prompt=row.get("prompt")).rule for row in rows} == set(RULES)
    page = (Path(__file__).parents[2] / "docs" / "evaluate.md").read_text(encoding="utf-8")
    assert [rule for rule in RULES if f"`{rule}` |" not in page] == []


def test_the_strict_published_reading_reads_what_it_read() -> None:
    for row in corpus("real"):
        label = published_label(row["dataset"], row["text"])
        assert label == BUILTIN.canonical_label(row["dataset"], extract(row["text"], published=True))
    assert published_label("mmsd", "It is [sarcasm]") == "sarcasm"
    assert published_label("mmsd", "It is sarcasm") is None
    assert published_label("cremad", r"<think>\boxed{sad}? No,") == "sad"


@pytest.mark.parametrize(
    ("text", "prompt", "label"),
    [
        ("1", "Is it sarcastic? 0 = no, 1 = yes", "sarcasm"),
        ("1", "Choose: 1. sarcasm 2. not sarcasm", "sarcasm"),
        ("2", "Choose: 1. sarcasm 2. not sarcasm", "not sarcasm"),
        ("0", "Is it sarcastic? Answer 0 or 1.", "not sarcasm"),
        ("1", "Is it sarcastic? Answer yes or no.", None),
        ("B", "A) sarcasm\nB) not sarcasm", "not sarcasm"),
        ("B", "Is it sarcastic?", None),
        ("1", None, "sarcasm"),
    ],
)
def test_a_sign_is_an_answer_where_the_prompt_offers_it(text: str, prompt: str | None, label: str | None) -> None:
    assert to_label("mmsd", text, prompt=prompt) == label


def test_the_labels_of_a_users_own_tasks_are_read_in_sentences_too() -> None:
    mine = BUILTIN.extended(
        {
            "domains": {"stress": {25: "no stress", 26: "stress"}, "mood": {27: "elated", 28: "worn out"}},
            "datasets": {"calls": {"domain": "stress"}, "diary": {"domain": "mood", "labels": ["elated", "worn out"]}},
            "synonyms": {"mood": {"euphoric": "elated"}},
        }
    )
    assert to_label("calls", "There are no signs of stress in the voice.", mine) == "no stress"
    assert to_label("calls", "Yes", mine) == "stress"
    assert to_label("diary", "She sounds euphoric.", mine) == "elated"
    assert to_label("diary", "Not elated, but worn-out.", mine) == "worn out"
    assert to_label("diary", "no", mine) is None


@steady
@given(st.text(), st.sampled_from(["cremad", "daicwoz", "mosei_senti", "siq2"]), st.none() | st.text())
def test_any_text_is_read_by_a_rule(text: str, dataset: str, prompt: str | None) -> None:
    found = read(text, dataset, prompt=prompt)
    assert found.rule in RULES and found.answer == found.answer.strip()
    labels = BUILTIN.domains[str(BUILTIN.dataset(dataset).domain)].labels if dataset != "siq2" else ()
    assert found.label is None or found.label in labels
