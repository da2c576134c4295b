"""Scores of a validation that come from logits alone: exact match of answers, the mean over tasks.

An answer whose every token is the most probable one behind those before it is what greedy decoding gives: no decoding
is needed to know whether it would be right.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from hba.atlas import Atlas
from hba.errors import InputError
from hba.train.loop import Validation


def exact(logits_LV: Tensor, tokens_L: Tensor, lengths_B: Tensor, banned: Sequence[int]) -> list[bool]:
    """Whether greedy decoding gives each answer whole: every token the most probable one behind those before it."""
    logits_LV = logits_LV.float().index_fill(1, torch.tensor(list(banned), device=logits_LV.device), -torch.inf)
    right_L = logits_LV.argmax(1) == tokens_L
    return [bool(part_L.all()) for part_L in torch.split(right_L, lengths_B.tolist())]


def exact_matches(rows: Atlas, said: Iterable[tuple[str, bool]]) -> dict[str, float]:
    """The exact match of each task: the mean over its datasets of the share of answers that are right."""
    by_task: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for key, right in said:
        by_task[str(rows.taxonomy.dataset(key).task or key)][key].append(right)
    return {
        task: sum(sum(hits) / len(hits) for hits in keys.values()) / len(keys) for task, keys in sorted(by_task.items())
    }


def mean_over_tasks(scores: Mapping[str, float | None], rows: Atlas, num_read: int) -> Validation:
    """The scores of the tasks that have one, with their mean, which chooses the best checkpoint; None if none has.

    A task has no score where its metric is not defined on the rows, such as two-class sentiment of neutral ones alone.
    `num_read` rows were answered. Raises InputError for 0.
    """
    if not num_read:
        fix = "Repair the media named in quarantine.jsonl."
        raise InputError(f"no sample of split {rows.split!r} can be read", where=str(rows.root), fix=fix)
    known = {key: score for key, score in scores.items() if score is not None}
    mean = sum(known.values()) / len(known) if known else None
    return Validation(mean, {**known, "mean": mean})
