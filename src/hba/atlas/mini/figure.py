"""A small human figure: how a state or an action moves body and face.

`animate` turns the name of a motion into points over time; `render` makes pixels and landmarks of them. Place, size,
colours, speed and phase are drawn independently of the motion, and the number of frames is the caller's. It knows no
labels: the names of `MOTIONS` are ways to move.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

SIZE = 56
FRAMES_PER_SECOND = 7
FINGER_MOVEMENT = 0.05  # about the length of a hand
Array = NDArray[np.float64]


@dataclass
class Motion:
    """Angles and offsets over frames [T]. Arm angles: 0 hangs down, pi points up, outward positive (radians)."""

    t: Array
    lean: Array = field(init=False)
    drop: Array = field(init=False)  # head towards the chest
    bob: Array = field(init=False)  # whole body, down positive
    arm_l: Array = field(init=False)
    arm_r: Array = field(init=False)
    elbow_l: Array = field(init=False)
    elbow_r: Array = field(init=False)
    smile: Array = field(init=False)  # -1 .. 1
    gape: Array = field(init=False)  # 0 .. 1
    index: Array = field(init=False)  # offsets of the finger tips, which landmarks have and the picture does not
    thumb: Array = field(init=False)

    def __post_init__(self) -> None:
        zero = np.zeros_like(self.t)
        self.lean, self.drop, self.bob, self.smile, self.gape = (zero.copy() for _ in range(5))
        self.index, self.thumb = zero.copy(), zero.copy()
        self.arm_l, self.arm_r = zero + 0.25, zero + 0.25
        self.elbow_l, self.elbow_r = zero + 0.1, zero + 0.1

    def arms(self, angle: Array | float, elbow: Array | float) -> None:
        """Set both arms alike."""
        self.arm_l, self.arm_r = self.t * 0 + angle, self.t * 0 + angle
        self.elbow_l, self.elbow_r = self.t * 0 + elbow, self.t * 0 + elbow


@dataclass(frozen=True)
class Tempo:
    """The individual manner of a person: phase of the movement, its speed, and when a sudden thing happens."""

    phase: float
    speed: float
    onset_seconds: float
    rng: np.random.Generator

    def wave(self, t: Array, hertz: float, shift: float = 0.0) -> Array:
        return np.sin(2 * np.pi * hertz * self.speed * t + self.phase + shift)

    def after(self, t: Array) -> Array:
        return np.clip((t - self.onset_seconds) * 6, 0, 1)

    def shake(self, t: Array, amount: float) -> Array:
        return self.rng.normal(0, amount, len(t))


def _talk(m: Motion, p: Tempo) -> None:
    m.arm_l, m.arm_r = 0.4 + 0.15 * p.wave(m.t, 0.7), 0.4 + 0.15 * p.wave(m.t, 0.9, 2)
    m.elbow_l, m.elbow_r = m.t * 0 + 0.6, 0.6 + 0.3 * p.wave(m.t, 0.8, 1)
    m.drop, m.gape = 0.015 * p.wave(m.t, 1.0), 0.3 + 0.3 * p.wave(m.t, 2.0)


def _anger(m: Motion, p: Tempo) -> None:
    m.arms(1.15 + 0.5 * np.sign(p.wave(m.t, 1.4)), 1.0)
    m.smile, m.lean = m.t * 0 - 0.7, 0.05 * p.wave(m.t, 1.4)


def _disgust(m: Motion, p: Tempo) -> None:
    m.arm_r, m.elbow_r = 1.5 + 0.1 * p.wave(m.t, 0.6), m.t * 0 + 0.9
    m.lean, m.smile = m.t * 0 - 0.13, m.t * 0 - 1


def _fear(m: Motion, p: Tempo) -> None:
    m.arms(0.75 + p.shake(m.t, 0.12), 2.3)
    m.bob, m.gape, m.lean = m.t * 0 + 0.07, m.t * 0 + 0.6, p.shake(m.t, 0.015)


def _happy(m: Motion, p: Tempo) -> None:
    m.arms(2.4 + 0.35 * p.wave(m.t, 1.2), 0.2)
    m.smile, m.bob = m.t * 0 + 1, -0.04 * np.abs(p.wave(m.t, 0.8))


def _sad(m: Motion, p: Tempo) -> None:
    m.arms(0.05 + 0.03 * p.wave(m.t, 0.3), 0.0)
    m.drop, m.smile, m.lean, m.bob = m.t * 0 + 0.09, m.t * 0 - 0.8, 0.07 + 0.02 * p.wave(m.t, 0.3), m.t * 0 + 0.03


def _surprise(m: Motion, p: Tempo) -> None:
    jump = p.after(m.t)
    m.arms(0.25 + 1.55 * jump, 0.1 + 0.9 * jump)
    m.gape, m.bob = jump.copy(), -0.05 * jump


def _slump(m: Motion, p: Tempo) -> None:
    _sad(m, p)
    m.lean, m.bob = m.lean + 0.05, m.bob + 0.02


def _startle(m: Motion, p: Tempo) -> None:
    _talk(m, p)
    flinch = p.after(m.t)
    m.arm_l, m.arm_r = m.arm_l * (1 - flinch) + 1.2 * flinch, m.arm_r * (1 - flinch) + 1.2 * flinch
    m.elbow_l, m.elbow_r = 0.6 + 1.8 * flinch, 0.6 + 1.8 * flinch
    m.bob, m.lean = 0.10 * flinch, p.shake(m.t, 0.02) - 0.05 * flinch


def _sit(m: Motion, p: Tempo) -> None:
    m.arms(0.4 + 0.03 * p.wave(m.t, 0.7), 0.6)
    m.drop, m.gape = 0.015 * p.wave(m.t, 1.0), 0.3 + 0.3 * p.wave(m.t, 2.0)


def _tremble(m: Motion, p: Tempo) -> None:
    _sit(m, p)
    m.index = m.thumb = p.shake(m.t, FINGER_MOVEMENT)


def _fumble(m: Motion, p: Tempo) -> None:
    _sit(m, p)
    m.thumb = p.shake(m.t, FINGER_MOVEMENT)


def _wave_hand(m: Motion, p: Tempo) -> None:
    m.arm_r, m.elbow_r = m.t * 0 + 2.2, 0.5 + 0.6 * p.wave(m.t, 1.4)
    m.smile = m.t * 0 + 0.5


def _point(m: Motion, p: Tempo) -> None:
    m.arm_r, m.elbow_r = 1.55 + 0.04 * p.wave(m.t, 0.5), m.t * 0.0


def _clap(m: Motion, p: Tempo) -> None:
    m.arms(0.7 - 0.1 * p.wave(m.t, 1.5), -1.4 - 0.6 * p.wave(m.t, 1.5))


def _reach_up(m: Motion, p: Tempo) -> None:
    m.arms(2.85 + 0.08 * p.wave(m.t, 0.7), 0.05)
    m.bob = -0.05 + 0.03 * p.wave(m.t, 1.0)


def _bend_down(m: Motion, p: Tempo) -> None:
    m.arms(-0.1 + 0.05 * p.wave(m.t, 0.5), 0.0)
    m.lean, m.drop, m.bob = m.t * 0 + 0.25, m.t * 0 + 0.12, 0.14 + 0.03 * p.wave(m.t, 0.6)


def _cover_ears(m: Motion, p: Tempo) -> None:
    m.arms(1.35 + 0.03 * p.wave(m.t, 0.8), 2.3)
    m.lean = 0.03 * p.wave(m.t, 1.0)


def _climb(m: Motion, p: Tempo) -> None:
    m.arm_l, m.arm_r = 2.2 + 0.7 * p.wave(m.t, 0.9), 2.2 - 0.7 * p.wave(m.t, 0.9)
    m.elbow_l, m.elbow_r = m.t * 0 + 0.3, m.t * 0 + 0.3
    m.bob = 0.03 * p.wave(m.t, 1.8)


def _lift(m: Motion, p: Tempo) -> None:
    m.arms(1.5 + 0.2 * p.wave(m.t, 0.8), 1.5 + 0.1 * p.wave(m.t, 0.8, 1))
    m.bob = 0.05 * p.wave(m.t, 0.8)


def _row(m: Motion, p: Tempo) -> None:
    m.arms(0.6 + 0.3 * p.wave(m.t, 0.8), -0.9)
    m.lean, m.bob = 0.2 * p.wave(m.t, 0.8), m.t * 0 + 0.1


def _throw(m: Motion, p: Tempo) -> None:
    m.arm_r, m.elbow_r = 1.6 + 1.3 * p.wave(m.t, 1.0), m.t * 0.0
    m.arm_l, m.lean = m.t * 0 + 0.1, 0.06 * p.wave(m.t, 1.0)


def _drink(m: Motion, p: Tempo) -> None:
    m.arm_r, m.elbow_r = 0.9 + 0.06 * p.wave(m.t, 0.5), m.t * 0 - 4.0
    m.drop, m.gape = m.t * 0 - 0.03, m.t * 0 + 0.5


def _drum(m: Motion, p: Tempo) -> None:
    m.arm_l, m.arm_r = 0.55 + 0.3 * p.wave(m.t, 2.2), 0.55 - 0.3 * p.wave(m.t, 2.2)
    m.elbow_l, m.elbow_r = 0.9 + 0.5 * p.wave(m.t, 2.2), 0.9 - 0.5 * p.wave(m.t, 2.2)


def _still(m: Motion, p: Tempo) -> None:
    m.lean = 0.01 * p.wave(m.t, 0.4)


MOTIONS: dict[str, Callable[[Motion, Tempo], None]] = {
    "talk": _talk, "anger": _anger, "disgust": _disgust, "fear": _fear, "happy": _happy, "neutral": _still, "sad": _sad,
    "surprise": _surprise, "slump": _slump, "startle": _startle, "sit": _sit, "tremble": _tremble, "fumble": _fumble,
    "wave": _wave_hand, "point": _point, "clap": _clap,
    "reach": _reach_up, "bend": _bend_down, "ears": _cover_ears, "climb": _climb, "lift": _lift, "row": _row,
    "throw": _throw, "drink": _drink, "drum": _drum,
}  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """Points [T, 2] in units of the frame (0..1, y down) by name, with the look of the person."""

    points: dict[str, Array]
    head_radius: float
    background: tuple[int, int, int]
    skin: tuple[int, int, int]
    shirt: tuple[int, int, int]


def animate(motion: str, num_frames: int, rng: np.random.Generator) -> Figure:
    """The figure of a person who makes `motion` (a key of MOTIONS) for `num_frames` frames at 7 a second."""
    t = np.arange(num_frames) / FRAMES_PER_SECOND
    person = Tempo(rng.uniform(0, 6.28), rng.uniform(0.85, 1.15), rng.uniform(0.3, 0.8), rng)
    m = Motion(t)
    MOTIONS[motion](m, person)
    centre, scale = rng.uniform(0.44, 0.56), rng.uniform(0.88, 1.05)
    grey = int(rng.integers(0, 60))
    look = [tuple(int(v) for v in rng.integers(low, 256, 3)) for low in (170, 110)]
    points = {
        name: np.stack([centre + scale * x, 0.47 + scale * (y + m.bob)], axis=1)
        for name, (x, y) in _skeleton(m).items()
    }
    for name, y in (("ankle_l", 0.42), ("ankle_r", 0.42)):  # the feet stay on the floor
        points[name][:, 1] = 0.47 + scale * y
    return Figure(points, 0.085 * scale, (grey, grey, grey + 20), look[0], look[1])  # type: ignore[arg-type]


def _skeleton(m: Motion) -> dict[str, tuple[Array, Array]]:
    still = np.zeros_like(m.t)
    points: dict[str, tuple[Array, Array]] = {}
    chest_x, chest_y = m.lean, still - 0.16
    head_x, head_y = m.lean * 1.5 + 0.4 * np.clip(m.drop, 0, 1), chest_y - 0.15 + m.drop
    points["nose"] = (head_x, head_y)
    for side, sign, arm, elbow in (("l", -1, m.arm_l, m.elbow_l), ("r", 1, m.arm_r, m.elbow_r)):
        shoulder = (chest_x + sign * 0.07, chest_y)
        bend = (shoulder[0] + sign * 0.14 * np.sin(arm), shoulder[1] + 0.14 * np.cos(arm))
        wrist = (bend[0] + sign * 0.15 * np.sin(arm + elbow), bend[1] + 0.15 * np.cos(arm + elbow))
        points[f"shoulder_{side}"], points[f"elbow_{side}"], points[f"wrist_{side}"] = shoulder, bend, wrist
        sin, cos = np.sin(arm + elbow), np.cos(arm + elbow)
        points[f"index_{side}"] = (wrist[0] + sign * 0.03 * sin + m.index, wrist[1] + 0.03 * cos - m.index)
        points[f"thumb_{side}"] = (wrist[0] - sign * 0.02 * cos + m.thumb, wrist[1] + 0.02 * sin - m.thumb)
        points[f"hip_{side}"] = (still + sign * 0.05, still + 0.12)
        points[f"ankle_{side}"] = (still + sign * 0.08, still + 0.42)
        points[f"eye_{side}"] = (head_x + sign * 0.03, head_y - 0.025)
        points[f"mouth_{side}"] = (head_x + sign * 0.035, head_y + 0.04 - 0.02 * m.smile)
    points["mouth_top"] = (head_x, head_y + 0.04 - 0.015 * m.gape + 0.01 * m.smile)
    points["mouth_bottom"] = (head_x, head_y + 0.04 + 0.035 * m.gape + 0.01 * m.smile)
    return points
