"""The backend `hf`: any chat model answers in words, in batches that change nothing, from hub id, folder or run."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from hba import open_atlas
from hba.batch.encode import collate, encoder_for
from hba.batch.prompt import FormatMix
from hba.config import load_config
from hba.errors import ConfigError, InputError
from hba.evaluate.answers import read
from hba.evaluate.config import PredictConfig
from hba.evaluate.predict import predict_run
from hba.evaluate.predictions import read_predictions
from hba.evaluate.score import score_run
from hba.model import OmniSapiens
from hba.run import RunFolder
from hba.storage import read_json, write_json
from hba.train.config import LmConfig
from hba.train.lm import train_lm

sys.path.insert(0, str(Path(__file__).parent.parent))
import tiny_chat

SETTINGS = ["generation.max_tokens=6", "encode.num_frames=2", "encode.max_pixels=3136", "loader.workers=0"]


def predict(model, folder, atlas, *changes, split="test[:24]", backend="hf"):
    config = load_config(PredictConfig, None, [*SETTINGS, *changes])
    done = predict_run(
        str(model), folder, atlas=str(atlas), split=split, config=config, backend=backend, progress=lambda _: None
    )
    return done, {p.id: p for p in read_predictions(folder / "predictions.jsonl")}


def said(predictions):
    return {key: (p.output, p.answer, p.label, p.tokens_in, p.tokens_out) for key, p in predictions.items()}


@pytest.fixture(scope="module")
def straight(tmp_path_factory, mini_atlas, backbone):
    """Greedy answers of the tiny Qwen2.5-Omni, in batches of 16."""
    folder = tmp_path_factory.mktemp("hf") / "run"
    return folder, *predict(backbone, folder, mini_atlas)


def test_greedy_answers_are_those_of_omni_sapiens(straight, mini_atlas, backbone):
    _, done, predictions = straight
    atlas, model = open_atlas(mini_atlas, split="test[:24]"), OmniSapiens.from_pretrained(backbone)
    config = load_config(PredictConfig, None, SETTINGS)
    enc = encoder_for(model.processor, config.encode, atlas.taxonomy, wording=FormatMix(["boxed"]))
    assert done.predicted == len(atlas) == 24 and done.skipped == 0
    assert any(sample.label is None for sample in atlas)
    for sample in atlas:
        batch = collate([enc.encode(sample)], pad_token_id=enc.pad_token_id, taxonomy=atlas.taxonomy)
        (text,) = model.generate(batch, max_new_tokens=6)
        mine = predictions[sample.id]
        said = read(text, sample.dataset, atlas.taxonomy, prompt=sample.problem, cut=mine.finish == "length")
        assert mine.output == text and (mine.rule, mine.answer, mine.label) == said
        assert mine.tokens_in == batch.inputs["input_ids"].shape[1]
        assert 1 <= mine.tokens_out <= 6
        assert mine.finish == "stop" or (mine.finish, mine.tokens_out) == ("length", 6)


@pytest.mark.parametrize("family", ["qwen_omni", *tiny_chat.FAMILIES])
def test_batches_of_mixed_lengths_equal_single_samples(family, tmp_path, mini_atlas, backbone):
    model, seen = backbone, "encode.modalities=[image, video, audio]"
    if family != "qwen_omni":
        model = tiny_chat.build(family, backbone, tmp_path / family)
        seen = f"encode.modalities=[{', '.join(tiny_chat.MODALITIES[family])}]"
    _, together = predict(model, tmp_path / "16", mini_atlas, seen, split="test[:12]")
    _, alone = predict(model, tmp_path / "1", mini_atlas, seen, "batch_size=1", split="test[:12]")
    assert said(together) == said(alone) and len(together) == 12
    assert len({p.tokens_in for p in together.values()}) > 1


def test_the_format_decides_the_prompt_and_is_part_of_the_run(straight, tmp_path, mini_atlas, backbone):
    _, _, boxed = straight
    _, thinking = predict(backbone, tmp_path / "think", mini_atlas, "generation.format=think")
    assert all(thinking[key].tokens_in > boxed[key].tokens_in for key in boxed)
    with pytest.raises(InputError, match="another format"):
        predict(backbone, tmp_path / "think", mini_atlas, "generation.format=plain")


def test_what_a_template_opens_stands_in_the_output_and_unended_thinking_has_no_label(tmp_path, mini_atlas, backbone):
    model = tiny_chat.build("llama", backbone, tmp_path / "llama")
    seen = ("encode.modalities=[]", "generation.max_tokens=3")
    _, plain = predict(model, tmp_path / "plain", mini_atlas, *seen)
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + "{% if add_generation_prompt %}<think>\n{% endif %}")
    _, thinking = predict(model, tmp_path / "thinking", mini_atlas, *seen)
    assert not any(p.output.startswith("<think>") for p in plain.values())
    assert all(p.output.startswith("<think>\n") and p.finish == "length" for p in thinking.values())
    assert {(p.rule, p.label, p.tokens_out) for p in thinking.values()} == {("unanswered", None, 3)}


def test_a_model_is_known_by_what_is_in_it_and_what_it_computes_in(straight, tmp_path, mini_atlas, backbone):
    kept = tmp_path / "kept"
    shutil.copytree(straight[0], kept)
    moved = tmp_path / "elsewhere"
    shutil.copytree(backbone, moved)
    predict(moved, kept, mini_atlas)  # another place, the same model
    with pytest.raises(InputError, match="another dtype"):
        predict(moved, kept, mini_atlas, "dtype=bfloat16")
    with pytest.raises(InputError, match="another attention"):
        predict(moved, kept, mini_atlas, "attention=eager")
    config = read_json(moved / "config.json")
    write_json(moved / "config.json", {**config, "initializer_range": 0.01})
    with pytest.raises(InputError, match="another settings"):
        predict(moved, kept, mini_atlas)
    settings = read_json(kept / "predict.json")
    for name in ("dtype", "attention", "settings"):  # as an older version wrote it
        del settings["identity"][name]
    write_json(kept / "predict.json", settings)
    shutil.copyfile(backbone / "config.json", moved / "config.json")
    predict(moved, kept, mini_atlas)


def test_labels_alone_are_said_or_weighed(tmp_path, mini_atlas, backbone):
    plain, atlas = "generation.format=plain", open_atlas(mini_atlas, split="test[:24]")
    _, free = predict(backbone, tmp_path / "free", mini_atlas, plain)
    _, bound = predict(backbone, tmp_path / "bound", mini_atlas, plain, "generation.constrain=labels")
    _, likely = predict(backbone, tmp_path / "likely", mini_atlas, plain, "generation.read=likelihood")
    for sample in atlas:
        if sample.label is None:
            assert bound[sample.id].output == free[sample.id].output == likely[sample.id].output
            assert likely[sample.id].probs is None
            continue
        worded = atlas.taxonomy.worded(sample.dataset, sample.problem)
        assert bound[sample.id].label in worded and bound[sample.id].output == worded[bound[sample.id].label]
        found = likely[sample.id]
        assert found.probs.keys() == worded.keys() and sum(found.probs.values()) == pytest.approx(1)
        assert found.label == max(found.probs, key=found.probs.get)
    assert any(p.label is None for p in free.values())
    identity = read_json(tmp_path / "bound" / "predict.json")["identity"]
    assert identity["constrain"] == "labels" and "read" not in identity
    assert read_json(tmp_path / "likely" / "predict.json")["identity"]["read"] == "likelihood"
    with pytest.raises(InputError, match="another constrain"):
        predict(backbone, tmp_path / "bound", mini_atlas, plain)
    calibrated = score_run(tmp_path / "likely", resamples=100).calibration.all
    assert calibrated.n == sum(p.probs is not None for p in likely.values())
    with pytest.raises(ConfigError, match="leaves no room"):
        predict(backbone, tmp_path / "x", mini_atlas, "generation.format=think", "generation.constrain=labels")


def test_a_device_without_room_is_told_of_in_one_sentence(tmp_path, mini_atlas, backbone, hba, monkeypatch):
    """For answers with their samples; on the way to the device without."""
    monkeypatch.setattr(OmniSapiens, "say", lambda *_, **__: torch.empty(1 << 56))  # no machine has that
    asked = ["--atlas", mini_atlas, "--backend", "hf", "--split", "test[:4]", *SETTINGS]
    code, _, err = hba("predict", backbone, "--run", tmp_path / "said", *asked, "batch_size=2")
    assert code == 1 and "Traceback" not in err
    assert "samples test/" in err and "no room for a batch of 2 samples" in err and "Use batch_size=1;" in err
    monkeypatch.setattr(OmniSapiens, "to", lambda *_: torch.empty(1 << 56))
    code, _, err = hba("predict", backbone, "--run", tmp_path / "moved", *asked)
    assert code == 1 and err.splitlines()[-1].startswith("error: no room in memory (") and "Traceback" not in err


def test_sampling_is_by_seed(tmp_path, mini_atlas, backbone):
    warm = ["generation.temperature=1.0", "generation.seed=1"]
    _, one = predict(backbone, tmp_path / "one", mini_atlas, *warm)
    torch.manual_seed(99)
    _, again = predict(backbone, tmp_path / "again", mini_atlas, *warm)
    _, other = predict(backbone, tmp_path / "other", mini_atlas, warm[0], "generation.seed=2")
    assert said(one) == said(again)
    assert sum(one[key].output != other[key].output for key in one) > len(one) // 2
    assert "seed" in read_json(tmp_path / "one" / "predict.json")["identity"]


def test_a_run_cut_off_anywhere_ends_as_an_uninterrupted_one(straight, tmp_path, mini_atlas, backbone):
    warm = ["generation.temperature=1.0", "batch_size=4"]
    _, whole = predict(backbone, tmp_path / "whole", mini_atlas, *warm)
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    lines = (cut / "predictions.jsonl").read_text().splitlines(keepends=True)
    (cut / "predictions.jsonl").write_text("".join(lines[:7]) + lines[7][:20])
    _, resumed = predict(backbone, cut, mini_atlas, *warm)
    assert said(resumed) == said(whole)
    # A resampled row is computed in its whole batch; a run with other batches is another run.
    with pytest.raises(InputError, match="another batch_size"):
        predict(backbone, cut, mini_atlas, warm[0], "batch_size=8")


@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_an_lm_run_answers_with_what_it_learned(strategy, straight, tmp_path, mini_atlas, backbone):
    run = tmp_path / "lm"
    config = load_config(LmConfig, None, [
        f"atlas={mini_atlas}", f"model.name={backbone}", f"model.strategy={strategy}", "model.dtype=float32",
        "train.max_steps=3", "train.batch_size=8", "train.learning_rate=1e-2", "loader.workers=0",
        "encode.num_frames=2", "encode.max_pixels=3136", "validation_split=validation[:8]",
    ])  # fmt: skip
    with RunFolder.open(run, config=config, command="train lm", seed=0) as folder:
        train_lm(config, folder)
    done, trained = predict(run, tmp_path / "out", mini_atlas, split="test[:24]", backend=None)
    _, _, fresh = straight
    assert done.predicted == 24 and {p.output for p in trained.values()} != {p.output for p in fresh.values()}
    settings = read_json(tmp_path / "out" / "predict.json")
    assert settings["backend"] == "hf" and settings["identity"]["checkpoint"] == "step_3"
    (saved,) = (run / "checkpoints").glob("step_*")
    weights = saved / ("model" if strategy == "full" else "adapter_model")
    weights.with_suffix(".safetensors").write_bytes(weights.with_suffix(".safetensors").read_bytes()[:-4] + b"abcd")
    with pytest.raises(InputError, match="another model"):
        predict(run, tmp_path / "out", mini_atlas, split="test[:24]")


def test_settings_that_only_servers_take_are_refused(tmp_path, mini_atlas, backbone):
    for change, named in (("generation.temperature=null", "temperature"), ("generation.extra={a: 1}", "extra")):
        with pytest.raises(InputError, match=rf"generation\.{named}"):
            predict(backbone, tmp_path / named, mini_atlas, change)


def test_what_the_model_cannot_take_stops_the_run_with_the_filter(tmp_path, mini_atlas, backbone):
    model = tiny_chat.build("gemma3", backbone, tmp_path / "gemma3")
    with pytest.raises(InputError, match=r"takes no audio.*--modalities video"):
        predict(model, tmp_path / "run", mini_atlas)


def test_a_broken_medium_is_quarantined_and_scored_rows_stay(tmp_path, mini_atlas, backbone):
    atlas = tmp_path / "atlas"
    shutil.copytree(mini_atlas, atlas)
    row = next(json.loads(line) for line in (atlas / "test.jsonl").read_text().splitlines() if '"audios": ["' in line)
    (atlas / row["audios"][0]).write_bytes(b"")
    done, predictions = predict(backbone, tmp_path / "run", atlas, split="test")
    broken = {record["id"] for record in done.quarantined}
    assert broken and not broken & set(predictions)
    assert len(broken) + len(predictions) == len(open_atlas(atlas, split="test"))


def test_a_language_head_of_stage_two_is_heard_and_adapters_are_not_ignored(tmp_path, mini_atlas, backbone):
    from hba.batch.config import EncodeConfig
    from hba.model import OmniSapiens

    model = OmniSapiens.from_pretrained(backbone)
    model.own_lm_head = True
    model.untie_lm_head()
    with torch.no_grad():
        model.transformer.lm_head.weight.copy_(model.transformer.lm_head.weight.flip(0))
    folder = tmp_path / "qa"
    model.save_pretrained(folder, backbone=str(backbone), strategy="heads", encode=EncodeConfig())
    heard = OmniSapiens.from_pretrained(folder, heads=False)
    assert torch.equal(heard.transformer.lm_head.weight, model.transformer.lm_head.weight)
    config = load_config(LmConfig, None, [f"atlas={mini_atlas}", f"model.name={folder}", "model.strategy=full"])
    started = RunFolder.open(tmp_path / "lm", config=config, command="train lm", seed=0)
    with started as run, pytest.raises(InputError, match="language head of its own"):
        train_lm(config, run)
    (folder / "bam").mkdir()
    with pytest.raises(InputError, match="BAM adapters, which a chat model ignores"):
        predict(folder, tmp_path / "run", mini_atlas)
