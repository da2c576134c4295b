"""The reliability plot: how often answers of a given confidence are right, as inline SVG.

A bar a bin, as high as the share of right answers and as dark as its share of rows; the dashed diagonal is where
probabilities mean what they say. Positions as in `plots`: horizontal in percent, vertical in pixels.
"""

from __future__ import annotations

from markupsafe import Markup

from hba.evaluate.results import Calibrated

HEIGHT, TOP, BOTTOM = 230, 8, 204
TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)
FAINTEST = 0.25  # a bin of one row must still be seen


def reliability(found: Calibrated) -> Markup:
    """The plot of the bins of `found`."""
    label = f"Reliability: expected calibration error {found.ece:.3f} over {found.n} predictions"
    largest = max((each.n for each in found.bins), default=1)
    parts = [_grid()]
    for each in found.bins:
        tip = f"confidence {each.confidence:.2f}, right {each.accuracy:.2f}, {each.n:,} predictions"
        opacity = round(FAINTEST + (1 - FAINTEST) * each.n / largest, 3)
        parts.append(
            Markup(
                '<rect class="bar" x="{}%" width="{}%" y="{}" height="{}" fill-opacity="{}"><title>{}</title></rect>'
            ).format(
                round(100 * each.low + 0.4, 3), round(100 * (each.high - each.low) - 0.8, 3), _y(each.accuracy),
                round(BOTTOM - _y(each.accuracy), 2), opacity, tip,
            )
        )  # fmt: skip
        parts.append(
            Markup('<circle class="dot" cx="{}%" cy="{}" r="3"><title>{}</title></circle>').format(
                round(100 * each.confidence, 3), _y(each.accuracy), tip
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


def _grid() -> Markup:
    parts = []
    for tick in TICKS:
        y = _y(tick)
        parts.append(
            Markup(
                '<line class="rule" x1="0" x2="100%" y1="{0}" y2="{0}"/><text class="y" x="-8" y="{1}">{2:.2f}</text>'
                '<text class="x" x="{3}%" y="{4}">{2:.2f}</text>'
            ).format(y, round(y + 3.5, 2), tick, 100 * tick, BOTTOM + 18)
        )
    return Markup("").join(parts)


def _y(share: float) -> float:
    return round(BOTTOM - (BOTTOM - TOP) * min(max(share, 0.0), 1.0), 2)
