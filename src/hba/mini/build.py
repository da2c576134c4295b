"""Make the mini-atlas: plan it, synthesise every clip (in parallel where asked), write the folder in one rename.

The bytes depend on size and seed alone: not on the number of workers, the order of work, the folder or the clock.
It refuses to write over anything but nothing; a folder that already is this very mini-atlas is left as it is.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
from numpy.typing import NDArray

from hba.atlas.pt import write_arrays
from hba.errors import HbaError, InputError, nearest
from hba.mini import people
from hba.mini.people import FRAMES_PER_SECOND, SAMPLE_RATE
from hba.mini.scenes import CARRIED_BY, LENGTHS, SIZES, SPLITS, Clip, Plan, make_plan
from hba.parallel import Died, each
from hba.storage import StorageError, begun, read_json, write_json

# Arrays to the bytes of real .wav, .mp4 and .pt files whose size says nothing about their content.
#
# WAV is IMA ADPCM (constant rate); MP4 is H.264 with every version and time stamp left out, padded by a `free` box to
# one common size; `.pt` goes through memory, since torch.save writes the archive's name into the file. The same arrays
# give the same bytes in every run. A video that does not fit the common size is encoded again at lower quality.


ADPCM_BLOCK_SAMPLES = 505  # of libsndfile at 8 kHz; whole blocks leave no padding behind the last sample
MP4_BYTES = 2560
_QUALITIES = (28, 32, 36, 40, 44)


def wav_bytes(samples: NDArray[np.float64]) -> bytes:
    """A WAV file (8 kHz mono, IMA ADPCM, 4 bits a sample) of samples [T] in -1..1."""
    target = io.BytesIO()
    soundfile.write(target, np.clip(samples, -0.99, 0.99), SAMPLE_RATE, format="WAV", subtype="IMA_ADPCM")
    return target.getvalue()


def mp4_bytes(frames: NDArray[np.uint8]) -> bytes:
    """An MP4 file (H.264) of frames [T, H, W, 3], always MP4_BYTES long."""
    for quality in _QUALITIES:
        raw = _h264_mp4(frames, quality)
        room = MP4_BYTES - len(raw)
        if room >= 8:
            return raw + room.to_bytes(4, "big") + b"free" + bytes(room - 8)
    found = f"{len(frames)} frames do not fit {MP4_BYTES} bytes"
    raise HbaError(found, where="mini-atlas video", fix="Draw fewer frames.")


def _h264_mp4(frames: NDArray[np.uint8], quality: int) -> bytes:
    target = io.BytesIO()
    with av.open(target, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        # Macroblock trees differ by a few bits between two encodings of the same frames, even on one thread.
        same = {"x264-params": "mbtree=0", "flags": "+bitexact", "bf": "0"}
        options = {"crf": str(quality), "preset": "medium", **same}
        stream = container.add_stream("libx264", rate=Fraction(FRAMES_PER_SECOND), options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        # The encoder writes its version and options into an SEI unit (type 6) of the stream.
        keep = av.BitStreamFilterContext("filter_units=remove_types=6", stream)
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")):
                container.mux(keep.filter(packet))
        for packet in stream.encode():
            container.mux(keep.filter(packet))
        container.mux(keep.filter(None))
    return target.getvalue()


# Functionals of a waveform in the spirit of openSMILE: 88 statistics computed from the samples alone.
#
# Contours of energy, pitch, periodicity, spectral shape and MFCC-like cepstra over 32 ms frames, each summarised by its
# mean, spread, extremes and change. They are measured on the audio as it lies in the file, never taken from what the
# generator knew.


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


# --- the atlas --------------------------------------------------------------------------------------------------------


VERSION = 3  # of the content: raise it whenever the same seed gives other bytes
NOTE = "Synthetic: generated voices, stick figures and sentences. Scores on it say nothing about human behaviour."
Files = dict[str, bytes | dict[str, NDArray[Any]]]
_PATIENCE_SECONDS = 600.0  # a clip takes some hundredth of one


@dataclass(frozen=True, kw_only=True)
class MiniAtlasSummary:
    """What lies in the folder. `rows` and `signatures` count rows by split, then by dataset or signature."""

    path: Path
    size: str
    seed: int
    rows: dict[str, dict[str, int]]
    signatures: dict[str, dict[str, int]]
    num_files: int
    total_bytes: int
    reused: bool


def build_mini_atlas(
    out: str | Path,
    *,
    size: str,
    seed: int,
    workers: int,
    progress: Callable[[int, int], None] | None = None,
) -> MiniAtlasSummary:
    """Write the mini-atlas of `size` (a key of SIZES) and `seed` into the folder `out`.

    `workers` processes synthesise clips (1: none but this one); `progress(done, total)` is told of each clip. If `out`
    already is the same mini-atlas, it is returned untouched. Raises InputError for an unknown size, a negative seed,
    fewer than one worker or an `out` that holds anything else, StorageError when the disk refuses.
    """
    out = Path(out)
    if size not in SIZES:
        raise InputError(f"unknown size {size!r}", where="mini-atlas", fix=nearest(size, SIZES))
    if seed < 0 or workers < 1:
        raise InputError(f"seed {seed}, workers {workers}", where="mini-atlas", fix="Use a seed >= 0 and workers >= 1.")
    same = _existing(out, size, seed)
    if same is not None:
        return same
    plan = make_plan(size, seed)
    with _fresh_folder(out) as folder:
        with closing(_recorded(plan.clips, workers)) as recorded:
            for done, files in enumerate(recorded, 1):
                for path, made in files.items():
                    _write(folder / path, made if isinstance(made, bytes) else write_arrays(made))
                if progress is not None:
                    progress(done, len(plan.clips))
        _write_rows(folder, plan)
        _write_about(folder, plan, size, seed)
    return _summary(out, reused=False)


def _existing(out: Path, size: str, seed: int) -> MiniAtlasSummary | None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    about = read_json(out / "atlas.json") if (out / "atlas.json").is_file() else {}
    wanted = {"name": "mini-atlas", "size": size, "seed": seed, "version": VERSION}
    if isinstance(about, dict) and all(about.get(key) == value for key, value in wanted.items()):
        return _summary(out, reused=True)
    found = f"already holds something other than the mini-atlas of size {size}, seed {seed}, version {VERSION}"
    raise InputError(found, where=str(out), fix="Choose a new folder, or remove this one first.")


@contextmanager
def _fresh_folder(out: Path) -> Iterator[Path]:
    """A temporary neighbour that becomes `out` in one rename; removed on failure.

    One sync of the disk before the rename, where a sync of each of the thousands of files takes most of a minute.
    """
    temporary = begun(out)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.sync()
        temporary.replace(out)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        fix = "Choose a writable folder on a disk with 50 MB to spare."
        raise StorageError(f"cannot write the mini-atlas ({error.strerror})", where=str(out), fix=fix) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _recorded(clips: Sequence[Clip], workers: int) -> Generator[Files, None, None]:
    """The files of each clip, in any order."""
    if workers == 1:
        yield from map(_record, clips)
        return
    for clip, made in each(_record, clips, workers=workers, patience=lambda _: _PATIENCE_SECONDS):
        if isinstance(made, Died):
            fix = "Run the same command again, with fewer --workers if memory is short."
            raise HbaError(f"the process that made it {made.reason}", where="/".join(clip.stem), fix=fix)
        yield made


def _record(clip: Clip) -> Files:
    """The clip's media as bytes and its descriptors as arrays, by path."""
    sound, sight = (np.random.default_rng([*clip.key, channel]) for channel in (0, 1))
    blocks, num_frames = LENGTHS[clip.length]
    made: Files = {}
    if clip.voice is not None:
        wav = made[clip.path("audios")] = wav_bytes(_sound(clip, blocks * ADPCM_BLOCK_SAMPLES, sound))
        if clip.described:
            heard, _ = soundfile.read(io.BytesIO(wav), dtype="float64")
            made[clip.path("opensmile")] = {"features": functionals(heard)}
    if clip.motion is not None:
        person = people.animate(clip.motion, num_frames, sight)
        made[clip.path("videos")] = mp4_bytes(people.frames(person, sight))
        if clip.described:
            made[clip.path("pose")] = dict(people.landmarks(person, sight))
    return made


def _sound(clip: Clip, num_samples: int, rng: np.random.Generator) -> people.Samples:
    if clip.voice is None or clip.voice == "ambience":
        return people.ambience(num_samples, rng)
    speech = people.speak(people.VOICES[clip.voice], num_samples, rng)
    return speech if clip.laughter is None else people.add_tail(speech, clip.laughter, rng)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _write_rows(folder: Path, plan: Plan) -> None:
    for split, rows in plan.rows.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        _write(folder / f"{split}.jsonl", lines.encode())


def _write_about(folder: Path, plan: Plan, size: str, seed: int) -> None:
    _write(folder / "README.txt", _readme(size, seed).encode())
    files = [file for file in folder.rglob("*") if file.is_file()]
    about = {
        "name": "mini-atlas",
        "synthetic": True,
        "seed": seed,
        "size": size,
        "version": VERSION,
        "note": NOTE,
        "rows": {split: _count(rows, "dataset") for split, rows in plan.rows.items()},
        "signatures": {split: _count(rows, "modality_signature") for split, rows in plan.rows.items()},
        "num_files": len(files) + 1,
        "media_bytes": sum(file.stat().st_size for file in files),
        "carried_by": CARRIED_BY,
    }
    write_json(folder / "atlas.json", about)


def _count(rows: Sequence[dict[str, Any]], key: str) -> dict[str, int]:
    return dict(sorted(Counter(row[key] for row in rows).items()))


def _readme(size: str, seed: int) -> str:
    height = width = people.SIZE
    carried = "\n".join(f"  {dataset:17} {how}" for dataset, how in CARRIED_BY.items())
    return (
        f"Mini-atlas of hba, size {size}, seed {seed}, version {VERSION}\n\n{NOTE}\n"
        "It has the schema, dataset keys, tasks and modality signatures of the Human Behavior Atlas,\n"
        "and none of its data.\n\n"
        f"What carries each label (nothing else does):\n{carried}\n\n"
        f"Rows: {', '.join(f'{split}.jsonl' for split in SPLITS)}, with paths relative to this folder.\n"
        "Media: .wav, 8 kHz mono, IMA ADPCM (some players need it converted);\n"
        f".mp4, H.264, {width}x{height}, {people.FRAMES_PER_SECOND} frames a second.\n"
        "Descriptors: opensmile/<media path>.pt and pose/<media path>.pt.\n"
        "Every file of one kind and length has the same size.\n"
    )


def _summary(out: Path, *, reused: bool) -> MiniAtlasSummary:
    about = read_json(out / "atlas.json")
    return MiniAtlasSummary(
        path=out,
        size=about["size"],
        seed=about["seed"],
        rows=about["rows"],
        signatures=about["signatures"],
        num_files=about["num_files"],
        total_bytes=about["media_bytes"] + (out / "atlas.json").stat().st_size,
        reused=reused,
    )
