"""Peak memory of `hba merge` on a model of 2 GB: shard by shard, against loading the model and folding it whole.

    python benchmarks/merge_memory.py [--keep FOLDER]

Prints lines of JSON. The model is a Qwen2.5-Omni thinker of the 3B's widths and vocabulary with five layers and random
weights in bfloat16, in three files; a checkpoint with LoRA of rank 32 stands on it. Each way runs in a process of its
own; memory is the peak of its resident set (ru_maxrss) above that of a process that has only imported the same. Whether
both ways give the same bits is compared tensor by tensor. Only ratios are comparable between machines. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

WIDTHS = {"hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16, "num_key_value_heads": 2}
LAYERS, VOCABULARY, SHARD = 5, 151_936, "700MB"


def build(folder: Path) -> None:
    """Write the model (`folder/base`) and the checkpoint that stands on it (`folder/lora`)."""
    import torch
    from transformers import AutoProcessor

    from hba import open_atlas
    from hba.batch.config import EncodeConfig
    from hba.mini import build_mini_atlas
    from hba.model import OmniSapiens, checkpoint
    from hba.model.config import ModelConfig
    from hba.model.omni import apply_strategy
    from hba.model.tiny import atlas_texts, build_tiny

    build_mini_atlas(folder / "atlas", size="tiny", seed=0, workers=1)
    build_tiny(folder / "tiny", atlas_texts(open_atlas(folder / "atlas", split="train")), seed=0)
    thinker = checkpoint.backbone_class(folder / "tiny")
    config = thinker.config_class.from_pretrained(folder / "tiny")
    text = config.text_config
    for name, value in WIDTHS.items():
        setattr(text, name, value)
    text.num_hidden_layers, text.vocab_size, text.layer_types = LAYERS, VOCABULARY, ["full_attention"] * LAYERS
    text.rope_parameters = {**text.rope_parameters, "mrope_section": [16, 24, 24]}
    config.tie_word_embeddings = text.tie_word_embeddings = False
    config.audio_config.output_dim = config.vision_config.out_hidden_size = WIDTHS["hidden_size"]
    torch.manual_seed(0)
    with torch.device("meta"):
        model = thinker._from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    model.save_pretrained(folder / "base", max_shard_size=SHARD)
    AutoProcessor.from_pretrained(folder / "tiny").save_pretrained(folder / "base")
    del model
    adapted = OmniSapiens.from_pretrained(folder / "base", dtype="bfloat16")
    apply_strategy(adapted, ModelConfig(name=str(folder / "base"), lora_r=32))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.02)
    kept = {"backbone": str(folder / "base"), "strategy": "lora", "encode": EncodeConfig()}
    adapted.save_pretrained(folder / "lora", **kept)


def imports(folder: Path) -> None:
    """Import what every way uses, its classes included."""
    for name in ("peft.tuners.lora", "hba.model.merge", "huggingface_hub"):
        import_module(name)
    from hba.model import checkpoint

    checkpoint.backbone_class(folder / "base")
    checkpoint.load_processor(folder / "base")


def stream(folder: Path, dtype: str) -> None:
    """As `hba merge` does it."""
    imports(folder)
    from hba.model.merge import merge_checkpoint

    merge_checkpoint(folder / "lora", folder / f"stream-{dtype}", dtype=dtype)


def whole(folder: Path, dtype: str) -> None:
    """The model loaded in float32, LoRA folded in by PEFT, rounded, saved by transformers."""
    imports(folder)
    import torch
    from huggingface_hub import save_torch_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

    from hba.model import OmniSapiens

    thinker = OmniSapiens.from_pretrained(folder / "lora", dtype="float32").transformer
    for parent in list(thinker.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                child.merge(safe_merge=True)
                setattr(parent, name, child.get_base_layer())
    out = folder / f"whole-{dtype}"
    out.mkdir()
    rounded = {f"thinker.{name}": tensor.to(getattr(torch, dtype)) for name, tensor in thinker.state_dict().items()}
    save_torch_state_dict(rounded, out, max_shard_size=SHARD)


def same(folder: Path, dtype: str) -> int:
    """How many tensors both ways wrote; an error where one differs in a bit."""
    import torch

    from hba.model.weights import Weights

    ours, theirs = Weights.of(folder / f"stream-{dtype}"), Weights.of(folder / f"whole-{dtype}")
    if sorted(ours.stored) != sorted(theirs.stored):
        raise SystemExit("other tensors")
    for name in theirs.stored:
        pairs = zip(ours.blocks(name), theirs.blocks(name), strict=True)
        if not all(torch.equal(a, b) for a, b in pairs):
            raise SystemExit(f"{name} differs")
    return len(theirs.stored)


def peak_megabytes(way: str, folder: Path, dtype: str = "") -> float:
    """The peak of the resident set of a process that goes one way, and of its reading and writing alone."""
    code = f"import resource, sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import merge_memory; "
    arguments = f"merge_memory.Path({str(folder)!r})" + (f", {dtype!r}" if dtype else "")
    code += f"merge_memory.{way}({arguments}); "
    code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    # The child's peak begins with what this process has: it imports nothing large itself.
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return float(out.splitlines()[-1])


def megabytes(*files: Path) -> float:
    """The size of the largest of `files`."""
    return max(file.stat().st_size for file in files) / 2**20


def measure(folder: Path) -> None:
    """Both ways in both precisions."""
    peak_megabytes("build", folder)
    base = sorted((folder / "base").glob("*.safetensors"))
    largest, adapter = megabytes(*base), megabytes(folder / "lora" / "adapter_model.safetensors")
    model = sum(file.stat().st_size for file in base) / 2**20
    print(json.dumps({"model_mb": round(model), "largest_shard_mb": round(largest), "adapters_mb": round(adapter)}))
    empty = peak_megabytes("imports", folder)
    for dtype in ("bfloat16", "float32"):
        found = {way: peak_megabytes(way, folder, dtype) - empty for way in ("stream", "whole")}
        compared = int(subprocess.run(
            [sys.executable, __file__, "--same", str(folder), dtype], check=True, capture_output=True, text=True
        ).stdout)  # fmt: skip
        print(json.dumps({
            "dtype": dtype,
            "stream_mb": round(found["stream"]),
            "whole_mb": round(found["whole"]),
            "stream_to_largest_shard": round(found["stream"] / largest, 2),
            "stream_to_shard_and_adapters": round(found["stream"] / (largest + adapter), 2),
            "whole_to_largest_shard": round(found["whole"] / largest, 2),
            "whole_to_stream": round(found["whole"] / found["stream"], 1),
            "tensors_equal_to_the_bit": compared,
        }))  # fmt: skip


def main() -> None:
    """Measure in a temporary folder, or in one that stays."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--same", nargs=2)
    options = parser.parse_args()
    if options.same:
        print(same(Path(options.same[0]), options.same[1]))
        return
    if options.keep is not None:
        options.keep.mkdir(parents=True)
        measure(options.keep)
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder))


if __name__ == "__main__":
    main()
