"""Run folders behind the pages: found below one folder, named by their path in it, read again when a file has changed.

Predictions and verdicts are laid into the database, so that runs can be joined and filtered; everything else is small
and read when a page asks. A request names a run by a name that was found here, never by a path. A file that another
command is writing is read as far as it is whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hba.errors import InputError
from hba.evaluate.answers import same_answer
from hba.explorer.database import Database
from hba.storage import read_json
from hba.taxonomy import Taxonomy, of_folder

MARKS = ("config.yaml", "predict.json", "predictions.jsonl", "metrics.json", "log.jsonl")
MAX_DEPTH = 4
JUDGEMENTS = "judgements.jsonl"
DECISIONS = "human_verdicts.jsonl"


@dataclass(frozen=True, kw_only=True)
class RunEntry:
    """A run folder; `changed` is the latest modification time of its records, in seconds since 1970."""

    name: str
    path: Path
    changed: float

    def has(self, file: str) -> bool:
        """Whether the run has a file of that name."""
        return (self.path / file).is_file()


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
        return [run for run in self.all() if run.has("predictions.jsonl")]

    def get(self, name: str) -> RunEntry:
        """The run of that name. Raises InputError for a name that is no run's."""
        for run in self.all():
            if run.name == name:
                return run
        raise InputError(f"no run {name!r}", where=str(self.root), fix="Choose one of the list.")

    def taxonomy(self, run: RunEntry) -> Taxonomy:
        """The taxonomy that the run was predicted with."""
        return of_folder(run.path)

    def load(self, name: str) -> RunEntry:
        """The run, with its predictions and verdicts in the database as its files are now."""
        run = self.get(name)
        readers: dict[str, Callable[[RunEntry], None]] = {
            "predictions.jsonl": self._load_predictions,
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
        taxonomy = self.taxonomy(run)
        self._database.write("DELETE FROM runs.prediction WHERE run = ?", [(run.name,)])
        values = (_prediction(run, record, taxonomy) for record in whole_lines(run.path / "predictions.jsonl"))
        self._database.write(
            "INSERT OR REPLACE INTO runs.prediction VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", values
        )

    def _load_judgements(self, run: RunEntry) -> None:
        self._database.write("DELETE FROM runs.judgement WHERE run = ?", [(run.name,)])
        judge = str(optional_json(run.path / "judge.json").get("model", "judge"))
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
    """The objects of a JSONL file; a last line that is still being written is left for the next time.

    Raises InputError naming any other line that is no JSON object."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            if line.strip():
                yield _object(line, f"{path}:{number}")


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InputError(f"not valid JSON ({error})", where=where, fix="Repair the line.") from None
    if not isinstance(record, dict):
        raise InputError("expected a JSON object", where=where, fix="Repair the line.")
    return record


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


def optional_json(path: Path) -> dict[str, Any]:
    """A JSON file of a run folder with NaN as None, {} where there is none. Raises InputError for a broken one."""
    value = read_json(path) if path.is_file() else {}
    return value if isinstance(value, dict) else {}
