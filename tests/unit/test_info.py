"""`hba atlas info`: counts that agree with the rows, durations that agree with the files, a page that stands alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from hba.atlas import open_atlas
from hba.atlas.info import atlas_info, histogram
from hba.cli import app
from hba.errors import InputError
from hba.report.atlas import render_info


def write_atlas(folder: Path, seconds: dict[str, list[float]], **changes: Any) -> Path:
    """Rows with a sound of each length, by split."""
    for split, lengths in seconds.items():
        rows = []
        for number, length in enumerate(lengths):
            name = f"{split}{number}.wav"
            soundfile.write(folder / name, np.full(int(length * 8000), 0.1), 8000)
            row = {"problem": f"{split} {number}?", "answer": "anger", "dataset": "cremad", "task": "emotion_cls"}
            rows.append(row | {"modality_signature": "text_audio", "audios": [name]} | changes)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_narrow_terminal_takes_bars_and_leaves_figures(mini_atlas: Path) -> None:
    result = CliRunner().invoke(app, ["atlas", "info", str(mini_atlas)], env={"COLUMNS": "60"})
    assert "text_video_audio" in result.stdout and "█" in result.stdout and "…" not in result.stdout


def test_licences_and_what_mental_health_labels_are_for_are_said(mini_atlas: Path, tmp_path: Path) -> None:
    """Of recordings, not of generated data; a licence that no page states is unknown."""
    care = "for research and no diagnosis"
    generated = CliRunner().invoke(app, ["atlas", "info", str(mini_atlas)]).stdout
    assert care in " ".join(generated.split()) and "Open" not in generated and "GPL-3.0" not in generated
    ptsd = {"dataset": "ptsd_in_the_wild", "answer": "ptsd", "task": "x_cls"}
    for name, change in {"emotion": {}, "ptsd": ptsd}.items():
        (tmp_path / name).mkdir()
        atlas, page = write_atlas(tmp_path / name, {"test": [1.0]}, **change), tmp_path / f"{name}.html"
        said = CliRunner().invoke(app, ["atlas", "info", str(atlas), "--out", str(page)]).stdout
        for text in (" ".join(said.split()), page.read_text()):
            assert ("ODbL" in text) == (name == "emotion") and ("unknown" in text.lower())
            for said in ("CREMA-D", "actors, recorded for it", "a form is asked for"):
                assert (said in text) == (name == "emotion")
            assert (care in text) == (name == "ptsd")


def test_counts_are_those_of_the_rows(mini_atlas: Path) -> None:
    info = atlas_info(mini_atlas)
    assert [split.name for split in info.splits] == ["train", "validation", "test"]
    for split in info.splits:
        samples = list(open_atlas(mini_atlas, split=split.name))
        tasks = info.taxonomy.datasets
        assert split.rows == len(samples)
        assert split.datasets == Counter(s.dataset for s in samples)
        assert split.tasks == Counter(tasks[s.dataset].task for s in samples)
        assert split.signatures == Counter(s.modality_signature for s in samples)
        labelled = Counter((s.dataset, s.label) for s in samples if s.label is not None)
        assert {(d, label): n for d, labels in split.labels.items() for label, n in labels.items()} == labelled
    assert (info.rows, info.synthetic, info.durations) == (237, True, None)
    assert sum(info.totals("datasets").values()) == 237
    assert list(info.totals("tasks").values()) == sorted(info.totals("tasks").values(), reverse=True)
    assert json.loads(json.dumps(info.to_json()))["splits"]["test"]["rows"] == 51


def test_chosen_splits_and_slices(mini_atlas: Path) -> None:
    info = atlas_info(mini_atlas, splits=["test", "train[:10]"])
    assert {split.name: split.rows for split in info.splits} == {"test": 51, "train[:10]": 10}
    with pytest.raises(InputError, match="is a part of a split"):
        atlas_info(mini_atlas, splits=["train[:10]"], durations=True)
    with pytest.raises(InputError, match="has no split 'dev'"):
        atlas_info(mini_atlas, splits=["dev"])


def test_durations(tmp_path: Path) -> None:
    write_atlas(tmp_path, {"train": [1.0, 2.0, 4.0], "test": [0.5, 3.0]})
    (tmp_path / "train2.wav").unlink()
    cache = tmp_path / "cache"
    seen: list[tuple[int, int]] = []
    info = atlas_info(tmp_path, durations=True, cache=cache, progress=lambda *counts: seen.append(counts))
    assert info.durations is not None
    assert info.durations.all.tolist() == [0.5, 1.0, 2.0, 3.0]
    assert info.durations.unknown == 1, "a missing file has no length, and is not taken for one of 0 s"
    assert seen[-1] == (4, 4)
    said = info.to_json()["durations"]
    assert said["all"] == {"rows": 4, "hours": 0.0018, "p5": 0.575, "median": 1.5, "p95": 2.85, "longest": 3.0}
    assert sum(said["histogram"]["counts"]) == 4
    seen.clear()
    again = atlas_info(tmp_path, durations=True, cache=cache, progress=lambda *counts: seen.append(counts))
    assert seen == [(4, 4)], "headers are remembered"
    assert again.to_json() == info.to_json()


def test_a_row_lasts_as_long_as_its_sounds_together(tmp_path: Path) -> None:
    write_atlas(tmp_path, {"train": [1.0, 2.0]}, audios=["train0.wav", "train1.wav"])
    info = atlas_info(tmp_path, durations=True)
    assert info.durations is not None
    assert info.durations.all.tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    ("values", "edges"),
    [
        ([1.0], (1.0, 1.001)),
        ([1.1, 1.2, 1.45], (1.1, 1.15, 1.2, 1.25, 1.3, 1.35, 1.4, 1.45)),
        ([0.6, 3.0, 700.0], (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)),
        ([0.02, 9.0], (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)),
    ],
)
def test_histogram_bins_are_round_and_hold_everything(values: list[float], edges: tuple[float, ...]) -> None:
    shape = histogram(np.array(values))
    assert shape.edges == pytest.approx(edges)
    assert sum(shape.counts) == len(values)
    assert len(shape.edges) == len(shape.counts) + 1


def test_no_values_have_no_histogram() -> None:
    assert histogram(np.zeros(0)).counts == ()


def test_counting_100000_rows_takes_about_a_second(tmp_path: Path) -> None:
    row = {"problem": "Is it a joke?", "answer": "yes", "dataset": "urfunny", "task": "humour_cls"}
    text = json.dumps(row | {"modality_signature": "text"}) + "\n"
    (tmp_path / "train.jsonl").write_text(text * 100_000)
    began = time.process_time()  # of this process alone, however busy the machine is
    assert [json.loads(line)["task"] for line in (tmp_path / "train.jsonl").open()] == ["humour_cls"] * 100_000
    read = time.process_time()
    assert atlas_info(tmp_path).rows == 100_000
    assert time.process_time() - read < 20 * (read - began), "far beyond what it takes to decode the lines"


def test_the_page_stands_alone_and_escapes(tmp_path: Path) -> None:
    folder = tmp_path / "a<b>&"
    folder.mkdir()
    write_atlas(folder, {"train": [1.0], "extra": [2.0]}, dataset="<i>mine")
    (folder / "taxonomy.yaml").write_text("datasets: {<i>mine: {domain: emotion, labels: [anger]}}")
    (folder / "train (copy).jsonl").write_text("no split")
    page = render_info(atlas_info(folder, durations=True))
    assert "a<b>" not in page
    assert "a&lt;b&gt;&amp;" in page
    assert "<i>" not in page
    assert "&lt;i&gt;mine" in page
    assert "copy" not in page
    assert not re.search(r"<script|(src|href)=[\"']?(https?:|//|file:)|@import|url\(", page)
    assert "default-src 'none'" in page
    assert page == render_info(atlas_info(folder, durations=True)), "no time stands on it"


def test_command(mini_atlas: Path, tmp_path: Path) -> None:
    page = tmp_path / "info.html"
    command = [sys.executable, "-m", "hba", "atlas", "info", str(mini_atlas), "--out", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=True)
    assert "237 rows: train 152, validation 34, test 51" in done.stdout
    assert "mmpsy_depression" in done.stdout
    assert "emotion recognition" in page.read_text()
    listed = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=900, check=True)
    assert json.loads(listed.stdout)["rows"] == 237


def test_headers_are_remembered_where_the_cache_of_hba_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hba: Callable[..., tuple[int, str, str]]
) -> None:
    (tmp_path / "atlas").mkdir()
    write_atlas(tmp_path / "atlas", {"train": [1.0], "test": [0.5]})
    monkeypatch.setenv("HBA_CACHE", str(tmp_path / "cache"))
    assert hba("atlas", "info", tmp_path / "atlas", "--durations", "--workers", "1")[0] == 0
    assert any(path.is_file() for path in (tmp_path / "cache").rglob("*"))
