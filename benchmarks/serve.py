"""Requests a second of `hba serve`, in batches and one at a time: the same server, the same requests, alternating.

    python benchmarks/serve.py MODEL --requests 64 --rounds 3

The peer is the same desk with batches of one row (`batch_size=1`). Prints both rates and their ratio for talks, whose
words come token by token, and for labels.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from hba.config import load_config
from hba.evaluate.config import PredictConfig
from hba.serve import Desk, Part, Question, Saying, Turn


def rate(desk: Desk, requests: int, ask: str) -> float:
    """Requests a second when all are there at once."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "words.txt"
        path.write_text("Well, that went wonderfully.")
        began = time.perf_counter()
        answers = []
        for number in range(requests):
            if ask == "talks":
                question = Question(turns=(Turn("user", (Part(text=f"Tell me of it, {number}."),)),))
                answers.append(desk.ask(question, saying=Saying(64)))
            else:
                answers.append(desk.ask(Question(dataset="mmsd", name="words.txt"), {"words.txt": path}))
        for answer in answers:
            answer.result()
        return requests / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--backend")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    given = parser.parse_args()
    config = load_config(PredictConfig, None, [f"batch_size={given.batch_size}"])
    with tempfile.TemporaryDirectory() as name:
        how = {"backend": given.backend, "most_waiting": 2 * given.requests}
        many = Desk(given.model, folder=Path(name) / "many", config=config, **how)
        one = Desk(given.model, folder=Path(name) / "one", config=replace(config, batch_size=1), **how)
        for ask in ("talks", "labels") if many.talks else ("labels",):
            rates: dict[str, list[float]] = {"batched": [], "one": []}
            for _ in range(given.rounds + 1):
                rates["batched"].append(rate(many, given.requests, ask))
                rates["one"].append(rate(one, given.requests, ask))
            batched, single = (statistics.median(each[1:]) for each in rates.values())  # the first warms up
            print(f"{ask}: {batched:.1f}/s in batches of {given.batch_size}, {single:.1f}/s one at a time: "
                  f"{batched / single:.2f} x")  # fmt: skip
        many.close()
        one.close()


if __name__ == "__main__":
    main()
