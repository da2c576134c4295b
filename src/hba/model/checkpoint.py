"""OmniSapiens on disk, by Hugging Face conventions.

A checkpoint folder holds `hba.json` (backbone, strategy, head columns, how samples are encoded), `heads.safetensors`,
the processor, and either the whole thinker (`model.safetensors`, strategy full), a PEFT adapter (lora) or nothing more
(heads). Folders are written whole or not at all; nothing is unpickled.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hba.atlas.batch import EncodeConfig
from hba.errors import InputError
from hba.model.heads import DomainHeads
from hba.model.omni import OmniSapiens, Strategy
from hba.storage import read_json, write_json
from hba.taxonomy import BUILTIN, Taxonomy

FORMAT = 1
CARD = "hba.json"
_DAMAGED = "Use another checkpoint of the run, or train again."


def save(model: OmniSapiens, folder: Path, *, backbone: str, strategy: Strategy, encode: EncodeConfig) -> None:
    """Write a checkpoint into `folder` (which the caller makes atomic)."""
    folder.mkdir(parents=True, exist_ok=True)
    if strategy in ("lora", "full"):
        model.thinker.save_pretrained(folder)
    save_file({k: v.contiguous().cpu() for k, v in model.heads.state_dict().items()}, folder / "heads.safetensors")
    model.processor.save_pretrained(folder)
    card = {
        "format": FORMAT,
        "backbone": backbone,
        "strategy": strategy,
        "columns": model.heads.columns,
        "encode": asdict(encode),
    }
    write_json(folder / CARD, card)


def load(
    path: str | Path, *, dtype: str = "auto", attention: str = "sdpa", taxonomy: Taxonomy = BUILTIN
) -> OmniSapiens:
    """An OmniSapiens from a checkpoint folder, a run folder (its best checkpoint), or a backbone with fresh heads.

    `dtype` is auto (bfloat16 on GPUs that have it, else float32), float32 or bfloat16. Raises InputError when the
    folder is none of these or of a newer format.
    """
    folder = resolve(path)
    if folder is None:
        thinker, processor = _backbone(str(path), dtype, attention), _processor(str(path))
        hidden = int(thinker.config.get_text_config().hidden_size)
        return OmniSapiens(thinker, DomainHeads.for_taxonomy(hidden, taxonomy), processor)
    card = read_card(folder)
    whole = card["strategy"] == "full"
    thinker = _backbone(str(folder) if whole else card["backbone"], dtype, attention)
    if card["strategy"] == "lora":
        thinker.load_adapter(str(folder))
    hidden = int(thinker.config.get_text_config().hidden_size)
    if card["columns"] is None:  # generative training leaves no heads that would fit
        return OmniSapiens(thinker, DomainHeads.for_taxonomy(hidden, taxonomy), _processor(str(folder)))
    heads = DomainHeads(hidden, card["columns"])
    try:
        heads.load_state_dict(load_file(folder / "heads.safetensors"))
    except (OSError, SafetensorError, RuntimeError) as error:
        what = f"cannot load the heads ({str(error).splitlines()[0]})"
        raise InputError(what, where=str(folder / "heads.safetensors"), fix=_DAMAGED) from error
    return OmniSapiens(thinker, heads, _processor(str(folder)))


def resolve(path: str | Path) -> Path | None:
    """The checkpoint folder that `path` means: itself, or the best of a run folder. None for a plain backbone."""
    folder = Path(path)
    if (folder / CARD).is_file():
        return folder
    best = folder / "checkpoints" / "best.json"
    if best.is_file():
        return folder / "checkpoints" / f"step_{read_json(best)['step']}"
    if (folder / "checkpoints").is_dir() or (folder.is_dir() and not (folder / "config.json").is_file()):
        fix = "Give a checkpoint, a run folder with a finished validation, or a Hugging Face model."
        raise InputError("no checkpoint here", where=str(folder), fix=fix)
    return None


def read_card(folder: Path) -> dict[str, Any]:
    """`hba.json` of a checkpoint. Raises InputError when its format is unknown."""
    card: dict[str, Any] = read_json(folder / CARD)
    if card.get("format") != FORMAT:
        found = f"checkpoint format {card.get('format')!r}, expected {FORMAT}"
        raise InputError(found, where=str(folder / CARD), fix="Use the hba version that wrote it.")
    return card


def encode_config(path: str | Path) -> EncodeConfig | None:
    """How the samples of a checkpoint's training were encoded; None for a plain backbone."""
    folder = resolve(path)
    return None if folder is None else TypeAdapter(EncodeConfig).validate_python(read_card(folder)["encode"])


def resolve_dtype(dtype: str) -> torch.dtype:
    """The torch dtype of a config value; auto is bfloat16 on GPUs that have it, else float32."""
    if dtype == "auto":
        dtype = "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in known:
        raise InputError(f"unknown dtype {dtype!r}", fix=f"Known: auto, {', '.join(known)}.")
    return known[dtype]


def _backbone(name: str, dtype: str, attention: str) -> Any:
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    return pretrained(Qwen2_5OmniThinkerForConditionalGeneration, name, dtype, attention)


def pretrained(model_class: Any, name: str, dtype: str, attention: str) -> Any:
    """A transformers model from a folder or the hub. Raises InputError when it cannot be loaded."""
    try:
        return model_class.from_pretrained(name, dtype=resolve_dtype(dtype), attn_implementation=attention)
    except (OSError, SafetensorError) as error:
        fix = "Check the name; a hub model needs a network or a filled cache."
        raise InputError(f"cannot load backbone ({str(error).splitlines()[0]})", where=name, fix=fix) from error
    except ImportError as error:
        fix = "Install it, or use model.attention=sdpa."
        raise InputError(f"{attention} is not installed ({str(error).splitlines()[0]})", where=name, fix=fix) from error


def _processor(name: str) -> Any:
    from transformers import Qwen2_5OmniProcessor

    try:
        return Qwen2_5OmniProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        what = f"cannot load the processor ({str(error).splitlines()[0]})"
        raise InputError(what, where=name, fix=_DAMAGED) from error


def describe(path: str | Path) -> str:
    """What `path` means, for provenance: the step folder of a checkpoint, or the backbone's name."""
    folder = resolve(path)
    return str(path) if folder is None else folder.name
