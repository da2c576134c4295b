"""Scores with intervals, confusion matrices that open their samples, calibration, slices, and two runs compared."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from hba.evaluate.runs import Run
from hba.explorer.app import explorer_of, form_of
from hba.explorer.query import Form
from hba.report.confusion import Matrix, matrices
from hba.report.plots import bar
from hba.report.reliability import reliability
from hba.report.words import warnings


def scores(request: Request) -> Response:
    """The metrics of a run."""
    explorer, form = explorer_of(request), form_of(request)
    runs = [run for run in explorer.runs.all() if run.has("metrics.json")]
    if not runs:
        return explorer.page(request, "scores.html.jinja", "Scores", runs=[], run=None)
    shown = explorer.runs.get(form.text("run") or runs[0].name)
    metrics = shown.opened.metrics
    shown_matrices = _matrices(shown.opened) if shown.has("predictions.jsonl") else []
    plot = reliability(metrics.calibration.all) if metrics.calibration else None
    bars = {key: bar(task, name=key) for key, task in metrics.tasks.items() if task.score is not None}
    return explorer.page(
        request, "scores.html.jinja", "Scores", runs=runs, run=shown, metrics=metrics, bars=bars,
        warnings=warnings(metrics, stale=shown.opened.stale), matrices=shown_matrices, reliability=plot, zip=zip,
        link=lambda **values: Form(values).link(),
    )  # fmt: skip


def _matrices(run: Run) -> list[Matrix]:
    """One matrix a dataset, so that a cell says which samples it means."""
    return [
        matrix
        for key in sorted({each.dataset for each in run.predictions})
        for domain in matrices([each for each in run.predictions if each.dataset == key], run.taxonomy)
        for matrix in [domain.pooled]
    ]


def compare(request: Request) -> Response:
    """Paired differences of run B to run A, and the samples that flipped."""
    from hba.evaluate.compare import compare_runs
    from hba.report.comparison import comparison

    explorer, form = explorer_of(request), form_of(request)
    runs = explorer.runs.predicted()
    if not (form.text("a") and form.text("b")):
        return explorer.page(request, "compare.html.jinja", "Compare", runs=runs, found=None)
    a, b = (explorer.runs.get(form.text(side)) for side in ("a", "b"))
    found = compare_runs(a.path, b.path, allow_other_data=form.text("other_data") == "1")
    return explorer.page(
        request, "compare.html.jinja", "Compare", runs=runs, found=found, table=comparison(found), a=a, b=b
    )
