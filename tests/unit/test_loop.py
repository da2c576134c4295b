"""The loop over a stage of a few numbers: what a step costs besides its micro-batches, and what it skips."""

import weakref
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hba.atlas.rows import Quarantined
from hba.config import load_config
from hba.errors import ConfigError, MachineError
from hba.model.process import start_accelerator
from hba.rl.config import RlConfig
from hba.run import RunFolder
from hba.storage import read_jsonl
from hba.train.config import BamConfig, LmConfig, QaConfig, SftConfig, TrainConfig
from hba.train.loop import Plan, Stage, Validation, build_optimizer, learning_rate_at, run_training
from hba.train.ranks import Ranks


@dataclass(frozen=True)
class Numbers:
    """A batch of rows that are their own features; odd ones cannot be read where `broken`."""

    samples: tuple
    x_B: torch.Tensor
    quarantined: tuple = ()

    def __len__(self):
        return len(self.samples)

    def to(self, device):
        return replace(self, x_B=self.x_B.to(device))


def batch_of(rows, broken):
    lost = [Quarantined(f"train/{row}", "train", "x", "here", "row", "broken") for row in rows if row in broken]
    kept = [int(row) for row in rows if row not in broken]
    return Numbers(tuple(kept), torch.tensor(kept, dtype=torch.float32).reshape(-1, 1), tuple(lost))


def squares(model, batch):
    return model(batch.x_B).square().sum()


def train(folder, micro_batches, starts, broken=(), ranks=None, loss=squares, batches=None, validate=None, **config):
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    stage = Stage(
        model=model,
        loss=loss,
        batches=batches or (lambda plan, start: (batch_of(rows, broken) for rows in plan[start:])),
        validate=validate or (lambda: Validation(0.5, {"mean": 0.5})),
        save_model=lambda folder: torch.save(model.state_dict(), folder / "model.pt"),
        learning_rates={},
    )
    settings = TrainConfig(**{"validate_every": 100, "log_every": 1} | config)
    plan = Plan([np.array(rows, np.int64) for rows in micro_batches], starts)
    with RunFolder.open(folder, config=settings, command="train x", seed=0) as run:
        run_training(stage, plan, settings, ranks or Ranks(start_accelerator("float32")), run)
    log = [line.record for line in read_jsonl(folder / "log.jsonl")]
    return model, [{key: value for key, value in record.items() if key != "samples_per_second"} for record in log]


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for a device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


def test_more_micro_batches_read_nothing_more_from_the_device(tmp_path):
    counts = []
    for name, parts in (("one", [[1, 2, 3, 4, 5, 6]]), ("six", [[1], [2], [3], [4], [5], [6]])):
        with HostReads() as reads:
            train(tmp_path / name, parts, [0, len(parts)])
        counts.append(reads.count)
    assert counts[0] == counts[1]


def test_parts_of_a_step_change_nothing(tmp_path):
    (whole, log), (parts, other) = (
        train(tmp_path / name, micro_batches, [0, len(micro_batches)])
        for name, micro_batches in (("one", [[1, 2, 3, 4]]), ("four", [[], [1, 2], [], [3, 4]]))
    )
    assert torch.allclose(whole.weight, parts.weight)
    assert log[0]["loss"] == pytest.approx(other[0]["loss"])


def test_a_micro_batch_is_read_when_the_one_before_has_been_run(tmp_path):
    """However many a step has, no more than two are alive: one in hand, and the next."""
    happened, alive, most = [], [], []

    def noted(model, batch):
        happened.append(f"run {batch.samples[0]}")
        return squares(model, batch)

    def read(rows):
        happened.append(f"read {rows[0]}")
        made = batch_of(rows, ())
        alive.append(weakref.ref(made))
        most.append(sum(ref() is not None for ref in alive))
        return made

    batches = lambda plan, start: (read(rows) for rows in plan[start:])  # noqa: E731
    train(tmp_path, [[1], [2], [3], [4], [5]], [0, 5], loss=noted, batches=batches)
    assert happened == [f"{what} {number}" for number in range(1, 6) for what in ("read", "run")]
    assert max(most) <= 2


def test_the_gradient_is_the_mean_over_what_could_be_read(tmp_path):
    """How many that are is known after the last micro-batch: to the bit where none is missing, to a rounding else."""
    plans = {"three": [[1, 2], [3]], "less": [[1, 2], [5, 3], [6]], "few": [[1, 2, 3]]}
    logs, weights = {}, {}
    for name, parts in plans.items():
        model, log = train(tmp_path / name, parts, [0, len(parts)], broken=(5, 6))
        logs[name], weights[name] = log[0], model.weight.item()
    assert [logs[name]["samples_seen"] for name in plans] == [3, 3, 3]
    for what in ("loss", "grad_norm"):
        assert logs["less"][what] == pytest.approx(logs["three"][what], rel=1e-6)
    assert weights["less"] == pytest.approx(weights["three"], rel=1e-6)
    # As it is where the number is known beforehand.
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    for rows in plans["three"]:
        (squares(model, batch_of(rows, ())) / 3).backward()
    assert logs["three"]["grad_norm"] == pytest.approx(
        float(torch.stack([model.weight.grad, model.bias.grad.unsqueeze(1)]).norm()), rel=1e-7
    )


def test_a_step_without_a_sample_is_skipped_named_and_moves_nothing_but_the_schedule(tmp_path):
    model, log = train(tmp_path / "run", [[1], [2], [3]], [0, 1, 2, 3], broken=(2,), warmup_share=1.0)
    kinds = [(record["step"], record["kind"]) for record in log]
    assert kinds == [(1, "train"), (2, "skipped"), (3, "train"), (3, "validation")]
    assert [record["samples_seen"] for record in log if record["kind"] == "train"] == [1, 2]
    (lost,) = [line.record["id"] for line in read_jsonl(tmp_path / "run" / "quarantine.jsonl")]
    assert lost == "train/2"
    again, _ = train(tmp_path / "without", [[1], [3]], [0, 1, 2], warmup_share=1.0)
    rates = [record["learning_rate"] for record in log if record["kind"] == "train"]
    assert rates == pytest.approx([1e-4 / 3, 1e-4]) and not torch.equal(model.weight, again.weight)


def test_a_run_without_any_readable_sample_ends_and_says_so(tmp_path):
    _, log = train(tmp_path / "run", [[1], [2]], [0, 1, 2], broken=(1, 2))
    assert [record["kind"] for record in log] == ["skipped", "skipped", "validation"]


def test_one_process_trains_in_one_precision_and_then_in_another():
    """As a notebook does."""
    order = ["float32", "bfloat16", "float32"]
    assert [start_accelerator(dtype).mixed_precision for dtype in order] == ["no", "bf16", "no"]


def test_a_device_without_room_says_what_it_held_and_what_to_change(tmp_path):
    def loss(model, batch):
        return model(batch.x_B).sum() + torch.empty(1 << 56).sum()  # no machine has that

    with pytest.raises(MachineError, match="no room for a micro-batch of 6 samples") as told:
        train(tmp_path, [[1, 2, 3, 4, 5, 6]], [0, 1], loss=loss)
    assert "samples 1, 2" in told.value.where and "train.device_batch_size=3" in told.value.fix
    assert "train.activation_checkpointing=true" in told.value.fix and "hba fit" in told.value.fix


def test_a_device_without_room_names_the_budget_of_tokens(tmp_path):
    """The micro-batch that did not fit, not another of its step; half of what it held."""

    @dataclass(frozen=True)
    class Worded(Numbers):
        @property
        def num_tokens(self):
            return torch.full((len(self),), 100)

    def loss(model, batch):
        return model(batch.x_B).sum() + (torch.empty(1 << 56).sum() if len(batch) == 4 else 0)

    def told(name, parts, **config):
        made = lambda plan, start: (Worded(*vars(batch_of(rows, ())).values()) for rows in plan[start:])  # noqa: E731
        with pytest.raises(MachineError, match="of 4 samples of up to 100 tokens") as said:
            train(tmp_path / name, parts, [0, len(parts)], loss=loss, batches=made, **config)
        return said.value

    parts = [[1, 2, 3, 4, 5], [6, 7, 8, 9], [10]]
    for name, config, key in (
        ("tokens", {"device_tokens": 450}, "train.device_tokens=200"),
        ("neither", {}, "train.device_tokens=200"),
        ("samples", {"device_batch_size": 5}, "train.device_batch_size=2"),
    ):
        error = told(name, parts, **config)
        assert key in error.fix and error.where.endswith("samples 6, 7, 8, 9")


def test_another_fault_of_a_loss_stays_what_it_is(tmp_path):
    def loss(model, batch):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        train(tmp_path, [[1, 2]], [0, 1], loss=loss)


def test_the_rate_rises_and_then_goes_as_its_schedule_says():
    def rates(**config):
        return [learning_rate_at(step, 10, TrainConfig(final_share=0.2, **config)) for step in range(10)]

    assert rates(schedule="constant", warmup_steps=4) == pytest.approx([0.25, 0.5, 0.75, *[1.0] * 7])
    linear = rates(schedule="linear", warmup_steps=2)
    assert linear[:3] == [0.5, 1.0, 1.0] and np.diff(linear[2:]) == pytest.approx([-0.1] * 7)
    cosine = rates(schedule="cosine", warmup_steps=2)
    assert cosine[:3] == linear[:3] and cosine[6] == pytest.approx(linear[6]) and cosine[4] > linear[4]
    assert rates(warmup_steps=0)[0] == 1.0 and rates(warmup_share=0.4) == rates(warmup_steps=4)


def test_groups_train_at_rates_of_their_own():
    names = ("heads", "lora_A", "bam", "lm_head")
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in names})

    def peaks(rates=(), **config):
        optimizer = build_optimizer(model, TrainConfig(learning_rate=1e-4, **config), dict(rates))
        names = {id(parameter): name.partition(".")[0] for name, parameter in model.named_parameters()}
        return {names[id(p)]: group["peak"] for group in optimizer.param_groups for p in group["params"]}

    assert set(peaks().values()) == {1e-4}
    own = peaks({"bam": 5e-3}, head_learning_rate=1e-3, lora_learning_rate=2e-4, lm_head_learning_rate=3e-5)
    assert own == {"heads": 1e-3, "lora_A": 2e-4, "bam": 5e-3, "lm_head": 3e-5}
    for key, what in (
        ("head_learning_rate", "classification head"),
        ("lora_learning_rate", "LoRA layer"),
        ("lm_head_learning_rate", "language head of its own"),
    ):
        with pytest.raises(ConfigError, match=f"no {what} trains here") as told:
            build_optimizer(nn.Linear(1, 1), TrainConfig(**{key: 1e-3}), {})
        assert told.value.where == f"train.{key}"


@pytest.mark.parametrize("asked", ["train.compile=true", "train.kernels=liger"])
def test_kernels_of_layers_are_refused_where_heads_alone_train(asked):
    given = ["atlas=x", "model.name=x", asked]
    assert load_config(SftConfig, None, given)
    with pytest.raises(ConfigError, match="no layer of a language model trains here"):
        load_config(SftConfig, None, [*given, "model.strategy=heads"])


@pytest.mark.parametrize(
    ("kind", "given", "trains"),
    [
        (SftConfig, ["model.strategy=lora"], {"head", "lora"}),
        (SftConfig, ["model.strategy=full"], {"head"}),
        (SftConfig, ["model.strategy=full", "answer_weight=1"], {"head", "lm_head"}),
        (LmConfig, ["model.strategy=lora"], {"lora"}),
        (LmConfig, ["model.strategy=full"], {"lm_head"}),
        (RlConfig, ["model.strategy=lora"], {"lora"}),
        (RlConfig, ["model.strategy=full"], set()),
        (RlConfig, ["model.strategy=full", "freeze_towers=false"], {"lm_head"}),
        (QaConfig, ["base=b"], set()),
        (BamConfig, ["base=b", "stage=adapters"], set()),
        (BamConfig, ["base=b", "stage=adapters+heads"], {"head"}),
        (BamConfig, ["base=b", "stage=full"], {"head", "lora", "lm_head"}),
    ],
)
def test_a_rate_of_what_does_not_train_is_refused_by_the_config(kind, given, trains):
    for what in ("head", "lora", "lm_head"):
        asked = ["atlas=a", *given, f"train.{what}_learning_rate=1e-3"]
        if what in trains:
            load_config(kind, None, asked)
            continue
        with pytest.raises(ConfigError, match="trains here") as told:
            load_config(kind, None, asked)
        assert told.value.where == f"train.{what}_learning_rate"


def test_lora_on_no_layer_is_refused_by_the_config():
    with pytest.raises(ConfigError, match=r"model\.lora_targets: no layer would have LoRA"):
        load_config(SftConfig, None, ["atlas=a", "model.lora_targets=[]"])


@pytest.mark.parametrize(("patience", "ends"), [(1, 6), (2, 8), (None, 14)])
def test_a_run_ends_when_validations_are_no_better_also_when_it_is_killed_there(tmp_path, patience, ends):
    """Validated every second step: best at 4, which 8 equals and does not better."""
    scores = {2: 0.1, 4: 0.5, 6: 0.3, 8: 0.5, 10: 0.4, 12: 0.9, 14: 0.2}
    validated = []

    def validate():
        validated.append(2 * (len(validated) + 1))
        return Validation(scores[validated[-1]], {"mean": scores[validated[-1]]})

    parts = [[number] for number in range(14)]
    how = {"validate_every": 2, "early_stopping": patience, "validate": validate}
    _, log = train(tmp_path, parts, list(range(15)), **how)
    assert validated[-1] == ends == log[-1]["step"]
    stops = [(line["step"], line["why"]) for line in log if line["kind"] == "stopped"]
    assert [step for step, _ in stops] == ([] if patience is None else [ends])
    assert all("step 4" in why for _, why in stops)
    # Killed before it could end: nothing is trained, validated or said again.
    _, again = train(tmp_path, parts, list(range(15)), **how)
    assert again == log and validated[-1] == ends
