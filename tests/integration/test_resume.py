"""A run that is killed goes on to the bit, in bfloat16 as in float32, in every supervised stage and way of training."""

import json

import pytest
import torch
from ranks import Dies
from safetensors.torch import load_file

SMALL = [
    "train.max_steps=4", "train.epochs=9", "train.batch_size=6", "train.validate_every=2", "train.log_every=3",
    "train.learning_rate=1e-3",
]  # fmt: skip
WHOLE = [
    "model.dtype=bfloat16", "encode.num_frames=2", "encode.max_pixels=3136", "loader.workers=0",
    "validation_split=validation[:9]",
]  # fmt: skip
FROZEN = ["dtype=bfloat16", "features.loader.workers=0"]
BAM = ["datasets=[daicwoz,siq2]", *FROZEN]
STAGES = {
    "sft heads": ["model.strategy=heads"], "sft dora": ["model.lora_dora=true"], "sft full": ["model.strategy=full"],
    "sft nf4 lora": ["model.lora_r=64", "model.quantization=nf4", "train.optimizer=adamw8bit"],
    "lm lora": ["model.strategy=lora"], "lm full": ["model.strategy=full"],
    "qa lm_head": FROZEN, "bam adapters": BAM, "bam adapters+heads": ["stage=adapters+heads", *BAM],
    "bam full": ["stage=full", *BAM],
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory, launch, mini_atlas, backbone):
    """A stage-1 run with LoRA, in bfloat16."""
    run = tmp_path_factory.mktemp("base") / "sft"
    config = ["model.strategy=lora", "train.batch_size=32", "answer_weight=1", *WHOLE, *SMALL, "train.max_steps=6"]
    done = launch(["train", "sft", "--run", run, f"atlas={mini_atlas}", f"model.name={backbone}", *config], ranks=1)
    assert done.code == 0, done.err
    return run


def everything(run):
    """Every tensor of the last checkpoint, the optimizer's too, and the log without times."""
    last = run / "checkpoints" / "step_4"
    tensors = {
        f"{file.relative_to(last)} {name}": tensor
        for file in last.rglob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return tensors, [{key: value for key, value in record.items() if key != "samples_per_second"} for record in log]


@pytest.mark.parametrize("name", STAGES)
def test_killed_and_resumed_in_bfloat16_every_tensor_is_the_same(tmp_path, launch, mini_atlas, backbone, base, name):
    """Killed once a checkpoint is whole, between two log lines."""
    stage = name.split()[0]
    stands_on = [f"model.name={backbone}", *WHOLE] if stage in ("sft", "lm") else [f"base={base}"]
    config = [f"atlas={mini_atlas}", *stands_on, *SMALL, *STAGES[name]]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert launch(["train", stage, "--run", straight, *config], ranks=1).code == 0
    dies = Dies(0, "hba.train.loop:save_state", "after")
    assert launch(["train", stage, "--run", killed, *config], ranks=1, dies=dies).code == -9
    assert launch(["train", stage, "--run", killed, *config], ranks=1).code == 0
    (ours, log), (theirs, expected) = everything(killed), everything(straight)
    assert ours.keys() == theirs.keys() and len(ours) > 2
    assert [tensor for tensor in theirs if not torch.equal(ours[tensor], theirs[tensor])] == []
    assert log == expected


def test_saved_between_validations_a_run_goes_on_as_if_it_had_not_been(tmp_path, launch, mini_atlas, backbone):
    """`save_every` changes no result and no log line; the checkpoint of the kill is the one that it wrote."""
    config = [f"atlas={mini_atlas}", f"model.name={backbone}", *WHOLE, *SMALL, "train.validate_every=9"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert launch(["train", "sft", "--run", straight, *config], ranks=1).code == 0
    often = [*config, "train.save_every=1"]
    dies = Dies(0, "hba.train.loop:build_optimizer")
    assert launch(["train", "sft", "--run", killed, *often], ranks=1, dies=dies).code == -9
    dies = Dies(0, "hba.train.loop:learning_rate_at", call=4)
    assert launch(["train", "sft", "--run", killed, *often], ranks=1, dies=dies).code == -9
    assert [path.name for path in (killed / "checkpoints").glob("step_*")] == ["step_3"]
    assert launch(["train", "sft", "--run", killed, *config], ranks=1).code == 0
    (ours, log), (theirs, expected) = everything(killed), everything(straight)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert log == expected


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_writes_a_checkpoint_and_says_so(tmp_path, launch, mini_atlas, backbone, name):
    run = tmp_path / "run"
    config = [f"atlas={mini_atlas}", f"model.name={backbone}", *WHOLE, *SMALL, "train.validate_every=9"]
    command = ["train", "sft", "--run", run, *config]
    ended = launch(command, ranks=1, dies=Dies(0, "hba.train.loop:learning_rate_at", call=3, signal=name))
    assert ended.code == 75
    assert f"stopped by {name}; its checkpoint is written (3 of 4 steps)" in ended.err[0]
    assert json.loads((run / "checkpoints" / "step_3" / "trainer_state.json").read_text())["step"] == 3
    assert not (run / "checkpoints" / "best.json").exists()  # nothing was validated
    assert launch(command, ranks=1).code == 0


def test_a_signal_before_the_first_step_ends_the_command_alike(tmp_path, launch, mini_atlas, backbone):
    run = tmp_path / "run"
    command = ["train", "sft", "--run", run, f"atlas={mini_atlas}", f"model.name={backbone}", *WHOLE, *SMALL]
    ended = launch(command, ranks=1, dies=Dies(0, "hba.train.sft:build_model", signal="SIGTERM"))
    assert ended.code == 75 and "stopped by SIGTERM" in ended.err[0] and "Traceback" not in ended.err[0]
    ended = launch(command, ranks=1, dies=Dies(0, "hba.train.loop:learning_rate_at", signal="SIGUSR1"))
    assert ended.code == 75 and "(1 of 4 steps)" in ended.err[0]
