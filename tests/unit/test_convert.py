"""Conversion: rows, ids and bytes stay as they are, there and back; what is unreadable stays so, and is named."""

import hashlib
import json
import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from hba.atlas import open_atlas
from hba.atlas.convert import convert_atlas, convert_to_parquet
from hba.atlas.rows import MEDIA_FIELDS
from hba.atlas.source import read_bytes
from hba.cli import app
from hba.errors import HbaError, InputError, MediaError
from hba.storage import read_json

SPLITS = ("train", "validation", "test")
SMALL = 200_000  # bytes a shard: several shards a split


def files(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".jsonl" and path.name not in ("convert.json", "README.txt")
    }


def rows(folder, split):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def shards(mini_atlas, tmp_path_factory):
    """The mini-atlas as parquet, in the order in which two processes finish."""
    out = tmp_path_factory.mktemp("convert") / "parquet"
    convert_atlas(mini_atlas, out, to="parquet", shard_bytes=SMALL, workers=2)
    return out


def test_shards_hold_the_same_rows_and_media(mini_atlas, shards):
    assert len(list(shards.glob("train-*-of-*.parquet"))) > 2
    for split in SPLITS:
        one, other = open_atlas(mini_atlas, split), open_atlas(shards, split)
        assert one.fingerprint == other.fingerprint and [s.id for s in one] == [s.id for s in other]
        for a, b in zip(one, other, strict=True):
            assert a.extra == b.extra and a.target == b.target
            for name in MEDIA_FIELDS:
                assert getattr(a, name) == getattr(b, name)
                for i in range(getattr(a, name)):
                    ours, theirs = (s.source.medium(s.number, name, i, where="") for s in (a, b))
                    assert read_bytes(ours) == read_bytes(theirs)
    assert open_atlas(shards, "train").synthetic  # what the atlas says of itself comes along


def test_there_and_back_again(mini_atlas, shards, tmp_path):
    convert_atlas(shards, tmp_path / "back", to="jsonl", shard_bytes=SMALL, workers=2)
    assert files(tmp_path / "back") == files(mini_atlas)
    assert all(rows(tmp_path / "back", split) == rows(mini_atlas, split) for split in SPLITS)


def test_the_manifest_says_what_is_there(mini_atlas, shards):
    manifest = read_json(shards / "convert.json")
    for split in SPLITS:
        said = manifest["splits"][split]
        assert said["fingerprint"] == open_atlas(mini_atlas, split).fingerprint
        for part in said["parts"]:
            assert part["sha256"] == hashlib.sha256((shards / part["file"]).read_bytes()).hexdigest()
            assert part["rows"] == pq.read_metadata(shards / part["file"]).num_rows
    assert sum(p["media"] for s in SPLITS for p in manifest["splits"][s]["parts"]) > 500
    assert not list(shards.glob(".*"))  # nothing of the work is left


def test_converting_again_changes_nothing(mini_atlas, shards, tmp_path):
    times = {path: path.stat().st_mtime_ns for path in shards.rglob("*.parquet")}
    convert_atlas(mini_atlas, shards, to="parquet", shard_bytes=SMALL)
    assert times == {path: path.stat().st_mtime_ns for path in shards.rglob("*.parquet")}
    convert_atlas(shards, tmp_path / "again", to="parquet", shard_bytes=1 << 30)  # cut anew
    assert len(list((tmp_path / "again").glob("*.parquet"))) == 3
    assert open_atlas(tmp_path / "again", "test").fingerprint == open_atlas(shards, "test").fingerprint


def test_a_view_and_one_split(mini_atlas, tmp_path):
    view = open_atlas(mini_atlas, "train").filter(datasets=["tess"])[::2]
    convert_to_parquet(view, tmp_path / "view")
    assert [s.id for s in open_atlas(tmp_path / "view", "train")] == [s.id for s in view]
    convert_atlas(mini_atlas, tmp_path / "test", to="parquet", splits=["test"])
    assert [p.name for p in (tmp_path / "test").glob("*.parquet")] == ["test-00000-of-00001.parquet"]


@pytest.mark.parametrize("compression", ["snappy", "none"])
def test_shards_of_another_writer_get_files_and_names(mini_atlas, tmp_path, compression):
    """The published shards know no paths, have no index, and are compressed."""
    table = pa.concat_tables(
        pq.read_table(shard) for shard in convert_to_parquet(open_atlas(mini_atlas, "test"), tmp_path / "ours")
    )
    published = [name for name in table.schema.names if name not in ("id", "media_paths", "extra_json")]
    (tmp_path / "in").mkdir()
    pq.write_table(
        table.select(published), tmp_path / "in/test-00000-of-00001.parquet", compression=compression, row_group_size=7
    )
    convert_atlas(tmp_path / "in", tmp_path / "out", to="jsonl")
    one, other = open_atlas(mini_atlas, "test"), open_atlas(tmp_path / "out", "test")
    assert [s.id for s in other] == [f"test/{k + 1}" for k in range(len(one))]
    for number, (a, b) in enumerate(zip(one, other, strict=True)):
        assert (a.problem, a.answer, a.label) == (b.problem, b.answer, b.label)
        for name in MEDIA_FIELDS:
            for i in range(getattr(a, name)):
                ours, theirs = (s.source.medium(s.number, name, i, where="") for s in (a, b))
                assert ours.read_bytes() == theirs.read_bytes()
                ending = {"videos": ".mp4", "audios": ".wav"}.get(name, ".pt")
                assert theirs.relative_to(other.root).as_posix() == f"{name}/test-{number:06d}-{i}{ending}"


# --- a small atlas made by hand --------------------------------------------------------------------------------------


def write(folder, *changes):
    good = {"problem": "How?", "answer": "anger", "dataset": "cremad", "task": "emotion_cls", "audios": ["a.wav"]}
    folder.mkdir(exist_ok=True)
    lines = [json.dumps(good | {"modality_signature": "text_audio"} | change) for change in changes]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "a.wav").write_bytes(b"RIFFaaaa")
    return folder


def both_ways(source, tmp_path):
    """Convert to shards and back; what each conversion says."""
    there = convert_atlas(source, tmp_path / "parquet", to="parquet")
    back = convert_atlas(tmp_path / "parquet", tmp_path / "jsonl", to="jsonl")
    return there[0], back[0]


def test_every_field_survives(tmp_path):
    odd = {"id": "ü", "class_label": "anger", "texts": ["t.txt"], "note": {"a": [1, None, "x"]}, "empty": None}
    source = write(tmp_path / "in", odd, {}, {"class_label": ""})
    both_ways(source, tmp_path)
    found = rows(tmp_path / "jsonl", "train")
    full = {name: [] for name in (*MEDIA_FIELDS, "texts")}
    assert found == [full | row for row in rows(source, "train")]
    assert open_atlas(tmp_path / "parquet", "train")[0].extra == {"note": odd["note"], "empty": None}


def test_ids_of_a_file_with_empty_lines_stay(tmp_path):
    source = write(tmp_path / "in", {}, {}, {})
    (source / "train.jsonl").write_text("\n" + (source / "train.jsonl").read_text().replace("\n", "\n\n"))
    ids = [s.id for s in open_atlas(source, "train")]
    assert ids == ["train/2", "train/4", "train/6"]
    both_ways(source, tmp_path)
    assert [s.id for s in open_atlas(tmp_path / "parquet", "train")] == ids
    assert [s.id for s in open_atlas(tmp_path / "jsonl", "train")] == ids


def test_what_cannot_be_read_stays_so_and_is_named(tmp_path):
    changes = [{}, {"audios": ["a.wav", "gone.wav"]}, {"audios": ["empty.wav"]}, {"audios": ["folder"]}]
    source = write(tmp_path / "in", *changes)
    (source / "empty.wav").touch()
    (source / "folder").mkdir()
    there, back = both_ways(source, tmp_path)
    assert [record["id"] for record in there.unreadable] == ["train/2", "train/4"]
    assert there.unreadable[0]["field"] == "audios" and there.unreadable[0]["reason"] == "no such file: gone.wav"
    assert [record["id"] for record in back.unreadable] == ["train/2", "train/4"]
    for form, reason in (("parquet", "is null"), ("jsonl", "no such file: gone.wav")):
        atlas = open_atlas(tmp_path / form, "train")
        assert atlas[1].audios == 2
        with pytest.raises(MediaError, match=reason):
            atlas[1].source.medium(1, "audios", 1, where="w")
        with pytest.raises(MediaError, match="is empty"):
            atlas[2].load_audios()


def test_the_command_says_what_was_left_unreadable(tmp_path):
    source = write(tmp_path / "in", {}, {"audios": ["gone.wav"]})
    command = ["atlas", "convert", str(source), str(tmp_path / "out"), "--to", "parquet", "--workers", "1", "--json"]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 2 and "quarantined train/2" in refused.stderr
    allowed = CliRunner().invoke(app, [*command, "--allow-quarantined", "1"])
    assert allowed.exit_code == 0
    assert json.loads(allowed.stdout)["rows"] == {"train": 2} and json.loads(allowed.stdout)["quarantined"] == 1


def test_rows_that_share_a_file_share_it_again(tmp_path):
    source = write(tmp_path / "in", {}, {}, {"audios": ["a.wav", "a.wav"]})
    both_ways(source, tmp_path)
    assert files(tmp_path / "jsonl") == files(source)


def shard_of(folder, *paths_and_bytes):
    """A shard whose media are said to have been called as given."""
    folder.mkdir()
    records = [
        {"problem": "How?", "answer": "anger", "dataset": "cremad", "task": "emotion_cls", "audios": [data]}
        | {"modality_signature": "text_audio", "media_paths": {"audios": [path]}}
        for path, data in paths_and_bytes
    ]
    schema = pa.Table.from_pylist(records).schema
    pq.write_table(pa.Table.from_pylist(records, schema), folder / "train.parquet")
    return folder


HOSTILE = ["../a.wav", "/tmp/a.wav", "x/../../a.wav", "C:\\a.wav", ""]


@pytest.mark.parametrize("path", HOSTILE)
def test_no_file_is_written_outside(tmp_path, path):
    with pytest.raises(InputError, match="leaves the atlas folder"):
        convert_atlas(shard_of(tmp_path / "in", (path, b"x")), tmp_path / "out", to="jsonl")
    assert not (tmp_path / "a.wav").exists() and not os.path.lexists("/tmp/a.wav")


@pytest.mark.parametrize("path", ["train.jsonl", "atlas.json", "convert.json", "taxonomy.yaml", ".convert/x"])
def test_a_medium_cannot_take_the_place_of_rows(tmp_path, path):
    with pytest.raises(InputError, match=f"path '{path}' is reserved"):
        convert_atlas(shard_of(tmp_path / "in", (path, b"x")), tmp_path / "out", to="jsonl")


def test_a_link_in_the_folder_is_not_followed(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out/m").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="leads out of"):
        convert_atlas(shard_of(tmp_path / "in", ("m/a.wav", b"x")), tmp_path / "out", to="jsonl")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_two_contents_under_one_name(tmp_path):
    source = shard_of(tmp_path / "in", ("a.wav", b"one"), ("a.wav", b"two"))
    with pytest.raises(HbaError, match=r"train.parquet:2, audios: a.wav is there with another content"):
        convert_atlas(source, tmp_path / "out", to="jsonl")
    assert not (tmp_path / "out/train.jsonl").exists()


def test_folders_that_cannot_be_used(mini_atlas, shards, tmp_path):
    with pytest.raises(InputError, match="is the source itself"):
        convert_atlas(mini_atlas, mini_atlas, to="jsonl")
    with pytest.raises(InputError, match="holds other shards"):
        convert_atlas(mini_atlas, shards, to="parquet", shard_bytes=1 << 30)
    assert not list(shards.glob(".*"))
    with pytest.raises(InputError, match="has no split 'nosuch'"):
        convert_atlas(shards, tmp_path / "out", to="jsonl", splits=["nosuch"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["problem", "videos", "audios", "ext_audio_feats"])
def test_bytes_of_a_shard_that_have_changed_are_noticed(shards, tmp_path, place):
    shutil.copytree(shards, tmp_path / "in")
    victim = sorted((tmp_path / "in").glob("train-*.parquet"))[0]
    data = bytearray(victim.read_bytes())
    group = pq.ParquetFile(victim).metadata.row_group(0)
    columns = [group.column(k) for k in range(group.num_columns)]
    column = next(c for c in columns if c.path_in_schema.split(".")[0] == place)
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    victim.write_bytes(data)
    with pytest.raises(InputError, match="train-00000"):
        convert_atlas(tmp_path / "in", tmp_path / "out", to="jsonl", splits=["train"])
    assert not (tmp_path / "out/train.jsonl").exists()
