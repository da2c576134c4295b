"""Intervals, paired differences and chance levels: against formulas, against naive resampling, and for a
seed."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest

from hba.errors import InputError
from hba.evaluate.confusion import Rows, encode
from hba.evaluate.metrics import score, score_rows
from hba.evaluate.stats import bootstrap, chance
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
    assert bootstrap(free) == ({}, None, {"siq2": (1.0, 1.0)})
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


def test_2_000_resamples_of_100_000_rows_take_seconds() -> None:
    data = rows(100_000, 0.7)
    groups = [str(i // 4) for i in range(100_000)]
    start = time.process_time()
    bootstrap(data, resamples=2000)
    single = time.process_time() - start
    bootstrap(data, clusters=groups, resamples=2000)
    assert single < 2
    assert time.process_time() - start < 10


def test_every_task_of_the_taxonomy_gets_an_interval() -> None:
    expected = {key for key, task in BUILTIN.tasks.items() if not task.judged}
    assert set(bootstrap(rows(2000, 0.5)).tasks) == expected == set(chance(rows(2000, 0.5)).tasks)
