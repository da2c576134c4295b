"""An RL run as verl's own config: every key that we set, and nothing that we do not.

`translate` is a pure function of the run, so that `--dry-run` can show all of it. What verl cannot do as the local
engine does is refused with a ConfigError that names the key, never approximated. What differs is said in docs/scale.md:
verl decays all parameters alike, and its learning rate moves by its own formula between the same points.

verl wants batches of one size that its GPUs divide. `Sizes` are such ones; the trainer gives each step the prompts that
the plan has for it, verl fills the rest with rows that weigh nothing, and the loss is a mean over the others alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hba.errors import ConfigError

if TYPE_CHECKING:
    from hba.rl.config import Algorithm, RlConfig

TRAINER_MODE = ESTIMATOR = "hba"
AGENT = "hba_omni"
TRAINING, VALIDATION = "training", "validation"
PLUGIN = "hba.rl.verl.plugin"
SIGNAL_PART = "hba_signal"  # of a rollout: its reward as a whole number, equal where rewards are
AVERAGES = {"token": "token-mean", "sequence": "seq-mean-token-mean", "constant": "seq-mean-token-sum-norm"}
KL_KINDS = {"k1": "kl", "k2": "mse", "k3": "low_var_kl"}
LOCAL_ONLY = {
    "encode.sound_of_clips": "verl takes clips as the rows have them",
    "encode.clip_pixels": "verl takes clips as the rows have them",
    "train.early_stopping": "verl has no early stopping",
    "train.lm_head_learning_rate": "verl trains all at one rate",
    "train.kernels": "verl has kernels of its own",
    "train.compile": "verl compiles nothing of ours",
    "train.optimizer": "verl builds its own AdamW",
}
"""Keys that say nothing to verl, and why: they must have their defaults."""


class Place(NamedTuple):
    """Where a run on verl has its files, and what it starts from."""

    run: Path
    model: str  # a release of the whole Qwen2.5-Omni: a hub id or a folder such as `hba merge` writes
    steps: int  # optimizer steps in all

    @property
    def folder(self) -> Path:
        """Everything that verl writes and reads."""
        return self.run / "verl"


def translate(config: RlConfig, place: Place) -> dict[str, Any]:
    """verl's keys, dotted, with their values. Raises ConfigError for what verl cannot do as asked."""
    algorithm = _algorithm(config)
    return {
        **_data(config, place, algorithm),
        **_model(config, place),
        **_actor(config, algorithm),
        **_rollout(config),
        **_reward(config),
        **_trainer(config, place),
    }


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as nested mappings."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        at = tree
        for section in sections:
            at = at.setdefault(section, {})
        at[name] = value
    return tree


def modules(config: RlConfig) -> str:
    """VERL_USE_EXTERNAL_MODULES: what verl's processes import; the user's first, which may hold a platform."""
    return ",".join((*config.verl.modules, PLUGIN))


def prompts_of_step(config: RlConfig) -> int:
    """Prompts of one step, over all GPUs; the last one of a plan, and those of a small dataset, have fewer."""
    return config.train.batch_size * config.train.accumulation


class Sizes(NamedTuple):
    """What verl is told of a step, over all GPUs."""

    prompts_of_update: int
    rows_at_once: int  # rollouts on one GPU in one pass


def sizes(config: RlConfig) -> Sizes:
    """The smallest sizes that fit a full step. Raises ConfigError for several updates that it cannot be cut into
    and for a budget of tokens."""
    world, responses = config.verl.nodes * config.verl.gpus_per_node, config.rollout.per_prompt
    prompts, updates = prompts_of_step(config), config.loss.updates
    if config.train.device_tokens is not None:
        fix = "Use train.device_batch_size, or the local engine."
        raise ConfigError("verl counts prompts, not tokens", where="train.device_tokens", fix=fix)
    even = world // math.gcd(world, responses)  # so many prompts have a number of responses that the GPUs divide
    of_update = -(-prompts // (updates * even)) * even
    if -(-prompts // of_update) != updates:
        found = f"{prompts} prompts x {responses} responses cannot be cut into {updates} updates on {world} GPUs"
        raise ConfigError(found, where="loss.updates", fix=f"Use {-(-prompts // of_update)}, or more prompts a step.")
    share, limit = of_update * responses // world, config.train.device_batch_size
    wanted = share if limit is None else min(share, limit * responses)
    return Sizes(of_update, next(rows for rows in range(wanted, 0, -1) if share % rows == 0))


def _algorithm(config: RlConfig) -> Algorithm:
    algorithm = config.resolved_algorithm()
    if config.model.strategy != "full":
        # Tried: verl writes the adapters unmerged, and actor and sampler differed by 8e-4 in log-probabilities.
        fix = "Use model.strategy=full, or the local engine."
        raise ConfigError("only the whole language model trains on verl", where="model.strategy", fix=fix)
    if algorithm.average not in AVERAGES:
        fix = f"Use one of {', '.join(AVERAGES)}, or the local engine."
        raise ConfigError("verl has no average by group", where="loss.average", fix=fix)
    for key, what in LOCAL_ONLY.items():
        section, name = key.split(".")
        given = getattr(config, section)
        if getattr(given, name) != getattr(type(given)(), name):
            raise ConfigError(what, where=key, fix="Leave it out, or use the local engine.")
    if config.rollout.sampler != "generate":
        fix = "Leave rollout.sampler out: verl starts and renews its own vLLM (verl.rollout)."
        raise ConfigError("a server of the local engine", where="rollout.sampler", fix=fix)
    return algorithm


def _data(config: RlConfig, place: Place, algorithm: Algorithm) -> dict[str, Any]:
    return {
        "data.gen_batch_size": 1,  # prompts are asked for in any number
        "algorithm.filter_groups.enable": algorithm.dynamic_sampling,
        # Not the reward: verl compares a deviation of floats, which equal numbers may have, with 0.
        "algorithm.filter_groups.metric": SIGNAL_PART,
        "data.train_files": TRAINING,  # which of the run's two sets of rows; the dataset opens it
        "data.val_files": VALIDATION,
        "data.hba_run": str(place.run),  # a key of ours: where the plug-ins find the run's config.yaml
        "data.custom_cls.path": "pkg://hba.rl.verl.dataset",
        "data.custom_cls.name": "AtlasDataset",
        "data.train_batch_size": sizes(config).prompts_of_update * config.loss.updates,  # the trainer knows each step's
        "data.max_prompt_length": config.encode.max_tokens,
        "data.max_response_length": config.rollout.max_new_tokens,
        "data.dataloader_num_workers": 0,  # rows hold references, so that there is nothing to prepare
        "data.shuffle": False,  # the order is that of the training plan
        "data.validation_shuffle": False,
        "data.seed": config.train.seed,
        "data.mm_processor_kwargs": {"min_pixels": config.encode.min_pixels, "max_pixels": config.encode.max_pixels},
    }


def _model(config: RlConfig, place: Place) -> dict[str, Any]:
    at = "actor_rollout_ref.model"
    own = {"attn_implementation": config.model.attention, "hba_language_layers_alone": config.freeze_towers}
    return {
        f"{at}._target_": f"{PLUGIN}.OmniModelConfig",
        f"{at}.path": place.model,
        f"{at}.override_config": own,
        f"{at}.use_remove_padding": config.model.attention == "flash_attention_2",
        f"{at}.enable_gradient_checkpointing": config.train.activation_checkpointing,
    }


def _actor(config: RlConfig, algorithm: Algorithm) -> dict[str, Any]:
    at, loss, train = "actor_rollout_ref.actor", config.loss, config.train
    prompts, rows = sizes(config)
    keys = {
        f"{at}.strategy": "fsdp2",
        f"{at}.ppo_mini_batch_size": prompts,
        f"{at}.ppo_micro_batch_size_per_gpu": rows,
        f"{at}.ppo_epochs": 1,
        f"{at}.grad_clip": train.max_grad_norm,
        f"{at}.clip_ratio": algorithm.clip_low,
        f"{at}.clip_ratio_low": algorithm.clip_low,
        f"{at}.clip_ratio_high": algorithm.clip_high,
        f"{at}.clip_ratio_c": math.exp(20.0),  # verl's second clip of bad responses, which no paper of ours has: off
        f"{at}.loss_agg_mode": AVERAGES[algorithm.average],
        f"{at}.loss_scale_factor": config.rollout.max_new_tokens if algorithm.average == "constant" else None,
        f"{at}.policy_loss.loss_mode": "gspo" if algorithm.ratio == "sequence" else "vanilla",
        f"{at}.entropy_coeff": 0,
        f"{at}.calculate_entropy": True,
        f"{at}.use_kl_loss": loss.kl_weight > 0,
        f"{at}.kl_loss_coef": loss.kl_weight,
        f"{at}.kl_loss_type": KL_KINDS[loss.kl],
        f"{at}.use_torch_compile": False,
        f"{at}.fsdp_config.use_torch_compile": False,
        "actor_rollout_ref.ref.fsdp_config.use_torch_compile": False,
        f"{at}.fsdp_config.param_offload": config.verl.offload,
        f"{at}.fsdp_config.optimizer_offload": config.verl.offload,
        # Safetensors beside verl's shards: `hba merge` and everything behind it read them without verl.
        f"{at}.checkpoint.save_contents": ["model", "optimizer", "extra", "hf_model"],
        f"{at}.checkpoint.load_contents": ["model", "optimizer", "extra"],
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": rows,
    }
    if config.model.dtype == "float32":
        names = ("param_dtype", "reduce_dtype", "buffer_dtype")
        for module in (at, "actor_rollout_ref.ref"):  # the policy of the start, too: else a KL of rounding errors
            keys |= {f"{module}.fsdp_config.mixed_precision.{name}": "fp32" for name in names}
            keys |= {f"{module}.fsdp_config.dtype": "float32"}
    return keys | _optimizer(config)


def _optimizer(config: RlConfig) -> dict[str, Any]:
    at, train = "actor_rollout_ref.actor.optim", config.train
    if train.schedule == "linear":
        raise ConfigError("verl has no linear schedule", where="train.schedule", fix="Use cosine or constant.")
    warmup: dict[str, float] = {f"{at}.lr_warmup_steps_ratio": train.warmup_share}
    if train.warmup_steps is not None:  # verl takes 0 steps for none given, and then the ratio
        warmup = {f"{at}.lr_warmup_steps": train.warmup_steps, f"{at}.lr_warmup_steps_ratio": 0.0}
    return {
        f"{at}.lr": train.learning_rate,
        f"{at}.betas": [train.beta1, train.beta2],
        f"{at}.weight_decay": train.weight_decay,
        f"{at}.clip_grad": train.max_grad_norm,
        f"{at}.lr_scheduler_type": train.schedule,
        f"{at}.min_lr_ratio": train.final_share,
        f"{at}.zero_indexed_step": False,
    } | warmup


def _rollout(config: RlConfig) -> dict[str, Any]:
    at, verl = "actor_rollout_ref.rollout", config.verl
    return {
        f"{at}.name": verl.rollout,
        f"{at}.n": config.rollout.per_prompt,
        f"{at}.temperature": config.rollout.temperature,
        f"{at}.top_p": 1.0,
        f"{at}.top_k": -1,
        f"{at}.seed": config.train.seed,
        f"{at}.dtype": "float32" if config.model.dtype == "float32" else "bfloat16",
        f"{at}.tensor_model_parallel_size": verl.tensor_parallel,
        f"{at}.gpu_memory_utilization": verl.gpu_memory_utilization,
        f"{at}.max_model_len": config.encode.max_tokens + config.rollout.max_new_tokens,
        f"{at}.log_prob_micro_batch_size_per_gpu": sizes(config).rows_at_once,
        f"{at}.calculate_log_probs": True,
        f"{at}.val_kwargs.do_sample": False,
        f"{at}.val_kwargs.temperature": 0,
        f"{at}.agent.num_workers": verl.agent_workers,
        f"{at}.agent.default_agent_loop": AGENT,
    }


def _reward(config: RlConfig) -> dict[str, Any]:
    return {
        "reward.num_workers": config.verl.reward_workers,
        "reward.reward_manager.source": "importlib",
        "reward.reward_manager.name": "ScorerRewardManager",
        "reward.reward_manager.module.path": "pkg://hba.rl.verl.reward",
    }


def _trainer(config: RlConfig, place: Place) -> dict[str, Any]:
    every, save = config.train.validate_every, config.train.save_every
    if isinstance(save, str):
        raise ConfigError("verl saves by steps", where="train.save_every", fix="Give a number of steps, or null.")
    return {
        "algorithm.adv_estimator": ESTIMATOR,
        "trainer.v1.trainer_mode": TRAINER_MODE,
        "trainer.project_name": config.train.wandb_project or "hba",
        "trainer.experiment_name": f"{place.run.parent.name}/{place.run.name}",
        "trainer.logger": ["console", "file", "tensorboard", *(["wandb"] if config.train.wandb_project else [])],
        "trainer.nnodes": config.verl.nodes,
        "trainer.n_gpus_per_node": config.verl.gpus_per_node,
        "trainer.total_epochs": config.train.epochs,
        "trainer.total_training_steps": place.steps,
        "trainer.save_freq": every if save is None else math.gcd(every, save),
        "trainer.test_freq": every,
        "trainer.val_before_train": True,
        "trainer.resume_mode": "auto",
        "trainer.default_local_dir": str(place.folder / "checkpoints"),
        "ray_kwargs.ray_init.runtime_env.env_vars": {
            "VERL_USE_EXTERNAL_MODULES": modules(config),
            "TENSORBOARD_DIR": str(place.run / "tensorboard"),
        },
    }
