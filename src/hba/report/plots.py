"""Charts as inline SVG, drawn here: score bars with intervals, and line charts.

Horizontal positions are percentages and vertical ones pixels, so that a chart fills any width while its text keeps
its size; colours come from the classes of style.css, so that light, dark and print share one drawing. Every text goes
through Markup formatting, which escapes it. Nothing here reads files or depends on time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple

from markupsafe import Markup

from hba.evaluate.results import TaskScore

MAX_POINTS = 400  # more do not show at the width of a page, and would make it heavy
Points = Sequence[tuple[float, float]]


class Reference(NamedTuple):
    """A published figure beside a bar; `score` in [0, 1]."""

    name: str
    score: float


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart. `style` is a class of style.css."""

    name: str
    points: Points
    style: Literal["main", "faint", "marked", "chance"]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A vertical axis from `low` to `high` with its ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]
    text: Callable[[float], str]


def bar(task: TaskScore, *, name: str, references: Sequence[Reference] = ()) -> Markup:
    """The bar of a scored task on an axis from 0 to 1: score, 95 % interval, chance, published figures."""
    if task.score is None:
        raise ValueError("a task without a score has no bar")
    score = _percent(task.score)
    parts = [
        Markup('<line class="rule" x1="{0}%" x2="{0}%" y1="0" y2="30"/>').format(tick) for tick in (0, 25, 50, 75, 100)
    ]
    parts.append(Markup('<rect class="bar" x="0" y="8" width="{}%" height="16" rx="2"/>').format(score))
    if task.ci95 is not None:
        low, high = (_percent(value) for value in task.ci95)
        shape = Markup('<line x1="{0}%" x2="{1}%" y1="16" y2="16"/>').format(low, high) + Markup("").join(
            Markup('<line x1="{0}%" x2="{0}%" y1="12" y2="20"/>').format(end) for end in (low, high)
        )
        parts += [Markup('<g class="halo">{0}</g><g class="whisker">{0}</g>').format(shape)]
    if task.chance is not None:
        chance = _percent(task.chance)
        parts.append(Markup('<line class="chance" x1="{0}%" x2="{0}%" y1="4" y2="28"/>').format(chance))
    for reference in references:
        at = _percent(reference.score)
        tip = f"{reference.name}, published: {reference.score:.3f}"
        parts.append(
            Markup('<circle class="published" cx="{}%" cy="4" r="3.5"><title>{}</title></circle>').format(at, tip)
        )
    return Markup('<svg class="track" role="img" aria-label="{}" width="100%" height="30">{}</svg>').format(
        describe(task, name), Markup("").join(parts)
    )


def describe(task: TaskScore, name: str) -> str:
    """A sentence that says what a bar shows."""
    if task.score is None:
        return f"{name}: not scored"
    interval = f", 95% interval {task.ci95[0]:.2f} to {task.ci95[1]:.2f}" if task.ci95 else ""
    chance = f", chance {task.chance:.2f}" if task.chance is not None else ""
    return f"{name}: {task.score:.2f}{interval}{chance}"


def line_chart(series: Sequence[Series], axis: Axis, *, last_step: int, label: str, height: int, small: bool) -> Markup:
    """A chart of lines over training steps 0 to `last_step`, `height` pixels high and as wide as its place.

    `label` says it in words. A `small` chart names only the first and the last step.
    """
    x_axis = nice_axis(0.0, float(last_step), count=5, tight=True)
    if small:
        x_axis = replace(x_axis, ticks=(0.0, x_axis.high), text=lambda value: f"{value:,.0f}")
    top, bottom = 8, height - 26
    parts = [_grid(axis, x_axis, top=top, bottom=bottom, small=small)]
    parts += [_line(line, axis, x_axis, top=top, bottom=bottom) for line in series]
    return Markup('<svg class="lines" role="img" aria-label="{}" width="100%" height="{}">{}</svg>').format(
        label, height, Markup("").join(parts)
    )


def _grid(axis: Axis, x_axis: Axis, *, top: int, bottom: int, small: bool) -> Markup:
    parts = []
    for tick in axis.ticks:
        y = _y(tick, axis, top, bottom)
        parts.append(
            Markup(
                '<line class="rule" x1="0" x2="100%" y1="{0}" y2="{0}"/><text class="y" x="-8" y="{1}">{2}</text>'
            ).format(y, round(y + 3.5, 2), axis.text(tick))
        )
    for tick in x_axis.ticks:
        x = _x(tick, x_axis)
        parts.append(Markup('<text class="x" x="{}%" y="{}">{}</text>').format(x, bottom + 18, x_axis.text(tick)))
    if not small:
        parts.append(Markup('<text class="step" x="-8" y="{}">step</text>').format(bottom + 18))
    return Markup("").join(parts)


def _line(line: Series, axis: Axis, x_axis: Axis, *, top: int, bottom: int) -> Markup:
    # A polyline takes no percentages: a nested drawing of 1000 units is stretched to the width instead.
    points = " ".join(f"{round(10 * _x(x, x_axis), 1)},{_y(y, axis, top, bottom)}" for x, y in thin(line.points))
    drawn = Markup(
        '<svg width="100%" height="{0}" viewBox="0 0 1000 {0}" preserveAspectRatio="none">'
        '<polyline class="{1}" points="{2}" vector-effect="non-scaling-stroke"/></svg>'
    ).format(bottom + 26, line.style, points)
    if line.style != "marked":
        return drawn
    dots = Markup("").join(
        Markup('<circle class="dot" cx="{}%" cy="{}" r="3"><title>step {:g}: {}</title></circle>').format(
            _x(x, x_axis), _y(y, axis, top, bottom), x, axis.text(y)
        )
        for x, y in thin(line.points)
    )
    return drawn + dots


def _x(value: float, axis: Axis) -> float:
    return round(100 * (value - axis.low) / ((axis.high - axis.low) or 1), 3)


def _y(value: float, axis: Axis, top: int, bottom: int) -> float:
    return round(bottom - (bottom - top) * (value - axis.low) / ((axis.high - axis.low) or 1), 2)


def _percent(value: float) -> float:
    return round(100 * min(max(value, 0.0), 1.0), 3)


def thin(points: Points, limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most `limit` points: the means of equal runs, so that a long log keeps its shape."""
    if len(points) <= limit:
        return list(points)
    edges = [round(i * len(points) / limit) for i in range(limit + 1)]
    runs = [points[a:b] for a, b in pairwise(edges)]
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]


def smooth(points: Points, width: int) -> list[tuple[float, float]]:
    """The mean over the `width` (odd) points around each, fewer at the ends."""
    sums = [0.0, *accumulate(y for _, y in points)]
    result = []
    for i, (x, _) in enumerate(points):
        first, end = max(0, i - width // 2), min(len(points), i + width // 2 + 1)
        result.append((x, (sums[end] - sums[first]) / (end - first)))
    return result


def nice_axis(low: float, high: float, *, count: int = 4, tight: bool = False) -> Axis:
    """An axis over [low, high] with about `count` round ticks; `tight` keeps the ends, else they move to ticks."""
    span = (high - low) or abs(high) or 1.0
    high = high if tight else low + span
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    if tight:
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    else:
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(i * step for i in range(first, last + 1))
    ends = (low, high) if tight else (ticks[0], ticks[-1])
    return Axis(low=ends[0], high=ends[1], ticks=ticks, text=_tick_text(step))


def _tick_text(step: float) -> Callable[[float], str]:
    if step < 1e-3:
        return lambda value: f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-") if value else "0"
    decimals = next(d for d in range(6) if math.isclose(round(step, d), step, rel_tol=1e-6))
    return lambda value: f"{value:,.{decimals}f}"


UNIT_AXIS = Axis(low=0.0, high=1.0, ticks=(0.0, 0.25, 0.5, 0.75, 1.0), text=lambda value: f"{value:.2f}")
SMALL_UNIT_AXIS = Axis(low=0.0, high=1.0, ticks=(0.0, 0.5, 1.0), text=lambda value: f"{value:.1f}")
