"""Objects with large tensors from a worker process to the main process.

An object is pickled with its tensors and arrays out of band into an anonymous file in memory, whose descriptor goes
over a Unix socket. The message itself is a few bytes, so that a worker never waits for a reader; nothing lies in
/dev/shm, which containers keep small; and when either side is killed the kernel frees the memory. An object that both
sides hold already (the store of an atlas, with all its rows) is named instead of copied.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 64


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, buffers: Callable[[pickle.PickleBuffer], None], shared: object) -> None:
        super().__init__(file, protocol=5, buffer_callback=buffers)
        self._shared = shared

    def persistent_id(self, obj: object) -> str | None:
        return "shared" if obj is self._shared else None

    def reducer_override(self, obj: object) -> Any:
        # By default a tensor is copied three times into the pickle, through a file format.
        if type(obj) is Tensor and obj.layout is torch.strided and obj.device.type == "cpu" and not obj.is_quantized:
            flat = obj.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
            return _tensor, (pickle.PickleBuffer(flat), obj.dtype, tuple(obj.shape))
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, buffers: list[memoryview], shared: object) -> None:
        super().__init__(file, buffers=buffers)
        self._shared = shared

    def persistent_load(self, pid: str) -> object:
        return self._shared


def _tensor(buffer: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if memoryview(buffer).nbytes == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=torch.uint8).view(dtype).reshape(shape)


def pack(value: object, shared: object) -> int:
    """Write `value` into an anonymous file; returns its descriptor, which the caller closes.

    Raises what pickling raises for a value that cannot be pickled, OSError when memory is short.
    """
    stream = io.BytesIO()
    buffers: list[pickle.PickleBuffer] = []
    _Pickler(stream, buffers.append, shared).dump(value)
    parts = [memoryview(stream.getbuffer()), *(buffer.raw() for buffer in buffers)]
    sizes = [part.nbytes for part in parts]
    descriptor = os.memfd_create("hba")
    with open(descriptor, "wb", closefd=False) as file:
        file.write(struct.pack(f"<{len(sizes) + 1}q", len(sizes), *sizes))
        for part in parts:
            file.write(bytes(-file.tell() % _ALIGNMENT))
            file.write(part)
    return descriptor


def unpack(descriptor: int, shared: object) -> Any:
    """The object that `pack` wrote; its tensors share one block of memory. `shared` takes the place of the other's."""
    data = np.empty(os.fstat(descriptor).st_size, np.uint8)
    view, at = data.data, 0
    while at < len(view):
        at += os.preadv(descriptor, [view[at:]], at)
    (count,) = struct.unpack_from("<q", view)
    at, parts = 8 * (count + 1), []
    for size in struct.unpack_from(f"<{count}q", view, 8):
        at += -at % _ALIGNMENT
        parts.append(view[at : at + size])
        at += size
    return _Unpickler(io.BytesIO(parts[0]), parts[1:], shared).load()
