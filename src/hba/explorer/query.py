"""From a page's form to rows of the database: filters, order, pages.

Every value of a request becomes a bound parameter, and every column stands here by name: no text of a request is ever
part of a query. A filter that is not of its form is an error that names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

from hba.errors import InputError, nearest
from hba.explorer.database import Database, Row

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


@dataclass
class Where:
    """Conditions that all hold, and their values in order."""

    parts: list[str] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)

    def add(self, condition: str, *values: Any) -> None:
        """One more condition with a '?' for each value."""
        self.parts.append(condition)
        self.values += values

    @property
    def sql(self) -> str:
        """'WHERE ...', or '' without conditions."""
        return f"WHERE {' AND '.join(self.parts)}" if self.parts else ""


@dataclass(frozen=True, kw_only=True)
class Found:
    """One page of rows of `total`; `pages` counts from 1."""

    rows: Sequence[Row]
    total: int
    page: int
    pages: int


def _paged(database: Database, select: str, tables: str, where: Where, order: str, page: int) -> Found:
    total = database.number(f"SELECT count(*) FROM {tables} {where.sql}", where.values)  # noqa: S608  bound values
    query = f"SELECT {select} FROM {tables} {where.sql} ORDER BY {order} LIMIT ? OFFSET ?"  # noqa: S608
    rows = database.all(query, [*where.values, PAGE_SIZE, (page - 1) * PAGE_SIZE])
    return Found(rows=rows, total=total, page=page, pages=max(1, -(-total // PAGE_SIZE)))


def find_samples(database: Database, form: Form) -> Found:
    """The samples that a form of the atlas page asks for, in the order of the atlas."""
    where = Where()
    add_sample_filters(where, form)
    return _paged(database, "s.*", "rows.sample s", where, "s.n", form.page)


def add_sample_filters(where: Where, form: Form) -> None:
    """Conditions on `s`: q, split, dataset, task, label, signature, least and most (seconds)."""
    for name in SAMPLE_COLUMNS:
        if value := form.text(name):
            where.add(f"s.{name} = ?", value)
    words = form.text("q").split()
    quoted = ['"' + word.replace('"', '""') + '"' for word in words if len(word) >= 3]  # what trigrams can find
    if quoted:
        where.add("s.n IN (SELECT rowid FROM rows.sample_text WHERE sample_text MATCH ?)", " AND ".join(quoted))
    for word in words:
        if len(word) < 3:
            where.add("instr(lower(s.words), lower(?)) > 0", word)
    for name, condition in (("least", "s.seconds >= ?"), ("most", "s.seconds <= ?")):
        if (seconds := form.number(name)) is not None:
            where.add(condition, seconds)


def find_predictions(database: Database, form: Form) -> Found:
    """The predictions of run A (and of run B beside them) that a form asks for, in the order of the ids.

    Filters: those of samples, `target`, `predicted`, `verdict` (of A), and `pair` (of A and B)."""
    where, tables, select = Where(), _PREDICTIONS, _COLUMNS
    second = form.text("b")
    values: list[Any] = []
    if second:
        tables, select, values = tables + _SECOND, select + _SECOND_COLUMNS, [second]
    where.add("p.run = ?", form.text("a"))
    if any(form.text(name) for name in ("q", "signature", "least", "most")):
        chosen = Where()
        only = Form({k: v for k, v in form.values.items() if k in ("q", "signature", "least", "most")})
        add_sample_filters(chosen, only)
        same = f"SELECT 1 FROM rows.sample s {chosen.sql} AND s.id = p.id AND s.split = p.split"  # noqa: S608
        where.add(f"EXISTS ({same})", *chosen.values)
    for name, column in (("dataset", "p.dataset"), ("task", "p.task"), ("split", "p.split"), ("target", "p.target")):
        if value := form.text(name):
            where.add(f"{column} = ?", value)
    if predicted := form.text("predicted"):
        where.add("p.label IS NULL") if predicted == "no label" else where.add("p.label = ?", predicted)
    _add_choice(where, form, "verdict", VERDICTS)
    if second:
        _add_choice(where, form, "pair", PAIRS)
    where.values = [*values, *where.values]
    return _paged(database, select, tables, where, "p.id", form.page)


_PREDICTIONS = """runs.prediction p
  LEFT JOIN runs.judgement j ON j.run = p.run AND j.id = p.id
  LEFT JOIN runs.decision h ON h.run = p.run AND h.id = p.id"""
_SECOND = """ JOIN runs.prediction q ON q.run = ? AND q.id = p.id
  LEFT JOIN runs.judgement i ON i.run = q.run AND i.id = q.id"""
_COLUMNS = "p.*, j.correct AS judged, j.reason AS reason"
_SECOND_COLUMNS = """, q.output AS b_output, q.answer AS b_answer, q.label AS b_label, q.correct AS b_correct,
  q.error AS b_error, i.correct AS b_judged"""


def _add_choice(where: Where, form: Form, name: str, choices: Mapping[str, str]) -> None:
    value = form.text(name)
    if not value:
        return
    if value not in choices:
        raise InputError(f"unknown filter {value!r}", where=name, fix=nearest(value, choices))
    where.add(choices[value])
