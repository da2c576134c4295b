"""How much faster `score` is than a loop over samples and classes, and how long the intervals take.

    python benchmarks/score.py [ROWS]

Prints one line of JSON: medians of five in CPU-seconds of one process, and the ratio. The loop is the plain way to
write these metrics, one pass over all rows per dataset and class; both must give the same task scores.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from hba.evaluate.compare import paired_difference
from hba.evaluate.metrics import SENTIMENT_GROUPS, encode, mean_of, score
from hba.evaluate.statistics import bootstrap, chance
from hba.taxonomy import BUILTIN, DATASETS, DOMAINS

Rows = list[tuple[str | None, str, str]]


def make_rows(count: int) -> Rows:
    """Rows over the thirteen classification datasets; 60 % right, some invalid."""
    rng = random.Random(0)
    keys = [key for key, dataset in DATASETS.items() if dataset.domain]
    rows: Rows = []
    for _ in range(count):
        key = rng.choice(keys)
        target = rng.choice(DATASETS[key].labels)
        rows.append((target if rng.random() < 0.6 else rng.choice([*DATASETS[key].labels, None]), target, key))
    return [tuple(row) for row in json.loads(json.dumps(rows))]  # type: ignore[misc]  # strings as a reader makes them


def class_counts(rows: list[tuple[Any, Any]], label: Any) -> tuple[int, int, int, int]:
    """TP, FP, FN, TN of one class, sample by sample."""
    tp = fp = fn = tn = 0
    for guess, target in rows:
        if target == label and guess == label:
            tp += 1
        elif target == label:
            fn += 1
        elif guess == label:
            fp += 1
        else:
            tn += 1
    return tp, fp, fn, tn


def loop_metrics(rows: list[tuple[Any, Any]]) -> tuple[float, float]:
    """Weighted F1 and mean weighted accuracy of one dataset."""
    f1s, accuracies = [], []
    for label in {target for _, target in rows}:
        tp, fp, fn, tn = class_counts(rows, label)
        f1s.append((2 * tp / (2 * tp + fp + fn) if tp else 0.0) * (tp + fn))
        accuracies.append(0.5 * (tp / (tp + fn) + tn / (tn + fp)))
    return sum(f1s) / len(rows), sum(accuracies) / len(accuracies)


def loop_score(rows: Rows) -> dict[str, float | None]:
    """Task scores by loops over datasets, classes and samples, with the other sentiment points as `score` has them."""
    found: dict[str, float] = {}
    for key in {dataset for _, _, dataset in rows}:
        mine: list[tuple[Any, Any]] = [(guess, target) for guess, target, dataset in rows if dataset == key]
        weighted_f1, weighted_accuracy = loop_metrics(mine)
        domain = DATASETS[key].domain
        found[key] = weighted_accuracy if domain == "emotion" else weighted_f1
        if domain == "sentiment_intensity":
            for groups in SENTIMENT_GROUPS.values():
                point = dict(zip(DOMAINS[domain].labels, groups, strict=True))
                grouped = [(point.get(g), point[t]) for g, t in mine if point[t] is not None]
                found[key] = loop_metrics(grouped)[0]
    loop_metrics([(guess, target) for guess, target, _ in rows])  # the aggregate
    scored = (task for task in BUILTIN.tasks.values() if not task.judged)
    return {task.key: mean_of([found[key] for key in task.datasets if key in found]) for task in scored}


def shuffled_within(predictions: list[str | None], datasets: list[str]) -> list[str | None]:
    """The predictions, dealt anew among the rows of their dataset."""
    rng = random.Random(1)
    pools: dict[str, list[str | None]] = {}
    for guess, key in zip(predictions, datasets, strict=True):
        pools.setdefault(key, []).append(guess)
    for pool in pools.values():
        rng.shuffle(pool)
    return [pools[key].pop() for key in datasets]


def median_seconds(work: Callable[[], object]) -> float:
    """Median of five, CPU-seconds of this process."""
    times = []
    for _ in range(5):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return statistics.median(times)


def main() -> None:
    """Measure and print."""
    rows = make_rows(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
    predictions, targets, datasets = (list(column) for column in zip(*rows, strict=True))
    fast = {key: task["score"] for key, task in score(predictions, targets, datasets)["tasks"].items()}
    slow = loop_score(rows)
    assert all(abs((fast[key] or 0) - (slow[key] or 0)) < 1e-9 for key in slow), (fast, slow)
    encoded = encode(predictions, targets, datasets)
    # The same rows, answered by another hand: each dataset's answers in another order.
    other = encode(shuffled_within(predictions, datasets), targets, datasets)
    groups = [f"{row // 5}" for row in range(len(rows))]
    seconds = {
        "score": median_seconds(lambda: score(predictions, targets, datasets)),
        "loop": median_seconds(lambda: loop_score(rows)),
        "intervals_2000": median_seconds(lambda: bootstrap(encoded)),
        "intervals_2000_clustered": median_seconds(lambda: bootstrap(encoded, clusters=groups)),
        "chance": median_seconds(lambda: chance(encoded)),
        "paired_2000": median_seconds(lambda: paired_difference(encoded, other)),
        "paired_2000_clustered": median_seconds(lambda: paired_difference(encoded, other, clusters=groups)),
    }
    rounded = {name: round(value, 4) for name, value in seconds.items()}
    print(json.dumps({"rows": len(rows), **rounded, "ratio": round(seconds["loop"] / seconds["score"], 1)}))


if __name__ == "__main__":
    main()
