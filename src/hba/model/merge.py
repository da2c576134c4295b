"""A checkpoint as one full model that needs neither PEFT nor hba: LoRA folded in, laid out as the backbone's release.

The folder holds the thinker's weights under `thinker.`, and a config.json of the whole Qwen2.5-Omni with the speaking
part switched off: `Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained`, vLLM and verl expect both. Heads and
adapters lie beside it, so that it is a checkpoint of hba, too. LoRA is folded in float32 and rounded once.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

from hba.atlas.config import EncodeConfig
from hba.errors import InputError
from hba.model import chat, checkpoint
from hba.model.omni import OmniSapiens
from hba.model.released import Release, load_released
from hba.storage import atomic_folder, write_json

# The class name by which every version of vLLM finds its thinker.
ARCHITECTURE = "Qwen2_5OmniModel"
PREFIX = "thinker."  # of a thinker's parameters in the whole model
BESIDE = ("heads.safetensors", "bam")


def merge_checkpoint(path: str | Path, out: Path, *, dtype: str = "bfloat16") -> None:
    """Write the checkpoint or the best of the run folder `path` as a full model into the new folder `out`.

    `dtype` is bfloat16, as the backbone is published, or float32. Raises InputError when `path` is neither a
    checkpoint nor a run, or `out` is taken.
    """
    folder = checkpoint.resolve(path)
    if folder is None:
        raise InputError("a plain backbone: nothing to merge", where=str(path), fix="Name a run or a checkpoint.")
    require_free(out)
    card, wanted = checkpoint.read_card(folder), checkpoint.resolve_dtype(dtype)
    with atomic_folder(out) as new:
        if card["columns"] is None and not _is_thinker(folder, card):
            _merge_chat_model(folder, new, wanted, card)
        else:
            write_full(checkpoint.load(folder, dtype="float32"), new, dtype=wanted, card=card)
        for name in BESIDE:
            if (folder / name).is_dir():
                shutil.copytree(folder / name, new / name)
            elif (folder / name).is_file():
                shutil.copyfile(folder / name, new / name)


def merge_released(path: Path, out: Path, release: Release, *, dtype: str = "bfloat16") -> None:
    """Write a checkpoint that the authors released (see released.py) as a full model into the new folder `out`."""
    require_free(out)
    model = load_released(path, release)
    name = str(release.backbone or chat.backbone_of(str(release.onto)))
    encode = checkpoint.encode_config(release.onto) if release.onto is not None else None
    base = checkpoint.resolve(release.onto) if release.onto is not None else None
    domains = None if base is None else checkpoint.read_card(base).get("domains")
    kept: dict[str, Any] = {"encode": encode or EncodeConfig(), "speaks": model.speaks, "domains": domains}
    with atomic_folder(out) as new:
        checkpoint.save(model, new, backbone=name, strategy="heads", **kept)
        write_full(model, new, dtype=checkpoint.resolve_dtype(dtype), card=checkpoint.read_card(new))


def require_free(out: Path) -> None:
    """Raise InputError when `out` exists: a model is not written over something else."""
    if out.exists():
        raise InputError("exists already", where=str(out), fix="Name a new folder, or remove this one.")


def write_full(model: OmniSapiens, folder: Path, *, dtype: torch.dtype, card: dict[str, Any]) -> None:
    """Write thinker, processor and `hba.json` (`card`, as of strategy full) into `folder`. Folds the model's LoRA."""
    thinker = fold_lora(model.thinker)
    write_thinker(thinker, folder, dtype=dtype)
    if thinker.generation_config is not None:
        thinker.generation_config.save_pretrained(folder)
    model.processor.save_pretrained(folder)
    write_json(folder / checkpoint.CARD, {**card, "strategy": "full"})


def write_thinker(thinker: Any, folder: Path, *, dtype: torch.dtype) -> None:
    """Write weights and config.json of a thinker without LoRA layers into `folder`, named as in the whole model."""
    weights: dict[str, Tensor] = thinker.state_dict()
    tied = weights["lm_head.weight"].data_ptr() == weights["model.embed_tokens.weight"].data_ptr()
    if tied:
        del weights["lm_head.weight"]
    rounded = {f"{PREFIX}{name}": t.to(dtype) if t.is_floating_point() else t for name, t in weights.items()}
    save_torch_state_dict(rounded, folder)
    write_json(folder / "config.json", _config(thinker, dtype, tied=tied))


def _is_thinker(folder: Path, card: dict[str, Any]) -> bool:
    from transformers import AutoConfig

    name = folder if card["strategy"] == "full" else card["backbone"]
    return is_thinker(AutoConfig.from_pretrained(name))


def is_thinker(config: Any) -> bool:
    """Whether `config` is of a Qwen2.5-Omni, or of its thinker."""
    return str(config.model_type).startswith("qwen2_5_omni")


def _merge_chat_model(folder: Path, out: Path, dtype: torch.dtype, card: dict[str, Any]) -> None:
    """What generative training made of any other chat model, as transformers writes its class."""
    from peft import PeftModel

    whole = card["strategy"] == "full"
    model = chat.load(folder if whole else card["backbone"], dtype="float32")
    transformer = model.transformer
    if not whole:
        transformer = PeftModel.from_pretrained(transformer, folder).merge_and_unload(safe_merge=True)
    transformer.to(dtype).save_pretrained(out)
    model.processor.save_pretrained(out)
    write_json(out / checkpoint.CARD, {**card, "strategy": "full"})


def fold_lora(module: Any) -> Any:
    """`module` with the weights of its LoRA layers added to those below, and the layers gone. ValueError for NaN."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                child.merge(safe_merge=True)
                setattr(parent, name, child.get_base_layer())
    return module


def _config(thinker: nn.Module, dtype: torch.dtype, *, tied: bool) -> dict[str, Any]:
    """config.json of the whole model, of which only the thinker is there."""
    name = str(dtype).removeprefix("torch.")
    inner: dict[str, Any] = {**_without_places(thinker.config.to_dict()), "dtype": name, "tie_word_embeddings": tied}  # type: ignore[union-attr,operator]
    inner["text_config"] = {**inner["text_config"], "tie_word_embeddings": tied}
    whole = {"architectures": [ARCHITECTURE], "model_type": "qwen2_5_omni", "enable_audio_output": False}
    return {**whole, "dtype": name, "tie_word_embeddings": tied, "thinker_config": inner}


def _without_places(config: dict[str, Any]) -> dict[str, Any]:
    """A config without the folders on this machine that its parts were read from."""
    kept = {key: value for key, value in config.items() if key != "_name_or_path"}
    return {key: _without_places(value) if isinstance(value, dict) else value for key, value in kept.items()}
