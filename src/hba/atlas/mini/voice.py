"""A small source-filter voice: what a speaker's state does to pitch, energy, tempo and voice quality.

A glottal pulse train runs through three formant resonators, syllable by syllable. The state of the speaker sets the
`Voice` parameters; everything else (base pitch, vowels, small jitter of each parameter) is drawn independently of it,
and the number of samples is given by the caller, so that a state never shows in the length of a clip.
It refuses nothing and knows no labels: the names of `VOICES` are manners of speaking.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter

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
    """Speech-like samples [num_samples] at 8 kHz in about -1..1, in the manner of `voice`."""
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
        crowd = lfilter([1, -0.7], [1], rng.normal(0, 1, len(t))) * gate
    else:
        level *= rng.uniform(0.15, 0.5)
        crowd = lfilter([1], [1, -0.9], rng.normal(0, 1, len(t)))
    mixed = speech.copy()
    mixed[start:] *= 0.25
    mixed[start:] += level * crowd / (crowd.std() + 1e-9)
    return mixed


def ambience(num_samples: int, rng: np.random.Generator) -> Samples:
    """A quiet room [num_samples] at 8 kHz: hum and noise, nobody speaks."""
    t = np.arange(num_samples) / SAMPLE_RATE
    hum = np.sin(2 * np.pi * rng.uniform(90, 130) * t + rng.uniform(0, 6.28))
    hiss = lfilter([1], [1, -rng.uniform(0.5, 0.95)], rng.normal(0, 1, num_samples))
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
            poles = [1, -2 * r * np.cos(2 * np.pi * hertz / SAMPLE_RATE), r * r]
            out[first:last] += gain * lfilter([1 - r], poles, source[first:last])
    return out
