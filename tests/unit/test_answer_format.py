"""Answer formats: what is asked and what is answered come from one file, and the extractor reads what it writes."""

import pickle
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hba.atlas.answer_format import FORMATS, AnswerFormat
from hba.errors import InputError
from hba.evaluate.answers import extract

WORDS = st.text(st.characters(categories=("L", "N", "Zs")), min_size=1).map(str.strip).filter(bool)


@given(WORDS, WORDS)
def test_the_extractor_reads_every_bundled_format(answer, reasoning):
    for name in ("plain", "boxed", "think"):
        assert extract(AnswerFormat(name).response(answer, reasoning)) == answer.lower().strip()


def test_bundled_formats_are_those_three_and_plain_changes_nothing():
    assert sorted(path.stem for path in FORMATS.glob("*.jinja")) == ["boxed", "plain", "think"]
    problem = "<video>Is this {{ sarcasm }}?\n"
    assert AnswerFormat("plain").prompt(problem) == problem
    assert AnswerFormat("plain").response("not sarcasm") == "not sarcasm"


def test_thinking_is_what_the_format_reward_looks_for():
    said = AnswerFormat("think").response("sad", "The voice is low.")
    assert re.fullmatch(r"<think>.*</think>.*\\boxed\{.*\}.*", said, re.DOTALL)
    assert said == "<think>The voice is low.</think>\n\\boxed{sad}"
    assert AnswerFormat("boxed").response("sad") == "\\boxed{sad}"
    assert all("\\boxed{}" in AnswerFormat(name).prompt("What?") for name in ("boxed", "think"))


def test_reasoning_is_never_made_up():
    assert AnswerFormat("think").shows_reasoning and not AnswerFormat("boxed").shows_reasoning
    with pytest.raises(InputError, match="reasoning"):
        AnswerFormat("think").response("sad")


def test_media_tags_keep_their_place():
    problem = "What <audio> does <video> this?"
    assert all(AnswerFormat(name).prompt(problem).startswith(problem) for name in ("boxed", "think"))


def test_an_own_file_is_a_format_and_survives_pickling(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{% block prompt %}Q: {{ problem }}{% endblock %}{% block response %}A: {{ answer }}{% endblock %}")
    for each in (AnswerFormat(str(path)), pickle.loads(pickle.dumps(AnswerFormat(str(path))))):
        assert each.prompt("why") == "Q: why" and each.response("so") == "A: so"


@pytest.mark.parametrize(
    ("text", "said"),
    [("{% block prompt %}{{ problem }}{% endblock %}", "without the block 'response'"), ("{% block", "not a jinja")],
)
def test_a_file_that_is_no_format_is_refused(tmp_path, text, said):
    path = tmp_path / "bad.jinja"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        AnswerFormat(str(path))


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(InputError, match="Did you mean 'think'"):
        AnswerFormat("thinks")
