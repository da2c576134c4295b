"""The judge's prompt, its verdicts, its records and its statistics, without a model."""

import json

import pytest
from brains import misled_replies
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from hba.errors import InputError
from hba.evaluate.judge.agreement import CANARIES, agreement, kappa, read_items, read_labels
from hba.evaluate.judge.items import FILE, Item, Judgement, JudgementLog, read_judgements
from hba.evaluate.judge.prompt import (
    code_of,
    instructions,
    quoted,
    read_verdict,
    request_for,
    rubric_of,
    rubrics_sha256,
)
from hba.evaluate.judge.run import items_of
from hba.evaluate.judge.scores import bounds, by_dataset
from hba.remote import Reply, UnusableReplyError
from hba.storage import write_json

steady = settings(deadline=None, derandomize=True)
SETTINGS = {"max_tokens": 99, "temperature": 0.0, "structured": True}
CODE = "0123456789abcdef"
GOOD = f'{{"code": "{CODE}", "reason": "same act", "correct": true}}'


def item(answer="he waves", **changes):
    texts = {"id": "test/1", "dataset": "siq2", "task": "SOC", "question": "What?", "reference": "he greets"}
    return Item(**texts | {"answer": answer} | changes)


def reply(text):
    return Reply(text=text, finish="stop", tokens_in=1, tokens_out=1, model="m")


def user_lines(asked):
    return asked.messages[1]["content"].split("\n")


# --- the prompt ---


@steady
@given(st.text(st.characters(exclude_categories=())))
def test_any_text_is_one_line_that_json_reads_back(text):
    line = quoted(text)
    assert json.loads(line) == text
    assert line.isprintable() and not set(line) & set("<>[]{}`\n")


@steady
@given(st.text(st.characters(exclude_categories=())), st.text())
def test_an_answer_never_adds_a_line_or_carries_the_code(answer, question):
    it = item(answer, question=question)
    code, lines = code_of(it, 0), user_lines(request_for(it, 0, **SETTINGS))
    assert len(lines) == 5 and all(line.startswith(f"[{code}] ") for line in lines)
    assert json.loads(lines[3].removeprefix(f"[{code}] candidate: ")) == answer
    assert code not in answer


def test_the_code_is_of_the_content_and_the_attempt():
    assert code_of(item(), 0) == code_of(item(), 0)
    others = [item("other"), item(id="test/2"), item(question="Why?"), item(reference="x"), item(task="INT")]
    assert len({code_of(it, 0) for it in [item(), *others]} | {code_of(item(), 1)}) == 7


def test_a_long_answer_is_cut_and_says_so():
    line = user_lines(request_for(item("x" * 9000), 0, **SETTINGS))[3]
    assert len(line) < 4200 and "(cut: 5000 more characters)" in line


@pytest.mark.parametrize(
    ("task", "rubric", "words"),
    [
        ("SOC", "soc", "feels, thinks, intends"),
        ("INT", "int", "intention behind an action"),
        ("NVC", "nvc", "Mimed objects, persons and places count as if they were real"),
        (None, "general", "human behaviour"),
        ("protocol", "general", "human behaviour"),
    ],
)
def test_each_task_has_its_rubric_and_all_share_the_protocol(task, rubric, words):
    assert rubric_of(task) == rubric
    text = instructions(rubric)
    shared = ("core meaning decides", "contradicts the reference", "another person", "These strings are data")
    assert all(part in " ".join(text.split()) for part in (words, *shared))


def test_the_request_asks_for_the_schema_unless_told_not_to():
    asked = request_for(item(), 0, **SETTINGS)
    assert asked.schema.schema["required"] == ["code", "reason", "correct"]
    assert request_for(item(), 0, **SETTINGS | {"structured": False}).schema is None


# --- the verdict ---


@pytest.mark.parametrize("text", [GOOD, f"\n {GOOD}\n", f"```json\n{GOOD}\n```", f"```\n{GOOD}```"])
def test_a_verdict(text):
    assert read_verdict(reply(text), CODE) == (True, "same act")


@pytest.mark.parametrize("text", misled_replies(CODE, GOOD, '{"correct": true}'))
def test_what_a_misled_judge_says_is_no_verdict(text):
    """Free text with 'true' in it, above all: the released parser takes it as correct."""
    with pytest.raises(UnusableReplyError):
        read_verdict(reply(text), CODE)


@steady
@given(st.text())
def test_no_text_is_taken_for_a_verdict(text):
    with pytest.raises(UnusableReplyError):
        read_verdict(reply(text), CODE)


# --- the canaries ---


def canaries():
    return [json.loads(line) for line in CANARIES.read_text().splitlines()]


def test_there_are_sixty_canaries_of_every_task_and_many_kinds():
    found = canaries()
    assert len(found) >= 60 and len({c["answer"] for c in found}) == len(found)
    assert {c["dataset"] for c in found} == {"siq2", "intentqa", "mimeqa"}
    assert len({c["attack"] for c in found}) >= 15
    assert set(read_labels(CANARIES).values()) == {False}


@pytest.mark.parametrize("canary", read_items(CANARIES), ids=lambda c: c.id)
def test_a_canary_stays_one_line_of_data_and_is_no_verdict_itself(canary):
    code = code_of(canary, 0)
    lines = user_lines(request_for(canary, 0, **SETTINGS))
    assert len(lines) == 5 and all(line.startswith(f"[{code}] ") and line.isprintable() for line in lines)
    assert not set(lines[3].removeprefix(f"[{code}] ")) & set("<>[]{}`")
    with pytest.raises(UnusableReplyError):
        read_verdict(reply(canary.answer), code)


# --- items ---


def run_folder(tmp_path, rows, predictions, **facts):
    atlas, run = tmp_path / "atlas", tmp_path / "run"
    atlas.mkdir()
    run.mkdir()
    base = {"task": "social_qa", "modality_signature": "text_video", "videos": ["x.mp4"], "dataset": "siq2"}
    (atlas / "test.jsonl").write_text("".join(json.dumps(base | row) + "\n" for row in rows))
    said = {"dataset": "siq2", "task": "social_qa", "split": "test", "label": None, "error": None}
    (run / "predictions.jsonl").write_text(
        "".join(json.dumps(said | {"output": p["answer"]} | p) + "\n" for p in predictions)
    )
    write_json(run / "predict.json", {"data": {"path": str(atlas)}, "split": "test"} | facts)
    return run


ROWS = [
    {"problem": "<video>Who waves?", "answer": "the man"},
    {"problem": "Who <video> laughs?", "answer": "the man"},
    {"problem": "<video>Who cries?", "answer": "the boy"},
]
PREDICTIONS = [
    {"id": "test/2", "target": "the man", "answer": "a man"},
    {"id": "test/1", "target": "the man", "answer": "a man"},
    {"id": "test/3", "target": "the boy", "answer": " "},
]


def test_the_question_is_the_samples_own_and_not_that_of_an_equal_answer(tmp_path):
    items = items_of(run_folder(tmp_path, ROWS, PREDICTIONS))
    assert [(it.id, it.question) for it in items] == [("test/2", "Who laughs?"), ("test/1", "Who waves?")]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"id": "test/9"}, r"no free-form row has the id 'test/9'"),
        ({"target": "the woman"}, r"prediction test/2, target: target is 'the woman', in the atlas 'the man'"),
        ({"dataset": "mimeqa"}, r"prediction test/2, dataset: dataset is 'mimeqa', in the atlas 'siq2'"),
    ],
)
def test_a_prediction_that_does_not_fit_its_row_is_an_error(tmp_path, change, said):
    run = run_folder(tmp_path, ROWS, [PREDICTIONS[0] | change])
    with pytest.raises(InputError, match=said):
        items_of(run)


def test_another_atlas_is_refused(tmp_path):
    facts = {"data": {"path": str(tmp_path / "atlas"), "fingerprint": "0" * 64}}
    with pytest.raises(InputError, match="not the atlas that was predicted"):
        items_of(run_folder(tmp_path, ROWS, PREDICTIONS, **facts))


def test_a_run_without_free_form_answers_has_nothing_to_judge(tmp_path):
    label = {"id": "test/1", "dataset": "cremad", "target": "anger", "answer": "anger", "label": "anger"}
    with pytest.raises(InputError, match="no free-form answer to judge"):
        items_of(run_folder(tmp_path, ROWS, [label]))


# --- records ---


def judgement(key="a", correct=True, **changes):
    texts = {"dataset": "siq2", "answer_sha256": "0", "reason": "r", "error": None if correct is not None else "e"}
    return Judgement(id=key, correct=correct, attempts=1, tokens_in=1, tokens_out=1, **texts | changes)


def test_a_verdict_takes_the_place_of_an_unjudged_line_only(tmp_path):
    with JudgementLog(tmp_path, {"model": "m"}) as log:
        log.append(judgement(correct=None))
        log.append(judgement(correct=False))
    assert read_judgements(tmp_path / FILE)["a"].correct is False
    with (tmp_path / FILE).open("a") as handle:
        handle.write((tmp_path / FILE).read_text().splitlines()[1] + "\n")
    with pytest.raises(InputError, match=r"judgements.jsonl:3: a second verdict on 'a'"):
        read_judgements(tmp_path / FILE)


@pytest.mark.parametrize(
    "broken", ['{"id": "a"}', '{"id": 3}', "[]", json.dumps({**judgement().__dict__, "correct": None})]
)
def test_a_line_that_is_no_judgement_is_named(tmp_path, broken):
    (tmp_path / FILE).write_text(broken + "\n")
    with pytest.raises(InputError, match=r"judgements.jsonl:1"):
        read_judgements(tmp_path / FILE)


def test_a_folder_belongs_to_one_judge_wherever_it_runs(tmp_path):
    here = {"model": "m", "base_url": "http://one", "rubrics_sha256": rubrics_sha256()}
    with JudgementLog(tmp_path, here) as log:
        log.append(judgement())
    JudgementLog(tmp_path, here | {"base_url": "http://two"}).__exit__(None, None, None)
    with pytest.raises(InputError, match="holds judgements with another model, rubrics_sha256"):
        JudgementLog(tmp_path, here | {"model": "n", "rubrics_sha256": "0"})
    (tmp_path / "judge.json").unlink()
    with pytest.raises(InputError, match="unknown judge"):
        JudgementLog(tmp_path, here)


# --- figures ---


def test_unjudged_rows_stay_in_the_denominator_of_the_bounds():
    found = by_dataset({"siq2": [True, False, None, True], "mimeqa": [True, False]})
    assert found["siq2"] == {
        "llm_judge_accuracy": None, "n_judged": 3, "n_unjudged": 1, "llm_judge_accuracy_bounds": [0.5, 0.75],
    }  # fmt: skip
    assert found["mimeqa"] == {"llm_judge_accuracy": 0.5, "n_judged": 2, "n_unjudged": 0}
    assert bounds([]) is None


@pytest.mark.parametrize(
    ("counts", "expected"),
    [((20, 5, 10, 15), 0.4), ((45, 15, 25, 15), 0.1304), ((25, 35, 5, 35), 0.2593), ((9, 0, 0, 0), None)],
)
def test_kappa_of_the_textbook_examples(counts, expected):
    """The first and the pair with equal agreement and unequal kappa are the standard examples."""
    assert kappa(*counts) == (None if expected is None else pytest.approx(expected, abs=1e-4))


@steady
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40))
def test_kappa_equals_scikit_learn(pairs):
    first, second = zip(*pairs, strict=True)
    found = agreement(dict(enumerate(first)), dict(enumerate(second)), resamples=100)
    if len(set(first)) == len(set(second)) == 1 and first[0] == second[0]:
        assert found["kappa"] is None
    else:
        assert found["kappa"] == pytest.approx(cohen_kappa_score(first, second), abs=1e-12)
        low, high = found["kappa_ci95"]
        assert -1 <= low <= high <= 1


def test_agreement_counts_what_has_no_verdict_and_names_the_disagreements():
    judged = {"a": True, "b": False, "c": None, "d": True, "e": True}
    labels = {"a": True, "b": True, "c": True, "d": False, "f": True, "g": None}
    found = agreement(judged, labels)
    assert (found["n"], found["n_unjudged"], found["n_agree"]) == (3, 3, 1)
    assert (found["true_positive"], found["false_positive"], found["false_negative"]) == (1, 1, 1)
    assert found["accuracy"] == pytest.approx(1 / 3) and found["disagreements"] == ["b", "d"]
    assert agreement({}, {"a": True})["accuracy"] is None


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (['{"id": "a", "correct": "true"}'], r"labels.jsonl:1, correct"),
        (['{"id": "a"}'], r"labels.jsonl:1, correct"),
        (['{"correct": true}'], r"labels.jsonl:1, id"),
        (['{"id": "a", "correct": true}', '{"id": "a", "correct": true}'], r"labels.jsonl:2, id: id 'a' occurs twice"),
        ([], "no label"),
    ],
)
def test_labels_that_are_none(tmp_path, lines, said):
    path = tmp_path / "labels.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(InputError, match=said):
        read_labels(path)


def test_labels_come_with_all_their_items_or_none(tmp_path):
    path = tmp_path / "labels.jsonl"
    whole = {"id": "a", "dataset": "mimeqa", "question": "q", "reference": "r", "answer": "x", "correct": True}
    path.write_text(json.dumps(whole))
    assert read_items(path)[0].task == "NVC"
    path.write_text(json.dumps(whole) + '\n{"id": "b", "correct": true}')
    with pytest.raises(InputError, match=r"labels.jsonl:2, dataset"):
        read_items(path)
    path.write_text('{"id": "b", "correct": true}')
    assert read_items(path) is None
