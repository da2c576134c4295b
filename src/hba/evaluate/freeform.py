"""Free-form answers without a judge: exact match, and the accuracies of the released generation evaluation.

Neither is the task score of the benchmark, which is the share that a judge finds right and stays unscored until one has
spoken. Exact match compares answers as `answers.plain` leaves them; no answer is a wrong one. Invariant: every rate
is a share of all rows, whatever could be read of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hba.evaluate.answers import plain, same_answer
from hba.evaluate.confusion import check_lengths


def generation_metrics(
    answers: Sequence[str | None], targets: Sequence[str], datasets: Sequence[str], tasks: Sequence[str]
) -> dict[str, float]:
    """The generation evaluation of the released SFT trainer, under its names (without the split in front).

    overall_accuracy and total_samples over all rows, {dataset}/accuracy and {dataset}/count, macro_accuracy (mean over
    datasets), task/{task}/accuracy by the row's own `task`. All four have N items; without rows there is only
    total_samples. Raises InputError for lengths that differ.
    """
    check_lengths(answers=answers, targets=targets, datasets=datasets, tasks=tasks)
    pairs = zip(answers, targets, strict=True)
    right = [answer is not None and same_answer(answer, target) for answer, target in pairs]
    if not right:
        return {"total_samples": 0}
    by_dataset, by_task = _shares(datasets, right), _shares(tasks, right)
    counts = Counter(datasets)
    found = {"overall_accuracy": sum(right) / len(right), "total_samples": float(len(right))}
    for key, share in by_dataset.items():
        found |= {f"{key}/accuracy": share, f"{key}/count": float(counts[key])}
    found["macro_accuracy"] = sum(by_dataset.values()) / len(by_dataset)
    return found | {f"task/{key}/accuracy": share for key, share in by_task.items()}


def majority_levels(targets: Sequence[str], datasets: Sequence[str]) -> dict[str, float]:
    """Per dataset the exact match of the best constant answer: the share of its most frequent target, in [0, 1]."""
    answers: dict[str, Counter[str]] = {}
    for key, target in zip(datasets, targets, strict=True):
        answers.setdefault(key, Counter())[plain(target)] += 1
    return {key: max(counts.values()) / counts.total() for key, counts in answers.items()}


def _shares(keys: Sequence[str], right: Sequence[bool]) -> dict[str, float]:
    rows, hits = Counter(keys), Counter(key for key, hit in zip(keys, right, strict=True) if hit)
    return {key: hits[key] / rows[key] for key in sorted(rows)}
