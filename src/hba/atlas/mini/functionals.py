"""Functionals of a waveform in the spirit of openSMILE: 88 statistics computed from the samples alone.

Contours of energy, pitch, periodicity, spectral shape and MFCC-like cepstra over 32 ms frames, each summarised by its
mean, spread, extremes and change. They are measured on the audio as it lies in the file, never taken from what the
generator knew.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hba.atlas.mini.voice import SAMPLE_RATE

NUM_FEATURES = 88
_FRAME, _HOP = 256, 80
_LAGS = np.arange(SAMPLE_RATE // 400, SAMPLE_RATE // 60)
_NUM_CEPSTRA = 7
Array = NDArray[np.float64]


def functionals(samples: Array) -> NDArray[np.float32]:
    """[88] float32 of samples [T >= 256] at 8 kHz; finite for every input, silence included."""
    starts = np.arange(0, len(samples) - _FRAME + 1, _HOP)
    frames = samples[starts[:, None] + np.arange(_FRAME)] * np.hanning(_FRAME)
    spectrum = np.abs(np.fft.rfft(frames, 2 * _FRAME)) ** 2 + 1e-12
    contours = np.stack([*_energy(samples, starts), *_pitch(spectrum), *_shape(spectrum), *_cepstra(spectrum)])
    change = np.abs(np.diff(contours, axis=1))
    third = len(starts) // 3
    low, high = np.percentile(contours, (10, 90), axis=1)
    summary = [contours.mean(1), contours.std(1), low, high, change.mean(1)]
    summary.append(contours[:, -third:].mean(1) - contours[:, :third].mean(1))
    vector = np.concatenate([*summary, _rhythm(contours[0])])
    return vector.astype(np.float32)


def _energy(samples: Array, starts: NDArray[np.int64]) -> list[Array]:
    frames = samples[starts[:, None] + np.arange(_FRAME)]
    crossings = (np.diff(np.signbit(frames), axis=1) != 0).mean(1)
    return [np.log10((frames**2).mean(1) + 1e-7), crossings]


def _pitch(spectrum: Array) -> list[Array]:
    correlation = np.fft.irfft(spectrum)
    normalised = correlation[:, _LAGS] / correlation[:, :1]
    best = normalised.argmax(1)
    return [np.log2(SAMPLE_RATE / _LAGS[best]), normalised.max(1)]


def _shape(spectrum: Array) -> list[Array]:
    hertz = np.linspace(0, SAMPLE_RATE / 2, spectrum.shape[1])
    share = spectrum / spectrum.sum(1, keepdims=True)
    centroid = (share * hertz).sum(1)
    spread = np.sqrt((share * (hertz - centroid[:, None]) ** 2).sum(1))
    return [centroid / 1000, spread / 1000, np.log10((share[:, hertz > 1500]).sum(1) + 1e-6)]


def _cepstra(spectrum: Array) -> list[Array]:
    edges = np.linspace(0, spectrum.shape[1], 21).astype(int)
    bands = np.log10(np.add.reduceat(spectrum, edges[:-1], axis=1))
    k = np.arange(1, _NUM_CEPSTRA + 1)[:, None]
    basis = np.cos(np.pi * k * (np.arange(20) + 0.5) / 20)
    return list(basis @ bands.T / 20)


def _rhythm(log_energy: Array) -> Array:
    """Four shares of the energy's modulation: 1-3, 3-5, 5-8 and 8-16 Hz."""
    modulation = np.abs(np.fft.rfft(log_energy - log_energy.mean())) ** 2
    hertz = np.fft.rfftfreq(len(log_energy), _HOP / SAMPLE_RATE)
    total = modulation.sum() + 1e-9
    bands = ((1, 3), (3, 5), (5, 8), (8, 16))
    return np.array([modulation[(hertz >= low) & (hertz < high)].sum() / total for low, high in bands])
