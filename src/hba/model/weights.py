"""The weights of a model on disk: safetensors files, known by their headers and read tensor by tensor.

`Weights.of` finds the files of a folder or of a model of the hub; `fit` compares what they hold with what a class of
transformers expects, before anything is built: a weight that is missing would be drawn at random, one that the class
does not know is a sign of another model, and transformers only warns of both. `write_weights` writes files piece by
piece, so that a model is never in memory whole. Files are read, not mapped: one that is cut off meanwhile is an error
here, where a mapped one would end the process. Nothing is unpickled.
"""

from __future__ import annotations

import json
import logging
import math
import re
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hba.errors import InputError
from hba.model.config import Quantization
from hba.storage import plural, read_json, write_json

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Parts of a published Qwen-Omni that its thinker does without: they speak.
LEFTOVERS = re.compile(r"(talker|token2wav|code2wav)\.")
BLOCK_BYTES = 16 << 20
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FLOATS = ("F", "BF")
_COEFFICIENTS = 16  # a linear layer with fewer inputs or outputs
_SHOWN = 5
_DOWNLOAD = "Download or copy the model again."
# PEFT imports bitsandbytes where it is installed, which warns of a kernel of the hub that it does without.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def silence_transformers() -> None:
    """To be called before classes of models are imported: nothing is to stand before what a command says in JSON.

    Python 3.13 strips the indentation of docstrings. transformers then misses what some of its classes tell of
    arguments, and prints that to stdout.
    """
    from transformers.utils import auto_docstring

    vars(sys.modules[auto_docstring.__module__])["print"] = lambda *_: None


class Stored(NamedTuple):
    """Where a tensor lies: `size` bytes of `file` from byte `start` on. `dtype` is the name that safetensors has."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class Weights:
    """The tensors of a model by the names in its files. `place` is what the model was asked for by."""

    place: str
    files: tuple[Path, ...]
    stored: Mapping[str, Stored]

    @classmethod
    def of(cls, name: str | Path) -> Weights:
        """Those of a folder, or of a model of the hub, downloaded first.

        Raises InputError when a file is missing or cut off, and when there are none in safetensors.
        """
        files = _files(Path(name)) if Path(name).is_dir() else _downloaded(str(name))
        return cls.in_files(str(name), files)

    @classmethod
    def in_files(cls, place: str, files: Sequence[Path]) -> Weights:
        """Those of these files. Raises InputError for one that is damaged."""
        return cls(place, tuple(files), {key: value for file in files for key, value in read_header(file).items()})

    def blocks(self, name: str, block_bytes: int = BLOCK_BYTES) -> Iterator[Tensor]:
        """The values of a tensor in a row, in flat pieces of at most `block_bytes`, copied from the file.

        Raises InputError when the file has become shorter, or holds numbers of a kind that is not known.
        """
        stored, dtype = self.stored[name], self.piece(name).dtype
        step = max(1, block_bytes // dtype.itemsize) * dtype.itemsize
        with stored.file.open("rb", buffering=0) as handle:
            handle.seek(stored.start)
            for start in range(0, stored.size, step):
                raw = torch.empty(min(step, stored.size - start), dtype=torch.uint8)
                _fill(handle, raw, stored.file)
                yield raw.view(dtype)

    @property
    def precision(self) -> torch.dtype | None:
        """The floating-point precision that all tensors have, None where they have several."""
        kinds = {DTYPES[each.dtype] for each in self.stored.values() if each.dtype in DTYPES}
        floats = {kind for kind in kinds if kind.is_floating_point}
        return floats.pop() if len(floats) == 1 else None

    def piece(self, name: str) -> Piece:
        """A tensor to be written elsewhere, block by block. Raises InputError for numbers of an unknown kind."""
        stored = self.stored[name]
        if stored.dtype not in DTYPES:
            fix = "Give the model in float32, bfloat16 or float16."
            raise InputError(f"{name} is {stored.dtype}, which is not read here", where=str(stored.file), fix=fix)
        return Piece(name, DTYPES[stored.dtype], stored.shape, lambda: self.blocks(name))

    def read(self, name: str) -> Tensor:
        """A tensor, copied from its file."""
        stored = self.stored[name]
        flat = next(self.blocks(name, max(stored.size, 1)), None)
        return torch.zeros(stored.shape, dtype=DTYPES[stored.dtype]) if flat is None else flat.reshape(stored.shape)


@dataclass(frozen=True)
class Fit:
    """Which stored tensor is which of a class. `sources` gives each name of the class those in the files."""

    weights: Weights
    sources: Mapping[str, tuple[str, ...]]
    tied: Mapping[str, str]  # of the class: the parameter that another one is

    @property
    def own_names(self) -> dict[str, str]:
        """The name of the class that each stored tensor is read for."""
        return {source: own for own, sources in self.sources.items() for source in sources}

    def read(self, own: str) -> Tensor:
        """The parameter `own`, or the one that it is tied to where the files hold it once."""
        return self.weights.read(self.sources.get(own, self.sources.get(self.tied.get(own, own), ()))[0])


def read_header(file: Path) -> dict[str, Stored]:
    """What a safetensors file holds. Raises InputError when it is missing, cut off or none."""
    try:
        with safe_open(file, framework="pt"), file.open("rb") as handle:  # type: ignore[no-untyped-call]
            (length,) = struct.unpack("<Q", handle.read(8))
            header: dict[str, Any] = json.loads(handle.read(length))
    except (OSError, SafetensorError) as error:
        what = f"damaged weights ({str(error).splitlines()[0]})"
        raise InputError(what, where=str(file), fix=_DOWNLOAD) from error
    found = {}
    for name, about in header.items():
        if name != "__metadata__":
            start, stop = about["data_offsets"]
            found[name] = Stored(file, about["dtype"], tuple(about["shape"]), 8 + length + start, stop - start)
    return found


def read_tensors(file: Path, what: str, fix: str) -> dict[str, Tensor]:
    """All tensors of a small file; `what` it should hold stands in errors. Raises InputError when it is damaged."""
    weights = open_tensors(file, what, fix)
    return {name: weights.read(name) for name in weights.stored}


def open_tensors(file: Path, what: str, fix: str) -> Weights:
    """The tensors of one file, all of floating-point numbers. Raises InputError as `read_tensors` does."""
    try:
        weights = Weights.in_files(str(file), [file])
    except InputError as error:
        raise InputError(f"cannot load {what}: {error.what}", where=str(file), fix=fix) from error
    odd = [f"{name} is {each.dtype}" for name, each in weights.stored.items() if not each.dtype.startswith(_FLOATS)]
    if odd:
        raise InputError(f"cannot load {what}: no floating-point numbers: {some(odd)}", where=str(file), fix=fix)
    return weights


def skeleton(model_class: Any, config: Any) -> Any:
    """A model of transformers without any weights (on the device `meta`), in float32: names and shapes alone.

    Raises InputError where it needs a package that is not there.
    """
    from transformers.utils.generic import ContextManagers

    config = deepcopy(config)
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        if part is not None:
            part.dtype = torch.float32
    try:
        with ContextManagers(model_class.get_init_context(torch.float32, False, False, None)):
            return model_class(config)
    except ImportError as error:
        raise lacks_package(model_class.__name__, error) from error


def lacks_package(name: str, error: ImportError) -> InputError:
    """The error for a model of which transformers wants a package that is not there (Gemma 3n sees by timm)."""
    said = " ".join(str(error).split()).partition(" You can install")[0]
    return InputError(f"needs a package that is not installed ({said})", where=name, fix="Install it with pip.")


def fit(
    weights: Weights, model: Any, *, leftovers: re.Pattern[str] = LEFTOVERS, unused: re.Pattern[str] | None = None
) -> Fit:
    """Find the weights of `model`, a `skeleton`, in the files, under the names that transformers accepts for them.

    Raises InputError that names those that are missing, of another shape or no floating-point numbers, and those that
    the class does not know. Names that begin as `leftovers` may be there, those that begin as `unused` may be missing.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key
    from transformers.utils.loading_report import LoadStateDictInfo

    expected: dict[str, Tensor] = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    rules = [each for each in transforms if not isinstance(each, WeightConverter)], converters
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    sources: dict[str, tuple[str, ...]] = {}
    unknown, wrong = set(), []
    for name, stored in weights.stored.items():
        own, pattern = rename_source_key(name, *rules, model.base_model_prefix, expected)
        if own not in expected and name in expected:
            own, pattern = rename_source_key(name, [], [], model.base_model_prefix, expected)
        if own not in expected:
            unknown.add(name)
            continue
        targets = [own] if pattern is None else _targets(own, by_pattern[pattern])
        for target in targets:
            sources[target] = (*sources.get(target, ()), name)
        if pattern is None and stored.shape != tuple(expected[own].shape):
            wrong.append(f"{name} is {list(stored.shape)}, expected {list(expected[own].shape)}")
        if expected[own].is_floating_point() and not stored.dtype.startswith(_FLOATS):
            wrong.append(f"{name} is {stored.dtype}, expected floating-point numbers")
    tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", {}) or {})
    there = set(sources) | {a for a, b in tied.items() if b in sources} | {b for a, b in tied.items() if a in sources}
    info = LoadStateDictInfo(set(expected) - there, unknown, set(), [], {})
    model._adjust_missing_and_unexpected_keys(info)  # what a class of transformers itself lets pass
    foreign = sorted(name for name in info.unexpected_keys if not leftovers.match(name))
    missing = sorted(name for name in info.missing_keys if unused is None or not unused.match(name))
    _require_all(weights, type(model).__name__, missing, foreign, wrong, len(expected))
    return Fit(weights, sources, tied | {b: a for a, b in tied.items() if a in sources and b not in sources})


def _targets(own: str, converter: Any) -> list[str]:
    """All parameters that a conversion makes; `own` is the first of them."""
    first, *_ = converter.target_patterns
    return [own.replace(first, target) for target in converter.target_patterns]


def require_whole(name: str | Path, model_class: Any, **options: Any) -> None:
    """Raise InputError when the folder or hub model `name` is not whole as a `model_class`; `options` are `fit`'s."""
    fit(Weights.of(name), skeleton(model_class, model_class.config_class.from_pretrained(name)), **options)


def _require_all(
    weights: Weights, class_name: str, missing: list[str], foreign: list[str], wrong: list[str], total: int
) -> None:
    if not (missing or foreign or wrong):
        return
    found = []
    if missing:
        found.append(f"{len(missing)} of the {total} weights of {class_name} are missing: {some(missing)}")
    if foreign:
        found.append(f"{plural(len(foreign), 'weight', 'is|are')} not known to {class_name}: {some(foreign)}")
    if wrong:
        found.append(f"weights that do not fit {class_name}: {some(wrong)}")
    fix = "Check that it is the model meant, of this size; if it is, its files are not whole: download it again."
    if foreign and not (missing or wrong):
        fix = "If the model can do without them, save it with transformers (from_pretrained, save_pretrained) first."
    raise InputError("; ".join(found), where=weights.place, fix=fix)


def some(names: Sequence[str]) -> str:
    """The first of `names`, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"


def keep_precision(model: Any, dtype: torch.dtype) -> None:
    """Note that `model`, whose weights are as its files have them, is to be in `dtype`: `give_precision` does it."""
    model.precision_to_come = dtype


def give_precision(model: nn.Module) -> None:
    """Put the models of transformers in `model` into the precision that was noted, weights of LoRA aside."""
    wanted: dict[int, torch.dtype] = {}
    for part in model.modules():
        dtype = vars(part).pop("precision_to_come", None)
        if dtype is not None:
            floats = ((name, p) for name, p in part.named_parameters() if p.is_floating_point())
            wanted |= {id(p): dtype for name, p in floats if "lora_" not in name}
            part.config.dtype = dtype
    if wanted:
        model._apply(lambda tensor: tensor.to(wanted.get(id(tensor), tensor.dtype)))  # type: ignore[no-untyped-call]


# --- quantised -------------------------------------------------------------------------------------------------------
#
# The linear layers of the language model alone: they are nearly all of its weights, and what adds up over its layers
# forgives their rounding. Embeddings and the language head share one matrix in many models and decide words directly;
# media towers are small and see values far from zero; norms, LoRA and heads are small. All of these stay in the model's
# precision. A layer is quantised as its file has it, whatever the model computes in, so that merging finds the same
# numbers again.


def quantize(transformer: Any, kind: Quantization, dtype: torch.dtype) -> None:
    """Put the linear layers of the language model into `kind`; they compute in `dtype`. Done on the GPU, where one is.

    nf4 is that of QLoRA (arXiv 2305.14314): 4 bits in blocks of 64, whose scales are quantised, too. int8 is LLM.int8()
    (arXiv 2208.07339): a scale a row, columns of inputs above 6 in 16 bits.
    """
    import bitsandbytes as bnb

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    for name in linear_names(transformer):
        layer = transformer.get_submodule(name)
        sizes = (layer.in_features, layer.out_features, layer.bias is not None)
        new: Any
        with torch.device("meta"):
            if kind == "nf4":
                new = bnb.nn.Linear4bit(*sizes, compute_dtype=dtype, compress_statistics=True, quant_type="nf4")
            else:
                new = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0)
        new.weight = _quantized(layer.weight.detach(), kind, device)
        if kind == "nf4":
            new.weight.module, new.quant_state = new, new.weight.quant_state
            new.quant_state.dtype = dtype  # what a product makes of it
            # On CPUs with AVX512-BF16 the first pass without gradients would pack the weights for products in bfloat16,
            # whatever the model computes in, and training would go on without gradients below.
            new.support_avx512bf16_for_cpu = False
        new.bias = layer.bias
        transformer.set_submodule(name, new.requires_grad_(False))
    setattr(transformer, "is_loaded_in_4bit" if kind == "nf4" else "is_loaded_in_8bit", True)  # PEFT looks for it


def dequantized(weight: Tensor, kind: Quantization) -> Tensor:
    """What `weight` [out, in] is after quantisation, in float32."""
    import bitsandbytes as bnb

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    found = _quantized(weight, kind, device)
    if kind == "nf4":
        back: Tensor = bnb.functional.dequantize_4bit(found.data, found.quant_state)
    else:
        back = bnb.functional.int8_vectorwise_dequant(found.data, found.SCB)
    return back.float().to(weight.device)


def _quantized(weight: Tensor, kind: Quantization, device: torch.device) -> Any:
    import bitsandbytes as bnb

    if kind == "nf4":
        how: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": True}
        return bnb.nn.Params4bit(weight.to(device).float(), requires_grad=False, **how).to(device)
    return bnb.nn.Int8Params(weight.to(device), requires_grad=False, has_fp16_weights=False).to(device)


class LanguageLayers(NamedTuple):
    """The layers of the language model of a transformers model; `prefix` is the name of what holds them, with a dot."""

    prefix: str
    layers: nn.ModuleList


def language_layers(transformer: Any) -> LanguageLayers:
    """Where the layers of the language model are: beside its embeddings. Raises InputError where they are not."""
    words = transformer.get_input_embeddings()
    name = next(name for name, module in transformer.named_modules() if module is words).rpartition(".")[0]
    layers = getattr(transformer.get_submodule(name), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        found = f"no layers of a language model beside {name}.embed_tokens"
        raise InputError(found, where=type(transformer).__name__, fix="Use another model.")
    return LanguageLayers(f"{name}." if name else "", layers)


def linear_names(transformer: Any) -> list[str]:
    """The linear layers of the language model, which LoRA and quantisation change: all but a few coefficients, such as
    those that mix the states of a token in Gemma 3n, whose training clamps them, and what deals tokens out to experts.
    Raises InputError where it has none.
    """
    start = f"{language_layers(transformer).prefix}layers."
    linear = ((n, m) for n, m in transformer.named_modules() if n.startswith(start) and isinstance(m, nn.Linear))
    linear = ((n, m) for n, m in linear if "router" not in n.split("."))
    found = [n for n, m in linear if ".lora_" in n or min(m.in_features, m.out_features) >= _COEFFICIENTS]
    if not found:
        what = f"no linear layers below {start}"
        raise InputError(what, where=type(transformer).__name__, fix="Use model.strategy=full.")
    return found


@contextmanager
def without_load_reports() -> Iterator[None]:
    """Within, transformers does not list weights that it leaves out or draws: `fit` has told of them, or need not."""
    from transformers.utils.logging import get_logger

    def keeps(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    loggers = [get_logger(f"transformers.{name}") for name in ("modeling_utils", "integrations.peft")]
    for logger in loggers:
        logger.addFilter(keeps)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(keeps)


def _files(folder: Path) -> list[Path]:
    if (folder / FILE).is_file():
        return [folder / FILE]
    if (folder / INDEX).is_file():
        return _indexed(folder / INDEX)
    pickled = sorted(file.name for file in folder.glob("*.bin"))
    what = f"no safetensors here ({some(pickled)} is not read: it may hold code)" if pickled else "no weights here"
    fix = f"Give a folder with {FILE} or {INDEX}; transformers' save_pretrained writes them."
    raise InputError(what, where=str(folder), fix=fix)


def _indexed(index: Path) -> list[Path]:
    """The files that an index names, in their order."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(part, str) for part in table.values()):
        what = "no index of weights: expected weight_map with names and files"
        raise InputError(what, where=str(index), fix=_DOWNLOAD)
    names = sorted(set(table.values()))
    missing = [name for name in names if Path(name).name != name or not (index.parent / name).is_file()]
    if missing:
        raise InputError(f"files of the model are missing: {some(missing)}", where=str(index), fix=_DOWNLOAD)
    return [index.parent / name for name in names]


def _downloaded(name: str) -> list[Path]:
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    try:
        optional = {"_raise_exceptions_for_missing_entries": False}
        if (file := cached_file(name, FILE, **optional)) is not None:
            return [Path(file)]
        if (index := cached_file(name, INDEX, **optional)) is not None:
            return [Path(part) for part in get_checkpoint_shard_files(name, index)[0]]
    except OSError as error:
        fix = "Check the name; a hub model needs a network or a filled cache."
        raise InputError(f"cannot load its weights ({str(error).splitlines()[0]})", where=name, fix=fix) from error
    raise InputError("no weights in safetensors", where=name, fix="Use a model that has them: pickles are not read.")


def _fill(handle: Any, raw: Tensor, file: Path) -> None:
    view, done = raw.numpy().data, 0
    while done < len(view):
        count = handle.readinto(view[done:])
        if not count:
            raise InputError("the file has been cut off while it was read", where=str(file), fix=_DOWNLOAD)
        done += count


# --- writing ---------------------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """A tensor to be written; `blocks` gives its values in a row, in any number of pieces, when their turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[Tensor]]

    @property
    def size(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def tensor_piece(name: str, tensor: Tensor) -> Piece:
    """A tensor in memory to be written, block by block."""
    step = max(1, BLOCK_BYTES // tensor.dtype.itemsize)
    return Piece(name, tensor.dtype, tuple(tensor.shape), lambda: torch.split(tensor.detach().reshape(-1), step))


def write_weights(folder: Path, shards: Sequence[Sequence[Piece]]) -> None:
    """Write the tensors of each of `shards` into a file of its own, as transformers names them, with their index.

    Raises what `write_file` does.
    """
    kept = [shard for shard in shards if shard]
    count = len(kept)
    names = [FILE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for name, shard in zip(names, kept, strict=True):
        write_file(folder / name, shard)
    if count > 1:
        table = {piece.name: name for name, shard in zip(names, kept, strict=True) for piece in shard}
        total = sum(piece.size for shard in kept for piece in shard)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(table.items()))})


def write_file(file: Path, pieces: Sequence[Piece], metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file: eight bytes with the length of the header, the header, then the tensors in a row.

    One block of one tensor is in main memory at a time. ValueError when a piece gives other bytes than it announced.
    """
    ordered = sorted(pieces, key=lambda piece: -piece.dtype.itemsize)  # each then starts at a multiple of its item size
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | dict(metadata or {})}
    place = 0
    for piece in ordered:
        entry = {"dtype": _NAMES[piece.dtype], "shape": list(piece.shape)}
        header[piece.name] = {**entry, "data_offsets": [place, place + piece.size]}
        place += piece.size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with file.open("wb") as handle:
        handle.write(struct.pack("<Q", len(raw)) + raw)
        for piece in ordered:
            written = 0
            for block in piece.blocks():
                flat = block.detach().to("cpu", piece.dtype).contiguous().reshape(-1)
                written += handle.write(flat.view(torch.uint8).numpy().data)
            if written != piece.size:
                raise ValueError(f"{piece.name}: {written} bytes for {piece.size}")
