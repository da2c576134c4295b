"""`describe`: extract what the rows of an atlas lack, in parallel, and name it in the rows.

Every medium is one item: done, or recorded as failed with its reason, never filled in. The run can be killed at any
point and started again: whole files of the same extractor and an unchanged medium stay, the rest is made, and the rows
gain what is there. Media and rows that lack nothing are not touched.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hba.atlas.source import DEFAULT_LIMITS, Limits
from hba.atlas.split import present_splits
from hba.descriptors import executors
from hba.descriptors.extract import Extract, Fatal
from hba.descriptors.items import Item, Plan, Settings, make_plan
from hba.descriptors.landmark_env import python_of_environment
from hba.descriptors.ledger import FOLDER, Extracted, Failed, Ledger, open_ledger
from hba.descriptors.link import link_rows
from hba.errors import InputError
from hba.parallel import Died

# Far above what any extractor needs for a byte of a medium: a bound for what hangs, not an estimate.
_PATIENCE_SECONDS, _PATIENCE_SECONDS_PER_MB = 900.0, 300.0


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
            results = executors.run(extract, queue, executor=executor, workers=crew, patience=_patience, gpu=gpu)
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

    def _take(self, item: Item, result: Extracted | Failed | Fatal | Died) -> None:
        if isinstance(result, Fatal):
            raise result.error
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
