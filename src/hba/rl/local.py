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

import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from hba.atlas import Atlas, data_record
from hba.atlas.answer_format import FormatMix
from hba.atlas.batch import SampleEncoder
from hba.atlas.chat_encoder import encoder_for
from hba.model import chat
from hba.model.chat import ChatModel
from hba.process import prepare_process, start_accelerator
from hba.rl.advantages import Advantage, build_advantage, informative
from hba.rl.algorithms import Algorithm
from hba.rl.config import RlConfig
from hba.rl.evaluation import answer_of, evaluate
from hba.rl.evaluation_log import collapsed_tasks, summary, write_evaluation
from hba.rl.policy import Reference, build_policy, build_reference
from hba.rl.prompts import PromptFeed
from hba.rl.rollout import Rollouts, roll_out
from hba.rl.rows import training_rows, validation_rows
from hba.rl.sampler import Draws, Prompts, Sampler
from hba.rl.scoring import Scorer
from hba.rl.server import build_sampler, require_small_gap
from hba.rl.telemetry import CollapseWatch, Outcome, RunLog
from hba.rl.update import update
from hba.run import RunFolder
from hba.storage import read_json, write_json
from hba.train.display import TrainingDisplay
from hba.train.loop import build_optimizer, learning_rate_at, step_seed
from hba.train.optimizer_state import restore_optimizer
from hba.train.ranks import Ranks
from hba.train.sharding import gathered, prepare_model
from hba.train.state import STOP, Progress, Saving, latest, read_progress, save_state

STATE = "rl_state.json"


class Setup(NamedTuple):
    """What stays the same in all steps of a run."""

    config: RlConfig
    algorithm: Algorithm
    ranks: Ranks
    run: RunFolder
    policy: ChatModel
    model: nn.Module  # the policy as it is prepared for training
    sampler: Sampler
    reference: Reference | None
    optimizer: torch.optim.Optimizer
    scorer: Scorer
    encoder: SampleEncoder
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
    ranks = Ranks(start_accelerator(config.model.dtype))
    prepare_process(config.train.seed)
    train, validation = training_rows(config), validation_rows(config)
    run.record_data(data_record(config.atlas, train))
    checkpoint = ranks.told(latest(run.checkpoints))
    setup = _setup(config, run, ranks, train, validation, checkpoint)
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
        while progress.step < total:
            wish = ranks.meet([], saving.wish(progress.step)).wish
            if wish and progress.step > saved_step:
                _save(setup, memory, progress)
                saved_step = progress.step
                saving.saved()
            if wish == STOP:
                raise saving.stopped(progress, total)

            progress = _step(setup, memory, progress, log, total)

            if progress.step % config.train.validate_every == 0 or progress.step == total:
                progress = _evaluate_and_save(setup, memory, progress, log)
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
    device, outcomes = setup.ranks.device, []
    full = [Prompts(p.batch.to(device), p.places) for piece in pieces for p in piece if len(p)]
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
        backbone, strategy = chat.backbone_of(config.model.name), config.model.strategy
        how: dict[str, Any] = {"encode": config.encode, "formats": (config.format,)}
        chat.save(setup.policy, folder, backbone=backbone, strategy=strategy, **how)
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
    shard, checkpointing = config.train.sharding == "full", config.train.activation_checkpointing
    policy = build_policy(config.model, checkpoint, freeze_towers=config.freeze_towers, mapped=shard)
    ranks.wait()  # as in the loop of the other stages: the first exchange of tensors comes next
    model = prepare_model(policy, accelerator, shard=shard, checkpoint_activations=checkpointing)
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
