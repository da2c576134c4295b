"""True runs on Ray with verl unpatched, on the CPU: HARPO killed and resumed, its rollouts judged by the local engine,
its checkpoint merged and asked; GRPO on two workers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("verl", reason="verl is not installed: make test-verl", exc_type=ImportError)
psutil = pytest.importorskip("psutil")

import numpy as np  # noqa: E402

from hba.config import load_config  # noqa: E402
from hba.rl.advantages import build_advantage  # noqa: E402
from hba.rl.config import RlConfig  # noqa: E402
from hba.rl.rows import training_rows  # noqa: E402
from hba.rl.scoring import Scorer  # noqa: E402

pytestmark = pytest.mark.slow
MINUTES = 60
SETTINGS = [
    *("model.strategy=full", "model.dtype=float32", "train.epochs=20", "train.batch_size=2", "train.accumulation=2"),
    *("train.learning_rate=2e-3", "train.validate_every=2", "train.weight_decay=0.0", "validation_rows=4"),
    *("rollout.per_prompt=4", "rollout.max_new_tokens=6", "table_every=1", "table_prompts=100"),
    *("encode.num_frames=2", "encode.max_pixels=3136", "encode.max_tokens=1024", "loader.workers=0"),
    *("verl.rollout=transformers_cpu", "verl.modules=[cpu_support]", "verl.agent_workers=1", "verl.reward_workers=1"),
]
# A random model says nothing right: how many different letters it uses is something that it can learn.
REWARD = (
    "def letters(responses, **_):\n    return [{'score': len(set(r)) / 10, 'even': len(r) % 2} for r in responses]\n"
)


def command(run, atlas, backbone, *settings, gpus=1):
    reward = run.parent / "own.py"
    reward.write_text(REWARD)
    cpu = [
        *("trainer.device=cpu", f"++ray_kwargs.ray_init.num_gpus={gpus}", "ray_kwargs.ray_init.num_cpus=16"),
        *(
            "++ray_kwargs.ray_init.include_dashboard=false",
            "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        ),
    ]
    options = [f"atlas={atlas}", f"model.name={backbone}", f"reward.function={reward}:letters", *SETTINGS, *settings]
    options += [f"verl.gpus_per_node={gpus}", f"verl.overrides=[{', '.join(cpu)}]"]
    return [sys.executable, "-m", "hba", "train", "rl", "--engine", "verl", "--json", "--run", str(run), *options]


def environment():
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here.parents[1] / "src"), str(here)])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


def trained(arguments):
    done = subprocess.run(
        arguments, env=environment(), capture_output=True, text=True, timeout=10 * MINUTES, check=False
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def killed_after(arguments, run, steps):
    """Start, and kill -9 the command and all that it started when `steps` steps are logged."""
    process = subprocess.Popen(arguments, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 8 * MINUTES
    while sum(line["kind"] == "rl" for line in lines(run / "log.jsonl")) < steps:
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
def harpo(tmp_path_factory, mini_atlas, backbone):
    """A HARPO run of six steps, killed after the third and resumed from the checkpoint of the second."""
    run = tmp_path_factory.mktemp("harpo") / "run"
    arguments = command(run, mini_atlas, backbone, "algorithm=harpo", "train.max_steps=6")
    killed_after(arguments, run, 3)
    result = trained(arguments)
    assert result["step"] == 6
    return run


def test_killed_and_resumed_every_step_is_logged_once(harpo):
    assert [line["step"] for line in lines(harpo / "log.jsonl") if line["kind"] == "rl"] == [1, 2, 3, 4, 5, 6]


def test_rewards_and_advantages_are_the_local_engines_over_steps_and_the_resume(harpo):
    config = load_config(RlConfig, harpo / "config.yaml")
    scorer, advantage = Scorer(config.reward), build_advantage("harpo")
    rows = {sample.id: sample for sample in training_rows(config)}
    table = lines(harpo / "rollouts.jsonl")
    for step in range(1, 7):
        own = [line for line in table if line["step"] == step]
        assert len(own) == 4 * 4
        parts = scorer([o["response"] for o in own], [rows[o["id"]] for o in own], [o["tokens"] for o in own])
        np.testing.assert_allclose([o["parts"]["score"] for o in own], [p["score"] for p in parts], atol=1e-6)
        assert [o["task"] for o in own] == [rows[o["id"]].task for o in own]
        expected = advantage([p["score"] for p in parts], [o["group"] for o in own], [o["task"] for o in own])
        np.testing.assert_allclose([o["advantage"] for o in own], expected, atol=1e-6)
    kept = json.loads((harpo / "verl" / "checkpoints" / "global_step_6" / "hba_advantage.json").read_text())
    for name, averages in advantage.state_dict().items():
        assert kept[name] == pytest.approx(averages, abs=1e-6)


def test_the_actor_and_the_sampling_engine_agree_on_probabilities(harpo):
    steps = [line["data"] for file in (harpo / "verl").glob("metrics-from-*.jsonl") for line in lines(file)]
    found = [step["rollout_corr/log_ppl_abs_diff"] for step in steps if "rollout_corr/log_ppl_abs_diff" in step]
    assert len(found) >= 6
    assert max(found) < 1e-4  # of the mean log-probability of a response


def test_the_merged_model_is_asked_like_any_other(harpo, hba, tmp_path, mini_atlas):
    code, _, err = hba("merge", harpo, tmp_path / "model", "--dtype", "float32")
    assert code == 0, err
    out = tmp_path / "predicted"
    code, _, err = hba(
        "predict", tmp_path / "model", "--backend", "hf", "--atlas", mini_atlas, "--split", "test[:4]", "--run", out
    )
    assert code == 0, err
    assert len(lines(out / "predictions.jsonl")) == 4


def test_grpo_on_two_workers_learns(tmp_path, mini_atlas, backbone):
    run = tmp_path / "run"
    settings = ("algorithm=grpo", "train.max_steps=20", "train.validate_every=20", "train.batch_size=4")
    trained(command(run, mini_atlas, backbone, *settings, gpus=2))
    scores = [line["score"] for line in lines(run / "log.jsonl") if line["kind"] == "rl"]
    assert len(scores) == 20
    assert np.mean(scores[-5:]) > np.mean(scores[:5])
