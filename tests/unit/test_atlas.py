"""Opening an atlas: rows, splits, slices, views, columns."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

import hba
from hba.atlas import Atlas, open_atlas
from hba.atlas.names import parse_split
from hba.batch.sampler import plan_batches
from hba.errors import InputError, MediaError
from hba.taxonomy import BUILTIN


def make_row(**changes: Any) -> dict[str, Any]:
    row = {
        "problem": "<audio>How does the speaker feel?",
        "answer": "anger",
        "images": [],
        "videos": [],
        "audios": ["audios/a.wav"],
        "texts": [],
        "dataset": "cremad",
        "task": "emotion_cls",
        "class_label": "anger",
        "modality_signature": "text_audio",
        "ext_video_feats": [],
        "ext_audio_feats": [],
    }
    return {key: value for key, value in (row | changes).items() if value is not ...}


QA = {"dataset": "siq2", "task": "social_qa", "class_label": "", "answer": "Because he won."}
TEXT = {"audios": [], "modality_signature": "text", "problem": "Is it a joke?"}


def write_rows(folder: Path, rows: list[Any], name: str = "train.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def atlas(tmp_path: Path) -> Atlas:
    humour = {"dataset": "urfunny", "task": "humour_cls", "class_label": "", "answer": "Yes", **TEXT}
    rows = [make_row(), make_row(**humour), make_row(**QA), make_row(answer="Angry ", class_label="ANGER", speaker=7)]
    write_rows(tmp_path, rows)
    (tmp_path / "audios").mkdir()
    soundfile.write(tmp_path / "audios/a.wav", np.full(8000, 0.1, np.float32), 16_000)
    return open_atlas(tmp_path, split="train")


def test_samples_say_what_their_rows_say(atlas: Atlas, tmp_path: Path) -> None:
    assert len(atlas) == 4
    assert [s.id for s in atlas] == ["train/1", "train/2", "train/3", "train/4"]
    assert [s.label for s in atlas] == ["anger", "humour", None, "anger"]
    assert [s.target for s in atlas] == ["anger", "humour", "Because he won.", "anger"]
    assert atlas[0].where == f"{tmp_path / 'train.jsonl'}:1"
    assert atlas[-1].extra == {"speaker": 7}
    assert (atlas[0].audios, atlas[1].audios) == (1, 0)
    assert atlas[0].load_audios()[0].seconds == 0.5
    with pytest.raises(IndexError):
        atlas[4]


def test_columns_agree_with_the_samples(atlas: Atlas) -> None:
    columns = atlas.columns
    for i, sample in enumerate(atlas):
        assert columns.datasets[columns.dataset_codes[i]] == sample.dataset
        assert columns.signatures[columns.signature_codes[i]] == sample.modality_signature
        assert columns.tasks[columns.task_codes[i]] == BUILTIN.dataset(sample.dataset).task
        expected = -1 if sample.label is None else BUILTIN.global_index(sample.dataset, sample.label)
        assert columns.label_codes[i] == expected
        assert columns.problem_chars[i] == len(sample.problem)
        assert columns.num_audios[i] == sample.audios
    assert atlas.audio_bytes.tolist() == [16_044, 0, 16_044, 16_044]
    assert (atlas.estimated_tokens > 0).all()


def test_filters_are_views_and_compose(atlas: Atlas) -> None:
    assert [s.id for s in atlas.filter(tasks=["EMO"])] == ["train/1", "train/4"]
    assert [s.id for s in atlas.filter(datasets=["siq2", "urfunny"])] == ["train/2", "train/3"]
    assert [s.id for s in atlas.filter(modalities="text")] == ["train/2"]
    both = atlas.filter(tasks=["EMO", "SOC"]).filter(datasets=["siq2"])
    assert [s.id for s in both] == ["train/3"]
    assert both.columns.dataset_codes.shape == (1,)
    with pytest.raises(InputError, match="Did you mean 'EMO'"):
        atlas.filter(tasks=["EM0"])
    with pytest.raises(InputError, match="no row"):
        atlas.filter(datasets=["tess"])


def test_fingerprint_tells_rows_apart(atlas: Atlas, tmp_path: Path) -> None:
    again = open_atlas(tmp_path, split="train")
    assert atlas.fingerprint == again.fingerprint
    assert len(atlas.fingerprint) == 64
    assert len({atlas.fingerprint, atlas[:3].fingerprint, atlas[1:].fingerprint}) == 3


def test_pickled_atlas_serves_the_same_samples(atlas: Atlas) -> None:
    atlas[0]  # an open file must not travel
    copy = pickle.loads(pickle.dumps(atlas))
    assert [s.id for s in copy] == [s.id for s in atlas]
    assert copy[0].load_audios()[0].samples.tobytes() == atlas[0].load_audios()[0].samples.tobytes()
    assert copy.fingerprint == atlas.fingerprint


def test_file_changed_after_opening_is_refused(atlas: Atlas, tmp_path: Path) -> None:
    write_rows(tmp_path, [make_row(problem="Another question altogether?")] * 4)
    with pytest.raises(InputError, match="changed after it was opened"):
        atlas[0]


def test_ids_and_line_numbers(tmp_path: Path) -> None:
    rows = [make_row(id="first"), "", "  ", make_row()]
    opened = open_atlas(write_rows(tmp_path, rows), split="train")
    assert [s.id for s in opened] == ["first", "train/4"]
    with pytest.raises(InputError, match=r"train.jsonl:2: field 'id': 'x' is also the id of line 1"):
        open_atlas(write_rows(tmp_path, [make_row(id="x"), make_row(id="x")]), split="train")
    with pytest.raises(InputError, match=r"train.jsonl:2: field 'id'"):
        open_atlas(write_rows(tmp_path, [make_row(id="train/2"), make_row()]), split="train")


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    line = json.dumps(make_row()).encode()
    (tmp_path / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n" + line)
    opened = open_atlas(tmp_path, split="train")
    assert [s.problem for s in opened] == [make_row()["problem"]] * 2


def test_order_within_a_signature_does_not_count(tmp_path: Path) -> None:
    row = make_row(videos=["v.mp4"], modality_signature="text_audio_video")
    opened = open_atlas(write_rows(tmp_path, [row]), split="train")
    assert opened[0].modality_signature == opened.columns.signatures[0] == "text_video_audio"


def test_synthetic_card(atlas: Atlas, tmp_path: Path) -> None:
    assert not atlas.synthetic
    (tmp_path / "atlas.json").write_text('{"name": "mini-atlas", "synthetic": true}')
    assert open_atlas(tmp_path, split="train").synthetic


# --- splits ----------------------------------------------------------------------------------------------------------


def test_a_missing_split_is_never_another_file(tmp_path: Path) -> None:
    write_rows(tmp_path, [make_row()])
    write_rows(tmp_path, [make_row()], "final_v8_test_cleaned.jsonl")
    assert open_atlas(tmp_path, split="test")[0].id == "test/1"
    with pytest.raises(InputError, match=r"no split 'validation'.*Choose one of: test, train"):
        open_atlas(tmp_path, split="validation")
    with pytest.raises(InputError, match="no split was named"):
        open_atlas(tmp_path)
    with pytest.raises(InputError, match="holds split 'train', not 'test'"):
        open_atlas(tmp_path / "train.jsonl", split="test")
    write_rows(tmp_path, [make_row()], "test.jsonl")
    with pytest.raises(InputError, match="ambiguous"):
        open_atlas(tmp_path, split="test")
    with pytest.raises(InputError, match="no such file"):
        open_atlas(tmp_path / "nowhere", split="test")


def test_one_file_needs_no_split(tmp_path: Path) -> None:
    write_rows(tmp_path, [make_row()] * 3, "mine.jsonl")
    assert open_atlas(tmp_path / "mine.jsonl").split == "mine"
    assert open_atlas(tmp_path / "mine.jsonl", split="train[1:]")[0].id == "train/2"


def test_train_1000_means_rows(tmp_path: Path) -> None:
    """The published reader took it for 1000 %."""
    write_rows(tmp_path, [make_row()] * 40)
    assert len(open_atlas(tmp_path, split="train[:10]")) == 10
    assert len(open_atlas(tmp_path, split="train[:10%]")) == 4
    assert [s.id for s in open_atlas(tmp_path, split="train[-2:]")] == ["train/39", "train/40"]
    assert [s.id for s in open_atlas(tmp_path, split="train[50%:55%]")] == ["train/21", "train/22"]
    with pytest.raises(InputError, match="selects none of 40 rows"):
        open_atlas(tmp_path, split="train[:0]")


@pytest.mark.parametrize(
    "spec", ["", "train[", "train[:]]", "../train", "a/b", "train[1:5%]", "train[:200%]", "train[1]"]
)
def test_unreadable_splits_are_refused(tmp_path: Path, spec: str) -> None:
    write_rows(tmp_path, [make_row()])
    with pytest.raises(InputError, match="split"):
        open_atlas(tmp_path, split=spec)


bounds = st.none() | st.integers(-300, 300)


@given(start=bounds, stop=bounds, total=st.integers(0, 250))
def test_row_slices_are_those_of_python(start: int | None, stop: int | None, total: int) -> None:
    text = f"train[{'' if start is None else start}:{'' if stop is None else stop}]"
    assert list(parse_split(text).rows(total)) == list(range(total))[start:stop]


@given(cuts=st.lists(st.integers(0, 100), max_size=6), total=st.integers(0, 500))
def test_per_cent_slices_partition_the_rows(cuts: list[int], total: int) -> None:
    edges = [0, *sorted(cuts), 100]
    parts = [parse_split(f"train[{a}%:{b}%]").rows(total) for a, b in pairwise(edges)]
    assert [row for part in parts for row in part] == list(range(total))


# --- any row opens or is refused by name ------------------------------------------------------------------------------

text = st.text(max_size=20)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=5,
)
changed_rows = st.dictionaries(st.sampled_from([*make_row(), "id", "other"]), json_values, max_size=3).map(
    lambda changes: make_row() | changes
)


@given(line=(changed_rows | json_values).map(json.dumps) | text.filter(str.strip) | st.binary(max_size=30).map(str))
def test_any_line_opens_or_is_refused_by_name(line: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.jsonl"
        path.write_bytes(b"\n" + " ".join(line.splitlines()).encode("utf-8", "surrogatepass"))
        try:
            sample = open_atlas(path)[0]
        except InputError as error:
            assert str(error).startswith(f"{path}:2") or "has no rows" in str(error)
        else:
            assert sample.where == f"{path}:2"


# --- scale ------------------------------------------------------------------------------------------------------------


def test_importing_hba_is_light() -> None:
    code = "import sys, hba; heavy = {'torch', 'av', 'numpy', 'soundfile', 'msgspec'} & set(sys.modules); print(heavy)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    assert hba.open_atlas is open_atlas


def test_media_does_not_load_torch() -> None:
    code = "import sys, hba.atlas; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_ten_thousand_rows_are_planned_without_opening_media(tmp_path: Path) -> None:
    rows = [make_row(), make_row(**TEXT), make_row(**QA)] * 3334
    opened = open_atlas(write_rows(tmp_path, rows), split="train")  # audios/a.wav does not exist
    plan = plan_batches(opened.columns.signature_codes, opened.estimated_tokens, batch_size=16, seed=0, epoch=0)
    assert sorted(np.concatenate(plan).tolist()) == list(range(len(rows)))
    with pytest.raises(MediaError):
        opened[0].load_audios()


def test_what_a_view_cannot_read_stands_in_the_quarantine_of_the_atlas_once(tmp_path: Path) -> None:
    (tmp_path / "gone.jsonl").write_text(
        json.dumps(
            {"problem": "How?", "answer": "sad", "dataset": "tess", "task": "emotion_cls",
             "modality_signature": "text_audio", "audios": ["gone.wav"]}
        ) + "\n"
    )  # fmt: skip
    atlas = open_atlas(tmp_path, split="gone")
    assert atlas.quarantine == []
    for _ in range(2):
        with pytest.raises(MediaError):
            atlas.filter(datasets=["tess"])[0].load_audios()
    assert [(q.id, q.field) for q in atlas.quarantine] == [("gone/1", "audios")]


def test_names_of_a_row_are_read_as_they_are_seen(tmp_path: Path) -> None:
    seen = make_row(id="a\u200b")
    unseen = make_row(
        id="a",
        dataset="\ufeffcremad",
        task="emotion\u200b_cls",
        modality_signature="\uff54ext_audio",
        class_label="\uff41nger\u200e",
        answer="",
    )
    atlas = open_atlas(write_rows(tmp_path, [seen, unseen]), "\u200btrain")
    assert atlas.columns.datasets == ("cremad",) and atlas.columns.signatures == ("text_audio",)
    assert [(s.id, s.dataset, s.task, s.label) for s in atlas] == [
        ("a\u200b", "cremad", "emotion_cls", "anger"), ("a", "cremad", "emotion_cls", "anger"),
    ]  # fmt: skip
    assert len(atlas.filter(datasets=["cremad\u200b"])) == 2
    plain = unseen | {"dataset": "cremad", "task": "emotion_cls"}
    assert atlas.fingerprint == open_atlas(write_rows(tmp_path / "plain", [seen, plain]), "train").fingerprint
