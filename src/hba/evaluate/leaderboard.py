"""`hba leaderboard`: runs beside published results, ranked where that is fair.

Tasks are ranked one by one (1 is best, ties share the mean of their places); a row's mean rank is over the ranked
tasks, by default those that every measured run has a score for. A row without one of them is shown and not ranked.
Never ranked in silence: runs on different data or different rows (refused unless allowed, and then marked), runs with
too many quarantined samples (shown, not ranked), and synthetic data beside published figures (published rows are then
shown and not ranked). Published figures are quoted, never measured here, and marked as such.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from hba.errors import InputError, nearest
from hba.published import published_table
from hba.report.load import Metrics, load_metrics
from hba.taxonomy import of_folder

SOURCES = {
    "hba_iclr2026": "arXiv 2510.04899",
    "omnisapiens2_icml2026": "arXiv 2602.10635",
    "rl_algorithms": "arXiv 2602.10635, RL algorithms",
}
DEFAULT_TABLES = ("hba_iclr2026", "omnisapiens2_icml2026")
JUDGED = "llm_judge_accuracy"
MAX_QUARANTINED = 0.01
ROUNDING = 0.0006  # published with three decimals, or in per cent with two


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row. Scores lie in [0, 1]; `rank` is None where the row is shown and not ranked, `notes` say why."""

    name: str
    published: bool
    source: str
    scores: Mapping[str, float]
    ci95: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    mean: float | None = None
    mean_rank: float | None = None
    rank: int | None = None
    synthetic: bool | None = None
    excluded: bool = False
    """shown and never ranked"""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Leaderboard:
    """The rows in their order, the tasks that are shown and those that are ranked, and what a reader must know."""

    entries: list[Entry]
    tasks: list[str]
    ranked_tasks: list[str]
    warnings: list[str]

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def build_leaderboard(
    runs: Sequence[Path],
    *,
    tables: Sequence[str] = DEFAULT_TABLES,
    tasks: Sequence[str] = (),
    allow_other_data: bool = False,
    max_quarantined: float = MAX_QUARANTINED,
) -> Leaderboard:
    """Rank the scored run folders `runs` beside the published `tables`.

    `tasks` chooses the ranked tasks; `max_quarantined` is the share of samples that a ranked run may leave out. Raises
    InputError for an unscored run, an unknown table, a task that no run has, and runs on different data or rows unless
    allowed.
    """
    measured = [_Measured(_name(run, runs), load_metrics(run / "metrics.json", of_folder(run))) for run in runs]
    ranked = _ranked_tasks(measured, tasks)
    warnings = _check_same_data(measured, ranked, allow_other_data)
    rows = [_entry(run, max_quarantined) for run in measured]
    synthetic = any(row.synthetic is not False for row in rows)
    published = published_entries(tables)
    if synthetic and published:
        if any(row.synthetic for row in rows):
            warnings.append("Synthetic data: these figures say nothing about people; published rows are not ranked.")
        else:
            warnings.append("A run does not say whether its data are synthetic; published rows are not ranked.")
        published = [replace(row, excluded=True, notes=("other data: not ranked",)) for row in published]
    entries = _rank([*rows, *published], ranked)
    shown = [key for key in _order(entries) if any(key in row.scores for row in entries)]
    return Leaderboard(entries=entries, tasks=shown, ranked_tasks=ranked, warnings=warnings)


@dataclass(frozen=True)
class _Measured:
    name: str
    metrics: Metrics


def _name(run: Path, runs: Sequence[Path]) -> str:
    """The folder's name, with its parent's where two are called alike."""
    path = run.resolve()
    alike = sum(other.resolve().name == path.name for other in runs) > 1
    return f"{path.parent.name}/{path.name}" if alike else path.name


def _ranked_tasks(measured: Sequence[_Measured], wanted: Sequence[str]) -> list[str]:
    scored = [[key for key, task in run.metrics.tasks.items() if task.score is not None] for run in measured]
    anywhere = list(dict.fromkeys(key for keys in scored for key in keys))
    for key in wanted:
        if key not in anywhere:
            raise InputError(f"no run has a score for task {key!r}", where="--tasks", fix=nearest(key, anywhere))
    common = list(wanted) or [key for key in anywhere if all(key in keys for keys in scored)]
    if not common:
        raise InputError("the runs have no scored task in common", fix="Choose the ranked tasks with --tasks.")
    return common


def _check_same_data(measured: Sequence[_Measured], ranked: Sequence[str], allowed: bool) -> list[str]:
    """Warnings about runs on different data; InputError unless that is allowed."""
    found = []
    prints = {run.name: run.metrics.provenance.get("data_fingerprint") for run in measured}
    if len(set(prints.values())) > 1:
        listed = ", ".join(f"{name}: {str(text)[:12]}" for name, text in prints.items())
        found.append(f"runs on different data (fingerprints {listed})")
    for key in ranked:
        tasks = {run.name: run.metrics.tasks[key] for run in _with(measured, key)}
        sizes = {name: task.n + (task.n_quarantined or 0) for name, task in tasks.items()}
        if len(set(sizes.values())) > 1:
            found.append(f"{key} was scored on different rows ({', '.join(f'{k}: {n:,}' for k, n in sizes.items())})")
    judged = [key for key in ranked if any(run.metrics.tasks[key].metric == JUDGED for run in _with(measured, key))]
    judges = {run.name: _judge(run.metrics) for run in measured} if judged else {}
    if len(set(judges.values())) > 1:
        listed = ", ".join(f"{name}: {judge}" for name, judge in judges.items())
        found.append(f"{', '.join(judged)} graded by different judges ({listed})")
    if found and not allowed:
        fix = "Predict and judge all of them alike, or rank them all the same with --allow-other-data."
        raise InputError("; ".join(found), fix=fix)
    return [f"Not the same evidence: {text}." for text in found]


def _with(measured: Sequence[_Measured], key: str) -> list[_Measured]:
    return [run for run in measured if key in run.metrics.tasks and run.metrics.tasks[key].score is not None]


def _judge(metrics: Metrics) -> str | None:
    judge = metrics.provenance.get("judge")
    return str(judge.get("model")) if isinstance(judge, dict) else None


def _entry(run: _Measured, max_quarantined: float) -> Entry:
    metrics, said = run.metrics, run.metrics.provenance
    total = metrics.counts.get("n", 0) + metrics.counts.get("n_quarantined", 0)
    share = metrics.counts.get("n_quarantined", 0) / total if total else 0.0
    notes = []
    if share > max_quarantined:
        notes.append(f"{share:.1%} of the samples quarantined: not ranked")
    elif share:
        notes.append(f"{metrics.counts['n_quarantined']:,} samples quarantined")
    if _judge(metrics):
        notes.append(f"judge: {_judge(metrics)}")
    if said.get("data_fingerprint") is None:
        notes.append("data not recorded")
    if said.get("synthetic"):
        notes.append("synthetic data")
    return Entry(
        name=run.name,
        published=False,
        source=str(said.get("model") or "measured here"),
        scores={key: task.score for key, task in metrics.tasks.items() if task.score is not None},
        ci95={key: task.ci95 for key, task in metrics.tasks.items() if task.ci95 is not None},
        synthetic=said.get("synthetic"),
        excluded=share > max_quarantined,
        notes=tuple(notes),
    )


def published_entries(tables: Sequence[str]) -> list[Entry]:
    """The rows of published tables, in [0, 1]. A row that repeats an earlier one to rounding is taken once.

    Raises InputError for an unknown table.
    """
    found: list[Entry] = []
    for table in tables:
        if table not in SOURCES:
            raise InputError(f"no published table {table!r}", where="--published", fix=nearest(table, SOURCES))
        rows = published_table(table)
        columns = rows.pop("columns")
        # Tables in per cent carry figures above 1; no score in [0, 1] does.
        scale = 100.0 if any(value > 1 for row in rows.values() for value in row) else 1.0
        for name, row in rows.items():
            scores = {key: value / scale for key, value in zip(columns, row, strict=True) if key != "mean_rank"}
            if not any(_repeats(scores, earlier.scores) for earlier in found):
                found.append(Entry(name=name, published=True, source=SOURCES[table], scores=scores))
    return found


def _repeats(scores: Mapping[str, float], earlier: Mapping[str, float]) -> bool:
    common = scores.keys() & earlier.keys()
    return len(common) > 1 and all(abs(scores[key] - earlier[key]) <= ROUNDING for key in common)


def _rank(entries: Sequence[Entry], ranked: Sequence[str]) -> list[Entry]:
    """The entries in order of mean rank, those without one last."""
    means = [_complete_mean(entry, ranked) for entry in entries]
    entries = [replace(entry, mean=mean) for entry, mean in zip(entries, means, strict=True)]
    chosen = [i for i, entry in enumerate(entries) if entry.mean is not None and not entry.excluded]
    by_task = [_places([entries[i].scores[key] for i in chosen]) for key in ranked]
    mean_ranks = {i: fmean(places[k] for places in by_task) for k, i in enumerate(chosen)}
    order = sorted(set(mean_ranks.values()))
    placed = [
        replace(entry, mean_rank=mean_ranks[i], rank=order.index(mean_ranks[i]) + 1) if i in mean_ranks else entry
        for i, entry in enumerate(entries)
    ]
    return sorted(placed, key=lambda e: (e.mean_rank is None, e.mean_rank or 0.0, -(e.mean or 0.0), e.name))


def _complete_mean(entry: Entry, ranked: Sequence[str]) -> float | None:
    known = [entry.scores[key] for key in ranked if key in entry.scores]
    return fmean(known) if len(known) == len(ranked) else None


def _places(scores: Sequence[float]) -> list[float]:
    """1 for the highest score; equal scores share the mean of their places."""
    return [
        1 + sum(other > score for other in scores) + (sum(other == score for other in scores) - 1) / 2
        for score in scores
    ]


def _order(entries: Iterable[Entry]) -> list[str]:
    return list(dict.fromkeys(key for entry in entries for key in entry.scores))
