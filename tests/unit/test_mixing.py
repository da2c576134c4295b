"""Mixing and subsampling: shares as asked, no row left out by chance, a function of (columns, config, seed, epoch)."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hba.atlas.rows import Columns
from hba.batch.sampler import MixConfig, epoch_rows, subsample
from hba.config import load_config, to_dict
from hba.errors import ConfigError, InputError
from hba.train.config import SftConfig, TrainConfig
from hba.train.loop import training_plan

NAMES = ("meld", "cremad", "tess", "mosei")


def columns(datasets, labels=None):
    """Columns of rows with the given dataset codes and labels."""
    n = len(datasets)
    zeros = np.zeros(n, np.int32)
    return Columns(
        datasets=NAMES,
        dataset_codes=np.asarray(datasets, np.int16),
        tasks=("EMO",),
        task_codes=np.zeros(n, np.int16),
        signatures=("text_audio", "text_video"),
        signature_codes=(np.arange(n) % 2).astype(np.int16),
        label_codes=np.asarray(labels if labels is not None else zeros, np.int16),
        problem_chars=zeros,
        answer_chars=zeros,
        num_images=zeros,
        num_videos=zeros,
        num_audios=zeros,
    )


def shares(of, rows):
    return {NAMES[code]: count / len(rows) for code, count in Counter(of.dataset_codes[rows].tolist()).items()}


sizes = st.lists(st.integers(1, 60), min_size=1, max_size=4)
SIZES = [600, 300, 90, 10]
ROWS = columns(np.repeat(range(4), SIZES), np.arange(1000) % 3)


@settings(max_examples=50, deadline=None)
@given(sizes=sizes, seed=st.integers(0, 2**31), epoch=st.integers(0, 5))
def test_every_row_once_by_default(sizes, seed, epoch):
    rows = epoch_rows(columns(np.repeat(range(len(sizes)), sizes)), MixConfig(), seed=seed, epoch=epoch)
    assert sorted(rows) == list(range(sum(sizes)))


@settings(max_examples=50, deadline=None)
@given(sizes=sizes, seed=st.integers(0, 2**31), epoch=st.integers(0, 3), temperature=st.floats(0.05, 1e6))
def test_shares_follow_the_temperature(sizes, seed, epoch, temperature):
    of = columns(np.repeat(range(len(sizes)), sizes))
    rows = epoch_rows(of, MixConfig(temperature=temperature, epoch_size=500), seed=seed, epoch=epoch)
    assert len(rows) == 500
    raw = [(size / max(sizes)) ** (1 / temperature) for size in sizes]
    for code, weight in enumerate(raw):
        expected = 500 * weight / sum(raw)
        assert abs(np.sum(of.dataset_codes[rows] == code) - expected) <= 1 + 1e-6  # far within a binomial's bounds


def test_temperature_of_one_is_the_data_and_a_large_one_is_even():
    assert sorted(epoch_rows(ROWS, MixConfig(epoch_size=1000), seed=0, epoch=4)) == list(range(1000))
    even = shares(ROWS, epoch_rows(ROWS, MixConfig(temperature=1e9), seed=0, epoch=0))
    assert even == pytest.approx(dict.fromkeys(NAMES, 0.25))


@settings(max_examples=50, deadline=None)
@given(weights=st.lists(st.floats(0, 100), min_size=4, max_size=4).filter(any), epoch=st.integers(0, 3))
def test_shares_follow_the_weights_and_zero_leaves_out(weights, epoch):
    config = MixConfig(weights=dict(zip(NAMES, weights, strict=True)))
    rows = epoch_rows(ROWS, config, seed=1, epoch=epoch)
    assert len(rows) == 1000
    counts = Counter(ROWS.dataset_codes[rows].tolist())
    for code, weight in enumerate(weights):
        assert abs(counts[code] - 1000 * weight / sum(weights)) <= 1 + 1e-6
        assert weight > 0 or counts[code] == 0


@pytest.mark.parametrize("config", [MixConfig(temperature=3), MixConfig(class_balanced=True, epoch_size=77)])
def test_rows_come_round_in_full_before_one_repeats(config):
    taken = np.concatenate([epoch_rows(ROWS, config, seed=5, epoch=epoch) for epoch in range(7)])
    often = np.bincount(taken, minlength=1000)
    labels = ROWS.label_codes if config.class_balanced else np.zeros(1000)
    for dataset in range(4):
        for label in range(3):
            cell = often[(ROWS.dataset_codes == dataset) & (labels == label)]
            assert len(cell) == 0 or cell.max() - cell.min() <= 1


def test_classes_of_a_dataset_are_balanced_without_changing_its_share():
    labels = np.where(np.arange(1000) % 10 == 0, 4, np.where(np.arange(1000) % 2, 5, -1))
    of = columns(np.repeat(range(4), SIZES), labels)
    rows = epoch_rows(of, MixConfig(class_balanced=True), seed=0, epoch=0)
    for code, size in enumerate(SIZES):
        counts = Counter(of.label_codes[rows][of.dataset_codes[rows] == code].tolist())
        assert set(counts) == {4, 5, -1} and all(abs(count - size / 3) <= 1 for count in counts.values())


def test_few_rows_can_be_asked_for_often():
    of = columns([0] * 3 + [1] * 5)
    rows = epoch_rows(of, MixConfig(weights={"meld": 999, "cremad": 1}, epoch_size=100_000), seed=0, epoch=2)
    assert np.bincount(rows).tolist() == [33300] * 3 + [20] * 5


def test_an_epoch_is_a_function_of_seed_and_number():
    def rows(seed, epoch):
        return sorted(epoch_rows(ROWS, MixConfig(temperature=4, epoch_size=100), seed=seed, epoch=epoch))

    assert rows(1, 2) == rows(1, 2)
    assert rows(1, 2) != rows(1, 3) and rows(1, 2) != rows(2, 2)


def test_the_plan_of_a_run_repeats_what_the_mix_asks_for():
    mix = MixConfig(weights={"meld": 0, "cremad": 1, "tess": 1, "mosei": 2})
    config = TrainConfig(epochs=2, batch_size=8)
    lengths = np.arange(1000)
    ranks = [training_plan(ROWS, lengths, mix, config, rank=rank, world=2) for rank in (0, 1)]
    again = training_plan(ROWS, lengths, mix, config, rank=1, world=2)
    assert [part.tolist() for part in ranks[1].micro_batches] == [part.tolist() for part in again.micro_batches]
    rows = np.concatenate([batch for plan in ranks for batch in plan.micro_batches])
    assert len(rows) == 2000
    assert shares(ROWS, rows) == pytest.approx({"cremad": 0.25, "tess": 0.25, "mosei": 0.5}, abs=0.001)
    assert all(len(set(ROWS.signature_codes[batch])) == 1 for plan in ranks for batch in plan.micro_batches)


BAD = {
    "unknown dataset": ({"weights": {"meld": 1, "mosey": 1}}, r"no row of dataset 'mosey'.*Did you mean 'mosei'"),
    "a dataset forgotten": ({"weights": {"meld": 1, "cremad": 1}}, r"none for tess, mosei"),
    "negative": ({"weights": {"meld": -1.0}}, r"mix.weights': meld is -1.0"),
    "not finite": ({"weights": {"meld": math.inf}}, r"mix.weights': meld is inf"),
    "all zero": ({"weights": dict.fromkeys(NAMES, 0)}, r"no dataset has a positive weight"),
    "none": ({"weights": {}}, r"no dataset has a positive weight"),
    "both": ({"weights": {"meld": 1}, "temperature": 2}, r"both 'mix.weights' and 'mix.temperature'"),
}


@pytest.mark.parametrize("name", BAD)
def test_weights_that_make_no_mix(name):
    values, message = BAD[name]
    with pytest.raises(ConfigError, match=message):
        epoch_rows(ROWS, MixConfig(**values), seed=0, epoch=0)


@pytest.mark.parametrize("bad", ["temperature=0", "temperature=-1", "epoch_size=0", "subsample=0", "subsample=1.5"])
def test_settings_out_of_range(bad):
    with pytest.raises(ConfigError, match=f"key 'mix.{bad.partition('=')[0]}': expected"):
        load_config(SftConfig, None, ["atlas=x", f"mix.{bad}"])


def test_weights_can_be_given_on_the_command_line():
    config = load_config(SftConfig, None, ["atlas=x", "mix.weights={meld: 2, cremad: 0.5}", "mix.class_balanced=true"])
    assert config.mix.weights == {"meld": 2, "cremad": 0.5}
    assert to_dict(config)["mix"]["weights"] == {"meld": 2.0, "cremad": 0.5}
    assert load_config(SftConfig, None, ["atlas=x", "mix.weights.meld=1"]).mix.weights == {"meld": 1}


# --- subsamples ------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(sizes=sizes, share=st.floats(0.01, 1), seed=st.integers(0, 2**31))
def test_every_stratum_keeps_its_share(sizes, share, seed):
    of = columns(np.repeat(range(len(sizes)), sizes))
    count = max(1, round(share * len(of)))
    rows = subsample(of, count, seed=seed, by=["dataset"])
    assert len(rows) == len(set(rows)) == count and list(rows) == sorted(rows)
    for code, size in enumerate(sizes):
        assert abs(np.sum(of.dataset_codes[rows] == code) - count * size / len(of)) < 2


def test_a_smaller_sample_is_part_of_a_larger_one_and_seeds_differ():
    small, large = (set(subsample(ROWS, share, seed=3)) for share in (0.05, 0.3))
    assert len(small) == 50 and len(large) == 300 and small < large
    assert small != set(subsample(ROWS, 0.05, seed=4))


def test_rare_strata_are_neither_favoured_nor_left_out():
    of = columns([0] * 990 + [1] * 10)
    hits = [np.sum(of.dataset_codes[subsample(of, 50, seed=seed)] == 1) for seed in range(400)]
    assert set(hits) == {0, 1}
    assert np.mean(hits) == pytest.approx(0.5, abs=0.1)


def test_strata_are_combinations():
    rows = subsample(ROWS, 100, seed=0, by=["dataset", "label", "modality"])
    cells = Counter(zip(ROWS.dataset_codes[rows], ROWS.label_codes[rows], ROWS.signature_codes[rows], strict=True))
    assert all(abs(count - 10) <= 1 for (dataset, _, _), count in cells.items() if dataset == 0)


def test_training_on_a_subsample_sees_the_same_rows_every_epoch():
    one, two = (epoch_rows(ROWS, MixConfig(subsample=0.1), seed=0, epoch=epoch) for epoch in (0, 1))
    assert np.array_equal(one, two) and np.array_equal(one, subsample(ROWS, 0.1, seed=0))
    mixed = epoch_rows(ROWS, MixConfig(subsample=0.1, temperature=5), seed=0, epoch=0)
    assert len(mixed) == 100 and set(mixed) <= set(one)


@pytest.mark.parametrize("size", [0, 1001, 0.0, 1.5, -0.1, 0.0001])
def test_a_sample_of_an_impossible_size(size):
    with pytest.raises(InputError, match=r"out of 1,000 rows"):
        subsample(ROWS, size, seed=0)


def test_an_unknown_stratum():
    with pytest.raises(InputError, match=r"unknown stratum 'labels'.*Did you mean 'label'"):
        subsample(ROWS, 10, seed=0, by=["labels"])
