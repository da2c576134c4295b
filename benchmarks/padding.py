"""How much of what a GPU computes is padding, and in how many passes: samples at once against tokens at once.

    python benchmarks/padding.py [--samples 8] [--tokens 8192] [ATLAS]

One epoch of stage 1 as published (512 samples a step) over the training rows of ATLAS; without it over 74,449 made-up
rows in the length mix of the release. Known of the release are its number of rows and the shares of the modality
signatures. Assumed are, for each corpus, its share of the rows of a signature (the number of its clips as its authors
give it), the median of its durations and texts, and that both are lognormal: see `CORPORA`. Lengths are those that the
planner reckons with, by the default encoding; a tokenizer's would differ by some per cent. Nothing is timed.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from hba import open_atlas
from hba.atlas import Atlas, Columns
from hba.batch.config import EncodeConfig
from hba.batch.sampler import Indices, MixConfig, input_tokens
from hba.train.config import TrainConfig
from hba.train.loop import training_plan

TRAINING_ROWS, SIGNATURES = 74_449, {"text_video_audio": 87_318, "text_audio": 10_431, "text": 2_550}


class Corpus(NamedTuple):
    """Assumed of a corpus: clips, median seconds, spread of its durations (sigma of the logarithm), median characters
    of a prompt."""

    signature: str
    clips: int
    seconds: float
    spread: float
    chars: int


CORPORA = {
    "mosei (twice)": Corpus("text_video_audio", 46_900, 7.3, 0.6, 500),
    "meld (twice)": Corpus("text_video_audio", 27_400, 3.0, 0.7, 350),
    "urfunny": Corpus("text_video_audio", 16_500, 18.0, 0.5, 600),
    "intentqa": Corpus("text_video_audio", 16_300, 44.0, 0.5, 300),
    "cremad": Corpus("text_video_audio", 7_400, 2.5, 0.2, 300),
    "siq2": Corpus("text_video_audio", 6_200, 60.0, 0.05, 300),
    "chsimsv2": Corpus("text_video_audio", 4_400, 3.6, 0.5, 300),
    "mimeqa, ptsd_in_the_wild, daicwoz": Corpus("text_video_audio", 1_600, 150.0, 0.6, 600),
    "tess": Corpus("text_audio", 2_800, 2.1, 0.15, 300),
    "mmpsy": Corpus("text_audio", 2_600, 90.0, 0.6, 800),
    "texts": Corpus("text", 1, 0.0, 0.0, 900),
}
LONGEST_SECONDS, BYTES_PER_SECOND = 300.0, 32_000


def release() -> Any:
    """What a planner reads of an atlas, of made-up rows in the mix of the release."""
    rng = np.random.default_rng(0)
    codes, seconds, chars = [], [], []
    for code, (signature, rows) in enumerate(SIGNATURES.items()):
        own = [corpus for corpus in CORPORA.values() if corpus.signature == signature]
        clips = sum(corpus.clips for corpus in own)
        for corpus in own:
            count = round(TRAINING_ROWS * rows / sum(SIGNATURES.values()) * corpus.clips / clips)
            codes.append(np.full(count, code, np.int16))
            seconds.append(np.minimum(corpus.seconds * np.exp(rng.normal(0, corpus.spread, count)), LONGEST_SECONDS))
            chars.append((corpus.chars * np.exp(rng.normal(0, 0.4, count))).astype(np.int32))
    codes_N, seconds_N = np.concatenate(codes), np.concatenate(seconds)
    zeros = np.zeros(len(codes_N), np.int16)
    columns = Columns(
        datasets=("release",),
        dataset_codes=zeros,
        tasks=("",),
        task_codes=zeros,
        label_codes=zeros,
        signatures=tuple(SIGNATURES),
        signature_codes=codes_N,
        problem_chars=np.concatenate(chars),
        answer_chars=zeros,
        num_images=zeros,
        num_videos=(codes_N == 0).astype(np.int16),
        num_audios=(codes_N < 2).astype(np.int16),
    )
    rows_made = SimpleNamespace(columns=columns, audio_bytes=(seconds_N * BYTES_PER_SECOND).astype(np.int64))
    rows_made.estimated_tokens = Atlas.estimated_tokens.func(rows_made)  # type: ignore[attr-defined]
    return rows_made


class Epoch(NamedTuple):
    """Of one epoch on so many GPUs."""

    padding: float  # share of the computed tokens
    passes: float  # micro-batches of a step, on each GPU
    largest: int  # tokens of a micro-batch, padded ones included
    tokens: float  # that all GPUs pass through for one that is used, where all wait for the largest of a place


def epoch(rows: Any, tokens_N: Indices, train: TrainConfig, world: int) -> Epoch:
    """Count one."""
    how = (rows.columns, rows.estimated_tokens, MixConfig(), train)
    plans = [training_plan(*how, tokens_N=tokens_N, rank=rank, world=world) for rank in range(world)]
    slots = [[len(part) * int(tokens_N[part].max(initial=0)) for part in plan.micro_batches] for plan in plans]
    used, computed = int(tokens_N.sum()), sum(map(sum, slots))
    waited = world * sum(map(max, zip(*slots, strict=True)))
    steps = len(plans[0].starts) - 1
    return Epoch(1 - used / computed, len(slots[0]) / steps, max(map(max, slots)), waited / used)


def main() -> None:
    """Print the table."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("atlas", nargs="?")
    asked.add_argument("--samples", type=int, default=8)
    asked.add_argument("--tokens", type=int, default=8192)
    given = asked.parse_args()
    rows = release() if given.atlas is None else open_atlas(given.atlas, split="train")
    tokens_N = input_tokens(rows, EncodeConfig())
    shown = ", ".join(f"{share} % {np.percentile(tokens_N, share):,.0f}" for share in (5, 50, 95, 100))
    print(f"{len(tokens_N):,} rows, tokens of a sample: {shown}; 512 samples a step (64 x 8)")
    whole = TrainConfig(epochs=1, batch_size=64, accumulation=8)
    # Each also in the memory that the other takes.
    samples = replace(whole, device_batch_size=given.samples)
    alike = epoch(rows, tokens_N, samples, 1).largest
    fewer = max(1, given.tokens // int(tokens_N.max()))
    settings = {
        f"device_batch_size={given.samples}": samples,
        f"device_tokens={alike}": replace(whole, device_tokens=alike),
        f"device_batch_size={fewer}": replace(whole, device_batch_size=fewer),
        f"device_tokens={given.tokens}": replace(whole, device_tokens=given.tokens),
    }
    print(f"{'':28}{'GPUs':>5}{'padding':>10}{'passes a step':>15}{'largest':>10}{'tokens for one used':>21}")
    for world in (1, 8):
        for name, train in settings.items():
            one = epoch(rows, tokens_N, train, world)
            print(f"{name:28}{world:>5}{one.padding:>10.1%}{one.passes:>15.1f}{one.largest:>10,}{one.tokens:>21.3f}")


if __name__ == "__main__":
    main()
