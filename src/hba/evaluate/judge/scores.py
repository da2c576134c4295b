"""Verdicts in metrics.json: llm_judge_accuracy of the free-form datasets, and the scores of their tasks.

A dataset has a score once every answer of it has a verdict; an empty answer is wrong without one. Until then its entry
has bounds and counts, and its task a note with them. `chance` of a judged task is the share of its most frequent
reference, which one constant answer reaches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hba.errors import InputError
from hba.evaluate.judge.items import FILE, answer_sha256, read_judgements
from hba.evaluate.metrics import RIGHT, WRONG, Rows, mean_of
from hba.evaluate.predictions import Prediction
from hba.taxonomy import Taxonomy

# Judge accuracy: the share of a dataset's answers that the judge found correct.
#
# Every row counts: an empty or failed answer is wrong without a judge, and a row without a verdict is unknown. One
# unknown row leaves the dataset without a score; what is known then are bounds, all unknown ones wrong or all right.


METRIC = "llm_judge_accuracy"
Verdicts = Mapping[str, bool | None]


def judge_accuracy(verdicts: Sequence[bool | None], *, published: bool = False) -> float | None:
    """Share of True in [0, 1]; None if a verdict is missing, or if there is none at all.

    `published=True` leaves rows without a verdict out of numerator and denominator, as the released script does.
    """
    known = [verdict for verdict in verdicts if verdict is not None]
    if not known or (len(known) < len(verdicts) and not published):
        return None
    return sum(known) / len(known)


def bounds(verdicts: Sequence[bool | None]) -> tuple[float, float] | None:
    """The accuracy if every missing verdict were False, and if every one were True; None without rows."""
    if not verdicts:
        return None
    right, unknown = sum(v is True for v in verdicts), sum(v is None for v in verdicts)
    return right / len(verdicts), (right + unknown) / len(verdicts)


def by_dataset(verdicts: Mapping[str, Sequence[bool | None]], *, published: bool = False) -> dict[str, dict[str, Any]]:
    """Per dataset: the accuracy, its bounds if verdicts are missing, and the counts n_judged and n_unjudged."""
    found: dict[str, dict[str, Any]] = {}
    for key, values in verdicts.items():
        unknown = sum(value is None for value in values)
        found[key] = {METRIC: judge_accuracy(values, published=published)}
        found[key] |= {"n_judged": len(values) - unknown, "n_unjudged": unknown}
        if unknown:
            found[key][f"{METRIC}_bounds"] = list(bounds(values) or ())
    return found


# --- verdicts in metrics.json -----------------------------------------------------------------------------------------


def read_verdicts(folder: Path, predictions: Sequence[Prediction], taxonomy: Taxonomy) -> dict[str, bool | None]:
    """The verdict of every free-form prediction by id, None without one; empty if nobody has judged the run.

    Raises InputError for a malformed judgements.jsonl, or one that is about other answers.
    """
    path = folder / FILE
    if not path.is_file():
        return {}
    judgements = read_judgements(path)
    found: dict[str, bool | None] = {}
    for p in predictions:
        if not taxonomy.dataset(p.dataset).free_form:
            continue
        judgement = judgements.get(p.id)
        if not p.spoken:
            found[p.id] = False
        elif judgement is None:
            found[p.id] = None
        elif judgement.answer_sha256 != answer_sha256(p.truth, p.answer or ""):
            fix = "Remove judgements.jsonl and judge.json, and judge these answers."
            raise InputError(f"the verdict on {p.id!r} is about another answer", where=str(path), fix=fix)
        else:
            found[p.id] = judgement.correct
    return found


def judged_rows(rows: Rows, predictions: Sequence[Prediction], verdicts: Verdicts) -> Rows:
    """`rows` with verdicts instead of exact matches, in the free-form datasets whose task is judged to the last answer.

    A task of which one dataset is judged and another is not has no score, and nothing of it may pass for one.
    """
    complete = _complete(predictions, verdicts, rows.layout.taxonomy)
    cells = rows.cells.copy()
    for number, p in enumerate(predictions):
        if p.dataset in complete and p.spoken:
            start = rows.layout.freeform_start + 3 * rows.layout.freeform_code[p.dataset]
            cells[number] = start + (RIGHT if verdicts[p.id] else WRONG)
    return replace(rows, cells=cells, judged=frozenset(complete))


def add_judged(
    metrics: dict[str, Any],
    predictions: Sequence[Prediction],
    verdicts: Verdicts,
    taxonomy: Taxonomy,
    *,
    published: bool = False,
) -> None:
    """Add the datasets' judge accuracy, the judged tasks' scores, and both to the mean over tasks."""
    values: dict[str, list[bool | None]] = {}
    for p in predictions:
        if p.id in verdicts:
            values.setdefault(p.dataset, []).append(verdicts[p.id])
    for key, entry in by_dataset(values, published=published).items():
        metrics["datasets"][key] |= entry
    for task in taxonomy.tasks.values():
        keys = [key for key in task.datasets if key in values]
        if keys and task.judged:
            entries = [metrics["datasets"][key] for key in keys]
            scores = [entry[METRIC] for entry in entries]
            rows = sum(entry["n"] for entry in entries)
            score = None if None in scores else mean_of(scores)
            found = metrics["tasks"][task.key] = {"score": score, "metric": METRIC, "n": rows, "datasets": keys}
            if score is None:
                found["note"] = _note(entries)
    metrics["aggregate"]["mean"]["score"] = mean_of([task["score"] for task in metrics["tasks"].values()])


def _complete(predictions: Sequence[Prediction], verdicts: Verdicts, taxonomy: Taxonomy) -> set[str]:
    open_ = {p.dataset for p in predictions if verdicts.get(p.id, False) is None}
    tasks = {taxonomy.dataset(key).task for key in open_} - {None}
    judged = {p.dataset for p in predictions if p.id in verdicts}
    return {key for key in judged - open_ if taxonomy.dataset(key).task not in tasks}


def _note(entries: Sequence[Mapping[str, Any]]) -> str:
    unjudged, rows = sum(entry["n_unjudged"] for entry in entries), sum(entry["n"] for entry in entries)
    low, high = (mean_of([_bound(entry, side) for entry in entries]) for side in (0, 1))
    return f"not scored: {unjudged} of {rows} answers are unjudged; between {low:.3f} and {high:.3f}"


def _bound(entry: Mapping[str, Any], side: int) -> float | None:
    bounds: Sequence[float] | None = entry.get(f"{METRIC}_bounds")
    score: float | None = entry[METRIC]
    return score if bounds is None else bounds[side]
