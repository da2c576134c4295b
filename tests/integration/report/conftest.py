"""A run folder and its atlas for the report tests: real files, written by soundfile, PyAV and the scorer."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import av
import numpy as np
import pytest
import soundfile

from hba.evaluate.score import score_run
from hba.taxonomy import BUILTIN

HOSTILE = '<script>document.title = "owned"</script><img src=x onerror="document.title=1"> & "quoted" \x00'
DATASETS = ("cremad", "meld_emotion", "mosei_senti", "urfunny", "mmsd", "daicwoz", "mmpsy_anxiety", "ptsd_in_the_wild")
ROWS_EACH = 24
QUARANTINED = (7, 30, 90)
CLIPS = {"ptsd_in_the_wild": "plain.mp4", "cremad": "old.avi", "meld_emotion": "cut.mp4", "daicwoz": "gone.mp4"}


class Built(NamedTuple):
    run: Path
    atlas: Path


class Build(Protocol):
    """`build` as the tests see it."""

    def __call__(self, root: Path, *, synthetic: bool = True, media: bool = True) -> Built: ...


@pytest.fixture(scope="session")
def build_run() -> Build:
    """Builds an atlas and a scored run below a folder."""
    return build


@pytest.fixture(scope="session")
def hostile() -> str:
    """The text in the prompts of one dataset."""
    return HOSTILE


def build(root: Path, *, synthetic: bool = True, media: bool = True) -> Built:
    """An atlas with a few real clips and a scored run on it."""
    built = Built(root / "first_run", root / "atlas")
    built.run.mkdir(parents=True)
    (built.atlas / "media").mkdir(parents=True)
    rows = _rows()
    _write_lines(built.atlas / "test.jsonl", rows)
    if media:
        _write_media(built.atlas / "media")
    data = {"path": str(built.atlas), "fingerprint": "3f" * 32, "synthetic": synthetic}
    environment = {"hba_version": "0.1.0", "git_commit": "abc123", "python": "3.11", "platform": "Linux", "cpu": "x86",
                   "cpu_cores": 2, "gpus": [], "packages": {"torch": "2.14.1"}, "seed": 0, "data": data}  # fmt: skip
    (built.run / "environment.json").write_text(json.dumps(environment))
    (built.run / "config.yaml").write_text("train:\n  learning_rate: 0.002\n  epochs: 3\nhf_token: hf_do_not_show\n")
    _write_lines(built.run / "predictions.jsonl", _predictions(rows))
    _write_lines(built.run / "quarantine.jsonl", _quarantine(built.atlas))
    _write_lines(built.run / "log.jsonl", _log())
    score_run(built.run, resamples=200)
    return built


def _write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _rows() -> list[dict[str, Any]]:
    rows = []
    for key in DATASETS:
        labels = BUILTIN.datasets[key].labels
        for i in range(ROWS_EACH):
            label = labels[i % len(labels)]
            rows.append({"problem": f"<audio>\nWhat does the speaker of clip {i} express?", "answer": label,
                         "dataset": key, "task": f"{key}_cls", "class_label": label, "modality_signature": "text_audio",
                         "images": [], "videos": [], "audios": ["media/adpcm.wav"], "texts": []})  # fmt: skip
    for row in rows:
        if row["dataset"] in CLIPS:
            row |= {"videos": [f"media/{CLIPS[row['dataset']]}"], "modality_signature": "text_video_audio"}
        if row["dataset"] == "urfunny":
            row |= {"problem": f"<audio>\n{HOSTILE}"}
        if row["dataset"] == "mmsd":
            row |= {"problem": "<audio>\n" + "A long transcript that goes on. " * 40}
    return rows


def _predictions(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    draw = random.Random(0)
    found = []
    for number, row in enumerate(rows, 1):
        if number in QUARANTINED:
            continue
        dataset = BUILTIN.datasets[row["dataset"]]
        labels = BUILTIN.domains[str(dataset.domain)].labels
        logits = {label: draw.gauss(2.0 if label == row["answer"] else 0.0, 1.0) for label in labels}
        total = sum(map(math.exp, logits.values()))
        probs = {label: math.exp(value) / total for label, value in logits.items()}
        label = max(probs, key=lambda name: probs[name])
        found.append({"id": f"test/{number}", "dataset": row["dataset"], "task": str(dataset.task), "split": "test",
                      "target": row["answer"], "output": label, "answer": label,
                      "label": None if number % 61 == 0 else label, "error": None, "probs": probs})  # fmt: skip
    found.append({"id": "test/999", "dataset": "intentqa", "task": "INT", "split": "test", "target": "to rest",
                  "output": "to eat", "answer": "to eat", "label": None, "error": None})  # fmt: skip
    return found


def _quarantine(atlas: Path) -> list[dict[str, Any]]:
    return [
        {"id": f"test/{n}", "where": f"{atlas / 'test.jsonl'}:{n}, audios", "field": "audios", "split": "test",
         "reason": "is empty (0 bytes) \ud800<b>"}
        for n in QUARANTINED
    ]  # fmt: skip


def _log() -> list[dict[str, Any]]:
    draw = random.Random(1)
    records: list[dict[str, Any]] = []
    for step in range(10, 901, 10):
        rate = 2e-3 * min(1.0, step / 50) * 0.5 * (1 + math.cos(math.pi * step / 900))
        loss = 0.25 + 1.9 * math.exp(-step / 220) + draw.gauss(0, 0.08)
        records.append({"step": step, "epoch": step / 300, "samples_seen": step * 16, "kind": "train",
                        "loss": loss, "learning_rate": rate, "grad_norm": 0.4 + draw.random()})  # fmt: skip
        if step % 100 == 0:
            scores = {key: 0.9 - 0.6 * math.exp(-step / (150 + 40 * i)) + draw.gauss(0, 0.02)
                      for i, key in enumerate(("SEN", "EMO", "HUM", "SAR", "ANX", "DEP", "PTSD"))}  # fmt: skip
            scores["mean"] = sum(scores.values()) / len(scores)
            records.append({"step": step, "kind": "validation", "metrics": scores})
    return records


def _write_media(folder: Path) -> None:
    time = np.arange(32000) / 16000
    tone = (0.4 * np.sin(2 * np.pi * (180 + 60 * time) * time) * np.exp(-time)).astype(np.float32)
    soundfile.write(folder / "adpcm.wav", tone, 16000, subtype="IMA_ADPCM")
    write_video(folder / "plain.mp4", codec="libx264")
    write_video(folder / "old.avi", codec="mpeg4")
    (folder / "cut.mp4").write_bytes((folder / "plain.mp4").read_bytes()[:900])


def write_video(path: Path, *, codec: str, seconds: float = 2.0, size: int = 96) -> None:
    """A disc that moves over a plain ground, 12 frames a second."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=12)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        rows, columns = np.mgrid[:size, :size]
        for i in range(int(seconds * 12)):
            x = size * (0.2 + 0.6 * i / (seconds * 12))
            disc = (rows - size / 2) ** 2 + (columns - x) ** 2 < (size / 6) ** 2
            image = np.where(disc[..., None], [240, 190, 70], [40, 60, 90]).astype(np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode(None))
