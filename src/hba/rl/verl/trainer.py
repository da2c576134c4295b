"""verl's synchronous trainer with what it lacks: the order of the plan, advantages that know tasks, HARPO's memory.

Registered as trainer mode `hba`. A step takes the prompts that the plan has for it, be they fewer than others'. A step
of verl calls `_compute_advantage`; there the rollouts' columns are read, the advantages of `hba.rl.advantages` computed
by the estimator `hba`, and after its update the step is logged as the local engine logs it. Rows that verl adds to fill
a batch count for nothing, in the divisor of the loss neither. The estimator's averages and the watch over the rewards
lie in every checkpoint, and a checkpoint without them is refused; the last and the best one are kept. Evaluations go
into RUN/evaluations.

Shapes: N rollouts, L response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transfer_queue as tq
from omegaconf import open_dict
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader
from verl.trainer.ppo.core_algos import register_adv_est
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.dataset.rl_dataset import collate_fn

from hba.errors import HbaError, InputError
from hba.rl.advantages import build_advantage
from hba.rl.evaluation import answer_of
from hba.rl.evaluation_log import FOLDER, collapsed_tasks, summary, write_evaluation
from hba.rl.telemetry import CollapseWatch, Outcome, board_figures, is_due, step_record, table
from hba.rl.verl.config import ESTIMATOR, SIGNAL_PART, TRAINER_MODE, prompts_of_step
from hba.rl.verl.dataset import OURS, PlanSampler, records, run_config
from hba.rl.verl.launch import keep_last_and_best, noted_failure
from hba.storage import AppendLog, read_json, write_json

STATE = "hba_state.json"
FORMAT = 2  # prompts come one by one, remainders of the plan included
# verl's figures of an update that log.jsonl has under the local engine's names; kl is there with a reference alone.
UPDATE = {
    "loss": "actor/loss",
    "grad_norm": "actor/grad_norm",
    "learning_rate": "actor/lr",
    "entropy": "actor/entropy",
    "clipped": "actor/pg_clipfrac",
    "kl": "actor/kl_loss",
}
# verl's counts of groups that dynamic sampling has dropped, for want of signal or since the step was full.
DROPPED = ("training/filter_groups/evicted_samples", "training/filter_groups/discarded_surplus_samples")
COLUMNS = ["uid", "task", "dataset", "sample_id", "index", "responses", "reward_model", "extra_fields"]


class _CountingWorkers:
    """verl's workers; an update's loss is a mean over `rows` rollouts, whatever fills its batch."""

    def __init__(self, workers: Any, rows: float) -> None:
        self._workers, self._rows = workers, rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self._workers, name)

    def update_actor(self, batch: Any) -> Any:
        """verl's, with the divisor of averages over responses put right."""
        batch.extra_info["global_batch_size"] = self._rows
        return self._workers.update_actor(batch)


@register_trainer(TRAINER_MODE)
class OmniTrainer(PPOTrainerSync):  # type: ignore[misc]
    """See the module."""

    actor_rollout_wg: Any

    def __init__(self, config: Any) -> None:
        self.run = Path(config.data.hba_run)
        self.settings = run_config(str(self.run))
        with open_dict(config):
            config.trainer.v1.trainer_mode = "sync"  # verl compares this name with "sync" in many places
            config.data.train_batch_size = prompts_of_step(self.settings)  # it was a size that verl's checks pass
        algorithm = self.settings.resolved_algorithm()
        self.advantage = build_advantage(algorithm.advantage, published=self.settings.published_harpo)
        self.watch = CollapseWatch()
        self._outcomes: list[Outcome] = []
        self._sizes: list[int] = []  # prompts of each step
        self._num_prompts = 0  # of this step, those that were dropped included
        self._refilled = 0  # prompts sampled beyond the step's own
        self._tasks: list[str | None] = []  # of the rollouts of this step; None for rows that fill a batch
        self._advantages: Sequence[float] = ()
        register_adv_est(ESTIMATOR)(self._estimate)
        super().__init__(config)

    def _init_dataloader(self) -> None:
        super()._init_dataloader()
        sampler = PlanSampler(self.train_dataset.atlas, self.settings)
        self.train_dataloader = StatefulDataLoader(
            dataset=self.train_dataset,
            batch_size=self.config.data.gen_batch_size,
            num_workers=0,
            drop_last=True,
            collate_fn=collate_fn,
            sampler=sampler,
        )
        self._sizes = list(map(len, sampler.steps))
        self.steps_per_epoch = len(sampler.steps)  # the plan holds all epochs

    def on_step_begin(self) -> None:
        """verl's hook: this step's number of prompts is the plan's; dynamic sampling fills every step."""
        super().on_step_begin()
        if not self.settings.resolved_algorithm().dynamic_sampling:
            with open_dict(self.config):
                self.config.data.train_batch_size = self._sizes[self.global_steps - 1]

    def prepare_step(self) -> dict[str, Any]:
        """verl's first act in a step: ask for its prompts."""
        self._refilled = 0
        asked: dict[str, Any] = super().prepare_step()
        return asked

    def _add_prompts_to_generate(self, num_prompts: int) -> int:
        """Prompts in place of groups without signal (dapo), `max_extra_batches` at most. Raises HbaError beyond.

        The local engine goes on with the groups that it has; verl's buffer waits for as many as were asked for.
        """
        self._refilled += num_prompts
        most = self.settings.max_extra_batches * self.settings.train.batch_size
        if self._refilled > most:
            what = f"step {self.global_steps} is not full after {most} prompts more: too few groups have signal"
            raise HbaError(what, where="algorithm=dapo", fix="Raise max_extra_batches, or choose easier prompts.")
        added: int = super()._add_prompts_to_generate(num_prompts)
        return added

    def _estimate(
        self, token_level_rewards: Tensor, response_mask: Tensor, index: Any, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """verl's estimator: advantages [N, L], one for all tokens of a response, and returns, which nobody reads."""
        own = [i for i, task in enumerate(self._tasks) if task is not None]
        rewards_N = token_level_rewards.sum(-1).tolist()
        values = self.advantage(
            [rewards_N[i] for i in own], [str(index[i]) for i in own], [str(self._tasks[i]) for i in own]
        )
        advantages_N = torch.zeros(len(rewards_N), dtype=token_level_rewards.dtype)
        advantages_N[own] = torch.as_tensor(values, dtype=advantages_N.dtype)
        self._advantages = advantages_N.tolist()
        spread_NL = advantages_N.to(response_mask.device).unsqueeze(-1) * response_mask
        return spread_NL, spread_NL

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        rows = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=COLUMNS)
        columns = {name: _column(rows[name]) for name in COLUMNS}
        padding = [bool(tag.get("is_padding", False)) for tag in batch.tags]
        self._tasks = [None if pad else str(task) for task, pad in zip(columns["task"], padding, strict=True)]
        self._require_no_failure()
        done = super()._compute_advantage(batch, metrics)
        own = [i for i, pad in enumerate(padding) if not pad]
        self._num_prompts = len({str(columns["uid"][i]) for i in own}) + int(sum(metrics.get(n, 0) for n in DROPPED))
        self._outcomes = [self._outcome({n: columns[n][i] for n in COLUMNS}, self._advantages[i]) for i in own]
        return done

    def _update_actor(self, batch: Any, metrics: dict[str, Any]) -> Any:
        of_update = self.config.actor_rollout_ref.actor.ppo_mini_batch_size * self.config.actor_rollout_ref.rollout.n
        workers: Any = self.actor_rollout_wg
        updates = -(-len(batch) // of_update)
        self.actor_rollout_wg = _CountingWorkers(workers, len(self._outcomes) / updates)
        try:
            done = super()._update_actor(batch, metrics)
        finally:
            self.actor_rollout_wg = workers
        update = {ours: float(metrics[theirs]) for ours, theirs in UPDATE.items() if theirs in metrics}
        metrics |= board_figures(self._log(self._outcomes, update))
        return done

    def _log(self, outcomes: list[Outcome], update: dict[str, float]) -> dict[str, Any]:
        """log.jsonl and rollouts.jsonl of the run, as the local engine writes them."""
        step, settings = self.global_steps, self.settings
        means = step_record(outcomes, self.advantage, self._num_prompts)
        record = {"step": step, "kind": "rl", "engine": "verl", **update, **means}
        with AppendLog(self.run / "log.jsonl") as log:
            if is_due(step, self.total_training_steps, settings):
                log.append(record)
            for sentence in self.watch.update(outcomes):
                log.append({"step": step, "kind": "warning", "message": sentence})
        if step == 1 or step % settings.table_every == 0:
            with AppendLog(self.run / "rollouts.jsonl") as log:
                for line in table(step, outcomes, settings.table_prompts):
                    log.append(line)
        return record

    def _val_metrics_update(
        self,
        data_sources: Any,
        sample_uids: Any,
        reward_extra_infos_dict: Any,
        sample_turns: Any,
        expected_acc_counts: Any = None,
    ) -> dict[str, float]:
        self._require_no_failure()
        parts = dict(reward_extra_infos_dict)
        found = records(self.val_dataset.atlas, parts, self.settings.validation_draws)
        if not found:
            fix = "Repair the media named in quarantine.jsonl."
            raise InputError("no row of the evaluation can be read", where=str(self.run), fix=fix)
        figures = summary(found)
        with AppendLog(self.run / "log.jsonl") as log:  # before the file, after which it is not done again
            log.append({"step": self.global_steps, "kind": "evaluation", "figures": figures})
            for sentence in collapsed_tasks(found):
                log.append({"step": self.global_steps, "kind": "warning", "message": sentence})
        write_evaluation(self.run, self.global_steps, found)
        keep_last_and_best(self.run)
        means = {name: values for name, values in parts.items() if name not in OURS}
        theirs = super()._val_metrics_update(data_sources, sample_uids, means, sample_turns, expected_acc_counts)
        return {**theirs, **{f"evaluation/{name}": value for name, value in figures.items()}}

    def _require_no_failure(self) -> None:
        """Before anything is learned from rollouts of which some are missing for a reason that ends the run."""
        failed = noted_failure(self.run)
        if failed is not None:
            raise failed

    def _outcome(self, row: dict[str, Any], advantage: float) -> Outcome:
        parts = dict(row["extra_fields"]["reward_extra_info"])
        parts.pop(SIGNAL_PART)
        sample = self.train_dataset.atlas[int(row["index"])]
        response = self.tokenizer.decode(row["responses"], skip_special_tokens=True)
        return Outcome(
            id=str(row["sample_id"]),
            task=str(row["task"]),
            dataset=str(row["dataset"]),
            group=str(row["uid"]),
            prompt=sample.problem,
            target=str(row["reward_model"]["ground_truth"]),
            response=response,
            answer=answer_of(sample, response, self.train_dataset.atlas.taxonomy),
            tokens=int(parts.pop("tokens")),
            parts=parts,
            advantage=advantage,
        )

    def _checkpoint(self, step: int) -> Path:
        return Path(self.config.trainer.default_local_dir) / f"global_step_{step}"

    def _save_checkpoint(self) -> None:
        folder = self._checkpoint(self.global_steps)
        folder.mkdir(parents=True, exist_ok=True)
        state = {"advantage": self.advantage.state_dict(), "watch": self.watch.state_dict()}
        write_json(folder / STATE, {**state, "format": FORMAT})
        super()._save_checkpoint()  # names the checkpoint as the latest when all of it is there
        keep_last_and_best(self.run)

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if self.global_steps:
            file = self._checkpoint(self.global_steps) / STATE
            if not file.is_file():
                fix = "Start a new run folder from its weights."
                raise InputError("the checkpoint has no averages of the advantages", where=str(file), fix=fix)
            state = read_json(file)
            if state.get("format") != FORMAT:  # of another order of prompts, in which verl has counted its place
                fix = "Merge it (hba merge) and start a new run folder from the model."
                raise InputError("the checkpoint is of another version of hba", where=str(file), fix=fix)
            self.advantage.load_state_dict(state["advantage"])
            self.watch.load_state_dict(state["watch"])
            with open_dict(self.config):  # verl saves before it evaluates; what has been evaluated is kept
                known = (self.run / FOLDER / f"step_{self.global_steps}.jsonl").is_file()
                self.config.trainer.val_before_train = not known


def _column(values: Any) -> list[Any]:
    """A column of TransferQueue as a list: nested tensors row by row, everything else as it came."""
    return list(values.unbind()) if isinstance(values, Tensor) else list(values)
