"""Run folders behind the pages: found below one folder, named by their path in it, read again when a file has changed.

Predictions and verdicts are laid into the database, so that runs can be joined and filtered; everything else is small
and read when a page asks. A request names a run by a name that was found here, never by a path. A file that another
command is writing is read as far as it is whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hba.errors import InputError
from hba.evaluate.judge.items import FILE as JUDGEMENTS
from hba.evaluate.judge.items import SETTINGS
from hba.evaluate.results import FILE as METRICS
from hba.evaluate.runs import ASKED, LOG, PREDICTIONS, Run, open_run
from hba.explorer.index import Database
from hba.storage import read_json, read_jsonl

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
        found = []
        for folder in _folders(self.root, MAX_DEPTH):
            name = folder.relative_to(self.root).as_posix()
            times = [(folder / mark).stat().st_mtime for mark in MARKS if (folder / mark).is_file()]
            shown = self.root.resolve().name if name == "." else name
            found.append(RunEntry(name=shown, path=folder, changed=max(times)))
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
        for file, table, holes, rows in (
            (PREDICTIONS, "prediction", 14, _predictions),
            (JUDGEMENTS, "judgement", 5, _judgements),
            (DECISIONS, "decision", 3, _decisions),
        ):
            path, key = run.path / file, (run.name, file)
            stamp = f"{path.stat().st_size} {path.stat().st_mtime_ns}" if path.is_file() else ""
            with self._database.writing:
                before = self._database.one("SELECT stamp FROM runs.source WHERE run = ? AND file = ?", key)
                if (before["stamp"] if before else "") == stamp:
                    continue
                with self._database.connection:
                    self._database.write(f"DELETE FROM runs.{table} WHERE run = ?", [(run.name,)])  # noqa: S608
                    insert = f"INSERT OR REPLACE INTO runs.{table} VALUES ({', '.join('?' * holes)})"  # noqa: S608
                    self._database.write(insert, rows(run))
                    self._database.write("INSERT OR REPLACE INTO runs.source VALUES (?, ?, ?)", [(*key, stamp)])
        return run


def _folders(folder: Path, depth: int) -> Iterator[Path]:
    if any((folder / mark).is_file() for mark in MARKS):
        yield folder
    if depth:
        for child in sorted(folder.iterdir()):
            hidden = child.name.startswith(".") or child.name in ("checkpoints", "tensorboard")
            if child.is_dir() and not child.is_symlink() and not hidden:
                yield from _folders(child, depth - 1)


def whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file of a run that may be going on. Raises InputError naming a line that is none."""
    return (line.record for line in read_jsonl(path, growing=True))


def _predictions(run: RunEntry) -> Iterator[tuple[Any, ...]]:
    taxonomy = run.opened.taxonomy
    for record in whole_lines(run.path / PREDICTIONS):
        dataset, target, label = str(record.get("dataset")), str(record.get("target")), record.get("label")
        known = taxonomy.datasets.get(dataset)
        free_form = known is None or known.domain is None
        probs = record.get("probs")
        unlabelled = record.get("target") is None
        target = "no answer is known" if unlabelled else target
        truth = target if free_form or unlabelled else taxonomy.canonical_label(dataset, target)
        correct = None if free_form or unlabelled else int(label is not None and label == truth)
        invalid = int(not free_form and label is None and not record.get("error"))
        yield (
            run.name, str(record.get("id")), str(record.get("split")), dataset, (known and known.task) or "no task",
            truth or target, record.get("output"), record.get("answer"), label, record.get("error"),
            None if probs is None else json.dumps(probs), record.get("tokens_out"), correct, invalid,
        )  # fmt: skip


def _judgements(run: RunEntry) -> Iterator[tuple[Any, ...]]:
    judge = str(read_json(run.path / SETTINGS).get("model", "judge")) if run.has(SETTINGS) else "judge"
    for record in whole_lines(run.path / JUDGEMENTS):
        verdict, reason = record.get("correct"), record.get("reason") or record.get("error")
        yield (run.name, str(record.get("id")), judge, None if verdict is None else int(bool(verdict)), reason)


def _decisions(run: RunEntry) -> Iterator[tuple[Any, ...]]:
    return ((run.name, record.get("id"), record.get("correct")) for record in whole_lines(run.path / DECISIONS))
