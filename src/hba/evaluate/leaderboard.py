"""`hba leaderboard`: runs beside published results, ranked where that is fair.

Tasks are ranked one by one (1 is best, ties share the mean of their places); a row's mean rank is over the ranked
tasks, by default those that every ranked run has a score for. A row without one of them is shown and not ranked.
Never ranked: a run whose predictions are no longer those that were scored, that answered a part of its rows, of which
too many failed, or that left too many out; and published rows beside a run whose datasets, split, rows or judge are not
theirs (`not_comparable`). They stand apart and say why.
Runs on different data or different rows are refused unless allowed, and then marked. What is no scored run is skipped
and named. Published figures are quoted, never measured here, and marked as such.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from hba.errors import InputError, nearest
from hba.evaluate.predictions import PREDICTIONS
from hba.evaluate.results import FILE, MAX_FAILED, SCANT, TEST, Metrics
from hba.evaluate.runs import ASKED, open_run
from hba.storage import plural
from hba.taxonomy import PUBLISHED, TASKS, published_table

SOURCES = {
    "hba_iclr2026": "arXiv 2510.04899",
    "omnisapiens2_icml2026": "arXiv 2602.10635",
    "rl_algorithms": "arXiv 2602.10635, RL algorithms",
}
DEFAULT_TABLES = ("hba_iclr2026", "omnisapiens2_icml2026")
# What the published rows were measured on.
PUBLISHED_JUDGE = "gpt-5-nano"
PUBLISHED_ROWS = int(PUBLISHED["size"][TEST])
APART = "other data: not ranked"
JUDGED = "llm_judge_accuracy"
MAX_QUARANTINED = 0.01
ROUNDING = 0.0006  # published with three decimals, or in per cent with two


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row. Scores lie in [0, 1], `n` are the rows of each task; `rank` is None where the row is shown and not
    ranked, `notes` say why."""

    name: str
    published: bool
    source: str
    scores: Mapping[str, float]
    ci95: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    n: Mapping[str, int] = field(default_factory=dict)
    num_rows: int | None = None
    num_failed: int | None = None
    mean: float | None = None
    mean_rank: float | None = None
    rank: int | None = None
    synthetic: bool | None = None
    excluded: bool = False
    """shown and never ranked"""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Leaderboard:
    """The rows in their order, the tasks that are shown and those that are ranked, and what a reader must know.

    `skipped` names what was given and is no scored run, with the reason.
    """

    entries: list[Entry]
    tasks: list[str]
    ranked_tasks: list[str]
    warnings: list[str]
    skipped: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def build_leaderboard(
    runs: Sequence[Path],
    *,
    tables: Sequence[str] = DEFAULT_TABLES,
    tasks: Sequence[str] = (),
    names: Mapping[Path, str] | None = None,
    allow_other_data: bool = False,
    max_quarantined: float = MAX_QUARANTINED,
) -> Leaderboard:
    """Rank the scored run folders `runs` beside the published `tables`.

    `tasks` chooses the ranked tasks; `names` are what runs are called, by default their folders;
    `max_quarantined` is the share of samples that a ranked run may leave out. Raises InputError when none of `runs` is
    scored, for an unknown table, a task that no run has, and ranked runs on different data or rows unless allowed.
    """
    found, skipped = [run for run in runs if (run / FILE).is_file()], _skipped(runs)
    if not found:
        raise InputError(f"no scored run: {'; '.join(skipped)}", where="RUNS", fix="Run `hba score` on it first.")
    opened = [open_run(run) for run in found]
    measured = [
        _Measured((names or {}).get(place) or _name(place, found), run.metrics, run.stale)
        for place, run in zip(found, opened, strict=True)
    ]
    rows = [_entry(run, max_quarantined) for run in measured]
    fair = [run for run, row in zip(measured, rows, strict=True) if not row.excluded]
    ranked = _ranked_tasks(measured, fair, tasks)
    warnings = _check_same_data(fair, ranked, allow_other_data)
    if not fair:
        warnings.append("No run can be ranked.")
    published = published_entries(tables)
    apart = _apart(fair, ranked)
    if published and (apart or not fair):
        if any(run.metrics.provenance.synthetic for run in measured):
            warnings.append("Synthetic data: these figures say nothing about people; published rows are not ranked.")
        if apart:
            warnings.append(f"Published rows stand apart, measured on something else: {'; '.join(apart)}.")
        published = [replace(row, excluded=True, notes=(APART,)) for row in published]
    entries = _rank([*rows, *published], ranked)
    present = {key for entry in entries for key in entry.scores}
    order = [key for run in measured for key in run.metrics.tasks if key in present and key not in TASKS]
    order += [key for key in TASKS if key in present]  # behind tasks of one's own, which no published row has
    return Leaderboard(
        entries=entries,
        tasks=list(dict.fromkeys(order)),
        ranked_tasks=ranked,
        warnings=warnings,
        skipped=skipped,
    )


@dataclass(frozen=True)
class _Measured:
    name: str
    metrics: Metrics
    stale: bool


def _skipped(runs: Sequence[Path]) -> list[str]:
    found = []
    for run in runs:
        if not (run / FILE).is_file():
            of_run = (run / PREDICTIONS).is_file() or (run / ASKED).is_file()
            found.append(f"{run} ({f'not scored: hba score {run}' if of_run else 'no run with predictions'})")
    return found


def _name(run: Path, runs: Sequence[Path]) -> str:
    """The folder's name, with its parent's where two are called alike."""
    path = run.resolve()
    alike = sum(other.resolve().name == path.name for other in runs) > 1
    return f"{path.parent.name}/{path.name}" if alike else path.name


def not_comparable(metrics: Metrics, tasks: Collection[str]) -> list[str]:
    """Why the published figures of `tasks` say nothing beside a run's; empty where datasets, split, rows and judge are
    those of the release. What the run does not record is not comparable."""
    said, total, found = metrics.provenance, metrics.aggregate, []
    if said.synthetic is not False:
        found.append("synthetic data" if said.synthetic else "does not say whether its data are synthetic")
    chosen = {key: value for key, value in (said.selection or {}).items() if key != "channels" and value is not None}
    if (said.asked_split or said.split) != TEST or chosen:
        found.append(f"rows: {said.scope}")
    elif said.data_rows != PUBLISHED_ROWS:
        asked = "does not say how many rows it was asked for"
        if said.data_rows is not None:
            asked = f"{plural(said.data_rows, 'row', 'was|were')} asked for"
        found.append(f"{asked} (published: {PUBLISHED_ROWS:,})")
    found += ["answered other rows than it was asked for"] if total.other_rows else []
    found += [f"only {total.rows} were answered"] if total.n_missing else []
    known = {key: task for key, task in metrics.tasks.items() if key in tasks and key in TASKS}
    mine = {key: task for key, task in known.items() if task.score is not None}
    other = [key for key, task in mine.items() if set(task.datasets) != set(TASKS[key].datasets)]
    found += [f"other datasets in {', '.join(other)}"] if other else []
    judged = [key for key in mine if TASKS[key].judged]
    judge = str((said.judge or {}).get("model"))
    if judged and not judge.startswith(PUBLISHED_JUDGE):
        found.append(f"{', '.join(judged)} judged by {judge} (published: {PUBLISHED_JUDGE}); rank others with --tasks")
    return found


def _apart(fair: Sequence[_Measured], ranked: Collection[str]) -> list[str]:
    """Why published rows are not ranked with these runs; a reason that is not all runs' names its runs."""
    reasons: dict[str, list[str]] = {}
    for run in fair:
        for why in not_comparable(run.metrics, ranked):
            reasons.setdefault(why, []).append(run.name)
    return [why if len(runs) == len(fair) else f"{why} ({', '.join(runs)})" for why, runs in reasons.items()]


def _ranked_tasks(measured: Sequence[_Measured], fair: Sequence[_Measured], wanted: Sequence[str]) -> list[str]:
    anywhere = list(dict.fromkeys(key for run in measured for key in _scored(run)))
    for key in wanted:
        if key not in anywhere:
            raise InputError(f"no run has a score for task {key!r}", where="--tasks", fix=nearest(key, anywhere))
    common = list(wanted) or [key for key in anywhere if fair and all(key in _scored(run) for run in fair)]
    if fair and not common:
        raise InputError("the runs have no scored task in common", fix="Choose the ranked tasks with --tasks.")
    return common


def _scored(run: _Measured) -> list[str]:
    return [key for key, task in run.metrics.tasks.items() if task.score is not None]


def _check_same_data(measured: Sequence[_Measured], ranked: Sequence[str], allowed: bool) -> list[str]:
    """Warnings about runs on different data; InputError unless that is allowed."""
    found = []
    prints = {run.name: run.metrics.provenance.data_fingerprint for run in measured}
    if len(set(prints.values())) > 1:
        listed = ", ".join(f"{name}: {str(text)[:12]}" for name, text in prints.items())
        found.append(f"runs on different data (fingerprints {listed})")
    for key in ranked:
        tasks = {run.name: run.metrics.tasks[key] for run in measured if key in _scored(run)}
        sizes = {name: task.n + (task.n_quarantined or 0) for name, task in tasks.items()}
        if len(set(sizes.values())) > 1:
            found.append(f"{key} was scored on different rows ({', '.join(f'{k}: {n:,}' for k, n in sizes.items())})")
    graded = {key: [run for run in measured if key in _scored(run)] for key in ranked}
    judged = [key for key in ranked if any(run.metrics.tasks[key].metric == JUDGED for run in graded[key])]
    judges = {run.name: _judge(run.metrics) for run in measured} if judged else {}
    if len(set(judges.values())) > 1:
        listed = ", ".join(f"{name}: {judge}" for name, judge in judges.items())
        found.append(f"{', '.join(judged)} graded by different judges ({listed})")
    if found and not allowed:
        fix = "Predict and judge all of them alike, or rank them all the same with --allow-other-data."
        raise InputError("; ".join(found), fix=fix)
    return [f"Not the same evidence: {text}." for text in found]


def _judge(metrics: Metrics) -> str | None:
    judge = metrics.provenance.judge
    return None if judge is None else str(judge.get("model"))


def _entry(run: _Measured, max_quarantined: float) -> Entry:
    metrics, said, counts = run.metrics, run.metrics.provenance, run.metrics.aggregate
    left_out = counts.n_quarantined or 0
    share = left_out / (counts.n + left_out) if counts.n + left_out else 0.0
    scant = f"{', '.join(metrics.scant[:3])}{', ...' * (len(metrics.scant) > 3)}"
    reasons = {
        "its predictions have changed since it was scored: not ranked (hba score)": run.stale,
        f"{counts.rows}: not ranked": counts.n_missing,
        "other rows than it was asked for: not ranked": counts.other_rows,
        f"{counts.failed_share:.1%} of the rows failed: not ranked": counts.failed_share > MAX_FAILED,
        f"{share:.1%} of the samples quarantined: not ranked": share > max_quarantined,
    }
    remarks = {
        f"{counts.n_failed or 0:,} failed rows": counts.n_failed and counts.failed_share <= MAX_FAILED,
        f"{plural(left_out, 'sample')} quarantined": left_out and share <= max_quarantined,
        f"judge: {_judge(metrics)}": _judge(metrics),
        said.unusual: said.unusual,
        "data not recorded": said.data_fingerprint is None,
        "synthetic data": said.synthetic,
        f"fewer than {SCANT} independent rows in {scant}": metrics.scant,
    }
    unfair, notes = ([text for text, holds in told.items() if holds] for told in (reasons, remarks))
    scored = {key: metrics.tasks[key] for key in _scored(run)}
    return Entry(
        name=run.name,
        published=False,
        source=str(said.model or "measured here"),
        scores={key: task.score for key, task in scored.items() if task.score is not None},
        ci95={key: task.ci95 for key, task in scored.items() if task.ci95 is not None},
        n={key: task.n for key, task in scored.items()},
        num_rows=counts.n or sum(task.n for task in metrics.tasks.values()),
        num_failed=counts.n_failed,
        synthetic=said.synthetic,
        excluded=bool(unfair),
        notes=(*unfair, *notes),
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
    """The entries in order of mean rank, those without one last, measured before published."""
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

    def order_of(entry: Entry) -> tuple[bool, float, bool, float, str]:
        apart = entry.rank is None and entry.published
        return entry.mean_rank is None, entry.mean_rank or 0.0, apart, -(entry.mean or 0.0), entry.name

    return sorted(placed, key=order_of)


def _complete_mean(entry: Entry, ranked: Sequence[str]) -> float | None:
    known = [entry.scores[key] for key in ranked if key in entry.scores]
    return fmean(known) if known and len(known) == len(ranked) else None


def _places(scores: Sequence[float]) -> list[float]:
    """1 for the highest score; equal scores share the mean of their places."""
    return [
        1 + sum(other > score for other in scores) + (sum(other == score for other in scores) - 1) / 2
        for score in scores
    ]
