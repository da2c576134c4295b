"""Leaderboards through real run folders and the command line: who is ranked, who is not, and that it is said."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hba.cli import app
from hba.errors import InputError
from hba.evaluate.leaderboard import build_leaderboard, published_entries
from hba.report.leaderboard import write_leaderboard

NEXT_BEST = {"SEN": 0.7, "EMO": 0.8}


def scored(folder: Path, scores: dict[str, float | None], *, n: int = 100, quarantined: int = 0, **said: Any) -> Path:
    folder.mkdir(parents=True)
    tasks = {
        key: {
            "score": score, "metric": "weighted_f1", "ci95": None if score is None else [score - 0.1, score + 0.1],
            "n": n, "n_quarantined": quarantined if key == "SEN" else 0,
        }
        for key, score in scores.items()
    }  # fmt: skip
    counts = {"n": n * len(tasks), "n_quarantined": quarantined}
    provenance = {"synthetic": False, "data_fingerprint": "abc", **said}
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
    assert entries["few"].notes == ("1 samples quarantined",)
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
