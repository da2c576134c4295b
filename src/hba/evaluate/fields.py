"""What a field says of every predicted sample: for slices, fairness and clusters.

`dataset`, `task`, `split`, `language`, `modality` and `group` come from the predictions and the taxonomy. Any other
name, and `group` where no prediction has one, is a field of the atlas' rows, read from the atlas that the run recorded
or the one that is given. Refused: a field that no row has, and rows of another fingerprint than the run's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hba.errors import InputError, nearest
from hba.evaluate.predictions import Prediction
from hba.evaluate.runs import ASKED, Run
from hba.taxonomy import Taxonomy

PUBLISHED_FIELDS = ("class_label", "modality_signature", "answer", "problem")
PREDICTED = ("dataset", "task", "split", "language", "modality", "group")


def field_values(
    field: str, predictions: Sequence[Prediction], taxonomy: Taxonomy, *, run: Run, atlas: Path | None = None
) -> list[str | None]:
    """The value of `field` for every prediction as text, None where a row does not have it.

    `task` is the benchmark's task key (EMO). Raises InputError when no row has the field, naming those that there are.
    """
    if field in PREDICTED:
        if field in ("task", "language"):
            values = [getattr(taxonomy.dataset(p.dataset), field) for p in predictions]
        else:
            values = [getattr(p, field) for p in predictions]
        if not any(values) and field == "group":  # where the taxonomy tells none, it is a field like any other
            return _from_atlas(field, predictions, run, atlas)
        if not any(values):
            fix = "Predict again with this version, or name a field of the rows."
            raise InputError(f"no prediction says its {field}", where=str(run.folder), fix=fix)
        return values
    return _from_atlas(field, predictions, run, atlas)


def _from_atlas(field: str, predictions: Sequence[Prediction], run: Run, atlas: Path | None) -> list[str | None]:
    from hba.evaluate.selection import predicted_rows

    asked = run.asked
    data = asked.get("data") or {}
    place = str(atlas) if atlas is not None else data.get("path")
    split = asked.get("split") or "+".join(sorted({p.split for p in predictions}))
    if not place:
        fix = "Say with --atlas where the rows are."
        what = f"the run does not record the atlas that has the field {field!r}"
        raise InputError(what, where=str(run.root / ASKED), fix=fix)
    opened = predicted_rows(asked, place, split)
    wanted, found, names = {p.id for p in predictions}, {}, set(PREDICTED)
    for key, row, extra in opened.said():
        if key in wanted:
            said = {**extra, **{name: getattr(row, name) for name in PUBLISHED_FIELDS}}
            names |= said.keys()
            found[key] = _text(said.get(field))
    values = [found.get(p.id) for p in predictions]
    if not any(value is not None for value in values):
        raise InputError(f"no row has the field {field!r}", where=str(place), fix=nearest(field, sorted(names)))
    return values


def _text(value: Any) -> str | None:
    return None if value in (None, "") else str(value)
