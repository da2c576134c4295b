"""Paired comparison: against formulas, scipy and naive resampling, and what it refuses."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, permutation_test

from hba.errors import InputError
from hba.evaluate.compare import paired_difference
from hba.evaluate.metrics import Rows, encode, score, score_rows
from hba.evaluate.statistics import bootstrap, holm, mcnemar
from hba.taxonomy import BUILTIN, DATASETS

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
    assert (alone.test, together.test) == ("mcnemar", "permutation")
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


# --- few rows --------------------------------------------------------------------------------------------------------


def labelled(guesses: list[str | None], targets: list[str], key: str = "mmsd") -> Rows:
    return encode(guesses, targets, [key] * len(targets))


def test_one_right_row_against_one_wrong_row_says_nothing() -> None:
    right, wrong = labelled(["sarcasm"], ["sarcasm"]), labelled(["not sarcasm"], ["sarcasm"])
    found = paired_difference(wrong, right).tasks["SAR"]
    assert (found.difference, found.p_value, found.ci95, found.test) == (1.0, 1.0, None, "permutation")
    five = paired_difference(labelled(["not sarcasm"] * 5, ["sarcasm"] * 5), labelled(["sarcasm"] * 5, ["sarcasm"] * 5))
    assert five.tasks["SAR"].p_value == pytest.approx(2 / 2**5)
    assert five.mean and five.mean.p_value == pytest.approx(2 / 2**5)


@pytest.mark.parametrize("key", ["mmsd", "tess", "mosei_senti"])
def test_the_permutation_test_is_that_of_scipy(key: str) -> None:
    """All exchanges of the two answers of ten rows, under the task's own metric."""
    guesses, targets, keys = make(10, 0.5, [key], seed=2)
    others = make(10, 0.7, [key], seed=3)[0]
    task = DATASETS[key].task

    def difference(a: np.ndarray, b: np.ndarray) -> float:
        first, second = (score(list(run), targets, keys)["tasks"][task]["score"] for run in (a, b))
        return second - first

    told = [np.array([x if x else "nothing" for x in run], dtype=object) for run in (guesses, others)]
    theirs = permutation_test(told, difference, permutation_type="samples", n_resamples=np.inf, vectorized=False)
    found = paired_difference(encode(guesses, targets, keys), encode(others, targets, keys)).tasks[str(task)]
    assert found.test == "permutation"
    nulls = np.abs(theirs.null_distribution) >= abs(difference(*told)) - 1e-9
    assert found.p_value == pytest.approx(nulls.mean())


def test_few_groups_are_exchanged_whole() -> None:
    """Six speakers of twenty rows who all flip together: 2 of 64 exchanges are as extreme, not 2 of 2^120."""
    targets = ["sarcasm", "not sarcasm"] * 60
    wrong = ["not sarcasm", "sarcasm"] * 60
    groups = [str(i // 20) for i in range(120)]
    found = paired_difference(labelled(wrong, targets), labelled(targets, targets), clusters=groups).tasks["SAR"]
    assert (found.test, found.n, found.n_independent) == ("permutation", 120, 6)
    assert found.p_value == pytest.approx(2 / 64)


def test_blind_runs_of_few_rows_differ_no_more_often_than_the_level_says() -> None:
    """The bootstrap's p-value is below 0.05 in about 10 % of such comparisons."""
    labels, found = DATASETS["tess"].labels, 0
    for seed in range(200):
        rng = random.Random(seed)
        targets = [rng.choice(labels) for _ in range(10)]
        runs = [[t if rng.random() < 0.6 else rng.choice(labels) for t in targets] for _ in range(2)]
        line = paired_difference(*(labelled(run, targets, "tess") for run in runs), resamples=200, seed=seed).tasks[
            "EMO"
        ]
        found += line.p_value is not None and line.p_value < 0.05
    assert found <= 18


def test_a_large_dataset_beside_a_small_one_is_drawn() -> None:
    """The mean over a task of five rows and one of 400 has too many exchanges to list."""
    targets = ["sarcasm", "not sarcasm"] * 200
    guesses, others = (make(400, skill, ["mmsd"], seed=1)[0] for skill in (0.5, 0.8))
    small = ["depression", "no depression"] * 2 + ["depression"]
    keys = ["mmsd"] * 400 + ["daicwoz"] * 5
    a, b = (encode([*run, *small], [*targets, *small], keys) for run in (guesses, others))
    result = paired_difference(a, b)
    assert (result.tasks["SAR"].test, result.tasks["DEP"].test) == ("bootstrap", "permutation")
    assert result.mean and result.mean.test == "permutation" and result.mean.p_value is not None
    assert result.tasks["DEP"].p_value == 1.0
    back = paired_difference(b, a)
    assert back.mean and back.mean.p_value == result.mean.p_value


def test_multilabel_answers_of_two_runs_are_exchanged_in_one_numbering() -> None:
    zero_shot = BUILTIN.extended({"extends": "zero_shot"})
    labels = zero_shot.dataset("av_asd").labels
    targets = [labels[i % 3] for i in range(6)]
    a = encode([labels[3]] * 6, targets, ["av_asd"] * 6, zero_shot)
    b = encode(targets, targets, ["av_asd"] * 6, zero_shot)
    line = paired_difference(a, b).tasks["AVASD"]
    assert (line.a, line.b, line.p_value) == (0.0, 1.0, pytest.approx(2 / 64))
