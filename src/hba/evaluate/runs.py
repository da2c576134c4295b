"""Several runs over the same rows: read, matched by sample id, compared.

Rows are the same when id, dataset and target are. Refused: runs on data of different fingerprints, unless told; an id
that means another row in another run; runs without a common row. What only some runs answered is left out of the
comparison and counted, never filled in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hba.errors import InputError
from hba.evaluate.compare import Paired, paired_difference
from hba.evaluate.confusion import Rows
from hba.evaluate.judge.judgements import PLACE
from hba.evaluate.judge.scores import Verdicts, judge_record, judged_rows, read_verdicts
from hba.evaluate.predictions import Prediction, read_predictions
from hba.evaluate.provenance import run_facts
from hba.evaluate.score import rows_of
from hba.taxonomy import BUILTIN, Taxonomy, of_folder


class Run(NamedTuple):
    """The predictions of one run folder, and what its files say of the data."""

    name: str
    folder: Path
    predictions: list[Prediction]
    fingerprint: str | None
    taxonomy: Taxonomy
    verdicts: Verdicts
    judge: dict[str, Any] | None


class Matched(NamedTuple):
    """The same rows of every run in one order, and how many rows of each run no other has."""

    predictions: list[list[Prediction]]
    left_out: list[int]


@dataclass(frozen=True, kw_only=True)
class Flip:
    """A row that one run has right and the other wrong."""

    id: str
    dataset: str
    target: str
    a: str | None
    b: str | None
    gained: bool


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """`hba compare A B`: the paired differences, and the rows behind them."""

    a: str
    b: str
    paired: Paired
    flips: list[Flip]
    num_rows: int
    left_out: list[int]
    same_data: bool | None
    """None when a run does not record its data"""
    clustered_by: str | None

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def load_run(folder: Path) -> Run:
    """Read a run folder. Raises InputError for a missing or malformed file."""
    folder = folder.resolve()
    taxonomy = of_folder(folder)
    predictions = read_predictions(folder / "predictions.jsonl", taxonomy)
    fingerprint = run_facts(folder)["data_fingerprint"]
    verdicts = read_verdicts(folder, predictions, taxonomy)
    return Run(folder.name, folder, predictions, fingerprint, taxonomy, verdicts, judge_record(folder))


def match(runs: Sequence[Run], *, allow_other_data: bool = False) -> Matched:
    """The rows that all runs answered, in the order of the first run.

    Raises InputError when fingerprints differ and that was not allowed, when an id has another dataset or target in
    another run, and when no row is common.
    """
    known = {run.fingerprint for run in runs if run.fingerprint is not None}
    if len(known) > 1 and not allow_other_data:
        found = ", ".join(f"{run.name}: {(run.fingerprint or 'not recorded')[:12]}" for run in runs)
        fix = "Predict on the same data, or compare the rows that they share with --allow-other-data."
        raise InputError(f"the runs are on different data (fingerprints {found})", fix=fix)
    tables = [{p.id: p for p in run.predictions} for run in runs]
    common = [key for key in tables[0] if all(key in table for table in tables[1:])]
    for key in common:
        rows = {(table[key].dataset, table[key].target) for table in tables}
        if len(rows) > 1:
            what = f"sample {key!r} is another row in another run: {sorted(rows)}"
            raise InputError(what, where=runs[0].name, fix="Compare runs on the same split of the same data.")
    if not common:
        names = ", ".join(run.name for run in runs)
        raise InputError("no sample was answered by all runs", where=names, fix="Compare runs on the same split.")
    return Matched([[table[key] for key in common] for table in tables], [len(t) - len(common) for t in tables])


def matched_rows(runs: Sequence[Run], matched: Matched) -> list[Rows]:
    """The cells of every run; free-form datasets by verdict where one judge has graded all runs to the last answer."""
    taxonomy = runs[0].taxonomy
    rows = [rows_of(predictions, taxonomy) for predictions in matched.predictions]
    judges = [None if run.judge is None else {k: v for k, v in run.judge.items() if k != PLACE} for run in runs]
    if any(judge is None or judge != judges[0] for judge in judges):
        return rows
    verdicts = [
        judged_rows(cells, predictions, run.verdicts)
        for cells, predictions, run in zip(rows, matched.predictions, runs, strict=True)
    ]
    common = frozenset.intersection(*(cells.judged for cells in verdicts))
    return verdicts if all(cells.judged == common for cells in verdicts) else rows


def compare_predictions(
    a: Sequence[Prediction],
    b: Sequence[Prediction],
    *,
    taxonomy: Taxonomy = BUILTIN,
    clusters: Sequence[str | None] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Paired:
    """Per task b minus a, with interval and p-value, of two sets of predictions on the same rows in the same order.

    Rows that share a `group` are drawn together unless `clusters` says otherwise. Raises InputError when the rows are
    not the same.
    """
    groups = [p.group for p in a] if clusters is None else clusters
    rows = rows_of(a, taxonomy), rows_of(b, taxonomy)
    return paired_difference(*rows, clusters=groups, resamples=resamples, seed=seed)


def compare_runs(
    a: Path,
    b: Path,
    *,
    allow_other_data: bool = False,
    resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Compare two run folders; see `match` for what is refused."""
    runs = load_run(a), load_run(b)
    matched = match(runs, allow_other_data=allow_other_data)
    of_a = matched.predictions[0]
    rows = matched_rows(runs, matched)
    known = [run.fingerprint for run in runs]
    return Comparison(
        a=runs[0].name,
        b=runs[1].name,
        paired=paired_difference(*rows, clusters=[p.group for p in of_a], resamples=resamples, seed=seed),
        flips=_flips(matched, rows),
        num_rows=len(of_a),
        left_out=matched.left_out,
        same_data=None if None in known else known[0] == known[1],
        clustered_by="group" if any(p.group for p in of_a) else None,
    )


def _flips(matched: Matched, rows: Sequence[Rows]) -> list[Flip]:
    a, b = matched.predictions
    right_a, right_b = (cells.right() for cells in rows)
    return [
        Flip(id=x.id, dataset=x.dataset, target=x.target, a=x.label or x.answer, b=y.label or y.answer, gained=bool(rb))
        for x, y, ra, rb in zip(a, b, right_a, right_b, strict=True)
        if ra != rb
    ]
