"""One atlas in two forms: the same plan, and the same batches to the bit."""

import numpy as np
import pytest
import torch

from hba.atlas import open_atlas
from hba.atlas.batch import EncodeConfig, Encoder
from hba.atlas.convert import convert_atlas
from hba.atlas.loader import LoaderConfig, load_batches
from hba.evaluate.predict import evaluation_plan


@pytest.mark.parametrize("workers", [0, 2])
def test_files_and_shards_give_the_same_batches(mini_atlas, model, tmp_path, workers):
    convert_atlas(mini_atlas, tmp_path / "shards", to="parquet", splits=["validation"], shard_bytes=100_000)
    encoder = Encoder(model.processor, EncodeConfig(num_frames=2, max_pixels=3136))
    forms = [open_atlas(folder, "validation") for folder in (mini_atlas, tmp_path / "shards")]
    plans = [evaluation_plan(atlas, np.arange(len(atlas)), 8) for atlas in forms]
    assert all(map(np.array_equal, *plans))
    config = LoaderConfig(workers=workers)
    loaded = [load_batches(atlas, encoder, plan, config) for atlas, plan in zip(forms, plans, strict=True)]
    for one, other in zip(*loaded, strict=True):
        assert [s.id for s in one.samples] == [s.id for s in other.samples] and len(one) > 0
        assert one.inputs.keys() == other.inputs.keys()
        assert all(torch.equal(one.inputs[name], other.inputs[name]) for name in one.inputs)
        assert torch.equal(one.class_index_B, other.class_index_B) and not one.quarantined + other.quarantined
