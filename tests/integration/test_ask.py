"""`hba ask`: files of one's own are answered as `hba predict` answers rows, and one that is broken stops no other."""

import csv
import io
import json
import shutil
import subprocess
import sys
import wave
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import numpy as np
import pytest
import soundfile

import hba as package
from hba.atlas.build import look_at, row_of
from hba.errors import InputError
from hba.evaluate.predictions import read_predictions
from hba.taxonomy import BUILTIN

FEW = ["loader.workers=0", "encode.num_frames=2", "encode.max_pixels=3136"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, mini_atlas, backbone):
    """Heads of every domain, hardly trained: what they say does not matter here."""
    folder = tmp_path_factory.mktemp("asked") / "sft"
    settings = [f"atlas={mini_atlas}", f"model.name={backbone}", "model.strategy=heads", *FEW, "train.max_steps=12"]
    settings += [
        "train.batch_size=32",
        "train.validate_every=12",
        "mix.temperature=8",
        "validation_split=validation[:60]",
    ]
    command = [sys.executable, "-m", "hba", "train", "sft", "--run", str(folder), *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def probabilities(replies):
    return {(reply["file"], reply["dataset"]): reply["probs"] for reply in replies}


def test_a_folder_is_answered_as_predict_answers_its_rows(hba, run, files, tmp_path):
    code, out, err = hba("ask", run, files, "--task", "EMO,SAR", "--json")
    assert code == 0, err
    replies = json.loads(out)["answers"]
    assert len(replies) == 8 and {reply["task"] for reply in replies} == {"EMO", "SAR"}
    assert all(reply["answer"] == max(reply["probs"], key=reply["probs"].get) for reply in replies)
    rows = []
    for reply in replies:
        medium = look_at(type(files)(reply["file"]))
        shutil.copy(medium.path, tmp_path)
        row = row_of(medium, medium.path.name, reply["dataset"], BUILTIN, question=None, transcript=None)
        rows.append(json.dumps(row | {"id": f"{reply['file']} {reply['dataset']}"}))
    (tmp_path / "test.jsonl").write_text("\n".join(rows), encoding="utf-8")
    code, _, err = hba("predict", run, "--atlas", tmp_path, "--run", tmp_path / "run", "loader.workers=0")
    assert code == 0, err
    predicted = {each.id: each for each in read_predictions(tmp_path / "run" / "predictions.jsonl")}
    for (file, dataset), probs in probabilities(replies).items():
        assert predicted[f"{file} {dataset}"].probs == pytest.approx(probs, abs=1e-6)
    told = package.ask(run, files, tasks=["EMO", "SAR"])
    assert probabilities(vars(reply) for reply in told).keys() == probabilities(replies).keys()
    for reply, said in zip(told, replies, strict=True):
        assert reply.probs == pytest.approx(said["probs"], abs=1e-6)


def test_heads_answer_all_that_they_know_and_a_broken_file_is_named(hba, run, files, tmp_path):
    shutil.copy(files / "clip.mp4", tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_bytes(b"no clip at all")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\x00bad")
    with wave.open(str(tmp_path / "d.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(16000)
    code, out, err = hba("ask", run, tmp_path, "--csv")
    assert code == 2
    found = list(csv.DictReader(io.StringIO(out)))
    whole = [row for row in found if not row["error"]]
    assert {row["file"] for row in whole} == {str(tmp_path / "a.mp4")}
    assert {row["task"] for row in whole} == {"SEN", "EMO", "HUM", "SAR", "ANX", "DEP", "PTSD"}
    assert all(0 < float(row["probability"]) <= 1 for row in whole)
    for name in ("b.mp4", "c.txt", "d.wav"):
        assert f"error: {tmp_path / name}: " in err
    code, out, _ = hba("ask", run, files / "clip.mp4", "--dataset", "cremad")
    assert code == 0 and "EMO" in out and "no diagnosis" in out


def test_a_question_of_ones_own_reaches_a_server(hba, files, chat_server):
    words = {"message": {"content": "She is glad."}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 9, "completion_tokens": 4}
    server = chat_server(say=[["jumping", 200, {"model": "m", "choices": [words], "usage": usage}]])
    asked = ["--backend", "openai", "--base-url", server.url, "--question", "Why is she jumping?"]
    code, out, err = hba("ask", "m", files / "picture.png", *asked, "--json")
    assert code == 0, err
    (reply,) = json.loads(out)["answers"]
    assert "She is glad." in reply["text"] and reply["probs"] is None
    assert (reply["task"], reply["dataset"]) == ("", "")  # the question is of none
    code, out, err = hba("ask", "m", files / "picture.png", *asked)
    assert code == 0 and "glad" in out and "SOC" not in out and "task" not in out.splitlines()[1], err


def test_of_a_folder_all_files_below_it_are_asked_but_for_tables(hba, files, chat_server, tmp_path):
    for name in ("happy/b.png", "happy/a.png", "sad/.hidden.png", "sad/c.png"):
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(files / "picture.png", tmp_path / "mine" / name)
    (tmp_path / "mine" / "metadata.csv").write_text("file_name,label\nhappy/a.png,happy\n")
    asked = ["--backend", "openai", "--base-url", chat_server().url, "--question", "Why?"]
    code, out, err = hba("ask", "m", tmp_path / "mine", *asked, "--json")
    assert code == 0, err
    named = [Path(reply["file"]).relative_to(tmp_path / "mine").as_posix() for reply in json.loads(out)["answers"]]
    assert named == ["happy/a.png", "happy/b.png", "sad/c.png"]


def test_bad_input_is_one_sentence(hba, run, files, backbone, tmp_path):
    (tmp_path / "empty").mkdir()
    for arguments, said in (
        ([run, tmp_path / "gone.mp4"], "gone.mp4: no such file or folder"),
        ([run, tmp_path / "empty"], "no files in this folder"),
        ([run, files, "--task", "EMOTION"], "unknown task 'EMOTION'"),
        ([run, files, "--dataset", "cremat"], "cremat"),
        ([run, files, "--question", "Why?"], "was not trained to answer"),
        ([backbone, files, "--backend", "hf"], "Give --task EMO"),
        ([backbone, files], "its answers would be random"),
        ([run, files, "--csv", "--json"], "exclude each other"),
        ([run, files, "--task", ","], "--task: ',' names nothing"),
        (["majority", files], "the baseline majority looks at no file"),
        ([run, files, "--backend", "random"], "the baseline random looks at no file"),
    ):
        code, out, err = hba("ask", *arguments)
        assert (code, out) == (2, "") and said in err, err
    with pytest.raises(InputError, match="no such file"):
        package.ask(run, tmp_path / "gone.mp4")
    with pytest.raises(InputError, match="no task and no dataset is named"):
        package.ask(run, files, tasks=[])


def tone(path, seconds):
    samples = np.sin(np.arange(round(16_000 * seconds)) ** 1.2 * 0.01).astype(np.float32) * 0.3
    soundfile.write(path, samples, 16_000, subtype="FLOAT")
    return samples


def test_windows_are_answered_as_the_files_that_they_are(hba, run, files, tmp_path):
    samples = tone(tmp_path / "long.wav", 7.6)
    asked = [tmp_path / "long.wav", files / "clip.mp4", files / "picture.png", "--task", "EMO"]
    code, out, err = hba("ask", run, *asked, "--every", "2s", "--json")
    assert code == 0, err
    replies = json.loads(out)["answers"]
    mine = [reply for reply in replies if reply["file"].endswith("long.wav")]
    assert [(reply["start"], reply["end"]) for reply in mine] == [(0, 2), (2, 4), (4, 6), (6, 7.6)]
    assert [reply["start"] for reply in replies if reply["file"].endswith("picture.png")] == [None]
    clip = [reply for reply in replies if reply["file"].endswith("clip.mp4")]
    assert clip[0]["start"] == 0 and all(reply["probs"] for reply in clip)
    code, out, err = hba("ask", run, files / "clip.mp4", "--task", "EMO", "--every", "0.5", "--json")
    short = json.loads(out)["answers"]
    assert len(short) > len(clip) and [reply["start"] for reply in short[:3]] == [0, 0.5, 1.0], err
    soundfile.write(tmp_path / "part.wav", samples[32_000:64_000], 16_000, subtype="FLOAT")
    (alone,) = package.ask(run, tmp_path / "part.wav", tasks=["EMO"])
    assert mine[1]["probs"] == pytest.approx(alone.probs, abs=1e-6)
    assert mine[1]["probs"] != pytest.approx(mine[0]["probs"], abs=1e-6)
    code, out, _ = hba("ask", run, tmp_path / "long.wav", "--task", "EMO", "--every", "4", "--csv")
    assert [(row["start"], row["end"]) for row in csv.DictReader(io.StringIO(out))] == [("0.0", "4.0"), ("4.0", "7.6")]
    code, out, _ = hba("ask", run, tmp_path / "long.wav", "--task", "EMO", "--every", "4s")
    assert code == 0 and "4 to 7.6 s" in out
    page = tmp_path / "curve.html"
    code, out, err = hba("ask", run, tmp_path / "long.wav", "--task", "EMO", "--every", "4s", "--out", page, "--json")
    assert code == 0 and json.loads(out)["page"] == str(page), err
    written, windows = page.read_text(encoding="utf-8"), json.loads(out)["answers"]
    first, last = (window["probs"] for window in windows)
    likeliest = max(first, key=lambda label: 4 * first[label] + 3.6 * last[label])
    course = f"{first[likeliest]:.3g} at 0 s to {last[likeliest]:.3g} at 7.6 s"
    assert f"{likeliest} over time: {likeliest}, {course}" in written
    assert "4 to 7.6 s" in written and str(tmp_path) not in written
    code, out, err = hba("ask", run, tmp_path / "long.wav", "--out", tmp_path / "curve.png")
    assert (code, out) == (2, "") and "no page is written as '.png'" in err
    for wrong in ("soon", "0.1", "-3", "inf", "nan"):
        code, out, err = hba("ask", run, tmp_path / "long.wav", f"--every={wrong}")
        assert (code, out) == (2, "") and "--every" in err


def test_what_is_said_is_heard_by_a_recogniser(hba, run, files, whisper, tmp_path):
    tone(tmp_path / "a.wav", 2)
    asked = ["ask", run, tmp_path / "a.wav", files / "picture.png", "--task", "EMO"]
    code, out, err = hba(*asked, "--transcribe", whisper, "--json")
    assert code == 0, err
    sound, picture = json.loads(out)["answers"]
    assert sound["transcript"] and picture["transcript"] is None
    (told,) = package.ask(run, tmp_path / "a.wav", tasks=["EMO"], transcript=sound["transcript"])
    assert sound["probs"] == pytest.approx(told.probs, abs=1e-6)
    code, out, err = hba(*asked, "--transcribe", run)
    assert (code, out) == (2, "") and "cannot load a recognition model" in err
    code, out, err = hba(*asked, "--transcribe", whisper, "--transcript", "hm")
    assert (code, out) == (2, "") and "--transcript" in err


class Ears(BaseHTTPRequestHandler):
    """/v1/audio/transcriptions, which is busy for the first request and says how many seconds it has heard."""

    heard: ClassVar[list] = []

    def do_GET(self):
        self.send_error(404)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        form = message_from_bytes(b"content-type: " + self.headers["content-type"].encode() + b"\r\n\r\n" + body)
        parts = {part.get_param("name", header="content-disposition"): part for part in form.get_payload()}
        sound, rate = soundfile.read(io.BytesIO(parts["file"].get_payload(decode=True)), dtype="float32")
        model = parts["model"].get_payload()
        self.heard.append((self.path, model, self.headers["authorization"], sound))
        status, said = (503, {}) if len(self.heard) == 1 else (200, {"text": f" {len(sound) / rate:g} seconds\n"})
        if model == "deaf":
            status, said = 400, {"error": {"message": "no such sound"}}
        if model == "locked" and self.headers["authorization"] != "Bearer for-ears":
            status, said = 401, {"error": {"message": "who are you?"}}
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(said).encode())

    def log_message(self, *_):
        pass


def test_what_is_said_is_heard_by_a_service(hba, run, files, tmp_path, monkeypatch):
    samples = tone(tmp_path / "a.wav", 2)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-for-openai-alone")
    monkeypatch.setattr(Ears, "heard", [])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Ears)
    Thread(target=server.serve_forever, daemon=True).start()
    service = ["--transcribe-url", f"http://127.0.0.1:{server.server_port}/v1", "--json"]
    asked = ["ask", run, tmp_path / "a.wav", files / "picture.png", "--task", "EMO"]
    code, out, err = hba(*asked, "--transcribe", "openai:whisper-1", *service)
    assert code == 0, err
    sound, picture = json.loads(out)["answers"]
    assert (sound["transcript"], picture["transcript"]) == ("2 seconds", None)
    (told,) = package.ask(run, tmp_path / "a.wav", tasks=["EMO"], transcript="2 seconds")
    assert sound["probs"] == pytest.approx(told.probs, abs=1e-6)
    (path, model, key, first), second = Ears.heard
    assert (path, model, key) == ("/v1/audio/transcriptions", "whisper-1", None)
    assert first == pytest.approx(samples, abs=1e-4) and (second[3] == first).all()
    code, out, err = hba(*asked, "--transcribe", "openai:deaf", *service)
    assert code == 2 and "cannot be transcribed" in err and "no such sound" in err
    assert [reply["error"] is None for reply in json.loads(out)["answers"]] == [False, True]
    code, out, err = hba(*asked, "--transcribe", "somebody/whisper", *service)
    assert (code, out) == (2, "") and "--transcribe-url" in err
    monkeypatch.setenv("MODELS_KEY", "for-the-model-alone")
    monkeypatch.setenv("EARS_KEY", "for-ears")
    locked = [*asked, "--set", "remote.api_key_env=MODELS_KEY", "--transcribe", "openai:locked", *service]
    code, out, err = hba(*locked)
    assert (code, out) == (1, "") and "then add --transcribe-key-env MY_KEY." in err and "remote." not in err
    assert Ears.heard[-1][2] is None
    code, out, err = hba(*locked, "--transcribe-key-env", "EARS_KEY")
    assert code == 0 and json.loads(out)["answers"][0]["transcript"] == "2 seconds", err
    assert Ears.heard[-1][2] == "Bearer for-ears"
    code, out, err = hba(*locked, "--transcribe-key-env", "sk-mine")
    assert (code, out) == (2, "") and "then --transcribe-key-env MY_KEY" in err and "sk-mine" not in err
    code, out, err = hba(*asked, "--transcribe", "somebody/whisper", "--transcribe-key-env", "EARS_KEY")
    assert (code, out) == (2, "") and "--transcribe-key-env: is for a recogniser of a service" in err
    Ears.heard.clear()  # busy again for the first request, and asked once
    code, out, err = hba(*asked, "--set", "remote.max_attempts=1", "--transcribe", "openai:whisper-1", *service)
    assert code == 1 and "no reply after 1 attempts" in err and len(Ears.heard) == 1
    server.shutdown()
    server.server_close()
    code, out, err = hba(*asked, "--transcribe", "openai:whisper-1", *service)
    assert (code, out) == (1, "") and "sk-for" not in err and str(server.server_port) in err
    assert "check the port of --transcribe-url" in err


def test_a_media_tag_in_what_is_said_is_text(hba, run, files, tmp_path):
    (tmp_path / "words.txt").write_text("She wrote <audio> and <video>.", encoding="utf-8")
    said = ["--transcript", "and then <image> and <audio>", "--json"]
    code, out, err = hba("ask", run, tmp_path / "words.txt", files / "sound.wav", "--task", "EMO", *said)
    assert code == 0, err
    assert all(reply["error"] is None and reply["probs"] for reply in json.loads(out)["answers"])
    row = row_of(look_at(files / "sound.wav"), "a.wav", "cremad", BUILTIN, question=None, transcript="so <audio>")
    assert row["problem"].startswith('<audio>The speaker says: "so < audio>"')


def test_descriptors_of_adapters_are_extracted_on_the_fly(hba, run, files, tmp_path):
    pytest.importorskip("opensmile", reason="opensmile is not installed")
    from serving import write_adapted

    write_adapted(tmp_path / "adapted", run)
    asked = [files / "sound.wav", "--dataset", "cremad,tess", "--json"]
    code, out, err = hba("ask", tmp_path / "adapted", *asked)
    assert code == 0, err
    cremad, tess = json.loads(out)["answers"]
    before = {reply["dataset"]: reply["probs"] for reply in json.loads(hba("ask", run, *asked)[1])["answers"]}
    assert cremad["probs"] != pytest.approx(before["cremad"], abs=1e-4)
    assert tess["probs"] == pytest.approx(before["tess"], abs=1e-6)
    tone(tmp_path / "short.wav", 0.02)
    code, out, err = hba("ask", tmp_path / "adapted", tmp_path / "short.wav", *asked)
    found = [(reply["dataset"], reply["error"]) for reply in json.loads(out)["answers"]]
    assert code == 2 and found[0][1].startswith("no descriptors: ") and "openSMILE" in found[0][1], err
    assert found[2:] == [("cremad", None), ("tess", None)]
    medium = look_at(files / "sound.wav")
    shutil.copy(medium.path, tmp_path)
    row = row_of(medium, "sound.wav", "cremad", BUILTIN, question=None, transcript=None)
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    described = ["atlas", "describe", tmp_path, "--audio", "egemaps", "--video", "none", "--workers", "1"]
    assert hba(*described)[0] == 0
    predicted = ["predict", tmp_path / "adapted", "--atlas", tmp_path, "--run", tmp_path / "run", "loader.workers=0"]
    assert hba(*predicted)[0] == 0
    (same,) = read_predictions(tmp_path / "run" / "predictions.jsonl")
    assert cremad["probs"] == pytest.approx(same.probs, abs=1e-6)
