"""Verdicts in metrics.json: every row counts, nothing is scored before the last verdict is there."""

import json
from dataclasses import asdict

import pytest
from free_form_run import make_run

from hba.errors import InputError
from hba.evaluate import score as scoring
from hba.evaluate.judge.items import Judgement, answer_sha256
from hba.evaluate.results import parse_metrics
from hba.report.page import write_report
from hba.report.tables import metrics_table


def score_run(*arguments, **options):
    """The metrics of a run as metrics.json has them."""
    return scoring.score_run(*arguments, **options).record()


def judge(run, verdict):
    """Write the judgements of a judge who gives `verdict(prediction)` on every answer; "skip" writes no line."""
    lines = []
    for line in (run / "predictions.jsonl").read_text().splitlines():
        p = json.loads(line)
        correct = verdict(p)
        if p["answer"] and correct != "skip":
            judgement = Judgement(
                id=p["id"], dataset=p["dataset"], answer_sha256=answer_sha256(p["target"], p["answer"]),
                correct=correct, reason=None, error="e" if correct is None else None, attempts=1, tokens_in=1,
                tokens_out=1,
            )  # fmt: skip
            lines.append(json.dumps(asdict(judgement)) + "\n")
    (run / "judgements.jsonl").write_text("".join(lines[::-1]))  # in another order than the predictions
    (run / "judge.json").write_text('{"model": "m"}')


def test_judged_tasks_have_scores_intervals_and_the_mean(tmp_path):
    shares = make_run(tmp_path, 300)
    run = tmp_path / "run"
    alone = score_run(run)
    assert alone["tasks"]["SOC"]["score"] is None and alone["aggregate"]["mean"]["score"] is None
    judge(run, lambda p: p["answer"].lower() == p["target"] and p["dataset"] != "mimeqa")
    found = score_run(run)
    assert found["datasets"]["siq2"]["llm_judge_accuracy"] == shares["siq2"] == found["tasks"]["SOC"]["score"]
    assert found["datasets"]["mimeqa"]["llm_judge_accuracy"] == 0.0 != found["datasets"]["mimeqa"]["exact_match"]
    low, high = found["tasks"]["SOC"]["ci95"]
    assert low < shares["siq2"] < high and high - low == pytest.approx(2 * 1.96 * (0.58 * 0.42 / 100) ** 0.5, rel=0.15)
    assert found["aggregate"]["mean"]["score"] == pytest.approx(2 * 0.58 / 3)
    assert found["provenance"]["judge"] == {"model": "m"}
    # An empty answer is wrong without a judge, and counts.
    assert found["datasets"]["siq2"]["n"] == 100 and found["datasets"]["siq2"]["n_judged"] == 100


@pytest.mark.parametrize("missing", [None, "skip"])
def test_an_unjudged_row_leaves_bounds_and_no_score(tmp_path, missing):
    make_run(tmp_path, 300)
    run = tmp_path / "run"
    judge(run, lambda p: missing if p["id"] in ("test/1", "test/4") else p["answer"].lower() == p["target"])
    found = score_run(run)
    entry, task = found["datasets"]["siq2"], found["tasks"]["SOC"]
    assert entry["llm_judge_accuracy"] is None and (entry["n_judged"], entry["n_unjudged"]) == (98, 2)
    assert entry["llm_judge_accuracy_bounds"] == [0.57, 0.59]
    assert task["score"] is None and task["ci95"] is None and task["n"] == 100
    assert "2 of 100 answers are unjudged; between 0.570 and 0.590" in task["note"]
    assert found["tasks"]["INT"]["score"] == 0.58 and found["aggregate"]["mean"]["score"] == pytest.approx(0.58)
    assert any("unjudged" in str(name) for name, *_ in metrics_table(parse_metrics(found, where="m")).rows)
    assert score_run(run, published=True)["datasets"]["siq2"]["llm_judge_accuracy"] == 57 / 98


def test_verdicts_on_other_answers_are_refused(tmp_path):
    make_run(tmp_path, 30)
    run = tmp_path / "run"
    judge(run, lambda p: True)
    path = run / "predictions.jsonl"
    path.write_text(path.read_text().replace("something else 2", "other"))
    with pytest.raises(InputError, match="the verdict on 'test/3' is about another answer"):
        score_run(run)


def test_the_report_shows_verdicts_with_their_reasons_and_obeys_no_answer(tmp_path):
    make_run(tmp_path, 60)
    run = tmp_path / "run"
    path = run / "predictions.jsonl"
    attack = "<script>alert(1)</script>"
    path.write_text(path.read_text().replace("something else 2", attack))
    judge(run, lambda p: None if p["id"] == "test/1" else p["answer"].lower() == p["target"])
    metrics = score_run(run)
    assert metrics["datasets"]["intentqa"]["llm_judge_accuracy"] is not None
    page = write_report(run).read_text()
    section = page[page.index('<section id="judged">') : page.index('<section id="quarantine">')]
    right = sum(p["answer"].lower() == p["target"] for p in map(json.loads, path.read_text().splitlines())) - 1
    assert f"1 unjudged, {58 - right} incorrect, {right} correct" in section
    assert section.index("test/1<") < section.index("incorrect</td>") < section.index(">correct</td>")
    assert attack not in page and "&lt;script&gt;" in section
    assert "<dt>Judge</dt>" in page.replace("\n", "") or ">Judge<" in page


def of_two_datasets(tmp_path):
    """A run whose task SOC has two datasets: siq2, and one of the user's own."""
    make_run(tmp_path, 90)
    run = tmp_path / "run"
    (run / "taxonomy.yaml").write_text(
        "tasks: {SOC: {datasets: [mine], metric: llm_judge_accuracy}}\ndatasets: {mine: {domain: qa}}\n"
    )
    path = run / "predictions.jsonl"
    path.write_text(path.read_text().replace('"mimeqa"', '"mine"'))
    return run


def test_a_task_that_is_judged_in_part_has_bounds_and_no_interval_and_is_in_no_mean(tmp_path):
    run = of_two_datasets(tmp_path)
    judge(run, lambda p: None if p["dataset"] == "mine" and p["id"] == "test/3" else p["answer"].lower() == p["target"])
    found = score_run(run)
    task, intent = found["tasks"]["SOC"], found["tasks"]["INT"]
    assert (task["score"], task["ci95"], task["chance"]) == (None, None, None) and "1 of 60 answers" in task["note"]
    assert found["datasets"]["siq2"]["llm_judge_accuracy"] is not None  # judged to the last answer, and no score alone
    mean = found["aggregate"]["mean"]
    assert (mean["score"], mean["ci95"], mean["chance"]) == (intent["score"], intent["ci95"], intent["chance"])
    judge(run, lambda p: p["answer"].lower() == p["target"])
    whole = score_run(run)
    assert whole["tasks"]["SOC"]["score"] is not None and whole["tasks"]["SOC"]["ci95"] is not None
    assert whole["aggregate"]["mean"]["ci95"] != intent["ci95"]


def test_a_published_score_without_an_interval_leaves_the_mean_without_one(tmp_path):
    """The released script leaves unjudged rows out: a score, over rows that the interval does not know."""
    run = of_two_datasets(tmp_path)
    judge(run, lambda p: None if p["dataset"] == "mine" and p["id"] == "test/3" else p["answer"].lower() == p["target"])
    found = score_run(run, published=True)
    assert found["tasks"]["SOC"]["score"] is not None and found["tasks"]["SOC"]["ci95"] is None
    assert found["aggregate"]["mean"]["score"] is not None and found["aggregate"]["mean"]["ci95"] is None


def test_the_mean_of_a_slice_is_over_the_tasks_of_the_mean(tmp_path):
    make_run(tmp_path, 90)
    run = tmp_path / "run"
    judge(run, lambda p: p["answer"].lower() == p["target"])
    whole = score_run(run, by=["split"])
    (part,) = whole["aggregate"]["breakdowns"]["split"]["slices"].values()
    assert part["mean"] == pytest.approx(whole["aggregate"]["mean"]["score"])
    assert part["tasks"]["SOC"]["ci95"] == whole["tasks"]["SOC"]["ci95"]


def test_another_reading_has_a_mean_over_the_tasks_of_the_mean_or_none(tmp_path):
    """A judge has seen the answers of one reading: the mean without the judged tasks is none beside the run's own."""
    make_run(tmp_path, 60)
    run = tmp_path / "run"
    row = {"dataset": "mmsd", "task": "x_cls", "split": "test", "target": "sarcasm", "output": "I say sarcasm.",
           "answer": "sarcasm", "label": "sarcasm", "error": None}  # fmt: skip
    with (run / "predictions.jsonl").open("a") as file:
        file.writelines(json.dumps({"id": f"labelled/{i}", **row}) + "\n" for i in range(20))
    alone = score_run(run)
    assert alone["aggregate"]["readings"]["published"]["mean"] == 0.0 and alone["aggregate"]["mean"]["score"] == 1.0
    judge(run, lambda p: p["answer"].lower() == p["target"])
    judged = score_run(run)["aggregate"]
    assert judged["mean"]["score"] < 1.0 and judged["readings"]["published"]["mean"] is None
