"""The explorer over 100,000 rows: first page, search, filters, memory. Limits: 1 s, 300 ms, 200 ms, 400 MB.

    python benchmarks/explorer.py [--rows 100000]

Starts `hba explore` as a user would, twice: with no index, and with the one that the first start left. Prints medians
of five requests a page and each figure as a share of its limit; below 1 holds.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("n", "rt", "lls", "st", "m", "ck")]
LIMITS = {"first page": 1.0, "search": 0.3, "filter": 0.2, "page 3000": 0.2, "sample": 0.2}
PAGES = {
    "search": "/atlas?q=speaker+{word}", "filter": "/atlas?dataset=mmsd&label=sarcasm",
    "page 3000": "/atlas?page=3000", "sample": "/sample/train/70000",
}  # fmt: skip
MEMORY_LIMIT_MB = 400


def write_atlas(folder: Path, rows: int) -> None:
    random.seed(0)
    kinds = [("mmsd", "sarcasm_cls", ("true", "false")), ("urfunny", "humor_cls", ("true", "false"))]
    shares = {"train": 0.8, "test": 0.2}
    for split, share in shares.items():
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for _ in range(int(rows * share)):
                dataset, task, answers = random.choice(kinds)
                text = " ".join(random.choices(WORDS, k=30))
                row = {"problem": f'The speaker says: "{text}"', "answer": random.choice(answers), "dataset": dataset,
                       "task": task, "modality_signature": "text"}  # fmt: skip
                file.write(json.dumps(row) + "\n")


def memory_mb(pid: int) -> float:
    """Resident memory of a process and its children, peak of each."""
    total = 0.0
    for child in [pid, *children(pid)]:
        status = Path(f"/proc/{child}/status").read_text(encoding="utf-8")
        total += next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024
    return total


def children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8")
    return [int(word) for word in listed.split()]


def measure(atlas: Path, cache: Path) -> tuple[dict[str, float], float]:
    command = [sys.executable, "-m", "hba", "explore", "--atlas", str(atlas), "--runs", str(atlas), "--port", "0",
               "--cache", str(cache), "--no-token", "--json"]  # fmt: skip
    started = time.perf_counter()
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        url = json.loads("".join(server.stdout.readline() for _ in range(3)))["url"].rstrip("/")
        ready = time.perf_counter() - started
        figures = {"first page": timed(url + "/atlas")}
        print(f"  the address is printed after {ready:.2f} s")
        while "Reading the atlas" in httpx.get(url + "/atlas", timeout=60).text:
            time.sleep(0.2)
        print(f"  every row can be found after {time.perf_counter() - started:.1f} s")
        for name, page in PAGES.items():
            times = [timed(url + page.format(word=random.choice(WORDS))) for _ in range(5)]
            figures[name] = statistics.median(times)
        return figures, memory_mb(server.pid)
    finally:
        server.kill()
        server.wait()


def timed(address: str) -> float:
    started = time.perf_counter()
    httpx.get(address, timeout=60).raise_for_status()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as folder:
        atlas = Path(folder) / "atlas"
        atlas.mkdir()
        write_atlas(atlas, rows)
        for name in ("no index", "index there"):
            print(f"{rows:,} rows, {name}:")
            figures, memory = measure(atlas, Path(folder) / "cache")
            for page, seconds in figures.items():
                share = seconds / LIMITS[page]
                print(f"  {page:11} {1000 * seconds:7.0f} ms   {share:5.2f} of its limit")
            print(f"  memory      {memory:7.0f} MB   {memory / MEMORY_LIMIT_MB:5.2f} of its limit")


if __name__ == "__main__":
    main()
