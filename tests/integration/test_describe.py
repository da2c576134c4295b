"""`hba atlas describe` on real media: files as published, rows that name them, and failures that are said."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import torch

from hba import open_atlas
from hba.atlas.media import load_audio
from hba.atlas.video import read_frames
from hba.descriptors.describe import Summary, describe, link_rows
from hba.descriptors.items import Settings, make_plan, open_ledger
from hba.descriptors.landmarks import environment_folder
from hba.errors import HbaError, InputError, MediaError
from hba.storage import file_sha256

pytest.importorskip("opensmile", reason="opensmile is not installed: pip install 'human-behavior-atlas[descriptors]'")
SOUND = Settings(audio="egemaps", video=None)
LANDMARKS_READY = (environment_folder() / "hba.json").is_file()
needs_landmarks = pytest.mark.skipif(not LANDMARKS_READY, reason="run `hba atlas describe --setup` to test landmarks")


def tone(path: Path, seconds: float = 0.5, hertz: float = 220.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    time = np.arange(round(16_000 * seconds)) / 16_000
    noise = np.random.default_rng(int(hertz)).normal(0, 0.01, len(time))
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * hertz * time) + noise, 16_000)


def movie(path: Path, *, sound: bool, pictures: list[np.ndarray] | None = None) -> None:
    """Ten frames at 10 a second, of noise unless `pictures` are given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    pictures = pictures or [rng.integers(0, 255, (64, 64, 3), np.uint8) for _ in range(10)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = (*pictures[0].shape[:2], "yuv420p")
        track = container.add_stream("aac", rate=16_000) if sound else None
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
        if track is not None:
            samples = (0.3 * np.sin(np.arange(len(pictures) * 1600) / 10)).astype(np.float32)[None]
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.sample_rate = 16_000
            container.mux(track.encode(frame))
            container.mux(track.encode())


def row(number: int, **fields: Any) -> dict[str, Any]:
    kinds = [kind for kind in ("video", "audio") if fields.get(f"{kind}s")]
    about = {"problem": "What do they feel?", "answer": "anger", "dataset": "cremad", "task": "emotion_cls"}
    return {"note": f"kept {number} ü", **about, "modality_signature": "_".join(["text", *kinds]), **fields}


def write_rows(root: Path, rows: list[dict[str, Any]], name: str = "train") -> None:
    (root / f"{name}.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))


def read_rows(root: Path, name: str = "train") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture
def atlas(tmp_path: Path) -> Path:
    """Two sounds, one of them in two rows and two splits, and a row of text."""
    root = tmp_path / "atlas"
    tone(root / "a" / "one.wav")
    tone(root / "a" / "two.wav", hertz=330)
    write_rows(root, [row(0, audios=["a/one.wav"]), row(1), row(2, audios=["a/one.wav", "a/two.wav"])])
    write_rows(root, [row(3, audios=["a/one.wav"])], "test")
    return root


def contents(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): file_sha256(p) for p in sorted(root.rglob("*")) if p.is_file()}


def failures(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "describe" / "describe_failures.jsonl").read_text().splitlines()]


def test_compare_features_are_written_as_published_and_named_in_the_rows(atlas: Path) -> None:
    before, lines = contents(atlas), (atlas / "train.jsonl").read_bytes().splitlines()
    summary = describe(atlas, Settings(audio="compare", video=None), workers=1)
    assert (summary.extracted, summary.failed) == ({"audio": 2}, {})
    assert summary.rows_linked == {"train": 2, "test": 1}
    rows = read_rows(atlas)
    assert rows[2]["ext_audio_feats"] == ["opensmile/a/one.wav.pt", "opensmile/a/two.wav.pt"]
    assert rows[2]["note"] == "kept 2 ü"
    assert (atlas / "train.jsonl").read_bytes().splitlines()[1] == lines[1]
    samples = open_atlas(atlas, "train")
    one, two = samples[2].load_descriptors("ext_audio_feats")
    assert one["features"].shape == (6373,)
    assert not torch.equal(one["features"], two["features"])
    kept = (atlas / "describe" / f"train.{before['train.jsonl'][:12]}.jsonl").read_bytes()
    assert kept.splitlines() == lines
    assert {name: before[name] for name in before if name.startswith("a/")}.items() <= contents(atlas).items()


def test_features_are_those_of_opensmile(atlas: Path) -> None:
    import opensmile

    describe(atlas, SOUND, splits=["train"], workers=1)
    smile = opensmile.Smile(opensmile.FeatureSet.eGeMAPSv02, opensmile.FeatureLevel.Functionals)
    audio = load_audio(atlas / "a" / "one.wav", where="test")
    expected = smile.process_signal(audio.samples, audio.sample_rate).to_numpy(np.float32)[0]
    got = torch.load(atlas / "opensmile_egemaps" / "a" / "one.wav.pt", weights_only=True)["features"].numpy()
    np.testing.assert_array_equal(got, expected)
    assert "ext_audio_feats" not in read_rows(atlas, "test")[0]


def test_low_level_descriptors_are_a_sequence_and_safetensors_open_as_well(atlas: Path) -> None:
    settings = Settings(audio="compare-lld", video=None, out_format="safetensors")
    describe(atlas, settings, splits=["test"], workers=1)
    assert read_rows(atlas, "test")[0]["ext_audio_feats"] == ["opensmile_lld/a/one.wav.safetensors"]
    (descriptor,) = open_atlas(atlas, "test")[0].load_descriptors("ext_audio_feats")
    length, width = descriptor["features"].shape
    assert (width, length > 30) == (65, True)


def test_a_second_run_changes_nothing_and_two_processes_give_the_same_bytes(atlas: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(atlas, other)
    describe(atlas, SOUND, workers=1)
    before = contents(atlas)
    again = describe(atlas, SOUND, workers=1)
    assert (again.extracted, again.kept, again.rows_linked) == ({}, {"audio": 2}, {"train": 0, "test": 0})
    assert contents(atlas) == before
    describe(other, SOUND, workers=2)
    same = {name: digest for name, digest in before.items() if not name.startswith("describe/")}
    assert same.items() <= contents(other).items()


def test_a_changed_medium_is_measured_again_and_a_touched_one_is_not(atlas: Path) -> None:
    describe(atlas, SOUND, workers=1)
    output = atlas / "opensmile_egemaps" / "a" / "two.wav.pt"
    before = file_sha256(output)
    (atlas / "a" / "one.wav").touch()
    tone(atlas / "a" / "two.wav", hertz=500)
    again = describe(atlas, SOUND, workers=1)
    assert (again.extracted, again.kept) == ({"audio": 1}, {"audio": 1})
    assert file_sha256(output) != before


def test_what_cannot_be_measured_is_recorded_and_never_filled_in(atlas: Path) -> None:
    tone(atlas / "a" / "short.wav", seconds=0.025)
    whole = (atlas / "a" / "two.wav").read_bytes()
    (atlas / "a" / "two.wav").write_bytes(whole[: len(whole) // 2])
    media = ["a/one.wav", "a/two.wav", "a/short.wav", "a/none.wav"]
    write_rows(atlas, [row(i, audios=[medium]) for i, medium in enumerate(media)])
    summary = describe(atlas, SOUND, workers=1)
    assert (summary.extracted, summary.failed) == ({"audio": 1}, {"audio": 3})
    reasons = {record["medium"]: record["reason"] for record in failures(atlas)}
    assert "88 of 88 openSMILE values are NaN" in reasons["a/short.wav"]
    assert "cut off" in reasons["a/two.wav"]
    assert "no such file" in reasons["a/none.wav"]
    assert [bool(r.get("ext_audio_feats")) for r in read_rows(atlas)] == [True, False, False, False]
    assert [p.name for p in (atlas / "opensmile_egemaps").rglob("*.*")] == ["one.wav.pt"]
    describe(atlas, SOUND, workers=1)
    assert len(failures(atlas)) == 3  # not once more
    (atlas / "a" / "two.wav").write_bytes(whole)
    mended = describe(atlas, SOUND, workers=1)
    assert (mended.extracted, mended.rows_linked["train"]) == ({"audio": 1}, 1)
    assert {record["medium"] for record in failures(atlas)} == {"a/short.wav", "a/none.wav"}


def test_a_clip_is_heard_by_its_sound_track_and_a_silent_one_fails(atlas: Path) -> None:
    movie(atlas / "v" / "loud.mp4", sound=True)
    movie(atlas / "v" / "mute.mp4", sound=False)
    write_rows(atlas, [row(0, videos=["v/loud.mp4"]), row(1, videos=["v/mute.mp4"])])
    summary = describe(atlas, SOUND, splits=["train"], workers=1)
    assert [f["reason"] for f in summary.failures] == ["has no sound track"]
    assert [r.get("ext_audio_feats") for r in read_rows(atlas)] == [["opensmile_egemaps/v/loud.mp4.pt"], None]


def test_descriptors_of_others_are_left_alone_unless_replaced(atlas: Path) -> None:
    foreign = atlas / "opensmile_egemaps" / "a" / "one.wav.pt"
    foreign.parent.mkdir(parents=True)
    torch.save({"features": torch.ones(3)}, foreign)
    shutil.copy(foreign, atlas / "published.pt")
    write_rows(atlas, [row(0, audios=["a/one.wav"]), row(1, audios=["a/two.wav"], ext_audio_feats=["published.pt"])])
    before = file_sha256(foreign)
    summary = describe(atlas, SOUND, splits=["train"], workers=1)
    assert "was not written by describe" in summary.failures[0]["reason"]
    assert file_sha256(foreign) == before
    assert read_rows(atlas)[1]["ext_audio_feats"] == ["published.pt"]
    replaced = describe(atlas, Settings(audio="egemaps", video=None, replace=True), splits=["train"], workers=1)
    assert replaced.extracted == {"audio": 2}
    assert file_sha256(foreign) != before
    assert read_rows(atlas)[1]["ext_audio_feats"] == ["opensmile_egemaps/a/two.wav.pt"]
    assert failures(atlas) == []


def test_rows_that_changed_meanwhile_are_left_alone(atlas: Path) -> None:
    plan = make_plan(atlas, ["train"], SOUND, ())
    write_rows(atlas, [row(9)])
    with pytest.raises(HbaError, match="changed while descriptors were extracted"):
        link_rows(plan.files[0], set(plan.items), atlas / "describe")
    assert read_rows(atlas)[0]["note"] == "kept 9 ü"


def test_bad_calls_are_refused_before_anything_is_written(atlas: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unknown audio descriptor 'egmaps'.*'egemaps'"):
        describe(atlas, Settings(audio="egmaps", video=None))
    with pytest.raises(InputError, match="nothing to extract"):
        Settings(audio=None, video=None)
    with pytest.raises(InputError, match="has no split 'dev'"):
        describe(atlas, SOUND, splits=["dev"])
    with pytest.raises(InputError, match="holds no split"):
        describe(tmp_path / "atlas" / "a", SOUND)
    with pytest.raises(InputError, match="unknown executor"):
        describe(atlas, SOUND, executor="dask")
    assert not (atlas / "a" / "describe").exists()
    with open_ledger(atlas), pytest.raises(HbaError, match="another process extracts"):
        describe(atlas, SOUND)


def test_the_command_names_failures_and_exits_2(atlas: Path) -> None:
    tone(atlas / "a" / "two.wav", seconds=0.025)
    command = [sys.executable, "-m", "hba", "atlas", "describe", str(atlas), "--audio", "egemaps", "--video", "none"]
    done = subprocess.run([*command, "--workers", "1", "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "train.jsonl:3, a/two.wav: cannot be measured" in done.stderr
    said = json.loads(done.stdout)
    assert (said["extracted"], said["failed"]) == ({"audio": 1}, {"audio": 1})
    assert said["real_time_factor"]["audio"] > 0
    allowed = subprocess.run([*command, "--allow-failed", "1"], capture_output=True, text=True, check=False)
    assert (allowed.returncode, "1 kept, 1 failed" in allowed.stdout) == (0, True)


@pytest.mark.parametrize(("rate", "expected"), [(None, 10), (5.0, 5), (100.0, 10), (1.0, 1)])
def test_frames_of_a_clip_come_on_the_grid_that_was_asked_for(
    tmp_path: Path, rate: float | None, expected: int
) -> None:
    movie(tmp_path / "v.mp4", sound=True)
    frames = list(read_frames(tmp_path / "v.mp4", where="v", frames_per_second=rate))
    assert (len(frames), frames[0].pixels.shape) == (expected, (64, 64, 3))


def test_a_clip_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    movie(tmp_path / "v.mkv", sound=False)
    data = (tmp_path / "v.mkv").read_bytes()
    (tmp_path / "v.mkv").write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(MediaError, match="cut off"):
        list(read_frames(tmp_path / "v.mkv", where="v"))


def photograph() -> np.ndarray:
    """The portrait that matplotlib carries, in the environment of the extractor."""
    from hba.atlas.media import load_image

    (path,) = environment_folder().glob("lib/*/site-packages/matplotlib/mpl-data/sample_data/grace_hopper.jpg")
    return load_image(path, where="portrait")


@needs_landmarks
def test_landmarks_of_a_photographed_person(atlas: Path) -> None:
    person = photograph()
    shifted = [np.ascontiguousarray(np.roll(person, 4 * i, axis=1)) for i in range(4)]
    movie(atlas / "v" / "person.mp4", sound=False, pictures=shifted)
    movie(atlas / "v" / "again.mp4", sound=False, pictures=shifted)
    movie(atlas / "v" / "nobody.mp4", sound=False)
    clips = ["v/person.mp4", "v/nobody.mp4", "v/again.mp4"]
    write_rows(atlas, [row(i, videos=[clip]) for i, clip in enumerate(clips)])
    summary: Summary = describe(atlas, Settings(audio=None, video="holistic"), splits=["train"], workers=1)
    assert (summary.extracted, summary.failed) == ({"video": 2}, {"video": 1})
    assert "sees nobody in any of 10 frames" in summary.failures[0]["reason"]
    rows = read_rows(atlas)
    assert [r.get("ext_video_feats") for r in rows] == [["pose/v/person.mp4.pt"], None, ["pose/v/again.mp4.pt"]]
    samples = open_atlas(atlas, "train")
    (first,), (again,) = (samples[i].load_descriptors("ext_video_feats") for i in (0, 2))
    points = {"pose": 33, "face": 468, "left_hand": 21, "right_hand": 21}
    assert {name: tuple(part.shape) for name, part in first.items()} == {n: (4, p, 3) for n, p in points.items()}
    assert all(torch.equal(first[name], again[name]) for name in points)  # whatever clip came between
    nose, left_shoulder, right_shoulder = first["pose"][0, [0, 11, 12]]
    assert right_shoulder[0] < nose[0] < left_shoulder[0]
    assert nose[1] < min(left_shoulder[1], right_shoulder[1])
    assert 0.4 < nose[0] < 0.65
    assert 0.25 < nose[1] < 0.5
    assert nose[2] > 0.9
    assert first["face"][:, :, 2].eq(1).all()
    moved = first["face"][3, :, 0].mean() - first["face"][0, :, 0].mean()
    assert moved == pytest.approx(12 / person.shape[1], abs=0.01)
    assert first["left_hand"].eq(0).all()  # out of the picture: confidence 0, at (0, 0)


def test_a_ray_cluster_gives_the_same_files(atlas: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed: pip install ray")
    other = tmp_path / "other"
    shutil.copytree(atlas, other)
    tone(atlas / "a" / "two.wav", seconds=0.025)
    on_ray = describe(atlas, SOUND, workers=2, executor="ray")
    assert (on_ray.extracted, on_ray.failed) == ({"audio": 1}, {"audio": 1})
    describe(other, SOUND, workers=1)
    output = Path("opensmile_egemaps", "a", "one.wav.pt")
    assert (atlas / output).read_bytes() == (other / output).read_bytes()
