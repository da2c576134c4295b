"""Descriptors of stage 3: one that cannot be read costs its own sample, and nothing is filled in for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from hba import open_atlas
from hba.atlas.rows import Quarantined
from hba.batch.pool import DescriptorConfig
from hba.train.features import read_descriptors, training_matrix


@pytest.mark.parametrize("content", [b"", b"no descriptor", "NaN"])
def test_a_descriptor_that_cannot_be_read_costs_its_own_sample_alone(
    tmp_path: Path, mini_atlas: Path, content: bytes | str
) -> None:
    """The flaw: it became None and took the features of the whole batch with it."""
    whole = open_atlas(mini_atlas, split="train").filter(datasets=["daicwoz"])
    atlas = tmp_path / "atlas"
    shutil.copytree(mini_atlas, atlas)
    number = int(whole.numbers[1])
    line = int(whole[1].where.rpartition(":")[2])
    row = json.loads((atlas / "train.jsonl").read_text().splitlines()[line - 1])
    broken = atlas / row["ext_video_feats"][0]
    if isinstance(content, bytes):
        broken.write_bytes(content)
    else:
        tensors = torch.load(broken, weights_only=True)
        torch.save(_with_nan(tensors), broken)
    expected = read_descriptors(whole, DescriptorConfig())
    rows = open_atlas(atlas, split="train").filter(datasets=["daicwoz"])
    found = read_descriptors(rows, DescriptorConfig())
    left_out = found.pop(number)
    assert isinstance(left_out, Quarantined)
    assert (left_out.id, left_out.field) == (whole[1].id, "ext_video_feats")
    assert found.keys() == expected.keys() - {number}
    for key, vectors in found.items():
        assert not isinstance(vectors, Quarantined)
        assert all(torch.equal(vectors[name], expected[key][name]) for name in ("video", "audio"))
    matrix = training_matrix(rows, found | {number: left_out}, "daicwoz")
    assert {name: len(tensor) for name, tensor in matrix.items()} == {"video": len(rows) - 1, "audio": len(rows) - 1}


def _with_nan(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.float() * float("nan")
    if isinstance(value, dict):
        return {key: _with_nan(inner) for key, inner in value.items()}
    return value
