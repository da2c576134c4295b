"""What is computed of a medium to be looked at: the waveform, the spectrogram, landmarks over time, descriptor curves.

All decoding happens in one process beside the server, which may crash, hang or be killed: the picture that was asked
for fails with a sentence, the next one gets a new process. So the server itself never loads torch or a codec.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from hba.atlas.slices import Source
from hba.atlas.source import RESTORE
from hba.errors import MediaError

PATIENCE_SECONDS = 60.0
WAVE_POINTS = 800
SPECTROGRAM_PIXELS = (800, 128)  # columns, rows
MAX_POSE_FRAMES = 1500
MAX_CURVES = 48
FLOOR_DECIBELS = -80.0
Floats = npt.NDArray[np.float32]
T = TypeVar("T")


class Decoder:
    """The process that decodes; made when it is first needed, and again after it has died."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._lock = threading.Lock()

    def call(self, function: Callable[..., T], source: Source, where: str) -> T:
        """`function(source, where)` in the other process. Raises MediaError, also when that process dies or hangs."""
        with self._lock:
            pool = self._pool = self._pool or ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        try:
            return pool.submit(function, source, where).result(PATIENCE_SECONDS)
        except BrokenProcessPool:
            self._drop(pool)
            raise MediaError("crashes its decoder", where=where, fix=RESTORE) from None
        except TimeoutError:
            self._drop(pool)
            what = f"takes its decoder more than {PATIENCE_SECONDS:.0f} seconds"
            raise MediaError(what, where=where, fix=RESTORE) from None

    def _drop(self, pool: ProcessPoolExecutor) -> None:
        with self._lock:
            if self._pool is pool:
                self._pool = None
        for process in list((pool._processes or {}).values()):
            process.kill()
        pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """End the process."""
        if self._pool is not None:
            self._drop(self._pool)


def playable(source: Source, where: str) -> tuple[str, bytes]:
    """Type and bytes of a clip, sound or image as browsers show it; a long one is cut, as in a report.

    Raises MediaError."""
    from hba.atlas.media import load_audio, load_image
    from hba.atlas.source import head
    from hba.explorer.serve_media import media_type
    from hba.report.embed import MAX_MEDIUM_BYTES, encode_audio, encode_image, encode_video

    kind = media_type(head(source, 16, where=where))
    if kind.startswith("audio/"):
        encoded = encode_audio(load_audio(source, where=where))
    elif kind.startswith("image/"):
        encoded = encode_image(load_image(source, where=where))
    else:
        encoded = encode_video(source, where=where, max_bytes=MAX_MEDIUM_BYTES)
    return encoded.mime, encoded.data


def sound_pictures(source: Source, where: str) -> dict[str, Any]:
    """`seconds`, `peaks` (least and greatest of each of 800 parts, in -1..1) and `spectrogram` (PNG) of a sound or of
    a clip's sound track. Raises MediaError."""
    from hba.atlas.media import SAMPLE_RATE, load_audio

    samples = load_audio(source, where=where).samples
    edges = np.linspace(0, len(samples), min(WAVE_POINTS, len(samples)) + 1).astype(int)
    peaks = [(float(part.min()), float(part.max())) for part in np.split(samples, edges[1:-1])]
    return {"seconds": len(samples) / SAMPLE_RATE, "peaks": peaks, "spectrogram": _spectrogram(samples)}


def _spectrogram(samples: Floats) -> bytes:
    """Mel-spaced power in decibels of 25 ms windows, as a greyscale PNG: dark is loud, high frequencies on top."""
    from PIL import Image

    window, columns, rows = 400, *SPECTROGRAM_PIXELS
    padded = np.pad(samples, (0, max(0, window - len(samples))))
    starts = np.unique(np.linspace(0, len(padded) - window, columns).astype(int))
    frames = padded[starts[:, None] + np.arange(window)] * np.hanning(window).astype(np.float32)
    power = np.abs(np.fft.rfft(frames, 1024)) ** 2
    mel = np.linspace(0, 2595 * np.log10(1 + 8000 / 700), rows)
    bins = np.minimum((700 * (10 ** (mel / 2595) - 1) / 8000 * 512).round().astype(int), 512)
    decibels = 10 * np.log10(power[:, bins].T[::-1] + 1e-10)
    level = np.clip((decibels - decibels.max()) / -FLOOR_DECIBELS + 1, 0, 1)
    picture = Image.fromarray((255 * (1 - level)).astype(np.uint8)).resize(SPECTROGRAM_PIXELS)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def landmarks(source: Source, where: str) -> dict[str, Any]:
    """`frames`: for each part of the body, [frames][points][x, y] with three decimals, None where it was not seen.

    Raises MediaError for a descriptor that holds no landmarks."""
    from hba.atlas.media import load_descriptor

    loaded = load_descriptor(source, where=where)
    parts = loaded if isinstance(loaded, dict) else {}
    shown = {name: parts[name] for name in ("pose", "face", "left_hand", "right_hand") if name in parts}
    if not shown:
        raise MediaError("holds no landmarks", where=where, fix="Extract them with `hba atlas describe`.")
    made: dict[str, Any] = {}
    for name, points in shown.items():
        taken = points[:MAX_POSE_FRAMES].numpy()
        made[name] = [_points(frame) if frame[:, 2].any() else None for frame in taken]
    return {"frames": made}


def _points(frame: npt.NDArray[np.floating[Any]]) -> list[list[float]]:
    return [[round(float(x), 3), round(float(y), 3)] for x, y in frame[:, :2]]


def curves(source: Source, where: str) -> dict[str, Any]:
    """Descriptors to draw: `parts`, each with `name`, `shape` and `values` [curves][time]: the 48 channels that vary
    most, or, without a time axis, the values themselves. Raises MediaError."""
    from hba.atlas.media import load_descriptor

    loaded = load_descriptor(source, where=where)
    tensors = loaded if isinstance(loaded, dict) else {"features": loaded}
    parts = []
    for name, tensor in tensors.items():
        values = tensor.float().numpy()
        flat = values.reshape(1, -1) if values.ndim < 2 else values.reshape(len(values), -1).T
        order = np.argsort(-flat.std(axis=1), kind="stable")[:MAX_CURVES]
        thin = max(1, flat.shape[1] // WAVE_POINTS)
        drawn = flat[np.sort(order), ::thin].astype(float)
        parts.append({"name": name, "shape": list(values.shape), "values": drawn.tolist()})
    return {"parts": parts}
