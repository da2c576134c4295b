"""The checkpoints that the authors released, read into an OmniSapiens. Their layout is a state dict:

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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hba.descriptors.pooled import Mode
from hba.errors import InputError, nearest
from hba.model import checkpoint
from hba.model.omni import OmniSapiens
from hba.model.released_bam import PREFIXES, add_released_adapters

# What Accelerate calls the model in a saved state, in the order of preference.
FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model_fsdp.bin")
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SHOWN = 5
_PEFT, _BACKBONE, _LORA = "base_model.model.", "backbone.", ".lora_A.default.weight"


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


def load_released(path: Path, release: Release) -> OmniSapiens:
    """The released checkpoint `path` (a file or its folder) as an OmniSapiens in float32, LoRA layers not yet folded.

    Raises InputError for a file that is damaged or holds code, and for unknown, missing or wrongly shaped keys.
    """
    whole = read_state(path)
    adapters = {name: tensor for name, tensor in whole.items() if name.startswith(PREFIXES)}
    state = {name: tensor for name, tensor in whole.items() if name not in adapters}
    if bool(adapters) != (release.dataset is not None):
        what = "holds adapters of one dataset" if adapters else "holds no adapters"
        raise InputError(what, where=str(path), fix="Name their dataset with --adapters-of; without adapters, none.")
    if release.backbone is not None:
        model = _load_sft(state, path, release.backbone, release.lora_alpha)
    elif state or release.onto is None:
        what = f"holds more than adapters: {_some(list(state))}"
        raise InputError(what, where=str(path), fix="Name the backbone with --backbone.")
    elif checkpoint.resolve(release.onto) is None:
        fix = "Name a run or a checkpoint; `hba merge --backbone` makes one of the released SFT model."
        raise InputError("a plain backbone has no heads for adapters", where=release.onto, fix=fix)
    else:
        model = checkpoint.load(release.onto, dtype="float32")
    if release.dataset is not None:
        add_released_adapters(model, adapters, dataset=release.dataset, pooling=release.pooling, path=path)
    return model


def _load_sft(state: dict[str, Tensor], path: Path, backbone: str, lora_alpha: int) -> OmniSapiens:
    if checkpoint.resolve(backbone) is not None:
        fix = "Name the plain backbone, such as Qwen/Qwen2.5-Omni-7B."
        raise InputError("a checkpoint of hba, not a backbone", where=backbone, fix=fix)
    model = checkpoint.load(backbone, dtype="float32")
    renamed = {_own_name(name, model): tensor for name, tensor in state.items()}
    adapted = sorted(name.removesuffix(_LORA) for name in renamed if name.endswith(_LORA))
    if adapted:
        ranks = {renamed[f"{name}{_LORA}"].shape[0] for name in adapted}
        _add_lora(model, [name.removeprefix("thinker.") for name in adapted], ranks, lora_alpha, path)
    _require_same_keys(model, renamed, dict(zip(renamed, state, strict=True)), path)
    model.load_state_dict(renamed, strict=False)  # strict up to tied weights, which a file may hold once
    return model


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
    return torch.load(file, map_location="cpu", weights_only=True)


def _own_name(name: str, model: OmniSapiens) -> str:
    """The name of a released parameter in an OmniSapiens; unknown ones stay as they are."""
    if name.startswith(_BACKBONE):
        return f"thinker.{name.removeprefix(_BACKBONE).removeprefix(_PEFT)}"
    kind, _, rest = name.partition(".")
    number, _, which = rest.partition(".")
    domains = list(model.heads.columns)
    if kind == "heads" and number.isdigit() and int(number) < len(domains):
        return f"heads.linear.{domains[int(number)]}.{which}"
    return name


def _released_name(name: str, model: OmniSapiens) -> str:
    """What a release calls a parameter of an OmniSapiens, but for PEFT's prefix."""
    kind, _, rest = name.partition(".")
    if kind == "thinker":
        return f"{_BACKBONE}{rest}"
    domain, _, which = rest.removeprefix("linear.").rpartition(".")
    return f"heads.{list(model.heads.columns).index(domain)}.{which}"


def _add_lora(model: OmniSapiens, targets: list[str], ranks: set[int], alpha: int, path: Path) -> None:
    from peft import LoraConfig

    layers = dict(model.thinker.named_modules())
    unknown = [name for name in targets if name not in layers]
    if unknown or len(ranks) != 1:
        what = f"LoRA of layers that the backbone lacks: {', '.join(unknown[:_SHOWN])}" if unknown else "several ranks"
        raise InputError(what, where=str(path), fix="Check --backbone.")
    (rank,) = ranks
    model.thinker.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))


def _require_same_keys(
    model: OmniSapiens, found: Mapping[str, Tensor], released: Mapping[str, str], path: Path
) -> None:
    """`found` by own names, `released` what the file calls them."""
    expected: dict[str, Tensor] = model.state_dict()
    unknown = [released[name] for name in found if name not in expected]
    if unknown:
        fix = f"Check that it is an SFT checkpoint. {nearest(unknown[0], ['backbone.*', 'heads.{i}.*'])}"
        raise InputError(f"unknown keys: {_some(unknown)}", where=str(path), fix=fix)
    held = {expected[name].data_ptr() for name in found}
    absent = [name for name in expected if name not in found and expected[name].data_ptr() not in held]
    missing = [_released_name(name, model) for name in absent]
    if missing:
        raise InputError(f"missing keys: {_some(missing)}", where=str(path), fix="Check --backbone and the file.")
    wrong = [
        f"{released[name]} is {list(tensor.shape)}, expected {list(expected[name].shape)}"
        for name, tensor in found.items()
        if tensor.shape != expected[name].shape
    ]
    if wrong:
        raise InputError(f"wrong shapes: {_some(wrong)}", where=str(path), fix="Check --backbone.")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"
