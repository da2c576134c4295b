"""True runs on Ray with verl unpatched, on the CPU, from a generative checkpoint: HARPO on one worker, killed, resumed,
its rollouts judged by the local engine, one sample unreadable, its checkpoint merged and asked; beside it, on the same
cores, GRPO on two workers with a KL term. Both raise the reward.

The model knows its 24 prompts by heart and says few answers with their thoughts: what is left to learn in 20
steps is the format.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest

pytest.importorskip("verl", reason="verl is not installed: make test-verl", exc_type=ImportError)
psutil = pytest.importorskip("psutil")

import numpy as np  # noqa: E402
from scipy.stats import bootstrap  # noqa: E402
from verl_run import environment, lines, on_a_cpu  # noqa: E402

from hba import open_atlas  # noqa: E402
from hba.config import load_config  # noqa: E402
from hba.report.rl import changes  # noqa: E402
from hba.rl.advantages import build_advantage  # noqa: E402
from hba.rl.config import RlConfig  # noqa: E402
from hba.rl.evaluation_log import read_evaluations, summary  # noqa: E402
from hba.rl.prompts import training_rows  # noqa: E402
from hba.rl.rewards import Scorer  # noqa: E402
from hba.rl.verl.dataset import step_rows  # noqa: E402
from hba.rl.verl.trainer import STATE  # noqa: E402
from hba.train.config import LmConfig  # noqa: E402
from hba.train.lm import train_lm  # noqa: E402
from hba.train.state import training_run  # noqa: E402

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
RECIPES = HERE.parents[1] / "src" / "hba" / "recipes"
MINUTES, STEPS, SAVED, KILLED = 60, 20, 10, 11
DATA = ["datasets=[mmpsy_anxiety,mmsd]", "encode.num_frames=2", "encode.min_pixels=3136", "encode.max_pixels=3136"]
SETTINGS = [
    *("model.strategy=full", "model.dtype=float32", "train.epochs=60", "train.batch_size=7", "train.weight_decay=0.0"),
    *(f"train.max_steps={STEPS}", "train.learning_rate=3e-4", "train.beta2=0.99", f"train.validate_every={SAVED}"),
    *("rollout.per_prompt=4", "rollout.max_new_tokens=24", "rollout.temperature=0.5"),
    *("table_every=1", "table_prompts=100"),
    *("validation_split=train", "validation_rows=null", "encode.max_tokens=1024", "loader.workers=0"),
    *("verl.rollout=transformers_cpu", "verl.modules=[cpu_support]", "verl.agent_workers=1"),
]
GRPO = ["algorithm=grpo", "loss.kl_weight=0.001", "loss.kl=k3"]
GRPO += [f"train.validate_every={STEPS}", "train.batch_size=5", "validation_rows=12"]
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
    """A model after 200 steps of generative training. Every row is there four times, each in a format of its own."""
    folder = tmp_path_factory.mktemp("lm")
    shutil.copytree(mini_atlas, folder / "atlas")
    rows = (mini_atlas / "train.jsonl").read_text()
    (folder / "atlas" / "train.jsonl").write_text(rows * 4)
    options = [f"atlas={folder / 'atlas'}", f"model.name={backbone}", *DATA, "train.epochs=100", "train.max_steps=200"]
    options += ["formats=[think, think, terse]", "train.validate_every=200"]
    config = load_config(LmConfig, RECIPES / "speak_tiny.yaml", options)
    with training_run(folder / "run", config=config, command="train lm", seed=0) as run:
        train_lm(config, run)
    return folder / "run"


def command(run, atlas, model, *settings, gpus=1):
    options = [f"atlas={atlas}", f"model.name={model}", *DATA, *SETTINGS, *settings]
    options += [f"verl.gpus_per_node={gpus}", f"verl.overrides=[{', '.join([*on_a_cpu(gpus), *QUICK])}]"]
    return [sys.executable, "-m", "hba", "train", "rl", "--engine", "verl", "--json", "--run", str(run), *options]


def started(folder, atlas, model, *settings, gpus=1):
    """The training of the run `folder`/run, with what it says in files of `folder`."""
    arguments = command(folder / "run", atlas, model, *settings, gpus=gpus)
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        return subprocess.Popen(arguments, env=environment(HERE), stdout=out, stderr=err)


def ended(process, folder, code=0):
    """What it printed, and said on standard error."""
    assert process.wait(25 * MINUTES) == code, (folder / "err").read_text()[-6000:]
    return json.loads((folder / "out").read_text()), (folder / "err").read_text()


def steps_of(run):
    return [line for line in lines(run / "log.jsonl") if line["kind"] == "rl"]


def kill_after(process, run, steps):
    """kill -9 the command and all that it started when `steps` steps are logged."""
    deadline = time.monotonic() + 25 * MINUTES
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
def runs(tmp_path_factory, mini_atlas, damaged, speaks):
    """HARPO, killed after step 11, resumed from the checkpoint of step 10, answers 2 for what was left out. And GRPO.

    Most of a start of Ray and verl waits for the imports of one process after the other, so that two runs side by side
    take little longer than one.
    """
    first, second = tmp_path_factory.mktemp("harpo"), tmp_path_factory.mktemp("grpo")
    killed = started(first, damaged[0], speaks, "algorithm=harpo")
    beside = started(second, mini_atlas, speaks, *GRPO, gpus=2)
    kill_after(killed, first / "run", KILLED)
    result, said = ended(started(first, damaged[0], speaks, "algorithm=harpo"), first, code=2)
    assert (result["step"], result["quarantined"]) == (STEPS, 1)
    assert f"quarantined {damaged[1]}" in said
    assert ended(beside, second)[0]["step"] == STEPS
    return first / "run", second / "run"


@pytest.fixture(scope="module")
def harpo(runs):
    return runs[0]


@pytest.fixture(scope="module")
def grpo(runs):
    return runs[1]


def test_a_reward_that_raises_now_and_then_ends_the_run_with_its_traceback(tmp_path, mini_atlas, speaks):
    """verl would drop the responses that it raises on and learn from the others."""
    (tmp_path / "own.py").write_text("def odd(responses, **_):\n    return [1 / (len(r) % 5) for r in responses]\n")
    process = started(tmp_path, mini_atlas, speaks, f"reward.function={tmp_path / 'own.py'}:odd", "validation_rows=12")
    assert process.wait(25 * MINUTES) == 1
    said = (tmp_path / "err").read_text()
    assert "raised ZeroDivisionError: division by zero" in said and 'own.py", line 2, in odd' in said
    assert steps_of(tmp_path / "run") == []


def test_the_last_checkpoint_and_the_best_are_kept(harpo):
    scores = {step: summary(records)["greedy_reward"] for step, records in read_evaluations(harpo).items()}
    saved = {step: score for step, score in scores.items() if step}
    best = max(saved, key=saved.get)
    kept = {path.name for path in (harpo / "verl" / "checkpoints").glob("global_step_*")}
    assert kept == {f"global_step_{best}", f"global_step_{STEPS}"}


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


def test_rewards_and_advantages_are_the_local_engines_over_steps_and_the_resume(harpo, damaged):
    config = load_config(RlConfig, harpo / "config.yaml")
    rows_read = training_rows(config)
    planned = step_rows(rows_read, config)
    assert {len(step) for step in planned} == {3, 7}, "14 prompts with sound alone, 10 with video"
    scorer, advantage = Scorer(config.reward), build_advantage("harpo")
    rows = {sample.id: sample for sample in training_rows(config)}
    table = lines(harpo / "rollouts.jsonl")
    for step in range(1, STEPS + 1):
        own = [line for line in table if line["step"] == step]
        lost = len(planned[step - 1]) * 4 - len(own)
        assert lost == 4 * (damaged[1] in {rows_read[int(row)].id for row in planned[step - 1]})
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


def rises(run):
    """By how much the mean reward of a prompt's responses is higher in the last third of the steps than the first."""
    early, late = defaultdict(list), defaultdict(list)
    for line in lines(run / "rollouts.jsonl"):
        if line["step"] <= STEPS // 3 or line["step"] > STEPS - STEPS // 3:
            (early if line["step"] <= STEPS // 3 else late)[line["id"]].append(line["parts"]["score"])
    return [np.mean(late[i]) - np.mean(early[i]) for i in sorted(early.keys() & late.keys())]


def greedy_rises(run):
    """The same of the greedy response to each prompt, between the first evaluation and the last."""
    first, last = (read_evaluations(run)[step] for step in (0, STEPS))
    return [after["greedy"]["score"] - before["greedy"]["score"] for before, after in zip(first, last, strict=True)]


@pytest.mark.parametrize("risen", [rises, greedy_rises])
def test_the_reward_rises(harpo, grpo, risen):
    """Prompt by prompt, both runs together: 24 prompts are few. By about half of what the format can give, 0.2."""
    both = np.array([*risen(harpo), *risen(grpo)])
    assert len(both) > 24
    assert bootstrap((both,), np.mean, random_state=0).confidence_interval.low > 0


def test_each_run_learns_the_format(harpo, grpo):
    for run in (harpo, grpo):
        (change,) = (change for change in changes(run) if change.name == "format, greedy")
        assert change.low > 0


def test_the_kl_term_is_from_the_policy_of_the_start(grpo):
    """Which is the policy itself in the first step, in the same precision and at the same temperature."""
    found = [step["kl"] for step in steps_of(grpo)]
    assert len(found) == STEPS
    assert found[0] < 1e-6
    assert min(found[1:]) > 0


def test_the_boards_of_both_engines_draw_the_same_names(harpo):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(harpo / "tensorboard"))
    board.Reload()
    drawn = {"rl/score", "rl/entropy", "rl/grad_norm", "rl/sarcasm_cls/score", "evaluation/greedy_reward"}
    assert drawn <= set(board.Tags()["scalars"])
    assert {event.step for event in board.Scalars("rl/score")} == set(range(1, STEPS + 1))
