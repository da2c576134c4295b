"""Charts as inline SVG, drawn here: score bars, training curves, counts, reliability, confusion matrices, sounds.

Horizontal positions are percentages and vertical ones pixels, so that a chart fills any width while its text keeps
its size; colours come from the classes of the style sheets, so that light, dark and print share one drawing. Every
text is escaped where `_element` writes it. Nothing here reads files or depends on time.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from markupsafe import Markup, escape

from hba.evaluate.metrics import Ints, encode, local_confusion
from hba.evaluate.predictions import Prediction
from hba.evaluate.results import Calibrated, TaskScore
from hba.evaluate.runs import Event
from hba.report import words
from hba.taxonomy import BUILTIN, TASKS, Taxonomy

if TYPE_CHECKING:
    from hba.evaluate.ask import Reply

Points = Sequence[tuple[float, float]]


def _element(tag: str, *inner: str, **attributes: object) -> Markup:
    """One element; `class_` stands for class, `aria_label` for aria-label."""
    # Joined, not formatted: a page has thousands.
    written = "".join([f' {_attribute(name)}="{escape(value)}"' for name, value in attributes.items()])
    body = f">{''.join(map(escape, inner))}</{tag}>" if inner else "/>"
    return Markup(f"<{tag}{written}{body}")  # noqa: S704  names of ours, values escaped


@cache
def _attribute(name: str) -> str:
    return name.strip("_").replace("_", "-")


def _drawing(kind: str, label: str, height: int, parts: Sequence[str]) -> Markup:
    """A drawing as wide as its place and `height` pixels high; `label` says it in words."""
    return _element("svg", *parts, class_=kind, role="img", aria_label=label, width="100%", height=height)


def _stretched(style: str, points: str, height: int) -> Markup:
    """A line. A polyline takes no percentages: a nested drawing of 1000 units is stretched to the width instead."""
    line = _element("polyline", class_=style, points=points, vector_effect="non-scaling-stroke")
    return _element("svg", line, width="100%", height=height, viewBox=f"0 0 1000 {height}", preserveAspectRatio="none")


def _percent(share: float) -> str:
    return f"{round(100 * min(max(share, 0.0), 1.0), 3)}%"


# --- the score of a task ----------------------------------------------------------------------------------------------


class Reference(NamedTuple):
    """A published figure beside a bar; `score` in [0, 1]."""

    name: str
    score: float


def bar(task: TaskScore, *, name: str, references: Sequence[Reference] = ()) -> Markup:
    """The bar of a scored task on an axis from 0 to 1: score, 95 % interval, chance, published figures."""
    if task.score is None:
        raise ValueError("a task without a score has no bar")

    def upright(kind: dict[str, str], share: float, y1: int, y2: int) -> Markup:
        return _element("line", **kind, x1=_percent(share), x2=_percent(share), y1=y1, y2=y2)

    said = f"{name}: {task.score:.2f}"
    parts = [upright({"class_": "rule"}, tick / 4, 0, 30) for tick in range(5)]
    parts.append(_element("rect", class_="bar", x=0, y=8, width=_percent(task.score), height=16, rx=2))
    if task.ci95 is not None:
        low, high = task.ci95
        reach = _element("line", x1=_percent(low), x2=_percent(high), y1=16, y2=16)
        shape = (reach, upright({}, low, 12, 20), upright({}, high, 12, 20))
        parts += [_element("g", *shape, class_=style) for style in ("halo", "whisker")]
        said += f", 95% interval {low:.2f} to {high:.2f}"
    if task.chance is not None:
        parts.append(upright({"class_": "chance"}, task.chance, 4, 28))
        said += f", chance {task.chance:.2f}"
    for reference in references:
        tip = _element("title", f"{reference.name}, published: {reference.score:.3f}")
        parts.append(_element("circle", tip, class_="published", cx=_percent(reference.score), cy=4, r=3.5))
    return _drawing("track", said, 30, parts)


# --- lines over steps -------------------------------------------------------------------------------------------------


MAX_POINTS = 400  # more do not show at the width of a page, and would make it heavy


@dataclass(frozen=True)
class Series:
    """One line of a chart. `style` is a class of style.css."""

    name: str
    points: Points
    style: Literal["main", "faint", "marked", "chance"] = "main"


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A vertical axis from `low` to `high` with its ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]
    text: Callable[[float], str]

    def share(self, value: float) -> float:
        """Where a value lies on it, from 0 to 1."""
        return (value - self.low) / ((self.high - self.low) or 1)


UNIT_AXIS = Axis(low=0.0, high=1.0, ticks=(0.0, 0.25, 0.5, 0.75, 1.0), text=lambda value: f"{value:.2f}")
SMALL_UNIT_AXIS = Axis(low=0.0, high=1.0, ticks=(0.0, 0.5, 1.0), text=lambda value: f"{value:.1f}")


@dataclass(frozen=True)
class Chart:
    """A drawn chart with its caption, and the series that its legend names."""

    title: str
    note: str
    svg: Markup
    legend: tuple[Series, ...] = ()


def line_chart(
    title: str,
    series: Sequence[Series],
    axis: Axis,
    *,
    last_step: float,
    label: str = "over training steps",
    small: bool = False,
    note: str = "",
    unit: str = "step",
) -> Chart:
    """Lines over the steps 0 to `last_step`, or over another `unit`; `label` goes on where the title ends, to say the
    chart in words.

    A `small` chart names only the first and the last step, and its lines have no legend.
    """
    height = 120 if small else 230
    x_axis = nice_axis(0.0, float(last_step), count=5, tight=True)
    if small:
        end = f"{x_axis.high:,.0f}" if unit == "step" else f"{words.plain(x_axis.high)} {unit}"
        x_axis = replace(x_axis, ticks=(0.0, x_axis.high), text=lambda value: end if value else "0")
    top, bottom = 8, height - 26
    parts = _grid(axis, [(x_axis.share(tick), x_axis.text(tick)) for tick in x_axis.ticks], top, bottom)
    if not small:
        parts.append(_element("text", unit, class_="step", x=-8, y=bottom + 18))
    for line in series:
        places = [(x_axis.share(x), _height(axis.share(y), top, bottom), x, y) for x, y in thin(line.points)]
        parts.append(_stretched(line.style, " ".join(f"{round(1000 * x, 1)},{y}" for x, y, *_ in places), height))
        if line.style == "marked":
            parts += [_dot(x, y, f"step {step:g}: {axis.text(value)}") for x, y, step, value in places]
    course = "; ".join(f"{line.name}, {_course(line.points, unit)}" for line in series)
    svg = _drawing("lines", f"{title} {label}: {course}", height, parts)
    return Chart(title, note, svg, tuple(series) if len(series) > 1 and not small else ())


def _grid(axis: Axis, marks: Iterable[tuple[float, str]], top: int, bottom: int) -> list[Markup]:
    """The rules of a vertical axis with their texts, and `marks` below at shares of the width."""
    parts = []
    for tick in axis.ticks:
        y = _height(axis.share(tick), top, bottom)
        parts.append(_element("line", class_="rule", x1=0, x2="100%", y1=y, y2=y))
        parts.append(_element("text", axis.text(tick), class_="y", x=-8, y=round(y + 3.5, 2)))
    return parts + [_element("text", text, class_="x", x=_percent(share), y=bottom + 18) for share, text in marks]


def _height(share: float, top: int, bottom: int) -> float:
    return round(bottom - (bottom - top) * share, 2)


def _dot(share: float, y: float, tip: str) -> Markup:
    return _element("circle", _element("title", tip), class_="dot", cx=_percent(share), cy=y, r=3)


def _course(points: Points, unit: str) -> str:
    (first, start), (last, end) = points[0], points[-1]
    when = [f"step {at:g}" if unit == "step" else f"{words.plain(at)} {unit}" for at in (first, last)]
    return f"{start:.3g} at {when[0]} to {end:.3g} at {when[1]}"


# --- answers over the time of a clip ----------------------------------------------------------------------------------


MOST_CURVES = 6


def over_time(replies: Sequence[Reply]) -> list[Chart]:
    """A small chart a label, of the replies of one file to one task: its probability, flat over each window, from 0 to
    the end of the last, the most probable on average first, at most MOST_CURVES.

    None where no window was asked, and where there are no probabilities.
    """
    known = [(each.start, each.end, each.probs) for each in replies if each.probs and each.end is not None]
    windows = [(start or 0.0, end, probs) for start, end, probs in known]
    whole = sum(end - start for start, end, _ in windows)
    means: defaultdict[str, float] = defaultdict(float)
    for start, end, probs in windows:
        for label, p in probs.items():
            means[label] += p * (end - start) / whole
    charts = []
    for label, mean in sorted(means.items(), key=lambda pair: -pair[1])[:MOST_CURVES]:
        points = [(at, probs.get(label, 0.0)) for start, end, probs in windows for at in (start, end)]
        how: dict[str, Any] = {"label": "over time", "note": f"{mean:.2f}", "small": True, "unit": "s"}
        charts.append(line_chart(label, [Series(label, points)], SMALL_UNIT_AXIS, last_step=windows[-1][1], **how))
    return charts


def thin(points: Points) -> list[tuple[float, float]]:
    """At most MAX_POINTS points: the means of equal runs, so that a long log keeps its shape."""
    if len(points) <= MAX_POINTS:
        return list(points)
    edges = [round(i * len(points) / MAX_POINTS) for i in range(MAX_POINTS + 1)]
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


# --- training curves: the charts of a run's log.jsonl -----------------------------------------------------------------
#
# A quantity that was never logged has no chart; values that are not finite are left out and counted, because a diverged
# run must be seen as one.


MIN_SMOOTHED_POINTS = 30


@dataclass(frozen=True, kw_only=True)
class Curves:
    """`charts` full size, `tasks` small. `num_not_finite` counts logged losses that are NaN or infinite."""

    charts: tuple[Chart, ...]
    tasks: tuple[Chart, ...]
    num_not_finite: int


def curves(events: Sequence[Event], tasks: Mapping[str, TaskScore]) -> Curves:
    """The charts of a log: loss (each logged step, its smoothed course, the validation loss), the mean validation
    score, learning rate and gradient norm, and a small one a task, for which `tasks` gives the chance level."""
    train = [event for event in events if event.kind == "train"]
    validation = [event for event in events if event.kind == "validation"]
    last_step = max((event.step for event in events), default=0)

    def points(of: Sequence[Event], value: Callable[[Event], float | None]) -> Points:
        return [(float(event.step), y) for event in of if (y := value(event)) is not None]

    losses = points(train, lambda event: event.loss)
    loss = [Series("logged step", losses)]
    if len(losses) >= MIN_SMOOTHED_POINTS:
        width = max(5, len(losses) // 25 * 2 + 1)
        smoothed = Series(f"mean over {width} logged steps", smooth(losses, width))
        loss = [Series("logged step", losses, "faint"), smoothed]
    loss.append(Series("validation", points(validation, lambda event: event.loss), "marked"))
    mean = points(validation, lambda event: event.metrics.get("mean"))
    charts = []
    for title, series, axis in (
        ("Loss", loss, None),
        ("Validation score, mean over tasks", [Series("mean", mean, "marked")], UNIT_AXIS),
        ("Learning rate", [Series("learning rate", points(train, lambda event: event.learning_rate))], None),
        ("Gradient norm", [Series("gradient norm", points(train, lambda event: event.grad_norm))], None),
    ):
        drawn = [line for line in series if line.points]
        values = [y for line in drawn for _, y in line.points]
        if drawn:
            axis = axis or nice_axis(min(0.0, *values), max(values))
            charts.append(line_chart(title, drawn, axis, last_step=last_step))
    order = list(TASKS)
    keys = {key for event in validation for key in event.metrics} - {"mean"}
    small = []
    for key in sorted(keys, key=lambda key: (order.index(key) if key in TASKS else len(order), key)):
        scores = points(validation, lambda event, key=key: event.metrics.get(key))  # type: ignore[misc]
        chance = tasks[key].chance if key in tasks else None
        series = [Series(key, scores, "marked")]
        if chance is not None:
            series.append(Series("chance", [(0.0, chance), (float(last_step), chance)], "chance"))
        if scores:
            said = {"label": "on validation", "note": f"{scores[-1][1]:.2f}"}
            small.append(line_chart(key, series, SMALL_UNIT_AXIS, last_step=last_step, small=True, **said))
    return Curves(
        charts=tuple(charts),
        tasks=tuple(small),
        num_not_finite=sum(event.loss is None for event in train),
    )


# --- counts -----------------------------------------------------------------------------------------------------------


NUM_COLOURS = 4
MAX_LABELS = 7  # under a histogram; more overlap on a phone
GAP = 0.06  # at either side of a bar of a histogram, in bars


def stacked(parts: Mapping[str, int], *, largest: int, name: str) -> Markup:
    """A bar of segments one after the other, as long as their sum is of `largest`."""
    drawn, at = [], 0.0
    for number, (part, count) in enumerate(parts.items()):
        width, tip = count / (largest or 1), _element("title", f"{part}: {count:,}")
        if count:
            place = {"x": _percent(at), "y": 5, "width": _percent(width), "height": 16}
            drawn.append(_element("rect", tip, class_=f"part{number % NUM_COLOURS}", **place))
        at += width
    label = f"{name}: " + ", ".join(f"{part} {count:,}" for part, count in parts.items() if count)
    return _drawing("track", label, 26, drawn)


def histogram(edges: Sequence[float], counts: Sequence[int], *, text: Callable[[float], str], label: str) -> Markup:
    """Bars of `counts` between `edges`, all equally wide; `text` puts an edge into words, `label` says what it is.

    `edges` must be one longer than `counts`, which must not be empty.
    """
    top, bottom, wide = 8, 194, 1 / len(counts)
    axis = nice_axis(0.0, float(max(counts)))
    whole = tuple(tick for tick in axis.ticks if tick == round(tick))  # no rule at half a row
    marks = [(i * wide, text(edges[i])) for i in range(0, len(edges), -(-len(edges) // MAX_LABELS))]
    parts = _grid(replace(axis, ticks=whole, text=lambda tick: f"{tick:,.0f}"), marks, top, bottom)
    for i, count in enumerate(counts):
        y = _height(axis.share(count), top, bottom)
        tip = _element("title", f"{text(edges[i])} to {text(edges[i + 1])}: {count:,}")
        place = {"x": _percent((i + GAP) * wide), "y": y, "width": _percent((1 - 2 * GAP) * wide)}
        parts.append(_element("rect", tip, class_="part0", **place, height=round(bottom - y, 2)))
    return _drawing("lines", label, bottom + 26, parts)


# --- reliability: how often answers of a given confidence are right ---------------------------------------------------


FAINTEST = 0.25  # a bin of one row must still be seen


def reliability(found: Calibrated) -> Markup:
    """A bar a bin, as high as the share of right answers and as dark as its share of rows; the dashed diagonal is where
    probabilities mean what they say."""
    label = f"Reliability: expected calibration error {found.ece:.3f} over {found.n} predictions"
    top, bottom, height = 8, 204, 230
    largest = max((each.n for each in found.bins), default=1)
    parts = _grid(UNIT_AXIS, [(tick, UNIT_AXIS.text(tick)) for tick in UNIT_AXIS.ticks], top, bottom)
    for each in found.bins:
        tip = f"confidence {each.confidence:.2f}, right {each.accuracy:.2f}, {each.n:,} predictions"
        y = _height(each.accuracy, top, bottom)
        place = {"x": _percent(each.low + 0.004), "width": _percent(each.high - each.low - 0.008), "y": y}
        opacity = round(FAINTEST + (1 - FAINTEST) * each.n / largest, 3)
        shape = {"height": round(bottom - y, 2), "fill_opacity": opacity}
        parts.append(_element("rect", _element("title", tip), class_="bar", **place, **shape))
        parts.append(_dot(each.confidence, y, tip))
    return _drawing("lines", label, height, [*parts, _stretched("chance", f"0,{bottom} 1000,{top}", height)])


# --- confusion matrices: what was answered for each true label, per domain and per dataset ----------------------------
#
# Counts are those of the scorer (`hba.evaluate.metrics`), so that the page cannot disagree with metrics.json. Rows are
# true labels, columns answers, both in the order of the global class indices; labels that occur nowhere are left out.
# An answer that is no label of the domain counts in the last column, 'no label', so that every row sums to its samples.
# Free-form datasets have no matrix.


NO_LABEL = "no label"


@dataclass(frozen=True)
class Cell:
    """`share` is the count over its row's sum, in [0, 1]."""

    count: int
    share: float
    correct: bool
    tip: str


@dataclass(frozen=True)
class Row:
    """The samples of one true label; `cells` lie in the order of the matrix's columns."""

    target: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Matrix:
    """`name` is a dataset key, or several joined by commas; `n` counts samples."""

    name: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    n: int


@dataclass(frozen=True)
class DomainMatrices:
    """`pooled` is over the whole domain; `datasets` holds one a dataset when there are several, else nothing."""

    name: str
    pooled: Matrix
    datasets: tuple[Matrix, ...]


def matrices(predictions: Sequence[Prediction], taxonomy: Taxonomy = BUILTIN) -> list[DomainMatrices]:
    """One entry a domain that has predictions, in the order of the taxonomy.

    Raises TaxonomyError for an unknown dataset or a target outside its domain.
    """
    rows = encode([p.label for p in predictions], [p.truth for p in predictions],
                  [p.dataset for p in predictions], taxonomy)  # fmt: skip
    counts_DCP, layout = rows.confusion(), rows.layout
    found = []
    for domain in taxonomy.domains.values():
        local = {}
        for key in sorted(layout.classified):
            code = layout.code[key]
            if layout.domain(key) == domain.name and counts_DCP[code].any():
                local[key] = local_confusion(layout, code, counts_DCP[code])
        if local:
            pooled = _matrix(", ".join(local), np.sum(list(local.values()), axis=0), domain.labels)
            several = tuple(_matrix(key, counts, domain.labels) for key, counts in local.items())
            found.append(DomainMatrices(domain.name.replace("_", " "), pooled, several if len(several) > 1 else ()))
    return found


def _matrix(name: str, counts: Ints, labels: Sequence[str]) -> Matrix:
    names, none = [*labels, NO_LABEL], len(labels)
    seen = [k for k in range(none) if counts[k].any() or counts[:, k].any()]
    columns = seen + [none] * bool(counts[:, none].any())
    rows = []
    for k in seen:
        total = int(counts[k].sum())
        cells = []
        for column in columns if total else ():
            count = int(counts[k, column])
            tip = f"{names[k]} answered as {names[column]}: {count} of {total}"
            cells.append(Cell(count, round(count / total, 4), column == k, tip))
        rows += [Row(names[k], tuple(cells))] if total else []
    return Matrix(name, tuple(names[k] for k in columns), tuple(rows), int(counts.sum()))


# --- media and shares, stretched to their place -----------------------------------------------------------------------


WIDTH = 800


def share_bar(share: float) -> Markup:
    """A bar of a share in [0, 1]."""
    track = _element("rect", class_="track", width=100, height=8)
    fill = _element("rect", class_="fill", width=round(100 * min(max(share, 0.0), 1.0), 1), height=8)
    box = {"class_": "share", "viewBox": "0 0 100 8", "preserveAspectRatio": "none", "aria_hidden": "true"}
    return _element("svg", track, fill, **box)


def waveform(peaks: Points, seconds: float) -> Markup:
    """The least and the greatest value, in -1..1, of each part of a sound."""
    height, step = 96, WIDTH / max(1, len(peaks))
    lines = []
    for i, (low, high) in enumerate(peaks):
        x, y1, y2 = round(i * step, 2), round(height / 2 * (1 - high), 1), round(height / 2 * (1 - low) + 0.6, 1)
        lines.append(_element("line", x1=x, x2=x, y1=y1, y2=y2))
    return _fixed("wave", height, f"Waveform, {seconds:.1f} s", lines)


def bundle(name: str, lines: Sequence[Sequence[float]]) -> Markup:
    """Lines of values over time on one scale, with what they are in words below."""
    height = 72
    values = [value for line in lines for value in line]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    scale = height / ((high - low) or 1.0)
    drawn = []
    for line in lines:
        step = WIDTH / max(1, len(line) - 1)
        points = (f"{round(i * step, 1)},{round(height - scale * (value - low), 1)}" for i, value in enumerate(line))
        drawn.append(_element("polyline", class_="thin", points=" ".join(points)))
    label = f"{name}: {len(lines)} curves from {low:.3g} to {high:.3g}"
    return _fixed("curve", height, label, drawn) + _element("p", label, class_="muted small")


def _fixed(kind: str, height: int, label: str, parts: Sequence[str]) -> Markup:
    box = {"viewBox": f"0 0 {WIDTH} {height}", "preserveAspectRatio": "none"}
    return _element("svg", *parts, class_=kind, **box, role="img", aria_label=label)
