"""`hba transfer` on the mini-atlas: what it holds out, what it compares, and that a kill changes nothing."""

import json
import shutil

import pytest
import yaml
from ranks import Dies
from typer.testing import CliRunner

from hba import open_atlas
from hba.cli import app
from hba.errors import ConfigError, InputError
from hba.model import OmniSapiens
from hba.model.config import ModelConfig
from hba.model.omni import apply_strategy
from hba.storage import read_jsonl
from hba.train.transfer import heldout_datasets, pretraining_datasets

KEYS = ["mosei_senti", "daicwoz"]
FEW = [
    "train.max_steps=3", "train.validate_every=2", "train.batch_size=8", "train.learning_rate=2e-3",
    "encode.num_frames=2", "encode.min_pixels=3136", "encode.max_pixels=3136", "loader.workers=0",
]  # fmt: skip


def arguments(run, atlas, backbone, *more):
    held = [part for key in KEYS for part in ("--heldout", key)]
    config = [f"atlas={atlas}", f"model.name={backbone}", "model.strategy=lora", "model.lora_r=4", *FEW]
    return ["transfer", "--run", str(run), *held, "--json", *config, *more]


@pytest.fixture(scope="module")
def transfer(tmp_path_factory, mini_atlas, backbone):
    run = tmp_path_factory.mktemp("transfer") / "run"
    done = CliRunner().invoke(app, arguments(run, mini_atlas, backbone))
    assert done.exit_code == 0, done.output
    return run, json.loads(done.stdout)


def config_of(run):
    return yaml.safe_load((run / "config.yaml").read_text())


def test_the_pretraining_has_not_seen_what_is_held_out(transfer, mini_atlas):
    run, _ = transfer
    pretrained_on = set(config_of(run / "pretrain")["datasets"])
    assert not pretrained_on & set(KEYS)
    labelled = {s.dataset for s in open_atlas(mini_atlas, split="train") if s.label is not None}
    assert pretrained_on | set(KEYS) == labelled


def test_both_starts_see_the_same_rows_for_the_published_epochs(transfer, backbone):
    run, _ = transfer
    for key in KEYS:
        pretrained, direct = (config_of(run / key / start) for start in ("pretrained", "direct"))
        assert pretrained["model"].pop("name") == str(run / "pretrain")
        assert direct["model"].pop("name") == str(backbone)
        assert pretrained == direct
        assert direct["datasets"] == [key]
        assert direct["train"]["epochs"] == {"mosei_senti": 1, "daicwoz": 2}[key]


def test_figures_are_those_of_the_runs_beside_the_published_ones(transfer):
    run, said = transfer
    assert said == json.loads((run / "transfer.json").read_text())
    assert [row["dataset"] for row in said["rows"]] == KEYS
    for row in said["rows"]:
        for start in ("pretrained", "direct"):
            metrics = json.loads((run / row["dataset"] / start / "metrics.json").read_text())
            assert row[start] == {k: metrics["tasks"][row["task"]][k] for k in ("score", "ci95")}
        assert row["difference"]["score"] == pytest.approx(row["pretrained"]["score"] - row["direct"]["score"])
        low, high = row["difference"]["ci95"]
        assert low <= row["difference"]["score"] <= high
        predicted = [line.record for line in read_jsonl(run / row["dataset"] / "direct" / "predictions.jsonl")]
        assert {record["dataset"] for record in predicted} == {row["dataset"]}
    assert said["rows"][0]["published"] == {"OmniSapiens-7B SFT": 0.724, "Qwen2.5-Omni-7B SFT": 0.612}
    table = (run / "transfer.md").read_text()
    assert "0.724 / 0.612" in table
    assert "not measured here" in table
    assert "Synthetic data" in table


def test_adapters_go_on_from_the_pretrained_ones_on_the_same_backbone(transfer, backbone):
    run, _ = transfer
    best = json.loads((run / KEYS[0] / "pretrained" / "checkpoints" / "best.json").read_text())["step"]
    card = json.loads((run / KEYS[0] / "pretrained" / "checkpoints" / f"step_{best}" / "hba.json").read_text())
    assert card["backbone"] == str(backbone)
    assert OmniSapiens.from_pretrained(run / KEYS[0] / "pretrained").heads.num_classes == 25


def test_a_strategy_that_would_lose_adapters_is_refused(transfer):
    model = OmniSapiens.from_pretrained(transfer[0] / "pretrain")
    with pytest.raises(ConfigError, match="LoRA layers"):
        apply_strategy(model, ModelConfig(name="run", strategy="full"))


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_figures(transfer, launch, tmp_path, mini_atlas, backbone):
    _, said = transfer
    run = tmp_path / "run"
    # Two checkpoints of the pretraining; one of it, two from it, the first of the direct start.
    for place, call in (("pretrain", 1), ("mosei_senti/direct", 4)):
        saved = Dies(0, "hba.train.loop:save_state", "after", call)
        died = launch(arguments(run, mini_atlas, backbone), ranks=1, dies=saved)
        assert died.codes == [-9], died.err
        assert [path.name for path in (run / place / "checkpoints").glob("step_*")] == ["step_2"]
    done = launch(arguments(run, mini_atlas, backbone), ranks=1)
    assert done.code == 0, done.err
    assert json.loads(done.out[0]) == said


def test_the_protocol_names_what_the_atlas_lacks_and_refuses_what_it_cannot_hold_out(mini_atlas):
    atlas = open_atlas(mini_atlas, split="train")
    assert heldout_datasets(atlas, None) == (["mosei_senti", "meld_emotion", "daicwoz"], ["mustard"])
    with pytest.raises(InputError, match="no classification rows of nope"):
        heldout_datasets(atlas, ["nope"])
    with pytest.raises(InputError, match="nothing is left"):
        pretraining_datasets(atlas.filter(datasets=["tess"]), ["tess"])


def test_a_task_that_shall_be_unseen_takes_its_other_datasets_along(tmp_path, mini_atlas):
    """MUStARD is no dataset of the atlas; one's own rows of it leave all of sarcasm out of the pretraining."""
    atlas = tmp_path / "atlas"
    shutil.copytree(mini_atlas, atlas)
    added = {
        "datasets": {"mustard": {"domain": "sarcasm", "labels": ["not sarcasm", "sarcasm"]}},
        "tasks": {"SAR": {"name": "sarcasm detection", "metric": "weighted_f1", "datasets": ["mustard"]}},
    }
    (atlas / "taxonomy.yaml").write_text(yaml.safe_dump(added))
    rows = open_atlas(atlas, split="train").filter(datasets=["mmsd", "tess"])
    assert pretraining_datasets(rows, ["mustard"]) == ("tess",)
