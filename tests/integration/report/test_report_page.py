"""The page of a whole run: self-contained, inert to hostile text, deterministic, and playable in a browser.

The browser test needs a chromium binary and is skipped, saying so, where there is none.
"""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import av
import pytest
import soundfile

from hba.errors import InputError
from hba.report.page import write_report
from hba.taxonomy import TASKS

VOID = {"meta", "img", "br"}
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


PROBE = """
const mark = (what) => { const p = document.createElement('p'); p.textContent = what; document.body.append(p); };
for (const [tag, url] of media) {
  const element = document.createElement(tag);
  element.oncanplaythrough = () => mark(`plays:${tag}:${element.duration > 1}`);
  element.onerror = () => mark(`fails:${tag}`);
  element.preload = 'auto'; element.src = url; element.load();
}
"""


class Page(HTMLParser):
    """Elements, attributes and text of a page; refuses tags that do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"attribute twice in <{tag}>"
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open.pop() == tag, f"</{tag}> does not close what is open"

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def built(tmp_path_factory, build_run):
    return build_run(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(built) -> Page:
    return Page(write_report(built.run).read_text(encoding="utf-8"))


def _media(page: Page, tag: str) -> list[bytes]:
    sources = [attributes["src"] for attributes in page.all(tag)]
    return [base64.b64decode(source.partition("base64,")[2], validate=True) for source in sources]


def test_the_page_loads_nothing_and_runs_nothing(built, page: Page) -> None:
    names = {name for name, _ in page.tags}
    assert names.isdisjoint({"script", "link", "iframe", "object", "embed", "base", "form"})
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "srcset", "poster", "data"):
            assert re.match(r"(data:(audio|video|image)/[a-z0-9]+;base64,|#)", attributes.get(name, "#")), attributes
    style = (built.run / "report.html").read_text().partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style and "@import" not in style and "http" not in style
    (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives["default-src"] == "'none'" and directives["media-src"] == "data:"
    assert "script-src" not in directives


def test_hostile_text_is_shown_and_inert(page: Page, hostile) -> None:
    shown = hostile.replace("\x00", "\ufffd")
    assert shown in "".join(page.text)
    assert "\ufffd<b>" in "".join(page.text)  # the lone surrogate of the quarantine's reason, and its tag as text
    assert not [image for image in page.all("img") if not image["src"].startswith("data:")]


def test_the_page_says_what_the_run_found(built, page: Page) -> None:
    words = page.words()
    metrics = json.loads((built.run / "metrics.json").read_text())
    mean = metrics["aggregate"]["mean"]
    assert f"{mean['score']:.2f} (95% interval {mean['ci95'][0]:.2f}–{mean['ci95'][1]:.2f})" in words
    assert "over 7 scored tasks; 7 of 7 wholly above chance ; 3 samples quarantined" in words.replace(
        "chance;", "chance ;"
    )
    assert "Synthetic data." in words and "not measured here" not in words
    assert "not scored (needs a judge)" in words
    for key, task in metrics["tasks"].items():
        if task["score"] is not None:
            assert f"{key} " in words and f"{task['score']:.3f}" in words
    assert "test/30" in words and "is empty (0 bytes)" in words
    assert "learning_rate: 0.002" in words and "abc123" in words
    assert "hf_do_not_show" not in words and "hf_token: (hidden)" in words


def test_charts_tables_and_media_have_names_for_those_who_cannot_see_them(page: Page) -> None:
    charts = [svg for svg in page.all("svg") if svg.get("role") == "img"]
    assert len(charts) == 7 + 4 + 7 + 1  # tasks, training, validation by task, reliability
    for element in (*charts, *page.all("audio"), *page.all("video")):
        assert element["aria-label"]
    assert all("controls" in element for element in (*page.all("audio"), *page.all("video")))
    assert all(element.get("tabindex") == "0" for _, element in page.tags if element.get("role") == "region")
    assert page.all("html")[0]["lang"] == "en"
    targets = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {link["href"][1:] for link in page.all("a")} <= targets


def test_media_are_in_the_page_in_forms_that_browsers_play(page: Page) -> None:
    sounds, clips = _media(page, "audio"), _media(page, "video")
    assert len(sounds) == 12 and len(clips) >= 3
    assert {soundfile.info(io.BytesIO(data)).subtype for data in sounds} == {"PCM_16"}
    for data in clips:
        with av.open(io.BytesIO(data)) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
    words = page.words()
    assert "re-encoded for the page" in words
    assert "video cannot be shown: no such file: media/gone.mp4" in words
    assert "is cut off: its header promises" in words


def test_the_same_run_gives_the_same_page(built, tmp_path: Path) -> None:
    first, second = (write_report(built.run, out=tmp_path / name) for name in ("a.html", "b.html"))
    assert first.read_bytes() == second.read_bytes()


def test_real_data_stand_beside_published_results_that_are_marked_so(tmp_path: Path, build_run) -> None:
    run = build_run(tmp_path, synthetic=False, media=False).run
    path = run / "metrics.json"
    metrics = json.loads(path.read_text())
    # As if the run had been asked for the whole test split of the release.
    metrics["provenance"] |= {"asked_split": "test", "data_rows": 18204}
    for key, task in metrics["tasks"].items():
        task["datasets"] = TASKS[key].datasets
    path.write_text(json.dumps(metrics))
    page = Page(write_report(run).read_text(encoding="utf-8"))
    words = page.words()
    assert "Synthetic data." not in words
    assert "published, not measured here (arXiv 2510.04899" in words
    assert "OmniSapiens-7B BAM (published)" in words
    assert len([c for c in page.all("circle") if c.get("class") == "published"]) == 7 * 6 + 1
    assert not page.all("audio")


def test_published_results_of_other_rows_stand_apart_and_say_why(tmp_path: Path, build_run) -> None:
    run = build_run(tmp_path, synthetic=False, media=False).run
    page = Page(write_report(run).read_text(encoding="utf-8"))
    words = page.words()
    assert "Published results apart from this run" in words and "OmniSapiens-7B BAM (published)" in words
    assert "Not to be compared with this run: does not say how many rows it was asked for (published: 18,204)" in words
    assert "other datasets in SEN, EMO, DEP" in words
    assert not [c for c in page.all("circle") if c.get("class") == "published"]
    table = (run / "report.html").read_text().partition("Published results apart")[2].partition("</table>")[0]
    assert "<b>" not in table


def test_what_is_missing_is_named(built, tmp_path: Path) -> None:
    run = tmp_path / "bare"
    run.mkdir()
    metrics = json.loads((built.run / "metrics.json").read_text())
    metrics["provenance"]["synthetic"] = None
    (run / "metrics.json").write_text(json.dumps(metrics))
    words = Page(write_report(run).read_text(encoding="utf-8")).words()
    for missing in ("predictions.jsonl", "log.jsonl", "quarantine.jsonl", "config.yaml", "environment.json"):
        assert f"No {missing} in the run folder" in words
    assert "Origin of the data not recorded" in words and "published, not measured" not in words


def test_a_recorded_atlas_that_is_gone_is_a_note_and_a_given_one_an_error(built, tmp_path: Path) -> None:
    run = tmp_path / "moved"
    shutil.copytree(built.run, run)
    environment = json.loads((run / "environment.json").read_text())
    environment["data"]["path"] = str(tmp_path / "gone")
    (run / "environment.json").write_text(json.dumps(environment))
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert f"The atlas {tmp_path / 'gone'} could not be opened" in page.words() and not page.all("audio")
    assert page.words().count("Answered") == 12
    with pytest.raises(InputError):
        write_report(run, atlas_root=tmp_path / "gone", out=tmp_path / "other.html")
    assert not (tmp_path / "other.html").exists()
    assert len(Page(write_report(run, atlas_root=built.atlas).read_text(encoding="utf-8")).all("audio")) == 12


def test_rows_of_another_atlas_are_not_shown_as_those_evaluated(built, tmp_path: Path) -> None:
    lines = (built.atlas / "test.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "test.jsonl").write_text("".join(lines[-24:] + lines[:-24]))
    page = Page(write_report(built.run, atlas_root=tmp_path, out=tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "is another one than was evaluated" in page.words()


def test_a_page_keeps_to_its_bytes(built, tmp_path: Path) -> None:
    atlas = tmp_path / "atlas"
    shutil.copytree(built.atlas, atlas)
    soundfile.write(atlas / "media" / "adpcm.wav", [0.1] * 16000 * 600, 16000)
    path = write_report(built.run, atlas_root=atlas, out=tmp_path / "r.html")
    assert path.stat().st_size < 10 << 20
    words = Page(path.read_text(encoding="utf-8")).words()
    assert "first 20 s of 600 s" in words and "the page holds a limited number of bytes" in words


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium binary: the page was not opened in a browser")
def test_every_medium_plays_in_a_browser_and_nothing_runs(built, page: Page, tmp_path: Path) -> None:
    # The page itself forbids scripts, so a probe page opens the same data: URIs and reports what happened.
    urls = [element["src"] for tag in ("audio", "video") for element in page.all(tag)]
    tags = [tag for tag in ("audio", "video") for _ in page.all(tag)]
    probe = tmp_path / "probe.html"
    media = json.dumps(list(zip(tags, urls, strict=True)))
    probe.write_text(f"<title>probe</title><body><script>const media = {media};{PROBE}</script></body>")
    dom = _dump(probe, tmp_path)
    assert dom.count("<p>plays:audio:true</p>") == len(page.all("audio"))
    assert dom.count("<p>plays:video:true</p>") == len(page.all("video"))
    assert "<p>fails" not in dom
    assert "<title>first_run · hba report</title>" in _dump(built.run / "report.html", tmp_path)


def _dump(path: Path, profile: Path) -> str:
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--virtual-time-budget=8000",
    ]
    command = [str(CHROMIUM), *flags, f"--user-data-dir={profile / 'profile'}", "--dump-dom", path.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=True).stdout
