"""`score_run`: predictions and quarantine to metrics.json, through real files."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hba.errors import InputError
from hba.evaluate.metrics import score
from hba.evaluate.predictions import Prediction, PredictionLog, read_predictions
from hba.evaluate.score import score_run
from hba.storage import read_json


def rows(count: int = 120, dataset: str = "cremad", start: int = 0) -> list[Prediction]:
    labels = {"cremad": ("anger", "sad", "happy"), "mmsd": ("sarcasm", "not sarcasm")}[dataset]
    rng = random.Random(start)
    found = []
    for i in range(start, start + count):
        target = rng.choice(labels)
        label = target if rng.random() < 0.7 else rng.choice([*labels, None])
        found.append(
            Prediction(
                id=f"test/{i}", dataset=dataset, task="x_cls", split="test", target=target, output=str(label),
                answer=str(label), label=label, error=None, latency_s=rng.random(),
            )
        )  # fmt: skip
    return found


def free(count: int = 4) -> list[Prediction]:
    return [
        Prediction(
            id=f"test/qa{i}", dataset="siq2", task="social_qa", split="test", target="Because she is late.",
            output="x", answer=["because she is late.", "no", "", None][i % 4], label=None, error=None,
        )
        for i in range(count)
    ]  # fmt: skip


def run_folder(folder: Path, predictions: list[Prediction], quarantined: list[dict[str, Any]] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    with PredictionLog(folder / "predictions.jsonl") as log:
        for prediction in predictions:
            log.append(prediction)
    if quarantined is not None:
        lines = (json.dumps({"where": "test.jsonl:9, audios", "field": "audios", "reason": "cut", **entry})
                 for entry in quarantined)  # fmt: skip
        (folder / "quarantine.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return folder


def test_probabilities_under_other_spellings_are_those_of_their_labels(tmp_path: Path) -> None:
    told = {"anger": {"Angry": 0.7, "sad": 0.2, "happy": 0.1}, "sad": {"SADNESS": 0.6, "joy": 0.3, "happiness": 0.1}}
    said = [
        replace(p, target=spelled, label=spelled, probs=told[label])
        for p, (label, spelled) in zip(rows(2), {"anger": "Angry", "sad": "Sadness"}.items(), strict=True)
    ]
    metrics = score_run(run_folder(tmp_path / "run", said))
    found = metrics["aggregate"]["calibration"]["all"]
    assert metrics["datasets"]["cremad"]["micro_accuracy"] == 1.0 == found["accuracy"]
    assert found["confidence"] == pytest.approx(0.65) and found["brier"] < 0.3
    read = read_predictions(tmp_path / "run" / "predictions.jsonl")
    assert read[1].probs == pytest.approx({"sad": 0.6, "happy": 0.4}) and read[1].label == "sad"
    (tmp_path / "bad").mkdir()
    bad = [replace(said[0], probs={"anger": 0.5, "hunger": 0.5}).record()]
    (tmp_path / "bad" / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in bad))
    with pytest.raises(InputError, match=r"predictions.jsonl:1, probs: unknown label 'hunger'"):
        score_run(tmp_path / "bad")


def test_metrics_json_is_what_the_contract_says(tmp_path: Path) -> None:
    predictions = [*rows(), *rows(60, "mmsd", 500), *free()]
    run = run_folder(tmp_path / "run", predictions, [{"id": "test/9000", "dataset": "cremad"}])
    metrics = score_run(run, provenance={"model": "tiny", "synthetic": True})
    assert read_json(run / "metrics.json") == metrics
    assert list(metrics) == ["tasks", "datasets", "aggregate", "provenance"]
    emotion = metrics["tasks"]["EMO"]
    plain = score([p.label for p in predictions], [p.target for p in predictions], [p.dataset for p in predictions])
    assert emotion["score"] == plain["tasks"]["EMO"]["score"]
    assert emotion["ci95"][0] < emotion["score"] < emotion["ci95"][1]
    assert emotion["chance"] == pytest.approx(0.5, abs=0.02)
    assert (emotion["metric"], emotion["n"], emotion["n_quarantined"]) == ("mean_weighted_accuracy", 120, 1)
    assert emotion["n_invalid"] == sum(p.label is None for p in predictions[:120]) > 0
    mean = metrics["aggregate"]["mean"]
    assert mean["score"] == pytest.approx((emotion["score"] + metrics["tasks"]["SAR"]["score"]) / 2)
    assert mean["ci95"][0] < mean["score"] < mean["ci95"][1]
    assert mean["chance"] < mean["ci95"][0]
    provenance = metrics["provenance"]
    assert {"hba_version", "data_fingerprint", "split", "model", "seed", "created_at", "synthetic"} <= set(provenance)
    assert (provenance["model"], provenance["synthetic"], provenance["split"]) == ("tiny", True, "test")
    assert provenance["data_fingerprint"] is None


def test_a_task_that_needs_a_judge_is_not_scored(tmp_path: Path) -> None:
    metrics = score_run(run_folder(tmp_path / "run", free()))
    task = metrics["tasks"]["SOC"]
    assert (task["score"], task["ci95"], task["chance"], task["n"], task["n_invalid"]) == (None, None, None, 4, 2)
    assert "judge" in task["note"]
    assert metrics["datasets"]["siq2"]["exact_match"] == 0.25
    assert metrics["datasets"]["siq2"]["chance"] == 1.0  # one answer is right for all of these rows
    released = {"overall_accuracy": 0.25, "macro_accuracy": 0.25, "total_samples": 4, "task/social_qa/accuracy": 0.25}
    assert metrics["aggregate"]["free_form"] == released | {"siq2/accuracy": 0.25, "siq2/count": 4}
    assert metrics["aggregate"]["mean"] == {"score": None, "ci95": None, "chance": None}


def without_times(metrics: dict[str, Any]) -> dict[str, Any]:
    return {**metrics, "provenance": {k: v for k, v in metrics["provenance"].items() if k != "created_at"}}


def test_two_runs_give_the_same_metrics_apart_from_times(tmp_path: Path) -> None:
    predictions = [*rows(), *rows(60, "mmsd", 500), *free()]
    first = score_run(run_folder(tmp_path / "a", predictions))
    slower = [Prediction(**{**p.record(), "latency_s": 9.0}) for p in random.Random(1).sample(predictions, 184)]
    second = score_run(run_folder(tmp_path / "b", slower))
    assert without_times(first) == without_times(second)
    assert without_times(score_run(tmp_path / "a", seed=1)) != without_times(first)


def test_a_failed_sample_is_wrong_and_counted(tmp_path: Path) -> None:
    good = [p for p in rows() if p.label == p.target][:40]
    failed = [
        Prediction(
            **{**p.record(), "id": f"bad/{i}", "label": None, "output": None, "answer": None, "error": "timed out"}
        )
        for i, p in enumerate(good[:10])
    ]
    entry = score_run(run_folder(tmp_path / "run", good + failed))["datasets"]["cremad"]
    assert (entry["n"], entry["n_failed"], entry["n_invalid"]) == (50, 10, 0)
    assert entry["micro_accuracy"] == 0.8


def test_quarantined_samples_are_counted_where_they_belong(tmp_path: Path) -> None:
    quarantined = [
        {"id": "test/0", "dataset": "cremad", "split": "test"},  # read and predicted by now
        {"id": "test/777", "dataset": "mmsd", "split": "test"},
        {"id": "test/778", "dataset": "cremad"},
        {"id": "train/3", "dataset": "cremad", "split": "train"},  # left out of training
        {"id": "test/779"},  # of an unknown dataset
    ]
    metrics = score_run(run_folder(tmp_path / "run", rows(40), quarantined))
    assert metrics["datasets"]["cremad"]["n"] == 40
    assert metrics["datasets"]["cremad"]["n_quarantined"] == 1
    assert metrics["datasets"]["mmsd"]["n_quarantined"] == 1
    assert (metrics["tasks"]["SAR"]["score"], metrics["tasks"]["SAR"]["n"]) == (None, 0)
    assert metrics["tasks"]["SAR"]["note"] == "not scored: no row with a defined score"
    assert metrics["aggregate"]["n_quarantined"] == 3
    assert metrics["aggregate"]["n_quarantined_unassigned"] == 1


def test_the_quarantine_may_lie_elsewhere(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", rows(40))
    other = tmp_path / "left_out.jsonl"
    other.write_text('{"id": "test/99"}\n')
    assert score_run(run, quarantine=other)["aggregate"]["n_quarantined"] == 1
    with pytest.raises(InputError, match="no such file"):
        score_run(run, quarantine=tmp_path / "none.jsonl")


def test_a_predictions_file_anywhere_is_scored_beside_itself(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", rows(40))
    moved = tmp_path / "other" / "mine.jsonl"
    moved.parent.mkdir()
    (run / "predictions.jsonl").rename(moved)
    metrics = score_run(moved)
    assert read_json(tmp_path / "other" / "metrics.json") == metrics


def test_environment_of_the_run_gives_the_provenance(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", rows(40))
    environment = {"seed": 3, "data": {"path": "x", "fingerprint": "ab12", "synthetic": True}}
    (run / "environment.json").write_text(json.dumps(environment))
    provenance = score_run(run, provenance={"seed": 4})["provenance"]
    assert (provenance["data_fingerprint"], provenance["synthetic"], provenance["seed"]) == ("ab12", True, 4)
    model = tmp_path / "backbone"
    model.mkdir()
    predict = {"model": str(model), "backend": "heads", "data": {"fingerprint": "cd34", "synthetic": False}}
    (run / "predict.json").write_text(json.dumps(predict))
    provenance = score_run(run)["provenance"]
    assert (provenance["model"], provenance["backend"], provenance["seed"]) == ("backbone", "heads", 3)
    assert (provenance["data_fingerprint"], provenance["synthetic"]) == ("cd34", False)
    (run / "predict.json").write_text('{"model": "Qwen/Qwen2.5-Omni-7B", "data": null}')
    assert score_run(run)["provenance"]["model"] == "Qwen/Qwen2.5-Omni-7B"
    (run / "environment.json").write_text("[]")
    with pytest.raises(InputError, match=r"environment\.json"):
        score_run(run)


def test_groups_widen_the_interval(tmp_path: Path) -> None:
    plain = rows(200)
    copies = [Prediction(**{**p.record(), "id": f"{p.id}.{i}", "group": p.id}) for p in plain for i in range(10)]
    ungrouped = [Prediction(**{**p.record(), "group": None}) for p in copies]
    wide = score_run(run_folder(tmp_path / "a", copies))["tasks"]["EMO"]["ci95"]
    narrow = score_run(run_folder(tmp_path / "b", ungrouped))["tasks"]["EMO"]["ci95"]
    assert wide[1] - wide[0] > 2.5 * (narrow[1] - narrow[0])


def test_published_figures_on_request(tmp_path: Path) -> None:
    one_class = [Prediction(**{**p.record(), "target": "sad", "label": "sad"}) for p in rows(20)]
    run = run_folder(tmp_path / "run", one_class)
    assert score_run(run)["tasks"]["EMO"]["score"] == 1.0
    published = score_run(run, published=True)
    assert published["tasks"]["EMO"]["score"] == 0.5
    assert published["tasks"]["EMO"]["ci95"] == [0.5, 0.5]
    assert published["provenance"]["scoring"]["published"] is True


@pytest.mark.parametrize(
    ("predictions", "quarantined", "message"),
    [
        ([], None, "no prediction to score: the file is empty"),
        (rows(2), [{"id": 5}], "quarantine.jsonl:1, id: expected str, found 5"),
        (rows(2), [{"id": "a", "dataset": "x"}], "quarantine.jsonl:1, dataset: unknown dataset 'x'"),
    ],
)
def test_bad_input_writes_nothing(tmp_path: Path, predictions: Any, quarantined: Any, message: str) -> None:
    run = run_folder(tmp_path / "run", predictions, quarantined)
    before = sorted(run.iterdir())
    with pytest.raises(InputError, match=message):
        score_run(run)
    assert sorted(run.iterdir()) == before


def test_a_missing_run_is_named(tmp_path: Path) -> None:
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(InputError, match="Run `hba predict` first"):
            score_run(missing)


def test_old_metrics_stay_when_the_new_predictions_are_broken(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", rows(40))
    before = score_run(run)
    with (run / "predictions.jsonl").open("a") as handle:
        handle.write('{"id": "torn')
    with pytest.raises(InputError, match=r"predictions.jsonl:41"):
        score_run(run)
    assert read_json(run / "metrics.json") == before


def test_the_report_of_what_means_no_label_counts_and_shortens():
    from hba.evaluate.predictions import Prediction
    from hba.evaluate.unmapped import LONGEST, unmapped

    common = {"task": "t", "split": "test", "target": "anger", "output": "x"}
    answers = ["angry?!", "dunno", "dunno", "w " * 99]
    rows = [
        Prediction(id=str(i), dataset="cremad", answer=a, label=None, error=None, **common)
        for i, a in enumerate(answers)
    ]
    failed = {**common, "output": None}
    rows += [Prediction(id="f", dataset="cremad", answer=None, label=None, error="timed out", **failed)]
    rows += [Prediction(id="r", dataset="cremad", answer="anger", label="anger", error=None, **common)]
    rows += [Prediction(id="q", dataset="siq2", answer="free", label=None, error=None, **common)]
    (key, entry), *others = unmapped(rows).items()
    assert (key, others, entry["n"], entry["share"]) == ("cremad", [], 4, 4 / 6)
    assert entry["answers"][0] == {"answer": "dunno", "n": 2}
    assert max(len(each["answer"]) for each in entry["answers"]) == LONGEST
