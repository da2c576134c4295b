"""Requests a second of `hba serve`: one person who asks one thing after another, against many at once.

    python benchmarks/serve.py MODEL --at-once 32 --rounds 5

One server for both, in a process of its own, over HTTP; the rounds alternate. Prints the median rates and the median
ratio of the rounds, for labels of short texts (or of `--file`) and, where the model has words, for talks of `--tokens`
tokens at most, with the mean size of a batch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from threading import local
from urllib.parse import urlsplit


class Server:
    """`hba serve` with its defaults, and what asks it."""

    def __init__(self, model: str, options: list[str], file: Path | None, tokens: int) -> None:
        self.model, self.file, self.tokens, self.own = model, file, tokens, local()
        command = [sys.executable, "-m", "hba", "serve", model, "--port", "0", "--json", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        said = ""
        while not said.rstrip().endswith("}"):
            said += self.process.stdout.readline()
        told = json.loads(said)
        self.address, self.token = urlsplit(told["url"]).netloc, told["token"]

    def call(self, path: str, body: object = None) -> tuple[int, bytes]:
        """Status and body of an answer. Each thread keeps its connection, which the server closes when it is idle."""
        if time.monotonic() - getattr(self.own, "used", 0.0) > 1:
            self.own.link = HTTPConnection(self.address, timeout=600)
        data, method = (None, "GET") if body is None else (json.dumps(body).encode(), "POST")
        self.own.link.request(method, path, data, {"authorization": f"Bearer {self.token}"})
        answer = self.own.link.getresponse()
        read, self.own.used = answer.read(), time.monotonic()
        return answer.status, read

    def ask(self, what: str, number: int) -> bool:
        """Whether it is answered."""
        said = f"Well, that went wonderfully, {number}."
        if what == "talks":
            talk = {"messages": [{"role": "user", "content": said}], "max_tokens": self.tokens}
            return self.call("/v1/chat/completions", talk)[0] == 200
        name, data = ("words.txt", said.encode()) if self.file is None else (self.file.name, self.file.read_bytes())
        url = f"data:application/octet-stream;base64,{b64encode(data).decode()}"
        return self.call("/v1/classify", {"files": [{"name": name, "data": url}], "tasks": "SAR"})[0] == 200

    def batches(self) -> int:
        """How many the model has answered."""
        lines = self.call("/metrics")[1].decode().splitlines()
        return int(float(next(line for line in lines if line.startswith("hba_batches_total")).split()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--file", type=Path)
    parser.add_argument("--ask", default="labels,talks")
    parser.add_argument("--serve", default="", help='options of hba serve, such as "--window 5"')
    given = parser.parse_args()
    server = Server(given.model, given.serve.split(), given.file, given.tokens)
    try:
        with ThreadPoolExecutor(given.at_once) as many, ThreadPoolExecutor(1) as one:
            for what in given.ask.split(","):
                rates: dict[str, list[float]] = {"many": [], "one": []}
                sizes = []
                for _ in range(given.rounds + 1):
                    for name, pool in (("many", many), ("one", one)):
                        count = given.requests if name == "many" else max(8, given.requests // 4)
                        before, began = server.batches(), time.perf_counter()
                        assert all(pool.map(lambda number: server.ask(what, number), range(count)))  # noqa: B023
                        rates[name].append(count / (time.perf_counter() - began))
                        if name == "many":
                            sizes.append(count / (server.batches() - before))
                ratio = statistics.median(a / b for a, b in list(zip(*rates.values(), strict=True))[1:])
                fast, slow = (statistics.median(each[1:]) for each in rates.values())  # the first warms up
                print(f"{what}: {fast:.1f}/s with {given.at_once} at once ({statistics.mean(sizes[1:]):.1f} a batch), "
                      f"{slow:.1f}/s one after another: {ratio:.2f} x", flush=True)  # fmt: skip
    finally:
        server.process.terminate()
        server.process.wait()


if __name__ == "__main__":
    main()
