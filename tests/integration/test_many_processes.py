"""Two processes (gloo). Stage 1: the losses of one process, sharded or not, and resume on another number of them. RL:
sharded as whole, from its first sampling on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import rl_run
import torch
from holding import held
from ranks import Dies, free_port
from rl_run import write_reward
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from hba.atlas.decoded import DecodedCache
from hba.errors import ConfigError, InputError
from hba.model import OmniSapiens
from hba.model.process import start_accelerator
from hba.storage import read_jsonl
from hba.train.state import restore_optimizer

sys.path.insert(0, str(Path(__file__).parent.parent))
from media_corpus import movie

SMALL = [
    "model.strategy=full", "train.max_steps=6", "train.epochs=9", "train.batch_size=8", "train.validate_every=3",
    "train.log_every=1", "train.learning_rate=1e-3", "encode.num_frames=2", "encode.min_pixels=3136",
    "encode.max_pixels=3136", "loader.workers=0", "validation_split=validation[:12]",
]  # fmt: skip
SHARDED = "train.sharding=full"
LORA = ["model.strategy=lora", "model.lora_r=4", "model.lora_dropout=0.0"]
AFTER_A_SAVE = Dies(0, "hba.train.loop:save_state", "after")


def train(launch, run, atlas, backbone, *overrides, ranks=1, dies=None):
    """Stage 1 on so many ranks; with `dies` one of them is killed, and the others end by themselves."""
    config = [f"atlas={atlas}", f"model.name={backbone}", *SMALL, *overrides]
    ended = launch(["train", "sft", "--run", run, *config], ranks=ranks, dies=dies)
    assert ended.codes == [0] * ranks if dies is None else -9 in ended.codes, ended.err


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
def one(tmp_path_factory, launch, mini_atlas, backbone):
    """The uninterrupted run of one process."""
    run = tmp_path_factory.mktemp("runs") / "one"
    train(launch, run, mini_atlas, backbone)
    return run


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, launch, mini_atlas, backbone):
    """The same over two processes, sharded, layers computed twice, at most three samples at once, decoded once."""
    run = tmp_path_factory.mktemp("runs") / "sharded"
    extra = [SHARDED, "train.activation_checkpointing=true", "train.device_batch_size=3"]
    extra += ["loader.decode_once=true", f"loader.decoded_folder={run.parent / 'kept'}"]
    train(launch, run, mini_atlas, backbone, *extra, ranks=2)
    return run


def test_ranks_keep_what_they_decode_in_one_folder(sharded):
    kept = DecodedCache(sharded.parent / "kept", 1 << 30)
    assert len(kept) > 20
    assert (kept.folder / "index").stat().st_size % len(kept) == 0  # each medium once


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
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == 6  # one rank alone answers
    assert_same_training(run, one)


SLOW_START = """
import os, sys, time
from datetime import timedelta
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from hba.train.ranks import Ranks
from test_loop import train
there = [Path(f"{sys.argv[2]}.{rank}") for rank in range(2)]
there[int(os.environ["RANK"])].touch()
while not all(path.exists() for path in there):  # they meet when both have imported everything
    time.sleep(0.01)
impatient = InitProcessGroupKwargs(backend="gloo", timeout=timedelta(seconds=10))
ranks = Ranks(Accelerator(cpu=True, kwargs_handlers=[impatient]))
time.sleep(14 * ranks.rank)
train(Path(sys.argv[2]), [[1 + ranks.rank], [3 + ranks.rank]], [0, 1, 2], ranks=ranks)
"""


def test_a_process_that_reads_its_weights_for_longer_than_exchanges_may_take_is_waited_for(tmp_path):
    unit = Path(__file__).parents[1] / "unit"
    places = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SLOW_START, str(unit), str(tmp_path / "run")],
            env=os.environ | places | {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=900)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert [line["samples_seen"] for line in logged(tmp_path / "run")] == [2, 4]


def test_a_loss_that_is_not_finite_ends_all_ranks_and_all_name_its_samples(launch, tmp_path, mini_atlas, backbone):
    config = [f"atlas={mini_atlas}", f"model.name={backbone}", *SMALL, "train.learning_rate=1e30"]
    config += ["train.max_grad_norm=1e30"]
    ended = launch(["train", "sft", "--run", tmp_path / "run", *config], ranks=3)
    assert ended.code == 1
    (said,) = {err.partition("error: ")[2] for err in ended.err}  # the same on every rank
    assert re.match(r"samples train/\d+.*(loss|gradient) is (nan|inf)", said)


@pytest.mark.slow
def test_torchrun_that_is_told_to_stop_leaves_a_checkpoint_and_goes_on(one, tmp_path, mini_atlas, backbone):
    """A scheduler's signal reaches the launcher, which passes it on and gives the processes time."""
    run = tmp_path / "run"
    patient = ["--signals-to-handle=SIGTERM,SIGUSR1", "--shutdown-timeout=600", f"--master-port={free_port()}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *patient]
    config = [f"atlas={mini_atlas}", f"model.name={backbone}", *SMALL, "train.save_every=1"]
    command = [*launcher, "-m", "--", "hba", "train", "sft", "--run", str(run), *config]
    in_the_middle = held(tmp_path, str(run / "checkpoints" / "step_2"), until_signalled=True, ACCELERATE_USE_CPU="true")
    stopped = subprocess.Popen(command, env=in_the_middle, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 600
    while not (run / "checkpoints" / "step_1").exists():
        assert time.monotonic() < deadline and stopped.poll() is None
        time.sleep(0.02)
    stopped.send_signal(signal.SIGUSR1)
    errors = stopped.communicate(timeout=600)[1]
    assert stopped.returncode == 1  # that of the launcher, whatever the code of its processes
    assert errors.count("stopped by SIGUSR1; its checkpoint is written") == 2, errors
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert again.returncode == 0, again.stderr
    assert_same_training(run, one)


def test_two_sharded_processes_give_the_losses_of_one(one, sharded):
    assert_same_training(sharded, one)
    assert weights(sharded).keys() == weights(one).keys()
    assert all(torch.allclose(tensor, weights(one)[name], atol=2e-3) for name, tensor in weights(sharded).items())


def test_sharded_ranks_write_their_parts_of_the_optimizer_and_one_whole_model(one, sharded):
    assert optimizer_files(one) == ["optimizer-00000-of-00001.safetensors"]
    assert optimizer_files(sharded) == [f"optimizer-0000{rank}-of-00002.safetensors" for rank in (0, 1)]
    name = "transformer.lm_head.weight" if "lm_head.weight" in weights(one) else "transformer.model.embed_tokens.weight"
    folder = sharded / "checkpoints" / "step_6"
    rows = []
    for file in optimizer_files(sharded):
        with safe_open(folder / file, framework="pt") as held:
            rows.append(held.get_slice(f"{name}/exp_avg").get_shape()[0])
    assert min(rows) > 0
    assert sum(rows) == weights(one)[name.removeprefix("transformer.")].shape[0]
    assert OmniSapiens.from_pretrained(sharded).heads.num_classes == 25


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_a_run_killed_on_some_processes_goes_on_with_others(one, launch, tmp_path, mini_atlas, backbone, first, then):
    run = tmp_path / "run"
    train(launch, run, mini_atlas, backbone, SHARDED, ranks=first, dies=AFTER_A_SAVE)
    train(launch, run, mini_atlas, backbone, SHARDED, ranks=then)
    assert_same_training(run, one)


def test_lora_adapters_and_heads_are_sharded_beside_a_frozen_backbone(launch, tmp_path, mini_atlas, backbone):
    """Killed and resumed on the way, on as many processes; with DoRA, whose lengths of rows are split, too."""
    alone, run, dora = tmp_path / "alone", tmp_path / "run", [*LORA, "model.lora_dora=true"]
    train(launch, alone, mini_atlas, backbone, *dora)
    train(launch, run, mini_atlas, backbone, *dora, SHARDED, ranks=2, dies=AFTER_A_SAVE)
    train(launch, run, mini_atlas, backbone, *dora, SHARDED, ranks=2)
    assert_same_training(run, alone)
    ours, theirs = (weights(r, "adapter_model.safetensors") for r in (run, alone))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=2e-3) for name in theirs)


@pytest.mark.parametrize(
    ("command", "strategy"),
    [
        ("sft", ["model.strategy=full", "answer_weight=1"]),
        ("lm", LORA),
        ("lm", [*LORA, "model.lora_dora=true"]),
    ],
    ids=["heads and words, everything", "words, LoRA", "words, DoRA"],
)
def test_sharded_ranks_in_bfloat16_compute_what_whole_ones_do(
    launch, tmp_path, mini_atlas, backbone, command, strategy
):
    """With layers computed twice: the first step's loss to the bit, the others as far as sums in another order go."""
    config = [f"atlas={mini_atlas}", f"model.name={backbone}", *SMALL, "train.activation_checkpointing=true"]
    config += [*strategy, "model.dtype=bfloat16", "train.max_steps=3"]
    for name, extra in (("whole", []), ("sharded", [SHARDED])):
        ended = launch(["train", command, "--run", tmp_path / name, *config, *extra], ranks=2)
        assert ended.code == 0, ended.err
    whole, sharded = (logged(tmp_path / name) for name in ("whole", "sharded"))
    assert sharded[0]["loss"] == whole[0]["loss"]
    assert [line["loss"] for line in sharded] == pytest.approx([line["loss"] for line in whole], rel=2e-3)
    assert [line["grad_norm"] for line in sharded] == pytest.approx([line["grad_norm"] for line in whole], rel=1e-2)


def test_sharded_ranks_whose_samples_dropped_a_modality_exchange_what_the_others_do(one, launch, tmp_path, mini_atlas):
    """With one sample a rank and half of all descriptors dropped, ranks differ in which adapters see any."""
    config = [f"atlas={mini_atlas}", f"base={one}", "datasets=[daicwoz,siq2]", "stage=full", "modality_dropout=0.5"]
    config += ["train.batch_size=2", "train.max_steps=6", "train.log_every=1", "features.loader.workers=0", SHARDED]
    done = launch(["train", "bam", "--run", tmp_path / "run", *config], ranks=2)
    assert done.code == 0, done.err
    assert len(logged(tmp_path / "run")) == 6


def test_an_lm_head_that_trains_alone_is_split_over_the_ranks(one, launch, tmp_path, mini_atlas):
    config = [f"atlas={mini_atlas}", f"base={one}", "dtype=bfloat16", "datasets=[siq2,intentqa]", SHARDED]
    config += ["train.batch_size=5", "train.max_steps=2", "train.log_every=1", "features.loader.workers=0"]
    done = launch(["train", "qa", "--run", tmp_path / "run", *config], ranks=2)
    assert done.code == 0, done.err
    assert len(logged(tmp_path / "run")) == 2 and all(line["grad_norm"] > 0 for line in logged(tmp_path / "run"))
    before, after = (OmniSapiens.from_pretrained(path).transformer.lm_head.weight for path in (one, tmp_path / "run"))
    assert after.shape == before.shape and not torch.equal(after, before)


def test_sharded_ranks_of_which_one_hears_its_clips_gather_the_same_layers(launch, tmp_path, backbone):
    """Which clips have a sound track is known when they are opened, after the plan is made."""
    (tmp_path / "m").mkdir()
    lines = []
    for number in range(8):
        sound = "aac" if number % 2 else ""
        film = movie("mp4", "libx264", range(10 + number, 18 + number), rate=8, size=(64, 64), sound=sound)
        (tmp_path / f"m/{number}.mp4").write_bytes(film)
        row = {"problem": "How?", "answer": ("anger", "happiness")[number // 2 % 2], "dataset": "cremad", "task": "t"}
        lines.append(row | {"videos": [f"m/{number}.mp4"], "modality_signature": "text_video"})
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    heard = ["encode.sound_of_clips=separate", "train.batch_size=2", "train.max_steps=3", "model.strategy=heads"]
    heard += ["validation_split=validation[:2]"]
    train(launch, tmp_path / "alone", tmp_path, backbone, *heard)
    train(launch, tmp_path / "shared", tmp_path, backbone, *heard, SHARDED, ranks=2)
    assert_same_training(tmp_path / "shared", tmp_path / "alone")


@pytest.mark.parametrize("strategy", [["model.strategy=full"], LORA], ids=["full", "lora"])
def test_published_weights_are_dealt_out_from_their_files_and_train_as_whole_ones(
    launch, tmp_path, mini_atlas, backbone, strategy
):
    """The files are in bfloat16, what trains and what is frozen is float32: each rank converts its own rows."""
    halved = tmp_path / "halved"
    model = OmniSapiens.from_pretrained(backbone, dtype="bfloat16")
    model.transformer.save_pretrained(halved)
    model.processor.save_pretrained(halved)
    config = [f"atlas={mini_atlas}", f"model.name={halved}", *SMALL, *strategy, "train.max_steps=3"]
    for name, ranks, extra in (("whole", 1, []), ("dealt", 2, [SHARDED])):
        ended = launch(["train", "sft", "--run", tmp_path / name, *config, *extra], ranks=ranks)
        assert ended.code == 0, ended.err
    assert_same_training(tmp_path / "dealt", tmp_path / "whole")


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


def test_rl_samples_and_learns_the_same_when_sharded(launch, tmp_path, mini_atlas, backbone):
    reward = write_reward(tmp_path)
    config = [f"atlas={mini_atlas}", f"model.name={backbone}", f"reward.function={reward}:letters", *rl_run.SMALL]
    config += ["train.batch_size=4", "train.accumulation=1", "train.max_steps=2", "--algorithm", "grpo"]
    for name, extra in (("whole", []), ("sharded", [SHARDED, "train.activation_checkpointing=true"])):
        done = launch(["train", "rl", "--run", tmp_path / name, *config, *extra], ranks=2)
        assert done.code == 0, done.err
    whole, sharded = (logged(tmp_path / name, "rl") for name in ("whole", "sharded"))
    assert len(whole) == len(sharded) == 2
    for ours, theirs in zip(sharded, whole, strict=True):
        for figure in ("score", "grad_norm", "entropy"):
            assert ours[figure] == pytest.approx(theirs[figure], rel=1e-4)
