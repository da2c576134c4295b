"""Transcripts through transformers' pipeline, with the real classes at tiny size and random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Processor,
)

from hba.atlas.audio import Audio, load_audio
from hba.descriptors.describe import describe
from hba.descriptors.items import Settings
from hba.descriptors.sound import Transcriber, transcriber_id
from hba.errors import InputError, MediaError


def noise(seconds: float) -> Audio:
    return Audio(np.random.default_rng(0).normal(0, 0.1, round(16_000 * seconds)).astype(np.float32))


@pytest.fixture(scope="module")
def wav2vec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("asr") / "wav2vec"
    folder.mkdir()
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, **{c: 5 + i for i, c in enumerate("abcdefgh")}}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    torch.manual_seed(0)
    convolutions = {"conv_dim": (8, 8), "conv_stride": (16, 20), "conv_kernel": (16, 20), "num_conv_pos_embeddings": 4}
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    groups = {"num_conv_pos_embedding_groups": 2, "vocab_size": len(vocabulary), "pad_token_id": 0}
    Wav2Vec2ForCTC(Wav2Vec2Config(**convolutions, **sizes, **groups)).save_pretrained(folder)
    tokenizer = Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))
    Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("seconds", [1.0, 33.0])
@pytest.mark.parametrize("kind", ["whisper", "wav2vec"])
def test_any_recognition_model_transcribes_sounds_of_any_length(
    kind: str, seconds: float, request: pytest.FixtureRequest
) -> None:
    heard = Transcriber(str(request.getfixturevalue(kind))).extract(noise(seconds), where="row 1")
    assert heard
    assert heard == " ".join(heard.split())


def test_no_words_are_an_error_and_no_empty_transcript(wav2vec: Path) -> None:
    transcriber = Transcriber(str(wav2vec))
    head = transcriber._pipeline.model.lm_head
    head.weight.data.zero_()
    head.bias.data.copy_(torch.eye(len(head.bias))[0])  # nothing but blanks
    with pytest.raises(MediaError, match="row 7: no speech was recognised"):
        transcriber.extract(noise(1), where="row 7")


def test_other_weights_are_another_extractor(whisper: Path, wav2vec: Path, tmp_path: Path) -> None:
    assert transcriber_id(str(whisper)) == transcriber_id(str(whisper)) != transcriber_id(str(wav2vec))
    other = tmp_path / wav2vec.name
    shutil.copytree(wav2vec, other)
    assert transcriber_id(str(other)) == transcriber_id(str(wav2vec))
    weights = other / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert transcriber_id(str(other)) != transcriber_id(str(wav2vec))
    assert transcriber_id("openai/whisper-large-v3") == "transformers asr openai/whisper-large-v3"


def test_what_is_no_recognition_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot load a recognition model"):
        Transcriber(str(tmp_path))


def test_rows_without_texts_get_transcripts(whisper: Path, tmp_path: Path) -> None:
    about = {"problem": "How?", "answer": "anger", "dataset": "cremad", "task": "x_cls"}
    about |= {"modality_signature": "text_audio", "audios": ["one.wav"]}
    rows = [about, about | {"texts": ["given.txt"]}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    soundfile.write(tmp_path / "one.wav", noise(1).samples, 16_000)
    settings = Settings(audio=None, video=None, transcripts=str(whisper))
    assert describe(tmp_path, settings, workers=2).extracted == {"transcript": 1}
    linked = [json.loads(line)["texts"] for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert linked == [["transcripts/one.wav.txt"], ["given.txt"]]
    stored = load_audio(tmp_path / "one.wav", where="one.wav")
    expected = Transcriber(str(whisper)).extract(stored, where="one.wav")
    assert (tmp_path / "transcripts" / "one.wav.txt").read_text(encoding="utf-8") == expected + "\n"
    assert describe(tmp_path, settings).kept == {"transcript": 1}
