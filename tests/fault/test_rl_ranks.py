"""RL on eight processes (gloo), which have 23 prompts in batches of five, an unreadable medium in every dataset, and
die in every phase of a step: nobody waits, and what comes out is what one process gives."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from ranks import Dies
from rl_run import result, write_reward
from safetensors.torch import load_file

from hba import open_atlas
from hba.rl.evaluation_log import read_evaluations
from hba.storage import read_json, read_jsonl

ROWS, LAST = 23, 6
SMALL = [
    *("model.strategy=full", "model.dtype=float32", "train.epochs=1", "train.batch_size=5", "train.validate_every=3"),
    *("train.learning_rate=2e-3", "train.weight_decay=0.0", "loss.kl_weight=0.05", "loss.updates=2"),
    *("rollout.per_prompt=3", "rollout.max_new_tokens=5", "table_every=1", "table_prompts=99"),
    *("encode.num_frames=2", "encode.max_pixels=3136", "loader.workers=0"),
    *(f"train_split=train[:{ROWS}]", "validation_split=validation[:7]"),
]
SHARDED = "train.sharding=full"
FEW = ["train.max_steps=2", "train.validate_every=1", "validation_rows=2"]
# Where a rank dies, and on how many ranks the run goes on to the next death: rollout, reward, update, save.
DEATHS = [
    (8, Dies(3, "hba.rl.local:roll_out", "before", 2)),
    (8, Dies(5, "hba.rl.local:_rewarded", "after", 3)),
    (3, Dies(0, "torch.optim:AdamW.step", "after", 2)),
    (8, Dies(7, "hba.train.state:save_optimizer", "before", 1)),
    (1, Dies(0, "hba.rl.local:Memory.save", "before", 1)),
]


@pytest.fixture(scope="module")
def atlas(tmp_path_factory, mini_atlas):
    """The mini-atlas; of every dataset one training row that has media cannot be read, as far as it has such a row."""
    folder = tmp_path_factory.mktemp("atlas") / "atlas"
    shutil.copytree(mini_atlas, folder)
    broken = {}
    for sample in open_atlas(folder, split=f"train[:{ROWS}]"):
        row = json.loads((folder / "train.jsonl").read_text().splitlines()[sample.number])
        media = [*row["videos"], *row["audios"]]
        if media and sample.dataset not in broken:
            broken[sample.dataset] = sample.id
            (folder / media[0]).write_bytes(b"broken")
    assert len(broken) > 5
    return folder, set(broken.values())


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    return write_reward(tmp_path_factory.mktemp("reward"))


@pytest.fixture(scope="module")
def trained(launch, atlas, backbone, reward):
    """`trained(run, *overrides, ranks=8, dies=None)`: how the ranks of the command ended."""

    def train(run, *overrides, source=atlas[0], function="letters", **options):
        given = [f"atlas={source}", f"model.name={backbone}", f"reward.function={reward}:{function}", *SMALL]
        return launch(["train", "rl", "--run", run, *given, *overrides], **options)

    return train


@pytest.fixture(scope="module")
def one(tmp_path_factory, trained):
    run = tmp_path_factory.mktemp("one") / "run"
    assert trained(run, ranks=1).code == 2  # samples were left out
    return run


def logged(run, kind):
    return [line.record for line in read_jsonl(run / "log.jsonl") if line.record["kind"] == kind]


def assert_same(run, other, atlas):
    """Losses, what was drawn, evaluations, weights; every prompt once, and those that cannot be read named once."""
    ours, theirs = logged(run, "rl"), logged(other, "rl")
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for name in ("loss", "grad_norm", "score", "entropy", "kl", "abs_advantage", "samples_seen"):
        np.testing.assert_allclose([x[name] for x in ours], [x[name] for x in theirs], atol=1e-4, rtol=1e-4)
    assert max(line["sampler_gap"] for line in ours) < 1e-5
    drawn, expected = (
        [(r.record["step"], r.record["group"], r.record["response"]) for r in read_jsonl(each / "rollouts.jsonl")]
        for each in (run, other)
    )
    assert drawn == expected
    prompts = Counter(group for _, group, _ in drawn)
    assert set(prompts.values()) == {3} and len(prompts) == ROWS - len(atlas[1])
    left_out = [line.record["id"] for line in read_jsonl(run / "quarantine.jsonl")]
    assert sorted(left_out) == sorted(atlas[1])
    for step, records in read_evaluations(other).items():
        found = read_evaluations(run)[step]
        assert [r["id"] for r in found] == [r["id"] for r in records]
        assert [r["sampled"]["score"] for r in found] == [r["sampled"]["score"] for r in records]
    last = f"checkpoints/step_{LAST}/model.safetensors"
    weights, wanted = load_file(run / last), load_file(other / last)
    assert all(torch.allclose(weights[name], tensor, atol=2e-3) for name, tensor in wanted.items())


def test_one_process_has_lines_for_every_step(one):
    """One of them may have had no readable prompt at all."""
    lines = [*logged(one, "rl"), *logged(one, "skipped")]
    assert sorted(line["step"] for line in lines) == list(range(1, LAST + 1))
    assert max(abs(line["loss"]) for line in logged(one, "rl")) > 1e-3


@pytest.mark.slow
def test_killed_in_every_phase_and_resumed_on_other_numbers_of_processes_it_ends_as_one(one, trained, atlas, tmp_path):
    run = tmp_path / "run"
    for ranks, dies in DEATHS:
        ended = trained(run, ranks=ranks, dies=dies)
        expected = [1] * ranks
        expected[dies.rank] = -9
        assert ended.codes == expected, ended.err
        said = "".join(text for rank, text in enumerate(ended.err) if rank != dies.rank)
        assert said.count("another process of this run has ended") >= ranks - 1
    assert trained(run, ranks=8).code == 2
    assert_same(run, one, atlas)


@pytest.mark.slow
def test_eight_sharded_processes_end_as_one(one, trained, atlas, tmp_path):
    """Whoever has no prompt runs a copy of another's micro-batch, generates nothing, and nobody waits for it."""
    run = tmp_path / "run"
    assert trained(run, SHARDED, ranks=8).code == 2
    assert_same(run, one, atlas)


@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_in_bfloat16_sampler_and_trainer_compute_alike_and_a_killed_run_ends_bit_for_bit_the_same(
    strategy, trained, tmp_path, mini_atlas
):
    kind = ["model.dtype=bfloat16", f"model.strategy={strategy}", "model.lora_r=4", "loss.updates=1"]
    steps = ["train.max_steps=3", "train.validate_every=2", "validation_rows=3"]
    dies = Dies(0, "hba.rl.local:update", "before", 3)
    assert trained(tmp_path / "killed", *kind, *steps, source=mini_atlas, ranks=1, dies=dies).code == -9
    for name in ("killed", "straight"):
        assert trained(tmp_path / name, *kind, *steps, source=mini_atlas, ranks=1).code == 0
    assert result(tmp_path / "killed") == result(tmp_path / "straight")
    first = logged(tmp_path / "straight", "rl")[0]
    assert first["kl"] == 0, "the policy of the start is computed in the same precision"
    assert 0 < first["sampler_gap"] < 0.02


def test_three_processes_may_have_one_prompt(trained, tmp_path, mini_atlas):
    """And one row to evaluate on."""
    few = ["train_split=train[:1]", "validation_split=validation[:1]"]
    ended = trained(tmp_path / "run", *few, source=mini_atlas, ranks=3)
    assert ended.code == 0, ended.err
    (record,) = logged(tmp_path / "run", "rl")
    assert record["rollouts"] == 3 and len(read_evaluations(tmp_path / "run")[1]) == 1


def test_a_step_of_which_no_prompt_can_be_read_is_skipped_by_all(trained, atlas, tmp_path):
    run = tmp_path / "run"
    few = ["train_split=train[:1]", "train.epochs=2", "validation_split=validation[:1]"]
    assert trained(run, *few, ranks=3).code == 2
    assert [(line["step"], line["why"]) for line in logged(run, "skipped")] == [
        (step, "every sample is quarantined") for step in (1, 2)
    ]
    assert logged(run, "rl") == [] and len(read_evaluations(run)) == 2
    (left_out,) = read_jsonl(run / "quarantine.jsonl")
    assert left_out.record["id"] in atlas[1]


def test_what_a_reward_raises_on_one_process_ends_all_of_them_with_its_traceback(trained, tmp_path):
    ended = trained(tmp_path / "run", *FEW, function="divides", ranks=3)
    assert ended.code == 1
    assert all("raised ZeroDivisionError" in text and "own.py" in text for text in ended.err)


def test_a_signal_to_one_process_stops_all_with_a_checkpoint_and_the_run_goes_on(trained, tmp_path, mini_atlas):
    run, straight = tmp_path / "run", tmp_path / "straight"
    steps = ["train.max_steps=3", "validation_rows=2"]
    dies = Dies(2, "hba.rl.local:update", "before", 2, "SIGTERM")
    ended = trained(run, *steps, source=mini_atlas, ranks=3, dies=dies)
    assert ended.code == 75
    assert "2 of 3 steps" in ended.err[0]
    assert read_json(run / "checkpoints" / "step_2" / "trainer_state.json")["step"] == 2
    assert trained(run, *steps, source=mini_atlas, ranks=1).code == 0
    assert trained(straight, *steps, source=mini_atlas, ranks=3).code == 0
    ours, theirs = ([line["grad_norm"] for line in logged(r, "rl")] for r in (run, straight))
    assert ours == pytest.approx(theirs, rel=1e-4) and len(ours) == 3
