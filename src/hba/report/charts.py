"""Charts as inline SVG, drawn here: score bars, line charts, training curves, counts, reliability, confusion matrices.

Horizontal positions are percentages and vertical ones pixels, so that a chart fills any width while its text keeps
its size; colours come from the classes of style.css, so that light, dark and print share one drawing. Every text goes
through Markup formatting, which escapes it. Nothing here reads files or depends on time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple

import numpy as np
from markupsafe import Markup

from hba.evaluate.metrics import Ints, encode
from hba.evaluate.predictions import Prediction
from hba.evaluate.results import Calibrated, TaskScore
from hba.evaluate.runs import Event
from hba.taxonomy import BUILTIN, TASKS, Taxonomy

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


# Training curves: the charts of a run's log.jsonl.
#
# Loss (each logged step, its smoothed course, and the validation loss), learning rate, gradient norm, the mean
# validation score, and one small chart a task. A quantity that was never logged has no chart; values that are not
# finite are left out and counted, because a diverged run must be seen as one.


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


# Charts of counts as inline SVG: stacked bars and histograms.
#
# Horizontal positions are percentages and vertical ones pixels; colours are classes of atlas.css. Every text goes
# through Markup formatting, which escapes it.



NUM_COLOURS = 4
MAX_LABELS = 7  # under a histogram; more overlap on a phone
BAR_HEIGHT = 26
GAP = 0.06  # at either side of a bar of a histogram, in bars


@dataclass(frozen=True)
class Part:
    """One segment of a bar; `colour` counts from 0."""

    name: str
    count: int
    colour: int


def stacked(parts: Sequence[Part], *, largest: int, name: str) -> Markup:
    """A bar of segments one after the other, as long as their sum is of `largest`."""
    drawn, at = [], 0.0
    for part in parts:
        width = 100 * part.count / (largest or 1)
        if part.count:
            drawn.append(
                Markup(
                    '<rect class="part{}" x="{}%" y="5" width="{}%" height="16"><title>{}: {:,}</title></rect>'
                ).format(part.colour % NUM_COLOURS, round(at, 3), round(width, 3), part.name, part.count)
            )
        at += width
    label = f"{name}: " + ", ".join(f"{part.name} {part.count:,}" for part in parts if part.count)
    return Markup('<svg class="track" role="img" aria-label="{}" width="100%" height="{}">{}</svg>').format(
        label, BAR_HEIGHT, Markup("").join(drawn)
    )


def histogram(
    edges: Sequence[float], counts: Sequence[int], *, text: Callable[[float], str], label: str, height: int = 220
) -> Markup:
    """Bars of `counts` between `edges`, all equally wide; `text` puts an edge into words, `label` says what it is.

    `edges` must be one longer than `counts`, which must not be empty.
    """
    axis = nice_axis(0.0, float(max(counts)))
    top, bottom, share = 8, height - 26, 100 / len(counts)
    parts = [_rule(tick, round(bottom - (bottom - top) * tick / axis.high, 2)) for tick in axis.ticks]
    for i, count in enumerate(counts):
        tall = round((bottom - top) * count / axis.high, 2)
        tip = f"{text(edges[i])} to {text(edges[i + 1])}: {count:,}"
        x, width = round((i + GAP) * share, 3), round((1 - 2 * GAP) * share, 3)
        parts.append(
            Markup('<rect class="part0" x="{}%" y="{}" width="{}%" height="{}"><title>{}</title></rect>').format(
                x, round(bottom - tall, 2), width, tall, tip
            )
        )
    every = -(-len(edges) // MAX_LABELS)
    for i in range(0, len(edges), every):
        x, words = round(i * share, 3), text(edges[i])
        parts.append(Markup('<text class="x" x="{}%" y="{}">{}</text>').format(x, bottom + 18, words))
    return Markup('<svg class="lines" role="img" aria-label="{}" width="100%" height="{}">{}</svg>').format(
        label, height, Markup("").join(parts)
    )


def _rule(tick: float, y: float) -> Markup:
    """A line across with its count; none at half a row."""
    if tick != round(tick):
        return Markup("")
    return Markup(
        '<line class="rule" x1="0" x2="100%" y1="{0}" y2="{0}"/><text class="y" x="-8" y="{1}">{2:,.0f}</text>'
    ).format(y, y + 3.5, tick)


def span(seconds: float) -> str:
    """A length in the unit that suits it: '0.5 s', '12 s', '3 min', '2 h'."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    if seconds < 3600:
        return f"{seconds / 60:.3g} min"
    hours = seconds / 3600
    return f"{hours:.3g} h" if hours < 100 else f"{hours:,.0f} h"


def size(num_bytes: int) -> str:
    """Bytes in the unit that suits them, of a thousand each."""
    value, units = float(num_bytes), ("bytes", "kB", "MB", "GB", "TB")
    for unit in units:
        if value < 1000 or unit == units[-1]:
            return f"{value:.3g} {unit}" if unit != "bytes" else f"{num_bytes:,} bytes"
        value /= 1000
    return ""


# The reliability plot: how often answers of a given confidence are right, as inline SVG.
#
# A bar a bin, as high as the share of right answers and as dark as its share of rows; the dashed diagonal is where
# probabilities mean what they say. Positions as above: horizontal in percent, vertical in pixels.


HEIGHT, TOP, BOTTOM = 230, 8, 204
TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)
FAINTEST = 0.25  # a bin of one row must still be seen


def reliability(found: Calibrated) -> Markup:
    """The plot of the bins of `found`."""
    label = f"Reliability: expected calibration error {found.ece:.3f} over {found.n} predictions"
    largest = max((each.n for each in found.bins), default=1)
    parts = [_square_grid()]
    for each in found.bins:
        tip = f"confidence {each.confidence:.2f}, right {each.accuracy:.2f}, {each.n:,} predictions"
        opacity = round(FAINTEST + (1 - FAINTEST) * each.n / largest, 3)
        parts.append(
            Markup(
                '<rect class="bar" x="{}%" width="{}%" y="{}" height="{}" fill-opacity="{}"><title>{}</title></rect>'
            ).format(
                round(100 * each.low + 0.4, 3), round(100 * (each.high - each.low) - 0.8, 3), _square_y(each.accuracy),
                round(BOTTOM - _square_y(each.accuracy), 2), opacity, tip,
            )
        )  # fmt: skip
        parts.append(
            Markup('<circle class="dot" cx="{}%" cy="{}" r="3"><title>{}</title></circle>').format(
                round(100 * each.confidence, 3), _square_y(each.accuracy), tip
            )
        )
    parts.append(
        Markup(
            '<svg width="100%" height="{0}" viewBox="0 0 1000 {0}" preserveAspectRatio="none">'
            '<polyline class="chance" points="0,{1} 1000,{2}" vector-effect="non-scaling-stroke"/></svg>'
        ).format(HEIGHT, BOTTOM, TOP)
    )
    return Markup('<svg class="lines" role="img" aria-label="{}" width="100%" height="{}">{}</svg>').format(
        label, HEIGHT, Markup("").join(parts)
    )


def _square_grid() -> Markup:
    parts = []
    for tick in TICKS:
        y = _square_y(tick)
        parts.append(
            Markup(
                '<line class="rule" x1="0" x2="100%" y1="{0}" y2="{0}"/><text class="y" x="-8" y="{1}">{2:.2f}</text>'
                '<text class="x" x="{3}%" y="{4}">{2:.2f}</text>'
            ).format(y, round(y + 3.5, 2), tick, 100 * tick, BOTTOM + 18)
        )
    return Markup("").join(parts)


def _square_y(share: float) -> float:
    return round(BOTTOM - (BOTTOM - TOP) * min(max(share, 0.0), 1.0), 2)


# Confusion matrices: what was answered for each true label, per domain and per dataset.
#
# Counts are those of the scorer (`hba.evaluate.metrics`), so that the page cannot disagree with metrics.json. Rows are
# true labels, columns answers, both in the order of the global class indices; labels that occur nowhere are left out.
# An answer that is no label of the domain counts in the last column, 'no label', so that every row sums to its samples.
# Free-form datasets have no matrix.


NO_LABEL = "no label"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """`share` is the count over its row's sum, in [0, 1]."""

    count: int
    share: float
    correct: bool
    tip: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """The samples of one true label; `cells` lie in the order of the matrix's columns."""

    target: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """`name` is a dataset key, or several joined by commas; `n` counts samples."""

    name: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    n: int


@dataclass(frozen=True, kw_only=True)
class DomainMatrices:
    """`pooled` is over the whole domain; `datasets` holds one a dataset when there are several, else nothing."""

    name: str
    pooled: Matrix
    datasets: tuple[Matrix, ...]


def matrices(predictions: Sequence[Prediction], taxonomy: Taxonomy = BUILTIN) -> list[DomainMatrices]:
    """One entry a domain that has predictions, in the order of the taxonomy.

    Raises TaxonomyError for an unknown dataset or a target outside its domain.
    """
    rows = encode([p.label for p in predictions], [p.target for p in predictions],
                  [p.dataset for p in predictions], taxonomy)  # fmt: skip
    counts_DCP, layout = rows.confusion(), rows.layout
    found = []
    for domain in taxonomy.domains.values():
        local = {
            key: _local(counts_DCP[layout.code[key]], np.array(domain.indices))
            for key in sorted(layout.classified)
            if layout.domain(key) == domain.name and counts_DCP[layout.code[key]].any()
        }
        if local:
            pooled = np.sum(list(local.values()), axis=0)
            several = tuple(_matrix(key, counts, domain.labels) for key, counts in local.items())
            found.append(
                DomainMatrices(
                    name=domain.name.replace("_", " "),
                    pooled=_matrix(", ".join(local), pooled, domain.labels),
                    datasets=several if len(several) > 1 else (),
                )
            )
    return found


def _local(counts_CP: Ints, indices_K: Ints) -> Ints:
    """[K, K + 1]: the domain's own rows and columns, every other answer in the last column."""
    inside = counts_CP[np.ix_(indices_K, indices_K)]
    outside = counts_CP[indices_K].sum(1) - inside.sum(1)
    return np.concatenate([inside, outside[:, None]], axis=1)


def _matrix(name: str, counts: Ints, labels: Sequence[str]) -> Matrix:
    num_labels = len(labels)
    seen = [k for k in range(num_labels) if counts[k].any() or counts[:, k].any()]
    columns = seen + [num_labels] * bool(counts[:, num_labels].any())
    names = [*labels, NO_LABEL]
    rows = tuple(
        Row(target=names[k], cells=tuple(_cell(counts, k, column, names) for column in columns))
        for k in seen
        if counts[k].any()
    )
    return Matrix(name=name, columns=tuple(names[k] for k in columns), rows=rows, n=int(counts.sum()))


def _cell(counts: Ints, target: int, column: int, names: Sequence[str]) -> Cell:
    count, total = int(counts[target, column]), int(counts[target].sum())
    tip = f"{names[target]} answered as {names[column]}: {count} of {total}"
    return Cell(count=count, share=round(count / total, 4), correct=column == target, tip=tip)
