"""Predictions by a remote model against a server on the loopback: what is sent, and what becomes of the replies."""

import base64
import importlib.util
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading

import numpy as np
import PIL.Image
import pytest
import soundfile
import torch

from hba import open_atlas
from hba.batch.config import EncodeConfig
from hba.config import load_config
from hba.errors import ConfigError, InputError
from hba.evaluate.backends.interface import open_backend
from hba.evaluate.config import Opening, PredictConfig
from hba.evaluate.predict import Selection, predict_run
from hba.evaluate.predictions import read_predictions
from hba.evaluate.score import score_run

ENCODE = EncodeConfig(num_frames=2, max_pixels=3136)


def opening(mini_atlas, *overrides, encode=ENCODE, split="test"):
    atlas = open_atlas(mini_atlas, split=split)
    config = load_config(PredictConfig, None, ["remote.base_url=http://127.0.0.1:9/v1", *overrides])
    return Opening(model="m", backend="openai", place=str(mini_atlas), atlas=atlas, config=config, encode=encode)


def seen_and_heard(atlas):
    """A sample with a video and a sound."""
    return next(sample for sample in atlas if sample.videos and sample.audios)


def test_a_request_holds_the_media_where_their_tags_stand(mini_atlas):
    given = opening(mini_atlas)
    sample = seen_and_heard(given.atlas)
    (message,) = open_backend("openai", given).request(sample).messages
    kinds = [part["type"] for part in message["content"] if part["type"] != "text"]
    assert sorted(kinds) == ["image_url", "image_url", "input_audio"]
    text = "".join(part["text"] for part in message["content"] if part["type"] == "text")
    assert "\\boxed{}" in text and "<audio>" not in text and "<video>" not in text
    (sound,) = (part["input_audio"] for part in message["content"] if part["type"] == "input_audio")
    heard, rate = soundfile.read(io.BytesIO(base64.b64decode(sound["data"])), dtype="float32")
    (audio,) = sample.load_audios()
    assert rate == 16000 and sound["format"] == "wav"
    np.testing.assert_allclose(heard, audio.samples, rtol=0, atol=0.501 / 32768)  # rounded, never rescaled


def test_frames_are_those_of_the_loader_with_their_times(mini_atlas):
    given = opening(mini_atlas, encode=EncodeConfig(num_frames=2, max_pixels=10**7))
    sample = seen_and_heard(given.atlas)
    (message,) = open_backend("openai", given).request(sample).messages
    urls = [part["image_url"]["url"] for part in message["content"] if part["type"] == "image_url"]
    shown = [np.array(PIL.Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))) for url in urls]
    (video,) = sample.load_videos(2)
    np.testing.assert_array_equal(shown, video.frames)
    times = ", ".join(f"{t:.1f}" for t in video.timestamps_seconds)
    assert any(f"frames at {times} s" in part.get("text", "") for part in message["content"])


def test_a_clip_can_go_as_its_file(mini_atlas):
    given = opening(mini_atlas, "video=file")
    sample = seen_and_heard(given.atlas)
    (message,) = open_backend("openai", given).request(sample).messages
    (url,) = (part["video_url"]["url"] for part in message["content"] if part["type"] == "video_url")
    assert url.startswith("data:video/mp4;base64,")
    assert [base64.b64decode(url.partition(",")[2])] == sample.read_videos()


def test_anthropic_is_refused_sound_before_anything_is_sent(mini_atlas, monkeypatch):
    with pytest.raises(InputError, match=r"takes no audio.*--modalities"):
        open_backend("anthropic", opening(mini_atlas))


def run(folder, atlas, server, *overrides, backend="openai", **options):
    settings = ["remote.first_backoff_seconds=0.01", "encode.num_frames=2", "encode.max_pixels=3136"]
    config = load_config(PredictConfig, None, [f"remote.base_url={server.url}", *settings, *overrides])
    options = {"atlas": str(atlas), "split": "test", "progress": lambda *_: None} | options
    return predict_run("m", folder, backend=backend, config=config, **options)


@pytest.mark.parametrize("backend", ["openai", "google"])
def test_the_server_gets_every_kind_of_medium(mini_atlas, chat_server, tmp_path, backend):
    server = chat_server(brain="kinds")
    said = run(tmp_path, mini_atlas, server, backend=backend)
    atlas = {sample.id: sample for sample in open_atlas(mini_atlas, split="test")}
    predictions = read_predictions(tmp_path / "predictions.jsonl")
    assert said.predicted == len(predictions) == len(atlas) == server.stats()["distinct"]
    for prediction in predictions:
        sample = atlas[prediction.id]
        assert prediction.output.count("input_audio") == sample.audios
        assert prediction.output.count("image_url") == sample.images + 2 * sample.videos
        assert prediction.tokens_out == 5 and prediction.latency_s >= 0


@pytest.mark.parametrize("backend", ["openai", "anthropic", "google"])
def test_answers_are_extracted_and_the_unusable_count_as_wrong(mini_atlas, chat_server, tmp_path, backend):
    run(tmp_path, mini_atlas, chat_server(brain="choose"), "encode.modalities=[]", backend=backend)
    predictions = read_predictions(tmp_path / "predictions.jsonl")
    labelled = [p for p in predictions if p.dataset not in ("siq2", "intentqa", "mimeqa")]
    assert {p.label is None for p in labelled} == {True, False}
    for prediction in labelled:
        boxed = "\\boxed" in prediction.output
        assert (prediction.label is not None) == boxed
    metrics = score_run(tmp_path, resamples=100).record()
    assert metrics["aggregate"]["n_invalid"] == sum(p.label is None for p in labelled)
    for key, entry in metrics["aggregate"]["unmapped"].items():
        rows = [p for p in labelled if p.dataset == key]
        lost = sum(p.label is None for p in rows)
        assert (entry["n"], entry["share"]) == (lost, lost / len(rows))
        assert metrics["datasets"][key]["invalid_share"] == entry["share"]
        assert entry["answers"] == [{"answer": "i would rather not say.", "n": lost}]


def test_a_refused_request_is_an_error_of_its_sample_alone(mini_atlas, chat_server, tmp_path):
    atlas = open_atlas(mini_atlas, split="test")
    victim = next(sample for sample in atlas if sample.label is not None and sample.problem.count('"') == 2)
    server = chat_server(brain="choose", refuse=victim.problem.split('"')[1])
    said = run(tmp_path, mini_atlas, server, "encode.modalities=[]")
    failed = [p for p in read_predictions(tmp_path / "predictions.jsonl") if p.error]
    assert victim.id in {p.id for p in failed} and said.predicted == len(atlas)
    assert {p.error for p in failed} == {"HTTP 400: this is refused"} and all(p.failed for p in failed)
    assert score_run(tmp_path, resamples=100).record()["aggregate"]["n_failed"] == len(failed)


def test_neither_key_nor_host_stands_in_the_run_folder(mini_atlas, chat_server, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-test-0123456789")
    server = chat_server(brain="key")
    run(tmp_path, mini_atlas, server, "remote.api_key_env=MY_KEY", "encode.modalities=[]")
    written = "".join(path.read_text() for path in tmp_path.iterdir() if path.suffix in (".json", ".jsonl"))
    assert "authorized" in written and "sk-test" not in written
    assert json.loads((tmp_path / "predict.json").read_text())["identity"]["model"] == "m"


def test_a_key_in_the_wrong_place_is_neither_written_nor_repeated(hba, mini_atlas, tmp_path):
    key = "AIzaSyD0123456789"
    command = ["predict", "m", "--backend", "openai", "--atlas", mini_atlas, "--run", tmp_path / "run"]
    places = ["remote.api_key={}", "remote.api_key_env={}", "generation.extra={{api_key: {}}}"]
    for place in [*places, "generation.extra={{extra_body: {{Authorization: {}}}}}"]:
        code, out, err = hba(*command, place.format(key))
        assert code == 2 and "Fix: " in err and key not in out + err
    assert not (tmp_path / "run").exists()


def test_why_samples_failed_is_said_once(hba, mini_atlas, chat_server, tmp_path):
    server = chat_server(brain="choose", refuse="Choose from")
    command = ["predict", "m", "--backend", "openai", "--atlas", mini_atlas, "--run", tmp_path]
    code, _, err = hba(*command, f"remote.base_url={server.url}", "encode.modalities=[]", "--datasets", "tess,siq2")
    assert code == 1 and "samples failed and count as wrong (HTTP 400: this is refused); everything else is done" in err


def test_another_prompt_is_another_run(mini_atlas, chat_server, tmp_path):
    server = chat_server()
    run(tmp_path, mini_atlas, server, "encode.modalities=[]")
    with pytest.raises(InputError, match="another format"):
        run(tmp_path, mini_atlas, server, "encode.modalities=[]", "generation.format=think")
    with pytest.raises(InputError, match="another temperature, top_p, seed"):
        run(tmp_path, mini_atlas, server, "encode.modalities=[]", "generation.temperature=0.7")
    moved = chat_server()  # a restarted server has another port: the same model, nothing left to ask
    found = run(tmp_path, mini_atlas, moved, "encode.modalities=[]")
    assert found.predicted and found.addresses == 1
    assert moved.stats()["requests"] == 0
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "predictions.jsonl").write_text("".join(lines[:-2]))  # as after a kill: two are asked at the other
    found = run(tmp_path, mini_atlas, moved, "encode.modalities=[]")
    assert found.predicted == len(lines) and found.addresses == 2
    assert moved.url not in (tmp_path / "predict.json").read_text()


def test_a_blocked_prompt_is_an_answer_that_counts_as_wrong():
    from hba.remote.providers import Google

    reply = Google().read({"promptFeedback": {"blockReason": "SAFETY"}, "usageMetadata": {"promptTokenCount": 7}})
    assert (reply.text, reply.finish, reply.tokens_in, reply.tokens_out) == ("", "SAFETY", 7, None)
    cut = {"candidates": [{"content": {"role": "model"}, "finishReason": "MAX_TOKENS"}]}
    assert Google().read(cut).finish == "MAX_TOKENS"
    for nothing in ({}, {"candidates": []}, {"candidates": [{"content": {}}]}):
        with pytest.raises((KeyError, IndexError, ValueError)):
            Google().read(nothing)


def test_what_was_answered_once_is_not_asked_again_by_another_run(mini_atlas, chat_server, tmp_path):
    server = chat_server(brain="choose")
    options = [f"remote.cache={tmp_path / 'cache'}", "encode.modalities=[]", "generation.temperature=0.5"]
    first = run(tmp_path / "a", mini_atlas, server, *options)
    asked = server.stats()["requests"]
    again = run(tmp_path / "b", mini_atlas, server, *options)
    assert server.stats()["requests"] == asked and again.tally.meter.cached == first.predicted
    a, b = ([(p.id, p.output) for p in read_predictions(tmp_path / name / "predictions.jsonl")] for name in "ab")
    assert sorted(a) == sorted(b)
    run(tmp_path / "c", mini_atlas, server, *options, "generation.seed=1")  # another draw is another question
    assert server.stats()["distinct"] > asked


# --- vLLM: what its engine is given; the engine itself runs in tests/with_vllm ---------------------------------------


def test_the_engine_gets_what_the_loader_decodes(mini_atlas, backbone):
    from transformers import Qwen2_5OmniProcessor

    from hba.batch.prompt import FormatMix
    from hba.evaluate.backends.vllm import engine_inputs

    processor = Qwen2_5OmniProcessor.from_pretrained(backbone)
    sample = seen_and_heard(open_atlas(mini_atlas, split="test"))
    given = engine_inputs(sample, processor, ENCODE, FormatMix(["boxed"]))
    assert given["prompt"].count("<|AUDIO|>") == given["prompt"].count("<|VIDEO|>") == 1
    assert "\\boxed{}" in given["prompt"]
    ((heard, rate),) = given["multi_modal_data"]["audio"]
    np.testing.assert_array_equal(heard, sample.load_audios()[0].samples)
    np.testing.assert_array_equal(given["multi_modal_data"]["video"], [sample.load_videos(2)[0].frames])
    assert rate == 16000 and "image" not in given["multi_modal_data"]
    span = sample.load_videos(ENCODE.num_frames)[0].duration_seconds
    assert given["mm_processor_kwargs"] == {"fps": pytest.approx(ENCODE.num_frames / span)}


def test_the_engine_serves_an_adapter_as_it_is_and_names_what_has_to_be_merged(
    hba, mini_atlas, backbone, model, tmp_path
):
    from hba.evaluate.backends.vllm import served
    from hba.model.merge import write_thinker

    with pytest.raises(InputError, match=r"a thinker alone.*--backend hf"):
        served(str(backbone))
    whole = tmp_path / "whole"
    whole.mkdir()
    write_thinker(model.transformer, whole, dtype=torch.float32)
    model.transformer.generation_config.save_pretrained(whole)
    model.processor.save_pretrained(whole)
    small = ["train.max_steps=1", "train.batch_size=4", "encode.num_frames=2", "encode.max_pixels=3136"]
    options = [f"atlas={mini_atlas}", f"model.name={whole}", "loader.workers=0", "model.lora_r=5", *small]
    rows = ["train_split=train[:4]", "validation_split=validation[:4]"]
    for strategy in ("lora", "full"):
        code, _, err = hba("train", "lm", "--run", tmp_path / strategy, *options, *rows, f"model.strategy={strategy}")
        assert code == 0, err
    found = served(str(tmp_path / "lora"))
    assert found.model == str(whole) and found.rank == 8 and (found.adapter / "adapter_model.safetensors").is_file()
    with pytest.raises(InputError, match=r"`hba merge .*full FOLDER`"):
        served(str(tmp_path / "full"))


def test_a_missing_engine_says_how_to_get_one(mini_atlas):
    if importlib.util.find_spec("vllm") is None:
        with pytest.raises(ConfigError, match=r"vllm cannot be imported.*\[vllm\]"):
            open_backend("vllm", opening(mini_atlas))


# --- what fails for one sample, and what fails for all ---

ROWS = 60


@pytest.fixture
def text_atlas(tmp_path):
    """Rows of text alone, each with its number."""
    folder = tmp_path / "atlas"
    folder.mkdir()
    fixed = {"answer": "anger", "class_label": "anger", "dataset": "cremad", "task": "emotion_cls"}
    fixed |= {"modality_signature": "text", "images": [], "videos": [], "audios": [], "texts": []}
    with (folder / "test.jsonl").open("w") as handle:
        for number in range(ROWS):
            problem = f'She says: "row {number}." What is felt? Choose from: anger, disgust.'
            handle.write(json.dumps({"id": f"r{number}", "problem": problem} | fixed) + "\n")
    return folder


def command(server, atlas, folder, *more):
    """`hba predict` of a remote model, quick to give up."""
    options = ["remote.first_backoff_seconds=0.01", "remote.max_attempts=2", "remote.max_concurrency=4", *more]
    place = ["--atlas", atlas, "--run", folder, "--base-url", server.url, "--json"]
    return ["predict", "m", "--backend", "openai", *place, *options]


def said_so(text, finish="stop", **message):
    return {"model": "m", "choices": [{"message": {"content": text, **message}, "finish_reason": finish}]}


@pytest.mark.parametrize("service", ["deepseek", "anthropic", "openai"])
def test_an_empty_account_stops_the_run_and_marks_no_row_as_wrong(text_atlas, chat_server, tmp_path, hba, service):
    server = chat_server(brain="choose", balance=20, broke=service)
    code, _, err = hba(*command(server, text_atlas, tmp_path / "run"))
    predictions = read_predictions(tmp_path / "run" / "predictions.jsonl")
    assert code == 1 and "add credit" in err and f"20 of {ROWS} rows are answered and kept in {tmp_path / 'run'}" in err
    assert len(predictions) == 20 and not any(p.error for p in predictions)
    code, out, _ = hba(*command(chat_server(brain="choose"), text_atlas, tmp_path / "run"))
    assert code == 0 and json.loads(out)["predicted"] == ROWS and json.loads(out)["failed"] == 0


def test_an_outage_keeps_no_failure_and_the_same_command_asks_what_is_open(text_atlas, chat_server, tmp_path, hba):
    run, back = tmp_path / "run", chat_server(brain="choose")
    code, _, err = hba(*command(chat_server(brain="choose", close_after=20), text_atlas, run))
    assert code == 1 and "requests in a row had no reply" in err and "we are away" in err
    assert len(read_predictions(run / "predictions.jsonl")) == 20
    code, out, err = hba(*command(chat_server(brain="choose", close_after=30), text_atlas, run, "remote.stop_after=99"))
    said = json.loads(out)
    assert code == 1 and (said["predicted"], said["failed"], said["unanswered"]) == (50, 0, 10)
    assert "10 rows got no answer and stay open (no reply after 2 attempts (the last: HTTP 503: we are away))" in err
    assert "Fix: Run the same command again" in err
    code, out, _ = hba(*command(back, text_atlas, run))
    assert code == 0 and json.loads(out)["predicted"] == ROWS and back.stats()["requests"] == 10


def test_a_server_that_was_never_there_leaves_nothing_behind(text_atlas, chat_server, tmp_path, hba):
    server = chat_server()
    server.process.kill()
    server.process.wait()
    code, _, err = hba(*command(server, text_atlas, tmp_path / "run"))
    assert code == 1 and "the connection was refused" in err and f"0 of {ROWS} rows" in err
    assert read_predictions(tmp_path / "run" / "predictions.jsonl") == []


def test_a_refusal_of_every_row_stops_the_run_and_leaves_the_folder_free(text_atlas, chat_server, tmp_path, hba):
    server = chat_server(brain="choose", say=[["0.7", 400, {"error": {"message": "too hot"}}]])
    code, _, err = hba(*command(server, text_atlas, tmp_path / "run", "generation.temperature=0.7"))
    assert code == 1 and "every one of 20 requests failed, the last: HTTP 400: too hot" in err
    assert read_predictions(tmp_path / "run" / "predictions.jsonl") == []
    few = command(server, text_atlas, tmp_path / "few", "--limit", "3")
    assert hba(*few, "generation.temperature=0.7")[0] == 1  # too few to stop: kept as failures of their own
    assert len(read_predictions(tmp_path / "few" / "predictions.jsonl")) == 3
    for folder, options in ((tmp_path / "run", ()), (tmp_path / "few", ("--limit", "3"))):
        code, out, err = hba(*command(server, text_atlas, folder, *options))  # another sampling, the same folder
        assert code == 0 and json.loads(out)["failed"] == 0, err


def test_refusals_in_the_middle_stay_with_their_rows(text_atlas, chat_server, tmp_path, hba):
    server = chat_server(brain="choose", say=[["row 7.", 400, {"error": {"message": "not this one"}}]])
    code, out, _ = hba(*command(server, text_atlas, tmp_path / "run"))
    failed = [p for p in read_predictions(tmp_path / "run" / "predictions.jsonl") if p.error]
    assert code == 1 and json.loads(out)["predicted"] == ROWS
    assert [(p.id, p.error) for p in failed] == [("r7", "HTTP 400: not this one")]


def test_hostile_replies_in_the_middle_of_a_run_are_their_rows_own(text_atlas, chat_server, tmp_path, hba):
    """Half a surrogate pair, an error as an answer, thinking without an answer, a filter, numbers beyond all bounds."""
    odd = {
        "row 3.": said_so("\\boxed{anger} \ud83d"),
        "row 5.": said_so(None, "length", reasoning_content="hm"),
        "row 7.": said_so(None, "content_filter"),
        "row 9.": said_so("", "error", error={"code": 502}),
        "row 11.": said_so("\\boxed{anger}") | {"usage": {"prompt_tokens": 10**40, "completion_tokens": "many"}},
        "row 13.": said_so("[" * 5000),
        "row 15.": said_so("\u0000\ufeff\\boxed{anger}"),
    }
    say = [[words, 200, reply] for words, reply in odd.items()]
    cache = f"remote.cache={tmp_path / 'cache'}"
    for folder in ("run", "again"):  # from the cache, too
        code, out, _ = hba(*command(chat_server(brain="choose", say=say), text_atlas, tmp_path / folder, cache))
        predictions = {p.id: p for p in read_predictions(tmp_path / folder / "predictions.jsonl")}
        said = json.loads(out)
        assert (code, said["predicted"], said["unanswered"] + said["failed"]) == (1, ROWS - said["unanswered"], 1)
        assert predictions["r3"].label == "anger" and predictions["r3"].output.endswith("\ufffd")
        assert (predictions["r5"].output, predictions["r5"].finish) == ("", "length")
        assert (predictions["r7"].output, predictions["r7"].finish) == ("", "content_filter")
        assert (said["cut"], said["filtered"]) == (1, 1)
        assert predictions["r11"].tokens_in is None and predictions["r11"].label == "anger"
    metrics = score_run(tmp_path / "run", resamples=100)
    assert metrics.provenance.answered_by == {"m": len(predictions) - said["failed"]}
    assert (metrics.aggregate.n_cut, metrics.aggregate.n_filtered) == (1, 1)


def test_what_a_server_does_not_take_is_left_out_and_stands_with_each_answer(text_atlas, chat_server, tmp_path, hba):
    server = chat_server(brain="choose", takes_no=["temperature"])
    code, out, err = hba(*command(server, text_atlas, tmp_path / "run"))
    assert code == 0 and "warning: the service refuses a parameter: temperature left out (Unsupported" in err
    assert {p.left_out for p in read_predictions(tmp_path / "run" / "predictions.jsonl")} == {("temperature left out",)}
    left_out = {"temperature left out": ROWS}
    assert json.loads(out)["remote"]["left_out"] == left_out
    assert score_run(tmp_path / "run", resamples=100).provenance.left_out == left_out


def test_while_a_server_is_away_the_display_says_so_and_ctrl_c_ends_it(text_atlas, chat_server, tmp_path):
    server = chat_server(brain="choose", close_after=10)
    patient = ["remote.first_backoff_seconds=20", "remote.max_attempts=8"]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "hba", *map(str, command(server, text_atlas, tmp_path / "run", *patient))],
        stdout=subprocess.DEVNULL, stderr=theirs, env=os.environ | {"COLUMNS": "200", "TERM": "xterm"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background ignore it
    )  # fmt: skip
    os.close(theirs)
    shown, interrupted = b"", False
    while True:
        try:
            part = os.read(ours, 1 << 16)  # until it ends
        except OSError:
            break
        shown += part
        if not interrupted and re.search(rb"attempt \d of 8 \(HTTP 503: we are away\)", shown):
            process.send_signal(signal.SIGINT)
            interrupted = True
    os.close(ours)
    assert process.wait(600) == 130 and b"Traceback" not in shown
    assert b"interrupted; run the same command again to resume" in shown
    assert len(read_predictions(tmp_path / "run" / "predictions.jsonl")) == 10


def test_media_are_prepared_side_by_side(mini_atlas, chat_server, tmp_path, monkeypatch):
    """Each waits until another is at work, too; one after the other would wait for ever."""
    from hba.evaluate.backends import remote

    together = threading.Barrier(2, timeout=600)

    def prepared(sample, encode, *, video):
        together.wait()
        return media_parts(sample, encode, video=video)

    media_parts = remote.media_parts
    monkeypatch.setattr(remote, "media_parts", prepared)
    monkeypatch.setattr(remote, "usable_cores", lambda: 2)
    done = run(tmp_path, mini_atlas, chat_server(), selection=Selection(limit=10))
    assert done.predicted == 10 and done.quarantined == []


def test_a_schema_that_binds_answers_is_never_left_out(text_atlas, chat_server, tmp_path, hba):
    server = chat_server(brain="choose", takes_no=["response_format"])
    code, _, err = hba(*command(server, text_atlas, tmp_path / "run", "generation.constrain=labels"))
    assert code == 1 and "every one of 20 requests failed" in err and "'response_format' is not supported" in err
