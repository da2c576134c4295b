"""The real widths and the real vocabulary of Qwen2.5-Omni-3B, with two layers and random weights (1.6 GB in bfloat16).

All commands run in one process, in turn; the peak of each is that of the resident set above what the imports took, as a
ratio to the weights on the disk. A float32 copy of them, or the same weights twice, would be 2. What a command leaves
alive counts against those after it.
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
import gc, json, re, sys
from importlib import import_module
for name in ("torch", "torchvision", "transformers", "accelerate", "peft", "peft.tuners.lora", "sklearn.metrics",
             "transformers.models.qwen2_5_omni.modeling_qwen2_5_omni", "torch.distributed.fsdp", "hba.train.bam",
             "transformers.models.qwen2_5_omni.processing_qwen2_5_omni", "torch.utils.tensorboard", "hba.train.sft",
             "hba.train.qa", "hba.evaluate.predict", "hba.model.merge", "hba.cli"):
    import_module(name)
def kilobytes(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

before, peaks = kilobytes("VmRSS"), []
for command in json.loads(sys.argv[1]):
    gc.collect()  # a process of its own would not have what the command before left in circles
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    sys.argv = ["hba", *command]
    try:
        sys.modules["hba.cli"].main()
    except SystemExit as end:
        if end.code:
            raise
    peaks.append((kilobytes("VmHWM") - before) * 1024)
print("PEAKS", json.dumps(peaks), file=sys.stderr)
"""
SMALL = ["encode.num_frames=2", "encode.max_pixels=3136", "loader.workers=0"]
LATER = ["train.batch_size=8", "train.max_steps=2", "features.loader.workers=0"]
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
def peaks(folder):
    """The peak of each command as a ratio to the weights, by the name of the folder that it makes."""
    atlas, base, sft = folder / "atlas", folder / "base", folder / "sft"
    found = [f"atlas={atlas}", f"model.name={base}", "model.dtype=bfloat16", *SMALL, *ROWS]
    later = [f"atlas={atlas}", "dtype=bfloat16", "validation_split=validation", "features.batch_size=2", *LATER]
    asked = ["--atlas", atlas, "--limit", "4", *SMALL, "dtype=bfloat16", "batch_size=2"]
    commands = {
        "sft": ["train", "sft", "--run", sft, *found, "validation_batch_size=2", "answer_weight=1"],
        "said": ["predict", sft, "--backend", "heads", "--run", folder / "said", *asked],
        "merged": ["merge", sft, folder / "merged"],
        "qa": ["train", "qa", "--from", sft, "--run", folder / "qa", *later, "datasets=[siq2]"],
        "bam": ["train", "bam", "--from", sft, "--run", folder / "bam", *later, "datasets=[daicwoz,siq2]"],
    }
    typed = json.dumps([list(map(str, command)) for command in commands.values()])
    given = os.environ | {"HF_HUB_OFFLINE": "1", "MALLOC_MMAP_THRESHOLD_": "1048576", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", CHILD, typed], env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    bytes_of = json.loads(done.stderr.rpartition("PEAKS ")[2].splitlines()[0])
    weights = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    ratios = {name: peak / weights for name, peak in zip(commands, bytes_of, strict=True)}
    assert all(ratio > 0 for ratio in ratios.values())  # what was looked at can be seen
    return ratios


def kinds(file):
    with safe_open(file, framework="pt") as held:
        return {held.get_slice(name).get_dtype() for name in held.keys()}  # noqa: SIM118 - no dict


def test_a_lora_step_takes_little_beside_the_weights(folder, peaks):
    assert peaks["sft"] < 1.2
    step = folder / "sft" / "checkpoints" / "step_1"
    assert kinds(step / "adapter_model.safetensors") == {"F32"}
    assert not list(step.glob("model*.safetensors"))  # the backbone is not written again


def test_prediction_takes_the_weights_once(folder, peaks):
    assert peaks["said"] < 1.04
    lines = (folder / "said" / "predictions.jsonl").read_text().splitlines()
    assert lines and all(json.loads(line)["error"] is None for line in lines)


def test_merging_holds_no_model_and_upcasts_nothing(folder, peaks):
    assert peaks["merged"] < 0.6
    assert {kind for file in (folder / "merged").glob("model*.safetensors") for kind in kinds(file)} == {"BF16"}


def test_training_of_lm_head_takes_the_head_its_gradient_and_its_moments(folder, peaks):
    """All in float32: 3.2 of the weights, of which the head is 0.4 in bfloat16. Neither the backbone that gave the
    features stays beside it, nor a rounded copy of the head or of its gradient (0.4 each), nor all answers' logits."""
    assert peaks["qa"] < 3.7
    step = folder / "qa" / "checkpoints" / "step_2"
    assert kinds(step / "lm_head.safetensors") == {"F32"}
    assert (step / "adapter_model.safetensors").stat().st_nlink > 1  # what was frozen is not written again
    kept = list((folder / "sft" / "features").rglob("*.safetensors"))
    assert kept and all(kinds(file) <= {"BF16", "F32", "I64"} and file.stat().st_size < 1 << 20 for file in kept)


def test_adapters_take_little_beside_the_frozen_weights(peaks):
    """The features of both kinds of rows, from caches; of the model a frozen head in bfloat16 is left by then."""
    assert peaks["bam"] < 0.9
