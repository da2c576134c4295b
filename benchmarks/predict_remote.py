"""Throughput of `hba predict` with a remote model against one client per request with a half-second pause after each.

    python benchmarks/predict_remote.py --rows 1500 --concurrency 16

Both ask the same server on the loopback (tests/servers/chat.py), which takes 50 ms for an answer, for rows of text;
once it never fails, once it fails a tenth of the time. Predictions of `hba predict` are appended to the disk. Prints
answers a second, medians of the rounds, and the ratio.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from hba import open_atlas
from hba.config import load_config
from hba.evaluate.backends import open_backend
from hba.evaluate.config import PredictConfig
from hba.evaluate.predict import open_rows, predict_run
from hba.evaluate.selection import EVERYTHING
from hba.remote import RemoteClient

SERVER = Path(__file__).parents[1] / "tests" / "servers" / "chat.py"
PAUSE_SECONDS = 0.5
FAULTS = {"429": 0.02, "500": 0.03, "drop": 0.02, "cut": 0.01, "malformed": 0.01, "slow": 0.01, "retry_after": "0.05"}
LABELS = ("anger", "disgust", "fear", "happy")


def write_rows(folder: Path, rows: int) -> None:
    folder.mkdir()
    fixed = {"answer": "anger", "class_label": "anger", "dataset": "cremad", "task": "emotion_cls"}
    fixed |= {"modality_signature": "text", "images": [], "videos": [], "audios": [], "texts": []}
    with (folder / "test.jsonl").open("w") as handle:
        for number in range(rows):
            problem = f'The speaker says: "sentence {number}" Choose from: {", ".join(LABELS)}.'
            handle.write(json.dumps({"problem": problem, **fixed}) + "\n")


def start(faults: dict) -> tuple[subprocess.Popen, str]:
    options = ["--brain", "choose", "--faults", json.dumps({"latency": 0.05} | faults)]
    process = subprocess.Popen([sys.executable, str(SERVER), *options], stdout=subprocess.PIPE, text=True)
    return process, f"http://127.0.0.1:{int(process.stdout.readline())}/v1"


async def one_client_per_request(atlas: Path, config: PredictConfig, count: int) -> None:
    options = {"split": "test", "config": config, "backend": "openai", "selection": EVERYTHING}
    backend = open_backend("openai", open_rows("m", str(atlas), **options))
    slots = asyncio.Semaphore(config.remote.max_concurrency)

    async def one(sample) -> None:
        async with slots:
            async with RemoteClient("m", config.remote) as client:
                await client.complete(backend.request(sample))
            await asyncio.sleep(PAUSE_SECONDS)

    await asyncio.gather(*map(one, open_atlas(atlas, split="test")[:count]))


def rates(atlas: Path, run: Path, url: str, options: argparse.Namespace) -> tuple[float, float]:
    settings = [f"remote.base_url={url}", f"remote.max_concurrency={options.concurrency}"]
    config = load_config(PredictConfig, None, settings)
    few = 6 * options.concurrency
    started = time.perf_counter()
    asyncio.run(one_client_per_request(atlas, config, few))
    slow = few / (time.perf_counter() - started)
    started = time.perf_counter()
    given = {"atlas": str(atlas), "split": "test", "config": config, "backend": "openai"}
    done = predict_run("m", run, progress=lambda tally: None, **given)
    assert (done.predicted, done.tally.failed) == (options.rows, 0)
    return slow, options.rows / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    for name, faults in (("no faults", {}), ("a tenth fails", FAULTS)):
        found = []
        with tempfile.TemporaryDirectory() as folder:
            atlas = Path(folder) / "atlas"
            write_rows(atlas, options.rows)
            for number in range(options.rounds):
                process, url = start(faults)
                try:
                    found.append(rates(atlas, Path(folder) / f"run{number}", url, options))
                finally:
                    process.kill()
                    process.wait()
        slow, fast = (median(column) for column in zip(*found, strict=True))
        ratio = median(b / a for a, b in found)
        print(f"{name:14} one client each {slow:6.1f}/s   hba predict {fast:6.1f}/s   {ratio:5.1f}x")


if __name__ == "__main__":
    main()
