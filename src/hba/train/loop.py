"""The one training loop. A stage gives it a loss; everything else (order, accumulation, clipping, schedule, checks,
logging, validation, checkpoints, resume) is here and the same for every stage.

One optimizer step = `accumulation` micro-batches on each rank; its loss is the sum over their samples divided by the
number of samples of all ranks, so that accumulation, world size and uneven batches do not change the gradient. The run
is a function of (config, data, seed): killed and resumed, it gives the losses and weights of an uninterrupted one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from accelerate import Accelerator
from pydantic import Field
from torch import Tensor, nn

from hba.atlas.columns import Columns
from hba.atlas.mixing import MixConfig, epoch_rows
from hba.atlas.sample import Quarantined, Sample
from hba.atlas.sampler import Indices, plan_batches
from hba.config import option
from hba.errors import ConfigError, HbaError
from hba.run import RunFolder
from hba.train.display import TrainingDisplay
from hba.train.state import Progress, latest, read_progress, restore_optimizer, save_state

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a stage is trained."""

    epochs: Count = option(5, "passes over the training rows")
    max_steps: Count | None = option(None, "stop after so many optimizer steps, even in mid-epoch")
    batch_size: Count = option(8, "samples in a micro-batch on one device")
    accumulation: Count = option(1, "micro-batches in one optimizer step on each device")
    learning_rate: Rate = option(1e-4, "peak learning rate")
    warmup_share: Share = option(0.05, "share of the steps with a rising learning rate, 0..1")
    final_share: Share = option(0.05, "learning rate at the end of the cosine, as a share of the peak")
    weight_decay: float = option(0.01, "AdamW weight decay of matrices; biases and norms have none")
    beta1: Share = option(0.9, "AdamW first-moment decay")
    beta2: Share = option(0.98, "AdamW second-moment decay")
    max_grad_norm: Rate = option(1.0, "gradients are scaled down to this norm")
    validate_every: Count = option(200, "optimizer steps between validations; each writes a checkpoint")
    log_every: Count = option(10, "optimizer steps between log lines", affects_result=False)
    seed: int = option(0, "orders the samples, starts fresh weights and dropout")
    wandb_project: str | None = option(None, "also log to this Weights & Biases project", affects_result=False)


class Validation(NamedTuple):
    """What a validation gives: the score that chooses the best checkpoint, and everything to log."""

    score: float
    metrics: dict[str, Any]


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


def training_plan(
    columns: Columns, lengths_N: Indices, mix: MixConfig, config: TrainConfig, *, rank: int, world: int
) -> list[Indices]:
    """This rank's micro-batches of the whole run, all epochs in a row; every global batch is split over the ranks."""
    plan: list[Indices] = []
    for epoch in range(config.epochs):
        rows = epoch_rows(columns, mix, seed=config.seed, epoch=epoch)
        codes_M, size = columns.signature_codes[rows], config.batch_size * world
        batches = plan_batches(codes_M, lengths_N[rows], batch_size=size, seed=config.seed, epoch=epoch)
        plan += [rows[batch] for batch in batches]
    smallest = min(map(len, plan))
    if smallest < world:
        fix = "Use fewer processes or a batch size that does not leave so small a rest."
        raise ConfigError(f"a batch of {smallest} samples cannot be split over {world} processes", fix=fix)
    return [batch[rank::world] for batch in plan]


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


def run_training(
    stage: Stage[B], plan: Sequence[Indices], config: TrainConfig, accelerator: Accelerator, run: RunFolder
) -> Progress:
    """Train `stage` over `plan`, resuming from the newest checkpoint of `run` if there is one."""
    total = math.ceil(len(plan) / config.accumulation)
    total = min(total, config.max_steps) if config.max_steps is not None else total
    optimizer = build_optimizer(stage.model, config, stage.learning_rates)
    model, optimizer = accelerator.prepare(stage.model, optimizer)
    progress = _resume(run, optimizer, accelerator)
    batches = stage.batches(plan, progress.step * config.accumulation)
    with TrainingDisplay(run, total, progress, config, enabled=accelerator.is_main_process) as display:
        while progress.step < total:
            started = time.perf_counter()
            rate = learning_rate_at(progress.step, total, config)
            micro_batches = list(islice(batches, config.accumulation))
            loss, grad_norm, count = _step(stage, model, optimizer, micro_batches, rate, config, accelerator)
            progress = replace(progress, step=progress.step + 1, samples_seen=progress.samples_seen + count)
            for batch in micro_batches:
                for sample in batch.quarantined:
                    run.quarantine.add(sample)
            seconds = time.perf_counter() - started
            display.step(progress, loss=loss, grad_norm=grad_norm, rate=rate, count=count, seconds=seconds)
            if progress.step % config.validate_every == 0 or progress.step == total:
                progress = _validate_and_save(stage, progress, optimizer, accelerator, run, display)
    return progress


def _step(
    stage: Stage[B],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[B],
    rate: float,
    config: TrainConfig,
    accelerator: Accelerator,
) -> tuple[float, float, int]:
    """One optimizer step. Returns the mean loss over all ranks, the gradient norm before clipping, and the samples."""
    model.train()
    full = [batch for batch in micro_batches if len(batch)]
    count = _count_samples(full, accelerator)
    if not count:
        return math.nan, math.nan, 0
    summed = torch.zeros((), device=accelerator.device)
    for number, batch in enumerate(full, 1):
        with nullcontext() if number == len(full) else accelerator.no_sync(model):
            total = stage.loss(model, batch.to(accelerator.device))
            _require_finite(total, "loss", [batch])
            # Ranks average their gradients; times their number it is the sum that the mean over all samples needs.
            accelerator.backward(total * accelerator.num_processes / count)
            summed += total.detach()
    grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    _require_finite(grad_norm, "gradient", micro_batches)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    mean = float(accelerator.reduce(summed, reduction="sum")) / count
    return mean, float(grad_norm), count


def _count_samples(full: Sequence[TrainBatch], accelerator: Accelerator) -> int:
    """Samples of a step on all ranks. Raises HbaError on every rank when one has fewer batches to run than another."""
    own = torch.tensor([[sum(map(len, full)), len(full)]], device=accelerator.device)
    counted = accelerator.gather(own)
    if len(set(counted[:, 1].tolist())) > 1:
        # Ranks exchange gradients in every backward pass: one that has none to run would keep the others waiting.
        what = "every sample of one process's batch is quarantined, while other processes have samples"
        raise HbaError(what, where="quarantine.jsonl", fix="Repair the media, or use larger batches.")
    return int(counted[:, 0].sum())


def _require_finite(value: Tensor, name: str, batches: Sequence[TrainBatch]) -> None:
    if not bool(torch.isfinite(value)):
        ids = ", ".join(s.id for b in batches for s in b.samples)
        fix = "Look at these samples; lower the learning rate; the last checkpoint is good."
        raise HbaError(f"{name} is {float(value.detach())}", where=f"samples {ids}", fix=fix)


def _validate_and_save(
    stage: Stage[Any],
    progress: Progress,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    run: RunFolder,
    display: TrainingDisplay,
) -> Progress:
    stage.model.eval()
    validation = stage.validate()
    display.validation(progress, validation.metrics)
    if progress.best_score is None or validation.score > progress.best_score:
        progress = replace(progress, best_step=progress.step, best_score=validation.score)
    if accelerator.is_main_process:
        save_state(run.checkpoints, progress, optimizer, stage.save_model, accelerator.device)
    accelerator.wait_for_everyone()
    return progress


def _resume(run: RunFolder, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> Progress:
    checkpoint = latest(run.checkpoints)
    progress = Progress() if checkpoint is None else read_progress(checkpoint)
    if checkpoint is not None:
        restore_optimizer(checkpoint, optimizer, accelerator.device)
    if accelerator.is_main_process:
        run.truncate_log(progress.step)
    return progress
