"""The SQLite files behind the pages, and the one way to ask them.

`rows` holds an atlas's rows for search and filters and lies in a cache folder, so that 100,000 rows are indexed once;
`runs` holds what run folders say, and lives as long as the server. Both stand in one connection a thread, so that a
filter such as "A right, B wrong, about sarcasm" is one query. Neither holds anything that the files do not say: remove
them, and they are made again.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

from hba.storage import alone, begun

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
        self._make("rows", rows, ROWS_TABLES)
        self._make("runs", runs, RUNS_TABLES)

    def _make(self, name: str, path: Path, tables: str) -> None:
        if path.is_file():
            return
        with self._alone(path):
            if path.is_file():
                return  # another explorer began at the same moment
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
        return self._alone(self._rows)

    @staticmethod
    def _alone(path: Path) -> AbstractContextManager[None]:
        return alone(path.with_suffix(".lock"))

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
