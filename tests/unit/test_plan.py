"""Steps are the same samples whatever the number of processes and however their shares are cut, remainders included."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hba import open_atlas
from hba.atlas.rows import Columns
from hba.batch.sampler import MixConfig, padding_share
from hba.cli.options import recipe_path
from hba.config import load_config
from hba.rl.config import RlConfig
from hba.train.config import BamConfig, LmConfig, QaConfig, SftConfig, TrainConfig
from hba.train.loop import num_steps, training_plan

# Rows of the release's training split by signature: its 74,449 rows in the shares of the whole release.
RELEASE = {"text_video_audio": 64_815, "text_audio": 7_742, "text": 1_892}
RECIPES = {
    "sft": (SftConfig, ["atlas=x"]), "lm": (LmConfig, ["atlas=x"]), "qa": (QaConfig, ["atlas=x", "base=x"]),
    "bam": (BamConfig, ["atlas=x", "base=x"]), "rl": (RlConfig, ["atlas=x"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def rows(mini_atlas):
    atlas = open_atlas(mini_atlas, split="train")
    return atlas.columns, atlas.estimated_tokens


def columns_of(sizes):
    """Columns of so many rows of each signature, as far as a plan reads them."""
    codes = np.repeat(np.arange(len(sizes)), list(sizes.values())).astype(np.int16)
    zeros = np.zeros(len(codes), np.int32)
    counts = dict.fromkeys(("problem_chars", "answer_chars", "num_images", "num_videos", "num_audios"), zeros)
    few = zeros.astype(np.int16)
    return Columns(
        datasets=("x",), dataset_codes=few, tasks=("",), task_codes=few, label_codes=few,
        signatures=tuple(sizes), signature_codes=codes, **counts,
    )  # fmt: skip


def steps(plan):
    cut = pairwise(plan.starts)
    return [Counter(np.concatenate(plan.micro_batches[start:end]).tolist()) for start, end in cut]


def plans_of(columns, lengths, config, world):
    return [training_plan(columns, lengths, MixConfig(), config, rank=rank, world=world) for rank in range(world)]


@settings(max_examples=60, deadline=None)
@given(
    world=st.integers(1, 9),
    batch_size=st.integers(1, 12),
    accumulation=st.integers(1, 5),
    limit=st.none() | st.integers(1, 5),
    budget=st.none() | st.integers(1, 6000),
)
def test_steps_do_not_depend_on_processes_or_parts(rows, world, batch_size, accumulation, limit, budget):
    columns, lengths = rows
    sizes = {"device_batch_size": limit, "device_tokens": budget}
    config = TrainConfig(epochs=2, batch_size=batch_size, accumulation=accumulation, **sizes)
    whole = TrainConfig(epochs=2, batch_size=batch_size, accumulation=accumulation)
    expected = steps(training_plan(columns, lengths, MixConfig(), whole, rank=0, world=1))
    plans = plans_of(columns, lengths, config, world)
    assert len({tuple(plan.starts) for plan in plans}) == 1
    assert [sum(parts, Counter()) for parts in zip(*map(steps, plans), strict=True)] == expected
    for together in zip(*(plan.micro_batches for plan in plans), strict=True):
        sizes = sorted(map(len, together))
        if budget is None:
            assert sizes[-1] and sizes[-1] - sizes[0] <= 1, "what is left over is spread evenly"
        else:
            assert sizes[-1], "nobody waits for a place without samples"
            assert all(len(part) < 2 or len(part) * lengths[part].max() <= budget for part in together)
        assert len(set(columns.signature_codes[np.concatenate(together)])) == 1
        if limit is not None:
            assert sizes[-1] <= limit


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_recipe_is_refused_on_any_number_of_processes(recipe):
    """The release's rows, one epoch: the first and the last rank of 1 to 64 take as many steps as one process."""
    kind, given = RECIPES[recipe]
    config = load_config(kind, recipe_path(recipe), [*given, "train.epochs=1"]).train
    columns = columns_of(RELEASE)
    lengths = np.random.default_rng(0).integers(100, 2000, len(columns))
    alone = training_plan(columns, lengths, MixConfig(), config, rank=0, world=1)
    for world in (*range(2, 9), 16, 33, 64):
        for rank in {0, world - 1}:
            plan = training_plan(columns, lengths, MixConfig(), config, rank=rank, world=world)
            assert num_steps(plan, config) == num_steps(alone, config)
            assert abs(sum(map(len, plan.micro_batches)) - len(columns) / world) < 0.02 * len(columns) / world + 64


@pytest.mark.parametrize("sizes", [{"text": 1}, {"text": 7, "text_audio": 1}, {"text": 63, "text_audio": 65}])
def test_fewer_rows_than_processes_are_a_plan_too(sizes):
    columns = columns_of(sizes)
    plans = plans_of(columns, np.ones(len(columns), int), TrainConfig(epochs=1, device_batch_size=1), 64)
    seen = Counter(int(row) for plan in plans for part in plan.micro_batches for row in part)
    assert seen == Counter(range(len(columns)))


def test_shares_are_padded_little():
    """Long and short samples of a batch go to different ranks, neighbours to the same; none gets all the long ones."""
    columns = columns_of({"text_audio": 4096})
    lengths = (100 * np.random.default_rng(0).lognormal(1, 1, 4096)).astype(int)
    config = TrainConfig(epochs=1, batch_size=64, device_batch_size=8)
    plans = plans_of(columns, lengths, config, 8)
    shares = [part for plan in plans for part in plan.micro_batches]
    whole = training_plan(columns, lengths, MixConfig(), config, rank=0, world=1).micro_batches
    strided = [batch[rank::8] for batch in np.split(np.concatenate(whole), 64) for rank in range(8)]
    assert padding_share(shares, lengths) < padding_share(strided, lengths) / 3
    tokens = [sum(int(lengths[part].sum()) for part in plan.micro_batches) for plan in plans]
    assert max(tokens) < 1.25 * min(tokens)


@pytest.mark.parametrize("world", [1, 8])
def test_a_budget_of_tokens_makes_pieces_of_one_size(world):
    """Few long samples or many short ones at once: less padding, fewer passes, and no rank waits for another's."""
    columns = columns_of({"text_audio": 4096})
    lengths = (100 * np.random.default_rng(0).lognormal(1, 1, 4096)).astype(int)
    most = {}
    for name, sizes in (("samples", {"device_batch_size": 8}), ("tokens", {"device_tokens": 4000})):
        config = TrainConfig(epochs=1, batch_size=64, **sizes)
        plans = plans_of(columns, lengths, config, world)
        assert len({tuple(plan.starts) for plan in plans}) == 1
        parts = [part for plan in plans for part in plan.micro_batches if len(part)]
        assert Counter(np.concatenate(parts).tolist()) == Counter(range(4096))
        costs = [len(part) * int(lengths[part].max()) for part in parts]
        most[name] = max(cost for cost, part in zip(costs, parts, strict=True) if len(part) > 1)
        # What a step takes where the ranks of a place wait for the slowest.
        together = zip(*(plan.micro_batches for plan in plans), strict=True)
        waits = [max(len(part) * int(lengths[part].max(initial=0)) for part in parts) for parts in together]
        most[f"{name} in all"] = sum(waits) * world / lengths.sum()
    assert most["tokens"] <= 4000 < most["samples"] / 3
    assert most["tokens in all"] < most["samples in all"]


def test_what_a_budget_counts_may_be_another_length_than_the_order():
    """The longest of a piece by `tokens_N` need not be its last; a sample beyond the budget is alone."""
    columns, order = columns_of({"text": 12}), np.arange(12)
    tokens = np.array([9, 1, 1, 1, 50, 1, 1, 1, 1, 2, 2, 9])
    config = TrainConfig(epochs=1, batch_size=12, device_tokens=18)
    plan = training_plan(columns, order, MixConfig(), config, tokens_N=tokens, rank=0, world=1)
    assert [tokens[part].tolist() for part in plan.micro_batches] == [[9, 1], [1, 1], [50], [1, 1, 1, 1, 2, 2], [9]]
