"""An atlas from one form into another: parquet shards with embedded media, or JSONL with media files.

Rows, ids, order, labels, extra fields and the bytes of every medium stay as they are, also what its file was called.
The work is cut into parts (shards) that processes take in any order. A part is checked before it appears, and appears
in one rename; a conversion that was killed goes on with the parts that are missing; `convert.json` comes last. A
medium that cannot be read stays unreadable in the new form, so that its sample is quarantined there as here, and is
named. Shards follow the published layout (`train-00000-of-00012.parquet`), so that any parquet reader opens them.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import pairwise
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from hba.atlas import Atlas, open_atlas
from hba.atlas.columns import Columns
from hba.atlas.embedded import index_path
from hba.atlas.records import media_bytes, read_records
from hba.atlas.shards import STAGING, Summary, read_summary, write_shard
from hba.atlas.split import present_splits
from hba.atlas.unpack import Part, read_part, write_part
from hba.environment import now
from hba.errors import HbaError, InputError
from hba.lifeline import die_with_parent
from hba.parallel import Died, each
from hba.storage import atomic_write, json_sha256, remove_abandoned, write_json
from hba.taxonomy import FILE as TAXONOMY_FILE

Form = Literal["parquet", "jsonl"]
OnProgress = Callable[[int, int], None]

SHARD_BYTES = 512 << 20
LAYOUT = 3  # of what is written; another number makes a conversion start anew
MANIFEST = "convert.json"
BESIDE = ("atlas.json", TAXONOMY_FILE)
# A part that is slower than this per byte is given up: its process hangs.
_PATIENCE_SECONDS, _PATIENCE_BYTES_PER_SECOND = 1800.0, 50_000


class _Job(NamedTuple):
    """Rows `start` to `stop` of a split: part `number` of `total`."""

    number: int
    total: int
    start: int
    stop: int
    bytes: int
    origin: str


class Converted(NamedTuple):
    """One split in its new form."""

    split: str
    parts: Sequence[Summary]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(part.rows for part in self.parts)

    @property
    def unreadable(self) -> list[dict[str, Any]]:
        """Quarantine records of the samples with a medium that could not be read."""
        return [record for part in self.parts for record in part.unreadable]


def convert_atlas(
    path: str | Path,
    out: str | Path,
    *,
    to: Form,
    splits: Sequence[str] | None = None,
    shard_bytes: int = SHARD_BYTES,
    workers: int = 1,
    progress: OnProgress | None = None,
) -> list[Converted]:
    """Convert the splits of the atlas at `path` (all by default) into the folder `out`, and write its convert.json.

    Going on with a conversion that was interrupted takes the same call. `progress(done, total)` counts parts. Raises
    InputError for bad rows, when `out` is the source itself or holds another conversion; HbaError when a part reads
    back differently or another process converts into `out`; StorageError when the disk is full.
    """
    out = Path(out)
    names = list(present_splits(Path(path))) if splits is None else list(splits)
    opened = [open_atlas(path, name) for name in names]
    if out.exists() and any(atlas.root == out.resolve() for atlas in opened):
        raise InputError("is the source itself", where=str(out), fix="Name another folder.")
    with _locked(out):
        plans = [_plan(atlas, shard_bytes) for atlas in opened]
        for atlas, plan in zip(opened, plans, strict=True):
            _refuse_others(atlas, out, to, plan)
        _copy_beside(opened[0].root, out)
        total, before = sum(map(len, plans)), 0
        converted = []
        for atlas, plan in zip(opened, plans, strict=True):
            tell = None if progress is None else partial(_tell, progress, before, total)
            converted.append(_convert(atlas, out, to, plan, workers, tell))
            before += len(plan)
        for atlas, result in zip(opened, converted, strict=True):
            if to == "jsonl":
                _join(out, result)
            _compare(atlas, open_atlas(out, atlas.split, taxonomy=atlas.taxonomy), result)
        _write_manifest(path, out, to, opened, converted)
        shutil.rmtree(out / STAGING)
    return converted


def convert_to_parquet(
    atlas: Atlas,
    out: str | Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    workers: int = 1,
    progress: OnProgress | None = None,
) -> list[Path]:
    """Write the rows of `atlas`, which may be a view, to shards of about `shard_bytes` in `out`; returns the shards.

    Shards that are there, whole and of the same rows are kept. Raises what `convert_atlas` raises.
    """
    out = Path(out)
    with _locked(out):
        plan = _plan(atlas, shard_bytes)
        _refuse_others(atlas, out, "parquet", plan)
        converted = _convert(atlas, out, "parquet", plan, workers, progress)
        shutil.rmtree(out / STAGING)
    return [out / part.file for part in converted.parts]


def _tell(progress: OnProgress, before: int, total: int, done: int, _: int) -> None:
    progress(before + done, total)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keep other processes from converting into `out`; the system lets go of the lock when this one is killed."""
    (out / STAGING).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out / STAGING, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        fix = "Wait for it to end, or end it."
        raise HbaError("another process converts into this folder", where=str(out), fix=fix) from None
    finally:
        os.close(descriptor)
        for folder in (out, index_path(out / "shard").parent):
            remove_abandoned(folder)  # of workers that outlived their killed process by a moment
        with suppress(OSError):  # not empty: the work is not done
            (out / STAGING).rmdir()


def _plan(atlas: Atlas, shard_bytes: int) -> list[_Job]:
    """Parts of about `shard_bytes` of media, at least one row each."""
    bounds, sums, held = [0], [], 0
    for number, size in enumerate(media_bytes(atlas)):
        if number > bounds[-1] and held + size > shard_bytes:
            bounds.append(number)
            sums.append(held)
            held = 0
        held += size
    sums.append(held)
    data = [LAYOUT, atlas.fingerprint, atlas.split]
    return [
        _Job(number, len(sums), start, stop, held, json_sha256([*data, start, stop, held]))
        for number, ((start, stop), held) in enumerate(zip(pairwise([*bounds, len(atlas)]), sums, strict=True))
    ]


def _convert(
    atlas: Atlas, out: Path, to: Form, plan: Sequence[_Job], workers: int, progress: OnProgress | None
) -> Converted:
    function = partial(_to_parquet if to == "parquet" else _to_jsonl, atlas, out)
    parts: dict[int, Summary] = {}
    for job, summary in _each(function, plan, workers):
        parts[job.number] = summary
        if progress is not None:
            progress(len(parts), len(plan))
    return Converted(atlas.split, [parts[job.number] for job in plan])


def _each(
    function: Callable[[_Job], Summary | HbaError], plan: Sequence[_Job], workers: int
) -> Iterator[tuple[_Job, Summary]]:
    if workers <= 1 or len(plan) == 1:
        results: Iterator[tuple[_Job, Summary | HbaError | Died]] = ((job, function(job)) for job in plan)
    else:
        results = iter(each(function, plan, workers=min(workers, len(plan)), patience=_patience))
    for job, result in results:
        if isinstance(result, HbaError):
            raise result
        if isinstance(result, Died):
            fix = "Run the command again; it goes on with the parts that are missing."
            raise HbaError(f"the process that wrote part {job.number} {result.reason}", fix=fix)
        yield job, result


def _patience(job: _Job) -> float:
    return _PATIENCE_SECONDS + job.bytes / _PATIENCE_BYTES_PER_SECOND


def _to_parquet(atlas: Atlas, out: Path, job: _Job) -> Summary | HbaError:
    _end_with_main()
    path = out / f"{atlas.split}-{job.number:05d}-of-{job.total:05d}.parquet"
    try:
        done = read_summary(path, job.origin)
        return done or write_shard(path, read_records(atlas, job.start, job.stop), job.origin)
    except HbaError as error:  # travels as it is, where a raised one comes back as a text
        return error


def _to_jsonl(atlas: Atlas, out: Path, job: _Job) -> Summary | HbaError:
    _end_with_main()
    part = Part(out, atlas.split, job.number, job.total)
    try:
        done = read_part(part, job.origin)
        return done or write_part(part, read_records(atlas, job.start, job.stop), job.origin, job.start + 1)
    except HbaError as error:  # as above
        return error


def _end_with_main() -> None:
    """Leave nothing that still writes when the main process is killed."""
    main = parent_process()
    if main is not None and main.pid is not None:
        die_with_parent(main.pid)


def _refuse_others(atlas: Atlas, out: Path, to: Form, plan: Sequence[_Job]) -> None:
    """Raise InputError when `out` holds the split in another form or another cut."""
    here = {out / f"{atlas.split}-{job.number:05d}-of-{job.total:05d}.parquet" for job in plan}
    shards = set(out.glob(f"{atlas.split}-*-of-*.parquet"))
    others = shards - here if to == "parquet" else shards
    fix = "Choose an empty folder, or convert the same data with the same shard size."
    if others or (to == "parquet" and (out / f"{atlas.split}.jsonl").exists()):
        raise InputError(f"holds other shards or rows of split {atlas.split!r}", where=str(out), fix=fix)


def _copy_beside(root: Path, out: Path) -> None:
    """Copy what an atlas says of itself."""
    for name in BESIDE:
        if (root / name).is_file():
            with atomic_write(out / name, "wb") as handle:
                handle.write((root / name).read_bytes())


def _join(out: Path, converted: Converted) -> None:
    """The lines of all parts as the rows of the split."""
    with atomic_write(out / f"{converted.split}.jsonl", "wb") as handle:
        for part in converted.parts:
            handle.write((out / STAGING / part.file).read_bytes())


def _compare(before: Atlas, after: Atlas, converted: Converted) -> None:
    """Raise HbaError unless the two say the same of every row; media without a path have got one."""
    if any(part.named for part in converted.parts):
        same = all(map(np.array_equal, _named(before.columns), _named(after.columns)))
    else:
        same = before.fingerprint == after.fingerprint
    if not same:
        what = f"split {before.split!r} reads back differently"
        raise HbaError(what, where=str(after.root), fix="Convert into an empty folder; this is a defect.")


def _named(columns: Columns) -> list[npt.NDArray[Any]]:
    """What the columns say, whatever order their names are in."""
    pairs = (
        (columns.datasets, columns.dataset_codes),
        (columns.tasks, columns.task_codes),
        (columns.signatures, columns.signature_codes),
    )
    names = [np.array(vocabulary)[codes] for vocabulary, codes in pairs]
    return [*names, columns.label_codes, columns.problem_chars, columns.answer_chars]


def _write_manifest(
    path: str | Path, out: Path, to: Form, opened: Sequence[Atlas], converted: Sequence[Converted]
) -> None:
    splits = {
        result.split: {
            "rows": result.rows,
            "fingerprint": atlas.fingerprint,
            "parts": msgspec.to_builtins(result.parts),
        }
        for atlas, result in zip(opened, converted, strict=True)
    }
    write_json(out / MANIFEST, {"from": str(path), "to": to, "layout": LAYOUT, "created_at": now(), "splits": splits})
