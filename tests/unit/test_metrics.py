"""Metrics through the public functions: values by hand, agreement with scikit-learn, invariances,
refusals."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, balanced_accuracy_score, precision_recall_fscore_support

from hba.errors import InputError, TaxonomyError
from hba.evaluate.metrics import primary, score
from hba.taxonomy import BUILTIN, DATASETS, DOMAINS

CLASSIFIED = sorted(key for key, dataset in DATASETS.items() if dataset.domain)
steady = settings(deadline=None, derandomize=True)


def labels_of(dataset: str) -> tuple[str, ...]:
    return DOMAINS[str(DATASETS[dataset].domain)].labels


@st.composite
def rows(draw: st.DrawFn, invalid: bool = True) -> list[tuple[str | None, str, str]]:
    """(prediction, target, dataset) triples over a few datasets."""
    datasets = draw(st.lists(st.sampled_from(CLASSIFIED), min_size=1, max_size=3, unique=True))
    found = []
    for _ in range(draw(st.integers(1, 40))):
        dataset = draw(st.sampled_from(datasets))
        label = st.sampled_from(labels_of(dataset))
        found.append((draw(st.none() | label if invalid else label), draw(label), dataset))
    return found


def scored(triples: list[tuple[str | None, str, str]], **options: Any) -> dict[str, Any]:
    return score(*(list(column) for column in zip(*triples, strict=True)), **options)


def all_values(metrics: dict[str, Any]) -> list[float]:
    entries = [*metrics["datasets"].values(), metrics["aggregate"], *metrics["tasks"].values()]
    numbers = [v for entry in entries for name, v in entry.items() if name not in ("n", "n_invalid")]
    return [v for v in numbers if isinstance(v, float)]


@steady
@given(rows(), st.booleans())
def test_every_figure_lies_between_0_and_1(triples: list[Any], published: bool) -> None:
    values = all_values(scored(triples, published=published))
    assert values
    assert all(0 <= value <= 1 for value in values)


@steady
@given(rows(invalid=False))
def test_perfect_predictions_score_1(triples: list[Any]) -> None:
    perfect = [(target, target, dataset) for _, target, dataset in triples]
    metrics = scored(perfect)
    assert all_values(metrics) == pytest.approx([1.0] * len(all_values(metrics)))
    neutral_only = {t for _, t, d in perfect if DATASETS[d].domain == "sentiment_intensity"} == {"neutral"}
    assert neutral_only == ("SEN" in metrics["tasks"] and metrics["tasks"]["SEN"]["score"] is None)


@steady
@given(rows(), st.randoms(use_true_random=False))
def test_order_of_rows_does_not_count(triples: list[Any], shuffler: random.Random) -> None:
    shuffled = list(triples)
    shuffler.shuffle(shuffled)
    assert scored(shuffled) == scored(triples)


@steady
@given(rows())
def test_agrees_with_scikit_learn_within_the_classes_of_the_ground_truth(triples: list[Any]) -> None:
    dataset = triples[0][2]
    targets = [t for _, t, d in triples if d == dataset]
    guesses = [p if p in targets else targets[0] for p, _, d in triples if d == dataset]
    entry = score(guesses, targets, [dataset] * len(targets))["datasets"][dataset]
    for average in ("macro", "weighted", "micro"):
        precision, recall, f1, _ = precision_recall_fscore_support(targets, guesses, average=average, zero_division=0)
        assert [entry[f"{average}_{name}"] for name in ("precision", "recall", "f1")] == pytest.approx(
            [precision, recall, f1], abs=1e-12
        )


@steady
@given(rows())
def test_micro_figures_are_the_accuracy_whatever_is_predicted(triples: list[Any]) -> None:
    """scikit-learn's micro averages over all classes, an invalid answer being one more class."""
    metrics = scored(triples)
    right = accuracy_score([t for _, t, _ in triples], [p or "invalid" for p, _, _ in triples])
    for name in ("precision", "recall", "f1", "accuracy"):
        assert metrics["aggregate"][f"micro_{name}"] == pytest.approx(right)


def test_a_class_absent_from_the_ground_truth_costs_a_false_positive() -> None:
    predictions, targets = ["happy", "sad", "sad", None], ["sad"] * 4
    default = score(predictions, targets, ["cremad"] * 4)["datasets"]["cremad"]
    published = score(predictions, targets, ["cremad"] * 4, published=True)["datasets"]["cremad"]
    assert (default["micro_precision"], published["micro_precision"]) == (0.5, 1.0)
    assert default["n_invalid"] == published["n_invalid"] == 1


def test_weighted_accuracy_of_one_class_reaches_1_unless_published() -> None:
    arguments = (["sad", "sad", "happy"], ["sad"] * 3, ["cremad"] * 3)
    assert score(*arguments)["tasks"]["EMO"]["score"] == pytest.approx(2 / 3)
    assert score(*arguments, published=True)["tasks"]["EMO"]["score"] == pytest.approx(1 / 3)
    assert score(["sad"], ["sad"], ["cremad"])["tasks"]["EMO"]["score"] == 1.0


def test_weighted_accuracy_of_two_classes_is_the_balanced_accuracy() -> None:
    targets = ["sad"] * 30 + ["happy"] * 10
    guesses = ["sad"] * 24 + ["happy"] * 13 + ["sad"] * 3
    measured = score(guesses, targets, ["cremad"] * 40)["datasets"]["cremad"]
    expected = balanced_accuracy_score(targets, guesses)
    assert measured["emotion_weighted_accuracy_mean"] == pytest.approx(expected)
    assert measured["sad/emotion_weighted_accuracy"] == pytest.approx(expected)


def test_sentiment_points_by_hand() -> None:
    targets = ["highly negative", "negative", "neutral", "weakly positive", "highly positive"]
    guesses = ["negative", "weakly negative", "neutral", "neutral", "positive"]
    entry = score(guesses, targets, ["mosei_senti"] * 5)["datasets"]["mosei_senti"]
    assert [entry[f"ACC{k}"] for k in (7, 5, 3, 2)] == pytest.approx([1 / 5, 2 / 5, 4 / 5, 3 / 4])
    negative, positive = (
        1.0,
        2 * 1 / (2 + 1),
    )  # the neutral answer is a miss of positive, not a hit of anything
    assert entry["F1w2"] == pytest.approx((2 * negative + 2 * positive) / 4)


def test_a_score_that_is_not_defined_is_none_and_left_out_of_the_mean() -> None:
    metrics = score(["neutral", "sarcasm"], ["neutral", "sarcasm"], ["mosei_senti", "mmsd"])
    assert metrics["datasets"]["mosei_senti"]["F1w2"] is None
    assert metrics["tasks"]["SEN"]["score"] is None
    assert metrics["aggregate"]["mean"] == {"score": 1.0}
    published = score(["neutral"], ["neutral"], ["mosei_senti"], published=True)
    assert published["datasets"]["mosei_senti"]["F1w2"] == 0.0


def test_task_score_is_the_mean_over_datasets_not_over_rows() -> None:
    predictions = ["sad", "happy"] * 10 + ["sad", "sad"]
    targets = ["sad", "happy"] * 10 + ["sad", "happy"]
    metrics = score(predictions, targets, ["cremad"] * 20 + ["tess"] * 2)
    assert metrics["tasks"]["EMO"] == {
        "score": 0.75, "metric": "mean_weighted_accuracy", "n": 22, "datasets": ["cremad", "tess"],
    }  # fmt: skip


def test_mean_weighted_accuracy_is_for_tasks_of_ones_own_domains_too() -> None:
    mine = BUILTIN.extended(
        {
            "domains": {"engagement": {25: "low", 26: "high"}},
            "datasets": {"classroom": {"domain": "engagement", "labels": ["low", "high"]}},
            "tasks": {"ENG": {"name": "x", "metric": "mean_weighted_accuracy", "datasets": ["classroom"]}},
        }
    )
    targets, guesses = ["low", "low", "low", "high"], ["low", "low", "high", "high"]
    found = score(guesses, targets, ["classroom"] * 4, taxonomy=mine)
    assert found["tasks"]["ENG"]["score"] == pytest.approx(balanced_accuracy_score(targets, guesses))
    assert "emotion_weighted_accuracy_mean" not in score(["sarcasm"], ["sarcasm"], ["mmsd"])["datasets"]["mmsd"]


def test_every_task_metric_has_a_function() -> None:
    for task in BUILTIN.tasks.values():
        if not task.judged:
            assert callable(primary(task.metric))
    with pytest.raises(TaxonomyError, match="weighted_f1"):
        primary("weighted_f2")


def test_neutral_is_read_within_the_domain_of_the_dataset() -> None:
    both = score(["neutral", "neutral"], ["neutral", "neutral"], ["cremad", "meld_senti"])
    assert both["aggregate"]["micro_accuracy"] == 1.0
    assert both["aggregate"]["macro_f1"] == 1.0
    assert score(["neutral"], ["sarcasm"], ["mmsd"])["datasets"]["mmsd"]["n_invalid"] == 1


def test_an_answer_of_another_domain_is_invalid_and_a_false_positive_there() -> None:
    metrics = score(["depression", "depression"], ["sarcasm", "depression"], ["mmsd", "daicwoz"])
    assert metrics["datasets"]["mmsd"]["n_invalid"] == 1
    assert metrics["datasets"]["daicwoz"]["macro_precision"] == 1.0
    assert metrics["aggregate"]["macro_precision"] == pytest.approx(0.25)


def test_raw_answers_and_synonyms_are_read_as_their_label() -> None:
    metrics = score(["Angry", "joy", "contempt"], ["anger", "Happiness", "sad"], ["cremad"] * 3)
    assert metrics["aggregate"]["micro_accuracy"] == pytest.approx(2 / 3)
    assert metrics["aggregate"]["n_invalid"] == 1


def test_free_form_rows_get_an_exact_match_and_no_task() -> None:
    metrics = score(["He  Waves.", "no", None], ["he waves.", "yes", "yes"], ["mimeqa"] * 3)
    assert metrics["tasks"] == {}
    assert metrics["datasets"] == {"mimeqa": {"n": 3, "n_invalid": 1, "exact_match": pytest.approx(1 / 3)}}
    assert metrics["aggregate"]["mean"] == {"score": None}
    assert metrics["aggregate"]["macro_f1"] is None


def test_no_rows_give_no_scores() -> None:
    metrics = score([], [], [])
    assert (metrics["tasks"], metrics["datasets"]) == ({}, {})
    assert metrics["aggregate"]["micro_f1"] is None


def test_an_extended_taxonomy_is_scored_the_same_way() -> None:
    entry = {"domain": "emotion", "labels": ["anger", "sad"]}
    task = {"name": "emotion recognition", "metric": "mean_weighted_accuracy", "datasets": ["iemocap"]}
    taxonomy = BUILTIN.extended({"datasets": {"iemocap": entry}, "tasks": {"EMO": task}})
    metrics = score(["anger", "sad"], ["anger", "anger"], ["iemocap"] * 2, taxonomy=taxonomy)
    assert metrics["tasks"]["EMO"]["score"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((["sad"], ["sad", "sad"], ["cremad"]), InputError, "predictions 1, targets 2, datasets 1"),
        (
            (["sad"] * 3, ["sad", "sad", "sadd"], ["cremad"] * 3),
            TaxonomyError,
            "index 2: unknown label 'sadd'",
        ),
        (
            (["sad"] * 2, ["sad"] * 2, ["cremad", "cremat"]),
            TaxonomyError,
            "index 1: unknown dataset 'cremat'",
        ),
        ((["sad"], ["sarcasm"], ["cremad"]), TaxonomyError, "index 0: unknown label 'sarcasm'"),
        (([3], ["sad"], ["cremad"]), InputError, r"index 0: .*\(int\)"),
        ((["sad"], [None], ["cremad"]), InputError, "index 0: .*NoneType"),
        ((["sad", ["sad"]], ["sad"] * 2, ["cremad"] * 2), InputError, "index 1: not a word"),
        ((["sad"], ["sad"], [["cremad"]]), InputError, "index 0: not a word"),
        ((["sad"], ["sad"], [7]), InputError, "index 0: "),
    ],
)
def test_wrong_input_is_refused_with_its_place(arguments: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        score(*arguments)


def test_100_000_rows_are_scored_at_little_cost_beside_reading_them() -> None:
    rng = random.Random(0)
    datasets = [rng.choice(CLASSIFIED) for _ in range(100_000)]
    targets = [rng.choice(labels_of(dataset)) for dataset in datasets]
    guesses = [rng.choice((target, "sad", None)) for target in targets]
    text = json.dumps([guesses, targets, datasets])
    copies = json.loads(text)  # separate string objects, as a reader makes them
    times: dict[str, list[float]] = {"read": [], "score": []}
    for _ in range(5):
        for name, work in (("read", lambda: json.loads(text)), ("score", lambda: score(*copies))):
            start = time.process_time()
            work()
            times[name].append(time.process_time() - start)
    assert min(times["score"]) < 4 * min(times["read"])


def test_scoring_imports_nothing_heavy() -> None:
    heavy = "('torch', 'sklearn', 'scipy', 'av')"
    code = f"import sys, hba.evaluate.score; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
