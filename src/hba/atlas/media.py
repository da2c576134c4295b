"""Bytes to arrays: the one place where media of a sample are decoded.

Sound is 16 kHz mono float32 (`audio`), clips are N exact frames (`video`), images are RGB, descriptors are tensors that
were loaded without unpickling code, or arrays where torch is not installed (`pt`). Content decides how a source is
read, never its name. A source is served whole or refused with a MediaError that names the place; nothing is ever
replaced by silence, black frames or zeros.
"""

from __future__ import annotations

import math
import pickle
import struct
import warnings
import zipfile
import zlib
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt

from hba.atlas.audio import SAMPLE_RATE, Audio, load_audio
from hba.atlas.source import DEFAULT_LIMITS, RESTORE, Frames, Limits, Source, check_source, head, opened, read_bytes
from hba.atlas.video import Video, load_video
from hba.environment import install_fix, is_installed
from hba.errors import InputError, MediaError
from hba.storage import machine_fault

if TYPE_CHECKING:
    from torch import Tensor

Image: TypeAlias = npt.NDArray[np.uint8]
Descriptor: TypeAlias = "Tensor | dict[str, Tensor]"

_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_NUMBERS = ("float16", "bfloat16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64")
_SAFETENSORS = {
    **{"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "BOOL": "bool"},
    **{"U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"},
}
_DAMAGED_IMAGE = (OSError, SyntaxError, ValueError, EOFError, OverflowError, struct.error, zlib.error, IndexError)
_BOUNDED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_DAMAGED_ZIP = (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, struct.error, NotImplementedError)
_DAMAGED_TENSOR = (
    pickle.UnpicklingError,
    *(RuntimeError, OSError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error),
    *(OverflowError, AssertionError, NotImplementedError, zipfile.BadZipFile, zlib.error),
)

__all__ = [
    "DEFAULT_LIMITS",
    "SAMPLE_RATE",
    "Audio",
    "Descriptor",
    "Frames",
    "Image",
    "Limits",
    "Source",
    "Video",
    "load_audio",
    "load_bytes",
    "load_descriptor",
    "load_image",
    "load_video",
]


def load_bytes(source: Source, *, where: str, limits: Limits = DEFAULT_LIMITS) -> bytes:
    """The source as it is stored. Raises MediaError when it is empty, cannot be read or exceeds `limits`."""
    check_source(source, where=where, limits=limits)
    try:
        return read_bytes(source, where=where)
    except OSError as error:
        raise MediaError(f"cannot be read ({error.strerror})", where=where, fix=RESTORE) from None


def load_image(source: Source, *, where: str, limits: Limits = DEFAULT_LIMITS) -> Image:
    """Decode an image to uint8 [H, W, 3] RGB, turned upright as its EXIF says; transparency is dropped.

    Raises MediaError naming `where` when the source is empty, cut off, corrupt, of an unknown or a 16-bit format, or
    exceeds `limits`.
    """
    import PIL.Image
    import PIL.ImageOps

    check_source(source, where=where, limits=limits)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            with opened(source, where=where) as file, PIL.Image.open(file, formats=_IMAGE_FORMATS) as image:
                form = image.format
                image.verify()  # the checksums of a PNG, which decoding ignores
            with opened(source, where=where) as file, PIL.Image.open(file, formats=_IMAGE_FORMATS) as image:
                pixels = image.width * image.height
                if pixels <= limits.max_pixels and image.mode not in ("I", "F", "I;16", "I;16B", "I;16L"):
                    if form == "JPEG":
                        _check_jpeg(source, where, limits)
                    return np.array(PIL.ImageOps.exif_transpose(image).convert("RGB"))
                mode = image.mode
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise MediaError(f"is too large ({error})", where=where, fix="Scale it down.") from None
    except PIL.UnidentifiedImageError:
        known = ", ".join(_IMAGE_FORMATS)
        raise MediaError(f"is not an image of a known format ({known})", where=where, fix=RESTORE) from None
    except _DAMAGED_IMAGE as error:
        raise MediaError(f"cannot be decoded ({error}): cut off or corrupt", where=where, fix=RESTORE) from None
    if pixels > limits.max_pixels:
        what = f"has {pixels:,} pixels, more than the limit of {limits.max_pixels:,}"
        raise MediaError(what, where=where, fix="Scale it down, or raise Limits.max_pixels.")
    raise MediaError(f"has 16 or 32 bits a channel (mode {mode})", where=where, fix="Convert it to 8 bits.")


def _check_jpeg(source: Source, where: str, limits: Limits) -> None:
    """Refuse a JPEG whose coded data are damaged or too few: libjpeg fills the rest with grey and tells nobody."""
    import av
    import av.error

    try:
        decoder = av.CodecContext.create("mjpeg", "r")
        decoder.options = {"err_detect": "explode", "max_pixels": str(limits.max_pixels)}
        for packet in (av.Packet(read_bytes(source, where=where)), None):
            decoder.decode(packet)
    except av.error.InvalidDataError:
        raise MediaError("cannot be decoded: cut off or corrupt", where=where, fix=RESTORE) from None
    except (av.error.PatchWelcomeError, NotImplementedError):
        return  # a rare kind of JPEG that only libjpeg reads


def load_descriptor(source: Source, *, where: str, limits: Limits = DEFAULT_LIMITS) -> Descriptor:
    """Load a `.pt` or safetensors file: a tensor, or a dict of tensors, on the CPU.

    Where torch is not installed, tensors are NumPy arrays of the same shapes and values (bfloat16 as float32), and a
    file that only torch reads is an InputError that says what to install. Raises MediaError naming `where` when it
    is empty or damaged, holds anything but tensors (it is never unpickled as code), holds NaN or infinity, or exceeds
    `limits`.
    """
    size = check_source(source, where=where, limits=limits)
    start = head(source, 9, where=where)
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") < size:  # no .pt of any release begins like this
        return _load_safetensors(source, where, limits)
    _check_archive(source, where, limits)
    with_torch = is_installed("torch")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about deprecated storage classes of old files
            with opened(source, where=where) as file:
                value = _torch_load(file) if with_torch else _load_without_torch(file, where)
    except _DAMAGED_TENSOR as error:
        fault = machine_fault(error, where)
        if fault is not None:
            raise fault from None
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        what = f"is not a plain file of tensors, or is damaged ({reason})"
        raise MediaError(what, where=where, fix="Save tensors alone with torch.save.") from None
    checked = _checked if with_torch else _checked_array
    if not isinstance(value, dict) and hasattr(type(value), "shape"):  # the value's own raises for nested tensors
        return checked(value, "", where, limits)
    if isinstance(value, dict) and value and all(isinstance(k, str) for k in value):
        return {name: checked(tensor, f" {name!r}", where, limits) for name, tensor in value.items()}
    what = f"expected a tensor or a dict of tensors, found {type(value).__name__}"
    raise MediaError(what, where=where, fix="Save a tensor, or a dict of names to tensors.")


def _torch_load(file: BinaryIO) -> Any:
    import torch

    return torch.load(file, map_location="cpu", weights_only=True)


def _load_without_torch(file: BinaryIO, where: str) -> Any:
    """As `_torch_load`, arrays for tensors. Raises InputError for what torch alone reads."""
    from hba.atlas.pt import NeedsTorchError, read_arrays

    try:
        return read_arrays(file)
    except NeedsTorchError as error:
        raise InputError(f"{error}, which torch alone reads", where=where, fix=f"{install_fix('train')}.") from None


def _load_safetensors(source: Source, where: str, limits: Limits) -> Descriptor:
    import safetensors

    with_torch = is_installed("torch")
    try:
        data = read_bytes(source, where=where)
        if with_torch:
            import safetensors.torch

            value: dict[str, Any] = safetensors.torch.load(data)
        else:
            from hba.atlas.pt import from_bytes

            stored: Any = safetensors
            value = {
                name: from_bytes(each["data"], _SAFETENSORS[each["dtype"]]).reshape(each["shape"])
                for name, each in stored.deserialize(data)
            }
    except (
        safetensors.SafetensorError,
        OSError,
        ValueError,
        KeyError,
        RuntimeError,
        TypeError,
        AttributeError,
    ) as error:
        fault = machine_fault(error, where)
        if fault is not None:
            raise fault from None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise MediaError(f"is not whole safetensors ({reason})", where=where, fix=RESTORE) from None
    if not value:
        raise MediaError("holds no tensors", where=where, fix=RESTORE)
    checked = _checked if with_torch else _checked_array
    return {name: checked(tensor, f" {name!r}", where, limits) for name, tensor in value.items()}


def _check_archive(source: Source, where: str, limits: Limits) -> None:
    """Refuse an archive that would unpack to more than the limit."""
    try:
        with opened(source, where=where) as file:
            if not zipfile.is_zipfile(file):
                return  # the format before torch 1.6 is not packed
            with zipfile.ZipFile(file) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
                # What one read of the others unpacks to has no bound; torch stores, and a zip program deflates.
                if any(each.compress_type not in _BOUNDED for each in archive.infolist()):
                    raise NotImplementedError("packed in another way than by DEFLATE")
                # torch does not check the checksums that it writes.
                damaged = archive.testzip() if unpacked <= limits.max_descriptor_bytes else None
    except (*_DAMAGED_ZIP, RuntimeError) as error:  # RuntimeError: claims to be encrypted
        raise MediaError(f"is damaged ({error})", where=where, fix=RESTORE) from None
    if damaged is not None:
        raise MediaError(f"is damaged (checksum of {damaged})", where=where, fix=RESTORE)
    if unpacked > limits.max_descriptor_bytes:
        what = f"unpacks to {unpacked:,} bytes, more than the limit of {limits.max_descriptor_bytes:,}"
        raise MediaError(what, where=where, fix="Store fewer frames, or raise Limits.max_descriptor_bytes.")


def _checked(tensor: object, name: str, where: str, limits: Limits) -> Tensor:
    import torch

    if not isinstance(tensor, torch.Tensor):
        what = f"entry{name}: expected a dense tensor, found {type(tensor).__name__}"
        raise MediaError(what, where=where, fix="Save dense tensors alone.")
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        kind = "quantised" if tensor.is_quantized else "nested" if tensor.is_nested else str(tensor.layout)
        what = f"tensor{name}: expected a dense tensor, found a {kind.removeprefix('torch.')} one"
        raise MediaError(what, where=where, fix="Save dense tensors alone.")
    dtype = str(tensor.dtype).removeprefix("torch.")
    cpu = tensor.device.type == "cpu"
    _require_numbers(list(tensor.shape) if cpu else [0], dtype, tensor.element_size(), name, where, limits)
    if not bool(torch.isfinite(tensor).all()):
        raise MediaError(f"tensor{name} holds NaN or infinite values", where=where, fix="Extract the descriptor again.")
    return tensor.detach()


def _checked_array(array: object, name: str, where: str, limits: Limits) -> Any:
    """As `_checked`, where torch is not installed: an array of its own, in place of a view of its file."""
    if not isinstance(array, np.ndarray):
        what = f"entry{name}: expected a dense tensor, found {type(array).__name__}"
        raise MediaError(what, where=where, fix="Save dense tensors alone.")
    _require_numbers(list(array.shape), array.dtype.name, array.itemsize, name, where, limits)
    if not np.isfinite(array).all():
        raise MediaError(f"tensor{name} holds NaN or infinite values", where=where, fix="Extract the descriptor again.")
    return array.copy()


def _require_numbers(shape: list[int], dtype: str, item_bytes: int, name: str, where: str, limits: Limits) -> None:
    """Raises MediaError for an empty tensor, one of no numbers, or one of too many."""
    # Not float8, complex or bool, with which torch cannot count, or which are no features.
    if dtype not in _NUMBERS:
        what = f"tensor{name} holds values of type torch.{dtype}"
        raise MediaError(what, where=where, fix="Save it as float32: tensor.float().")
    if math.prod(shape) == 0:
        raise MediaError(f"tensor{name} is empty, shape {shape}", where=where, fix=RESTORE)
    # Strides of zero let a file of a few bytes claim any shape.
    if math.prod(shape) * item_bytes > limits.max_descriptor_bytes:
        what = f"tensor{name} claims shape {shape}, more than {limits.max_descriptor_bytes:,} bytes"
        raise MediaError(what, where=where, fix="Store fewer frames, or raise Limits.max_descriptor_bytes.")
