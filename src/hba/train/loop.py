"""The one training loop. A stage gives it a loss; everything else (order, accumulation, clipping, schedule, checks,
logging, validation, checkpoints, resume) is here and the same for every stage.

One optimizer step = `accumulation` batches, each shared out over the ranks; its loss is the sum over their samples
divided by the number of samples of all ranks, so that accumulation, world size and uneven batches do not change the
gradient. A rank may have none of them (see `ranks`); a step of which no sample can be read on any rank is skipped by
all. The run is a function of (config, data, seed): killed and resumed, on as many devices or on others, it gives the
losses and weights of an uninterrupted one. Only dropout depends on the number of ranks.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from shutil import which
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hba.atlas import Atlas, data_record, open_atlas
from hba.atlas.rows import Columns, MediaSource, Quarantined, Sample
from hba.batch.config import EncodeConfig
from hba.batch.encode import TextProcessor
from hba.batch.sampler import Indices, MixConfig, epoch_rows, input_tokens, plan_batches
from hba.errors import ConfigError, HbaError, InputError
from hba.model import checkpoint
from hba.model.config import ModelConfig, Quantization, require_bitsandbytes, require_gpu_package
from hba.model.omni import OmniSapiens, apply_strategy, require_lora_layers
from hba.model.process import prepare_process, start_accelerator
from hba.run import RunFolder
from hba.storage import room
from hba.train.config import BamConfig, TrainConfig, refuse_idle_rates
from hba.train.display import TrainingDisplay
from hba.train.ranks import Ranks, gathered, prepare_model
from hba.train.state import STOP, Progress, Saving, latest, read_progress, restore_optimizer, save_state, settle

# Which samples a rank trains on at which step: a pure function of (rows, mix, config, rank, number of ranks).
#
# Invariants: the samples of an optimizer step are the same for any number of ranks and any `device_batch_size` and
# `device_tokens`; every rank has as many micro-batches a step, and those at the same place have the same modalities.
# Where a batch has fewer samples than there are places for, some micro-batches are empty (see `ranks`): no number of
# rows or ranks is refused. Nor is a sample of more tokens than `device_tokens`: it is a micro-batch of its own.


class Plan(NamedTuple):
    """What one rank runs: its micro-batches, and the number of each optimizer step's first, with one end more."""

    micro_batches: list[Indices]
    starts: list[int]


def num_steps(plan: Plan, config: TrainConfig) -> int:
    """The optimizer steps that are run: those of the plan, or the first `max_steps`."""
    planned = len(plan.starts) - 1
    return planned if config.max_steps is None else min(planned, config.max_steps)


def training_plan(
    columns: Columns,
    lengths_N: Indices,
    mix: MixConfig,
    config: TrainConfig,
    groups_N: Indices | None = None,
    *,
    tokens_N: Indices | None = None,
    rank: int,
    world: int,
) -> Plan:
    """This rank's share of the whole run, all epochs in a row. The batches are the same for any number of ranks.

    A batch has one modality signature, so that all ranks run the same layers at the same time; `groups_N` may divide
    the rows further. `tokens_N` is what `device_tokens` counts by, where that is not `lengths_N`.
    """
    codes_N = columns.signature_codes.astype(np.int64)
    if groups_N is not None:
        codes_N = codes_N + groups_N * len(columns.signatures)
    batches: list[Indices] = []
    for epoch in range(config.epochs):
        rows = epoch_rows(columns, mix, seed=config.seed, epoch=epoch)
        codes_M, size = codes_N[rows], config.batch_size
        planned = plan_batches(codes_M, lengths_N[rows], batch_size=size, seed=config.seed, epoch=epoch)
        batches += [rows[batch] for batch in planned]
    counted_N = lengths_N if tokens_N is None else tokens_N
    shares = [
        share(batch, config, (rank + number) % world, world, counted_N[batch]) for number, batch in enumerate(batches)
    ]
    ends = np.cumsum([len(parts) for parts in shares])
    starts = [0, *ends[config.accumulation - 1 :: config.accumulation].tolist()]
    if starts[-1] != ends[-1]:
        starts.append(int(ends[-1]))
    return Plan([part for parts in shares for part in parts], starts)


def share(batch: Indices, config: TrainConfig, place: int, world: int, tokens_M: Indices) -> list[Indices]:
    """A rank's samples of a batch, in as many parts on every rank; a part may be empty.

    A batch is sorted by length. It is cut into pieces that are dealt over the ranks in its order, so that a piece is
    padded little and ranks run pieces of similar length at the same time. Where `device_tokens` is set, pieces have
    about as many tokens, padded ones included, and `tokens_M` are those of the samples; else about as many samples. A
    rank's `place` changes from batch to batch: no rank always has the longest pieces, or always those that a remainder
    leaves empty.
    """
    limit = len(batch) if config.device_batch_size is None else config.device_batch_size
    if config.device_tokens is None:
        parts = -(-len(batch) // (world * limit))
        size, longer = divmod(len(batch), parts * world)  # so many pieces, the first ones, have one sample more
        ends = [piece * size + min(piece, longer) for piece in range(parts * world + 1)]
    else:
        ends = _cut(tokens_M.tolist(), config.device_tokens, limit)
        parts = -(-(len(ends) - 1) // world)
        if len(ends) - 1 < parts * world:  # room for more pieces, hence smaller ones
            ends = _evened(tokens_M.tolist(), config.device_tokens, limit, parts * world)
        ends += [len(batch)] * (parts * world + 1 - len(ends))
    return [batch[ends[piece] : ends[piece + 1]] for piece in range(place, parts * world, world)]


def _cut(tokens_M: Sequence[int], budget: int, limit: int) -> list[int]:
    """Where pieces begin, with one end more: the fewest of at most `limit` samples and `budget` tokens, padded ones
    included; a sample of more is a piece of its own."""
    ends, longest = [0], 0
    for place, tokens in enumerate(tokens_M):
        count, longest = place - ends[-1] + 1, max(longest, tokens)
        if count > 1 and (count > limit or longest * count > budget):
            ends.append(place)
            longest = tokens
    return [*ends, len(tokens_M)]


def _evened(tokens_M: Sequence[int], budget: int, limit: int, pieces: int) -> list[int]:
    """`_cut` by the smallest budget that gives no more than `pieces`, to within a sixteenth."""
    low, high = 0, budget
    while high - low > high // 16 + 1:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_cut(tokens_M, middle, limit)) - 1 <= pieces else (middle, high)
    return _cut(tokens_M, high, limit)


# --- the start --------------------------------------------------------------------------------------------------------


class StageConfig(Protocol):
    """What the configs of all stages have."""

    @property
    def atlas(self) -> str: ...
    @property
    def train_split(self) -> str: ...
    @property
    def validation_split(self) -> str: ...
    @property
    def train(self) -> TrainConfig: ...
    @property
    def mix(self) -> MixConfig: ...


class Start(NamedTuple):
    """What every stage begins with: the processes, its rows, and the checkpoint at which a run resumes."""

    ranks: Ranks
    train: Atlas
    validation: Atlas
    resume: Path | None


def begin(config: StageConfig, run: RunFolder, dtype: str, rows: Callable[[Atlas], Atlas]) -> Start:
    """Join the processes of the run, seed them, and open `rows` of both splits, those of the training first.

    Raises InputError for splits that cannot be opened or have no such rows, ConfigError for other data than before and
    for a quantisation or an optimizer that cannot be had.
    """
    require_installed(config)
    ranks = Ranks(start_accelerator(dtype))
    prepare_process(config.train.seed)
    train = rows(open_atlas(config.atlas, split=config.train_split).with_answers())
    validation = open_atlas(config.atlas, split=config.validation_split, taxonomy=train.taxonomy).with_answers()
    validation = rows(validation)
    run.record_data(data_record(config.atlas, train))
    return Start(ranks, train, validation, ranks.told(latest(run.checkpoints)))


def load_model(config: ModelConfig, resume: Path | None, *, mapped: bool, **options: Any) -> OmniSapiens:
    """The model to train: from the config's name, or from the checkpoint that a run resumes at.

    `mapped` and `options` are those of `OmniSapiens.from_pretrained`.
    """
    # Weights that train keep float32 masters; the configured dtype is for those that do not.
    options["dtype"] = "float32" if config.strategy == "full" else config.dtype
    options |= {"attention": config.attention, "quantization": config.quantization, "mapped": mapped}
    model = OmniSapiens.from_pretrained(resume or config.name, **options)
    answer_at_once(model.processor)
    return apply_strategy(model, config)


def answer_at_once(processor: Any) -> None:
    """Let a chat template that opens thinking for the model (Qwen3.5's) close it: an answer that is learned behind the
    open tag would be a thought, and a response to be rewarded would lack it. It is saved so, and the model asked as it
    was trained."""
    owner = processor.tokenizer if isinstance(processor, TextProcessor) else processor
    template, turn = owner.chat_template, {"role": "user", "content": [{"type": "text", "text": "."}]}
    tag = ""
    for way in (template, f"{{% set enable_thinking = false %}}{template}"):  # Qwen's have a switch
        owner.chat_template = way
        prompt = processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False).rstrip()
        if not prompt.endswith((">", "]", "▷")):
            return
        from hba.evaluate.answers import opened_thinking  # where no prompt ends with a tag, no rule is compiled

        if not (tag := opened_thinking(prompt)):
            return
    closed = f"\n{tag[0]}/{tag[1:]}\n\n"
    owner.chat_template = f"{template}{{% if add_generation_prompt %}}{{{{ {closed!r} }}}}{{% endif %}}"


def require_installed(config: Any) -> None:
    """Raise ConfigError where a config asks for weights or an optimizer that cannot be had here, or for a precision
    that the LoRA layers it starts with were not trained on. Nothing is loaded."""
    optimizer = config.train.optimizer
    require_bitsandbytes(optimizer, of_it=optimizer != "adamw", where="train.optimizer")
    if optimizer == "paged_adamw8bit" and not torch.cuda.is_available():
        what = "paged_adamw8bit moves moments out of a GPU's memory, and there is no GPU"
        raise ConfigError(what, where="train.optimizer", fix="Use train.optimizer=adamw8bit.")
    _require_compiler(config.train)
    if config.train.kernels == "liger":
        require_gpu_package("train.kernels", "liger", "liger_kernel", "liger-kernel", "none")
    model: ModelConfig | None = getattr(config, "model", None)
    if model is not None or hasattr(config, "attention"):
        attention, dtype = (getattr(model or config, name) for name in ("attention", "dtype"))
        checkpoint.require_attention(attention, dtype, where="attention" if model is None else "model.attention")
    if model is None:
        if isinstance(config, BamConfig) and config.stage == "full":
            _require_base(config)
        return
    require_bitsandbytes(model.quantization, of_it=model.quantization != "none", where="model.quantization")
    folder = checkpoint.resolve(model.name)
    card = None if folder is None else checkpoint.read_card(folder)
    if model.strategy == "lora" and (model.lora_targets or model.lora_rank_pattern):
        base = model.name if folder is None else checkpoint.base_of(folder)
        require_lora_layers(checkpoint.bare_backbone(base), model)
    if card is not None and card["strategy"] == "lora" and model.strategy == "lora":
        _require_same_weights(card, model.quantization, key="model.quantization", where=model.name)


def _require_compiler(train: TrainConfig) -> None:
    """Raise ConfigError where layers are to be compiled and nothing here can build the kernels."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    missing = [] if which(compiler) else [f"a C++ compiler ({compiler})"]
    if torch.cuda.is_available() and find_spec("triton") is None:
        missing.append("triton")
    if train.compile and missing:
        what = f"torch.compile needs {' and '.join(missing)}, which is not installed"
        raise ConfigError(what, where="train.compile", fix="Install it, or use train.compile=false.")


def _require_base(config: BamConfig) -> None:
    """`require_installed` for BAM that trains all of its base, which says itself what it has LoRA of."""
    folder = checkpoint.resolve(config.base)
    if folder is None:
        return  # `FrozenBase` says what it wants
    card = checkpoint.read_card(folder)
    strategy = card["strategy"]
    refuse_idle_rates(config.train, heads=True, lora=strategy == "lora", lm_head=strategy == "full")
    if card["strategy"] != "lora":
        return
    has = checkpoint.quantization_of(card)
    kind = has if config.quantization == "auto" else config.quantization
    _require_same_weights(card, kind, key="quantization", where=config.base)


def _require_same_weights(card: Mapping[str, Any], asked: Quantization, *, key: str, where: str) -> None:
    has = checkpoint.quantization_of(card)
    if has != asked:
        kept = "unquantised weights" if has == "none" else has
        what = f"its LoRA layers were trained on {kept}, {key} is {asked}"
        raise ConfigError(what, where=where, fix=f"Use {key}={has}, or fold them in first (hba merge).")


def rows_of(atlas: Atlas, datasets: Iterable[str] | None, *, free_form: bool) -> Atlas:
    """The rows with a domain, hence a head, or the `free_form` ones without, of the given datasets or of all.

    Raises InputError when there are none.
    """
    keys = {key for key, dataset in atlas.taxonomy.datasets.items() if (dataset.domain is None) == free_form}
    return atlas.filter(datasets=keys if datasets is None else keys & {atlas.taxonomy.dataset(k).key for k in datasets})


def planned_rows(rows: Atlas, config: StageConfig, groups_N: Indices | None = None) -> Indices:
    """Those of `rows` that a run trains on, over all ranks and epochs, up to its last step; repeated ones repeat."""
    plan = training_plan(rows.columns, rows.estimated_tokens, config.mix, config.train, groups_N, rank=0, world=1)
    return np.concatenate(plan.micro_batches[: plan.starts[num_steps(plan, config.train)]])


# --- the loop ---------------------------------------------------------------------------------------------------------


_log = logging.getLogger(__name__)
KEPT = "The last checkpoint is good."


class Validation(NamedTuple):
    """What a validation gives: the score that chooses the best checkpoint (None if no task has one), and everything to
    log."""

    score: float | None
    metrics: dict[str, Any]


def mean_over_tasks(scores: Mapping[str, float | None], rows: Atlas, num_read: int) -> Validation:
    """The scores of the tasks that have one, with their mean, which chooses the best checkpoint; None if none has.

    A task has no score where its metric is not defined on the rows, such as two-class sentiment of neutral ones alone.
    `num_read` rows were answered. Raises InputError for 0.
    """
    if not num_read:
        fix = "Repair the media named in quarantine.jsonl."
        raise InputError(f"no sample of split {rows.split!r} can be read", where=str(rows.root), fix=fix)
    known = {key: score for key, score in scores.items() if score is not None}
    mean = sum(known.values()) / len(known) if known else None
    return Validation(mean, {**known, "mean": mean})


class TrainBatch(Protocol):
    """What the loop needs of a batch, be it the inputs of a whole model or the features that a frozen one gave."""

    @property
    def samples(self) -> Sequence[Sample]:
        """The samples, for messages."""
        ...

    @property
    def quarantined(self) -> Sequence[Quarantined]:
        """The samples of the plan that could not be read."""
        ...

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def to(self: B, device: torch.device | str) -> B:
        """The same batch with its tensors on `device`."""
        ...


B = TypeVar("B", bound=TrainBatch)


@dataclass(frozen=True, kw_only=True)
class Stage(Generic[B]):
    """What a training stage brings to the loop."""

    model: nn.Module
    loss: Callable[[nn.Module, B], Tensor]  # summed over the samples of the micro-batch
    batches: Callable[[Sequence[Indices], int], Iterator[B]]  # (plan of this rank, first micro-batch)
    validate: Callable[[], Validation]
    save_model: Callable[[Path], None]
    learning_rates: Mapping[str, float]  # name prefix of parameters -> peak rate, where it is not the config's


def learning_rate_at(step: int, total: int, config: TrainConfig) -> float:
    """Share of the peak rate at optimizer step `step` (0-based) of `total`: linear warm-up, then `config.schedule`."""
    warmup = max(1, round(config.warmup_share * total)) if config.warmup_steps is None else config.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, total - warmup)
    left = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.final_share + (1 - config.final_share) * left


def _peak_rate(name: str, config: TrainConfig, rates: Mapping[str, float]) -> float:
    """The peak rate of a parameter: of its prefix in `rates`, of heads, LoRA layers or lm_head, or of all."""
    own = next((rate for prefix, rate in rates.items() if name.startswith(prefix)), None)
    if own is None and name.startswith("heads."):
        own = config.head_learning_rate
    if own is None and "lora_" in name:
        own = config.lora_learning_rate
    if own is None and _of_lm_head(name):
        own = config.lm_head_learning_rate
    return config.learning_rate if own is None else own


def _of_lm_head(name: str) -> bool:
    """Whether a parameter is of a language head with weights of its own; one that shares them goes by the embeddings'
    name."""
    return "lm_head" in name.split(".") and "lora_" not in name


def build_optimizer(model: nn.Module, config: TrainConfig, rates: Mapping[str, float]) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters; matrices decay, vectors do not. Each group keeps its `peak` rate.

    Raises ConfigError where nothing trains, or nothing at a rate that is given for heads, LoRA layers or lm_head.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            peak = _peak_rate(name, config, rates)
            decay = config.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((peak, decay), []).append(parameter)
    if not groups:
        raise ConfigError("nothing to train: no parameter requires a gradient", fix="Choose another strategy.")
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    heads, lora = any(name.startswith("heads.") for name in names), any("lora_" in name for name in names)
    refuse_idle_rates(config, heads=heads, lora=lora, lm_head=any(map(_of_lm_head, names)))
    options = [{"params": p, "peak": peak, "lr": peak, "weight_decay": decay} for (peak, decay), p in groups.items()]
    betas = (config.beta1, config.beta2)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(options, betas=betas, fused=True)
    import bitsandbytes as bnb

    of_8_bits = bnb.optim.AdamW8bit if config.optimizer == "adamw8bit" else bnb.optim.PagedAdamW8bit
    built: torch.optim.Optimizer = of_8_bits(options, betas=betas)
    return built


def shown_peak(optimizer: torch.optim.Optimizer, config: TrainConfig) -> float:
    """The peak rate that log lines follow: the config's, or where nothing trains at it the highest that there is."""
    peaks = {float(group["peak"]) for group in optimizer.param_groups}
    return config.learning_rate if config.learning_rate in peaks else max(peaks)


def train_stage(
    stage: Stage[B],
    config: StageConfig,
    run: RunFolder,
    ranks: Ranks,
    rows: Atlas,
    encode: EncodeConfig,
    groups_N: Indices | None = None,
) -> Progress:
    """`run_training` over this rank's share of the plan of `rows`; batches have one of `groups_N`, where given."""
    how = (rows.columns, rows.estimated_tokens, config.mix, config.train, groups_N)
    plan = training_plan(*how, tokens_N=input_tokens(rows, encode), rank=ranks.rank, world=ranks.world)
    return run_training(stage, plan, config.train, ranks, run)


def run_training(stage: Stage[B], plan: Plan, config: TrainConfig, ranks: Ranks, run: RunFolder) -> Progress:
    """Train `stage` over `plan`, resuming from the newest checkpoint of `run` if there is one.

    Raises StoppedError, after a checkpoint was written, when a signal asks a rank to stop.
    """
    total = num_steps(plan, config)
    ranks.wait()  # weights take one process longer to read than another; exchanges of tensors have a time limit
    model = prepare_model(stage.model, ranks.accelerator, config)
    optimizer: torch.optim.Optimizer = build_optimizer(stage.model, config, stage.learning_rates)
    progress = _resume(run, stage.model, optimizer, ranks)
    saved_step = progress.step
    batches = stage.batches(plan.micro_batches, plan.starts[progress.step])
    saving = Saving(config.save_every)
    with saving, TrainingDisplay(run, total, progress, config, enabled=ranks.is_first) as display:
        while progress.step < total and not stopped_early(progress, config):
            started = time.perf_counter()
            step = slice(*plan.starts[progress.step : progress.step + 2])
            met = ranks.meet(sum(map(len, plan.micro_batches[step])), saving.wish(progress.step))
            if met.wish and progress.step > saved_step:
                save_state(run.checkpoints, progress, stage.model, optimizer, stage.save_model, ranks)
                saved_step = progress.step
                saving.saved()
            if met.wish == STOP:
                raise saving.stopped(progress, total)

            rate = learning_rate_at(progress.step, total, config)
            torch.manual_seed(step_seed(config.seed, progress.step, ranks.rank))
            coming = _named(islice(batches, step.stop - step.start), run)
            loss, grad_norm, count = _step(stage, model, optimizer, coming, met.num_samples, rate, config, ranks)
            progress = replace(
                progress,
                step=progress.step + 1,
                samples_seen=progress.samples_seen + count,
                loss_sum=progress.loss_sum + loss * count,
                loss_samples=progress.loss_samples + count,
            )
            seconds, shown = time.perf_counter() - started, rate * shown_peak(optimizer, config)
            progress = display.step(progress, grad_norm=grad_norm, learning_rate=shown, count=count, seconds=seconds)

            if progress.step % config.validate_every == 0 or progress.step == total:
                stage.model.eval()
                with gathered(stage.model):
                    validation = stage.validate()
                display.validation(progress, validation.metrics)
                if validation.score is None and ranks.is_first:
                    _log.warning("no task of the validation has a score: the last checkpoint counts as the best")
                progress = progress.validated(validation.score)
                if progress.step < total and stopped_early(progress, config):
                    display.stopped_early(progress)
                save_state(run.checkpoints, progress, stage.model, optimizer, stage.save_model, ranks)
                saved_step = progress.step
                saving.saved()
    return progress


def stopped_early(progress: Progress, config: TrainConfig) -> bool:
    """Whether the last `early_stopping` validations were none better than the best: a run that is killed right behind
    its last validation and resumed knows it, too."""
    if config.early_stopping is None or progress.best_step is None:
        return False
    return progress.step // config.validate_every - progress.best_step // config.validate_every >= config.early_stopping


class _Stepped(NamedTuple):
    """What an optimizer step was: mean loss, gradient norm before clipping, and samples of all ranks."""

    loss: float
    grad_norm: float
    samples: int


class _Ran(NamedTuple):
    """What is kept of a micro-batch that was run: its samples, none of a copy, and its summed loss."""

    samples: Sequence[Sample]
    loss: Tensor


def _named(batches: Iterable[B], run: RunFolder) -> Iterator[B]:
    """`batches`; what could not be read of one is in quarantine before anything that could fail."""
    for batch in batches:
        run.quarantine.add_all(batch.quarantined)
        yield batch


def _step(
    stage: Stage[B],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[B],
    planned: int,
    rate: float,
    config: TrainConfig,
    ranks: Ranks,
) -> _Stepped:
    """One optimizer step over `batches`, each read when the one before was run; all ranks planned `planned` samples.

    How many can be read is known at the end: until then the gradient is that of the sum divided by `planned`, to which
    it is set right where some are missing. Where all are, nothing moves. Raises HbaError on all ranks, before the
    optimizer moves, when loss or gradient is not finite.
    """
    model.train()
    ran: list[_Ran] = []
    for turn in ranks.turns(batches, model, portable, lambda batch: getattr(batch, "inputs", ())):  # features have none
        with room_to_train(turn.batch, config, ranks):
            loss = stage.loss(model, turn.batch.to(ranks.device)) * turn.weight
            ranks.backward(loss / planned, model)
        ran.append(_Ran(turn.batch.samples if turn.weight else (), loss.detach()))
    count = ranks.meet(sum(len(each.samples) for each in ran)).num_samples
    if not count:
        return _Stepped(0.0, 0.0, 0)
    with room_to_train(None, config, ranks):
        ranks.add_up_gradients(model)
        for parameter in model.parameters() if count < planned else ():
            if parameter.grad is not None:
                parameter.grad.mul_(planned / count)
        norm = ranks.accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        losses = [each.loss for each in ran]
        summed = ranks.total(torch.stack(losses).sum() if losses else torch.zeros((), device=ranks.device))
        # The one place in a step where the host waits for the device.
        mean, grad_norm = torch.stack([summed.float() / count, norm.float()]).tolist()
        if not math.isfinite(mean):
            wrong = [each for each in ran if not bool(torch.isfinite(each.loss))]
            raise _not_finite("loss", mean * count, wrong, ranks)
        if not math.isfinite(grad_norm):
            raise _not_finite("gradient", grad_norm, ran, ranks)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return _Stepped(mean, grad_norm, count)


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of a rank's dropout at a step, so that a resumed run draws what an uninterrupted one does."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


def portable(batch: B) -> B:
    """A copy of a micro-batch for another rank: its samples without the atlas that their media lie in."""
    nowhere = cast(MediaSource, None)  # whoever computes with a batch opens no medium
    samples = tuple(replace(sample, source=nowhere, refused={}) for sample in batch.samples)
    copied: B = replace(batch, samples=samples)  # type: ignore[type-var]
    return copied


def room_to_train(
    batch: Any, config: TrainConfig, ranks: Ranks, copies: int = 1, what: str = "micro-batch"
) -> AbstractContextManager[None]:
    """`room` for what training computes of a micro-batch, or for the step of the optimizer (`batch` None); `copies` are
    rows of a batch to a sample of the plan."""

    def keys() -> list[str]:
        found = []
        if batch is not None and len(batch) <= copies:
            found = ["a lower encode.max_tokens"]
        elif batch is not None:
            tokens_B = getattr(batch, "num_tokens", None)
            held = 0 if tokens_B is None else len(batch) * int(tokens_B.max())
            if config.device_tokens is not None or (held and config.device_batch_size is None):
                most = min(config.device_tokens or held, held or config.device_tokens or 0)
                found = [f"train.device_tokens={most // 2}"]
            else:
                found = [f"train.device_batch_size={len(batch) // copies // 2}"]
        if batch is not None and not config.activation_checkpointing:
            found.append("train.activation_checkpointing=true")
        return found + ([] if config.sharding == "full" or ranks.world == 1 else ["train.sharding=full"])

    return room(batch, keys, what="the step of the optimizer" if batch is None else what, fix=KEPT)


def _not_finite(name: str, value: float, ran: Sequence[_Ran], ranks: Ranks) -> HbaError:
    """The error that names the samples of what `ran` on all ranks; made by all of them together."""
    ids = ranks.gather([sample.id for each in ran for sample in each.samples])
    fix = "Look at these samples; lower the learning rate; the last checkpoint is good."
    return HbaError(f"{name} is {value}", where=f"samples {', '.join(ids)}", fix=fix)


def _resume(run: RunFolder, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> Progress:
    checkpoint = ranks.told(latest(run.checkpoints))
    progress = Progress() if checkpoint is None else read_progress(checkpoint)
    if checkpoint is not None:
        restore_optimizer(checkpoint, model, optimizer)
    if ranks.is_first:
        run.truncate_log(progress.step)
        if checkpoint is not None:
            settle(run.checkpoints, progress)
    return progress
