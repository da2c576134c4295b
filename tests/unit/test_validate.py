"""`hba atlas validate`: planted faults give exactly the planted findings, in any way of working."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from typer.testing import CliRunner

from hba.atlas import open_atlas
from hba.atlas.convert import convert_to_parquet
from hba.atlas.probe import probe
from hba.atlas.scan import CODES, LEVELS
from hba.atlas.validate import Validation, validate_atlas
from hba.cli import app, main
from hba.errors import InputError, MediaError
from hba.report.atlas import render_validation

Rows = dict[str, list[Any]]


class Checked(NamedTuple):
    """The folder of a check, and what it returned."""

    out: Path
    result: Validation


Planted = set[tuple[str, str, str]]  # level, code, where


def read_rows(atlas: Path) -> Rows:
    names = ("train", "validation", "test")
    return {name: [json.loads(line) for line in (atlas / f"{name}.jsonl").read_text().splitlines()] for name in names}


def write_rows(atlas: Path, rows: Rows) -> Path:
    atlas.mkdir(parents=True, exist_ok=True)
    for name, lines in rows.items():
        text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
        (atlas / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return atlas


def text_row(**changes: Any) -> dict[str, Any]:
    row = {
        "problem": "Is it a joke?",
        "answer": "humour",
        "dataset": "urfunny",
        "task": "humour_cls",
        "modality_signature": "text",
    }
    return {key: value for key, value in (row | changes).items() if value is not ...}


def found(result: Any) -> list[tuple[str, str, str]]:
    return [(finding.level, finding.code, finding.where) for finding in result.findings]


# --- rows ------------------------------------------------------------------------------------------------------------

QA = {"dataset": "siq2", "task": "social_qa", "answer": "Because he won."}
BAD_ROWS: dict[str, tuple[Any, Planted]] = {
    "cut line": (json.dumps(text_row())[:50], {("error", "row-json", ":2")}),
    "array": ("[1]", {("error", "row-json", ":2")}),
    "type": (text_row(answer=3), {("error", "row-schema", ":2")}),
    "missing": (text_row(modality_signature=...), {("error", "row-schema", ":2")}),
    "twice": ('{"answer": "humour", ' + json.dumps(text_row())[1:], {("error", "row-schema", ":2")}),
    "twice inside": (json.dumps(text_row())[:-1] + ', "x": [{"a": 1, "a": 2}]}', {("error", "row-schema", ":2")}),
    "number": (json.dumps(text_row())[:-1] + ', "x": 1e999}', {("error", "row-schema", ":2")}),
    "dataset": (text_row(dataset="urfunn"), {("error", "row-dataset", ":2")}),
    "label": (text_row(answer="funny"), {("error", "row-label", ":2")}),
    "signature": (text_row(modality_signature="text_audio"), {("error", "row-signature", ":2")}),
    "path": (text_row(texts=["../secret"]), {("error", "row-path", ":2, texts")}),
    "id": (text_row(id="train/1"), {("error", "row-id", ":2")}),
    "tags": (text_row(problem="<audio>Is it?"), {("error", "row-tags", ":2")}),
    "prompt": (text_row(problem=" "), {("error", "row-empty", ":2")}),
    "free answer": (text_row(**QA | {"answer": ""}), {("error", "row-empty", ":2")}),
    "unlabelled": (text_row(answer=None), {("note", "row-unlabelled", ":2")}),
    "no answer": (text_row(**QA | {"answer": ...}), {("note", "row-unlabelled", ":2")}),
    "task": (text_row(task="humour_qa"), {("warning", "task-suffix", ":2")}),
    "unlisted": (text_row(dataset="tess", answer="calm", task="emotion_cls"), {("warning", "label-unlisted", ":2")}),
    "several": (
        text_row(answer="funny", modality_signature="text_smell", texts=["/etc/passwd"], problem="<image>?"),
        {
            ("error", "row-label", ":2"),
            ("error", "row-signature", ":2"),
            ("error", "row-path", ":2, texts"),
            ("error", "row-tags", ":2"),
        },
    ),
}
LEFT = ("tags", "prompt", "free answer", "twice", "twice inside", "number")
"""what opening leaves to the encoder, or to who reads extra fields"""
NOTE = ("note", "release-size", "train.jsonl")


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named(tmp_path: Path, name: str) -> None:
    bad, planted = BAD_ROWS[name]
    good = [text_row(problem="Is this one a joke?"), text_row(problem="And this one?")]
    result = validate_atlas(write_rows(tmp_path, {"train": [good[0], bad, good[1]]}))
    assert set(found(result)) - {NOTE} == {(level, code, f"train.jsonl{at}") for level, code, at in planted}
    assert (result.rows, result.ok) == ({"train": 3}, not any(level == "error" for level, _, _ in planted))
    assert all(finding.fix for finding in result.findings)
    if not result.ok and name not in LEFT:
        with pytest.raises(InputError, match=re.escape(f"{tmp_path}/train.jsonl:2")):
            open_atlas(tmp_path, split="train")


def test_all_bad_rows_are_named_and_the_good_ones_counted(tmp_path: Path) -> None:
    rows = [text_row(problem=f"{i}?", dataset="nothing" if i % 2 else "urfunny") for i in range(40)]
    result = validate_atlas(write_rows(tmp_path, {"train": rows}))
    places = [where for _, code, where in found(result) if code == "row-dataset"]
    assert places == [f"train.jsonl:{line}" for line in range(2, 41, 2)], "in the order of the file"
    assert (result.bad_rows, result.signatures) == ({"train": 20}, {"text": 20})


def test_ids_across_splits(tmp_path: Path) -> None:
    rows = {name: [text_row(problem=f"{name}?", id="same")] for name in ("train", "test")}
    result = validate_atlas(write_rows(tmp_path, rows))
    (finding,) = [f for f in result.findings if f.code == "row-id"]
    assert finding.where == "test.jsonl:1"
    assert "'same' is also the id of train.jsonl:1" in finding.message


def test_a_file_that_cannot_be_read_as_rows(tmp_path: Path) -> None:
    write_rows(tmp_path, {"train": [text_row()], "test": []})
    (tmp_path / "validation.jsonl").write_bytes(b"\xff\xfe\x00garbage\n" + b"x" * 100)
    codes = {(code, where) for _, code, where in found(validate_atlas(tmp_path))}
    assert codes >= {("split-unreadable", "test.jsonl"), ("row-json", "validation.jsonl:1")}
    with pytest.raises(InputError, match="no such file or folder"):
        validate_atlas(tmp_path / "nothing")
    with pytest.raises(InputError, match="has no split 'dev'"):
        validate_atlas(tmp_path, splits=["dev"])
    with pytest.raises(InputError, match="is a part of a split"):
        validate_atlas(tmp_path, splits=["train[:10]"])


def test_text_of_a_shard_that_is_not_utf8_is_a_finding(tmp_path: Path) -> None:
    """Arrow reads it as it is, and Python raises where it is looked at."""
    text = {name: pa.array([value]) for name, value in text_row().items()}
    pq.write_table(pa.table(text | {"problem": pa.array([b"\xff?"]).view(pa.string())}), tmp_path / "train.parquet")
    (finding,) = validate_atlas(tmp_path).findings
    assert (finding.code, finding.level) == ("split-unreadable", "error")
    assert "column 'problem': is damaged" in finding.message


def test_the_same_question_in_two_splits(tmp_path: Path) -> None:
    rows = {"train": [text_row()], "validation": [text_row(problem="2?")], "test": [text_row(), text_row(problem="2?")]}
    result = validate_atlas(write_rows(tmp_path, rows))
    leaks = [f for f in result.findings if f.code == "row-leak"]
    assert [(f.level, f.where, f.also) for f in leaks] == [
        ("error", "train.jsonl:1", ("test.jsonl:1",)),
        ("warning", "validation.jsonl:1", ("test.jsonl:2",)),
    ]
    assert validate_atlas(tmp_path, splits=["train"]).ok


def test_counts_against_the_published_ones(tmp_path: Path) -> None:
    write_rows(tmp_path, {"train": [text_row(), text_row(problem="2?", answer="not humour")]})
    assert found(validate_atlas(tmp_path)) == [NOTE]
    strict = validate_atlas(tmp_path, release=True)
    said = [finding.message for finding in strict.findings if finding.code == "release-size"]
    assert any("train 2 for 74,449" in text for text in said)
    assert any("text_video_audio 0 for 87,318" in text for text in said)
    assert not strict.ok
    (tmp_path / "atlas.json").write_text('{"synthetic": true}')
    assert found(validate_atlas(tmp_path)) == [], "generated data are not compared"
    (tmp_path / "atlas.json").write_text('{"synthetic": "yes"}')
    assert ("error", "card-broken", "atlas.json") in found(validate_atlas(tmp_path))


# --- media -----------------------------------------------------------------------------------------------------------


def write_video(path: Path, pixels: Callable[[int], Any], frames: int = 50, flags: str = "") -> None:
    with av.open(str(path), "w", options={"movflags": flags} if flags else {}) as out:
        stream = out.add_stream("libx264", rate=25, options={"g": "10"})
        stream.width = stream.height = 64
        for i in range(frames):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels(i), format="rgb24")))
        out.mux(stream.encode())


def noise(i: int) -> Any:
    return np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8)


def sole_rows(rows: Rows, split: str, field: str) -> list[int]:
    """Lines of a split whose file no other row names."""
    names = Counter(name for lines in rows.values() for row in lines for name in row[field])
    return [line for line, row in enumerate(rows[split], 1) if row[field] and names[row[field][0]] == 1]


def plant_media(atlas: Path, rows: Rows) -> Planted:
    """Break one medium after the other, each of a row of its own; what must be found."""
    used: set[int] = set()
    planted: Planted = set()

    def plant(field: str, code: str, damage: Callable[[Path], object], level: str = "error") -> None:
        line = next(line for line in sole_rows(rows, "train", field) if line not in used)
        used.add(line)
        damage(atlas / rows["train"][line - 1][field][0])
        planted.add((level, code, f"train.jsonl:{line}, {field}"))

    def link(file: Path) -> None:
        file.unlink()
        file.symlink_to("/etc/hostname")

    def pipe(file: Path) -> None:
        file.unlink()
        os.mkfifo(file)

    half = lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])  # noqa: E731
    plant("audios", "media-missing", Path.unlink)
    plant("audios", "media-missing", lambda file: file.write_bytes(b""))
    plant("audios", "media-missing", pipe)
    plant("audios", "media-outside", link)
    plant("audios", "media-broken", half)
    plant("audios", "media-broken", lambda file: file.write_text("#EXTM3U\nhttp://example.org/a.wav\n"))
    plant("audios", "media-blank", lambda file: soundfile.write(file, np.zeros(8000), 8000, format="WAV"), "warning")
    plant("videos", "media-broken", half)
    plant("videos", "media-broken", lambda file: write_video(file, noise, flags="faststart") or half(file))
    plant("videos", "media-blank", lambda file: write_video(file, lambda _: np.zeros((64, 64, 3), np.uint8)), "warning")
    plant("ext_audio_feats", "media-broken", half)
    plant("ext_audio_feats", "media-broken", lambda file: torch.save({"features": torch.full((88,), torch.nan)}, file))
    plant("ext_audio_feats", "media-broken", lambda file: torch.save({"features": torch.zeros(2, 2, 2)}, file))
    plant("ext_audio_feats", "media-broken", lambda file: torch.save({"other": torch.zeros(88)}, file))
    plant("ext_audio_feats", "descriptor-shape", lambda file: torch.save({"features": torch.zeros(87)}, file))
    pose = {"pose": torch.zeros(8, 11, 3), "face": torch.zeros(9, 7, 3)}
    plant("ext_video_feats", "media-broken", lambda file: torch.save(pose, file))
    plant("ext_video_feats", "media-broken", lambda file: torch.save({"pose": torch.zeros(8, 33)}, file))
    return planted


def plant_leaks(atlas: Path, rows: Rows) -> Planted:
    """A clip under another name in test, and one under its own name."""
    first, second = sole_rows(rows, "test", "audios")[:2]
    line, other = sole_rows(rows, "train", "audios")[-2:]
    shutil.copyfile(atlas / rows["test"][first - 1]["audios"][0], atlas / rows["train"][line - 1]["audios"][0])
    rows["train"][other - 1]["audios"] = rows["test"][second - 1]["audios"]
    return {("error", "media-leak", f"train.jsonl:{number}, audios") for number in (line, other)}


@pytest.fixture(scope="module")
def faulty(mini_atlas: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Planted]:
    """A mini-atlas with a fault of each kind, and the findings that it must give."""
    atlas = tmp_path_factory.mktemp("faulty") / "at<b>las"
    shutil.copytree(mini_atlas, atlas)
    rows = read_rows(atlas)
    planted = plant_media(atlas, rows) | plant_leaks(atlas, rows)
    rows["train"].append({**text_row(), "dataset": "<script>alert(1)</script>"})
    planted.add(("error", "row-dataset", f"train.jsonl:{len(rows['train'])}"))
    write_rows(atlas, rows)
    return atlas, planted


@pytest.fixture(scope="module")
def checked(faulty: tuple[Path, Planted], tmp_path_factory: pytest.TempPathFactory) -> Checked:
    """An uninterrupted check of the faulty atlas."""
    out = tmp_path_factory.mktemp("checked")
    return Checked(out, validate_atlas(faulty[0], out=out, workers=2))


def test_planted_faults_are_found_and_nothing_else(faulty: tuple[Path, Planted], checked: Checked) -> None:
    said = json.loads((checked.out / "validate.json").read_text())
    places = [(f["level"], f["code"], f["where"]) for f in said["findings"]]
    assert sorted(places) == sorted(faulty[1])
    assert said["ok"] is False
    assert said["summary"]["codes"]["media-broken"] == 10
    assert said["summary"]["media"]["audios"]["num_refused"] == 6
    assert {f["code"] for f in said["findings"]} <= set(CODES)
    assert all(f["level"] in LEVELS and f["message"] and f["fix"] for f in said["findings"])


# With one sound a check never ends, so that it is at work when it is killed.
NEVER_OPENED = """
import pathlib, soundfile, time
never = pathlib.Path({!r}).read_bytes()
opened = soundfile.SoundFile.__init__
def wait(self, file, *rest, **options):
    start = file.read(4096)
    file.seek(0)
    while start and never.startswith(start):
        time.sleep(1)
    opened(self, file, *rest, **options)
soundfile.SoundFile.__init__ = wait
"""


def test_a_killed_check_resumes_and_ends_with_the_same(
    faulty: tuple[Path, Planted], checked: Checked, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "hba", "atlas", "validate", str(faulty[0]), "--out", str(tmp_path), "--json"]
    log = tmp_path / "media.jsonl"
    site = tmp_path / "site"
    site.mkdir()
    last = [row["audios"][0] for row in read_rows(faulty[0])["test"] if row["audios"]][-1]
    (site / "sitecustomize.py").write_text(NEVER_OPENED.format(str(faulty[0] / last)))
    process = subprocess.Popen(
        [*command, "--workers", "2"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))},
    )  # fmt: skip
    deadline = time.monotonic() + 900
    while not log.is_file() or log.read_bytes().count(b"\n") < 30:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    lines = log.read_bytes().splitlines(keepends=True)
    whole = (checked.out / "media.jsonl").read_bytes().count(b"\n")
    assert 30 <= len(lines) < whole, "killed in the middle"
    log.write_bytes(b"".join(lines)[:-20])  # a torn last line
    done = subprocess.run([*command, "--workers", "1"], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 1, done.stderr
    assert (tmp_path / "validate.json").read_bytes() == (checked.out / "validate.json").read_bytes()
    assert json.loads(done.stdout) == json.loads((tmp_path / "validate.json").read_text())
    keys = [json.loads(line)["key"] for line in log.read_text().splitlines()]
    assert len(keys) == whole, "what was found before the kill was not done again"
    assert (tmp_path / "validate.html").is_file()


def test_a_changed_file_is_checked_again(mini_atlas: Path, tmp_path: Path) -> None:
    rows = [row for row in read_rows(mini_atlas)["train"] if row["audios"] and not row["videos"]][:3]
    for row in rows:
        row |= {"ext_audio_feats": []}
        (tmp_path / row["audios"][0]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(mini_atlas / row["audios"][0], tmp_path / row["audios"][0])
    write_rows(tmp_path, {"train": rows})
    out, file = tmp_path / "out", tmp_path / rows[1]["audios"][0]
    assert validate_atlas(tmp_path, out=out).ok
    good = file.read_bytes()
    file.write_bytes(good[:600])
    assert [f.code for f in validate_atlas(tmp_path, out=out).findings if f.level == "error"] == ["media-broken"]
    assert validate_atlas(tmp_path, out=out, quick=True).ok, "headers do not tell"
    file.write_bytes(good)
    assert validate_atlas(tmp_path, out=out).ok, "what was refused is tried again"
    status = file.stat()
    file.write_bytes(b"RIFF" + bytes(len(good) - 4))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert validate_atlas(tmp_path, out=out).ok, "same size and time: remembered"
    assert not validate_atlas(tmp_path, out=out, fresh=True).ok


def test_a_decoder_that_crashes_is_a_finding(mini_atlas: Path, tmp_path: Path) -> None:
    """libsndfile is made to abort on one file, as a broken decoder does."""
    atlas = tmp_path / "atlas"
    shutil.copytree(mini_atlas, atlas)
    rows = {"train": [row for row in read_rows(atlas)["train"] if row["audios"]][:12]}
    rows["train"] = [row | {"ext_audio_feats": [], "ext_video_feats": []} for row in rows["train"]]
    for name in ("validation", "test"):
        (atlas / f"{name}.jsonl").unlink()
    write_rows(atlas, rows)
    bad = rows["train"][4]["audios"][0]
    (tmp_path / "sitecustomize.py").write_text(
        "import os, pathlib, soundfile\n"
        f"bad = pathlib.Path({str(atlas / bad)!r}).read_bytes()\n"
        "opened = soundfile.SoundFile.__init__\n"
        "def crash(self, file, *rest, **options):\n"
        "    start = file.read(4096)\n"
        "    file.seek(0)\n"
        "    os.abort() if bad.startswith(start) else opened(self, file, *rest, **options)\n"
        "soundfile.SoundFile.__init__ = crash\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "hba", "atlas", "validate", str(atlas), "--workers", "1", "--json"],
        capture_output=True, text=True, timeout=900, check=False, env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    said = json.loads(done.stdout)
    assert done.returncode == 1
    (finding,) = said["findings"]
    assert (finding["code"], finding["where"]) == ("media-crash", "train.jsonl:5, audios")
    assert f"{bad} crashed (SIGABRT)" in finding["message"]


@pytest.mark.parametrize("cut", [0.02, 0.3, 0.6, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("flags", ["", "faststart"])
def test_the_probe_accepts_a_clip_only_if_all_of_it_is_there(tmp_path: Path, cut: float, flags: str) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, noise, flags=flags)
    data = path.read_bytes()
    path.write_bytes(data[: int(cut * len(data))])
    if cut < 1:
        with pytest.raises(MediaError):
            probe(path, "videos", where="x", quick=False, hashed=False)
        return
    facts = probe(path, "videos", where="x", quick=False, hashed=True)
    assert (facts.frames, facts.seconds, facts.frames_per_second) == (50, 2.0, 25.0)
    assert (facts.width, facts.height, facts.blank) == (64, 64, False)
    quick = probe(path, "videos", where="x", quick=True, hashed=False)
    assert (quick.frames, quick.seconds, quick.sha256) == (50, 2.0, None)


def test_facts_of_sounds(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, (22050, 2)), 44100)
    for quick in (False, True):
        facts = probe(path, "audios", where="x", quick=quick, hashed=False)
        assert (facts.seconds, facts.sample_rate, facts.channels, facts.blank) == (0.5, 44100, 2, False)
    with pytest.raises(MediaError, match="no video track"):
        probe(path, "videos", where="x", quick=True, hashed=False)


# --- command and page ------------------------------------------------------------------------------------------------


def test_a_clean_atlas_exits_0_without_findings(
    mini_atlas: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["hba", "atlas", "validate", str(mini_atlas), "--out", str(tmp_path), "--workers", "2"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code in (0, None)
    assert "Nothing is wrong with 237 rows and 503 files." in capsys.readouterr().out
    said = json.loads((tmp_path / "validate.json").read_text())
    assert (said["ok"], said["findings"]) == (True, [])
    assert said["summary"]["media"]["audios"]["sample_rates"] == {"8000 Hz": 156}


def test_the_page_stands_alone_and_escapes(faulty: tuple[Path, Planted], checked: Checked) -> None:
    page = render_validation(checked.result)
    assert "<script" not in page
    assert "at<b>las" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    assert not re.search(r"(src|href)=[\"']?(https?:|//|file:)", page)
    assert "@import" not in page
    assert "url(" not in page
    for code in {code for _, code, _ in faulty[1]}:
        assert f'id="{code}"' in page


def test_a_long_list_is_cut_on_the_page_and_says_so(tmp_path: Path) -> None:
    bad = text_row(dataset="x", problem="\x07")
    result = validate_atlas(write_rows(tmp_path, {"train": [bad] * 250}))
    page = render_validation(result)
    assert page.count("train.jsonl:") == 200
    assert "and 50 more in validate.json" in page
    assert "\x07" not in page


def test_shards_give_the_same_findings(mini_atlas: Path, tmp_path: Path) -> None:
    """JSONL, shards with an index, and shards without one, whose media are found by reading up to them."""
    source, shards = tmp_path / "jsonl", tmp_path / "shards"
    rows = read_rows(mini_atlas)
    chosen = {name: [row for row in rows[name] if row["audios"] and not row["videos"]][:4] for name in rows}
    for row in (row for lines in chosen.values() for row in lines):
        row |= {"ext_audio_feats": []}
        (source / row["audios"][0]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(mini_atlas / row["audios"][0], source / row["audios"][0])
    broken, copied = source / chosen["train"][1]["audios"][0], source / chosen["test"][2]["audios"][0]
    broken.write_bytes(broken.read_bytes()[:500])
    shutil.copyfile(source / chosen["train"][3]["audios"][0], copied)
    write_rows(source, chosen)
    for name in chosen:
        convert_to_parquet(open_atlas(source, split=name), shards)

    def said(atlas: Path) -> list[tuple[str, str, str]]:
        return [
            (level, code, re.sub(r"-00000-of-00001\.parquet", ".jsonl", where))
            for level, code, where in found(validate_atlas(atlas))
            if level != "note"
        ]

    expected = [("error", "media-broken", "train.jsonl:2, audios"), ("error", "media-leak", "train.jsonl:4, audios")]
    assert said(source) == expected
    assert said(shards) == expected
    shutil.rmtree(shards / "index")
    assert said(shards) == expected


def test_the_terminal_shows_the_code_of_a_finding_and_how_to_mend_it(tmp_path: Path) -> None:
    write_rows(tmp_path, {"train": [text_row(answer="humuor")]})
    result = CliRunner().invoke(app, ["atlas", "validate", str(tmp_path)], env={"COLUMNS": "200"})
    assert result.exit_code == 1
    assert "row-label" in result.stdout and "Did you mean 'humour'?" in result.stdout
