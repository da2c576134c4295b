"""Run folders behind the pages: found below one folder, named by their path in it, read again when a file has changed.

Predictions and verdicts are laid into the database, so that runs can be joined and filtered; everything else is small
and read when a page asks. A request names a run by a name that was found here, never by a path. A file that another
command is writing is read as far as it is whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hba.errors import InputError
from hba.evaluate.answers import same_answer
from hba.evaluate.judge.items import FILE as JUDGEMENTS
from hba.evaluate.judge.items import SETTINGS
from hba.evaluate.results import FILE as METRICS
from hba.evaluate.runs import ASKED, LOG, PREDICTIONS, Run, open_run
from hba.explorer.index import Database
from hba.storage import read_json, read_jsonl
from hba.taxonomy import Taxonomy

MARKS = ("config.yaml", ASKED, PREDICTIONS, METRICS, LOG)
MAX_DEPTH = 4
DECISIONS = "human_verdicts.jsonl"


@dataclass(frozen=True, kw_only=True)
class RunEntry:
    """A run folder; `changed` is the latest modification time of its records, in seconds since 1970."""

    name: str
    path: Path
    changed: float

    @cached_property
    def opened(self) -> Run:
        """The run as everybody reads it."""
        return open_run(self.path)

    def has(self, file: str) -> bool:
        """Whether the run has a file of that name."""
        return self.opened.has(file)


class Runs:
    """The run folders below `root`, None for none."""

    def __init__(self, root: Path | None, database: Database) -> None:
        self.root, self._database = root, database

    def all(self) -> list[RunEntry]:
        """Every run, the last changed first."""
        if self.root is None or not self.root.is_dir():
            return []
        found = [_entry(folder, self.root) for folder in _folders(self.root, MAX_DEPTH)]
        return sorted(found, key=lambda run: (-run.changed, run.name))

    def predicted(self) -> list[RunEntry]:
        """The runs that have predictions."""
        return [run for run in self.all() if run.has(PREDICTIONS)]

    def get(self, name: str) -> RunEntry:
        """The run of that name. Raises InputError for a name that is no run's."""
        for run in self.all():
            if run.name == name:
                return run
        raise InputError(f"no run {name!r}", where=str(self.root), fix="Choose one of the list.")

    def load(self, name: str) -> RunEntry:
        """The run, with its predictions and verdicts in the database as its files are now."""
        run = self.get(name)
        readers: dict[str, Callable[[RunEntry], None]] = {
            PREDICTIONS: self._load_predictions,
            JUDGEMENTS: self._load_judgements,
            DECISIONS: self._load_decisions,
        }
        for file, read in readers.items():
            path = run.path / file
            stamp = f"{path.stat().st_size} {path.stat().st_mtime_ns}" if path.is_file() else ""
            with self._database.writing:
                before = self._database.one(
                    "SELECT stamp FROM runs.source WHERE run = ? AND file = ?", (run.name, file)
                )
                if (before["stamp"] if before else "") != stamp:
                    with self._database.connection:
                        read(run)
                        values = [(run.name, file, stamp)]
                        self._database.write("INSERT OR REPLACE INTO runs.source VALUES (?, ?, ?)", values)
        return run

    def _load_predictions(self, run: RunEntry) -> None:
        taxonomy = run.opened.taxonomy
        self._database.write("DELETE FROM runs.prediction WHERE run = ?", [(run.name,)])
        values = (_prediction(run, record, taxonomy) for record in whole_lines(run.path / PREDICTIONS))
        self._database.write(
            "INSERT OR REPLACE INTO runs.prediction VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", values
        )

    def _load_judgements(self, run: RunEntry) -> None:
        self._database.write("DELETE FROM runs.judgement WHERE run = ?", [(run.name,)])
        judge = str(read_json(run.path / SETTINGS).get("model", "judge")) if run.has(SETTINGS) else "judge"
        values = (_judgement(run, record, judge) for record in whole_lines(run.path / JUDGEMENTS))
        self._database.write("INSERT OR REPLACE INTO runs.judgement VALUES (?, ?, ?, ?, ?)", values)

    def _load_decisions(self, run: RunEntry) -> None:
        self._database.write("DELETE FROM runs.decision WHERE run = ?", [(run.name,)])
        values = ((run.name, record.get("id"), record.get("correct")) for record in whole_lines(run.path / DECISIONS))
        self._database.write("INSERT OR REPLACE INTO runs.decision VALUES (?, ?, ?)", values)


def _folders(folder: Path, depth: int) -> Iterator[Path]:
    if any((folder / mark).is_file() for mark in MARKS):
        yield folder
    if depth:
        for child in sorted(folder.iterdir()):
            hidden = child.name.startswith(".") or child.name in ("checkpoints", "tensorboard")
            if child.is_dir() and not child.is_symlink() and not hidden:
                yield from _folders(child, depth - 1)


def _entry(folder: Path, root: Path) -> RunEntry:
    name = folder.relative_to(root).as_posix()
    times = [(folder / mark).stat().st_mtime for mark in MARKS if (folder / mark).is_file()]
    return RunEntry(name=root.resolve().name if name == "." else name, path=folder, changed=max(times))


def whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file of a run that may be going on. Raises InputError naming a line that is none."""
    return (line.record for line in read_jsonl(path, growing=True))


def _prediction(run: RunEntry, record: dict[str, Any], taxonomy: Taxonomy) -> tuple[Any, ...]:
    dataset, target, label = str(record.get("dataset")), str(record.get("target")), record.get("label")
    known = taxonomy.datasets.get(dataset)
    free_form = known is None or known.domain is None
    probs = record.get("probs")
    truth = target if free_form else taxonomy.canonical_label(dataset, target)
    correct = None if free_form else int(label is not None and label == truth)
    invalid = int(not free_form and label is None and not record.get("error"))
    return (
        run.name, str(record.get("id")), str(record.get("split")), dataset, (known and known.task) or "no task",
        truth or target, record.get("output"), record.get("answer"), label, record.get("error"),
        None if probs is None else json.dumps(probs), record.get("tokens_out"), correct, invalid,
    )  # fmt: skip


def _judgement(run: RunEntry, record: dict[str, Any], judge: str) -> tuple[Any, ...]:
    verdict = record.get("correct")
    reason = record.get("reason") or record.get("error")
    return (run.name, str(record.get("id")), judge, None if verdict is None else int(bool(verdict)), reason)


def exact(answer: str | None, target: str) -> bool:
    """Whether a free-form answer is the target to the letter, but for case and punctuation."""
    return answer is not None and same_answer(answer, target)
