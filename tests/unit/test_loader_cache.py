"""Encoded samples are kept for the next epoch within a bound of bytes, the most recently used ones."""

import json

import numpy as np
import pytest
import torch

from hba import open_atlas
from hba.batch.config import EncodeConfig, LoaderConfig
from hba.batch.encode import Encoded, Encoder
from hba.batch.loader import load_batches

SAMPLE_BYTES = 400_000  # two of them fit into a megabyte


class Counting(Encoder):
    """Gives each sample SAMPLE_BYTES of tensors and remembers which it was asked for."""

    def __init__(self):
        super().__init__(None, EncodeConfig())
        self.asked = []

    @property
    def pad_token_id(self):
        return 0

    def encode(self, sample):
        self.asked.append(sample.number)
        size = 2_000_000 if sample.number == 6 else SAMPLE_BYTES
        return Encoded(sample=sample, input_ids_T=torch.full((size // 8,), sample.number, dtype=torch.long))


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    folder = tmp_path_factory.mktemp("atlas")
    row = {"problem": "Is it?", "answer": "anger", "dataset": "cremad", "task": "t", "modality_signature": "text"}
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(7)))
    return open_atlas(folder, split="train")


@pytest.mark.parametrize(
    ("megabytes", "plan", "encoded"),
    [
        (256, [[0, 1, 2], [3, 4, 5], [5, 4, 3], [2, 1, 0]], [0, 1, 2, 3, 4, 5]),
        (1, [[0, 1, 2], [3, 4, 5], [5, 4, 3], [2, 1, 0]], [0, 1, 2, 3, 4, 5, 3, 2, 1, 0]),
        (1, [[0, 1], [0, 2], [0, 1]], [0, 1, 2, 1]),  # the one that was used last stays
        (1, [[0, 1], [6], [0, 1]], [0, 1, 6]),  # what is larger than all room drives nothing out
        (0, [[0, 1], [1, 0]], [0, 1, 1, 0]),
    ],
)
def test_cache_is_bounded_by_bytes(atlas, megabytes, plan, encoded):
    encoder = Counting()
    rows = [np.array(batch) for batch in plan]
    config = LoaderConfig(workers=0, cache_megabytes=megabytes)
    for batch, wanted in zip(load_batches(atlas, encoder, rows, config), plan, strict=True):
        assert batch.inputs["input_ids"][:, -1].tolist() == wanted
    assert encoder.asked == encoded
