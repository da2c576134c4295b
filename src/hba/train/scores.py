"""Scores of a validation (exact match from logits alone, the mean over tasks), and whose heads were trained at all.

An answer whose every token is the most probable one behind those before it is what greedy decoding gives: no decoding
is needed to know whether it would be right.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hba.atlas import Atlas
from hba.batch.sampler import Indices
from hba.errors import InputError
from hba.model import checkpoint
from hba.taxonomy import Taxonomy
from hba.train.loop import Validation


def exact(logits_LV: Tensor, tokens_L: Tensor, lengths_B: Tensor, banned: Sequence[int]) -> list[bool]:
    """Whether greedy decoding gives each answer whole: every token the most probable one behind those before it."""
    banned_ids = torch.tensor(list(banned), dtype=torch.long, device=logits_LV.device)
    logits_LV = logits_LV.float().index_fill(1, banned_ids, -torch.inf)
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


# Which domains' heads are trained at the end of a stage. What another head says is noise: it is not scored.
#
# A checkpoint's card names them; None stands for all, as of the checkpoints that the authors released.


def after_sft(train: Atlas, rows: Indices, start: str) -> list[str] | None:
    """Those of the `rows` of `train` that are trained on, and those of the checkpoint `start`, if there is one."""
    base = checkpoint.resolve(start)
    card: dict[str, Any] = {"columns": None} if base is None else checkpoint.read_card(base)
    known: list[str] | None = [] if card["columns"] is None else card.get("domains")
    if known is None:
        return None
    columns = train.columns
    codes = set(columns.dataset_codes[rows].tolist())
    return sorted({*known, *_domains(train.taxonomy, (columns.datasets[code] for code in codes))})


def require_trained(validation: Atlas, domains: list[str] | None) -> None:
    """Raise InputError when no row of `validation` belongs to a domain whose head is trained: no score is had."""
    columns = validation.columns
    found = _domains(validation.taxonomy, (columns.datasets[code] for code in set(columns.dataset_codes.tolist())))
    if domains is not None and not found & set(domains):
        what = f"its rows are of {', '.join(sorted(found))}, the trained heads of {', '.join(domains)}"
        fix = "Give training and validation rows of one domain at least: other datasets, or other splits."
        raise InputError(what, where=f"{validation.root}, split {validation.split}", fix=fix)


def after_bam(
    card: dict[str, Any], datasets: Iterable[str], taxonomy: Taxonomy, base: Path, *, heads: bool
) -> list[str] | None:
    """Those of the checkpoint `base` (`card` is its card), and those of `datasets` if the stage trains `heads`, too.

    Raises InputError for adapters alone before a head that was never trained.
    """
    known: list[str] | None = card.get("domains")
    if known is None:
        return None
    wanted = _domains(taxonomy, datasets)
    if not heads and (fresh := wanted - set(known)):
        fix = "Leave its datasets out (datasets=[...]), use stage=adapters+heads, or train its head first (train sft)."
        raise InputError(f"no head of {', '.join(sorted(fresh))} was trained", where=str(base), fix=fix)
    return sorted({*known, *wanted})


def _domains(taxonomy: Taxonomy, datasets: Iterable[str]) -> set[str]:
    return {domain for key in datasets if (domain := taxonomy.dataset(key).domain) is not None}
