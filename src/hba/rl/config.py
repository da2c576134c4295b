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

    nodes: Count = option(1, "machines", affects_result=False)
    gpus_per_node: Count = option(8, "GPUs of each machine", affects_result=False)
    rollout: str = option("vllm", "engine that samples: vllm, or one that a module of yours registers with verl")
    tensor_parallel: Count = option(1, "GPUs that share one copy of the sampling engine", affects_result=False)
    gpu_memory_utilization: Share = option(0.5, "of a GPU's memory for the sampling engine", affects_result=False)
    agent_workers: Count = option(8, "processes that prepare prompts and await responses", affects_result=False)
    reward_workers: Count = option(
        1, "processes that reward, each with its encoder; one shares it among all", affects_result=False
    )
    offload: bool = option(False, "keep parameters and optimizer in main memory while sampling", affects_result=False)
    modules: tuple[str, ...] = option((), "Python modules that every process of verl imports besides hba's plug-in")
    overrides: tuple[str, ...] = option((), "verl's own keys on top, as hydra takes them: ++trainer.test_freq=5")


# --- the run ----------------------------------------------------------------------------------------------------------


NotNegative = Annotated[float, Field(ge=0)]


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How responses are sampled. Defaults are those of the published runs."""

    per_prompt: Annotated[int, Field(ge=1)] = option(5, "responses sampled for each prompt")
    max_new_tokens: Annotated[int, Field(ge=1)] = option(2048, "longest response, in tokens")
    temperature: Annotated[float, Field(gt=0)] = option(1.0, "of the sampling, and of the policy that is trained")
    sampler: Literal["generate", "server"] = option(
        "generate", "transformers' generate, or the vLLM server of remote.base_url (docs/rl.md)"
    )
    weights: str | None = option(
        None,
        "folder that trainer and server both see, where weights are handed over; null: in the run",
        affects_result=False,
    )
    max_gap: Annotated[float, Field(gt=0)] = option(
        0.3, "mean |log-probability of server - of policy| of a step, in nats, above which the run ends"
    )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The policy loss; what is not given is as the algorithm's paper has it (docs/rl.md)."""

    average: Average | None = option(None, "token, sequence, group or constant: what weighs the same")
    clip_low: NotNegative | None = option(None, "a ratio below 1 - clip_low gains nothing more")
    clip_high: NotNegative | None = option(None, "a ratio above 1 + clip_high gains nothing more")
    updates: Annotated[int, Field(ge=1)] = option(1, "optimizer updates in a step, each over a part of its prompts")
    kl_weight: NotNegative = option(
        0.0, "weight of the KL divergence from the policy at the start; 0 needs no reference"
    )
    kl: KlKind = option("k3", "its estimator: k1, k2 or k3")
    advantage: str | None = option(
        None, "advantages of your own in place of the algorithm's, as module:function or file.py:function"
    )
    importance_cap: Annotated[float, Field(ge=1)] | None = option(
        None, "correct for a server's sampling with importance weights of at most this, such as 2; null: do not"
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

    atlas: str = option(doc="atlas folder, or the hub id of a release")
    algorithm: AlgorithmName = option("harpo", "whose advantages and loss")
    published_harpo: bool = option(
        False, "harpo, grpo: as released. Groups without signal weigh on all others; a group of one keeps its reward"
    )
    max_extra_batches: Count = option(8, "dapo: batches sampled beyond a step's own to fill it with signal")
    model: ModelConfig = field(default_factory=lambda: ModelConfig(name="Qwen/Qwen2.5-Omni-7B"))
    freeze_towers: bool = option(True, "with strategy full: train the layers of the language model alone")
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
