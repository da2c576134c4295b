"""The evaluations of a run on verl in the local engine's form: evaluations/step_N.jsonl, one line a held-out prompt.

verl validates with one way of sampling and keeps means. Each row stands in its validation set once a response, the
reward manager adds the evaluation's judgement, the answer and the row's number to the parts of a reward, and the
trainer puts the responses to a row together again. A row of which one response is missing (its media cannot be read) is
left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from hba.atlas import Atlas
from hba.atlas.sample import Sample
from hba.rl.evaluation import answer_of, is_right
from hba.rl.evaluation_log import WAYS, mean_parts
from hba.rl.rewards import well_formed
from hba.rl.verl.config import SIGNAL_PART
from hba.taxonomy import Taxonomy

ROW, WAY = "hba_row", "hba_way"  # which response it is, as numbers
ANSWER = "hba_answer"  # what is read in it, a text
OURS = (ROW, WAY, ANSWER, SIGNAL_PART)  # among the parts of a reward, of which verl makes means


def ways(draws: int) -> tuple[str, ...]:
    """How each of the responses to a row is made: `draws` are sampled, one is greedy."""
    return ("sampled",) * draws + ("greedy",)


def verdict(sample: Sample, text: str, row: int, way: str, taxonomy: Taxonomy) -> dict[str, float | str]:
    """What an evaluation says of a response beyond the parts of its reward, and which response it is."""
    judged: dict[str, float | str] = {
        "right": float(is_right(sample, text, taxonomy)),
        "format": float(well_formed(text)),
        ANSWER: answer_of(sample, text, taxonomy),
    }
    return {**judged, ROW: float(row), WAY: float(WAYS.index(way))}


def records(atlas: Atlas, parts: Mapping[str, Sequence[Any]], draws: int) -> list[dict[str, Any]]:
    """One record a row of `atlas` with the parts both ways, means over `draws` sampled responses, in the atlas' order.

    `parts` are columns, a value a response: `ROW`, `WAY`, `ANSWER`, tokens, right, format and the parts of the reward.
    """
    by_row: dict[int, dict[str, list[dict[str, float]]]] = defaultdict(lambda: {way: [] for way in WAYS})
    greedy: dict[int, str] = {}
    names = [name for name in parts if name not in (*OURS, "reward")]  # reward is verl's name of the score
    for i, (row, way) in enumerate(zip(parts[ROW], parts[WAY], strict=True)):
        by_row[int(row)][WAYS[int(way)]].append({name: parts[name][i] for name in names})
        if WAYS[int(way)] == "greedy":
            greedy[int(row)] = parts[ANSWER][i]
    found = []
    for row, responses in by_row.items():
        if all(len(made) == ways(draws).count(way) for way, made in responses.items()):
            sample = atlas[row]
            identity = {"id": sample.id, "task": sample.task, "dataset": sample.dataset, "number": sample.number}
            means = {way: mean_parts(made) for way, made in responses.items()}
            found.append({**identity, "target": sample.target, **means, "answer": greedy[row]})
    return sorted(found, key=lambda record: int(record["number"]))
