"""Reinforcement learning on one machine, or on the GPUs of one launcher: `hba train rl`.

A step reads like the papers: sample responses to the prompts of the step, reward them, turn the rewards into
advantages over all rollouts of all processes, update the policy, and every `validate_every` steps evaluate it and keep
it. Prompts come from the loader in the order of the training plan, in batches of one modality signature.

The run is a function of (config, data, seed): each draw is seeded by its place in the plan, and what an algorithm
remembers (HARPO's averages), the place in the plan and the watch over the rewards lie in the checkpoint beside weights
and optimizer. Killed in any phase of a step and resumed, on as many processes or on others, it gives the results of an
uninterrupted run. A process may have no prompt of a step, by a remainder or since none can be read: all go on together.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hba.atlas import Atlas
from hba.batch.encode import Batch, Encoder, encoder_for
from hba.batch.prompt import FormatMix
from hba.errors import HbaError, InputError
from hba.model import checkpoint
from hba.model.checkpoint import require_perceived
from hba.model.config import ModelConfig
from hba.model.omni import OmniSapiens
from hba.model.weights import language_layers
from hba.rl.advantages import Advantage, build_advantage, informative
from hba.rl.config import Algorithm, RlConfig
from hba.rl.evaluation import answer_of, evaluate
from hba.rl.evaluation_log import collapsed_tasks, summary, write_evaluation
from hba.rl.losses import importance_weights, kl_divergence, surrogate, token_weights
from hba.rl.prompts import PromptFeed, sample_of
from hba.rl.rewards import Scorer
from hba.rl.rollout import Draws, Key, Probabilities, Prompts, Rollouts, Sampler, probabilities, roll_out
from hba.rl.server import build_sampler, require_small_gap
from hba.rl.telemetry import CollapseWatch, Outcome, RunLog, Updated
from hba.run import RunFolder
from hba.storage import read_json, write_json
from hba.train.display import TrainingDisplay
from hba.train.loop import (
    begin,
    build_optimizer,
    learning_rate_at,
    load_model,
    portable,
    room_to_train,
    step_seed,
    stopped_early,
)
from hba.train.ranks import Ranks, Turn, gathered, is_sharded, prepare_model
from hba.train.state import STOP, Progress, Saving, read_progress, restore_optimizer, save_state

# The update: from rollouts with advantages to new weights.
#
# The loss of an update is a weighted sum over its response tokens, of all processes together (`losses.token_weights`),
# so that micro-batches and ranks change nothing but memory; a rank may have none of them (`hba.train.ranks`). Where a
# step makes one update the old policy is the policy itself: ratios are 1, nothing is clipped, and the gradient is that
# of REINFORCE with the advantages. With several updates a step, each over a part of its prompts, the probabilities
# before the first are kept.
#
# Rollouts without signal have no gradient. They are looked at all the same, for their entropy and their distance from
# the reference, and they count where the algorithm averages over all rollouts.
#
# Shapes: B rows (rollouts) of a micro-batch, L response tokens, N rollouts of an update on all ranks.


Pieces: TypeAlias = Sequence[Sequence[Rollouts | None]]  # of a step: the micro-batches of each, None for an empty one


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A micro-batch on its way through the update. Rows that are left out of it (`dapo`) have neither outcome nor
    weight; a part without any outcome is not run."""

    batch: Batch | None
    outcomes: Sequence[Outcome | None]
    advantages_B: Tensor
    weights_B: Tensor  # of one token of the row, in the loss of the update
    sampler_logps_BL: Tensor
    update: int
    old_logps_BL: Tensor | None = None  # None: those of the update itself
    reference_logps_BL: Tensor | None = None

    def __len__(self) -> int:
        """Rollouts that take part."""
        return sum(outcome is not None for outcome in self.outcomes)

    def for_another_rank(self) -> _Part:
        """What another rank needs to run the same passes."""
        assert self.batch is not None
        return replace(self.to(torch.device("cpu")), batch=portable(self.batch).to("cpu"), outcomes=())

    def to(self, device: torch.device) -> _Part:
        """The same with its tensors on `device`."""
        assert self.batch is not None
        return replace(
            self,
            batch=self.batch.to(device),
            advantages_B=self.advantages_B.to(device),
            weights_B=self.weights_B.to(device),
            sampler_logps_BL=self.sampler_logps_BL.to(device),
        )


def update(setup: Setup, pieces: Pieces, everyone: Sequence[Outcome], rate: float) -> Updated:
    """Update the policy on the rollouts in `pieces`, those of this rank.

    `everyone` are the outcomes of all ranks that take part, in one order; this rank's learn what the update says of
    them. `rate` scales the learning rates. Raises HbaError naming the samples when loss or gradient are not finite.
    """
    config = setup.config.loss
    updates = min(config.updates, len(pieces))
    of_update: dict[int, list[Outcome]] = defaultdict(list)
    for outcome in everyone:
        of_update[outcome.piece * updates // len(pieces)].append(outcome)
    parts = _parts(setup, pieces, of_update, updates)
    given = setup.ranks.turns(
        parts,
        setup.policy,
        _Part.for_another_rank,
        lambda part: () if part.batch is None else part.batch.inputs,
    )
    turns = list(given)  # each on the device at its turn alone
    if setup.reference is not None or len(of_update) > 1:
        turns = [Turn(_looked_ahead(setup, turn.batch, old=len(of_update) > 1), turn.weight) for turn in turns]
    done = [
        _one_update(setup, [turn for turn in turns if turn.batch.update == number], of_update[number], rate)
        for number in sorted(of_update)
    ]
    return Updated(sum(u.loss for u in done) / len(done), sum(u.grad_norm for u in done) / len(done))


def _parts(setup: Setup, pieces: Pieces, of_update: Mapping[int, Sequence[Outcome]], updates: int) -> list[_Part]:
    """The micro-batches of this rank, with what the outcomes of all ranks make of theirs."""
    known: dict[Key, Outcome] = {}
    weights: dict[Key, float] = {}
    for outcomes in of_update.values():
        numbers: dict[str, int] = {}
        weights_N = token_weights(
            torch.tensor([outcome.tokens for outcome in outcomes]),
            torch.tensor([numbers.setdefault(outcome.group, len(numbers)) for outcome in outcomes]),
            average=setup.algorithm.average,
            max_tokens=setup.config.rollout.max_new_tokens,
        )
        known |= {outcome.key: outcome for outcome in outcomes}
        weights |= dict(zip((outcome.key for outcome in outcomes), weights_N.tolist(), strict=True))
    parts = []
    for piece, rollouts in ((number, each) for number, micro in enumerate(pieces) for each in micro):
        keys = [] if rollouts is None else rollouts.keys
        rows = [known.get(key) for key in keys]
        parts.append(
            _Part(
                batch=None if rollouts is None else rollouts.batch,
                outcomes=rows,
                advantages_B=torch.tensor([0.0 if row is None else row.advantage for row in rows]),
                weights_B=torch.tensor([weights.get(key, 0.0) for key in keys]),
                sampler_logps_BL=torch.zeros(0, 0) if rollouts is None else rollouts.sampler_logps_BL,
                update=piece * updates // len(pieces),
            )
        )
    return parts


@torch.no_grad()
def _looked_ahead(setup: Setup, part: _Part, *, old: bool) -> _Part:
    """The part with the probabilities of the reference and, with `old`, those before the step."""
    moved, temperature = part.to(setup.accelerator.device), setup.config.rollout.temperature
    assert moved.batch is not None
    with _room(setup, moved.batch):
        if setup.reference is not None:
            part = replace(part, reference_logps_BL=setup.reference(moved.batch, temperature))
        return replace(part, old_logps_BL=_probabilities(setup, moved).logps_BL) if old else part


def _one_update(setup: Setup, turns: Sequence[Turn[_Part]], outcomes: Sequence[Outcome], rate: float) -> Updated:
    """One optimizer step over `outcomes`, those of all ranks; nothing moves where none of them has a gradient."""
    ranks, accelerator, policy = setup.ranks, setup.accelerator, setup.policy
    losses: list[Tensor] = []
    learned: list[_Learned] = []
    for turn in turns:
        part = turn.batch.to(accelerator.device)
        # Sharded ranks go through their layers together, backwards too.
        signal = setup.reference is not None or any(row and row.advantage for row in part.outcomes)
        silent = not signal and not is_sharded(policy)
        with _room(setup, part.batch):
            with torch.no_grad() if silent else nullcontext():
                loss, about = _loss(setup, part)
                loss = loss * turn.weight
            if not silent:
                ranks.backward(loss, policy)
        losses.append(loss.detach())
        learned.append(about)
    ranks.add_up_gradients(policy)
    norm = accelerator.clip_grad_norm_(policy.parameters(), setup.config.train.max_grad_norm)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    summed = ranks.total(torch.stack(losses).sum() if losses else torch.zeros((), device=accelerator.device))
    # Here the host waits for the device; in the micro-batches nothing of ours makes it.
    mean, grad_norm = torch.stack([summed.float(), norm.float()]).tolist()
    for about in learned:
        about.tell()
    for name, value in (("loss", mean), ("gradient", grad_norm)):
        if not math.isfinite(value):
            ids = ", ".join(dict.fromkeys(outcome.id for outcome in outcomes))
            fix = "Look at these samples; lower the learning rate; the last checkpoint is good."
            raise HbaError(f"{name} is {value}", where=f"samples {ids}", fix=fix)
    if setup.reference is not None or any(outcome.advantage for outcome in outcomes):
        for group in setup.optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        with _room(setup, None):
            setup.optimizer.step()
    setup.optimizer.zero_grad(set_to_none=True)
    return Updated(mean, grad_norm)


def _room(setup: Setup, batch: Batch | None) -> AbstractContextManager[None]:
    copies = setup.config.rollout.per_prompt
    return room_to_train(batch, setup.config.train, setup.ranks, copies, "micro-batch")


class _Learned(NamedTuple):
    """What an update says of the rollouts of a micro-batch: by name a mean over the tokens of each, on the device."""

    outcomes: Sequence[Outcome | None]
    means_B: Mapping[str, Tensor]

    def tell(self) -> None:
        """Let the outcomes know."""
        for name, values_B in self.means_B.items() if self.outcomes else ():
            for outcome, value in zip(self.outcomes, values_B.tolist(), strict=True):
                if outcome is not None:
                    setattr(outcome, name, value)


def _loss(setup: Setup, part: _Part) -> tuple[Tensor, _Learned]:
    """The share of a micro-batch in the loss, and what its outcomes learn: entropy, KL, clipping."""
    config, algorithm = setup.config.loss, setup.algorithm
    new = _probabilities(setup, part)
    old_BL = new.logps_BL.detach() if part.old_logps_BL is None else part.old_logps_BL
    terms = surrogate(
        new.logps_BL,
        old_BL,
        part.advantages_B,
        new.mask_BL,
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        ratio=algorithm.ratio,
    )
    loss_BL, reported = terms.loss_NL, {"entropy": new.entropy_BL, "clipped": terms.clipped_NL.float()}
    reported["sampler_gap"] = (old_BL - part.sampler_logps_BL).abs()
    if config.importance_cap is not None:
        reported["importance"] = importance_weights(old_BL, part.sampler_logps_BL, new.mask_BL, config.importance_cap)
        loss_BL = loss_BL * reported["importance"]
    if part.reference_logps_BL is not None:
        loss_BL = loss_BL + config.kl_weight * kl_divergence(new.logps_BL, part.reference_logps_BL, config.kl)
        reported["kl"] = kl_divergence(new.logps_BL.detach(), part.reference_logps_BL, "k3")
    tokens_B = new.mask_BL.sum(1).clamp_min(1)
    means = {name: (value_BL.detach() * new.mask_BL).sum(1) / tokens_B for name, value_BL in reported.items()}
    return (loss_BL * new.mask_BL * part.weights_B.unsqueeze(1)).sum(), _Learned(part.outcomes, means)


def _probabilities(setup: Setup, part: _Part) -> Probabilities:
    assert part.batch is not None  # only parts with rollouts have a turn
    return probabilities(setup.model, setup.policy, part.batch, setup.config.rollout.temperature)


# The policy of an RL run, and the reference that it may be kept near to.
#
# The policy is any chat model that speaks: a run or checkpoint of generative training, or a published model. What a
# LoRA run compares itself with is itself with its layers switched off, which costs no memory; a run that trains
# everything holds a frozen copy. Dropout is off: probabilities of the update must be those of the sampling.
#
# All of them compute in one precision, that of training (autocast over the weights as they are kept): a difference of
# log-probabilities is then one of policies and not of roundings.


Reference = Callable[[Batch, float], Tensor]  # (batch, temperature) -> log-probabilities [B, L]


def build_policy(config: ModelConfig, resume: Path | None, *, freeze_towers: bool, mapped: bool = False) -> OmniSapiens:
    """The model to train, from the config's name or the checkpoint that a run resumes at.

    With strategy full and `freeze_towers`, the layers of the language model train and nothing else does; `mapped` as in
    `OmniSapiens.from_pretrained`.
    """
    policy = load_model(config, resume, mapped=mapped, heads=False)
    if config.strategy == "full" and freeze_towers:
        prefix = language_layers(policy.transformer).prefix
        trained = f"{prefix}layers.", f"{prefix}norm."
        for name_, parameter in policy.transformer.named_parameters():
            parameter.requires_grad = name_.startswith(trained)
    for module in policy.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return policy


def build_reference(config: ModelConfig, policy: OmniSapiens, accelerator: Accelerator) -> Reference:
    """The policy as it was when the run began, whatever a resumed one has learned since.

    Raises InputError for a run that goes on with LoRA layers which it was given: without them it is another model.
    """
    if config.strategy == "lora":
        folder = checkpoint.resolve(config.name)
        if folder is not None and checkpoint.read_card(folder)["strategy"] == "lora":
            fix = "Merge it first (hba merge) and start from the merged model, or set loss.kl_weight=0."
            raise InputError("a model with LoRA layers has no reference to switch to", where=config.name, fix=fix)
        return lambda batch, temperature: _without_lora(policy, batch, temperature, accelerator)
    frozen = OmniSapiens.from_pretrained(config.name, dtype="float32", attention=config.attention, heads=False)
    if accelerator.mixed_precision == "bf16":
        _round_once(frozen)
    frozen = frozen.to(accelerator.device).eval().requires_grad_(False)
    return lambda batch, temperature: _looked_at(frozen, batch, temperature, accelerator)


def _round_once(model: OmniSapiens) -> None:
    """Keep in bfloat16 what autocast would round in each pass: half the memory, and the same numbers."""
    words = model.transformer.get_input_embeddings().weight  # never rounded; a language head may share it
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.weight is not words:
            module.to(torch.bfloat16)


def _without_lora(policy: OmniSapiens, batch: Batch, temperature: float, accelerator: Accelerator) -> Tensor:
    policy.transformer.disable_adapters()
    try:
        return _looked_at(policy, batch, temperature, accelerator)
    finally:
        policy.transformer.enable_adapters()


@torch.no_grad()
def _looked_at(model: OmniSapiens, batch: Batch, temperature: float, accelerator: Accelerator) -> Tensor:
    with accelerator.autocast():
        return probabilities(model, model, batch, temperature).logps_BL


# --- the loop ---------------------------------------------------------------------------------------------------------


STATE = "rl_state.json"


class Setup(NamedTuple):
    """What stays the same in all steps of a run."""

    config: RlConfig
    algorithm: Algorithm
    ranks: Ranks
    run: RunFolder
    policy: OmniSapiens
    model: nn.Module  # the policy as it is prepared for training
    sampler: Sampler
    reference: Reference | None
    optimizer: torch.optim.Optimizer
    scorer: Scorer
    encoder: Encoder
    validation: Atlas

    @property
    def accelerator(self) -> Accelerator:
        """Of this process."""
        return self.ranks.accelerator


class Memory(NamedTuple):
    """What changes from step to step besides weights and optimizer, and is in every checkpoint."""

    advantage: Advantage
    watch: CollapseWatch
    feed: PromptFeed

    def save(self, folder: Path) -> None:
        """Write it into a checkpoint."""
        state = {"advantage": self.advantage.state_dict(), "watch": self.watch.state_dict()}
        write_json(folder / STATE, {**state, "position": self.feed.position})


class Sampled(NamedTuple):
    """The rollouts of a step."""

    pieces: list[list[Rollouts | None]]  # this rank's; None for a micro-batch without prompts
    outcomes: list[Outcome]  # of all ranks, those that take part in the step
    num_prompts: int  # that were sampled


def train_rl(config: RlConfig, run: RunFolder) -> Progress:
    """Run (or resume) it in `run`.

    Raises InputError for bad data, config or reward, HbaError for a failing step, StoppedError, after a checkpoint was
    written, when a signal asks a rank to stop.
    """
    of_datasets = partial(Atlas.filter, datasets=config.datasets)
    ranks, train, validation, checkpoint = begin(config, run, config.model.dtype, of_datasets)
    require_perceived(config.model.name, config.encode, train)
    setup = _setup(config, run, ranks, train, sample_of(validation, config), checkpoint)
    memory, progress = _memory(setup, train, checkpoint)
    ranks.wait()  # for one that reads its reference for longer: a sharded policy is gathered next
    planned = -(-len(memory.feed) // config.train.accumulation)
    total = planned if config.train.max_steps is None else min(planned, config.train.max_steps)
    display = TrainingDisplay(run, total, progress, config.train, enabled=ranks.is_first)
    saving = Saving(config.train.save_every)
    with closing(setup.sampler), saving, display:
        log = RunLog(run, display, config, total)
        if checkpoint is None:
            progress = _evaluate_and_save(setup, memory, progress, log)
        saved_step = progress.step
        while progress.step < total and not stopped_early(progress, config.train):
            wish = ranks.meet(wish=saving.wish(progress.step)).wish
            if wish and progress.step > saved_step:
                _save(setup, memory, progress)
                saved_step = progress.step
                saving.saved()
            if wish == STOP:
                raise saving.stopped(progress, total)

            progress = _step(setup, memory, progress, log, total)

            if progress.step % config.train.validate_every == 0 or progress.step == total:
                progress = _evaluate_and_save(setup, memory, progress, log)
                if progress.step < total and stopped_early(progress, config.train):
                    display.stopped_early(progress)
                saved_step = progress.step
                saving.saved()
    return progress


def _step(setup: Setup, memory: Memory, progress: Progress, log: RunLog, total: int) -> Progress:
    """Sample, reward, compare, update."""
    config, ranks, started = setup.config, setup.ranks, time.perf_counter()
    torch.manual_seed(step_seed(config.train.seed, progress.step, ranks.rank))
    setup.sampler.renew(progress.step)
    rate = learning_rate_at(progress.step, total, config.train)
    pieces, everyone, num_prompts = _sample(setup, memory.feed, progress.step)
    progress = replace(progress, step=progress.step + 1, samples_seen=progress.samples_seen + num_prompts)
    if not everyone:
        log.skipped(progress, "no group has signal" if num_prompts else "every sample is quarantined")
        return progress
    sampled_at = time.perf_counter()
    advantages = memory.advantage(
        [o.parts["score"] for o in everyone], [o.group for o in everyone], [o.task for o in everyone]
    )
    for outcome, value in zip(everyone, advantages.tolist(), strict=True):
        outcome.advantage = value
    updated = update(setup, pieces, everyone, rate)
    own = {key for piece in pieces for rollouts in piece if rollouts is not None for key in rollouts.keys}
    everyone = _in_order(ranks.gather([outcome for outcome in everyone if outcome.key in own]))
    seconds = {"rollout_seconds": sampled_at - started, "update_seconds": time.perf_counter() - sampled_at}
    log.step(progress, everyone, memory.advantage, memory.watch, updated, rate, num_prompts, seconds)
    if config.rollout.sampler == "server":
        require_small_gap([outcome.sampler_gap for outcome in everyone], config)
    return progress


def _sample(setup: Setup, feed: PromptFeed, step: int) -> Sampled:
    """The rollouts of a step, rewarded; with dynamic sampling of as many batches as give enough signal."""
    train, rollout, dynamic = setup.config.train, setup.config.rollout, setup.algorithm.dynamic_sampling
    draws = Draws(f"{train.seed}/training", rollout.max_new_tokens, rollout.temperature)
    if train.device_tokens is not None:
        draws = draws._replace(size_key="train.device_tokens")
    taken = train.accumulation if dynamic else min(train.accumulation, len(feed) - step * train.accumulation)
    most = taken + (setup.config.max_extra_batches if dynamic else 0)
    pieces: list[list[Rollouts | None]] = []
    everyone: list[Outcome] = []
    with gathered(setup.policy):
        prompts = [piece for _ in range(taken) for piece in feed.take()]
        while True:
            _quarantine(setup, prompts)
            everyone += setup.ranks.collect(partial(_answered, setup, prompts, draws, pieces))
            kept = _in_order(everyone)
            if dynamic:
                wanted = train.batch_size * train.accumulation
                kept = _with_signal(kept, wanted)
            if not dynamic or taken == most or len(_groups(kept)) == wanted:
                return Sampled(pieces, kept, len(_groups(everyone)))
            prompts, taken = feed.take(), taken + 1


def _quarantine(setup: Setup, pieces: Sequence[Sequence[Prompts]]) -> None:
    """Name what cannot be read, before anything that could fail: a resumed run shall know of it."""
    for prompts in (prompts for piece in pieces for prompts in piece):
        setup.run.quarantine.add_all(prompts.batch.quarantined)


def _answered(
    setup: Setup, pieces: Sequence[Sequence[Prompts]], draws: Draws, before: list[list[Rollouts | None]]
) -> list[Outcome]:
    """A response to each row of this rank's micro-batches, rewarded; the rollouts are put behind `before`."""
    outcomes: list[Outcome] = []
    full = [prompts for piece in pieces for prompts in piece if len(prompts)]
    sampled = iter(roll_out(setup.sampler, setup.policy, full, draws))
    for piece in pieces:
        rollouts = [next(sampled) if len(prompts) else None for prompts in piece]
        for each in rollouts:
            outcomes += [] if each is None else _rewarded(setup, each, len(before))
        before.append(rollouts)
    return outcomes


def _rewarded(setup: Setup, rollouts: Rollouts, piece: int) -> list[Outcome]:
    samples = rollouts.batch.samples
    scores = setup.scorer(rollouts.texts, samples, rollouts.lengths)
    rows = zip(samples, rollouts.keys, rollouts.texts, rollouts.lengths, scores, strict=True)
    return [
        Outcome(
            id=sample.id,
            task=sample.task,
            dataset=sample.dataset,
            group=f"{key[0].batch}/{key[0].prompt}/{sample.id}",
            prompt=sample.problem,
            target=sample.target,
            response=text,
            answer=answer_of(sample, text, setup.encoder.taxonomy),
            tokens=length,
            parts=parts,
            key=key,
            piece=piece,
        )
        for sample, key, text, length, parts in rows
    ]


def _in_order(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """As one process has them."""
    return sorted(outcomes, key=lambda outcome: outcome.key)


def _groups(outcomes: Iterable[Outcome]) -> list[str]:
    return list(dict.fromkeys(outcome.group for outcome in outcomes))


def _with_signal(outcomes: Sequence[Outcome], count: int) -> list[Outcome]:
    """The rollouts of the first `count` groups whose rewards differ: what DAPO trains on, others weigh nothing."""
    kept_N = informative([outcome.parts["score"] for outcome in outcomes], [outcome.group for outcome in outcomes])
    signalling = [outcome for outcome, kept in zip(outcomes, kept_N, strict=True) if kept]
    chosen = set(_groups(signalling)[:count])
    return [outcome for outcome in signalling if outcome.group in chosen]


def _evaluate_and_save(setup: Setup, memory: Memory, progress: Progress, log: RunLog) -> Progress:
    config = setup.config
    setup.sampler.renew(progress.step)
    with gathered(setup.policy):
        records = evaluate(
            setup.sampler,
            setup.policy,
            setup.validation,
            setup.encoder,
            setup.scorer,
            config.rollout,
            setup.ranks,
            setup.run.quarantine,
            draws=config.validation_draws,
            batch_size=config.validation_batch_size,
            seed=config.train.seed,
        )
    figures = summary(records)
    if setup.ranks.is_first:
        write_evaluation(setup.run.path, progress.step, records)
    log.evaluation(progress, figures, collapsed_tasks(records))
    progress = progress.validated(figures["greedy_reward"])
    _save(setup, memory, progress)
    return progress


def _save(setup: Setup, memory: Memory, progress: Progress) -> None:
    config = setup.config

    def save_model(folder: Path) -> None:
        backbone, strategy = checkpoint.backbone_of(config.model.name), config.model.strategy
        how: dict[str, Any] = {"encode": config.encode, "formats": (config.format,)}
        setup.policy.save_pretrained(folder, backbone=backbone, strategy=strategy, **how)
        memory.save(folder)

    save_state(setup.run.checkpoints, progress, setup.policy, setup.optimizer, save_model, setup.ranks)


def _setup(
    config: RlConfig,
    run: RunFolder,
    ranks: Ranks,
    train: Atlas,
    validation: Atlas,
    checkpoint: Path | None,
) -> Setup:
    accelerator = ranks.accelerator
    scorer = Scorer(config.reward, train.taxonomy)
    shard = config.train.sharding == "full"
    policy = build_policy(config.model, checkpoint, freeze_towers=config.freeze_towers, mapped=shard)
    ranks.wait()  # as in the loop of the other stages: the first exchange of tensors comes next
    # Its probabilities are made of the head's logits a piece at a time.
    model = prepare_model(policy, accelerator, config.train, pieces=True)
    policy.train()
    regularised = config.loss.kl_weight > 0
    encoder = encoder_for(policy.processor, config.encode, train.taxonomy, wording=FormatMix((config.format,)))
    return Setup(
        config=config,
        algorithm=config.resolved_algorithm(),
        ranks=ranks,
        run=run,
        policy=policy,
        model=model,
        sampler=build_sampler(config, policy, encoder, ranks, run.path),
        reference=build_reference(config.model, policy, accelerator) if regularised else None,
        optimizer=build_optimizer(policy, config.train, {}),
        scorer=scorer,
        encoder=encoder,
        validation=validation,
    )


def _memory(setup: Setup, train: Atlas, checkpoint: Path | None) -> tuple[Memory, Progress]:
    """Of a fresh run, or as it was at `checkpoint`; the optimizer is put back, too, and the log is cut there."""
    config = setup.config
    state: dict[str, Any] | None = None if checkpoint is None else read_json(checkpoint / STATE)
    feed = PromptFeed(
        train,
        setup.encoder,
        config.mix,
        config.train,
        config.loader,
        replicates=config.rollout.per_prompt,
        new_tokens=config.rollout.max_new_tokens,
        rank=setup.ranks.rank,
        world=setup.ranks.world,
        updates=config.loss.updates,
        position=0 if state is None else state["position"],
    )
    advantage = build_advantage(setup.algorithm.advantage, published=config.published_harpo)
    memory, progress = Memory(advantage, CollapseWatch(), feed), Progress()
    if checkpoint is not None and state is not None:
        progress = read_progress(checkpoint)
        restore_optimizer(checkpoint, setup.policy, setup.optimizer)
        advantage.load_state_dict(state["advantage"])
        memory.watch.load_state_dict(state["watch"])
    setup.run.truncate_log(progress.step)
    return memory, progress
