"""Parquet shards with embedded media serve the samples of the JSONL form, and bad shards are refused by name."""

from __future__ import annotations

import gc
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

from hba.atlas import Atlas, open_atlas, parquet
from hba.atlas.convert import convert_atlas, convert_to_parquet
from hba.atlas.info import atlas_info
from hba.atlas.media import Limits, load_audio
from hba.atlas.parquet import index_path, write_index
from hba.atlas.source import CHECKED_BYTES, Slice, checksums_of, read_bytes
from hba.atlas.source import opened as opened_medium
from hba.atlas.validate import validate_atlas
from hba.errors import InputError, MediaError
from hba.evaluate.predict import sample_groups


def _write_media(folder: Path, number: int) -> None:
    rng = np.random.default_rng(number)
    soundfile.write(folder / f"{number}.wav", rng.normal(0, 0.1, 16_000), 16_000)
    torch.save({"pose": torch.rand(5, 3)}, folder / f"{number}.pt")
    with av.open(str(folder / f"{number}.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=10)
        stream.width = stream.height = 64
        for _ in range(12):
            pixels = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jsonl")
    lines = []
    for number in range(6):
        _write_media(folder, number)
        row: dict[str, Any] = {"problem": f"Question {number}?", "answer": "anger", "dataset": "cremad"}
        row |= {"task": "emotion_cls", "class_label": "anger", "modality_signature": "text_audio"}
        row["audios"] = [f"{number}.wav"]
        if number % 3 == 1:
            row |= {"videos": [f"{number}.mp4"], "modality_signature": "text_video_audio", "speaker": {"age": number}}
            row["ext_video_feats"] = [f"{number}.pt"]
        if number % 3 == 2:
            row |= {
                "audios": [],
                "modality_signature": "text",
                "dataset": "siq2",
                "task": "x_qa",
                "answer": f"A{number}",
            }
            row["class_label"] = ""
        if number == 4:
            row |= {"id": "named", "audios": ["0.wav", "1.wav"]}
        lines.append(json.dumps(row))
    (folder / "train.jsonl").write_text("\n".join([*lines[:2], "", *lines[2:]]) + "\n")  # ids are line numbers
    return folder


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("parquet")
    shards = convert_to_parquet(open_atlas(source, "train"), out, shard_bytes=80_000)
    assert len(shards) > 1
    return out


def without_index(source: Path, out: Path, **options: Any) -> Path:
    """One shard as another tool writes it."""
    opened = open_atlas(source, "train")
    records = []
    for number, sample in enumerate(opened):
        record = {name: getattr(opened.row(number), name) for name in ("problem", "answer", "dataset", "task")}
        record |= {"class_label": opened.row(number).class_label, "id": sample.id}
        record["modality_signature"] = sample.modality_signature
        for name in ("images", "videos", "audios", "ext_video_feats", "ext_audio_feats"):
            paths = [sample.source.medium(sample.number, name, i, where="") for i in range(getattr(sample, name))]
            record[name] = [read_bytes(path) for path in paths]
        records.append(record)
    media = [
        pa.field(n, pa.list_(pa.binary())) for n in ("images", "videos", "audios", "ext_video_feats", "ext_audio_feats")
    ]
    text = [pa.field(n, pa.string()) for n in records[0] if n not in {field.name for field in media}]
    path = out / "train.parquet"
    pq.write_table(pa.Table.from_pylist(records, pa.schema(text + media)), path, **options)
    return path


def assert_same(one: Atlas, other: Atlas, *, extra: bool = True) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        for name in ("id", "problem", "answer", "dataset", "task", "label", "modality_signature", "texts"):
            assert getattr(a, name) == getattr(b, name), name
        for name in ("images", "videos", "audios", "ext_video_feats", "ext_audio_feats"):
            assert getattr(a, name) == getattr(b, name), name
        assert not extra or a.extra == b.extra
        for x, y in zip(a.load_audios(), b.load_audios(), strict=True):
            np.testing.assert_array_equal(x.samples, y.samples)
        for x, y in zip(a.load_videos(4), b.load_videos(4), strict=True):
            np.testing.assert_array_equal(x.frames, y.frames)
        for x, y in zip(a.load_descriptors("ext_video_feats"), b.load_descriptors("ext_video_feats"), strict=True):
            assert torch.equal(x["pose"], y["pose"])
    for name in ("dataset_codes", "signature_codes", "task_codes", "label_codes", "problem_chars", "num_videos"):
        np.testing.assert_array_equal(getattr(one.columns, name), getattr(other.columns, name))


def test_converted_atlas_is_the_same(source: Path, converted: Path) -> None:
    one, other = open_atlas(source, "train"), open_atlas(converted, "train")
    assert [s.id for s in other] == ["train/1", "train/2", "train/4", "train/5", "named", "train/7"]
    assert_same(one, other)
    np.testing.assert_array_equal(one.audio_bytes, other.audio_bytes)
    np.testing.assert_array_equal(one.columns.num_audios, other.columns.num_audios)
    assert other[1].extra == {"speaker": {"age": 1}}


def test_fingerprint_is_that_of_the_rows_in_any_form(source: Path, converted: Path, tmp_path: Path) -> None:
    expected = open_atlas(source, "train").fingerprint
    assert open_atlas(converted, "train").fingerprint == expected
    assert open_atlas(converted, "train[1:]").fingerprint == open_atlas(source, "train[1:]").fingerprint != expected
    paths = [open_atlas(converted, "train").row(number).audios for number in (0, 4)]
    assert paths == [("0.wav",), ("0.wav", "1.wav")]
    rows = [json.loads(line) for line in (source / "train.jsonl").read_text().split("\n") if line]
    rows[1]["speaker"]["age"] += 1
    for order, (name, rewritten) in enumerate((("same", rows[:1]), ("other", rows[:2]))):
        # Other spelling of the same JSON, keys in another order.
        lines = [json.dumps(dict(reversed(row.items())), indent=None, separators=(" ,", " : ")) for row in rewritten]
        folder = tmp_path / name
        folder.mkdir()
        (folder / "train.jsonl").write_text("\n".join(lines))
        same = open_atlas(folder, "train").fingerprint == open_atlas(source, f"train[:{len(lines)}]").fingerprint
        assert same == (order == 0)


def test_an_index_does_not_change_the_fingerprint(source: Path, tmp_path: Path) -> None:
    shard = without_index(source, tmp_path)
    before = open_atlas(shard).fingerprint
    write_index(shard)
    assert open_atlas(shard).fingerprint == before


@pytest.mark.parametrize("at", [0.1, 0.5, 0.999])
def test_a_flipped_bit_in_the_index_is_refused(source: Path, tmp_path: Path, at: float) -> None:
    index = index_path(convert_to_parquet(open_atlas(source, "train"), tmp_path)[0])
    data = bytearray(index.read_bytes())
    data[int(at * len(data))] ^= 4
    index.write_bytes(data)
    with pytest.raises(InputError, match=r"\.arrow: is damaged"):
        open_atlas(tmp_path, "train")


MEDIA = {"audios": lambda s: s.load_audios(), "videos": lambda s: s.load_videos(4)}
MEDIA["ext_video_feats"] = lambda s: s.load_descriptors("ext_video_feats")


@pytest.mark.parametrize("name", MEDIA)
@pytest.mark.parametrize("at", [0.0, 0.5, 0.9])
def test_a_flipped_bit_in_a_medium_is_noticed(source: Path, tmp_path: Path, name: Any, at: float) -> None:
    shard = convert_to_parquet(open_atlas(source, "train"), tmp_path)[0]
    opened = open_atlas(tmp_path, "train")
    part = opened[1].source.medium(opened[1].number, name, 0, where="")
    with shard.open("r+b") as file:
        file.seek(part.offset + int(at * part.size))
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 16]))
    MEDIA[name](opened[2]), MEDIA[name](opened[4])  # the others are as they were
    with pytest.raises(MediaError, match=f"train-00000-of-00001.parquet:2, {name}: differs from its checksum"):
        MEDIA[name](opened[1])
    assert [(q.id, q.field) for q in opened.quarantine] == [("train/2", name)]
    with pytest.raises(MediaError, match=r"a place: differs from its checksum after byte \d"):
        read_bytes(part, where="a place")


def test_only_what_is_read_is_checked(tmp_path: Path) -> None:
    medium = bytearray(np.random.default_rng(0).bytes(5 * CHECKED_BYTES // 2))
    checksums = checksums_of(bytes(medium))
    (tmp_path / "shard").write_bytes(b"before" + medium + b"after")
    part = Slice(tmp_path / "shard", 6, len(medium), checksums)
    rng = np.random.default_rng(1)
    with opened_medium(part, where="w") as file:
        for at in (0, CHECKED_BYTES - 3, 2 * CHECKED_BYTES, *rng.integers(0, len(medium), 20).tolist()):
            file.seek(at)
            length = int(rng.integers(1, len(medium)))
            assert file.read(length) == medium[at : at + length]
    medium[CHECKED_BYTES + 7] ^= 1
    (tmp_path / "shard").write_bytes(b"before" + medium + b"after")
    with opened_medium(part, where="w") as file:
        file.seek(2 * CHECKED_BYTES)
        assert file.read() == medium[2 * CHECKED_BYTES :]
    message = f"differs from its checksum after byte {CHECKED_BYTES:,}"
    with pytest.raises(MediaError, match=message), opened_medium(part, where="w") as file:
        assert len(file.read()) == CHECKED_BYTES
        raise ValueError("what a decoder makes of it")


def test_an_index_of_another_format_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_VERSION", 2)
    convert_to_parquet(open_atlas(source, "train"), tmp_path / "old")
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"is of format 2, this hba reads format 3. Fix: Delete .*index, then convert"):
        open_atlas(tmp_path / "old", "train")
    shutil.rmtree(tmp_path / "old/index")
    convert_to_parquet(open_atlas(tmp_path / "old", "train"), tmp_path / "new")
    assert_same(open_atlas(source, "train"), open_atlas(tmp_path / "new", "train"))


def test_flipped_bits_in_a_shard_without_index_are_noticed(source: Path, tmp_path: Path) -> None:
    shard = convert_to_parquet(open_atlas(source, "train"), tmp_path)[0]
    good = shard.read_bytes()
    index_path(shard).unlink()
    sound = good.index((source / "3.wav").read_bytes()) + 5000
    data = bytearray(good)
    data[sound] ^= 1  # a sample of the sound a little louder, which no decoder notices
    shard.write_bytes(data)
    with pytest.raises(MediaError, match=r"audios: cannot be read"):
        open_atlas(shard)[3].load_audios()
    noticed = 0
    for at in range(4, len(good) - 4000, len(good) // 40):
        data = bytearray(good)
        data[at] ^= 16
        shard.write_bytes(data)
        try:
            for a, b in zip(open_atlas(source, "train"), open_atlas(shard), strict=True):
                assert [x.samples.tobytes() for x in a.load_audios()] == [x.samples.tobytes() for x in b.load_audios()]
                assert (a.problem, a.answer, a.id) == (b.problem, b.answer, b.id)
        except (MediaError, InputError):
            noticed += 1
    assert noticed


@pytest.mark.parametrize("options", [{}, {"compression": "none"}, {"compression": "zstd", "row_group_size": 2}])
def test_shards_of_other_writers(source: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    shard = without_index(source, tmp_path, **options)
    one = open_atlas(source, "train")
    assert_same(one, open_atlas(tmp_path, "train"), extra=False)
    write_index(shard)
    assert_same(one, open_atlas(shard), extra=False)


def test_media_of_an_indexed_shard_are_slices(converted: Path) -> None:
    opened = open_atlas(converted, "train")
    sample = opened[1]
    medium = sample.source.medium(sample.number, "videos", 0, where="")
    assert isinstance(medium, Slice)
    assert read_bytes(medium)[4:8] == b"ftyp"


def test_any_parquet_reader_opens_the_shards(converted: Path, source: Path) -> None:
    table = pa.concat_tables([pq.read_table(shard) for shard in sorted(converted.glob("train-*.parquet"))])
    assert table["audios"].to_pylist()[0] == [(source / "0.wav").read_bytes()]


def test_pickled_and_filtered(converted: Path) -> None:
    opened = pickle.loads(pickle.dumps(open_atlas(converted, "train[1:]"))).filter(tasks=["EMO"])
    assert [s.id for s in opened] == ["train/2", "train/5", "named"]
    assert opened[0].load_audios()
    assert opened.fingerprint == open_atlas(converted, "train[1:]").filter(tasks=["EMO"]).fingerprint


def test_conversion_resumes_and_repeats_identically(source: Path, converted: Path, tmp_path: Path) -> None:
    atlas = open_atlas(source, "train")
    shards = convert_to_parquet(atlas, tmp_path, shard_bytes=80_000)
    assert [s.read_bytes() for s in shards] == [(converted / s.name).read_bytes() for s in shards]
    kept = shards[0].stat().st_mtime_ns
    index_path(shards[1]).unlink()  # as if killed before the second shard was done
    shards[1].write_bytes(b"half")
    assert convert_to_parquet(atlas, tmp_path, shard_bytes=80_000) == shards
    assert shards[0].stat().st_mtime_ns == kept
    assert_same(atlas, open_atlas(tmp_path, "train"))
    with pytest.raises(InputError, match="holds other shards"):
        convert_to_parquet(atlas, tmp_path, shard_bytes=1 << 30)


def test_conversion_in_processes(source: Path, tmp_path: Path) -> None:
    atlas = open_atlas(source, "train")
    convert_to_parquet(atlas, tmp_path, shard_bytes=80_000, workers=2)
    assert_same(atlas, open_atlas(tmp_path, "train"))


# --- bad shards -------------------------------------------------------------------------------------------------------


def text_shard(folder: Path, **columns: Any) -> Path:
    """A shard of three text rows with some columns replaced, or left out where None."""
    good: dict[str, Any] = {
        "problem": ["Is it a joke?"] * 3,
        "answer": ["yes", "no", "yes"],
        "dataset": ["urfunny"] * 3,
        "task": ["humour_cls"] * 3,
        "modality_signature": ["text"] * 3,
    }
    table = {name: values for name, values in (good | columns).items() if values is not None}
    pq.write_table(pa.table(table), folder / "test.parquet")
    return folder / "test.parquet"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"modality_signature": None}, "test.parquet: column 'modality_signature': is missing"),
        ({"answer": [1, 2, 3]}, "test.parquet: column 'answer': expected string, found int64"),
        ({"audios": [["a.wav"]] * 3}, "column 'audios': expected list of binary"),
        ({"answer": ["yes", "no", "perhaps"]}, "test.parquet:3: field 'answer': unknown label 'perhaps'"),
        ({"problem": ["a", None, "c"]}, "test.parquet:2: field 'problem': is missing"),
        ({"dataset": ["urfunny", "ur", "urfunny"]}, "test.parquet:2: field 'dataset': unknown dataset 'ur'"),
        ({"modality_signature": ["text", "text", "smell"]}, "test.parquet:3: field 'modality_signature': unknown"),
        ({"id": ["a", "b", "a"]}, "test.parquet:3: field 'id': 'a' is also the id of"),
        (
            {name: [] for name in ("problem", "answer", "dataset", "task", "modality_signature")},
            "has no rows|found null",
        ),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_atlas(text_shard(tmp_path, **columns))


def test_good_text_shard_opens(tmp_path: Path) -> None:
    assert [s.label for s in open_atlas(text_shard(tmp_path))] == ["humour", "not humour", "humour"]


def test_cut_stale_and_missing_shards(converted: Path, tmp_path: Path) -> None:
    shutil.copytree(converted, tmp_path, dirs_exist_ok=True)
    first, last = sorted(tmp_path.glob("*.parquet"))[0], sorted(tmp_path.glob("*.parquet"))[-1]
    data = first.read_bytes()
    first.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="was not made from"):
        open_atlas(tmp_path, "train")
    index_path(first).unlink()
    with pytest.raises(InputError, match="not a whole parquet file"):
        open_atlas(tmp_path, "train")
    first.write_bytes(data)
    last.unlink()
    with pytest.raises(InputError, match="missing"):
        open_atlas(tmp_path, "train")


def test_shard_that_shrinks_after_opening(source: Path, tmp_path: Path) -> None:
    shard = convert_to_parquet(open_atlas(source, "train"), tmp_path)[0]
    opened = open_atlas(tmp_path, "train")
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(MediaError, match="lies beyond the end"):
        opened[1].load_videos(4)


def test_slices_respect_their_ends(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(1000, np.float32), 16_000)
    sound = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "shard").write_bytes(b"x" * 100 + sound + b"y" * 100)
    inner = Slice(tmp_path / "shard", 100, len(sound))
    assert len(load_audio(inner, where="w").samples) == 1000
    with pytest.raises(MediaError, match="cut off"):
        load_audio(inner._replace(size=len(sound) - 10), where="w")
    with pytest.raises(MediaError, match="more than the limit"):
        load_audio(inner, where="w", limits=Limits(max_bytes=100))
    with pytest.raises(MediaError, match="is empty"):
        load_audio(inner._replace(size=0), where="w")


@pytest.mark.parametrize("name", ["problem", "answer", "note"])
def test_text_that_is_not_utf_8_is_refused_at_the_start(tmp_path: Path, name: str) -> None:
    text = {"problem": "How?", "answer": "anger", "dataset": "cremad", "task": "emotion_cls"}
    columns: dict[str, Any] = {key: [value] * 2 for key, value in (text | {"modality_signature": "text"}).items()}
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    assert len(open_atlas(tmp_path, "train")) == 2
    columns[name] = pa.array([b"anger", b"\xff\xfe"], pa.binary()).view(pa.string())
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    with pytest.raises(InputError, match=f"train.parquet: column {name!r}: is damaged .*UTF8"):
        open_atlas(tmp_path, "train")


def test_names_of_a_shard_are_read_as_they_are_seen(tmp_path: Path) -> None:
    names = {"dataset": ["urfunny", "urfunny\u200b", "\ufeffurfunny"]}
    names["modality_signature"] = ["text", "text\u2060", "\uff54ext"]
    answers = {"answer": ["yes", "\uff39es", "no\u200b"]}
    atlas = open_atlas(text_shard(tmp_path, **names, **answers))
    assert atlas.columns.datasets == ("urfunny",) and atlas.columns.signatures == ("text",)
    assert [s.label for s in atlas] == ["humour", "humour", "not humour"]
    (tmp_path / "plain").mkdir()
    assert atlas.fingerprint == open_atlas(text_shard(tmp_path / "plain", **answers)).fingerprint


# --- shards of other programs ----------------------------------------------------------------------------------------


def column_of(kind: str, media: list[list[bytes]]) -> pa.Array:
    """Media as other programs write them: `datasets` as structs, one a row or in lists."""
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    if kind == "struct":
        return pa.array([{"bytes": row[0], "path": "a.wav"} if row else None for row in media], struct)
    if kind == "list of structs":
        return pa.array([[{"bytes": m, "path": "a.wav"} for m in row] for row in media], pa.list_(struct))
    if kind == "bytes":
        return pa.array([row[0] if row else None for row in media], pa.binary())
    return pa.array(media, pa.list_(pa.binary_view() if kind == "list of views" else pa.binary()))


FOREIGN = ("struct", "list of structs", "bytes", "list of views", "list")


def foreign_shard(source: Path, folder: Path, kind: str, **options: Any) -> Path:
    """The rows of `source` with one sound or none, as another program writes them."""
    rows = [json.loads(line) for line in (source / "train.jsonl").read_text().split("\n") if line]
    rows = [row for row in rows if len(row.get("audios", ())) < 2]
    names = ("problem", "answer", "dataset", "task", "modality_signature")
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in names}
    if kind == "list of views":
        columns = {name: pa.array(values, pa.string_view()) for name, values in columns.items()}
    for name in ("audios", "videos"):
        media = [[(source / path).read_bytes() for path in row.get(name, ())] for row in rows]
        columns[name] = column_of(kind, media)
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / "train-00000-of-00001.parquet", row_group_size=2, **options)
    return folder / "train-00000-of-00001.parquet"


@pytest.mark.parametrize("options", [{}, {"compression": "none", "use_dictionary": False, "write_page_index": True}])
@pytest.mark.parametrize("kind", FOREIGN)
def test_shards_of_datasets_are_read_everywhere_alike(
    source: Path, tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    atlas = open_atlas(foreign_shard(source, tmp_path / "in", kind, **options).parent, "train")
    local = [sample for sample in open_atlas(source, "train") if sample.audios < 2]
    assert len(atlas) == len(local) > 3
    for a, b in zip(atlas, local, strict=True):
        assert (a.audios, a.videos, a.problem, a.label) == (b.audios, b.videos, b.problem, b.label)
        for x, y in zip(a.load_audios(), b.load_audios(), strict=True):
            np.testing.assert_array_equal(x.samples, y.samples)
        assert [v.frames.tobytes() for v in a.load_videos(4)] == [v.frames.tobytes() for v in b.load_videos(4)]
    checked = validate_atlas(tmp_path / "in")
    assert [finding.message for finding in checked.findings if finding.level == "error"] == []
    assert {name: media.num_refused for name, media in checked.media.items()} == {"audios": 0, "videos": 0}
    assert checked.media["audios"].num_files == sum(sample.audios for sample in local)
    durations = atlas_info(tmp_path / "in", durations=True).durations
    assert durations is not None and durations.unknown == 0
    convert_atlas(tmp_path / "in", tmp_path / "out", to="jsonl")
    for a, b in zip(open_atlas(tmp_path / "out", "train"), local, strict=True):
        assert [x.samples.tobytes() for x in a.load_audios()] == [x.samples.tobytes() for x in b.load_audios()]


@pytest.mark.parametrize("kind", ["struct", "list"])
def test_a_row_without_the_medium_that_its_signature_promises_is_refused(
    source: Path, tmp_path: Path, kind: str
) -> None:
    shard = foreign_shard(source, tmp_path, kind)
    table = pq.read_table(shard)
    rows = table.num_rows
    media = table["audios"].to_pylist()
    broken = [k for k in range(rows) if media[k]][:1] + [k for k in range(rows) if not media[k]][:1]
    media[broken[0]], media[broken[1]] = (None if kind == "struct" else []), media[broken[0]]
    place = table.schema.get_field_index("audios")
    pq.write_table(table.set_column(place, "audios", pa.array(media, table.schema.field(place).type)), shard)
    atlas = open_atlas(tmp_path, "train")  # which reads no medium
    for row in range(rows):
        if row in broken:
            message = rf"parquet:{row + 1}, audios: the row has {int(row == broken[1])} of them, but its modality"
            with pytest.raises(MediaError, match=message):
                atlas[row].load_audios()
        else:
            atlas[row].load_audios()
    assert [(q.id, q.field) for q in atlas.quarantine] == [(f"train/{row + 1}", "audios") for row in sorted(broken)]
    found = [f.where for f in validate_atlas(tmp_path).findings if f.code == "row-signature"]
    assert found == [f"{shard.name}:{row + 1}" for row in sorted(broken)]


@pytest.mark.parametrize("columns", [{"audios": [3, 4, 5]}, {"audios": [{"path": "a.wav"}] * 3}, {"answer": [1, 2, 3]}])
def test_what_opening_refuses_is_a_finding(tmp_path: Path, columns: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"column '.*': expected") as caught:
        open_atlas(text_shard(tmp_path, **columns))
    messages = [f.message for f in validate_atlas(tmp_path).findings if f.level == "error"]
    assert messages[0] == caught.value.what


def test_ids_and_what_rows_say_cost_no_medium(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    said = {"problem": "How?", "answer": "anger", "dataset": "cremad", "task": "emotion_cls", "speaker": "s1"}
    columns: dict[str, Any] = {name: [value] * 40 for name, value in said.items()}
    columns |= {"modality_signature": ["text_audio"] * 40, "audios": [[rng.bytes(500_000)] for _ in range(40)]}
    shard = tmp_path / "test.parquet"
    pq.write_table(pa.table(columns), shard, row_group_size=10)
    read = 0
    pread = os.pread

    def counted(descriptor: int, size: int, start: int) -> bytes:
        nonlocal read
        data = pread(descriptor, size, start)
        read += len(data)
        return data

    monkeypatch.setattr("hba.atlas.parquet.os.pread", counted)
    atlas = open_atlas(tmp_path, "test")
    assert atlas.ids[:2] == ["test/1", "test/2"] and len(atlas.ids) == 40
    assert [(key, row.problem, extra["speaker"]) for key, row, extra in atlas[3:5].said()] == [
        ("test/4", "How?", "s1"), ("test/5", "How?", "s1"),
    ]  # fmt: skip
    assert len(atlas.fingerprint) == 64 and atlas.estimated_tokens.sum() > 0
    assert sample_groups(atlas) == dict.fromkeys(atlas.ids, "speaker: s1")
    assert sum(sample.audios for sample in atlas) == 40  # the footer says that each row has one
    assert read < 300_000 < shard.stat().st_size / 50  # its end, by which a shard is known, and its footer
    assert atlas[7].source.medium(7, "audios", 0, where="w") == columns["audios"][7][0]


def test_of_many_shards_without_an_index_few_are_open_and_each_gives_its_own_media(tmp_path: Path) -> None:
    """Pages are kept when their shard is closed: the next must not be served them in the place of its own."""
    row = {"problem": "Q?", "answer": "anger", "dataset": "cremad", "task": "emotion_cls", "class_label": "anger"}
    media = [b"medium %03d" % number * 20 for number in range(3 * parquet._OPEN_SHARDS)]
    for number, medium in enumerate(media):
        columns = {name: [value] for name, value in (row | {"modality_signature": "text_audio"}).items()}
        table = pa.table(columns | {"audios": pa.array([[medium]], pa.list_(pa.binary()))})
        pq.write_table(table, tmp_path / f"train-{number:05}-of-{len(media):05}.parquet")
    store: Any = open_atlas(tmp_path, "train")[0].source
    gc.collect()
    gc.disable()  # nothing is closed but by those who have opened it
    try:
        before = sum(1 for _ in Path("/proc/self/fd").iterdir())
        for number in np.random.default_rng(0).integers(0, len(media), 300):
            found = store.medium(int(number), "audios", 0, where="here")
            assert (found if isinstance(found, bytes) else read_bytes(found)) == media[number]
            now = sum(1 for _ in Path("/proc/self/fd").iterdir())
            assert now - before <= 2 * parquet._OPEN_SHARDS + 2
    finally:
        gc.enable()
