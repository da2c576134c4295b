"""Flaws of the published system that this project must not repeat: what is not proved elsewhere is proved here.

docs/flaws.md lists them all, each with the tests that keep it out.
"""

import json
import os
import shutil

import pytest
import torch

from hba import open_atlas
from hba.batch.config import EncodeConfig, LoaderConfig
from hba.batch.encode import Encoder, collate
from hba.batch.loader import load_batches
from hba.batch.prompt import MODALITIES
from hba.config import load_config
from hba.errors import InputError
from hba.model import OmniSapiens
from hba.model.config import ModelConfig
from hba.rl.local import build_policy
from hba.run import RunFolder
from hba.storage import begun, read_jsonl
from hba.train.config import SftConfig, TrainConfig
from hba.train.loop import build_optimizer, learning_rate_at
from hba.train.sft import sft_loss, train_sft

SMALL = [
    "model.strategy=full", "train.batch_size=4", "train.validate_every=2", "train.log_every=1", "encode.num_frames=2",
    "encode.max_pixels=3136", "loader.workers=0", "validation_split=validation[:12]", "datasets=[tess,meld_emotion]",
]  # fmt: skip


def train(run, atlas, backbone, *overrides):
    config = load_config(SftConfig, None, [f"atlas={atlas}", f"model.name={backbone}", *SMALL, *overrides])
    with RunFolder.open(run, config=config, command="train sft", seed=0) as folder:
        return config, train_sft(config, folder)


def logged(run, kind):
    return [line.record for line in read_jsonl(run / "log.jsonl") if line.record["kind"] == kind]


@pytest.fixture
def fresh(backbone):
    """A model that a test may change."""
    torch.manual_seed(0)
    return OmniSapiens.from_pretrained(backbone)


def batch_with_every_medium(model, atlas, **settings):
    encoder = Encoder(model.processor, EncodeConfig(num_frames=2, max_pixels=3136, **settings))
    wanted = ("text_video_audio", "text_audio", "text")
    samples = [
        next(s for s in atlas if s.label is not None and s.modality_signature == signature) for signature in wanted
    ]
    return collate([encoder.encode(sample) for sample in samples], pad_token_id=encoder.pad_token_id)


# --- training --------------------------------------------------------------------------------------------------------


def test_every_tower_gets_a_gradient_from_the_loss_of_the_heads(fresh, mini_atlas):
    batch = batch_with_every_medium(fresh, open_atlas(mini_atlas, split="train"))
    sft_loss(fresh, batch, answer_weight=0.0).backward()
    grown = {name for name, p in fresh.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
    parts = ("audio_tower.conv1", "visual.patch_embed", "model.embed_tokens")
    for part in (*(f"transformer.{part}" for part in parts), "heads."):
        assert any(name.startswith(part) for name in grown), part


def test_a_modality_that_is_switched_off_reaches_nothing(fresh, mini_atlas):
    """Every switch can be turned off, and turning it off changes what it says."""
    atlas = open_atlas(mini_atlas, split="train")
    keys = {"audio": {"input_features", "feature_attention_mask"}, "video": {"pixel_values_videos", "video_grid_thw"}}
    assert keys["audio"] | keys["video"] <= batch_with_every_medium(fresh, atlas).inputs.keys()
    for off, gone in keys.items():
        rest = tuple(modality for modality in MODALITIES if modality != off)
        batch = batch_with_every_medium(fresh, atlas, modalities=rest)
        assert not gone & batch.inputs.keys()
        (kept,) = keys.keys() - {off}
        assert keys[kept] <= batch.inputs.keys()
        assert torch.isfinite(fresh.classify(batch)[batch.class_index_B >= 0].max(-1).values).all()


@pytest.mark.parametrize("rates", [{}, {"heads.": 1e-2}])
def test_every_trained_parameter_is_in_one_group_of_one_optimizer(fresh, rates):
    fresh.transformer.audio_tower.requires_grad_(False)
    optimizer = build_optimizer(fresh, TrainConfig(learning_rate=1e-3), rates)
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(parameter) for parameter in fresh.parameters() if parameter.requires_grad}
    heads = {id(parameter) for parameter in fresh.heads.parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["peak"] == (rates.get("heads.", 1e-3) if id(parameter) in heads else 1e-3)


def test_the_schedule_of_a_run_ends_with_its_last_step_whatever_is_accumulated(tmp_path, mini_atlas, backbone):
    config, progress = train(tmp_path / "run", mini_atlas, backbone, "train.epochs=3", "train.accumulation=2")
    rates = [line["learning_rate"] for line in logged(tmp_path / "run", "train")]
    whole = config.train.learning_rate
    expected = [whole * learning_rate_at(step, progress.step, config.train) for step in range(progress.step)]
    assert progress.step > 3
    assert rates == pytest.approx(expected)
    assert max(rates) == pytest.approx(whole)
    assert rates[-1] < 0.5 * whole


def test_a_half_written_checkpoint_is_never_resumed_from(tmp_path, mini_atlas, backbone):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    train(straight, mini_atlas, backbone, "train.max_steps=4")
    train(broken, mini_atlas, backbone, "train.max_steps=4")
    checkpoints = broken / "checkpoints"
    # As if the process had been killed while it wrote step 4: the whole folder is there under its unfinished name.
    unfinished = checkpoints / begun(checkpoints / "step_4").name.replace(f"-{os.getpid()}-", "-4194304-")
    shutil.copytree(checkpoints / "step_4", unfinished)
    (unfinished / "model.safetensors").write_bytes(b"half")
    shutil.rmtree(checkpoints / "step_4")
    _, progress = train(broken, mini_atlas, backbone, "train.max_steps=4")
    assert progress.step == 4
    wall_clock = "samples_per_second"
    ours, theirs = ([{**line, wall_clock: 0} for line in logged(run, "train")] for run in (broken, straight))
    assert ours == theirs
    assert not [path for path in checkpoints.iterdir() if path.name.endswith(".tmp")]


def test_the_best_checkpoint_has_the_best_mean_over_tasks_and_no_step_is_skipped(tmp_path, mini_atlas, backbone):
    """No early stopping: a score that stands still neither ends the run nor chooses a later checkpoint."""
    run = tmp_path / "run"
    _, progress = train(run, mini_atlas, backbone, "train.max_steps=8", "train.learning_rate=1e-9")
    validations = logged(run, "validation")
    assert [line["step"] for line in validations] == [2, 4, 6, 8]
    means = [line["metrics"]["mean"] for line in validations]
    for line in validations:
        tasks = [score for name, score in line["metrics"].items() if name != "mean"]
        assert line["metrics"]["mean"] == pytest.approx(sum(tasks) / len(tasks))
    best = json.loads((run / "checkpoints" / "best.json").read_text())
    assert best["score"] == max(means)
    assert best["step"] == progress.best_step == validations[means.index(max(means))]["step"]


class Exploit:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("content", ["code", "cut"])
def test_an_optimizer_state_that_runs_code_or_is_cut_is_refused(tmp_path, mini_atlas, backbone, content):
    run = tmp_path / "run"
    train(run, mini_atlas, backbone, "train.max_steps=4")
    path = run / "checkpoints" / "step_4" / "optimizer-00000-of-00001.safetensors"
    if content == "code":
        torch.save({"optimizer": Exploit(tmp_path / "ran"), "rng": {}}, path)
    else:
        path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(InputError, match=r"step_4: not the optimizer state of a run.*Remove step_4"):
        train(run, mini_atlas, backbone, "train.max_steps=4")
    assert not (tmp_path / "ran").exists()


# --- data ------------------------------------------------------------------------------------------------------------


def test_a_bad_sample_takes_nothing_from_the_others_of_its_batch(tmp_path, mini_atlas, model):
    """The same rows, one of them broken: the batch is that of the other rows, bit for bit."""
    copy = tmp_path / "atlas"
    shutil.copytree(mini_atlas, copy)
    atlas = open_atlas(copy, split="train").filter(datasets=["tess"])
    encoder = Encoder(model.processor, EncodeConfig(num_frames=2, max_pixels=3136))
    line = int(atlas[1].where.rpartition(":")[2])
    row = json.loads((copy / "train.jsonl").read_text().splitlines()[line - 1])
    (copy / row["audios"][0]).write_bytes(b"")
    options = LoaderConfig(workers=0)
    (batch,) = load_batches(atlas, encoder, [torch.tensor([0, 1, 2]).numpy()], options)
    (others,) = load_batches(atlas, encoder, [torch.tensor([0, 2]).numpy()], options)
    assert [sample.id for sample in batch.quarantined] == [atlas[1].id]
    assert batch.inputs.keys() == others.inputs.keys() >= {"input_features"}
    assert all(torch.equal(batch.inputs[name], others.inputs[name]) for name in others.inputs)
    assert torch.equal(batch.class_index_B, others.class_index_B)


# --- switches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("freeze", [True, False])
def test_towers_of_a_policy_train_unless_they_are_frozen(backbone, freeze):
    policy = build_policy(ModelConfig(name=str(backbone), strategy="full"), None, freeze_towers=freeze)
    towers = [p for name, p in policy.transformer.named_parameters() if "visual" in name or "audio_tower" in name]
    assert towers and {p.requires_grad for p in towers} == {not freeze}
