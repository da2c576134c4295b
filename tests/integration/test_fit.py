"""`hba fit`: what it counts without weights is what a real pass holds, and what it says can be typed."""

import json
import re

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoTokenizer

from hba import open_atlas
from hba.batch.config import EncodeConfig
from hba.batch.encode import Batch, Encoder
from hba.batch.loader import encode_row
from hba.batch.sampler import input_tokens
from hba.cli.train import _fitted
from hba.config import load_config, to_dict
from hba.errors import InputError
from hba.fit import GATHERED, LM_HEAD, _Bare, _Ledger, _Need, find_gpu, fit_run, recipe_for, work_of
from hba.model.checkpoint import load_backbone, load_processor
from hba.model.config import ModelConfig
from hba.model.omni import OmniSapiens, as_they_come, recompute_layers
from hba.model.tiny import FAMILIES, TinySizes
from hba.rl.config import RlConfig
from hba.rl.local import build_policy
from hba.rl.rollout import probabilities, with_responses
from hba.run import RunFolder
from hba.train.config import BamConfig, LmConfig, QaConfig, SftConfig

HOW = {"dtype": "float32", "attention": "sdpa"}
SMALL = ["atlas=x", "train.device_batch_size=3"]


def config(cls, backbone, *more):
    return load_config(cls, None, [f"model.name={backbone}", *SMALL, *more])


@pytest.mark.parametrize(
    "more",
    [
        ("model.strategy=lora", "model.dtype=float32"),
        ("model.strategy=lora", "model.dtype=bfloat16"),
        ("model.strategy=full", "model.dtype=float32"),
        ("model.strategy=lora", "model.dtype=float32", "train.activation_checkpointing=true"),
        ("model.strategy=lora", "model.dtype=bfloat16", "train.activation_checkpointing=true"),
    ],
    ids=["lora", "bfloat16", "full", "recomputed", "recomputed in bfloat16"],
)
def test_what_is_counted_without_weights_is_what_a_real_pass_holds(backbone, more):
    settings = config(LmConfig, backbone, *more)
    work = work_of(settings, 200, str(backbone))[0]
    bare = _Bare(str(backbone))
    dtype = torch.bfloat16 if "model.dtype=bfloat16" in more else torch.float32
    counted = bare.count(work, dtype, 3).bytes
    model = bare._prepared(work, None).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype).normal_(std=0.01)
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    if settings.train.activation_checkpointing:
        recompute_layers(model)
    model.train()
    ids = torch.randint(0, 50, (3, work.tokens))
    there = torch.ones_like(ids)
    there[0, :5] = 0
    ledger = _Ledger()
    for tensor in (*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)):
        ledger.see(tensor)
    before = ledger.peak = ledger.now
    with ledger, torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16), as_they_come(model):
        head = model.get_output_embeddings()
        last = head.register_forward_pre_hook(lambda _, args: (args[0][:, -work.answers :].flatten(0, 1),))
        logits = model(input_ids=ids, attention_mask=there, use_cache=False).logits
        last.remove()
        loss = torch.nn.functional.cross_entropy(logits.float(), ids[:, -work.answers :].flatten())
        del logits
    with ledger:
        loss.backward()
    assert counted == pytest.approx(ledger.peak - before, rel=0.15)


@pytest.mark.parametrize("strategy", ["lora", "full"])
def test_a_deep_model_is_counted_by_few_of_its_layers(backbone, strategy):
    more = (f"model.strategy={strategy}", "model.dtype=bfloat16", "train.activation_checkpointing=true")
    bare = _Bare(str(backbone))
    text = bare.text_of(bare.config)
    text.num_hidden_layers, text.layer_types = 9, ["full_attention"] * 9
    work = work_of(config(LmConfig, backbone, *more), 100, str(backbone))[0]
    whole = bare._count(work, torch.bfloat16, 3, range(9))
    assert bare.count(work, torch.bfloat16, 3) == pytest.approx(whole, rel=0.02)


@pytest.mark.parametrize("family", ["gemma4", "gemma3n"])
def test_layers_that_share_keys_and_values_are_counted_apart(backbone, tmp_path, family):
    if family == "gemma3n":
        pytest.importorskip("timm")
    made = FAMILIES[family].make(AutoTokenizer.from_pretrained(backbone), TinySizes())
    text = made.config.text_config
    if family == "gemma3n":
        text.intermediate_size, text.activation_sparsity_pattern = [128] * 12, [0.5] * 2 + [0.0] * 10
    text.num_hidden_layers, text.num_kv_shared_layers = 12, 6
    text.layer_types = ["sliding_attention", "full_attention"] * 6
    made.config.save_pretrained(tmp_path)
    bare = _Bare(str(tmp_path))
    work = work_of(config(LmConfig, tmp_path, "model.strategy=lora", "model.dtype=bfloat16"), 100, str(tmp_path))[0]
    whole = bare._count(work, torch.bfloat16, 1, range(12))
    assert bare.count(work, torch.bfloat16, 1) == pytest.approx(whole, rel=0.05)
    # Of the layers with keys and values of their own three keep the last 64 tokens, two heads of 16 numbers each.
    assert bare.cache_bytes(torch.bfloat16, 100) == 2 * 2 * 2 * 16 * (3 * 64 + 3 * 100)


def test_layers_of_linear_attention_are_counted(backbone, tmp_path):
    made = FAMILIES["qwen3.5"].make(AutoTokenizer.from_pretrained(backbone), TinySizes())
    made.config.save_pretrained(tmp_path)
    bare, dtype = _Bare(str(tmp_path)), torch.bfloat16
    work = work_of(config(LmConfig, tmp_path, "model.strategy=lora", "model.dtype=bfloat16"), 100, str(tmp_path))[0]
    assert bare.count(work, dtype, 2).bytes > bare.count(work, dtype, 1).bytes > 0
    assert bare.cache_bytes(dtype, 100) == 2 * 2 * 2 * 16 * 100  # of one layer in three


def test_heads_are_counted_without_the_layer_that_they_do_not_read(backbone):
    settings = config(SftConfig, backbone, "model.strategy=lora", "model.dtype=float32")
    work = work_of(settings, 200, str(backbone))[0]
    bare = _Bare(str(backbone))
    counted = bare.count(work, torch.float32, 3).bytes
    model = bare._prepared(work, None).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.01)
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    ledger = _Ledger()
    for tensor in (*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)):
        ledger.see(tensor)
    before = ledger.peak = ledger.now
    ids = torch.randint(0, 50, (3, work.tokens))
    there = torch.ones_like(ids)
    there[0, :5] = 0
    with ledger:
        states = OmniSapiens(model.train(), None)._penultimate({"input_ids": ids, "attention_mask": there})
        states.mean().backward()
    assert counted == pytest.approx(ledger.peak - before, rel=0.15)


def test_weights_gradients_and_optimizer_are_exact(backbone, model):
    numbers = sum(p.numel() for p in model.transformer.parameters())
    found = fit_run(str(backbone), "lm", config(LmConfig, backbone, "model.strategy=full"), find_gpu("24"), tokens=[50])
    parts = {name: round(size * 2**30) for name, size in found.parts.items()}
    assert (parts["weights"], parts["gradients"], parts["optimizer"]) == (4 * numbers, 4 * numbers, 8 * numbers)
    assert found.fits and found.largest > 100 and found.changes == []
    assert found.setting == f"train.device_batch_size={found.largest}"


def test_quantised_weights_take_what_they_hold(backbone):
    for kind in ("nf4", "int8"):
        lora = config(LmConfig, backbone, f"model.quantization={kind}", "model.dtype=float32")
        found = fit_run(str(backbone), "lm", lora, find_gpu("24"), tokens=[50])
        plain = config(LmConfig, backbone, "model.dtype=float32")
        whole = fit_run(str(backbone), "lm", plain, find_gpu("24"), tokens=[50])
        weights = [p.detach() for p in load_backbone(str(backbone), quantization=kind, **HOW).parameters()]
        held = sum(p.nbytes for p in weights) - sum(p.nbytes for p in load_backbone(str(backbone), **HOW).parameters())
        if kind == "nf4":
            held += sum(p.numel() for p in weights if p.dtype is torch.uint8) * 2 / 64
        spared = (whole.parts["weights"] - found.parts["weights"]) * 2**30
        assert -held == pytest.approx(spared, rel=0.01)
        assert found.parts["a quantised layer as it computes"] > 0


def test_more_tokens_take_more_and_every_saving_saves(backbone):
    def total(*more, tokens=200, gpus=1):
        settings = config(SftConfig, backbone, "model.strategy=full", *more)
        return fit_run(str(backbone), "sft", settings, find_gpu("24"), gpus=gpus, tokens=[tokens]).total

    plain = total()
    assert total(tokens=400) > plain > total("train.activation_checkpointing=true")
    assert plain > total("train.sharding=full", gpus=8)
    mixed = ("train.sharding=full", "model.dtype=bfloat16")
    assert total(*mixed, gpus=8) < total("train.sharding=full", "model.dtype=float32", gpus=8)
    assert total("model.strategy=lora") < plain


def test_what_does_not_fit_says_what_to_type(hba, backbone):
    args = ["fit", str(backbone), "--gpu", "1", "--tokens", "3000", "train.batch_size=512"]
    code, out, _ = hba(*args)
    assert code == 1 and "It does not fit." in out and "train.device_tokens=" in out
    code, out, _ = hba(*args, "--json")
    found = json.loads(out)
    change = next(change for change in found["changes"] if change.startswith("train.device_tokens="))
    assert code == 1 and not found["fits"] and found["total"] > found["usable"]
    code, out, _ = hba(*args, *change.split())  # what is validated at once, too
    assert code == 0 and "It fits." in out


def test_a_budget_of_tokens_is_what_is_counted(backbone):
    """Samples of the longest within the budget, or one; what is proposed fits, and one more does not."""

    def settings(*more):
        return load_config(LmConfig, None, [f"model.name={backbone}", "atlas=x", "train.batch_size=512", *more])

    def samples(*more):
        return work_of(settings(*more), 300, "")[0].samples

    assert [samples(f"train.device_tokens={budget}") for budget in (900, 9, 10**6)] == [3, 1, 512]
    assert samples("train.device_tokens=900", "train.device_batch_size=2") == 2

    def fit(budget):
        return fit_run(str(backbone), "lm", settings(f"train.device_tokens={budget}"), find_gpu("2"), tokens=[300])

    key, _, most = fit(900).setting.partition("=")
    found = fit(most)
    assert key == "train.device_tokens" and found.fits and found.samples == found.largest
    assert found.usable - found.total < found.parts["activations"] / found.samples, "there is room for one more"


def test_all_responses_to_a_prompt_are_in_one_update(backbone):
    sizes = ["rollout.max_new_tokens=20", "train.device_tokens=2000"]
    settings = load_config(RlConfig, None, [f"model.name={backbone}", "atlas=x", "rollout.per_prompt=5", *sizes])
    update, sampling = work_of(settings, 80, "")
    assert (update.samples, update.tokens, sampling.samples) == (20, 100, 20)


@pytest.mark.parametrize("more", [("lora", "float32"), ("full", "bfloat16")], ids=" in ".join)
def test_rl_counts_what_drawing_and_looking_at_the_responses_hold(backbone, more):
    """The policy's own `say` with its cache, and its `probabilities` with their gradient, by the same ledger."""
    given = [f"model.name={backbone}", "atlas=x", "rollout.max_new_tokens=30", "rollout.per_prompt=3"]
    given += ["train.device_batch_size=1", f"model.strategy={more[0]}", f"model.dtype={more[1]}"]
    settings, bare = load_config(RlConfig, None, given), _Bare(str(backbone))
    needs = [_Need(bare, work, 1) for work in work_of(settings, 200, str(backbone))]
    update, sampling = (need.of_one.to(need.of_two, 2).bytes for need in needs)
    sampling += 3 * bare.cache_bytes(needs[1].dtype, 200)
    policy = build_policy(settings.model, None, freeze_towers=True).train()
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    ids = torch.randint(20, 50, (3, 200))
    there = torch.ones_like(ids)
    there[0, :5] = 0
    inputs = {"input_ids": ids, "attention_mask": there}
    batch = Batch(samples=(), inputs=inputs, class_index_B=torch.zeros(3), domain_names=(None,) * 3)
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=more[1] == "bfloat16")

    def held(work):
        ledger = _Ledger()
        parameters = list(policy.parameters())
        for tensor in (*parameters, *policy.buffers(), *(p.grad for p in parameters if p.grad is not None)):
            ledger.see(tensor)
        before = ledger.peak = ledger.now
        with ledger:
            work()
        return ledger.peak - before

    def draw():
        with mixed:
            said = policy.say(batch, max_new_tokens=30, temperature=1.0, uniforms_BL=torch.full((3, 30), 0.5))
        assert [len(one.ids) for one in said] == [30, 30, 30]

    def look():
        with mixed:
            probabilities(policy, policy, with_responses(batch, [ids[0, :30]] * 3, 0), 1.0).logps_BL.sum().backward()

    assert sampling == pytest.approx(held(draw), rel=0.15)
    assert update == pytest.approx(held(look), rel=0.15)


def test_rl_counts_its_draws_and_what_is_there_meanwhile(backbone, model):
    numbers = sum(p.numel() for p in model.transformer.parameters())

    def settings(*more):
        given = [f"model.name={backbone}", "atlas=x", "model.strategy=full", "model.dtype=bfloat16"]
        given += ["rollout.max_new_tokens=20", "train.device_batch_size=1"]
        return load_config(RlConfig, None, [*given, *more])

    def fit(*more):
        return fit_run(str(backbone), "rl", settings(*more), find_gpu("24"), tokens=[80])

    drawn, served = fit(), fit("rollout.sampler=server", "remote.base_url=http://here/v1")
    assert 0 < drawn.sampling_share < 1 and served.sampling_share == 0
    assert served.samples_per_second > drawn.samples_per_second
    kept = fit("loss.kl_weight=0.1")
    assert 2 * numbers < kept.parts["policy of the start"] * 2**30 < 4 * numbers
    assert kept.samples_per_second < drawn.samples_per_second
    # A split policy is whole while it answers, as it is gathered; moments stay, gradients are gone.
    works = work_of(settings("train.sharding=full", "loss.kl_weight=0"), 80, "")
    update, sampling = (_Need(_Bare(str(backbone)), work, 8).fixed for work in works)
    assert sampling["optimizer"] == update["optimizer"] > 0 == sampling["gradients"] < update["gradients"]
    assert sampling["weights"] == update["weights"] and 2 * numbers < sampling[GATHERED] < 4 * numbers


def test_bam_that_trains_all_is_counted_as_the_training_it_is(backbone):
    """Of a run by what it trained, of a backbone as `hba train sft` would; the frozen stages as features alone."""

    def need(*more):
        given = [f"base={backbone}", "atlas=x", "train.batch_size=3", "dtype=float32", *more]
        (work,) = work_of(load_config(BamConfig, None, given), 80, str(backbone))
        return _Need(_Bare(str(backbone)), work, 1)

    frozen, labels, words = need(), need("stage=full", "datasets=[daicwoz]"), need("stage=full")
    lora = config(SftConfig, backbone, "model.dtype=float32", "train.batch_size=3")
    assert labels.parts(3) == _Need(_Bare(str(backbone)), work_of(lora, 80, str(backbone))[0], 1).parts(3)
    assert frozen.fixed["gradients"] == 0 < labels.fixed["gradients"] == words.fixed["gradients"]
    assert frozen.parts(3)["activations"] < labels.parts(3)["activations"] < words.parts(3)["activations"]
    settings = load_config(BamConfig, None, [f"base={backbone}", "atlas=x", "stage=full", "features.batch_size=4000"])
    found = fit_run(str(backbone), "bam", settings, find_gpu("1.2"), tokens=[1000])
    assert found.setting.startswith("train.device_tokens=") and found.validation < found.validation_asked == 4000
    assert found.changes == [f"features.batch_size={found.validation}"]


def test_a_step_of_bam_that_trains_all_of_a_run_holds_what_is_counted(backbone, mini_atlas, tmp_path, monkeypatch):
    """The second step of `train_bam` itself on a run with LoRA, by the same ledger."""
    from hba.train import bam, loop

    base, shapes, peaks = tmp_path / "base", [], []
    start = loop.load_model(ModelConfig(name=str(backbone), dtype="float32", lora_r=5), None, mapped=False)
    known = {"backbone": str(backbone), "strategy": "lora", "encode": EncodeConfig(modalities=())}
    start.save_pretrained(base, **known)
    given = [f"base={base}", f"atlas={mini_atlas}", "datasets=[daicwoz]", "stage=full", "dtype=float32", "hidden=2"]
    given += ["train.batch_size=3", "train.max_steps=2", "features.loader.workers=0"]
    settings = load_config(BamConfig, None, given)

    def noted(model, batch, loss=bam.bam_loss):
        shapes.append(batch.inputs["input_ids"].shape)
        return loss(model, batch)

    def stepped(stage, model, optimizer, *more, step=loop._step):
        ledger, states = _Ledger(), optimizer.state.values()
        for tensor in (*model.parameters(), *model.buffers(), *(each for state in states for each in state.values())):
            ledger.see(tensor)
        before = ledger.peak = ledger.now
        with ledger:
            done = step(stage, model, optimizer, *more)
        peaks.append(ledger.peak - before)
        return done

    monkeypatch.setattr(bam, "bam_loss", noted)
    monkeypatch.setattr(loop, "_step", stepped)
    with RunFolder.open(tmp_path / "run", config=settings, command="train", seed=0) as run:
        bam.train_bam(settings, run)
    rows, tokens = shapes[1]
    (work,) = work_of(settings, tokens, str(base))
    assert work.model.lora_r == 5 and work.samples == 3
    need = _Need(_Bare(str(base)), work, 1)
    counted = need.of_one.to(need.of_two, rows - 1).bytes + need.fixed["gradients"]
    assert counted == pytest.approx(peaks[1], rel=0.15)


def test_an_lm_head_that_trains_is_counted_beside_the_frozen_model_or_behind_it(backbone, model):
    """In float32, with its gradient and its moments: behind the model where features are kept, else at once."""
    head = model.transformer.get_output_embeddings().weight.numel() * 4

    def needs(*more):
        settings = load_config(QaConfig, None, [f"base={backbone}", "atlas=x", "train.batch_size=3", *more])
        return [_Need(_Bare(str(backbone)), work, 1) for work in work_of(settings, 80, str(backbone))]

    features, learning = needs()
    assert features.fixed["weights"] > 0 == features.fixed[LM_HEAD]
    assert learning.fixed[LM_HEAD] == 3 * head == sum(learning.fixed.values())
    (streamed,) = needs("features.cache=false")
    assert streamed.work.samples == 3 and streamed.fixed[LM_HEAD] == 3 * head
    assert streamed.fixed["weights"] == features.fixed["weights"]
    assert streamed.parts(3)["activations"] >= max(features.parts(3)["activations"], head)
    assert head < learning.parts(3)["activations"] < learning.parts(30)["activations"]
    _, second = needs("train.accumulation=2")  # beside the gradient of the micro-batch before
    assert second.parts(3)["activations"] == learning.parts(3)["activations"] + head
    (streamed_second,) = needs("features.cache=false", "train.accumulation=2")
    assert streamed_second.parts(3)["activations"] >= features.parts(3)["activations"] + head
    (small,) = needs("features.cache=false", "train.optimizer=adamw8bit")
    assert small.fixed[LM_HEAD] < 1.6 * head


@pytest.mark.parametrize("stage", ["sft", "lm", "qa", "bam", "rl", "predict"])
def test_every_stage_has_an_estimate(hba, backbone, mini_atlas, stage):
    recipe = [] if stage == "predict" else ["--config", f"{stage}_tiny"]
    code, out, err = hba("fit", str(backbone), "--gpu", "h100", "--stage", stage, *recipe, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["stage"] == stage and found["largest"] >= 1 and found["samples_per_second"] > 0
    assert "keys and values" in found["parts"] or stage != "predict"


def test_lengths_and_an_epoch_are_those_of_an_atlas(hba, backbone, mini_atlas):
    recipe = ("--config", "sft_tiny", "--atlas", str(mini_atlas))
    code, out, _ = hba("fit", str(backbone), "--gpu", "24", *recipe, "--json")
    found = json.loads(out)
    assert code == 0 and found["epoch_hours"] > 0 and found["tokens"] > 100


def test_what_a_budget_counts_is_near_what_the_model_gets(mini_atlas, backbone):
    """Reckoned without decoding, by the encoding: rather too much than too little."""
    rows = open_atlas(mini_atlas, split="train")
    _, first = np.unique(rows.columns.dataset_codes, return_index=True)
    small = {"num_frames": 2, "max_pixels": 3136}
    for encode in (EncodeConfig(**small), EncodeConfig(**small, modalities=("video",)), EncodeConfig(modalities=())):
        encoder = Encoder(load_processor(str(backbone)), encode, rows.taxonomy)
        reckoned_N = input_tokens(rows, encode)
        found = {rows[row].dataset: (len(encode_row(rows, encoder, row).input_ids_T), reckoned_N[row]) for row in first}
        assert all(real <= reckoned <= 2 * real + 64 for real, reckoned in found.values()), (encode, found)


def test_bad_input_is_told_before_anything_is_built(hba, backbone, tmp_path):
    with pytest.raises(InputError, match=r"no GPU 'h10' is known.*h100"):
        find_gpu("h10")
    assert find_gpu("NVIDIA H100").tflops == 989 and find_gpu("24GB").gigabytes == 24
    for args, said in (
        (["no/such/folder/here", "--gpu", "24"], "no/such/folder/here"),
        ([str(backbone), "--gpu", "0"], "no GPU '0' is known"),
        ([str(backbone), "--gpu", "24", "train.batchsize=3"], "train.batchsize"),
    ):
        code, _, err = hba("fit", *args)
        assert code == 2 and said in err
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("train:\n  epochs: 1\n")
    code, _, err = hba("fit", str(backbone), "--gpu", "24", "--config", str(recipe))
    assert code == 2 and "--stage" in err


def test_lora_in_bfloat16_is_trained_with_layers_computed_twice(hba, backbone, mini_atlas, tmp_path):
    """The second pass over a layer takes its inputs as the first did."""
    settings = [f"atlas={mini_atlas}", f"model.name={backbone}", "model.strategy=lora", "model.dtype=bfloat16"]
    settings += ["train.max_steps=2", "train.validate_every=2", "loader.workers=0", "encode.max_pixels=3136"]
    losses = []
    for again in ("false", "true"):
        run = tmp_path / again
        more = [f"train.activation_checkpointing={again}", "validation_split=validation[:8]", "train.log_every=1"]
        code, _, err = hba("train", "lm", "--run", run, *settings, *more)
        assert code == 0, err
        log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in log if "loss" in line and "step" in line])
    assert losses[0] and losses[0] == losses[1]


ASKED = ["train.device_batch_size=64"]


def fitting(backbone, gpu, *more, tokens=1000, gpus=1, typed=()):
    settings = load_config(SftConfig, None, [f"model.name={backbone}", "atlas=x", "train.batch_size=64", *ASKED, *more])
    return recipe_for(str(backbone), settings, find_gpu(gpu), gpus=gpus, tokens=tokens, typed=typed)


def test_a_recipe_takes_the_mildest_saving_that_is_enough_and_leaves_what_is_typed(backbone):
    """The tiny model on GPUs that are tiny, too."""
    assert fitting(backbone, "24").keys == {}
    some = fitting(backbone, "1.2").keys
    assert some.keys() == {"train.device_batch_size"} and 2 <= some["train.device_batch_size"] < 64
    less = fitting(backbone, "0.66").keys
    assert less["train.activation_checkpointing"] is True and less["train.device_batch_size"] >= 1
    typed = fitting(backbone, "1.2", "train.activation_checkpointing=true", typed=["train.activation_checkpointing"])
    budget = fitting(backbone, "1.2", "train.device_batch_size=null").keys["train.device_tokens"]
    assert some["train.device_batch_size"] * 1000 <= budget < 64_000
    assert typed.keys["train.device_batch_size"] > some["train.device_batch_size"]
    assert fitting(backbone, "1.2").total <= fitting(backbone, "1.2").usable
    with pytest.raises(InputError, match=r"--gpu 0\.66: .*no setting has room.*hba fit"):
        fitting(backbone, "0.66", "train.device_batch_size=60", typed=["train.device_batch_size"])
    with pytest.raises(InputError, match="no setting has room"):
        fitting(backbone, "0.65", tokens=30_000)


def test_a_run_for_a_gpu_of_a_size_says_what_it_sets_and_goes_on_without_the_option(
    hba, backbone, mini_atlas, tmp_path
):
    run = tmp_path / "run"
    settings = [f"atlas={mini_atlas}", f"model.name={backbone}", "datasets=[tess]", "loader.workers=0"]
    settings += ["encode.num_frames=2", "encode.max_pixels=3136", "train.batch_size=64", "train.max_steps=1"]
    settings += ["validation_split=validation[:40]"]
    code, _, err = hba("train", "sft", "--run", run, "--gpu", "0.65", *settings, "train.device_batch_size=64")
    assert code == 2 and "--gpu 0.65" in err and "no setting has room" in err  # typed: not lowered
    assert not run.exists()
    code, _, err = hba("train", "sft", "--run", run, "--gpu", "0.66", *settings)
    assert code == 0, err
    chosen = json.loads((run / "gpu.json").read_text())
    words = " ".join(f"{key}={str(value).lower()}" for key, value in chosen["keys"].items())
    assert chosen["gpu"] == "0.66" and f"--gpu 0.66: sets {words} (" in err
    recorded = yaml.safe_load((run / "config.yaml").read_text())["train"]
    assert recorded["device_tokens"] == chosen["keys"]["train.device_tokens"]
    again, _ = _fitted(SftConfig, None, settings, run, None)
    assert to_dict(again.train) == recorded
    typed, _ = _fitted(SftConfig, None, [*settings, "train.device_batch_size=1"], run, None)
    assert typed.train.device_batch_size == 1


def test_a_validation_batch_has_room_too(hba, backbone):
    """It passes through the model at once whatever is trained at once."""
    asked = ["fit", str(backbone), "--gpu", "1.2", "--tokens", "1000", "train.device_batch_size=1"]
    code, out, _ = hba(*asked, "validation_batch_size=4000")
    (said,) = re.findall(r"Try (validation_batch_size=\d+)", out)
    assert code == 1 and hba(*asked, said)[0] == 0
    keys = fitting(backbone, "1.2", "validation_batch_size=4000").keys
    assert 1 <= keys["validation_batch_size"] < 4000
    with pytest.raises(InputError, match=r"no setting has room for a validation of 4000 x 1,000 tokens"):
        fitting(backbone, "1.2", "validation_batch_size=4000", typed=["validation_batch_size"])


@pytest.mark.parametrize(
    "more",
    [
        ("model.strategy=full", "train.optimizer=adamw8bit"),
        ("model.strategy=lora", "encode.long_audio=windows"),
        ("model.strategy=lora", "model.quantization=nf4"),
        ("model.strategy=heads",),
    ],
)
def test_savings_that_a_run_cannot_have_are_not_tried(hba, backbone, more):
    typed = [key.partition("=")[0] for key in more]
    assert "train.sharding" not in fitting(backbone, "0.66", *more, gpus=8, tokens=100, typed=typed).keys
    code, out, err = hba("fit", str(backbone), "--gpu", "0.7", "--tokens", "3000", "train.batch_size=512", *more)
    assert code == 1 and "It does not fit." in out and "sharding" not in out, err


def test_dora_is_proposed_split_and_not_in_four_bits(hba, backbone):
    args = ["fit", str(backbone), "--gpu", "0.7", "--tokens", "3000", "train.batch_size=512", "model.lora_dora=true"]
    code, out, err = hba(*args)
    assert code == 1 and "train.sharding=full" in out and "quantization" not in out, err


def test_a_gpu_without_bfloat16_is_counted_in_float32(backbone):
    settings = config(LmConfig, backbone, "model.strategy=lora")
    plain, old = (fit_run(str(backbone), "lm", settings, find_gpu(name), tokens=[200]) for name in ("l4", "t4"))
    assert old.parts["weights"] > 1.5 * plain.parts["weights"]
