"""verl's synchronous trainer with what it lacks: the order of the plan, advantages that know tasks, HARPO's memory.

Registered as trainer mode `hba`. A step of verl calls `_compute_advantage`; there the rollouts' columns are read, the
advantages of `hba.rl.advantages` computed by the estimator `hba`, and the step logged as the local engine logs it. Rows
that verl adds to fill a batch count for nothing. The estimator's averages lie in every checkpoint, and a checkpoint
without them is refused.

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

from hba.errors import InputError
from hba.rl.advantages import build_advantage
from hba.rl.algorithms import ALGORITHMS
from hba.rl.telemetry import Outcome, step_record, table
from hba.rl.verl.config import ESTIMATOR, TRAINER_MODE
from hba.rl.verl.dataset import PlanSampler
from hba.rl.verl.rows import run_config
from hba.storage import AppendLog, read_json, write_json

STATE = "hba_advantage.json"
COLUMNS = ["uid", "task", "dataset", "sample_id", "index", "responses", "reward_model", "extra_fields"]


@register_trainer(TRAINER_MODE)
class OmniTrainer(PPOTrainerSync):  # type: ignore[misc]
    """See the module."""

    def __init__(self, config: Any) -> None:
        with open_dict(config):
            config.trainer.v1.trainer_mode = "sync"  # verl compares this name with "sync" in many places
        self.run = Path(config.data.hba_run)
        self.settings = run_config(str(self.run))
        algorithm = ALGORITHMS[self.settings.algorithm]
        self.advantage = build_advantage(algorithm.advantage, published=self.settings.published_harpo)
        self._tasks: list[str | None] = []  # of the rollouts of this step; None for rows that fill a batch
        self._advantages: Sequence[float] = ()
        register_adv_est(ESTIMATOR)(self._estimate)
        super().__init__(config)

    def _init_dataloader(self) -> None:
        super()._init_dataloader()
        sampler = PlanSampler(self.train_dataset.atlas, self.settings)
        self.train_dataloader = StatefulDataLoader(
            dataset=self.train_dataset,
            batch_size=self.config.data.train_batch_size,
            num_workers=0,
            drop_last=True,
            collate_fn=collate_fn,
            sampler=sampler,
        )
        self.steps_per_epoch = len(sampler.steps)  # the plan holds all epochs

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
        outcomes = [self._outcome({name: columns[name][i] for name in COLUMNS}, self._advantages[i]) for i in own]
        for task, means in self._log(outcomes)["tasks"].items():
            metrics |= {f"hba/{task}/{name}": value for name, value in means.items()}
        return done

    def _log(self, outcomes: list[Outcome]) -> dict[str, Any]:
        """log.jsonl and rollouts.jsonl of the run, as the local engine writes them."""
        step, settings, record = self.global_steps, self.settings, step_record(outcomes, self.advantage)
        with AppendLog(self.run / "log.jsonl") as log:
            log.append({"step": step, "kind": "rl", "engine": "verl", **record})
        if step == 1 or step % settings.table_every == 0:
            with AppendLog(self.run / "rollouts.jsonl") as log:
                for line in table(step, outcomes, settings.table_prompts):
                    log.append(line)
        return record

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
        write_json(folder / STATE, self.advantage.state_dict())
        super()._save_checkpoint()  # names the checkpoint as the latest when all of it is there

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if self.global_steps:
            file = self._checkpoint(self.global_steps) / STATE
            if not file.is_file():
                fix = "Start a new run folder from its weights."
                raise InputError("the checkpoint has no averages of the advantages", where=str(file), fix=fix)
            self.advantage.load_state_dict(read_json(file))


def _column(values: Any) -> list[Any]:
    """A column of TransferQueue as a list: nested tensors row by row, everything else as it came."""
    return list(values.unbind()) if isinstance(values, Tensor) else list(values)
