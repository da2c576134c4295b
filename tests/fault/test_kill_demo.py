"""kill -9 of the whole demo, workers included, at moments spread over its life: it ends as if nothing had happened.

Each round starts the demo, waits for a phase (seen by the files that are there) and a seeded random time more, and
kills its process group. After the last one it runs to its end and must equal an uninterrupted run: metrics.json apart
from times, every probability, every logged loss.
"""

import json
import random
import signal
from itertools import chain

import pytest
from ranks import Killed

STEPS = ["train.max_steps=12", "train.validate_every=3", "train.log_every=1", "train.batch_size=8"]
STEPS += ["qa.train.max_steps=6", "qa.train.validate_every=3", "qa.train.log_every=1"]
STEPS += ["bam.train.max_steps=12", "bam.train.validate_every=4", "bam.train.log_every=1"]
STEPS += ["speak.train.max_steps=2", "rl.train.max_steps=1", "rl.validation_rows=4", "rl.rollout.max_new_tokens=4"]
STEPS += ["speak.validation_split=validation[:8]"]
RUNS = ("sft", "qa", "bam")
SEED = 20
ROUND_SECONDS = 1200

# What is there when a phase has begun, and up to how many seconds later the kill comes.
PHASES = {
    "synthesis": (".atlas.*.tmp/*", 1.5),
    "backbone": ("atlas/atlas.json", 1.0),
    "training": ("sft/environment.json", 1.5),
    "checkpoint": ("sft/checkpoints/.step_*.tmp/*", 0.05),
    "features": ("features/train/*/card.json", 0.5),
    "adapters": ("bam/checkpoints/step_4", 0.5),
    "prediction": ("sft/predict.json", 0.6),
    "score and report": ("sft/metrics.json", 0.1),
}


def demo(launch, folder, killed=None):
    """How the demo in a folder ended."""
    return launch(["demo", "--run", folder, "--size", "tiny", *STEPS], ranks=1, killed=killed, timeout=ROUND_SECONDS)


def kill_in(launch, folder, pattern, delay):
    """Start the demo, kill its process group `delay` seconds after `pattern` is there; False if it ended before."""
    ended = demo(launch, folder, Killed(str(folder), pattern, delay))
    assert ended.code in (0, -signal.SIGKILL), ended.err
    return ended.code != 0


def lines(folder, name):
    return {run: [json.loads(line) for line in (folder / run / name).read_text().splitlines()] for run in RUNS}


def finished(launch, folder):
    """Run the demo to its end; everything that must not depend on interruptions."""
    done = demo(launch, folder)
    assert done.code == 0, done.err
    metrics = {run: json.loads((folder / run / "metrics.json").read_text()) for run in RUNS}
    for each in metrics.values():
        del each["provenance"]["created_at"]
    predictions, log = (lines(folder, name) for name in ("predictions.jsonl", "log.jsonl"))
    return {
        "metrics": metrics,
        "predictions": sorted(
            (run, p["id"], str(p["label"]), p["output"], p["tokens_in"], sorted(p.get("probs", {}).items()))
            for run in RUNS
            for p in predictions[run]
        ),
        "log": [{**line, "samples_per_second": 0} for line in chain(*log.values())],
        "files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if _lasting(path)),
    }


def _lasting(path):
    # TensorBoard writes a file for every start.
    return path.is_file() and path.parent.name != "tensorboard"


@pytest.mark.slow
def test_a_demo_that_is_killed_again_and_again_ends_in_the_same_metrics(launch, tmp_path):
    rng = random.Random(SEED)
    folder = tmp_path / "killed"
    folder.mkdir()
    kills = sum(kill_in(launch, folder, pattern, rng.uniform(0, longest)) for pattern, longest in PHASES.values())
    assert kills >= 6, f"{kills} of {len(PHASES)} rounds were killed; the others had ended before"
    killed = finished(launch, folder)
    straight = finished(launch, tmp_path / "straight")
    assert straight["log"][-1]["step"] == 12  # of the last stage
    for part, value in straight.items():
        assert killed[part] == value, part
