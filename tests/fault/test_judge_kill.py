"""5,000 verdicts from a server that often fails, through three kill -9: none lost, none doubled, all right."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from free_form_run import make_run

from hba.evaluate.judge.items import read_judgements
from hba.evaluate.score import score_run

ROWS, ANSWERS, CONCURRENCY = 5102, 5000, 32  # every 50th answer is empty
FAULTS = {"429": 0.04, "500": 0.04, "503": 0.01, "hang": 0.002, "drop": 0.03, "cut": 0.02, "malformed": 0.02,
          "strange": 0.01, "slow": 0.02, "slow_seconds": 0.1, "hang_seconds": 60.0, "retry_after": "0.02"}  # fmt: skip
LONGEST_SECONDS = 900


def start(run, server):
    # A fifth of the replies is no verdict; eight in a row are one in 400,000.
    options = [f"remote.max_concurrency={CONCURRENCY}", "remote.timeout_seconds=10"]
    options += ["remote.first_backoff_seconds=0.02", "attempts=8"]
    command = [sys.executable, "-m", "hba", "judge", str(run), "--model", "m", "--base-url", server.url, "--no-cache"]
    return subprocess.Popen(
        [*command, "--json", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


def lines(run):
    path = run / "judgements.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
def test_5000_verdicts_survive_every_fault_and_three_kills(chat_server, tmp_path):
    shares = make_run(tmp_path, ROWS)
    run, rng = tmp_path / "run", random.Random(5)
    server = chat_server("flaky", seed=9, **FAULTS)
    server.hold(5800)  # of some 6,250 replies, a fifth of which is no verdict: none ends before it is killed
    for kill_at in (800, 2200, 3900):
        process, deadline = start(run, server), time.monotonic() + LONGEST_SECONDS
        while lines(run) < kill_at + rng.randrange(200):
            assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        process.stderr.close()
        assert kill_at <= lines(run) < ANSWERS
    server.release()
    out, err = start(run, server).communicate(timeout=LONGEST_SECONDS)
    found = json.loads(out)
    assert lines(run) == ANSWERS == found["n"] == len(read_judgements(run / "judgements.jsonl")), err

    predictions = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    truth = {p["id"]: p["answer"].lower() == p["target"] for p in predictions}
    for key, judgement in read_judgements(run / "judgements.jsonl").items():
        assert judgement.correct is truth[key]
    assert found["n_unjudged"] == 0
    stats = server.stats()
    # What was under way at a kill is asked again, and nothing else.
    assert stats["answered_twice"] <= 3 * 2 * CONCURRENCY and stats["peak"] <= CONCURRENCY + 2

    scores = score_run(run).record()["datasets"]
    assert {key: scores[key]["llm_judge_accuracy"] for key in shares} == pytest.approx(shares, abs=1e-12)
