"""Checkpoints come back as they were saved, whatever was trained."""

import errno
import json
import re
import shutil
from functools import partial
from unittest.mock import Mock

import pytest
import torch

from hba import open_atlas
from hba.batch.config import EncodeConfig
from hba.batch.encode import Encoder, collate
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
    model.save_pretrained(tmp_path / "ck", backbone=str(backbone), strategy=strategy, encode=ENCODE)
    loaded = OmniSapiens.from_pretrained(tmp_path / "ck").eval()
    assert torch.equal(loaded.classify(batch), model.classify(batch))
    assert checkpoint.encode_config(tmp_path / "ck") == ENCODE


def test_lora_trains_the_language_model_and_the_heads_alone(backbone):
    model = trained(backbone, "lora")
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names and all(n.startswith(("transformer.model.layers.", "heads.")) for n in names)
    assert all("lora_" in n for n in names if n.startswith("transformer."))


def test_heads_strategy_trains_nothing_else(backbone):
    names = [name for name, p in trained(backbone, "heads").named_parameters() if p.requires_grad]
    assert names and all(n.startswith("heads.") for n in names)


def test_a_lora_adapter_follows_the_conventions_of_peft(backbone, tmp_path):
    trained(backbone, "lora").save_pretrained(tmp_path, backbone=str(backbone), strategy="lora", encode=ENCODE)
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
    ("fails", "fix"),
    [
        (ValueError("X does not support an attention implementation through sdpa"), r"model.attention \(eager\)"),
        (ValueError("Unrecognized model"), "Use another model"),
        (json.JSONDecodeError("Expecting value", "", 0), "not whole: download it again"),
        (OSError("no such model"), "Check the name"),
        (RuntimeError("CUDA error: out of memory"), None),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), None),
    ],
)
def test_what_a_backbone_cannot_load_for_says_what_helps(backbone, monkeypatch, fails, fix):
    monkeypatch.setattr("hba.model.checkpoint.skeleton", Mock(side_effect=fails))
    with pytest.raises(type(fails) if fix is None else InputError) as told:
        OmniSapiens.from_pretrained(backbone)
    assert told.value is fails if fix is None else re.search(fix, told.value.fix)
    assert fix is None or ("attention" in told.value.fix) == ("attention" in str(fails))


@pytest.mark.parametrize(
    ("file", "message"), [("heads.safetensors", "cannot load the heads"), ("model.safetensors", "cannot load backbone")]
)
def test_a_cut_checkpoint_is_named(backbone, tmp_path, file, message):
    trained(backbone, "full").save_pretrained(tmp_path / "ck", backbone=str(backbone), strategy="full", encode=ENCODE)
    whole = (tmp_path / "ck" / file).read_bytes()
    (tmp_path / "ck" / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=message):
        OmniSapiens.from_pretrained(tmp_path / "ck")


def old(folder, backbone):
    """Let a checkpoint's card name its backbone as it was typed."""
    card = json.loads((folder / "hba.json").read_text())
    (folder / "hba.json").write_text(json.dumps({**card, "backbone": backbone}))


def test_a_checkpoint_opens_from_any_folder(backbone, tmp_path, monkeypatch):
    """Those of older versions, too, where what they name lies below a folder that they lie below."""
    shutil.copytree(backbone, tmp_path / "models" / "tiny")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "sft" / "checkpoints" / "step_1"
    name = checkpoint.backbone_of("models/tiny")
    trained("models/tiny", "lora").save_pretrained(folder, backbone=name, strategy="lora", encode=ENCODE)
    assert checkpoint.read_card(folder)["backbone"] == str(tmp_path / "models" / "tiny")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    hashes = checkpoint.backbone_hashes(folder)
    for card in (name, "models/tiny"):
        old(folder, card)
        assert OmniSapiens.from_pretrained(folder) and OmniSapiens.from_pretrained(folder, heads=False)
        assert checkpoint.backbone_hashes(folder) == hashes
        checkpoint.link(folder, tmp_path / card.replace("/", "-") / "later", speaks=True)
        assert checkpoint.read_card(tmp_path / card.replace("/", "-") / "later")["backbone"] == name


@pytest.mark.parametrize("load", [OmniSapiens.from_pretrained, partial(OmniSapiens.from_pretrained, heads=False)])
@pytest.mark.parametrize("name", ["/nowhere/models/tiny", "nowhere/models/tiny/7", "models/tiny"])
def test_a_backbone_that_is_gone_is_named_with_the_places_where_it_was_looked_for(
    backbone, tmp_path, monkeypatch, name, load
):
    folder = tmp_path / "runs" / "step_1"
    trained(backbone, "heads").save_pretrained(folder, backbone=str(backbone), strategy="heads", encode=ENCODE)
    old(folder, name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"the backbone of this checkpoint is gone: no folder") as refused:
        load(folder)
    places = [name] if name.startswith("/") else [str(tmp_path / name), str(tmp_path / "runs" / name)]
    assert all(place in str(refused.value) for place in places)
    assert "hba.json" in str(refused.value)


def test_a_folder_beside_the_run_is_no_id_of_the_hub(backbone, tmp_path):
    assert checkpoint.place_of("Qwen/Qwen2.5-Omni-7B") == "Qwen/Qwen2.5-Omni-7B"
    folder = tmp_path / "step_1"
    trained(backbone, "heads").save_pretrained(folder, backbone="Qwen/Omni", strategy="heads", encode=ENCODE)
    assert checkpoint.base_of(folder) == "Qwen/Omni"


# --- LoRA that goes on -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "fix"),
    [({"lora_r": 8}, "model.lora_r=4"), ({"lora_alpha": 8}, "model.lora_alpha=64"), ({}, "model.lora_r=4")],
)
def test_lora_of_another_rank_or_alpha_is_refused_with_what_to_type(backbone, tmp_path, change, fix):
    trained(backbone, "lora").save_pretrained(tmp_path, backbone=str(backbone), strategy="lora", encode=ENCODE)
    wanted = {"lora_r": 4, "lora_alpha": 64, **change} if change else {}
    config = ModelConfig(name=str(tmp_path), **wanted)
    whole, words = OmniSapiens.from_pretrained(tmp_path), OmniSapiens.from_pretrained(tmp_path, heads=False)
    for model in (whole, words):
        with pytest.raises(ConfigError, match=r"LoRA layers of rank 4 and alpha 64, the config asks for") as refused:
            apply_strategy(model, config)
        assert fix in refused.value.fix and "hba merge" in refused.value.fix


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_dropout_of_the_config_is_that_of_lora_which_goes_on(backbone, batch, tmp_path, dropout):
    kept = {"backbone": str(backbone), "strategy": "lora", "encode": ENCODE}
    trained(backbone, "lora").save_pretrained(tmp_path / "a", **kept)
    config = ModelConfig(name=str(tmp_path), lora_r=4, lora_dropout=dropout)
    model = apply_strategy(OmniSapiens.from_pretrained(tmp_path / "a"), config).train()
    first, second = (model(batch).pooled_BH for _ in range(2))
    assert torch.equal(first, second) == (dropout == 0)
    model.save_pretrained(tmp_path / "b", **kept)
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["lora_dropout"] == dropout


@pytest.mark.parametrize(
    "change", [{"num_frames": 3}, {"num_frames": 0}, {"min_pixels": 9000, "max_pixels": 8000}, {"max_audio_seconds": 0}]
)
def test_encoding_that_cannot_be_is_refused_before_anything_runs(tmp_path, change):
    overrides = [f"encode.{key}={value}" for key, value in change.items()]
    with pytest.raises(ConfigError, match="encode"):
        load_config(SftConfig, None, ["atlas=none", *overrides])
