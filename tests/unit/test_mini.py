"""The mini-atlas is in the published schema, whole, reproducible to the byte, and never written over anything else."""

import hashlib
import io
import json
from collections import defaultdict
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch

from hba import open_atlas
from hba.errors import InputError
from hba.mini import CARRIED_BY, VERSION, build_mini_atlas
from hba.mini.scenes import make_plan
from hba.taxonomy import BUILTIN

SPLITS = ("train", "validation", "test")
PATHS = ("images", "videos", "audios", "texts", "ext_video_feats", "ext_audio_feats")


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    folder = tmp_path_factory.mktemp("atlas") / "mini"
    build_mini_atlas(folder, size="tiny", seed=0, workers=1)
    return folder


def rows_of(folder, split):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def tree(folder):
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize("split", SPLITS)
def test_every_split_has_all_datasets_tasks_and_signatures(atlas, split):
    rows = rows_of(atlas, split)
    assert {row["dataset"] for row in rows} == set(BUILTIN.datasets)
    assert {row["modality_signature"] for row in rows} == {"text", "text_audio", "text_video_audio"}
    assert {BUILTIN.dataset(row["dataset"]).task for row in rows} == set(BUILTIN.tasks)


@pytest.mark.parametrize("split", SPLITS)
def test_rows_agree_with_the_taxonomy_and_their_signature(atlas, split):
    for row in rows_of(atlas, split):
        about = BUILTIN.dataset(row["dataset"])
        assert row["task"].endswith("_qa" if about.domain is None else "_cls")
        if about.domain is not None:
            assert row["class_label"] in about.labels
            assert BUILTIN.canonical_label(row["dataset"], row["answer"]) == row["class_label"]
        media = {"text", *(["video"] if row["videos"] else []), *(["audio"] if row["audios"] else [])}
        assert set(row["modality_signature"].split("_")) == media
        assert row["problem"].count("<video>") <= len(row["videos"])
        assert row["problem"].count("<audio>") <= len(row["audios"])


def test_every_class_occurs_in_training(atlas):
    seen = defaultdict(set)
    for row in rows_of(atlas, "train"):
        seen[row["dataset"]].add(row.get("class_label"))
    for key, about in BUILTIN.datasets.items():
        assert set(about.labels) <= seen[key], key


def test_every_file_is_used_and_every_path_exists(atlas):
    used = {path for split in SPLITS for row in rows_of(atlas, split) for name in PATHS for path in row[name]}
    lying = {str(file.relative_to(atlas)) for file in atlas.rglob("*") if file.is_file()}
    assert lying == used | {f"{split}.jsonl" for split in SPLITS} | {"atlas.json", "README.txt"}


def test_no_clip_serves_two_splits(atlas):
    files = [{path for row in rows_of(atlas, split) for name in PATHS for path in row[name]} for split in SPLITS]
    assert not files[0] & files[1]
    assert not files[0] & files[2]
    assert not files[1] & files[2]
    contents = [{hashlib.sha256((atlas / path).read_bytes()).hexdigest() for path in paths} for paths in files]
    assert not contents[0] & contents[2]


def test_bytes_depend_on_seed_alone(atlas, tmp_path):
    build_mini_atlas(tmp_path / "another name", size="tiny", seed=0, workers=2)
    build_mini_atlas(tmp_path / "seed1", size="tiny", seed=1, workers=1)
    first, again, other = tree(atlas), tree(tmp_path / "another name"), tree(tmp_path / "seed1")
    assert first == again
    assert not {path for path in first if path.endswith((".wav", ".mp4", ".pt"))} & set(other)
    assert not {digest for path, digest in first.items() if path.endswith(".wav")} & set(other.values())


def test_media_are_real_and_of_one_size_a_kind(atlas):
    wavs = {file: soundfile.info(str(file)) for file in atlas.rglob("*.wav")}
    assert {info.samplerate for info in wavs.values()} == {8000}
    assert {(info.frames, file.stat().st_size) for file, info in wavs.items()} == {
        (9090, 4668),
        (10100, 5180),
        (11615, 5948),
    }
    movies = list(atlas.rglob("*.mp4"))
    assert len({file.stat().st_size for file in movies}) == 1
    for file in movies[:8]:
        data = file.read_bytes()
        assert b"x264" not in data
        assert b"Lav" not in data
        with av.open(io.BytesIO(data)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(frames) in (8, 9, 10)
        assert frames[0].shape == (56, 56, 3)
        assert np.std(np.stack(frames), axis=0).mean() > 0.05, "something must move"
    for kind in ("opensmile", "pose"):
        sizes = {file.stat().st_size for file in (atlas / kind).rglob("*.pt")}
        assert len(sizes) <= 3, "a size may tell the length, and nothing else"


def test_descriptors_load_without_code_and_hold_what_they_say(atlas):
    row = next(row for row in rows_of(atlas, "train") if row["dataset"] == "cremad")
    pose = torch.load(atlas / row["ext_video_feats"][0], weights_only=True)
    assert {name: tuple(value.shape[1:]) for name, value in pose.items()} == {
        "pose": (11, 3),
        "face": (7, 3),
        "left_hand": (3, 3),
        "right_hand": (3, 3),
    }
    assert len({len(value) for value in pose.values()}) == 1
    sound = torch.load(atlas / row["ext_audio_feats"][0], weights_only=True)
    assert sound["features"].shape == (88,)
    assert torch.isfinite(sound["features"]).all()


def test_descriptors_where_adapters_need_them(atlas):
    for row in rows_of(atlas, "train"):
        if BUILTIN.dataset(row["dataset"]).task in ("EMO", "DEP", "ANX", "PTSD", "HUM"):
            assert len(row["ext_audio_feats"]) == len(row["audios"])
            assert len(row["ext_video_feats"]) == len(row["videos"])


def test_tags_stand_everywhere_and_nowhere(atlas):
    problems = [row["problem"] for row in rows_of(atlas, "train") if row["modality_signature"] == "text_video_audio"]
    assert any(problem.startswith("<video><audio>") for problem in problems)
    assert any(problem.endswith("<video><audio>") for problem in problems)
    assert any("<video>" in problem and "<audio>" not in problem for problem in problems)
    assert any("<" not in problem for problem in problems)


def test_the_folder_says_what_it_is(atlas):
    about = json.loads((atlas / "atlas.json").read_text())
    wanted = {"name": "mini-atlas", "synthetic": True, "seed": 0, "size": "tiny", "version": VERSION}
    assert {key: about[key] for key in wanted} == wanted
    assert set(about["carried_by"]) == set(CARRIED_BY) == set(BUILTIN.datasets)
    readme = (atlas / "README.txt").read_text()
    assert "Synthetic" in readme
    assert all(key in readme for key in BUILTIN.datasets)


def test_summary_counts_what_lies_there(atlas):
    summary = build_mini_atlas(atlas, size="tiny", seed=0, workers=1)
    files = [file for file in atlas.rglob("*") if file.is_file()]
    assert summary.reused
    assert summary.num_files == len(files)
    assert summary.total_bytes == sum(file.stat().st_size for file in files) < 2_000_000
    assert (
        sum(summary.rows["train"].values()) == len(rows_of(atlas, "train")) == sum(summary.signatures["train"].values())
    )


def test_same_atlas_is_left_untouched_and_another_refused(atlas):
    before = {file: file.stat().st_mtime_ns for file in atlas.rglob("*")}
    build_mini_atlas(atlas, size="tiny", seed=0, workers=1)
    for arguments in ({"size": "tiny", "seed": 1}, {"size": "small", "seed": 0}):
        with pytest.raises(InputError, match="already holds"):
            build_mini_atlas(atlas, workers=1, **arguments)
    assert before == {file: file.stat().st_mtime_ns for file in atlas.rglob("*")}


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=str(tmp_path)):
        build_mini_atlas(tmp_path, size="tiny", seed=0, workers=1)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": "tinny", "seed": 0, "workers": 1}, "Did you mean 'tiny'"),
        ({"size": "tiny", "seed": -1, "workers": 1}, "seed -1"),
        ({"size": "tiny", "seed": 0, "workers": 0}, "workers 0"),
    ],
)
def test_bad_arguments_are_named(tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        build_mini_atlas(tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


def test_progress_is_told_and_an_interruption_leaves_nothing(tmp_path):
    calls = []

    def stop(done, total):
        calls.append((done, total))
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_mini_atlas(tmp_path / "out", size="tiny", seed=0, workers=1, progress=stop)
    assert [done for done, _ in calls] == [1, 2, 3, 4, 5]
    assert calls[0][1] > 100
    assert not list(Path(tmp_path).iterdir())


def test_the_atlas_opens_and_every_medium_decodes(atlas):
    for split in SPLITS:
        opened = open_atlas(atlas, split=split)
        assert len(opened) == len(rows_of(atlas, split))
        assert not opened.quarantine
    for number in range(len(opened)):
        sample = opened[number]
        assert all(0.9 < audio.seconds < 1.6 for audio in sample.load_audios())
        assert all(video.frames.shape == (8, 56, 56, 3) for video in sample.load_videos(8))
        assert len(sample.load_descriptors("ext_audio_feats")) == sample.ext_audio_feats
        assert len(sample.load_descriptors("ext_video_feats")) == sample.ext_video_feats


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_prompt_without_media_stands_in_two_splits(seed: int) -> None:
    plan = make_plan("small", seed)
    written = {
        split: {row["problem"] for row in rows if not row["videos"] and not row["audios"]}
        for split, rows in plan.rows.items()
    }
    assert all(written.values())
    assert not written["train"] & written["test"] and not written["train"] & written["validation"]
    assert not written["validation"] & written["test"]
