"""Peak memory and time of a step of generative SFT: logits of the response alone against logits of every token.

    python benchmarks/lm_memory.py

Prints lines of JSON. The tiny Qwen2.5-Omni with the vocabulary of the real one (151,936 tokens), a batch of samples of
the mini-atlas whose prompts are filled up to 256 and 512 tokens, forward and backward. Each way runs in a process of
its own; memory is the peak of the resident set over what it was before the step, read from the kernel. Only ratios
are comparable between machines, and that of the time is the head's alone: the model behind it is tiny. Linux only.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hba import open_atlas
from hba.batch.config import EncodeConfig
from hba.batch.encode import Batch, collate, encoder_for
from hba.batch.prompt import FormatMix
from hba.model import OmniSapiens
from hba.model.heads import answer_loss

VOCABULARY = 151_936
SAMPLES = 4


def full_logits(model: OmniSapiens, batch: Batch) -> Tensor:
    """The answer loss by way of the logits of every token, as a forward without `labels` gives them."""
    assert batch.labels_BT is not None
    logits_BTV = model.transformer(**batch.inputs, use_cache=False).logits
    return answer_loss(logits_BTV[:, :-1][batch.labels_BT[:, 1:] != -100], batch.labels_BT)


def response_logits(model: OmniSapiens, batch: Batch) -> Tensor:
    """The answer loss as `hba train lm` computes it."""
    assert batch.labels_BT is not None
    return answer_loss(model(batch).answer_logits_NV, batch.labels_BT)


WAYS = {"full": full_logits, "response": response_logits}


def step(way: str, atlas: Path, backbone: Path, tokens: int) -> dict[str, Any]:
    """Peak memory, seconds, loss and gradient norm of one step, measured in this process."""
    torch.set_num_threads(1)
    model = OmniSapiens.from_pretrained(backbone, dtype="float32", heads=False)
    batch = filled(model, atlas, tokens)
    WAYS[way](model, filled(model, atlas, 0)).backward()  # what is allocated once is not counted
    model.zero_grad(set_to_none=False)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, started = resident("VmRSS"), time.perf_counter()
    loss = WAYS[way](model, batch)
    loss.backward()
    seconds, peak = time.perf_counter() - started, resident("VmHWM")
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    return {"megabytes": peak - before, "seconds": seconds, "loss": float(loss.detach()), "grad_norm": float(norm)}


def filled(model: OmniSapiens, atlas: Path, tokens: int) -> Batch:
    """A batch whose prompts are filled up to `tokens` tokens with words."""
    enc = encoder_for(
        model.processor, EncodeConfig(modalities=("audio",)), answers=True, wording=FormatMix(["boxed"])
    )
    word = model.processor.tokenizer(" the", add_special_tokens=False)["input_ids"][-1]
    encoded = []
    for sample in open_atlas(atlas, split=f"train[:{SAMPLES}]"):
        one = enc.encode(sample)
        extra = torch.full((max(0, tokens - len(one.input_ids_T)),), word)
        encoded.append(replace(one, input_ids_T=torch.cat([extra, one.input_ids_T])))
    return collate(encoded, pad_token_id=enc.pad_token_id)


def resident(field: str) -> float:
    """A field of /proc/self/status, in megabytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def made(folder: Path) -> tuple[Path, Path]:
    """A mini-atlas, and a tiny backbone with the vocabulary of Qwen2.5-Omni."""
    from hba.mini import build_mini_atlas
    from hba.model.tiny import atlas_texts, build_tiny

    build_mini_atlas(folder / "atlas", size="tiny", seed=0, workers=1)
    build_tiny(folder / "tiny", atlas_texts(open_atlas(folder / "atlas", split="train")), seed=0)
    model = OmniSapiens.from_pretrained(folder / "tiny", dtype="float32", heads=False)
    model.transformer.resize_token_embeddings(VOCABULARY, mean_resizing=False)
    model.transformer.save_pretrained(folder / "large")
    model.processor.save_pretrained(folder / "large")
    return folder / "atlas", folder / "large"


def main() -> None:
    """Both ways in turn, for two lengths of prompt."""
    with tempfile.TemporaryDirectory() as folder:
        atlas, backbone = made(Path(folder))
        for tokens in (256, 512):
            found = {}
            for way in WAYS:
                command = [sys.executable, __file__, way, str(atlas), str(backbone), str(tokens)]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                found[way] = json.loads(out.splitlines()[-1])
            full, response = found["full"], found["response"]
            ratio = {f"{key}_ratio": round(full[key] / response[key], 2) for key in ("megabytes", "seconds")}
            same = {key: abs(full[key] - response[key]) / abs(full[key]) for key in ("loss", "grad_norm")}
            print(json.dumps({"tokens": tokens, "samples": SAMPLES, **found, **ratio, "relative_difference": same}))


if __name__ == "__main__":
    if len(sys.argv) == 5:
        print(json.dumps(step(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))))
    else:
        main()
