"""Scores with intervals, confusion matrices that open their samples, calibration, slices, and two runs compared."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from hba.explorer import drawings
from hba.explorer.app import explorer_of, form_of
from hba.explorer.pages_predictions import confusion_of
from hba.explorer.runs import RunEntry, optional_json
from hba.report.load import Metrics, parse_metrics
from hba.report.plots import bar

SLICED = ("modality", "dataset", "split")
CONFIDENCE_BINS = 10


def scores(request: Request) -> Response:
    """The metrics of a run."""
    explorer, form = explorer_of(request), form_of(request)
    runs = [run for run in explorer.runs.all() if run.has("metrics.json")]
    if not runs:
        return explorer.page(request, "scores.html.jinja", "Scores", runs=[], run=None)
    shown = explorer.runs.get(form.text("run") or runs[0].name)
    metrics = metrics_of(shown)
    matrices: list[dict[str, Any]] = []
    slices: list[dict[str, Any]] = []
    reliability: dict[str, Any] | None = None
    if shown.has("predictions.jsonl"):
        explorer.runs.load(shown.name)
        matrices = confusion_of(explorer, shown.name)
        slices, reliability = _slices(explorer, shown.name), _reliability(explorer, shown.name)
    bars = {key: bar(task, name=key) for key, task in metrics.tasks.items() if task.score is not None}
    return explorer.page(
        request, "scores.html.jinja", "Scores", runs=runs, run=shown, metrics=metrics, bars=bars, matrices=matrices,
        slices=slices, reliability=reliability,
    )  # fmt: skip


def metrics_of(run: RunEntry) -> Metrics:
    """metrics.json of a run. Raises InputError when it is missing or malformed."""
    path = run.path / "metrics.json"
    return parse_metrics(optional_json(path), where=str(path))


def _slices(explorer: Any, run: str) -> list[dict[str, Any]]:
    """Share right by modality and by length of clip, over what has a verdict."""
    found = []
    lengths = """CASE WHEN s.seconds IS NULL THEN 'length not known' WHEN s.seconds = 0 THEN 'no sound or clip'
      WHEN s.seconds < 5 THEN 'under 5 s' WHEN s.seconds < 30 THEN '5 to 30 s' ELSE '30 s and more' END"""
    for title, column in (("Modality", "s.signature"), ("Length", lengths)):
        query = f"""SELECT {column} AS slice, count(*) AS n, avg(coalesce(p.correct, j.correct)) AS share
          FROM runs.prediction p JOIN rows.sample s ON s.id = p.id AND s.split = p.split
          LEFT JOIN runs.judgement j ON j.run = p.run AND j.id = p.id
          WHERE p.run = ? AND coalesce(p.correct, j.correct) IS NOT NULL GROUP BY 1 ORDER BY 1"""  # noqa: S608  our names
        rows = [
            {"slice": row["slice"], "n": row["n"], "share": row["share"], "bar": drawings.bar(row["share"])}
            for row in explorer.database.all(query, (run,))
        ]
        if rows:
            found.append({"title": title, "rows": rows})
    return found


def _reliability(explorer: Any, run: str) -> dict[str, Any] | None:
    """How often the run is right at each confidence (10 bins), and the expected calibration error."""
    query = """SELECT correct, (SELECT max(value) FROM json_each(probs)) AS p FROM runs.prediction
      WHERE run = ? AND probs IS NOT NULL AND correct IS NOT NULL"""
    rows = explorer.database.all(query, (run,))
    if not rows:
        return None
    bins: list[list[tuple[float, int]]] = [[] for _ in range(CONFIDENCE_BINS)]
    for row in rows:
        bins[min(int(row["p"] * CONFIDENCE_BINS), CONFIDENCE_BINS - 1)].append((row["p"], row["correct"]))
    shown, error = [], 0.0
    for number, members in enumerate(bins):
        if members:
            sure = sum(p for p, _ in members) / len(members)
            right = sum(c for _, c in members) / len(members)
            error += len(members) / len(rows) * abs(sure - right)
            span = f"{number / CONFIDENCE_BINS:.1f} to {(number + 1) / CONFIDENCE_BINS:.1f}"
            shown.append({"span": span, "n": len(members), "sure": sure, "right": right, "bar": drawings.bar(right)})
    return {"bins": shown, "error": error, "n": len(rows)}


def compare(request: Request) -> Response:
    """Paired differences of run B to run A, and the samples that flipped."""
    from hba.evaluate.runs import compare_runs

    explorer, form = explorer_of(request), form_of(request)
    runs = explorer.runs.predicted()
    if not (form.text("a") and form.text("b")):
        return explorer.page(request, "compare.html.jinja", "Compare", runs=runs, found=None)
    a, b = (explorer.runs.get(form.text(side)) for side in ("a", "b"))
    found = compare_runs(a.path, b.path, allow_other_data=form.text("other_data") == "1")
    return explorer.page(request, "compare.html.jinja", "Compare", runs=runs, found=found, a=a, b=b)
