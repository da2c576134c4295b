"""The runs: a list, one run with its curves while it trains, and configs side by side."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from hba import yaml_core
from hba.config import flat
from hba.errors import InputError
from hba.evaluate.runs import Event
from hba.explorer.app import explorer_of, form_of
from hba.explorer.runs import RunEntry, whole_lines
from hba.report.curves import Curves, curves

SHOWN_FACTS = (
    *("command", "started_at", "hba_version", "git_commit", "python", "platform", "cpu", "cpu_cores", "gpus", "seed"),
)


def runs(request: Request) -> Response:
    """Every run with its command, its score and its age."""
    explorer = explorer_of(request)
    return explorer.page(request, "runs.html.jinja", "Runs", runs=[_summary(run) for run in explorer.runs.all()])


def _summary(run: RunEntry) -> dict[str, Any]:
    environment = run.opened.environment or {}
    last = max((int(record.get("step", 0)) for record in whole_lines(run.path / "log.jsonl")), default=None)
    score, part = None, ""
    if run.has("metrics.json"):
        try:
            metrics = run.opened.metrics
            score, part = metrics.mean.score, metrics.aggregate.rows if metrics.aggregate.n_missing else ""
        except InputError as error:  # of this run alone; its own page says it in full
            part = error.what
    return {
        "run": run,
        "command": environment.get("command", "predict" if run.has("predict.json") else ""),
        "started": environment.get("started_at", ""),
        "score": score,
        "part": part,
        "step": last,
    }


def run(request: Request) -> Response:
    """One run: curves, configuration, environment, and where to go from here."""
    explorer = explorer_of(request)
    shown = explorer.runs.get(form_of(request).text("run"))
    environment = shown.opened.environment or {}
    return explorer.page(
        request, "run.html.jinja", shown.name, run=shown, curves=_curves(shown),
        config=shown.opened.config,
        facts={name: environment[name] for name in SHOWN_FACTS if name in environment},
        packages=environment.get("packages", {}), data=environment.get("data", {}),
    )  # fmt: skip


def run_curves(request: Request) -> Response:
    """The curves of one run, for the page that asks again while the run goes on."""
    explorer = explorer_of(request)
    shown = explorer.runs.get(form_of(request).text("run"))
    return explorer.page(request, "curves_live.html.jinja", shown.name, run=shown, curves=_curves(shown))


def _curves(shown: RunEntry) -> Curves | None:
    events = []
    for record in whole_lines(shown.path / "log.jsonl"):
        kept = {k: v for k, v in record.items() if k in Event.__dataclass_fields__}
        events.append(msgspec.convert({"kind": "", **kept}, Event))
    if not events:
        return None
    return curves(events, shown.opened.metrics.tasks if shown.has("metrics.json") else {})


def side_by_side(request: Request) -> Response:
    """The configs of the chosen runs, one line a key, those that differ first."""
    explorer = explorer_of(request)
    names = request.query_params.getlist("run")
    chosen = [explorer.runs.get(name) for name in names]
    configs = [flat(yaml_core.read(run.path / "config.yaml")) if run.has("config.yaml") else {} for run in chosen]
    rows = []
    for key in sorted({key for config in configs for key in config}):
        values = [yaml_core.dump_inline(config[key]) if key in config else "–" for config in configs]
        rows.append({"key": key, "values": values, "differs": len(set(values)) > 1})
    rows.sort(key=lambda row: (not row["differs"], row["key"]))
    return explorer.page(request, "side_by_side.html.jinja", "Side by side", runs=chosen, rows=rows)
