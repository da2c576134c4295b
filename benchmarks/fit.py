"""`hba fit` against what training takes on a CPU: two steps of `hba train lm` and `hba train sft` at two sizes.

    python benchmarks/fit.py             # some minutes
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
from pathlib import Path
from typing import Any

import torch

import gpu
from hba import open_atlas
from hba.cli.options import recipe_path
from hba.config import load_config
from hba.errors import InputError
from hba.fit import find_gpu, fit_run, recipe_for
from hba.mini import build_mini_atlas
from hba.model import checkpoint
from hba.model.tiny import atlas_texts, build_tiny
from hba.train.config import LmConfig, SftConfig

SIZES = {
    "wide": {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 2},
    "deep": {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 2},
}
LAYERS = {"wide": 6, "deep": 14}
VOCABULARY = 16_384
WORDS = "She looks at him and then away from him, and nobody in the room says a word about it. " * 14
SAMPLES = 4


def build(folder: Path) -> None:
    """The mini-atlas, the tiny model, and the larger ones with its processor."""
    build_mini_atlas(folder / "atlas", size="tiny", seed=0, workers=1)
    build_tiny(folder / "tiny", atlas_texts(open_atlas(folder / "atlas", split="train")), seed=0)
    for size, widths in SIZES.items():
        thinker = checkpoint.backbone_class(folder / "tiny")
        config = thinker.config_class.from_pretrained(folder / "tiny")
        text = config.text_config
        for name, value in widths.items():
            setattr(text, name, value)
        width = text.hidden_size // text.num_attention_heads
        text.head_dim = width
        text.rope_parameters = {**text.rope_parameters, "mrope_section": [width // 8, width * 3 // 16, width * 3 // 16]}
        text.num_hidden_layers, text.layer_types = LAYERS[size], ["full_attention"] * LAYERS[size]
        text.vocab_size = VOCABULARY
        config.tie_word_embeddings = text.tie_word_embeddings = False
        config.audio_config.output_dim = config.vision_config.out_hidden_size = text.hidden_size
        torch.manual_seed(0)
        thinker._from_config(config, dtype=torch.float32).save_pretrained(folder / size)
        checkpoint.load_processor(folder / "tiny").save_pretrained(folder / size)


def settings(folder: Path, size: str, more: list[str]) -> list[str]:
    """Overrides of a run."""
    same = [f"atlas={folder / 'atlas'}", f"model.name={folder / size}", "encode.modalities=[]", "loader.workers=0"]
    same += [f"encode.system_prompt={json.dumps(WORDS)}", f"train.batch_size={SAMPLES}", "train.max_steps=2"]
    same += ["train.validate_every=2", "datasets=[meld_senti]", "train.epochs=1", "validation_batch_size=1"]
    return same + more


LOOK = """
import os, re
from hba.cli import main
from hba.train import loop

def megabytes(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

def built(*given, build=loop.build_optimizer):
    made = build(*given)
    for weight in [*given[0].parameters(), *given[0].buffers()]:
        weight.sum()  # a weight in a mapped file has no memory before it is read
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    loop.before, loop.steps = megabytes("VmRSS"), 0
    return made

def stepped(*given, step=loop._step):
    stepped = step(*given)
    loop.steps += 1
    if loop.steps == 2:  # the moments of the optimizer are made at the end of the first
        print("PEAK", megabytes("VmHWM") - loop.before, flush=True)
        os._exit(0)
    return stepped

loop.build_optimizer, loop._step = built, stepped
main()
"""


def taken(folder: Path, stage: str, overrides: list[str]) -> float:
    """What two steps of `hba train` take beside the weights, in megabytes of the resident set."""
    with tempfile.TemporaryDirectory(dir=folder) as run:
        command = [sys.executable, "-c", LOOK, "train", stage, "--run", f"{run}/r", *overrides]
        env = os.environ | {
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "MALLOC_TRIM_THRESHOLD_": "65536",
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(command, env=env, capture_output=True, text=True)
    if "PEAK" not in done.stdout:
        sys.exit(done.stderr[-2000:])
    return float(done.stdout.rsplit("PEAK", 1)[1])


def reckoned(folder: Path, size: str, stage: str, overrides: list[str], tokens: int) -> float:
    """The same by `hba fit`."""
    config = load_config(SftConfig if stage == "sft" else LmConfig, None, overrides)
    found = fit_run(str(folder / size), stage, config, find_gpu("24"), tokens=[tokens])
    return (found.total - found.parts["weights"]) * 1024


def tokens_of(folder: Path) -> int:
    """Length of the longest prompt that the run sees."""
    from hba.batch.config import EncodeConfig
    from hba.batch.encode import encoder_for

    processor = checkpoint.load_processor(folder / "tiny")
    encoder = encoder_for(processor, EncodeConfig(modalities=(), system_prompt=WORDS))
    return max(
        len(encoder.encode(sample).input_ids_T)
        for sample in open_atlas(folder / "atlas", split="train").filter(datasets=["meld_senti"])
    )


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
    if sys.argv[1:] == ["recipes"]:
        recipes()
        return
    cases: list[tuple[str, list[str]]] = [
        ("sft", ["model.strategy=lora", "model.dtype=float32"]),
        ("sft", ["model.strategy=lora", "model.dtype=float32", "train.activation_checkpointing=true"]),
        ("lm", ["model.strategy=full", "model.dtype=float32"]),
        ("lm", ["model.strategy=lora", "model.dtype=bfloat16"]),
    ]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build(folder)
        tokens = tokens_of(folder)
        for stage, more in cases:
            for size in SIZES:
                overrides = settings(folder, size, more)
                estimate = reckoned(folder, size, stage, overrides, tokens)
                found: dict[str, Any] = {"stage": stage, "size": size, "settings": more, "tokens": tokens}
                real = taken(folder, stage, overrides)
                found |= {"reckoned": round(estimate), "taken": round(real), "ratio": round(estimate / real, 3)}
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
