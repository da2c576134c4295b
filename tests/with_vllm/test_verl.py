"""verl with its own vLLM replica, unpatched but for what a CPU needs: HARPO on text, sound and video, on Ray.

The actor and vLLM agree on probabilities only if prompts arrive with one placeholder a medium, media as the actor's
processor sees them, the media tokens banned (they have a thousandth of a random model's probability), the weights named
as vLLM's loader expects and renewed after each step.
"""

import subprocess
from pathlib import Path

import pytest
from real_vllm import CPU, VLLM
from verl_run import TESTS, environment, lines, on_a_cpu

from hba import open_atlas

pytestmark = [pytest.mark.slow, pytest.mark.skipif(VLLM is None, reason="no vLLM here: make test-vllm")]
HERE = Path(__file__).parent
STEPS = 3
SETTINGS = [
    *("algorithm=harpo", "model.strategy=full", "model.dtype=float32", f"train.max_steps={STEPS}", "train.epochs=20"),
    *("train.batch_size=2", "train.accumulation=2", "train.learning_rate=2e-3", f"train.validate_every={STEPS}"),
    *("validation_rows=4", "rollout.per_prompt=4", "rollout.max_new_tokens=6", "table_every=1", "table_prompts=100"),
    *("encode.num_frames=2", "encode.max_pixels=3136", "encode.max_tokens=1024", "loader.workers=0"),
    *("verl.modules=[cpu_support,vllm_cpu_support]", "verl.agent_workers=1"),
]
# Sleep is for GPUs; a bucket of weights is shared memory.
VLLM_ON_A_CPU = [
    *("actor_rollout_ref.rollout.enforce_eager=true", "++actor_rollout_ref.rollout.enable_sleep_mode=false"),
    *("actor_rollout_ref.rollout.max_num_seqs=16", "++actor_rollout_ref.rollout.logprobs_mode=processed_logprobs"),
    "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes=64",
]
MODULES = [TESTS / "with_verl", HERE, HERE / "metadata"]


def hba_there(*arguments):
    """The command line in vLLM's environment."""
    called = [VLLM, "-m", "hba", *map(str, arguments)]
    done = subprocess.run(
        called,
        env=environment(*MODULES) | CPU | {"VERL_PLATFORM": "cpu"},
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory, mini_atlas, served):
    folder = tmp_path_factory.mktemp("verl")
    reward = folder / "own.py"
    reward.write_text("def letters(responses, **_):\n    return [len(set(r)) / 10 for r in responses]\n")
    given = [f"atlas={mini_atlas}", f"model.name={served}", f"reward.function={reward}:letters", *SETTINGS]
    given += ["verl.gpus_per_node=1", f"verl.overrides=[{', '.join([*on_a_cpu(1), *VLLM_ON_A_CPU])}]"]
    hba_there("train", "rl", "--engine", "verl", "--json", "--run", folder / "run", *given)
    return folder / "run"


def test_actor_and_vllm_agree_on_every_kind_of_row_after_every_step(run, mini_atlas):
    kinds = {sample.id: sample.modality_signature for sample in open_atlas(mini_atlas, split="train")}
    assert len({kinds[line["id"]] for line in lines(run / "rollouts.jsonl")}) > 1
    steps = [line["data"] for file in (run / "verl").glob("metrics-from-*.jsonl") for line in lines(file)]
    found = [step for step in steps if "rollout_corr/log_ppl_abs_diff" in step]
    assert len(found) == STEPS
    assert max(step["rollout_corr/log_ppl_abs_diff"] for step in found) < 1e-4
    assert len({step["actor/entropy"] for step in found}) == STEPS, "the weights have moved"


def test_every_step_and_evaluation_is_in_the_run_folder(run):
    log = lines(run / "log.jsonl")
    assert [line["step"] for line in log if line["kind"] == "rl"] == [1, 2, 3]
    assert [line["step"] for line in log if line["kind"] == "evaluation"] == [0, STEPS]


def test_the_engine_answers_as_transformers_does(tmp_path, hba, mini_atlas, served):
    asked = [served, "--atlas", mini_atlas, "--split", "test", "--per-dataset", "6"]
    options = ["generation.max_tokens=12", "dtype=float32", "encode.num_frames=4", "encode.max_pixels=3136"]
    hba_there("predict", *asked, "--backend", "vllm", "--run", tmp_path / "there", *options, "vllm.max_model_len=2048")
    code, _, err = hba("predict", *asked, "--backend", "hf", "--run", tmp_path / "here", *options)
    assert code == 0, err
    here, there = (
        {line["id"]: line for line in lines(tmp_path / name / "predictions.jsonl")} for name in ("here", "there")
    )
    assert here.keys() == there.keys() and len(here) > 25
    assert {i: line["tokens_in"] for i, line in here.items()} == {i: line["tokens_in"] for i, line in there.items()}
    assert {i: line["output"] for i, line in here.items()} == {i: line["output"] for i, line in there.items()}
    assert {line["modality"] for line in here.values()} == {"text", "text_audio", "text_video_audio"}
