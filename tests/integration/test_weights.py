"""Weights that are missing, foreign, cut off or of another kind are one clear error before a model is built; what a
published model has beside its thinker is silent."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import BertConfig, BertModel, BertTokenizer, Qwen2_5OmniThinkerForConditionalGeneration
from transformers.modeling_layers import GradientCheckpointingLayer

from hba.atlas import open_atlas
from hba.batch.config import EncodeConfig
from hba.batch.encode import Encoder, collate
from hba.batch.pool import DescriptorConfig
from hba.embedding import Embedder
from hba.errors import InputError
from hba.model import OmniSapiens, checkpoint
from hba.model.bam import AdapterSpec, Bam, load_bam, save_bam
from hba.model.config import ModelConfig, computes_bfloat16
from hba.model.omni import apply_strategy
from hba.model.weights import INDEX, Piece, Weights, give_precision, write_weights
from hba.train.config import TrainConfig
from hba.train.ranks import prepare_model, whole_weights
from hba.train.sft import sft_loss

sys.path.insert(0, str(Path(__file__).parent.parent))
import tiny_chat

Thinker = Qwen2_5OmniThinkerForConditionalGeneration
LAYER = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(backbone, tmp_path):
    """A copy of the tiny backbone."""
    return Path(shutil.copytree(backbone, tmp_path / "backbone"))


def rewrite(file, change):
    """Replace the tensors of a file by `change` of them."""
    save_file({k: t.contiguous() for k, t in change(load_file(file)).items()}, file, metadata={"format": "pt"})


def without(*names):
    return lambda tensors: {k: t for k, t in tensors.items() if k not in names}


def as_published(tensors):
    """The names of the release, which also speaks."""
    spoken = {"talker.thinker_to_talker_proj.weight": torch.zeros(2), "token2wav.code2wav_dit_model.x": torch.zeros(2)}
    return {f"thinker.{name}": tensor for name, tensor in tensors.items()} | spoken


CHANGES = {
    r"1 of the \d+ weights of Qwen2_5OmniThinkerFor\w+ are missing: model.layers.1.mlp.up_proj.weight": without(LAYER),
    r"\d\d weights are not known to \w+: encoder\.\w+\.": lambda s: {f"encoder.{k}": t for k, t in s.items()},
    r"1 weight is not known to \w+: model.layers.0.extra": lambda s: s | {"model.layers.0.extra": torch.zeros(2)},
    r"model.layers.1.mlp.up_proj.weight is \[3, 64\], expected \[128, 64\]": lambda s: s | {LAYER: torch.zeros(3, 64)},
    r"up_proj.weight is I32, expected floating-point": lambda s: s | {LAYER: torch.zeros(128, 64, dtype=torch.int32)},
}


@pytest.mark.parametrize("message", CHANGES)
@pytest.mark.parametrize("load", [OmniSapiens.from_pretrained, partial(OmniSapiens.from_pretrained, heads=False)])
def test_weights_that_do_not_fit_are_named_before_anything_is_built(folder, message, load, monkeypatch):
    rewrite(folder / "model.safetensors", CHANGES[message])
    monkeypatch.setattr(Thinker, "from_pretrained", lambda *_, **__: pytest.fail("a model was built"))
    with pytest.raises(InputError, match=message) as refused:
        load(folder)
    assert str(folder) in str(refused.value)


def test_what_a_published_model_speaks_with_is_left_out_without_a_word(folder, backbone, capfd, caplog):
    rewrite(folder / "model.safetensors", as_published)
    inner = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_5_omni", "thinker_config": inner}))
    weights, expected = (OmniSapiens.from_pretrained(each).transformer.state_dict() for each in (folder, backbone))
    assert weights.keys() == expected.keys() and all(torch.equal(weights[key], expected[key]) for key in weights)
    out, err = capfd.readouterr()
    assert "talker" not in out + err + caplog.text and "UNEXPECTED" not in out + err + caplog.text


def test_a_model_that_does_not_chat_is_refused(tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=16, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"no chat model of type 'bert' in transformers"):
        OmniSapiens.from_pretrained(tmp_path)


def sharded(folder):
    """Lay the weights of a folder out in shards, with an index."""
    Thinker.from_pretrained(folder).save_pretrained(folder, max_shard_size="200KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    return folder / INDEX


def test_shards_that_are_missing_or_cut_off_are_named(folder):
    index = sharded(folder)
    parts = sorted(folder.glob("model-*.safetensors"))
    assert len(parts) > 2 and OmniSapiens.from_pretrained(folder)
    whole = parts[1].read_bytes()
    for size in (0, 4, 20, len(whole) // 2):
        parts[1].write_bytes(whole[:size])
        with pytest.raises(InputError, match=rf"{parts[1].name}: cannot load backbone: damaged weights"):
            OmniSapiens.from_pretrained(folder)
    parts[1].unlink()
    with pytest.raises(InputError, match=rf"files of the model are missing: {parts[1].name}"):
        OmniSapiens.from_pretrained(folder)
    index.write_text("{}")
    with pytest.raises(InputError, match="no index of weights"):
        OmniSapiens.from_pretrained(folder)


def test_a_file_that_is_cut_off_while_it_is_read_is_an_error_and_not_the_end_of_the_process(folder):
    weights = Weights.of(folder)
    name = max(weights.stored, key=lambda key: weights.stored[key].start)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-64])
    with pytest.raises(InputError, match="cut off while it was read"):
        weights.read(name)


def test_pickled_weights_are_not_read(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"pytorch_model.bin is not read"):
        OmniSapiens.from_pretrained(folder)


def test_files_are_written_piece_by_piece_and_read_back_to_the_bit(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(7, 5, dtype=torch.bfloat16),
        "b": torch.arange(3),
        "c": torch.randn(9),
        "d": torch.zeros(0, 2),
        "e": torch.tensor(1.5, dtype=torch.float16),
    }

    def piece(name, step=4):
        tensor = tensors[name]
        return Piece(name, tensor.dtype, tuple(tensor.shape), lambda: tensor.reshape(-1).split(step))

    write_weights(tmp_path / ".", [[piece("a"), piece("b")], [], [piece("c"), piece("d"), piece("e")]])
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted(file.name for file in tmp_path.iterdir()) == [*names, INDEX]
    theirs = load_file(tmp_path / names[0]) | load_file(tmp_path / names[1])
    weights = Weights.of(tmp_path)
    for name, tensor in tensors.items():
        assert torch.equal(theirs[name], tensor) and theirs[name].dtype == tensor.dtype
        assert torch.equal(weights.read(name), tensor)
        assert torch.equal(torch.cat([*weights.blocks(name, 8), tensor.new_zeros(0)]), tensor.reshape(-1))
    with pytest.raises(ValueError, match="a: 4 bytes for 70"):
        write_weights(tmp_path, [[Piece("a", torch.bfloat16, (7, 5), lambda: [torch.zeros(2)])]])


# --- what was trained ------------------------------------------------------------------------------------------------


@pytest.fixture
def lora(backbone, tmp_path):
    """A checkpoint with LoRA, an lm_head of its own and adapters of one dataset."""
    torch.manual_seed(0)
    model = apply_strategy(OmniSapiens.from_pretrained(backbone), ModelConfig(name=str(backbone), lora_r=4))
    model.own_lm_head = True
    model.untie_lm_head()
    model.save_pretrained(tmp_path / "ck", backbone=str(backbone), strategy="lora", encode=EncodeConfig())
    return tmp_path / "ck"


def renamed(tensors):
    return {name.replace("layers.2", "layers.7"): tensor for name, tensor in tensors.items()}


def wider(tensors):
    return {name: torch.zeros(8, *t.shape[1:]) if "lora_A" in name else t for name, t in tensors.items()}


ADAPTER = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
DAMAGE = [
    (checkpoint.ADAPTER, without(ADAPTER), r"1 weight of the adapter is missing: model.layers.0.mlp.up_proj.lora_B"),
    (checkpoint.ADAPTER, renamed, r"\d+ weights of the adapter are missing: model.layers.2"),
    (checkpoint.ADAPTER, lambda s: s | {"x.lora_A.weight": torch.zeros(2)}, "adapter is unknown: x.lora_A"),
    (checkpoint.ADAPTER, wider, r"lora_A.weight is \[8, 64\], expected \[4, 64\]"),
    (checkpoint.LM_HEAD, lambda s: {"weight": s["weight"][:5]}, r"cannot load the lm_head: .*found .*\[5, 64\]"),
    (checkpoint.LM_HEAD, lambda s: {"other": s["weight"]}, r"cannot load the lm_head: expected weight"),
    (checkpoint.HEADS, without("linear.humour.bias"), r"cannot load the heads \(.*linear.humour.bias"),
    (checkpoint.HEADS, lambda s: {k: t.to(torch.int32) for k, t in s.items()}, "the heads: no floating-point numbers"),
    (checkpoint.HEADS, lambda s: {k: t[..., :32] if t.ndim > 1 else t for k, t in s.items()}, "states of 32 numbers"),
]


@pytest.mark.parametrize(("file", "change", "message"), DAMAGE)
def test_what_was_trained_and_is_not_whole_is_named(lora, file, change, message):
    assert OmniSapiens.from_pretrained(lora).own_lm_head
    rewrite(lora / file, change)
    with pytest.raises(InputError, match=message) as refused:
        OmniSapiens.from_pretrained(lora)
    assert file in str(refused.value)


@pytest.mark.parametrize("size", [0, 100])
def test_a_cut_adapter_is_named_before_its_backbone_is_loaded(lora, size, monkeypatch):
    whole = (lora / checkpoint.ADAPTER).read_bytes()
    (lora / checkpoint.ADAPTER).write_bytes(whole[:size])
    monkeypatch.setattr(Thinker, "from_pretrained", lambda *_, **__: pytest.fail("a model was built"))
    with pytest.raises(InputError, match=rf"{checkpoint.ADAPTER}: cannot load the adapter: damaged weights"):
        OmniSapiens.from_pretrained(lora)


def test_an_adapter_that_lacks_a_part_of_what_it_measured_is_named(tmp_path):
    spec = AdapterSpec(
        dataset="tess", dims={"audio": 3, "video": 2}, hidden=4, dropout=0.0, modality_dropout=0.0, layer_norm=False,
        descriptors=DescriptorConfig(),
    )  # fmt: skip
    save_bam(Bam([spec], 8), tmp_path)
    file = tmp_path / "bam" / "tess.safetensors"
    whole = load_file(file)
    rewrite(file, lambda s: {k: t for k, t in s.items() if "center" not in k and "scale" not in k})
    assert load_bam(tmp_path, 8) is not None  # as the authors released theirs
    save_file({k: t for k, t in whole.items() if k != "audio_adapter.scale"}, file)
    with pytest.raises(InputError, match=r"cannot load the adapters .*audio_adapter.scale"):
        load_bam(tmp_path, 8)


@pytest.mark.parametrize("family", tiny_chat.FAMILIES)
def test_a_chat_model_that_is_not_whole_is_refused(family, backbone, tmp_path):
    place = tiny_chat.build(family, backbone, tmp_path / "base")
    file = place / "model.safetensors"
    gone = next(name for name in sorted(load_file(file)) if "mlp" in name and name.endswith("weight"))
    rewrite(file, without(gone))
    with pytest.raises(InputError, match=r"cannot load backbone: 1 of the .* weights of .* are missing"):
        OmniSapiens.from_pretrained(place, heads=False)


# --- shards ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone, whose models are sharded as those of many."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield SimpleNamespace(is_main_process=True)
    torch.distributed.destroy_process_group()


def shard(model):
    mesh = init_device_mesh("cpu", (1,))
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.fixture
def halved(backbone, tmp_path):
    """The tiny backbone in bfloat16, as models are published."""
    model = Thinker.from_pretrained(backbone, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "halved")
    OmniSapiens.from_pretrained(backbone).processor.save_pretrained(tmp_path / "halved")
    return tmp_path / "halved"


def places(parameters):
    """The files that parameters are mapped from; None for memory of this process."""
    found = set()
    spans = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    files = [(*(int(end, 16) for end in span[0].split("-")), span[5]) for span in spans if len(span) == 6]
    for parameter in parameters:
        names = [name for start, stop, name in files if start <= parameter.data_ptr() < stop and "/" in name]
        found.add(Path(names[0]).name if names else None)
    return found


def test_a_model_that_will_be_sharded_stays_in_its_files_and_then_is_what_a_loaded_one_is(halved, group):
    mapped = OmniSapiens.from_pretrained(halved, dtype="float32", mapped=True)
    assert places(mapped.transformer.parameters()) == {"model.safetensors"}
    assert {p.dtype for p in mapped.transformer.parameters()} == {torch.bfloat16}
    apply_strategy(mapped, ModelConfig(name="x", strategy="full"))
    shard(mapped)
    give_precision(mapped)
    loaded = OmniSapiens.from_pretrained(halved, dtype="float32")
    assert places(loaded.transformer.parameters()) == {None}
    expected = dict(loaded.transformer.named_parameters())
    for name, parameter in mapped.transformer.named_parameters():
        assert torch.equal(parameter.full_tensor(), expected[name]) and parameter.dtype == torch.float32
    assert mapped.transformer.lm_head.weight is mapped.transformer.get_input_embeddings().weight
    assert all(parameter.requires_grad for parameter in mapped.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_begins_alike_on_a_model_that_is_mapped_and_is_never_rounded(halved, backbone, dtype):
    config, fresh = ModelConfig(name="x", lora_r=4), []
    for name, mapped in ((halved, True), (halved, False), (backbone, False)):
        torch.manual_seed(0)
        model = apply_strategy(OmniSapiens.from_pretrained(name, dtype=dtype, mapped=mapped), config)
        give_precision(model)
        fresh.append({name: p for name, p in model.named_parameters() if "lora_" in name})
        base = {p.dtype for name, p in model.transformer.named_parameters() if "lora_" not in name}
        assert base == {getattr(torch, dtype)}
    for other in fresh[1:]:
        assert fresh[0].keys() == other.keys() and all(torch.equal(fresh[0][key], other[key]) for key in other)
    assert {p.dtype for p in fresh[0].values()} == {torch.float32}
    assert any(not torch.equal(p, p.bfloat16().float()) for p in fresh[0].values())


def test_one_process_that_was_launched_as_many_are_holds_its_one_shard(halved, group):
    """So that one GPU can show what sharding does."""
    mapped = OmniSapiens.from_pretrained(halved, dtype="float32", mapped=True)
    apply_strategy(mapped, ModelConfig(name="x", strategy="full"))
    prepared = prepare_model(mapped, Accelerator(cpu=True), TrainConfig(sharding="full"))
    expected = dict(OmniSapiens.from_pretrained(halved, dtype="float32").transformer.named_parameters())
    for name, parameter in prepared.transformer.named_parameters():
        assert isinstance(parameter, DTensor) and torch.equal(parameter.full_tensor(), expected[name])


@pytest.fixture
def in_bfloat16():
    AcceleratorState._reset_state(reset_partial_state=True)  # a process has one precision; this one began in float32
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


def passed(backbone, mini_atlas, accelerator, **how):
    """A training pass of everything over three rows: the model, its loss, and the bytes kept for the backward pass."""
    torch.manual_seed(0)
    model = OmniSapiens.from_pretrained(backbone, dtype="float32")
    model.untie_lm_head()
    model = prepare_model(model.train(), accelerator, TrainConfig(**how))
    rows = open_atlas(mini_atlas, split="train").filter(datasets=["tess"])
    small = EncodeConfig(num_frames=2, min_pixels=3136, max_pixels=3136)
    encoder = Encoder(model.processor, small, rows.taxonomy, answers=True)
    batch = collate([encoder.encode(rows[i]) for i in range(3)], pad_token_id=encoder.pad_token_id)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = sft_loss(model, batch, answer_weight=1.0)
    whole = "sharding" not in how
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters() if whole}
    return model, loss, sum(storage.nbytes() for place, storage in kept.items() if place not in weights)


@pytest.mark.parametrize("recomputed", [False, True])
def test_sharded_training_in_bfloat16_keeps_no_copy_of_a_gathered_weight(
    backbone, mini_atlas, group, in_bfloat16, recomputed
):
    """And the pass in which nothing is rounded that autocast would not round, with the embeddings given back."""
    how = {"activation_checkpointing": recomputed}
    whole, expected, with_copies = passed(backbone, mini_atlas, in_bfloat16, **how)
    model, loss, kept = passed(backbone, mini_atlas, in_bfloat16, sharding="full", **how)
    assert loss.item() == expected.item()
    layers, head = model.transformer.model.layers, model.transformer.lm_head
    inside = sum(p.numel() for p in layers.parameters() if p.ndim == 2)
    copied = head.weight.numel() + (0 if recomputed else inside)
    assert with_copies - kept > 0.9 * 2 * copied
    still = {n: p for n, p in model.named_parameters() if not isinstance(p, DTensor)}
    assert not [name for name in still if "layers." in name or "blocks." in name or "embed_tokens" in name]
    loss.backward()
    expected.backward()
    for name, parameter in model.named_parameters():
        theirs = whole.get_parameter(name).grad
        assert (parameter.grad is None) == (theirs is None), name
        if theirs is not None:
            assert parameter.grad.dtype == torch.float32
            assert (parameter.grad.full_tensor() - theirs).abs().max() <= 1e-5 + 1e-2 * theirs.abs().max(), name


GATHERED = {
    "lora": lambda name: "lora_" in name or name.startswith("heads.") or name == "transformer.lm_head.weight",
    "heads": lambda name: name.startswith("heads.") or name == "transformer.lm_head.weight",
    "full": lambda name: True,
}


@pytest.mark.parametrize("strategy", GATHERED)
def test_saving_a_sharded_model_gathers_what_its_checkpoint_holds_and_no_more(
    backbone, tmp_path, group, strategy, monkeypatch
):
    model = OmniSapiens.from_pretrained(backbone)
    model.own_lm_head = True
    model.untie_lm_head()
    apply_strategy(model, ModelConfig(name="x", strategy=strategy, lora_r=4))
    if strategy == "full":  # parts of a model that trains may be frozen: RL trains the language model alone
        model.transformer.visual.requires_grad_(False)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    shard(model)
    names = {id(p): name for name, p in model.named_parameters()}
    gathered, full_tensor = set(), DTensor.full_tensor
    monkeypatch.setattr(DTensor, "full_tensor", lambda self: gathered.add(names[id(self)]) or full_tensor(self))
    with whole_weights(model, group):
        model.save_pretrained(tmp_path / "ck", backbone=str(backbone), strategy=strategy, encode=EncodeConfig())
    assert gathered == {name for name in names.values() if GATHERED[strategy](name)}
    saved = dict(OmniSapiens.from_pretrained(tmp_path / "ck").named_parameters())
    assert saved.keys() == expected.keys() and all(torch.equal(saved[name], expected[name]) for name in expected)


# --- other models ----------------------------------------------------------------------------------------------------


@pytest.fixture
def encoder(tmp_path):
    """A tiny sentence encoder with neither its pooler nor only its own names."""
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]))
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=7, **sizes), add_pooling_layer=False).save_pretrained(tmp_path / "bert")
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    rewrite(tmp_path / "bert" / "model.safetensors", lambda s: s | {"cls.predictions.bias": torch.zeros(7)})
    return tmp_path / "bert"


def test_a_sentence_encoder_needs_every_weight_that_it_uses(encoder, capfd):
    assert Embedder(str(encoder)).embed(["a b", "b"]).shape == (2, 16)
    said = capfd.readouterr().err
    assert not [word for word in ("UNEXPECTED", "MISSING", "not sharded") if word in said]
    rewrite(encoder / "model.safetensors", without("encoder.layer.1.output.dense.weight"))
    with pytest.raises(InputError, match=r"cannot load the sentence encoder .*1 of the .*encoder.layer.1.output.dense"):
        Embedder(str(encoder))


@pytest.mark.parametrize(
    ("capability", "computes"),
    [(None, False), ((6, 0), False), ((7, 0), False), ((7, 5), False), ((8, 0), True), ((8, 9), True), ((9, 0), True)],
)
def test_bfloat16_that_a_gpu_emulates_does_not_count(capability, computes):
    """V100 is 7.0, T4 7.5, A100 8.0, L4 8.9, H100 9.0."""
    assert computes_bfloat16(capability) is computes
