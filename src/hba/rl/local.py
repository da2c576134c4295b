"""Reinforcement learning on one machine, or on the GPUs of one launcher: `hba train rl`.

A step reads like the papers: sample responses to the prompts of the step, reward them, turn the rewards into
advantages over all rollouts of all processes, update the policy, and every `validate_every` steps evaluate it and keep
it. Prompts come from the loader in the order of the training plan, in batches of one modality signature.

The run is a function of (config, data, seed): the random numbers of a step are seeded by its number, and what an
algorithm remembers (HARPO's averages), the place in the plan and the watch over the rewards lie in the checkpoint
beside weights and optimizer. Killed in any phase of a step and resumed, it gives the results of an uninterrupted run.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from hba.atlas import Atlas
from hba.atlas.answer_format import FormatMix
from hba.atlas.batch import Batch, SampleEncoder
from hba.atlas.chat_encoder import encoder_for
from hba.errors import HbaError
from hba.model import chat
from hba.model.chat import ChatModel
from hba.process import data_record, prepare_process, start_accelerator
from hba.rl.advantages import Advantage, build_advantage, informative
from hba.rl.algorithms import Algorithm
from hba.rl.config import RlConfig
from hba.rl.evaluation import evaluate
from hba.rl.evaluation_log import summary, write_evaluation
from hba.rl.policy import Reference, build_policy, build_reference
from hba.rl.prompts import PromptFeed
from hba.rl.rollout import Rollouts, roll_out
from hba.rl.rows import training_rows, validation_rows
from hba.rl.sampler import Draws, Sampler
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
from hba.train.state import Progress, latest, read_progress, save_state

STATE = "rl_state.json"


class Setup(NamedTuple):
    """What stays the same in all steps of a run."""

    config: RlConfig
    algorithm: Algorithm
    accelerator: Accelerator
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


class Memory(NamedTuple):
    """What changes from step to step besides weights and optimizer, and is in every checkpoint."""

    advantage: Advantage
    watch: CollapseWatch
    feed: PromptFeed

    def save(self, folder: Path) -> None:
        """Write it into a checkpoint."""
        state = {"advantage": self.advantage.state_dict(), "watch": self.watch.state_dict()}
        write_json(folder / STATE, {**state, "position": self.feed.position})


def train_rl(config: RlConfig, run: RunFolder) -> Progress:
    """Run (or resume) it in `run`. Raises InputError for bad data, config or reward, HbaError for a failing step."""
    ranks = Ranks(start_accelerator(config.model.dtype))
    accelerator = ranks.accelerator
    prepare_process(config.train.seed)
    train, validation = training_rows(config), validation_rows(config)
    run.record_data(data_record(config.atlas, train))
    checkpoint = ranks.told(latest(run.checkpoints))
    setup = _setup(config, run, ranks, train, validation, checkpoint)
    memory, progress = _memory(setup, train, checkpoint)
    planned = max(1, len(memory.feed) // config.train.accumulation)
    total = min(planned, config.train.max_steps) if config.train.max_steps is not None else planned
    display = TrainingDisplay(run, total, progress, config.train, enabled=accelerator.is_main_process)
    with closing(setup.sampler), display:
        log = RunLog(run, display, config)
        if checkpoint is None:
            progress = _evaluate_and_save(setup, memory, progress, log)
        while progress.step < total:
            progress = _step(setup, memory, progress, log, total)
            if progress.step % config.train.validate_every == 0 or progress.step == total:
                progress = _evaluate_and_save(setup, memory, progress, log)
    return progress


def _step(setup: Setup, memory: Memory, progress: Progress, log: RunLog, total: int) -> Progress:
    """Sample, reward, compare, update."""
    accelerator, started = setup.accelerator, time.perf_counter()
    torch.manual_seed(step_seed(setup.config.train.seed, progress.step, accelerator.process_index))
    setup.sampler.renew(progress.step)
    sampled, own = _sample(setup, memory.feed, progress.step)
    everyone: list[Outcome] = gather_object(own)
    if not everyone:
        fix = "Repair the media named in quarantine.jsonl."
        raise HbaError(f"no prompt of step {progress.step + 1} can be read", where=setup.config.atlas, fix=fix)
    sampled_at = time.perf_counter()
    advantages = memory.advantage(
        [o.parts["score"] for o in everyone], [o.group for o in everyone], [o.task for o in everyone]
    )
    for outcome, value in zip(everyone, advantages.tolist(), strict=True):
        outcome.advantage = value
    first = sum(gather_object([len(own)])[: accelerator.process_index])
    own = everyone[first : first + len(own)]
    rate = learning_rate_at(progress.step, total, setup.config.train)
    updated = update(setup, sampled, own, everyone, first, rate)
    everyone = gather_object(own)
    prompts = len({outcome.group for outcome in everyone})
    progress = replace(progress, step=progress.step + 1, samples_seen=progress.samples_seen + prompts)
    seconds = {"rollout_seconds": sampled_at - started, "update_seconds": time.perf_counter() - sampled_at}
    log.step(progress, everyone, memory.advantage, memory.watch, updated, rate, seconds)
    require_small_gap([outcome.sampler_gap for outcome in everyone], setup.config.rollout.server)
    return progress


def _sample(setup: Setup, feed: PromptFeed, step: int) -> tuple[list[Rollouts], list[Outcome]]:
    """This rank's rollouts of a step, rewarded; with dynamic sampling of as many batches as give enough signal."""
    sampled: list[Rollouts] = []
    outcomes: list[Outcome] = []
    rank, rollout = setup.accelerator.process_index, setup.config.rollout
    with gathered(setup.policy):
        taken = setup.config.train.accumulation
        most = taken + (setup.config.max_extra_batches if setup.algorithm.dynamic_sampling else 0)
        prompts = _prompts(setup, feed, taken)
        while True:
            draws = Draws(f"{setup.config.train.seed}/{step}/{taken}", rollout.max_new_tokens, rollout.temperature)
            for rollouts in roll_out(setup.sampler, setup.policy, prompts, draws):
                outcomes += _rewarded(setup.scorer, rollouts, f"{rank}/{len(sampled)}")
                sampled.append(rollouts)
            if taken == most or _has_enough_signal(setup, outcomes):
                return sampled, outcomes
            prompts, taken = _prompts(setup, feed, 1), taken + 1


def _prompts(setup: Setup, feed: PromptFeed, count: int) -> list[Batch]:
    """The micro-batches of the next `count` batches of the plan, without what cannot be read."""
    taken = [prompts for _ in range(count) for prompts in feed.take()]
    for refused in (sample for prompts in taken for sample in prompts.quarantined):
        setup.run.quarantine.add(refused)
    return [prompts.to(setup.accelerator.device) for prompts in taken if len(prompts)]


def _has_enough_signal(setup: Setup, own: Sequence[Outcome]) -> bool:
    """Whether as many groups as a step has prompts have rewards that differ (DAPO)."""
    everyone: list[Outcome] = gather_object(list(own))
    groups = [outcome.group for outcome in everyone]
    kept_N = informative([outcome.parts["score"] for outcome in everyone], groups)
    full = {group for group, kept in zip(groups, kept_N, strict=True) if kept}
    return len(full) >= setup.config.train.batch_size * setup.config.train.accumulation


def _rewarded(scorer: Scorer, rollouts: Rollouts, place: str) -> list[Outcome]:
    samples = rollouts.batch.samples
    scores = scorer(rollouts.texts, samples, rollouts.lengths)
    return [
        Outcome(
            id=sample.id,
            task=sample.task,
            dataset=sample.dataset,
            group=f"{place}/{sample.id}",
            prompt=sample.problem,
            target=sample.target,
            response=text,
            tokens=length,
            parts=parts,
        )
        for sample, text, length, parts in zip(samples, rollouts.texts, rollouts.lengths, scores, strict=True)
    ]


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
            setup.accelerator,
            setup.run.quarantine,
            draws=config.validation_draws,
            batch_size=config.validation_batch_size,
            seed=config.train.seed,
        )
    figures = summary(records)
    if setup.accelerator.is_main_process:
        write_evaluation(setup.run.path, progress.step, records)
    log.evaluation(progress, figures)
    score = figures["greedy_reward"]
    if progress.best_score is None or score > progress.best_score:
        progress = replace(progress, best_step=progress.step, best_score=score)

    def save_model(folder: Path) -> None:
        backbone, strategy = chat.backbone_of(config.model.name), config.model.strategy
        how: dict[str, Any] = {"encode": config.encode, "formats": (config.format,)}
        chat.save(setup.policy, folder, backbone=backbone, strategy=strategy, **how)
        memory.save(folder)

    save_state(setup.run.checkpoints, progress, setup.policy, setup.optimizer, save_model, setup.ranks)
    return progress


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
    policy = build_policy(config.model, checkpoint, freeze_towers=config.freeze_towers)
    shard, checkpointing = config.train.sharding == "full", config.train.activation_checkpointing
    model = prepare_model(policy, accelerator, shard=shard, checkpoint_activations=checkpointing)
    policy.train()
    regularised = config.loss.kl_weight > 0
    encoder = encoder_for(policy.processor, config.encode, train.taxonomy, wording=FormatMix((config.format,)))
    return Setup(
        config=config,
        algorithm=config.resolved_algorithm(),
        accelerator=accelerator,
        ranks=ranks,
        run=run,
        policy=policy,
        model=model,
        sampler=build_sampler(config, policy, encoder, accelerator, run.path),
        reference=build_reference(config.model, policy, accelerator.device) if regularised else None,
        optimizer=build_optimizer(policy, config.train, {}),
        scorer=scorer,
        encoder=encoder,
        validation=validation,
    )


def _memory(setup: Setup, train: Atlas, checkpoint: Path | None) -> tuple[Memory, Progress]:
    """Of a fresh run, or as it was at `checkpoint`; the optimizer is put back, too, and the log is cut there."""
    config, accelerator = setup.config, setup.accelerator
    state: dict[str, Any] | None = None if checkpoint is None else read_json(checkpoint / STATE)
    feed = PromptFeed(
        train,
        setup.encoder,
        config.mix,
        config.train,
        config.loader,
        replicates=config.rollout.per_prompt,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
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
