"""Make the mini-atlas: plan it, synthesise every clip (in parallel where asked), write the folder in one rename.

The bytes depend on size and seed alone: not on the number of workers, the order of work, the folder or the clock.
It refuses to write over anything but nothing; a folder that already is this very mini-atlas is left as it is.
"""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from hba.atlas.mini import figure, render, voice
from hba.atlas.mini.encode import ADPCM_BLOCK_SAMPLES, mp4_bytes, pt_bytes, wav_bytes
from hba.atlas.mini.functionals import functionals
from hba.atlas.mini.plan import LENGTHS, SPLITS, Clip, Plan, make_plan
from hba.atlas.mini.scenes import CARRIED_BY, SIZES
from hba.errors import InputError, nearest
from hba.lifeline import die_with_parent
from hba.storage import StorageError, begun, read_json, write_json

VERSION = 3  # of the content: raise it whenever the same seed gives other bytes
NOTE = "Synthetic: generated voices, stick figures and sentences. Scores on it say nothing about human behaviour."
Arrays = dict[str, NDArray[Any]]


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
        with _mapper(workers) as apply:
            for done, described in enumerate(apply(partial(_record, folder), plan.clips), 1):
                for path, arrays in described.items():
                    _write(folder / path, pt_bytes(arrays))
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


@contextmanager
def _mapper(workers: int) -> Iterator[Callable[..., Iterator[dict[str, Arrays]]]]:
    if workers == 1:
        yield map
        return
    # Spawned, since forking a process that has loaded torch and its threads can hang.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=die_with_parent, initargs=(os.getpid(),)) as pool:
        try:
            yield partial(pool.map, chunksize=16)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _record(folder: Path, clip: Clip) -> dict[str, Arrays]:
    """Write the clip's media below `folder`; return its descriptors by path (torch stays out of the workers)."""
    sound, sight = (np.random.default_rng([*clip.key, channel]) for channel in (0, 1))
    blocks, num_frames = LENGTHS[clip.length]
    described: dict[str, Arrays] = {}
    if clip.voice is not None:
        wav = wav_bytes(_sound(clip, blocks * ADPCM_BLOCK_SAMPLES, sound))
        _write(folder / clip.path("audios"), wav)
        if clip.described:
            heard, _ = soundfile.read(io.BytesIO(wav), dtype="float64")
            described[clip.path("opensmile")] = {"features": functionals(heard)}
    if clip.motion is not None:
        person = figure.animate(clip.motion, num_frames, sight)
        _write(folder / clip.path("videos"), mp4_bytes(render.frames(person, sight)))
        if clip.described:
            described[clip.path("pose")] = dict(render.landmarks(person, sight))
    return described


def _sound(clip: Clip, num_samples: int, rng: np.random.Generator) -> voice.Samples:
    if clip.voice is None or clip.voice == "ambience":
        return voice.ambience(num_samples, rng)
    speech = voice.speak(voice.VOICES[clip.voice], num_samples, rng)
    return speech if clip.laughter is None else voice.add_tail(speech, clip.laughter, rng)


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
    height = width = figure.SIZE
    carried = "\n".join(f"  {dataset:17} {how}" for dataset, how in CARRIED_BY.items())
    return (
        f"Mini-atlas of hba, size {size}, seed {seed}, version {VERSION}\n\n{NOTE}\n"
        "It has the schema, dataset keys, tasks and modality signatures of the Human Behavior Atlas,\n"
        "and none of its data.\n\n"
        f"What carries each label (nothing else does):\n{carried}\n\n"
        f"Rows: {', '.join(f'{split}.jsonl' for split in SPLITS)}, with paths relative to this folder.\n"
        "Media: .wav, 8 kHz mono, IMA ADPCM (some players need it converted);\n"
        f".mp4, H.264, {width}x{height}, {figure.FRAMES_PER_SECOND} frames a second.\n"
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
