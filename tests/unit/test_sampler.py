"""Batch plans: complete, homogeneous, tight, and a function of (seed, epoch)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hba.batch.sampler import padding_share, plan_batches
from hba.errors import ConfigError


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4000)), min_size=1, max_size=300),
    batch_size=st.integers(1, 40),
    seed=st.integers(0, 2**31),
    shuffle=st.booleans(),
)
def test_every_row_once_in_batches_of_one_signature(rows, batch_size, seed, shuffle):
    codes, lengths = (np.array(column) for column in zip(*rows, strict=True))
    batches = plan_batches(codes, lengths, batch_size=batch_size, seed=seed, epoch=3, shuffle=shuffle)
    assert sorted(np.concatenate(batches)) == list(range(len(rows)))
    assert all(len(set(codes[b])) == 1 and len(b) <= batch_size for b in batches)


def plan(seed, epoch, n=500):
    rng = np.random.default_rng(7)
    return plan_batches(rng.integers(0, 3, n), rng.integers(10, 2000, n), batch_size=8, seed=seed, epoch=epoch)


def test_plan_is_a_function_of_seed_and_epoch():
    same = [list(b) for b in plan(1, 2)]
    assert same == [list(b) for b in plan(1, 2)]
    assert same != [list(b) for b in plan(1, 3)]
    assert same != [list(b) for b in plan(2, 2)]


def test_grouping_by_length_saves_most_padding():
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(5.5, 0.9, 4000).astype(int) + 1
    codes = np.zeros(4000, dtype=int)
    grouped = padding_share(plan_batches(codes, lengths, batch_size=16, seed=0, epoch=0), lengths)
    order = rng.permutation(4000)
    random = padding_share([order[i : i + 16] for i in range(0, 4000, 16)], lengths)
    padded_to_4096 = 1 - lengths.sum() / (4096 * 4000)
    assert grouped < 0.15 < random < padded_to_4096


def test_batch_size_must_be_positive():
    with pytest.raises(ConfigError, match="batch_size is 0"):
        plan_batches(np.zeros(3, dtype=int), np.ones(3, dtype=int), batch_size=0, seed=0, epoch=0)
