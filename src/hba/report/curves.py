"""Training curves: the charts of a run's log.jsonl.

Loss (each logged step, its smoothed course, and the validation loss), learning rate, gradient norm, the mean
validation score, and one small chart a task. A quantity that was never logged has no chart; values that are not
finite are left out and counted, because a diverged run must be seen as one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from hba.evaluate.results import TaskScore
from hba.evaluate.runs import Event
from hba.report.plots import SMALL_UNIT_AXIS, UNIT_AXIS, Axis, Points, Series, line_chart, nice_axis, smooth
from hba.taxonomy import TASKS

MIN_SMOOTHED_POINTS = 30


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawn chart with its caption and the series that its legend names."""

    title: str
    note: str
    svg: Markup
    legend: tuple[Series, ...]


@dataclass(frozen=True, kw_only=True)
class Curves:
    """`charts` full size, `tasks` small. `num_not_finite` counts logged losses that are NaN or infinite."""

    charts: tuple[Chart, ...]
    tasks: tuple[Chart, ...]
    num_not_finite: int


def curves(events: Sequence[Event], tasks: Mapping[str, TaskScore]) -> Curves:
    """The charts of a log; `tasks` gives the chance levels of the small ones."""
    train = [event for event in events if event.kind == "train"]
    validation = [event for event in events if event.kind == "validation"]
    last_step = max((event.step for event in events), default=0)
    charts = [
        _loss(train, validation, last_step),
        _validation_mean(validation, last_step),
        _single(train, last_step, "Learning rate", lambda event: event.learning_rate),
        _single(train, last_step, "Gradient norm", lambda event: event.grad_norm),
    ]
    keys = sorted({key for event in validation for key in event.metrics} - {"mean"}, key=_task_order)
    return Curves(
        charts=tuple(chart for chart in charts if chart),
        tasks=tuple(chart for key in keys if (chart := _task(key, validation, tasks.get(key), last_step))),
        num_not_finite=sum(event.loss is None for event in train),
    )


def _task_order(key: str) -> tuple[int, str]:
    return (list(TASKS).index(key) if key in TASKS else len(TASKS), key)


def _points(events: Sequence[Event], value: Callable[[Event], float | None]) -> Points:
    return [(float(event.step), y) for event in events if (y := value(event)) is not None]


def _loss(train: Sequence[Event], validation: Sequence[Event], last_step: int) -> Chart | None:
    raw = _points(train, lambda event: event.loss)
    held_out = _points(validation, lambda event: event.loss)
    smoothed = len(raw) >= MIN_SMOOTHED_POINTS
    series = [Series(name="logged step", points=raw, style="faint" if smoothed else "main")] if raw else []
    if smoothed:
        width = max(5, len(raw) // 25 * 2 + 1)
        series.append(Series(name=f"mean over {width} logged steps", points=smooth(raw, width), style="main"))
    if held_out:
        series.append(Series(name="validation", points=held_out, style="marked"))
    return _chart("Loss", series, _zero_axis(series), last_step) if series else None


def _validation_mean(validation: Sequence[Event], last_step: int) -> Chart | None:
    points = _points(validation, lambda event: event.metrics.get("mean"))
    if not points:
        return None
    series = [Series(name="mean", points=points, style="marked")]
    return _chart("Validation score, mean over tasks", series, UNIT_AXIS, last_step)


def _single(train: Sequence[Event], last_step: int, title: str, value: Callable[[Event], float | None]) -> Chart | None:
    points = _points(train, value)
    if not points:
        return None
    series = [Series(name=title.lower(), points=points, style="main")]
    return _chart(title, series, _zero_axis(series), last_step)


def _task(key: str, validation: Sequence[Event], task: TaskScore | None, last_step: int) -> Chart | None:
    points = _points(validation, lambda event: event.metrics.get(key))
    if not points:
        return None
    series = [Series(name=key, points=points, style="marked")]
    if task is not None and task.chance is not None:
        ends = [(0.0, task.chance), (float(last_step), task.chance)]
        series.append(Series(name="chance", points=ends, style="chance"))
    label = f"{key} on validation, {_course(points)}"
    svg = line_chart(series, SMALL_UNIT_AXIS, last_step=last_step, label=label, height=120, small=True)
    return Chart(title=key, note=f"{points[-1][1]:.2f}", svg=svg, legend=())


def _zero_axis(series: Sequence[Series]) -> Axis:
    values = [y for line in series for _, y in line.points]
    return nice_axis(min(0.0, *values), max(values))


def _chart(title: str, series: Sequence[Series], axis: Axis, last_step: int) -> Chart:
    label = f"{title} over training steps: " + "; ".join(f"{line.name}, {_course(line.points)}" for line in series)
    svg = line_chart(series, axis, last_step=last_step, label=label, height=230, small=False)
    return Chart(title=title, note="", svg=svg, legend=tuple(series) if len(series) > 1 else ())


def _course(points: Points) -> str:
    (first, start), (last, end) = points[0], points[-1]
    return f"{start:.3g} at step {first:g} to {end:.3g} at step {last:g}"
