"""Throughput of `hba predict` with a remote model against one client per request with a half-second pause after each.

    python benchmarks/predict_remote.py --rows 1500 --concurrency 16

Both ask the same server on the loopback (tests/servers/chat.py), which takes 50 ms for an answer, for rows of text;
once it never fails, once it fails a tenth of the time. Predictions of `hba predict` are appended to the disk. Then rows
with a picture each, which has to be decoded, scaled and compressed: as many at once as there are cores, against one
after the other. Prints answers a second, medians of the rounds, and the ratio.
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

import numpy as np
import PIL.Image

from hba import open_atlas
from hba.config import load_config
from hba.environment import usable_cores
from hba.evaluate.backends import remote
from hba.evaluate.backends.interface import open_backend
from hba.evaluate.config import PredictConfig
from hba.evaluate.predict import EVERYTHING, open_rows, predict_run
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


def write_pictures(folder: Path, rows: int) -> None:
    folder.mkdir()
    fixed = {"problem": "<image>What is felt? Choose from: anger, fear.", "answer": "anger", "class_label": "anger"}
    fixed |= {"dataset": "cremad", "task": "emotion_cls", "modality_signature": "text_image", "videos": []}
    noise = np.random.default_rng(0).integers(0, 256, (800, 1200, 3), dtype=np.uint8)
    with (folder / "test.jsonl").open("w") as handle:
        for number in range(rows):
            PIL.Image.fromarray(np.roll(noise, number, 0)).save(folder / f"{number}.png", compress_level=1)
            handle.write(json.dumps({"images": [f"{number}.png"], **fixed, "audios": [], "texts": []}) + "\n")


def with_pictures(atlas: Path, run: Path, url: str, rows: int, threads: int) -> float:
    """Answers a second where `threads` prepare pictures."""
    config = load_config(PredictConfig, None, [f"remote.base_url={url}"])
    remote.usable_cores = lambda: threads
    started = time.perf_counter()
    given = {"atlas": str(atlas), "split": "test", "config": config, "backend": "openai"}
    done = predict_run("m", run, progress=lambda tally: None, **given)
    assert (done.predicted, done.tally.failed) == (rows, 0)
    return rows / (time.perf_counter() - started)


def compare_pictures(options: argparse.Namespace) -> None:
    cores, found = usable_cores(), []
    with tempfile.TemporaryDirectory() as folder:
        atlas = Path(folder) / "atlas"
        write_pictures(atlas, options.pictures)
        for number in range(options.rounds):
            process, url = start({})
            try:
                runs = [(Path(folder) / f"run{number}-{threads}", threads) for threads in (1, cores)]
                found.append([with_pictures(atlas, run, url, options.pictures, threads) for run, threads in runs])
            finally:
                process.kill()
                process.wait()
    slow, fast = (median(column) for column in zip(*found, strict=True))
    ratio = median(b / a for a, b in found)
    print(f"pictures       one at a time   {slow:6.1f}/s   on {cores:3} cores  {fast:6.1f}/s   {ratio:5.1f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=100)
    options = parser.parse_args()
    compare_pictures(options)
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
