"""5,000 predictions by a remote model that fails in every way, killed three times: nothing lost, doubled or wrong."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
from sklearn.metrics import f1_score

from hba.evaluate.predictions import read_predictions
from hba.evaluate.score import score_run

ROWS = 5000
# A fifth of all attempts fails, in each way that a loaded server and a network have.
FAULTS = {"429": 0.04, "500": 0.03, "503": 0.02, "hang": 0.002, "drop": 0.03, "cut": 0.02, "malformed": 0.03,
          "strange": 0.02, "slow": 0.01, "slow_seconds": 0.1, "hang_seconds": 60.0, "retry_after": "0.05"}  # fmt: skip
LABELS = ("anger", "disgust", "fear", "happy")


def said(prompt):
    """What the brain `choose` of tests/servers says to a prompt: a label, or None for no usable answer."""
    number = int(hashlib.sha256(prompt.encode()).hexdigest(), 16)
    return None if number % 8 == 0 else LABELS[number // 8 % len(LABELS)]


@pytest.fixture
def atlas(tmp_path):
    """Rows of text alone, whose prompts all differ."""
    draw = random.Random(0)
    folder = tmp_path / "atlas"
    folder.mkdir()
    with (folder / "test.jsonl").open("w") as handle:
        for number in range(ROWS):
            problem = f'The speaker says: "sentence {number}" What does she feel? Choose from: {", ".join(LABELS)}.'
            fields = {"answer": draw.choice(LABELS), "dataset": "cremad", "task": "emotion_cls"}
            rest = {"modality_signature": "text", "images": [], "videos": [], "audios": [], "texts": []}
            label = {"class_label": fields["answer"]}
            handle.write(json.dumps({"id": f"r{number}", "problem": problem} | fields | rest | label) + "\n")
    return folder


def lines(path):
    return path.read_bytes().count(b"\n") if path.is_file() else 0


@pytest.mark.slow
def test_three_kills_under_faults_lose_and_double_nothing(atlas, chat_server, tmp_path):
    server = chat_server(brain="choose", seed=7, **FAULTS)
    run = tmp_path / "run"
    settings = [f"remote.base_url={server.url}", "remote.first_backoff_seconds=0.01", "remote.timeout_seconds=10"]
    rest = ["--atlas", str(atlas), "--backend", "openai", "--run", str(run), "--json", "remote.max_concurrency=64"]
    command = [sys.executable, "-m", "hba", "predict", "m", *rest, *settings]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    server.hold(ROWS * 9 // 10)  # none ends before it is killed
    for share in (0.2, 0.5, 0.8):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 900
        while lines(run / "predictions.jsonl") < share * ROWS:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert share * ROWS <= lines(run / "predictions.jsonl") < ROWS
    server.release()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr

    predictions = read_predictions(run / "predictions.jsonl")  # refuses an id that stands twice
    assert {p.id for p in predictions} == {f"r{number}" for number in range(ROWS)}
    rows = {row["id"]: row for row in map(json.loads, (atlas / "test.jsonl").read_text().splitlines())}
    for prediction in predictions:
        asked = rows[prediction.id]["problem"] + "\nGive only the final answer, inside \\boxed{}."
        assert (prediction.label, prediction.target) == (said(asked), rows[prediction.id]["answer"])
        assert prediction.error is None
    stats = server.stats()
    assert stats["distinct"] == ROWS
    # Beside what was under way when it was killed, every row was answered once.
    assert stats["answered"] <= ROWS + 3 * 64
    assert sum(count for fault, count in stats["faults"].items() if fault != "none") > 0.15 * stats["requests"]
    check_scores(run, predictions)


def check_scores(run, predictions):
    """The metrics are those of another implementation, and the invalid are counted as wrong."""
    metrics = score_run(run, resamples=100).record()["datasets"]["cremad"]
    invalid = sum(p.label is None for p in predictions)
    right = sum(p.label == p.target for p in predictions)
    assert metrics["n"] == ROWS and metrics["n_invalid"] == invalid
    assert 0.1 < invalid / ROWS < 0.15 and metrics["micro_accuracy"] == pytest.approx(right / ROWS)
    given = [p.label or "invalid" for p in predictions]
    expected = f1_score([p.target for p in predictions], given, labels=LABELS, average="weighted")
    assert metrics["weighted_f1"] == pytest.approx(expected)
    assert Counter(given)["invalid"] == invalid
