"""The one training loop. A stage gives it a loss; everything else (order, accumulation, clipping, schedule, checks,
logging, validation, checkpoints, resume) is here and the same for every stage.

One optimizer step = `accumulation` batches, each shared out over the ranks; its loss is the sum over their samples
divided by the number of samples of all ranks, so that accumulation, world size and uneven batches do not change the
gradient. The run is a function of (config, data, seed): killed and resumed, on as many devices or on others, it gives
the losses and weights of an uninterrupted one. Only dropout depends on the number of ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hba.atlas.sample import Quarantined, Sample
from hba.atlas.sampler import Indices
from hba.errors import ConfigError, HbaError
from hba.run import RunFolder
from hba.train.config import TrainConfig
from hba.train.display import TrainingDisplay
from hba.train.optimizer_state import restore_optimizer
from hba.train.plan import Plan, num_steps
from hba.train.sharding import gathered, is_sharded, prepare_model
from hba.train.state import Progress, latest, read_progress, save_state, settle


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


def run_training(
    stage: Stage[B], plan: Plan, config: TrainConfig, accelerator: Accelerator, run: RunFolder
) -> Progress:
    """Train `stage` over `plan`, resuming from the newest checkpoint of `run` if there is one."""
    total = num_steps(plan, config)
    model = prepare_model(
        stage.model,
        accelerator,
        shard=config.sharding == "full",
        checkpoint_activations=config.activation_checkpointing,
    )
    optimizer: torch.optim.Optimizer = build_optimizer(stage.model, config, stage.learning_rates)
    progress = _resume(run, stage.model, optimizer, accelerator)
    batches = stage.batches(plan.micro_batches, plan.starts[progress.step])
    with TrainingDisplay(run, total, progress, config, enabled=accelerator.is_main_process) as display:
        while progress.step < total:
            started = time.perf_counter()
            rate = learning_rate_at(progress.step, total, config)
            torch.manual_seed(step_seed(config.seed, progress.step, accelerator.process_index))
            micro_batches = list(islice(batches, plan.starts[progress.step + 1] - plan.starts[progress.step]))
            loss, grad_norm, count = _step(stage, model, optimizer, micro_batches, rate, config, accelerator)
            progress = replace(progress, step=progress.step + 1, samples_seen=progress.samples_seen + count)
            for batch in micro_batches:
                run.quarantine.add_all(batch.quarantined)
            seconds = time.perf_counter() - started
            shown = rate * shown_peak(optimizer, config)
            display.step(progress, loss=loss, grad_norm=grad_norm, learning_rate=shown, count=count, seconds=seconds)
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
    count = _count_samples(micro_batches, accelerator)
    full = [batch for batch in micro_batches if len(batch)]
    if not count:
        return math.nan, math.nan, 0
    summed = torch.zeros((), device=accelerator.device)
    for number, batch in enumerate(full, 1):
        # A sharded model keeps its gradients sharded: it reduces them after every micro-batch.
        with nullcontext() if number == len(full) or is_sharded(model) else accelerator.no_sync(model):
            total = stage.loss(model, batch.to(accelerator.device))
            _require_finite(total, "loss", [batch])
            # Ranks average their gradients; times their number it is the sum that the mean over all samples needs.
            accelerator.backward(total * accelerator.num_processes / count)
            summed += total.detach()
    grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    grad_norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
    _require_finite(grad_norm, "gradient", micro_batches)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    mean = float(accelerator.reduce(summed, reduction="sum")) / count
    return mean, float(grad_norm), count


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of a rank's dropout at a step, so that a resumed run draws what an uninterrupted one does."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


def _count_samples(micro_batches: Sequence[TrainBatch], accelerator: Accelerator) -> int:
    """Samples of a step on all ranks. Raises HbaError on every rank when one has a batch to run that another has not.

    Ranks exchange gradients and gather layers in every pass: one that has none to run would keep the others waiting.
    """
    own = torch.tensor([[len(batch) for batch in micro_batches]], device=accelerator.device)
    counted_RM = accelerator.gather(own)
    if bool(((counted_RM > 0) != (counted_RM[:1] > 0)).any()):
        what = "every sample of one process's batch is quarantined, while other processes have samples"
        raise HbaError(what, where="quarantine.jsonl", fix="Repair the media, or use larger batches.")
    return int(counted_RM.sum())


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
    with gathered(stage.model):
        validation = stage.validate()
    display.validation(progress, validation.metrics)
    if progress.best_score is None or validation.score > progress.best_score:
        progress = replace(progress, best_step=progress.step, best_score=validation.score)
    save_state(run.checkpoints, progress, stage.model, optimizer, stage.save_model, accelerator)
    return progress


def _resume(run: RunFolder, model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> Progress:
    checkpoint = latest(run.checkpoints)
    progress = Progress() if checkpoint is None else read_progress(checkpoint)
    if checkpoint is not None:
        restore_optimizer(checkpoint, model, optimizer)
    if accelerator.is_main_process:
        run.truncate_log(progress.step)
        if checkpoint is not None:
            settle(run.checkpoints, progress)
    return progress
