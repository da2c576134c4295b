"""Reward of 160 responses (32 prompts x 5) with one warm, batched, cached embedder, against the released way (the
embedder loaded for every batch, pairs encoded one by one); and HARPO's advantages of 160 and 10,000 rollouts.

Run: OMP_NUM_THREADS=1 python benchmarks/rl_reward.py        Prints median CPU seconds and ratios.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import cos_sim

from hba.embedding import MINILM, Embedder, _resolve
from hba.evaluate.answers import extract
from hba.rl.advantages import Harpo
from hba.rl.rewards import grpo_reward

LABELS = ["anger", "disgust", "fear", "happy", "sad", "neutral", "sarcasm", "not sarcasm", "humour", "not humour"]


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """Median CPU seconds of this process."""
    taken = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        taken.append(time.process_time() - started)
    return statistics.median(taken)


def released_way(responses: list[str], targets: list[str]) -> None:
    """Load, then embed two texts at a time, with the library that the release uses."""
    encoder = SentenceTransformer(_resolve(MINILM), device="cpu")
    for response, target in zip(responses, targets, strict=True):
        answer, wanted = encoder.encode([extract(response), target], convert_to_tensor=True, show_progress_bar=False)
        cos_sim(answer, wanted)


def label_mix(seed: int) -> tuple[list[str], list[str]]:
    """Responses as the mini-atlas' tasks give them: mostly class labels."""
    rng = np.random.default_rng(seed)
    targets = [str(label) for label in rng.choice(LABELS, 32) for _ in range(5)]
    return [rf"<think>loud voice</think>\boxed{{{rng.choice(LABELS)}}}" for _ in targets], targets


def all_different(seed: int) -> tuple[list[str], list[str]]:
    """Free-form answers of which no two are equal, to 32 targets."""
    words = ["she", "he", "wants", "to", "comfort", "help", "leave", "because", "of", "the", "rain", "a", "friend"]
    rng = np.random.default_rng(seed)

    def sentence() -> str:
        return " ".join(rng.choice(words, 8)) + f" {rng.integers(1_000_000)}"

    targets = [text for text in [sentence() for _ in range(32)] for _ in range(5)]
    return [rf"<think>x</think>\boxed{{{sentence()}}}" for _ in targets], targets


def main() -> None:
    """Print what was measured."""
    embedder = Embedder()
    for name, make in (("label mix", label_mix), ("all texts differ", all_different)):
        grpo_reward(*make(0), embedder=embedder)
        batches = iter([make(seed) for seed in range(1, 4)])
        ours = seconds(lambda source=batches: grpo_reward(*next(source), embedder=embedder))  # type: ignore[misc]
        theirs = seconds(lambda maker=make: released_way(*maker(9)))  # type: ignore[misc]
        print(
            f"reward of 160 responses, {name}: {1000 * ours:.1f} ms; released way {theirs:.2f} s: {theirs / ours:.0f}x"
        )
    for count in (160, 10_000):
        rewards = np.random.default_rng(0).choice([0.0, 0.2, 1.0], count)
        groups = [f"prompt {i // 5}" for i in range(count)]
        tasks = [f"task {i // 5 % 10}" for i in range(count)]
        harpo = Harpo()
        taken = seconds(lambda: harpo(rewards, groups, tasks), repeats=21)  # noqa: B023
        print(f"HARPO advantages of {count:,} rollouts: {1000 * taken:.2f} ms")


if __name__ == "__main__":
    main()
