"""The people of the mini-atlas: how a state or an action moves body and face, what a camera sees of it, and a voice.

`animate` turns the name of a motion into points over time; `render` makes pixels and landmarks of them. Place, size,
colours, speed and phase are drawn independently of the motion, and the number of frames is the caller's. It knows no
labels: the names of `MOTIONS` are ways to move.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SIZE = 56
FRAMES_PER_SECOND = 7
FINGER_MOVEMENT = 0.05  # about the length of a hand
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Person:
    """The individual manner of somebody over the times `t` of frames [T]: phase of a movement, its speed, and when a
    sudden thing happens."""

    t: Array
    phase: float
    speed: float
    onset_seconds: float
    rng: np.random.Generator

    def wave(self, hertz: float, shift: float = 0.0) -> Array:
        return np.sin(2 * np.pi * hertz * self.speed * self.t + self.phase + shift)

    def after(self) -> Array:
        return np.clip((self.t - self.onset_seconds) * 6, 0, 1)

    def shake(self, amount: float) -> Array:
        return self.rng.normal(0, amount, len(self.t))


# Angles and offsets over frames. Arm angles: 0 hangs down, pi points up, outward positive (radians); `arms` and
# `elbows` are both of them. Down is positive. Finger tips are what landmarks have and the picture does not.
Movement = dict[str, Any]
_AT_REST: Movement = {
    "lean": 0.0, "drop": 0.0, "bob": 0.0, "smile": 0.0, "gape": 0.0, "index": 0.0, "thumb": 0.0,
    "arm_l": 0.25, "arm_r": 0.25, "elbow_l": 0.1, "elbow_r": 0.1,
}


def _talk(p: Person) -> Movement:
    arms = {"arm_l": 0.4 + 0.15 * p.wave(0.7), "arm_r": 0.4 + 0.15 * p.wave(0.9, 2)}
    elbows = {"elbow_l": 0.6, "elbow_r": 0.6 + 0.3 * p.wave(0.8, 1)}
    return arms | elbows | {"drop": 0.015 * p.wave(1.0), "gape": 0.3 + 0.3 * p.wave(2.0)}


def _sad(p: Person) -> Movement:
    lean = 0.07 + 0.02 * p.wave(0.3)
    return {"arms": 0.05 + 0.03 * p.wave(0.3), "elbows": 0.0, "drop": 0.09, "smile": -0.8, "lean": lean, "bob": 0.03}


def _surprise(p: Person) -> Movement:
    jump = p.after()
    return {"arms": 0.25 + 1.55 * jump, "elbows": 0.1 + 0.9 * jump, "gape": jump, "bob": -0.05 * jump}


def _startle(p: Person) -> Movement:
    before, flinch = _talk(p), p.after()
    arms = {name: before[name] * (1 - flinch) + 1.2 * flinch for name in ("arm_l", "arm_r")}
    elbows = dict.fromkeys(("elbow_l", "elbow_r"), 0.6 + 1.8 * flinch)
    return before | arms | elbows | {"bob": 0.10 * flinch, "lean": p.shake(0.02) - 0.05 * flinch}


def _sit(p: Person) -> Movement:
    face = {"drop": 0.015 * p.wave(1.0), "gape": 0.3 + 0.3 * p.wave(2.0)}
    return {"arms": 0.4 + 0.03 * p.wave(0.7), "elbows": 0.6} | face


def _drum(p: Person) -> Movement:
    arm, elbow = 0.3 * p.wave(2.2), 0.5 * p.wave(2.2)
    return {"arm_l": 0.55 + arm, "arm_r": 0.55 - arm, "elbow_l": 0.9 + elbow, "elbow_r": 0.9 - elbow}


def _climb(p: Person) -> Movement:
    arm = 0.7 * p.wave(0.9)
    return {"arm_l": 2.2 + arm, "arm_r": 2.2 - arm, "elbows": 0.3, "bob": 0.03 * p.wave(1.8)}


MOTIONS: dict[str, Callable[[Person], Movement]] = {
    "talk": _talk,
    "anger": lambda p: {
        "arms": 1.15 + 0.5 * np.sign(p.wave(1.4)), "elbows": 1.0,
        "smile": -0.7, "lean": 0.05 * p.wave(1.4),
    },
    "disgust": lambda p: {"arm_r": 1.5 + 0.1 * p.wave(0.6), "elbow_r": 0.9, "lean": -0.13, "smile": -1},
    "fear": lambda p: {
        "arms": 0.75 + p.shake(0.12), "elbows": 2.3,
        "bob": 0.07, "gape": 0.6, "lean": p.shake(0.015),
    },
    "happy": lambda p: {
        "arms": 2.4 + 0.35 * p.wave(1.2), "elbows": 0.2,
        "smile": 1, "bob": -0.04 * np.abs(p.wave(0.8)),
    },
    "neutral": lambda p: {"lean": 0.01 * p.wave(0.4)},
    "sad": _sad,
    "surprise": _surprise,
    "slump": lambda p: (sad := _sad(p)) | {"lean": sad["lean"] + 0.05, "bob": sad["bob"] + 0.02},
    "startle": _startle,
    "sit": _sit,
    "tremble": lambda p: _sit(p) | dict.fromkeys(("index", "thumb"), p.shake(FINGER_MOVEMENT)),
    "fumble": lambda p: _sit(p) | {"thumb": p.shake(FINGER_MOVEMENT)},
    "wave": lambda p: {"arm_r": 2.2, "elbow_r": 0.5 + 0.6 * p.wave(1.4), "smile": 0.5},
    "point": lambda p: {"arm_r": 1.55 + 0.04 * p.wave(0.5), "elbow_r": 0.0},
    "clap": lambda p: {"arms": 0.7 - 0.1 * p.wave(1.5), "elbows": -1.4 - 0.6 * p.wave(1.5)},
    "reach": lambda p: {"arms": 2.85 + 0.08 * p.wave(0.7), "elbows": 0.05, "bob": -0.05 + 0.03 * p.wave(1.0)},
    "bend": lambda p: {
        "arms": -0.1 + 0.05 * p.wave(0.5), "elbows": 0.0,
        "lean": 0.25, "drop": 0.12, "bob": 0.14 + 0.03 * p.wave(0.6),
    },
    "ears": lambda p: {"arms": 1.35 + 0.03 * p.wave(0.8), "elbows": 2.3, "lean": 0.03 * p.wave(1.0)},
    "climb": _climb,
    "lift": lambda p: {
        "arms": 1.5 + 0.2 * p.wave(0.8), "elbows": 1.5 + 0.1 * p.wave(0.8, 1),
        "bob": 0.05 * p.wave(0.8),
    },
    "row": lambda p: {"arms": 0.6 + 0.3 * p.wave(0.8), "elbows": -0.9, "lean": 0.2 * p.wave(0.8), "bob": 0.1},
    "throw": lambda p: {"arm_r": 1.6 + 1.3 * p.wave(1.0), "elbow_r": 0.0, "arm_l": 0.1, "lean": 0.06 * p.wave(1.0)},
    "drink": lambda p: {"arm_r": 0.9 + 0.06 * p.wave(0.5), "elbow_r": -4.0, "drop": -0.03, "gape": 0.5},
    "drum": _drum,
}


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
    person = Person(t, rng.uniform(0, 6.28), rng.uniform(0.85, 1.15), rng.uniform(0.3, 0.8), rng)
    moved = MOTIONS[motion](person)
    both = {f"{part}_{side}": moved[f"{part}s"] for part in ("arm", "elbow") for side in "lr" if f"{part}s" in moved}
    m = SimpleNamespace(**{name: t * 0 + value for name, value in (_AT_REST | both | moved).items()})
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


def _skeleton(m: SimpleNamespace) -> dict[str, tuple[Array, Array]]:
    still = np.zeros_like(m.bob)
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


# From a moving figure to what a camera and a landmark detector would give: frames and points.
#
# Frames carry sensor noise and landmarks measurement noise of the same strength whatever the figure does.



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


# A small source-filter voice: what a speaker's state does to pitch, energy, tempo and voice quality.
#
# A glottal pulse train runs through three formant resonators, syllable by syllable. The state of the speaker sets the
# `Voice` parameters; everything else (base pitch, vowels, small jitter of each parameter) is drawn independently of it,
# and the number of samples is given by the caller, so that a state never shows in the length of a clip.
# It refuses nothing and knows no labels: the names of `VOICES` are manners of speaking.


SAMPLE_RATE = 8000
Samples = NDArray[np.float64]

_FORMANTS_HZ = (
    (730, 1090, 2440),
    (270, 2290, 3010),
    (300, 870, 2240),
    (530, 1840, 2480),
    (570, 840, 2410),
    (440, 1020, 2240),
)
_BANDWIDTHS_HZ = (80, 100, 140)
_GAINS = (1.0, 0.6, 0.3)
_ROOM_NOISE = 0.0015


@dataclass(frozen=True, kw_only=True)
class Voice:
    """One manner of speaking. Pitch, level and tempo are relative to the speaker; tempo is syllables a second."""

    pitch: float = 1.0
    melody: float = 0.12  # standard deviation of the log pitch accents
    level: float = 0.5
    tempo: float = 4.2
    open_quotient: float = 0.6  # small: tense and bright; large: soft and dull
    tremor: float = 0.0  # depth of a 7 Hz pitch modulation
    rise: float = 0.0  # log pitch change towards the end
    breath: float = 0.02  # noise in the source
    freeze: bool = False  # speech breaks off once and comes back higher


VOICES: dict[str, Voice] = {
    "neutral": Voice(melody=0.08, level=0.45, tempo=4.0),
    "anger": Voice(pitch=1.25, melody=0.30, level=1.0, tempo=5.5, open_quotient=0.35, rise=-0.1, breath=0.04),
    "happy": Voice(pitch=1.55, melody=0.45, level=0.75, tempo=5.0, open_quotient=0.5, rise=0.1),
    "sad": Voice(pitch=0.8, melody=0.05, level=0.18, tempo=2.5, open_quotient=0.85, rise=-0.15),
    "fear": Voice(pitch=1.75, melody=0.1, level=0.4, tempo=6.5, tremor=0.12, rise=0.05, breath=0.06),
    "disgust": Voice(pitch=0.7, melody=0.25, level=0.6, tempo=3.0, open_quotient=0.7, rise=-0.3, breath=0.3),
    "surprise": Voice(pitch=1.3, melody=0.15, level=0.8, tempo=3.5, open_quotient=0.5, rise=0.8),
    "steady": Voice(melody=0.22, level=0.6, tempo=4.5),
    "depressed": Voice(pitch=0.85, melody=0.03, level=0.17, tempo=2.6, open_quotient=0.85, rise=-0.15),
    "anxious": Voice(pitch=1.35, melody=0.22, level=0.6, tempo=6.5, tremor=0.14, breath=0.12),
    "depressed anxious": Voice(
        pitch=1.1, melody=0.03, level=0.17, tempo=4.2, tremor=0.14, breath=0.12, open_quotient=0.85, rise=-0.15
    ),
    "startled": Voice(pitch=1.2, melody=0.12, level=0.75, tempo=6.0, tremor=0.08, open_quotient=0.4, freeze=True),
    "warm": Voice(pitch=1.5, melody=0.40, level=0.75, tempo=5.0, open_quotient=0.5, rise=0.15),
    "drawl": Voice(pitch=0.75, melody=0.05, level=0.4, tempo=2.4, open_quotient=0.8, rise=-0.3, breath=0.12),
}


def speak(voice: Voice, num_samples: int, rng: np.random.Generator) -> Samples:
    """Speech-like samples [num_samples] at 8 kHz in about -1..1, in the manner of a voice."""
    voice = _jittered(voice, rng)
    seconds = num_samples / SAMPLE_RATE
    t = np.linspace(0, 1, num_samples, endpoint=False)
    num_syllables = max(2, round(seconds * voice.tempo))
    syllable = np.minimum((t * num_syllables).astype(int), num_syllables - 1)
    within = t * num_syllables - syllable
    pitch = _pitch_contour(voice, t, seconds, syllable, within, num_syllables, rng)
    envelope = np.sqrt(np.sin(np.pi * np.clip(within, 0, 1)))
    if voice.freeze:
        start = rng.uniform(0.25, 0.5)
        pitch *= np.where(t > start, 1.35, 1.0)
        envelope = envelope * ((t < start) | (t > start + 0.22))
    source = _glottal(pitch, voice.open_quotient) + rng.normal(0, voice.breath, num_samples)
    shaped = _vowels(source, num_syllables, rng) * envelope
    shaped *= 0.09 * voice.level / (shaped.std() + 1e-9)
    spoken: Samples = np.tanh(shaped * 1.2) / 1.2 + rng.normal(0, _ROOM_NOISE, num_samples)
    return spoken


def add_tail(speech: Samples, laughter: bool, rng: np.random.Generator) -> Samples:
    """The same number of samples whose last two fifths carry an audience: bursts of laughter, or steady murmur."""
    n = len(speech)
    start = n - 2 * n // 5
    t = np.arange(n - start) / SAMPLE_RATE
    level = 0.06 * np.exp(rng.normal(0, 0.2))
    if laughter:
        rate = rng.uniform(4.5, 6.0)
        gate = np.clip(np.sin(2 * np.pi * rate * t), 0, 1) ** 0.5 * np.exp(-0.8 * t)
        crowd = np.convolve(rng.normal(0, 1, len(t)), [1, -0.7])[: len(t)] * gate
    else:
        level *= rng.uniform(0.15, 0.5)
        crowd = _ringing(rng.normal(0, 1, len(t)), 0.9)
    mixed = speech.copy()
    mixed[start:] *= 0.25
    mixed[start:] += level * crowd / (crowd.std() + 1e-9)
    return mixed


def ambience(num_samples: int, rng: np.random.Generator) -> Samples:
    """A quiet room [num_samples] at 8 kHz: hum and noise, nobody speaks."""
    t = np.arange(num_samples) / SAMPLE_RATE
    hum = np.sin(2 * np.pi * rng.uniform(90, 130) * t + rng.uniform(0, 6.28))
    decay = rng.uniform(0.5, 0.95)
    hiss = _ringing(rng.normal(0, 1, num_samples), decay)
    room: Samples = rng.uniform(0.002, 0.01) * hum + rng.uniform(0.003, 0.01) * hiss / hiss.std()
    return room


def _jittered(voice: Voice, rng: np.random.Generator) -> Voice:
    def scaled(value: float, spread: float) -> float:
        return float(value * np.exp(rng.normal(0, spread)))

    base_hz = rng.uniform(105, 190)
    return replace(
        voice,
        pitch=base_hz * scaled(voice.pitch, 0.07),
        tempo=scaled(voice.tempo, 0.08),
        level=scaled(voice.level, 0.15),
        melody=scaled(voice.melody, 0.15),
        open_quotient=min(0.95, scaled(voice.open_quotient, 0.05)),
    )


def _pitch_contour(
    voice: Voice,
    t: Samples,
    seconds: float,
    syllable: NDArray[np.int64],
    within: Samples,
    num_syllables: int,
    rng: np.random.Generator,
) -> Samples:
    accents = rng.normal(0, voice.melody, num_syllables)
    log_pitch = accents[syllable] * np.sin(np.pi * within) + voice.rise * t**2 - 0.1 * t
    contour: Samples = voice.pitch * np.exp(log_pitch)
    return contour * (1 + voice.tremor * np.sin(2 * np.pi * 7 * t * seconds + rng.uniform(0, 6.28)))


def _glottal(pitch_hz: Samples, open_quotient: float) -> Samples:
    phase = np.cumsum(pitch_hz) / SAMPLE_RATE % 1.0
    flow = np.where(phase < open_quotient, np.sin(np.pi * phase / open_quotient) ** 2, 0.0)
    return np.diff(flow, prepend=flow[:1])


def _vowels(source: Samples, num_syllables: int, rng: np.random.Generator) -> Samples:
    out = np.zeros_like(source)
    bounds = np.linspace(0, len(source), num_syllables + 1).astype(int)
    for first, last in pairwise(bounds):
        formants = _FORMANTS_HZ[int(rng.integers(len(_FORMANTS_HZ)))]
        for hertz, bandwidth, gain in zip(formants, _BANDWIDTHS_HZ, _GAINS, strict=True):
            r = np.exp(-np.pi * bandwidth / SAMPLE_RATE)
            out[first:last] += gain * (1 - r) * _ringing(source[first:last], r, 2 * np.pi * hertz / SAMPLE_RATE)
    return out


def _ringing(signal: Samples, decay: float, angle: float = 0.0) -> Samples:
    """A signal through a pole, y[n] = x[n] + decay y[n-1], or with an angle through the pair decay e^(+-i angle)."""
    n = np.arange(min(len(signal), int(40 / -np.log(decay))))  # below a float's last digit
    response = decay**n * (np.sin((n + 1) * angle) / np.sin(angle) if angle else 1.0)
    size = len(signal) + len(n)
    heard: Samples = np.fft.irfft(np.fft.rfft(signal, size) * np.fft.rfft(response, size), size)[: len(signal)]
    return heard
