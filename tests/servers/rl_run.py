"""RL runs on the tiny model, and their death in a chosen phase, for tests of the loop and of who samples for it."""

import signal
from types import ModuleType

import torch
from ranks import Dies
from safetensors.torch import load_file

from hba.config import load_config
from hba.rl import evaluation_log, local
from hba.rl.config import RlConfig
from hba.rl.rollout import Place, Prompts
from hba.run import RunFolder
from hba.storage import read_json, read_jsonl

SMALL = [
    *("model.strategy=full", "model.dtype=float32", "train.epochs=1", "train.batch_size=3", "train.accumulation=2"),
    *("train.max_steps=4", "train.learning_rate=2e-3", "train.validate_every=2", "train.weight_decay=0.0"),
    *("rollout.per_prompt=3", "rollout.max_new_tokens=5", "table_every=2", "validation_rows=6"),
    *("encode.num_frames=2", "encode.max_pixels=3136", "loader.workers=0"),
]
# A random model says nothing right: how many different letters it uses is something that it can learn.
REWARD = """
def letters(responses, **_):
    return [{"score": len(set(r)) / 10, "even": len(r) % 2} for r in responses]

def nan(responses, **_):
    return [float("nan")] * len(responses)

def divides(responses, tasks, **_):
    return [1 / ("sentiment" not in task) for task in tasks]
"""


def as_prompts(batch, first=0):
    """The batch as prompts of a run from number `first` on, in which copies of a sample are copies of one prompt."""
    ids = list(dict.fromkeys(sample.id for sample in batch.samples))
    return Prompts(batch, tuple(Place(0, first + ids.index(sample.id)) for sample in batch.samples))


def write_reward(folder):
    path = folder / "own.py"
    path.write_text(REWARD)
    return path


def arguments(atlas, model, reward, *changes):
    """The settings of a command."""
    return [f"atlas={atlas}", f"model.name={model}", f"reward.function={reward}:letters", *SMALL, *changes]


def settings(atlas, model, reward, *changes):
    return load_config(RlConfig, None, arguments(atlas, model, reward, *changes))


def train(path, config):
    with RunFolder.open(path, config=config, command="train rl", seed=config.train.seed) as run:
        return local.train_rl(config, run)


def logged(path, kind):
    return [line.record for line in read_jsonl(path / "log.jsonl") if line.record["kind"] == kind]


def without_times(record):
    return {key: value for key, value in record.items() if not key.endswith("_seconds")}


def _weights(checkpoint):
    return next(file for file in sorted(checkpoint.glob("*model.safetensors")))


def result(path):
    """Everything that must not depend on interruptions."""
    last = max((path / "checkpoints").glob("step_*"), key=lambda step: int(step.name.removeprefix("step_")))
    return {
        "weights": {name: tensor.tolist() for name, tensor in load_file(_weights(last)).items()},
        "state": read_json(last / local.STATE),
        "log": [without_times(line.record) for line in read_jsonl(path / "log.jsonl")],
        "rollouts": [line.record for line in read_jsonl(path / "rollouts.jsonl")],
        "evaluations": evaluation_log.read_evaluations(path),
        "best": read_json(path / "checkpoints" / "best.json"),
    }


# Where the process dies, in the order in which a step passes: module, function, before or after it.
PHASES = [
    (local, "roll_out", "after"),
    (local, "_rewarded", "after"),
    (local, "update", "before"),
    (torch.optim.AdamW, "step", "after"),
    (local.RunLog, "step", "after"),
    (local, "evaluate", "after"),
    (local, "write_evaluation", "after"),
    (local.Memory, "save", "after"),
    (local, "save_state", "after"),
]


def die_in(launch, owner, name, when, path, given):
    """Run `hba train rl` with the settings `given` in a process that kills itself in the named phase of the first step
    that it makes. A process of the launcher: one that has made backward passes on threads cannot fork one that does."""
    place = owner.__name__ if isinstance(owner, ModuleType) else f"{owner.__module__}:{owner.__qualname__}"
    function = f"{place}{':' if isinstance(owner, ModuleType) else '.'}{name}"
    ended = launch(["train", "rl", "--run", path, *given], ranks=1, dies=Dies(0, function, when))
    assert ended.codes == [-signal.SIGKILL], (name, ended.codes, ended.err)
