"""What only a GPU shows, in some ten minutes and without a network: speed, memory and bits at real dimensions.

    python benchmarks/gpu.py [--tiny] [--dry-run] [--minutes 10] [--out FILE] [--page docs/gpu.md] [CHECK ...]
    python benchmarks/gpu.py --read FILE --page docs/gpu.md

Prints a line of JSON a check, with `--out` into a file, too, and ends with 1 if one of them failed; the others run.
`--page` puts the results into a page, between its two marks; `--read` takes them from a file of an earlier run.

The first checks train and ask the thinkers of Qwen2.5-Omni-7B and 3B, towers included, at their real dimensions. Their
weights are random and drawn on the GPU by each process; no file of weights is read or written. Prompts are clips of the
mini-atlas, some 1,100 tokens each. The other checks take the model of merge_memory.py (the widths of the 3B, five
layers, 2 GB on the disk). Every command is one of `hba`, in a process of its own.

Each check has a budget in seconds, within the minutes of the whole run; what has no time left says so.
`gpu_mb` is the most that torch held on the GPU, of a training the most in its steps; `fit_mb` is what `hba fit` counts
for them. `share_of_peak` is the operations that `hba fit` counts for a sample (layers computed twice count twice) times
samples a second, over what the GPU's maker states. `main_mb` is the peak of private main memory above that of the
imports, `host_waits` the lines of hba at which the host waited for the GPU, and how often.

Without a GPU, or with `--tiny`, the tiny backbone takes all models' place, figures of the GPU are null, and what a CPU
cannot show says so; the commands and what is compared are the same. `--dry-run` lists the checks.

`HBA_VLLM` names the Python of an environment with vLLM and hba, where this one has no vLLM.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
import load_memory
import merge_memory

# What the real dimensions of the two published sizes are, by their config files; the towers are the same.
TEXTS = {
    "7b": {
        **{"hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "vocab_size": 152_064},
        **{"num_attention_heads": 28, "num_key_value_heads": 4},
    },
    "3b": {
        **{"hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36, "vocab_size": 151_936},
        **{"num_attention_heads": 16, "num_key_value_heads": 2},
    },
}
SOUND = {
    **{"d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120},
    **{"n_window": 100, "max_source_positions": 1500},
}
SIGHT: dict[str, Any] = {
    **{"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16},
    "fullatt_block_indexes": [7, 15, 23, 31],
}
# Clips of 8 frames of 448 x 448 pixels make 1,024 tokens.
CLIPS = ("encode.num_frames=8", "encode.min_pixels=200704", "encode.max_pixels=200704")
SEEN = ("datasets=[cremad,meld_emotion,meld_senti,mosei_emotion]", "validation_batch_size=4")
STEPS, WARM = 8, 2  # the first steps of a process choose kernels and fill caches: they are not counted
BIG = (
    *(f"train.max_steps={STEPS}", f"train.validate_every={STEPS}", "train.epochs=4", "train.log_every=1", *SEEN),
    *("train.activation_checkpointing=true", "train.learning_rate=1e-4"),
)
MARKS = ("<!-- results of benchmarks/gpu.py -->", "<!-- end of results -->")
ENCODE = ("encode.num_frames=2", "encode.min_pixels=3136", "encode.max_pixels=3136")
# Seven rows a batch, four at once on the device: losses of parts are added up as at 7B.
SFT = (
    *("train.batch_size=7", "train.device_batch_size=4", "train.log_every=1", "train.max_steps=6", "train.epochs=2"),
    *("train.validate_every=6", "train.save_every=2", "train.learning_rate=1e-3", "validation_split=validation[:9]"),
)
RL = (
    *("model.strategy=full", "train.batch_size=3", "train.max_steps=2", "train.epochs=1", "train.validate_every=2"),
    *("train.learning_rate=1e-5", "loss.kl_weight=0.01", "rollout.per_prompt=3", "rollout.max_new_tokens=24"),
    *("validation_split=validation[:4]", "train_split=train[:24]"),
)
RECIPE_TOKENS, VOCABULARY, WIDTH = 5 * 2048, 151_936, 3584  # of a micro-batch of the recipe `rl` on the 7B
LATE = "the budget of the check"
NO_ROOM = "no room for"  # as hba says that a GPU is full: a training then tries half as many samples
DIES, HOW = "HBA_BENCHMARK_DIES_AT_STEP", "HBA_BENCHMARK_HOW"  # HOW: words of `measured` below


class Place(NamedTuple):
    """Data and model of the checks; `tiny` without a GPU."""

    folder: Path
    tiny: bool
    ends: float = float("inf")  # of the check, by time.monotonic

    @property
    def real(self) -> Path:
        """Where runs on models of real dimensions lie."""
        return self.folder / "real"

    @property
    def base(self) -> Path:
        """The model with files of weights, made when it is first wanted."""
        if not (self.folder / "base").is_dir():
            merge_memory.peak_megabytes("build", self.folder / "wide")
            (self.folder / "wide" / "base").rename(self.folder / "base")
            shutil.rmtree(self.folder / "wide")
        return self.folder / "base"

    @property
    def model(self) -> list[str]:
        """Overrides that name the data and that model."""
        return [f"atlas={self.folder / 'atlas'}", f"model.name={self.base}", *ENCODE]

    def drawn(self, size: str, samples: int) -> list[str]:
        """Overrides that name the data and a model of real dimensions, so many samples of which are a batch."""
        clips = ENCODE if self.tiny else CLIPS
        samples = min(samples, 2) if self.tiny else samples
        return [
            f"atlas={self.folder / 'atlas'}",
            f"model.name={self.folder / size}",
            *clips,
            *(f"train.batch_size={samples}", f"train.device_batch_size={samples}"),
        ]


def machine(_: Place) -> dict[str, Any]:
    """What is under it, and whether bfloat16 is native."""
    import torch

    from hba.model.checkpoint import resolve_dtype

    found = {"torch": torch.__version__, "auto": str(resolve_dtype("auto"))}
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        require(native == (resolve_dtype("auto") is torch.bfloat16), "auto is not what torch calls native")
        found |= {"gpu": card.name, "gpu_gb": round(card.total_memory / 2**30), "native_bfloat16": native}
    return found


def lora(place: Place) -> dict[str, Any]:
    """LoRA on the 7B with its towers: speed, memory, and both beside `hba fit`."""
    return measured(place, "lora", "7b", 8)


def qlora(place: Place) -> dict[str, Any]:
    """The same on a language model in 4 bits."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return {"skipped": "no bitsandbytes here"}
    return measured(place, "qlora", "7b", 8, "model.quantization=nf4")


def full(place: Place) -> dict[str, Any]:
    """Everything trains, towers too: the 3B, its moments in 8 bits where 32 have no room."""
    light = importlib.util.find_spec("bitsandbytes") is not None
    if not place.tiny and memory_gib() < (60 if light else 100):
        return {"skipped": "weights, gradients and moments take 47 GB with bitsandbytes, 75 GB without"}
    more = ["train.optimizer=adamw8bit"] if light and (place.tiny or memory_gib() < 100) else []
    return measured(place, "full", "3b", 4, "model.strategy=full", "train.learning_rate=1e-5", *more, saved=False)


def attention(place: Place) -> dict[str, Any]:
    """LoRA on the 7B with each implementation of attention: the same loss, at what speed and memory."""
    own: dict[str, Callable[[], dict[str, Any]]] = {
        "sdpa": lambda: lora(place),
        "eager": lambda: measured(place, "eager", "7b", 8, "model.attention=eager"),
        "flash_attention_2": lambda: measured(place, "flash", "7b", 8, "model.attention=flash_attention_2"),
    }
    why = "no GPU" if place.tiny else "no flash-attn here"
    if place.tiny or importlib.util.find_spec("flash_attn") is None:
        own["flash_attention_2"] = lambda: {"skipped": why}
    ways = each_alone(own)
    ran = {name: each for name, each in ways.items() if isinstance(each, dict) and "losses" in each}
    if "sdpa" not in ran:
        return ways
    # Batches of other sizes, where one had no room, have other losses.
    first = {name: each["losses"][0] for name, each in ran.items() if each["samples"] == ran["sdpa"]["samples"]}
    worst = max(abs(loss / first["sdpa"] - 1) for loss in first.values())
    require(worst < 0.05, f"the first loss differs: {first}")
    fastest = {n: round(e["step_seconds"] / ran["sdpa"]["step_seconds"], 2) for n, e in ran.items() if n in first}
    return {"first_loss_differs": round(worst, 5), "step_seconds_to_sdpa": fastest, **ways}


def bit_equal(place: Place) -> dict[str, Any]:
    """LoRA on the 7B in bfloat16, killed at step 4 of 6 and resumed: losses and trained weights to the bit."""
    more = [*place.drawn("7b", 4), *BIG, "train.max_steps=6", "train.validate_every=6", "train.save_every=2"]
    more += ["model.dtype=bfloat16"]
    how = {HOW: "exact", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    straight, run = place.real / "straight", place.real / "killed"
    command = ["train", "sft", "--run"]
    try:
        child(place, *command, str(straight), *more, environment=how)
        kernels = "deterministic"
    except AssertionError as error:
        if "deterministic" not in str(error):
            raise
        # Some kernel has no such form: equal runs may then differ by themselves.
        shutil.rmtree(straight, ignore_errors=True)
        how, kernels = {}, "as they are"
        child(place, *command, str(straight), *more)
    killed = child(place, *command, str(run), *more, environment=how | {DIES: "4"}, code=-signal.SIGKILL)
    require((run / "checkpoints" / "step_2").is_dir(), "it was killed before its first checkpoint")
    child(place, *command, str(run), *more, environment=how)
    found = {"killed": killed["code"], "kernels": kernels, **difference(run, straight)}
    if found["tensors_that_differ"] and kernels != "deterministic":
        child(place, *command, str(place.real / "again"), *more)
        found["tensors_that_differ_uninterrupted"] = difference(place.real / "again", straight)["tensors_that_differ"]
        return found
    require(not found["tensors_that_differ"] and not found["loss_difference"], f"other bits: {found}")
    return found


def answers(place: Place) -> dict[str, Any]:
    """Prediction at 7B: the heads of the LoRA run in classes, and the backbone in words, 32 tokens an answer."""
    own = ["--atlas", str(place.folder / "atlas"), "--limit", "16" if place.tiny else "32", "--split", "train"]
    own += ["--datasets", SEEN[0].partition("[")[2].rstrip("]"), "batch_size=8"]

    def ask(backend: str, model: Path, *more: str) -> dict[str, Any]:
        run = str(place.real / f"answers-{backend}")
        asked_for = ["predict", str(model), "--backend", backend, "--run", run, *own, *more]
        return child(place, *asked_for, environment={HOW: "measured"})

    def by_heads() -> dict[str, Any]:
        lora(place)
        return ask("heads", place.real / "lora")

    encode = ENCODE if place.tiny else CLIPS
    words = ("hf", place.folder / "7b", *encode, "generation.max_tokens=32")
    return each_alone({"hf": lambda: ask(*words), "heads": by_heads})


def rl_step(place: Place) -> dict[str, Any]:
    """Two steps of RL on the 7B with LoRA: sampling and update, with the KL term of the untrained model."""
    reward = place.folder / "own.py"
    reward.write_text("def letters(responses, **_):\n    return [len(set(r)) / 100 for r in responses]\n")
    more = [*place.drawn("7b", 2), "train.device_batch_size=1", *SEEN, "train.max_steps=2", "train.validate_every=2"]
    more += ["train.activation_checkpointing=true", "loss.kl_weight=0.01", "rollout.per_prompt=4", "format=plain"]
    more += [f"rollout.max_new_tokens={24 if place.tiny else 128}", "validation_rows=2", "validation_batch_size=2"]
    more += [f"reward.function={reward}:letters"]
    asked_for = ["train", "rl", "--run", str(place.real / "rl-step"), *more]
    done = child(place, *asked_for, environment={HOW: "measured"})
    steps = [record for record in records(place.real / "rl-step") if record["kind"] == "rl"]
    require(len(steps) == 2, f"{len(steps)} steps")
    gap = max(record["sampler_gap"] for record in steps)
    require(gap < 0.05, f"sampler and update: {gap}")
    last = {name: steps[-1][name] for name in ("rollout_seconds", "update_seconds")}
    found = {**done, **last, "rollouts": 8, "sampler_gap": round(gap, 5)}
    tokens = done.get("longest_prompt")
    return found | (counted_by_fit(place, "rl", "7b", more, tokens) if tokens else {})


def load(place: Place) -> dict[str, Any]:
    """A model in bfloat16 on its way to the GPU."""
    return {"model_mb": size(place.base), **child(place, "--load", str(place.base))}


def bfloat16(place: Place) -> dict[str, Any]:
    """The same rows in bfloat16 and in float32: heads differ by rounding alone."""
    return child(place, "--bfloat16", str(place.base))


def sft(place: Place) -> dict[str, Any]:
    """LoRA on a backbone in the precision that the device has: losses are finite, and where the host waits for it."""
    done = train(place, "sft", "sft", *SFT)
    require(len(losses(place.folder / "sft")) == 6, "a step has no finite loss")
    return done


def sharded(place: Place) -> dict[str, Any]:
    """FSDP over one GPU, loaded from mapped files: what is computed and saved is what a whole model gives."""
    require_made(place, "sft", sft)
    done = train(place, "sft", "sharded", *SFT, "train.sharding=full", shards=True)
    return {**done, **difference(place.folder / "sharded", place.folder / "sft")}


def everything(place: Place) -> dict[str, Any]:
    """All weights train, float32 masters under autocast, sharded, layers computed twice."""
    more = ("model.strategy=full", "train.sharding=full", "train.activation_checkpointing=true", "train.max_steps=2")
    return train(place, "sft", "full", *SFT, *more, shards=True)


def stages(place: Place) -> dict[str, Any]:
    """Stage 2 on cached features: where the caches are full the GPU holds lm_head, and no backbone."""
    base = train(place, "sft", "speaks", *SFT, "answer_weight=1")
    options = [f"atlas={place.folder / 'atlas'}", f"base={place.folder / 'speaks'}", "train.max_steps=2"]
    options += [f"features.folder={place.folder / 'features'}", "train.batch_size=5", "validation_split=validation"]
    first = child(place, "train", "qa", "--run", str(place.folder / "qa"), *options)
    second = child(place, "train", "qa", "--run", str(place.folder / "qa-again"), *options)
    key = "main_mb" if base["gpu_mb"] is None else "gpu_mb"
    return {f"stage_1_{key}": base[key], f"first_{key}": first[key], f"cached_{key}": second[key]}


def merge(place: Place) -> dict[str, Any]:
    """`hba merge`: main memory against the largest file of the backbone."""
    require_made(place, "sft", sft)
    out = place.folder / "merged"
    done = child(place, "merge", str(place.folder / "sft"), str(out))
    largest = merge_memory.megabytes(*place.base.glob("*.safetensors"))
    return {**done, "largest_shard_mb": round(largest), "to_largest_shard": round(done["main_mb"] / largest, 2)}


def predict(place: Place) -> dict[str, Any]:
    """The merged model answers in words, and the heads of the run that it was made of in classes."""
    require_made(place, "merged", merge)
    words = child(place, *asked(place, "hf"))
    heads = child(place, *asked(place, "heads", str(place.folder / "sft")))
    return {"words": words, "heads": heads}


def rl(place: Place) -> dict[str, Any]:
    """Two steps of everything with a KL term: sampler and update compute alike, in the precision of the device."""
    reward = place.folder / "own.py"
    reward.write_text("def letters(responses, **_):\n    return [len(set(r)) / 100 for r in responses]\n")
    done = train(place, "rl", "rl", *RL, f"reward.function={reward}:letters")
    steps = [record for record in records(place.folder / "rl") if record["kind"] == "rl"]
    require(bool(steps) and all(record["sampler_gap"] < 0.05 for record in steps), f"sampler and update: {steps}")
    return {**done, "sampler_gap": max(record["sampler_gap"] for record in steps), "first_kl": steps[0]["kl"]}


def probabilities(place: Place) -> dict[str, Any]:
    """Log-probabilities of all response tokens of a micro-batch of the recipe `rl`, in chunks and at once."""
    found = {way: child(place, "--probabilities", way) for way in ("chunks", "whole")}
    key = "main_mb" if found["chunks"]["gpu_mb"] is None else "gpu_mb"
    chunks, whole = found["chunks"], found["whole"]
    require(abs(whole["sum"] / chunks["sum"] - 1) < 1e-4, f"other numbers: {found}")
    peaks = {"chunks_mb": chunks[key], "whole_mb": whole[key], "whole_to_chunks": round(whole[key] / chunks[key], 1)}
    return {"tokens": chunks["tokens"], "whole_logits_mb": chunks["tokens"] * VOCABULARY * 4 // 2**20, **peaks}


def vllm(place: Place) -> dict[str, Any]:
    """vLLM's engine and transformers answer the same rows with the same merged model."""
    here = importlib.util.find_spec("vllm") is not None
    python = sys.executable if here else os.environ.get("HBA_VLLM")
    if python is None or place.tiny:
        return {"skipped": "no GPU" if place.tiny else "no vLLM here, and HBA_VLLM names no environment with it"}
    require_made(place, "predictions-hf", predict)
    done = child(place, *asked(place, "vllm"), python=python)
    folders = [place.folder / f"predictions-{name}" for name in ("hf", "vllm")]
    said = [{row["id"]: row["output"] for row in records(folder, "predictions.jsonl")} for folder in folders]
    require(said[0].keys() == said[1].keys(), "other rows")
    alike = sum(said[0][row] == said[1][row] for row in said[0])
    return {**done, "rows": len(said[0]), "answers_alike": alike}


Check = Callable[[Place], dict[str, Any]]
# With the seconds that each may take; those that matter most come first.
CHECKS: dict[Check, int] = {
    **{machine: 30, lora: 150, qlora: 180, attention: 240, full: 180, answers: 180, rl_step: 180, bit_equal: 300},
    **{load: 120, bfloat16: 120, sft: 120, sharded: 180, everything: 120, stages: 240, merge: 180},
    **{predict: 180, rl: 180, probabilities: 120, vllm: 300},
}


# --- training at real dimensions -------------------------------------------------------------------------------------


def measured(place: Place, run: str, size: str, samples: int, *overrides: str, saved: bool = True) -> dict[str, Any]:
    """`hba train sft` on a model of real dimensions, once: its steps, its memory, and what `hba fit` says of both."""
    kept = place.real / f"{run}.json"
    if kept.is_file():
        found: dict[str, Any] = json.loads(kept.read_text())
        require("failed" not in found, f"{run} failed before: {found.get('failed')}")
        return found
    how = "measured" if saved else "measured unsaved"
    while True:
        more = [*place.drawn(size, samples), *BIG, *overrides]
        try:
            done = child(place, "train", "sft", "--run", str(place.real / run), *more, environment={HOW: how})
            break
        except AssertionError as error:
            if NO_ROOM not in str(error) or samples == 1:
                if LATE not in str(error):  # the next check that needs it may have more seconds
                    kept.write_text(json.dumps({"failed": str(error)[-300:]}))
                raise
            samples //= 2
            shutil.rmtree(place.real / run, ignore_errors=True)
    said = losses(place.real / run)
    require(len(said) == STEPS, "a step has no finite loss")
    found = {**done, "losses": [round(loss, 4) for loss in said[:: STEPS - 1]]}
    found |= counted_by_fit(place, "sft", size, more, done["longest"])
    card = None if place.tiny else gpu_of_fit()
    if card is not None:
        rate = found["operations_a_sample"] * found["samples_per_second"]
        found |= {"stated_tflops": card.tflops, "share_of_peak": round(rate / (card.tflops * 1e12), 3)}
    kept.write_text(json.dumps(found))
    return found


def each_alone(ways: Mapping[str, Callable[[], dict[str, Any]]]) -> dict[str, Any]:
    """What each of `ways` gives by its name, whatever becomes of the others; `failed` has the errors of those that
    failed, if any."""
    found: dict[str, Any] = {}
    for name, way in ways.items():
        try:
            found[name] = way()
        except Exception as error:  # noqa: BLE001 -- the others run, and the exit code says it
            found["failed"] = f"{found.get('failed', '')}{name}: {str(error)[-300:]} ".lstrip()
    return found


def counted_by_fit(place: Place, stage: str, size: str, overrides: Sequence[str], tokens: int) -> dict[str, Any]:
    """What `hba fit` counts for the steps of a run whose longest input has so many tokens."""
    from hba.config import load_config
    from hba.fit import UTILISATION, find_gpu, fit_run
    from hba.rl.config import RlConfig
    from hba.train.config import SftConfig

    kinds: dict[str, Any] = {"sft": SftConfig, "rl": RlConfig}
    config = load_config(kinds[stage], None, list(overrides))
    card = find_gpu("80")
    found = fit_run(str(place.folder / size), stage, config, card, tokens=[tokens])
    counted = {"fit_mb": round(found.total * 1024)}
    if stage == "rl":  # its time is not that of operations alone
        return counted
    operations = card.tflops * 1e12 * UTILISATION / found.samples_per_second
    return counted | {"operations_a_sample": round(operations)}


def memory_gib() -> float:
    """Of the GPU."""
    import torch

    return float(torch.cuda.get_device_properties(0).total_memory / 2**30)


def gpu_of_fit() -> Any:
    """What `hba fit` knows of this GPU; None where it does not know it."""
    import torch

    from hba.fit import GPUS

    name = torch.cuda.get_device_properties(0).name.lower().replace(" ", "")
    like = [card for card in GPUS.values() if card.name.lower().replace(" ", "") in name]
    return max(like, key=lambda card: (len(card.name), -abs(card.gigabytes - memory_gib())), default=None)


# --- commands in processes of their own ------------------------------------------------------------------------------


def train(
    place: Place,
    command: str,
    run: str,
    *overrides: str,
    shards: bool = False,
    environment: dict[str, str] | None = None,
    code: int = 0,
) -> dict[str, Any]:
    """`hba train COMMAND`; with `shards` this one process has a process group, as one of many would."""
    arguments = ["train", command, "--run", str(place.folder / run), *place.model, *overrides]
    own = {"HBA_BENCHMARK_GROUP": str(place.folder / f"group-{run}")} if shards else {}
    return child(place, *arguments, environment=own | (environment or {}), code=code)


def asked(place: Place, backend: str, model: str | None = None) -> list[str]:
    """`hba predict` of some rows of the test split."""
    arguments = ["predict", model or str(place.folder / "merged"), "--backend", backend, "--limit", "40"]
    arguments += ["--atlas", str(place.folder / "atlas"), "--run", str(place.folder / f"predictions-{backend}")]
    return [*arguments, *ENCODE, *([] if backend == "heads" else ["generation.max_tokens=16"])]


def child(
    place: Place,
    *arguments: str,
    environment: dict[str, str] | None = None,
    code: int = 0,
    python: str = sys.executable,
) -> dict[str, Any]:
    """Run this file for one command; what it measured. AssertionError with the end of its errors for another code."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if place.tiny else {}
    # What is freed goes back to the kernel at once: main memory is what is held, not what the allocator kept.
    shared = {"HF_HUB_OFFLINE": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    given = os.environ | shared | hidden | (environment or {})
    command = [python, __file__, "--child", *arguments]
    left = place.ends - time.monotonic()
    require(left > 0, f"no seconds are left of {LATE}")
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=given, start_new_session=True, **pipes)
    try:
        out, err = process.communicate(timeout=None if left == float("inf") else left)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        _, err = process.communicate()
        raise AssertionError(f"{' '.join(arguments[:2])} has not ended within {LATE}: {err[-300:]}") from None
    finally:
        with suppress(ProcessLookupError):  # its own processes may have outlived it
            os.killpg(process.pid, signal.SIGKILL)
    require(process.returncode == code, f"{' '.join(arguments)} ended with {process.returncode}: {err[-2000:]}")
    return json.loads(out.splitlines()[-1]) if code == 0 else {"code": process.returncode}


def run_child(arguments: Sequence[str]) -> None:
    """In the child: one command, or a look at one thing; then its measurements, as the last line."""
    import torch

    import hba.cli

    import_module("transformers.models.qwen2_5_omni.modeling_qwen2_5_omni")
    on_gpu, started = torch.cuda.is_available(), time.perf_counter()
    if file := os.environ.get("HBA_BENCHMARK_GROUP"):
        store = torch.distributed.FileStore(file, 1)
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=0, world_size=1)
    if step := os.environ.get(DIES):
        die_at(int(step))
    how = os.environ.get(HOW, "")
    draw_what_has_no_files()
    if "exact" in how:
        torch.use_deterministic_algorithms(True)
    watch = watched_work(unsaved="unsaved" in how) if "measured" in how else None
    waits: list[str] = []
    on_gpu = on_gpu and "vllm" not in arguments  # whose engine is a process of its own, and wants to be the first
    if on_gpu and watch is None:  # to be told of waits costs time

        def shown(message: Warning | str, category: type[Warning], name: str, line: int, *_: Any) -> None:
            if "synchroniz" in str(message):
                waits.append(f"{name}:{line}")

        torch.cuda.set_sync_debug_mode("warn")
        warnings.showwarning = shown
        warnings.simplefilter("always")
    found: dict[str, Any] = {}
    with load_memory.Watched() as watched:
        if arguments[0] in LOOKS:
            found = LOOKS[arguments[0]](*arguments[1:])
        else:
            sys.argv = ["hba", *arguments]
            try:
                hba.cli.main()
            except SystemExit as stop:
                if stop.code:
                    raise
    found |= {"seconds": round(time.perf_counter() - started, 1), "main_mb": round(watched.peak)}
    found["gpu_mb"] = round(torch.cuda.max_memory_allocated() / 2**20) if on_gpu else None
    if watch is not None:
        print(json.dumps(found | watch()), flush=True)
        return
    ours = [place.split("/hba/")[-1] for place in waits if "/hba/" in place]
    found["host_waits"] = {place: ours.count(place) for place in sorted(set(ours))} if on_gpu else None
    print(json.dumps(found), flush=True)


def die_at(step: int) -> None:
    """Have this process kill itself when it adds up the gradients of that step."""
    from hba.train.ranks import Ranks

    whole, steps = Ranks.add_up_gradients, iter(range(1, step + 1))

    def fatal(*given: Any) -> None:
        if next(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        whole(*given)

    Ranks.add_up_gradients = fatal  # type: ignore[method-assign]


def draw_what_has_no_files() -> None:
    """Have this process draw the weights of a model that is a config alone, on the GPU, alike in every process."""
    from hba.model import checkpoint
    from hba.model.weights import quantize

    whole = checkpoint.load_backbone

    def drawn(name: str, *, dtype: str, attention: str, **more: Any) -> Any:
        import torch

        if any(Path(name).glob("*.safetensors")):
            return whole(name, dtype=dtype, attention=attention, **more)
        model_class, wanted = checkpoint.backbone_class(name), checkpoint.resolve_dtype(dtype)
        config = model_class.config_class.from_pretrained(name)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(0)
            model = model_class._from_config(config, dtype=wanted, attn_implementation=attention)
        model.eval()
        if more.get("quantization", "none") != "none":
            quantize(model, more["quantization"], wanted)
        if more.get("adapter") is not None:
            checkpoint.load_adapter(model, more["adapter"])
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return model

    checkpoint.load_backbone = drawn


def watched_work(*, unsaved: bool) -> Callable[[], dict[str, Any]]:
    """Have this process take the time of its training steps and answers; what is called at the end says them.

    Of a step, the time in which it waited for the loader is told apart. With `unsaved` no checkpoint is written.
    """
    import torch

    from hba.model import OmniSapiens
    from hba.train import loop

    on_gpu = torch.cuda.is_available()
    steps: list[dict[str, Any]] = []
    asked_of: dict[str, list[float]] = {"rows": [], "seconds": [], "tokens": []}
    prompts: list[int] = []

    def now() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    whole_step, say, classify = loop._step, OmniSapiens.say, OmniSapiens.classify

    def step(stage: Any, model: Any, optimizer: Any, batches: Any, *given: Any) -> Any:
        if on_gpu and not steps:
            torch.cuda.reset_peak_memory_stats()  # loading had its own
        seen: dict[str, Any] = {"waited": 0.0, "samples": 0, "tokens": 0, "slots": 0, "longest": 0}

        def noted() -> Iterator[Any]:
            begun = time.perf_counter()
            for batch in batches:
                seen["waited"] += time.perf_counter() - begun
                count, longest = batch.inputs["input_ids"].shape
                seen["samples"] += count
                seen["tokens"] += int(batch.num_tokens.sum())
                seen["slots"] += count * longest
                seen["longest"] = max(seen["longest"], longest)
                yield batch
                begun = time.perf_counter()

        begun = now()
        done = whole_step(stage, model, optimizer, noted(), *given)
        seen["seconds"] = now() - begun - seen["waited"]
        seen["peak"] = torch.cuda.max_memory_allocated() if on_gpu else None
        steps.append(seen)
        return done

    def timed(call: Callable[..., Any], said: Callable[[Any], int]) -> Callable[..., Any]:
        def asked_now(self: Any, batch: Any, *given: Any, **options: Any) -> Any:
            prompts.append(batch.inputs["input_ids"].shape[1])
            begun = now()
            found = call(self, batch, *given, **options)
            asked_of["seconds"].append(now() - begun)
            asked_of["rows"].append(len(found))
            asked_of["tokens"].append(said(found))
            return found

        return asked_now

    patched: Any = loop
    patched._step = step
    if unsaved:
        patched.save_state = lambda *_: None
    asking: Any = OmniSapiens
    asking.say = timed(say, lambda found: sum(one.tokens for one in found))
    asking.classify = timed(classify, lambda _: 0)

    def told() -> dict[str, Any]:
        found: dict[str, Any] = {}
        if steps:
            warm = steps[WARM:] or steps
            seconds = sum(each["seconds"] for each in warm)
            found |= {
                "gpu_mb": round(steps[-1]["peak"] / 2**20) if on_gpu else None,
                "steps": len(warm),
                "samples": max(each["samples"] for each in warm),
                "longest": max(each["longest"] for each in steps),
                "step_seconds": round(statistics.median(each["seconds"] for each in warm), 4),
                "samples_per_second": round(sum(each["samples"] for each in warm) / seconds, 3),
                "tokens_per_second": round(sum(each["tokens"] for each in warm) / seconds),
                "padding": round(1 - sum(each["tokens"] for each in warm) / sum(each["slots"] for each in warm), 3),
                "loader_seconds": round(statistics.median(each["waited"] for each in warm), 4),
            }
        elif asked_of["rows"]:
            later = {name: values[1:] or values for name, values in asked_of.items()}
            seconds = sum(later["seconds"])
            found |= {"rows": int(sum(asked_of["rows"])), "rows_per_second": round(sum(later["rows"]) / seconds, 2)}
            found |= {"answer_tokens_per_second": round(sum(later["tokens"]) / seconds), "longest_prompt": max(prompts)}
        return found

    return told


def look_at_loading(base: str) -> dict[str, Any]:
    """Weights in their own precision, to the device."""
    import torch

    from hba.model import OmniSapiens

    model = OmniSapiens.from_pretrained(base, dtype="bfloat16")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return {"parameters": sum(parameter.numel() for parameter in model.parameters())}


def look_at_bfloat16(base: str) -> dict[str, Any]:
    """The largest difference of a logit to the one in float32, as a share of their spread."""
    import torch

    from hba import open_atlas
    from hba.batch.config import EncodeConfig
    from hba.batch.encode import Encoder, collate
    from hba.model import OmniSapiens

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = open_atlas(Path(base).parent / "atlas", split="test").filter(datasets=["tess"])
    logits = []
    for dtype in ("float32", "bfloat16"):
        torch.manual_seed(0)
        model = OmniSapiens.from_pretrained(base, dtype=dtype).eval().to(device)
        encoder = Encoder(model.processor, EncodeConfig(num_frames=2, min_pixels=3136, max_pixels=3136), rows.taxonomy)
        batch = collate([encoder.encode(sample) for sample in rows], pad_token_id=encoder.pad_token_id).to(device)
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            found_BC = model(batch).logits_BC
        logits.append(found_BC[torch.isfinite(found_BC)].float())
    spread = float(logits[0].std())
    worst = float((logits[0] - logits[1]).abs().max()) / spread
    require(worst < 0.5, f"logits differ by {worst} of their spread")
    return {"rows": len(rows), "largest_difference": round(worst, 4)}


def look_at_probabilities(way: str) -> dict[str, Any]:
    """Forward and backward through lm_head and the log-probabilities of as many tokens as the device has room for."""
    import torch

    from hba.rl import rollout

    on_gpu = torch.cuda.is_available()
    room = torch.cuda.mem_get_info()[0] if on_gpu else 4 << 30
    device, tokens = "cuda" if on_gpu else "cpu", min(RECIPE_TOKENS, room // (8 * 4 * VOCABULARY))
    width = WIDTH if on_gpu else 32
    torch.manual_seed(0)
    head = torch.nn.Linear(width, VOCABULARY, bias=False, device=device, dtype=torch.bfloat16 if on_gpu else None)
    states_NH = torch.randn(tokens, width, device=device, dtype=head.weight.dtype, requires_grad=True)
    ids_N = torch.randint(VOCABULARY, (tokens,), device=device)
    if way == "whole":
        rollout.CHUNK_VALUES = tokens * VOCABULARY
    options = {"banned": [7], "temperature": 1.0, "vocabulary": VOCABULARY}
    found_N2 = rollout.of_tokens(states_NH, head, ids_N=ids_N, **options)
    found_N2[:, 0].sum().backward()
    return {"tokens": tokens, "sum": round(float(found_N2.detach().double().sum()), 1)}


LOOKS: dict[str, Callable[..., dict[str, Any]]] = {
    "--load": look_at_loading,
    "--bfloat16": look_at_bfloat16,
    "--probabilities": look_at_probabilities,
}


# --- what they left --------------------------------------------------------------------------------------------------


def require(holds: bool, what: str) -> None:
    """End the check with `what` where it does not hold."""
    if not holds:
        raise AssertionError(what)


def require_made(place: Place, name: str, check: Check) -> None:
    """Run the check that leaves the folder `name`, where it is not there."""
    if not (place.folder / name).is_dir():
        check(place)


def records(run: Path, name: str = "log.jsonl") -> list[dict[str, Any]]:
    """The lines of a log."""
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def losses(run: Path) -> list[float]:
    """Of every step, those that are finite."""
    return [record["loss"] for record in records(run) if record["kind"] == "train" and abs(record["loss"]) < 1e9]


def difference(run: Path, other: Path) -> dict[str, Any]:
    """Losses that differ (relative), and trained tensors that differ in a bit."""
    from safetensors.torch import load_file

    ours, theirs = losses(run), losses(other)
    require(len(ours) == len(theirs), f"{len(ours)} and {len(theirs)} steps")
    worst = max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))
    require(worst < 1e-2, f"losses differ: {ours}, {theirs}")
    names = [path.relative_to(run) for path in sorted((run / "checkpoints" / "step_6").glob("*.safetensors"))]
    names = [name for name in names if not name.name.startswith("optimizer")]
    pairs = [(load_file(run / name), load_file(other / name)) for name in names]
    differ = [key for a, b in pairs for key in a if not a[key].equal(b[key])]
    total = sum(len(a) for a, _ in pairs)
    return {"loss_difference": worst, "tensors": total, "tensors_that_differ": len(differ)}


def size(folder: Path) -> int:
    """The weights of a folder, in megabytes."""
    return round(sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**20)


def build(place: Place) -> None:
    """Data, the tiny model, and configs and processors of the models of real dimensions."""
    from hba import open_atlas
    from hba.mini import build_mini_atlas
    from hba.model.tiny import atlas_texts, build_tiny

    build_mini_atlas(place.folder / "atlas", size="tiny", seed=0, workers=1)
    tiny = place.folder / ("base" if place.tiny else "tiny")
    build_tiny(tiny, atlas_texts(open_atlas(place.folder / "atlas", split="train")), seed=0)
    place.real.mkdir()
    write_configs(tiny, place.folder, real=not place.tiny)


def write_configs(tiny: Path, folder: Path, *, real: bool = True) -> None:
    """A folder for each of `TEXTS`: a config, of the real dimensions or of `tiny`, and its processor; no weights."""
    from hba.model import checkpoint

    for name, dimensions in TEXTS.items():
        config = checkpoint.read_backbone_config(tiny)
        if real:
            text = config.text_config
            for part, values in ((text, dimensions), (config.audio_config, SOUND), (config.vision_config, SIGHT)):
                for key, value in values.items():
                    setattr(part, key, value)
                part.initializer_range = 0.02
            config.initializer_range = 0.02
            config.audio_config.output_dim = config.vision_config.out_hidden_size = text.hidden_size
            text.layer_types = ["full_attention"] * text.num_hidden_layers
            text.max_position_embeddings = 32_768
            wide = {"rope_theta": 1_000_000.0, "mrope_section": [16, 24, 24]}
            text.rope_parameters = {**text.rope_parameters, **wide}
            config.tie_word_embeddings = text.tie_word_embeddings = False
        config.save_pretrained(folder / name)
        checkpoint.load_processor(tiny).save_pretrained(folder / name)


# --- the page --------------------------------------------------------------------------------------------------------


def write_page(page: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Put the results between the marks of `page`. SystemExit for a page without them."""
    text = page.read_text(encoding="utf-8")
    before, found, rest = text.partition(MARKS[0])
    _, closed, after = rest.partition(MARKS[1])
    if not (found and closed):
        sys.exit(f"{page} has no lines {MARKS[0]} and {MARKS[1]}, between which the results go.")
    page.write_text(f"{before}{found}\n\n{as_markdown(lines)}\n{closed}{after}", encoding="utf-8")


def as_markdown(lines: Sequence[dict[str, Any]]) -> str:
    """The results as text and tables."""
    under = next((line for line in lines if line["check"] == "machine"), {})
    gpu = f"{under['gpu']}, {under['gpu_gb']} GB" if "gpu" in under else "No GPU: the tiny backbone on a CPU"
    said = [f"{gpu}; torch {under.get('torch', 'unknown')}.", ""]
    trained: list[tuple[str, dict[str, Any]]] = []
    for line in lines:
        if line["check"] == "attention":
            ways = ("eager", "flash_attention_2")
            trained += [(f"lora, {way}", line[way]) for way in ways if "step_seconds" in line.get(way, {})]
        elif "step_seconds" in line:
            trained.append((line["check"], line))
    if trained:
        said += ["| training | samples x tokens | step | tokens a second | of the peak | GPU memory | by `hba fit` |"]
        said += ["|---|---|---|---|---|---|---|"]
    for name, found in trained:
        share = f"{found['share_of_peak']:.0%}" if "share_of_peak" in found else "-"
        peak, counted = found["gpu_mb"], found["fit_mb"]
        memory = "-" if peak is None else f"{peak / 1024:.1f} GB"
        by_fit = f"{counted / 1024:.1f} GB" + ("" if peak is None else f" ({counted / peak:.2f})")
        cells = [name, f"{found['samples']} x {found['longest']:,}", f"{found['step_seconds']:.2f} s"]
        cells += [f"{found['tokens_per_second']:,}", share, memory, by_fit]
        said.append(f"| {' | '.join(cells)} |")
    said += ["", "| check | seconds | what came out |", "|---|---|---|"]
    shown = {name for name, _ in trained} | {"machine"}
    for line in lines:
        own = {key: value for key, value in line.items() if key not in ("check", "check_seconds", "at")}
        own = {key: value for key, value in own.items() if not (isinstance(value, dict) and "step_seconds" in value)}
        if "failed" in own:
            own["failed"] = own["failed"][-300:]  # where an error says what it is
        if line["check"] not in shown:
            said.append(f"| {line['check']} | {line['check_seconds']} | {in_words(own)} |")
    return "\n".join(said) + "\n"


def in_words(found: dict[str, Any]) -> str:
    """One cell of a table: figures by name, those of a part behind its name."""
    words = []
    for key, value in found.items():
        if isinstance(value, dict):
            words.append(f"{key}: ({in_words(value)})")
        elif value is not None:
            words.append(f"{key} {value}")
    return "; ".join(words).replace("|", "/").replace("\n", " ").replace("<", "&lt;")


def main() -> None:
    """Every check that is named, or all."""
    if sys.argv[1:2] == ["--child"]:
        run_child(sys.argv[2:])
        return
    known = {check.__name__: check for check in CHECKS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=", ".join(known))
    parser.add_argument("--tiny", action="store_true", help="the tiny backbone on the CPU")
    parser.add_argument("--dry-run", action="store_true", help="list the checks, and stop")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all checks together")
    parser.add_argument("--out", type=Path, help="write the lines of JSON into this file, too")
    parser.add_argument("--read", type=Path, help="run nothing: the lines of JSON of an earlier run")
    parser.add_argument("--page", type=Path, help="put the results into this page, such as docs/gpu.md")
    options = parser.parse_args()
    if wrong := set(options.checks) - set(known):
        parser.error(f"no check {', '.join(sorted(wrong))}; there are {', '.join(known)}")
    chosen = [known[name] for name in options.checks] or list(CHECKS)
    if options.dry_run:
        for check in chosen:
            print(f"{check.__name__:14}{CHECKS[check]:4} s  {(check.__doc__ or '').strip()}")
        return
    if options.read is not None:
        lines = [json.loads(line) for line in options.read.read_text(encoding="utf-8").splitlines()]
    else:
        places = {"out": options.out, "page": options.page}
        lines = run_checks(chosen, tiny=options.tiny, minutes=options.minutes, **places)
    if options.page is not None:
        write_page(options.page, lines)
    sys.exit(any("failed" in line for line in lines))


def run_checks(
    chosen: Sequence[Check], *, tiny: bool, minutes: float, out: Path | None, page: Path | None
) -> list[dict[str, Any]]:
    """Each in turn, whatever becomes of the others; what each found. File and page have it before the next begins."""
    import torch

    lines: list[dict[str, Any]] = []
    deadline = time.monotonic() + 60 * minutes
    if out is not None:
        out.write_text("", encoding="utf-8")
    with tempfile.TemporaryDirectory() as scratch:
        place = Place(Path(scratch), tiny or not torch.cuda.is_available())
        build(place)
        for check in chosen:
            started = time.monotonic()
            try:
                left = min(deadline, started + CHECKS[check])
                late = {"skipped": f"the {minutes:g} minutes are over: name it alone, or give more --minutes"}
                found = check(place._replace(ends=left)) if started < deadline else late
            except Exception as error:  # noqa: BLE001 -- the others run, and the exit code says it
                found = {
                    "failed": str(error).replace(scratch, "SCRATCH"),
                    "at": traceback.format_exc().splitlines()[-3].strip(),
                }
            line = {"check": check.__name__, **found, "check_seconds": round(time.monotonic() - started, 1)}
            lines.append(line)
            print(json.dumps(line), flush=True)
            if out is not None:
                with out.open("a", encoding="utf-8") as handle:
                    handle.write(json.dumps(line) + "\n")
            if page is not None:
                write_page(page, lines)
    return lines


if __name__ == "__main__":
    main()
