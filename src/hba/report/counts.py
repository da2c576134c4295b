"""Charts of counts as inline SVG: stacked bars and histograms, in the manner of `plots`.

Horizontal positions are percentages and vertical ones pixels; colours are classes of atlas.css. Every text goes through
Markup formatting, which escapes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from hba.report.plots import nice_axis

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
