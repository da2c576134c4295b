"""Leaderboards through real run folders and the command line: who is ranked, who is not, and that it is said."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hba.cli import app
from hba.errors import InputError
from hba.evaluate.leaderboard import build_leaderboard, published_entries
from hba.report.comparison import write_leaderboard
from hba.taxonomy import TASKS

NEXT_BEST = {"SEN": 0.7, "EMO": 0.8}


def scored(folder: Path, scores: dict[str, float | None], *, n: int = 100, quarantined: int = 0, **said: Any) -> Path:
    folder.mkdir(parents=True)
    tasks = {
        key: {
            "score": score, "metric": "weighted_f1", "ci95": None if score is None else [score - 0.1, score + 0.1],
            "n": n, "n_quarantined": quarantined if key == "SEN" else 0, "datasets": TASKS[key].datasets,
        }
        for key, score in scores.items()
    }  # fmt: skip
    counts = {"n": n * len(tasks), "n_quarantined": quarantined}
    release = {"split": "test", "asked_split": "test", "data_rows": 18204}
    provenance = {"synthetic": False, "data_fingerprint": "abc", **release, **said}
    metrics = {"tasks": tasks, "datasets": {}, "aggregate": {"mean": {"score": 0.5}, **counts}}
    (folder / "metrics.json").write_text(json.dumps({**metrics, "provenance": provenance}), encoding="utf-8")
    return folder


def hba(*arguments: Any) -> tuple[int, str, BaseException | None]:
    result = CliRunner().invoke(app, ["leaderboard", *map(str, arguments)], env={"COLUMNS": "80"})
    return result.exit_code, result.stdout, result.exception


def test_mean_ranks_are_those_of_the_definition(tmp_path: Path) -> None:
    runs = [
        scored(tmp_path / "a", {"SEN": 0.9, "EMO": 0.6, "SOC": None}),
        scored(tmp_path / "b", {"SEN": 0.8, "EMO": 0.6, "SOC": None}),
        scored(tmp_path / "c", {"SEN": 0.7, "EMO": 0.9, "SOC": 0.5}),
    ]
    board = build_leaderboard(runs, tables=[])
    assert board.ranked_tasks == ["SEN", "EMO"]
    assert {e.name: e.mean_rank for e in board.entries} == {"a": 1.75, "b": 2.25, "c": 2.0}
    assert [(e.name, e.rank) for e in board.entries] == [("a", 1), ("c", 2), ("b", 3)]
    assert board.tasks == ["SEN", "EMO", "SOC"]
    only = build_leaderboard(runs, tables=[], tasks=["SOC"])
    assert [(e.name, e.rank) for e in only.entries] == [("c", 1), ("a", None), ("b", None)]
    with pytest.raises(InputError, match="no run has a score for task 'SOQ'"):
        build_leaderboard(runs, tasks=["SOQ"])


def test_published_rows_stand_beside_real_runs_and_are_marked(tmp_path: Path) -> None:
    board = build_leaderboard([scored(tmp_path / "mine", {"SEN": 0.77, "EMO": 0.7})])
    names = [e.name for e in board.entries if e.published]
    assert "OmniSapiens-7B BAM" in names and "OmniSapiens-7B 2.0 (HARPO)" in names
    assert len(names) == 7  # Qwen, HumanOmni, BAM and RL are in both tables, with the same figures
    ranked = {e.name: e.rank for e in board.entries}
    assert ranked["mine"] == ranked["OmniSapiens-7B BAM"] == 1  # second and first, first and second
    assert ranked["OmniSapiens-7B 2.0 (HARPO)"] is None  # no figure for SEN
    for suffix in (".html", ".md", ".tex", ".csv"):
        path = tmp_path / f"board{suffix}"
        write_leaderboard(board, path)
        text = path.read_text(encoding="utf-8")
        assert "arXiv 2510.04899" in text
        assert "OmniSapiens-7B BAM †" in text or "$^\\dagger$" in text or ",True,arXiv" in text


def test_all_published_figures_are_scores() -> None:
    found = published_entries(["hba_iclr2026", "omnisapiens2_icml2026", "rl_algorithms"])
    assert all(0 < score <= 1 for entry in found for score in entry.scores.values())
    harpo = next(entry for entry in found if entry.name == "OmniSapiens-7B 2.0 (HARPO)")
    assert harpo.scores["EMO"] == pytest.approx(0.7655) and "mean_rank" not in harpo.scores
    with pytest.raises(InputError, match="no published table 'hba_iclr'"):
        published_entries(["hba_iclr"])


def test_synthetic_runs_are_never_ranked_beside_published_rows(tmp_path: Path) -> None:
    for name, synthetic in (("s", True), ("unknown", None)):
        board = build_leaderboard([scored(tmp_path / name, NEXT_BEST, synthetic=synthetic)])
        assert [e.rank for e in board.entries] == [1] + [None] * 7
        assert board.warnings
        assert all(e.notes == ("other data: not ranked",) for e in board.entries if e.published)
    code, out, _ = hba(tmp_path / "s")
    assert code == 0 and "Synthetic data" in out


def test_runs_on_different_data_or_rows_are_refused_unless_told_and_then_marked(tmp_path: Path) -> None:
    a = scored(tmp_path / "a", NEXT_BEST)
    other, fewer = scored(tmp_path / "b", NEXT_BEST, data_fingerprint="xyz"), scored(tmp_path / "c", NEXT_BEST, n=50)
    with pytest.raises(InputError, match=r"different data \(fingerprints a: abc, b: xyz\).*--allow-other-data"):
        build_leaderboard([a, other])
    with pytest.raises(InputError, match="SEN was scored on different rows"):
        build_leaderboard([a, fewer])
    board = build_leaderboard([a, other], allow_other_data=True)
    assert "Not the same evidence" in board.warnings[0]


def test_scores_of_two_judges_are_not_ranked_in_silence(tmp_path: Path) -> None:
    runs = [scored(tmp_path / name, {"SOC": 0.5}, judge={"model": name}) for name in ("gpt", "claude")]
    for run in runs:
        metrics = json.loads((run / "metrics.json").read_text())
        metrics["tasks"]["SOC"]["metric"] = "llm_judge_accuracy"
        (run / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(InputError, match=r"SOC graded by different judges \(gpt: gpt, claude: claude\)"):
        build_leaderboard(runs)
    board = build_leaderboard(runs, tables=[], allow_other_data=True)
    assert board.entries[0].notes[0].startswith("judge: ")


def test_a_run_with_many_quarantined_samples_is_shown_and_not_ranked(tmp_path: Path) -> None:
    few = scored(tmp_path / "few", NEXT_BEST, n=999, quarantined=1)
    many = scored(tmp_path / "many", {"SEN": 0.99, "EMO": 0.99}, n=950, quarantined=50)
    options = {"tables": [], "allow_other_data": True}
    entries = {e.name: e for e in build_leaderboard([few, many], **options).entries}
    assert (entries["few"].rank, entries["many"].rank) == (1, None)
    assert entries["many"].notes == ("2.6% of the samples quarantined: not ranked",)
    assert entries["few"].notes == ("1 sample quarantined",)
    raised = {e.name: e.rank for e in build_leaderboard([few, many], max_quarantined=0.1, **options).entries}
    assert raised["many"] == 1


def test_names_from_data_break_no_format(tmp_path: Path) -> None:
    evil = scored(tmp_path / "a|b_<script>&%", NEXT_BEST, model="=cmd()")
    board = build_leaderboard([evil], tables=[])
    written = {}
    for suffix in (".html", ".md", ".tex", ".csv"):
        write_leaderboard(board, tmp_path / f"x{suffix}")
        written[suffix] = (tmp_path / f"x{suffix}").read_text(encoding="utf-8")
    assert "<script>" not in written[".html"]
    assert "a\\|b\\_\\<script" in written[".md"]
    assert r"a\textbar{}b\_\textless{}script\textgreater{}\&\%" in written[".tex"]
    assert r"\caption{Leaderboard" in written[".tex"] and r"\end{table}" in written[".tex"]
    rows = list(csv.DictReader(written[".csv"].splitlines()))
    assert rows[0]["source"] == "'=cmd()" and rows[0]["SEN"] == "0.7" and rows[0]["SEN_low"]
    with pytest.raises(InputError, match=r"no table is written as '\.pdf'"):
        write_leaderboard(board, tmp_path / "x.pdf")


def test_the_command_prints_writes_and_gives_json(tmp_path: Path) -> None:
    runs = scored(tmp_path / "one" / "sft", NEXT_BEST), scored(tmp_path / "two" / "sft", {"SEN": 0.9, "EMO": 0.9})
    code, out, _ = hba(*runs, "--published", "none", "--out", tmp_path / "b.md", "--json")
    found = json.loads(out)
    assert code == 0
    assert [entry["name"] for entry in found["entries"]] == ["two/sft", "one/sft"]
    assert "| 1 | two/sft |" in (tmp_path / "b.md").read_text()
    code, out, _ = hba(*runs, "--tasks", "EMO")
    assert code == 0 and "ranked over EMO" in out and "…" not in out
    assert isinstance(hba(tmp_path)[2], InputError)


# --- what stands apart -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"asked_split": "train", "split": "train"}, "rows: train"),
        ({"selection": {"limit": 20}}, "rows: test; the first 20 rows"),
        ({"selection": {"datasets": ["tess"]}}, "rows: test; only tess"),
        ({"asked_split": "test[:100]"}, "rows: test[:100]"),
        ({"data_rows": 210}, "210 rows were asked for (published: 18,204)"),
        ({"data_rows": None}, "does not say how many rows it was asked for (published: 18,204)"),
    ],
)
def test_published_rows_are_ranked_with_runs_on_their_rows_alone(
    tmp_path: Path, said: dict[str, Any], reason: str
) -> None:
    run = scored(tmp_path / "mine", NEXT_BEST, **said)
    board = build_leaderboard([run])
    assert [e.rank for e in board.entries] == [1] + [None] * 7
    assert f"measured on something else: {reason}." in board.warnings[0]
    for suffix in (".html", ".md", ".tex"):
        write_leaderboard(board, tmp_path / f"board{suffix}")
        text = (tmp_path / f"board{suffix}").read_text(encoding="utf-8").partition("<footer>")[0]
        bold = re.findall(r"<b>([^<]*)</b>|\*\*([^*]*)\*\*|\\textbf\{([^}]*)\}", text)
        assert {"".join(found)[:5] for found in bold} == {"0.700", "0.800"}  # of the run, which is ranked; nothing else


def test_other_datasets_and_another_judge_keep_published_rows_apart(tmp_path: Path) -> None:
    made_up = scored(tmp_path / "clips", NEXT_BEST)
    metrics = json.loads((made_up / "metrics.json").read_text())
    metrics["tasks"]["EMO"]["datasets"] = ["mine"]
    (made_up / "metrics.json").write_text(json.dumps(metrics))
    assert "other datasets in EMO." in build_leaderboard([made_up]).warnings[0]
    assert build_leaderboard([made_up], tasks=["SEN"]).entries[0].published  # on SEN alone they are comparable
    judged = scored(tmp_path / "judged", {**NEXT_BEST, "SOC": 0.9}, judge={"model": "claude"})
    board = build_leaderboard([judged])
    assert "SOC judged by claude (published: gpt-5-nano)" in board.warnings[0]
    assert {e.rank for e in board.entries if e.published} == {None}
    ranked = build_leaderboard([judged], tasks=["SEN", "EMO"])
    assert ranked.warnings == [] and any(e.rank for e in ranked.entries if e.published)
    same = scored(tmp_path / "same", {**NEXT_BEST, "SOC": 0.9}, judge={"model": "gpt-5-nano-2025-08-07"})
    assert build_leaderboard([same]).warnings == []


def test_a_reason_that_is_one_runs_names_it(tmp_path: Path) -> None:
    runs = [scored(tmp_path / "a", NEXT_BEST), scored(tmp_path / "b", NEXT_BEST, data_rows=99)]
    assert "99 rows were asked for (published: 18,204) (b)." in build_leaderboard(runs).warnings[0]


def test_what_is_no_scored_run_is_skipped_and_named(tmp_path: Path) -> None:
    scored(tmp_path / "good", NEXT_BEST)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "page.html").write_text("<p>")
    (tmp_path / "waiting").mkdir()
    (tmp_path / "waiting" / "predictions.jsonl").write_text("")
    board = build_leaderboard(sorted(tmp_path.iterdir()), tables=[])
    assert [entry.name for entry in board.entries] == ["good"]
    assert [text.rpartition("/")[2] for text in board.skipped[:2]] == [
        "page.html (no run with predictions)", "tiny (no run with predictions)"
    ]  # fmt: skip
    assert "waiting (not scored: hba score" in board.skipped[2]
    with pytest.raises(InputError, match=r"no scored run: .*waiting \(not scored"):
        build_leaderboard([tmp_path / "waiting"])


def test_columns_keep_the_order_of_the_taxonomy(tmp_path: Path) -> None:
    runs = [
        scored(tmp_path / "a", {"SAR": 0.5, "EMO": 0.5, "SEN": 0.5}),
        scored(tmp_path / "b", {"SEN": 0.9, "SAR": 0.9}),
    ]
    for order in (runs, runs[::-1]):
        assert build_leaderboard(order, tables=[]).tasks == ["SEN", "EMO", "SAR"]
    metrics = json.loads((runs[0] / "metrics.json").read_text())
    metrics["tasks"] |= {"MINE": {**metrics["tasks"]["EMO"], "datasets": ["mine"]}}
    (runs[0] / "metrics.json").write_text(json.dumps(metrics))
    assert build_leaderboard(runs[:1], tables=[]).tasks == ["MINE", "SEN", "EMO", "SAR"]  # one's own come first


def test_runs_are_called_as_they_are_told(tmp_path: Path) -> None:
    runs = [scored(tmp_path / name, NEXT_BEST) for name in ("lr=1e-3", "b")]
    code, out, _ = hba(*runs, "--name", f"{runs[0]}=Ours", "--name", "b=Theirs = 2", "--json")
    assert code == 0 and {e["name"] for e in json.loads(out)["entries"] if not e["published"]} == {"Ours", "Theirs = 2"}
    assert (
        json.loads(hba(runs[1], "--name", "Mine", "--published", "none", "--json")[1])["entries"][0]["name"] == "Mine"
    )
    for wrong in ("c=X", "Mine", "b="):
        assert "names no run" in str(hba(*runs, "--name", wrong)[2])


def test_n_and_intervals_are_shown_and_no_digit_is_cut_on_a_narrow_terminal(tmp_path: Path) -> None:
    keys = list(TASKS)
    runs = [scored(tmp_path / f"run{i}", dict.fromkeys(keys, 0.5 + 0.04 * i), n=1830) for i in range(5)]
    figures = {}
    for columns in (60, 80, 300):
        result = CliRunner().invoke(app, ["leaderboard", *map(str, runs)], env={"COLUMNS": str(columns)})
        assert result.exit_code == 0 and "…" not in result.stdout
        shown = result.stdout.partition("Published rows")[0].partition("† published")[0]
        assert max(map(len, shown.splitlines())) <= columns
        figures[columns] = sorted(re.findall(r"\d\.\d\d–\d\.\d\d|\d\.\d\d|\d+,\d+", shown))
    assert figures[60] == figures[80] == figures[300]
    assert figures[80].count("18,300") == 5 and figures[80].count("0.40–0.60") == len(keys)
    board = build_leaderboard(runs)
    write_leaderboard(board, tmp_path / "board.csv")
    rows = list(csv.DictReader((tmp_path / "board.csv").read_text().splitlines()))
    assert (rows[0]["EMO_n"], rows[0]["n"]) == ("1830", "18300")
    write_leaderboard(board, tmp_path / "board.md")
    assert "0.660 (0.560–0.760)" in (tmp_path / "board.md").read_text()


def test_failed_and_partial_runs_are_shown_and_not_ranked_and_spoil_no_ranking(tmp_path: Path) -> None:
    def changed(run: Path, **counts: int) -> Path:
        metrics = json.loads((run / "metrics.json").read_text())
        metrics["aggregate"] |= counts
        (run / "metrics.json").write_text(json.dumps(metrics))
        return run

    good = [scored(tmp_path / name, NEXT_BEST) for name in ("a", "b")]
    lost = changed(scored(tmp_path / "lost", {"SEN": 0.9}, n=90), n_failed=12)
    part = changed(scored(tmp_path / "part", {"SEN": 0.99, "EMO": 0.99}, n=30), n_asked=200)
    board = build_leaderboard([*good, lost, part], tables=[])  # neither the rows nor the tasks of the two count
    assert {e.name: e.rank for e in board.entries} == {"a": 1, "b": 1, "lost": None, "part": None}
    assert board.ranked_tasks == ["SEN", "EMO"]
    notes = {e.name: e.notes[0] for e in board.entries if e.notes}
    assert notes == {"lost": "13.3% of the rows failed: not ranked", "part": "60 of 200 rows: not ranked"}
