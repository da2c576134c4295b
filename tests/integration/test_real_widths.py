"""The real widths and the real vocabulary of Qwen2.5-Omni-3B, with two layers and random weights (1.6 GB in bfloat16).

Each command runs in a process of its own; its peak is that of the resident set above what its imports took, as a ratio
to the weights on the disk. A float32 copy of them, or the same weights twice, would be 2.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import merge_memory

pytestmark = pytest.mark.slow

CHILD = """
import re, sys
from importlib import import_module
for name in ("torch", "torchvision", "transformers", "accelerate", "peft", "peft.tuners.lora", "sklearn.metrics",
             "transformers.models.qwen2_5_omni.modeling_qwen2_5_omni", "torch.distributed.fsdp", "hba.train.bam",
             "transformers.models.qwen2_5_omni.processing_qwen2_5_omni", "torch.utils.tensorboard", "hba.train.sft",
             "hba.train.qa", "hba.evaluate.predict", "hba.model.merge", "hba.cli"):
    import_module(name)
def kilobytes(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew: a child starts with that of its parent
before = kilobytes("VmRSS")
sys.argv = ["hba", *sys.argv[1:]]
try:
    sys.modules["hba.cli"].main()
finally:
    print("PEAK", (kilobytes("VmHWM") - before) * 1024, file=sys.stderr)
"""
SMALL = ["encode.num_frames=2", "encode.max_pixels=3136", "loader.workers=0"]
ROWS = ["train_split=train[:24]", "validation_split=validation[:6]", "train.batch_size=2", "train.max_steps=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model (`base`), the mini-atlas (`atlas`)."""
    made = tmp_path_factory.mktemp("wide")
    layers, merge_memory.LAYERS = merge_memory.LAYERS, 2
    try:
        merge_memory.build(made)
    finally:
        merge_memory.LAYERS = layers
    return made


@pytest.fixture(scope="module")
def peak(folder):
    """Run a command: its peak as a ratio to the weights."""
    weights = sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors"))

    def run(*arguments):
        given = os.environ | {"HF_HUB_OFFLINE": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", CHILD, *map(str, arguments)]
        done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        ratio = int(done.stderr.split("PEAK ")[1].split()[0]) / weights
        assert ratio > 0  # what was looked at can be seen
        return ratio

    return run


@pytest.fixture(scope="module")
def trained(folder, peak):
    """A run of one LoRA step, and its peak."""
    found = [f"atlas={folder / 'atlas'}", f"model.name={folder / 'base'}", "model.dtype=bfloat16"]
    more = ["validation_batch_size=2", "answer_weight=1"]
    return folder / "sft", peak("train", "sft", "--run", folder / "sft", *found, *SMALL, *ROWS, *more)


def kinds(file):
    with safe_open(file, framework="pt") as held:
        return {held.get_slice(name).get_dtype() for name in held.keys()}  # noqa: SIM118 - no dict


def test_a_lora_step_takes_little_beside_the_weights(trained):
    run, ratio = trained
    assert ratio < 1.2
    step = run / "checkpoints" / "step_1"
    assert kinds(step / "adapter_model.safetensors") == {"F32"}
    assert not list(step.glob("model*.safetensors"))  # the backbone is not written again


def test_prediction_takes_the_weights_once(folder, peak, trained):
    where = ["--atlas", folder / "atlas", "--run", folder / "said", "--limit", "4"]
    ratio = peak("predict", trained[0], "--backend", "heads", *where, *SMALL, "dtype=bfloat16", "batch_size=2")
    assert ratio < 1.04
    lines = (folder / "said" / "predictions.jsonl").read_text().splitlines()
    assert lines and all(json.loads(line)["error"] is None for line in lines)


def test_merging_holds_no_model_and_upcasts_nothing(folder, peak, trained):
    assert peak("merge", trained[0], folder / "merged") < 0.6
    assert {kind for file in (folder / "merged").glob("model*.safetensors") for kind in kinds(file)} == {"BF16"}
