"""OmniSapiens on disk, by Hugging Face conventions.

A checkpoint folder holds `hba.json` (backbone, strategy, head columns, how samples are encoded), `heads.safetensors`,
the processor, and either the whole thinker (`model.safetensors`, strategy full), a PEFT adapter (lora) or nothing more
(heads). Stage 2 adds `lm_head.safetensors`, stage 3 `bam/` (see bam.py); what they left frozen is linked from the
checkpoint that they stand on. Folders are written whole or not at all; nothing is unpickled.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hba.atlas.config import EncodeConfig
from hba.atlas.hub_id import parse_hub_id
from hba.errors import InputError
from hba.model.bam import FOLDER, load_bam, save_bam
from hba.model.config import Strategy
from hba.model.heads import DomainHeads
from hba.model.names import require_place
from hba.model.omni import OmniSapiens
from hba.storage import file_sha256, json_sha256, read_json, write_json
from hba.taxonomy import BUILTIN, Taxonomy

FORMAT = 1
CARD = "hba.json"
HEADS, LM_HEAD = "heads.safetensors", "lm_head.safetensors"
_STATE_OF_TRAINING = ("optimizer", "trainer_state")  # files of a run's checkpoint that are none of its model
_DAMAGED = "Use another checkpoint of the run, or train again."


def save(
    model: OmniSapiens,
    folder: Path,
    *,
    backbone: str,
    strategy: Strategy,
    encode: EncodeConfig,
    speaks: bool = False,
    domains: list[str] | None = None,
) -> None:
    """Write a checkpoint into `folder` (which the caller makes atomic).

    `speaks` says that training has taught the model to answer free-form rows in words; `domains` are those whose heads
    have seen rows, None all of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if strategy in ("lora", "full"):
        model.thinker.save_pretrained(folder)
    save_heads(model.heads, folder)
    if model.own_lm_head:
        save_lm_head(model.thinker.lm_head.weight, folder)
    if model.bam is not None:
        save_bam(model.bam, folder)
    model.processor.save_pretrained(folder)
    card = {
        "format": FORMAT,
        "backbone": backbone,
        "strategy": strategy,
        "columns": model.heads.columns,
        "encode": asdict(encode),
        "speaks": speaks,
        "domains": domains,
    }
    write_json(folder / CARD, card)


def save_heads(heads: DomainHeads, folder: Path) -> None:
    """Write `heads.safetensors`."""
    save_file({k: v.contiguous().cpu() for k, v in heads.state_dict().items()}, folder / HEADS)


def save_lm_head(weight_VH: Tensor, folder: Path) -> None:
    """Write `lm_head.safetensors`."""
    save_file({"weight": weight_VH.detach().contiguous().cpu()}, folder / LM_HEAD)


def link(base: Path, folder: Path, *, without: Sequence[str] = (), **changes: Any) -> None:
    """Put the files of the checkpoint `base` into `folder` but for those named in `without`, and change its card.

    Files are linked where the file system allows it, else copied: what a stage left frozen costs no space.
    """
    for file in base.rglob("*"):
        name = file.relative_to(base).as_posix()
        skipped = file.is_dir() or name in (CARD, *without) or name.split("/")[0] in without
        if skipped or name.startswith(_STATE_OF_TRAINING):
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, folder / name)
        except OSError:
            shutil.copyfile(file, folder / name)
    write_json(folder / CARD, {**read_card(base), **changes})


def trained_hash(folder: Path) -> str:
    """SHA-256 of what was trained on top of the backbone: the heads, with lm_head and adapters where there are any."""
    later = [file for file in (folder / LM_HEAD, *sorted((folder / FOLDER).glob("*.safetensors"))) if file.is_file()]
    heads = file_sha256(folder / HEADS)
    return json_sha256([heads, *map(file_sha256, later)]) if later else heads


def backbone_hashes(folder: Path) -> dict[str, str]:
    """What decides the hidden states of a checkpoint: SHA-256 of its weights, and of the backbone that it stands on.

    A backbone of the hub is named with the commit that the cache holds.
    """
    card = read_card(folder)
    others = (HEADS, LM_HEAD, *_STATE_OF_TRAINING)
    found = {f.name: file_sha256(f) for f in folder.glob("*.safetensors") if not f.name.startswith(others)}
    if card["strategy"] == "full":
        return found
    backbone = Path(card["backbone"])
    if backbone.is_dir():
        return found | {f"backbone/{f.name}": file_sha256(f) for f in backbone.glob("*.safetensors")}
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(card["backbone"], "config.json")
    return found | {"backbone": f"{card['backbone']}@{Path(cached).parent.name if isinstance(cached, str) else None}"}


def load(
    path: str | Path, *, dtype: str = "auto", attention: str = "sdpa", taxonomy: Taxonomy = BUILTIN
) -> OmniSapiens:
    """An OmniSapiens from a checkpoint folder, a run folder (its best checkpoint), or a backbone with fresh heads.

    `dtype` is auto (bfloat16 on GPUs that have it, else float32), float32 or bfloat16. Raises InputError when the
    folder is none of these or of a newer format.
    """
    folder = resolve(path)
    if folder is None:
        thinker, processor = _backbone(str(path), dtype, attention), load_processor(path)
        hidden = int(thinker.config.get_text_config().hidden_size)
        return OmniSapiens(thinker, DomainHeads.for_taxonomy(hidden, taxonomy), processor)
    card = read_card(folder)
    whole = card["strategy"] == "full"
    thinker = _backbone(str(folder) if whole else card["backbone"], dtype, attention)
    if card["strategy"] == "lora":
        thinker.load_adapter(str(folder))
    hidden = int(thinker.config.get_text_config().hidden_size)
    if card["columns"] is None:  # generative training leaves no heads that would fit
        return OmniSapiens(thinker, DomainHeads.for_taxonomy(hidden, taxonomy), load_processor(folder))
    model = OmniSapiens(thinker, load_heads(folder), load_processor(folder), load_bam(folder, hidden))
    model.speaks = bool(card.get("speaks", False))
    if (folder / LM_HEAD).is_file():
        model.own_lm_head = True
        model.untie_lm_head()
        model.thinker.lm_head.load_state_dict(_tensors(folder / LM_HEAD))
    return model


def load_heads(folder: Path) -> DomainHeads:
    """The heads of a checkpoint folder alone. Raises InputError when they are damaged."""
    tensors, columns = _tensors(folder / HEADS), read_card(folder)["columns"]
    try:
        heads = DomainHeads(tensors[f"linear.{next(iter(columns))}.weight"].shape[1], columns)
        heads.load_state_dict(tensors)
    except (RuntimeError, KeyError) as error:
        what = f"cannot load the heads ({str(error).splitlines()[0]})"
        raise InputError(what, where=str(folder / HEADS), fix=_DAMAGED) from error
    return heads


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        what = f"cannot load the {file.stem} ({str(error).splitlines()[0]})"
        raise InputError(what, where=str(file), fix=_DAMAGED) from error
    return tensors


def resolve(path: str | Path) -> Path | None:
    """The checkpoint folder that `path` means: itself, the best of a run folder, or one of the hub, downloaded first.

    None for a plain backbone. Raises InputError when there is no such folder, when there is no model in it, and when
    the hub cannot be asked.
    """
    require_place(path)
    folder = Path(path)
    if not folder.is_dir():
        from hba.model.hub_model import hub_checkpoint  # the hub's client is not needed for what lies here

        return hub_checkpoint(*parse_hub_id(str(path)), CARD)
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


def load_processor(name: str | Path) -> Any:
    """The processor of a checkpoint or backbone. Raises InputError when it cannot be loaded."""
    from transformers import Qwen2_5OmniProcessor

    try:
        return Qwen2_5OmniProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        what = f"cannot load the processor ({str(error).splitlines()[0]})"
        raise InputError(what, where=str(name), fix=_DAMAGED) from error


def describe(path: str | Path) -> str:
    """What `path` means, for provenance: the step folder of a checkpoint, or the backbone's name."""
    folder = resolve(path)
    return str(path) if folder is None else folder.name
