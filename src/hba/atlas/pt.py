"""Files of `torch.save` read and written without torch: plain tensors, alone or in a dict, as NumPy arrays.

What lies in such a file is a zip archive: a pickle that says names, types and shapes, and beside it the numbers. The
pickle is never run. Its opcodes are walked, those known here alone, and the three names in it that mean tensors are
compared as text; nothing is imported or called for a file. What only torch reads (the format before torch 1.6, sparse
or quantised tensors) is `NeedsTorchError`, everything else that is not plain is a ValueError.
"""

from __future__ import annotations

import io
import itertools
import math
import pickletools
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

Array = NDArray[Any]

REBUILD, PARAMETER, ATTRIBUTES = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "OrderedDict"
STORAGES = {
    **{"HalfStorage": "float16", "FloatStorage": "float32", "DoubleStorage": "float64", "BFloat16Storage": "bfloat16"},
    **{"ByteStorage": "uint8", "CharStorage": "int8", "ShortStorage": "int16", "IntStorage": "int32"},
    **{"LongStorage": "int64", "BoolStorage": "bool"},
}


MOST_DEEP = 64
"""containers in one another; a file of tensors has a few"""


class NeedsTorchError(ValueError):
    """A file that torch may read, and this module does not."""


class _Global(NamedTuple):
    name: str  # "module qualname"


class _Storage(NamedTuple):
    dtype: str
    key: str
    size: int


class _Mark:
    pass


def read_arrays(file: BinaryIO) -> Any:
    """What a file of `torch.save` holds, tensors as arrays of their shape; bfloat16 becomes float32, without loss.

    Views of one storage may overlap or repeat: check the size before copying. Raises NeedsTorchError, ValueError, or
    what zipfile raises for a damaged archive.
    """
    if not zipfile.is_zipfile(file):
        file.seek(0)
        if file.read(1) != b"\x80":
            raise ValueError("it is neither an archive nor a pickle")
        raise NeedsTorchError("is of the format before torch 1.6")
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        inside = next((name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")), None)
        if inside is None:
            raise ValueError("it holds no data.pkl")
        if f"{inside}byteorder" in names and archive.read(f"{inside}byteorder") != b"little":
            raise NeedsTorchError("was written on a big-endian machine")
        storages: dict[_Storage, Array] = {}

        def numbers(storage: _Storage) -> Array:
            if storage not in storages:
                raw = archive.read(f"{inside}data/{storage.key}")  # KeyError: no such storage
                storages[storage] = from_bytes(raw, storage.dtype)[: storage.size]
            return storages[storage]

        return _Walk(numbers).value(archive.read(f"{inside}data.pkl"))


def from_bytes(raw: bytes | bytearray, dtype: str) -> Array:
    """Little-endian numbers of the type that torch calls `dtype`, flat. Raises ValueError for a broken length."""
    if dtype == "bfloat16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, np.dtype(dtype).newbyteorder("<"))


@dataclass
class _Walk:
    """The value that a pickle of plain tensors describes, found by walking its opcodes."""

    numbers: Callable[[_Storage], Array]

    def value(self, pickled: bytes) -> Any:
        stack: list[Any] = []
        memo: dict[int, Any] = {}
        for opcode, read, _ in pickletools.genops(pickled):
            name, arg = opcode.name, cast("Any", read)
            if name in ("PROTO", "FRAME"):
                continue
            if name == "STOP":
                (found,) = stack
                _require_flat(found)
                return found
            if name in ("BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"):
                stack.append(arg)
            elif name in ("NONE", "NEWTRUE", "NEWFALSE"):
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "MARK"):
                stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "MARK": _Mark}[name]())
            elif name == "GLOBAL":
                stack.append(_Global(arg))
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[arg] = stack[-1]
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[arg])
            elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
                stack.append(tuple(_popped(stack, None if name == "TUPLE" else int(name[-1]))))
            elif name in ("APPEND", "APPENDS"):
                items = _popped(stack, 1 if name == "APPEND" else None)
                _of(stack[-1], list).extend(items)
            elif name in ("SETITEM", "SETITEMS"):
                items = _popped(stack, 2 if name == "SETITEM" else None)
                keys = (_of(key, str) for key in items[::2])  # the hash of a tuple would go as deep as it does
                _of(stack[-1], dict).update(zip(keys, items[1::2], strict=True))
            elif name == "BINPERSID":
                stack.append(_storage(stack.pop()))
            elif name == "REDUCE":
                made, args = _popped(stack, 2)
                stack.append(self._called(_of(made, _Global).name, _of(args, tuple)))
            else:
                raise ValueError(f"a pickle with {name}")
        raise ValueError("its pickle has no end")

    def _called(self, name: str, args: tuple[Any, ...]) -> Any:
        if name == f"collections {ATTRIBUTES}" and not args:
            return {}
        if name == REBUILD and len(args) >= 6:
            return _view(self.numbers(_of(args[0], _Storage)), *args[1:4])
        if name == PARAMETER and args:
            return _of(args[0], np.ndarray)
        kind = NeedsTorchError if name.startswith("torch") else ValueError
        raise kind(f"holds {name.replace(' ', '.')}")


def _popped(stack: list[Any], count: int | None) -> list[Any]:
    """The last `count` values of the stack, or those behind its last mark."""
    if count is None:
        at = next((place for place in range(len(stack) - 1, -1, -1) if isinstance(stack[place], _Mark)), None)
        if at is None:
            raise ValueError("its pickle lacks a mark")
        found = stack[at + 1 :]
        del stack[at:]
        return found
    found = stack[len(stack) - count :]
    if len(found) < count:
        raise ValueError("its pickle takes more than there is")
    del stack[len(stack) - count :]
    return found


def _require_flat(found: Any) -> None:
    """Raises ValueError for containers that lie in one another without end, or deeper than MOST_DEEP."""
    level = [found] if isinstance(found, dict | list | tuple) else []
    for _ in range(MOST_DEEP):
        inside = (each.values() if isinstance(each, dict) else each for each in level)
        within = itertools.chain.from_iterable(inside)
        level = list({id(each): each for each in within if isinstance(each, dict | list | tuple)}.values())
        if not level:
            return
    raise ValueError(f"its values lie deeper than {MOST_DEEP} in one another")


def _of(value: Any, kind: type[Any]) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"its pickle has {type(value).__name__} for {kind.__name__}")
    return value


def _storage(named: Any) -> _Storage:
    """The storage that a persistent id names: ('storage', class, key, device, count)."""
    _, kind, key, _, count = _of(named, tuple)
    module, _, name = _of(kind, _Global).name.partition(" ")
    if module != "torch" or name not in STORAGES:
        raise NeedsTorchError(f"holds {module}.{name}")
    return _Storage(STORAGES[name], _of(key, str), _of(count, int))


def _view(flat: Array, offset: Any, shape: Any, strides: Any) -> Array:
    """A tensor's view of its storage. Raises ValueError for one that reaches outside of it."""
    sizes, steps = _of(shape, tuple), _of(strides, tuple)
    if not all(type(each) is int and each >= 0 for each in (offset, *sizes, *steps)) or len(sizes) != len(steps):
        raise ValueError("its pickle describes no tensor")
    reached = offset + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True)) + 1
    if math.prod(sizes) and reached > len(flat):
        raise ValueError(f"a tensor of {len(flat)} numbers claims {reached}")
    if not math.prod(sizes):
        return np.empty(sizes, flat.dtype)
    start = flat[offset:]
    return as_strided(start, sizes, [step * flat.itemsize for step in steps], writeable=False)


def write_arrays(arrays: Mapping[str, Array]) -> bytes:
    """A file as `torch.save` writes it of a dict of tensors of one type, which share one storage: that keeps it small.

    The same arrays give the same bytes, whatever torch is installed, if any. Raises ValueError for another type.
    """
    flat = np.concatenate([array.reshape(-1) for array in arrays.values()])
    kind = next((name for name, dtype in STORAGES.items() if dtype == flat.dtype.name), None)
    if kind is None:
        raise ValueError(f"torch has no storage of {flat.dtype}")
    storage = b"(" + _text("storage") + _named(f"torch {kind}") + _text("0") + _text("cpu") + _number(flat.size) + b"tQ"
    body, start = b"", 0
    for name, array in arrays.items():
        strides = [math.prod(array.shape[place + 1 :]) for place in range(array.ndim)]
        view = storage + _number(start) + _tuple(array.shape) + _tuple(strides) + b"\x89"
        body += _text(name) + _named(REBUILD) + b"(" + view + _named(f"collections {ATTRIBUTES}") + b")RtR"
        start += array.size
    parts = {
        "data.pkl": b"\x80\x02}(" + body + b"u.",
        "byteorder": sys.byteorder.encode(),
        "data/0": flat.tobytes(),
        "version": b"3\n",
    }
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in parts.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data)
    return target.getvalue()


def _named(name: str) -> bytes:
    return b"c" + "\n".join(name.split(" ")).encode() + b"\n"


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def _number(number: int) -> bytes:
    return b"J" + struct.pack("<i", number)


def _tuple(numbers: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(_number, numbers)) + b"t"
