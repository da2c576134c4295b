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
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hba.atlas import Atlas, data_record, open_atlas
from hba.atlas.rows import Columns, MediaSource, Quarantined, Sample
from hba.batch.sampler import Indices, MixConfig, epoch_rows, plan_batches
from hba.errors import ConfigError, HbaError, InputError, MachineError
from hba.model import checkpoint
from hba.model.config import ModelConfig, require_quantizer
from hba.model.process import prepare_process, start_accelerator
from hba.run import RunFolder
from hba.train.config import TrainConfig
from hba.train.display import TrainingDisplay
from hba.train.ranks import Ranks, Turn, gathered, prepare_model
from hba.train.state import STOP, Progress, Saving, latest, read_progress, restore_optimizer, save_state, settle

# Which samples a rank trains on at which step: a pure function of (rows, mix, config, rank, number of ranks).
#
# Invariants: the samples of an optimizer step are the same for any number of ranks and any `device_batch_size`; every
# rank has as many micro-batches a step, and those at the same place have the same modalities. Where a batch has fewer
# samples than there are places for, some micro-batches are empty (see `ranks`): no number of rows or ranks is refused.


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
    rank: int,
    world: int,
) -> Plan:
    """This rank's share of the whole run, all epochs in a row. The batches are the same for any number of ranks.

    A batch has one modality signature, so that all ranks run the same layers at the same time; `groups_N` may divide
    the rows further.
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
    limit = config.device_batch_size
    shares = [share(batch, limit, (rank + number) % world, world) for number, batch in enumerate(batches)]
    ends = np.cumsum([len(parts) for parts in shares])
    starts = [0, *ends[config.accumulation - 1 :: config.accumulation].tolist()]
    if starts[-1] != ends[-1]:
        starts.append(int(ends[-1]))
    return Plan([part for parts in shares for part in parts], starts)


def share(batch: Indices, limit: int | None, place: int, world: int) -> list[Indices]:
    """A rank's samples of a batch, in as many parts on every rank; a part may be empty.

    A batch is sorted by length. It is cut into pieces that are dealt over the ranks in its order, so that a piece is
    padded little and ranks run pieces of similar length at the same time. A rank's `place` changes from batch to batch:
    no rank always has the longest pieces, or always those that a remainder leaves empty.
    """
    parts = 1 if limit is None else -(-len(batch) // (world * limit))
    size, longer = divmod(len(batch), parts * world)  # so many pieces, the first ones, have one sample more
    starts = [piece * size + min(piece, longer) for piece in range(place, parts * world, world)]
    pieces = range(place, parts * world, world)
    return [batch[start : start + size + (piece < longer)] for start, piece in zip(starts, pieces, strict=True)]


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


def require_installed(config: Any) -> None:
    """Raise ConfigError where a config asks for weights or an optimizer that cannot be had here, or for a precision
    that the LoRA layers it starts with were not trained on. Nothing is loaded."""
    model: ModelConfig | None = getattr(config, "model", None)
    if model is None:
        return
    require_quantizer(model.quantization, where="model.quantization")
    folder = checkpoint.resolve(model.name)
    card = None if folder is None else checkpoint.read_card(folder)
    has = checkpoint.quantization_of(card)
    if card is not None and card["strategy"] == "lora" and model.strategy == "lora" and has != model.quantization:
        kept = "unquantised weights" if has == "none" else has
        what = f"its LoRA layers were trained on {kept}, model.quantization is {model.quantization}"
        fix = f"Use model.quantization={has}, or fold them in first (hba merge)."
        raise ConfigError(what, where=model.name, fix=fix)


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
_SHOWN = 5


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
    """Share of the peak rate at optimizer step `step` (0-based) of `total`: linear warm-up, then a cosine."""
    warmup = max(1, round(config.warmup_share * total))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return config.final_share + (1 - config.final_share) * 0.5 * (1 + math.cos(math.pi * done))


def build_optimizer(model: nn.Module, config: TrainConfig, rates: Mapping[str, float]) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; matrices decay, vectors do not. Each group keeps its `peak` rate."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            peak = next((rate for prefix, rate in rates.items() if name.startswith(prefix)), config.learning_rate)
            decay = config.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((peak, decay), []).append(parameter)
    if not groups:
        raise ConfigError("nothing to train: no parameter requires a gradient", fix="Choose another strategy.")
    options = [{"params": p, "peak": peak, "lr": peak, "weight_decay": decay} for (peak, decay), p in groups.items()]
    return torch.optim.AdamW(options, betas=(config.beta1, config.beta2))


def shown_peak(optimizer: torch.optim.Optimizer, config: TrainConfig) -> float:
    """The peak rate that log lines follow: the config's, or where nothing trains at it the highest that there is."""
    peaks = {float(group["peak"]) for group in optimizer.param_groups}
    return config.learning_rate if config.learning_rate in peaks else max(peaks)


def train_stage(
    stage: Stage[B], config: StageConfig, run: RunFolder, ranks: Ranks, rows: Atlas, groups_N: Indices | None = None
) -> Progress:
    """`run_training` over this rank's share of the plan of `rows`; batches have one of `groups_N`, where given."""
    how = (rows.columns, rows.estimated_tokens, config.mix, config.train, groups_N)
    return run_training(stage, training_plan(*how, rank=ranks.rank, world=ranks.world), config.train, ranks, run)


def run_training(stage: Stage[B], plan: Plan, config: TrainConfig, ranks: Ranks, run: RunFolder) -> Progress:
    """Train `stage` over `plan`, resuming from the newest checkpoint of `run` if there is one.

    Raises StoppedError, after a checkpoint was written, when a signal asks a rank to stop.
    """
    total = num_steps(plan, config)
    ranks.wait()  # weights take one process longer to read than another; exchanges of tensors have a time limit
    shard, recompute = config.sharding == "full", config.activation_checkpointing
    model = prepare_model(stage.model, ranks.accelerator, shard=shard, checkpoint_activations=recompute)
    optimizer: torch.optim.Optimizer = build_optimizer(stage.model, config, stage.learning_rates)
    progress = _resume(run, stage.model, optimizer, ranks)
    saved_step = progress.step
    batches = stage.batches(plan.micro_batches, plan.starts[progress.step])
    saving = Saving(config.save_every)
    with saving, TrainingDisplay(run, total, progress, config, enabled=ranks.is_first) as display:
        while progress.step < total:
            started = time.perf_counter()
            micro_batches = list(islice(batches, plan.starts[progress.step + 1] - plan.starts[progress.step]))
            for batch in micro_batches:  # before anything that could fail: a resumed run shall know of them
                run.quarantine.add_all(batch.quarantined)
            wish = saving.wish(progress.step)
            met = ranks.meet(micro_batches, wish, lambda batch: getattr(batch, "inputs", ()))  # features have none
            if met.wish and progress.step > saved_step:
                save_state(run.checkpoints, progress, stage.model, optimizer, stage.save_model, ranks)
                saved_step = progress.step
                saving.saved()
            if met.wish == STOP:
                raise saving.stopped(progress, total)

            rate = learning_rate_at(progress.step, total, config)
            torch.manual_seed(step_seed(config.seed, progress.step, ranks.rank))
            loss, grad_norm, count = 0.0, 0.0, met.num_samples
            if count:
                turns = ranks.turns(micro_batches, met, model, portable)
                try:
                    loss, grad_norm = _step(stage, model, optimizer, turns, count, rate, config, ranks)
                except RuntimeError as error:  # torch.OutOfMemoryError is one; a CPU's allocator raises nothing else
                    raise (_no_room(turns, config, ranks) if _is_no_room(error) else error) from None
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
                save_state(run.checkpoints, progress, stage.model, optimizer, stage.save_model, ranks)
                saved_step = progress.step
                saving.saved()
    return progress


def _step(
    stage: Stage[B],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    turns: Sequence[Turn[B]],
    count: int,
    rate: float,
    config: TrainConfig,
    ranks: Ranks,
) -> tuple[float, float]:
    """One optimizer step over `count` samples of all ranks: the mean loss, and the gradient norm before clipping.

    Raises HbaError on all ranks, before the optimizer moves, when one of the two is not finite.
    """
    model.train()
    losses: list[Tensor] = []
    for turn in turns:
        loss = stage.loss(model, turn.batch.to(ranks.device)) * turn.weight
        ranks.backward(loss / count, model)
        losses.append(loss.detach())
    ranks.add_up_gradients(model)
    norm = ranks.accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    summed = ranks.total(torch.stack(losses).sum() if losses else torch.zeros((), device=ranks.device))
    # The one place in a step where the host waits for the device.
    mean, grad_norm = torch.stack([summed.float() / count, norm.float()]).tolist()
    if not math.isfinite(mean):
        wrong = [turn for turn, loss in zip(turns, losses, strict=True) if not bool(torch.isfinite(loss))]
        raise _not_finite("loss", mean * count, wrong, ranks)
    if not math.isfinite(grad_norm):
        raise _not_finite("gradient", grad_norm, turns, ranks)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return mean, grad_norm


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of a rank's dropout at a step, so that a resumed run draws what an uninterrupted one does."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


def portable(batch: B) -> B:
    """A copy of a micro-batch for another rank: its samples without the atlas that their media lie in."""
    nowhere = cast(MediaSource, None)  # whoever computes with a batch opens no medium
    samples = tuple(replace(sample, source=nowhere, refused={}) for sample in batch.samples)
    copied: B = replace(batch, samples=samples)  # type: ignore[type-var]
    return copied


def _is_no_room(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _no_room(turns: Sequence[Turn[Any]], config: TrainConfig, ranks: Ranks) -> MachineError:
    """The error for a device that is too small for a micro-batch: what it held, and what to change."""
    most = max((turn.batch for turn in turns), key=len)
    tokens = getattr(most, "num_tokens", None)  # features of a frozen backbone have no tokens any more
    lengths = "" if tokens is None else f" of up to {int(tokens.max()):,} tokens"
    what = f"no room for a micro-batch of {len(most)} samples{lengths}"
    if ranks.device.type == "cuda":
        used, size = torch.cuda.max_memory_allocated(ranks.device), torch.cuda.mem_get_info(ranks.device)[1]
        what += f" ({used / 2**30:.1f} of {size / 2**30:.1f} GiB were in use)"
    half = max(1, len(most) // 2)
    keys = [f"train.device_batch_size={half}"] if len(most) > 1 else ["a lower encode.max_tokens"]
    keys += [] if config.activation_checkpointing else ["train.activation_checkpointing=true"]
    keys += [] if config.sharding == "full" or ranks.world == 1 else ["train.sharding=full"]
    fix = f"Use {' or '.join(keys)}; `hba fit MODEL --gpu GB` tells what fits. The last checkpoint is good."
    ids = ", ".join([sample.id if isinstance(sample, Sample) else str(sample) for sample in most.samples][:_SHOWN])
    return MachineError(what, where=f"{ranks.device}, samples {ids}", fix=fix)


def _not_finite(name: str, value: float, turns: Sequence[Turn[Any]], ranks: Ranks) -> HbaError:
    """The error that names the samples of `turns` of all ranks; made by all of them together."""
    ids = ranks.gather([sample.id for turn in turns if turn.weight for sample in turn.batch.samples])
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
