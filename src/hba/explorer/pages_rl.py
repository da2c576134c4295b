"""RL: the curves of a run's rewards and factors, and the rollouts of one prompt over the steps."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from hba.explorer.app import explorer_of, form_of
from hba.explorer.runs import finite, whole_lines
from hba.report.plots import Series, line_chart, nice_axis

FILE = "rollouts.jsonl"
MAX_SHOWN = 200


def rl(request: Request) -> Response:
    """A run's figures per task over the steps, and its sampled rollouts."""
    explorer, form = explorer_of(request), form_of(request)
    runs = [run for run in explorer.runs.all() if run.has(FILE)]
    if not runs:
        return explorer.page(request, "rl.html.jinja", "RL", runs=[], run=None)
    run = explorer.runs.get(form.text("run") or runs[0].name)
    rollouts = list(whole_lines(run.path / FILE))
    prompts = sorted({str(r.get("id")) for r in rollouts})
    chosen = form.text("id") or (prompts[0] if prompts else "")
    shown = [r for r in rollouts if str(r.get("id")) == chosen][:MAX_SHOWN]
    charts = _charts(list(whole_lines(run.path / "log.jsonl")))
    return explorer.page(
        request, "rl.html.jinja", "RL", runs=runs, run=run, prompts=prompts, chosen=chosen, rollouts=shown,
        charts=charts, total=len(rollouts),
    )  # fmt: skip


def _charts(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The charts of every figure of the steps, one a task."""
    series: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for event in events:
        for group, name, value in _figures(event):
            series.setdefault(name, {}).setdefault(group, []).append((float(event["step"]), value))
    last = max((int(event.get("step", 0)) for event in events), default=0)
    return [{"title": name, "lines": _lines(name, lines, last)} for name, lines in series.items()]


def _figures(event: dict[str, Any]) -> list[tuple[str, str, float]]:
    """(task, name, value) of everything that a step's line says; `all` stands for the mean over all tasks."""
    if event.get("kind") != "rl":
        return []
    whole = {name: value for name, value in event.items() if name not in ("step", "samples_seen")}
    groups = {"all": whole, **(event.get("tasks") or {})}
    return [
        (task, name, known)
        for task, figures in groups.items()
        for name, value in figures.items()
        if (known := finite(value)) is not None
    ]


def _lines(name: str, lines: dict[str, list[tuple[float, float]]], last: int) -> list[dict[str, Any]]:
    values = [y for points in lines.values() for _, y in points]
    axis = nice_axis(min(0.0, *values), max(values))
    drawn = []
    for group, points in lines.items():
        label = f"{name}, {group}: {points[0][1]:.3g} to {points[-1][1]:.3g}"
        one = Series(name=group, points=points, style="main")
        drawn.append({"name": group, "last": points[-1][1],
                      "svg": line_chart([one], axis, last_step=last, label=label, height=110, small=True)})  # fmt: skip
    return drawn
