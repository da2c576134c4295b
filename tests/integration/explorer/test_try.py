"""The Try page: a clip is recorded in a real browser, answered as `hba ask` answers it, labelled, and found again."""

import json
import os
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path

import httpx
import pytest

import hba as package
from hba import open_atlas
from hba.explorer.pages import KEPT, kappa_of
from hba.explorer.server import create_app
from hba.serve import Desk

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
        return httpx.post(f"{url}/try/clip?name={path.name}", content=file.read(), timeout=60).json()["clip"]


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
    page.wait_for_timeout(1500)
    page.click("#stop")
    page.wait_for_selector(".tries-answers article:nth-of-type(2) .probs", timeout=60_000)
    assert not page.is_visible("#preview")
    page.wait_for_selector("[data-sound] svg.wave", timeout=60_000)
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


def test_two_who_differ_leave_a_row_without_an_answer(trying, mini_atlas):
    url, mine = trying
    clip = sent(url, next(iter(sorted(mini_atlas.rglob("*.wav")))))
    asked = httpx.post(f"{url}/try/ask", data={"clip": clip, "task": "SAR", "models": ["runs/sft"]}, timeout=60)
    assert asked.status_code == 200 and "not sarcasm" in asked.text
    for who, label in (("ann", "sarcasm"), ("bob", "not sarcasm")):
        kept = httpx.post(f"{url}/try/keep", data={"clip": clip, "task": "SAR", "label": label, "annotator": who})
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
    asked = httpx.post(f"{url}/try/ask", data={"clip": broken, "task": "EMO", "models": ["runs/sft"]}, timeout=60)
    assert asked.status_code == 200 and "cannot be decoded" in asked.text
    for data in ({"label": "nonsense"}, {"label": "happy", "clip": "../../etc/passwd"}, {"label": "happy"}):
        said = httpx.post(f"{url}/try/keep", data={"clip": broken, "task": "EMO"} | data, timeout=60)
        assert said.status_code in (404, 500), said.text
    foreign = {"origin": "https://example.org"}
    assert httpx.post(f"{url}/try/keep", data={"clip": broken}, headers=foreign).status_code == 403
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
            asked = httpx.post(f"{url}/try/ask", data={"clip": clip, "task": "SAR", "models": [*models]}, timeout=60)
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
