"""From a moving figure to what a camera and a landmark detector would give: frames and points.

Frames carry sensor noise and landmarks measurement noise of the same strength whatever the figure does.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from hba.atlas.mini.figure import SIZE, Figure

POSE = ("nose", *(f"{joint}_{side}" for joint in ("shoulder", "elbow", "wrist", "hip", "ankle") for side in ("l", "r")))
FACE = ("nose", "eye_l", "eye_r", "mouth_l", "mouth_r", "mouth_top", "mouth_bottom")
HANDS = {"left_hand": ("wrist_l", "index_l", "thumb_l"), "right_hand": ("wrist_r", "index_r", "thumb_r")}
GROUPS: dict[str, tuple[str, ...]] = {"pose": POSE, "face": FACE, **HANDS}

_OVERSAMPLING = 2
_LANDMARK_NOISE = 0.004
_PIXEL_NOISE = 2.0


def frames(figure: Figure, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Pixels [T, 56, 56, 3] of the figure."""
    num_frames = len(figure.points["nose"])
    clean = np.stack([_draw(figure, k) for k in range(num_frames)]).astype(np.float64)
    noisy = clean + rng.normal(0, _PIXEL_NOISE, (1, SIZE, SIZE, 1))
    return np.clip(noisy, 0, 255).astype(np.uint8)


def landmarks(figure: Figure, rng: np.random.Generator) -> dict[str, NDArray[np.float16]]:
    """Groups pose, face, left_hand, right_hand: [T, points, (x, y, confidence)], x and y in units of the frame."""
    found = {}
    for group, names in GROUPS.items():
        xy = np.stack([figure.points[name] for name in names], axis=1)
        xy = xy + rng.normal(0, _LANDMARK_NOISE, xy.shape)
        confidence = rng.uniform(0.85, 1.0, (*xy.shape[:2], 1))
        found[group] = np.concatenate([xy, confidence], axis=2).astype(np.float16)
    return found


def _draw(figure: Figure, k: int) -> NDArray[np.uint8]:
    pixels = SIZE * _OVERSAMPLING
    image = Image.new("RGB", (pixels, pixels), figure.background)
    pen = ImageDraw.Draw(image)

    def at(name: str) -> tuple[float, float]:
        x, y = figure.points[name][k] * pixels
        return float(x), float(y)

    width = max(2, pixels // 20)
    for side in ("l", "r"):
        pen.line([at(f"hip_{side}"), at(f"ankle_{side}")], fill=(120, 120, 160), width=width)
    pen.polygon([at("shoulder_l"), at("shoulder_r"), at("hip_r"), at("hip_l")], fill=figure.shirt)
    for side in ("l", "r"):
        pen.line([at(f"shoulder_{side}"), at(f"elbow_{side}"), at(f"wrist_{side}")], fill=figure.shirt, width=width)
        x, y = at(f"wrist_{side}")
        pen.ellipse([x - width * 0.7, y - width * 0.7, x + width * 0.7, y + width * 0.7], fill=figure.skin)
    _draw_face(pen, at, figure.head_radius * pixels, figure.skin)
    return np.asarray(image.reduce(_OVERSAMPLING))


def _draw_face(
    pen: ImageDraw.ImageDraw, at: Callable[[str], tuple[float, float]], radius: float, skin: tuple[int, int, int]
) -> None:
    x, y = at("nose")
    pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=skin)
    for side in ("l", "r"):
        ex, ey = at(f"eye_{side}")
        pen.ellipse([ex - 1.3, ey - 1.3, ex + 1.3, ey + 1.3], fill=(20, 20, 40))
    top, bottom = at("mouth_top"), at("mouth_bottom")
    pen.line([at("mouth_l"), bottom, at("mouth_r")], fill=(150, 20, 20), width=2)
    pen.line([at("mouth_l"), top, at("mouth_r")], fill=(150, 20, 20), width=2)
