"""Media to the browser, as they are or drawn. By ranges: a clip starts to play before it has been read, also when it
lies inside a shard.

A medium is named by its sample's split and row, its field and its place in the field, never by a path, so that no
request can name a file. Content decides the type that is declared, of a short list; anything else is bytes to save.
"""

from __future__ import annotations

import io
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, TimeoutError, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from starlette.responses import Response, StreamingResponse

from hba.atlas.rows import MEDIA_FIELDS, Field, Sample
from hba.atlas.source import DEFAULT_LIMITS, RESTORE, Source, check_source, head, opened
from hba.errors import InputError, MediaError

BLOCK = 1 << 18
MAX_RANGE_BYTES = 8 << 20  # of one answer: players ask for the rest
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
_PLAIN = "application/octet-stream"


class Span(NamedTuple):
    """Bytes `start` to `stop` (exclusive) of a medium."""

    start: int
    stop: int


def source_of(sample: Sample, field: str, index: int) -> Source:
    """Medium `index` of a sample's field. Raises InputError for one that is not there, MediaError for a broken path."""
    if field not in MEDIA_FIELDS or not 0 <= index < getattr(sample, field):
        raise InputError(f"no medium {index} in {field!r}", where=sample.where, fix="See the sample's own page.")
    name: Field = field  # type: ignore[assignment]
    return sample.source.medium(sample.number, name, index, where=sample.place(name))


def media_type(start: bytes) -> str:
    """The declared type of content that begins with `start`."""
    if start[:4] == b"RIFF":
        return {b"WAVE": "audio/wav", b"AVI ": "video/x-msvideo", b"WEBP": "image/webp"}.get(start[8:12], _PLAIN)
    if start[4:8] == b"ftyp":
        return "audio/mp4" if start[8:12] == b"M4A " else "video/mp4"
    known = {
        b"fLaC": "audio/flac", b"OggS": "audio/ogg", b"ID3": "audio/mpeg", b"\xff\xfb": "audio/mpeg",
        b"\x1a\x45\xdf\xa3": "video/webm", b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif",
    }  # fmt: skip
    return next((kind for magic, kind in known.items() if start.startswith(magic)), _PLAIN)


def media_response(source: Source, asked: str | None, *, where: str) -> Response:
    """The medium, or the part of it that the Range header `asked` names; 416 for a range that it does not have."""
    size = check_source(source, where=where, limits=DEFAULT_LIMITS)
    headers = {"accept-ranges": "bytes", "content-security-policy": "sandbox; default-src 'none'"}
    span = Span(0, size)
    if asked is not None:
        found = parse_range(asked, size)
        if found is None:
            return Response(status_code=416, headers=headers | {"content-range": f"bytes */{size}"})
        span = found
        headers["content-range"] = f"bytes {span.start}-{span.stop - 1}/{size}"
    headers["content-length"] = str(span.stop - span.start)
    kind = media_type(head(source, 16, where=where))
    if kind == _PLAIN:
        headers["content-disposition"] = "attachment"
    return StreamingResponse(_blocks(source, span, where), 200 if asked is None else 206, headers, kind)


def parse_range(asked: str, size: int) -> Span | None:
    """The bytes that 'bytes=a-b', 'bytes=a-' or 'bytes=-n' means of `size`, at most 8 MB of them; None for no bytes."""
    match = _RANGE.fullmatch(asked.strip())
    if match is None or match.group(0) == "bytes=-":
        return None
    first, last = match.groups()
    start = int(first) if first else max(size - int(last), 0)
    stop = min(int(last) + 1, size) if first and last else size
    return Span(start, min(stop, start + MAX_RANGE_BYTES)) if start < stop else None


def _blocks(source: Source, span: Span, where: str) -> Iterator[bytes]:
    """The bytes of a span. A medium that ends early, or differs from its checksum, breaks the answer off."""
    with opened(source, where=where) as file:
        file.seek(span.start)
        left = span.stop - span.start
        while left:
            block = file.read(min(BLOCK, left))
            if not block:
                raise MediaError("became shorter while it was read", where=where)
            yield block
            left -= len(block)


# What is computed of a medium to be looked at: the waveform, the spectrogram, landmarks over time, descriptor curves.
#
# All decoding happens in processes beside the server, which may crash, hang or be killed: the picture that was asked
# for fails with a sentence, the next one gets a new process. So the server itself never loads torch or a codec. What
# takes seconds (`found_landmarks`, `windows`, `playable`) has a decoder of its own, so that nothing short waits for it.


PATIENCE_SECONDS = 60.0
TURN_SECONDS = 10.0
MOST_ASIDE = 3
WAVE_POINTS = 800
SPECTROGRAM_PIXELS = (800, 128)  # columns, rows
MAX_POSE_FRAMES = 1500
MAX_CURVES = 48
FLOOR_DECIBELS = -80.0
Floats = npt.NDArray[np.float32]
T = TypeVar("T")


class Decoder:
    """The process that decodes, one medium at a time; made when it is first needed, and again after it has died.

    A medium that takes longer than TURN_SECONDS goes on aside, and a new process takes the next: of those that hang
    each holds the others up for that long, and not for PATIENCE_SECONDS, as long as MOST_ASIDE at most are aside."""

    def __init__(self) -> None:
        self._turn, self._changing = threading.Lock(), threading.Lock()
        self._idle: ProcessPoolExecutor | None = None
        self._busy: set[ProcessPoolExecutor] = set()

    def call(self, function: Callable[..., T], source: Source, where: str) -> T:
        """`function(source, where)` in the other process. Raises MediaError, also when that process dies or hangs.

        Its time begins with its turn: a medium that crashes or hangs costs those that wait behind it nothing but the
        wait."""
        with self._turn:
            end = time.monotonic() + PATIENCE_SECONDS
            try:
                pool, coming = self._submitted(function, source, where)
            except BrokenProcessPool:  # its process was ended while it had nothing to do
                pool, coming = self._submitted(function, source, where)
            wait([coming], min(TURN_SECONDS, PATIENCE_SECONDS))
            while not coming.done() and len(self._busy) > MOST_ASIDE and time.monotonic() < end:
                wait([coming], 1)
        try:
            found = coming.result(max(0.0, end - time.monotonic()))
        except BrokenProcessPool:
            what = "crashes its decoder"
        except TimeoutError:
            what = f"is not decoded within {PATIENCE_SECONDS:.0f} seconds"
        except Exception:
            self._give_back(pool)
            raise
        else:
            self._give_back(pool)
            return found
        with self._changing:
            self._busy.discard(pool)
        _end(pool)
        raise MediaError(what, where=where, fix=RESTORE)

    def _submitted(
        self, function: Callable[..., T], source: Source, where: str
    ) -> tuple[ProcessPoolExecutor, Future[T]]:
        """The process that has nothing to do, or a new one, and what comes of it."""
        with self._changing:
            pool, self._idle = self._idle or ProcessPoolExecutor(1, mp_context=get_context("spawn")), None
            coming = pool.submit(function, source, where)
            self._busy.add(pool)
        return pool, coming

    def _give_back(self, pool: ProcessPoolExecutor) -> None:
        with self._changing:
            self._busy.discard(pool)
            spare, self._idle = self._idle, pool
        if spare is not None:
            _end(spare)

    def close(self) -> None:
        """End the processes."""
        with self._changing:
            pools = {*self._busy, *filter(None, [self._idle])}
            self._busy, self._idle = set(), None
        for pool in pools:
            _end(pool)


def _end(pool: ProcessPoolExecutor) -> None:
    for process in list((pool._processes or {}).values()):
        process.kill()
    pool.shutdown(wait=False, cancel_futures=True)


def playable(source: Source, where: str) -> tuple[str, bytes]:
    """Type and bytes of a clip, sound or image as browsers show it; a long one is cut, as in a report.

    Raises MediaError."""
    from hba.report.page import MAX_MEDIUM_BYTES, Kind, encode

    said = media_type(head(source, 16, where=where))
    kind: Kind = "audio" if said.startswith("audio/") else "image" if said.startswith("image/") else "video"
    encoded = encode(kind, source, where=where, max_bytes=MAX_MEDIUM_BYTES)
    return encoded.mime, encoded.data


def sound_pictures(source: Source, where: str) -> tuple[float, list[tuple[float, float]], bytes]:
    """Seconds, least and greatest of each of 800 parts (in -1..1), and the spectrogram (PNG) of a sound or of a clip's
    sound track. Raises MediaError."""
    from hba.atlas.media import SAMPLE_RATE, load_audio

    samples = load_audio(source, where=where).samples
    edges = np.linspace(0, len(samples), min(WAVE_POINTS, len(samples)) + 1).astype(int)
    peaks = [(float(part.min()), float(part.max())) for part in np.split(samples, edges[1:-1])]
    return len(samples) / SAMPLE_RATE, peaks, _spectrogram(samples)


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


def kinds(source: Source, where: str) -> tuple[str, ...]:
    """What a model can take of a file: image, video, audio. Raises MediaError for one that is no medium."""
    from hba.atlas.build import look_at

    assert isinstance(source, Path)
    return look_at(source).kinds


def landmarks(source: Source, where: str) -> dict[str, Any]:
    """`frames`: for each part of the body, [frames][points][x, y] with three decimals, None where it was not seen; at
    most MAX_POSE_FRAMES of `total`. `rate`: frames a second, None where they are spread over the whole clip.

    Raises MediaError for a descriptor that holds no landmarks."""
    from hba.atlas.media import load_descriptor

    loaded = load_descriptor(source, where=where)
    return _landmarks(loaded if isinstance(loaded, dict) else {}, where)


LANDMARK_RATE = 15.0  # frames a second


def found_landmarks(source: Source, where: str) -> dict[str, Any]:
    """`landmarks` of a clip, by MediaPipe.

    Raises MediaError where nobody is seen in it, HbaError where MediaPipe is not set up."""
    from hba.atlas.video import read_frames
    from hba.descriptors.landmarks import Holistic

    holistic = Holistic()
    try:
        frames = read_frames(source, where=where, frames_per_second=LANDMARK_RATE)
        pixels = (frame.pixels for frame in islice(frames, MAX_POSE_FRAMES))
        return _landmarks(holistic.extract(pixels, where=where), where) | {"rate": LANDMARK_RATE}
    finally:
        holistic.close()


class Part(NamedTuple):
    """Seconds `start` to `end` of a clip or sound, cut out into `path`."""

    start: float
    end: float
    path: Path


MOST_WINDOWS = 60


def windows(source: Source, where: str, *, folder: Path, every: float) -> list[Part]:
    """The windows of a clip or sound as `hba ask --every` cuts them, written into `folder`; none of a picture.

    Raises MediaError for a file that cannot be read, InputError for more than MOST_WINDOWS."""
    from hba.atlas.build import look_at
    from hba.evaluate.ask import windows_of

    assert isinstance(source, Path)
    medium, found = look_at(source), list[Part]()
    if not {"video", "audio"} & set(medium.kinds):
        return []
    for piece in windows_of(medium, folder, every):
        if len(found) == MOST_WINDOWS:
            what = f"has more than {MOST_WINDOWS} windows of {every:g} seconds"
            raise InputError(what, where=where, fix="Take longer windows, or `hba ask --every`.")
        found.append(Part(piece.start or 0.0, piece.end or 0.0, piece.files.get("video") or piece.files["audio"]))
    return found


def _landmarks(parts: Mapping[str, Any], where: str) -> dict[str, Any]:
    shown = {name: parts[name] for name in ("pose", "face", "left_hand", "right_hand") if name in parts}
    if not shown:
        raise MediaError("holds no landmarks", where=where, fix="Extract them with `hba atlas describe`.")
    made: dict[str, Any] = {}
    for name, points in shown.items():
        taken = np.asarray(points[:MAX_POSE_FRAMES])
        made[name] = [_points(frame) if frame[:, 2].any() else None for frame in taken]
    return {"frames": made, "rate": None, "total": max(map(len, shown.values()))}


def _points(frame: npt.NDArray[np.floating[Any]]) -> list[list[float]]:
    return [[round(float(x), 3), round(float(y), 3)] for x, y in frame[:, :2]]


def curves(source: Source, where: str) -> list[tuple[str, list[int], list[list[float]]]]:
    """Descriptors to draw, each with name, shape and values [curves][time]: the 48 channels that vary most, or, without
    a time axis, the values themselves. Raises MediaError."""
    from hba.atlas.media import load_descriptor

    loaded = load_descriptor(source, where=where)
    tensors = loaded if isinstance(loaded, dict) else {"features": loaded}
    parts = []
    for name, tensor in tensors.items():
        values = np.asarray(tensor) if isinstance(tensor, np.ndarray) else tensor.float().numpy()
        flat = values.reshape(1, -1) if values.ndim < 2 else values.reshape(len(values), -1).T
        order = np.argsort(-flat.std(axis=1), kind="stable")[:MAX_CURVES]
        thin = max(1, flat.shape[1] // WAVE_POINTS)
        parts.append((name, list(values.shape), flat[np.sort(order), ::thin].astype(float).tolist()))
    return parts
