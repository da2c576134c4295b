"""Recordings longer than `encode.max_audio_seconds`: refused, cut, or heard in windows, as the run says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # tiny_chat is shared

import tiny_chat
from hba import open_atlas
from hba.atlas import Atlas
from hba.batch.config import EncodeConfig
from hba.batch.encode import Encoder, collate, encoder_for
from hba.config import load_config
from hba.errors import ConfigError, MediaError
from hba.evaluate.config import PredictConfig
from hba.evaluate.predict import predict_run
from hba.model import OmniSapiens
from hba.model.checkpoint import load_processor
from hba.run import RunFolder
from hba.storage import read_json, read_jsonl
from hba.train.bam import train_bam
from hba.train.config import BamConfig, SftConfig
from hba.train.sft import train_sft

RATE = 16_000
PARTS = 3
ROW = {"problem": "How does the person feel?", "dataset": "cremad", "task": "emotion_cls", "answer": "anger"}
FREE = {"problem": "Why?", "dataset": "siq2", "task": "social_reasoning_qa", "answer": "Since."}


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording of 3 s and its seconds as files of their own; a short one; a long one with a free-form answer."""
    folder = tmp_path_factory.mktemp("recordings")
    sound = np.random.default_rng(0).normal(0, 0.1, PARTS * RATE).astype(np.float32)
    files = {"long": sound, "short": sound[: RATE // 2], "eleven": np.tile(sound, 4)[: 11 * RATE]}
    files |= {f"part{i}": sound[i * RATE : (i + 1) * RATE] for i in range(PARTS)}
    for name, samples in files.items():
        soundfile.write(folder / f"{name}.wav", samples, RATE, subtype="FLOAT")
    heard = {"modality_signature": "text_audio"}
    rows = [ROW | heard | {"id": name, "audios": [f"{name}.wav"]} for name in files]
    rows.append(FREE | heard | {"id": "free", "audios": ["long.wav"]})
    rows.append(ROW | heard | {"id": "two", "audios": ["short.wav", "long.wav"]})
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained = [row for row in rows if row["id"] in ("long", "short", "part0", "eleven")]
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in trained))
    return folder


def encoder(model: OmniSapiens, **changes: Any) -> Encoder:
    return Encoder(model.processor, EncodeConfig(**({"max_audio_seconds": 1.0} | changes)))


def batch(given: Encoder, atlas: Atlas, *ids: str) -> Any:
    samples = {sample.id: sample for sample in atlas}
    encoded = [given.encode(samples[name]) for name in ids]
    return collate(encoded, pad_token_id=given.pad_token_id)


def test_a_long_sound_is_refused_by_default(recordings: Path, model: OmniSapiens) -> None:
    with pytest.raises(MediaError, match=r"audio of 3\.0 s, more than max_audio_seconds=1\.0.*encode\.long_audio"):
        batch(encoder(model), open_atlas(recordings, split="test"), "long")


def test_windows_give_the_mean_of_the_logits_of_the_parts(recordings: Path, model: OmniSapiens) -> None:
    atlas = open_atlas(recordings, split="test")
    windows, whole = encoder(model, long_audio="windows"), encoder(model)
    parts = model.classify(batch(whole, atlas, *(f"part{i}" for i in range(PARTS))))
    expected, own = parts.mean(0), torch.isfinite(parts[0])
    alone = model.classify(batch(windows, atlas, "long"))[0]
    torch.testing.assert_close(alone[own], expected[own], rtol=0, atol=1e-5)
    assert (parts.std(0)[own] > 1e-4).any()  # the parts differ
    among = batch(windows, atlas, "short", "long", "part0", "eleven")
    assert [window.rows_R.tolist() for window in among.windows] == [[1, 3], [1, 3], *[[3]] * 8]
    logits = model.classify(among)
    torch.testing.assert_close(logits[1], alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits[2], parts[0], rtol=0, atol=1e-5)
    assert among.num_tokens[3] > 10 * among.num_tokens[2] > 0


def test_a_long_recording_takes_memory_by_its_length(recordings: Path, model: OmniSapiens) -> None:
    atlas = open_atlas(recordings, split="test")
    whole = encoder(model, max_audio_seconds=60.0).encode(next(s for s in atlas if s.id == "eleven"))
    windows = encoder(model, long_audio="windows").encode(next(s for s in atlas if s.id == "eleven"))
    assert len(windows.windows) == 10
    assert sum(mel.shape[1] for each in (windows, *windows.windows) for mel in each.mels) == whole.mels[0].shape[1]
    assert windows.num_bytes < 1.2 * whole.num_bytes
    seen = []
    hook = model.transformer.model.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    model.classify(batch(encoder(model, long_audio="windows"), atlas, "eleven", "short"))
    hook.remove()
    assert [rows for rows, _ in seen] == [2, *[1] * 10]  # one window after the other, never all at once
    assert max(tokens for _, tokens in seen) < 3 * whole.input_ids_T.numel() / 11 + 60


@pytest.mark.parametrize(("mode", "seconds"), [("head", 1.0), ("published", 10.0)])
def test_a_head_is_the_beginning(recordings: Path, model: OmniSapiens, mode: str, seconds: float) -> None:
    atlas = open_atlas(recordings, split="test")
    given = encoder(model, long_audio=mode)
    found = given.encode(next(s for s in atlas if s.id == "eleven"))
    assert found.mels[0].shape[1] == seconds * 100 and found.windows == ()
    if mode == "head":
        part = given.encode(next(s for s in atlas if s.id == "part0"))
        assert torch.equal(found.input_ids_T, part.input_ids_T) and torch.equal(found.mels[0], part.mels[0])
    else:  # the limit of the run is not that of the release
        long = given.encode(next(s for s in atlas if s.id == "long"))
        assert long.mels[0].shape[1] == 300


def test_what_cannot_be_heard_in_windows_is_refused_by_name(recordings: Path, model: OmniSapiens) -> None:
    atlas = open_atlas(recordings, split="test")
    windows = encoder(model, long_audio="windows")
    with pytest.raises(MediaError, match=r"test\.jsonl:\d+, audios: audio of 3\.0 s"):  # words are of one sound
        batch(windows, atlas, "free")
    with pytest.raises(MediaError, match=r"test\.jsonl:\d+, audios: holds 2 sounds, one of them long"):
        batch(windows, atlas, "two")


def test_training_and_prediction_with_windows(
    tmp_path: Path, recordings: Path, backbone: Path, mini_atlas: Path
) -> None:
    settings = [
        f"atlas={recordings}", f"model.name={backbone}", "model.strategy=full", "train.max_steps=2", "train.epochs=9",
        "train.batch_size=4", "train.validate_every=2", "train.log_every=1", "loader.workers=0",
        "encode.long_audio=windows", "encode.max_audio_seconds=1",
    ]  # fmt: skip
    config = load_config(SftConfig, None, settings)
    with RunFolder.open(tmp_path / "run", config=config, command="train sft", seed=0) as folder:
        train_sft(config, folder)
    card = read_json(next((tmp_path / "run" / "checkpoints").glob("step_2")) / "hba.json")
    assert (card["encode"]["long_audio"], card["encode"]["max_audio_seconds"]) == ("windows", 1.0)
    predicting = load_config(PredictConfig, None, ["loader.workers=0"])
    predict_run(
        str(tmp_path / "run"), tmp_path / "said", atlas=str(recordings), split="test", config=predicting,
        progress=lambda _: None,
    )  # fmt: skip
    assert read_json(tmp_path / "said" / "predict.json")["encode"]["long_audio"] == "windows"
    said = [line.record for line in read_jsonl(tmp_path / "said" / "predictions.jsonl")]
    assert {line["id"] for line in said} == {"long", "short", "eleven", *(f"part{i}" for i in range(PARTS))}
    model = OmniSapiens.from_pretrained(tmp_path / "run").eval()
    atlas = open_atlas(recordings, split="test")
    logits = model.classify(batch(encoder(model, long_audio="windows"), atlas, "long"))
    probs = torch.softmax(logits[0], 0)
    line = next(line for line in said if line["id"] == "long")
    assert max(line["probs"].values()) == pytest.approx(float(probs.max()), abs=1e-4)
    later = [f"atlas={mini_atlas}", f"base={tmp_path / 'run'}", "datasets=[daicwoz]", "train.sharding=full"]
    whole = load_config(BamConfig, None, [*later, "stage=full"])
    with (
        RunFolder.open(tmp_path / "bam", config=whole, command="train bam", seed=0) as folder,
        pytest.raises(ConfigError, match=r"encode\.long_audio.*different numbers of windows"),
    ):
        train_bam(whole, folder)


def test_words_are_not_said_of_windows(tmp_path: Path, recordings: Path, backbone: Path) -> None:
    model = tiny_chat.build("qwen2-audio", backbone, tmp_path / "model")
    with pytest.raises(ConfigError, match=r"encode\.long_audio.*averaged by heads"):
        encoder_for(load_processor(model), EncodeConfig(long_audio="windows"))
    config = load_config(PredictConfig, None, ["encode.long_audio=windows", "loader.workers=0"])
    with pytest.raises(ConfigError, match=r"encode\.long_audio.*averaged by heads"):
        predict_run(
            str(model), tmp_path / "said", atlas=str(recordings), split="test", config=config, backend="hf",
            progress=lambda _: None,
        )  # fmt: skip
    for changes in (["answer_weight=1"], ["train.sharding=full"]):
        with pytest.raises(ConfigError, match=r"encode\.long_audio"):
            load_config(SftConfig, None, ["atlas=a", "encode.long_audio=windows", *changes])


def test_a_chat_model_hears_the_head_that_it_can_take(tmp_path: Path, recordings: Path, backbone: Path) -> None:
    """Its own limit applies where it is shorter: Qwen2-Audio's here is 4 s."""
    processor = load_processor(tiny_chat.build("qwen2-audio", backbone, tmp_path / "model"))
    atlas = {sample.id: sample for sample in open_atlas(recordings, split="test")}
    with pytest.raises(MediaError, match=r"audio of 11\.0 s, more than the 4 s"):
        encoder_for(processor, EncodeConfig()).encode(atlas["eleven"])
    found = encoder_for(processor, EncodeConfig(long_audio="head")).encode(atlas["eleven"])
    soundfile.write(tmp_path / "head.wav", soundfile.read(recordings / "eleven.wav")[0][: 4 * RATE], RATE, "FLOAT")
    row = ROW | {"modality_signature": "text_audio", "audios": ["head.wav"]}
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
    (head,) = open_atlas(tmp_path, split="test")
    expected = encoder_for(processor, EncodeConfig()).encode(head)
    assert torch.equal(found.input_ids_T, expected.input_ids_T)
    assert torch.equal(found.media["input_features"], expected.media["input_features"])
