"""Objects with large tensors from a worker process to the main process, as bytes over a socket.

An object is pickled with its tensors and arrays out of band, so that they are copied into the socket and out of it, and
nowhere else. It takes no file descriptor beyond the socket itself, of which processes may have few, and nothing in
/dev/shm, which containers keep small; when either side is killed the kernel frees what was on its way. An object that
both sides hold already (the store of an atlas, with all its rows) is named instead of copied.
"""

from __future__ import annotations

import io
import pickle
import socket
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_ALIGNMENT = 64
_HEADER = struct.Struct("<qq")
_PARTS_AT_ONCE = 512  # sendmsg takes 1,024 at most

Bytes = npt.NDArray[np.uint8]


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


def pack(value: object, shared: object) -> list[memoryview]:
    """`value` as bytes in several parts, its tensors in place. Raises what pickling raises."""
    stream = io.BytesIO()
    buffers: list[pickle.PickleBuffer] = []
    _Pickler(stream, buffers.append, shared).dump(value)
    parts = [memoryview(stream.getbuffer()), *(buffer.raw() for buffer in buffers)]
    sizes = [part.nbytes for part in parts]
    packed = [memoryview(struct.pack(f"<{len(sizes) + 1}q", len(sizes), *sizes))]
    at = packed[0].nbytes
    for part in parts:
        packed += [memoryview(bytes(-at % _ALIGNMENT)), part]
        at += -at % _ALIGNMENT + part.nbytes
    return packed


def unpack(data: Bytes, shared: object) -> Any:
    """The object of which `data` are the bytes; its tensors lie in them. `shared` takes the place of the other's."""
    view = data.data
    (count,) = struct.unpack_from("<q", view)
    at, parts = 8 * (count + 1), []
    for size in struct.unpack_from(f"<{count}q", view, 8):
        at += -at % _ALIGNMENT
        parts.append(view[at : at + size])
        at += size
    return _Unpickler(io.BytesIO(parts[0]), parts[1:], shared).load()


def send(connection: socket.socket, number: int, packed: list[memoryview]) -> None:
    """Send what `pack` made, under a number. Waits while nobody reads."""
    parts = [memoryview(_HEADER.pack(number, sum(part.nbytes for part in packed))), *packed]
    parts = [part for part in parts if part.nbytes]
    while parts:
        sent = connection.sendmsg(parts[:_PARTS_AT_ONCE])
        while parts and sent >= parts[0].nbytes:
            sent -= parts.pop(0).nbytes
        if sent:
            parts[0] = parts[0][sent:]


def receive_header(connection: socket.socket) -> tuple[int, int] | None:
    """The number and the size of what comes next; None when the other side is gone."""
    header = np.empty(_HEADER.size, np.uint8)
    if not receive(connection, header):
        return None
    number, size = _HEADER.unpack(header.data)
    return number, size


def receive(connection: socket.socket, data: Bytes) -> bool:
    """Fill `data` with what comes next; False when the other side is gone before it is full."""
    view = data.data
    while view.nbytes:
        try:
            count = connection.recv_into(view)
        except ConnectionResetError:
            return False
        if count == 0:
            return False
        view = view[count:]
    return True
