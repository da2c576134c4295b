"""Runs compared through their folders and through the command line: matching, refusals, flips, spread."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hba.cli import app
from hba.errors import InputError
from hba.evaluate.judge.items import answer_sha256
from hba.evaluate.judge.judgements import Judgement, JudgementLog
from hba.evaluate.predictions import Prediction, PredictionLog
from hba.evaluate.runs import compare_predictions, compare_runs
from hba.evaluate.variance import run_variance

LABELS = {"mmsd": ("sarcasm", "not sarcasm"), "cremad": ("anger", "sad", "happy")}


def answered(seed: int, skill: float, count: int = 120) -> list[Prediction]:
    """The same rows for every seed and skill, answered with another hand."""
    truth, hand = random.Random(0), random.Random(seed)
    found = []
    for i in range(count):
        dataset = truth.choice(list(LABELS))
        target = truth.choice(LABELS[dataset])
        label = target if hand.random() < skill else hand.choice(LABELS[dataset])
        found.append(
            Prediction(
                id=f"test/{i}", dataset=dataset, task="x_cls", split="test", target=target, output=label,
                answer=label, label=label, error=None,
            )
        )  # fmt: skip
    return found


def folder(path: Path, predictions: list[Prediction], fingerprint: str | None = "same") -> Path:
    path.mkdir()
    with PredictionLog(path / "predictions.jsonl") as log:
        for prediction in predictions:
            log.append(prediction)
    if fingerprint:
        (path / "predict.json").write_text(json.dumps({"data": {"fingerprint": fingerprint}}), encoding="utf-8")
    return path


def hba(*arguments: Any, columns: int = 100) -> tuple[int, str, BaseException | None]:
    result = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": str(columns)})
    return result.exit_code, result.stdout, result.exception


def test_a_better_run_is_found_better_whatever_the_order_of_its_lines(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", answered(1, 0.4))
    b = folder(tmp_path / "b", random.Random(1).sample(answered(2, 0.95), 120))
    found = compare_runs(a, b)
    assert found.same_data is True
    assert (found.num_rows, found.left_out, found.clustered_by) == (120, [0, 0], None)
    for line in found.paired.tasks.values():
        assert line.difference is not None and line.difference > 0.2
        assert line.p_holm is not None and line.p_holm < 0.05
    gained = sum(line.gained for line in found.paired.tasks.values())
    assert sum(flip.gained for flip in found.flips) == gained
    assert len(found.flips) == gained + sum(line.lost for line in found.paired.tasks.values())
    direct = compare_predictions(answered(1, 0.4), answered(2, 0.95))
    assert direct.tasks["SAR"].difference == pytest.approx(found.paired.tasks["SAR"].difference)


def test_other_data_are_refused_unless_told(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", answered(1, 0.5))
    b = folder(tmp_path / "b", answered(2, 0.5, 100), fingerprint="other")
    with pytest.raises(InputError, match=r"different data .*a: same, b: other.*--allow-other-data"):
        compare_runs(a, b)
    found = compare_runs(a, b, allow_other_data=True)
    assert (found.num_rows, found.left_out, found.same_data) == (100, [20, 0], False)
    unknown = folder(tmp_path / "c", answered(3, 0.5), fingerprint=None)
    assert compare_runs(a, unknown).same_data is None


def test_an_id_that_means_another_row_is_refused(tmp_path: Path) -> None:
    rows = answered(1, 0.5)
    turned = {"sarcasm": "not sarcasm", "not sarcasm": "sarcasm", "anger": "sad", "sad": "happy", "happy": "anger"}
    other = [replace(p, target=turned[p.target]) for p in rows]
    with pytest.raises(InputError, match="sample 'test/0' is another row"):
        compare_runs(folder(tmp_path / "a", rows), folder(tmp_path / "b", other))
    with pytest.raises(InputError, match="no sample was answered by all"):
        renamed = [replace(p, id=f"other/{p.id}") for p in rows]
        compare_runs(tmp_path / "a", folder(tmp_path / "c", renamed))


def test_rows_of_one_group_are_drawn_together(tmp_path: Path) -> None:
    grouped = [[replace(p, group=f"speaker {i // 20}") for i, p in enumerate(answered(s, 0.6))] for s in (1, 2)]
    found = compare_runs(folder(tmp_path / "a", grouped[0]), folder(tmp_path / "b", grouped[1]))
    assert found.clustered_by == "group"


def test_spread_over_seeds_is_that_of_the_scores(tmp_path: Path) -> None:
    runs = [folder(tmp_path / str(seed), answered(seed, 0.7)) for seed in range(4)]
    found = run_variance(runs)
    line = found.tasks["SAR"]
    known = [score for score in line.scores if score is not None]
    mean = sum(known) / 4
    assert line.mean == pytest.approx(mean)
    assert line.sd == pytest.approx((sum((score - mean) ** 2 for score in known) / 3) ** 0.5)
    low, high = line.ci95_runs or (1, 0)
    assert high - low == pytest.approx(2 * 3.182446 * line.sd / 2, rel=1e-5)  # t of three degrees of freedom
    assert line.ci95_rows and line.ci95_rows[0] < mean < line.ci95_rows[1]
    assert found.mean and 0 < found.mean.agreement < 1
    same = run_variance([runs[0], folder(tmp_path / "twin", answered(0, 0.7))])
    assert same.mean and (same.mean.sd, same.mean.agreement) == (0.0, 1.0)
    with pytest.raises(InputError, match="one run has no spread"):
        run_variance(runs[:1])


def test_compare_on_the_command_line(tmp_path: Path) -> None:
    a, b = folder(tmp_path / "a", answered(1, 0.4)), folder(tmp_path / "b", answered(2, 0.95))
    code, out, _ = hba("compare", a, b, "--json")
    found = json.loads(out)
    assert code == 0
    assert set(found["paired"]["tasks"]) == {"EMO", "SAR"}
    assert found["flips"][0].keys() == {"id", "dataset", "target", "a", "b", "gained"}
    code, out, _ = hba("compare", a, b, "--flips", "3")
    assert code == 0
    assert "120 common rows" in out and "rows changed sides" in out and "SAR" in out
    code, out, _ = hba("compare", "--seeds", a, b, "--json")
    assert json.loads(out)["runs"] == ["a", "b"]
    assert "same answer" in hba("compare", "--seeds", a, b)[1]
    assert isinstance(hba("compare", a)[2], InputError)


def test_compare_writes_tables_for_papers_and_pages(tmp_path: Path) -> None:
    a, b = folder(tmp_path / "run_a&1", answered(1, 0.4)), folder(tmp_path / "50%_<b>", answered(2, 0.95))
    for more in ([], ["--seeds"]):
        files = tmp_path / "table.tex", tmp_path / "table.md"
        code, out, _ = hba("compare", a, b, *more, "--json", "--out", files[0], "--out", files[1])
        assert code == 0
        found = json.loads(out)
        tasks = found["tasks"] if more else found["paired"]["tasks"]
        latex, page = (path.read_text(encoding="utf-8") for path in files)
        rows = well_formed(latex)
        assert [row[0] for row in rows] == ["task", *tasks, "mean"]
        assert r"50\%\_\textless{}b\textgreater{}" in latex and r"run\_a\&1" in latex
        lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
        assert [line[0] for line in lines] == ["task", *tasks, "mean"]
        assert r"50%\_\<b\>" in page
        if not more:
            line = tasks["EMO"]
            shown = [f"{line['a']:.3f}", f"{line['b']:.3f}", rf"\textbf{{+{line['difference']:.3f}}}"]
            assert rows[1][1:4] == shown and rows[1][4] == "{:.3f}--{:.3f}".format(*line["ci95"])
            assert lines[1][3] == f"**+{line['difference']:.3f}**"
    assert "table.tex." in hba("compare", a, b, "--out", files[0], columns=300)[1]
    error = hba("compare", a, b, "--out", tmp_path / "table.csv")[2]
    assert isinstance(error, InputError) and "no table is written as '.csv'" in str(error)


def well_formed(latex: str) -> list[list[str]]:
    """The rows of the one tabular, after checks of what makes LaTeX stop: environments, braces, bare signs, columns."""
    latex = re.sub(r"^%.*\n", "", latex)
    begun = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", latex):
        assert kind == "begin" or begun.pop() == name
        begun += [name] if kind == "begin" else []
    assert begun == []
    plain = re.sub(r"\\[&%$#_{}]", "", latex)  # without what is escaped
    depth = [plain[:end].count("{") - plain[:end].count("}") for end in range(len(plain) + 1)]
    assert min(depth) == depth[-1] == 0
    assert plain.count("$") % 2 == 0
    assert not re.search(r"[_%#<>|~]", plain)
    assert plain.count(r"\caption{") == 1
    columns = re.search(r"\\begin\{tabular\}\{([lr]+)\}", latex)
    body = latex.partition(r"\toprule")[2].partition(r"\bottomrule")[0]
    rows = [line.removesuffix(r" \\").split(" & ") for line in body.splitlines() if line.endswith(r"\\")]
    assert columns and {len(row) for row in rows} == {len(columns[1])}
    assert r"&" not in plain.partition(r"\begin{tabular}")[0]
    return rows


def test_no_figure_is_cut_on_a_narrow_terminal(tmp_path: Path) -> None:
    a, b = judged(tmp_path / "a", [True] * 8), judged(tmp_path / "b", [False] * 8)
    for left in (a, b):
        (left / "judgements.jsonl").unlink()  # by exact match: the longest name of a task
    wide, narrow = (hba("compare", a, b, columns=columns)[1] for columns in (200, 60))
    assert "(exact match)" in wide and "(exact match)" not in narrow and "…" not in narrow
    assert sorted(re.findall(r"[-+]?\d[\d./–-]*", narrow)) == sorted(re.findall(r"[-+]?\d[\d./–-]*", wide))


def judged(path: Path, right: list[bool], judge: str = "gpt", url: str = "a") -> Path:
    """A run of free-form answers, none of them an exact match, with a judge's verdicts."""
    rows = [
        Prediction(
            id=f"test/{i}", dataset="siq2", task="social_qa", split="test", target="because she is late", output="x",
            answer=f"answer {i}", label=None, error=None,
        )
        for i in range(len(right))
    ]  # fmt: skip
    run = folder(path, rows)
    with JudgementLog(run, {"model": judge, "base_url": url}) as log:
        for row, hit in zip(rows, right, strict=True):
            sha, said = answer_sha256(row.target, row.answer or ""), {"reason": "", "error": None, "attempts": 1}
            verdict = Judgement(
                id=row.id, dataset="siq2", answer_sha256=sha, correct=hit, tokens_in=1, tokens_out=1, **said
            )
            log.append(verdict)
    return run


def test_verdicts_of_one_judge_are_compared_and_those_of_two_are_not(tmp_path: Path) -> None:
    a = judged(tmp_path / "a", [True] * 5 + [False] * 15)
    b = judged(tmp_path / "b", [True] * 15 + [False] * 5, url="elsewhere")
    line = compare_runs(a, b).paired.tasks["SOC"]
    assert (line.metric, line.test, line.gained, line.lost) == ("llm_judge_accuracy", "mcnemar", 10, 0)
    assert line.difference == pytest.approx(0.5)
    other = judged(tmp_path / "c", [True] * 20, judge="claude")
    assert compare_runs(a, other).paired.tasks["SOC"].metric == "exact_match"
    found = run_variance([a, b])
    assert found.mean and found.mean.scores == [0.25, 0.75]
