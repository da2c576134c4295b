"""Everything that decides an RL run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import Field

from hba.batch.config import EncodeConfig, LoaderConfig
from hba.batch.sampler import MixConfig
from hba.config import option
from hba.errors import ConfigError
from hba.model.config import ModelConfig
from hba.remote import ClientConfig
from hba.rl.rewards import RewardConfig
from hba.train.config import Count, TrainConfig, refuse_idle_rates, refuse_quantized_training

# The algorithms by name: whose advantages, and with which loss their papers go. Formulas and sources: docs/rl.md.


Average = Literal["token", "sequence", "group", "constant"]
Ratio = Literal["token", "sequence"]
KlKind = Literal["k1", "k2", "k3"]
AlgorithmName = Literal[
    "grpo",
    "harpo",
    "dr_grpo",
    "rloo",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "gpg",
    "ema_grpo",
    "dapo",
    "gspo",
]


class Algorithm(NamedTuple):
    """What an algorithm stands for; a run may change each."""

    advantage: str
    average: Average = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    ratio: Ratio = "token"
    dynamic_sampling: bool = False


ALGORITHMS: Mapping[AlgorithmName, Algorithm] = {
    "grpo": Algorithm("grpo", average="sequence"),
    "harpo": Algorithm("harpo", average="sequence"),  # as GRPO's, so that the two differ in their advantages alone
    "dr_grpo": Algorithm("dr_grpo", average="constant"),
    "rloo": Algorithm("rloo", average="sequence"),
    "reinforce_pp": Algorithm("reinforce_pp"),
    "reinforce_pp_baseline": Algorithm("reinforce_pp_baseline"),
    "gpg": Algorithm("gpg"),
    "ema_grpo": Algorithm("ema_grpo"),
    "dapo": Algorithm("grpo", clip_high=0.28, dynamic_sampling=True),
    "gspo": Algorithm("grpo", average="sequence", clip_low=3e-4, clip_high=4e-4, ratio="sequence"),
}


# What only verl needs to know of a run: the cluster, and the engine that samples.


Share = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class VerlConfig:
    """Read by `--engine verl` alone; nothing of it but `overrides` and `modules` changes what is computed."""

    nodes: Count = option(1, "number of machines", affects_result=False)
    gpus_per_node: Count = option(8, "GPUs of each machine", affects_result=False)
    rollout: str = option("vllm", "engine that samples: vllm, or one that your own module registers with verl")
    tensor_parallel: Count = option(1, "GPUs that share one copy of the engine that samples", affects_result=False)
    gpu_memory_utilization: Share = option(
        0.5, "share of a GPU's memory for the engine that samples, 0..1", affects_result=False
    )
    agent_workers: Count = option(8, "processes that prepare prompts and wait for responses", affects_result=False)
    reward_workers: Count = option(
        1,
        "processes that compute rewards. Each loads a sentence encoder of its own; one process serves all",
        affects_result=False,
    )
    offload: bool = option(False, "move weights and optimizer to main memory during sampling", affects_result=False)
    modules: tuple[str, ...] = option((), "Python modules that every process of verl imports, beside that of hba")
    overrides: tuple[str, ...] = option((), "keys of verl's own, as hydra takes them, such as ++trainer.test_freq=5")


# --- the run ----------------------------------------------------------------------------------------------------------


NotNegative = Annotated[float, Field(ge=0)]


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How responses are sampled. Defaults are those of the published runs."""

    per_prompt: Annotated[int, Field(ge=1)] = option(5, "responses sampled for each prompt (the size of a group)")
    max_new_tokens: Annotated[int, Field(ge=1)] = option(2048, "longest response, in tokens")
    temperature: Annotated[float, Field(gt=0)] = option(1.0, "temperature of sampling. The trained policy has it, too")
    sampler: Literal["generate", "server"] = option(
        "generate",
        "what samples. generate: transformers in this process; server: the vLLM server at remote.base_url (docs/rl.md)",
    )
    weights: str | None = option(
        None,
        "folder that trainer and server both see, for handing over weights. null: in the run folder",
        affects_result=False,
    )
    max_gap: Annotated[float, Field(gt=0)] = option(
        0.3,
        "how far server and trainer may disagree. The run ends when the mean difference of log-probabilities in a "
        "step is larger, in nats",
    )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The policy loss; what is not given is as the algorithm's paper has it (docs/rl.md)."""

    average: Average | None = option(
        None,
        "what weighs the same in the loss: each token, sequence or group; constant: divide by "
        "rollout.max_new_tokens. null: the algorithm's own",
    )
    clip_low: NotNegative | None = option(
        None, "how far below 1 a token's probability ratio is pushed at most. null: the algorithm's own"
    )
    clip_high: NotNegative | None = option(
        None, "how far above 1 a token's probability ratio is pushed at most. null: the algorithm's own"
    )
    updates: Annotated[int, Field(ge=1)] = option(
        1, "optimizer updates in a step. Each takes a part of the step's prompts"
    )
    kl_weight: NotNegative = option(
        0.0, "how strongly the policy is held to that of the start (KL divergence). 0: not at all, and no copy is kept"
    )
    kl: KlKind = option("k3", "estimator of the KL divergence: k1, k2 or k3")
    advantage: str | None = option(
        None, "your own advantages instead of the algorithm's, as module:function or file.py:function"
    )
    importance_cap: Annotated[float, Field(ge=1)] | None = option(
        None, "correct for a server's sampling by importance weights of at most this, such as 2. null: do not"
    )

    def resolved(self, algorithm: Algorithm) -> Algorithm:
        """The algorithm with what this config changes of it."""
        average = algorithm.average if self.average is None else self.average
        low = algorithm.clip_low if self.clip_low is None else self.clip_low
        high = algorithm.clip_high if self.clip_high is None else self.clip_high
        advantage = algorithm.advantage if self.advantage is None else self.advantage
        return algorithm._replace(advantage=advantage, average=average, clip_low=low, clip_high=high)


@dataclass(frozen=True, kw_only=True)
class RlConfig:
    """Everything that decides a run. A step takes `train.batch_size` times `train.accumulation` prompts."""

    RENAMED: ClassVar[Mapping[str, str]] = {
        "rollout.server.url": "remote.base_url",
        "rollout.server.weights": "rollout.weights",
        "rollout.server.max_gap": "rollout.max_gap",
        "rollout.server": "remote",
    }

    atlas: str = option(doc="the atlas: a folder, or the hub id of a release")
    algorithm: AlgorithmName = option("harpo", "the RL algorithm: how advantages and loss are computed")
    published_harpo: bool = option(
        False,
        "harpo and grpo as released: groups without signal weigh on all others, and a group of one keeps its reward",
    )
    max_extra_batches: Count = option(
        8, "dapo: most batches sampled on top, to fill a step with groups that have signal"
    )
    model: ModelConfig = field(default_factory=lambda: ModelConfig(name="Qwen/Qwen2.5-Omni-7B"))
    freeze_towers: bool = option(
        True, "with strategy=full: train the language model's layers only, not the parts that hear and see"
    )
    train: TrainConfig = field(default_factory=lambda: TrainConfig(log_every=1))  # steps are slow, lines are few
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    remote: ClientConfig = field(
        default_factory=lambda: ClientConfig(max_concurrency=64, timeout_seconds=600.0, max_attempts=6)
    )
    reward: RewardConfig = field(default_factory=RewardConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    verl: VerlConfig = field(default_factory=VerlConfig)
    format: str = option("think", "how prompts ask for the answer: plain, boxed, think, or a path to a .jinja file")
    train_split: str = option("train", "split whose prompts are trained on. Slices such as train[:10%] work")
    validation_split: str = option("validation", "split that evaluations ask")
    validation_rows: Count | None = option(
        512, "rows in an evaluation, drawn from all datasets and labels. null: all rows"
    )
    validation_draws: Count = option(1, "responses sampled for each of these rows. The record has their mean")
    validation_batch_size: Count = option(32, "rows in a batch of an evaluation")
    datasets: tuple[str, ...] | None = option(
        None, "train and evaluate on these datasets only, such as [tess, mmsd]. null: on all"
    )
    table_every: Count = option(
        10, "steps between the examples of responses that are written to rollouts.jsonl", affects_result=False
    )
    table_prompts: Count = option(4, "prompts in each of these examples", affects_result=False)

    def __post_init__(self) -> None:
        if (self.rollout.sampler == "server") != (self.remote.base_url is not None):
            what = f"rollout.sampler is {self.rollout.sampler}, remote.base_url is {self.remote.base_url}"
            raise ConfigError(what, fix="Give rollout.sampler=server and remote.base_url=http://... together.")
        if self.remote.provider != "openai" or self.remote.cache is not None:
            what = "a sampler speaks the API of vLLM and keeps no replies"
            raise ConfigError(what, where="remote", fix="Leave remote.provider and remote.cache out.")
        if self.loss.importance_cap is not None and self.rollout.sampler != "server":
            what = "the policy that samples is the policy that learns: there is no mismatch to correct"
            raise ConfigError(what, where="loss.importance_cap", fix="Leave it out, or use rollout.sampler=server.")
        refuse_quantized_training(self.model.quantization, self.model.strategy, self.train)
        strategy = self.model.strategy
        says = strategy == "full" and not self.freeze_towers
        refuse_idle_rates(self.train, heads=False, lora=strategy == "lora", lm_head=says)
        if self.rollout.sampler == "server":
            unserved = {"quantization": self.model.quantization != "none"}
            if self.model.strategy == "lora":
                unserved |= {"lora_dora": self.model.lora_dora, "lora_rank_pattern": bool(self.model.lora_rank_pattern)}
            for key in (key for key, asked in unserved.items() if asked):
                what = "a sampling server would serve another policy"
                raise ConfigError(what, where=f"model.{key}", fix="Leave it out, or use rollout.sampler=generate.")
        if self.encode.sound_of_clips == "interleaved" and self.rollout.sampler == "server":
            what, fix = "a sampling server interleaves no sound", "Use encode.sound_of_clips=separate."
            raise ConfigError(what, where="encode.sound_of_clips", fix=fix)

    def resolved_algorithm(self) -> Algorithm:
        """The algorithm of the run, with what `loss` changes of it; every engine runs this one."""
        return self.loss.resolved(ALGORITHMS[self.algorithm])
