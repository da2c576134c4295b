"""The atlas and the runs behind the pages.

The atlas is opened split by split in the background, its rows laid into the search index.

The index is keyed by the files of the rows (name, size, modification time): an atlas that has changed is indexed anew,
an unchanged one opens at once. Explorers of one atlas share the index; one of them fills it, and when it ends, another
goes on. Pages can be read while it grows and say how far it is. Durations come last, from the
headers that `hba atlas info --durations` reads and remembers, too. A dataset on the hub is looked at as its branch was
at the start; its media are fetched when a page shows them, so that their durations stay unknown.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlencode

from hba.atlas import Atlas, Sample, open_atlas
from hba.atlas.info import NO_TASK, row_seconds, splits_at
from hba.atlas.names import find_files, hub_id_of, no_split, present_splits
from hba.errors import HbaError, InputError, nearest
from hba.evaluate.judge.items import FILE as JUDGEMENTS
from hba.evaluate.judge.items import SETTINGS
from hba.evaluate.results import FILE as METRICS
from hba.evaluate.runs import ASKED, LOG, PREDICTIONS, Run, open_run
from hba.storage import alone, begun, read_json, read_jsonl
from hba.taxonomy import Taxonomy

# The SQLite files behind the pages, and the one way to ask them.
#
# `rows` holds an atlas's rows for search and filters and lies in a cache folder, so that 100,000 rows are indexed once;
# `runs` holds what run folders say, and lives as long as the server. Both stand in one connection a thread, so that a
# filter such as "A right, B wrong, about sarcasm" is one query. Neither holds anything that the files do not say:
# remove them, and they are made again.


ROWS_VERSION = 1  # of ROWS_TABLES: raise it when they change
ROWS_TABLES = """
CREATE TABLE rows.fact(key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE rows.sample(
  n INTEGER PRIMARY KEY, split TEXT NOT NULL, number INTEGER NOT NULL, id TEXT NOT NULL, dataset TEXT NOT NULL,
  task TEXT NOT NULL, label TEXT, signature TEXT NOT NULL, problem TEXT NOT NULL, target TEXT NOT NULL,
  images INTEGER, videos INTEGER, audios INTEGER, visual INTEGER, sound INTEGER, seconds REAL,
  words TEXT GENERATED ALWAYS AS (id || char(10) || problem || char(10) || target) VIRTUAL);
CREATE UNIQUE INDEX rows.sample_place ON sample(split, number);
CREATE INDEX rows.sample_id ON sample(id);
CREATE INDEX rows.sample_dataset ON sample(dataset, label);
CREATE VIRTUAL TABLE rows.sample_text USING fts5(
  words, content='sample', content_rowid='n', tokenize='trigram', columnsize=0);
"""
RUNS_TABLES = """
CREATE TABLE runs.source(run TEXT, file TEXT, stamp TEXT, PRIMARY KEY(run, file)) WITHOUT ROWID;
CREATE TABLE runs.prediction(
  run TEXT NOT NULL, id TEXT NOT NULL, split TEXT NOT NULL, dataset TEXT NOT NULL, task TEXT NOT NULL,
  target TEXT NOT NULL, output TEXT, answer TEXT, label TEXT, error TEXT, probs TEXT, tokens_out INTEGER,
  correct INTEGER, invalid INTEGER NOT NULL, PRIMARY KEY(run, id)) WITHOUT ROWID;
CREATE INDEX runs.prediction_cell ON prediction(run, dataset, target, label);
CREATE TABLE runs.judgement(
  run TEXT NOT NULL, id TEXT NOT NULL, judge TEXT NOT NULL, correct INTEGER, reason TEXT, PRIMARY KEY(run, id)
) WITHOUT ROWID;
CREATE TABLE runs.decision(
  run TEXT NOT NULL, id TEXT NOT NULL, correct INTEGER NOT NULL, PRIMARY KEY(run, id)) WITHOUT ROWID;
"""

Row = sqlite3.Row


class Database:
    """Both files, opened once a thread. `rows` is a file of the cache, `runs` a temporary one."""

    def __init__(self, rows: Path, runs: Path) -> None:
        self._rows, self._runs = rows, runs
        self._local = threading.local()
        self.writing = threading.Lock()
        """held by whoever writes in this process: the index or a run's files, one at a time"""
        for name, path, tables in (("rows", rows, ROWS_TABLES), ("runs", runs, RUNS_TABLES)):
            with nullcontext() if path.is_file() else alone(path.with_suffix(".lock")):
                if path.is_file():
                    continue  # of an explorer that began earlier, or at the same moment
                made = begun(path)
                made.unlink(missing_ok=True)
                made.touch(mode=0o600)  # prompts of clinical interviews are for nobody else on the machine
                with closing(sqlite3.connect(":memory:")) as connection:
                    connection.execute(f"ATTACH DATABASE ? AS {name}", [str(made)])
                    connection.execute(f"PRAGMA {name}.journal_mode = WAL")
                    connection.executescript(tables)
                made.replace(path)

    def indexing(self) -> AbstractContextManager[None]:
        """Held by the one process that lays rows into the index; another that serves it reads, and goes on after it."""
        return alone(self._rows.with_suffix(".lock"))

    @property
    def connection(self) -> sqlite3.Connection:
        """This thread's connection."""
        made: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if made is None:
            made = sqlite3.connect(":memory:", timeout=30.0)
            made.row_factory = sqlite3.Row
            made.execute("PRAGMA temp_store = MEMORY")
            for name, path in (("rows", self._rows), ("runs", self._runs)):
                made.execute(f"ATTACH DATABASE ? AS {name}", [str(path)])
                made.execute(f"PRAGMA {name}.synchronous = NORMAL")
                made.execute(f"PRAGMA {name}.cache_size = -8000")
            self._local.connection = made
        return made

    def all(self, query: str, values: Sequence[Any] = ()) -> list[Row]:
        """Every row of a query."""
        return self.connection.execute(query, values).fetchall()

    def one(self, query: str, values: Sequence[Any] = ()) -> Row | None:
        """The first row of a query, or None."""
        found: Row | None = self.connection.execute(query, values).fetchone()
        return found

    def number(self, query: str, values: Sequence[Any] = ()) -> int:
        """The integer that a query gives; 0 for NULL."""
        found = self.one(query, values)
        return 0 if found is None or found[0] is None else int(found[0])

    def write(self, query: str, values: Iterable[Sequence[Any]]) -> None:
        """Run one statement for each of `values`, inside the caller's transaction."""
        self.connection.executemany(query, values)


# From a page's form to rows of the database: filters, order, pages.
#
# Every value of a request becomes a bound parameter, and every column stands here by name: no text of a request is ever
# part of a query. A filter that is not of its form is an error that names it.


PAGE_SIZE = 24
SAMPLE_COLUMNS = ("split", "dataset", "task", "label", "signature")
VERDICTS = {
    "right": "p.correct = 1",
    "wrong": "p.correct = 0",
    "invalid": "p.invalid = 1",
    "error": "p.error IS NOT NULL",
    "judged right": "j.correct = 1",
    "judged wrong": "j.correct = 0",
    "unjudged": "p.correct IS NULL AND j.correct IS NULL",
    "judge disagreed with a person": "h.correct <> j.correct",
}
PAIRS = {
    "A right, B wrong": "(coalesce(p.correct, j.correct) = 1 AND coalesce(q.correct, i.correct) = 0)",
    "A wrong, B right": "(coalesce(p.correct, j.correct) = 0 AND coalesce(q.correct, i.correct) = 1)",
    "answers differ": "coalesce(p.label, p.answer, '') <> coalesce(q.label, q.answer, '')",
    "both wrong": "(coalesce(p.correct, j.correct) = 0 AND coalesce(q.correct, i.correct) = 0)",
}
MAX_PAGE = 100_000


@dataclass(frozen=True)
class Form:
    """The values of a page's address, with the ways to read and to change them."""

    values: Mapping[str, str]

    def text(self, name: str) -> str:
        """A value, '' where there is none."""
        return self.values.get(name, "").strip()

    def number(self, name: str) -> float | None:
        """A number, None where there is none. Raises InputError for what is none."""
        text = self.text(name)
        try:
            return float(text) if text else None
        except ValueError:
            raise InputError(f"{text!r} is no number", where=name, fix="Write it as 2.5.") from None

    @property
    def page(self) -> int:
        """The page that was asked for, from 1."""
        text = self.text("page")
        if text and not (text.isdecimal() and 1 <= int(text) <= MAX_PAGE):
            raise InputError(f"{text!r} is no page", where="page", fix="Pages count from 1.")
        return int(text or 1)

    def link(self, **changed: object) -> str:
        """'?...' with some values changed; None removes one. A changed filter begins at the first page."""
        kept = {k: v for k, v in self.values.items() if v and k != "page"}
        merged = {**kept, **{k: str(v) for k, v in changed.items() if v is not None}}
        return "?" + urlencode({k: v for k, v in merged.items() if k not in changed or changed[k] is not None})


Condition: TypeAlias = "tuple[Any, ...]"
"""SQL with a '?' for each value, and the values."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """One page of rows of `total`; `pages` counts from 1."""

    rows: Sequence[Row]
    total: int
    page: int
    pages: int


def _paged(database: Database, select: str, tables: str, where: Sequence[Condition], order: str, form: Form) -> Found:
    """The page of the rows for which every condition holds."""
    held = f"{tables} WHERE {' AND '.join(['TRUE', *(condition for condition, *_ in where)])}"
    values = [value for _, *values in where for value in values]
    total = database.number(f"SELECT count(*) FROM {held}", values)  # noqa: S608  bound values
    query = f"SELECT {select} FROM {held} ORDER BY {order} LIMIT ? OFFSET ?"  # noqa: S608
    rows = database.all(query, [*values, PAGE_SIZE, (form.page - 1) * PAGE_SIZE])
    return Found(rows=rows, total=total, page=form.page, pages=max(1, -(-total // PAGE_SIZE)))


def find_samples(database: Database, form: Form) -> Found:
    """The samples that a form of the atlas page asks for, in the order of the atlas.

    Filters: q, split, dataset, task, label, signature, least and most (seconds).
    """
    where = [(f"s.{name} = ?", value) for name in SAMPLE_COLUMNS if (value := form.text(name))]
    return _paged(database, "s.*", "rows.sample s", [*where, *_searched(form)], "s.n", form)


def _searched(form: Form) -> list[Condition]:
    """Conditions on `s`: words, and seconds from least to most."""
    words = form.text("q").split()
    found: list[Condition] = []
    quoted = ['"' + word.replace('"', '""') + '"' for word in words if len(word) >= 3]  # what trigrams can find
    if quoted:
        match = "s.n IN (SELECT rowid FROM rows.sample_text WHERE sample_text MATCH ?)"
        found.append((match, " AND ".join(quoted)))
    found += [("instr(lower(s.words), lower(?)) > 0", word) for word in words if len(word) < 3]
    for name, condition in (("least", "s.seconds >= ?"), ("most", "s.seconds <= ?")):
        if (seconds := form.number(name)) is not None:
            found.append((condition, seconds))
    return found


PREDICTED = """runs.prediction p
  LEFT JOIN runs.judgement j ON j.run = p.run AND j.id = p.id
  LEFT JOIN runs.decision h ON h.run = p.run AND h.id = p.id"""
COLUMNS = "p.*, j.judge AS judge, j.correct AS judged, j.reason AS reason"
_SECOND = """ JOIN runs.prediction q ON q.id = p.id
  LEFT JOIN runs.judgement i ON i.run = q.run AND i.id = q.id"""
_SECOND_COLUMNS = """, q.output AS b_output, q.answer AS b_answer, q.label AS b_label, q.correct AS b_correct,
  q.error AS b_error, i.correct AS b_judged"""
WITH_QUESTION = f"{PREDICTED} LEFT JOIN rows.sample s ON s.id = p.id AND s.split = p.split"
# A failed or empty answer is wrong without anybody's judgement.
FREE_FORM = "p.correct IS NULL AND p.error IS NULL AND trim(coalesce(p.answer, '')) <> ''"


def find_predictions(database: Database, form: Form) -> Found:
    """The predictions of run A (and of run B beside them) that a form asks for, in the order of the ids.

    Filters: those of samples, `target`, `predicted`, `verdict` (of A), and `pair` (of A and B)."""
    tables, columns = PREDICTED, COLUMNS
    where: list[Condition] = [("p.run = ?", form.text("a"))]
    second = form.text("b")
    if second:
        tables, columns = tables + _SECOND, columns + _SECOND_COLUMNS
        where.append(("q.run = ?", second))
    signature = form.text("signature")
    chosen = [*([("s.signature = ?", signature)] if signature else []), *_searched(form)]
    if chosen:
        held = " AND ".join(condition for condition, *_ in chosen)
        same = f"SELECT 1 FROM rows.sample s WHERE {held} AND s.id = p.id AND s.split = p.split"  # noqa: S608
        where.append((f"EXISTS ({same})", *(value for _, *values in chosen for value in values)))
    where += [(f"p.{n} = ?", value) for n in ("dataset", "task", "split", "target") if (value := form.text(n))]
    if predicted := form.text("predicted"):
        where.append(("p.label IS NULL",) if predicted == "no label" else ("p.label = ?", predicted))
    for name, choices in (("verdict", VERDICTS), ("pair", PAIRS if second else {})):
        if (value := form.text(name)) and choices:
            if value not in choices:
                raise InputError(f"unknown filter {value!r}", where=name, fix=nearest(value, choices))
            where.append((choices[value],))
    return _paged(database, columns, tables, where, "p.id", form)


def find_answers(database: Database, form: Form, run: str) -> Found:
    """The free-form answers of a run that are for a judge or a person, with their questions."""
    where = [("p.run = ?", run), (FREE_FORM,)]
    return _paged(database, f"{COLUMNS}, s.problem", WITH_QUESTION, where, "p.dataset, p.id", form)


# --- the index of an atlas --------------------------------------------------------------------------------------------


CHUNK = 5000


@dataclass(frozen=True)
class State:
    """How far the index is; `error` says why it went no further."""

    done: int
    total: int
    ready: bool
    error: str | None = None


def located(atlas: str | Path) -> str | Path:
    """The folder, or the dataset on the hub at the commit that it has now. Raises InputError when it has none."""
    hub_id = hub_id_of(atlas)
    if hub_id is None:
        return Path(atlas)
    from hba.atlas.hub_client import list_repo  # takes as long to load as a small atlas to open

    repo = list_repo(hub_id).repo
    return f"hf://datasets/{repo.id}@{repo.commit}"


def index_name(root: str | Path) -> str:
    """File name of the index of the atlas at `root`, as `located` says it: another one whenever its rows have changed.

    Those of a dataset on the hub change with its commit, those of a folder with a file.
    """
    stamps: list[Any] = [ROWS_VERSION, str(root.resolve() if isinstance(root, Path) else root)]
    if isinstance(root, Path):
        for split in present_splits(root):
            for file in find_files(root, split).files:
                status = file.stat()
                stamps.append([file.name, status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:24] + ".sqlite"


class AtlasIndex:
    """The rows of one atlas. `start` begins opening and indexing in a thread; everything else may be called at once."""

    def __init__(self, root: str | Path, database: Database, headers: Path) -> None:
        """`root` as `located` says it; `headers` is the folder that remembers the headers of media."""
        self.root, self._database, self._headers = root, database, headers
        self.splits = splits_at(root)
        self._atlases: dict[str, Atlas] = {}
        self._opening = threading.Lock()
        self._thread = threading.Thread(target=self._build, name="index", daemon=True)
        self._error: str | None = None
        self._known: tuple[int, dict[str, list[str]]] | None = None
        """how many rows the values of the filters were taken from, and these"""

    def start(self) -> None:
        """Open and index what has not been."""
        self._thread.start()

    def wait(self, seconds: float | None = None) -> None:
        """Wait until the thread of `start` has ended."""
        self._thread.join(seconds)

    @property
    def state(self) -> State:
        """How far the index is."""
        facts = self._facts()
        ready = facts.get("ready") == "1"
        done = int(facts.get("rows", 0))
        return State(done, int(facts.get("total", done)), ready, self._error)

    def atlas(self, split: str) -> Atlas:
        """The opened split. Raises InputError for a split that is not there, or whose rows are bad."""
        if split not in self.splits:
            raise no_split(split, self.splits, where=str(self.root))
        with self._opening:
            if split not in self._atlases:
                self._atlases[split] = open_atlas(self.root, split)
            return self._atlases[split]

    def sample(self, split: str, number: int) -> Sample:
        """Row `number` of a split. Raises InputError when it is not there."""
        atlas = self.atlas(split)
        if not 0 <= number < len(atlas):
            raise InputError(f"no row {number}", where=f"split {split}", fix=f"Choose one below {len(atlas):,}.")
        return atlas[number]

    @property
    def quarantine(self) -> list[Any]:
        """The samples whose media could not be read since the server started."""
        return [record for atlas in self._atlases.values() for record in atlas.quarantine]

    def known_values(self) -> dict[str, list[str]]:
        """What the filters offer: the values of split, dataset, task, label and signature that occur, in order."""
        done = self.state.done
        if self._known is None or self._known[0] != done:
            query = "SELECT DISTINCT {0} FROM rows.sample WHERE {0} IS NOT NULL ORDER BY 1"
            found = {name: self._database.all(query.format(name)) for name in SAMPLE_COLUMNS}
            self._known = (done, {name: [row[0] for row in rows] for name, rows in found.items()})
        return self._known[1]

    def _facts(self) -> dict[str, str]:
        return {row["key"]: row["value"] for row in self._database.all("SELECT key, value FROM rows.fact")}

    def _note(self, **facts: object) -> None:
        values = [(key, str(value)) for key, value in facts.items()]
        self._database.write("INSERT OR REPLACE INTO rows.fact VALUES (?, ?)", values)

    def _build(self) -> None:
        try:
            with self._database.indexing():
                if not self.state.ready:
                    self._index_rows()
                if isinstance(self.root, Path) and self._facts().get("durations") != "1":
                    self._index_durations(self.root)
        except HbaError as error:
            self._error = str(error)

    def _index_rows(self) -> None:
        atlases = {split: self.atlas(split) for split in self.splits}
        self._locked(partial(self._note, total=sum(map(len, atlases.values()))))
        rows = (_record(split, sample, atlas.taxonomy) for split, atlas in atlases.items() for sample in atlas)
        done = self._database.number("SELECT count(*) FROM rows.sample")  # of an index that was interrupted
        for _ in islice(rows, done):
            pass
        while chunk := [(done + i, *row) for i, row in enumerate(islice(rows, CHUNK))]:
            done += len(chunk)
            self._locked(partial(self._insert, chunk, done))
        self._locked(partial(self._note, ready=1))

    def _insert(self, chunk: list[tuple[Any, ...]], done: int) -> None:
        holes = ", ".join("?" * len(chunk[0]))
        self._database.write(f"INSERT INTO rows.sample VALUES ({holes}, NULL)", chunk)  # noqa: S608  no text of anyone's
        words = ((row[0], f"{row[3]}\n{row[8]}\n{row[9]}") for row in chunk)
        self._database.write("INSERT INTO rows.sample_text(rowid, words) VALUES (?, ?)", words)
        self._note(rows=done)

    def _index_durations(self, root: Path) -> None:
        update = "UPDATE rows.sample SET seconds = ? WHERE split = ? AND number = ?"
        for split in self.splits:
            found = row_seconds(root, split, cache=self._headers)
            values = [(seconds, split, number) for number, seconds in enumerate(found)]
            self._locked(partial(self._database.write, update, values))
        self._locked(partial(self._note, durations=1))

    def _locked(self, work: Callable[[], None]) -> None:
        with self._database.writing, self._database.connection:
            work()


def _record(split: str, sample: Sample, taxonomy: Taxonomy) -> tuple[Any, ...]:
    task = taxonomy.dataset(sample.dataset).task or NO_TASK
    media = (sample.images, sample.videos, sample.audios, sample.ext_video_feats, sample.ext_audio_feats)
    target = sample.target if sample.answered else "no answer is known"
    words = (sample.label, sample.modality_signature, sample.problem, target)
    return (split, sample.number, sample.id, sample.dataset, task, *words, *media)


# Run folders behind the pages: found below one folder, named by their path in it, read again when a file has changed.
#
# Predictions and verdicts are laid into the database, so that runs can be joined and filtered; everything else is small
# and read when a page asks. A request names a run by a name that was found here, never by a path. A file that another
# command is writing is read as far as it is whole.


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
            run.name, str(record.get("id")), str(record.get("split")), dataset, (known and known.task) or NO_TASK,
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
