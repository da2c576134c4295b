"""Everything that decides an RL run."""

from __future__ import annotations

from dataclasses import dataclass, field

from hba.atlas.batch import EncodeConfig
from hba.atlas.loader import LoaderConfig
from hba.atlas.mixing import MixConfig
from hba.config import option
from hba.errors import ConfigError
from hba.model.omni import ModelConfig
from hba.rl.algorithms import AlgorithmName
from hba.rl.sampler import RolloutConfig
from hba.rl.scoring import RewardConfig
from hba.rl.update import LossConfig
from hba.rl.verl.settings import VerlConfig
from hba.train.loop import Count, TrainConfig


@dataclass(frozen=True, kw_only=True)
class RlConfig:
    """Everything that decides a run. A step takes `train.batch_size` times `train.accumulation` prompts."""

    atlas: str = option(doc="atlas folder, or the hub id of a release")
    algorithm: AlgorithmName = option("harpo", "whose advantages and loss")
    published_harpo: bool = option(False, "HARPO as released: groups without signal weigh on all others")
    max_extra_batches: Count = option(8, "dapo: batches sampled beyond a step's own to fill it with signal")
    model: ModelConfig = field(default_factory=lambda: ModelConfig(name="Qwen/Qwen2.5-Omni-7B"))
    freeze_towers: bool = option(True, "with strategy full: train the layers of the language model alone")
    train: TrainConfig = field(default_factory=TrainConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    verl: VerlConfig = field(default_factory=VerlConfig)
    format: str = option("think", "how prompts ask: plain, boxed, think, or a path to a .jinja file")
    train_split: str = option("train", "split whose prompts are trained on; slices such as train[:10%] work")
    validation_split: str = option("validation", "split of the evaluations")
    validation_rows: Count | None = option(512, "rows of an evaluation, a stratified sample; null for all")
    validation_draws: Count = option(1, "sampled responses to each of these rows; their record has the mean")
    validation_batch_size: Count = option(32, "rows in an evaluation batch")
    datasets: tuple[str, ...] | None = option(None, "train and evaluate on these dataset keys alone")
    table_every: Count = option(10, "steps between the samples of rollouts in rollouts.jsonl", affects_result=False)
    table_prompts: Count = option(4, "prompts in such a sample", affects_result=False)

    def __post_init__(self) -> None:
        if self.loss.importance_cap is not None and self.rollout.sampler != "server":
            what = "the policy that samples is the policy that learns: there is no mismatch to correct"
            raise ConfigError(what, where="loss.importance_cap", fix="Leave it out, or use rollout.sampler=server.")
