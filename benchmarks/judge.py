"""Judge throughput against one client per request with a half-second pause after each, at the same concurrency.

    python benchmarks/judge.py --answers 1500 --concurrency 16

Both ask the same server on the loopback (tests/servers/chat.py), which takes 50 ms for an answer: once a server that
never fails, once one that fails a tenth of the time. The baseline is what scripts in this field do to keep under rate
limits; it is measured on fewer answers, as it is slow. Prints answers a second, medians of the rounds, and the ratio.
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

SERVERS = Path(__file__).parents[1] / "tests" / "servers"
sys.path.insert(0, str(SERVERS))

from free_form_run import make_run  # noqa: E402

from hba.evaluate.judge.items import Item  # noqa: E402
from hba.evaluate.judge.run import JudgeConfig, items_of, judge_item, judge_items  # noqa: E402
from hba.remote import ClientConfig, RemoteClient  # noqa: E402

PAUSE_SECONDS = 0.5
FAULTS = {"429": 0.02, "500": 0.03, "drop": 0.02, "cut": 0.01, "malformed": 0.01, "slow": 0.01, "retry_after": "0.05"}


def start(faults: dict) -> tuple[subprocess.Popen, str]:
    options = ["--brain", "judge", "--faults", json.dumps({"latency": 0.05} | faults)]
    command = [sys.executable, str(SERVERS / "chat.py"), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    return process, f"http://127.0.0.1:{int(process.stdout.readline())}/v1"


async def one_client_per_request(items: list[Item], config: JudgeConfig) -> None:
    slots = asyncio.Semaphore(config.remote.max_concurrency)

    async def one(item: Item) -> None:
        async with slots:
            async with RemoteClient("m", config.remote) as client:
                await judge_item(client, item, config)
            await asyncio.sleep(PAUSE_SECONDS)

    await asyncio.gather(*map(one, items))


def rates(items: list[Item], url: str, options: argparse.Namespace, folder: Path) -> tuple[float, float]:
    """Answers a second of the baseline and of `hba judge`, verdicts written to the disk."""
    config = JudgeConfig(remote=ClientConfig(base_url=url, max_concurrency=options.concurrency))
    few = items[: 6 * options.concurrency]
    started = time.perf_counter()
    asyncio.run(one_client_per_request(few, config))
    slow = len(few) / (time.perf_counter() - started)
    started = time.perf_counter()
    judged = judge_items(items, folder, model="m", config=config, progress=lambda tally: None)
    assert len(judged.judgements) == len(items) and not judged.unjudged
    return slow, len(items) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=1500)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    for name, faults in (("no faults", {}), ("a tenth fails", FAULTS)):
        found = []
        with tempfile.TemporaryDirectory() as folder:
            make_run(Path(folder), options.answers)
            items = items_of(Path(folder) / "run")
            for number in range(options.rounds):
                process, url = start(faults)
                try:
                    found.append(rates(items, url, options, Path(folder) / f"out{number}"))
                finally:
                    process.kill()
                    process.wait()
        slow, fast = (median(column) for column in zip(*found, strict=True))
        ratio = median(b / a for a, b in found)
        print(f"{name:14} one client each {slow:6.1f}/s   hba judge {fast:6.1f}/s   {ratio:5.1f}x")


if __name__ == "__main__":
    main()
