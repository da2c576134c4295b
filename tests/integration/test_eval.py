"""`hba eval`: from a model to numbers, a page and a line of the leaderboard in one command that goes on."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

from rich.console import Console

from hba.cli.evaluate import Pace, _ahead_table
from hba.evaluate.compare import compare_runs
from hba.evaluate.runs import open_run
from hba.report.comparison import SuiteTables, suite_table


def evaluated(hba, tmp_path, *arguments):
    code, out, err = hba("eval", *arguments, "--run", tmp_path / "run", "--json")
    assert code == 0, err
    return json.loads(out), err


def test_a_baseline_gets_numbers_a_page_and_a_line(hba, mini_atlas, tmp_path):
    found, err = evaluated(hba, tmp_path, "majority", "--atlas", mini_atlas)
    assert "rows are left to ask" in err and found["judged"] is None
    assert "time unknown until its first rows are answered" in err and "minute for" in err
    assert "at the pace of the first 8" in err and found["ahead"][0]["seconds"] > 0
    assert found["metrics"]["tasks"]["EMO"]["score"] is not None
    assert (tmp_path / "run" / "report.html").is_file() and (tmp_path / "run" / "leaderboard.html").is_file()
    assert "majority" in json.dumps(found["leaderboard"])
    one_by_one = tmp_path / "apart"
    assert hba("predict", "majority", "--atlas", mini_atlas, "--run", one_by_one)[0] == 0
    code, out, _ = hba("score", one_by_one, "--json")
    assert code == 0 and json.loads(out)["tasks"] == found["metrics"]["tasks"]


def test_a_remote_model_is_judged_in_the_same_command(hba, mini_atlas, tmp_path, chat_server, monkeypatch):
    monkeypatch.setenv("HBA_CACHE", str(tmp_path / "cache"))
    server, judge = chat_server(), chat_server("judge")
    asked = ["m", "--backend", "openai", "--base-url", server.url, "--judge", "j", "--judge-url", judge.url]
    few = ["--atlas", mini_atlas, "--per-dataset", "2", "encode.num_frames=2"]
    found, err = evaluated(hba, tmp_path, *asked, *few)
    assert found["judged"]["verdicts"] > 0 and found["judged"]["unjudged"] == 0
    done, total = re.search(r"judge m\b.*?(\d+)/(\d+)", err).groups()  # one bar over rows and verdicts
    assert int(done) == int(total) == found["ahead"][0]["rows"] + found["judged"]["verdicts"]
    assert found["metrics"]["tasks"]["SOC"]["score"] is not None
    before = server.stats()["requests"]
    again, err = evaluated(hba, tmp_path, *asked, *few)
    assert "0 of" in err and server.stats()["requests"] <= before + 1  # whether the server is there, and no answer
    assert again["metrics"]["tasks"] == found["metrics"]["tasks"]


def test_the_time_of_a_service_is_that_of_requests_at_once(hba, mini_atlas, tmp_path, chat_server):
    pace = Pace(32, 3200)  # replies of one second: 4 at once, then 8, 16, 32, and 32 again and again
    ends = [number + 1 for number, wave in enumerate([4, 8, 16, *[32] * 100]) for _ in range(wave)]
    said = next(left for count, end in enumerate(ends, 1) if (left := pace.seconds(count, end)) is not None)
    assert pace.rows == 64 and abs(said - ends[3199]) < 5  # not 800, as by the first 8
    batches = Pace(16, 1600)  # of 16 rows in a second, the first in ten
    ends = [10 + number // 16 for number in range(1600)]
    said = next(left for count, end in enumerate(ends, 1) if (left := batches.seconds(count, end)) is not None)
    assert abs(said - ends[-1]) < 10
    few = ["--atlas", mini_atlas, "--per-dataset", "2", "encode.num_frames=2", "remote.max_concurrency=8"]
    _, err = evaluated(hba, tmp_path, "m", "--backend", "openai", "--base-url", chat_server().url, *few)
    assert "time unknown until" in err and "at the pace of the first 16" in err


def test_what_is_ahead_fits_a_terminal_of_80_columns():
    ahead = {"setting": "m", "left": 101_234, "rows": 101_234, "judged": 5_000, "tokens_in": 1_123_456_789}
    ahead |= {"tokens_out_at_most": 103_663_616, "cost_usd_at_most": 1234.56, "seconds": None}
    out = io.StringIO()
    Console(file=out, width=80).print(_ahead_table([ahead]))
    head, row = (line.split() for line in out.getvalue().splitlines() if "time" in line or "101,234" in line)
    assert head[0] == "name" and row[0] == "m" and row[-1] == "unknown"


def kill_after(command, log, lines):
    """Kill a command once its log has so many lines."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 600
    while not log.is_file() or log.read_bytes().count(b"\n") < lines:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_killed_it_goes_on_to_the_same_numbers(hba, mini_atlas, tmp_path, chat_server):
    server = chat_server()
    few = ["--atlas", str(mini_atlas), "--per-dataset", "4", "encode.num_frames=2", "remote.max_concurrency=2"]
    asked = ["m", "--backend", "openai", "--base-url", server.url, *few]
    command = [sys.executable, "-m", "hba", "eval", *asked, "--run", str(tmp_path / "run")]
    server.hold(8)  # more are not answered: it is in the middle when it is killed
    log = tmp_path / "run" / "predictions.jsonl"
    kill_after(command, log, 5)
    server.release()
    kept = log.read_bytes().count(b"\n")
    assert kept >= 5 and not (tmp_path / "run" / "metrics.json").exists()
    found, err = evaluated(hba, tmp_path, *asked)
    left, of = map(int, re.search(r"(\d+) of (\d+) rows are left", err).groups())
    assert kept <= of - left < of
    apart, _ = evaluated(hba, tmp_path / "apart", *asked)
    assert {key: task["score"] for key, task in found["metrics"]["tasks"].items()} == {
        key: task["score"] for key, task in apart["metrics"]["tasks"].items()
    }


def test_bad_input_is_told_before_anything_is_asked(hba, mini_atlas, tmp_path):
    for arguments in (["majority", "--atlas", tmp_path / "no"], ["no/such", "--atlas", mini_atlas]):
        code, out, err = hba("eval", *arguments, "--run", tmp_path / "run")
        assert (code, out) == (2, "") and "error: " in err and not (tmp_path / "run").exists()
    rows = map(json.loads, (mini_atlas / "test.jsonl").read_text(encoding="utf-8").splitlines())
    unlabelled = [row for row in rows if row["modality_signature"] == "text"][:2]
    for row in unlabelled:
        del row["answer"], row["class_label"]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, unlabelled)), encoding="utf-8")
    code, out, err = hba("eval", "m", "--backend", "openai", "--atlas", tmp_path, "--run", tmp_path / "run")
    assert (code, out) == (2, "") and "no row of split 'test' has an answer" in err and not (tmp_path / "run").exists()


SUITE = """\
atlas: {atlas}
run: {run}
per_dataset: 2
set: {{encode.num_frames: 2, remote.max_concurrency: 2}}
settings:
  whole: {{model: m, backend: openai, base_url: "{url}"}}
  deaf: {{model: m, backend: openai, base_url: "{url}", modalities: video}}
  thinking: {{model: m, backend: openai, base_url: "{url}", set: {{generation.format: think}}}}
"""


def test_a_suite_is_one_table_of_paired_differences_and_goes_on_after_a_kill(hba, mini_atlas, tmp_path, chat_server):
    server = chat_server()
    file = tmp_path / "suite.yaml"
    file.write_text(SUITE.format(atlas=mini_atlas, run=tmp_path / "run", url=server.url))
    code, out, err = hba("eval", file, "--dry-run", "--json")
    assert code == 0 and server.stats()["requests"] == 0 and not (tmp_path / "run").exists(), err
    ahead = json.loads(out)["ahead"]
    assert [each["setting"] for each in ahead] == ["whole", "deaf", "thinking"]
    assert all(each["left"] == each["rows"] > 0 and each["tokens_in"] > 0 for each in ahead)
    command = [sys.executable, "-m", "hba", "eval", str(file)]
    server.hold(ahead[0]["rows"] + 7)  # in the middle of the second setting no more is answered
    kill_after(command, tmp_path / "run" / "deaf" / "predictions.jsonl", 5)
    server.release()
    assert not (tmp_path / "run" / "suite.json").exists()
    before = server.stats()["requests"]
    code, out, err = hba("eval", file, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [each["left"] == 0 for each in found["ahead"]] == [True, False, False]
    assert found["ahead"][1]["rows"] - found["ahead"][1]["left"] >= 5 and found["ahead"][0]["seconds"] == 0
    left = sum(each["left"] for each in found["ahead"])
    assert left <= server.stats()["requests"] - before <= left + 3  # each setting looks whether the server is there
    assert set(found["differences"]) == {"deaf", "thinking"}
    mean = found["differences"]["deaf"]["paired"]["mean"]
    assert mean["difference"] == mean["b"] - mean["a"] and len(mean["ci95"]) == 2
    ranked = {row["name"] for row in found["leaderboard"]["entries"] if not row["published"]}
    assert ranked == {"whole", "deaf", "thinking"}
    table = (tmp_path / "run" / "suite.md").read_text()
    assert "minus whole" in table and table.count("| deaf |") == 1


def test_the_table_of_a_suite_gives_the_baseline_its_own_scores_and_fits_a_narrow_terminal(hba, mini_atlas, tmp_path):
    """One setting has not answered EMO: the baseline's line is the same whichever setting stands first."""
    for name in ("majority", "random", "uniform"):
        model = "random" if name == "uniform" else name
        run = tmp_path / name
        assert hba("predict", model, "--atlas", mini_atlas, "--per-dataset", "2", "--run", run)[0] == 0
        if name == "random":
            lines = (run / "predictions.jsonl").read_text().splitlines()
            kept = [line for line in lines if json.loads(line)["task"] != "emotion_cls"]
            assert kept != lines
            (run / "predictions.jsonl").write_text("\n".join(kept) + "\n")
        hba("score", run, "--partial")
    own = open_run(tmp_path / "majority").metrics
    found = {name: compare_runs(tmp_path / "majority", tmp_path / name) for name in ("random", "uniform")}
    table = suite_table(["majority", *found], found, "majority", own)
    first = table.texts(table.rows[0])
    assert first[1].text == f"{own.mean.score:.3f}"
    assert first[table.head.index("EMO")].text == f"{own.tasks['EMO'].score:.3f}"
    assert any(said.startswith("random: the mean is over") for said in table.warnings)
    assert not any(said.startswith("uniform: the mean is over") for said in table.warnings)
    assert "corrected over the settings" in " ".join(table.notes) and "mean is not" not in " ".join(table.notes)
    console = Console(width=80, file=io.StringIO())
    console.print(SuiteTables(table, "majority"))
    shown = console.file.getvalue()
    assert all(len(line) <= 80 for line in shown.splitlines())
    for row in table.rows:
        cells = [cell.text for cell in table.texts(row)]
        lines = [line.split() for line in shown.splitlines() if line.strip().startswith(cells[0])]
        assert lines and all(cell in " ".join(map(" ".join, lines)) for cell in cells), shown


def test_a_suite_says_which_key_is_wrong(hba, mini_atlas, tmp_path):
    file = tmp_path / "suite.yaml"
    good = {"atlas": str(mini_atlas), "run": str(tmp_path / "run"), "settings": {"a": {"model": "majority"}}}
    two = {"a": {"model": "majority"}, "b": {"model": "random"}}
    wrong = [
        (good, "two settings or more"),
        (good | {"atlass": "x"}, "suite.yaml:4: unknown key 'atlass'"),
        (good | {"settings": {"a": {"model": "majority"}, "b": {}}}, "'settings.b.model' is missing"),
        (good | {"settings": {"a": {"model": "majority"}, "../b": {"model": "random"}}}, "no name of a folder"),
        (good | {"settings": two | {"suite.md": {"model": "random"}}}, "'suite.md' is the name of a file"),
        (good | {"settings": two | {"leaderboard.html": {"model": "random"}}}, "'leaderboard.html' is the name of"),
        (good | {"settings": two, "baseline": "c"}, "no setting 'c'"),
        (good | {"settings": two, "set": {"bath": 1}}, "'bath'"),
    ]
    for suite, said in wrong:
        file.write_text("\n".join(f"{key}: {json.dumps(value)}" for key, value in suite.items()))
        code, out, err = hba("eval", file)
        assert (code, out) == (2, "") and said in err and not (tmp_path / "run").exists(), err


def test_a_run_that_left_rows_out_is_not_ranked(hba, mini_atlas, tmp_path, chat_server):
    """As by `hba leaderboard`."""
    lines = map(json.loads, (mini_atlas / "test.jsonl").read_text(encoding="utf-8").splitlines())
    rows = [row for row in lines if row["modality_signature"] == "text_audio"][:6]
    for row in rows:
        (tmp_path / "atlas" / row["audios"][0]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(mini_atlas / row["audios"][0], tmp_path / "atlas" / row["audios"][0])
    (tmp_path / "atlas" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "atlas" / rows[0]["audios"][0]).write_bytes(b"no sound")
    asked = ["m", "--backend", "openai", "--base-url", chat_server().url, "--atlas", tmp_path / "atlas"]
    found, _ = evaluated(hba, tmp_path, *asked, "--allow-quarantined", "1")
    (entry,) = (row for row in found["leaderboard"]["entries"] if not row["published"])
    assert entry["rank"] is None and "16.7% of the samples quarantined: not ranked" in entry["notes"]
