"""Scores with intervals, confusion matrices that open their samples, calibration, slices, and two runs compared."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from hba.evaluate.predictions import read_predictions
from hba.evaluate.results import Metrics
from hba.evaluate.runs import open_run
from hba.explorer.app import explorer_of, form_of
from hba.explorer.query import Form
from hba.explorer.runs import RunEntry
from hba.report.confusion import Matrix, matrices
from hba.report.plots import bar
from hba.report.reliability import reliability
from hba.report.words import warnings
from hba.taxonomy import Taxonomy


def scores(request: Request) -> Response:
    """The metrics of a run."""
    explorer, form = explorer_of(request), form_of(request)
    runs = [run for run in explorer.runs.all() if run.has("metrics.json")]
    if not runs:
        return explorer.page(request, "scores.html.jinja", "Scores", runs=[], run=None)
    shown = explorer.runs.get(form.text("run") or runs[0].name)
    metrics = metrics_of(shown)
    shown_matrices: list[Matrix] = []
    if shown.has("predictions.jsonl"):
        shown_matrices = _matrices(shown, explorer.runs.taxonomy(shown))
    plot = reliability(metrics.calibration.all) if metrics.calibration else None
    bars = {key: bar(task, name=key) for key, task in metrics.tasks.items() if task.score is not None}
    return explorer.page(
        request, "scores.html.jinja", "Scores", runs=runs, run=shown, metrics=metrics, bars=bars,
        warnings=warnings(metrics), matrices=shown_matrices, reliability=plot, zip=zip,
        link=lambda **values: Form(values).link(),
    )  # fmt: skip


def metrics_of(run: RunEntry) -> Metrics:
    """metrics.json of a run. Raises InputError when it is missing or malformed."""
    return open_run(run.path).metrics


def _matrices(run: RunEntry, taxonomy: Taxonomy) -> list[Matrix]:
    """One matrix a dataset, so that a cell says which samples it means."""
    predictions = read_predictions(run.path / "predictions.jsonl", taxonomy)
    return [
        matrix
        for key in sorted({each.dataset for each in predictions})
        for domain in matrices([each for each in predictions if each.dataset == key], taxonomy)
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
