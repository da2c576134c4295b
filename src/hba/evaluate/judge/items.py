"""What is judged: the free-form answers of a run, each with the question of its own sample.

The question comes from the atlas row with the prediction's id, never from a row with the same answer: answers repeat,
and a question found by its answer is that of another sample. A prediction whose row is not there, or says something
else, is an error; so is an atlas with another fingerprint. An empty answer needs no judge: it is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hba.errors import InputError
from hba.evaluate.predictions import Prediction, read_predictions
from hba.storage import json_sha256, read_json
from hba.taxonomy import of_folder

if TYPE_CHECKING:
    from hba.atlas import Atlas

_TAGS = re.compile(r"<(?:image|video|audio)>")


@dataclass(frozen=True, kw_only=True)
class Item:
    """One answer to judge. `task` is a key such as SOC, None for a dataset without one."""

    id: str
    dataset: str
    task: str | None
    question: str
    reference: str
    answer: str

    @property
    def answer_sha256(self) -> str:
        """What a verdict is about; a verdict on another answer is not this one's."""
        return answer_sha256(self.reference, self.answer)


def answer_sha256(reference: str, answer: str) -> str:
    """Hash of an answer with its reference."""
    return json_sha256([reference, answer])


def free_form(run: Path) -> list[Prediction]:
    """The free-form predictions of a run folder. Raises InputError for a bad file, and if there are none."""
    taxonomy = of_folder(run)
    predictions = read_predictions(run / "predictions.jsonl", taxonomy)
    found = [p for p in predictions if taxonomy.dataset(p.dataset).free_form]
    if not found:
        fix = "Predict with a backend that answers in words; class labels need no judge."
        raise InputError("no free-form answer to judge", where=str(run / "predictions.jsonl"), fix=fix)
    return found


def answered(prediction: Prediction) -> bool:
    """Whether there is an answer that a judge could look at."""
    return bool((prediction.answer or "").strip())


def items_of(run: Path, atlas: str | None = None) -> list[Item]:
    """The items of a run. `atlas` says where the rows are if predict.json does not, or no longer.

    Raises InputError naming id and field for a prediction that does not fit its row.
    """
    predictions = [p for p in free_form(run) if answered(p)]
    questions: dict[tuple[str, str], str] = {}
    for opened in _atlases(run, atlas, predictions):
        questions |= _questions(opened, [p for p in predictions if p.split == opened.split])
    taxonomy = of_folder(run)
    return [
        Item(
            id=p.id,
            dataset=p.dataset,
            task=taxonomy.dataset(p.dataset).task,
            question=questions[p.split, p.id],
            reference=p.target,
            answer=p.answer or "",
        )
        for p in predictions
    ]


def _atlases(run: Path, atlas: str | None, predictions: Sequence[Prediction]) -> list[Atlas]:
    path = run / "predict.json"
    facts: dict[str, Any] = read_json(path) if path.is_file() else {}
    data = facts.get("data") or {}
    source = atlas or data.get("path")
    if source is None:
        raise InputError("nothing says which atlas was predicted", where=str(run), fix="Give it with --atlas.")
    splits = [facts["split"]] if "split" in facts else sorted({p.split for p in predictions})
    from hba.evaluate.selection import predicted_rows  # scoring reads verdicts and needs no decoder

    return [predicted_rows(facts, source, split) for split in splits]


def _questions(atlas: Atlas, predictions: Sequence[Prediction]) -> dict[tuple[str, str], str]:
    """The question of every prediction, by (split, id)."""
    wanted = {p.id: p for p in predictions}
    found = {}
    for row in np.flatnonzero(atlas.columns.label_codes < 0):
        sample = atlas[int(row)]
        prediction = wanted.pop(sample.id, None)
        if prediction is None:
            continue
        for field in ("dataset", "target"):
            if getattr(prediction, field) != getattr(sample, field):
                what = f"{field} is {getattr(prediction, field)!r}, in the atlas {getattr(sample, field)!r}"
                raise InputError(what, where=f"prediction {sample.id}, {field}", fix="Predict this atlas anew.")
        found[sample.split, sample.id] = " ".join(_TAGS.sub(" ", sample.problem).split())
    if wanted:
        what = f"no free-form row has the id {next(iter(wanted))!r} ({len(wanted)} such predictions)"
        raise InputError(what, where=str(atlas.root), fix="Give the atlas that was predicted with --atlas.")
    return found
