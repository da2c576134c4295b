"""Each plug-in point of verl that hba uses, by name: a verl that moves one fails here first, and says which."""

import asyncio
import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest

verl = pytest.importorskip("verl", reason="verl is not installed: make test-verl", exc_type=ImportError)
hydra = pytest.importorskip("hydra")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

from hba.config import (  # noqa: E402
    dump_yaml,
    load_config,
    to_yaml,
)
from hba.rl.advantages import build_advantage  # noqa: E402
from hba.rl.config import ALGORITHMS, RlConfig  # noqa: E402
from hba.rl.losses import kl_divergence, surrogate, token_weights  # noqa: E402
from hba.rl.verl.config import AGENT, ESTIMATOR, TRAINER_MODE, Place, nested, translate  # noqa: E402

# Keys that are ours, that verl reads without listing them, or that it has no default for.
NOT_IN_VERLS_DEFAULTS = (
    *("actor_rollout_ref.actor.fsdp_config.mixed_precision", "actor_rollout_ref.ref.fsdp_config.mixed_precision"),
    *("data.hba_run", "actor_rollout_ref.model.override_config"),
    *("data.mm_processor_kwargs", "ray_kwargs.ray_init.runtime_env.env_vars", "actor_rollout_ref.rollout.name"),
)
SOURCE = Path(verl.__file__).parent


def composed(overrides, folder=None):
    """verl's config as `python -m verl.trainer.main_ppo` composes it, with ours on top."""
    with hydra.initialize_config_dir(str(SOURCE / "trainer" / "config"), version_base=None):
        return hydra.compose("ppo_trainer", overrides=overrides)


@pytest.fixture(scope="module")
def translated():
    config = load_config(
        RlConfig,
        None,
        ["atlas=DATA", "train.batch_size=8", "model.strategy=full", "model.dtype=float32", "verl.gpus_per_node=2"],
    )
    return translate(config, Place(Path("/runs/rl"), "/models/omni", 10))


def test_every_key_that_we_set_is_one_of_verls(translated):
    default = composed([])
    unknown = [
        key
        for key in translated
        if not key.startswith(NOT_IN_VERLS_DEFAULTS) and OmegaConf.select(default, key, default="?") == "?"
    ]
    assert unknown == [], "verl has renamed or dropped these; see hba/rl/verl/config.py"


def composed_with(translated, folder):
    """verl's config as a run of ours composes it."""
    (folder / "hba.yaml").write_text(dump_yaml({"defaults": ["ppo_trainer", "_self_"], **nested(translated)}))
    searched = [f"hydra.searchpath=[file://{SOURCE / 'trainer' / 'config'}]"]
    with hydra.initialize_config_dir(str(folder), version_base=None):
        return hydra.compose("hba", overrides=searched)


def test_our_config_composes_and_passes_verls_own_validation(translated, tmp_path):
    from verl.utils.config import validate_config

    config = composed_with(translated, tmp_path)
    for key, value in translated.items():
        found = OmegaConf.select(config, key)
        assert (OmegaConf.to_container(found) if OmegaConf.is_config(found) else found) == value, key
    validate_config(config, use_reference_policy=False, use_critic=False)


def test_what_is_registered_by_name():
    from verl.experimental.agent_loop.agent_loop import _agent_loop_registry
    from verl.trainer.ppo.v1 import get_trainer_cls
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    from hba.rl.verl.trainer import OmniTrainer

    assert get_trainer_cls(TRAINER_MODE) is OmniTrainer
    assert _agent_loop_registry[AGENT]["_target_"] == "hba.rl.verl.plugin.OmniAgentLoop"
    assert callable(RolloutReplicaRegistry.register)


def test_what_is_loaded_by_path(translated):
    from verl.trainer.ppo.reward import resolve_reward_manager_cls
    from verl.utils.dataset.rl_dataset import get_dataset_class
    from verl.workers.config import HFModelConfig

    from hba.rl.verl.dataset import AtlasDataset
    from hba.rl.verl.reward import ScorerRewardManager

    config = OmegaConf.create(nested(translated))
    assert get_dataset_class(config.data).__name__ == AtlasDataset.__name__
    assert resolve_reward_manager_cls(config).__name__ == ScorerRewardManager.__name__
    # No vLLM is here: one who samples with another engine need not have it.
    assert issubclass(hydra.utils.get_class(config.actor_rollout_ref.model._target_), HFModelConfig)


@pytest.mark.parametrize(
    "name",
    [
        *("_init_dataloader", "_compute_advantage", "_update_actor", "_save_checkpoint", "_load_checkpoint"),
        *("prepare_step", "_add_prompts_to_generate", "_val_metrics_update", "on_step_begin"),
    ],
)
def test_the_steps_of_the_trainer_that_we_extend(name):
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    from hba.rl.verl.trainer import OmniTrainer

    ours, theirs = (list(inspect.signature(getattr(c, name)).parameters) for c in (OmniTrainer, PPOTrainerSync))
    assert ours == theirs


def test_the_estimator_is_called_with_rewards_mask_and_group():
    from verl.trainer.ppo.core_algos import register_adv_est
    from verl.trainer.ppo.ray_trainer import compute_advantage

    assert callable(register_adv_est) and ESTIMATOR == "hba"
    source = inspect.getsource(compute_advantage)
    for name in ("token_level_rewards", "response_mask", "index"):
        assert f'"{name}"' in source


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_every_algorithms_advantages_are_the_local_engines_through_verls_registry(name, monkeypatch):
    from verl.protocol import DataProto
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, register_adv_est
    from verl.trainer.ppo.ray_trainer import compute_advantage

    from hba.rl.verl.trainer import OmniTrainer

    random = np.random.default_rng(3)
    trainer, expected = OmniTrainer.__new__(OmniTrainer), build_advantage(ALGORITHMS[name].advantage)
    trainer.advantage = build_advantage(ALGORITHMS[name].advantage)
    monkeypatch.delitem(ADV_ESTIMATOR_REGISTRY, ESTIMATOR, raising=False)  # one trainer a process
    register_adv_est(ESTIMATOR)(trainer._estimate)
    for _ in range(3):  # harpo and ema_grpo remember
        rewards = random.integers(0, 3, 12) / 2
        groups, tasks = [str(i // 4) for i in range(12)], ["emotion_cls"] * 8 + ["siq2_qa"] * 4
        mask, scores = torch.ones(14, 5), torch.zeros(14, 5)
        mask[::3, 3:], scores[:12, 2] = 0, torch.as_tensor(rewards, dtype=torch.float32)
        trainer._tasks = [*tasks, None, None]  # two rows that fill the batch
        batch = DataProto.from_dict(
            {"token_level_rewards": scores, "response_mask": mask}, {"uid": np.array([*groups, "x", "x"], object)}
        )
        found = compute_advantage(batch, adv_estimator=ESTIMATOR, config=OmegaConf.create({})).batch["advantages"]
        wanted = np.append(expected(rewards, groups, tasks), [0, 0])
        np.testing.assert_allclose(found, wanted[:, None] * mask.numpy(), atol=1e-6)


def test_advantages_of_ones_own_are_those_of_the_trainer(tmp_path, monkeypatch):
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY

    from hba.rl.verl.trainer import OmniTrainer, PPOTrainerSync

    (tmp_path / "mine.py").write_text("def halved(rewards, **_):\n    return rewards / 2\n")
    given = ["atlas=DATA", "model.strategy=full", f"loss.advantage={tmp_path / 'mine.py'}:halved"]
    (tmp_path / "config.yaml").write_text(to_yaml(load_config(RlConfig, None, given)))
    monkeypatch.setattr(PPOTrainerSync, "__init__", lambda self, config: None)  # verl's own part, which starts Ray's
    monkeypatch.delitem(ADV_ESTIMATOR_REGISTRY, ESTIMATOR, raising=False)
    trainer = OmniTrainer(OmegaConf.create({"data": {"hba_run": str(tmp_path)}, "trainer": {"v1": {}}}))
    assert trainer.advantage([1.0, 3.0], ["a", "a"], ["t", "t"]).tolist() == [0.5, 1.5]


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_every_algorithms_loss_and_its_gradient_are_the_local_engines(name, kl, tmp_path):
    """By the keys that a run gives verl, in micro-batches of two workers, with ratios clipped on both sides, and with
    rows that fill the batch: a remainder, or prompts that cannot be read."""
    from verl.trainer.ppo.core_algos import agg_loss, get_policy_loss_fn, kl_penalty
    from verl.utils.config import omega_conf_to_dataclass

    from hba.rl.verl.trainer import _CountingWorkers

    given = ["atlas=DATA", "train.batch_size=4", "model.strategy=full", "rollout.max_new_tokens=9", f"algorithm={name}"]
    run = load_config(RlConfig, None, [*given, "verl.gpus_per_node=2", "loss.kl_weight=0.3", f"loss.kl={kl}"])
    keys = translate(run, Place(Path("/runs/rl"), "/models/omni", 10))
    actor = omega_conf_to_dataclass(composed_with(keys, tmp_path).actor_rollout_ref.actor)

    torch.manual_seed(5)
    lengths = torch.tensor([9, 1, 4, 6, 2, 7, 3, 5])
    mask = torch.nn.functional.pad((torch.arange(9) < lengths.unsqueeze(1)).float(), (0, 0, 0, 4))
    new = (-3 * torch.rand(12, 9)).requires_grad_()
    old, reference = new.detach() + 0.4 * torch.randn(12, 9), new.detach() + 0.4 * torch.randn(12, 9)
    advantages = torch.nn.functional.pad(torch.randn(8), (0, 4))

    ranks, step = 2, SimpleNamespace(extra_info={"global_batch_size": 12})
    _CountingWorkers(SimpleNamespace(update_actor=lambda batch: None), 8).update_actor(step)
    size = {"batch_num_tokens": int(lengths.sum()), **step.extra_info}
    actor.global_batch_info.update(dp_size=ranks, loss_scale_factor=actor.loss_scale_factor, **size)
    theirs = 0.0
    for rows in torch.arange(12).split(2):  # a worker's loss counts half: gradients are averaged over the workers
        loss, _ = get_policy_loss_fn(actor.policy_loss.loss_mode)(
            old_log_prob=old[rows],
            log_prob=new[rows],
            advantages=advantages[rows].unsqueeze(1).expand(-1, 9),
            response_mask=mask[rows],
            loss_agg_mode=actor.loss_agg_mode,
            config=actor,
        )
        penalty = kl_penalty(new[rows], reference[rows], actor.kl_loss_type)
        averaged = agg_loss(penalty, mask[rows], actor.loss_agg_mode, **actor.global_batch_info)
        theirs = theirs + (loss + actor.kl_loss_coef * averaged) / ranks
    (their_gradient,) = torch.autograd.grad(theirs, new)

    algorithm = run.resolved_algorithm()
    clips = {"clip_low": algorithm.clip_low, "clip_high": algorithm.clip_high, "ratio": algorithm.ratio}
    terms = surrogate(new[:8], old[:8], advantages[:8], mask[:8], **clips).loss_NL
    terms = terms + run.loss.kl_weight * kl_divergence(new[:8], reference[:8], run.loss.kl)
    weights = token_weights(lengths, torch.arange(8) // 2, average=algorithm.average, max_tokens=9)
    ours = (terms * mask[:8] * weights.unsqueeze(1)).sum()
    (our_gradient,) = torch.autograd.grad(ours, new)

    torch.testing.assert_close(theirs, ours, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(their_gradient, our_gradient, atol=1e-7, rtol=1e-4)


def test_the_divisor_and_the_number_of_prompts_are_read_where_ours_are_put():
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    update = inspect.getsource(PPOTrainer._update_actor)
    given, called = ('"global_batch_size": ppo_mini_batch_size', "self.actor_rollout_wg.update_actor(batch)")
    assert given in update and update.index("batch.extra_info.update(extra_info)") < update.index(called)
    assert 'global_batch_info["global_batch_size"] = data["global_batch_size"]' in (
        (SOURCE / "workers/utils/losses.py").read_text()
    )
    fit = inspect.getsource(PPOTrainer.fit)
    assert fit.index("self.on_step_begin()") < fit.index("self.step(metrics, self.timing_raw)")
    assert "train_batch_size = self.config.data.train_batch_size" in inspect.getsource(PPOTrainer.step)
    assert "num_prompts // gen_batch_size" in inspect.getsource(PPOTrainer._next_train_batch)


def test_groups_of_equal_rewards_have_no_deviation_in_the_part_that_verl_compares():
    """Of a reward they may have one: it is why the reward is not what verl compares."""
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

    from hba.rl.advantages import SIGNAL
    from hba.rl.verl.config import SIGNAL_PART

    source = inspect.getsource(ReplayBuffer._dapo_filtered_keys)
    assert "float(np.std(values)) == 0.0" in source and "reward_extra_info[self.filter_groups_metric]" in source
    assert SIGNAL_PART != "reward"
    rewards = [0.1, 1.0 / 3, 0.8 * 0.731, -0.75, 1.7]
    assert any(np.std([reward] * 3) != 0 for reward in rewards)
    for count in (2, 3, 5, 7):
        assert all(np.std([float(round(reward / SIGNAL))] * count) == 0 for reward in rewards)


def test_whatever_a_reward_raises_ends_the_run_and_keeps_nobody_waiting(tmp_path, mini_atlas):
    from hba.errors import HbaError
    from hba.rl.verl.launch import note_failure, noted_failure
    from hba.rl.verl.reward import ScorerRewardManager

    (tmp_path / "verl").mkdir()
    (tmp_path / "own.py").write_text("def broken(responses, **_):\n    return [{}[r] for r in responses]\n")
    given = [f"atlas={mini_atlas}", "model.strategy=full", f"reward.function={tmp_path / 'own.py'}:broken"]
    (tmp_path / "config.yaml").write_text(to_yaml(load_config(RlConfig, None, given)))
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: "a response")
    config = OmegaConf.create({"data": {"hba_run": str(tmp_path)}})
    manager = ScorerRewardManager(config, tokenizer, None)

    row = SimpleNamespace(
        batch={"responses": torch.ones(3, dtype=torch.long), "attention_mask": torch.ones(5, dtype=torch.long)},
        non_tensor_batch={"role": "training", "index": 0, "way": "sampled"},
    )

    async def all_at_once():
        asked = [manager.run_single([row]) for _ in range(3)]
        return await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 30)

    assert noted_failure(tmp_path) is None
    errors = asyncio.run(all_at_once())
    assert all(isinstance(error, HbaError) for error in errors)
    noted = str(noted_failure(tmp_path))
    assert f"reward.function={tmp_path / 'own.py'}:broken: raised KeyError: 'a response'" in noted
    assert 'own.py", line 2, in broken' in noted
    note_failure(tmp_path, HbaError("another"))
    assert str(noted_failure(tmp_path)) == noted, "the first counts"


def test_groups_without_signal_are_replaced_up_to_the_limit():
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    from hba.errors import HbaError
    from hba.rl.verl.trainer import OmniTrainer

    assert "refill_fn=self._add_prompts_to_generate" in inspect.getsource(PPOTrainer._build_replay_buffer)
    assert "self.refill_fn(dispatch_count)" in inspect.getsource(ReplayBuffer.sample)
    trainer = OmniTrainer.__new__(OmniTrainer)
    trainer.settings = load_config(
        RlConfig, None, ["atlas=DATA", "algorithm=dapo", "max_extra_batches=2", "train.batch_size=4"]
    )
    trainer.global_steps, trainer._refilled = 7, 6
    with pytest.raises(HbaError, match="step 7 is not full after 8 prompts more"):
        trainer._add_prompts_to_generate(3)


def test_evaluations_and_agents_are_called_as_ours_answer():
    from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
    from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    validate = inspect.getsource(PPOTrainer._validate)
    assert 'extra_field.get("reward_extra_info", {})' in validate and "return self._val_metrics_update(" in validate
    assert list(inspect.signature(SingleTurnAgentLoop.run).parameters)[:3] == ["self", "sampling_params", "priority"]
    failed = inspect.getsource(AgentLoopWorkerTQ._run_prompt)
    assert 'status = "failure"' in failed, "a prompt whose media cannot be read no longer leaves the rest alone"


def test_processors_and_positions_are_asked_for_as_ours_answers():
    from verl.experimental.agent_loop.agent_loop import AgentLoopWorker
    from verl.utils.tokenizer import build_multimodal_processor_inputs
    from verl.workers.config import HFModelConfig

    source = inspect.getsource(AgentLoopWorker._compute_position_ids)
    assert "self.processor.get_rope_index(" in source and "get_rope_index_kwargs" in source
    seen = build_multimodal_processor_inputs(
        lambda **call: call, text=["a"], videos=[("frames", {"duration": 2.0})], audio=["sound"],
        mm_processor_kwargs={"min_pixels": 1, "max_pixels": 2},
    )  # fmt: skip
    assert seen["videos"] == ["frames"] and seen["video_metadata"] == [{"duration": 2.0}]
    assert seen["audio"] == ["sound"] and (seen["min_pixels"], seen["max_pixels"]) == (1, 2)
    assert hasattr(HFModelConfig, "__post_init__")


def test_the_vllm_server_has_the_step_that_we_replace():
    source = (SOURCE / "workers/rollout/vllm_rollout/vllm_async_server.py").read_text()  # vllm need not be installed
    for name in ("def _init_model_config(self, model_config)", "class vLLMHttpServer", "self.server_class ="):
        assert name in source
    assert "omega_conf_to_dataclass(model_config, dataclass_type=HFModelConfig)" in source, "it honours _target_ now"


def test_a_config_of_a_run_reaches_the_plugins(tmp_path):
    from hba.rl.verl.dataset import run_config

    config = load_config(RlConfig, None, ["atlas=DATA", "algorithm=grpo"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert run_config(str(tmp_path)) == config
