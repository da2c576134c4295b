"""The mini-atlas: a small synthetic atlas in the published schema, byte-identical for a seed.

All datasets, tasks and modality signatures, with real .wav, .mp4 and .pt files. Each label can be learned only from
the modality that carries it in life: emotion from voice and movement, sentiment from words, sarcasm from words and
voice disagreeing, and so on (`CARRIED_BY`). Names, lengths, file sizes, order and prompts say nothing about it.
It is a stand-in for tests and demonstrations, never evidence about people.

Reading order: scenes (who shows what) -> plan (clips and rows) -> voice, figure, render, words -> encode -> build.
"""

from hba.mini.build import VERSION, MiniAtlasSummary, build_mini_atlas
from hba.mini.scenes import CARRIED_BY, SIZES

__all__ = ["CARRIED_BY", "SIZES", "VERSION", "MiniAtlasSummary", "build_mini_atlas"]
