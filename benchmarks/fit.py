"""`hba fit` against what training takes on a CPU: two steps of `hba train lm`, `sft` and `rl`, each at two sizes.

    python benchmarks/fit.py             # some minutes
    python benchmarks/fit.py rl lora     # the cases with these words
    python benchmarks/fit.py recipes     # the table of docs/scale.md: what `--gpu` sets for Qwen2.5-Omni-7B

Prints a line of JSON a case: megabytes that `hba fit` reckons beside the weights, megabytes that were taken, and their
ratio; the limits are 0.85 and 1.15. Taken is the peak of the resident set during the steps, less what was there before;
weights in mapped files are read by then.
The models are Qwen2.5-Omni thinkers of random weights, whose prompts are text with a long system message. glibc gives
memory back at once (MALLOC_MMAP_THRESHOLD_), as a GPU's allocator lends it out again. Linux only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import gpu
from hba import open_atlas
from hba.cli.options import recipe_path
from hba.config import load_config
from hba.errors import InputError
from hba.fit import REFERENCE, _Bare, _Need, find_gpu, recipe_for, work_of
from hba.mini import build_mini_atlas
from hba.model import checkpoint
from hba.model.tiny import atlas_texts, build_tiny
from hba.rl.config import RlConfig
from hba.train.config import LmConfig, SftConfig

SIZES = {
    "wide": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6},
    "deep": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 14},
    "small and wide": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6},
    "small and deep": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 14},
}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2}
VOCABULARY = 16_384
WORDS = "She looks at him and then away from him, and nobody in the room says a word about it. "
SAMPLES = 4
SMALL = ("rl",)  # stages that are compared with smaller models
KINDS: dict[str, Any] = {"sft": SftConfig, "lm": LmConfig, "rl": RlConfig}
REWARD = "def letters(responses, **_):\n    return [len(set(r)) / 100 for r in responses]\n"


def build(folder: Path, sizes: Sequence[str]) -> None:
    """The mini-atlas, the tiny model, and larger ones with its processor."""
    build_mini_atlas(folder / "atlas", size="tiny", seed=0, workers=1)
    build_tiny(folder / "tiny", atlas_texts(open_atlas(folder / "atlas", split="train")), seed=0)
    for size in sizes:
        widths = SIZES[size]
        thinker = checkpoint.backbone_class(folder / "tiny")
        config = thinker.config_class.from_pretrained(folder / "tiny")
        text = config.text_config
        for name, value in (widths | HEADS).items():
            setattr(text, name, value)
        width = text.hidden_size // text.num_attention_heads
        text.head_dim = width
        text.rope_parameters = {**text.rope_parameters, "mrope_section": [width // 8, width * 3 // 16, width * 3 // 16]}
        text.layer_types = ["full_attention"] * text.num_hidden_layers
        text.vocab_size = VOCABULARY
        config.tie_word_embeddings = text.tie_word_embeddings = False
        config.audio_config.output_dim = config.vision_config.out_hidden_size = text.hidden_size
        torch.manual_seed(0)
        thinker._from_config(config, dtype=torch.float32).save_pretrained(folder / size)
        checkpoint.load_processor(folder / "tiny").save_pretrained(folder / size)


def words_of(size: str) -> str:
    """A system message, longer for larger models."""
    return WORDS * (6 if size.startswith("small") else 14)


def settings(folder: Path, size: str, more: list[str]) -> list[str]:
    """Overrides of a run."""
    same = [f"atlas={folder / 'atlas'}", f"model.name={folder / size}", "encode.modalities=[]", "loader.workers=0"]
    same += [f"encode.system_prompt={json.dumps(words_of(size))}", f"train.batch_size={SAMPLES}", "train.max_steps=2"]
    same += ["train.validate_every=2", "datasets=[meld_senti]", "train.epochs=1", "validation_batch_size=1"]
    return same + more


def of_rl(folder: Path, *more: str) -> list[str]:
    """Further ones of an RL run: a prompt with several responses a step."""
    (folder / "reward.py").write_text(REWARD)
    drawn = ["rollout.per_prompt=4", "rollout.max_new_tokens=96", "validation_rows=1", "train.batch_size=1"]
    return [*drawn, f"reward.function={folder / 'reward.py'}:letters", "algorithm=grpo", *more]


LOOK = """
import os, re
from hba.cli import main
from hba.rl import local
from hba.train import loop
from torch.nn import Module

def megabytes(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

def read(model):
    for weight in [*model.parameters(), *model.buffers()]:
        weight.sum()  # a weight in a mapped file has no memory before it is read

def began(model):
    read(model)
    loop.before = megabytes("VmRSS")

def watched(module, name, step):
    def run(*given, inner=getattr(module, name)):
        open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
        done = inner(*given)
        run.times += 1
        if run.times == 2:  # the moments of the optimizer are made at the end of the first step
            print("PEAK", name.strip("_"), megabytes("VmHWM") - loop.before, flush=True)
            if step:
                os._exit(0)
        return done
    run.times = 0
    setattr(module, name, run)

def built(*given, inner=loop.build_optimizer):
    made = inner(*given)
    began(given[0])
    return made

def referring(config, policy, *given, inner=local.build_reference):
    there = megabytes("VmRSS")
    made = inner(config, policy, *given)
    for cell in made.__closure__:
        if config.strategy == "full" and isinstance(cell.cell_contents, Module):
            read(cell.cell_contents)
            print("PEAK reference", megabytes("VmRSS") - there, flush=True)
    return made

def sampling(setup, *given, inner=local._sample):
    states = [each for state in setup.optimizer.state.values() for each in state.values()]
    # Behind the first step, for which much is imported, and less the moments that it has made.
    loop.before = megabytes("VmRSS") - sum(each.nbytes for each in states) / 2**20
    return inner(setup, *given)

loop.build_optimizer, local.build_reference, local._sample = built, referring, sampling
watched(loop, "_step", True)
watched(local, "_sample", False)
watched(local, "update", True)
main()
"""


def taken(folder: Path, stage: str, overrides: list[str]) -> dict[str, float]:
    """What the second of two steps of `hba train` takes beside the weights, in megabytes of the resident set; of RL the
    sampling and the update."""
    with tempfile.TemporaryDirectory(dir=folder) as run:
        command = [sys.executable, "-c", LOOK, "train", stage, "--run", f"{run}/r", *overrides]
        env = os.environ | {
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "MALLOC_TRIM_THRESHOLD_": "65536",
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(command, env=env, capture_output=True, text=True)
    found = [line.split() for line in done.stdout.splitlines() if line.startswith("PEAK")]
    if not found:
        sys.exit(done.stderr[-2000:])
    return {name: float(size) for _, name, size in found}


def reckoned(folder: Path, size: str, stage: str, overrides: list[str], tokens: int) -> dict[str, float]:
    """The same by `hba fit`."""
    config = load_config(KINDS[stage], None, overrides)
    works = work_of(config, tokens, str(folder / size))
    needs = [_Need(_Bare(str(folder / size)), work, 1) for work in works]
    names = ("update", "sample") if stage == "rl" else ("step",)
    there = [need.fixed["weights"] + need.fixed[REFERENCE] for need in needs]
    found = [need.total(need.work.samples) - size for need, size in zip(needs, there, strict=True)]
    sizes = dict(zip(names, found, strict=True)) | {"reference": needs[0].fixed[REFERENCE]}
    return {name: size / 2**20 for name, size in sizes.items()}


def tokens_of(folder: Path, size: str, stage: str) -> int:
    """Length of the longest prompt that the run sees."""
    from hba.batch.config import EncodeConfig
    from hba.batch.encode import encoder_for
    from hba.batch.prompt import FormatMix

    processor = checkpoint.load_processor(folder / "tiny")
    wording = {"wording": FormatMix(("think",))} if stage == "rl" else {}
    encoder = encoder_for(processor, EncodeConfig(modalities=(), system_prompt=words_of(size)), **wording)
    rows = open_atlas(folder / "atlas", split="train").filter(datasets=["meld_senti"])
    return max(len(encoder.encode(sample).input_ids_T) for sample in rows)


def recipes() -> None:
    """What `hba train sft --config sft --gpu GB` sets, by the longest row."""
    cases: list[tuple[str, int, list[str]]] = [(size, 1, []) for size in ("16", "24", "48", "80")]
    cases += [("80", 8, ["model.strategy=full"])]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build_tiny(folder / "tiny", ["one text"], seed=0)
        gpu.write_configs(folder / "tiny", folder)
        for size, gpus, more in cases:
            config = load_config(SftConfig, recipe_path("sft"), [f"model.name={folder / '7b'}", "atlas=x", *more])
            for tokens in (1024, 4096):
                try:
                    found = recipe_for(str(folder / "7b"), config, find_gpu(size), gpus=gpus, tokens=tokens)
                    words = f"{found.words or 'fits as it is'} ({found.total:.1f} of {found.usable:.1f} GB)"
                except InputError as error:
                    words = error.what
                print(f"{gpus} x {size} GB {' '.join(more)}, longest row {tokens:,}: {words}", flush=True)


def main() -> None:
    """Each case in turn."""
    only = sys.argv[1:]
    if only == ["recipes"]:
        recipes()
        return
    cases: list[tuple[str, list[str]]] = [
        ("sft", ["model.strategy=lora", "model.dtype=float32"]),
        ("sft", ["model.strategy=lora", "model.dtype=float32", "train.activation_checkpointing=true"]),
        ("lm", ["model.strategy=full", "model.dtype=float32"]),
        ("lm", ["model.strategy=lora", "model.dtype=bfloat16"]),
        ("rl", ["model.strategy=lora", "model.dtype=float32"]),
        ("rl", ["model.strategy=full", "model.dtype=float32", "loss.kl_weight=0.1"]),
        ("rl", ["model.strategy=full", "model.dtype=bfloat16", "train.activation_checkpointing=true"]),
    ]
    cases = [(stage, more) for stage, more in cases if all(word in " ".join([stage, *more]) for word in only)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sizes = {stage: [size for size in SIZES if size.startswith("small") is (stage in SMALL)] for stage, _ in cases}
        build(folder, list(dict.fromkeys(size for of_stage in sizes.values() for size in of_stage)))
        for stage, more in cases:
            for size in sizes[stage]:
                overrides = settings(folder, size, [*(of_rl(folder) if stage == "rl" else []), *more])
                tokens = tokens_of(folder, size, stage)
                estimates = reckoned(folder, size, stage, overrides, tokens)
                found: dict[str, Any] = {"stage": stage, "size": size, "settings": more, "tokens": tokens}
                for part, real in taken(folder, stage, overrides).items():
                    ratio = round(estimates[part] / real, 3)
                    found |= {"part": part, "reckoned": round(estimates[part]), "taken": round(real), "ratio": ratio}
                    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
