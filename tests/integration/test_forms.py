"""One atlas has one fingerprint, the same samples and the same batches in whatever form it is stored."""

import shutil

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from hba import open_atlas
from hba.atlas.convert import convert_atlas
from hba.atlas.parquet import index_path
from hba.atlas.rows import MEDIA_FIELDS
from hba.atlas.source import read_bytes
from hba.batch.config import EncodeConfig, LoaderConfig
from hba.batch.encode import Encoder
from hba.batch.loader import load_batches
from hba.batch.sampler import plan_batches

SPOKEN = ("id", "split", "problem", "answer", "dataset", "task", "modality_signature", "label", "texts", "extra")


@pytest.fixture(scope="module")
def forms(tmp_path_factory, mini_atlas):
    """Folders of the same atlas: as made, as shards, as shards without index, and back to files."""
    root = tmp_path_factory.mktemp("forms")
    convert_atlas(mini_atlas, root / "parquet", to="parquet", shard_bytes=60_000)
    convert_atlas(root / "parquet", root / "files", to="jsonl")
    shutil.copytree(root / "parquet", root / "plain")
    for shard in (root / "plain").glob("*.parquet"):
        index_path(shard).unlink()
    return {"parquet": root / "parquet", "plain": root / "plain", "files": root / "files"}


def said(sample):
    """What a sample says and holds, without where it lies."""
    media = {}
    for name in MEDIA_FIELDS:
        sources = [sample.source.medium(sample.number, name, i, where="") for i in range(getattr(sample, name))]
        media[name] = [read_bytes(source) for source in sources]
    return {name: getattr(sample, name) for name in SPOKEN} | media


@pytest.mark.parametrize("form", ["parquet", "plain", "files"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_fingerprint_and_samples(forms, mini_atlas, form, split):
    one, other = open_atlas(mini_atlas, split=split), open_atlas(forms[form], split=split)
    assert other.fingerprint == one.fingerprint
    assert other[3:20].fingerprint == one[3:20].fingerprint != one.fingerprint
    assert other.filter(modalities="text_audio").fingerprint == one.filter(modalities="text_audio").fingerprint
    assert [said(sample) for sample in other] == [said(sample) for sample in one]


@pytest.mark.parametrize("form", ["parquet", "files"])
def test_batches(forms, mini_atlas, backbone, form):
    encoder = Encoder(AutoProcessor.from_pretrained(backbone), EncodeConfig(num_frames=2))
    plans, batches = [], []
    for folder in (mini_atlas, forms[form]):
        atlas = open_atlas(folder, split="train")
        columns = atlas.columns
        plan = plan_batches(columns.signature_codes, atlas.estimated_tokens, batch_size=4, seed=3, epoch=1)
        plans.append(plan)
        batches.append(list(load_batches(atlas, encoder, plan[:8], LoaderConfig(workers=0))))
    assert all(map(np.array_equal, *plans))
    for a, b in zip(*batches, strict=True):
        assert [s.id for s in a.samples] == [s.id for s in b.samples]
        assert a.inputs.keys() == b.inputs.keys()
        assert all(torch.equal(a.inputs[name], b.inputs[name]) for name in a.inputs)
        assert torch.equal(a.class_index_B, b.class_index_B)
        assert not a.quarantined and not b.quarantined
