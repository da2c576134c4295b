"""`hba eval`: from a model to numbers, a page and a line of the leaderboard in one command that goes on."""

import json
import os
import re
import signal
import subprocess
import sys
import time


def evaluated(hba, tmp_path, *arguments):
    code, out, err = hba("eval", *arguments, "--run", tmp_path / "run", "--json")
    assert code == 0, err
    return json.loads(out), err


def test_a_baseline_gets_numbers_a_page_and_a_line(hba, mini_atlas, tmp_path):
    found, err = evaluated(hba, tmp_path, "majority", "--atlas", mini_atlas)
    assert "rows are left to ask" in err and found["judged"] is None
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
    found, _ = evaluated(hba, tmp_path, *asked, *few)
    assert found["judged"]["verdicts"] > 0 and found["judged"]["unjudged"] == 0
    assert found["metrics"]["tasks"]["SOC"]["score"] is not None
    before = server.stats()["requests"]
    again, err = evaluated(hba, tmp_path, *asked, *few)
    assert "0 of" in err and server.stats()["requests"] <= before + 1  # whether the server is there, and no answer
    assert again["metrics"]["tasks"] == found["metrics"]["tasks"]


def test_killed_it_goes_on_to_the_same_numbers(hba, mini_atlas, tmp_path, chat_server):
    server = chat_server(latency=0.02)
    few = ["--atlas", str(mini_atlas), "--per-dataset", "4", "encode.num_frames=2", "remote.max_concurrency=2"]
    asked = ["m", "--backend", "openai", "--base-url", server.url, *few]
    command = [sys.executable, "-m", "hba", "eval", *asked, "--run", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log, end = tmp_path / "run" / "predictions.jsonl", time.monotonic() + 90
    while time.monotonic() < end and (not log.is_file() or log.read_bytes().count(b"\n") < 5):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
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
