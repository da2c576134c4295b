"""How a document that `rows` wrote is answered and scored, whatever harness asks.

Needs numpy, msgspec and PyYAML, neither torch nor a decoder, so that it runs in the harness' own environment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from hba.evaluate.answers import read
from hba.evaluate.metrics import mean_of, score
from hba.taxonomy import Taxonomy, of_folder

JUDGED_METRIC = "exact_match"


@lru_cache(maxsize=8)
def taxonomy_of(folder: str) -> Taxonomy:
    """The taxonomy of an export."""
    return of_folder(folder)


def read_answer(document: Mapping[str, Any], text: str, *, cut: bool = False) -> dict[str, Any]:
    """One scored row: dataset, target, and the label (free-form: the answer) that the model's `text` gives, or None.

    `cut`: it reached a limit of length.
    """
    taxonomy = taxonomy_of(document["taxonomy"])
    free_form = taxonomy.dataset(document["dataset"]).free_form
    prompt = "".join(part.get("text", "") for part in document["parts"]) if "parts" in document else None
    _, answer, label = read(text, document["dataset"], taxonomy, prompt=prompt, cut=cut)
    said = (answer or None) if free_form else label
    return {name: document[name] for name in ("dataset", "target", "task", "taxonomy")} | {"answer": said}


def task_metric(taxonomy: Taxonomy, task: str) -> str:
    """The metric that a harness can compute alone: that of the task, exact match where a judge would be needed."""
    return JUDGED_METRIC if taxonomy.tasks[task].judged else taxonomy.tasks[task].metric


def task_score(rows: Sequence[Mapping[str, Any]]) -> float:
    """The score of the rows of one task by `task_metric`, as `hba score` computes it; NaN where it is not defined."""
    if not rows:
        return float("nan")
    taxonomy = taxonomy_of(rows[0]["taxonomy"])
    answers, targets, datasets = ([row[name] for row in rows] for name in ("answer", "target", "dataset"))
    scored = score(answers, targets, datasets, taxonomy=taxonomy)
    task = rows[0]["task"]
    if taxonomy.tasks[task].judged:
        value = mean_of([entry[JUDGED_METRIC] for entry in scored["datasets"].values()])
    else:
        value = scored["tasks"][task]["score"]
    return float("nan") if value is None else value


def invalid_share(rows: Sequence[Mapping[str, Any]]) -> float:
    """The share of rows whose answer means no label; NaN without rows."""
    return sum(row["answer"] is None for row in rows) / len(rows) if rows else float("nan")
