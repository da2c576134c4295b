"""Everything that decides a training run, one config a stage; what all stages share stands first."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from hba.batch.config import WINDOWS_ARE_FOR_HEADS, EncodeConfig, LoaderConfig
from hba.batch.pool import DescriptorConfig
from hba.batch.sampler import MixConfig
from hba.config import option
from hba.errors import ConfigError
from hba.model.config import AS_TRAINED, ATTENTION, FROZEN_DTYPE, AsTrained, Attention, Dtype, ModelConfig

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0)]
Minutes = Annotated[str, Field(pattern=r"^([1-9]\d*(\.\d+)?|0\.\d*[1-9]\d*)min$")]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a stage is trained."""

    epochs: Count = option(5, "passes over the training rows")
    max_steps: Count | None = option(None, "stop after this many optimizer steps, even in the middle of an epoch")
    batch_size: Count = option(8, "samples in a batch, all devices together")
    accumulation: Count = option(1, "batches that make one optimizer step")
    device_batch_size: Count | None = option(
        None,
        "most samples on one device at once. A larger share of a batch runs in parts; the result is the same",
        affects_result=False,
    )
    device_tokens: Count | None = option(
        None,
        "most tokens on one device at once, padding included: samples x the longest one, estimated from the rows",
        affects_result=False,
    )
    sharding: Literal["none", "full"] = option(
        "none", "none: each device holds the whole model; full: the devices share it (FSDP2)", affects_result=False
    )
    activation_checkpointing: bool = option(
        False, "save memory: compute the layers a second time in the backward pass. Slower", affects_result=False
    )
    compile: bool = option(
        False,
        "compile the layers of the language model (torch.compile). The start takes minutes longer, each step less",
    )
    kernels: Literal["none", "liger"] = option(
        "none", "liger: Liger's faster kernels compute norms and gated products of the language model. Needs a GPU"
    )
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = option(
        "adamw",
        "adamw; adamw8bit keeps its moments in 8 bits; paged_adamw8bit also moves them to main memory when the "
        "GPU is full",
    )
    learning_rate: Rate = option(1e-4, "highest learning rate, reached after the warm-up")
    head_learning_rate: Rate | None = option(
        None, "highest learning rate of the classification heads. null: learning_rate"
    )
    lora_learning_rate: Rate | None = option(None, "highest learning rate of the LoRA layers. null: learning_rate")
    lm_head_learning_rate: Rate | None = option(
        None, "highest learning rate of the language head (lm_head). null: learning_rate"
    )
    schedule: Literal["cosine", "linear", "constant"] = option(
        "cosine", "learning rate after the warm-up. cosine and linear fall to final_share; constant stays"
    )
    warmup_share: Share = option(0.05, "share of the steps in which the learning rate rises, 0..1")
    warmup_steps: Annotated[int, Field(ge=0)] | None = option(
        None, "number of steps in which the learning rate rises; replaces warmup_share"
    )
    final_share: Share = option(
        0.05, "learning rate at the end of cosine and linear, as a share of the highest one, 0..1"
    )
    weight_decay: float = option(0.01, "weight decay of AdamW, for matrices alone: biases and norms have none")
    beta1: Share = option(0.9, "how slowly AdamW forgets old gradients (first moment), 0..1")
    beta2: Share = option(0.98, "how slowly AdamW forgets old squared gradients (second moment), 0..1")
    max_grad_norm: Rate = option(1.0, "a gradient with a larger norm is scaled down to this one")
    validate_every: Count = option(200, "optimizer steps between validations. Each validation writes a checkpoint")
    early_stopping: Count | None = option(
        None, "end after this many validations in a row without a better score. null: never end early"
    )
    save_every: Count | Minutes | None = option(
        None,
        "write more checkpoints: every N optimizer steps, or every so many minutes, such as 30min",
        affects_result=False,
    )
    log_every: Count = option(10, "optimizer steps between lines of the log", affects_result=False)
    seed: int = option(0, "random seed: decides the order of samples, new weights, and dropout")
    wandb_project: str | None = option(None, "also log to this project of Weights & Biases", affects_result=False)

    def __post_init__(self) -> None:
        """Raises ConfigError for moments in 8 bits that would be split over the processes."""
        if self.optimizer != "adamw" and self.sharding == "full":
            what = f"the moments of {self.optimizer} cannot be split over the processes"
            raise ConfigError(what, where="train.optimizer", fix="Use train.optimizer=adamw, or sharding=none.")


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """How the frozen backbone's features are computed and kept."""

    cache: bool = option(
        True, "compute the backbone's features once and keep them. false: run the backbone in every step"
    )
    folder: str | None = option(
        None, "folder that keeps the features. null: FROM/features, FROM being the base run", affects_result=False
    )
    batch_size: Annotated[int, Field(ge=1)] = option(32, "samples in a batch while features are computed")
    loader: LoaderConfig = field(default_factory=LoaderConfig)


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Everything that decides a stage-1 run. `model.name` may be a run or checkpoint, from which it then starts."""

    atlas: str = option(doc="the atlas: a folder, or the hub id of a release")
    model: ModelConfig = field(default_factory=lambda: ModelConfig(name="Qwen/Qwen2.5-Omni-7B"))
    train: TrainConfig = field(default_factory=TrainConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    train_split: str = option("train", "split to train on. Slices such as train[:10%] work")
    validation_split: str = option("validation", "split whose score chooses the best checkpoint")
    datasets: tuple[str, ...] | None = option(None, "train on these datasets only, such as [tess, mmsd]. null: on all")
    validation_batch_size: Count = option(32, "samples in a batch of validation")
    answer_weight: float = option(
        0.0, "how much answering in words weighs beside the labels. 0: free-form rows are not trained"
    )

    def __post_init__(self) -> None:
        """Raises ConfigError for windows of sounds where words are trained, or where ranks must compute alike, and for
        what `refuse_quantized_training`, `refuse_idle_rates` and, of heads alone, `refuse_idle_kernels` refuse."""
        if self.encode.long_audio == "windows":
            if self.answer_weight > 0:
                found = "windows of a sound are averaged by heads; answer_weight trains words, too"
                raise ConfigError(found, where="encode.long_audio", fix=WINDOWS_ARE_FOR_HEADS)
            refuse_windows_of_shards(self.encode, self.train)
        refuse_quantized_training(self.model.quantization, self.model.strategy, self.train)
        if self.model.strategy == "heads":
            refuse_idle_kernels(self.train)
        whole = self.model.strategy == "full"
        says = whole and self.answer_weight > 0
        refuse_idle_rates(self.train, heads=True, lora=self.model.strategy == "lora", lm_head=says)


def refuse_windows_of_shards(encode: EncodeConfig, train: TrainConfig) -> None:
    """Raise ConfigError where processes that share a model would hear different numbers of windows of a sound."""
    if encode.long_audio == "windows" and train.sharding == "full":
        found = "processes that share a model cannot hear different numbers of windows"
        fix = "Use train.sharding=none, or encode.long_audio=head."
        raise ConfigError(found, where="encode.long_audio", fix=fix)


def refuse_quantized_training(
    quantization: str, strategy: str, train: TrainConfig, *, where: str = "model.quantization"
) -> None:
    """Raise ConfigError where quantised weights would have to train, or to be split over the processes."""
    if quantization != "none" and strategy == "full":
        what = f"weights of {quantization} are frozen, and strategy full trains them"
        raise ConfigError(what, where=where, fix="Use strategy lora, or quantization=none.")
    if quantization != "none" and train.sharding == "full":
        what = f"weights of {quantization} cannot be split over the processes"
        raise ConfigError(what, where=where, fix="Use train.sharding=none, or quantization=none.")


def refuse_idle_kernels(train: TrainConfig) -> None:
    """Raise ConfigError where layers would be compiled, or computed by other kernels, and none trains."""
    for key, asked in (("compile", train.compile), ("kernels", train.kernels != "none")):
        if asked:
            raise ConfigError("no layer of a language model trains here", where=f"train.{key}", fix="Leave it out.")


def refuse_idle_rates(train: TrainConfig, *, heads: bool, lora: bool, lm_head: bool) -> None:
    """Raise ConfigError for a learning rate of heads, of LoRA layers or of the language head where none train."""
    for key, what, trains in (
        ("head_learning_rate", "classification head", heads),
        ("lora_learning_rate", "LoRA layer", lora),
        ("lm_head_learning_rate", "language head of its own", lm_head),
    ):
        if getattr(train, key) is not None and not trains:
            raise ConfigError(f"no {what} trains here", where=f"train.{key}", fix="Leave it out.")


@dataclass(frozen=True, kw_only=True)
class QaConfig:
    """Everything that decides a stage-2 run."""

    atlas: str = option(doc="the atlas: a folder, or the hub id of a release")
    base: str = option(doc="run folder or checkpoint of stage 1 to start from (--from)")
    train: TrainConfig = field(default_factory=TrainConfig)
    features: FeatureConfig = field(default_factory=FeatureConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    train_split: str = option("train", "split to train on. Slices such as train[:10%] work")
    validation_split: str = option("validation", "split whose score chooses the best checkpoint")
    datasets: tuple[str, ...] | None = option(
        None, "train on these free-form datasets only, such as [siq2]. null: on all"
    )
    dtype: Dtype = option("auto", FROZEN_DTYPE)
    attention: Attention = option("sdpa", ATTENTION)
    quantization: AsTrained = option("auto", AS_TRAINED)

    def __post_init__(self) -> None:
        """Raises ConfigError for rates of heads and LoRA, which are frozen, of lm_head, which alone trains, and for
        layers to compile."""
        refuse_idle_rates(self.train, heads=False, lora=False, lm_head=False)
        refuse_idle_kernels(self.train)


@dataclass(frozen=True, kw_only=True)
class BamConfig:
    """Everything that decides a stage-3 run. Defaults are the published ones; heads train at train.learning_rate."""

    atlas: str = option(doc="the atlas: a folder, or the hub id of a release")
    base: str = option(doc="run folder or checkpoint of an earlier stage to start from (--from)")
    datasets: tuple[str, ...] | None = option(
        None, "datasets that get an adapter each (--dataset). null: all that have descriptors"
    )
    stage: Literal["adapters", "adapters+heads", "full"] = option(
        "adapters", "what is trained: the adapters alone, with the heads, or everything"
    )
    adapter_learning_rate: Rate = option(5e-3, "highest learning rate of the adapters")
    hidden: Count = option(256, "width of an adapter's hidden layer")
    dropout: Annotated[float, Field(ge=0, lt=1)] = option(
        0.1, "share of the descriptor values that training sets to zero, 0..1"
    )
    modality_dropout: Share = option(
        0.3, "chance, 0..1, that a sample trains without a modality; drawn for each modality"
    )
    layer_norm: bool = option(False, "apply LayerNorm to the descriptor before the adapter")
    standardise: bool = option(
        True, "centre and scale each descriptor value by the training rows. The released code does not (false)"
    )
    descriptors: DescriptorConfig = field(default_factory=DescriptorConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=4, learning_rate=2.5e-4))
    features: FeatureConfig = field(default_factory=FeatureConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    train_split: str = option("train", "split to train on. Slices such as train[:10%] work")
    validation_split: str = option("validation", "split whose score chooses the best checkpoint")
    dtype: Dtype = option("auto", FROZEN_DTYPE)
    attention: Attention = option("sdpa", ATTENTION)
    quantization: AsTrained = option("auto", AS_TRAINED)

    def __post_init__(self) -> None:
        """Raises ConfigError for rates of what the stage leaves frozen, and for layers to compile where none trains."""
        whole = self.stage == "full"
        refuse_idle_rates(self.train, heads=self.stage != "adapters", lora=whole, lm_head=whole)
        if self.stage != "full":
            refuse_idle_kernels(self.train)


@dataclass(frozen=True, kw_only=True)
class LmConfig:
    """Everything that decides a run of generative SFT. `model.name` may be a run or checkpoint of another stage."""

    atlas: str = option(doc="the atlas: a folder, or the hub id of a release")
    model: ModelConfig = field(default_factory=lambda: ModelConfig(name="Qwen/Qwen2.5-Omni-7B"))
    train: TrainConfig = field(default_factory=TrainConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    train_split: str = option("train", "split to train on. Slices such as train[:10%] work")
    validation_split: str = option("validation", "split whose score chooses the best checkpoint")
    datasets: tuple[str, ...] | None = option(None, "train on these datasets only, such as [tess, mmsd]. null: on all")
    validation_batch_size: Count = option(32, "samples in a batch of validation")
    formats: tuple[str, ...] = option(
        ("plain",),
        "how prompts ask for the answer: plain, boxed, think, or a .jinja file. Several share the rows equally",
    )
    reasoning: str = option(
        "{{ reasoning }}",
        "text inside <think>: a jinja template over the row's fields, answer, problem, dataset and task",
    )

    def __post_init__(self) -> None:
        """Raises ConfigError for quantised weights that would have to train or to be split, and for idle rates."""
        refuse_quantized_training(self.model.quantization, self.model.strategy, self.train)
        strategy = self.model.strategy
        refuse_idle_rates(self.train, heads=False, lora=strategy == "lora", lm_head=strategy == "full")
