"""`hba fit`: whether a run fits on a GPU, what takes the memory, and how long an epoch is. No weight is loaded.

One micro-batch is computed as training computes it, by the classes and the autocast of the run, on tensors without
numbers (PyTorch's FakeTensorMode). Counted are the bytes that live at once and the operations of its matrix products;
so a family of models needs no formula of its own. Only the language model is computed, with two numbers of layers and
of samples; what a layer and a sample cost is the difference. Three parts are reckoned and not computed: media towers
(their shapes depend on the values of their input), the last token of an answer with all keys and values, and what a
driver keeps for itself.

What it cannot know is how fast a GPU is: it assumes `UTILISATION` of the figure that its maker states.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers.modeling_layers import GradientCheckpointingLayer

from hba.errors import ConfigError, InputError, nearest
from hba.evaluate.config import PredictConfig
from hba.model import checkpoint
from hba.model.checkpoint import backbone_class, read_config, resolve_dtype
from hba.model.config import ModelConfig
from hba.model.heads import CHUNK_VALUES
from hba.model.omni import OmniSapiens, apply_strategy, as_they_come, behind_head, recompute_layers
from hba.model.weights import language_layers, linear_names, skeleton
from hba.rl.config import RlConfig
from hba.rl.rollout import of_tokens
from hba.storage import read_json
from hba.taxonomy import BUILTIN
from hba.train.config import BamConfig, LmConfig, QaConfig, SftConfig, TrainConfig
from hba.train.ranks import ROUNDED, Unit, units

Settings: TypeAlias = SftConfig | LmConfig | QaConfig | BamConfig | RlConfig | PredictConfig
GIB = 2**30
UTILISATION = 0.35
"""share of a GPU's stated bfloat16 operations a second that training of this kind reaches"""
USABLE = 0.94
"""share of a GPU's memory that tensors can have: allocators leave holes"""
DRIVER_GIB = 0.6
"""what CUDA and its libraries keep for themselves"""
BUSY_TOKENS = 2048
"""tokens at once with which a GPU has enough to do: more of them make a step no faster"""
READ = 0.6
"""share of the stated bytes a second with which a pass of one token reads the weights"""
STEP_SECONDS = 0.03
"""of a pass of one token that is small: what Python and the launches of its kernels take"""
ANSWER_TOKENS = 16  # of a supervised answer in words; most labels have two
QUANTIZED_BYTES = {"int8": 1.0, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}  # a weight: codes, scales, scales of scales
GATHERED = "layers gathered from other GPUs"
REFERENCE = "policy of the start"
LM_HEAD = "lm_head in float32 and its moments"
VALIDATION = "validation_batch_size"
LOGITS_BYTES = 20  # of a token's logit while its loss and gradient are made: five are alive
SAID_BYTES = 16  # of a logit from which the most probable token is taken: four are alive
DRAWN_BYTES = 40  # of one from which a token is drawn: shares of probability are added up in 64 bits
KEYS = "keys and values"
MOST = 1 << 30  # samples, of a model that takes nothing for them
TOWER_POSITIONS = 3  # of a media tower for a token of the prompt: 4 patches or 2 frames of sound make one


class Gpu(NamedTuple):
    """A GPU: its memory in GiB, and as its maker states them its operations a second (10^12, dense) in bfloat16, or
    in float32 where it has no bfloat16 and `auto` is float32, and the bytes that its memory gives a second (10^9)."""

    name: str
    gigabytes: float
    tflops: float
    bandwidth: float
    bfloat16: bool = True


GPUS = {
    "t4": Gpu("T4", 16, 8.1, 320, bfloat16=False),
    "rtx4080": Gpu("RTX 4080", 16, 97, 717),
    "l4": Gpu("L4", 24, 121, 300),
    "a10": Gpu("A10", 24, 125, 600),
    "rtx3090": Gpu("RTX 3090", 24, 71, 936),
    "rtx4090": Gpu("RTX 4090", 24, 165, 1008),
    "rtx5090": Gpu("RTX 5090", 32, 210, 1792),
    "a100-40": Gpu("A100", 40, 312, 1555),
    "a6000": Gpu("RTX A6000", 48, 155, 768),
    "l40s": Gpu("L40S", 48, 362, 864),
    "a100-80": Gpu("A100", 80, 312, 2039),
    "h100": Gpu("H100", 80, 989, 3350),
    "h200": Gpu("H200", 141, 989, 4800),
    "b200": Gpu("B200", 180, 2250, 8000),
}
TYPICAL = {16: "rtx4080", 24: "rtx4090", 32: "rtx5090", 40: "a100-40", 48: "l40s", 80: "a100-80", 141: "h200"}


def find_gpu(name: str) -> Gpu:
    """A GPU by its name (h100, rtx4090), or by its memory in GiB (24), for which a usual one of that size stands.

    Raises InputError for a name that is not known and for a size that is none.
    """
    key = re.sub(r"[\s_]", "", name.lower()).removesuffix("gb").removeprefix("nvidia")
    if key in GPUS:
        return GPUS[key]
    if re.fullmatch(r"\d+(\.\d+)?", key) and float(key) > 0:
        size = float(key)
        like = GPUS[TYPICAL[min(TYPICAL, key=lambda known: abs(known - size))]]
        return like._replace(gigabytes=size)
    fix = f"{nearest(name, list(GPUS))} Or give its memory in GB, such as --gpu 24."
    raise InputError(f"no GPU {name!r} is known", where="--gpu", fix=fix)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What a run takes of each GPU, in GiB. `parts` add up to `total` and are those of `samples` x `tokens`.

    `largest` is how many of the longest samples have room, `setting` the key and value with which all have.
    """

    model: str
    stage: str
    gpu: Gpu
    gpus: int
    samples: int
    tokens: int
    parts: dict[str, float]
    usable: float
    largest: int
    setting: str
    samples_per_second: float
    epoch_hours: float | None
    changes: list[str]
    validation: int = 0  # the most samples of a validation batch that have room
    validation_asked: int = 0  # 0: nothing is validated by the model
    sampling_share: float = 0.0  # of the time, in RL: that of drawing responses of the greatest length

    @property
    def total(self) -> float:
        """All parts, in GiB."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether the micro-batch and the validation batch that were asked for have room."""
        return self.total <= self.usable and self.validation >= self.validation_asked

    def record(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self) | {"gpu": self.gpu._asdict(), "total": self.total, "fits": self.fits}


class Work(NamedTuple):
    """What a stage computes at once of `tokens` a sample, the longest: the micro-batch of training, or a batch."""

    model: ModelConfig
    train: TrainConfig | None  # None: nothing is kept for a backward pass
    samples: int
    tokens: int
    answers: int = 0  # tokens of a sample that have logits in training
    pieces: bool = False  # logits are made of some tokens at a time
    cached: int = 0  # tokens of keys and values that a sample has when its answer is complete
    frozen_towers: bool = True
    copies: int = 1  # of a sample of the plan: responses to a prompt
    step: int = 0  # samples of an optimizer step, on all GPUs: of one micro-batch no gradients are there before
    counted: int = 0  # what the plan counts for a sample of the plan by `train.device_tokens`
    beside: TrainConfig | None = None  # of a pass between steps: the training whose weights and moments are there
    reference: bool = False  # whether the policy of the start is there, too
    lm_head: TrainConfig | None = None  # of a copy of lm_head that trains on states of the frozen model
    alone: bool = False  # whether the frozen model has gone by then

    @property
    def state(self) -> TrainConfig | None:
        """The training whose weights and moments are there."""
        return self.train or self.beside


class Counted(NamedTuple):
    """Bytes alive beyond the weights at the peak of the forward and of the backward pass, and operations.

    Each of the three grows by the same with each layer and with each sample; the greater of two peaks does not.
    """

    forward: float
    backward: float
    flops: float

    @property
    def bytes(self) -> float:
        """At the peak of both."""
        return max(self.forward, self.backward)

    def to(self, other: Counted, steps: float) -> Counted:
        """As many `steps` away from this as `other` is one."""
        return Counted(*(a + (b - a) * steps for a, b in zip(self, other, strict=True)))


def _training(config: Settings) -> TrainConfig | None:
    """The training that runs the model; None where a frozen one is asked, of which other things may learn."""
    if isinstance(config, PredictConfig | QaConfig) or (isinstance(config, BamConfig) and config.stage != "full"):
        return None
    return config.train


def _budgeted(config: Settings) -> TrainConfig | None:
    """The training of which a GPU takes so many tokens at once: where that is set, and where nothing is."""
    train = _training(config)
    return train if train and (train.device_tokens is not None or train.device_batch_size is None) else None


def work_of(config: Settings, tokens: int, model: str) -> list[Work]:
    """What `config` makes a GPU do; of RL the update and the sampling. `tokens` are those of the longest prompt."""
    if isinstance(config, PredictConfig):
        plain = _of_run(config, model)
        return [Work(plain, None, config.batch_size, tokens, cached=tokens + config.generation.max_tokens)]
    if isinstance(config, QaConfig) or (isinstance(config, BamConfig) and config.stage != "full"):
        plain, learning = _of_run(config, model), config.train if isinstance(config, QaConfig) else None
        if not config.features.cache:
            return [Work(plain, None, _at_once(config.train, tokens), tokens, lm_head=learning)]
        works = [Work(plain, None, config.features.batch_size, tokens)]
        if learning is not None:
            works.append(Work(plain, None, _at_once(learning, tokens), ANSWER_TOKENS, lm_head=learning, alone=True))
        return works
    if not isinstance(config, RlConfig):
        answers = ANSWER_TOKENS if _speaks(config) else 0
        learned = _of_run(config, model) if isinstance(config, BamConfig) else config.model
        samples = _at_once(config.train, tokens)
        work = Work(learned, config.train, samples, tokens + answers, answers, frozen_towers=False)
        return [work._replace(counted=tokens, step=config.train.batch_size * config.train.accumulation)]
    new, copies = config.rollout.max_new_tokens, config.rollout.per_prompt
    counted = (tokens + new) * copies
    samples = _at_once(config.train, counted) * copies
    plain = replace(config.model, lora_dropout=0.0)  # the update drops nothing: it must see what the sampling saw
    update = Work(plain, config.train, samples, tokens + new, new, True, frozen_towers=config.freeze_towers)
    apart = config.model.strategy == "full" and config.loss.kl_weight > 0  # LoRA is switched off instead
    step = config.train.batch_size * config.train.accumulation * copies // config.loss.updates
    update = update._replace(copies=copies, counted=counted, reference=apart, step=step)
    sampling = update._replace(train=None, beside=config.train, tokens=tokens, cached=tokens + new)
    return [update, sampling] if config.rollout.sampler == "generate" else [update]


def _speaks(config: SftConfig | LmConfig | BamConfig) -> bool:
    """Whether training has answers in words, as far as its config tells."""
    if isinstance(config, SftConfig):
        return config.answer_weight > 0
    keys = config.datasets if isinstance(config, BamConfig) else None
    return keys is None or any(key not in BUILTIN.datasets or BUILTIN.datasets[key].domain is None for key in keys)


def _at_once(train: TrainConfig, counted: int) -> int:
    """Samples of a micro-batch whose longest counts so many tokens."""
    most = train.device_batch_size or train.batch_size
    return most if train.device_tokens is None else max(1, min(most, train.device_tokens // counted))


def _checkpoint(model: str) -> Path | None:
    """That of a run on this machine; nothing is downloaded to count."""
    return checkpoint.resolve(model) if Path(model).is_dir() else None


def _of_run(config: PredictConfig | QaConfig | BamConfig, model: str) -> ModelConfig:
    """The model of a stage behind the first as the run `model` has it, frozen but where BAM trains all.

    A plain backbone has no LoRA; where all trains it stands for a run by `hba train sft`, by its defaults.
    """
    folder, trains = _checkpoint(model), _training(config) is not None
    card = None if folder is None else checkpoint.read_card(folder)
    kind = checkpoint.quantization_of(card) if config.quantization == "auto" else config.quantization
    how: dict[str, Any] = {"dtype": config.dtype, "attention": config.attention, "quantization": kind}
    if card is None or folder is None:
        return ModelConfig(name=model, strategy="lora" if trains else "heads", **how)
    if card["strategy"] == "lora":
        adapter = read_json(folder / "adapter_config.json")
        how |= {"lora_r": adapter["r"], "lora_alpha": adapter["lora_alpha"], "lora_dora": adapter["use_dora"]}
        how["lora_rank_pattern"] = adapter["rank_pattern"] or None
    frozen = card["strategy"] == "full" and not trains
    return ModelConfig(name=model, strategy="heads" if frozen else card["strategy"], **how)


def fit_run(
    model: str, stage: str, config: Settings, gpu: Gpu, *, gpus: int = 1, tokens: Sequence[int], rows: int | None = None
) -> Fit:
    """Whether and how `config` fits on `gpus` GPUs, each of which is `gpu`.

    `tokens` are lengths of prompts: the longest must fit, speed is that of their mean. `rows` are those of an epoch.
    Raises InputError for a model that is not found or unknown, ConfigError for what cannot be trained.
    """
    bare = _Bare(model, gpu)
    longest, mean = max(tokens), max(1, round(sum(tokens) / len(tokens)))
    # As many tokens in more samples have more answers; where samples are counted the longest take most.
    lengths = sorted({longest, mean}) if _budgeted(config) else [longest]
    needs = [_Need(bare, work, gpus) for length in lengths for work in work_of(config, length, model)]
    usable = gpu.gigabytes * USABLE - DRIVER_GIB
    tightest = max(needs, key=lambda need: need.total(need.work.samples))
    learned = work_of(config, longest, model)[0]
    at_mean = _Need(bare, learned._replace(tokens=max(1, learned.tokens - longest + mean)), gpus)
    seconds, drawing = at_mean.flops(1) / (gpu.tflops * 1e12 * UTILISATION), 0.0
    if isinstance(config, RlConfig):
        seconds += _looking_seconds(at_mean, config, gpu)
        drawing = sum(_Need(bare, work, gpus).drawing_seconds(gpu) for work in work_of(config, mean, model)[1:])
    rate = gpus / (seconds + drawing)
    parts = {name: size / GIB for name, size in tightest.parts(tightest.work.samples).items() if size}
    most = _most(bare, config, model, usable, gpus, lengths)
    counted = learned.counted if _budgeted(config) else 1
    roomy = sum(parts.values()) <= usable
    changes = [] if roomy else _changes(bare, config, model, usable, gpus, lengths)
    validation, asked = _validated(bare, config, model, usable, gpus, longest)
    if roomy and 0 < validation < asked:
        changes = [f"{_validation_key(config)}={validation}"]
    return Fit(
        model=model,
        stage=stage,
        gpu=gpu,
        gpus=gpus,
        samples=tightest.work.samples,
        tokens=tightest.work.tokens,
        parts=parts,
        usable=usable,
        largest=most // counted,
        setting=f"{_key(config)}={most}",
        samples_per_second=rate,
        epoch_hours=None if rows is None else rows * learned.copies / rate / 3600,
        changes=changes,
        validation=validation,
        validation_asked=asked,
        sampling_share=drawing / (seconds + drawing),
    )


def _looking_seconds(update: _Need, config: RlConfig, gpu: Gpu) -> float:
    """Of the passes without gradients over a response: by the reference, and by the policy before several updates."""
    looks = (config.loss.kl_weight > 0) + (config.loss.updates > 1)
    passing = _Need(update.bare, update.work._replace(train=None, beside=update.work.train), update.gpus)
    return looks * passing.flops(1) / (gpu.tflops * 1e12 * UTILISATION)


def _key(config: Settings) -> str:
    """The key that says how much a GPU takes at once."""
    if isinstance(config, PredictConfig):
        return "batch_size"
    if isinstance(config, QaConfig | BamConfig) and _training(config) is None and config.features.cache:
        return "features.batch_size"
    return "train.device_tokens" if _budgeted(config) else "train.device_batch_size"


def _most(bare: _Bare, config: Settings, model: str, usable: float, gpus: int, lengths: Sequence[int]) -> int:
    """The largest value of `_key` with which samples of all `lengths` have room, 0 where one of them has none."""
    found, full, train = [], [], _budgeted(config)
    for work in (work for length in lengths for work in work_of(config, length, model)):
        samples = _Need(bare, work, gpus).largest(usable * GIB) // work.copies
        if not samples:
            return 0
        if train is None:
            found.append(samples)
        elif samples < (train.device_batch_size or train.batch_size):
            found.append(samples * work.counted)
        else:  # a batch has no more
            full.append(samples * work.counted)
    return min(found) if found else max(full)


def _validated(bare: _Bare, config: Settings, model: str, usable: float, gpus: int, tokens: int) -> tuple[int, int]:
    """The most samples of a validation batch that have room beside what training holds, and how many are asked for.

    A split model is whole while it is validated.
    """
    if isinstance(config, PredictConfig | QaConfig) or _training(config) is None:
        return 0, 0
    work = work_of(config, tokens, model)[0]
    cached = tokens + config.rollout.max_new_tokens if isinstance(config, RlConfig) else 0
    passing = work._replace(train=None, beside=work.train, tokens=tokens, answers=0, cached=cached)
    asked = config.features.batch_size if isinstance(config, BamConfig) else config.validation_batch_size
    return _Need(bare, passing, gpus).largest(usable * GIB), asked


def _validation_key(config: Settings) -> str:
    return "features.batch_size" if isinstance(config, BamConfig) else VALIDATION


def _changes(bare: _Bare, config: Settings, model: str, usable: float, gpus: int, lengths: Sequence[int]) -> list[str]:
    """Settings with which it would fit, the mildest first; at most three."""
    found: list[str] = []
    longest = work_of(config, max(lengths), model)[0]
    asked = longest.samples // longest.copies
    if (train := _budgeted(config)) is not None:
        asked = train.device_tokens or asked * longest.counted

    def offer(words: str, changed: Settings, count: int = gpus) -> bool:
        most = _most(bare, changed, model, usable, count, lengths)
        validation, wished = _validated(bare, changed, model, usable, count, max(lengths))
        if not most or (wished and not validation):
            return False
        if len(found) < 3:
            small = f"{_key(config)}={most}" if most < asked else ""
            fewer = f"{_validation_key(config)}={validation}" if validation < wished else ""
            found.append(" ".join(each for each in (words.strip(), small, fewer) if each))
        return True

    offer("", config)
    if isinstance(config, PredictConfig | QaConfig) or _training(config) is None:
        return found
    saving: Settings = replace(config, train=replace(config.train, activation_checkpointing=True))
    if not config.train.activation_checkpointing:
        offer("train.activation_checkpointing=true ", saving)
    lighter: list[dict[str, Any]] = []
    if not isinstance(config, BamConfig):  # of which the run that it stands on decides
        lighter += [{"model.strategy": "lora"}] if config.model.strategy == "full" else []
        lighter += [{"model.quantization": "nf4"}] if config.model.quantization == "none" else []
    for keys in lighter:
        if (light := _changed(saving, keys)) is not None:
            ((key, value),) = keys.items()
            offer(f"{key}={value} train.activation_checkpointing=true ", light)
    shared = _changed(saving, {"train.sharding": "full"})
    if shared is None:
        return found
    for count in (2, 4, 8, 16, 32, 64):
        words = f"{count} GPUs with train.sharding=full train.activation_checkpointing=true "
        if count >= gpus and len(found) < 3 and offer(words, shared, count):
            break
    return found


class Recipe(NamedTuple):
    """The keys that make a run fit on a GPU, and what is then taken of what there is, in GiB."""

    keys: dict[str, Any]
    total: float
    usable: float

    @property
    def words(self) -> str:
        """As they are typed."""
        return " ".join(f"{key}={str(value).lower()}" for key, value in self.keys.items())


def recipe_for(
    model: str, config: SftConfig | LmConfig | RlConfig, gpu: Gpu, *, gpus: int, tokens: int, typed: Sequence[str] = ()
) -> Recipe:
    """What to set so that `config` fits on `gpus` GPUs, each of which is `gpu`, with prompts of up to `tokens`.

    The mildest saving with which `BUSY_TOKENS` are computed at once, or else the one with room for most: nothing,
    layers computed twice, on several GPUs a split model, and only where none of them has room for one sample a frozen
    backbone in 4 bits. Keys of `typed` stay as they are. Raises InputError where nothing makes it fit.
    """
    place = checkpoint.resolve(model)
    bare = _Bare(model if place is None else checkpoint.base_of(place), gpu)
    usable, key = gpu.gigabytes * USABLE - DRIVER_GIB, _key(config)
    work = work_of(config, tokens, model)[0]
    counted = work.counted if key == "train.device_tokens" else 1
    share = -(-config.train.batch_size // gpus)
    asked = config.train.device_tokens or counted * min(work.samples // work.copies, share)
    wanted = min(asked, max(BUSY_TOKENS, counted) if counted > 1 else -(-BUSY_TOKENS // tokens))
    again, split = {"train.activation_checkpointing": True}, {"train.sharding": "full"}
    ways: list[dict[str, Any]] = [{}, again] + ([again | split] if gpus > 1 else [])
    if config.model.strategy != "full":
        ways.append(again | {"model.quantization": "nf4"})
    best, most = ways[0], 0
    for way in ways:
        way = {name: value for name, value in way.items() if name not in typed and _value(config, name) != value}
        if most and "model.quantization" in way:
            break
        if (changed := _changed(config, way)) is None:
            continue
        room = min(asked, _most(bare, changed, model, usable, gpus, [tokens]))
        if room > most:
            best, most = way, room
        if most >= wanted:
            break
    if not most or (key in typed and most < asked):
        what = f"{key}={asked}, prompts of {tokens:,} tokens" if key in typed else f"a prompt of {tokens:,} tokens"
        fix = f"Take a smaller model, fewer tokens or more GPUs; `hba fit {model} --gpu {gpu.gigabytes:g}` shows more."
        raise InputError(f"no setting has room for {what}", where=f"--gpu {gpu.gigabytes:g}", fix=fix)
    keys = best if most == asked else best | {key: most}
    changed = _changed(config, keys)
    assert changed is not None  # it has been counted
    validation, wished = _validated(bare, changed, model, usable, gpus, tokens)
    if validation < wished:
        if not validation or VALIDATION in typed:
            what = f"a validation of {wished if VALIDATION in typed else 1} x {tokens:,} tokens"
            fix = f"Take a smaller {VALIDATION}, fewer tokens, or a larger GPU."
            raise InputError(f"no setting has room for {what}", where=f"--gpu {gpu.gigabytes:g}", fix=fix)
        keys = keys | {VALIDATION: validation}
    needs = [_Need(bare, each, gpus) for each in work_of(changed, tokens, model)]
    return Recipe(keys, max(need.total(need.work.samples) for need in needs) / GIB, usable)


def _value(config: Settings, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def _changed(config: Settings, keys: dict[str, Any]) -> Settings | None:
    """With other values, or None where a run like this cannot have them."""
    if "model.quantization" in keys and isinstance(config, SftConfig | LmConfig | RlConfig) and config.model.lora_dora:
        return None  # DoRA measures whole rows, which are made of the 4 bits in float32 each time
    try:
        for key, value in keys.items():
            section, _, name = key.partition(".")
            config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    except ConfigError:
        return None
    return config


class _Need:
    """The memory of one `Work` on each of `gpus` GPUs, by part, for any number of samples."""

    def __init__(self, bare: _Bare, work: Work, gpus: int) -> None:
        self.bare, self.work, self.gpus = bare, work, gpus
        state = work.state
        self.dtype = resolve_dtype(bare.auto if work.model.dtype == "auto" else work.model.dtype)
        sizes = bare.sizes(work)
        split = state is not None and state.sharding == "full"
        shared = gpus if split else 1
        kept = torch.float32 if work.model.strategy == "full" else self.dtype  # as where all of it trains
        moments = _moment_bytes(state)
        head = 0 if work.lm_head is None else bare.head_parameters
        small = QUANTIZED_BYTES.get(work.model.quantization)
        spared = 0.0 if small is None else sizes.linear * (kept.itemsize - small)
        self.fixed = {
            "weights": (sizes.frozen * kept.itemsize - spared + sizes.trained * 4) / shared,
            "a quantised layer as it computes": 0 if small is None else sizes.widest * kept.itemsize,
            "gradients": 0 if work.train is None else sizes.trained * 4 / shared,
            "optimizer": sizes.trained * moments / shared,
            GATHERED: bare.gathered_bytes(work, self.dtype, whole=work.train is None) if shared > 1 else 0,
            REFERENCE: bare.reference_bytes(self.dtype) if work.reference else 0,
        }
        if work.alone:
            self.fixed = dict.fromkeys(self.fixed, 0.0)
        self.fixed[LM_HEAD] = head * (4 + _moment_bytes(work.lm_head))
        self.head_gradient, step = head * 4.0, 0
        if work.lm_head is not None:
            step = work.lm_head.batch_size * work.lm_head.accumulation
        # From the second micro-batch of a step on, what those before it have added up is there, too.
        self.gradient_before = self.head_gradient if work.samples * gpus < step else 0.0
        # What is gathered from other GPUs gives its gradients to them, a layer after the other.
        self.share = 0 if work.train is None or split else -(-work.step // gpus)
        nothing = Counted(0, 0, 0)
        counted = (nothing if work.alone else bare.count(work, self.dtype, samples) for samples in (1, 2))
        self.of_one, self.of_two = counted

    def flops(self, samples: int) -> float:
        """Operations of a micro-batch, towers included."""
        towers: float = 2 * self.bare.tower_parameters * TOWER_POSITIONS * self.work.tokens * samples
        passes = 3 if self._trains_towers else 1
        return self.of_one.to(self.of_two, samples - 1).flops + passes * towers

    def drawing_seconds(self, gpu: Gpu) -> float:
        """Of a response as long as the cache has room for, drawn beside those of its micro-batch. Each of its tokens is
        a pass: the weights are read from memory, and the cache."""
        rows, speed = self.work.samples, gpu.tflops * 1e12 * UTILISATION
        new = self.work.cached - self.work.tokens
        weight = QUANTIZED_BYTES.get(self.work.model.quantization, self.dtype.itemsize)
        held = self.bare.cache_bytes(self.dtype, self.work.tokens + new / 2) * rows
        reading = (self.bare.language_parameters * weight + held) / (gpu.bandwidth * 1e9 * READ)
        each = max(STEP_SECONDS, reading, 2 * self.bare.language_parameters * rows / speed)
        return float(self.flops(rows) / speed + new * each) / rows

    @property
    def _trains_towers(self) -> bool:
        work = self.work
        return work.train is not None and work.model.strategy == "full" and not work.frozen_towers

    def parts(self, samples: int) -> dict[str, float]:
        """Bytes by part. What lives one after the other counts once: the towers' own peak, the language model's, the
        gradient of an lm_head with its logits."""
        counted = self.of_one.to(self.of_two, samples - 1)
        activations = counted.bytes
        if self.share and samples >= self.share:
            one, two = (self.bare.count(self.work, self.dtype, few, fresh=True) for few in (1, 2))
            activations = max(0.0, one.to(two, samples - 1).bytes - self.fixed["gradients"])
        towers = self.bare.tower_bytes(self.work, self.dtype, self._trains_towers) * samples
        if self.work.lm_head is not None:
            logits = samples * ANSWER_TOKENS * self.bare.vocabulary
            part = 4 * min(CHUNK_VALUES, self.bare.head_parameters)  # of the gradient, before it is added
            learning = self.gradient_before + self.head_gradient + part + LOGITS_BYTES * min(CHUNK_VALUES, logits)
            activations = learning if self.work.alone else max(self.gradient_before + activations, learning)
            towers = 0.0 if self.work.alone else towers
        if self.work.cached:
            read = {"activations": max(activations, towers), KEYS: self._keys(self.work.tokens) * samples}
            said = {"activations": self._last_token(samples), KEYS: self._keys(self.work.cached) * samples}
            moving = max(read, said, key=lambda each: sum(each.values()))
        elif self._trains_towers:
            moving = {"activations": activations, "activations of media towers": towers}
        else:
            moving = {"activations": max(activations, towers)}
        return self.fixed | moving

    def _keys(self, tokens: int) -> float:
        return self.bare.cache_bytes(self.dtype, tokens)

    def _last_token(self, samples: int) -> float:
        """Bytes that the last token of an answer takes beside all keys and values: those of a layer, one for each head
        that asks, the distribution that is said or drawn from, and the head where autocast rounds it each time."""
        text = self.bare.text_of(self.bare.config)
        repeated = text.num_attention_heads / (getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
        layer = self._keys(self.work.cached) / text.num_hidden_layers * repeated
        logits = self.bare.vocabulary * (SAID_BYTES if self.work.beside is None else DRAWN_BYTES)
        rounds = self.work.model.strategy == "full" and self.dtype is torch.bfloat16
        return float(samples * (layer + logits) + (self.bare.head_parameters * 2 if rounds else 0))

    def total(self, samples: int) -> float:
        """Bytes of all parts."""
        return sum(self.parts(samples).values())

    def largest(self, usable: float) -> int:
        """The most samples that fit, 0 for none. Which of two peaks is the greater changes with their number."""
        fit, most = 0, 1
        while self.total(most) <= usable and most < MOST:
            fit, most = most, 2 * most
        while most - fit > 1:
            middle = (fit + most) // 2
            fit, most = (middle, most) if self.total(middle) <= usable else (fit, middle)
        return max(fit, self.share) if self.share and self.total(self.share) <= usable else fit


def _moment_bytes(train: TrainConfig | None) -> float:
    """Of the optimizer, for a number that it trains."""
    return 0.0 if train is None else 8.0 if train.optimizer == "adamw" else 2 + 8 / 256  # and scales of blocks


class _Sizes(NamedTuple):
    """Numbers of parameters; `linear` are those that may be quantised, `widest` the largest matrix of them."""

    trained: int
    frozen: int
    linear: int
    widest: int


class _Bare:
    """A model without weights, and what it computes."""

    def __init__(self, name: str, gpu: Gpu | None = None) -> None:
        self.auto: Literal["bfloat16", "float32"] = "bfloat16" if gpu is None or gpu.bfloat16 else "float32"
        folder = _checkpoint(name)
        name = name if folder is None else checkpoint.base_of(folder)
        self.model_class = backbone_class(name)
        config = read_config(name)
        wanted = self.model_class.config_class
        self.config = config if isinstance(config, wanted) else wanted.from_pretrained(name)
        self._counted: dict[tuple[Any, ...], Counted] = {}
        self._sizes: dict[tuple[Any, ...], _Sizes] = {}
        whole = skeleton(self.model_class, self.config)
        whole.tie_weights()
        language_layers(whole)  # a model without any is told of at once
        self._whole = whole
        language = {id(p) for p in _decoder(whole).parameters()} | {id(whole.get_output_embeddings().weight)}
        self.tower_parameters = sum(p.numel() for p in whole.parameters() if id(p) not in language)
        self.vocabulary, width = whole.get_output_embeddings().weight.shape
        self.head_parameters = self.vocabulary * width
        self.language_parameters = sum(p.numel() for p in whole.parameters()) - self.tower_parameters
        words = whole.get_input_embeddings().weight
        rounds = [m.weight for m in whole.modules() if isinstance(m, ROUNDED) and m.weight is not words]
        self.rounded = sum(p.numel() for p in {id(p): p for p in rounds}.values())
        self.towers = [_Tower.of(part) for part in _tower_configs(self.config, self.text_of(self.config))]
        self.linear = [whole.get_submodule(name).weight.numel() for name in linear_names(whole)]

    @staticmethod
    def text_of(config: Any) -> Any:
        """The config of the language model."""
        return config.get_text_config(decoder=True)

    def sizes(self, work: Work) -> _Sizes:
        """Parameters by what is trained."""
        key = (str(work.model), work.frozen_towers)
        if key not in self._sizes:
            model = self._prepared(work, None)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            frozen = sum(p.numel() for p in model.parameters()) - trained
            self._sizes[key] = _Sizes(trained, frozen, sum(self.linear), max(self.linear))
        found = self._sizes[key]
        return found if work.state is not None else found._replace(trained=0, frozen=found.trained + found.frozen)

    def reference_bytes(self, dtype: torch.dtype) -> float:
        """Of a policy that is not trained: what autocast rounds in `dtype`, the rest of it in float32."""
        numbers = self.language_parameters + self.tower_parameters
        return float(self.rounded * dtype.itemsize + (numbers - self.rounded) * 4)

    def gathered_bytes(self, work: Work, dtype: torch.dtype, *, whole: bool) -> float:
        """The most of a model split over GPUs that is whole on one of them at a time, by the units of training, or with
        `whole` all of it: between steps ranks answer different samples.

        What lies in no unit of its own is there throughout; beside it the embeddings, or two layers, the next of which
        is fetched already, with the gradients of one, or the language head with its own.
        """
        model = self._prepared(work, None)
        sizes: dict[str, list[float]] = {"layer": [0.0], "words": [0.0], "rest": []}
        for unit, own in _gathered_together(model, work, dtype):
            size = sum(p.numel() * (2 if unit.rounded else 4 if p.requires_grad else dtype.itemsize) for p in own)
            summed = sum(p.numel() * (6 if unit.rounded else 4) for p in own if p.requires_grad)
            if whole or unit.module is model:
                sizes["rest"].append(size)
            elif unit.module is model.get_input_embeddings():
                sizes["words"].append(size)
            else:
                next_one = size if isinstance(unit.module, GradientCheckpointingLayer) else 0
                sizes["layer"].append(size + next_one + summed)
        if whole:
            return sum(sizes["rest"])
        return sum(max(found) for found in (sizes["rest"], [*sizes["layer"], *sizes["words"]]))

    def _prepared(self, work: Work, layers: Sequence[int] | None) -> Any:
        """The model as the stage trains it, still without numbers; its language model has these `layers` alone."""
        config = deepcopy(self.config)
        if layers is not None:
            text, total = self.text_of(config), self.text_of(config).num_hidden_layers
            for name, each in _by_layer(text).items():
                setattr(text, name, [each[layer] for layer in layers])
            if getattr(text, "num_kv_shared_layers", 0):
                text.num_kv_shared_layers = sum(layer >= total - text.num_kv_shared_layers for layer in layers)
            text.num_hidden_layers = len(layers)
        attention = "sdpa" if work.model.attention == "flash_attention_2" else work.model.attention
        config._attn_implementation = checkpoint.attention_of_parts(self._whole, attention)
        model = skeleton(self.model_class, config)
        model.tie_weights()
        with torch.device("meta"):
            if work.model.strategy == "heads":
                model.requires_grad_(False)
            else:
                apply_strategy(OmniSapiens(model, None), work.model)
        if work.frozen_towers and work.model.strategy == "full":
            inside = {id(p) for p in _decoder(model).parameters()} - {id(model.get_input_embeddings().weight)}
            for parameter in model.parameters():
                parameter.requires_grad = id(parameter) in inside
        return model

    def count(self, work: Work, dtype: torch.dtype, samples: int, *, fresh: bool = False) -> Counted:
        """What a micro-batch of so many samples takes, all layers of the language model together; with `fresh` its
        gradients as they come, else beside those that are there.
        """
        text = self.text_of(self.config)
        total: int = text.num_hidden_layers
        if work.train is not None and not work.answers:
            total -= 1  # heads alone read the state before the last layer, which then does not run
        stretches = _stretches(text, total)
        # The first layer takes less than another: below it nothing may want a gradient.
        few = max(2, stretches[0].period)
        if total <= few + stretches[-1].period:
            return self._count(work, dtype, samples, range(total), fresh=fresh)
        base = found = self._count(work, dtype, samples, range(few), fresh=fresh)
        for stretch in stretches:
            start = max(few, stretch.start)
            more = range(start, min(stretch.end, start + stretch.period))
            if more:
                with_more = self._count(work, dtype, samples, [*range(few), *more], fresh=fresh)
                grown = base.to(with_more, (stretch.end - start) / len(more))
                found = Counted(*(a + b - c for a, b, c in zip(found, grown, base, strict=True)))
        return found

    def _count(
        self, work: Work, dtype: torch.dtype, samples: int, layers: Sequence[int], *, fresh: bool = False
    ) -> Counted:
        recompute = work.train is not None and work.train.activation_checkpointing
        trains, shared = work.train is not None, work.state is not None and work.state.sharding == "full"
        asked = (work.tokens, work.answers, work.pieces, work.frozen_towers, samples, tuple(layers), fresh)
        key = (str(work.model), dtype, recompute, trains, shared, *asked)
        if key not in self._counted:
            model = self._prepared(work, layers)
            masters = torch.float32 if work.model.strategy == "full" else dtype
            there = _gathered_together(model, work, dtype) if shared else ()
            rounded = {id(p) for unit, own in there if unit.rounded for p in own}
            with FakeTensorMode():
                _give_numbers_no_values(model, masters, rounded)
                model.train(trains)
                if recompute:
                    recompute_layers(model)
                self._counted[key] = _computed(model, work, dtype, samples, fresh)
        return self._counted[key]

    def cache_bytes(self, dtype: torch.dtype, tokens: float) -> float:
        """Keys and values of the `tokens` of a sample, of the layers that keep some: those of convolutions or linear
        attention keep a state of one size, those that share keep none, and sliding ones the last of them."""
        text = self.text_of(self.config)
        own = text.num_hidden_layers - (getattr(text, "num_kv_shared_layers", None) or 0)
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        whole = heads * width  # a layer that sees all may have heads of its own (Gemma 4)
        if "sliding_attention" in (kinds := list(getattr(text, "layer_types", None) or ["full_attention"] * own)[:own]):
            seen_by_all = getattr(text, "num_global_key_value_heads", None) or heads
            whole = seen_by_all * (getattr(text, "global_head_dim", None) or width)
        window = getattr(text, "sliding_window", None) or tokens
        kept = {"sliding_attention": heads * width * min(tokens, window), "linear_attention": 0, "conv": 0}
        return float(2 * dtype.itemsize * sum(kept.get(kind, whole * tokens) for kind in kinds))

    def tower_bytes(self, work: Work, dtype: torch.dtype, trained: bool) -> float:
        """What media towers hold at once for a sample whose prompt is media alone, the larger tower of a model."""
        recompute = work.train is not None and work.train.activation_checkpointing
        positions = TOWER_POSITIONS * work.tokens
        return max((tower.bytes(positions, dtype, trained, recompute) for tower in self.towers), default=0.0)


class _Tower(NamedTuple):
    """The dimensions of an encoder of sound or pictures."""

    width: int
    inner: int
    depth: int

    @classmethod
    def of(cls, config: Any) -> _Tower:
        """By the names that transformers' configs have for them."""

        def first(*names: str) -> int:
            return next(
                (int(getattr(config, name)) for name in names if isinstance(getattr(config, name, None), int)), 0
            )

        width = first("hidden_size", "d_model", "embed_dim")
        inner = first("intermediate_size", "encoder_ffn_dim") or 4 * width
        return cls(width, inner, first("num_hidden_layers", "depth", "encoder_layers"))

    def bytes(self, positions: int, dtype: torch.dtype, trained: bool, recompute: bool) -> float:
        """One layer's own, 6 states and 2 inner ones; trained, some 17 states of each layer are kept (34 bytes each in
        16 bits, arXiv 2205.05198 without attention's own), with recomputation 1."""
        alone = positions * (6 * self.width + 2 * self.inner) * dtype.itemsize
        if not trained:
            return float(alone)
        return float(alone + positions * self.width * dtype.itemsize * self.depth * (1 if recompute else 17))


def _tower_configs(config: Any, text: Any) -> Iterator[Any]:
    for name in ("audio_config", "vision_config"):
        part = getattr(config, name, None)
        if part is not None and part is not text:
            yield part


def _decoder(model: Any) -> nn.Module:
    """The language model of a transformers model: what owns the table of words, and its layers."""
    words = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is words).rpartition(".")[0]
    owner: nn.Module = model.get_submodule(name) if name else model
    return owner


def _gathered_together(model: Any, work: Work, dtype: torch.dtype) -> Iterator[tuple[Unit, list[nn.Parameter]]]:
    """The units of a model that is split over GPUs, each with those of its parameters that no earlier one has."""
    seen: set[int] = set()
    for unit in units(model, mixed=dtype is torch.bfloat16, head=not work.pieces):
        own = [p for p in unit.module.parameters() if id(p) not in seen]
        seen |= {id(p) for p in own}
        yield unit, own


def _by_layer(text: Any) -> dict[str, list[Any]]:
    """What the config of a language model says layer by layer: its kind, in Gemma 3n its width and how sparse it is."""
    named = ((name, getattr(text, name, None)) for name in text.to_dict())
    return {name: each for name, each in named if isinstance(each, list) and len(each) == text.num_hidden_layers}


class _Stretch(NamedTuple):
    """Layers `start` to `end` of a language model, which are alike but for kinds that repeat after `period` layers."""

    start: int
    end: int
    period: int


def _stretches(text: Any, total: int) -> list[_Stretch]:
    """Those of the first `total` layers: layers that share keys and values are others than those with their own."""
    lists = _by_layer(text)
    kinds = lists.pop("layer_types", ["same"] * total)
    own = text.num_hidden_layers - (getattr(text, "num_kv_shared_layers", None) or 0)
    alike = [(layer < own, *(each[layer] for each in lists.values())) for layer in range(total)]
    starts = [layer for layer in range(total) if not layer or alike[layer] != alike[layer - 1]]
    ends = [*starts[1:], total]
    return [_Stretch(a, b, _period(kinds[a:b])) for a, b in zip(starts, ends, strict=True)]


def _period(kinds: Sequence[str]) -> int:
    """After how many layers their kinds repeat."""
    return next(n for n in range(1, len(kinds) + 1) if all(kinds[i] == kinds[i % n] for i in range(len(kinds))))


def _give_numbers_no_values(model: nn.Module, masters: torch.dtype, rounded: set[int]) -> None:
    """Fake tensors in place of those on `meta`: they know a device and count as memory. Frozen ones in `masters`, those
    of which a shard is gathered `rounded` (by id) in bfloat16."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                dtype = torch.float32 if parameter.requires_grad else masters
                dtype = torch.bfloat16 if id(parameter) in rounded else dtype
                fresh = made.get(id(parameter))
                if fresh is None:
                    fresh = nn.Parameter(torch.empty(parameter.shape, dtype=dtype), parameter.requires_grad)
                    made[id(parameter)] = fresh
                module._parameters[name] = fresh
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


class _Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the tensors that live, the most that lived at once, and operations of matrix products and attention."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.flops = 0
        self._living: dict[int, Any] = {}

    def see(self, tensor: Tensor) -> None:
        """Count the memory of a tensor until it is freed; views share it."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._living:
            return

        def freed(_: object) -> None:
            self.now -= size
            self._living.pop(key, None)

        self._living[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute, then count what came out."""
        out = func(*args, **(kwargs or {}))
        flops = flop_registry.get(func.overloadpacket)
        if flops is not None:
            self.flops += flops(*args, **(kwargs or {}), out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.see(leaf)
        return out


def _computed(model: Any, work: Work, dtype: torch.dtype, samples: int, fresh: bool) -> Counted:
    """One micro-batch of the language model: forward, and where it trains backward, onto gradients that are there or
    `fresh` ones."""
    ledger = _Ledger()
    for tensor in (*model.parameters(), *model.buffers()):
        ledger.see(tensor)
    for parameter in model.parameters():
        if parameter.requires_grad and not fresh:
            parameter.grad = torch.empty_like(parameter)
            ledger.see(parameter.grad)
    before = ledger.peak = ledger.now
    tokens, decoder = work.tokens, _decoder(model)

    def head(states: Tensor) -> Tensor:
        logits: Tensor = model.get_output_embeddings()(states)
        return behind_head(logits, model.config)

    mask: Tensor | None = torch.ones(samples, 1, tokens, tokens, dtype=torch.bool)
    if "linear_attention" in (getattr(_Bare.text_of(model.config), "layer_types", None) or ()):
        mask = None  # its layers look whether anything is masked, which numbers without values do not tell
    ids = torch.zeros(samples, tokens, dtype=torch.long)
    learns = work.train is not None  # else autocast keeps no rounded copies, as it does not in inference mode
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16, cache_enabled=learns)
    with ledger, mixed, torch.set_grad_enabled(learns), as_they_come(model):
        ledger.see(ids)
        if mask is not None:
            ledger.see(mask)
        states = decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        if work.train is None:
            head(states[:, -1]).float()
            return Counted(ledger.peak - before, 0, ledger.flops)
        if work.answers:
            said = states[:, -work.answers :].flatten(0, 1)
            targets = torch.zeros(len(said), dtype=torch.long)
            if work.pieces:
                vocabulary = len(model.get_output_embeddings().weight)
                how: dict[str, Any] = {"ids_N": targets, "banned": [0], "temperature": 1.0, "vocabulary": vocabulary}
                loss = of_tokens(said, head, **how)[:, 0].sum()
            else:
                loss = functional.cross_entropy(head(said).float(), targets)
        else:
            loss = states.float().mean()
    forward, ledger.peak = ledger.peak - before, ledger.now
    if loss.requires_grad:  # not where heads alone train
        with ledger:
            loss.backward()  # type: ignore[no-untyped-call]
    return Counted(forward, ledger.peak - before, ledger.flops)
