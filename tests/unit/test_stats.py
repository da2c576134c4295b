"""Intervals, paired differences and chance levels: against formulas, against naive resampling, and for a
seed."""

from __future__ import annotations

import math
import random
import time
from functools import partial

import numpy as np
import pytest
from scipy import stats as scipy_stats

from hba.errors import InputError
from hba.evaluate.metrics import Rows, encode, score, score_rows
from hba.evaluate.statistics import (
    Null,
    bootstrap,
    chance,
    effective_units,
    interval,
    mean_interval,
    permutation,
    resample,
    satterthwaite,
    student_interval,
    student_p,
    student_reach,
)
from hba.taxonomy import BUILTIN, DATASETS

CLASSIFIED = sorted(key for key, dataset in DATASETS.items() if dataset.domain)


def make(count: int, skill: float, seed: int = 0, datasets: list[str] = CLASSIFIED) -> tuple[list, list, list]:
    """Predictions that are right with probability `skill`, otherwise a random label of the dataset or
    None."""
    truth_rng, guess_rng = random.Random(seed), random.Random(f"{seed}{skill}")
    keys = [truth_rng.choice(datasets) for _ in range(count)]
    targets = [truth_rng.choice(DATASETS[key].labels) for key in keys]
    guesses = [
        target if guess_rng.random() < skill else guess_rng.choice([*DATASETS[key].labels, None])
        for key, target in zip(keys, targets, strict=True)
    ]
    return guesses, targets, keys


def rows(count: int, skill: float, **options: object) -> Rows:
    return encode(*make(count, skill, **options))  # type: ignore[arg-type]


def half_right(count: int) -> Rows:
    """PTSD rows of which half are right in either class."""
    targets = ["ptsd", "no ptsd"] * (count // 2)
    guesses = ["ptsd", "no ptsd", "no ptsd", "ptsd"] * (count // 4)
    return encode(guesses, targets, ["ptsd_in_the_wild"] * count)


def width(interval: tuple[float, float] | None) -> float:
    assert interval is not None
    return interval[1] - interval[0]


def test_interval_holds_the_score_and_the_seed_decides_it() -> None:
    data = rows(3000, 0.7)
    intervals = bootstrap(data, seed=1)
    metrics = score_rows(data)
    for key, task in metrics["tasks"].items():
        low, high = intervals.tasks[key] or (1, 0)
        assert low < task["score"] < high
    low, high = intervals.mean or (1, 0)
    assert low < metrics["aggregate"]["mean"]["score"] < high
    assert bootstrap(data, seed=1) == intervals
    assert bootstrap(data, seed=2) != intervals


def test_order_of_rows_does_not_count() -> None:
    guesses, targets, keys = make(500, 0.6)
    groups = [str(i // 3) for i in range(500)]
    order = random.Random(3).sample(range(500), 500)
    turned = encode(*([column[i] for i in order] for column in (guesses, targets, keys)))
    straight = encode(guesses, targets, keys)
    assert bootstrap(turned) == bootstrap(straight)
    assert bootstrap(turned, clusters=[groups[i] for i in order]) == bootstrap(straight, clusters=groups)


def test_one_dataset_does_not_disturb_the_draws_of_another() -> None:
    alone = rows(300, 0.6, datasets=["mmsd"])
    first, second = make(300, 0.6, datasets=["mmsd"]), make(300, 0.6, datasets=["tess"])
    together = encode(*(a + b for a, b in zip(first, second, strict=True)))
    assert bootstrap(together).tasks["SAR"] == bootstrap(alone).tasks["SAR"]


def test_width_is_that_of_the_normal_approximation() -> None:
    """Half right of 1,000: the standard error of a proportion is sqrt(1/4/1000), and F1 of balanced classes
    is one."""
    expected = 2 * 1.96 * np.sqrt(0.25 / 1000)
    assert width(bootstrap(half_right(1000), resamples=4000).tasks["PTSD"]) == pytest.approx(expected, rel=0.07)


def test_agrees_with_resampling_row_by_row() -> None:
    guesses, targets, keys = make(200, 0.6, datasets=["mosei_senti"])
    rng = np.random.default_rng(5)
    naive = []
    for _ in range(600):
        picked = rng.integers(200, size=200)
        sample = ([column[i] for i in picked] for column in (guesses, targets, keys))
        naive.append(score(*sample)["tasks"]["SEN"]["score"])  # type: ignore[arg-type]
    interval = bootstrap(encode(guesses, targets, keys)).tasks["SEN"]
    assert interval == pytest.approx(tuple(np.quantile(naive, [0.025, 0.975])), abs=0.02)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        right = rng.random(300) < 0.7
        targets = ["ptsd", "no ptsd"] * 150
        guesses = [t if r else {"ptsd": "no ptsd", "no ptsd": "ptsd"}[t] for t, r in zip(targets, right, strict=True)]
        low, high = bootstrap(encode(guesses, targets, ["ptsd_in_the_wild"] * 300), resamples=400, seed=seed).mean or (
            1,
            0,
        )
        covered += low <= 0.7 <= high
    assert 0.9 <= covered / 200 <= 0.99


def test_rows_of_one_group_are_drawn_together() -> None:
    """Ten copies of each row carry no more information than one: the interval of 100 groups is that of 100
    rows."""
    single, repeated = half_right(100), half_right(100)
    repeated = Rows(layout=single.layout, cells=np.repeat(single.cells, 10))
    groups = [str(i // 10) for i in range(1000)]
    clustered = width(bootstrap(repeated, clusters=groups, resamples=4000).tasks["PTSD"])
    assert clustered == pytest.approx(width(bootstrap(single, resamples=4000).tasks["PTSD"]), rel=0.08)
    assert clustered > 2.5 * width(bootstrap(repeated, resamples=4000).tasks["PTSD"])


def test_rows_without_a_group_stand_alone() -> None:
    data = rows(400, 0.6)
    alone = bootstrap(data, clusters=[None] * 400)
    assert alone == bootstrap(data) == bootstrap(data, clusters=[str(i) for i in range(400)])


def test_group_keys_must_match_the_rows() -> None:
    with pytest.raises(InputError, match="3 group keys for 400 rows"):
        bootstrap(rows(400, 0.6), clusters=["a"] * 3)
    with pytest.raises(InputError, match="10 resamples"):
        bootstrap(rows(400, 0.6), resamples=10)


def test_what_cannot_be_scored_has_no_interval() -> None:
    neutral = encode(["neutral"] * 3, ["neutral"] * 3, ["meld_senti"] * 3)
    assert bootstrap(neutral).tasks == {"SEN": None}
    assert chance(neutral).tasks == {"SEN": None}
    free = encode(["a"], ["a"], ["siq2"])
    assert bootstrap(free) == ({}, None, {"siq2": None})  # one row says nothing of the spread of rows
    assert chance(free) == ({}, None, {})


def test_chance_of_known_cases() -> None:
    three_to_one = ["sarcasm"] * 75 + ["not sarcasm"] * 25
    majority_f1 = 0.75 * 2 * 0.75 / 1.75
    level = chance(encode(three_to_one, three_to_one, ["mmsd"] * 100))
    assert level.tasks["SAR"] == pytest.approx(max(majority_f1, 0.75**2 + 0.25**2), abs=0.01)
    emotions = ["sad"] * 90 + ["happy"] * 10
    assert chance(encode(emotions, emotions, ["cremad"] * 100)).tasks["EMO"] == pytest.approx(0.5, abs=0.01)
    halves = ["ptsd", "no ptsd"] * 100
    assert chance(encode(halves, halves, ["ptsd_in_the_wild"] * 200)).mean == pytest.approx(0.5, abs=0.01)


def test_chance_depends_on_the_targets_alone() -> None:
    assert chance(rows(500, 0.1)) == chance(rows(500, 0.9))


def test_blind_answers_do_not_beat_chance() -> None:
    _, targets, keys = make(4000, 0.5)
    answers = {key: random.Random(7).sample(targets_of, len(targets_of)) for key in set(keys)
               if (targets_of := [t for t, k in zip(targets, keys, strict=True) if k == key])}  # fmt: skip
    shuffled = [answers[key].pop() for key in keys]
    blind = encode(shuffled, targets, keys)
    for task, level in chance(blind).tasks.items():
        low, _ = bootstrap(blind).tasks[task] or (1, 1)
        assert level is not None and low < level, task


def test_2_000_resamples_of_100_000_rows_cost_less_than_to_draw_1_000_row_by_row() -> None:
    data, drawing = rows(100_000, 0.7), np.random.default_rng(0)
    groups = [str(i // 4) for i in range(100_000)]

    def draw() -> None:
        for _ in range(200):
            drawing.integers(0, len(groups), len(groups))

    works = [draw, partial(bootstrap, data, resamples=2000), partial(bootstrap, data, clusters=groups, resamples=2000)]
    least = [math.inf] * len(works)
    for _ in range(6):  # of which the least disturbed counts; threads that wait beside this one are not its work
        for number, work in enumerate(works):
            start = time.thread_time()
            work()
            least[number] = min(least[number], time.thread_time() - start)
        if least[1] < 5 * least[0] and least[2] < 40 * least[0]:
            break
    else:
        pytest.fail(f"seconds to draw 200 resamples, and of the bootstraps: {least}")


def test_every_task_of_the_taxonomy_gets_an_interval() -> None:
    expected = {key for key, task in BUILTIN.tasks.items() if not task.judged}
    assert set(bootstrap(rows(2000, 0.5)).tasks) == expected == set(chance(rows(2000, 0.5)).tasks)


# --- few rows, few groups --------------------------------------------------------------------------------------------


def right_or_not(right: list[bool]) -> Rows:
    return encode(["late" if hit else "early" for hit in right], ["late"] * len(right), ["siq2"] * len(right))


def uneven(seed: int) -> tuple[Rows, list[str]]:
    """35 speakers worth 8.7: four with 20 to 60 rows, who differ, and 31 with three; 70 % right in the long run."""
    rng = np.random.default_rng(seed)
    sizes = [60, 40, 30, 20] + [3] * 31
    shares = rng.beta(0.7 * 7 / 3, 0.3 * 7 / 3, len(sizes))  # within-speaker correlation 0.3
    right = np.concatenate([rng.random(m) < share for m, share in zip(sizes, shares, strict=True)]).tolist()
    return right_or_not(right), [str(i) for i, m in enumerate(sizes) for _ in range(m)]


def test_uneven_groups_are_worth_fewer() -> None:
    assert effective_units(None, 12) == 12
    assert effective_units(np.repeat(np.arange(6), 5), 30) == pytest.approx(6)
    assert effective_units(np.array([0] * 10 + [1, 2, 3, 4, 5]), 15) == pytest.approx(15**2 / (100 + 5))


def test_intervals_by_few_and_uneven_groups_cover_what_they_promise() -> None:
    """Plain percentiles cover 0.90 here, and rows drawn alone 0.44."""
    covered = 0
    for seed in range(150):
        rows, groups = uneven(seed)
        low, high = bootstrap(rows, clusters=groups, resamples=500, seed=seed).datasets["siq2"] or (1, 0)
        covered += low <= 0.7 <= high
    assert 0.92 <= covered / 150 <= 0.995


def test_the_interval_of_few_rows_is_as_wide_as_that_of_student() -> None:
    """The mean of 12 rows, half of them right: t_{0.975, 11} standard errors, not 1.96 of the smaller ones."""
    low, high = bootstrap(right_or_not([True, False] * 6), resamples=20_000).datasets["siq2"] or (0, 0)
    error = scipy_stats.sem([1, 0] * 6)
    expected = scipy_stats.t.interval(0.95, 11, loc=0.5, scale=error)
    assert (high - low) == pytest.approx(expected[1] - expected[0], abs=0.09)  # in steps of a twelfth
    assert (high - low) > 2 * 1.96 * error
    many = right_or_not([True, False] * 500)
    plain = np.random.default_rng(0).binomial(1000, 0.5, 20_000) / 1000
    assert bootstrap(many, resamples=20_000).datasets["siq2"] == pytest.approx(
        np.quantile(plain, [0.025, 0.975]), abs=2e-3
    )
    assert bootstrap(right_or_not([True])).datasets["siq2"] is None


def test_degrees_of_freedom_and_p_values_are_those_of_scipy() -> None:
    a, b = [0.61, 0.66, 0.63, 0.70], [0.71, 0.69, 0.75]
    welch = scipy_stats.ttest_ind(b, a, equal_var=False)
    variances = [(float(np.var(side, ddof=1)) / len(side), len(side) - 1) for side in (a, b)]
    freedom = satterthwaite(variances)
    assert freedom == pytest.approx(welch.df)
    t = (np.mean(b) - np.mean(a)) / np.sqrt(sum(v for v, _ in variances))
    assert student_p(float(t), freedom) == pytest.approx(welch.pvalue)
    assert student_interval(a) == pytest.approx(scipy_stats.t.interval(0.95, 3, np.mean(a), scipy_stats.sem(a)))


@pytest.mark.parametrize("freedom", [1, 1.3, 2.7, 29.5, 1e4, 1e6])
def test_students_t_is_that_of_scipy_for_any_freedom(freedom: float) -> None:
    assert student_reach(freedom) == pytest.approx(scipy_stats.t.ppf(0.975, freedom), rel=1e-8)
    for t in (0.0, 1e-9, 0.1, 1.0, 1.96, 5.0, 40.0):
        assert student_p(-t, freedom) == pytest.approx(2 * scipy_stats.t.sf(t, freedom), rel=1e-8)


def test_students_t_of_what_is_no_number_ends() -> None:
    assert math.isnan(student_p(math.nan, 3)) and math.isnan(student_p(2.0, math.nan))
    assert all(math.isnan(student_reach(freedom)) for freedom in (math.nan, 0.0))
    assert student_p(math.inf, 3) == student_p(-1e200, 3) == 0.0


def test_the_interval_of_a_mean_is_that_of_scipy_and_takes_little_memory() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=400)
    found = mean_interval(values, resamples=5000)
    theirs = scipy_stats.bootstrap((values,), np.mean, n_resamples=5000, method="percentile", rng=1).confidence_interval
    assert found == pytest.approx((theirs.low, theirs.high), abs=0.03)


def test_a_sum_of_exact_tests_is_exact() -> None:
    """Two datasets of one row each that changed sides: of the four exchanges two are as extreme as both gained."""
    one = Null(np.array([-1.0, 1.0]), np.array([0.5, 0.5]), exact=True)
    rng = np.random.default_rng(0)
    assert permutation(1.0, [(0.5, one), (0.5, one)], 1000, rng) == pytest.approx(0.5)
    drawn = Null(np.array([-1.0, 1.0] * 500), np.full(1000, 1e-3), exact=False)
    assert permutation(1.0, [(0.5, one), (0.5, drawn)], 1000, rng) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("other", [2, 24, 40])
def test_many_columns_do_not_overflow(other: int) -> None:
    """The joint number of 25 runs of 56 cells needs 146 bits; in 64 the first runs were lost, and with them types."""
    first = np.random.default_rng(0).integers(56, size=400)
    columns = [(first, 56), *[(np.full(400, 3), 56)] * other]
    drawn = resample(columns, None, 100, np.random.default_rng(1))
    assert len(drawn) == 1 + other and all((counts.sum(1) == 400).all() for counts in drawn)
    assert ((drawn[0] > 0).any(0) == (np.bincount(first, minlength=56) > 0)).all()
    few = resample(columns[:2], None, 100, np.random.default_rng(1))  # the same draws of the same rows
    assert (drawn[0] == few[0]).all()


def test_the_mean_has_an_interval_over_the_tasks_of_its_score_or_none() -> None:
    both = rows(600, 0.6, datasets=["mmsd", "daicwoz"])
    alone = bootstrap(rows(600, 0.6, datasets=["mmsd", "daicwoz"]), tasks={"SAR"})
    assert list(alone.tasks) == ["SAR"] and alone.mean == alone.tasks["SAR"] == bootstrap(both).tasks["SAR"]
    assert bootstrap(both, tasks={"SAR", "SOC"}).mean is None  # a score without an interval


def test_a_resample_in_which_a_dataset_is_undefined_gives_no_mean() -> None:
    """One row in ten of SEN is not neutral: where none is drawn there is no SEN score, and none of SAR alone."""
    keys = ["meld_senti"] * 10 + ["mmsd"] * 100
    targets = ["neutral"] * 9 + ["positive"] + ["sarcasm", "not sarcasm"] * 50
    low, _ = bootstrap(encode(targets, targets, keys)).mean or (0, 0)
    assert low == 1.0
    wrong = ["negative"] * 10 + targets[10:]
    assert bootstrap(encode(wrong, targets, keys)).mean == (0.5, 0.5)


def test_nothing_is_made_of_nothing() -> None:
    assert interval(np.full(10, np.nan)) is None
    assert student_interval([0.5]) is None
