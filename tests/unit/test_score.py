"""`score_run`: predictions and quarantine to metrics.json, through real files."""

from __future__ import annotations

import json
import random
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hba.atlas import open_atlas
from hba.cli import app
from hba.errors import InputError
from hba.evaluate import score as scoring
from hba.evaluate.leaderboard import build_leaderboard
from hba.evaluate.metrics import score
from hba.evaluate.predictions import Prediction, PredictionLog, ids_sha256, read_predictions
from hba.evaluate.results import parse_metrics
from hba.evaluate.runs import open_run
from hba.export.wandb_table import tables_of
from hba.report.page import write_report
from hba.report.words import warnings
from hba.storage import read_json


def score_run(*arguments: Any, **options: Any) -> dict[str, Any]:
    """The metrics of a run as metrics.json has them."""
    return scoring.score_run(*arguments, **options).record()


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


def test_the_strict_published_reading_stands_beside_the_scores_and_is_shown_where_it_differs(tmp_path: Path) -> None:
    said = [
        replace(p, output=f"The emotion is [{p.label}]." if i % 2 else f"The emotion is {p.label}.", rule="mention")
        for i, p in enumerate(rows(60))
        if p.label is not None
    ]
    said.append(replace(said[0], id="failed", output=None, answer=None, label=None, rule=None, error="HTTP 500"))
    metrics = score_run(run_folder(tmp_path / "run", said))
    strict = [p.label if p.output and "[" in p.output else None for p in said]
    plain = score(strict, [p.target for p in said], [p.dataset for p in said])
    reading = metrics["aggregate"]["readings"]["published"]
    assert reading["tasks"] == {"EMO": plain["tasks"]["EMO"]["score"]} and reading["mean"] == reading["tasks"]["EMO"]
    assert reading["n_invalid"] == strict.count(None) - 1 > 20
    assert metrics["aggregate"]["rules"] == {"mention": len(said) - 1}
    (sentence,) = [w for w in warnings(parse_metrics(metrics, where="")) if "published" in w]
    assert f"EMO {reading['tasks']['EMO']:.3f}" in sentence and f"{reading['n_invalid']} invalid" in sentence
    alike = score_run(run_folder(tmp_path / "alike", [replace(p, output=p.label) for p in said[:-1]]))
    assert alike["aggregate"]["readings"]["published"]["mean"] == alike["aggregate"]["mean"]["score"]
    assert not [w for w in warnings(parse_metrics(alike, where="")) if "published" in w]
    heads = [replace(p, probs={str(p.label): 1.0}, rule=None) for p in said[:-1]]
    assert "readings" not in score_run(run_folder(tmp_path / "heads", heads))["aggregate"]


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
    (run / "metrics.json").unlink()
    said = CliRunner().invoke(app, ["score", str(run), "--published"]).output
    assert "as the released scorer has them" in " ".join(said.split())
    assert read_json(run / "metrics.json")["tasks"]["EMO"]["score"] == 0.5
    assert "released scorer" not in CliRunner().invoke(app, ["score", str(run)]).output


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
    from hba.evaluate.score import LONGEST, unmapped

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


# --- rows that were asked for ----------------------------------------------------------------------------------------


def asked(folder: Path, rows: int | None, **more: Any) -> Path:
    """predict.json of a run that was to answer `rows` rows."""
    record = {"model": "m", "split": "test", "data": {"fingerprint": "ab12", "synthetic": False, "rows": rows}, **more}
    (folder / "predict.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


def hba(*arguments: Any, columns: int = 80) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": str(columns)})
    error = f"error: {result.exception}" if isinstance(result.exception, InputError) else ""
    return result.exit_code, result.stdout, result.stderr + error


def test_a_part_of_the_rows_is_never_scored_as_the_whole(tmp_path: Path) -> None:
    run = asked(run_folder(tmp_path / "run", rows(337)), 1030, skipped={"siq2": 18})
    code, out, err = hba("score", run)
    assert code == 1
    assert "Scores of 337 of 1,012 rows" in out and "337/1,012" in out
    assert "only 337 of 1,012 rows have a prediction" in err and "the same `hba predict` command again" in err
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["aggregate"]["n_asked"] == 1012
    code, out, err = hba("score", run, "--partial")
    assert code == 0 and "Scores of 337 of 1,012 rows" in out and err.startswith("warning: only 337 of 1,012 rows")
    assert "337 of 1,012 rows" in write_report(run).read_text(encoding="utf-8")
    assert json.loads(hba("score", run, "--partial", "--json")[1])["aggregate"]["n_asked"] == 1012
    board = build_leaderboard([run], tables=[])
    assert board.entries[0].rank is None and "337 of 1,012 rows: not ranked" in board.entries[0].notes
    asked(run, 337)
    code, out, err = hba("score", run)
    assert (code, err) == (0, "") and "of 1,012" not in out


def test_other_rows_of_the_same_number_are_noticed(tmp_path: Path) -> None:
    mine = [p.id for p in rows(40)]
    run = asked(run_folder(tmp_path / "run", rows(40)), 40, asked={"cremad": 40}, asked_ids=ids_sha256(reversed(mine)))
    code, out, err = hba("score", run)
    assert (code, err) == (0, "") and "other rows" not in out
    assert "other_rows" not in json.loads((run / "metrics.json").read_text())["aggregate"]
    other = asked(run_folder(tmp_path / "other", rows(40, start=7)), 40, asked_ids=ids_sha256(mine))
    code, out, err = hba("score", other)
    assert code == 1 and "of other rows than" in out and "error: the predictions are of other rows" in err
    assert json.loads((other / "metrics.json").read_text())["aggregate"]["other_rows"] is True
    assert hba("score", other, "--partial")[0] == 0
    assert "of other rows than the run was asked for" in write_report(other).read_text(encoding="utf-8")
    board = build_leaderboard([run, other], tables=[])
    assert {entry.name: entry.rank for entry in board.entries} == {"run": 1, "other": None}
    more = asked(run_folder(tmp_path / "more", rows(41)), 40)
    assert hba("score", more)[0] == 1
    quarantined = [{"id": "test/39", "dataset": "cremad", "split": "test"}]
    whole = run_folder(tmp_path / "whole", rows(39), quarantined)
    ids = [p.id for p in rows(39)]
    for left_out, code in (("test/39", 0), ("test/40", 1)):
        assert hba("score", asked(whole, 40, asked_ids=ids_sha256([*ids, left_out])))[0] == code


def test_scores_of_other_predictions_than_the_present_are_named_and_not_ranked(tmp_path: Path) -> None:
    run, other = asked(run_folder(tmp_path / "run", rows(40)), 40), asked(run_folder(tmp_path / "other", rows(40)), 40)
    for each in (run, other):
        scoring.score_run(each)
    assert not open_run(other).stale and [e.rank for e in build_leaderboard([run, other], tables=[]).entries] == [1, 1]
    path = other / "predictions.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(reversed(lines)))
    assert not open_run(other).stale
    path.write_bytes(b"".join(lines[:20]))
    board = build_leaderboard([run, other], tables=[])
    assert {entry.name: entry.rank for entry in board.entries} == {"run": 1, "other": None}
    assert "hba score" in board.entries[1].notes[0]
    assert "have changed since these scores were made" in write_report(other).read_text(encoding="utf-8")
    path.write_bytes(b"".join(lines)[:-30])  # cut off by a kill
    assert open_run(other).stale and build_leaderboard([run, other], tables=[]).entries[1].rank is None


def test_a_field_called_group_is_read_from_the_rows_where_predictions_have_none(tmp_path: Path) -> None:
    row = {"problem": "How does it sound? Choose from: happy, sad.", "answer": "sad", "dataset": "cremad",
           "task": "emotion_cls", "modality_signature": "text"}  # fmt: skip
    atlas = tmp_path / "atlas"
    atlas.mkdir()
    lines = [json.dumps({**row, "id": f"test/{i}", "group": f"g{i % 2}"}) for i in range(12)]
    (atlas / "test.jsonl").write_text("\n".join(lines), encoding="utf-8")
    run = asked(run_folder(tmp_path / "run", rows(12)), 12, data={"path": str(atlas)})
    assert set(scoring.score_run(run, by=["group"]).breakdowns["group"].slices) == {"g0", "g1"}
    assert scoring.score_run(run, cluster="group").provenance.scoring.clusters.groups == 2


def test_what_was_asked_of_each_dataset_is_counted_against_it(tmp_path: Path) -> None:
    quarantined = [{"id": "test/900", "dataset": "cremad", "split": "test"}]
    run = run_folder(tmp_path / "run", rows(40), quarantined)
    asked(run, 100, asked={"cremad": 41, "mmsd": 50}, skipped={"siq2": 9})
    metrics = scoring.score_run(run)
    assert (metrics.tasks["EMO"].n_asked, metrics.tasks["EMO"].n_missing) == (
        41,
        0,
    )  # the quarantined row is accounted for
    assert (metrics.tasks["SAR"].n, metrics.tasks["SAR"].n_missing) == (0, 50)
    assert metrics.tasks["SAR"].note == "not scored: none of 50 rows was answered"
    assert (metrics.aggregate.n_asked, metrics.aggregate.n_missing) == (91, 50)
    assert metrics.tasks["SOC"].note == "not scored (9 rows that the model is not trained to answer)"


def test_a_run_of_hba_predict_says_what_it_was_asked_for(mini_atlas: Path, tmp_path: Path) -> None:
    from hba.evaluate.config import PredictConfig
    from hba.evaluate.predict import predict_run

    options = {"atlas": str(mini_atlas), "split": "test", "config": PredictConfig(), "progress": lambda tally: None}
    predict_run("majority", tmp_path, backend="majority", **options)
    whole = scoring.score_run(tmp_path)
    assert whole.aggregate.n_missing == 0 and whole.aggregate.n_asked == whole.aggregate.n > 40
    assert all(task.n_asked == task.n for task in whole.tasks.values())
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "predictions.jsonl").write_text("".join(lines[:17]))
    assert scoring.score_run(tmp_path).aggregate.rows == f"17 of {len(lines)} rows"


def test_shards_that_are_not_merged_are_found_and_named(tmp_path: Path) -> None:
    run = asked(run_folder(tmp_path / "run", rows(40)), 120)
    for number in (1, 2):
        (run / "shards").mkdir(exist_ok=True)
        run_folder(run / "shards" / f"{number}-of-2", rows(40, start=40 * number))
    code, _, err = hba("score", run)
    assert code == 1 and "predictions of shards are not merged (1-of-2, 2-of-2)" in err and "without --shard" in err
    (run / "predictions.jsonl").unlink()
    code, _, err = hba("score", run)
    assert code == 1 and "the predictions lie in 2 shards that are not merged" in err and "without --shard" in err
    for command in ("compare", "judge"):
        assert (
            "2 shards that are not merged" in hba(command, run, *([run] if command == "compare" else ["--offline"]))[2]
        )
    share = scoring.score_run(run / "shards" / "1-of-2")  # of one process: a part of the run's rows
    assert share.aggregate.rows == "40 of 120 rows" and share.provenance.data_fingerprint == "ab12"


def test_chosen_rows_and_another_split_stand_beside_the_figures(tmp_path: Path) -> None:
    run = asked(run_folder(tmp_path / "run", rows(20)), 20, selection={"limit": 20, "channels": ["audio"]})
    out = " ".join(hba("score", run)[1].split())
    assert "Scores (test; the first 20 rows; media given: audio); rows drawn alone" in out
    assert "run report · test; the first 20 rows; media given: audio<" in write_report(run).read_text(encoding="utf-8")
    asked(run, 20)
    assert "Scores; rows drawn alone" in hba("score", run)[1]


def test_the_model_card_says_that_a_part_was_scored(tmp_path: Path) -> None:
    from hba.export.push import model_card

    run = asked(run_folder(tmp_path / "run", [*rows(300), *failed(7, 600)]), 1012)
    environment = {"hba_version": "0", "seed": 0, "data": {"path": "a", "rows": 9, "fingerprint": "f"}}
    (run / "environment.json").write_text(json.dumps(environment))
    scoring.score_run(run)
    card = {"encode": {"modalities": ["audio"]}, "strategy": "lora", "columns": []}
    text = model_card(open_run(run), place="me/mine", base_model="org/base", license_id="apache-2.0", card=card)
    assert "Rows: `test` (307 of 1,012 rows)" in text and "**Only 307 of 1,012 rows were answered" in text
    assert re.search(r"\| EMO emotion recognition \|.*\| 307 \| \d+ \| 7 \| 0 \|", text)


# --- rows that failed ------------------------------------------------------------------------------------------------


def failed(count: int, start: int = 0, dataset: str = "cremad", error: str = "connection refused") -> list[Prediction]:
    nothing = {"label": None, "output": None, "answer": None, "error": error}
    return [Prediction(**{**p.record(), **nothing}) for p in rows(count, dataset, start)]


def test_a_run_whose_server_was_never_reached_has_no_score(tmp_path: Path) -> None:
    run = asked(run_folder(tmp_path / "run", failed(210)), 210)
    metrics = scoring.score_run(run)
    assert (metrics.mean.score, metrics.mean.ci95, metrics.tasks["EMO"].score) == (None, None, None)
    assert metrics.tasks["EMO"].note == "not scored: all 210 rows failed" and metrics.aggregate.n_failed == 210
    assert [(each.error, each.n) for each in metrics.aggregate.failures] == [("connection refused", 210)]
    code, out, _ = hba("score", run)
    shown = " ".join(out.split())
    assert code == 0 and "0.000" not in out and "All 210 rows failed, most often: connection refused" in shown
    page = write_report(run).read_text(encoding="utf-8")
    assert "No score: all 210 rows failed" in page and "No labelled row has an answer." in page
    assert "No wrong answer" not in page and "connection refused" in page
    other = asked(run_folder(tmp_path / "good", rows(210)), 210)
    scoring.score_run(other)
    board = build_leaderboard([run, other], tables=[])
    assert [(entry.name, entry.rank) for entry in board.entries] == [("good", 1), ("run", None)]
    assert "100.0% of the rows failed: not ranked" in board.entries[1].notes and board.entries[1].num_failed == 210
    alone = build_leaderboard([run])
    assert alone.warnings[0] == "No run can be ranked." and {entry.rank for entry in alone.entries} == {None}
    assert hba("leaderboard", run)[0] == 0


def test_more_than_one_failed_row_in_twenty_leaves_a_task_without_a_score(tmp_path: Path) -> None:
    few = scoring.score_run(run_folder(tmp_path / "few", [*rows(95), *failed(5, 500)]))
    assert few.tasks["EMO"].score is not None and (few.tasks["EMO"].n_failed, few.aggregate.n_failed) == (5, 5)
    assert few.mean.score is not None
    many = scoring.score_run(run_folder(tmp_path / "many", [*rows(94), *failed(6, 500), *rows(60, "mmsd", 900)]))
    assert many.tasks["EMO"].score is None and many.tasks["EMO"].ci95 is None
    assert many.tasks["EMO"].note == "not scored: 6 of 100 rows failed"
    sarcasm = many.tasks["SAR"]
    assert sarcasm.score is not None
    assert (many.mean.score, many.mean.ci95, many.mean.chance) == (sarcasm.score, sarcasm.ci95, sarcasm.chance)
    most = scoring.score_run(run_folder(tmp_path / "most", [*rows(10), *failed(90, 500), *rows(60, "mmsd", 900)]))
    assert most.tasks["SAR"].score is not None and most.mean.score is None  # most of what was asked is not in it
    assert most.aggregate.readings["published"].mean is None  # nor has another reading one
    assert list(many.aggregate.readings["published"].tasks) == ["SAR"]
    table = hba("score", tmp_path / "many")[1]
    assert "failed" in table and re.search(r"6 of 100\s+rows failed", " ".join(table.split()))


def test_failed_rows_of_a_slice_are_no_invalid_answers(tmp_path: Path) -> None:
    spoken = [Prediction(**{**p.record(), "modality": "text_audio"}) for p in [*rows(60), *failed(2, 200)]]
    seen = [Prediction(**{**p.record(), "modality": "text_video"}) for p in [*rows(30, start=300), *failed(10, 400)]]
    parts = scoring.score_run(run_folder(tmp_path / "run", [*spoken, *seen])).breakdowns["modality"].slices
    assert (parts["text_audio"].n_failed, parts["text_video"].n_failed) == (2, 10)
    invalid = sum(p.label is None and not p.failed for p in seen)
    assert parts["text_video"].n_invalid == invalid < 10
    assert parts["text_audio"].tasks["EMO"].score is not None and parts["text_audio"].mean is not None
    emotion = parts["text_video"]
    assert (emotion.tasks["EMO"].score, emotion.tasks["EMO"].ci95, emotion.mean, emotion.accuracy) == (None,) * 4


def test_how_answers_ended_is_counted_and_shown(tmp_path: Path) -> None:
    words = ["stop"] * 30 + ["length"] * 7 + ["content_filter"] * 2 + ["end_turn"]
    ended = [Prediction(**{**p.record(), "finish": word}) for p, word in zip(rows(40), words, strict=True)]
    run = asked(run_folder(tmp_path / "run", [*ended, *rows(20, "mmsd", 900)]), 60)
    metrics = scoring.score_run(run)
    assert metrics.tasks["EMO"].finish == {"content_filter": 2, "end_turn": 1, "length": 7, "stop": 30}
    assert (metrics.tasks["EMO"].n_cut, metrics.tasks["EMO"].n_filtered, metrics.tasks["SAR"].finish) == (7, 2, {})
    written = json.loads((run / "metrics.json").read_text())
    assert written["datasets"]["cremad"]["finish"]["length"] == written["aggregate"]["finish"]["length"] == 7
    out = " ".join(hba("score", run)[1].split())
    assert "7 cut off, 2 filtered" in out and "did not end by themselves" in out
    assert "7 cut off, 2 filtered" in write_report(run).read_text(encoding="utf-8")


# --- what else may not pass for a score ------------------------------------------------------------------------------


def test_what_training_left_out_of_the_same_split_is_not_left_out_of_the_evaluated_rows(tmp_path: Path) -> None:
    """A model trained on the first rows of a split and tested on the rest: both write to one quarantine."""
    lines = []
    for i in range(30):
        label = ("anger", "sad", "happy")[i % 3]
        lines.append({"problem": "?", "answer": label, "dataset": "cremad", "task": "x_cls", "class_label": label,
                      "modality_signature": "text", "images": [], "videos": [], "audios": [], "texts": []})  # fmt: skip
    atlas = tmp_path / "atlas"
    atlas.mkdir()
    (atlas / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    opened = open_atlas(atlas, split="train[20:]")
    assert len(opened) == 10
    left_out = [{"id": f"train/{i}", "dataset": "cremad", "split": "train"} for i in (3, 4, 5)]  # of the training
    left_out += [{"id": opened[9].id, "dataset": "cremad", "split": "train"}]
    predictions = [
        Prediction(
            id=opened[i].id, dataset="cremad", task="x_cls", split="train", target=opened[i].target, output="sad",
            answer="sad", label="sad", error=None,
        )
        for i in range(8)
    ]  # fmt: skip
    run = run_folder(tmp_path / "run", predictions, left_out)
    (run / "config.yaml").write_text("train: {epochs: 1}\n")
    data = {"path": str(atlas), "fingerprint": opened.fingerprint, "synthetic": False, "rows": 10}
    asked(run, 10, split="train[20:]", data=data, asked={"cremad": 10})
    metrics = scoring.score_run(run)
    assert (metrics.aggregate.n_quarantined, metrics.tasks["EMO"].n_quarantined) == (1, 1)
    assert metrics.aggregate.n_missing == 1  # and not hidden behind what training left out
    (atlas / "train.jsonl").rename(tmp_path / "elsewhere.jsonl")
    assert scoring.score_run(run).aggregate.n_quarantined == 2  # as many as are unanswered, where nobody can look


def test_a_task_of_ones_own_has_its_name_in_every_table(tmp_path: Path) -> None:
    own = "tasks:\n  MINE: {name: engagement of pupils, datasets: [mine]}\n  BARE: {datasets: [bare]}\n"
    own += "datasets:\n  mine: {domain: sarcasm, labels: [sarcasm, not sarcasm]}\n"
    own += "  bare: {domain: sarcasm, labels: [sarcasm, not sarcasm]}\n"
    run = tmp_path / "run"
    run.mkdir()
    (run / "taxonomy.yaml").write_text(own)
    found = [Prediction(**{**p.record(), "dataset": key, "id": f"{key}/{i}"})
             for key in ("mine", "bare") for i, p in enumerate(rows(30, "mmsd"))]  # fmt: skip
    (run / "predictions.jsonl").write_text("".join(json.dumps(p.record()) + "\n" for p in found))
    out = " ".join(hba("score", run, columns=120)[1].split())
    assert "MINE engagement of pupils" in out and "BARE bare" in out
    page = write_report(run).read_text(encoding="utf-8")
    assert "<b>MINE</b> engagement of pupils" in page and "<b>BARE</b> bare" in page
    tasks = tables_of(run)["tasks"].rows
    assert [row[:2] for row in tasks[:2]] == [("MINE", "engagement of pupils"), ("BARE", "bare")]


BOARD = """
import json, pathlib
from types import SimpleNamespace
def Table(columns, data): return {"columns": columns}
def init(**told):
    with (pathlib.Path(__file__).parent / "told.jsonl").open("a") as file:
        file.write(json.dumps(told) + "\\n")
    return SimpleNamespace(log=lambda tables: None, summary={}, finish=lambda: None, dir="here", url="there")
"""


def test_tables_go_to_the_board_of_their_run_folder_whatever_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package in the place of the real one, which wants an account: it writes down what it is told."""
    (tmp_path / "wandb.py").write_text(BOARD)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    for name in ("a", "b"):
        run = tmp_path / name / "sft"
        run.mkdir(parents=True)
        (run / "predictions.jsonl").write_text("".join(json.dumps(p.record()) + "\n" for p in rows(30, "mmsd")))
        assert hba("score", run)[0] == 0
    (tmp_path / "a" / "sft" / "wandb.json").write_text('{"id": "of-the-training"}')
    for name in ("a", "b", "b"):
        code, *said = hba("export", "wandb", tmp_path / name / "sft", "--project", "emotions")
        assert code == 0, said
    first, second, again = (json.loads(line) for line in (tmp_path / "told.jsonl").read_text().splitlines())
    assert (first["id"], first["name"], first["resume"]) == ("of-the-training", "a/sft", "allow")
    assert second["id"] == again["id"] != first["id"] and second["name"] == "b/sft"


def test_few_rows_and_few_effective_groups_are_named(tmp_path: Path) -> None:
    sizes = [60, 40, 30, 20] + [3] * 31  # 35 speakers, worth 8.7
    speakers = [str(i) for i, size in enumerate(sizes) for _ in range(size)]
    grouped = [Prediction(**{**p.record(), "group": who}) for p, who in zip(rows(243), speakers, strict=True)]
    run = asked(run_folder(tmp_path / "run", [*grouped, *rows(4, "mmsd", 900)]), 247)
    metrics = scoring.score_run(run)
    assert metrics.datasets["cremad"].n_independent == pytest.approx(243**2 / sum(size**2 for size in sizes))
    assert metrics.scant == ["cremad", "mmsd"] and metrics.provenance.scoring.clusters.few == ("cremad", "mmsd")
    out = " ".join(hba("score", run)[1].split())
    assert "Too few independent rows for an interval to be trusted: cremad (8.71), mmsd (4)." in out
    assert "cremad (8.71)" in write_report(run).read_text(encoding="utf-8")


def test_a_metrics_file_of_an_older_version_is_read_with_what_predict_json_knows(tmp_path: Path) -> None:
    old = {
        "tasks": {"EMO": {"score": 0.5, "metric": "mean_weighted_accuracy", "n": 30, "datasets": ["cremad"],
                          "ci95": [0.4, 0.6], "chance": 0.5, "n_invalid": 1, "n_failed": 0, "n_quarantined": 0}},
        "datasets": {"cremad": {"n": 30, "n_invalid": 1, "micro_accuracy": 0.5, "chance": 0.5}},
        "aggregate": {"mean": {"score": 0.5, "ci95": [0.4, 0.6]}, "n": 30, "n_invalid": 1, "micro_f1": 0.5},
        "provenance": {"hba_version": "0.0.1", "split": "test", "synthetic": False, "scoring": {
            "resamples": 2000, "seed": 0, "published": False, "level": 0.95, "clusters": None}},
    }  # fmt: skip
    run = asked(tmp_path, 99, selection={"limit": 99})
    (run / "metrics.json").write_text(json.dumps(old))
    metrics = open_run(run).metrics
    assert metrics.tasks["EMO"].name == "emotion recognition" and metrics.datasets["cremad"].figures == {
        "micro_accuracy": 0.5
    }
    assert metrics.aggregate.rows == "30 of 99 rows" and metrics.provenance.scope == "test; the first 99 rows"
    assert metrics.record()["aggregate"]["micro_f1"] == 0.5
    (run / "metrics.json").write_text(json.dumps({**old, "aggregate": {"n": "many"}}))
    with pytest.raises(InputError, match=r"metrics\.json, aggregate.*n"):
        open_run(run).metrics  # noqa: B018
