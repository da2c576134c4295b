"""A finished run of 100,000 predictions, run again: what it takes to find that nothing is left.

    python benchmarks/predict_again.py

Text rows in JSONL, answered by the majority baseline, then the same command again. Prints its processor time and memory
beside the limits (3 s, 300 MB), and as a ratio to a process that reads both files as JSON and does nothing else.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

ROWS = 100_000
SECONDS_AT_MOST, MEGABYTES_AT_MOST = 3.0, 300
PEER = "import json, sys; [len(json.loads(line)) for name in sys.argv[1:] for line in open(name)]"


def write(folder: Path) -> None:
    """Rows of 90 words."""
    rng = random.Random(0)
    words = [f"word{number}" for number in range(500)]
    said = {"dataset": "urfunny", "task": "humour_cls", "modality_signature": "text"}
    for name, count in (("train", 1000), ("test", ROWS)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for number in range(count):
                row = {"problem": " ".join(rng.choices(words, k=90)), "answer": rng.choice(["yes", "no"]), **said}
                file.write(json.dumps(row | {"speaker": f"s{number % 900}"}) + "\n")


def used(*command: str) -> tuple[float, int]:
    """Processor seconds and peak memory in MB of a command, in a process that does nothing else."""
    code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL);"
    code += "u = resource.getrusage(resource.RUSAGE_CHILDREN); print(u.ru_utime + u.ru_stime, u.ru_maxrss)"
    done = subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True, text=True)
    seconds, kilobytes = done.stdout.split()
    return float(seconds), int(kilobytes) >> 10


def main() -> None:
    """Run it twice."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, run = Path(temporary, "atlas"), Path(temporary, "run")
        folder.mkdir()
        write(folder)
        predict = (sys.executable, "-m", "hba", "predict", "majority", "--json")
        command = (*predict, "--atlas", str(folder), "--run", str(run))
        subprocess.run(command, check=True, capture_output=True)
        seconds, megabytes = used(*command)
        peer, _ = used(sys.executable, "-c", PEER, str(folder / "test.jsonl"), str(run / "predictions.jsonl"))
    record = {"seconds": round(seconds, 2), "at_most": SECONDS_AT_MOST, "megabytes": megabytes}
    record |= {"megabytes_at_most": MEGABYTES_AT_MOST, "times_the_peer": round(seconds / peer, 2)}
    print(json.dumps(record | {"holds": seconds <= SECONDS_AT_MOST and megabytes <= MEGABYTES_AT_MOST}))


if __name__ == "__main__":
    main()
