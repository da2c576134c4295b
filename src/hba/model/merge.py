"""A checkpoint as one full model that needs neither PEFT nor hba: LoRA folded in, laid out as the backbone's release.

The folder holds the thinker's weights under `thinker.`, and a config.json of the whole Qwen2.5-Omni with the speaking
part switched off: `Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained`, vLLM and verl expect both. Another chat
model keeps the names that it was published with. Heads and adapters lie beside it, so that it is a checkpoint of hba,
too: its `hba.json` says how samples are encoded.

The model is never in memory whole: tensor after tensor goes from the files of the backbone into files of the same
tensors, LoRA folded by PEFT's own layers in float32 and rounded once. A layer with LoRA is held whole, of any other
tensor one block.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hba.batch.config import EncodeConfig
from hba.errors import InputError
from hba.model import checkpoint
from hba.model.bam import FOLDER, load_bam, save_bam
from hba.model.config import Quantization, require_bitsandbytes
from hba.model.released import Release, read_release, released_adapters
from hba.model.weights import (
    Fit,
    Piece,
    Weights,
    dequantized,
    fit,
    linear_names,
    skeleton,
    some,
    tensor_piece,
    write_weights,
)
from hba.storage import atomic_folder, write_json

# The class name by which every version of vLLM finds its thinker.
ARCHITECTURE = "Qwen2_5OmniModel"
PREFIX = "thinker."  # of a thinker's parameters in the whole model
PEFT_ROOT = "base_model.model."


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a full model is put together from.

    `base` is the folder or hub id whose files say which tensors there are and which lie together; `own` are those in
    the place of its own, by their names in transformers' class. `add_lora` puts LoRA layers with their weights into a
    skeleton of the class. Its linear layers are rounded as in training, where that was `quantization`. The processor is
    that of `processor`.
    """

    base: str
    processor: str
    own: Mapping[str, Piece] = field(default_factory=dict)
    add_lora: Callable[[Any], None] | None = None
    quantization: Quantization = "none"


def merge_checkpoint(path: str | Path, out: Path, *, dtype: str = "bfloat16") -> None:
    """Write the checkpoint or the best of the run folder `path` as a full model into the new folder `out`.

    `dtype` is bfloat16, as the backbone is published, or float32. Raises InputError when `path` is neither a
    checkpoint nor a run, or `out` is taken, and for an adapter that is no LoRA of weights alone.
    """
    folder = checkpoint.resolve(path)
    if folder is None:
        raise InputError("a plain backbone: nothing to merge", where=str(path), fix="Name a run or a checkpoint.")
    require_free(out)
    with atomic_folder(out) as new:
        write_full(parts_of(folder), new, dtype=checkpoint.resolve_dtype(dtype), card=checkpoint.read_card(folder))
        if (folder / checkpoint.HEADS).is_file():
            shutil.copyfile(folder / checkpoint.HEADS, new / checkpoint.HEADS)
        if (folder / FOLDER).is_dir():
            shutil.copytree(folder / FOLDER, new / FOLDER)


def merge_released(path: Path, out: Path, release: Release, *, dtype: str = "bfloat16") -> None:
    """Write a checkpoint that the authors released (see released.py) as a full model into the new folder `out`.

    Raises InputError for a file that is damaged or holds code, and for unknown, missing or wrongly shaped keys.
    """
    require_free(out)
    found = read_release(path, release)
    wanted = checkpoint.resolve_dtype(dtype)
    with atomic_folder(out) as new:
        if found.model is not None:
            place = checkpoint.place_of(str(release.backbone))
            card = checkpoint.new_card(place, "full", EncodeConfig(), columns=found.model.heads.columns)
            parts = Parts(base=place, processor=place, own=found.model.own, add_lora=found.model.add_lora)
            heads, earlier = found.model.heads, None
        else:
            folder = checkpoint.require_heads(str(release.onto))
            card, parts, heads = checkpoint.read_card(folder), parts_of(folder), checkpoint.load_heads(folder)
            earlier = load_bam(folder, heads.hidden_size)
        checkpoint.save_heads(heads, new)
        if release.dataset is not None:
            how: dict[str, Any] = {"dataset": release.dataset, "pooling": release.pooling, "path": path}
            save_bam(released_adapters(earlier, heads.hidden_size, found.adapters, **how), new)
        write_full(parts, new, dtype=wanted, card=card)


def require_free(out: Path) -> None:
    """Raise InputError when `out` exists: a model is not written over something else."""
    if out.exists():
        raise InputError("exists already", where=str(out), fix="Name a new folder, or remove this one.")


def parts_of(folder: Path) -> Parts:
    """What the model of a checkpoint folder consists of. Raises InputError when its backbone cannot be had."""
    base = checkpoint.base_of(folder)
    checkpoint.require_config(folder, base)
    own: dict[str, Piece] = {}
    if (folder / checkpoint.LM_HEAD).is_file():
        name, shape = checkpoint.language_head(base)
        own[name] = checkpoint.stored_lm_head(folder, shape).piece("weight")
    card = checkpoint.read_card(folder)
    add_lora = partial(checkpoint.load_adapter, folder=folder) if card["strategy"] == "lora" else None
    kind = checkpoint.quantization_of(card)
    require_bitsandbytes(kind, of_it=kind != "none", where=str(folder))
    return Parts(base=base, processor=str(folder), own=own, add_lora=add_lora, quantization=kind)


def write_full(parts: Parts, folder: Path, *, dtype: torch.dtype, card: Mapping[str, Any]) -> None:
    """Write weights, config, processor and `hba.json` (`card`, as of strategy full) into `folder`.

    Raises InputError when the files of the base are not whole, and for LoRA that cannot be folded.
    """
    config = checkpoint.read_config(parts.base)
    if getattr(config, "quantization_config", None) is not None:
        fix = "Train and merge on the model that it was quantised from."
        raise InputError("is quantised: nothing can be folded into it", where=parts.base, fix=fix)
    model_class = checkpoint.backbone_class(parts.base)
    bare = skeleton(model_class, model_class.config_class.from_pretrained(parts.base))
    generation = _generation_config(parts.base, bare)
    found = fit(Weights.of(parts.base), bare)
    rounded = set() if parts.quantization == "none" else {f"{name}.weight" for name in linear_names(bare)}
    split = sorted(name for name in rounded if len(found.sources.get(name, ())) != 1)
    if split:
        what = f"weights in {parts.quantization} that the files hold in parts: {some(split)}"
        raise InputError(what, where=parts.base, fix="Use the run as it is: its folder predicts what it learned.")
    processor = checkpoint.load_processor(parts.processor)
    if checkpoint.is_thinker(config):
        shards, tied = _thinker_shards(found, parts.own, bare.all_tied_weights_keys)
        write_json(folder / "config.json", _config(bare.config, dtype, tied=tied))
    else:
        shards = [[_Placed(own, found.weights.piece(name)) for name, own in names] for names in _by_file(found)]
        whole = _in_precision(_without_places(config.to_dict()), dtype)
        if parts.own:
            shards = [[each for each in shard if each.own not in parts.own] for shard in shards]
            shards[-1] += [_Placed(name, piece._replace(name=name)) for name, piece in parts.own.items()]
            whole = _untied(whole)
        write_json(folder / "config.json", whole)
    layers = {} if parts.add_lora is None else _lora_layers(bare, found, parts.add_lora)
    if parts.quantization != "none":
        again = partial(_as_quantized, kind=parts.quantization)
        shards = [[p._replace(piece=again(p.piece)) if p.own in rounded else p for p in each] for each in shards]
    write_weights(folder, [[_rounded(each.piece, layers.get(each.own), dtype) for each in shard] for shard in shards])
    generation.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_json(folder / checkpoint.CARD, {**card, "strategy": "full", "quantization": "none"})


def write_thinker(thinker: Any, folder: Path, *, dtype: torch.dtype) -> None:
    """Write weights and config.json of a thinker in memory, without LoRA layers, named as in the whole model."""
    weights: dict[str, Tensor] = thinker.state_dict()
    tied = weights["lm_head.weight"].data_ptr() == weights["model.embed_tokens.weight"].data_ptr()
    if tied:
        del weights["lm_head.weight"]
    pieces = [tensor_piece(f"{PREFIX}{name}", tensor) for name, tensor in weights.items()]
    write_weights(folder, [[_rounded(piece, None, dtype) for piece in pieces]])
    write_json(folder / "config.json", _config(thinker.config, dtype, tied=tied))


def name_as_released(adapter: Path, out: Path) -> None:
    """Write the PEFT adapter of a thinker into `out`, which may be its own folder, with the names of the whole model,
    by which vLLM knows its layers."""
    tensors = load_file(adapter / checkpoint.ADAPTER)
    if out != adapter:
        shutil.copyfile(adapter / "adapter_config.json", out / "adapter_config.json")
    named = {name.replace(PEFT_ROOT, PEFT_ROOT + PREFIX, 1): tensor for name, tensor in tensors.items()}
    save_file(named, out / checkpoint.ADAPTER)


class _Placed(NamedTuple):
    """A tensor of the new model under the name in its files, and what the class calls it."""

    own: str
    piece: Piece


def _by_file(found: Fit) -> list[list[tuple[str, str]]]:
    """The stored names of each file that the class reads, with the names that they have there."""
    own_names = found.own_names
    files: dict[Path, list[tuple[str, str]]] = {file: [] for file in found.weights.files}
    for name, stored in found.weights.stored.items():
        if name in own_names:
            files[stored.file].append((name, own_names[name]))
    return list(files.values())


def _thinker_shards(
    found: Fit, own: Mapping[str, Piece], tied_keys: Mapping[str, str]
) -> tuple[list[list[_Placed]], bool]:
    """The thinker's tensors as the files of its base hold them together, and whether lm_head is the embeddings."""
    held = {name: found.weights.piece(source) for name, (source, *_) in found.sources.items()} | dict(own)
    tied = False
    for target, source in tied_keys.items():
        if target in held and source not in held:
            held[source] = held.pop(target)
        if target in held and not _same(held[target], held[source]):
            continue  # lm_head has been trained alone
        held.pop(target, None)
        tied = True
    shards: dict[Path, list[_Placed]] = {file: [] for file in found.weights.files}
    for name, piece in held.items():
        beside = found.sources.get(name) or found.sources[tied_keys.get(name) or found.tied[name]]
        shards[found.weights.stored[beside[0]].file].append(_Placed(name, piece._replace(name=f"{PREFIX}{name}")))
    return list(shards.values()), tied


def _same(one: Piece, other: Piece) -> bool:
    """Whether two tensors hold the same numbers."""
    if one.shape != other.shape:
        return False
    pairs = zip(one.blocks(), other.blocks(), strict=True)
    return all(torch.equal(a.reshape(-1).float(), b.reshape(-1).float()) for a, b in pairs)


def _lora_layers(bare: Any, found: Fit, add_lora: Callable[[Any], None]) -> dict[str, Any]:
    """The LoRA layers, with their weights, by the parameter that each of them changes.

    Raises InputError for an adapter that changes more than weights, which folding would lose.
    """
    from peft import PeftType
    from peft.tuners.tuners_utils import BaseTunerLayer

    add_lora(bare)
    for adapter in bare.peft_config.values():
        more = ("modules_to_save", "lora_bias", "trainable_token_indices", "target_parameters")
        odd = [name for name in more if getattr(adapter, name, None)]
        odd += [] if getattr(adapter, "bias", "none") == "none" else ["bias"]
        if adapter.peft_type != PeftType.LORA or odd:
            kind = f"{adapter.peft_type.value} with {', '.join(odd)}" if odd else adapter.peft_type.value
            what = f"an adapter of kind {kind} cannot be folded"
            raise InputError(what, where=found.weights.place, fix="Merge it with PEFT (merge_and_unload).")
    layers = {f"{name}.weight": layer for name, layer in bare.named_modules() if isinstance(layer, BaseTunerLayer)}
    split = sorted(name for name in layers if len(found.sources.get(name, ())) != 1)
    if split:
        what = f"LoRA of weights that the files hold in parts: {some(split)}"
        raise InputError(what, where=found.weights.place, fix="Merge it with PEFT (merge_and_unload).")
    return layers


def _rounded(piece: Piece, layer: Any, dtype: torch.dtype) -> Piece:
    """A tensor in the precision of the new model, with what `layer` adds to it."""
    wanted = dtype if piece.dtype.is_floating_point else piece.dtype
    if layer is None:
        return piece._replace(dtype=wanted)
    return piece._replace(dtype=wanted, blocks=lambda: _folded(layer, piece))


def _folded(layer: Any, piece: Piece) -> Iterator[Tensor]:
    """The weight of a layer with its LoRA added, in float32. Raises InputError where that is not finite."""
    weight = _whole(piece)
    base = layer.get_base_layer()
    empty, base.weight = base.weight, nn.Parameter(weight, requires_grad=False)
    layer.merge()
    if not torch.isfinite(base.weight).all():
        raise InputError(f"{piece.name} with its LoRA is not finite", fix="Use another checkpoint of the run.")
    yield base.weight.data
    base.weight = empty
    layer.merged_adapters.clear()


def _whole(piece: Piece) -> Tensor:
    """A tensor in float32."""
    whole, done = torch.empty(piece.shape), 0
    for block in piece.blocks():
        whole.view(-1)[done : done + block.numel()] = block.reshape(-1)
        done += block.numel()
    return whole


def _as_quantized(piece: Piece, kind: Quantization) -> Piece:
    """A weight as training in `kind` had it, in float32."""
    return piece._replace(dtype=torch.float32, blocks=lambda: iter([dequantized(_whole(piece), kind)]))


def _generation_config(base: str, bare: Any) -> Any:
    """How the base generates by default: as its files say, or as its config does."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(base)
    except OSError:
        return bare.generation_config


def _config(config: Any, dtype: torch.dtype, *, tied: bool) -> dict[str, Any]:
    """config.json of the whole model, of which only the thinker is there."""
    name = str(dtype).removeprefix("torch.")
    inner = {**_in_precision(_without_places(config.to_dict()), dtype), "dtype": name, "tie_word_embeddings": tied}
    inner["text_config"] = {**inner["text_config"], "tie_word_embeddings": tied}
    whole = {"architectures": [ARCHITECTURE], "model_type": "qwen2_5_omni", "enable_audio_output": False}
    return {**whole, "dtype": name, "tie_word_embeddings": tied, "thinker_config": inner}


def _in_precision(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The config of a chat model whose weights are `dtype` throughout, and which does not speak."""
    name = str(dtype).removeprefix("torch.")
    changed = {
        key: _in_precision(value, dtype) if isinstance(value, dict) else name if key == "dtype" else value
        for key, value in config.items()
    }
    return changed | ({"enable_audio_output": False} if "enable_audio_output" in config else {})


def _untied(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a model whose language head has weights of its own."""
    inner = {key: _untied(value) if isinstance(value, dict) else value for key, value in config.items()}
    return inner | {"tie_word_embeddings": False} if "tie_word_embeddings" in inner else inner


def _without_places(config: dict[str, Any]) -> dict[str, Any]:
    """A config without the folders on this machine that its parts were read from."""
    kept = {key: value for key, value in config.items() if key != "_name_or_path"}
    return {key: _without_places(value) if isinstance(value, dict) else value for key, value in kept.items()}
