"""Models for others: merged ones load in plain transformers, released ones load here; both give the same logits."""

import json
import os
import pickle
import sys
import weakref
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoProcessor, Qwen2_5OmniThinkerForConditionalGeneration

from hba import open_atlas
from hba.batch.config import EncodeConfig
from hba.batch.encode import Encoder, collate
from hba.errors import InputError
from hba.evaluate.backends.interface import LOCAL
from hba.evaluate.config import PredictConfig
from hba.evaluate.predict import EVERYTHING, open_rows
from hba.model import OmniSapiens, checkpoint
from hba.model.config import ModelConfig
from hba.model.heads import masked_mean
from hba.model.merge import merge_checkpoint, merge_released
from hba.model.omni import apply_strategy, lora_targets
from hba.model.released import Release
from hba.model.weights import Weights

sys.path.insert(0, str(Path(__file__).parent.parent))
import tiny_chat

ENCODE = EncodeConfig(num_frames=4, min_pixels=3136, max_pixels=3136)
Thinker = Qwen2_5OmniThinkerForConditionalGeneration


@pytest.fixture(scope="module")
def batch(model, mini_atlas):
    encoder = Encoder(model.processor, ENCODE)
    samples = [s for s in open_atlas(mini_atlas, split="test") if s.label is not None][:4]
    return collate([encoder.encode(s) for s in samples], pad_token_id=encoder.pad_token_id)


def shaken(module):
    """Every parameter that trains moved away from its start."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return module.eval()


def token_logits(thinker, batch):
    with torch.inference_mode():
        return thinker.eval()(**batch.inputs).logits


@pytest.fixture(scope="module")
def lora(backbone, tmp_path_factory):
    """A model with LoRA that does something, and its checkpoint."""
    folder = tmp_path_factory.mktemp("lora") / "step_1"
    model = apply_strategy(OmniSapiens.from_pretrained(backbone), ModelConfig(name=str(backbone), lora_r=4))
    known = {"encode": ENCODE, "domains": ["emotion", "humour"]}
    shaken(model).save_pretrained(folder, backbone=str(backbone), strategy="lora", **known)
    return model, folder


# --- merge -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def merged(lora, tmp_path_factory):
    out = tmp_path_factory.mktemp("merged") / "model"
    merge_checkpoint(lora[1], out, dtype="float32")
    return out


def test_plain_transformers_loads_a_merged_model_with_equal_logits(lora, merged, batch, backbone):
    plain = Thinker.from_pretrained(merged)
    expected = token_logits(lora[0].transformer, batch)
    assert torch.allclose(token_logits(plain, batch), expected, atol=1e-4)
    assert not torch.allclose(token_logits(Thinker.from_pretrained(backbone), batch), expected, atol=1e-2)
    processor = AutoProcessor.from_pretrained(merged)
    assert processor.chat_template == lora[0].processor.chat_template
    assert processor.tokenizer.get_vocab() == lora[0].processor.tokenizer.get_vocab()


def test_a_merged_model_is_laid_out_as_the_release_of_the_backbone(merged):
    """vLLM maps `thinker.model.`, `thinker.lm_head.` and `thinker.`, and reads `thinker_config` of the whole config."""
    names = load_file(merged / "model.safetensors").keys()
    assert all(name.startswith("thinker.") for name in names)
    assert not [name for name in names if "lora" in name or "base_layer" in name]
    config = json.loads((merged / "config.json").read_text())
    assert config["architectures"] == ["Qwen2_5OmniModel"]
    assert AutoConfig.from_pretrained(merged).thinker_config.text_config.hidden_size == 64
    assert config["thinker_config"]["text_config"]["tie_word_embeddings"] is ("thinker.lm_head.weight" not in names)


def test_heads_lie_beside_a_merged_model(lora, merged, batch):
    loaded = OmniSapiens.from_pretrained(merged).eval()
    logits, expected = loaded.classify(batch), lora[0].classify(batch)
    assert torch.allclose(logits, expected, atol=1e-4)
    assert checkpoint.encode_config(merged) == ENCODE


def test_bfloat16_is_what_is_written_unless_asked_otherwise(lora, tmp_path):
    merge_checkpoint(lora[1], tmp_path / "half")
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}


def test_nothing_is_overwritten_and_a_backbone_is_refused(lora, merged, backbone, tmp_path):
    with pytest.raises(InputError, match="exists already"):
        merge_checkpoint(lora[1], merged)
    with pytest.raises(InputError, match="nothing to merge"):
        merge_checkpoint(backbone, tmp_path / "out")


@pytest.mark.parametrize("backend", LOCAL)
def test_backends_on_this_machine_encode_as_a_merged_model_was_trained(merged, backbone, mini_atlas, backend):
    """The flaw: vLLM was given the defaults, whatever the model had seen in training."""

    def encoded(model, config):
        rows = {"split": "test[:2]", "config": config, "backend": backend, "selection": EVERYTHING}
        return open_rows(str(model), str(mini_atlas), **rows).encode

    assert encoded(merged, PredictConfig()) == ENCODE != EncodeConfig()
    assert encoded(backbone, PredictConfig()) == EncodeConfig()
    asked = EncodeConfig(num_frames=2)
    assert encoded(merged, PredictConfig(encode=asked)) == asked


# --- shard by shard ---------------------------------------------------------------------------------------------------


def in_shards(backbone, out, *, tied=True, dtype=torch.bfloat16):
    """The tiny backbone as it is published: in files of a few tensors, in bfloat16, beside what speaks."""
    thinker = Thinker.from_pretrained(backbone, dtype=dtype)
    if not tied:
        thinker.lm_head.weight = nn.Parameter(thinker.lm_head.weight.detach() * 2)
        thinker.config.tie_word_embeddings = thinker.config.text_config.tie_word_embeddings = False
    weights = {f"thinker.{name}": tensor for name, tensor in thinker.state_dict().items()}
    if tied:
        del weights["thinker.lm_head.weight"]
    weights["talker.model.norm.weight"] = torch.zeros(40_000)
    out.mkdir()
    save_torch_state_dict(weights, out, max_shard_size="150KB")
    inner = thinker.config.to_dict()
    config = {"model_type": "qwen2_5_omni", "tie_word_embeddings": tied, "thinker_config": inner}
    (out / "config.json").write_text(json.dumps(config))
    OmniSapiens.from_pretrained(backbone).processor.save_pretrained(out)
    return out


def adapted(base, out, **options):
    """A checkpoint with LoRA of some kind that has moved, on the folder `base`."""
    torch.manual_seed(0)
    model = OmniSapiens.from_pretrained(base, dtype="float32").requires_grad_(False)
    how = {"r": 4, "lora_alpha": 8, "target_modules": lora_targets(model.transformer), **options}
    model.transformer.add_adapter(LoraConfig(**how))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name
    shaken(model).save_pretrained(out, backbone=str(base), strategy="lora", encode=ENCODE)
    return out


def merged_whole(folder, dtype):
    """The thinker of a checkpoint with LoRA folded in, in memory, by PEFT."""
    thinker = OmniSapiens.from_pretrained(folder, dtype="float32").transformer
    for module in list(thinker.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, BaseTunerLayer):
                child.merge(safe_merge=True)
                setattr(module, name, child.get_base_layer())
    return {f"thinker.{name}": tensor.to(dtype) for name, tensor in thinker.state_dict().items()}


def stored(folder):
    """The tensors of a model by name, with the file of each."""
    files = {file.name: load_file(file) for file in sorted(folder.glob("model*.safetensors"))}
    return {name: tensor for held in files.values() for name, tensor in held.items()}, {
        name: file for file, held in files.items() for name in held
    }


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_dropout": 0.5}], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_shard_by_shard_is_to_the_bit_what_merging_whole_gives(backbone, tmp_path, options, dtype):
    base = in_shards(backbone, tmp_path / "base")
    folder = adapted(base, tmp_path / "ck", **options)
    merge_checkpoint(folder, tmp_path / "out", dtype=dtype)
    ours, files = stored(tmp_path / "out")
    whole = merged_whole(folder, getattr(torch, dtype))
    assert torch.equal(whole.pop("thinker.lm_head.weight"), whole["thinker.model.embed_tokens.weight"])
    assert sorted(ours) == sorted(whole)
    assert not [name for name in whole if not torch.equal(ours[name], whole[name])]
    plain, before = stored(base)
    moved = [name for name in ours if not torch.equal(ours[name], plain[name].to(ours[name].dtype))]
    assert len(moved) == 21 and all("_proj" in name for name in moved)
    groups = [{n for n in held if held[n] == file and "talker" not in n} for held, file in
              [(before, file) for file in sorted(set(before.values()))]]  # fmt: skip
    assert [{n for n in files if files[n] == file} for file in sorted(set(files.values()))] == [g for g in groups if g]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == files
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in ours.values())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("strategy", ["lora", "full", "heads"])
def test_a_language_head_and_every_strategy_are_merged_from_shards(backbone, tmp_path, tied, strategy):
    base = in_shards(backbone, tmp_path / "base", tied=tied)
    model = apply_strategy(
        OmniSapiens.from_pretrained(base, dtype="float32"),
        ModelConfig(name=str(base), strategy=strategy, lora_r=4),
    )
    shaken(model)
    model.own_lm_head = True
    model.untie_lm_head()
    with torch.no_grad():
        model.transformer.lm_head.weight.add_(0.5)
    model.save_pretrained(tmp_path / "ck", backbone=str(base), strategy=strategy, encode=ENCODE)
    merge_checkpoint(tmp_path / "ck", tmp_path / "out", dtype="float32")
    ours, whole = stored(tmp_path / "out")[0], merged_whole(tmp_path / "ck", torch.float32)
    assert sorted(ours) == sorted(whole)
    assert not [name for name in whole if not torch.equal(ours[name], whole[name])]
    assert not torch.equal(ours["thinker.lm_head.weight"], ours["thinker.model.embed_tokens.weight"])
    plain = Thinker.from_pretrained(tmp_path / "out")
    assert torch.equal(plain.lm_head.weight, model.transformer.lm_head.weight)


def test_a_merge_holds_a_layer_at_a_time_and_reads_every_byte_once(backbone, tmp_path, monkeypatch):
    base = in_shards(backbone, tmp_path / "base")
    folder = adapted(base, tmp_path / "ck")
    monkeypatch.setattr(Thinker, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    read, alive, most = [], weakref.WeakSet(), [0]

    def watched(self, name, block_bytes=1 << 12):
        for block in blocks(self, name, 1 << 12):
            read.append(block.nbytes)
            alive.add(block.untyped_storage())
            most[0] = max(most[0], sum(storage.nbytes() for storage in alive))
            yield block

    blocks = Weights.blocks
    monkeypatch.setattr(Weights, "blocks", watched)
    merge_checkpoint(folder, tmp_path / "out")
    weights = stored(base)[0]
    lora = sum(tensor.nbytes for tensor in load_file(folder / "adapter_model.safetensors").values())
    spoken = weights.pop("talker.model.norm.weight").nbytes
    total = sum(tensor.nbytes for tensor in weights.values())
    assert sum(read) == total + lora and spoken
    assert most[0] - lora <= 3 * (1 << 12) < max(tensor.nbytes for tensor in weights.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"bias": "lora_only"}, "LORA with bias"), ({"lora_bias": True}, "LORA with lora_bias")],
)
def test_an_adapter_that_is_more_than_lora_is_refused(backbone, tmp_path, options, message):
    folder = adapted(backbone, tmp_path / "ck", **options)
    with pytest.raises(InputError, match=message):
        merge_checkpoint(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_lora_that_is_not_finite_is_refused(backbone, tmp_path):
    folder = adapted(backbone, tmp_path / "ck")
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"thinker.model.layers.1.mlp.up_proj.weight with its LoRA is not finite"):
        merge_checkpoint(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_backbone_that_is_not_whole_is_not_merged(backbone, tmp_path):
    base = in_shards(backbone, tmp_path / "base")
    folder = adapted(base, tmp_path / "ck")
    part = sorted(base.glob("model-*.safetensors"))[1]
    save_file({name: t for name, t in load_file(part).items() if "proj" not in name}, part)
    with pytest.raises(InputError, match=r"weights of Qwen2_5OmniThinker\w+ are missing"):
        merge_checkpoint(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", tiny_chat.FAMILIES)
def test_a_chat_model_is_merged_as_its_own_class(family, backbone, tmp_path):
    """What generative SFT of a model other than Qwen2.5-Omni leaves."""
    torch.manual_seed(0)
    name = str(tiny_chat.build(family, backbone, tmp_path / "base"))
    model = OmniSapiens.from_pretrained(name, dtype="float32", heads=False)
    apply_strategy(model, ModelConfig(name=name, lora_r=4))
    shaken(model).save_pretrained(tmp_path / "ck", backbone=name, strategy="lora", encode=ENCODE)
    merge_checkpoint(tmp_path / "ck", tmp_path / "out", dtype="float32")
    plain = type(model.transformer).from_pretrained(tmp_path / "out").eval()
    tokens = torch.arange(5, 25)[None]
    with torch.inference_mode():
        ours, theirs = (m(input_ids=tokens).logits for m in (plain, model.transformer))
        untrained = OmniSapiens.from_pretrained(name, dtype="float32", heads=False).transformer.eval()
        base = untrained(input_ids=tokens).logits
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert not torch.allclose(base, theirs, atol=1e-2)
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert AutoProcessor.from_pretrained(tmp_path / "out").chat_template == model.processor.chat_template


# --- what the authors released ---------------------------------------------------------------------------------------


class Released(nn.Module):
    """The published model's layout: a thinker, with PEFT or without, and a list of heads."""

    def __init__(self, thinker, columns, lora_alpha):
        super().__init__()
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        options = {"r": 4, "lora_alpha": lora_alpha, "lora_dropout": 0.05, "target_modules": names}
        self.backbone = get_peft_model(thinker, LoraConfig(**options)) if lora_alpha else thinker
        self.columns = columns
        self.heads = nn.ModuleList(nn.Linear(64, len(indices)) for indices in columns.values())

    def classify(self, batch):
        with torch.inference_mode():
            states = self.backbone(**batch.inputs, output_hidden_states=True).hidden_states
        pooled = masked_mean(states[-2], batch.inputs["attention_mask"])
        logits = torch.full((len(batch), 25), -torch.inf)
        for row, name in enumerate(batch.domain_names):
            logits[row, list(self.columns[name])] = self.heads[list(self.columns).index(name)](pooled[row])
        return logits


@pytest.fixture(scope="module", params=[64, None], ids=["lora", "full"])
def released(request, backbone, model):
    torch.manual_seed(0)
    made = Released(Thinker.from_pretrained(backbone), model.heads.columns, request.param)
    return shaken(made)


@pytest.mark.parametrize("file", ["pytorch_model_fsdp.bin", "model.safetensors"])
def test_a_released_checkpoint_gives_its_logits_here(released, backbone, batch, tmp_path, file):
    state = released.state_dict()
    if file.endswith(".bin"):
        torch.save(state, tmp_path / file)
    else:
        save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / file)
    merge_released(tmp_path, tmp_path / "out", Release(backbone=str(backbone)), dtype="float32")
    ours = OmniSapiens.from_pretrained(tmp_path / "out").eval().classify(batch)
    assert torch.allclose(ours, released.classify(batch), atol=1e-4)


CHANGES = {
    "unknown keys: backbone.extra": lambda s: s | {"backbone.extra": torch.zeros(1)},
    "unknown keys: optimizer": lambda s: s | {"optimizer": torch.zeros(1)},
    "missing keys: heads.1.bias": lambda s: {k: v for k, v in s.items() if k != "heads.1.bias"},
    r"heads.6.weight is \[3, 64\], expected \[2, 64\]": lambda s: s | {"heads.6.weight": torch.zeros(3, 64)},
    "unknown keys: heads.7.weight": lambda s: s | {"heads.7.weight": torch.zeros(2, 64)},
}


@pytest.mark.parametrize("message", CHANGES)
def test_keys_that_do_not_fit_are_named(released, backbone, tmp_path, message):
    file = tmp_path / "pytorch_model.bin"
    torch.save(CHANGES[message](released.state_dict()), file)
    with pytest.raises(InputError, match=message):
        merge_released(file, tmp_path / "out", Release(backbone=str(backbone)))
    assert not (tmp_path / "out").exists()


class Exploit:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_released_file_runs_no_code(backbone, tmp_path):
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(pickle.dumps({"backbone.x": Exploit(tmp_path / "ran")}, protocol=2))
    with pytest.raises(InputError, match="cannot read the weights"):
        merge_released(file, tmp_path / "out", Release(backbone=str(backbone)))
    assert not (tmp_path / "ran").exists()


class ReleasedAdapter(nn.Module):
    """The published adapter: delta = alpha * MLP([LayerNorm] f)."""

    def __init__(self, features, layer_norm):
        super().__init__()
        if layer_norm:
            self.ln_feats = nn.LayerNorm(features)
        self.mlp = nn.Sequential(nn.Linear(features, 8), nn.ReLU(), nn.Linear(8, 64))
        self.alpha = nn.Parameter(torch.tensor([0.7]))

    def forward(self, features_BF):
        normed = self.ln_feats(features_BF) if hasattr(self, "ln_feats") else features_BF
        return self.alpha * self.mlp(normed)


def released_adapters(layer_norm, **sizes):
    torch.manual_seed(2)
    made = {f"{name}_adapter": ReleasedAdapter(size, layer_norm) for name, size in sizes.items()}
    return shaken(nn.ModuleDict(made))


@pytest.mark.parametrize(("layer_norm", "sizes"), [(False, {"video": 12, "audio": 20}), (True, {"audio": 20})])
def test_released_adapters_go_onto_a_checkpoint(lora, batch, tmp_path, layer_norm, sizes):
    adapters = released_adapters(layer_norm, **sizes)
    torch.save(adapters.state_dict(), tmp_path / "bam.pt")
    release = Release(onto=str(lora[1]), dataset="urfunny", pooling="mean")
    merge_released(tmp_path / "bam.pt", tmp_path / "out", release, dtype="float32")
    loaded = OmniSapiens.from_pretrained(tmp_path / "out").eval()
    ours = loaded.bam.adapters("urfunny")
    for name, size in sizes.items():
        features = torch.randn(3, size)
        assert torch.allclose(ours.adapter(name)(features), adapters[f"{name}_adapter"](features), atol=1e-6)
    assert ours.spec.descriptors.mode == "mean" and ours.spec.descriptors.published
    assert set(loaded.bam.datasets) == {"urfunny"}
    assert checkpoint.read_card(tmp_path / "out")["domains"] == ["emotion", "humour"]
    assert torch.allclose(loaded.classify(batch), lora[0].classify(batch), atol=1e-4)  # no row of urfunny


def test_further_released_adapters_stand_beside_the_first(lora, tmp_path):
    for number, key in enumerate(("urfunny", "mmsd"), 1):
        torch.save(released_adapters(False, audio=5).state_dict(), tmp_path / f"{key}.pt")
        onto = str(lora[1]) if number == 1 else str(tmp_path / "out1")
        merge_released(tmp_path / f"{key}.pt", tmp_path / f"out{number}", Release(onto=onto, dataset=key))
    assert set(OmniSapiens.from_pretrained(tmp_path / "out2").bam.datasets) == {"urfunny", "mmsd"}


def test_a_whole_released_model_with_adapters_is_read_in_one_go(released, backbone, tmp_path):
    state = released.state_dict() | released_adapters(False, video=6).state_dict()
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="--adapters-of"):
        merge_released(tmp_path, tmp_path / "out", Release(backbone=str(backbone)))
    with pytest.raises(InputError, match="more than adapters"):
        merge_released(tmp_path, tmp_path / "out", Release(onto=str(backbone), dataset="mmsd"))
    merge_released(tmp_path, tmp_path / "out", Release(backbone=str(backbone), dataset="mmsd"))
    assert set(OmniSapiens.from_pretrained(tmp_path / "out").bam.datasets) == {"mmsd"}


BAM_CHANGES = {
    "unknown keys: audio_adapter.mlp.4.bias": lambda s: s | {"audio_adapter.mlp.4.bias": torch.zeros(2)},
    "missing keys: audio_adapter.alpha": lambda s: {k: v for k, v in s.items() if k != "audio_adapter.alpha"},
    r"mlp.2.weight is \[9, 8\], expected \[64, 8\]": lambda s: s | {"audio_adapter.mlp.2.weight": torch.zeros(9, 8)},
    "more than adapters: optimizer": lambda s: s | {"optimizer": torch.zeros(1)},
}


@pytest.mark.parametrize("message", BAM_CHANGES)
def test_keys_of_adapters_that_do_not_fit_are_named(lora, tmp_path, message):
    torch.save(BAM_CHANGES[message](released_adapters(False, audio=5).state_dict()), tmp_path / "bam.pt")
    with pytest.raises(InputError, match=message):
        merge_released(tmp_path / "bam.pt", tmp_path / "out", Release(onto=str(lora[1]), dataset="urfunny"))


def test_adapters_are_not_put_on_a_plain_backbone(backbone, tmp_path):
    torch.save(released_adapters(False, audio=5).state_dict(), tmp_path / "bam.pt")
    with pytest.raises(InputError, match="no heads"):
        merge_released(tmp_path / "bam.pt", tmp_path / "out", Release(onto=str(backbone), dataset="urfunny"))


def test_the_language_head_of_stage_2_is_in_the_merged_model(lora, tmp_path):
    folder = tmp_path / "staged"
    checkpoint.link(lora[1], folder)
    model = OmniSapiens.from_pretrained(folder)
    model.untie_lm_head()
    with torch.no_grad():
        model.transformer.lm_head.weight.add_(0.5)
    checkpoint.save_lm_head(model.transformer.lm_head.weight, folder)
    merge_checkpoint(folder, tmp_path / "out", dtype="float32")
    plain = Thinker.from_pretrained(tmp_path / "out")
    assert torch.equal(plain.lm_head.weight, model.transformer.lm_head.weight)
    assert not torch.equal(plain.lm_head.weight, plain.get_input_embeddings().weight)


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_merges(lora, tmp_path):
    from typer.testing import CliRunner

    from hba.cli import app

    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["merge", str(lora[1]), str(out), "--dtype", "float32", "--json"])
    assert (done.exit_code, json.loads(done.stdout)) == (0, {"model": str(out)})
    assert (out / "config.json").is_file()
