"""Bins for a histogram of lengths: a dozen, with edges that people would choose, and every value in one of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Seconds = npt.NDArray[np.float64]

LOG_STEPS = (1.0, 2.0, 5.0)
MAX_RATIO = 30.0  # of the longest to the shortest: beyond it, bins grow with the length
NUM_BINS = 12


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """`counts[i]` values lie from `edges[i]` up to `edges[i + 1]` (in the last bin, up to and with it)."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


def histogram(values: Seconds) -> Histogram:
    """About a dozen bins with round edges: equal ones, or growing ones when lengths differ a lot. In seconds."""
    if len(values) == 0:
        return Histogram(edges=(), counts=())
    low, high = float(values.min()), float(values.max())
    edges = _growing(low, high) if high > MAX_RATIO * low else _equal(low, high)
    counts, _ = np.histogram(values, edges)
    return Histogram(edges=tuple(edges), counts=tuple(counts.tolist()))


def _growing(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(max(low, 0.1))), math.ceil(math.log10(high)) + 1)
    steps = [0.0, *(round(step * 10.0**power, 6) for power in powers for step in LOG_STEPS)]
    first = max(i for i, edge in enumerate(steps) if edge <= low)
    last = next(i for i, edge in enumerate(steps) if edge >= high)
    return steps[first : max(last, first + 1) + 1]


def _equal(low: float, high: float) -> list[float]:
    rough = max((high - low) / NUM_BINS, 1e-3)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 6) for i in range(first, max(last, first + 1) + 1)]
