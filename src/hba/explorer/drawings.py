"""Figures as SVG and words, for pages: waveforms, descriptor curves, probabilities, and an answer with its thinking.

Everything is drawn with attributes and classes of the style sheet, since a page allows no style of its own; every text
goes through Markup formatting, which escapes it.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from hba.explorer.index import Row

_THINK = re.compile(r"\s*<think>(.*?)</think>\s*(.*)", re.DOTALL | re.IGNORECASE)
WIDTH, HEIGHT = 800, 96
CURVE_HEIGHT = 72


def answer(row: Row) -> dict[str, Any]:
    """`thinking` and `spoken` of a prediction's output, and its probabilities, the largest first."""
    output = row["output"] or ""
    match = _THINK.match(output)
    probs = json.loads(row["probs"]) if row["probs"] else {}
    ranked = sorted(probs.items(), key=lambda pair: -pair[1])
    return {
        "thinking": match.group(1).strip() if match else "",
        "spoken": match.group(2).strip() if match else output,
        "probs": [{"label": k, "p": p, "bar": bar(p)} for k, p in ranked],
    }


def bar(share: float) -> Markup:
    """A bar of a share in [0, 1]."""
    return Markup(
        '<svg class="share" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="track" width="100" height="8"/><rect class="fill" width="{}" height="8"/></svg>'
    ).format(round(100 * min(max(share, 0.0), 1.0), 1))


def waveform(sound: Mapping[str, Any]) -> dict[str, Any]:
    """`svg` and `seconds` of a sound, and its spectrogram as a data: address."""
    step = WIDTH / max(1, len(sound["peaks"]))
    lines = Markup("").join(
        Markup('<line x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(
            round(i * step, 2), round(HEIGHT / 2 * (1 - high), 1), round(HEIGHT / 2 * (1 - low) + 0.6, 1)
        )
        for i, (low, high) in enumerate(sound["peaks"])
    )
    svg = Markup(
        '<svg class="wave" viewBox="0 0 {} {}" preserveAspectRatio="none" role="img" '
        'aria-label="Waveform, {:.1f} s">{}</svg>'
    ).format(WIDTH, HEIGHT, sound["seconds"], lines)
    picture = base64.b64encode(sound["spectrogram"]).decode()
    return {"svg": svg, "seconds": sound["seconds"], "spectrogram": f"data:image/png;base64,{picture}"}


def descriptor_curves(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each part its `name`, its `shape` in words, and an `svg` of its values over time."""
    return [
        {
            "name": part["name"],
            "shape": " x ".join(map(str, part["shape"])),
            "svg": _curves(part["name"], part["values"]),
        }
        for part in found["parts"]
    ]


def _curves(name: str, curves: Sequence[Sequence[float]]) -> Markup:
    values = [value for curve in curves for value in curve]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    scale = CURVE_HEIGHT / ((high - low) or 1.0)
    drawn = Markup("").join(
        Markup('<polyline class="thin" points="{}"/>').format(
            " ".join(
                f"{round(i * WIDTH / max(1, len(curve) - 1), 1)},{round(CURVE_HEIGHT - scale * (value - low), 1)}"
                for i, value in enumerate(curve)
            )
        )
        for curve in curves
    )
    label = f"{name}: {len(curves)} curves from {low:.3g} to {high:.3g}"
    return Markup(
        '<svg class="curve" viewBox="0 0 {} {}" preserveAspectRatio="none" role="img" aria-label="{}">{}</svg>'
        '<p class="muted small">{}</p>'
    ).format(WIDTH, CURVE_HEIGHT, label, drawn, label)


def level(share: float) -> int:
    """The class of a confusion cell's shade: 0 to 10."""
    return round(10 * min(max(share, 0.0), 1.0))
