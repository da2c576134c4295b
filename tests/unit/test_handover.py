"""What a worker hands over arrives as it was: every type, shape and layout of tensor, and shared objects by name."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hba.atlas.handover import pack, unpack

TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


def passed(value, ours=None, theirs=None):
    descriptor = pack(value, ours)
    try:
        return unpack(descriptor, theirs)
    finally:
        os.close(descriptor)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), max_size=4),
    dtype=st.sampled_from(TYPES),
    transposed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_tensors_arrive_equal(shape, dtype, transposed, seed):
    tensor = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 100).to(dtype)
    tensor = tensor.transpose(0, -1) if transposed and shape else tensor
    (arrived,) = passed([tensor])
    assert arrived.dtype == dtype and arrived.shape == tensor.shape and torch.equal(arrived, tensor)


def test_tensors_can_be_written_and_do_not_overlap():
    one, two = passed((torch.zeros(3), torch.zeros(5, dtype=torch.bool)))
    one += 1
    assert one.tolist() == [1, 1, 1] and not two.any()


def test_other_values_arrive_equal():
    value = {"text": "ü", "array": np.arange(6.0).reshape(2, 3), "nothing": None, "nested": ((1,), [b"x"])}
    arrived = passed(value)
    assert np.array_equal(arrived.pop("array"), value.pop("array")) and arrived == value


def test_a_shared_object_is_named_not_copied():
    ours, theirs = {"rows": bytes(1 << 20)}, {"rows": "of the main process"}
    descriptor = pack([ours, {"again": ours}], ours)
    assert os.fstat(descriptor).st_size < 1000
    arrived = unpack(descriptor, theirs)
    os.close(descriptor)
    assert arrived[0] is theirs and arrived[1]["again"] is theirs


def test_what_cannot_be_pickled_is_an_error_and_leaks_no_descriptor():
    before = set(Path("/proc/self/fd").iterdir())
    with pytest.raises((AttributeError, TypeError)):
        pack({"tensor": torch.zeros(3), "function": lambda: 0}, None)
    assert set(Path("/proc/self/fd").iterdir()) == before
