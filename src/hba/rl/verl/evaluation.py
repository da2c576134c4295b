"""The evaluations of a run on verl in the local engine's form: evaluations/step_N.jsonl, one line a held-out prompt.

verl validates with one way of sampling and keeps means. Each row stands in its validation set once a response, the
reward manager adds the evaluation's judgement and the row's number to the parts of a reward, and the trainer puts the
responses to a row together again. A row of which one response is missing (its media cannot be read) is left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from hba.atlas import Atlas
from hba.atlas.sample import Sample
from hba.rl.evaluation import is_right
from hba.rl.evaluation_log import WAYS, mean_parts
from hba.rl.rewards import well_formed
from hba.taxonomy import Taxonomy

ROW, WAY = "hba_row", "hba_way"  # which response it is, as numbers: verl averages all parts


def ways(draws: int) -> tuple[str, ...]:
    """How each of the responses to a row is made: `draws` are sampled, one is greedy."""
    return ("sampled",) * draws + ("greedy",)


def verdict(sample: Sample, text: str, row: int, way: str, taxonomy: Taxonomy) -> dict[str, float]:
    """What an evaluation says of a response beyond the parts of its reward, and which response it is."""
    right, formed = float(is_right(sample, text, taxonomy)), float(well_formed(text))
    return {"right": right, "format": formed, ROW: float(row), WAY: float(WAYS.index(way))}


def records(atlas: Atlas, parts: Mapping[str, Sequence[float]], draws: int) -> list[dict[str, Any]]:
    """One record a row of `atlas` with the parts both ways, means over `draws` sampled responses, in the atlas' order.

    `parts` are columns, one value a response: `ROW`, `WAY`, tokens, right, format and the parts of the reward.
    """
    by_row: dict[int, dict[str, list[dict[str, float]]]] = defaultdict(lambda: {way: [] for way in WAYS})
    names = [name for name in parts if name not in (ROW, WAY, "reward")]  # reward is verl's name of the score
    for i, (row, way) in enumerate(zip(parts[ROW], parts[WAY], strict=True)):
        by_row[int(row)][WAYS[int(way)]].append({name: parts[name][i] for name in names})
    found = []
    for row, responses in by_row.items():
        if all(len(made) == ways(draws).count(way) for way, made in responses.items()):
            sample = atlas[row]
            identity = {"id": sample.id, "task": sample.task, "dataset": sample.dataset, "number": sample.number}
            found.append({**identity, **{way: mean_parts(made) for way, made in responses.items()}})
    return sorted(found, key=lambda record: int(record["number"]))
