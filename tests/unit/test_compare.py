"""Paired comparison: against formulas, scipy and naive resampling, and what it refuses."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from hba.errors import InputError
from hba.evaluate.compare import holm, mcnemar, paired_difference
from hba.evaluate.confusion import Rows, encode
from hba.evaluate.metrics import score, score_rows
from hba.evaluate.stats import bootstrap
from hba.taxonomy import DATASETS

steady = settings(deadline=None, derandomize=True)


def make(count: int, skill: float, datasets: list[str], seed: int = 0) -> tuple[list, list, list]:
    rng = random.Random(seed)
    keys = [rng.choice(datasets) for _ in range(count)]
    targets = [rng.choice(DATASETS[key].labels) for key in keys]
    pairs = zip(keys, targets, strict=True)
    guesses = [t if rng.random() < skill else rng.choice([*DATASETS[k].labels, None]) for k, t in pairs]
    return guesses, targets, keys


def free(right: list[bool]) -> Rows:
    return encode(["late" if hit else "early" for hit in right], ["late"] * len(right), ["siq2"] * len(right))


def test_paired_difference_sees_what_two_intervals_cannot() -> None:
    guesses, targets, keys = make(600, 0.6, ["mmsd"])
    better = [t if i % 20 == 0 else g for i, (g, t) in enumerate(zip(guesses, targets, strict=True))]
    a, b = encode(guesses, targets, keys), encode(better, targets, keys)
    result = paired_difference(a, b)
    found = result.tasks["SAR"]
    gained = score_rows(b)["tasks"]["SAR"]["score"] - score_rows(a)["tasks"]["SAR"]["score"]
    low, high = found.ci95 or (0, 0)
    assert found.difference == pytest.approx(gained)
    assert 0 < low < gained < high
    assert found.p_value is not None and found.p_value < 0.01
    assert (found.test, found.lost, found.n) == ("bootstrap", 0, 600)
    assert found.gained == sum(x != y for x, y in zip(guesses, better, strict=True))
    assert result.mean and result.mean.difference == pytest.approx(gained)
    separate = [bootstrap(run).tasks["SAR"] for run in (a, b)]
    assert separate[0] and separate[1] and separate[0][1] > separate[1][0]  # overlapping
    turned = paired_difference(b, a).tasks["SAR"]
    assert (turned.difference, turned.gained) == (pytest.approx(-gained), 0)


def turned(interval: tuple[float, float]) -> tuple[float, float]:
    return pytest.approx(-interval[1]), pytest.approx(-interval[0])


@pytest.mark.parametrize("seed", range(3))
def test_swapping_the_runs_turns_the_signs_and_nothing_else(seed: int) -> None:
    guesses, targets, keys = make(150, 0.5, ["cremad", "tess", "mmsd"], seed)
    better = [t if i % 9 == seed else g for i, (g, t) in enumerate(zip(guesses, targets, strict=True))]
    a, b = encode(guesses, targets, keys), encode(better, targets, keys)
    groups = [str(i // 3) for i in range(150)]
    for clusters in (None, groups):
        there, back = (paired_difference(x, y, clusters=clusters) for x, y in ((a, b), (b, a)))
        for key, one in [*there.tasks.items(), *there.datasets.items()]:
            other = back.tasks.get(key) or back.datasets[key]
            assert one.ci95 and other.ci95 and other.difference == pytest.approx(-(one.difference or 0))
            assert other.ci95 == turned(one.ci95) and other.p_value == one.p_value and other.p_holm == one.p_holm
        assert there.mean and back.mean and there.mean.ci95 and back.mean.ci95 == turned(there.mean.ci95)


def test_a_run_does_not_differ_from_itself() -> None:
    data = encode(*make(500, 0.6, ["cremad", "tess", "mmsd", "daicwoz"]))
    result = paired_difference(data, data, clusters=[str(i // 5) for i in range(500)])
    for found in (*result.tasks.values(), *result.datasets.values()):
        assert (found.difference, found.ci95, found.p_value) == (0.0, (0.0, 0.0), 1.0)


def test_agrees_with_resampling_pairs_of_rows_by_hand() -> None:
    guesses, targets, keys = make(150, 0.5, ["mosei_senti"])
    others = make(150, 0.7, ["mosei_senti"], seed=1)[0]
    rng, naive = np.random.default_rng(5), []
    for _ in range(500):
        picked = rng.integers(150, size=150)
        runs = [[run[i] for i in picked] for run in (guesses, others)]
        truth = [targets[i] for i in picked], [keys[i] for i in picked]
        first, second = (score(run, *truth)["tasks"]["SEN"]["score"] for run in runs)
        naive.append(second - first)
    found = paired_difference(encode(guesses, targets, keys), encode(others, targets, keys)).tasks["SEN"]
    assert found.ci95 == pytest.approx(tuple(np.quantile(naive, [0.025, 0.975])), abs=0.03)


def test_free_form_rows_are_compared_by_exact_match_with_mcnemar_and_stay_out_of_the_mean() -> None:
    result = paired_difference(free([True] * 10 + [False] * 20), free([False] * 2 + [True] * 20 + [False] * 8))
    found = result.tasks["SOC"]
    assert (found.metric, found.test, found.gained, found.lost) == ("exact_match", "mcnemar", 12, 2)
    assert found.difference == pytest.approx(10 / 30)
    assert found.p_value == pytest.approx(binomtest(2, 14).pvalue)
    assert result.mean is None


def test_a_judged_task_enters_the_mean_under_its_own_metric() -> None:
    a, b = (replace(run, judged=frozenset({"siq2"})) for run in (free([True, False] * 20), free([True] * 40)))
    result = paired_difference(a, b)
    assert result.tasks["SOC"].metric == "llm_judge_accuracy"
    assert result.mean and result.mean.difference == pytest.approx(0.5)
    with pytest.raises(InputError, match="same rows"):
        paired_difference(a, free([True] * 40))


def test_rows_that_share_a_group_are_no_independent_evidence() -> None:
    """Ten questions about one video that all flip together are one observation, and McNemar would count ten."""
    a, b = free([False] * 60 + [True] * 40), free([True] * 60 + [False] * 40)
    groups = [str(i // 10) for i in range(100)]
    alone, together = paired_difference(a, b).tasks["SOC"], paired_difference(a, b, clusters=groups).tasks["SOC"]
    assert (alone.test, together.test) == ("mcnemar", "bootstrap")
    assert alone.p_value is not None and together.p_value is not None and together.p_value > 5 * alone.p_value
    assert alone.ci95 and together.ci95 and together.ci95[1] - together.ci95[0] > alone.ci95[1] - alone.ci95[0]


def test_only_the_same_rows_can_be_paired() -> None:
    guesses, targets, keys = make(50, 0.6, ["cremad", "mmsd"])
    a = encode(guesses, targets, keys)
    for other in (encode(guesses[1:], targets[1:], keys[1:]), encode(guesses[::-1], targets[::-1], keys[::-1])):
        with pytest.raises(InputError, match="same rows in the same order"):
            paired_difference(a, other)


@steady
@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_is_the_exact_sign_test(gained: int, lost: int) -> None:
    expected = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar(gained, lost) == pytest.approx(expected, abs=1e-9)


def test_holm_of_a_known_case() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


def test_blind_runs_differ_about_as_often_as_the_level_says() -> None:
    """Two runs of the same skill over six tasks: Holm keeps the share of comparisons with any finding near 5 %."""
    datasets, found = ["mmsd", "urfunny", "mmpsy_anxiety", "daicwoz", "ptsd_in_the_wild", "tess"], 0
    for seed in range(60):
        _, targets, keys = make(240, 0.5, datasets, seed)
        rng = random.Random(seed)
        runs = [[t if rng.random() < 0.6 else None for t in targets] for _ in range(2)]
        a, b = (encode(run, targets, keys) for run in runs)
        result = paired_difference(a, b, resamples=1000, seed=seed)
        found += any(line.p_holm is not None and line.p_holm < 0.05 for line in result.tasks.values())
    assert found <= 9
