"""What a worker hands over arrives as it was: every type, shape and layout of tensor, and shared objects by name."""

import gc
import pickle
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hba.batch.loader import pack, receive, receive_header, send, unpack

TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


def passed(value, ours=None, theirs=None):
    """`value` as it comes out at the other end of a socket."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with one, other, ThreadPoolExecutor(1) as pool:
        sent = pool.submit(send, one, 7, pack(value, ours))
        number, size = receive_header(other)
        data = np.empty(size, np.uint8)
        assert number == 7 and receive(other, data)
        sent.result()
        one.close()
        assert receive_header(other) is None
    return unpack(data, theirs)


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
    assert sum(part.nbytes for part in pack([ours, {"again": ours}], ours)) < 1000
    arrived = passed([ours, {"again": ours}], ours, theirs)
    assert arrived[0] is theirs and arrived[1]["again"] is theirs


def test_many_tensors_and_large_ones_arrive_equal():
    value = [torch.full((k % 3,), k) for k in range(3000)] + [torch.rand(1 << 20)]
    assert all(map(torch.equal, passed(value), value))


def test_an_answer_that_is_torn_off_is_none():
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with other:
        packed = pack(torch.zeros(100), None)
        whole = sum(part.nbytes for part in packed)
        one.sendall(b"".join([(7).to_bytes(8, "little"), whole.to_bytes(8, "little"), *packed])[:-1])
        one.close()
        assert receive_header(other) == (7, whole)
        assert not receive(other, np.empty(whole, np.uint8))


def test_what_cannot_be_pickled_is_an_error_and_leaks_no_descriptor():
    gc.collect()  # what others left
    before = set(Path("/proc/self/fd").iterdir())
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):  # the last one since Python 3.14
        pack({"tensor": torch.zeros(3), "function": lambda: 0}, None)
    assert set(Path("/proc/self/fd").iterdir()) <= before
