"""The predictions of a run, or of two beside each other, with filters that find the mistakes."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from hba.errors import InputError
from hba.explorer import drawings
from hba.explorer.app import explorer_of, form_of
from hba.explorer.query import PAIRS, VERDICTS, Form, find_predictions
from hba.explorer.runs import exact


def predictions(request: Request) -> Response:
    """A page of predictions."""
    explorer, form = explorer_of(request), form_of(request)
    runs = explorer.runs.predicted()
    if not runs:
        return explorer.page(request, "predictions.html.jinja", "Predictions", runs=[], found=None)
    form = Form({**form.values, "a": form.text("a") or runs[0].name})
    for side in ("a", "b"):
        if form.text(side):
            explorer.runs.load(form.text(side))
    found = find_predictions(explorer.database, form)
    rows = [_shown(row, form) for row in found.rows]
    return explorer.page(
        request, "predictions.html.jinja", "Predictions", runs=runs, found=found, rows=rows, asked=form,
        values=_values(explorer, form), verdicts=list(VERDICTS), pairs=list(PAIRS),
    )  # fmt: skip


def _shown(row: Any, form: Form) -> dict[str, Any]:
    shown = {"row": row, "exact": exact(row["answer"], row["target"]), **drawings.answer(row)}
    shown["state"] = state_of(row["correct"], row["judged"], row["error"], row["invalid"])
    if form.text("b"):
        shown["b_state"] = state_of(row["b_correct"], row["b_judged"], row["b_error"], 0)
    return shown


def state_of(correct: int | None, judged: int | None, error: str | None, invalid: int) -> str:
    """One word for what became of a sample: right, wrong, invalid, error or unjudged."""
    if error:
        return "error"
    if invalid:
        return "invalid"
    verdict = judged if correct is None else correct
    return "unjudged" if verdict is None else "right" if verdict else "wrong"


def _values(explorer: Any, form: Form) -> dict[str, list[str]]:
    run = form.text("a")
    known: dict[str, list[str]] = {}
    for name in ("dataset", "task", "split", "target"):
        query = f"SELECT DISTINCT {name} FROM runs.prediction WHERE run = ? ORDER BY 1"  # noqa: S608  a name of ours
        condition = [run]
        if name == "target":
            query = "SELECT DISTINCT target FROM runs.prediction WHERE run = ? AND correct IS NOT NULL ORDER BY 1"
        known[name] = [row[0] for row in explorer.database.all(query, condition)]
    return known


def prediction(request: Request) -> Response:
    """From the id of a prediction to its sample's page."""
    explorer, form = explorer_of(request), form_of(request)
    query = "SELECT split, number FROM rows.sample WHERE split = ? AND id = ?"
    found = explorer.database.one(query, (form.text("split"), form.text("id")))
    if found is None:
        what = f"the atlas has no sample {form.text('id')!r} in split {form.text('split')!r}"
        raise InputError(what, fix="Open the atlas that the run was predicted on with --atlas.")
    return RedirectResponse(f"/sample/{found['split']}/{found['number']}")
