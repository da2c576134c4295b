"""An explorer on a real port over a small atlas and runs with known mistakes, and a real browser for it."""

import json
import os
import shutil
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
import uvicorn

from hba import open_atlas
from hba.evaluate.judge.items import Judgement, answer_sha256
from hba.evaluate.score import score_run
from hba.explorer.server import create_app

PATIENCE = 600_000  # milliseconds, for a machine that is busy
HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


class Served(NamedTuple):
    url: str
    atlas: Path
    runs: Path
    app: object

    def get(self, address, **more):
        return httpx.get(self.url + address, timeout=600, **more)


def predictions(atlas, wrong):
    """Every test row answered rightly but for those whose number is in `wrong`, which take the domain's other label."""
    records = []
    for sample in atlas:
        domain = atlas.taxonomy.dataset(sample.dataset).domain
        label = sample.target
        if domain is not None and sample.number in wrong:
            label = next(x for x in atlas.taxonomy.dataset(sample.dataset).labels if x != sample.target)
        answer = label if domain is not None or sample.number not in wrong else "something else"
        output = f"<think>what I {HOSTILE} see</think>{answer}"
        record = {"id": sample.id, "dataset": sample.dataset, "task": sample.task, "split": sample.split,
                  "target": sample.target, "output": output, "answer": answer, "label": label if domain else None,
                  "latency_s": 0.1, "tokens_in": 3, "tokens_out": 2, "error": None}  # fmt: skip
        rest = [each for each in atlas.taxonomy.dataset(sample.dataset).labels if each != label]
        records.append(record | ({"probs": {label: 0.9, rest[0]: 0.1}} if domain else {}))
    return records


def judgement(record):
    digest = answer_sha256(record["target"], record["answer"])
    verdict = {"correct": record["answer"] == record["target"], "reason": HOSTILE, "error": None}
    known = {"id": record["id"], "dataset": record["dataset"], "answer_sha256": digest}
    return Judgement(**known, **verdict, attempts=1, tokens_in=1, tokens_out=1)


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def make_runs(root, atlas_root):
    atlas = open_atlas(atlas_root, split="test")
    for name, wrong in (("a", set(range(0, len(atlas), 5))), ("b", set(range(0, len(atlas), 10)))):
        run = root / name
        records = predictions(atlas, wrong)
        write_lines(run / "predictions.jsonl", records)
        data = {"path": str(atlas_root), "fingerprint": atlas.fingerprint, "synthetic": True, "rows": len(atlas)}
        settings = {"model": name, "backend": "heads", "split": "test", "data": data}
        (run / "predict.json").write_text(json.dumps(settings))
        (run / "config.yaml").write_text(f"train:\n  learning_rate: 0.00{len(name) + len(wrong) % 7}\n  seed: 0\n")
        events = [{"step": i, "kind": "train", "loss": 1 / i, "learning_rate": 1e-3, "grad_norm": 1.0} for i in (1, 2)]
        write_lines(run / "log.jsonl", events)
        free = [r for r in records if "probs" not in r]
        write_lines(run / "judgements.jsonl", [asdict(judgement(r)) for r in free])
        (run / "judge.json").write_text(json.dumps({"model": "judge-1"}))
        score_run(run, resamples=100)
    parts = [{"score": i / 9, "abs_advantage": 0.5} for i in range(1, 9)]
    steps = [{"step": i, "kind": "rl", **part, "tasks": {"HUM": part}, "datasets": {"urfunny": part}}
             for i, part in enumerate(parts, 1)]  # fmt: skip
    (root / "rl").mkdir()
    write_lines(root / "rl" / "log.jsonl", steps)
    write_lines(root / "rl" / "rollouts.jsonl", [
        {"step": i, "id": "test/1", "task": "HUM", "dataset": "urfunny", "group": "g", "prompt": HOSTILE,
         "target": "humour", "response": f"{HOSTILE} {i}", "tokens": 7, "parts": {"score": 0.25}, "advantage": -0.5}
        for i in (1, 8)
    ])  # fmt: skip
    quarantined = {"id": "test/3", "split": "test", "dataset": "cremad", "where": f"test.jsonl:4 {HOSTILE}",
                   "field": "audios", "reason": "is cut off"}  # fmt: skip
    write_lines(root / "a" / "quarantine.jsonl", [quarantined])


@pytest.fixture(scope="module")
def served(tmp_path_factory, mini_atlas):
    """The explorer over a copy of the tiny mini-atlas with one hostile row, and runs a and b."""
    root = tmp_path_factory.mktemp("explorer")
    atlas = root / "atlas"
    shutil.copytree(mini_atlas, atlas)
    row = json.loads((atlas / "test.jsonl").read_text().splitlines()[-1])
    row |= {"problem": f"Sarcastic? {HOSTILE}", "dataset": "mmsd", "task": "sarcasm_cls", "answer": "true",
            "class_label": "sarcasm", "modality_signature": "text", "id": HOSTILE}  # fmt: skip
    row |= {name: [] for name in ("images", "videos", "audios", "texts", "ext_video_feats", "ext_audio_feats")}
    with (atlas / "test.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    make_runs(root / "runs", atlas)
    app = create_app(atlas=atlas, runs=root / "runs", cache_folder=root / "cache")
    with running(app) as url:
        yield Served(url, atlas, root / "runs", app)


@contextmanager
def running(app):
    """The address of a server for `app` on a free port, its atlas indexed."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    if app.state.explorer.index is not None:
        app.state.explorer.index.wait(900)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(600)


@pytest.fixture(scope="module")
def recording_browser():
    """A Chromium with a camera and a microphone that are none, which it lets every page have."""
    with chromium("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream") as made:
        yield made


@pytest.fixture(scope="module")
def serve():
    """`running`, for tests that need an app of their own."""
    return running


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium. Skipped where there is none, but never on CI."""
    with chromium() as made:
        yield made


@contextmanager
def chromium(*more):
    """A Chromium, with `more` flags."""
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("no Chromium: apt-get install chromium")
        pytest.skip("no Chromium on the PATH: apt-get install chromium")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", "--autoplay-policy=no-user-gesture-required"]  # fmt: skip
    with sync_playwright() as player:
        made = player.chromium.launch(executable_path=found, args=[*flags, *more], timeout=PATIENCE)
        whole = made.new_context

        def new_context(**options):
            context = whole(**options)
            context.set_default_timeout(PATIENCE)
            return context

        made.new_context = new_context
        yield made
        made.close()


@pytest.fixture
def page(browser):
    """A new window of 1280 x 900; a script error or a refused resource fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    faults = []
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    yield opened
    context.close()
    assert not faults
