"""Stage 1 on the mini-atlas: exact resume, invariance to accumulation, loud failures, quarantine."""

import json
import math
import shutil
import sys
from functools import partial
from itertools import pairwise

import pytest
import torch
from ranks import Dies
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from hba.config import load_config
from hba.errors import ConfigError, HbaError, InputError, MachineError
from hba.model import OmniSapiens
from hba.model.checkpoint import ADAPTER
from hba.run import RunFolder
from hba.storage import read_jsonl
from hba.train import loop
from hba.train.config import SftConfig, TrainConfig
from hba.train.loop import learning_rate_at
from hba.train.sft import train_sft

SMALL = [
    "model.strategy=full", "train.max_steps=6", "train.epochs=9", "train.batch_size=4", "train.validate_every=2",
    "train.log_every=1", "train.learning_rate=1e-3", "encode.num_frames=4", "encode.min_pixels=3136",
    "encode.max_pixels=3136", "loader.workers=0", "validation_split=validation[:12]",
]  # fmt: skip


def settings(atlas, backbone, *overrides):
    return load_config(SftConfig, None, [f"atlas={atlas}", f"model.name={backbone}", *SMALL, *overrides])


def train(run, config):
    with RunFolder.open(run, config=config, command="train sft", seed=0) as folder:
        return train_sft(config, folder)


def logged(run, kind="train"):
    timing = ("samples_per_second", "time")
    lines = [line.record for line in read_jsonl(run / "log.jsonl")]
    return [{k: v for k, v in r.items() if k not in timing} for r in lines if r["kind"] == kind]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, mini_atlas, backbone):
    """An uninterrupted run."""
    run = tmp_path_factory.mktemp("runs") / "straight"
    train(run, settings(mini_atlas, backbone))
    return run


def test_a_run_leaves_its_whole_record(straight):
    assert {"config.yaml", "environment.json", "log.jsonl", "checkpoints", "tensorboard"} <= {
        p.name for p in straight.iterdir()
    }
    assert [r["step"] for r in logged(straight)] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(r["loss"]) for r in logged(straight))
    assert [r["step"] for r in logged(straight, "validation")] == [2, 4, 6]
    best = json.loads((straight / "checkpoints/best.json").read_text())["step"]
    assert {p.name for p in (straight / "checkpoints").glob("step_*")} == {f"step_{best}", "step_6"}


def test_validation_rows_of_other_domains_alone_are_refused(tmp_path, mini_atlas, backbone):
    rows = ["train_split=train[:1]", "validation_split=validation[6:7]"]
    with pytest.raises(InputError, match="its rows are of sentiment_intensity, the trained heads of emotion"):
        train(tmp_path / "run", settings(mini_atlas, backbone, *rows))


AFTER_A_SAVE = Dies(0, "hba.train.loop:save_state", "after")


def test_killed_and_resumed_equals_uninterrupted(straight, launch, tmp_path, mini_atlas, backbone):
    run = tmp_path / "killed"
    command = ["train", "sft", "--run", run, f"atlas={mini_atlas}", f"model.name={backbone}", *SMALL]
    for step in ("step_2", "step_4"):
        assert launch(command, ranks=1, dies=AFTER_A_SAVE).code == -9
        assert (run / "checkpoints" / step).exists()
    done = launch(command, ranks=1)
    assert done.code == 0, done.err
    assert logged(run) == logged(straight)
    assert logged(run, "validation") == logged(straight, "validation")
    ours, theirs = (load_file(r / "checkpoints/step_6/model.safetensors") for r in (run, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_compiled_layers_train_and_resume_as_plain_ones_do(tmp_path, mini_atlas, backbone, monkeypatch):
    """In bfloat16, with LoRA, dropout and layers computed twice. The graphs run by the backend `eager`, which rounds as
    the model does: to build kernels takes minutes. One graph serves all layers, but the first, below which none trains.
    """
    config = ["model.strategy=lora", "model.dtype=bfloat16", "train.activation_checkpointing=true", "train.max_steps=2"]
    config += ["train.validate_every=1", "validation_split=validation[:4]", "train.batch_size=2"]
    train(tmp_path / "plain", settings(mini_atlas, backbone, *config))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    compiled = settings(mini_atlas, backbone, *config, "train.compile=true")
    counters.clear()
    saved = loop.save_state

    def killed(*arguments):
        saved(*arguments)
        raise InterruptedError

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(loop, "save_state", killed)
        train(tmp_path / "compiled", compiled)
    train(tmp_path / "compiled", compiled)
    assert counters["frames"]["ok"] == counters["frames"]["total"] > 0 and not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 4
    assert logged(tmp_path / "compiled") == logged(tmp_path / "plain")
    ours, theirs = (load_file(tmp_path / name / "checkpoints/step_2" / ADAPTER) for name in ("compiled", "plain"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_without_a_compiler_nothing_is_loaded(tmp_path, mini_atlas, backbone, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"torch.compile needs a C\+\+ compiler \(no-such-compiler\)") as told:
        train(tmp_path / "run", settings(mini_atlas, backbone, "train.compile=true"))
    assert told.value.where == "train.compile" and "train.compile=false" in told.value.fix


@pytest.mark.parametrize(
    ("key", "asked"), [("model.attention", "flash_attention_2"), ("train.kernels", "liger")], ids=["flash", "liger"]
)
def test_what_needs_a_gpu_is_refused_before_anything_is_loaded(hba, tmp_path, key, asked):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, _, err = hba("train", "sft", "--run", tmp_path / "run", "atlas=/nowhere", "model.name=/tmp", f"{key}={asked}")
    said = " ".join(err.split())
    assert code == 2 and f"{key}: {asked} needs a GPU, and there is none. Fix: Use {key}=" in said


def test_a_validation_without_room_names_its_batch(tmp_path, mini_atlas, backbone, monkeypatch):
    monkeypatch.setattr(OmniSapiens, "classify", lambda *_: torch.empty(1 << 56))  # no machine has that
    config = settings(mini_atlas, backbone, "train.max_steps=1", "datasets=[tess]", "validation_split=validation")
    with pytest.raises(MachineError, match=r"no room for a batch of \d samples of up to \d+ tokens") as told:
        train(tmp_path / "run", config)
    assert "Use validation_batch_size=" in told.value.fix and "validation/" in told.value.where


def test_mean_losses_of_the_log_are_those_of_an_uninterrupted_run(launch, tmp_path, mini_atlas, backbone):
    """A run may resume at a checkpoint between two log lines."""
    run, whole = tmp_path / "killed", tmp_path / "whole"
    rare = ["train.log_every=3", "train.validate_every=2"]
    train(whole, settings(mini_atlas, backbone, *rare))
    command = ["train", "sft", "--run", run, f"atlas={mini_atlas}", f"model.name={backbone}", *SMALL, *rare]
    assert launch(command, ranks=1, dies=AFTER_A_SAVE).code == -9
    assert launch(command, ranks=1).code == 0
    assert [record["step"] for record in logged(whole)] == [2, 3, 4, 6]
    assert logged(run) == logged(whole)


def test_accumulation_does_not_change_the_gradient(tmp_path, mini_atlas, backbone):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    # One step sees every row of this dataset, so that the two runs see the same samples whatever their order.
    common = ["train.max_steps=1", "train.validate_every=1", "datasets=[tess]"]
    train(whole, settings(mini_atlas, backbone, *common, "train.batch_size=8"))
    train(halves, settings(mini_atlas, backbone, *common, "train.batch_size=3", "train.accumulation=3"))
    (one,), (other,) = logged(whole), logged(halves)
    assert one["samples_seen"] == other["samples_seen"] == 8
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_the_schedule_counts_optimizer_steps():
    config = TrainConfig(warmup_share=0.1, final_share=0.0)
    shares = [learning_rate_at(step, 100, config) for step in range(100)]
    assert shares[0] == pytest.approx(0.1) and max(shares) == pytest.approx(1.0)
    assert shares.index(max(shares)) in (9, 10)
    assert shares[-1] < 0.001 and all(a > b for a, b in pairwise(shares[10:]))


def test_training_data_order_is_part_of_the_seed(straight, tmp_path, mini_atlas, backbone):
    other = tmp_path / "seed1"
    train(other, settings(mini_atlas, backbone, "train.seed=1"))
    assert [r["loss"] for r in logged(other)] != [r["loss"] for r in logged(straight)]


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_samples(tmp_path, mini_atlas, backbone):
    with pytest.raises(HbaError, match=r"samples train/\d+.*(loss|gradient) is (nan|inf)"):
        train(tmp_path / "nan", settings(mini_atlas, backbone, "train.learning_rate=1e30", "train.max_grad_norm=1e30"))


def test_a_broken_medium_is_quarantined_and_the_run_goes_on(tmp_path, mini_atlas, backbone):
    atlas = tmp_path / "atlas"
    shutil.copytree(mini_atlas, atlas)
    victims = {}
    for line in read_jsonl(atlas / "train.jsonl"):
        if line.record["dataset"] == "tess" and len(victims) < 2:
            (atlas / line.record["audios"][0]).write_bytes(b"")
            victims[line.record.get("id", f"train/{line.number}")] = line.record["audios"][0]
    run = tmp_path / "run"
    train(run, settings(atlas, backbone, "datasets=[tess]", "train.epochs=1", "train.batch_size=2"))
    records = [line.record for line in read_jsonl(run / "quarantine.jsonl")]
    assert {r["id"] for r in records} == set(victims)
    assert all("train.jsonl:" in r["where"] and r["field"] == "audios" for r in records)


def test_a_validation_without_any_score_does_not_end_the_run(tmp_path, mini_atlas, backbone, caplog, hba):
    """Two-class sentiment leaves neutral rows out: of these alone it has no score. The last checkpoint is the best."""
    atlas, run = tmp_path / "atlas", tmp_path / "run"
    shutil.copytree(mini_atlas, atlas)
    for split in ("validation", "test"):
        rows = [line.record for line in read_jsonl(atlas / f"{split}.jsonl")]
        for row in (row for row in rows if row["dataset"] == "mosei_senti"):
            row.update({name: "neutral" for name in ("answer", "class_label") if name in row})
        (atlas / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [f"atlas={atlas}", f"model.name={backbone}", *SMALL, "train.max_steps=2", "train.validate_every=1"]
    code, out, _ = hba("train", "sft", "--run", run, *given, "datasets=[mosei_senti]")
    assert code == 0 and "no task of the validation has a score" in out
    assert "the last checkpoint counts as the best" in caplog.text
    assert [record["metrics"] for record in logged(run, "validation")] == [{"mean": None}] * 2
    assert json.loads((run / "checkpoints" / "best.json").read_text()) == {"step": 2, "score": None}
    code, out, err = hba("transfer", "--run", tmp_path / "transfer", "--json", "--heldout", "mosei_senti", *given)
    assert code == 0, err
    (row,) = json.loads(out)["rows"]
    assert (row["task"], row["n"], row["pretrained"]["score"], row["difference"]["score"]) == ("SEN", 6, None, None)


def test_every_run_folder_is_a_wandb_run_of_its_own_with_its_config(tmp_path, mini_atlas, backbone, monkeypatch):
    """A package in the place of the real one, which wants an account: it writes down what it is told."""
    (tmp_path / "wandb.py").write_text("""
import json, pathlib
class Run:
    def log(self, numbers, step): pass
    def finish(self): pass
def init(**told):
    with (pathlib.Path(__file__).parent / "told.jsonl").open("a") as file:
        file.write(json.dumps(told) + "\\n")
    return Run()
""")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    runs = [tmp_path / name / "sft" for name in ("a", "b")]
    for run, steps in ((runs[0], 1), (runs[1], 1), (runs[0], 1)):
        train(run, settings(mini_atlas, backbone, f"train.max_steps={steps}", "train.wandb_project=emotions"))
    first, second, again = (json.loads(line) for line in (tmp_path / "told.jsonl").read_text().splitlines())
    assert first["id"] == again["id"] != second["id"]
    assert [first["name"], second["name"], first["project"]] == ["a/sft", "b/sft", "emotions"]
    assert first["config"]["train"]["learning_rate"] == 1e-3 and first["config"]["atlas"] == str(mini_atlas)


def test_workers_do_not_change_the_batches(straight, tmp_path, mini_atlas, backbone):
    run = tmp_path / "workers"
    train(run, settings(mini_atlas, backbone, "loader.workers=2"))
    assert logged(run) == logged(straight)


def test_a_run_killed_before_it_named_its_best_checkpoint_names_it_on_resume(straight, tmp_path, mini_atlas, backbone):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    best = run / "checkpoints" / "best.json"
    expected = best.read_text()
    best.unlink()
    train(run, settings(mini_atlas, backbone))
    assert best.read_text() == expected
