"""The public paths on a GPU, with the tiny model: a killed run resumed, 4 bits, 8-bit moments, flash, predicting.

`python -m pytest tests/gpu` where torch sees a CUDA device; elsewhere each of them is skipped. Real dimensions, speed
and memory are those of benchmarks/gpu.py.
"""

import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file

from hba.evaluate.predictions import read_predictions

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is False")
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="no bitsandbytes here")

SMALL = [
    "encode.num_frames=2", "encode.max_pixels=3136", "loader.workers=0", "validation_split=validation[:20]",
    "model.dtype=bfloat16", "train.batch_size=8", "train.max_steps=6", "train.epochs=9", "train.validate_every=6",
    "train.log_every=1", "train.learning_rate=1e-2", "datasets=[tess]", "answer_weight=1",
]  # fmt: skip

# `hba` in a process of its own, with kernels that add up in one order, which kills itself at the step that is named.
CHILD = """
import os, signal, sys
import torch
from hba.cli import main
from hba.train.ranks import Ranks
torch.use_deterministic_algorithms(True)
whole, step = Ranks.add_up_gradients, int(os.environ.get("DIES", 0))
calls = iter(range(1, 1000))
def fatal(*given):
    if next(calls) == step:
        os.kill(os.getpid(), signal.SIGKILL)
    whole(*given)
Ranks.add_up_gradients = fatal
sys.argv = ["hba", *sys.argv[1:]]
main()
"""


@pytest.fixture
def train(hba, mini_atlas, backbone, tmp_path):
    """`train(name, *overrides)`: a run of six steps of LoRA in this process; its losses."""

    def run(name, *overrides):
        torch.cuda.reset_peak_memory_stats()
        asked = [f"atlas={mini_atlas}", f"model.name={backbone}", *SMALL, *overrides]
        code, _, err = hba("train", "sft", "--run", tmp_path / name, *asked)
        assert code == 0, err
        assert torch.cuda.max_memory_allocated() > 0  # it was the GPU that trained
        return losses(tmp_path / name)

    return run


def losses(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def weights(run):
    files = sorted((run / "checkpoints" / "step_6").rglob("*.safetensors"))
    return {f"{file.name} {name}": tensor for file in files for name, tensor in load_file(file).items()}


def child(*arguments, code=0, **environment):
    shared = {"HF_HUB_OFFLINE": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    command = [sys.executable, "-c", CHILD, *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | shared | environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr[-3000:]


@pytest.mark.parametrize("more", [[], ["train.activation_checkpointing=true"]], ids=["plain", "computed twice"])
def test_lora_in_bfloat16_killed_and_resumed_is_the_same_to_the_bit(mini_atlas, backbone, tmp_path, more):
    asked = [f"atlas={mini_atlas}", f"model.name={backbone}", *SMALL, "train.save_every=2", *more]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    child("train", "sft", "--run", straight, *asked)
    child("train", "sft", "--run", killed, *asked, code=-signal.SIGKILL, DIES="4")
    assert (killed / "checkpoints" / "step_2").is_dir()
    child("train", "sft", "--run", killed, *asked)
    assert losses(killed) == losses(straight) and len(losses(killed)) == 6
    ours, theirs = weights(killed), weights(straight)
    assert ours.keys() == theirs.keys() and any("lora" in name for name in ours)
    assert [name for name in ours if not ours[name].equal(theirs[name])] == []


@needs_bitsandbytes
def test_lora_on_four_bits_learns(train, tmp_path):
    said = train("nf4", "model.quantization=nf4")
    assert said[-1] < said[0]
    (card,) = (tmp_path / "nf4" / "checkpoints").glob("step_6/hba.json")
    assert json.loads(card.read_text())["quantization"] == "nf4"


@needs_bitsandbytes
def test_moments_in_eight_bits_that_may_leave_the_gpu_learn_as_those_in_32(train):
    plain = train("plain")
    paged = train("paged", "train.optimizer=paged_adamw8bit")
    assert paged[0] == pytest.approx(plain[0], rel=1e-3)  # before the first step of the optimizer
    assert paged[-1] < paged[0]


def test_flash_attention_gives_the_losses_of_sdpa_or_is_refused(hba, train, mini_atlas, backbone, tmp_path):
    if find_spec("flash_attn") is not None:
        assert train("flash", "model.attention=flash_attention_2") == pytest.approx(train("sdpa"), rel=0.05)
        return
    asked = [f"atlas={mini_atlas}", f"model.name={backbone}", *SMALL, "model.attention=flash_attention_2"]
    code, _, err = hba("train", "sft", "--run", tmp_path / "flash", *asked)
    said = " ".join(err.split())
    assert code == 2 and "flash_attention_2 needs flash-attn, which is not installed" in said
    assert "model.attention=sdpa" in said


def test_predicting_on_a_gpu_gives_what_a_cpu_does(hba, train, mini_atlas, tmp_path):
    """In float32; what is left are sums in another order and a GPU's shorter floats in convolutions."""
    train("run")
    asked = ["predict", tmp_path / "run", "--backend", "heads", "--atlas", mini_atlas, "--datasets", "tess"]
    asked += ["dtype=float32", "loader.workers=0"]
    torch.cuda.reset_peak_memory_stats()
    code, _, err = hba(*asked, "--run", tmp_path / "gpu")
    assert code == 0, err
    assert torch.cuda.max_memory_allocated() > 0
    child(*asked, "--run", tmp_path / "cpu", CUDA_VISIBLE_DEVICES="")
    ours, theirs = (
        {one.id: one.probs for one in read_predictions(tmp_path / name / "predictions.jsonl")}
        for name in ("gpu", "cpu")
    )
    assert ours and ours.keys() == theirs.keys()
    for sample, probabilities in ours.items():
        assert probabilities == pytest.approx(theirs[sample], abs=5e-3)
