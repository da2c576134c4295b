"""Checkpoints come back as they were saved, whatever was trained."""

import json

import pytest
import torch

from hba import open_atlas
from hba.atlas.batch import Encoder, collate
from hba.atlas.config import EncodeConfig
from hba.config import load_config
from hba.errors import ConfigError, InputError
from hba.model import OmniSapiens, checkpoint
from hba.model.config import ModelConfig
from hba.model.omni import apply_strategy
from hba.train.config import SftConfig

ENCODE = EncodeConfig(num_frames=4, min_pixels=3136, max_pixels=3136)


@pytest.fixture
def batch(model, mini_atlas):
    encoder = Encoder(model.processor, ENCODE)
    samples = [s for s in open_atlas(mini_atlas, split="test") if s.label is not None][:4]
    return collate([encoder.encode(s) for s in samples], pad_token_id=encoder.pad_token_id)


def trained(backbone, strategy):
    """A model of which everything that the strategy trains has moved."""
    torch.manual_seed(1)
    config = ModelConfig(name=str(backbone), strategy=strategy, lora_r=4)
    model = apply_strategy(OmniSapiens.from_pretrained(backbone), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


@pytest.mark.parametrize("strategy", ["heads", "lora", "full"])
def test_saved_and_loaded_models_agree(backbone, batch, tmp_path, strategy):
    model = trained(backbone, strategy)
    checkpoint.save(model, tmp_path / "ck", backbone=str(backbone), strategy=strategy, encode=ENCODE)
    loaded = OmniSapiens.from_pretrained(tmp_path / "ck").eval()
    assert torch.equal(loaded.classify(batch), model.classify(batch))
    assert checkpoint.encode_config(tmp_path / "ck") == ENCODE


def test_lora_trains_the_language_model_and_the_heads_alone(backbone):
    model = trained(backbone, "lora")
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names and all(n.startswith(("thinker.model.layers.", "heads.")) for n in names)
    assert all("lora_" in n for n in names if n.startswith("thinker."))


def test_heads_strategy_trains_nothing_else(backbone):
    names = [name for name, p in trained(backbone, "heads").named_parameters() if p.requires_grad]
    assert names and all(n.startswith("heads.") for n in names)


def test_a_lora_adapter_follows_the_conventions_of_peft(backbone, tmp_path):
    checkpoint.save(trained(backbone, "lora"), tmp_path, backbone=str(backbone), strategy="lora", encode=ENCODE)
    assert {"adapter_config.json", "adapter_model.safetensors", "heads.safetensors"} <= {
        p.name for p in tmp_path.iterdir()
    }
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4


def test_a_folder_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(InputError, match="no checkpoint here"):
        OmniSapiens.from_pretrained(tmp_path)


def test_a_backbone_that_does_not_exist_is_named():
    with pytest.raises(InputError, match="no/such-model: cannot load backbone"):
        OmniSapiens.from_pretrained("no/such-model")


@pytest.mark.parametrize(
    ("file", "message"), [("heads.safetensors", "cannot load the heads"), ("model.safetensors", "cannot load backbone")]
)
def test_a_cut_checkpoint_is_named(backbone, tmp_path, file, message):
    checkpoint.save(trained(backbone, "full"), tmp_path / "ck", backbone=str(backbone), strategy="full", encode=ENCODE)
    whole = (tmp_path / "ck" / file).read_bytes()
    (tmp_path / "ck" / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=message):
        OmniSapiens.from_pretrained(tmp_path / "ck")


@pytest.mark.parametrize(
    "change", [{"num_frames": 3}, {"num_frames": 0}, {"min_pixels": 9000, "max_pixels": 8000}, {"max_audio_seconds": 0}]
)
def test_encoding_that_cannot_be_is_refused_before_anything_runs(tmp_path, change):
    overrides = [f"encode.{key}={value}" for key, value in change.items()]
    with pytest.raises(ConfigError, match="encode"):
        load_config(SftConfig, None, ["atlas=none", *overrides])
