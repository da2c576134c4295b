"""The Try page: a clip is recorded in a real browser, answered as `hba ask` answers it, labelled, and found again."""

import hashlib
import json
import os
import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile
import torch
from holding import PATIENCE, until
from safetensors.torch import save_file

import hba as package
from hba import open_atlas
from hba.descriptors.landmarks import environment_folder
from hba.evaluate.desk import Desk
from hba.explorer import media
from hba.explorer.media import landmarks
from hba.explorer.pages import KEPT, kappa_of
from hba.explorer.server import create_app
from hba.report import words
from hba.report.charts import over_time
from hba.storage import write_json
from hba.taxonomy import BUILTIN

SHOTS = os.environ.get("HBA_SCREENSHOTS")


@pytest.fixture(scope="module")
def trying(answering, serve, tmp_path_factory):
    """The address of an explorer with one model under two names, and the folder that it keeps rows in."""
    root = tmp_path_factory.mktemp("trying")
    with closing(Desk(str(answering), folder=root / "desk")) as desk:
        models = {"runs/sft": desk, "runs/other": desk}
        app = create_app(atlas=None, runs=None, cache_folder=root / "cache", models=models, keep=root / "mine")
        with serve(app) as url:
            yield url, root / "mine"


def sent(url, path):
    with path.open("rb") as file:
        return httpx.post(f"{url}/try/clip?name={path.name}", content=file.read(), timeout=600).json()["clip"]


def test_a_recorded_clip_is_answered_labelled_and_found_after_a_reload(trying, answering, recording_browser, tmp_path):
    url, mine = trying
    context = recording_browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.goto(f"{url}/")
    assert "Nothing leaves this machine" in page.inner_text("main") and "no diagnosis" in page.inner_text("main")
    page.click("#camera")
    page.wait_for_selector("#preview:not([hidden])")
    while page.evaluate("document.querySelector('#preview').currentTime") < 1.5:
        page.wait_for_timeout(50)
    page.click("#stop")
    page.wait_for_selector(".tries-answers article:nth-of-type(2) .probs", timeout=600_000)
    assert not page.is_visible("#preview")
    page.wait_for_selector("[data-sound] svg.wave", timeout=600_000)
    page.fill("#annotator", "ann")
    page.focus("#ask")
    page.keyboard.press("2")
    page.wait_for_selector("text=Kept. ann:")
    page.reload()
    assert page.locator("#kept tbody tr").count() == 1 and page.locator("#player video").count() == 1
    page.click("#ask")
    page.wait_for_selector(".tries-labels")
    page.fill("#annotator", "bob")
    page.locator("[data-digit='2']").click()
    page.wait_for_selector("text=ann and bob agree on 1 clip with kappa not defined")
    for width, scheme in ((1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        if SHOTS:
            page.screenshot(path=Path(SHOTS) / f"try-{width}-{scheme}.png", full_page=True)
    context.close()
    assert not faults
    (sample,) = open_atlas(mine, split="kept")
    assert sample.label == sample.target and sample.videos == 1
    assert sample.extra["labels"] == {"ann": sample.label, "bob": sample.label}
    (medium,) = (mine / "media").iterdir()
    (reply,) = package.ask(answering, medium, tasks=["EMO"])
    assert sample.extra["said"]["runs/sft"]["answer"] == reply.answer
    assert sample.extra["said"]["runs/sft"]["probs"] == pytest.approx(reply.probs, abs=1e-6)


def test_several_clips_wait_in_a_queue_and_are_labelled_by_keys_alone(
    answering, serve, recording_browser, mini_atlas, tmp_path
):
    sounds = sorted(mini_atlas.rglob("*.wav"))[:2]
    (tmp_path / "notes.md").write_text("no medium")
    with closing(Desk(str(answering), folder=tmp_path / "desk")) as desk:
        models, mine = {"runs/sft": desk}, tmp_path / "mine"
        app = create_app(atlas=None, runs=None, cache_folder=tmp_path / "cache", models=models, keep=mine)
        with serve(app) as url:
            context = recording_browser.new_context(viewport={"width": 1280, "height": 900})
            page = context.new_page()
            faults = []
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.goto(url)
            page.set_input_files("#file", [*sounds, tmp_path / "notes.md"])
            page.wait_for_selector("text=clip 1 of 2")
            page.wait_for_selector(".tries-labels", timeout=60_000)
            page.click("#curve")
            page.wait_for_selector(".over-time figure svg.lines", timeout=60_000)
            page.wait_for_selector("#player .over-time .head", state="attached")
            page.focus("#ask")
            keeps, asks = [], []
            page.route("**/try/keep", lambda route: keeps.append(route))
            page.route("**/try/ask", lambda route: asks.append(route))
            for _ in range(2):  # pressed again while the first is on its way
                page.keyboard.press("1")
            page.keyboard.down("1")
            while not keeps:
                page.wait_for_timeout(20)
            keeps[0].continue_()
            page.wait_for_selector("text=clip 2 of 2")
            while not asks:
                page.wait_for_timeout(20)
            page.keyboard.press("2")  # the second clip is shown, its answers are not
            asks[0].continue_()
            page.locator("#state", has_text="Answered.").wait_for(timeout=60_000)
            page.keyboard.down("1")  # still held
            assert len(keeps) == 1
            page.keyboard.up("1")
            page.unroute_all()
            page.locator("#state", has_text="Answered.").wait_for(timeout=60_000)
            assert page.locator("#player .over-time").count() == 0  # it was of the clip before
            page.keyboard.press("2")
            page.wait_for_selector("text=That was the last clip.")
            assert page.locator("#kept tbody tr").count() == 2
            # Chosen again, the first is passed over: this annotator has labelled it.
            page.set_input_files("#file", [])
            page.locator("#state", has_text="No files.").wait_for()
            page.set_input_files("#file", sounds)
            page.locator("#state", has_text="Answered.").wait_for(timeout=60_000)
            assert page.input_value("#clip") == hashlib.sha256(sounds[1].read_bytes()).hexdigest()[:24]
            # A browser does not know every type.
            unnamed = shutil.copy(sounds[0], tmp_path / "talk")
            page.set_input_files("#file", [unnamed, tmp_path / "notes.md"])
            page.wait_for_selector("text=clip 1 of 1; left out, as no clip, sound or picture: 1")
            page.locator("#state", has_text="Answered.").wait_for(timeout=60_000)
            assert page.locator("#answers .probs").count() == 1
            context.close()
    assert not faults
    assert [row["labels"] for row in map(json.loads, (mine / KEPT).read_text().splitlines())] == [
        {"me": "anger"},
        {"me": "disgust"},
    ]


def test_windows_on_the_page_are_those_of_ask(trying, answering, tmp_path):
    url, _ = trying
    clip = tmp_path / "talk.wav"
    tone = np.sin(np.arange(3 * 16000) / 20) * np.linspace(0.01, 0.9, 3 * 16000)
    soundfile.write(clip, tone, 16000)
    form = {"clip": sent(url, clip), "task": "EMO", "models": ["runs/sft"]}
    said = httpx.post(f"{url}/try/curve", data=form | {"every": "1"}, timeout=60)
    assert said.status_code == 200, said.text
    replies = package.ask(answering, clip, tasks=["EMO"], every=1)
    assert len(replies) == 3 and replies[0].probs != replies[2].probs
    for reply in replies:
        assert words.when(reply.start, reply.end) in said.text and words.likeliest(reply.probs) in said.text
    first = over_time(replies)[0]
    assert str(first.svg) in said.text and "at 3 s" in first.svg
    assert "runs/sft over time: EMO, emotion recognition" in said.text
    for every, what in (("0.1", "windows of 0.1 seconds"), ("nan", "windows of nan"), ("", "windows of no seconds")):
        assert what in httpx.post(f"{url}/try/curve", data=form | {"every": every}).text
    long = tmp_path / "long.wav"
    soundfile.write(long, np.zeros(31 * 16000), 16000)
    refused = httpx.post(f"{url}/try/curve", data=form | {"clip": sent(url, long), "every": "0.5"}, timeout=60)
    assert refused.status_code == 404 and "more than 60 windows of 0.5 seconds" in refused.text


def test_a_page_says_which_task_its_answers_are_of(trying, mini_atlas):
    url, _ = trying
    form = {"clip": sent(url, next(iter(sorted(mini_atlas.rglob("*.wav"))))), "models": ["runs/sft"], "every": "1"}
    assert ">SAR, sarcasm detection</option>" in httpx.get(f"{url}/try").text
    for more, what in (({"task": "SAR"}, "SAR, sarcasm detection"), ({"question": "Who is it?"}, "Who is it?")):
        assert f"<h3>{what}</h3>" in httpx.post(f"{url}/try/ask", data=form | more, timeout=PATIENCE).text
    for page in ("ask", "curve"):
        refused = httpx.post(f"{url}/try/{page}", data=form | {"task": ""}, timeout=PATIENCE)
        assert refused.status_code == 404 and "nothing is asked" in refused.text


SEEING = """\
import os, struct, sys, time
print("0.10.21", flush=True)
while os.path.exists("HELD"):
    open("HELD.begun", "w").close()
    time.sleep(0.01)
while head := sys.stdin.buffer.read(8):
    height, width = struct.unpack("<II", head)
    if height:
        sys.stdin.buffer.read(height * width * 3)
        sys.stdout.buffer.write(struct.pack("<f", 0.5) * 1629)
        sys.stdout.buffer.flush()
"""


def set_up_mediapipe(folder):
    """One that sees a person everywhere, and nothing as long as there is a file `folder`/held."""
    python = environment_folder() / "bin" / "python"
    python.parent.mkdir(parents=True)
    (folder / "seeing.py").write_text(SEEING.replace("HELD", str(folder / "held")))
    python.write_text(f"#!/bin/sh\nexec {sys.executable} {folder / 'seeing.py'}\n")
    python.chmod(0o755)
    write_json(environment_folder() / "hba.json", {"mediapipe": "0.10.21"})


def test_landmarks_are_found_for_a_clip_or_what_is_missing_is_named(serve, mini_atlas, tmp_path, monkeypatch):
    monkeypatch.setenv("HBA_CACHE", str(tmp_path / "cache"))
    app = create_app(atlas=None, runs=None, cache_folder=tmp_path / "rows", models={"runs/full": Full(BUILTIN)})
    with serve(app) as url:
        clip = sent(url, next(iter(sorted(mini_atlas.rglob("*.mp4")))))
        said = httpx.get(f"{url}/try/landmarks/{clip}", timeout=60).text
        assert "not set up" in said and "hba atlas describe --setup" in said
        set_up_mediapipe(tmp_path)
        found = httpx.get(f"{url}/try/landmarks/{clip}", timeout=600).json()
        frames = found["frames"]
    assert {name: len(points[0]) for name, points in frames.items()} == {
        "pose": 33, "face": 468, "left_hand": 21, "right_hand": 21
    }  # fmt: skip
    assert frames["pose"][0][0] == [0.5, 0.5] and found["rate"] == 15


def test_a_clip_that_takes_long_keeps_nobody_waiting(serve, mini_atlas, tmp_path, monkeypatch):
    """While landmarks of one clip are looked for another is drawn and kept; they come all the same."""
    monkeypatch.setenv("HBA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(media, "PATIENCE_SECONDS", PATIENCE)
    set_up_mediapipe(tmp_path)
    held, begun = tmp_path / "held", tmp_path / "held.begun"
    held.touch()
    how = {"cache_folder": tmp_path / "rows", "models": {"runs/full": Full(BUILTIN)}, "keep": tmp_path / "mine"}
    with serve(create_app(atlas=None, runs=None, **how)) as url, ThreadPoolExecutor(1) as pool:
        slow, quick = (sent(url, next(iter(sorted(mini_atlas.rglob(f"*.{kind}"))))) for kind in ("mp4", "wav"))
        try:
            coming = pool.submit(httpx.get, f"{url}/try/landmarks/{slow}", timeout=PATIENCE)
            until(begun.exists)
            assert "<svg" in httpx.get(f"{url}/try/sound/{quick}", timeout=PATIENCE).text
            label = {"clip": quick, "task": "EMO", "label": "fear"}
            assert "me: fear" in httpx.post(f"{url}/try/keep", data=label, timeout=PATIENCE).text
            assert not coming.done()
        finally:
            held.unlink()
        assert coming.result().json()["frames"]["pose"]


def test_stored_landmarks_say_how_many_frames_there_were(tmp_path):
    """Those of a long clip end before it does: they are not spread over the rest of it."""
    save_file({"pose": torch.ones(1600, 33, 3)}, tmp_path / "long.safetensors")
    stored = landmarks(tmp_path / "long.safetensors", "here")
    assert (len(stored["frames"]["pose"]), stored["total"], stored["rate"]) == (1500, 1600, None)


def test_two_who_differ_leave_a_row_without_an_answer(trying, mini_atlas):
    url, mine = trying
    clip = sent(url, next(iter(sorted(mini_atlas.rglob("*.wav")))))
    asked = httpx.post(f"{url}/try/ask", data={"clip": clip, "task": "SAR", "models": ["runs/sft"]}, timeout=600)
    assert asked.status_code == 200 and "not sarcasm" in asked.text
    for who, label in (("ann", "sarcasm"), ("bob", "not sarcasm")):
        kept = httpx.post(
            f"{url}/try/keep", data={"clip": clip, "task": "SAR", "label": label, "annotator": who}, timeout=600
        )
        assert kept.status_code == 200, kept.text
    rows = [json.loads(line) for line in (mine / KEPT).read_text().splitlines()]
    row = next(row for row in rows if row["id"].startswith(clip))
    assert row["labels"] == {"ann": "sarcasm", "bob": "not sarcasm"} and "answer" not in row
    assert "differ" in kept.text
    assert open_atlas(mine, split="kept").columns is not None


def test_what_is_no_clip_or_no_label_is_refused(trying, mini_atlas, tmp_path):
    url, mine = trying
    (tmp_path / "broken.mp4").write_bytes(b"no clip at all")
    broken = sent(url, tmp_path / "broken.mp4")
    asked = httpx.post(f"{url}/try/ask", data={"clip": broken, "task": "EMO", "models": ["runs/sft"]}, timeout=600)
    assert asked.status_code == 200 and "cannot be decoded" in asked.text
    for data in ({"label": "nonsense"}, {"label": "happy", "clip": "../../etc/passwd"}, {"label": "happy"}):
        said = httpx.post(f"{url}/try/keep", data={"clip": broken, "task": "EMO"} | data, timeout=600)
        assert said.status_code in (404, 500), said.text
    foreign = {"origin": "https://example.org"}
    assert httpx.post(f"{url}/try/keep", data={"clip": broken}, headers=foreign, timeout=600).status_code == 403
    assert not [path for path in (mine / "media").glob("*") if path.suffix == ".mp4"]


class Full:
    """A model whose device has no room."""

    def __init__(self, taxonomy):
        self.taxonomy = taxonomy

    def asks(self, path, *, task=None, question=None):
        answer = Future()
        answer.set_exception(RuntimeError("out of memory at /home/jane"))
        return [("cremad", answer)]


def test_a_model_that_fails_leaves_the_others_their_answers(answering, serve, tmp_path, mini_atlas):
    with closing(Desk(str(answering), folder=tmp_path / "desk")) as desk:
        models = {"runs/full": Full(desk.taxonomy), "runs/sft": desk}
        with serve(create_app(atlas=None, runs=None, cache_folder=tmp_path / "cache", models=models)) as url:
            clip = sent(url, next(iter(sorted(mini_atlas.rglob("*.wav")))))
            asked = httpx.post(f"{url}/try/ask", data={"clip": clip, "task": "SAR", "models": [*models]}, timeout=600)
    assert asked.status_code == 200 and "not sarcasm" in asked.text
    assert "the model failed (RuntimeError)" in asked.text and "jane" not in asked.text


def test_kappa_is_cohens():
    """By hand: 5 of 6 equal; chance 2/6 * 3/6 + 4/6 * 3/6 = 1/2."""
    pairs = [("a", "a"), ("a", "a"), ("b", "b"), ("b", "b"), ("b", "a"), ("b", "b")]
    assert kappa_of(pairs) == pytest.approx((5 / 6 - 1 / 2) / (1 - 1 / 2))
    assert kappa_of([("a", "a")] * 3) is None


def test_keep_is_for_the_try_page(hba, tmp_path):
    code, _, err = hba("explore", "--keep", tmp_path, "--port", "0")
    assert code == 2 and "Name --models" in err
