"""Runs compared through their folders and through the command line: matching, refusals, flips, spread."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats
from typer.testing import CliRunner

from hba.cli import app
from hba.errors import InputError
from hba.evaluate.compare import MEAN, compare_predictions, compare_runs, compare_seeds, run_variance
from hba.evaluate.judge.items import Judgement, JudgementLog, answer_sha256
from hba.evaluate.predictions import Prediction, PredictionLog

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
    with pytest.raises(InputError, match="sample 'test/0' is not the same row in all runs"):
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


def test_failed_rows_have_a_column_in_every_comparison(tmp_path: Path) -> None:
    lost = [replace(p, output=None, answer=None, label=None, error="refused") for p in answered(1, 0.4)[:2]]
    a, b = folder(tmp_path / "a", answered(2, 0.9)), folder(tmp_path / "b", [*lost, *answered(1, 0.4)[2:]])
    task = "EMO" if lost[0].dataset == "cremad" else "SAR"
    found = json.loads(hba("compare", a, b, "--json")[1])["failed"]
    assert sum(sum(counts) for key, counts in found.items() if key != MEAN) == 2 and found[MEAN] == [0, 2]
    assert found[task][0] == 0 < found[task][1]
    pair, several = (a, b), (a, b, "vs", b, b)
    for arguments, columns, shown in ((pair, 60, "0/2"), (("--seeds", a, b), 80, "2"), (several, 80, "2/4")):
        out = hba("compare", *arguments, columns=columns)[1]
        mean = next(line for line in out.splitlines() if line.strip().startswith("mean "))
        assert "failed" in out and mean.split()[-1] == shown, out


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


# --- seeds against seeds ---------------------------------------------------------------------------------------------


def test_seeds_of_one_model_against_seeds_of_another(tmp_path: Path) -> None:
    a = [folder(tmp_path / f"a{seed}", answered(seed, 0.5)) for seed in range(3)]
    b = [folder(tmp_path / f"b{seed}", answered(50 + seed, 0.9)) for seed in range(4)]
    found = compare_seeds(a, b)
    spread = [run_variance(side) for side in (a, b)]
    for key, line in found.tasks.items():
        assert line.a == pytest.approx(spread[0].tasks[key].mean) and line.b == pytest.approx(spread[1].tasks[key].mean)
        assert line.sd_a == pytest.approx(spread[0].tasks[key].sd) and line.scores_b == spread[1].tasks[key].scores
        assert line.difference is not None and line.ci95 and line.ci95[0] < line.difference < line.ci95[1]
        assert line.se and line.se_rows and line.se >= line.se_rows
        assert line.p_holm is not None and line.p_holm < 0.05
    assert found.mean and found.mean.difference is not None and found.mean.difference > 0.15
    back = compare_seeds(b[::-1], a)  # whichever is named first, in whatever order
    for key, line in found.tasks.items():
        other = back.tasks[key]
        assert (other.p_value, other.se) == (pytest.approx(line.p_value), pytest.approx(line.se))
        assert other.ci95 == pytest.approx((-line.ci95[1], -line.ci95[0])) if line.ci95 else None
    for sides in ((a, b[:1]), (a[:1], b)):
        with pytest.raises(InputError, match="one run does not say how far seeds spread"):
            compare_seeds(*sides)


def test_where_rows_matter_little_it_is_the_test_of_welch_on_the_scores(tmp_path: Path) -> None:
    """10,000 free-form rows whose answers differ between runs by a seed's own skill."""

    def run(path: Path, share: float) -> Path:
        hand = random.Random(str(path))
        rows = [
            Prediction(
                id=f"test/{i}", dataset="siq2", task="social_qa", split="test", target="late", output="x",
                answer="late" if hand.random() < share else "early", label=None, error=None,
            )
            for i in range(10_000)
        ]  # fmt: skip
        return folder(path, rows)

    a = [run(tmp_path / f"a{i}", share) for i, share in enumerate((0.40, 0.55, 0.62))]
    b = [run(tmp_path / f"b{i}", share) for i, share in enumerate((0.60, 0.71, 0.80, 0.66))]
    line = compare_seeds(a, b, resamples=500).tasks["SOC"]
    theirs = scipy_stats.ttest_ind(line.scores_b, line.scores_a, equal_var=False)
    assert line.p_value == pytest.approx(theirs.pvalue, rel=0.02)
    assert line.ci95 == pytest.approx(tuple(theirs.confidence_interval()), abs=3e-3)
    assert line.freedom == pytest.approx(theirs.df, rel=0.02)


def test_the_standard_error_is_the_sum_of_its_parts(tmp_path: Path) -> None:
    """By the formula of docs/statistics.md, from the matrix of right answers, which a bootstrap never sees."""
    rng, size = np.random.default_rng(0), 300
    shares_KN = 1 / (1 + np.exp(-(rng.normal(0.5, 1.5, size) + rng.normal(0, 0.25, (7, 1)))))
    right_KN = rng.random((7, size)) < shares_KN
    runs = []
    for number, right in enumerate(right_KN):
        rows = [
            Prediction(
                id=f"test/{i}", dataset="siq2", task="social_qa", split="test", target="late", output="x",
                answer="late" if hit else "early", label=None, error=None,
            )
            for i, hit in enumerate(right)
        ]  # fmt: skip
        runs.append(folder(tmp_path / str(number), rows))
    line = compare_seeds(runs[:3], runs[3:], resamples=8000).tasks["SOC"]
    a_KN, b_KN = right_KN[:3].astype(float), right_KN[3:].astype(float)
    over_rows = (b_KN.mean(0) - a_KN.mean(0)).var(ddof=1) / size
    over_runs = sum(side.mean(1).var(ddof=1) / len(side) for side in (a_KN, b_KN))
    twice = sum((side.var(1).mean() - side.mean(0).var()) / size / (len(side) - 1) for side in (a_KN, b_KN))
    assert twice > 0.2 * over_rows and over_runs > 0.2 * over_rows  # every part counts
    assert line.se_rows == pytest.approx(np.sqrt(over_rows), rel=0.03)
    assert line.se == pytest.approx(np.sqrt(over_rows + over_runs - twice), rel=0.03)


def test_the_interval_over_seeds_and_rows_covers_what_it_promises() -> None:
    """Rows, seeds and what both do together, as logits of a right answer; the models do not differ."""
    from hba.evaluate import compare
    from hba.evaluate.metrics import encode

    covered, repeats, size = 0, 120, 150
    for repeat in range(repeats):
        rng = np.random.default_rng(repeat)
        easy_N = rng.normal(0.8, 1.5, size)
        shares_KN = 1 / (1 + np.exp(-(easy_N + rng.normal(0, 0.3, (6, 1)))))
        right_KN = rng.random((6, size)) < shares_KN
        rows = [encode(["y" if hit else "n" for hit in right], ["y"] * size, ["siq2"] * size) for right in right_KN]
        drawn = compare._drawn(rows, None, compare._by_cells, resamples=300, seed=repeat)
        low, high = compare._of_sides(drawn, rows[0], 3).ci95 or (1.0, 0.0)
        covered += low <= 0 <= high
    assert 0.9 <= covered / repeats <= 0.99


def test_seeds_against_seeds_on_the_command_line(tmp_path: Path) -> None:
    a = [folder(tmp_path / f"a{seed}", answered(seed, 0.5)) for seed in range(2)]
    b = [folder(tmp_path / f"b{seed}", answered(50 + seed, 0.9)) for seed in range(2)]
    code, out, _ = hba("compare", *a, "vs", *b, "--json", "--out", tmp_path / "table.tex")
    found = json.loads(out)
    assert (code, found["a"], found["b"], set(found["tasks"])) == (0, ["a0", "a1"], ["b0", "b1"], {"EMO", "SAR"})
    assert [row[0] for row in well_formed((tmp_path / "table.tex").read_text())] == ["task", "EMO", "SAR", "mean"]
    code, out, _ = hba("compare", *a, "vs", *b)
    assert code == 0 and "B (2 runs) minus A (2 runs): 120 common rows" in out and "sd of A" in out
    assert json.loads(hba("compare", a[0], "vs", b[0], "--json")[1])["paired"]
    for wrong in ((*a, "vs"), (a[0], "vs", b[0], "vs", b[1])):
        assert "`vs` stands between" in str(hba("compare", *wrong)[2])
    assert "A1 A2 vs B1 B2" in str(hba("compare", *a, *b)[2])


def test_the_spread_of_22_runs_and_more_is_over_all_their_rows(tmp_path: Path) -> None:
    """The joint number of the answers of 22 runs does not fit into 64 bits."""
    runs = [folder(tmp_path / str(seed), answered(seed, 0.7, 60)) for seed in range(24)]
    few, many = run_variance(runs[:12]).tasks, run_variance(runs).tasks
    for key, line in many.items():
        assert line.ci95_rows and few[key].ci95_rows
        low, high = line.ci95_rows
        wide = few[key].ci95_rows[1] - few[key].ci95_rows[0]
        assert low < line.mean < high and 0.5 * wide < high - low < wide  # of 24 runs, not of 12


# --- what may not pass for a comparison ------------------------------------------------------------------------------


def failing(rows: list[Prediction], dataset: str, count: int) -> list[Prediction]:
    """`rows` of which the first `count` of a dataset ended in an error."""
    found = []
    for row in rows:
        fails = row.dataset == dataset and count > 0
        count -= fails
        nothing = {"output": None, "answer": None, "label": None, "error": "refused"}
        found.append(replace(row, **nothing) if fails else row)
    return found


def test_a_task_of_which_many_rows_failed_is_not_compared_and_says_so(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", answered(1, 0.6))
    b = folder(tmp_path / "b", failing(answered(2, 0.6), "mmsd", 5))
    found = compare_runs(a, b).paired
    line = found.tasks["SAR"]
    assert (line.a, line.b, line.difference, line.p_value, line.p_holm) == (None,) * 5
    assert "of mmsd failed in a run" in str(line.note)
    assert found.mean and found.mean.difference == found.tasks["EMO"].difference is not None
    assert "SAR is not compared" in hba("compare", a, b)[1]
    assert run_variance([a, b]).tasks["SAR"].mean is None
    seeds = compare_seeds([a, a], [b, b])
    assert seeds.tasks["SAR"].difference is None and seeds.mean and seeds.mean.difference is not None
    assert run_variance([a, b]).mean.mean is not None
    lost = folder(tmp_path / "lost", failing(answered(3, 0.6), "mmsd", 6))  # of all rows 5 % exactly
    assert compare_runs(a, lost).paired.mean.difference is not None
    more = folder(tmp_path / "more", failing(answered(3, 0.6), "mmsd", 7))
    assert compare_runs(a, more).paired.mean.difference is None
    assert "the mean is not compared: 7 of 120 rows failed in a run." in " ".join(hba("compare", a, more)[1].split())
    few = folder(tmp_path / "c", failing(answered(2, 0.6), "mmsd", 1))
    assert compare_runs(a, few).paired.tasks["SAR"].difference is not None


def test_a_comparison_of_parts_names_the_rows_that_were_asked_for(tmp_path: Path) -> None:
    runs = [folder(tmp_path / name, answered(seed, 0.6, 40)) for seed, name in enumerate(("a", "b"))]
    for run in runs:
        (run / "predict.json").write_text(
            json.dumps({"data": {"fingerprint": "same", "rows": 1012}, "skipped": {"siq2": 12}})
        )
    assert compare_runs(*runs).num_asked == 1000
    assert "40 common rows of 1,000 asked" in hba("compare", *runs, columns=200)[1]
    assert "40 common rows of 1,000 asked" in hba("compare", "--seeds", *runs, columns=200)[1]


def test_a_task_that_is_judged_in_part_is_compared_by_exact_match_throughout(tmp_path: Path) -> None:
    """siq2 judged to the last answer, another dataset of the task not: verdicts and exact matches are no one metric."""
    (tmp_path / "taxonomy.yaml").write_text(
        "tasks: {SOC: {datasets: [mine], metric: llm_judge_accuracy}}\ndatasets: {mine: {domain: qa}}\n"
    )
    runs = []
    for name in ("a", "b"):
        run = judged(tmp_path / name, [True] * 12)
        (run / "taxonomy.yaml").write_text((tmp_path / "taxonomy.yaml").read_text())
        extra = Prediction(
            id="mine/1", dataset="mine", task="social_qa", split="test", target="x", output="x", answer="x", label=None,
            error=None,
        )  # fmt: skip
        with (run / "predictions.jsonl").open("a") as file:
            file.write(json.dumps(extra.record()) + "\n")
        runs.append(run)
    found = compare_runs(*runs).paired
    assert found.tasks["SOC"].metric == "exact_match" and found.mean is None
    assert found.tasks["SOC"].a == pytest.approx((0 + 1) / 2)
