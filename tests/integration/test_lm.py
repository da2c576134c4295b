"""Generative SFT end to end: it learns, resumes, opens as OmniSapiens, and trains every family."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from ranks import Dies
from safetensors.torch import load_file

from hba import open_atlas
from hba.batch.encode import IGNORED, collate, encoder_for
from hba.batch.prompt import FormatMix
from hba.config import load_config
from hba.errors import ConfigError, InputError
from hba.evaluate.config import PredictConfig
from hba.evaluate.predict import Selection, open_rows
from hba.model import OmniSapiens, checkpoint
from hba.run import RunFolder
from hba.storage import read_json, read_jsonl, write_json
from hba.train.config import LmConfig
from hba.train.lm import train_lm

sys.path.insert(0, str(Path(__file__).parent.parent))
import tiny_chat

SMALL = [
    *("model.strategy=full", "model.dtype=float32", "train.epochs=1", "train.batch_size=8", "train.log_every=1"),
    *("train.learning_rate=2e-3", "train.validate_every=4", "encode.num_frames=2", "encode.max_pixels=3136"),
    *("train_split=train[:72]", "validation_split=validation[:16]", "loader.workers=0"),
]


def settings(atlas, model, *changes):
    return load_config(LmConfig, None, [f"atlas={atlas}", f"model.name={model}", *SMALL, *changes])


def train(path, config):
    with RunFolder.open(path, config=config, command="train lm", seed=config.train.seed) as run:
        return train_lm(config, run)


def logged(path, kind="train"):
    return [line.record for line in read_jsonl(path / "log.jsonl") if line.record["kind"] == kind]


def weights(run):
    return load_file(run / "checkpoints" / f"step_{logged(run)[-1]['step']}" / "model.safetensors")


@pytest.fixture(scope="module")
def straight(tmp_path_factory, mini_atlas, backbone):
    """A run of one epoch, half plain and half with thinking."""
    run = tmp_path_factory.mktemp("lm") / "run"
    train(run, settings(mini_atlas, backbone, "formats=[plain, think]", 'reasoning="It is {{ answer }}."'))
    return run


def test_the_loss_falls_and_validation_scores_the_response_tokens(straight):
    losses = [record["loss"] for record in logged(straight)]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    validations = logged(straight, "validation")
    assert validations[-1]["loss"] < validations[0]["loss"]
    figures = validations[-1]["metrics"]  # so few steps teach where an answer ends, which does not count
    assert 0 <= figures["answer_accuracy"] <= figures["token_accuracy"] < 1
    best = read_json(straight / "checkpoints" / "best.json")
    assert best["score"] == -min(v["loss"] for v in validations)


def test_the_figures_of_a_validation_are_those_of_answers_without_their_end_tokens(straight, mini_atlas):
    model = OmniSapiens.from_pretrained(straight, dtype="float32", heads=False).eval()
    step = checkpoint.resolve(straight).name
    config = load_config(LmConfig, straight / "config.yaml")
    wording = FormatMix(config.formats, reasoning=config.reasoning, seed=config.train.seed)
    atlas = open_atlas(mini_atlas, split="validation[:16]")
    encoder = encoder_for(model.processor, config.encode, atlas.taxonomy, answers=True, wording=wording)
    right, tokens, whole = 0, 0, 0
    for sample in atlas:
        batch = collate([encoder.encode(sample)], pad_token_id=encoder.pad_token_id)
        with torch.inference_mode():
            same = model(batch).answer_logits_NV.argmax(-1) == batch.labels_BT[batch.labels_BT != IGNORED]
        right, tokens, whole = right + int(same[:-1].sum()), tokens + len(same) - 1, whole + bool(same.all())
    (found,) = (v["metrics"] for v in logged(straight, "validation") if f"step_{v['step']}" == step)
    assert found["token_accuracy"] == pytest.approx(right / tokens)
    assert found["answer_accuracy"] == pytest.approx(whole / len(atlas))


def test_a_run_is_asked_in_the_format_that_it_was_trained_in(straight, tmp_path, mini_atlas):
    def opened(*changes):
        config = load_config(PredictConfig, None, list(changes))
        every = Selection(limit=2)
        return open_rows(str(straight), str(mini_atlas), split="test", config=config, backend="hf", selection=every)

    assert opened().config.generation.format == "plain" and "trained in plain and think" in opened().note
    assert opened("generation.format=think").note is None
    assert "asked in the format boxed, but" in opened("generation.format=boxed").note
    old = tmp_path / "old"
    shutil.copytree(checkpoint.resolve(straight), old)
    card = read_json(old / "hba.json")
    for formats, note in ((["think"], None), (None, "does not say")):
        write_json(old / "hba.json", {**card, "formats": formats})
        config = load_config(PredictConfig, None, [])
        rows = {"split": "test", "config": config, "backend": "hf", "selection": Selection(limit=2)}
        found = open_rows(str(old), str(mini_atlas), **rows)
        assert found.config.generation.format == (formats or ["boxed"])[0]
        assert found.note is None if note is None else note in found.note


def test_a_checkpoint_opens_as_a_chat_model_and_as_omni_sapiens(straight):
    one, other = (OmniSapiens.from_pretrained(straight, dtype="float32", heads=heads) for heads in (False, True))
    theirs = other.transformer.state_dict()
    for name, tensor in one.transformer.state_dict().items():
        assert torch.equal(tensor, theirs[name])
    assert one.processor.chat_template == other.processor.chat_template
    card = checkpoint.read_card(checkpoint.resolve(straight))
    assert card["columns"] is None and card["strategy"] == "full"
    assert checkpoint.encode_config(straight).num_frames == 2


def test_predictions_by_heads_are_refused_where_no_heads_were_trained(straight, mini_atlas):
    from hba.evaluate.config import PredictConfig
    from hba.evaluate.predict import predict_run

    with pytest.raises(InputError, match="without trained heads"):
        predict_run(
            str(straight), straight, atlas=str(mini_atlas), split="test", config=PredictConfig(), backend="heads",
            progress=lambda done, total: None,
        )  # fmt: skip


def test_kill_and_resume_give_the_weights_of_an_uninterrupted_run(straight, launch, tmp_path, mini_atlas, backbone):
    run = tmp_path / "run"
    config = [f"atlas={mini_atlas}", f"model.name={backbone}", *SMALL]
    config += ["formats=[plain, think]", 'reasoning="It is {{ answer }}."']
    command = ["train", "lm", "--run", run, *config]
    died = launch(command, ranks=1, dies=Dies(0, "hba.train.loop:save_state", "after"))
    assert died.codes == [-9] and (run / "checkpoints" / "step_4").is_dir(), died.err
    assert launch(command, ranks=1).code == 0
    expected = weights(straight)
    for name, tensor in weights(run).items():
        assert torch.equal(tensor, expected[name]), name
    assert [(r["step"], r["loss"]) for r in logged(run)] == [(r["step"], r["loss"]) for r in logged(straight)]


@pytest.mark.parametrize("family", tiny_chat.FAMILIES)
def test_other_families_train_with_lora_and_load_again(family, tmp_path, mini_atlas, backbone):
    folder, run = tiny_chat.build(family, backbone, tmp_path / family), tmp_path / "run"
    seen = f"encode.modalities=[{', '.join(tiny_chat.MODALITIES[family])}]"
    steps = ["train.max_steps=8", "train.learning_rate=1e-2", "train.validate_every=8"]
    train(run, settings(mini_atlas, folder, seen, "model.strategy=lora", "model.lora_r=4", *steps))
    losses = [record["loss"] for record in logged(run)]
    assert losses[-1] < losses[0]
    saved = checkpoint.resolve(run)
    assert (saved / "adapter_model.safetensors").is_file() and not (saved / "model.safetensors").is_file()
    assert checkpoint.read_card(saved)["backbone"] == str(folder)
    loaded = OmniSapiens.from_pretrained(run, dtype="float32", heads=False).transformer
    adapters = [tensor for name, tensor in loaded.state_dict().items() if "lora_B" in name]
    assert adapters and any(tensor.abs().max() > 0 for tensor in adapters)


def test_a_lora_run_goes_on_from_another_in_its_adapter(tmp_path, mini_atlas, backbone):
    first, second = tmp_path / "first", tmp_path / "second"
    few = ["model.strategy=lora", "model.lora_r=4", "train.max_steps=2"]
    train(first, settings(mini_atlas, backbone, *few))
    train(second, settings(mini_atlas, first, *few))
    card = checkpoint.read_card(checkpoint.resolve(second))
    assert card["backbone"] == str(backbone)
    assert logged(second)[0]["loss"] < logged(first)[0]["loss"]
    for name, wrong in {"full": ["model.strategy=full"], "rank": ["model.strategy=lora", "model.lora_r=8"]}.items():
        with pytest.raises(ConfigError, match="LoRA layers of rank 4"):
            train(tmp_path / name, settings(mini_atlas, first, *wrong))


def test_thinking_without_reasoning_is_refused_by_row(tmp_path, mini_atlas, backbone):
    with pytest.raises(InputError, match=r"train\.jsonl:\d+: no reasoning"):
        train(tmp_path / "run", settings(mini_atlas, backbone, "formats=[think]"))


def test_recipes_are_whole(mini_atlas, backbone):
    from hba.cli.options import RECIPES

    tiny = load_config(LmConfig, RECIPES / "lm_tiny.yaml", [f"atlas={mini_atlas}", f"model.name={backbone}"])
    assert tiny.formats == ("plain", "think")
    assert load_config(LmConfig, RECIPES / "lm.yaml", [f"atlas={mini_atlas}"]).model.strategy == "lora"
