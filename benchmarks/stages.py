"""What a frozen backbone's cache saves in BAM and QA, and what tight batches save in stage 1.

    python benchmarks/stages.py [DEMO]

Prints lines of JSON with ratios of CPU seconds of one process, both sides in the same run. DEMO is a folder of
`hba demo`, of which atlas, tiny and sft are read; without it a mini-atlas of size small and a stage-1 run of one step
are made. BAM: 4 epochs over three datasets, with the backbone in every step, with the cache filled first, and with a
cache that stands; QA: 5 epochs. The backbone in every step is measured twice: with media decoded in every epoch, as it
is where memory holds a small part of the samples, and with all of them kept in memory, encoded. Losses of all sides
have to be equal to 1e-5, or the benchmark fails.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hba.atlas import open_atlas
from hba.batch.config import EncodeConfig
from hba.batch.encode import Batch, Encoder, collate
from hba.batch.sampler import plan_batches
from hba.config import load_config
from hba.mini import build_mini_atlas
from hba.model import OmniSapiens
from hba.model.process import prepare_process
from hba.model.tiny import atlas_texts, build_tiny
from hba.run import RunFolder
from hba.storage import read_jsonl
from hba.train.bam import train_bam
from hba.train.config import BamConfig, QaConfig, SftConfig
from hba.train.qa import train_qa
from hba.train.sft import sft_loss, train_sft

DATASETS = ("daicwoz", "ptsd_in_the_wild", "cremad")
PADDED_TOKENS = 4096  # the length to which the released trainer pads
Trainer = Callable[[Any, RunFolder], object]


def train(run: Path, kind: type[Any], work: Trainer, values: Sequence[str]) -> float:
    """CPU seconds of a training run."""
    config = load_config(kind, None, values)
    with RunFolder.open(run, config=config, command="benchmark", seed=0) as folder:
        started = time.process_time()
        work(config, folder)
        return time.process_time() - started


def losses(run: Path) -> list[float]:
    """The logged training losses of a run."""
    return [line.record["loss"] for line in read_jsonl(run / "log.jsonl") if line.record["kind"] == "train"]


def cached_stage(name: str, folder: Path, kind: type[Any], work: Trainer, epochs: int, values: list[str]) -> None:
    """A stage with and without its cache, and again with a cache that stands.

    What any run costs once (opening the atlas, descriptors, a checkpoint) is measured and taken off on both sides.
    """
    common = [*values, "features.loader.workers=0", "train.validate_every=100000", "train.log_every=1"]
    few, keep = [*common, f"train.epochs={epochs}"], f"features.folder={folder / name}"
    off, forget = "features.cache=false", "features.loader.cache_megabytes=0"
    train(folder / f"{name}-warm", kind, work, [*common, off, "train.max_steps=1"])  # imports
    cached = train(folder / f"{name}-cached", kind, work, [*few, keep])
    once = train(folder / f"{name}-once", kind, work, [*few, keep, "train.max_steps=1"])
    decoded = train(folder / f"{name}-decoded", kind, work, [*few, off, forget])
    encoded = train(folder / f"{name}-encoded", kind, work, [*few, off])
    again = train(folder / f"{name}-again", kind, work, [*few, keep, "train.seed=1"])
    worst = max(
        abs(a - b)
        for other in ("decoded", "encoded")
        for a, b in zip(losses(folder / f"{name}-cached"), losses(folder / f"{name}-{other}"), strict=True)
    )
    if worst > 1e-5:
        raise SystemExit(f"{name}: losses differ by {worst}")
    epoch = (again - once) / epochs
    figures = {
        "stage": name,
        "epochs": epochs,
        "seconds": {"decoded each epoch": decoded, "encoded samples in memory": encoded, "cache filled": cached},
        "once a run": once,
        "ratio in total, media decoded each epoch": (decoded - once) / (cached - once),
        "ratio in total, encoded samples in memory": (encoded - once) / (cached - once),
        "ratio an epoch, media decoded": (decoded - once) / epochs / epoch,
        "ratio an epoch, encoded samples in memory": (encoded - once) / epochs / epoch,
        "largest difference of losses": worst,
    }
    print(json.dumps(figures, default=str), flush=True)


def padded(batch: Batch) -> Batch:
    """The batch as the released trainer pads it."""
    missing = PADDED_TOKENS - batch.inputs["input_ids"].shape[1]
    wide = {name: torch.nn.functional.pad(batch.inputs[name], (missing, 0)) for name in ("input_ids", "attention_mask")}
    return Batch(
        samples=batch.samples,
        inputs=batch.inputs | wide,
        class_index_B=batch.class_index_B,
        domain_names=batch.domain_names,
    )


def padding(atlas_root: Path, model: OmniSapiens, steps: int = 6, batch_size: int = 4) -> None:
    """Forward and backward pass of stage 1 over batches of the atlas' own mix of lengths, tight and padded."""
    atlas = open_atlas(atlas_root, split="train")
    labelled = atlas.select(np.flatnonzero(atlas.columns.label_codes >= 0))
    codes_N, lengths_N = labelled.columns.signature_codes, labelled.estimated_tokens
    plan = plan_batches(codes_N, lengths_N, batch_size=batch_size, seed=0, epoch=0)[:steps]
    encoder = Encoder(model.processor, EncodeConfig(max_pixels=3136))
    batches = [
        collate([encoder.encode(labelled[int(row)]) for row in rows], pad_token_id=encoder.pad_token_id)
        for rows in plan
    ]
    seconds = {}
    for name, change in (("tight", lambda batch: batch), ("padded", padded)):
        sft_loss(model, batches[0], answer_weight=0.0).backward()  # warm
        started = time.process_time()
        for batch in batches:
            sft_loss(model, change(batch), answer_weight=0.0).backward()
        seconds[name] = time.process_time() - started
    lengths = [batch.inputs["input_ids"].shape[1] for batch in batches]
    ratio = round(seconds["padded"] / seconds["tight"], 1)
    print(json.dumps({"stage": "sft", "tokens of a batch": lengths, "throughput against padding to 4,096": ratio}))


def main() -> None:
    """Run all three."""
    prepare_process(0)
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary)
        demo = Path(sys.argv[1]) if len(sys.argv) > 1 else made
        atlas, sft = demo / "atlas", demo / "sft"
        if demo == made:
            build_mini_atlas(atlas, size="small", seed=0, workers=1)
            build_tiny(made / "tiny", atlas_texts(open_atlas(atlas, split="train")), seed=0)
            values = [f"atlas={atlas}", f"model.name={made / 'tiny'}", "model.strategy=full", "train.max_steps=1"]
            values += ["answer_weight=1", "encode.max_pixels=3136", "validation_split=validation[:8]"]
            train(sft, SftConfig, train_sft, values)
        stands = [f"atlas={atlas}", f"base={sft}", "dtype=float32", "train.batch_size=16"]
        chosen = [*stands, f"datasets=[{','.join(DATASETS)}]"]
        cached_stage("bam", made, BamConfig, train_bam, 4, chosen)
        cached_stage("qa", made, QaConfig, train_qa, 5, [*stands, "train.learning_rate=1e-3"])
        padding(atlas, OmniSapiens.from_pretrained(sft, dtype="float32"))


if __name__ == "__main__":
    main()
