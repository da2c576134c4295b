"""The evaluations of an RL run on disk: one file a step, one line a held-out prompt with both ways of answering it.

Reading needs neither torch nor the model, so that a report and the explorer can show a run from any machine.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from hba.storage import atomic_write, read_jsonl

FOLDER = "evaluations"
WAYS = ("sampled", "greedy")


def mean_parts(responses: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The parts of the responses to one row, each the mean over those that have it; of one response its very own."""
    names = dict.fromkeys(name for parts in responses for name in parts)
    return {name: mean([parts[name] for parts in responses if name in parts]) for name in names}


def summary(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over the rows: reward, right and format of both ways, and `right` of the greedy responses by task."""
    means: dict[str, list[float]] = defaultdict(list)
    for record in records:
        for way in WAYS:
            for name, part in (("reward", "score"), ("right", "right"), ("format", "format"), ("tokens", "tokens")):
                means[f"{way}_{name}"].append(record[way][part])
        means[f"greedy_right/{record['task']}"].append(record["greedy"]["right"])
    return {name: float(np.mean(values)) for name, values in sorted(means.items())}


def write_evaluation(run: Path, step: int, records: Sequence[dict[str, Any]]) -> None:
    """Keep the records of an evaluation at `step`."""
    with atomic_write(run / FOLDER / f"step_{step}.jsonl") as handle:
        handle.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def read_evaluations(run: Path) -> dict[int, list[dict[str, Any]]]:
    """The records of every evaluation of a run, by step."""
    files = {int(path.stem.removeprefix("step_")): path for path in (run / FOLDER).glob("step_*.jsonl")}
    return {step: [line.record for line in read_jsonl(files[step])] for step in sorted(files)}
