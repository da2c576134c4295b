"""Bad input is refused with one message that names file, row and field; nothing of it is served or executed."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import torch

from hba.atlas import open_atlas
from hba.atlas.convert import convert_to_parquet
from hba.atlas.info import atlas_info
from hba.atlas.validate import validate_atlas
from hba.batch.config import EncodeConfig, load_media
from hba.errors import InputError, MediaError


def row(**changes: Any) -> dict[str, Any]:
    good = {
        "problem": "How does the speaker feel?",
        "answer": "anger",
        "dataset": "cremad",
        "task": "emotion_cls",
        "modality_signature": "text_audio",
        "audios": ["a.wav"],
    }
    return {key: value for key, value in (good | changes).items() if value is not ...}


def write(folder: Path, *lines: dict[str, Any] | str) -> Path:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "train.jsonl").write_text(text + "\n")
    return folder


BAD_ROWS = {
    "cut line": (json.dumps(row())[:60], "not valid JSON"),
    "not an object": ("[1, 2]", "expected a JSON object, found array"),
    "wrong type": (row(answer=3), r"field 'answer': expected str, found int"),
    "wrong type in a list": (
        row(audios=["a.wav", 5]),
        r"field 'audios\[...\]'|field 'audios\[1\]': expected str, found int",
    ),
    "path instead of list": (row(audios="a.wav"), "field 'audios': expected array, found str"),
    "null": (row(problem=None), "field 'problem': expected str, found null"),
    "no signature": (row(modality_signature=...), "field 'modality_signature': is missing"),
    "no problem": (row(problem=...), "field 'problem': is missing"),
    "unknown signature": (row(modality_signature="text_smell"), "field 'modality_signature': unknown 'text_smell'"),
    "signature against media": (row(modality_signature="text_video"), "the row's media are 'text_audio'"),
    "unknown dataset": (row(dataset="cremadd"), "field 'dataset'.*Did you mean 'cremad'"),
    "unknown label": (row(answer="furious"), "field 'answer': unknown label 'furious'"),
    "unknown class label": (row(class_label="furious"), "field 'class_label': unknown label"),
    "labels that disagree": (row(class_label="fear"), "contradicts the answer 'anger'"),
    "empty id": (row(id=" "), "field 'id': is empty"),
    "not a number": (json.dumps(row(other=float("nan"))), "not valid JSON"),
    "absolute path": (row(audios=["/etc/passwd"]), "audios: path '/etc/passwd' leaves"),
    "parent path": (row(audios=["x/../../y.wav"]), "audios: path .* leaves"),
    "parent path, other slashes": (row(audios=["..\\y.wav"]), "audios: path .* leaves"),
    "drive": (row(audios=["C:\\y.wav"]), "audios: path .* leaves"),
    "NUL in a path": (row(audios=["a\0.wav"]), "audios: path .* leaves"),
    "empty path": (row(audios=[""]), "audios: path '' leaves"),
    "descriptor path": (row(ext_audio_feats=["../a.pt"]), "ext_audio_feats: path .* leaves"),
    "too deep": ('{"a":' * 5000 + "1" + "}" * 5000, "not valid JSON|is missing"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_row_is_named(tmp_path: Path, name: str) -> None:
    bad, message = BAD_ROWS[name]
    write(tmp_path, row(), row(), bad, row())
    with pytest.raises(InputError, match=message) as caught:
        open_atlas(tmp_path, split="train")
    assert str(caught.value).startswith(f"{tmp_path / 'train.jsonl'}:3")
    assert caught.value.fix
    assert caught.value.exit_code == 2


def test_bytes_that_are_not_text(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(json.dumps(row()).encode() + b'\n{"problem": "\xff\xfe"}\n')
    with pytest.raises(InputError, match=r"train.jsonl:2: not valid JSON"):
        open_atlas(tmp_path, split="train")


@pytest.mark.parametrize("text", [b"\xff\xfe", b"\xc0\x80", b"\xed\xa0\x80"])
def test_bytes_that_are_not_text_in_an_extra_field(tmp_path: Path, text: bytes) -> None:
    good = json.dumps(row()).encode()
    (tmp_path / "train.jsonl").write_bytes(good + b"\n" + good[:-1] + b', "speaker": "' + text + b'"}\n')
    with pytest.raises(InputError, match=r"train.jsonl:2: not valid JSON"):
        open_atlas(tmp_path, split="train")


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_empty_split(tmp_path: Path, content: str) -> None:
    (tmp_path / "train.jsonl").write_text(content)
    with pytest.raises(InputError, match="split 'train' has no rows"):
        open_atlas(tmp_path, split="train")


# --- media -----------------------------------------------------------------------------------------------------------


def refused(folder: Path, field: str, **changes: Any) -> InputError:
    """Open an atlas of one row, load its media, and return the refusal."""
    atlas = open_atlas(write(folder, row(**changes)), split="train")
    sample = atlas[0]
    with pytest.raises(InputError) as caught:
        sample.load_audios()
        sample.load_videos(8)
        sample.load_descriptors("ext_audio_feats")
    assert caught.value.where == f"{folder / 'train.jsonl'}:1, {field}"
    if isinstance(caught.value, MediaError):
        kept = sample.quarantined(caught.value)
        assert (kept.id, kept.field) == ("train/1", field)
        assert atlas.quarantine == [kept]
    return caught.value


def test_missing_and_empty_sound(tmp_path: Path) -> None:
    assert "no such file: a.wav" in str(refused(tmp_path, "audios"))
    (tmp_path / "a.wav").touch()
    assert "is empty (0 bytes)" in str(refused(tmp_path, "audios"))
    (tmp_path / "a.wav").write_bytes(b"RIFF" + bytes(100))
    assert "cannot be decoded" in str(refused(tmp_path, "audios"))


def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.wav")
    assert "not a regular file" in str(refused(tmp_path, "audios"))


@pytest.mark.parametrize("flags", ["", "faststart"])
def test_clip_cut_in_the_middle(tmp_path: Path, flags: str) -> None:
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w", options={"movflags": flags} if flags else {}) as out:
        stream = out.add_stream("libx264", rate=25)
        stream.width = stream.height = 64
        for i in range(100):
            pixels = np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    video = {"audios": [], "videos": ["v.mp4"], "modality_signature": "text_video"}
    assert "cut off" in str(refused(tmp_path, "videos", **video))


class Exploit:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("form", ["torch", "legacy", "pickle"])
def test_descriptor_that_runs_code(tmp_path: Path, form: str) -> None:
    marker = tmp_path / "executed"
    payload = {"features": torch.zeros(3), "x": Exploit(marker)}
    if form == "pickle":
        (tmp_path / "a.pt").write_bytes(pickle.dumps(payload))
    else:
        torch.save(payload, tmp_path / "a.pt", _use_new_zipfile_serialization=form == "torch")
    text = {"audios": [], "modality_signature": "text", "ext_audio_feats": ["a.pt"]}
    assert "not a plain file of tensors" in str(refused(tmp_path, "ext_audio_feats", **text))
    assert not marker.exists()
    careless = pickle.load if form == "pickle" else torch.load  # the exploit is real: a careless reader runs it
    with (tmp_path / "a.pt").open("rb") as file:
        careless(file, **({} if form == "pickle" else {"weights_only": False}))
    assert marker.exists()


@pytest.mark.parametrize(("milliseconds", "good"), [(5, False), (29.9, False), (30, True)])
def test_a_sound_that_is_too_short_for_a_token_is_its_rows_fault(
    tmp_path: Path, milliseconds: float, good: bool
) -> None:
    soundfile.write(tmp_path / "a.wav", np.full(int(milliseconds * 16), 0.5), 16_000)
    (sample,) = open_atlas(write(tmp_path, row()), "train")
    if good:
        assert load_media(sample, EncodeConfig(), 16_000).audios
    else:
        with pytest.raises(MediaError, match=r"train.jsonl:1, audios: lasts .* ms, less than the 30 ms"):
            load_media(sample, EncodeConfig(), 16_000)
    assert validate_atlas(tmp_path).ok == good


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_link_out_of_the_atlas(tmp_path: Path, kind: str) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "atlas"
    outside.mkdir()
    inside.mkdir()
    (outside / "a.wav").write_bytes(b"secret")
    if kind == "file":
        (inside / "a.wav").symlink_to(outside / "a.wav")
        path = "a.wav"
    else:
        (inside / "media").symlink_to(outside)
        path = "media/a.wav"
    message = str(refused(inside, "audios", audios=[path]))
    assert "is a link out of" in message
    assert "secret" not in message


def test_a_medium_that_becomes_a_link_out_of_an_open_atlas_is_refused(tmp_path: Path) -> None:
    inside, secret = tmp_path / "atlas", tmp_path / "secret.wav"
    (inside / "media").mkdir(parents=True)
    for path in (secret, inside / "media" / "a.wav", inside / "b.wav"):
        soundfile.write(path, np.full(8000, 0.5), 16_000)
    atlas = open_atlas(write(inside, row(audios=["media/a.wav"]), row(audios=["b.wav"])), "train")
    assert atlas[0].load_audios() and atlas[1].load_audios()
    (inside / "media").rename(tmp_path / "media")
    (inside / "media").symlink_to("../media")
    (inside / "b.wav").unlink()
    (inside / "b.wav").symlink_to("../secret.wav")
    for sample in atlas:
        with pytest.raises(InputError, match="is a link out of"):
            sample.load_audios()
    codes = {finding.code for finding in validate_atlas(inside).findings if finding.level == "error"}
    assert codes == {"media-outside"}


@pytest.mark.parametrize("place", ["rows/v2.jsonl", "../elsewhere/v2.jsonl"])
def test_rows_may_be_a_link_and_their_media_lie_where_it_lies(tmp_path: Path, place: str) -> None:
    """What a person names is followed wherever it leads; what rows name stays in the folder that was named."""
    folder = tmp_path / "atlas"
    folder.mkdir()
    soundfile.write(folder / "a.wav", np.full(8000, 0.5), 16_000)
    (folder / place).parent.mkdir()
    write(folder, row()).joinpath("train.jsonl").rename(folder / place)
    (folder / "train.jsonl").symlink_to(place)
    atlas = open_atlas(folder, "train")
    assert atlas.root == folder.resolve() and atlas[0].load_audios()
    assert [finding.message for finding in validate_atlas(folder).findings if finding.level == "error"] == []
    assert atlas_info(folder, durations=True).durations.unknown == 0  # type: ignore[union-attr]
    convert_to_parquet(atlas, tmp_path / "shards")
    assert open_atlas(tmp_path / "shards", "train").fingerprint == atlas.fingerprint
    assert open_atlas(folder / "train.jsonl")[0].load_audios()


def test_link_inside_the_atlas_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real.wav").touch()
    (tmp_path / "a.wav").symlink_to("real.wav")
    assert "is empty" in str(refused(tmp_path, "audios"))
