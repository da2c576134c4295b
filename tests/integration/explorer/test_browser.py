"""What a person does in the explorer, in a real browser."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hba import open_atlas
from hba.evaluate.judge.agreement import read_items, read_labels
from hba.explorer.server import GO_TO, create_app

SHOTS = os.environ.get("HBA_SCREENSHOTS")


def rows_with(atlas, field):
    return next(sample.number for sample in open_atlas(atlas, split="test") if getattr(sample, field))


def until(page, condition, seconds=600):
    """Wait for a condition in the page; its own policy forbids what waits inside it."""
    deadline = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        page.wait_for_timeout(100)


def shown(page):
    """How many rows the page counts."""
    return int(page.locator(".pager").first.inner_text().split()[0].replace(",", ""))


def test_search_and_filter_show_what_the_atlas_has(served, page):
    atlas = open_atlas(served.atlas, split="test")
    page.goto(served.url + "/atlas")
    page.select_option("select[name=split]", "test")
    page.wait_for_url(re.compile("split=test"))
    assert shown(page) == len(atlas)
    page.select_option("select[name=dataset]", "cremad")
    page.wait_for_url(re.compile("dataset=cremad"))
    assert shown(page) == sum(sample.dataset == "cremad" for sample in atlas)
    page.fill("input[name=q]", "nobody wrote this")
    page.press("input[name=q]", "Enter")
    page.wait_for_url(re.compile("q=nobody"))
    assert "No sample is like that" in page.inner_text("main")


@pytest.mark.parametrize("field, tag", [("videos", "video"), ("audios", "audio")])
def test_clips_and_sounds_play(served, page, field, tag):
    page.goto(f"{served.url}/sample/test/{rows_with(served.atlas, field)}")
    until(page, f"document.querySelector('{tag}').readyState > 0")
    page.eval_on_selector(tag, "player => { player.muted = true; return player.play(); }")
    until(page, f"document.querySelector('{tag}').currentTime > 0.1")


def test_sound_and_landmarks_are_drawn(served, page):
    number = next(s.number for s in open_atlas(served.atlas, split="test") if s.ext_video_feats and s.audios)
    page.goto(f"{served.url}/sample/test/{number}")
    page.wait_for_selector("[data-sound] svg.wave", timeout=600_000)
    assert page.eval_on_selector("img.spectrogram", "picture => picture.naturalWidth") == 800
    page.wait_for_selector("canvas[data-ready]", state="attached", timeout=600_000)
    inked = "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(value => value)"
    until(page, f"({inked})(document.querySelector('canvas'))")
    page.wait_for_selector("svg.curve", timeout=600_000)


def test_a_confusion_cell_opens_exactly_its_samples(served, page):
    page.goto(served.url + "/scores?run=a")
    cell = page.locator(".matrix td:not(.right) a").first
    count, tip = int(cell.inner_text()), cell.get_attribute("title")
    cell.click()
    page.wait_for_url(re.compile("/predictions"))
    assert shown(page) == count
    target, answered = re.match(r"(.*) answered as (.*):", tip).groups()
    assert set(page.locator("article dd:first-of-type").all_inner_texts()) == {target}
    assert all(answered in text for text in page.locator("article dd:nth-of-type(2)").all_inner_texts())


def test_two_runs_compared_lead_to_the_flipped_samples(served, page):
    page.goto(served.url + "/compare?a=a&b=b")
    rows = page.locator("table").last.locator("tbody tr")
    assert rows.count() > 0
    page.get_by_text("All that B gained").click()
    page.wait_for_url(re.compile("pair="))
    marks = page.locator("article").first.locator(".mark").all_inner_texts()
    assert marks == ["wrong", "right"]


def test_keys_move_and_open(served, page):
    page.goto(served.url + "/predictions?a=a&verdict=wrong")
    page.keyboard.press("j")
    first = page.evaluate("document.activeElement.querySelector('.id').textContent")
    page.keyboard.press("j")
    assert page.evaluate("document.activeElement.querySelector('.id').textContent") != first
    page.keyboard.press("k")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("/sample/test/"))
    assert page.inner_text("h1") == first


def test_a_verdict_is_saved_and_found_after_a_reload(served, page):
    page.goto(served.url + "/judge?run=b")
    card = page.locator("article").first
    card.get_by_role("button", name="Wrong").click()
    card.get_by_text("You said wrong.").wait_for()
    page.reload()
    assert "You said wrong." in page.locator("article").first.inner_text()
    said = page.locator("article .id").first.inner_text()
    path = served.runs / "b" / "human_verdicts.jsonl"
    assert read_labels(path) == {said: False}
    (item,) = read_items(path)
    assert item.question == open_atlas(served.atlas, split="test")[int(said.split("/")[1]) - 1].problem


def test_curves_move_while_a_run_trains(served, page, backbone, tmp_path):
    given = [f"atlas={served.atlas}", f"model.name={backbone}", "train.epochs=1000", "datasets=[mmsd]"]
    command = [sys.executable, "-m", "hba", "train", "sft", "--config", "sft_tiny", "--run", served.runs / "live"]
    with (tmp_path / "out").open("w") as out:
        training = subprocess.Popen([*map(str, command), *given], stdout=out, stderr=out)
        try:
            log = served.runs / "live" / "log.jsonl"
            while not (log.is_file() and log.read_text().count('"train"') > 1):
                assert training.poll() is None, (tmp_path / "out").read_text()
                time.sleep(0.1)
            page.goto(served.url + "/run?run=live")
            before = page.locator("polyline").first.get_attribute("points")
            until(page, f"document.querySelector('polyline').getAttribute('points') != '{before}'")
            assert training.poll() is None
        finally:
            training.kill()
            training.wait()
            shutil.rmtree(served.runs / "live", ignore_errors=True)


def test_rollouts_of_a_prompt_and_the_curves_of_each_task(served, page):
    page.goto(served.url + "/rl?run=rl")
    rows = page.get_by_role("region", name="Rollouts").last.locator("tbody tr")
    assert rows.count() == 2
    assert "-0.500" in rows.first.inner_text() and "score 0.25" in rows.first.inner_text()
    assert "reward" in page.locator(".chart-title").first.inner_text().lower()


def test_hostile_text_stays_text(served, page):
    for address in ("/atlas?q=owned", "/predictions?a=a", "/judge?run=a", "/quarantine", "/sample/test/0", "/rl"):
        page.goto(served.url + address)
        assert "document.title=" in page.content()
        assert "owned" not in page.title()


@pytest.mark.parametrize("width, scheme", [(1280, "light"), (390, "dark")])
def test_every_page_fits_and_is_named(served, browser, width, scheme, tmp_path):
    """No page is wider than the window, every control has a name; the pictures are kept where HBA_SCREENSHOTS says."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    number = rows_with(served.atlas, "videos")
    addresses = {"atlas": "/atlas", "sample": f"/sample/test/{number}", "runs": "/runs", "run": "/run?run=a",
                 "side-by-side": "/runs/side-by-side?run=a&run=b", "predictions": "/predictions?a=a&b=b",
                 "scores": "/scores?run=a", "compare": "/compare?a=a&b=b", "judge": "/judge?run=a", "rl": "/rl",
                 "quarantine": "/quarantine"}  # fmt: skip
    unnamed = """[...document.querySelectorAll('button, a[href], input:not([type=hidden]), select, video, audio, img')]
      .filter(e => !(e.innerText?.trim() || e.labels?.length || e.ariaLabel || e.alt)).map(e => e.outerHTML)"""
    for name, address in addresses.items():
        page.goto(served.url + address)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        assert page.evaluate(unnamed) == [], name
        picture = Path(SHOTS or tmp_path) / f"{name}-{width}-{scheme}.png"
        page.screenshot(path=picture)
        assert picture.stat().st_size > 5_000
    context.close()


def test_a_browser_comes_in_with_the_token_from_a_file_and_from_another_site(served, serve, browser, tmp_path):
    """A strict cookie is not sent along with what another page began: the way in must not need it at once."""
    app = create_app(atlas=served.atlas, runs=served.runs, cache_folder=tmp_path, token="secret")
    with serve(app) as url:
        context = browser.new_context()
        page, asked = context.new_page(), []
        page.on("request", lambda request: asked.append((request.url, request.headers.get("referer", ""))))
        page.goto(url + "/sample/test/0")
        assert "lacks its token" in page.inner_text("h1")
        (tmp_path / "open.html").write_text(GO_TO.format(url=f"{url}/sample/test/0?token=secret"))
        page.goto((tmp_path / "open.html").as_uri())
        page.wait_for_url(url + "/sample/test/0")
        page.wait_for_selector("main h1")
        assert "lacks its token" not in page.inner_text("h1")
        page.goto(url + "/runs")
        assert page.locator("main table").count() > 0
        assert sum("secret" in address for address, _ in asked) == 1
        assert not any("secret" in referer for _, referer in asked)
        assert "secret" not in page.evaluate("document.cookie")
        context.close()
