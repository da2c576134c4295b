"""Prompts of Voxtral: the ids that Mistral's own package makes of the same conversations and sounds."""

import base64
import io
from importlib.util import find_spec
from itertools import groupby

import numpy as np
import pytest
import soundfile
import torch

from hba.batch.encode import answer_ids, end_token_id, features_of
from hba.batch.prompt import PlainText
from hba.model.checkpoint import load_processor
from hba.model.tiny import build_tiny

TEXTS = ["How does the speaker feel? Sad, or glad and calm.", "Ist sie traurig? 是 悲伤 吗?"]
SOUND, SPEAKS, ENDS = {"type": "audio"}, {"type": "text", "text": "How does the speaker feel?\n"}, "glad [/INST] 🙂"
TALKS = {
    "a sound": [{"role": "user", "content": [SOUND, SPEAKS]}],
    "sounds among words": [{"role": "user", "content": [SPEAKS, SOUND, {"type": "text", "text": " 是吗? "}, SOUND]}],
    "turns": [
        {"role": "system", "content": [{"type": "text", "text": "Be calm."}]},
        {"role": "user", "content": [SPEAKS]},
        {"role": "assistant", "content": [{"type": "text", "text": "Sad."}]},
        {"role": "user", "content": [{"type": "text", "text": "traurig"}]},
    ],
}
# What mistral-common 1.13.1 made of them through transformers 5.10.4: ids, and how often each stands there.
# fmt: off
EXPECTED = {
    "a sound": [
        [1, 1], [3, 1], [25, 1], [24, 100], [348, 1], [352, 1], [344, 1], [355, 1], [353, 1], [98, 1], [45, 1], [4, 1],
    ],
    "sounds among words": [
        [1, 1], [3, 1], [348, 1], [352, 1], [344, 1], [355, 1], [353, 1], [98, 1], [45, 1], [25, 1], [24, 100],
        [347, 1], [331, 1], [186, 1], [98, 1], [67, 1], [25, 1], [24, 50], [4, 1],
    ],
    "turns": [
        [1, 1], [17, 1], [101, 1], [136, 1], [351, 1], [81, 1], [18, 1], [3, 1], [348, 1], [352, 1], [344, 1], [355, 1],
        [353, 1], [98, 1], [45, 1], [4, 1], [311, 1], [81, 1], [2, 1], [3, 1], [151, 1], [326, 1], [327, 1], [4, 1],
    ],
    "words": [321, 295, 67, 126, 82, 108, 113, 118, 119, 128, 67, 275, 194, 188, 165],
}
# fmt: on


def sounds():
    """One of five seconds, which fills one window of four and a part of the next, and one of half a second."""
    draw = np.random.default_rng(0)
    return [draw.normal(size=n).astype(np.float32) / 10 for n in (80_000, 8_000)]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return build_tiny(tmp_path_factory.mktemp("voxtral") / "model", TEXTS * 5, seed=0, family="voxtral")


@pytest.fixture(scope="module", params=["published", "saved"])
def processor(published, tmp_path_factory, request):
    found = load_processor(published)
    if request.param == "saved":
        folder = tmp_path_factory.mktemp("voxtral") / "saved"
        found.save_pretrained(folder)
        found = load_processor(folder)
    return found


def encoded(processor, talk):
    text = processor.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
    return features_of(processor, text, sounds()[: text.count("[AUDIO]")], [], [], [], pixels={})


def runs(ids):
    return [[number, len(list(same))] for number, same in groupby(ids.flatten().tolist())]


@pytest.mark.parametrize("name", TALKS)
def test_ids_are_those_of_mistral_common(processor, name):
    assert runs(encoded(processor, TALKS[name])["input_ids"]) == EXPECTED[name]


def test_names_of_its_tokens_are_words_in_a_prompt_and_in_an_answer(processor):
    plain = PlainText(processor)
    text = processor.apply_chat_template([{"role": "user", "content": plain(ENDS)}], tokenize=False)
    ids = features_of(processor, text, [], [], [], [], pixels={})["input_ids"][0]
    assert ids.tolist().count(4) == 1
    answer = answer_ids(processor.tokenizer, ENDS, end_token_id(processor))
    assert answer.tolist() == EXPECTED["words"] + [2]


def test_mistral_common_makes_the_same_today(published):
    """Where it is installed: of its ids, and of each sound the same numbers to the bit."""
    if find_spec("mistral_common") is None:
        pytest.skip("mistral-common is not installed")
    from transformers import AutoProcessor

    theirs, ours = AutoProcessor.from_pretrained(published), load_processor(published)
    options = {"pad_to_multiple_of": 64_000, "max_source_positions": 400}
    for name, talk in TALKS.items():
        left = iter(sounds())
        heard = []
        for turn in talk:
            parts = turn["content"]
            parts = [part if part["type"] == "text" else part | {"base64": as_wav(next(left))} for part in parts]
            heard.append(turn | {"content": parts})
        found = theirs.apply_chat_template(heard, processor_kwargs=dict(options))
        assert runs(found["input_ids"]) == EXPECTED[name]
        if "input_features" in found:
            assert torch.equal(found["input_features"], encoded(ours, talk)["input_features"])
    words = theirs.tokenizer.tokenizer.instruct_tokenizer.tokenizer.encode(ENDS, bos=False, eos=False)
    assert words == EXPECTED["words"]


def as_wav(sound):
    file = io.BytesIO()
    soundfile.write(file, sound, 16_000, format="wav", subtype="FLOAT")
    return base64.b64encode(file.getvalue()).decode()
