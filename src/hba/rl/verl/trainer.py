"""verl's synchronous trainer with what it lacks: the order of the plan, advantages that know tasks, HARPO's memory.

Registered as trainer mode `hba`. A step of verl calls `_compute_advantage`; there the rollouts' columns are read, the
advantages of `hba.rl.advantages` computed by the estimator `hba`, and after its update the step is logged as the local
engine logs it. Rows that verl adds to fill a batch count for nothing. The estimator's averages and the watch over the
rewards lie in every checkpoint, and a checkpoint without them is refused. Evaluations go into RUN/evaluations.

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
from hba.rl.evaluation_log import FOLDER, summary, write_evaluation
from hba.rl.telemetry import CollapseWatch, Outcome, board_figures, step_record, table
from hba.rl.verl.config import ESTIMATOR, TRAINER_MODE
from hba.rl.verl.dataset import PlanSampler
from hba.rl.verl.evaluation import ROW, WAY, records
from hba.rl.verl.rows import run_config
from hba.storage import AppendLog, read_json, write_json

STATE = "hba_state.json"
# verl's figures of an update that log.jsonl has under the local engine's names; kl is there with a reference alone.
UPDATE = {
    "loss": "actor/loss",
    "grad_norm": "actor/grad_norm",
    "learning_rate": "actor/lr",
    "entropy": "actor/entropy",
    "clipped": "actor/pg_clipfrac",
    "kl": "actor/kl_loss",
}
COLUMNS = ["uid", "task", "dataset", "sample_id", "index", "responses", "reward_model", "extra_fields"]


@register_trainer(TRAINER_MODE)
class OmniTrainer(PPOTrainerSync):  # type: ignore[misc]
    """See the module."""

    def __init__(self, config: Any) -> None:
        with open_dict(config):
            config.trainer.v1.trainer_mode = "sync"  # verl compares this name with "sync" in many places
        self.run = Path(config.data.hba_run)
        self.settings = run_config(str(self.run))
        algorithm = self.settings.resolved_algorithm()
        self.advantage = build_advantage(algorithm.advantage, published=self.settings.published_harpo)
        self.watch = CollapseWatch()
        self._outcomes: list[Outcome] = []
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
            batch_size=self.config.data.gen_batch_size or self.config.data.train_batch_size,
            num_workers=0,
            drop_last=True,
            collate_fn=collate_fn,
            sampler=sampler,
        )
        self.steps_per_epoch = len(sampler.steps)  # the plan holds all epochs

    def prepare_step(self) -> dict[str, Any]:
        """verl's first act in a step: ask for its prompts."""
        self._refilled = 0
        asked: dict[str, Any] = super().prepare_step()
        return asked

    def _add_prompts_to_generate(self, num_prompts: int) -> int:
        """Prompts in place of groups without signal (dapo), `max_extra_batches` at most. Raises HbaError beyond."""
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
        done = super()._compute_advantage(batch, metrics)
        own = [i for i, pad in enumerate(padding) if not pad]
        self._outcomes = [self._outcome({n: columns[n][i] for n in COLUMNS}, self._advantages[i]) for i in own]
        return done

    def _update_actor(self, batch: Any, metrics: dict[str, Any]) -> Any:
        done = super()._update_actor(batch, metrics)
        update = {ours: float(metrics[theirs]) for ours, theirs in UPDATE.items() if theirs in metrics}
        metrics |= board_figures(self._log(self._outcomes, update))
        return done

    def _log(self, outcomes: list[Outcome], update: dict[str, float]) -> dict[str, Any]:
        """log.jsonl and rollouts.jsonl of the run, as the local engine writes them."""
        step, settings = self.global_steps, self.settings
        means = step_record(outcomes, self.advantage)
        record = {"step": step, "kind": "rl", "engine": "verl", **update, **means}
        with AppendLog(self.run / "log.jsonl") as log:
            log.append(record)
            for sentence in self.watch.update({task: own["score"] for task, own in means["tasks"].items()}):
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
        parts = dict(reward_extra_infos_dict)
        found = records(self.val_dataset.atlas, parts, self.settings.validation_draws)
        if not found:
            fix = "Repair the media named in quarantine.jsonl."
            raise InputError("no row of the evaluation can be read", where=str(self.run), fix=fix)
        figures = summary(found)
        with AppendLog(self.run / "log.jsonl") as log:  # before the file, after which it is not done again
            log.append({"step": self.global_steps, "kind": "evaluation", "figures": figures})
        write_evaluation(self.run, self.global_steps, found)
        means = {name: values for name, values in parts.items() if name not in (ROW, WAY)}
        theirs = super()._val_metrics_update(data_sources, sample_uids, means, sample_turns, expected_acc_counts)
        return {**theirs, **{f"evaluation/{name}": value for name, value in figures.items()}}

    def _outcome(self, row: dict[str, Any], advantage: float) -> Outcome:
        parts = dict(row["extra_fields"]["reward_extra_info"])
        return Outcome(
            id=str(row["sample_id"]),
            task=str(row["task"]),
            dataset=str(row["dataset"]),
            group=str(row["uid"]),
            prompt=self.train_dataset.atlas[int(row["index"])].problem,
            target=str(row["reward_model"]["ground_truth"]),
            response=self.tokenizer.decode(row["responses"], skip_special_tokens=True),
            tokens=int(parts.pop("tokens")),
            parts=parts,
            advantage=advantage,
        )

    def _checkpoint(self, step: int) -> Path:
        return Path(self.config.trainer.default_local_dir) / f"global_step_{step}"

    def _save_checkpoint(self) -> None:
        folder = self._checkpoint(self.global_steps)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / STATE, {"advantage": self.advantage.state_dict(), "watch": self.watch.state_dict()})
        super()._save_checkpoint()  # names the checkpoint as the latest when all of it is there

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if self.global_steps:
            file = self._checkpoint(self.global_steps) / STATE
            if not file.is_file():
                fix = "Start a new run folder from its weights."
                raise InputError("the checkpoint has no averages of the advantages", where=str(file), fix=fix)
            state = read_json(file)
            self.advantage.load_state_dict(state["advantage"])
            self.watch.load_state_dict(state["watch"])
            with open_dict(self.config):  # verl saves before it evaluates; what has been evaluated is kept
                known = (self.run / FOLDER / f"step_{self.global_steps}.jsonl").is_file()
                self.config.trainer.val_before_train = not known


def _column(values: Any) -> list[Any]:
    """A column of TransferQueue as a list: nested tensors row by row, everything else as it came."""
    return list(values.unbind()) if isinstance(values, Tensor) else list(values)
