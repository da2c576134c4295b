"""Answer formats: what is asked and what is answered come from one file, and the extractor reads what it writes."""

import pickle
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hba.atlas.rows import Sample
from hba.batch.prompt import FORMATS, AnswerFormat, FormatMix, taught
from hba.errors import InputError
from hba.evaluate.answers import extract, to_label
from hba.taxonomy import BUILTIN

WORDS = st.text(st.characters(categories=("L", "N", "Zs")), min_size=1).map(str.strip).filter(bool)


@given(WORDS, WORDS)
def test_the_extractor_reads_every_bundled_format(answer, reasoning):
    for name in ("plain", "boxed", "think", "terse"):
        assert extract(AnswerFormat(name).response(answer, reasoning)) == answer.lower().strip()


def test_bundled_formats_are_known_and_plain_changes_nothing():
    assert sorted(path.stem for path in FORMATS.glob("*.jinja")) == ["boxed", "plain", "terse", "think"]
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


def sample(number, **fields):
    row = {"problem": "What?", "dataset": "cremad", "task": "emotion_cls", "label": "sad", "answer": "sad"}
    media = {"images": 0, "videos": 0, "audios": 0, "ext_video_feats": 0, "ext_audio_feats": 0, "texts": ()}
    rest = {"modality_signature": "text", "source": None, "where": f"train.jsonl:{number}", "extra": fields}
    return Sample(id=str(number), split="train", number=number, **row, **media, **rest)


def test_a_mix_gives_every_format_its_share_and_a_sample_always_the_same():
    mix = FormatMix(["plain", "think"], reasoning="Low voice.", seed=3)
    names = [mix.format_of(sample(i)).name for i in range(2000)]
    assert 0.45 < names.count("think") / len(names) < 0.55
    again = pickle.loads(pickle.dumps(mix))
    assert names == [again.format_of(sample(i)).name for i in range(2000)]
    other = FormatMix(mix.names, seed=4)
    assert names != [other.format_of(sample(i)).name for i in range(2000)]
    asked = {mix.answer(sample(i), "sad") for i in range(50)}
    assert asked == {"sad", "<think>Low voice.</think>\n\\boxed{sad}"}


@pytest.mark.parametrize(
    ("dataset", "label", "problem", "words"),
    [
        ("cremad", "sad", "Choose from: happiness, Sadness, anger.", "Sadness"),
        ("cremad", "sad", "Choose from: happy, sad, anger.", "sad"),
        ("cremad", "happy", "I feel joy today. What is the emotion?", "happy"),
        ("mmsd", "not sarcasm", "Is the tweet sarcastic? Answer yes or no.", "no"),
        ("mmpsy_anxiety", "anxiety", "Is there anxiety? Say 'True' or 'False'.", "True"),
        ("mmsd", "sarcasm", 'He says: "yes or no". Choose from: not sarcasm, sarcasm.', "sarcasm"),
        ("siq2", None, "Why? Answer yes or no.", "sad"),
    ],
)
def test_a_model_is_taught_the_label_in_the_words_that_the_prompt_offers(dataset, label, problem, words):
    row = replace(sample(1), dataset=dataset, label=label, problem=problem)
    assert taught(row, BUILTIN) == words
    if label is not None:
        assert to_label(dataset, words, prompt=problem) == label


def test_reasoning_comes_from_the_row_or_is_missed_by_name():
    mix = FormatMix(["think"])
    row = sample(1, reasoning="The brows are drawn.")
    assert mix.answer(row, "sad").startswith("<think>The brows are drawn.</think>")
    with pytest.raises(InputError, match=r"train\.jsonl:7: no reasoning"):
        mix.answer(sample(7), "sad")
    assert FormatMix(["boxed"]).answer(sample(7), "sad") == "\\boxed{sad}"
    with pytest.raises(InputError, match="not a jinja text"):
        FormatMix(["think"], reasoning="{{")
    with pytest.raises(InputError, match="formats: no answer format"):
        FormatMix([])


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(InputError, match="Did you mean 'think'"):
        AnswerFormat("thinks")
