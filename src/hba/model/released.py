"""The checkpoints that the authors released. Their layout is a state dict:

    backbone.*                      the thinker; with PEFT `backbone.base_model.model.*`, its layers `*.base_layer.*`
                                    and `*.lora_A.default.weight`, `*.lora_B.default.weight`
    heads.{i}.weight | .bias        the head of the i-th domain, in the order of the taxonomy
    video_adapter.*, audio_adapter.*    BAM of one dataset (see released_bam.py), beside those or alone

Files are safetensors or what torch.save wrote, read with weights_only=True: nothing in them is executed. Every key must
be known, present and of the right shape; otherwise the error names them.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hba.batch.pool import DescriptorConfig, Mode
from hba.errors import InputError
from hba.model import checkpoint
from hba.model.bam import MODALITIES, AdapterSpec, Bam, DatasetAdapters
from hba.model.heads import DomainHeads
from hba.model.weights import Piece, skeleton, some, tensor_piece
from hba.taxonomy import BUILTIN, Taxonomy

# Adapters that the authors released, put beside those of a model. Their keys in a state dict, one group a modality:
#
#     video_adapter.alpha, .mlp.0.weight|bias, .mlp.2.weight|bias and, with layer norm, .ln_feats.weight|bias
#     audio_adapter.*     the same
#
# A state dict tells neither the dataset nor how descriptors were pooled over time: both are asked for.


PREFIXES = tuple(f"{name}_adapter." for name in MODALITIES)
PUBLISHED_MODALITY_DROPOUT = 0.3
_MEASURED = ("center", "scale")  # buffers of our adapters that the released ones lack: 0 and 1


def released_adapters(
    bam: Bam | None,
    hidden_size: int,
    state: Mapping[str, Tensor],
    *,
    dataset: str,
    pooling: Mode,
    path: Path,
    taxonomy: Taxonomy = BUILTIN,
) -> Bam:
    """The adapters in `state` for `dataset`, beside those of `bam`; they replace earlier ones of it.

    Raises InputError for an unknown dataset, and for unknown, missing or wrongly shaped keys, which it names.
    """
    spec = _spec(state, taxonomy.dataset(dataset).key, pooling, path)
    fresh = DatasetAdapters(spec, hidden_size)
    expected = {name: tensor for name, tensor in fresh.state_dict().items() if name.split(".")[1] not in _MEASURED}
    unknown, missing = sorted(state.keys() - expected.keys()), sorted(expected.keys() - state.keys())
    wrong = [
        f"{name} is {list(state[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    for what, names in (("unknown keys", unknown), ("missing keys", missing), ("wrong shapes", wrong)):
        if names:
            raise InputError(f"{what}: {', '.join(names)}", where=str(path), fix="Check the file and the backbone.")
    fresh.load_state_dict(dict(state), strict=False)
    others = [] if bam is None else [bam.adapters(key) for key in bam.datasets if key != spec.dataset]
    together = [*others, fresh]
    joined = Bam([each.spec for each in together], hidden_size)
    for each in together:
        joined.datasets[each.spec.dataset] = each
    return joined


def _spec(state: Mapping[str, Tensor], dataset: str, pooling: Mode, path: Path) -> AdapterSpec:
    dims: dict[str, int] = {}
    hidden: set[int] = set()
    for name in MODALITIES:
        weight = state.get(f"{name}_adapter.mlp.0.weight")
        if weight is not None and weight.ndim == 2:
            hidden.add(weight.shape[0])
            dims[name] = weight.shape[1]
    if len(hidden) != 1:
        what = "no adapter: expected video_adapter.mlp.0.weight or audio_adapter.mlp.0.weight"
        found = f"adapters of different hidden sizes {sorted(hidden)}" if hidden else what
        raise InputError(found, where=str(path), fix="Check that it is a BAM checkpoint.")
    return AdapterSpec(
        dataset=dataset,
        dims=dims,
        hidden=hidden.pop(),
        dropout=0.0,
        modality_dropout=PUBLISHED_MODALITY_DROPOUT,
        layer_norm=any(".ln_feats." in name for name in state),
        descriptors=DescriptorConfig(mode=pooling, published=True),
    )


# --- released checkpoints ---------------------------------------------------------------------------------------------


# What Accelerate calls the model in a saved state, in the order of preference.
FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model_fsdp.bin")
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_PEFT, _BACKBONE, _LORA, _THINKER = "base_model.model.", "backbone.", ".lora_A.default.weight", "thinker."


@dataclass(frozen=True, kw_only=True)
class Release:
    """What a released state dict does not tell.

    `backbone` gives config and processor of a whole model; adapters alone go on the checkpoint `onto`. `dataset` is
    that of the adapters, None without any; `pooling` is how their descriptors are pooled. LoRA's alpha is 64 as
    published.
    """

    backbone: str | None = None
    onto: str | None = None
    lora_alpha: int = 64
    dataset: str | None = None
    pooling: Mode = "meanstd"


@dataclass(frozen=True, kw_only=True)
class ReleasedModel:
    """A whole model of a release: its heads, the backbone's tensors by their names in the class, and its LoRA."""

    heads: DomainHeads
    own: Mapping[str, Piece]
    add_lora: Callable[[Any], None] | None


class Found(NamedTuple):
    """What a released file holds; `model` is None for adapters alone."""

    model: ReleasedModel | None
    adapters: Mapping[str, Tensor]


def read_release(path: Path, release: Release) -> Found:
    """What the released checkpoint `path` (a file or its folder) holds; large tensors stay in their files.

    Raises InputError for a file that is damaged or holds code, and for unknown, missing or wrongly shaped keys.
    """
    whole = read_state(path)
    adapters = {name: tensor for name, tensor in whole.items() if name.startswith(PREFIXES)}
    state = {name: tensor for name, tensor in whole.items() if name not in adapters}
    if bool(adapters) != (release.dataset is not None):
        what = "holds adapters of one dataset" if adapters else "holds no adapters"
        raise InputError(what, where=str(path), fix="Name their dataset with --adapters-of; without adapters, none.")
    if release.backbone is not None:
        return Found(_read_model(state, path, release.backbone, release.lora_alpha), adapters)
    if state or release.onto is None:
        what = f"holds more than adapters: {some(list(state))}"
        raise InputError(what, where=str(path), fix="Name the backbone with --backbone.")
    return Found(None, adapters)


def _read_model(state: dict[str, Tensor], path: Path, backbone: str, lora_alpha: int) -> ReleasedModel:
    if checkpoint.resolve(backbone) is not None:
        fix = "Name the plain backbone, such as Qwen/Qwen2.5-Omni-7B."
        raise InputError("a checkpoint of hba, not a backbone", where=backbone, fix=fix)
    config = checkpoint.read_config(backbone)
    if not checkpoint.is_thinker(config):
        other = f"is a model of type {config.model_type}, not a Qwen2.5-Omni, on which the release stands"
        raise InputError(other, where=backbone, fix="Name the backbone of the release, such as Qwen/Qwen2.5-Omni-7B.")
    bare = skeleton(checkpoint.backbone_class(backbone), getattr(config, "thinker_config", config))
    heads = DomainHeads.for_taxonomy(int(bare.config.get_text_config().hidden_size), BUILTIN)
    tied = dict(bare.all_tied_weights_keys)
    released = {_own_name(name, list(heads.columns)): name for name in state}
    adapted = sorted(name.removesuffix(_LORA) for name in released if name.endswith(_LORA))
    add_lora = None
    if adapted:
        ranks = {state[released[f"{name}{_LORA}"]].shape[0] for name in adapted}
        matrices = {name: state[key] for name, key in released.items() if ".lora_" in name}
        targets = [name.removeprefix(_THINKER) for name in adapted]
        add_lora = partial(_add_lora, targets=targets, ranks=ranks, alpha=lora_alpha, matrices=matrices, path=path)
        add_lora(bare)
    expected = {f"{_THINKER}{name}": tensor for name, tensor in bare.state_dict().items()}
    expected |= {f"heads.{name}": tensor for name, tensor in heads.state_dict().items()}
    found = {own: state[name] for own, name in released.items()}
    _require_same_keys(expected, found, released, tied, list(heads.columns), path)
    heads.load_state_dict({name: state[released[f"heads.{name}"]] for name in heads.state_dict()})
    own = {
        name.removeprefix(_THINKER).replace(".base_layer.", "."): tensor_piece(name, state[key])
        for name, key in released.items()
        if name.startswith(_THINKER) and ".lora_" not in name
    }
    return ReleasedModel(heads=heads, own=own, add_lora=add_lora)


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a file or folder. Raises InputError when there is none, or it holds more than tensors."""
    file = path if path.is_file() else next((path / name for name in FILES if (path / name).is_file()), None)
    if file is not None:
        return _read(file)
    index = next((path / name for name in INDICES if (path / name).is_file()), None)
    if index is None:
        raise InputError("no released checkpoint here", where=str(path), fix=f"Expected one of {', '.join(FILES)}.")
    parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return {name: tensor for part in parts for name, tensor in _read(path / Path(part).name).items()}


def _read(file: Path) -> dict[str, Tensor]:
    fix = "Download it again; a file that needs code to load is not accepted."
    try:
        state = load_file(file) if file.suffix == ".safetensors" else _unpickled(file)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        what = f"cannot read the weights ({str(error).splitlines()[0]})"
        raise InputError(what, where=str(file), fix=fix) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError("not a state dict: expected names with tensors", where=str(file), fix=fix)
    return state


def _unpickled(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # what torch wrote before 1.6 cannot be mapped
        return torch.load(file, map_location="cpu", weights_only=True)


def _own_name(name: str, domains: Sequence[str]) -> str:
    """The name of a released parameter in an OmniSapiens; unknown ones stay as they are."""
    if name.startswith(_BACKBONE):
        return f"{_THINKER}{name.removeprefix(_BACKBONE).removeprefix(_PEFT)}"
    kind, _, rest = name.partition(".")
    number, _, which = rest.partition(".")
    if kind == "heads" and number.isdigit() and int(number) < len(domains):
        return f"heads.linear.{domains[int(number)]}.{which}"
    return name


def _released_name(name: str, domains: Sequence[str]) -> str:
    """What a release calls a parameter of an OmniSapiens, but for PEFT's prefix."""
    kind, _, rest = name.partition(".")
    if kind == "thinker":
        return f"{_BACKBONE}{rest}"
    domain, _, which = rest.removeprefix("linear.").rpartition(".")
    return f"heads.{domains.index(domain)}.{which}"


def _add_lora(
    bare: Any, *, targets: list[str], ranks: set[int], alpha: int, matrices: Mapping[str, Tensor], path: Path
) -> None:
    """Put the LoRA layers of a release, with their weights, into a skeleton of the thinker."""
    from peft import LoraConfig

    layers = dict(bare.named_modules())
    unknown = [name for name in targets if name not in layers]
    if unknown or len(ranks) != 1:
        what = f"LoRA of layers that the backbone lacks: {some(unknown)}" if unknown else "several ranks"
        raise InputError(what, where=str(path), fix="Check --backbone.")
    (rank,) = ranks
    bare.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))
    known = bare.state_dict().keys()
    given = {name.removeprefix(_THINKER): tensor.float() for name, tensor in matrices.items()}
    bare.load_state_dict({k: tensor for k, tensor in given.items() if k in known}, strict=False, assign=True)


def _require_same_keys(
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    released: Mapping[str, str],
    tied: Mapping[str, str],
    domains: Sequence[str],
    path: Path,
) -> None:
    """`expected` and `found` by own names, `released` what the file calls them; of tied ones it may hold either."""
    unknown = [released[name] for name in found if name not in expected]
    if unknown:
        fix = "Give a checkpoint of the authors' SFT, whose weights are named backbone.* and heads.{i}.*."
        raise InputError(f"unknown keys: {some(unknown)}", where=str(path), fix=fix)
    pairs = {f"{_THINKER}{one}": f"{_THINKER}{other}" for one, other in tied.items()}
    either = pairs | {other: one for one, other in pairs.items()}
    absent = [name for name in expected if name not in found and either.get(name) not in found]
    missing = [_released_name(name, domains) for name in absent]
    if missing:
        raise InputError(f"missing keys: {some(missing)}", where=str(path), fix="Check --backbone and the file.")
    wrong = [
        f"{released[name]} is {list(tensor.shape)}, expected {list(expected[name].shape)}"
        for name, tensor in found.items()
        if tensor.shape != expected[name].shape
    ]
    if wrong:
        raise InputError(f"wrong shapes: {some(wrong)}", where=str(path), fix="Check --backbone.")
