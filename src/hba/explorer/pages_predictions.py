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


def confusion_of(explorer: Any, run: str) -> list[dict[str, Any]]:
    """One matrix a classification dataset: labels in the order of the taxonomy, counts, and links to the samples."""
    query = """SELECT dataset, target, coalesce(label, 'no label') AS label, count(*) AS n FROM runs.prediction
      WHERE run = ? AND correct IS NOT NULL GROUP BY 1, 2, 3"""
    counts: dict[str, dict[tuple[str, str], int]] = {}
    for row in explorer.database.all(query, (run,)):
        counts.setdefault(row["dataset"], {})[row["target"], row["label"]] = row["n"]
    taxonomy = explorer.runs.taxonomy(explorer.runs.get(run))
    found = []
    for key, cells in sorted(counts.items()):
        labels = taxonomy.domains[str(taxonomy.dataset(key).domain)].labels
        found.append(_matrix(key, cells, labels, run))
    return found


def _matrix(key: str, cells: dict[tuple[str, str], int], labels: tuple[str, ...], run: str) -> dict[str, Any]:
    used = [label for label in (*labels, "no label") if any(label in pair for pair in cells)]
    targets = [label for label in used if any(target == label for target, _ in cells)]
    rows = []
    for target in targets:
        total = sum(n for (wanted, _), n in cells.items() if wanted == target)
        counts = [cells.get((target, said), 0) for said in used]
        link = Form({"a": run, "dataset": key, "target": target})
        rows.append({"target": target, "cells": [
            {"n": n, "level": drawings.level(n / total), "right": said == target,
             "link": "/predictions" + link.link(predicted=said),
             "tip": f"{target} answered as {said}: {n} of {total}"}
            for said, n in zip(used, counts, strict=True)
        ]})  # fmt: skip
    return {"name": key, "columns": used, "rows": rows}
