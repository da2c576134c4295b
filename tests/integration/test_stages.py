"""QA and BAM on the mini-atlas: what they train and leave alone, caches, exact resume, media that matter."""

import json
import logging
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from ranks import Dies
from safetensors.torch import load_file

from hba import open_atlas
from hba.batch.config import EncodeConfig
from hba.batch.encode import IGNORED, Encoder, collate
from hba.config import load_config
from hba.errors import InputError, MachineError
from hba.evaluate.config import PredictConfig
from hba.evaluate.predict import predict_run
from hba.model import OmniSapiens, checkpoint
from hba.model.config import ModelConfig
from hba.model.generate import media_token_ids
from hba.model.omni import apply_strategy
from hba.run import RunFolder, locked_folder
from hba.storage import read_jsonl
from hba.train import loop
from hba.train.bam import train_bam
from hba.train.config import BamConfig, QaConfig, SftConfig
from hba.train.features import extract
from hba.train.qa import exact, train_qa
from hba.train.sft import train_sft

SFT = [
    "model.strategy=full", "train.max_steps=30", "train.epochs=9", "train.batch_size=8", "train.validate_every=30",
    "train.learning_rate=2e-3", "encode.num_frames=2", "encode.max_pixels=3136", "loader.workers=0", "answer_weight=1",
    "validation_split=validation[:12]",
]  # fmt: skip
LATER = ["train.batch_size=8", "train.validate_every=4", "train.log_every=1", "features.loader.workers=0"]
STAGES = {
    "qa": (QaConfig, train_qa, ["train.epochs=4", "train.learning_rate=1e-3"]),
    "bam": (BamConfig, train_bam, ["datasets=[daicwoz,siq2]", "train.epochs=6", "adapter_learning_rate=2e-2"]),
}


def train(stage, run, atlas, base, *overrides):
    kind, work, own = STAGES[stage]
    config = load_config(kind, None, [f"atlas={atlas}", f"base={base}", *LATER, *own, *overrides])
    with RunFolder.open(run, config=config, command=f"train {stage}", seed=0) as folder:
        return work(config, folder)


def losses(run):
    return [line.record["loss"] for line in read_jsonl(run / "log.jsonl") if line.record["kind"] == "train"]


def newest(run):
    return max((run / "checkpoints").glob("step_*"), key=lambda path: int(path.name[5:]))


def weights(run):
    """Every tensor that a stage has trained."""
    files = [*newest(run).glob("*.safetensors"), *newest(run).glob("bam/*.safetensors")]
    return {f"{file.name} {name}": tensor for file in files for name, tensor in load_file(file).items()}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def base(tmp_path_factory, mini_atlas, backbone):
    """A stage-1 run that has begun to speak."""
    run = tmp_path_factory.mktemp("runs") / "sft"
    config = load_config(SftConfig, None, [f"atlas={mini_atlas}", f"model.name={backbone}", *SFT])
    with RunFolder.open(run, config=config, command="train sft", seed=0) as folder:
        train_sft(config, folder)
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory, mini_atlas, base):
    """Uninterrupted runs of both stages, with their caches in the base's folder."""
    folder = tmp_path_factory.mktemp("stages")
    for stage in STAGES:
        train(stage, folder / stage, mini_atlas, base)
    return {stage: folder / stage for stage in STAGES}


def mixed_batch(model, atlas, datasets, **options):
    encoder = Encoder(model.processor, EncodeConfig(num_frames=2, max_pixels=3136), **options)
    samples = [next(s for s in atlas if s.dataset == key and s.videos) for key in datasets]
    return collate([encoder.encode(sample) for sample in samples], pad_token_id=encoder.pad_token_id)


# --- what is trained -------------------------------------------------------------------------------------------------


def test_qa_leaves_backbone_and_heads_to_the_bit_and_moves_lm_head(base, runs, mini_atlas):
    """The tiny backbone ties lm_head to its embeddings; training it there would change every logit of the heads."""
    before, after = (OmniSapiens.from_pretrained(run).eval() for run in (base, runs["qa"]))
    batch = mixed_batch(before, open_atlas(mini_atlas, split="test"), ["cremad", "daicwoz", "ptsd_in_the_wild"])
    assert torch.equal(before.classify(batch), after.classify(batch))
    words, still = (model.transformer.get_input_embeddings().weight for model in (before, after))
    assert torch.equal(words, still)
    assert not torch.equal(before.transformer.lm_head.weight, after.transformer.lm_head.weight)
    assert losses(runs["qa"])[-1] < losses(runs["qa"])[0]
    ours, theirs = newest(runs["qa"]), checkpoint.resolve(base)
    assert (ours / "model.safetensors").samefile(theirs / "model.safetensors"), "what is frozen costs no space"


def test_bam_moves_the_data_sets_that_it_adapts_and_no_other(base, runs, mini_atlas):
    before, after = (OmniSapiens.from_pretrained(run).eval() for run in (base, runs["bam"]))
    atlas = open_atlas(mini_atlas, split="test")
    batch = mixed_batch(after, atlas, ["cremad", "daicwoz", "ptsd_in_the_wild"], descriptors=after.bam.descriptors)
    ours_BC, theirs_BC = after.classify(batch), before.classify(batch)
    assert torch.equal(ours_BC[[0, 2]], theirs_BC[[0, 2]])
    assert not torch.equal(ours_BC[1], theirs_BC[1])
    free = mixed_batch(after, atlas, ["siq2", "intentqa"], answers=True, descriptors=after.bam.descriptors)
    lengths = (free.labels_BT != IGNORED).sum(1).tolist()
    moved, still = (model(free).answer_states_NH.split(lengths) for model in (after, before))
    assert torch.equal(moved[1], still[1])
    delta_TH = moved[0] - still[0]
    torch.testing.assert_close(delta_TH, delta_TH[:1].expand_as(delta_TH), atol=1e-4, rtol=0)  # every position alike
    assert delta_TH.abs().max() > 1e-4
    assert after.generate(free, max_new_tokens=2) and not after.transformer.lm_head._forward_pre_hooks


@pytest.mark.parametrize("stage", ["adapters+heads", "full"])
def test_other_stages_of_bam_train_what_they_say(tmp_path, base, mini_atlas, stage):
    run = tmp_path / "run"
    train("bam", run, mini_atlas, base, f"stage={stage}", "train.max_steps=3", "datasets=[daicwoz]")
    before, after = (OmniSapiens.from_pretrained(path) for path in (base, run))
    ours, theirs = (model.heads.linear["mental_health_depression"].weight for model in (after, before))
    assert not torch.equal(ours, theirs)
    still = [torch.equal(p, before.transformer.get_parameter(name)) for name, p in after.transformer.named_parameters()]
    assert all(still) == (stage != "full")


def test_the_whole_model_of_a_lora_run_trains_in_its_own_precision_and_is_loaded_once(
    tmp_path, backbone, mini_atlas, monkeypatch
):
    config = ModelConfig(name=str(backbone), lora_r=4, lora_alpha=6)
    model = apply_strategy(OmniSapiens.from_pretrained(backbone), config)
    encode = EncodeConfig(num_frames=2, max_pixels=3136)
    model.save_pretrained(tmp_path / "lora", backbone=str(backbone), strategy="lora", encode=encode)
    loaded = []
    load = OmniSapiens.from_pretrained

    def noted(*args, **options):
        loaded.append(load(*args, **options))
        return loaded[-1]

    monkeypatch.setattr(OmniSapiens, "from_pretrained", noted)
    steps = ["train.max_steps=1", "datasets=[daicwoz]", "validation_split=validation[:40]"]
    train("bam", tmp_path / "run", mini_atlas, tmp_path / "lora", "stage=full", "dtype=bfloat16", *steps)
    (model,) = loaded
    kinds = {parameter.dtype for name, parameter in model.transformer.named_parameters() if "lora_" not in name}
    assert kinds == {torch.bfloat16}
    adapter = json.loads((newest(tmp_path / "run") / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (4, 6)


def test_bam_has_one_optimizer_with_a_rate_for_adapters(runs):
    """The flaw: adapters sat in two optimizers."""
    state = load_file(next(newest(runs["bam"]).glob("optimizer*.safetensors")))
    moments = [name for name in state if "exp_avg_sq" in name]
    adapters = [name for name in weights(runs["bam"]) if name.split()[0] in ("daicwoz.safetensors", "siq2.safetensors")]
    assert len(moments) == len([name for name in adapters if not name.endswith(("center", "scale"))])
    trained = [line.record for line in read_jsonl(runs["bam"] / "log.jsonl") if line.record["kind"] == "train"]
    assert max(record["learning_rate"] for record in trained) == pytest.approx(2e-2)  # that of the adapters


# --- the loss is on the answer ----------------------------------------------------------------------------------------


def test_states_predict_the_next_token_once_shifted_once_normed(base, mini_atlas):
    """The flaws: the answer loss was shifted twice, left padding was taken for the prompt, the norm came twice."""
    model = OmniSapiens.from_pretrained(base).eval()
    batch = mixed_batch(model, open_atlas(mini_atlas, split="train"), ["siq2", "intentqa", "mimeqa"], answers=True)
    assert (batch.inputs["attention_mask"] == 0).any(), "padded on the left"
    logits_BTV = model.transformer(**batch.inputs, use_cache=False).logits
    end = model.processor.tokenizer.eos_token_id
    for row, (feature, sample) in enumerate(zip(extract(model, batch), batch.samples, strict=True)):
        tokens = model.processor.tokenizer(sample.target, add_special_tokens=False)["input_ids"]
        assert feature.tokens_L.tolist() == [*tokens, end]
        expected_LV = logits_BTV[row, -len(feature.tokens_L) - 1 : -1]
        torch.testing.assert_close(model.transformer.lm_head(feature.states_LH), expected_LV, atol=1e-4, rtol=1e-4)
    model.forward = lambda batch: torch.empty(1 << 56)  # no machine has that
    with pytest.raises(MachineError, match=r"no room for a batch of \d+ samples of up to") as told:
        extract(model, batch)
    assert f"features.batch_size={len(batch) // 2}" in told.value.fix and batch.samples[0].id in told.value.where


def test_exact_under_teacher_forcing_is_what_greedy_decoding_gives(runs, mini_atlas):
    """Targets are made of the model's own answers, half of them with a token changed."""
    model = OmniSapiens.from_pretrained(runs["qa"]).eval()
    atlas = open_atlas(mini_atlas, split="test")
    batch = mixed_batch(model, atlas, ["siq2", "intentqa", "mimeqa"], answers=True)
    found = extract(model, batch)
    prompts = mixed_batch(model, atlas, ["siq2", "intentqa", "mimeqa"])
    said = model.generate(prompts, max_new_tokens=32)
    banned = media_token_ids(model.transformer.config, model.processor)
    for feature, text, sample in zip(found, said, batch.samples, strict=True):
        lengths = torch.tensor([len(feature.tokens_L)])
        (right,) = exact(model.transformer.lm_head(feature.states_LH), feature.tokens_L, lengths, banned)
        assert right == (text == sample.target)


def test_a_checkpoint_of_a_later_training_keeps_lm_head_and_adapters(runs, tmp_path, backbone):
    """Whatever trains on from stage 2 or 3 and saves the whole model, with a backbone that is not saved with it."""
    for stage, run in runs.items():
        model = OmniSapiens.from_pretrained(run)
        kept = {"backbone": str(backbone), "strategy": "heads", "encode": EncodeConfig(), "speaks": True}
        model.save_pretrained(tmp_path / stage, **kept)
        again = OmniSapiens.from_pretrained(tmp_path / stage)
        assert torch.equal(again.transformer.lm_head.weight, model.transformer.lm_head.weight) or stage == "bam"
        assert (again.bam is None) == (stage == "qa") and again.speaks


# --- caches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_the_cache_changes_no_loss(stage, runs, tmp_path, mini_atlas, base):
    train(stage, tmp_path / "run", mini_atlas, base, "features.cache=false")
    assert losses(tmp_path / "run") == pytest.approx(losses(runs[stage]), abs=1e-5)


def test_a_standing_cache_is_read_without_the_backbone(runs, tmp_path, mini_atlas, base, monkeypatch):
    shards = {path: path.stat().st_mtime_ns for path in (base / "features").rglob("*.safetensors")}
    assert shards
    monkeypatch.setattr(OmniSapiens, "from_pretrained", lambda *_, **__: pytest.fail("the backbone was loaded"))
    train("bam", tmp_path / "bam", mini_atlas, base, "train.seed=1", "train.max_steps=2", "datasets=[siq2]")
    train("qa", tmp_path / "qa", mini_atlas, base, "train.seed=1", "train.max_steps=2")
    assert shards == {path: path.stat().st_mtime_ns for path in (base / "features").rglob("*.safetensors")}


@pytest.mark.parametrize("stage", STAGES)
def test_the_backbone_goes_once_its_features_are_cached(stage, tmp_path, mini_atlas, base, monkeypatch):
    loaded, left = weakref.WeakSet(), []
    load, run_training = OmniSapiens.from_pretrained, loop.run_training

    def watched(*args, **options):
        model = load(*args, **options)
        loaded.add(model.transformer)
        return model

    def train_now(*args):
        left.append(len(loaded))
        return run_training(*args)

    monkeypatch.setattr(OmniSapiens, "from_pretrained", watched)
    monkeypatch.setattr(loop, "run_training", train_now)
    rows = ["train_split=train[:90]", "validation_split=validation[:90]", "datasets=[siq2]", "train.max_steps=1"]
    train(stage, tmp_path / "run", mini_atlas, base, f"features.folder={tmp_path / 'features'}", *rows)
    assert left == [0] and list((tmp_path / "features").rglob("*.safetensors"))


def test_other_commands_are_not_kept_out_of_the_features_while_the_backbone_is_hashed(
    tmp_path, mini_atlas, base, monkeypatch
):
    """That takes minutes at 7B, and a sweep starts many commands on one cache at once."""
    hashes, entered = checkpoint.backbone_hashes, []

    def hashed(folder):
        with locked_folder(tmp_path / "features/train/siq2"):
            entered.append(folder)
        return hashes(folder)

    monkeypatch.setattr(checkpoint, "backbone_hashes", hashed)
    few = ["datasets=[siq2]", "train.max_steps=1", f"features.folder={tmp_path / 'features'}"]
    train("qa", tmp_path / "run", mini_atlas, base, *few)
    assert entered


def test_stale_features_are_named_and_computed_again(runs, tmp_path, mini_atlas, base, caplog):
    copy = tmp_path / "sft"
    shutil.copytree(base, copy)
    best = checkpoint.resolve(copy)
    card = json.loads((best / "hba.json").read_text())
    (best / "hba.json").write_text(json.dumps({**card, "encode": {**card["encode"], "num_frames": 4}}))
    with caplog.at_level(logging.WARNING):
        train("bam", tmp_path / "bam", mini_atlas, copy, "datasets=[daicwoz]", "train.max_steps=4")
    assert "features/train/daicwoz were computed with another encoding: computing them again" in caplog.text
    assert losses(tmp_path / "bam")[0] != losses(runs["bam"])[0]


def test_a_damaged_shard_is_named(runs, tmp_path, mini_atlas, base):
    copy = tmp_path / "sft"
    shutil.copytree(base, copy)
    (copy / "features/train/daicwoz/shard_00000.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match=r"daicwoz/shard_00000\.safetensors: not a shard of features.*Remove the file"):
        train("bam", tmp_path / "bam", mini_atlas, copy, "datasets=[daicwoz]")


@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_resumed_equals_uninterrupted(stage, runs, launch, tmp_path, mini_atlas, base):
    """Once while features are computed, once after a checkpoint."""
    copy, run = tmp_path / "sft", tmp_path / "run"
    shutil.copytree(base, copy)
    shutil.rmtree(copy / "features")
    own = [f"atlas={mini_atlas}", "--from", str(copy), *LATER, *STAGES[stage][2]]
    if stage == "bam":
        own = [word for word in own if not word.startswith("datasets")] + ["--dataset", "daicwoz", "--dataset", "siq2"]
    command = ["train", stage, "--run", run, *own]
    for function, sign in (
        ("hba.train.features:write_shard", "features/train/*/shard_*.safetensors"),
        ("hba.train.loop:save_state", "../run/checkpoints/step_4"),
    ):
        assert launch(command, ranks=1, dies=Dies(0, function, "after")).code == -9
        assert list(copy.glob(sign))
    done = launch(command, ranks=1)
    assert done.code == 0, done.err
    assert losses(run) == losses(runs[stage])
    assert same(weights(run), weights(runs[stage]))


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "field"), [(s, f) for s in STAGES for f in ("audios", "videos")])
def test_another_medium_changes_the_loss(stage, field, runs, tmp_path, mini_atlas, base):
    """The flaw: decoded audio and video never reached the model in the QA and BAM trainers."""
    atlas = tmp_path / "atlas"
    shutil.copytree(mini_atlas, atlas)
    lines = (atlas / "train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    dataset = "siq2" if stage == "qa" else "daicwoz"
    places = [i for i, row in enumerate(rows) if row["dataset"] == dataset]
    rows[places[0]][field] = rows[places[1]][field]
    (atlas / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    cache = f"features.folder={tmp_path / 'features'}"
    chosen = [f"datasets=[{dataset}]", "train.batch_size=8", "train.max_steps=1", cache]
    train(stage, tmp_path / "swapped", atlas, base, *chosen)
    train(stage, tmp_path / "as it was", mini_atlas, base, *chosen)
    assert losses(tmp_path / "swapped") != losses(tmp_path / "as it was")


def without_descriptors(atlas, copy, dataset, count):
    shutil.copytree(atlas, copy)
    rows = [json.loads(line) for line in (copy / "train.jsonl").read_text().splitlines()]
    victims = [(i, row) for i, row in enumerate(rows, 1) if row["dataset"] == dataset][:count]
    for _, row in victims:
        row["ext_video_feats"] = []
    (copy / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return [f"train/{i}" for i, _ in victims]


def test_missing_descriptors_are_named_unless_allowed(tmp_path, mini_atlas, base):
    atlas = tmp_path / "atlas"
    names = without_descriptors(mini_atlas, atlas, "daicwoz", 2)
    cache = f"features.folder={tmp_path / 'features'}"
    with pytest.raises(InputError, match=rf"2 samples .*{names[0]} \(video\), {names[1]} \(video\).*--allow-missing"):
        train("bam", tmp_path / "bam", atlas, base, "datasets=[daicwoz]", cache)
    allowed = ["datasets=[daicwoz]", cache, "descriptors.allow_missing=true", "train.max_steps=2"]
    assert train("bam", tmp_path / "bam2", atlas, base, *allowed).step == 2


def test_a_data_set_without_descriptors_is_refused_by_name_and_left_out_of_all(tmp_path, mini_atlas, base, caplog):
    with pytest.raises(InputError, match="no descriptors in mimeqa"):
        train("bam", tmp_path / "one", mini_atlas, base, "datasets=[mimeqa]")
    with caplog.at_level(logging.WARNING):
        train("bam", tmp_path / "all", mini_atlas, base, "datasets=null", "train.max_steps=1")
    assert "without adapters: chsimsv2, intentqa, mimeqa" in caplog.text
    kept = {path.stem for path in (newest(tmp_path / "all") / "bam").glob("*.json")}
    assert len(kept) == 13 and not kept & {"chsimsv2", "intentqa", "mimeqa"}


def test_a_broken_medium_is_quarantined_by_the_cache(tmp_path, mini_atlas, base):
    atlas = tmp_path / "atlas"
    shutil.copytree(mini_atlas, atlas)
    rows = [json.loads(line) for line in (atlas / "train.jsonl").read_text().splitlines()]
    number, row = next((i, row) for i, row in enumerate(rows, 1) if row["dataset"] == "daicwoz")
    (atlas / row["audios"][0]).write_bytes(b"")
    cache, run = f"features.folder={tmp_path / 'features'}", tmp_path / "run"
    progress = train("bam", run, atlas, base, "datasets=[daicwoz]", "train.epochs=2", cache)
    assert progress.samples_seen == 2 * (sum(r["dataset"] == "daicwoz" for r in rows) - 1)
    (record,) = [line.record for line in read_jsonl(run / "quarantine.jsonl")]
    assert (record["id"], record["field"]) == (f"train/{number}", "audios")


@pytest.mark.parametrize(("stage", "dataset"), [("qa", "siq2"), ("bam", "daicwoz")])
def test_a_validation_row_that_cannot_be_read_is_quarantined_and_no_crash(stage, dataset, tmp_path, mini_atlas, base):
    """Batches of one row: the one that is left out leaves an empty batch."""
    atlas = tmp_path / "atlas"
    shutil.copytree(mini_atlas, atlas)
    rows = [json.loads(line) for line in (atlas / "validation.jsonl").read_text().splitlines()]
    number, row = next((i, row) for i, row in enumerate(rows, 1) if row["dataset"] == dataset)
    (atlas / (row["audios"] or row["videos"])[0]).write_bytes(b"")
    options = ["train.max_steps=1", f"features.folder={tmp_path / 'features'}", "features.batch_size=1"]
    train(stage, tmp_path / "run", atlas, base, f"datasets=[{dataset}]", *options)
    ids = [line.record["id"] for line in read_jsonl(tmp_path / "run" / "quarantine.jsonl")]
    assert ids == [f"validation/{number}"]


def test_stages_stand_on_trained_heads(tmp_path, mini_atlas, backbone):
    for stage in STAGES:
        with pytest.raises(InputError, match="has no trained heads"):
            train(stage, tmp_path / stage, mini_atlas, backbone)


# --- predictions ------------------------------------------------------------------------------------------------------


def test_predictions_answer_free_form_rows_and_take_adapters_along(runs, tmp_path, mini_atlas):
    options = load_config(PredictConfig, None, ["loader.workers=0", "generation.max_tokens=8"])
    for stage, run in runs.items():
        said = predict_run(str(run), tmp_path / stage, atlas=str(mini_atlas), split="test", config=options,
                           progress=lambda *_: None)  # fmt: skip
        assert said.skipped == 0
    lines = {stage: read_jsonl(tmp_path / stage / "predictions.jsonl") for stage in runs}
    qa, bam = ({line.record["id"]: line.record for line in lines[stage]} for stage in ("qa", "bam"))
    free = [row for row in qa.values() if row["dataset"] in ("siq2", "intentqa", "mimeqa")]
    assert free and all(row["output"] is not None and "probs" not in row for row in free)
    assert all(row["finish"] == "stop" or (row["finish"], row["tokens_out"]) == ("length", 8) for row in free)
    assert all(1 <= row["tokens_out"] <= 8 for row in free)
    changed = {row["dataset"] for key, row in bam.items() if "probs" in row and row["probs"] != qa[key]["probs"]}
    assert changed == {"daicwoz"}
    identity = json.loads((Path(tmp_path) / "bam/predict.json").read_text())["identity"]
    assert identity["model"] != json.loads((tmp_path / "qa/predict.json").read_text())["identity"]["model"]
