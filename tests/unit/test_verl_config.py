"""A run as verl's config: pure, without verl."""

import ast
import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from hba.config import load_config
from hba.errors import ConfigError
from hba.rl.config import RlConfig
from hba.rl.verl.config import SIGNAL_PART, Place, nested, translate

PLACE = Place(Path("/runs/rl"), "Qwen/Qwen2.5-Omni-7B", 120)


def keys(*overrides):
    given = ["atlas=DATA", "train.batch_size=32", "model.strategy=full", *overrides]
    return translate(load_config(RlConfig, None, given), PLACE)


def test_a_published_run_on_one_machine():
    found = keys("train.device_batch_size=1", "encode.max_tokens=3072", "train.learning_rate=1e-6")
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    assert found["data.train_batch_size"] == found[f"{actor}.ppo_mini_batch_size"] == 32
    assert found[f"{rollout}.n"] == found[f"{actor}.ppo_micro_batch_size_per_gpu"] == 5  # one prompt's rollouts
    assert (found["data.max_prompt_length"], found["data.max_response_length"]) == (3072, 2048)
    assert found[f"{rollout}.max_model_len"] == 5120
    assert found[f"{actor}.optim.lr"] == 1e-6
    assert found[f"{actor}.loss_agg_mode"] == "seq-mean-token-mean"  # HARPO's loss is GRPO's
    assert found["trainer.total_training_steps"] == 120
    assert found["trainer.default_local_dir"] == "/runs/rl/verl/checkpoints"
    assert not found[f"{actor}.use_kl_loss"]


@pytest.mark.parametrize(
    "overrides, key, value",
    [
        (["algorithm=gspo"], "policy_loss.loss_mode", "gspo"),
        (["algorithm=gspo"], "clip_ratio_high", 4e-4),
        (["algorithm=dr_grpo"], "loss_agg_mode", "seq-mean-token-sum-norm"),
        (["algorithm=dr_grpo"], "loss_scale_factor", 2048),
        (["algorithm=gpg"], "loss_agg_mode", "token-mean"),
        (["loss.kl_weight=0.01", "loss.kl=k1"], "kl_loss_type", "kl"),
        (["loss.updates=4"], "ppo_mini_batch_size", 8),
        (["train.accumulation=2"], "ppo_mini_batch_size", 64),
        (["train.schedule=constant"], "optim.lr_scheduler_type", "constant"),
        (["train.warmup_share=0.2"], "optim.lr_warmup_steps_ratio", 0.2),
        (["train.warmup_steps=7"], "optim.lr_warmup_steps", 7),
        (["train.warmup_steps=0"], "optim.lr_warmup_steps_ratio", 0.0),  # verl takes 0 steps for none given
        (["model.dtype=float32"], "fsdp_config.mixed_precision.param_dtype", "fp32"),
    ],
)
def test_what_the_actor_is_told(overrides, key, value):
    assert keys(*overrides)[f"actor_rollout_ref.actor.{key}"] == value


@pytest.mark.parametrize(
    "overrides, where",
    [
        (["model.strategy=lora"], "model.strategy"),
        (["loss.average=group"], "loss.average"),
        (["loss.updates=5"], "loss.updates"),
        (["train.device_tokens=9999"], "train.device_tokens"),
        (["train.schedule=linear"], "train.schedule"),
        (["train.early_stopping=2"], "train.early_stopping"),
        (["train.compile=true"], "train.compile"),
        (["train.kernels=liger"], "train.kernels"),
        (["train.lm_head_learning_rate=1e-5", "freeze_towers=false"], "train.lm_head_learning_rate"),
        (["train.save_every=30min"], "train.save_every"),
        (["rollout.sampler=server", "remote.base_url=http://localhost:8000/v1"], "rollout.sampler"),
    ],
)
def test_what_verl_cannot_do_is_refused_by_name(overrides, where):
    with pytest.raises(ConfigError) as error:
        keys(*overrides)
    assert error.value.where == where


@pytest.mark.parametrize("save, every", [("null", 200), ("50", 50), ("120", 40), ("400", 200)])
def test_checkpoints_come_as_often_as_asked_and_at_each_evaluation(save, every):
    found = keys("train.validate_every=200", f"train.save_every={save}")
    assert (found["trainer.save_freq"], found["trainer.test_freq"]) == (every, 200)


def test_the_board_is_that_of_the_run_folder():
    found = keys("train.wandb_project=emotions")
    assert (found["trainer.project_name"], found["trainer.experiment_name"]) == ("emotions", "runs/rl")
    assert "wandb" in found["trainer.logger"] and "wandb" not in keys()["trainer.logger"]


@pytest.mark.parametrize("prompts", [1, 7, 23, 32, 33])
@pytest.mark.parametrize("responses", [1, 3, 5])
@pytest.mark.parametrize("gpus", [1, 2, 3, 8])
def test_any_number_of_prompts_fits_any_number_of_gpus(prompts, responses, gpus):
    """With as few rows that weigh nothing as verl's checks leave."""
    found = keys(f"train.batch_size={prompts}", f"rollout.per_prompt={responses}", f"verl.gpus_per_node={gpus}")
    size, actor = found["data.train_batch_size"], "actor_rollout_ref.actor"
    assert size >= found[f"{actor}.ppo_mini_batch_size"] >= prompts
    assert size * responses % gpus == 0 and size - prompts < gpus
    assert size * responses // gpus % found[f"{actor}.ppo_micro_batch_size_per_gpu"] == 0


def test_updates_of_prompts_that_they_do_not_divide():
    found = keys("train.batch_size=7", "loss.updates=2", "verl.gpus_per_node=1")
    assert found["actor_rollout_ref.actor.ppo_mini_batch_size"] == 4 and found["data.train_batch_size"] == 8


def test_dapo_samples_on_through_verls_filter_of_groups():
    found = keys("algorithm=dapo")
    assert found["algorithm.filter_groups.enable"] and found["algorithm.filter_groups.metric"] == SIGNAL_PART
    assert found["data.gen_batch_size"] == 1
    assert found["actor_rollout_ref.actor.clip_ratio_high"] == 0.28
    assert not keys("algorithm=grpo")["algorithm.filter_groups.enable"]


def test_the_users_modules_come_before_the_plugin():
    found = keys("verl.modules=[mine]")["ray_kwargs.ray_init.runtime_env.env_vars"]
    assert found["VERL_USE_EXTERNAL_MODULES"] == "mine,hba.rl.verl.plugin"


def test_nested():
    assert nested({"a.b.c": 1, "a.b.d": 2, "e": {"f.g": 3}}) == {"a": {"b": {"c": 1, "d": 2}}, "e": {"f.g": 3}}


def test_a_dry_run_shows_every_key_and_makes_nothing(hba, tmp_path, mini_atlas, backbone):
    options = ["--engine", "verl", "--dry-run", "--json", "--run", tmp_path / "rl"]
    small = [
        f"atlas={mini_atlas}",
        f"model.name={backbone}",
        "model.strategy=full",
        "train.batch_size=4",
        "train.epochs=1",
        "verl.gpus_per_node=1",
    ]
    code, out, err = hba("train", "rl", *options, *small)
    assert code == 0, err
    shown = json.loads(out)
    assert shown["actor_rollout_ref.model.path"] == str(tmp_path / "rl" / "verl" / "model")
    assert shown["trainer.total_training_steps"] > 1
    assert not (tmp_path / "rl").exists()


def test_a_dry_run_is_verls(hba):
    code, _, err = hba("train", "rl", "--dry-run", "atlas=nowhere")
    assert code == 2
    assert "--engine verl" in err


def imported(module, seen):
    """The modules that `module` imports as it is read, and those of hba.rl.verl among them in turn. Nothing is run."""
    tree = ast.parse(Path(find_spec(module).origin).read_text())
    for node in tree.body:
        named = [node.module] if isinstance(node, ast.ImportFrom) else []
        named += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module == "hba.rl.verl":
            named += [f"{node.module}.{alias.name}" for alias in node.names]
        for name in set(named) - seen:
            seen.add(name)
            if name.startswith("hba.rl.verl."):
                imported(name, seen)
    return tree, seen


def test_what_verl_loads_by_name_is_there_and_wants_no_vllm():
    """verl's module of vLLM cannot be imported without it: who samples with another engine would end there."""
    found = keys()
    places = {
        found["actor_rollout_ref.model._target_"],
        f"{found['data.custom_cls.path']}.{found['data.custom_cls.name']}",
        f"{found['reward.reward_manager.module.path']}.{found['reward.reward_manager.name']}",
    }
    for place in places:
        module, _, name = place.removeprefix("pkg://").rpartition(".")
        tree, read = imported(module, set())
        assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
        assert not [each for each in read if "vllm" in each]
