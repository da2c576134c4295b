"""Parity of the metrics with the released scripts, to 1e-9, and where the default differs on purpose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hba.evaluate.metrics import averages, class_report, generation_metrics, pooled_confusion, score, score_indices
from hba.taxonomy import BUILTIN

DATA = Path(__file__).with_name("data")
FILES = sorted([*DATA.glob("metrics_*.json"), *DATA.glob("metrics/m0*.json")])
COUNTS = ("n", "n_invalid")


def load(path: Path) -> dict[str, Any]:
    """One shape for the two families of golden files."""
    golden = json.loads(path.read_text(encoding="utf-8"))
    given, expected = golden["inputs"], golden["expected"]
    if "prediction_indices" in given:
        return {
            "predictions": given["prediction_indices"],
            "targets": given["target_indices"],
            "datasets": given["datasets"],
            "aggregate": expected["aggregate"],
            "per_dataset": expected["per_dataset"],
            "classes": None,
        }
    return {
        "predictions": given["prediction_index"],
        "targets": given["ground_truth_index"],
        "datasets": given["datasets"],
        "aggregate": expected["aggregate_metrics"],
        "per_dataset": expected["per_dataset_metrics"],
        "classes": expected["aggregate_class_metrics"],
    }


def flat(metrics: dict[str, Any]) -> dict[str, float]:
    return {
        f"{dataset}/{name}": value
        for dataset, values in metrics["datasets"].items()
        for name, value in values.items()
        if name not in COUNTS
    }


def as_labels(indices: list[int], datasets: list[str]) -> list[str | None]:
    """Labels within each row's dataset, None for a class of another domain."""
    result = []
    for index, dataset in zip(indices, datasets, strict=True):
        domain = BUILTIN.domains[str(BUILTIN.datasets[dataset].domain)]
        labels = dict(zip(domain.indices, domain.labels, strict=True))
        result.append(labels.get(index))
    return result


def test_all_nine_files_are_there() -> None:
    assert len(FILES) == 9


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_published_figures_are_reproduced(path: Path) -> None:
    golden = load(path)
    metrics = score_indices(golden["predictions"], golden["targets"], golden["datasets"], published=True)
    assert flat(metrics) == pytest.approx(golden["per_dataset"], abs=1e-9)
    measured = {name: metrics["aggregate"][name] for name in golden["aggregate"]}
    assert measured == pytest.approx(golden["aggregate"], abs=1e-9)


@pytest.mark.parametrize("path", [f for f in FILES if f.stem.startswith("m0")], ids=lambda path: path.stem)
def test_published_class_counts_are_reproduced(path: Path) -> None:
    golden = load(path)
    report = class_report(pooled_confusion(golden["predictions"], golden["targets"]))
    present = {str(i) for i, entry in enumerate(report) if entry["count"]}
    assert present == set(golden["classes"])
    for index, expected in golden["classes"].items():
        entry = report[int(index)]
        assert [entry[k] for k in ("tp", "fp", "fn")] == list(expected["confusion_matrix"].values())
        for name in ("precision", "recall", "f1", "count"):
            assert entry[name] == pytest.approx(expected[name], abs=1e-9)


@pytest.mark.parametrize("path", [f for f in FILES if load(f)["datasets"]], ids=lambda path: path.stem)
def test_the_public_function_on_labels_gives_the_same_datasets(path: Path) -> None:
    golden = load(path)
    predictions = as_labels(golden["predictions"], golden["datasets"])
    targets = [str(label) for label in as_labels(golden["targets"], golden["datasets"])]
    metrics = score(predictions, targets, golden["datasets"], published=True)
    assert flat(metrics) == pytest.approx(golden["per_dataset"], abs=1e-9)


@pytest.mark.parametrize("path", [f for f in FILES if load(f)["datasets"]], ids=lambda path: path.stem)
def test_the_default_differs_only_in_micro_figures_and_one_class_datasets(path: Path) -> None:
    golden = load(path)
    arguments = (golden["predictions"], golden["targets"], golden["datasets"])
    default, published = score_indices(*arguments), score_indices(*arguments, published=True)
    one_class = {
        dataset
        for dataset in set(golden["datasets"])
        if len({t for t, d in zip(golden["targets"], golden["datasets"], strict=True) if d == dataset}) == 1
    }
    for name, value in flat(default).items():
        before = flat(published)[name]
        dataset = name.split("/")[0]
        if "micro_" in name:
            assert value == pytest.approx(default["datasets"][dataset]["micro_accuracy"], abs=1e-9)
            assert value <= before + 1e-9
        elif "emotion_weighted_accuracy" in name and dataset in one_class:
            assert value == pytest.approx(2 * before, abs=1e-9)
        elif value is not None:
            assert value == pytest.approx(before, abs=1e-9)


def test_micro_figures_of_the_default_are_lower_where_the_published_ones_were_inflated() -> None:
    golden = load(DATA / "metrics" / "m04_invalid_minus1_300.json")
    confusion = pooled_confusion(golden["predictions"], golden["targets"])
    assert averages(confusion)["micro_f1"] < averages(confusion, published=True)["micro_f1"]


def test_generation_accuracies_are_the_micro_accuracies() -> None:
    golden = json.loads((DATA / "extras" / "generation_metrics.json").read_text(encoding="utf-8"))
    given, expected = golden["inputs"], golden["expected"]["metrics"]
    metrics = score(given["predictions"], given["ground_truths"], given["datasets"])
    for key, entry in metrics["datasets"].items():
        assert entry["micro_accuracy"] == pytest.approx(expected[f"val/{key}/accuracy"], abs=1e-9)
        assert entry["n"] == expected[f"val/{key}/count"]
    assert metrics["aggregate"]["micro_accuracy"] == pytest.approx(expected["val/overall_accuracy"], abs=1e-9)


def test_generation_metrics_are_the_released_ones() -> None:
    golden = json.loads((DATA / "extras" / "generation_metrics.json").read_text(encoding="utf-8"))
    given, expected = golden["inputs"], golden["expected"]["metrics"]
    found = generation_metrics(given["predictions"], given["ground_truths"], given["datasets"], given["tasks"])
    assert {f"val/{name}": value for name, value in found.items()} == pytest.approx(expected, abs=1e-9)
