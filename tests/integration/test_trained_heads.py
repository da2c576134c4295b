"""A head that has seen no row of its domain says nothing: neither the run itself nor what stands on it scores it."""

import json
import shutil

import pytest

from hba import open_atlas
from hba.evaluate.predictions import read_predictions

FEW = ["loader.workers=0", "encode.num_frames=2", "encode.max_pixels=3136"]


@pytest.fixture(scope="module")
def call(request):
    """The command line, for fixtures of a module."""
    import subprocess
    import sys

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", "hba", *map(str, arguments)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done

    return run


@pytest.fixture(scope="module")
def trained(call, tmp_path_factory, mini_atlas, backbone):
    """Two steps on sarcasm alone."""
    run = tmp_path_factory.mktemp("trained") / "sft"
    settings = [f"atlas={mini_atlas}", f"model.name={backbone}", "model.strategy=heads", "datasets=[mmsd]", *FEW]
    call("train", "sft", "--run", run, *settings, "train.max_steps=2", "train.validate_every=2")
    return run


def predicted(hba, model, atlas, run):
    code, out, err = hba("predict", model, "--atlas", atlas, "--run", run, "--json", *FEW)
    assert code == 0, err
    rows = open_atlas(atlas, split="test")
    found = {p.dataset for p in read_predictions(run / "predictions.jsonl")}
    assert json.loads(out)["skipped"] == sum(sample.dataset != "mmsd" for sample in rows)
    return found


def test_a_head_whose_rows_come_after_the_last_step_is_not_trained(call, tmp_path, mini_atlas, backbone):
    """One step of one batch of one signature cannot have reached every domain of the plan."""
    settings = [f"atlas={mini_atlas}", f"model.name={backbone}", "model.strategy=heads", *FEW, "train.batch_size=1"]
    call("train", "sft", "--run", tmp_path, *settings, "train.max_steps=1", "train.validate_every=1")
    (card,) = (json.loads(path.read_text()) for path in tmp_path.glob("checkpoints/step_*/hba.json"))
    assert len(card["domains"]) == 1


def test_rows_of_untrained_heads_are_left_out_and_counted(hba, trained, mini_atlas, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert predicted(hba, trained, mini_atlas, tmp_path / "run") == {"mmsd"}
    code, out, err = hba("score", tmp_path / "run")
    assert code == 0, err
    tasks = json.loads((tmp_path / "run" / "metrics.json").read_text())["tasks"]
    assert {key for key, task in tasks.items() if task["score"] is not None} == {"SAR"}
    jokes = sum(sample.dataset == "urfunny" for sample in open_atlas(mini_atlas, split="test"))
    assert tasks["HUM"]["n_skipped"] == jokes
    untrained = "not scored ({} rows that the model is not trained to answer)"
    assert tasks["HUM"]["note"] == untrained.format(jokes)
    assert tasks["SOC"]["note"] == untrained.format(tasks["SOC"]["n_skipped"])
    shown = " ".join(out.split())
    assert f"HUM humor detection, {tasks['HUM']['note']}" in shown
    assert f"SOC social reasoning, {tasks['SOC']['note']}" in shown  # a judge would have nothing to judge


def test_a_merged_model_and_one_trained_on_know_it_too(hba, call, trained, mini_atlas, tmp_path):
    call("merge", trained, tmp_path / "merged", "--dtype", "float32")
    assert predicted(hba, tmp_path / "merged", mini_atlas, tmp_path / "a") == {"mmsd"}
    settings = [f"atlas={mini_atlas}", f"model.name={trained}", "model.strategy=heads", "datasets=[urfunny]", *FEW]
    call("train", "sft", "--run", tmp_path / "on", *settings, "train.max_steps=1", "train.validate_every=1")
    code, _, err = hba("predict", tmp_path / "on", "--atlas", mini_atlas, "--run", tmp_path / "b", *FEW)
    assert code == 0, err
    assert {p.dataset for p in read_predictions(tmp_path / "b" / "predictions.jsonl")} == {"mmsd", "urfunny"}


def test_a_checkpoint_that_does_not_name_its_heads_is_warned_of_once(hba, trained, mini_atlas, tmp_path):
    (step,) = (path.parent for path in trained.glob("checkpoints/step_*/hba.json"))
    old = tmp_path / "old"
    shutil.copytree(step, old)
    card = json.loads((old / "hba.json").read_text())
    del card["domains"]
    (old / "hba.json").write_text(json.dumps(card))
    command = ["predict", old, "--atlas", mini_atlas, "--run", tmp_path / "run", "--datasets", "mmsd,tess", *FEW]
    code, _, err = hba(*command)
    assert code == 0, err
    (warning,) = (line for line in err.splitlines() if "warning" in line)
    assert warning.startswith(f"warning: {old} does not say which heads were trained")
    assert {p.dataset for p in read_predictions(tmp_path / "run" / "predictions.jsonl")} == {"mmsd", "tess"}
    code, _, err = hba("predict", trained, "--atlas", mini_atlas, "--run", tmp_path / "named", *FEW)
    assert code == 0 and "warning" not in err


def test_rows_of_untrained_heads_alone_are_no_empty_file(hba, trained, mini_atlas, tmp_path):
    code, _, err = hba("predict", trained, "--atlas", mini_atlas, "--run", tmp_path, "--datasets", "tess", *FEW)
    assert code == 0, err
    code, _, err = hba("score", tmp_path)
    assert code == 2 and "heads that were not trained" in err


def test_adapters_alone_need_a_trained_head_and_a_stage_that_trains_it_says_so(hba, trained, mini_atlas, tmp_path):
    bam = ["train", "bam", "--from", trained, f"atlas={mini_atlas}", "--dataset", "daicwoz", "train.max_steps=1"]
    code, _, err = hba(*bam, "--run", tmp_path / "alone")
    assert code == 2 and "no head of mental_health_depression was trained" in err and "adapters+heads" in err
    code, _, err = hba(*bam, "--run", tmp_path / "both", "stage=adapters+heads")
    assert code == 0, err
    (card,) = (json.loads(path.read_text()) for path in (tmp_path / "both").glob("checkpoints/step_*/hba.json"))
    assert card["domains"] == ["mental_health_depression", "sarcasm"]
