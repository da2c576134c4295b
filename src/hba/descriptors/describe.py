"""`describe`: extract what the rows of an atlas lack, in parallel, and name it in the rows.

Every medium is one item: done, or recorded as failed with its reason, never filled in. The run can be killed at any
point and started again: whole files of the same extractor and an unchanged medium stay, the rest is made, and the rows
gain what is there. Media and rows that lack nothing are not touched.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from hba.atlas.media import load_audio
from hba.atlas.names import present_splits
from hba.atlas.probe import probe
from hba.atlas.source import DEFAULT_LIMITS, Limits
from hba.atlas.video import read_frames
from hba.descriptors.items import (
    FOLDER,
    Extracted,
    Failed,
    Item,
    Ledger,
    Plan,
    RowFile,
    Settings,
    Wanted,
    make_plan,
    open_ledger,
    stamp_of,
)
from hba.descriptors.landmarks import Holistic, python_of_environment
from hba.descriptors.sound import Opensmile, Transcriber
from hba.errors import HbaError, InputError, MachineError, MediaError, nearest
from hba.parallel import Died, Done, each, outcome
from hba.storage import atomic_write, confined_path, file_sha256, remove_abandoned, write_data

if TYPE_CHECKING:
    from torch import Tensor


# Where items are worked on: processes of this machine, or actors of a Ray cluster.
#
# Both take the same function and items and yield each item once with its result, or with `Died` and a reason when its
# process crashed, was killed or took too long; the rest goes on in a new one. On a cluster every node needs hba, the
# environment for landmarks, and the atlas under the same path.


Work = TypeVar("Work")
Result = TypeVar("Result")

EXECUTORS = ("processes", "ray")
_TICK_SECONDS = 5.0


def run(
    function: Callable[[Work], Result],
    items: Iterable[Work],
    *,
    executor: str,
    workers: int,
    patience: Callable[[Work], float],
    gpu: bool = False,
) -> Generator[Done[Work, Result], None, None]:
    """Yield `function` of every item, in the order of completion; `items` are drawn as they are needed.

    `gpu` asks Ray for one a worker, where the cluster has any. Raises InputError for an unknown executor, HbaError when
    workers cannot start.
    """
    if executor not in EXECUTORS:
        raise InputError(f"unknown executor {executor!r}", where="--executor", fix=nearest(executor, EXECUTORS))
    if executor == "processes":
        yield from each(function, items, workers=workers, patience=patience)
    else:
        yield from _each_on_ray(function, items, workers=workers, patience=patience, gpu=gpu)


class _Hand:
    """What an actor holds: the function with all that it has loaded."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function

    def work(self, item: Any) -> Any:
        return outcome(self._function, item)


def _each_on_ray(
    function: Callable[[Work], Result],
    items: Iterable[Work],
    *,
    workers: int,
    patience: Callable[[Work], float],
    gpu: bool,
) -> Iterator[Done[Work, Result]]:
    ray = _load_ray()
    ours = not ray.is_initialized()
    if ours:
        ray.init(log_to_driver=False)  # the cluster of RAY_ADDRESS, or one on this machine
    resources = ray.cluster_resources()
    gpus = int(gpu and resources.get("GPU", 0) >= 1)
    hand = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0)(_Hand)
    places = int(resources.get("GPU" if gpus else "CPU", 1))  # an actor without one would wait for ever
    idle = [hand.remote(function) for _ in range(max(1, min(workers, places)))]
    waiting, busy = iter(items), {}
    try:
        while True:
            while idle and (item := next(waiting, None)) is not None:
                actor = idle.pop()
                busy[actor.work.remote(item)] = (actor, item, time.monotonic())
            if not busy:
                return
            ready, _ = ray.wait(list(busy), num_returns=1, timeout=_TICK_SECONDS)
            late = [ref for ref, (_, item, since) in busy.items() if time.monotonic() - since > patience(item)]
            for ref in ready or late[:1]:
                actor, item, _ = busy.pop(ref)
                result = _result(ray, ref) if ready else Died(f"took more than {patience(item):,.0f} s")
                if isinstance(result, MachineError):
                    raise result
                if isinstance(result, Died):  # whatever the actor is now, a new one is sound
                    ray.kill(actor)
                    actor = hand.remote(function)
                idle.append(actor)
                yield Done(item, result)
    finally:
        for actor in [*idle, *(actor for actor, _, _ in busy.values())]:
            ray.kill(actor)
        if ours:
            ray.shutdown()


def _result(ray: Any, ref: Any) -> Any:
    try:
        return ray.get(ref)
    except ray.exceptions.RayError as error:
        return Died(f"its Ray worker was lost ({type(error).__name__})")


def _load_ray() -> Any:
    try:
        import ray  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        fix = "pip install 'ray[default]' on every node, or use --executor processes."
        raise HbaError("ray is not installed", where="--executor ray", fix=fix) from None
    return ray


# Name the extracted descriptors in the rows, and keep the rows as they were.
#
# A JSONL file is replaced in one rename; before that its bytes are kept as `describe/{name}.{their SHA-256}.jsonl`.
# Only lines that gain something are written anew, with their fields in order and their unknown fields kept; every other
# line keeps its bytes. A file that changed since it was read is left alone, loudly. Media are never touched.


_BOM = b"\xef\xbb\xbf"


def link_rows(rows: RowFile, done: set[str], keep_in: Path) -> int:
    """Set the wanted fields of every row whose outputs are all `done`; return how many rows gained something.

    Raises HbaError when the file has changed since it was read.
    """
    wanted: dict[int, list[Wanted]] = {}
    for want in rows.wanted:
        if done.issuperset(want.outputs):
            wanted.setdefault(want.line, []).append(want)
    if not wanted:
        return 0
    if stamp_of(rows.path) != rows.stamp:
        fix = "Run the same command again: the descriptors stand, only the rows are left to write."
        raise HbaError("the rows were changed while descriptors were extracted", where=str(rows.path), fix=fix)
    with rows.path.open("rb") as file:
        lines = file.readlines()
    gained = 0
    for number, wants in wanted.items():
        linked = _linked(lines[number - 1], wants)
        gained += linked is not None
        lines[number - 1] = linked or lines[number - 1]
    if gained:
        _keep(rows.path, keep_in)
        write_data(rows.path, b"".join(lines))
    return gained


def _linked(raw: bytes, wants: list[Wanted]) -> bytes | None:
    """The line with its new fields; None when it has them already."""
    row = json.loads(raw.removeprefix(_BOM))
    fields = {want.field: list(want.outputs) for want in wants}
    if all(row.get(name) == outputs for name, outputs in fields.items()):
        return None
    end = b"\r\n" if raw.endswith(b"\r\n") else b"\n" if raw.endswith(b"\n") else b""
    return json.dumps(row | fields, ensure_ascii=False).encode() + end


def _keep(path: Path, folder: Path) -> None:
    copy = folder / f"{path.stem}.{file_sha256(path)[:12]}.jsonl"
    if not copy.exists():
        with atomic_write(copy, "wb") as handle, path.open("rb") as original:
            shutil.copyfileobj(original, handle)


# Measure one medium and write its file: what a worker process does.
#
# The file appears under its name whole or not at all, and only after the medium was decoded to its end. What is wrong
# with a medium comes back as `Failed`; what is wrong with the machine (disk full, extractor broken) as its error, since
# every other item would meet it too.


class Extract:
    """Measures items with the extractors of `settings`, each loaded when it is first needed. Picklable."""

    def __init__(self, settings: Settings, limits: Limits = DEFAULT_LIMITS) -> None:
        self.settings, self.limits = settings, limits
        self._loaded: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": {}}

    def __call__(self, item: Item) -> Extracted | Failed | HbaError:
        """Write the file of an item. A failure writes nothing."""
        try:
            source = confined_path(Path(item.root), item.medium, where=item.where)
        except InputError as error:
            return Failed(error.what)
        try:
            return self._extract(item, source)
        except MediaError as error:
            return Failed(error.what)
        except HbaError as error:
            return error

    def close(self) -> None:
        """End the extractors that are processes."""
        if "video" in self._loaded:
            self._loaded.pop("video").close()

    def _extract(self, item: Item, source: Path) -> Extracted:
        began, status = time.perf_counter(), source.stat()
        field: Literal["videos", "audios"] = "videos" if item.kind == "video" else "audios"
        facts = probe(source, field, where=item.where, quick=True, hashed=True, limits=self.limits)
        made = self._measure(item, source)
        data = made.encode() + b"\n" if isinstance(made, str) else _packed(made, self.settings.out_format)
        write_data(Path(item.root, item.output), data)
        return Extracted(
            medium_bytes=status.st_size,
            medium_mtime_ns=status.st_mtime_ns,
            medium_sha256=facts.sha256 or "",
            output_bytes=len(data),
            shapes={} if isinstance(made, str) else {name: list(tensor.shape) for name, tensor in made.items()},
            medium_seconds=facts.seconds,
            work_seconds=round(time.perf_counter() - began, 4),
        )

    def _measure(self, item: Item, source: Path) -> dict[str, Tensor] | str:
        if item.kind == "video":
            rate = self.settings.frames_per_second
            frames = read_frames(source, where=item.where, frames_per_second=rate, limits=self.limits)
            return self._holistic().extract((frame.pixels for frame in frames), where=item.where)
        audio = load_audio(source, where=item.where, limits=self.limits)
        if item.kind not in self._loaded:
            made = Opensmile(self.settings.audio or "") if item.kind == "audio" else None
            self._loaded[item.kind] = made or Transcriber(self.settings.transcripts or "")
        extractor: Opensmile | Transcriber = self._loaded[item.kind]
        return extractor.extract(audio, where=item.where)

    def _holistic(self) -> Holistic:
        running: Holistic | None = self._loaded.get("video")
        if running is None or not running.alive:
            running = self._loaded["video"] = Holistic()
        return running


def _packed(tensors: Mapping[str, Tensor], out_format: str) -> bytes:
    if out_format == "safetensors":
        from safetensors.torch import save

        return bytes(save(dict(tensors)))
    import io

    import torch

    buffer = io.BytesIO()
    torch.save(dict(tensors), buffer)
    return buffer.getvalue()


# Far above what any extractor needs for a byte of a medium: a bound for what hangs, not an estimate.
_PATIENCE_SECONDS, _PATIENCE_SECONDS_PER_MB = 900.0, 300.0


# --- the run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a run did. Counts are by kind (audio, video, transcript); seconds are of media and of workers' time."""

    root: str
    extracted: dict[str, int]
    kept: dict[str, int]
    """whole already, from an earlier run"""
    failed: dict[str, int]
    rows_linked: dict[str, int]
    """rows that gained a descriptor or transcript, by split"""
    medium_seconds: dict[str, float]
    work_seconds: dict[str, float]
    seconds: float
    failures: list[dict[str, str]]
    failures_file: str

    def to_json(self) -> dict[str, Any]:
        """All fields, and the real-time factor: seconds of media for a second of one worker, by kind."""
        spent = {kind: seconds for kind, seconds in self.work_seconds.items() if seconds}
        rates = {kind: round(self.medium_seconds[kind] / seconds, 2) for kind, seconds in spent.items()}
        return asdict(self) | {"real_time_factor": rates}


def describe(
    root: str | Path,
    settings: Settings,
    *,
    splits: Iterable[str] | None = None,
    workers: int = 1,
    executor: str = "processes",
    limits: Limits = DEFAULT_LIMITS,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Extract what `settings` ask for in the splits (all when None) of the JSONL atlas at `root`, and link it.

    `executor`: processes of this machine, or ray. Raises InputError for a bad atlas or setting, HbaError when an
    extractor is not installed or another process is at work there, StorageError on a full disk; what was done stays.
    """
    if workers < 1:
        raise InputError(f"is {workers}", where="--workers", fix="Use at least one.")
    began, root = time.monotonic(), Path(root)
    if settings.video:
        python_of_environment()
    wanted = tuple(splits) if splits is not None else present_splits(root)  # no atlas: nothing is written there
    with open_ledger(root.resolve()) as ledger:
        plan = make_plan(root, wanted, settings, ledger.outputs())
        run = _Run(plan, ledger, settings)
        # A worker that outlived a killed run may have died over an item that a later run finished.
        for folder in {Path(plan.root, output).parent for output in plan.items}:
            remove_abandoned(folder)
        run.work(Extract(settings, limits), executor=executor, workers=workers, progress=progress)
        linked = {rows.split: link_rows(rows, run.done, plan.root / FOLDER) for rows in plan.files}
        ledger.settle(run.done)
        return run.summary(linked, time.monotonic() - began)


class _Run:
    """The items of a plan, and what has become of them."""

    def __init__(self, plan: Plan, ledger: Ledger, settings: Settings) -> None:
        self.plan, self.ledger, self.settings = plan, ledger, settings
        self.done = {item.output for item in plan.items.values() if ledger.is_done(item)}
        self.kept = Counter[str](plan.items[output].kind for output in self.done)
        self.extracted: list[tuple[Item, Extracted]] = []
        self.failures: list[tuple[Item, str]] = []

    def work(
        self, extract: Extract, *, executor: str, workers: int, progress: Callable[[int, int], None] | None
    ) -> None:
        """Work on all items that are not done; a model for transcripts is loaded in one process alone."""
        todo = [item for item in self.plan.items.values() if item.output not in self.done]
        spoken = [item for item in todo if item.kind == "transcript"]
        measured = [item for item in todo if item.kind != "transcript"]
        for items, processes in ((measured, workers), (spoken, 1)):
            if not items:
                continue
            queue, gpu = self._started(items), items is spoken
            crew = min(processes, len(items))
            results = run(extract, queue, executor=executor, workers=crew, patience=_patience, gpu=gpu)
            with closing(results):  # an error here must end the processes
                for done in results:
                    self._take(done.item, done.result)
                    if progress is not None:
                        progress(len(self.extracted) + len(self.failures), len(todo))

    def _started(self, items: list[Item]) -> Iterator[Item]:
        ours = self.ledger.outputs()
        for item in items:
            if item.output not in ours and not self.settings.replace and Path(item.root, item.output).exists():
                # Perhaps published, perhaps of another tool: not ours to overwrite.
                self._fail(item, f"{item.output} is there and was not written by describe; --replace overwrites it")
                continue
            self.ledger.start(item)
            yield item

    def _take(self, item: Item, result: Extracted | Failed | HbaError | Died) -> None:
        if isinstance(result, HbaError):
            raise result
        if isinstance(result, Extracted):
            self.ledger.finish(item, result)
            self.done.add(item.output)
            self.extracted.append((item, result))
        else:
            self._fail(item, result.reason if isinstance(result, Failed) else f"its process {result.reason}")

    def _fail(self, item: Item, reason: str) -> None:
        self.ledger.fail(item, reason)
        self.failures.append((item, reason))

    def summary(self, linked: dict[str, int], seconds: float) -> Summary:
        """What has been done."""
        media_time: dict[str, float] = {}
        work_time: dict[str, float] = {}
        for item, result in self.extracted:
            media_time[item.kind] = media_time.get(item.kind, 0.0) + (result.medium_seconds or 0.0)
            work_time[item.kind] = work_time.get(item.kind, 0.0) + result.work_seconds
        return Summary(
            root=str(self.plan.root),
            extracted=dict(Counter(item.kind for item, _ in self.extracted)),
            kept=dict(self.kept),
            failed=dict(Counter(item.kind for item, _ in self.failures)),
            rows_linked=linked,
            medium_seconds={kind: round(value, 3) for kind, value in media_time.items()},
            work_seconds={kind: round(value, 3) for kind, value in work_time.items()},
            seconds=round(seconds, 3),
            failures=[{"medium": item.medium, "where": item.where, "reason": why} for item, why in self.failures],
            failures_file=str(self.ledger.failures_path),
        )


def _patience(item: Item) -> float:
    return _PATIENCE_SECONDS + _PATIENCE_SECONDS_PER_MB * item.size_bytes / 1e6
