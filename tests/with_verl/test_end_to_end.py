"""True runs on Ray with verl unpatched, on the CPU: HARPO on one worker with its reward, from a generative checkpoint,
killed and resumed, its rollouts judged by the local engine, one sample unreadable, its checkpoint merged and asked;
GRPO on two workers."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("verl", reason="verl is not installed: make test-verl", exc_type=ImportError)
psutil = pytest.importorskip("psutil")

import numpy as np  # noqa: E402
from verl_run import environment, lines, on_a_cpu  # noqa: E402

from hba import open_atlas  # noqa: E402
from hba.config import load_config  # noqa: E402
from hba.rl.advantages import build_advantage  # noqa: E402
from hba.rl.config import RlConfig  # noqa: E402
from hba.rl.evaluation_log import read_evaluations  # noqa: E402
from hba.rl.rows import training_rows  # noqa: E402
from hba.rl.scoring import Scorer  # noqa: E402
from hba.rl.verl.trainer import STATE  # noqa: E402

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
MINUTES, STEPS, SAVED, KILLED = 60, 20, 10, 12
DATA = ["datasets=[mmpsy_anxiety,mmsd]", "encode.num_frames=2", "encode.min_pixels=3136", "encode.max_pixels=3136"]
SETTINGS = [
    *("model.strategy=full", "model.dtype=float32", "train.epochs=60", "train.batch_size=6", "train.weight_decay=0.0"),
    *(f"train.max_steps={STEPS}", "train.learning_rate=5e-4", "train.beta2=0.99", f"train.validate_every={SAVED}"),
    *("rollout.per_prompt=4", "rollout.max_new_tokens=24", "table_every=1", "table_prompts=100"),
    *("validation_split=train", "validation_rows=null", "encode.max_tokens=1024", "loader.workers=0"),
    *("verl.rollout=transformers_cpu", "verl.modules=[cpu_support]", "verl.agent_workers=1", "verl.reward_workers=1"),
]
QUICK = [  # verl's own buffer of prompts polls every two seconds
    "trainer.v1.sampler.custom_sampler.path=pkg://cpu_rollout",
    "trainer.v1.sampler.custom_sampler.name=QuickBuffer",
]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory, mini_atlas):
    """The mini-atlas with one sound of a training row of mmpsy_anxiety cut off."""
    atlas = tmp_path_factory.mktemp("damaged") / "atlas"
    shutil.copytree(mini_atlas, atlas)
    row = open_atlas(atlas, split="train").filter(datasets=["mmpsy_anxiety"])[0]
    (medium,) = lines(atlas / "train.jsonl")[row.number]["audios"]
    (atlas / medium).write_bytes((atlas / medium).read_bytes()[:20])
    return atlas, row.id


@pytest.fixture(scope="module")
def speaks(tmp_path_factory, mini_atlas, backbone):
    """A model after 150 steps of generative training, asked to think, as the demo's is before RL."""
    run = tmp_path_factory.mktemp("lm") / "run"
    options = [f"atlas={mini_atlas}", f"model.name={backbone}", *DATA, "train.epochs=60", "train.max_steps=150"]
    called = [sys.executable, "-m", "hba", "train", "lm", "--config", "speak_tiny", "--run", str(run), *options]
    done = subprocess.run(
        [*called, "train.validate_every=150"], env=environment(HERE), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return run


def command(run, atlas, model, *settings, gpus=1):
    options = [f"atlas={atlas}", f"model.name={model}", *DATA, *SETTINGS, *settings]
    options += [f"verl.gpus_per_node={gpus}", f"verl.overrides=[{', '.join([*on_a_cpu(gpus), *QUICK])}]"]
    return [sys.executable, "-m", "hba", "train", "rl", "--engine", "verl", "--json", "--run", str(run), *options]


def trained(arguments, code=0):
    done = subprocess.run(
        arguments, env=environment(HERE), capture_output=True, text=True, timeout=10 * MINUTES, check=False
    )
    assert done.returncode == code, done.stderr[-6000:]
    return json.loads(done.stdout), done.stderr


def steps_of(run):
    return [line for line in lines(run / "log.jsonl") if line["kind"] == "rl"]


def killed_after(arguments, run, steps):
    """Start, and kill -9 the command and all that it started when `steps` steps are logged."""
    process = subprocess.Popen(arguments, env=environment(HERE), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 8 * MINUTES
    while len(steps_of(run)) < steps:
        assert process.poll() is None, (run / "verl" / "verl.log").read_text()[-6000:]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        try:
            one.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    process.wait()


@pytest.fixture(scope="module")
def harpo(tmp_path_factory, damaged, speaks):
    """A HARPO run killed after step 12 and resumed from the checkpoint of step 10; answers 2 for what was left out."""
    run = tmp_path_factory.mktemp("harpo") / "run"
    arguments = command(run, damaged[0], speaks, "algorithm=harpo")
    killed_after(arguments, run, KILLED)
    result, said = trained(arguments, code=2)
    assert (result["step"], result["quarantined"]) == (STEPS, 1)
    assert f"quarantined {damaged[1]}" in said
    return run


def test_killed_and_resumed_every_step_and_evaluation_is_there_once(harpo):
    assert [line["step"] for line in steps_of(harpo)] == list(range(1, STEPS + 1))
    evaluated = [line["step"] for line in lines(harpo / "log.jsonl") if line["kind"] == "evaluation"]
    assert evaluated == sorted(read_evaluations(harpo)) == [0, SAVED, STEPS]
    assert all({"loss", "grad_norm", "learning_rate", "entropy"} <= step.keys() for step in steps_of(harpo))


def test_what_cannot_be_read_is_named_once_and_the_rest_goes_on(harpo, damaged):
    (record,) = lines(harpo / "quarantine.jsonl")
    assert (record["id"], record["field"]) == (damaged[1], "audios")
    assert all(damaged[1] not in {r["id"] for r in records} for records in read_evaluations(harpo).values())
    assert len(read_evaluations(harpo)[0]) == len(training_rows(load_config(RlConfig, harpo / "config.yaml"))) - 1


def test_rewards_and_advantages_are_the_local_engines_over_steps_and_the_resume(harpo):
    config = load_config(RlConfig, harpo / "config.yaml")
    scorer, advantage = Scorer(config.reward), build_advantage("harpo")
    rows = {sample.id: sample for sample in training_rows(config)}
    table = lines(harpo / "rollouts.jsonl")
    for step in range(1, STEPS + 1):
        own = [line for line in table if line["step"] == step]
        assert len(own) in (6 * 4, 5 * 4)  # all prompts, or all but the one that cannot be read
        parts = scorer([o["response"] for o in own], [rows[o["id"]] for o in own], [o["tokens"] for o in own])
        np.testing.assert_allclose([o["parts"]["score"] for o in own], [p["score"] for p in parts], atol=1e-6)
        assert [o["task"] for o in own] == [rows[o["id"]].task for o in own]
        expected = advantage([p["score"] for p in parts], [o["group"] for o in own], [o["task"] for o in own])
        np.testing.assert_allclose([o["advantage"] for o in own], expected, atol=1e-6)
    kept = json.loads((harpo / "verl" / "checkpoints" / f"global_step_{STEPS}" / STATE).read_text())["advantage"]
    for name, averages in advantage.state_dict().items():
        assert kept[name] == pytest.approx(averages, abs=1e-6)


def test_the_actor_and_the_sampling_engine_agree_on_probabilities(harpo):
    steps = [line["data"] for file in (harpo / "verl").glob("metrics-from-*.jsonl") for line in lines(file)]
    found = [step["rollout_corr/log_ppl_abs_diff"] for step in steps if "rollout_corr/log_ppl_abs_diff" in step]
    assert len(found) >= STEPS
    assert max(found) < 1e-4  # of the mean log-probability of a response


def test_the_merged_model_is_asked_and_the_run_reported_like_any_other(harpo, hba, tmp_path, mini_atlas):
    code, _, err = hba("merge", harpo, tmp_path / "model", "--dtype", "float32")
    assert code == 0, err
    out = tmp_path / "predicted"
    code, _, err = hba(
        "predict", tmp_path / "model", "--backend", "hf", "--atlas", mini_atlas, "--split", "test[:4]", "--run", out
    )
    assert code == 0, err
    assert len(lines(out / "predictions.jsonl")) == 4
    code, _, err = hba("report", harpo)
    assert code == 0, err
    assert "reward, greedy" in (harpo / "report.html").read_text()


def test_grpo_on_two_workers_learns(tmp_path, mini_atlas, backbone):
    """From random weights: with the rewards of the papers a model as tiny as this one does not learn reliably from the
    24 prompts that it knows by heart, so that the reward is how many different letters a response has."""
    run, reward = tmp_path / "run", tmp_path / "own.py"
    reward.write_text("def letters(responses, **_):\n    return [len(set(r)) / 10 for r in responses]\n")
    settings = ["algorithm=grpo", f"reward.function={reward}:letters", f"train.validate_every={STEPS}"]
    settings += ["train.batch_size=8", "train.learning_rate=2e-3", "rollout.max_new_tokens=6", "validation_rows=4"]
    trained(command(run, mini_atlas, backbone, *settings, gpus=2))
    scores = [step["score"] for step in steps_of(run)]
    assert len(scores) == STEPS
    assert np.mean(scores[-5:]) > np.mean(scores[:5])
