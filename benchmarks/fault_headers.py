"""Headers that claim the absurd, format by format, and pickles that run code (used by fault_media.py).

Every patch takes the bytes of an intact medium and changes one claim: rates of zero, millions of channels, frames of
65535x65535, durations of thirty years, chunks larger than the file. Where a checksum guards the header it is set right,
so that the claim, not the checksum, is what a reader meets.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import torch

Patch = Callable[[bytes], bytes]
MARKER = Path(tempfile.gettempdir(), f"fault-campaign-{os.getpid()}-executed")  # the folder that run code makes


def _at(offset: int, form: str, value: float) -> Patch:
    """Write a number at a place counted from the start."""
    return lambda data: data[:offset] + struct.pack(form, value) + data[offset + struct.calcsize(form) :]


def _after(sign: bytes, offset: int, form: str, value: float) -> Patch:
    """Write a number at a place counted from an occurrence of a sign: the last, as mp4 has its header at the end."""

    def patch(data: bytes) -> bytes:
        place = data.find(sign) if data.startswith(b"\x1a\x45\xdf\xa3") else data.rfind(sign)
        if place < 0:
            raise ValueError(f"the medium holds no {sign!r}")
        return _at(place + offset, form, value)(data)

    return patch


def _then(*patches: Patch) -> Patch:
    def patch(data: bytes) -> bytes:
        for each in patches:
            data = each(data)
        return data

    return patch


def _ogg(change: Patch) -> Patch:
    """Change the first page and set its checksum right."""

    def patch(data: bytes) -> bytes:
        end = data.index(b"OggS", 4)
        page = bytearray(change(data[:end]))
        page[22:26] = bytes(4)
        crc = 0
        for byte in page:
            crc ^= byte << 24
            for _ in range(8):
                crc = (crc << 1 ^ 0x04C11DB7) & 0xFFFFFFFF if crc & 0x80000000 else crc << 1
        page[22:26] = struct.pack("<I", crc)
        return bytes(page) + data[end:]

    return patch


def _png(width: int, height: int, depth: int = 8) -> Patch:
    def patch(data: bytes) -> bytes:
        head = b"IHDR" + struct.pack(">IIB", width, height, depth) + data[25:29]
        return data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:]

    return patch


def _flac(shift: int, width: int, value: int) -> Patch:
    """Set a bit field of the stream information; `shift` counts from the end of its 64 bits of numbers."""

    def patch(data: bytes) -> bytes:
        (bits,) = struct.unpack_from(">Q", data, 18)
        bits = bits & ~(((1 << width) - 1) << shift) | value << shift
        return _at(18, ">Q", bits)(data)

    return patch


def _pickled(old: bytes, new: bytes) -> Patch:
    """Replace bytes in the pickle of a `.pt` archive."""

    def patch(data: bytes) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w") as target:
            for name in source.namelist():
                content = source.read(name)
                target.writestr(name, content.replace(old, new) if name.endswith("data.pkl") else content)
        return out.getvalue()

    return patch


def _tensor_without_storage(shape: tuple[int, ...]) -> Patch:
    def patch(_: bytes) -> bytes:
        file = io.BytesIO()
        torch.save({"pose": torch.zeros(1).expand(shape)}, file)
        return file.getvalue()

    return patch


_HUGE = 0x7FFFFFFF
_MP4 = [
    _after(b"mvhd", 20, ">I", 0xFFFFFFF0),
    _after(b"mdhd", 20, ">I", 0xFFFFFFF0),
    _then(_after(b"mvhd", 16, ">I", 1), _after(b"mvhd", 20, ">I", 1_000_000_000)),
    _after(b"mdhd", 16, ">I", 0),
    _after(b"stsz", 12, ">I", _HUGE),
    _after(b"stts", 12, ">I", _HUGE),
    _after(b"stts", 16, ">I", _HUGE),
    _after(b"stsc", 12, ">I", _HUGE),
    _after(b"stco", 12, ">I", 0xFFFFFFF0),
    _after(b"moov", -4, ">I", 0xFFFFFFF0),
    _after(b"mdat", -4, ">I", 0xFFFFFFF0),
    _after(b"stsz", -4, ">I", 0),
]
RETIMED = _after(b"\x2a\xd7\xb1\x83", 4, ">H", 0xFFFF)  # time stamps in units of 16 seconds: no reader can tell
_MATROSKA = [
    _after(b"\x44\x89\x88", 3, ">d", 1e12),
    _after(b"\x44\x89\x88", 3, ">d", float("nan")),
    _after(b"\x44\x89\x88", 3, ">d", -1.0),
    RETIMED,
    _after(b"\x1f\x43\xb6\x75", 4, ">Q", 0x01FFFFFFFFFFFFF0),
    _after(b"\x16\x54\xae\x6b", 4, ">Q", 0x010FFFFFFFFFFFF0),
]
_FRAME = [_then(_after(b"\xb0\x82", 2, ">H", 0xFFFF), _after(b"\xba\x81", 2, ">B", 0xFF))]

PATCHES: dict[str, list[Patch]] = {
    "wav": [
        _at(24, "<I", 0),
        _at(24, "<I", 1 << 31),
        _at(22, "<H", 65535),
        _at(22, "<H", 0),
        _after(b"data", 4, "<I", 0x7FFFFFF0),
        _at(16, "<I", 0xFFFFFFF0),
        _at(34, "<H", 0),
        _at(32, "<H", 0),
    ],
    "flac": [
        _flac(44, 20, 0),
        _flac(0, 36, (1 << 36) - 1),
        _flac(41, 3, 7),
        _flac(44, 20, (1 << 20) - 1),
        _flac(36, 5, 0),
        _at(8, ">H", 1),
    ],
    "mp3": [
        lambda data: b"ID3\x04\x00\x00\x7f\x7f\x7f\x7f" + data,
        lambda data: _at(data.index(b"\xff", 0) + 2, "B", 0xFC)(data),
        lambda data: _at(max(data.find(b"Xing"), data.find(b"Info")) + 8, ">I", _HUGE)(data),
        lambda data: _at(max(data.find(b"Xing"), data.find(b"Info")) + 8, ">I", 1)(data),
    ],
    "ogg": [
        _ogg(_after(b"\x01vorbis", 12, "<I", 0)),
        _ogg(_after(b"\x01vorbis", 12, "<I", 1 << 31)),
        _ogg(_after(b"\x01vorbis", 11, "B", 255)),
        _ogg(_after(b"\x01vorbis", 28, "B", 0xFF)),
    ],
    "m4a": [
        *_MP4[:9],
        _after(b"mp4a", 20, ">H", 65535),
        _after(b"mp4a", 28, ">I", 0),
    ],
    "opus": [
        _MATROSKA[0],
        _after(b"\xb5\x88", 2, ">d", 0.0),
        _after(b"OpusHead", 9, "B", 255),
        _MATROSKA[4],
        _after(b"\x9f\x81", 2, "B", 255),
        _after(b"\xb5\x88", 2, ">d", 2.0**31),
    ],
    "mp4": [_then(_after(b"avc1", 28, ">H", 65535), _after(b"avc1", 30, ">H", 65535)), *_MP4],
    "mkv": [*_FRAME, *_MATROSKA],
    "vp8": [
        _after(b"\x9d\x01\x2a", 3, "<I", 0x3FFF3FFF),
        lambda data: _at(data.index(b"\x9d\x01\x2a") + 3, "<I", 0x3FFF3FFF)(data),
        *_FRAME,
        *_MATROSKA,
    ],
    "vp9": [*_FRAME, *_MATROSKA],
    "png": [
        _png(65535, 65535),
        _png(_HUGE, _HUGE),
        _png(0, 0),
        _png(272, 144, 255),
        _after(b"IDAT", -4, ">I", _HUGE),
        _png(5000, 5000),
    ],
    "jpg": [
        _after(b"\xff\xc0", 5, ">I", 0xFFFFFFFF),
        _after(b"\xff\xc0", 5, ">I", 0x13881388),
        _after(b"\xff\xc0", 5, ">I", 0),
        _after(b"\xff\xc0", 9, "B", 255),
        _after(b"\xff\xda", 2, ">H", 0xFFFF),
    ],
    "pt": [
        _tensor_without_storage((10**6, 10**6)),
        _pickled(b"K\x07K\x03", b"J\xff\xff\xff\x7fK\x03"),
        _after(b"PK\x01\x02", 24, "<I", 0xFFFFFFF0),
        _pickled(b"M\xe8\x03", b"J\xff\xff\xff\x7f"),
    ],
    "safetensors": [
        _at(0, "<Q", 1 << 62),
        _at(0, "<Q", 9),
        lambda data: data.replace(b"[40,25]", b"[99,99]"),
        lambda data: data.replace(b"[40,25]", b"[-1,25]"),
        lambda data: data.replace(b'"F32"', b'"F64"', 1),
        lambda data: data.replace(b"[0,4000]", b"[9,4000]"),
    ],
}


class _Exploit:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(MARKER),)


class _Evaluated:
    def __reduce__(self) -> tuple[object, ...]:
        return eval, (f"__import__('os').mkdir({str(MARKER)!r})",)


def code_pickles() -> list[bytes]:
    """Files that run code in a careless reader."""
    found = []
    for payload in (_Exploit(), _Evaluated()):
        value = {"pose": torch.zeros(3), "x": payload}
        for zipped in (True, False):
            file = io.BytesIO()
            torch.save(value, file, _use_new_zipfile_serialization=zipped)
            found.append(file.getvalue())
        found.append(pickle.dumps(value))
    return found
