"""A tiny model of every family through every stage, and the table of docs/models.md: what each hears and sees."""

import json
import math
import re
import shutil
import sys
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from transformers import AutoTokenizer, PhiConfig, PhiForCausalLM

import hba as package
from hba import open_atlas
from hba.batch.config import EncodeConfig
from hba.batch.encode import IGNORED, Encoder, collate, perceived
from hba.config import load_config
from hba.errors import ConfigError, InputError
from hba.evaluate.answers import opened_thinking
from hba.evaluate.config import PredictConfig
from hba.evaluate.predict import predict_run
from hba.evaluate.predictions import read_predictions
from hba.model import OmniSapiens, checkpoint
from hba.model.config import ModelConfig
from hba.model.generate import choice_logps
from hba.model.merge import merge_checkpoint
from hba.model.omni import apply_strategy, compile_layers, recompute_layers
from hba.model.tiny import FAMILIES, TEXT_TEMPLATE, TinySizes
from hba.model.weights import language_layers, linear_names, skeleton
from hba.rl.config import RlConfig
from hba.rl.local import train_rl
from hba.run import RunFolder
from hba.storage import read_jsonl
from hba.train.bam import train_bam
from hba.train.config import BamConfig, LmConfig, QaConfig, SftConfig
from hba.train.lm import train_lm
from hba.train.loop import answer_at_once
from hba.train.qa import train_qa
from hba.train.sft import sft_loss, train_sft

sys.path.insert(0, str(Path(__file__).parent.parent))
import tiny_chat

DOC = Path(package.__file__).parents[2] / "docs" / "models.md"
DATASETS = ("daicwoz", "siq2", "tess")  # clips with sound and descriptors, of classes and free-form; sound alone
LORA = ["model.strategy=lora", "model.lora_r=2", "model.dtype=float32", "encode.num_frames=2", "loader.workers=0"]
HEARD = {"phi4": ["audio"]}  # each of its pictures has 545 tokens: one pass sees them
SEEN = ["encode.min_pixels=3136", "encode.max_pixels=3136"]
STEPS = ["train.max_steps=2", "train.batch_size=4", "train.learning_rate=1e-2", "train.log_every=1"]
FEATURES = ["dtype=float32", "features.loader.workers=0", "features.batch_size=4", *STEPS]
SPOKEN = ["rollout.per_prompt=2", "rollout.max_new_tokens=4", "train.max_steps=2", "train.batch_size=2"]
STAGES = {
    "sft": (SftConfig, train_sft, [*LORA, *SEEN, *STEPS, "validation_batch_size=4", "answer_weight=1"]),
    "lm": (LmConfig, train_lm, [*LORA, *SEEN, *STEPS, "validation_batch_size=4"]),
    "qa": (QaConfig, train_qa, FEATURES),
    "bam": (BamConfig, train_bam, [*FEATURES, "datasets=[daicwoz,siq2]", "adapter_learning_rate=1e-2"]),
    "rl": (RlConfig, train_rl, [*LORA, *SEEN, *SPOKEN, "validation_rows=2", "validation_batch_size=2"]),
}
# Gemma 3n hands on four states a token; a pass of Phi-4 that gives all states spoils what it sees in later ones.
SHORTER = ("gemma3n", "phi4")
NEEDED = {"gemma3n": "timm", "smolvlm": "num2words"}  # a tower; numbers of frames in words
LACKING = [family for family, package in NEEDED.items() if not find_spec(package)]
PRESENT = [family for family in FAMILIES if family not in LACKING]
# These also see batches of pictures, clips and both.
MIXED = ("qwen3.5", "internvl", "llava-onevision", "smolvlm", "glm4v", "lfm2-vl", "music-flamingo")
BITS = {"nf4": torch.uint8, "int8": torch.int8}
REWARD = "def length(responses, **_):\n    return [float(len(text)) for text in responses]\n"


@pytest.fixture(scope="module")
def atlas(tmp_path_factory, mini_atlas):
    """The first rows of three datasets."""
    out = tmp_path_factory.mktemp("families") / "atlas"
    shutil.copytree(mini_atlas, out, copy_function=lambda source, to: Path(to).hardlink_to(source))
    for split, count in (("train", 2), ("validation", 1), ("test", 1)):
        rows = [json.loads(line) for line in (out / f"{split}.jsonl").read_text().splitlines()]
        kept = [row for key in DATASETS for row in [row for row in rows if row["dataset"] == key][:count]]
        (out / f"{split}.jsonl").unlink()
        (out / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    return out


class Runs:
    """The stages of every family, each run when it is first asked for."""

    def __init__(self, folder, atlas, backbone):
        self.folder, self.atlas, self.backbone = folder, atlas, backbone
        (folder / "rewards.py").write_text(REWARD)

    def model(self, family):
        out = self.folder / family / "model"
        return out if out.is_dir() else tiny_chat.build(family, self.backbone, out)

    def of(self, family, stage, *more):
        run = self.folder / family / " ".join((stage, *more))
        if not run.is_dir():
            kind, work, own = STAGES[stage]
            if stage in ("qa", "bam"):
                base = [f"base={self.of(family, 'sft')}"]
            else:
                seen = ", ".join(HEARD.get(family, FAMILIES[family].modalities))
                base = [f"model.name={self.of(family, 'lm', *more) if stage == 'rl' else self.model(family)}"]
                base.append(f"encode.modalities=[{seen}]")
            if stage == "rl":
                base.append(f"reward.function={self.folder / 'rewards.py'}:length")
            config = load_config(kind, None, [f"atlas={self.atlas}", *own, *base, *more])
            with RunFolder.open(run, config=config, command=f"train {stage}", seed=0) as opened:
                work(config, opened)
        return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory, atlas, backbone):
    return Runs(tmp_path_factory.mktemp("runs"), atlas, backbone)


def weights(run, name):
    return load_file(checkpoint.resolve(run) / name)


def steps(run):
    return [line.record for line in read_jsonl(run / "log.jsonl") if line.record["kind"] == "train"]


def batch_of(model, family, atlas, *, answers=False, datasets=None, seen=None, only=None):
    how = {"modalities": seen or FAMILIES[family].modalities}
    config = EncodeConfig(num_frames=2, min_pixels=3136, max_pixels=3136, **how)
    rows = open_atlas(atlas, split="train")
    encoder = Encoder(model.processor, config, rows.taxonomy, answers=answers)
    chosen = [s for s in rows if datasets is None or s.dataset in datasets]
    encoded = [encoder.encode(s) for s in (chosen if only is None else chosen[only : only + 1])]
    return collate(encoded, pad_token_id=encoder.pad_token_id, taxonomy=rows.taxonomy)


def test_the_table_of_the_docs_says_what_each_family_hears_and_sees(runs):
    rows = re.findall(r"^\| `([\w.-]+)` \| [^|]+ \| (\w+) \| (\w+) \| (\w+) \|", DOC.read_text(), re.M)
    assert [family for family, *_ in rows] == list(FAMILIES)
    for family, *said in rows:
        if family in LACKING:
            continue
        known = perceived(checkpoint.load_processor(runs.model(family)))
        assert known == FAMILIES[family].modalities
        assert [word != "no" for word in said] == [kind in known for kind in ("image", "video", "audio")], family


def of_one_layer_less(transformer, batch):
    """What the model hands to its last norm when its last layer does nothing."""
    prefix, layers = language_layers(transformer)
    norm, noted = transformer.get_submodule(f"{prefix}norm"), []
    handles = [
        layers[-1].register_forward_hook(lambda _, args, out: args[0]),
        norm.register_forward_pre_hook(lambda _, args: noted.append(args[0])),
    ]
    with torch.no_grad():
        transformer(**batch.inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    return noted[0]


@pytest.mark.parametrize("family", PRESENT)
def test_states_and_logits_are_those_of_the_whole_model_and_what_no_answer_needs_does_not_run(runs, atlas, family):
    model = OmniSapiens.from_pretrained(runs.model(family), dtype="float32").eval()
    batch = batch_of(model, family, atlas, answers=True)
    plain = batch_of(model, family, atlas, datasets=("daicwoz", "tess"))
    called = []
    for part in (language_layers(model.transformer).layers[-1], model.transformer.get_output_embeddings()):
        part.register_forward_hook(lambda module, *_: called.append(type(module).__name__))
    with torch.no_grad():
        alone = model(plain)
        assert called == []
        found = model(batch)
        assert len(called) == 2
        told = {"output_hidden_states": True} if family not in SHORTER else {}
        whole = model.transformer(**batch.inputs, use_cache=False, **told)
    state_BTH = whole.hidden_states[-2] if told else of_one_layer_less(model.transformer, batch)
    mask_BT1 = batch.prompt_mask.unsqueeze(-1)
    pooled_BH = (state_BTH * mask_BT1).sum(1) / mask_BT1.sum(1)
    torch.testing.assert_close(found.pooled_BH, pooled_BH, atol=1e-6, rtol=1e-5)
    said_NV = whole.logits[:, :-1][batch.labels_BT[:, 1:] != IGNORED]
    torch.testing.assert_close(found.answer_logits_NV, said_NV, atol=1e-6, rtol=1e-5)
    kept = [i for i, sample in enumerate(batch.samples) if sample.label is not None]
    torch.testing.assert_close(alone.logits_BC, found.logits_BC[kept], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen2.5-omni", "gemma4"])
def test_of_a_prompt_the_logits_of_its_last_token_alone_are_computed(runs, atlas, family):
    model = OmniSapiens.from_pretrained(runs.model(family), dtype="float32", heads=False).eval()
    batch, positions = batch_of(model, family, atlas), []
    head = model.transformer.get_output_embeddings()
    hook = head.register_forward_hook(lambda _, __, logits: positions.append(logits.shape[1]))
    model.generate(batch, max_new_tokens=3)
    assert positions and set(positions) == {1}
    positions.clear()
    model.logps(batch, [["sad", "not sad at all"]] * len(batch))
    hook.remove()
    assert positions[0] == 1 and max(positions) < 20 < batch.inputs["input_ids"].shape[1]


def steps_of(model, batch, **how):
    """Loss and gradients of one training step, how often each layer was run, and what was kept for it by precision."""
    counts, kept = {}, {}
    for name, module in model.named_modules():
        if re.search(r"(layers|blocks)\.\d+$", name):
            module.register_forward_pre_hook(lambda *_, name=name: counts.update({name: counts.get(name, 0) + 1}))

    def keep(tensor):
        if tensor.requires_grad or tensor.ndim == 3:
            kept[tensor.dtype] = kept.get(tensor.dtype, 0) + tensor.numel()
        return tensor

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", **how):
        loss = sft_loss(model.train(), batch, answer_weight=1.0)
    loss.backward()
    return float(loss.detach()), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, counts, kept


@pytest.mark.parametrize("strategy", ["lora", "full"])
def test_layers_are_computed_twice_only_where_something_below_trains(runs, atlas, strategy):
    found = []
    for twice in (False, True):
        torch.manual_seed(1)
        model = OmniSapiens.from_pretrained(runs.model("qwen2.5-omni"), dtype="float32")
        apply_strategy(model, ModelConfig(name="x", strategy=strategy, lora_r=2, lora_dropout=0.0))
        if twice:
            recompute_layers(model.transformer)
        found.append(steps_of(model, batch_of(model, "qwen2.5-omni", atlas, answers=True), enabled=False))
    (loss, gradients, once, _), (same, again, runs_of, _) = found
    assert loss == same and gradients.keys() == again.keys()
    assert all(torch.allclose(gradients[name], again[name], atol=1e-6) for name in gradients)
    towers = {name for name in once if "visual" in name or "audio_tower" in name}
    assert towers and set(once) - towers
    assert {runs_of[name] for name in towers} == {1 if strategy == "lora" else 2}
    assert {runs_of[name] for name in set(once) - towers} == {2}


def test_what_deals_tokens_out_to_experts_stays_as_it_is(backbone):
    made = FAMILIES["gemma4"].make(AutoTokenizer.from_pretrained(backbone), TinySizes())
    more = {"enable_moe_block": True, "num_experts": 16, "top_k_experts": 2, "moe_intermediate_size": 32}
    for name, value in more.items():
        setattr(made.config.text_config, name, value)
    model = skeleton(made.model_class, made.config)
    assert any("router.proj" in name for name, _ in model.named_modules())
    assert linear_names(model) and not [name for name in linear_names(model) if "router" in name]


def test_lora_keeps_no_copy_of_its_inputs_in_float32_under_autocast(runs, atlas, monkeypatch):
    """The same loss and gradients, to the bit, with fewer numbers kept in float32."""
    found = []
    for cast in (True, False):
        torch.manual_seed(1)
        model = OmniSapiens.from_pretrained(runs.model("qwen2.5-omni"), dtype="bfloat16")
        apply_strategy(model, ModelConfig(name="x", lora_r=2, lora_dropout=0.5))
        with pytest.MonkeyPatch.context() as patch:
            if cast:
                patch.setattr("hba.model.omni.as_they_come", lambda _: nullcontext())
            batch = batch_of(model, "qwen2.5-omni", atlas, answers=True)
            found.append(steps_of(model, batch, dtype=torch.bfloat16))
    (loss, gradients, _, before), (same, again, _, after) = found
    assert loss == same and all(torch.equal(gradients[name], again[name]) for name in gradients)
    assert after[torch.float32] < 0.7 * before[torch.float32]


@pytest.mark.parametrize("family", PRESENT)
def test_sft(runs, family):
    run = runs.of(family, "sft")
    assert len(steps(run)) == 2
    trained = weights(run, checkpoint.ADAPTER)
    assert any(bool(tensor.any()) for name, tensor in trained.items() if "lora_B" in name)
    assert all("layers." in name for name in trained)
    assert not re.search("visual|vision|audio", " ".join(trained))


@pytest.mark.parametrize("family", PRESENT)
def test_lm(runs, family):
    run = runs.of(family, "lm")
    assert any(bool(tensor.any()) for name, tensor in weights(run, checkpoint.ADAPTER).items() if "lora_B" in name)
    assert checkpoint.read_card(checkpoint.resolve(run))["columns"] is None


def test_an_answer_is_learned_behind_thinking_that_is_over(runs):
    question = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]

    def prompt(processor):
        return processor.apply_chat_template(question, add_generation_prompt=True, tokenize=False)

    folders = runs.model("qwen3.5"), checkpoint.resolve(runs.of("qwen3.5", "lm"))
    before, after = map(checkpoint.load_processor, folders)
    assert opened_thinking(prompt(before)) == "<think>\n" and prompt(after) == f"{prompt(before)}\n</think>\n\n"
    before.chat_template = before.chat_template.replace("enable_thinking", "other")  # a template without the switch
    answer_at_once(before)
    assert prompt(before) == prompt(after)


@pytest.mark.parametrize("family", PRESENT)
def test_qa(runs, family):
    run = runs.of(family, "qa")
    before = OmniSapiens.from_pretrained(runs.of(family, "sft"), dtype="float32")
    after = OmniSapiens.from_pretrained(run, dtype="float32")
    heads = [model.transformer.get_output_embeddings().weight for model in (before, after)]
    assert not torch.equal(*heads) and after.own_lm_head
    words = [model.transformer.get_input_embeddings().weight for model in (before, after)]
    assert torch.equal(*words)


@pytest.mark.parametrize("family", PRESENT)
def test_bam(runs, atlas, family):
    before = OmniSapiens.from_pretrained(runs.of(family, "sft"), dtype="float32").eval()
    after = OmniSapiens.from_pretrained(runs.of(family, "bam"), dtype="float32").eval()
    assert set(after.bam.datasets) == {"daicwoz", "siq2"}
    batch = batch_of(before, family, atlas, datasets=("tess",))
    assert torch.equal(before.classify(batch), after.classify(batch))


@pytest.mark.parametrize("family", PRESENT)
def test_rl(runs, family):
    run, before = runs.of(family, "rl"), weights(runs.of(family, "lm"), checkpoint.ADAPTER)
    after = load_file(run / "checkpoints" / "step_2" / checkpoint.ADAPTER)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in after.items())


@pytest.mark.parametrize("family", PRESENT)
def test_predict_and_merge(runs, atlas, tmp_path, family):
    config = load_config(PredictConfig, None, ["loader.workers=0", "generation.max_tokens=4", "dtype=float32"])
    for stage, backend in (("qa", "heads"), ("rl", "hf")):
        run, merged = runs.of(family, stage), tmp_path / "merged" / stage
        merge_checkpoint(run, merged, dtype="float32")
        told = []
        for number, model in enumerate((run, merged)):
            out = tmp_path / f"{stage}{number}"
            options = {"atlas": str(atlas), "split": "test", "config": config, "progress": lambda _: None}
            predict_run(str(model), out, backend=backend, **options)
            told.append({p.id: (p.output, p.error) for p in read_predictions(out / "predictions.jsonl")})
        assert len(told[0]) == 3 and not any(error for _, error in told[0].values())
        assert told[0] == told[1]


@pytest.fixture(scope="module")
def pictured(atlas, tmp_path_factory):
    """A clip and a picture, two pictures, a clip alone, a sound alone."""
    out = tmp_path_factory.mktemp("families") / "pictured"
    shutil.copytree(atlas, out, copy_function=lambda source, to: Path(to).hardlink_to(source))
    rows = [json.loads(line) for line in (atlas / "train.jsonl").read_text().splitlines()]
    clip, sound = rows[0], next(row for row in rows if row["dataset"] == "tess")
    draw = np.random.default_rng(0)
    for number, size in enumerate(((90, 160, 3), (120, 60, 3))):
        Image.fromarray(draw.integers(0, 255, size, dtype=np.uint8)).save(out / f"{number}.png")
    both = clip | {"images": ["0.png"], "problem": f"<image>{clip['problem']}"}
    two = sound | {"images": ["0.png", "1.png"], "problem": f"<image><image>{sound['problem']}"}
    for row in (both, two):
        kinds = [kind for kind in ("image", "video", "audio") if row[f"{kind}s"]]
        row["modality_signature"] = "_".join(("text", *kinds))
    (out / "train.jsonl").unlink()
    (out / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (both, two, clip, sound)))
    return out


@pytest.mark.parametrize("family", [family for family in MIXED if family not in LACKING])
def test_beside_rows_of_other_media_a_row_is_what_it_is_alone(runs, atlas, pictured, tmp_path, family):
    run = runs.of(family, "sft")
    config = load_config(PredictConfig, None, ["loader.workers=0", "generation.max_tokens=2", "dtype=float32"])
    how = {"atlas": str(atlas), "split": "test", "backend": "heads", "config": config, "progress": lambda _: None}
    predict_run(str(runs.of(family, "bam")), tmp_path / "told", **how)
    told = list(read_predictions(tmp_path / "told" / "predictions.jsonl"))
    assert len(told) == 3 and not any(each.error for each in told)
    merge_checkpoint(run, tmp_path / "merged", dtype="float32")
    ours, merged = (OmniSapiens.from_pretrained(each, dtype="float32").eval() for each in (run, tmp_path / "merged"))
    batch, prompts = (batch_of(ours, family, pictured, answers=answers) for answers in (True, False))
    with torch.no_grad():
        found, expected = ours(batch), merged(batch)
    torch.testing.assert_close(found.answer_logits_NV, expected.answer_logits_NV, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.logits_BC, expected.logits_BC, atol=1e-4, rtol=1e-4)
    if family == "glm4v":
        assert int(batch.inputs["image_grid_thw"].prod(-1).max()) * 14 * 14 <= 3136  # encode.max_pixels
    # Beside others a row is what it is alone, and an answer from what was kept of its prompt as likely as in one pass.
    said = [row[row != IGNORED].tolist() for row in batch.labels_BT]
    logps_NV = found.answer_logits_NV.log_softmax(-1).split([len(each) for each in said])
    likely = [float(rows[range(len(each)), each].sum()) for rows, each in zip(logps_NV, said, strict=True)]
    kept = choice_logps(ours.transformer, prompts.inputs, [[each] for each in said])
    assert [logp for (logp,) in kept] == pytest.approx(likely, abs=1e-3)
    for row, whole_H in enumerate(found.pooled_BH):
        alone = batch_of(ours, family, pictured, only=row)
        torch.testing.assert_close(ours.pooled(alone)[0], whole_H, atol=1e-4, rtol=1e-4)


def quantised_step(runs, atlas, family, kind, batch=None):
    """A model of that kind after one step in bfloat16, which every trained weight has reached, and its batch."""
    how = {"quantization": kind, "dtype": "bfloat16"}
    model = OmniSapiens.from_pretrained(runs.model(family), **how)
    apply_strategy(model, ModelConfig(name=str(runs.model(family)), lora_r=2, lora_dropout=0.0, **how))
    batch = batch or batch_of(model, family, atlas, answers=True, seen=HEARD.get(family))
    small = [n for n, p in model.transformer.named_parameters() if p.dtype is BITS[kind] and n.endswith("weight")]
    start = f"{language_layers(model.transformer).prefix}layers."
    assert small and all(name.startswith(start) for name in small)
    loss, gradients, _, _ = steps_of(model, batch, dtype=torch.bfloat16)
    assert math.isfinite(loss) and gradients.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())
    assert any("lora_B" in name and bool(gradient.any()) for name, gradient in gradients.items())
    torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2).step()
    return model, batch


@pytest.mark.parametrize("family", PRESENT)
def test_quantised_a_family_trains_predicts_and_is_merged(runs, atlas, tmp_path, family):
    model, batch = quantised_step(runs, atlas, family, "nf4")
    seen = ", ".join(FAMILIES[family].modalities)
    encode = load_config(EncodeConfig, None, [f"modalities=[{seen}]"])
    model.save_pretrained(tmp_path / "run", backbone=str(runs.model(family)), strategy="lora", encode=encode)
    merge_checkpoint(tmp_path / "run", tmp_path / "merged", dtype="float32")
    ours, merged = (OmniSapiens.from_pretrained(tmp_path / n, dtype="float32").eval() for n in ("run", "merged"))
    assert (ours.quantization, merged.quantization) == ("nf4", "none")
    with torch.no_grad():
        found, expected = ours(batch), merged(batch)
    torch.testing.assert_close(found.answer_logits_NV, expected.answer_logits_NV, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found.logits_BC, expected.logits_BC, atol=1e-3, rtol=1e-3)
    assert ours.generate(batch, max_new_tokens=2) == merged.generate(batch, max_new_tokens=2)
    model, _ = quantised_step(runs, atlas, family, "int8", batch)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = model.eval()(batch)  # merged, it is another model: int8 rounds inputs of layers, too
    assert bool(found.pooled_BH.isfinite().all() and found.answer_logits_NV.isfinite().all())


def test_compiled_layers_of_a_quantised_model_train_as_plain_ones_do(runs, atlas, monkeypatch):
    """Loss and gradients to the bit. Graphs run by the backend `eager`: to build kernels takes minutes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    name, found = runs.model("qwen2.5-omni"), []
    for compiled in (False, True):
        torch.manual_seed(1)
        model = OmniSapiens.from_pretrained(name, dtype="bfloat16", quantization="nf4")
        apply_strategy(model, ModelConfig(name=str(name), lora_r=2, lora_dropout=0.5, quantization="nf4"))
        counters.clear()
        if compiled:
            compile_layers(model.transformer)
        batch = batch_of(model, "qwen2.5-omni", atlas, answers=True, datasets=("tess",))
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16):
            loss = sft_loss(model.train(), batch, answer_weight=1.0)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert counters["frames"]["ok"] == counters["frames"]["total"] > 0 and not counters["graph_break"]
    assert len(found[0]) == len(found[1]) > 10
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def test_reinforcement_learning_in_four_bits(runs, atlas, tmp_path):
    rounded = ["model.quantization=nf4"]
    before = runs.of("qwen2.5-omni", "lm", *rounded)
    run = runs.of("qwen2.5-omni", "rl", *rounded)
    trained = load_file(run / "checkpoints" / "step_2" / checkpoint.ADAPTER)
    assert any(not torch.equal(tensor, weights(before, checkpoint.ADAPTER)[name]) for name, tensor in trained.items())
    assert checkpoint.quantization_of(checkpoint.read_card(checkpoint.resolve(run))) == "nf4"
    merge_checkpoint(run, tmp_path / "merged", dtype="float32")
    told = []
    for number, model in enumerate((run, tmp_path / "merged")):
        options = ["loader.workers=0", "generation.max_tokens=4", "dtype=float32"]
        how = {"config": load_config(PredictConfig, None, options), "progress": lambda _: None}
        out = tmp_path / str(number)
        predict_run(str(model), out, atlas=str(atlas), split="test", backend="hf", **how)
        told.append({p.id: (p.output, p.error) for p in read_predictions(out / "predictions.jsonl")})
    assert len(told[0]) == 3 and told[0] == told[1] and not any(error for _, error in told[0].values())


def test_a_tower_of_its_own_way_of_attending_leaves_the_other_parts_theirs(runs):
    if LACKING:
        pytest.skip("needs timm")
    model = OmniSapiens.from_pretrained(runs.model("gemma3n"), attention="sdpa", heads=False)
    config = model.transformer.config
    ways = {name: getattr(config, name)._attn_implementation for name in config.sub_configs}
    assert ways == {"text_config": "sdpa", "vision_config": "eager", "audio_config": "sdpa"}
    # FlashAttention itself needs a GPU: what the parts of a model without weights are asked for.
    bare = skeleton(type(model.transformer), type(config).from_pretrained(runs.model("gemma3n")))
    bare.config._attn_implementation = checkpoint.attention_of_parts(bare, "flash_attention_2")
    ways = {name: getattr(bare.config, name)._attn_implementation for name in config.sub_configs}
    assert ways == {"text_config": "flash_attention_2", "vision_config": "eager", "audio_config": "flash_attention_2"}


def test_what_a_family_cannot_is_refused_in_one_sentence_before_data_are_read(runs, atlas, tmp_path, monkeypatch):
    monkeypatch.setattr("hba.batch.encode.load_media", lambda *_, **__: pytest.fail("a medium was read"))
    monkeypatch.setattr(checkpoint, "load_backbone", lambda *_, **__: pytest.fail("the model was loaded"))
    refused = {"llama": "TextProcessor takes no videos", "gemma3": "Gemma3Processor takes no audio"}
    for stage in ("sft", "lm", "rl"):
        kind, work, own = STAGES[stage]
        for family, message in refused.items():
            config = load_config(kind, None, [f"atlas={atlas}", *own, f"model.name={runs.model(family)}"])
            opened = RunFolder.open(tmp_path / f"{stage}-{family}", config=config, command=stage, seed=0)
            told = pytest.raises(InputError, match=rf"{message}, and \d+ rows have some.*encode\.modalities")
            with opened as run, told:
                work(config, run)


def test_clips_of_several_numbers_of_frames_are_refused_where_a_batch_has_one(runs, atlas):
    rows, rate = open_atlas(atlas, split="train"), EncodeConfig(fps=2.0, modalities=("video",))
    checkpoint.require_perceived(runs.model("internvl"), rate, rows)
    with pytest.raises(ConfigError, match=r"one number of frames together.*encode\.num_frames"):
        checkpoint.require_perceived(runs.model("llava-onevision"), rate, rows)


def _weightless(folder, config, tokenizer, template):
    config.save_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer._processor_class = tokenizer.init_kwargs["processor_class"] = None
    tokenizer.save_pretrained(folder)


def _config_says(folder, **more):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | more))


def _brings_code(folder, config, kind="own"):
    config.save_pretrained(folder)
    _config_says(folder, model_type=kind, auto_map={"AutoConfig": "own.Own"})
    (folder / "own.py").write_text("raise SystemExit('code of a model was run')")


def _of_another_kind(folder, config):
    config.save_pretrained(folder)
    _config_says(folder, model_type="llava_llama")


def _gguf(folder, _):
    folder.mkdir()
    (folder / "model-Q4_K_M.gguf").write_bytes(b"GGUF")


def _hears_by_torchaudio(folder, config):
    config.save_pretrained(folder)
    names = {"processor_class": "GraniteSpeechProcessor", "feature_extractor_type": "GraniteSpeechFeatureExtractor"}
    for part in ("processor", "preprocessor"):
        (folder / f"{part}_config.json").write_text(json.dumps(names))


SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
UNFIT = {
    "no template": ("LlamaConfig", SIZES, None, "TextProcessor has no chat template"),
    "vision": ("SiglipVisionConfig", SIZES, TEXT_TEMPLATE, "no chat model of type 'siglip_vision_model'"),
    "encoder": ("BertConfig", SIZES, TEXT_TEMPLATE, "no chat model of type 'bert'"),
    "two halves": (
        "T5Config",
        {"d_model": 16},
        TEXT_TEMPLATE,
        "T5ForConditionalGeneration reads prompts by an",
    ),
    "other layers": ("GPT2Config", {"n_embd": 16, "n_layer": 1, "n_head": 2}, TEXT_TEMPLATE, "no layers of a language"),
    "awq": ("LlamaConfig", SIZES, TEXT_TEMPLATE, "is quantised by awq, whose package is missing"),
    "tekken": ("LlamaConfig", SIZES, TEXT_TEMPLATE, "tekken.json, which is read for Voxtral alone"),
    "package": ("GraniteSpeechConfig", {}, _hears_by_torchaudio, "needs a package .* requires the torchaudio library"),
    "code": ("LlamaConfig", SIZES, _brings_code, "brings its own code, which is not run"),
    "older code": ("LlamaConfig", SIZES, partial(_brings_code, kind="internvl_chat"), "whose name ends in -hf"),
    "other kind": ("LlamaConfig", SIZES, _of_another_kind, "transformers does not know.*whose name ends in -hf"),
    "gguf": ("LlamaConfig", SIZES, _gguf, r"weights for llama.cpp \(GGUF\), which are not read"),
}


@pytest.mark.parametrize("unfit", UNFIT)
def test_what_is_no_chat_model_is_refused_in_one_sentence_before_weights_are_read(
    backbone, tmp_path, atlas, hba, monkeypatch, unfit
):
    import transformers

    name, sizes, template, said = UNFIT[unfit]
    kind = getattr(transformers, name)
    classes = {
        "LlamaConfig": "LlamaForCausalLM",
        "T5Config": "T5ForConditionalGeneration",
        "GPT2Config": "GPT2LMHeadModel",
        "GraniteSpeechConfig": "GraniteSpeechForConditionalGeneration",
    }
    folder, config = tmp_path / "model", kind(**sizes, architectures=[classes.get(name, "None")])
    if callable(template):
        template(folder, config)
    else:
        _weightless(folder, config, transformers.AutoTokenizer.from_pretrained(backbone), template)
    if unfit == "awq":
        _config_says(folder, quantization_config={"quant_method": "awq", "bits": 4, "version": "gemm"})
        monkeypatch.setattr("transformers.quantizers.quantizer_awq.is_gptqmodel_available", lambda: False)
    if unfit == "package":
        monkeypatch.setattr("transformers.utils.import_utils.is_torchaudio_available", lambda: False)
    if unfit == "tekken":
        monkeypatch.setitem(sys.modules, "mistral_common", None)  # as where it is not installed
        monkeypatch.setattr("transformers.models.auto.tokenization_auto.is_mistral_common_available", lambda: False)
        (folder / "tekken.json").write_text("{}")
        for file in folder.glob("tokenizer*"):
            file.unlink()
    monkeypatch.setattr("hba.batch.encode.load_media", lambda *_, **__: pytest.fail("a medium was read"))
    monkeypatch.setattr("hba.model.weights._fill", lambda *_: pytest.fail("a weight was read"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers would ask whether to run code of a model
    given = [
        f"atlas={atlas}",
        f"model.name={folder}",
        "model.dtype=float32",
        "encode.modalities=[]",
        "loader.workers=0",
    ]
    code, _, err = hba("train", "sft", "--run", tmp_path / "run", *given)
    assert code == 2 and re.search(said, " ".join(err.split())), err
    assert "Traceback" not in err


def test_verl_says_which_family_it_takes(runs, atlas, tmp_path, hba):
    given = [f"atlas={atlas}", f"model.name={runs.model('qwen2.5-vl')}", "model.strategy=full"]
    code, _, err = hba("train", "rl", "--engine", "verl", "--run", tmp_path / "run", *given)
    assert code == 2 and "verl's engine takes Qwen2.5-Omni alone, and this is a model of type qwen2_5_vl" in err


def test_an_lm_head_that_is_not_trained_alone_is_refused_before_features_are_made(runs, tmp_path):
    """Phi's has a bias; that costs nothing to know, and features of many rows cost hours."""
    model = shutil.copytree(runs.model("llama"), tmp_path / "phi")
    known = json.loads((model / "config.json").read_text())
    for file in (*model.glob("*.safetensors"), model / "generation_config.json"):
        file.unlink(missing_ok=True)
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    PhiForCausalLM(PhiConfig(**{name: known[name] for name in (*sizes, *ids)})).save_pretrained(model)
    kind, work, own = STAGES["sft"]
    given = [f"atlas={runs.atlas}", *own, f"model.name={model}", "model.strategy=heads", "encode.modalities=[]"]
    config = load_config(kind, None, given)
    with RunFolder.open(tmp_path / "sft", config=config, command="train sft", seed=0) as opened:
        work(config, opened)
    for stage in ("qa", "bam"):
        kind, work, own = STAGES[stage]
        made = tmp_path / f"features of {stage}"
        given = [f"atlas={runs.atlas}", *own, f"base={tmp_path / 'sft'}", f"features.folder={made}"]
        config = load_config(kind, None, given)
        with (
            pytest.raises(InputError, match="a language head with a bias is not trained alone"),
            RunFolder.open(tmp_path / stage, config=config, command=f"train {stage}", seed=0) as opened,
        ):
            work(config, opened)
        assert not list(made.rglob("*.safetensors"))
