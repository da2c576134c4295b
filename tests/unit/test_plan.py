"""Steps are the same samples whatever the number of processes and however their shares are cut."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hba import open_atlas
from hba.atlas.mixing import MixConfig
from hba.errors import ConfigError
from hba.train.config import TrainConfig
from hba.train.plan import training_plan


@pytest.fixture(scope="module")
def rows(mini_atlas):
    atlas = open_atlas(mini_atlas, split="train")
    return atlas.columns, atlas.estimated_tokens


def steps(plan):
    cut = pairwise(plan.starts)
    return [Counter(np.concatenate(plan.micro_batches[start:end]).tolist()) for start, end in cut]


@settings(max_examples=60, deadline=None)
@given(
    world=st.integers(1, 4),
    batch_size=st.integers(1, 12),
    accumulation=st.integers(1, 5),
    limit=st.none() | st.integers(1, 5),
)
def test_steps_do_not_depend_on_processes_or_parts(rows, world, batch_size, accumulation, limit):
    columns, lengths = rows
    config = TrainConfig(epochs=2, batch_size=batch_size, accumulation=accumulation, device_batch_size=limit)
    whole = TrainConfig(epochs=2, batch_size=batch_size, accumulation=accumulation)
    expected = steps(training_plan(columns, lengths, MixConfig(), whole, rank=0, world=1))
    try:
        plans = [training_plan(columns, lengths, MixConfig(), config, rank=r, world=world) for r in range(world)]
    except ConfigError as error:
        assert "cannot be split" in str(error)
        return
    assert len({tuple(plan.starts) for plan in plans}) == 1
    assert [sum(parts, Counter()) for parts in zip(*map(steps, plans), strict=True)] == expected
    for together in zip(*(plan.micro_batches for plan in plans), strict=True):
        assert all(len(part) for part in together)
        assert len(set(columns.signature_codes[np.concatenate(together)])) == 1
        if limit is not None and limit > 1:
            assert max(map(len, together)) <= limit


def test_a_batch_smaller_than_the_processes_is_refused(rows):
    with pytest.raises(ConfigError, match="cannot be split over 4 processes"):
        training_plan(*rows, MixConfig(), TrainConfig(batch_size=2), rank=0, world=4)
