"""Two processes (gloo). Stage 1: the losses of one process, sharded or not, and resume on another number of them. RL:
sharded as whole, from its first sampling on."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import rl_run
import torch
from rl_run import write_reward
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from hba.errors import ConfigError, InputError
from hba.model import OmniSapiens
from hba.process import start_accelerator
from hba.storage import read_jsonl
from hba.train.optimizer_state import restore_optimizer

SMALL = [
    "model.strategy=full", "train.max_steps=6", "train.epochs=9", "train.batch_size=8", "train.validate_every=3",
    "train.log_every=1", "train.learning_rate=1e-3", "encode.num_frames=2", "encode.min_pixels=3136",
    "encode.max_pixels=3136", "loader.workers=0", "validation_split=validation[:12]",
]  # fmt: skip
SHARDED = "train.sharding=full"
LORA = ["model.strategy=lora", "model.lora_r=4", "model.lora_dropout=0.0"]


def start(run, atlas, backbone, *overrides, processes=1):
    config = [f"atlas={atlas}", f"model.name={backbone}", *SMALL, *overrides]
    return launched(["train", "sft", "--run", str(run), *config], processes)


def launched(arguments, processes):
    """The command's processes, as a launcher starts them."""
    command = [sys.executable, "-m", "hba", *arguments]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [shared | {"WORLD_SIZE": str(processes), "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(processes)]
    places = ranks if processes > 1 else [{}]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return [subprocess.Popen(command, env=os.environ | place, **pipes) for place in places]


def train(*arguments, **options):
    ended(start(*arguments, **options))


def ended(processes):
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors.decode()


def killed_after(step, run, *arguments, **options):
    """Start the command, and kill all its processes once the checkpoint of `step` stands."""
    processes = start(run, *arguments, **options)
    deadline = time.monotonic() + 200
    while not (run / "checkpoints" / f"step_{step}").exists():
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.02)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
    for process in processes:
        process.communicate()


def logged(run, kind="train"):
    return [line.record for line in read_jsonl(run / "log.jsonl") if line.record["kind"] == kind]


def assert_same_training(run, other):
    assert [line["step"] for line in logged(run)] == [line["step"] for line in logged(other)]
    for ours, theirs in zip(logged(run), logged(other), strict=True):
        assert ours["samples_seen"] == theirs["samples_seen"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    scores, expected = ([line["metrics"]["mean"] for line in logged(r, "validation")] for r in (run, other))
    assert scores == pytest.approx(expected, abs=0.1)


def weights(run, file="model.safetensors"):
    return load_file(run / "checkpoints" / "step_6" / file)


def optimizer_files(run):
    return sorted(path.name for path in (run / "checkpoints" / "step_6").glob("optimizer-*"))


@pytest.fixture(scope="module")
def one(tmp_path_factory, mini_atlas, backbone):
    """The uninterrupted run of one process."""
    run = tmp_path_factory.mktemp("runs") / "one"
    train(run, mini_atlas, backbone)
    return run


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, mini_atlas, backbone):
    """The same over two processes, sharded, layers computed twice, at most three samples at once."""
    run = tmp_path_factory.mktemp("runs") / "sharded"
    extra = [SHARDED, "train.activation_checkpointing=true", "train.device_batch_size=3"]
    train(run, mini_atlas, backbone, *extra, processes=2)
    return run


def test_two_processes_of_accelerate_give_the_losses_of_one(one, tmp_path, mini_atlas, backbone):
    run = tmp_path / "two"
    launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    quiet = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = ["-m", "hba", "train", "sft", "--json", "--run", str(run)]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *quiet, *command, f"atlas={mini_atlas}", f"model.name={backbone}", *SMALL],
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == 6  # one rank alone answers
    assert_same_training(run, one)


def test_two_sharded_processes_give_the_losses_of_one(one, sharded):
    assert_same_training(sharded, one)
    assert weights(sharded).keys() == weights(one).keys()
    assert all(torch.allclose(tensor, weights(one)[name], atol=2e-3) for name, tensor in weights(sharded).items())


def test_sharded_ranks_write_their_parts_of_the_optimizer_and_one_whole_model(one, sharded):
    assert optimizer_files(one) == ["optimizer-00000-of-00001.safetensors"]
    assert optimizer_files(sharded) == [f"optimizer-0000{rank}-of-00002.safetensors" for rank in (0, 1)]
    name = "thinker.lm_head.weight" if "lm_head.weight" in weights(one) else "thinker.model.embed_tokens.weight"
    folder = sharded / "checkpoints" / "step_6"
    rows = []
    for file in optimizer_files(sharded):
        with safe_open(folder / file, framework="pt") as held:
            rows.append(held.get_slice(f"{name}/exp_avg").get_shape()[0])
    assert min(rows) > 0
    assert sum(rows) == weights(one)[name.removeprefix("thinker.")].shape[0]
    assert OmniSapiens.from_pretrained(sharded).heads.num_classes == 25


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_a_run_killed_on_some_processes_goes_on_with_others(one, tmp_path, mini_atlas, backbone, first, then):
    run = tmp_path / "run"
    killed_after(3, run, mini_atlas, backbone, SHARDED, processes=first)
    train(run, mini_atlas, backbone, SHARDED, processes=then)
    assert_same_training(run, one)


@pytest.mark.slow
def test_lora_adapters_and_heads_are_sharded_beside_a_frozen_backbone(tmp_path, mini_atlas, backbone):
    """Killed and resumed on the way, on as many processes."""
    alone, run = tmp_path / "alone", tmp_path / "run"
    train(alone, mini_atlas, backbone, *LORA)
    killed_after(3, run, mini_atlas, backbone, *LORA, SHARDED, processes=2)
    train(run, mini_atlas, backbone, *LORA, SHARDED, processes=2)
    assert_same_training(run, alone)
    ours, theirs = (weights(r, "adapter_model.safetensors") for r in (run, alone))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=2e-3) for name in theirs)


def test_a_part_of_the_optimizer_that_is_missing_is_named(sharded, tmp_path):
    folder = tmp_path / "step_6"
    shutil.copytree(sharded / "checkpoints" / "step_6", folder)
    (folder / "optimizer-00001-of-00002.safetensors").unlink()
    model = nn.Linear(1, 1)
    with pytest.raises(InputError, match=r"step_6: .*no file optimizer-00001-of-00002\.safetensors"):
        restore_optimizer(folder, model, torch.optim.AdamW(model.parameters()))


def test_the_state_of_an_optimizer_of_other_parameters_is_refused(one):
    model = nn.Linear(1, 1)
    with pytest.raises(InputError, match="parameters that do not train"):
        restore_optimizer(one / "checkpoints" / "step_6", model, torch.optim.AdamW(model.parameters()))


def test_a_launcher_that_shards_by_itself_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match=r"train\.sharding=full"):
        start_accelerator("float32")


def test_rl_samples_and_learns_the_same_when_sharded(tmp_path, mini_atlas, backbone):
    reward = write_reward(tmp_path)
    config = [f"atlas={mini_atlas}", f"model.name={backbone}", f"reward.function={reward}:letters", *rl_run.SMALL]
    config += ["train.batch_size=4", "train.accumulation=1", "train.max_steps=2", "--algorithm", "grpo"]
    for name, extra in (("whole", []), ("sharded", [SHARDED, "train.activation_checkpointing=true"])):
        ended(launched(["train", "rl", "--run", str(tmp_path / name), *config, *extra], 2))
    whole, sharded = (logged(tmp_path / name, "rl") for name in ("whole", "sharded"))
    assert len(whole) == len(sharded) == 2
    for ours, theirs in zip(sharded, whole, strict=True):
        for figure in ("score", "grad_norm", "entropy"):
            assert ours[figure] == pytest.approx(theirs[figure], rel=1e-4)
