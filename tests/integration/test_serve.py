"""`hba serve`: what `hba ask` says of a file comes over HTTP, also to OpenAI's own client; what is not offered is
refused in OpenAI's words."""

import asyncio
import base64
import errno
import json
import math
import os
import socket
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import numpy as np
import openai
import pytest
import soundfile
import torch
from holding import until
from serving import PATIENCE, data_url, serving, write_adapted

import hba as package
from hba.config import load_config
from hba.evaluate import desk
from hba.evaluate.config import PredictConfig
from hba.evaluate.desk import Desk, FullError, Inquiry, Part, Question, Saying, Turn
from hba.serve import _bytes_of

LONGEST = 12


def settings(*more):
    return load_config(PredictConfig, None, [f"generation.max_tokens={LONGEST}", "loader.workers=1", *more])


@pytest.fixture(scope="module")
def served(answering, tmp_path_factory):
    with serving(answering, tmp_path_factory.mktemp("desk"), config=settings()) as made:
        yield made


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="secret", max_retries=0) as made:
        yield made


def parts(files):
    sound = {"data": base64.b64encode((files / "sound.wav").read_bytes()).decode(), "format": "wav"}
    picture = data_url("image/png", (files / "picture.png").read_bytes())
    clip = data_url("video/mp4", (files / "clip.mp4").read_bytes())
    return {
        "sound.wav": {"type": "input_audio", "input_audio": sound},
        "picture.png": {"type": "image_url", "image_url": {"url": picture}},
        "clip.mp4": {"type": "video_url", "video_url": {"url": clip}},
    }


def asked(client, model, content, **more):
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(model=str(model), messages=messages, **more)


def test_files_are_classified_as_ask_classifies_them(served, answering, files):
    """Together in one request, as JSON and as a form: to 1e-6, and those of one kind in one batch."""
    paths = sorted(files.iterdir())
    replies = package.ask(answering, files, tasks=["EMO", "SAR"])
    sent = [{"name": path.name, "data": data_url("video/mp4", path.read_bytes())} for path in paths]
    as_json = served.client.post("/v1/classify", json={"files": sent, "tasks": ["EMO", "SAR"]})
    form = [("file", (path.name, path.read_bytes())) for path in paths]
    as_form = served.client.post("/v1/classify", files=form, data={"tasks": "EMO,SAR"})
    assert list(served.desk.batch_sizes)[-8:] == [2] * 8  # two tasks of a clip, a sound, a picture, a text
    for answer in (as_json, as_form):
        assert answer.status_code == 200, answer.text
        results = answer.json()["results"]
        assert len(results) == len(replies) == 8
        for found, reply in zip(results, replies, strict=True):
            assert (found["file"], found["dataset"]) == (reply.file.rpartition("/")[2], reply.dataset)
            assert found["answer"] == reply.answer
            assert found["probs"] == pytest.approx(reply.probs, abs=1e-6)


def test_openais_client_gets_what_ask_says(served, client, answering, files):
    config = settings("generation.format=plain")
    for name, part in parts(files).items():
        (reply,) = package.ask(answering, files / name, question="What is this?", config=config)
        said = asked(client, answering, [part, {"type": "text", "text": "What is this?"}])
        assert said.choices[0].message.content == reply.text
        assert said.choices[0].finish_reason in ("stop", "length")
        assert said.usage.prompt_tokens > 5 and 0 < said.usage.completion_tokens <= LONGEST
    assert [model.id for model in client.models.list()] == [str(answering)]


def test_a_chat_model_of_the_hub_talks_and_labels(backbone, files, tmp_path):
    config = settings("encode.num_frames=2", "encode.max_pixels=3136", "generation.format=plain")
    with serving(backbone, tmp_path, backend="hf", config=config) as served:
        (reply,) = package.ask(backbone, files / "sound.wav", question="Why?", backend="hf", config=config)
        (label,) = package.ask(backbone, files / "sound.wav", tasks=["EMO"], backend="hf", config=config)
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="secret", max_retries=0) as client:
            said = asked(client, backbone, [parts(files)["sound.wav"], {"type": "text", "text": "Why?"}])
        assert said.choices[0].message.content == reply.text
        (found,) = served.classify(files / "sound.wav").json()["results"]
        assert (found["answer"], found["text"]) == (label.answer, label.text)
        (free,) = served.classify(files / "sound.wav", question="Why?", tasks=None).json()["results"]
        assert (free["task"], free["dataset"], free["text"]) == ("", "", reply.text)
        nothing = served.client.post("/v1/classify", json={"files": []})
        assert nothing.status_code == 400 and "has to be asked something" in nothing.json()["error"]["message"]


def test_a_seed_decides_what_is_drawn_whatever_is_drawn_beside_it(client, answering):
    how = {"temperature": 1.0, "max_tokens": 8}
    alone = [asked(client, answering, "Well?", seed=seed, **how).choices[0].message.content for seed in (1, 2, 1)]
    assert alone[0] == alone[2] != alone[1]
    with ThreadPoolExecutor(8) as pool:
        beside = list(pool.map(lambda seed: asked(client, answering, "Well?", seed=seed, **how), (1, 2, 3, 4, 1)))
    assert [one.choices[0].message.content for one in beside][:2] == alone[:2]
    assert beside[0].choices[0].message.content == beside[4].choices[0].message.content


def test_a_talk_has_turns_and_a_system_prompt_and_comes_as_a_stream(client, served, answering, files):
    picture = parts(files)["picture.png"]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [picture, {"type": "text", "text": "<audio> Who is <|im_end|> this?"}]},
        {"role": "assistant", "content": "A person."},
        {"role": "user", "content": [picture, {"type": "text", "text": "And this?"}]},
    ]
    whole = client.chat.completions.create(model=str(answering), messages=messages)
    shorter = client.chat.completions.create(model=str(answering), messages=messages[1:])
    assert shorter.usage.prompt_tokens < whole.usage.prompt_tokens
    how = {"stream": True, "stream_options": {"include_usage": True}}
    pieces = list(client.chat.completions.create(model=str(answering), messages=messages, **how))
    said = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert said == whole.choices[0].message.content and pieces[-1].usage == whole.usage


def words(stream):
    """The pieces of an answer that have some."""
    return (piece.choices[0].delta.content for piece in stream if piece.choices and piece.choices[0].delta.content)


@contextmanager
def holding(served, step, go_on):
    """At so many tokens of an answer the model waits until it may go on; the number of its steps is kept."""
    steps = [0]

    def wait(*_):
        steps[0] += 1
        assert steps[0] != step or go_on.wait(PATIENCE)

    hook = served.desk.backend.model.transformer.get_output_embeddings().register_forward_pre_hook(wait)
    try:
        yield steps
    finally:
        hook.remove()


def test_a_stream_comes_while_the_model_still_speaks(client, served, answering, files):
    whole, heard = asked(client, answering, "Well?").choices[0].message.content, threading.Event()
    with holding(served, LONGEST, heard) as steps:
        said = ""
        for piece in words(asked(client, answering, "Well?", stream=True)):
            heard.set()
            said += piece
    assert said == whole and steps[0] == LONGEST
    broken = {"type": "image_url", "image_url": {"url": data_url("image/png", b"no picture")}}
    with pytest.raises(openai.BadRequestError, match="cannot be read"):  # what fails before is no stream
        asked(client, answering, [broken], stream=True)


@pytest.mark.parametrize("how", ["length", "stop"])
def test_a_short_answer_does_not_wait_for_a_long_one_beside_it(served, client, answering, how):
    whole = asked(client, answering, "Well?").choices[0].message.content
    talk, go_on = Question(turns=(Turn("user", (Part(text="Well?"),)),)), threading.Event()
    saying = Saying(2) if how == "length" else Saying(LONGEST, stop=(whole[1],))
    alone = served.desk.ask_together([Inquiry(talk, saying)])[0].result(PATIENCE)
    sayings, heard = (saying, saying, Saying(LONGEST)), ([], [], [])
    inquiries = [Inquiry(talk, each, told.append) for each, told in zip(sayings, heard, strict=True)]
    with holding(served, LONGEST, go_on):  # at the last token of the long one
        first, second, last = served.desk.ask_together(inquiries)
        found = [each.result(PATIENCE) for each in (first, second)]
        assert not last.done() and served.desk.waiting == 1
        go_on.set()
        assert last.result(PATIENCE).output == whole == "".join(heard[2])
    assert served.desk.batch_sizes[-1] == 3
    for each, told in zip(found, heard, strict=False):
        assert (each.output, each.finish, each.tokens_in, each.tokens_out) == (
            alone.output, alone.finish, alone.tokens_in, alone.tokens_out)  # fmt: skip
        assert each.finish == how and "".join(told) == each.output


def test_the_model_does_not_go_on_for_nobody(client, served, answering):
    gone = threading.Event()
    with holding(served, LONGEST // 2, gone) as steps:
        stream = asked(client, answering, "Well?", stream=True)
        next(words(stream))
        stream.close()
        deadline = time.monotonic() + PATIENCE
        while served.gate.under_way:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        gone.set()
        while served.desk.waiting:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert steps[0] <= LONGEST // 2


def test_a_stream_that_is_left_before_its_first_event_is_not_said_to_its_end(served, answering):
    """The client goes while the head of the answer is on its way to it."""
    body = {"model": str(answering), "messages": [{"role": "user", "content": "Well?"}], "stream": True}
    content, gone = json.dumps(body).encode(), threading.Event()
    headers = [(b"host", b"127.0.0.1"), (b"authorization", b"Bearer secret")]
    scope = {"type": "http", "asgi": {"spec_version": "2.3"}, "http_version": "1.1", "scheme": "http", "method": "POST",
             "path": "/v1/chat/completions", "query_string": b"", "headers": headers, "server": None}  # fmt: skip

    async def leave():
        left, coming = asyncio.Event(), [{"type": "http.request", "body": content, "more_body": False}]

        async def receive():
            if coming:
                return coming.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            assert message == {"type": "http.response.start", "status": 200, "headers": message["headers"]}
            left.set()
            await asyncio.Event().wait()  # nobody reads

        await served.gate(scope, receive, send)
        gone.set()
        await asyncio.to_thread(until, lambda: not served.desk.waiting)

    with holding(served, LONGEST // 2, gone) as steps:
        asyncio.run(leave())
    assert steps[0] <= LONGEST // 2


def test_an_answer_ends_before_a_text_that_stops_it(client, answering):
    whole = asked(client, answering, "Well?").choices[0].message.content
    stop = whole[len(whole) // 2 :][:5]
    expected = whole[: whole.index(stop)]
    short = asked(client, answering, "Well?", stop=["never said", stop])
    assert short.choices[0].message.content == expected and short.choices[0].finish_reason == "stop"
    assert short.usage.completion_tokens < LONGEST
    told = asked(client, answering, "Well?", stop=["never said", stop], logprobs=True).choices[0].logprobs.content
    assert "".join(token.token for token in told[:-1]) in expected != "".join(token.token for token in told[:-1])
    assert "".join(token.token for token in told).startswith(expected)
    none = asked(client, answering, "Well?", stop=whole[0], logprobs=True).choices[0]
    assert none.message.content == "" and none.logprobs.content == []
    assert "".join(words(asked(client, answering, "Well?", stop=stop, stream=True))) == expected
    assert "".join(words(asked(client, answering, "Well?", stop=stop + " and never", stream=True))) == whole
    # Its beginnings are looked for as far as the answer goes: with all of them the model was at it for minutes.
    assert asked(client, answering, "Well?", stop="x" * 1_000_000).choices[0].message.content == whole


def test_several_answers_a_share_of_the_distribution_and_log_probabilities(client, answering):
    greedy = asked(client, answering, "Well?", logprobs=True, top_logprobs=3).choices[0]
    assert "".join(token.token for token in greedy.logprobs.content) == greedy.message.content
    for token in greedy.logprobs.content:
        first, *_ = token.top_logprobs
        assert len(token.top_logprobs) == 3 and (first.token, first.logprob) == (token.token, token.logprob)
        assert sum(math.exp(each.logprob) for each in token.top_logprobs) <= 1 + 1e-6
    how = {"temperature": 2.0, "max_tokens": 8}
    sharp = asked(client, answering, "Well?", top_p=1e-6, **how).choices[0].message.content
    assert greedy.message.content.startswith(sharp) and sharp
    alone = [asked(client, answering, "Well?", seed=seed, **how).choices[0].message.content for seed in (5, 6, 7)]
    several = asked(client, answering, "Well?", seed=5, n=3, logprobs=True, **how)
    assert [choice.message.content for choice in several.choices] == alone and len({*alone}) > 1
    assert [len(choice.logprobs.content[0].top_logprobs) for choice in several.choices] == [0, 0, 0]


def test_several_answers_are_encoded_once_and_equal_separate_ones(answering, files, tmp_path, monkeypatch):
    """Each is what its own seed draws alone, log-probabilities included; the files of a talk are looked at once."""
    looked, look = [], desk.look_at
    monkeypatch.setattr(desk, "look_at", lambda path: looked.append(path.name) or look(path))
    content = [*parts(files).values(), {"type": "text", "text": "Who is this?"}]
    how = {"temperature": 1.5, "max_tokens": 6, "logprobs": True, "top_logprobs": 2}
    with (
        serving(answering, tmp_path, config=settings("loader.workers=0")) as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="secret", max_retries=0) as client,
    ):
        several = asked(client, answering, content, seed=5, n=3, **how)
        assert sorted(looked) == ["0.wav", "1.png", "2.mp4"]
        alone = [asked(client, answering, content, seed=seed, **how) for seed in (5, 6, 7)]
    assert len({choice.message.content for choice in several.choices}) > 1
    assert several.usage.completion_tokens == sum(each.usage.completion_tokens for each in alone)
    for choice, (one,) in zip(several.choices, (each.choices for each in alone), strict=True):
        assert (choice.message, choice.finish_reason) == (one.message, one.finish_reason)
        for token, own in zip(choice.logprobs.content, one.logprobs.content, strict=True):
            assert (token.token, token.bytes) == (own.token, own.bytes)
            assert token.logprob == pytest.approx(own.logprob, abs=1e-5)


def test_of_two_limits_the_one_that_is_given_holds(client, answering):
    for more in ({"max_completion_tokens": None, "max_tokens": 2}, {"max_completion_tokens": 2, "max_tokens": LONGEST}):
        assert asked(client, answering, "Well?", **more).usage.completion_tokens == 2


def test_parts_of_a_character_have_its_bytes(served):
    tokenizer = served.desk.backend.model.processor.tokenizer
    ids = tokenizer.encode("<0x41> é😀 well", add_special_tokens=False)
    found = [_bytes_of(tokenizer.convert_ids_to_tokens(token), tokenizer.decode([token])) for token in ids]
    assert b"".join(map(bytes, found)).decode() == "<0x41> é😀 well"
    assert _bytes_of("<0xF0>", "\ufffd") == [0xF0] and _bytes_of("é", "é") == list("é".encode())
    assert _bytes_of("▁é", "\ufffd") is None and _bytes_of(None, "") == []


@contextmanager
def failing(served, error):
    """The model fails; for each time it is kept whether what it failed on before is still held."""
    held, before = [], []

    def fail(_, args):
        held.append(before != [] and before[-1]() is not None)
        before.append(weakref.ref(args[0]))
        raise error()

    hook = served.desk.backend.model.transformer.get_output_embeddings().register_forward_pre_hook(fail)
    try:
        yield held
    finally:
        hook.remove()


def test_a_device_without_room_is_told_of_here_and_there(served, client, answering, caplog):
    talk = {"messages": [{"role": "user", "content": "Well?"}], "n": 2}
    with failing(served, torch.OutOfMemoryError) as held:
        answer = served.client.post("/v1/chat/completions", json=talk)
    assert answer.status_code == 503 and "retry-after" in answer.headers, answer.text
    assert "no room for a batch of 1 sample" in answer.json()["error"]["message"]
    assert "no room for a batch of 2 samples" in caplog.text and "batch_size=1" in caplog.text
    assert held == [False] * 3  # both, then each alone
    assert asked(client, answering, "Well?").choices[0].message.content


def test_a_full_disk_is_not_laid_on_the_model(served, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/srv/files-1/0.wav")

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfileobj", full)  # what writes the files of a form
        answer = served.client.post("/v1/classify", files=[("file", ("a.wav", b"RIFF"))], data={"tasks": "EMO"})
    said = answer.json()["error"]["message"]
    assert answer.status_code == 503 and "retry-after" in answer.headers, answer.text
    assert "No space left on device" in said and "model" not in said and "/srv" not in said


def test_a_model_that_fails_leaves_its_trace_in_the_log(served, caplog):
    with failing(served, ZeroDivisionError):
        answer = served.client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Sesame?"}]})
    assert answer.status_code == 500 and "the model failed on a batch of 1 row" in caplog.text
    assert "in _predictions" in caplog.text and "Sesame" not in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("more", "param", "said"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty", "not supported"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "up to 4"),
        ({"stop": [""]}, "stop", "up to 4"),
        ({"top_logprobs": 2}, "top_logprobs", "with logprobs"),
        ({"logprobs": True, "stream": True}, "logprobs", "not told in a stream"),
        ({"n": 17}, "n", "from 1 to 16"),
        ({"n": -1}, "n", "from 1 to 16"),
        ({"n": True}, "n", "from 1 to 16"),
        ({"stop": {}}, "stop", "up to 4"),
        ({"stop": ["x"] * 10_000}, "stop", "up to 4"),
        ({"n": 2, "stream": True}, "n", "1 for a stream"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "not supported"),
        ({"temperature": 3}, "temperature", "from 0 to 2"),
        ({"max_tokens": LONGEST + 1}, "max_tokens", f"from 1 to {LONGEST}"),
        ({"max_tokens": 0}, "max_tokens", f"from 1 to {LONGEST}"),
        ({"max_completion_tokens": 0, "max_tokens": 2}, "max_tokens", f"from 1 to {LONGEST}"),
        ({"extra_body": {"guided_choice": ["a"]}}, "guided_choice", "not supported"),
    ],
)
def test_a_parameter_that_is_not_offered_is_refused(client, answering, more, param, said):
    with pytest.raises(openai.BadRequestError, match=said) as refused:
        asked(client, answering, "Well?", **more)
    assert refused.value.param == param


def test_what_cannot_be_asked_is_refused(client, served, answering, files, caplog):
    away = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}}
    file = {"type": "video_url", "video_url": {"url": "file:///etc/passwd"}}
    text = {"type": "image_url", "image_url": {"url": data_url("image/png", b"no picture")}}
    for content, said in (
        ([away], "addresses are not fetched"),
        ([file], "addresses are not fetched"),
        ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,!!"}}], "is no base64"),
        ([{"type": "file", "file": {}}], "must be text"),
        ([text], "a file cannot be read"),
        ([], "must be text or a list"),
    ):
        with pytest.raises(openai.BadRequestError, match=said):
            asked(client, answering, content)
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4o' here"):
        asked(client, "gpt-4o", "Well?")
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0) as stranger:
        for call in (lambda: asked(stranger, answering, "Well?"), lambda: list(stranger.models.list())):
            with pytest.raises(openai.AuthenticationError):
                call()
    for body, said in (
        (b"{", "is no JSON"),
        (b"[]", "no JSON object"),
        (b'{"messages": [{"role": "assistant", "content": "x"}]}', "a user last"),
        (b"[" * 100_000, "is no JSON"),
    ):
        refused = served.client.post("/v1/chat/completions", content=body)
        assert refused.status_code == 400 and said in refused.json()["error"]["message"]
    for fields, said in (
        ({"tasks": "EMOTION"}, "unknown task"),
        ({"datasets": ["cremat"]}, "cremat"),
        ({"files": [{"name": "x.txt"}]}, "must be a data URL"),
    ):
        refused = served.classify(files / "words.txt", **fields)
        assert refused.status_code == 400 and said in refused.json()["error"]["message"], refused.text
    long = served.classify(files / "words.txt", tasks="x" * 100_000)
    assert long.status_code == 400 and len(long.text) < 3000
    assert served.client.post("/v1/classify", headers={"origin": "http://["}, json={}).status_code == 403
    assert not caplog.text  # what a client sends is no fault of the server, and not to be read in its log


def test_descriptors_of_adapters_are_measured_on_the_fly_or_named(answering, files, tmp_path, monkeypatch):
    pytest.importorskip("opensmile", reason="opensmile is not installed")
    adapted = write_adapted(tmp_path / "adapted", answering)
    replies = package.ask(adapted, files / "sound.wav", datasets=["cremad", "tess"])
    plain = package.ask(answering, files / "sound.wav", datasets=["cremad"])
    wanted = {"tasks": None, "datasets": "cremad,tess"}
    with serving(adapted, tmp_path / "desk", config=settings()) as served:
        results = served.classify(files / "sound.wav", **wanted).json()["results"]
        for found, reply in zip(results, replies, strict=True):
            assert (found["dataset"], found["error"]) == (reply.dataset, None)
            assert found["probs"] == pytest.approx(reply.probs, abs=1e-6)
        assert results[0]["probs"] != pytest.approx(plain[0].probs, abs=1e-4)
        soundfile.write(tmp_path / "short.wav", np.zeros(320), 16_000)
        paths = (tmp_path / "short.wav", files / "sound.wav")
        sent = [("file", (path.name, path.read_bytes())) for path in paths]
        answer = served.client.post("/v1/classify", files=sent, data={"datasets": "cremad"})
        short, whole = answer.json()["results"]
        assert short["error"].startswith("no descriptors: ")
        assert whole["probs"] == pytest.approx(results[0]["probs"], abs=1e-6)
    monkeypatch.setattr("hba.descriptors.sound.installed_version", lambda name: None)
    with serving(adapted, tmp_path / "desk", config=settings()) as served:
        refused = served.classify(files / "sound.wav", **wanted)
        assert refused.status_code == 400
        assert "the adapters of cremad read descriptors, and opensmile is not installed" in refused.text
        assert served.classify(files / "sound.wav").status_code == 200  # EMO is asked by tess, which has none


def test_one_broken_file_of_several_is_named(served, files):
    sent = [("file", ("a.mp4", b"no clip at all")), ("file", ("b.wav", (files / "sound.wav").read_bytes()))]
    answer = served.client.post("/v1/classify", files=sent, data={"tasks": "EMO"})
    broken, whole = answer.json()["results"]
    assert answer.status_code == 200 and whole["error"] is None and "cannot be decoded" in broken["error"]
    assert str(served.desk.folder) not in answer.text


def test_an_empty_list_of_tasks_is_as_none(served, files):
    whole = served.classify(files / "words.txt", tasks=None).json()["results"]
    for nothing in ([""], [], ",", " "):
        answer = served.classify(files / "words.txt", tasks=nothing)
        assert answer.status_code == 200 and len(answer.json()["results"]) == len(whole) > 1, answer.text


def test_a_desk_closes_while_the_model_answers(answering, files, tmp_path, monkeypatch):
    """What the model is at is answered, what waits is told, and the threads and files go."""
    desk = Desk(str(answering), folder=tmp_path, config=settings("batch_size=1", "loader.workers=0"))
    begun, go_on, classify = threading.Event(), threading.Event(), desk.backend.classify

    def slow(batch):
        begun.set()
        assert go_on.wait(PATIENCE)
        return classify(batch)

    monkeypatch.setattr(desk.backend, "classify", slow)
    ((_, first),) = desk.asks(files / "words.txt", task="EMO")
    assert begun.wait(PATIENCE)
    ((_, second),) = desk.asks(files / "words.txt", task="EMO")
    with desk._changed:
        assert desk._changed.wait_for(lambda: desk._ready, PATIENCE)
    second.add_done_callback(lambda _: go_on.set())  # the model goes on once the desk is closing
    desk.close()
    assert first.result(PATIENCE).label is not None and isinstance(second.exception(0), FullError)
    assert not any(thread.is_alive() for thread in desk._threads) and not desk.folder.exists()


def test_health_and_metrics_and_who_may_ask(served):
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{served.url}/metrics").status_code == 401
    counted = served.client.get("/metrics").text
    assert 'hba_requests_total{path="/metrics",status="401"} 1' in counted
    assert "# TYPE hba_rows_total counter" in counted and "hba_rows_waiting 0" in counted
    for method, path, status, allow in (
        ("GET", "/v1/nothing", 404, None),
        ("GET", "/v1/classify", 405, "POST"),
        ("DELETE", "/v1/models", 405, "GET, HEAD"),
        ("PUT", "/v1/chat/completions", 405, "POST"),
    ):
        refused = served.client.request(method, path)
        assert (refused.status_code, refused.headers.get("allow")) == (status, allow)
        assert refused.json()["error"]["type"] == "invalid_request_error"
    address = httpx.URL(served.url)
    with socket.create_connection((address.host, address.port), timeout=PATIENCE) as link, link.makefile("rb") as heard:
        link.sendall(b"this is no HTTP\r\n\r\n")
        head, _, said = heard.read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ") and json.loads(said)["error"]["code"] == "invalid_http"
    other = {"origin": "https://example.org"}
    assert served.client.post("/v1/classify", headers=other, json={}).status_code == 403
    assert served.client.get("/health", headers={"host": "example.org"}).status_code == 421
