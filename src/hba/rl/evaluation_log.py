"""The evaluations of an RL run on disk: one file a step, one line a held-out prompt with both ways of answering it.

Reading needs neither torch nor the model, so that a report and the explorer can show a run from any machine.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from hba.storage import read_jsonl, write_jsonl

FOLDER = "evaluations"
WAYS = ("sampled", "greedy")
COLLAPSED_SHARE = 0.95  # of the answers that are one answer, and above its share of the targets by at least:
COLLAPSED_EXCESS = 0.15
COLLAPSED_ROWS = 10  # fewer say nothing


def mean_parts(responses: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The parts of the responses to one row, each the mean over those that have it; of one response its very own."""
    names = dict.fromkeys(name for parts in responses for name in parts)
    return {name: mean([parts[name] for parts in responses if name in parts]) for name in names}


def summary(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over the rows: reward, right and format of both ways, and `right` of the greedy responses by task.

    Beside them `chance`, of all rows and by task: the share that is right where each row gets the most frequent target
    of its dataset, whatever it asks.
    """
    means: dict[str, list[float]] = defaultdict(list)
    targets: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        targets[record["dataset"]][record["target"]] += 1
    for record in records:
        for way in WAYS:
            for name, part in (("reward", "score"), ("right", "right"), ("format", "format"), ("tokens", "tokens")):
                means[f"{way}_{name}"].append(record[way][part])
        means[f"greedy_right/{record['task']}"].append(record["greedy"]["right"])
        of_dataset = targets[record["dataset"]]
        for name in ("chance", f"chance/{record['task']}"):
            means[name].append(max(of_dataset.values()) / of_dataset.total())
    return {name: float(np.mean(values)) for name, values in sorted(means.items())}


def collapsed(answers: Counter[str], targets: Counter[str], count: int) -> str | None:
    """What is said of `count` answers that are nearly all one answer, when the targets are not; else None."""
    top, times = answers.most_common(1)[0]
    share, wanted = times / count, targets[top] / count
    if count < COLLAPSED_ROWS or share < COLLAPSED_SHARE or share - wanted < COLLAPSED_EXCESS:
        return None
    shown = top if len(top) <= 40 else f"{top[:37]}..."
    return f"{share:.0%} of {count} answers are {shown!r}, which {wanted:.0%} of the targets are"


def collapsed_tasks(records: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for each task of an evaluation whose greedy answers are nearly all one answer."""
    by_task: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for record in records:
        by_task[record["task"]].append((record["answer"], record["target"]))
    said = {
        task: collapsed(Counter(answer for answer, _ in pairs), Counter(target for _, target in pairs), len(pairs))
        for task, pairs in sorted(by_task.items())
    }
    return [f"the held-out answers to {task} have collapsed: {what}" for task, what in said.items() if what is not None]


def write_evaluation(run: Path, step: int, records: Sequence[dict[str, Any]]) -> None:
    """Keep the records of an evaluation at `step`."""
    write_jsonl(run / FOLDER / f"step_{step}.jsonl", records)


def read_evaluations(run: Path) -> dict[int, list[dict[str, Any]]]:
    """The records of every evaluation of a run, by step."""
    files = {int(path.stem.removeprefix("step_")): path for path in (run / FOLDER).glob("step_*.jsonl")}
    return {step: [line.record for line in read_jsonl(files[step])] for step in sorted(files)}
