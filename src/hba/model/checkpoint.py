"""OmniSapiens on disk, by Hugging Face conventions.

A checkpoint folder holds `hba.json` (backbone, strategy, head columns, how samples are encoded), `heads.safetensors`,
the processor, and either the whole thinker (`model.safetensors`, strategy full), a PEFT adapter (lora) or nothing more
(heads). Stage 2 adds `lm_head.safetensors`, stage 3 `bam/` (see bam.py); what they left frozen is linked from the
checkpoint that they stand on. Folders are written whole or not at all; nothing is unpickled.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from importlib.util import find_spec
from json import JSONDecodeError
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from hba.atlas import Atlas
from hba.atlas.names import hub_id_of, parse_hub_id
from hba.batch.config import EncodeConfig
from hba.batch.encode import TextProcessor, VoxtralProcessor, give_template, tekken_tokenizer
from hba.batch.encode import require_perceived as require_perceived_by
from hba.errors import ConfigError, InputError, nearest
from hba.model.bam import FOLDER
from hba.model.config import AsTrained, Quantization, Strategy, computes_bfloat16, require_gpu_package, require_place
from hba.model.heads import DomainHeads
from hba.model.weights import (
    Fit,
    Weights,
    fit,
    give_precision,
    keep_precision,
    lacks_package,
    language_layers,
    open_tensors,
    quantize,
    read_tensors,
    silence_transformers,
    skeleton,
    some,
    without_load_reports,
)
from hba.storage import file_sha256, json_sha256, lacks_memory, plural, read_json, write_json

FORMAT = 1
CARD = "hba.json"
HEADS, LM_HEAD = "heads.safetensors", "lm_head.safetensors"
_STATE_OF_TRAINING = ("optimizer", "trainer_state")  # files of a run's checkpoint that are none of its model
_SETTINGS = (".json", ".jinja", ".txt", ".model")  # files of a model that are not weights
ADAPTER = "adapter_model.safetensors"
# Of these the class in transformers' own list is the model with its talker, which is left out.
THINKERS = {
    "qwen2_5_omni": "Qwen2_5OmniThinkerForConditionalGeneration",
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration",
}
_DAMAGED = "Use another checkpoint of the run, or train again."
OTHER_BACKBONE = f"Check that {CARD} names the backbone that it was trained on. {_DAMAGED}"


def new_card(
    backbone: str,
    strategy: Strategy,
    encode: EncodeConfig,
    *,
    columns: Mapping[str, Sequence[int]] | None = None,
    speaks: bool = False,
    domains: list[str] | None = None,
    formats: Sequence[str] = (),
    quantization: Quantization = "none",
) -> dict[str, Any]:
    """What `hba.json` says of a checkpoint.

    `columns` None for one without heads; `formats` are the answer formats that it was trained in, where it speaks;
    `quantization` is that of the backbone that it was trained on.
    """
    return {
        "format": FORMAT,
        "backbone": backbone,
        "strategy": strategy,
        "columns": columns,
        "encode": asdict(encode),
        "speaks": speaks,
        "domains": domains,
        "formats": list(dict.fromkeys(formats)),
        "quantization": quantization,
    }


def quantization_of(card: Mapping[str, Any] | None) -> Quantization:
    """That of the backbone on which the checkpoint with this `hba.json` was trained; None for a plain backbone."""
    found: Quantization = "none" if card is None else card.get("quantization", "none")
    return found


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
    card = read_card(base)
    backbone = card["backbone"] if card["strategy"] == "full" else place_of(base_of(base))
    write_json(folder / CARD, {**card, "backbone": backbone, **changes})


def trained_hash(folder: Path) -> str:
    """SHA-256 of what was trained on top of the backbone: the heads, with lm_head and adapters where there are any."""
    later = [file for file in (folder / LM_HEAD, *sorted((folder / FOLDER).glob("*.safetensors"))) if file.is_file()]
    heads = file_sha256(folder / HEADS)
    return json_sha256([heads, *map(file_sha256, later)]) if later else heads


def backbone_hashes(folder: Path) -> dict[str, str]:
    """What decides the hidden states of a checkpoint: SHA-256 of its weights, and of the backbone that it stands on.

    A backbone of the hub is named with its commit.
    """
    card = read_card(folder)
    others = (HEADS, LM_HEAD, *_STATE_OF_TRAINING)
    found = {f.name: file_sha256(f) for f in folder.glob("*.safetensors") if not f.name.startswith(others)}
    if card["strategy"] == "full":
        return found
    base = base_of(folder)
    if Path(base).is_dir():
        return found | {f"backbone/{f.name}": file_sha256(f) for f in Path(base).glob("*.safetensors")}
    return found | {"backbone": _revision(base)}


def settings_hash(folder: Path) -> str:
    """SHA-256 of the files of a model that say how it and its processor work: settings, vocabulary, chat template; of a
    checkpoint, with the config of its backbone."""
    others = (CARD, "trainer_state.json")
    files = [f for f in sorted(folder.iterdir()) if f.suffix in _SETTINGS and f.name not in others]
    if (folder / CARD).is_file():
        files += [f for f in (Path(base_of(folder)) / "config.json",) if f.is_file()]
    return json_sha256([[f.name, file_sha256(f)] for f in files])


def identity(
    name: str | Path, *, dtype: str, attention: str | None = None, quantization: AsTrained = "none"
) -> dict[str, str]:
    """What decides the words of the model `name`, by content, wherever it lies: its weights, the files that say how it
    works, and what it computes in, `dtype` and `quantization` as `OmniSapiens.from_pretrained` has them. A model of the
    hub is its name and commit. A checkpoint is also called by the name of its folder.

    Raises InputError when there is no such model.
    """
    folder = resolve(name)
    found = {"checkpoint": folder.name} if folder is not None else {}
    if folder is not None:
        weights = backbone_hashes(folder)
        if (folder / LM_HEAD).is_file():
            weights[LM_HEAD] = file_sha256(folder / LM_HEAD)
        ends = Path(base_of(folder)) / "generation_config.json"
        settings = [settings_hash(folder), file_sha256(ends) if ends.is_file() else None]
        found |= {"model": json_sha256(weights), "settings": json_sha256(settings)}
    elif Path(name).is_dir():
        weights = {file.name: file_sha256(file) for file in Path(name).glob("*.safetensors")}
        found |= {"model": json_sha256(weights), "settings": settings_hash(Path(name))}
    else:
        found["model"] = _revision(str(name))
    found["dtype"] = str(resolve_dtype(dtype)).removeprefix("torch.")
    card = None if folder is None else read_card(folder)
    kind = quantization_of(card) if quantization == "auto" else quantization
    if kind != "none":
        found["quantization"] = kind
    return found if attention is None else {**found, "attention": attention}


def _revision(name: str) -> str:
    """A model of the hub with the commit that the cache holds, into which its config is put where it is not yet."""
    from huggingface_hub import try_to_load_from_cache

    read_config(name)
    cached = try_to_load_from_cache(name, "config.json")
    return f"{name}@{Path(cached).parent.name if isinstance(cached, str) else None}"


def load_heads(folder: Path) -> DomainHeads:
    """The heads of a checkpoint folder alone. Raises InputError when they are damaged or others than its card names."""
    tensors, columns = read_tensors(folder / HEADS, "the heads", _DAMAGED), read_card(folder)["columns"]
    try:
        heads = DomainHeads(tensors[f"linear.{next(iter(columns))}.weight"].shape[1], columns)
        heads.load_state_dict(tensors)
    except (RuntimeError, KeyError, IndexError) as error:
        what = f"cannot load the heads ({' '.join(str(error).split())})"
        raise InputError(what, where=str(folder / HEADS), fix=_DAMAGED) from error
    return heads


def load_lm_head(folder: Path, shape: Sequence[int]) -> Tensor:
    """The weights [V, H] of `lm_head.safetensors`. Raises InputError when it is damaged or of another shape."""
    return stored_lm_head(folder, shape).read("weight")


def stored_lm_head(folder: Path, shape: Sequence[int]) -> Weights:
    """`lm_head.safetensors`, whose one tensor is `weight`. Raises InputError when it is damaged or of another shape."""
    weights = open_tensors(folder / LM_HEAD, "the lm_head", _DAMAGED)
    found = {name: list(each.shape) for name, each in weights.stored.items()}
    if found != {"weight": list(shape)}:
        what = f"cannot load the lm_head: expected weight {list(shape)}, found {found}"
        raise InputError(what, where=str(folder / LM_HEAD), fix=_DAMAGED)
    return weights


def resolve(path: str | Path) -> Path | None:
    """The checkpoint folder that `path` means: itself, the best of a run folder, or one of the hub, downloaded first.

    None for a plain backbone. Raises InputError when there is no such folder, when there is no model in it, and when
    the hub cannot be asked.
    """
    require_place(path)
    folder = Path(path)
    if not folder.is_dir():
        return hub_checkpoint(*parse_hub_id(str(path)), CARD)
    if (folder / CARD).is_file():
        return folder
    best = folder / "checkpoints" / "best.json"
    if best.is_file():
        return folder / "checkpoints" / f"step_{read_json(best)['step']}"
    if any(folder.glob("*.gguf")) and not (folder / "config.json").is_file():
        fix = "Give the model that they were made from; model.quantization=nf4 has its layers in 4 bits."
        raise InputError("holds weights for llama.cpp (GGUF), which are not read", where=str(folder), fix=fix)
    if (folder / "checkpoints").is_dir() or (folder.is_dir() and not (folder / "config.json").is_file()):
        fix = "Give a checkpoint, a run folder with a finished validation, or a Hugging Face model."
        raise InputError("no checkpoint here", where=str(folder), fix=fix)
    return None


# What of a repository is fetched; nothing of it is executed.
_FETCHED = ("*.json", "*.jinja", "*.safetensors", "*.txt", "*.yaml")


@cache
def hub_checkpoint(repo: str, revision: str | None, card: str) -> Path | None:
    """The checkpoint `repo`, as `hba push` sends it, in the hub's cache, downloaded first; None for one without `card`.

    Resolved to a commit once a process; everything after is of that commit. None also for a repository that is not
    there or not shown, which whoever loads it as a backbone reports. Raises InputError when the hub cannot be reached
    or the download breaks off: a checkpoint that is taken for a backbone would answer with heads that nothing has
    trained. What is in the cache already decides without it, and so it does offline (HF_HUB_OFFLINE=1).
    """
    # Imported here: the hub's client is not needed for what lies on this machine.
    from huggingface_hub import constants, errors, get_session, hf_hub_download, snapshot_download
    from huggingface_hub import try_to_load_from_cache as cached

    from hba.remote.request import BROKEN_OFF, NO_ANSWER, proxies_checked, shown

    in_cache = isinstance(cached(repo, "config.json", revision=revision), str)
    known = in_cache or isinstance(cached(repo, card, revision=revision), str)
    try:
        with proxies_checked():
            if not (known or constants.HF_HUB_OFFLINE):
                # A download tries again for half a minute, which is too long where a path was mistyped.
                with suppress(*BROKEN_OFF):
                    seconds = constants.HF_HUB_ETAG_TIMEOUT
                    get_session().head(constants.ENDPOINT, timeout=seconds, follow_redirects=False)
            found = Path(hf_hub_download(repo, card, revision=revision))
            return Path(snapshot_download(repo, revision=found.parent.name, allow_patterns=list(_FETCHED)))
    except (errors.RemoteEntryNotFoundError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        return None
    except (errors.HfHubHTTPError, *NO_ANSWER) as error:
        # The card of a checkpoint is fetched first: a cache that has files and no card holds a backbone.
        if isinstance(error, errors.LocalEntryNotFoundError) and (constants.HF_HUB_OFFLINE or in_cache):
            return None
        what = f"no such folder on this machine, and the hub at {shown(constants.ENDPOINT)} gives no answer"
        fix = "Check name and network, then run it again; with HF_HUB_OFFLINE=1 what was downloaded before is used."
        raise InputError(what, where=repo, fix=fix) from None


def read_card(folder: Path) -> dict[str, Any]:
    """`hba.json` of a checkpoint. Raises InputError when its format is unknown."""
    card: dict[str, Any] = read_json(folder / CARD)
    if card.get("format") != FORMAT:
        found = f"checkpoint format {card.get('format')!r}, expected {FORMAT}"
        raise InputError(found, where=str(folder / CARD), fix="Use the hba version that wrote it.")
    return card


def encode_config(path: str | Path) -> EncodeConfig | None:
    """How samples reach the model `path`: as in its training. Every backend on this machine asks here.

    None for a plain backbone, which does not say.
    """
    folder = resolve(path)
    return None if folder is None else TypeAdapter(EncodeConfig).validate_python(read_card(folder)["encode"])


def answer_formats(path: str | Path) -> tuple[str, ...] | None:
    """The answer formats that a checkpoint was trained in, none where it does not say; None for a plain backbone."""
    folder = resolve(path)
    return None if folder is None else tuple(read_card(folder).get("formats") or ())


def resolve_dtype(dtype: str) -> torch.dtype:
    """The torch dtype of a config value; auto is bfloat16 on GPUs that compute in it, else float32."""
    if dtype == "auto":
        capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
        dtype = "bfloat16" if computes_bfloat16(capability) else "float32"
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in known:
        raise InputError(f"unknown dtype {dtype!r}", fix=nearest(dtype, ["auto", *known]))
    return known[dtype]


def require_attention(attention: str, dtype: str = "bfloat16", *, where: str = "attention") -> None:
    """Raise ConfigError where flash attention cannot be had: without a GPU, its package, or a `dtype` of 16 bits."""
    if attention != "flash_attention_2":
        return
    require_gpu_package(where, attention, "flash_attn", "flash-attn", "sdpa")
    if resolve_dtype(dtype) is torch.float32:
        what = f"{attention} computes in bfloat16, and the model in float32"
        raise ConfigError(what, where=where, fix=f"Use dtype bfloat16, or {where}=sdpa.")


def base_of(folder: Path) -> str:
    """The folder or hub id whose weights a checkpoint stands on: its own, where everything was trained.

    Raises InputError for a folder that is gone, naming where it was looked for.
    """
    card = read_card(folder)
    if card["strategy"] == "full":
        return str(folder)
    name = str(card["backbone"])
    # Checkpoints of older versions have the path as it was typed, relative to where training was started.
    looked = [Path(name)] if Path(name).is_absolute() else [Path(name), *(p / name for p in folder.absolute().parents)]
    found = next((place for place in looked if place.is_dir()), None)
    if found is not None:
        return str(found.absolute())
    if Path(name).is_absolute() or hub_id_of(name) is None:
        raise _gone(folder, looked)
    return name


def backbone_of(path: str) -> str:
    """The model that an adapter trained from `path` stands on: that of its card, where it has one."""
    folder = resolve(path)
    return place_of(path if folder is None else base_of(folder))


def require_heads(path: str | Path) -> Path:
    """The checkpoint folder that `path` means. Raises InputError for a backbone, and for a model without heads."""
    folder = resolve(path)
    if folder is None or read_card(folder)["columns"] is None:
        fix = "Name a run or a checkpoint; `hba merge --backbone` makes one of the released SFT model."
        raise InputError("has no heads for adapters", where=str(path), fix=fix)
    return folder


def require_config(folder: Path, base: str) -> None:
    """Raise InputError when the checkpoint `folder` stands on a model `base` of the hub that cannot be had.

    It may have been the path of a folder that is gone: both are said.
    """
    if not Path(base).is_dir():
        try:
            read_config(base)
        except InputError as error:
            raise _gone(folder, [Path(base), *(p / base for p in folder.absolute().parents)], error.what) from error


def _gone(folder: Path, looked: Sequence[Path], hub: str = "") -> InputError:
    places = some([str(place.absolute()) for place in looked])
    fix = f"Put it back, or write where it is now as `backbone` of {folder / CARD}."
    what = f"the backbone of this checkpoint is gone: no folder {places}"
    return InputError(f"{what}; on the hub: {hub}" if hub else what, where=str(folder), fix=fix)


def place_of(name: str) -> str:
    """A model's name as a checkpoint keeps it: that of a folder whole, so that it is found from anywhere."""
    return str(Path(name).absolute()) if Path(name).is_dir() else name


def read_config(name: str | Path) -> Any:
    """The config of a model of transformers. Raises InputError when there is none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RecursionError) as error:
        said = str(error)
        if "custom code" in said or "does not recognize this architecture" in said:
            what = "is of a kind that transformers does not know"
            if "custom code" in said:
                what = "brings its own code, which is not run: transformers does not know it"
            raise InputError(what, where=str(name), fix=_instead_of(name)) from error
        fix = "Check the name; a hub model needs a network or a filled cache."
        raise InputError(f"cannot load backbone ({said.splitlines()[0]})", where=str(name), fix=fix) from error
    except ImportError as error:
        raise lacks_package(str(name), error) from error


# Published models whose config names code of their own, and what to give in their place.
_HF = "Give its repository for transformers, whose name ends in -hf, where there is one."
_HEARING = "Use a model that hears and is in the table of docs/models.md, such as Voxtral or Qwen2-Audio."
_PHI4 = "Download its revision refs/pr/70 into a folder and give that: transformers knows it."
INSTEAD = {
    "internvl_chat": _HF,
    "llava_llama": _HF,  # Audio Flamingo 3 and Music Flamingo as NVIDIA's own code has them
    "llava_qwen": _HF,
    "videollama3_qwen2": _HF,
    "phi4mm": _PHI4,
    "minicpmo": "Use MiniCPM-V 4.6, or Qwen2.5-Omni where sound is heard.",
    "minicpmv": "Use MiniCPM-V 4.6.",
    "kimi_audio": _HEARING,
    "ultravox": _HEARING,
}


def _instead_of(name: str | Path) -> str:
    from transformers import PretrainedConfig

    kind = PretrainedConfig.get_config_dict(name)[0].get("model_type")
    return INSTEAD.get(str(kind), "Use a model that transformers knows.")


def backbone_class(name: str | Path) -> Any:
    """transformers' class for the model in a folder or on the hub. Raises InputError when there is none."""
    silence_transformers()
    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    )

    config = read_config(name)
    written = (getattr(config, "architectures", None) or [""])[0]
    kind = config.model_type
    known = THINKERS.get(kind) or MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.get(kind) or written
    known = known or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    found_class = getattr(transformers, known, None) if isinstance(known, str) else None
    if found_class is None or not found_class.can_generate():
        found = f"no chat model of type {kind!r} in transformers {transformers.__version__}"
        raise InputError(found, where=str(name), fix="Use a model that transformers knows; code of models is not run.")
    if getattr(config, "is_encoder_decoder", False):
        found = f"{found_class.__name__} reads prompts by an encoder, and has no states of them that heads could read"
        raise InputError(found, where=str(name), fix="Use a chat model whose prompt and answer are one text.")
    return found_class


def bare_backbone(name: str | Path) -> Any:
    """The model in a folder or on the hub without its weights (`skeleton`). Raises InputError as `backbone_class`."""
    model_class = backbone_class(name)
    return skeleton(model_class, model_class.config_class.from_pretrained(name))


def read_backbone_config(name: str | Path) -> Any:
    """The config of the part of a model that is loaded: all of it, but for what speaks. Raises InputError."""
    return backbone_class(name).config_class.from_pretrained(name)


def is_thinker(config: Any) -> bool:
    """Whether `config` is of a Qwen2.5-Omni, or of its thinker."""
    return str(config.model_type) in ("qwen2_5_omni", "qwen2_5_omni_thinker")


class LanguageHead(NamedTuple):
    """The language head of a class: the name of its weights, and their shape [V, H]."""

    name: str
    shape: tuple[int, int]


def language_head(name: str | Path) -> LanguageHead:
    """That of the model in a folder or on the hub, which is not loaded. Raises InputError for one with a bias."""
    bare = bare_backbone(name)
    head = bare.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise InputError("a language head with a bias is not trained alone", where=str(name), fix="Use another.")
    found = next(name for name, module in bare.named_modules() if module is head)
    return LanguageHead(f"{found}.weight", tuple(head.weight.shape))


def fit_backbone(name: str | Path) -> Fit:
    """Where the files of the folder or hub model `name` hold its weights. Raises InputError as `fit` does."""
    return _fit_named(str(name), bare_backbone(name))


def load_backbone(
    name: str,
    *,
    dtype: str,
    attention: str,
    mapped: bool = False,
    adapter: Path | None = None,
    quantization: Quantization = "none",
    heads: bool = False,
) -> Any:
    """A transformers model from a folder or the hub, with the LoRA layers of the checkpoint `adapter`.

    With `heads` the layers of its language model, which these read, must be found, before anything is loaded. With
    `quantization` the linear layers of its language model are quantised as their files have them.

    With `mapped` its weights are mapped from their files in the precision that they have there, which costs no memory;
    `give_precision` then makes them `dtype`. Raises InputError when the files do not hold the weights of the class, all
    of them and no others; before it is built, but for quantised models, of which transformers alone knows the names.
    """
    model_class = backbone_class(name)
    wanted = resolve_dtype(dtype)
    first = wanted
    kinds: str | dict[str, str] = attention
    try:
        config = model_class.config_class.from_pretrained(name)
        if getattr(config, "quantization_config", None) is not None:
            if quantization != "none":
                what = f"is quantised already, and would be made {quantization}"
                raise InputError(what, where=name, fix="Use quantization=none, or the model that it was made from.")
        else:
            bare = skeleton(model_class, config)
            if heads:
                language_layers(bare)
            kinds = attention_of_parts(bare, attention)
            stored = _fit_named(name, bare).weights
            if adapter is not None:
                load_adapter(bare, adapter)
            first = (stored.precision if mapped or quantization != "none" else None) or wanted
        options = {"dtype": first, "attn_implementation": kinds, "use_safetensors": True}
        with without_load_reports():
            model, info = model_class.from_pretrained(name, **options, output_loading_info=True)
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        if lacks_memory(error):
            raise
        fix = "Check the name; a hub model needs a network or a filled cache."
        if isinstance(error, ValueError):
            attends = re.search("attention|attn", str(error), re.IGNORECASE)
            fix = f"Use another {'model.attention (eager), or another ' if attends else ''}model."
            if isinstance(error, (JSONDecodeError, UnicodeDecodeError)):
                fix = "Its files are not whole: download it again."
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"cannot load backbone ({said})", where=name, fix=fix) from error
    except ImportError as error:
        if getattr(config, "quantization_config", None) is not None:
            kind = config.quantization_config.get("quant_method")
            what = f"is quantised by {kind}, whose package is missing ({str(error).splitlines()[0]})"
            fix = "Use the model that it was made from, with model.quantization=nf4 where memory is short."
            raise InputError(what, where=name, fix=fix) from error
        raise lacks_package(name, error) from error
    if info["missing_keys"]:
        found = f"{plural(len(info['missing_keys']), 'weight', 'is|are')} missing: {some(sorted(info['missing_keys']))}"
        fix = "Its files are not whole: download it again."
        raise InputError(f"cannot load backbone: {found}", where=name, fix=fix)
    if quantization != "none":
        quantize(model, quantization, wanted)
    if first is not wanted:
        keep_precision(model, wanted)
        if not mapped:
            give_precision(model)
    if adapter is not None:
        load_adapter(model, adapter)
    return model


def attention_of_parts(bare: Any, attention: str) -> str | dict[str, str]:
    """How each part of a model attends: a tower that has no such implementation (timm's have none) in its own way.

    A language model that has none is refused when it is loaded.
    """
    flag = {"sdpa": "_supports_sdpa", "flash_attention_2": "_supports_flash_attn"}.get(attention)
    text = type(bare.config.get_text_config())
    without = {type(m.config) for m in bare.modules() if flag and getattr(m, flag, None) is False} - {text}
    parts = {name for name in bare.config.sub_configs if type(getattr(bare.config, name, None)) in without}
    # A part that is not named has none of its own, and attends by sdpa whatever the whole does.
    each = {"": attention, **dict.fromkeys(bare.config.sub_configs, attention), **dict.fromkeys(parts, "eager")}
    return each if parts else attention


def _fit_named(name: str, bare: Any) -> Fit:
    try:
        return fit(Weights.of(name), bare)
    except InputError as error:
        raise InputError(f"cannot load backbone: {error.what}", where=error.where, fix=error.fix) from error


def load_adapter(model: Any, folder: Path) -> None:
    """Add the LoRA layers of a checkpoint to a transformers model, or to a `skeleton`, which then holds them alone.

    They are in float32, as they were trained, whatever the model's dtype: rounded to it, a run that resumes would go on
    from other weights than it had.

    Raises InputError when the adapter is damaged, or is not that of this model: weights missing, unknown or of another
    shape.
    """
    from peft import PeftConfig

    file = folder / ADAPTER
    tensors = read_tensors(file, "the adapter", _DAMAGED)
    # PEFT writes DoRA's vectors by their modules' names, which transformers does not find.
    given = {f"{name}.weight" if name.endswith("_vector") else name: tensor for name, tensor in tensors.items()}
    if model.device.type == "meta":
        model.hf_device_map = {"": "cpu"}  # where the adapter's weights go
    try:
        with without_load_reports():
            peft_config, whole = PeftConfig.from_pretrained(folder), {"lora_": torch.float32}
            info = model.load_adapter(adapter_state_dict=given, peft_config=peft_config, dtype_plan=whole)
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
        if lacks_memory(error):
            raise
        shapes = {f"base_model.model.{_unnamed(name)}": list(p.shape) for name, p in model.named_parameters()}
        wrong = [
            f"{name} is {list(each.shape)}, expected {shapes[name]}"
            for name, each in tensors.items()
            if name in shapes and list(each.shape) != shapes[name]
        ]
        said = some(wrong) if wrong else str(error).splitlines()[0]
        raise InputError(f"cannot load the adapter ({said})", where=str(file), fix=OTHER_BACKBONE) from error
    for what, names in (("missing", info.missing_keys), ("unknown", info.unexpected_keys)):
        if names:
            many = plural(len(names), "weight of the adapter|weights of the adapter", "is|are")
            found = f"{many} {what}: {some(sorted(map(_unnamed, names)))}"
            raise InputError(found, where=str(file), fix=OTHER_BACKBONE)


def _unnamed(name: str) -> str:
    """A parameter of a LoRA layer as adapter files call it, without the adapter's name."""
    return name.replace(".default.", ".")


def load_processor(name: str | Path) -> Any:
    """The processor of a checkpoint or backbone, of a model of text alone its tokenizer (`TextProcessor`).

    Raises InputError when it cannot be loaded or has no chat template.
    """
    from transformers import AutoProcessor, PreTrainedTokenizerBase

    try:
        processor = _voxtral(name) or AutoProcessor.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        if (Path(name) / "tekken.json").is_file() and find_spec("mistral_common") is None:
            what = "its tokenizer is tekken.json, which is read for Voxtral alone, and mistral-common is not installed"
            raise InputError(what, where=str(name), fix="Use a model with tokenizer.json.") from error
        if isinstance(error, ImportError):
            raise lacks_package(str(name), error) from error
        said = str(error).splitlines()[0] if isinstance(error, (OSError, ValueError)) else repr(error)
        what = f"cannot load the processor ({said})"
        raise InputError(what, where=str(name), fix="Use a model that comes with its processor.") from error
    if isinstance(processor, PreTrainedTokenizerBase):
        processor = TextProcessor(processor)
    elif getattr(processor, "tokenizer", None) is not None:
        give_template(processor)
    if getattr(processor, "tokenizer", None) is None or processor.chat_template is None:
        fix = "Use a chat model; a base model has no template."
        raise InputError(f"{type(processor).__name__} has no chat template", where=str(name), fix=fix)
    return processor


def _voxtral(name: str | Path) -> VoxtralProcessor | None:
    """The processor of a Voxtral, as it is published or was saved by hba; None of all others."""
    from transformers import AutoFeatureExtractor, AutoTokenizer
    from transformers.utils import cached_file

    saved = Path(name) / "tokenizer_config.json"
    if saved.is_file():
        if read_json(saved).get("processor_class") != VoxtralProcessor.__name__:
            return None
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    elif (Path(name) / CARD).is_file() or read_config(name).model_type != "voxtral":
        return None
    else:
        tokenizer = tekken_tokenizer(Path(cached_file(name, "tekken.json")))
    return VoxtralProcessor(AutoFeatureExtractor.from_pretrained(name, trust_remote_code=False), tokenizer)


def require_perceived(path: str | Path, encode: EncodeConfig, atlas: Atlas) -> None:
    """Raise InputError for rows of `atlas` with media that the model `path` does not take; nothing else is loaded."""
    folder = resolve(path)
    if folder is None:
        backbone_class(path)  # an unknown model is told of before a processor that it does not come with
    require_perceived_by(load_processor(folder or path), encode, atlas.columns, where=str(path))


def describe(path: str | Path) -> str:
    """What `path` means, for provenance: the step folder of a checkpoint, or the backbone's name."""
    folder = resolve(path)
    return str(path) if folder is None else folder.name
