"""`hba compare`: are runs different, and how far do runs spread that should be the same?

Runs are matched by sample id: rows are the same when id, dataset and target are. What only some runs answered is left
out and counted, never filled in. Refused: runs on data of different fingerprints, unless told; an id that means another
row in another run; runs without a common row.

Two runs (`compare_runs`): a task whose score is an accuracy over one dataset of independent rows is tested exactly
(McNemar); one that rests on few rows or groups by exchanging the two runs' answers (exactly, where the exchanges can
be listed); every other one by a paired bootstrap of its own metric. Several runs of one model (`run_variance`): their
spread. Several runs of A with several of B (`compare_seeds`): the difference of their means, with an interval that
holds what other rows and what other seeds would give. Rows of one group are drawn together throughout, and p-values of
the tasks are corrected by Holm. A task of which too many rows failed in a run is not compared. Invariant: swapping the
sides turns the signs and nothing else.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple, TypeVar

import numpy as np

from hba.errors import InputError
from hba.evaluate.judge.items import PLACE
from hba.evaluate.judge.scores import judged_rows
from hba.evaluate.metrics import Floats, Ints, Rows
from hba.evaluate.predictions import Prediction
from hba.evaluate.results import MAX_FAILED, Interval
from hba.evaluate.runs import Run, open_run
from hba.evaluate.score import rows_of
from hba.evaluate.statistics import (
    FEW,
    Clusters,
    Drawn,
    Null,
    Part,
    bootstrap_p,
    effective_units,
    exchanged,
    groups_of,
    holm,
    interval,
    line_of,
    mcnemar,
    mean_of_tasks,
    parts,
    permutation,
    resample,
    rng_of,
    satterthwaite,
    shares_of,
    student_interval,
    student_of,
    student_p,
    value,
)
from hba.taxonomy import BUILTIN, Taxonomy

ACCURACIES = ("exact_match", "llm_judge_accuracy")
MEAN = "mean over tasks"
D = TypeVar("D", "Difference", "SeedDifference")
L = TypeVar("L", "Difference", "SeedDifference", "Spread")


class Recorded:
    """A result that can be written."""

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)  # type: ignore[call-overload,no-any-return]


# ---------------------------------------------------------------------------------------------------- rows of runs


def _rows_of(runs: Sequence[Run], predictions: Sequence[Sequence[Prediction]]) -> list[Rows]:
    """The cells of every run; free-form datasets by verdict where one judge has graded all runs to the last answer."""
    rows = [rows_of(mine, run.taxonomy) for run, mine in zip(runs, predictions, strict=True)]
    judges = [None if run.judge is None else {k: v for k, v in run.judge.items() if k != PLACE} for run in runs]
    if any(judge is None or judge != judges[0] for judge in judges):
        return rows
    verdicts = [judged_rows(c, mine, run.verdicts) for c, mine, run in zip(rows, predictions, runs, strict=True)]
    common = frozenset.intersection(*(cells.judged for cells in verdicts))
    return verdicts if all(cells.judged == common for cells in verdicts) else rows


def failed_rows(predictions: Sequence[Sequence[Prediction]], taxonomy: Taxonomy) -> dict[str, list[int]]:
    """How many rows ended in an error in each run, by the key of their task, and of all rows under MEAN."""
    found: dict[str, list[int]] = {}
    for number, mine in enumerate(predictions):
        for p in mine:
            for key in (taxonomy.dataset(p.dataset).task or p.dataset, MEAN):
                found.setdefault(key, [0] * len(predictions))[number] += p.failed
    return found


def failed_tasks(predictions: Sequence[Sequence[Prediction]], taxonomy: Taxonomy) -> dict[str, str]:
    """Why a task is not compared, by its key: more than MAX_FAILED of a dataset's rows failed in one of the runs.

    The key MEAN says that as many of all rows failed, which leaves no mean.
    """
    found: dict[str, str] = {}
    for mine in predictions:
        lost = sum(p.failed for p in mine)
        if lost > MAX_FAILED * len(mine):
            found[MEAN] = f"{lost:,} of {len(mine):,} rows failed in a run"
        rows, failed = (Counter(p.dataset for p in kept) for kept in (mine, [p for p in mine if p.failed]))
        for key in failed:
            task = taxonomy.dataset(key).task or key
            if failed[key] / rows[key] > MAX_FAILED:
                found[task] = f"{failed[key]:,} of {rows[key]:,} rows of {key} failed in a run"
    return found


class _Runs(NamedTuple):
    """The same rows of several runs in one order. `failed` are the tasks that are not compared, with the reason."""

    runs: list[Run]
    predictions: list[list[Prediction]]
    rows: list[Rows]
    failed: dict[str, str]
    about: dict[str, Any]
    """what every result says of its rows: failed, num_rows, num_asked, left_out"""

    @property
    def clusters(self) -> list[str | None]:
        """The group of each row."""
        return [p.group for p in self.predictions[0]]

    @property
    def clustered_by(self) -> str | None:
        """What rows are drawn together by."""
        return "group" if any(self.clusters) else None


def _matched(folders: Sequence[Path], allow_other_data: bool, *, by_id: bool) -> _Runs:
    """The run folders over the rows that all answered, in the order of the first run or of their ids.

    All are read with the tasks and labels of the first: one that it does not know is refused. Raises InputError for
    what else is refused.
    """
    first = open_run(folders[0])
    runs = [first, *(open_run(folder, first.taxonomy) for folder in folders[1:])]
    if len({run.fingerprint for run in runs if run.fingerprint is not None}) > 1 and not allow_other_data:
        found = ", ".join(f"{run.name}: {(run.fingerprint or 'not recorded')[:12]}" for run in runs)
        fix = "Predict on the same data, or compare the rows that they share with --allow-other-data."
        raise InputError(f"the runs are on different data (fingerprints {found})", fix=fix)
    tables = [{p.id: p for p in run.predictions} for run in runs]
    common = [key for key in tables[0] if all(key in table for table in tables[1:])]
    for key in common:
        rows = {(table[key].dataset, table[key].target) for table in tables}
        if len(rows) > 1:
            what = f"sample {key!r} is not the same row in all runs: {sorted(rows)}"
            raise InputError(what, where=first.name, fix="Compare runs on the same split of the same data.")
    if not common:
        names = ", ".join(run.name for run in runs)
        raise InputError("no sample was answered by all runs", where=names, fix="Compare runs on the same split.")
    if by_id:  # so that the draws do not depend on which run is named first
        common.sort()
    predictions = [[table[key] for key in common] for table in tables]
    asked = [run.num_asked for run in runs]
    about = {
        "failed": failed_rows(predictions, first.taxonomy),
        "num_rows": len(common),
        # The most, where they were asked for different ones.
        "num_asked": None if None in asked else max(number for number in asked if number is not None),
        "left_out": [len(table) - len(common) for table in tables],
    }
    failed = failed_tasks(predictions, first.taxonomy)
    return _Runs(runs, predictions, _same_rows(_rows_of(runs, predictions)), failed, about)


class _Dataset(NamedTuple):
    """One dataset in K runs: real scores [K], and resampled scores [K, R] over the same draws of rows."""

    parts: Sequence[Part]
    groups_M: Ints | None
    scores_K: Floats
    drawn_KR: Floats
    units: float

    @property
    def first(self) -> Part:
        """The dataset in the first run; truth, metric and place of the rows are those of all."""
        return self.parts[0]

    def apart(self, num_a: int) -> Drawn:
        """The mean of the runs from `num_a` on minus that of the runs before."""
        score = self.scores_K[num_a:].mean() - self.scores_K[:num_a].mean()
        drawn_R = self.drawn_KR[num_a:].mean(0) - self.drawn_KR[:num_a].mean(0)
        return Drawn(np.array([score]), drawn_R, self.units)


def _drawn(
    rows: Sequence[Rows],
    clusters: Clusters | None,
    order_of: Callable[[Sequence[Part]], list[int]],
    *,
    resamples: int,
    seed: int,
    published: bool = False,
) -> list[_Dataset]:
    """Every dataset with its resamples. Types of rows are drawn in the order of their cells: `order_of` the runs is
    that in which cells count, and must not depend on how the runs are called."""
    found = []
    for mine in zip(*(parts(run, published) for run in rows), strict=True):
        groups_M = groups_of(clusters, mine[0].members_M, rows[0])
        order = order_of(mine)
        columns = [(mine[k].cells_M, mine[k].size) for k in order]
        drawn = dict(zip(order, resample(columns, groups_M, resamples, rng_of(seed, mine[0].key)), strict=True))
        drawn_KR = np.stack([part.score(drawn[k]) for k, part in enumerate(mine)])
        scores_K = np.concatenate([part.real() for part in mine])
        found.append(_Dataset(mine, groups_M, scores_K, drawn_KR, effective_units(groups_M, len(mine[0].cells_M))))
    return found


def _by_cells(mine: Sequence[Part]) -> list[int]:
    """The order of runs whose rows are in the order of their ids."""
    return sorted(range(len(mine)), key=lambda k: mine[k].cells_M.tolist())


def _turned(pair: Sequence[Part]) -> bool:
    """Whether the second of two runs counts first, whatever the order of their rows."""
    cells_a, cells_b = (part.cells_M.tolist() for part in pair)
    return sorted(zip(cells_a, cells_b, strict=True)) > sorted(zip(cells_b, cells_a, strict=True))


def _lines(
    found: Sequence[_Dataset],
    taxonomy: Taxonomy,
    failed: Mapping[str, str],
    line: Callable[[Sequence[_Dataset], str | None], L],
) -> tuple[dict[str, L], L | None]:
    """A line of each task that has rows, and of the mean over those that are scored. `line` is told why it must say
    nothing, where too many rows failed."""
    of_tasks = {task.key: [e for e in found if e.first.key in task.datasets] for task in taxonomy.tasks.values()}
    tasks = {key: line(mine, failed.get(key)) for key, mine in of_tasks.items() if mine}
    out = {key for task in failed for key in (taxonomy.tasks[task].datasets if task in taxonomy.tasks else (task,))}
    scored = [each for each in found if each.first.in_task and each.first.key not in out]
    return tasks, line(scored, failed.get(MEAN)) if scored else None


def _defined(found: Sequence[_Dataset]) -> Sequence[_Dataset]:
    """The datasets of a line that have a score in all runs; all where none has."""
    return [each for each in found if not np.isnan(each.scores_K).any()] or found


def _scores(found: Sequence[_Dataset], rows: Rows) -> Floats:
    """What a line scores in each run [K]."""
    return mean_of_tasks(rows.layout, {each.first.key: each.scores_K for each in found})


def _or_failed(line: D, note: str | None) -> D:
    if note is None:
        return line
    return replace(line, a=None, b=None, difference=None, ci95=None, p_value=None, note=note)


def _with_holm(tasks: dict[str, D]) -> dict[str, D]:
    tested = {key: found.p_value for key, found in tasks.items() if found.p_value is not None}
    corrected = dict(zip(tested, holm(list(tested.values())), strict=True))
    return {key: replace(found, p_holm=corrected.get(key)) for key, found in tasks.items()}


def _same_rows(runs: Sequence[Rows]) -> list[Rows]:
    """The runs with one numbering of their multilabel pairs. Raises InputError unless they hold the same rows."""
    first = runs[0]
    for other in runs[1:]:
        same = first.layout is other.layout and len(first.cells) == len(other.cells) and first.judged == other.judged
        if not same or not (_truth(first) == _truth(other)).all() or _true_sets(first) != _true_sets(other):
            fix = "Match the two runs by id first and keep the rows that both have."
            raise InputError("the two runs do not hold the same rows in the same order", fix=fix)
    pairs = tuple(dict.fromkeys(pair for run in runs for pair in run.pairs))
    numbers = {pair: number for number, pair in enumerate(pairs)}
    found = []
    for run in runs:
        cells = run.cells.copy()
        mine = cells >= run.layout.size
        if mine.any():
            to_common = np.array([numbers[pair] for pair in run.pairs], dtype=np.int64)
            cells[mine] = to_common[cells[mine] - run.layout.size] + run.layout.size
        found.append(replace(run, cells=cells, pairs=pairs))
    return found


def _truth(rows: Rows) -> Ints:
    """Dataset and target of each row as a number, [N]; of a free-form row the dataset alone."""
    start, size, guesses = rows.layout.freeform_start, rows.layout.size, rows.layout.num_classes + 1
    other = np.where(rows.cells < size, -1 - (rows.cells - start) // 3, -size)
    truth: Ints = np.where(rows.cells < start, rows.cells // guesses, other)
    return truth


def _true_sets(rows: Rows) -> list[tuple[str, str]]:
    """Dataset and true labels of every multilabel row."""
    pairs = (rows.pairs[cell - rows.layout.size] for cell in rows.cells[rows.cells >= rows.layout.size].tolist())
    return [(pair.dataset, pair.true) for pair in pairs]


# -------------------------------------------------------------------------------------------------------- two runs


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Side b minus side a in one metric; None where a score is not defined. `n` rows, worth `n_independent`.

    `test` is mcnemar, permutation or bootstrap. `gained` rows are wrong in a and right in b, `lost` the other way
    round. `p_holm` is the p-value corrected over the tasks; None for a dataset and for the mean. `note` says why
    nothing is compared.
    """

    metric: str
    a: float | None
    b: float | None
    difference: float | None
    ci95: Interval | None
    p_value: float | None
    test: str
    n: int
    gained: int
    lost: int
    n_independent: float
    p_holm: float | None = None
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Differences per task, of the mean over scored tasks, and per dataset.

    A task of free-form rows that no judge has seen is compared by exact match and does not enter the mean.
    """

    tasks: Mapping[str, Difference]
    mean: Difference | None
    datasets: Mapping[str, Difference]


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
class Comparison(Recorded):
    """`hba compare A B`: the paired differences, and the rows behind them.

    `num_asked` is how many rows the runs were to answer, None where a run does not say. `failed` has, for each task and
    MEAN (all rows), how many rows ended in an error in each run.
    """

    a: str
    b: str
    paired: Paired
    failed: dict[str, list[int]]
    flips: list[Flip]
    num_rows: int
    num_asked: int | None
    left_out: list[int]
    same_data: bool | None
    """None when a run does not record its data"""
    clustered_by: str | None


def compare_runs(
    a: Path,
    b: Path,
    *,
    allow_other_data: bool = False,
    resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Compare two run folders. Raises InputError for what is refused (see the module)."""
    pair = _matched([a, b], allow_other_data, by_id=False)
    known = [run.fingerprint for run in pair.runs]
    how: dict[str, Any] = {"resamples": resamples, "seed": seed}
    return Comparison(
        a=pair.runs[0].name,
        b=pair.runs[1].name,
        paired=paired_difference(*pair.rows, clusters=pair.clusters, failed=pair.failed, **how),
        flips=_flips(pair),
        same_data=None if None in known else known[0] == known[1],
        clustered_by=pair.clustered_by,
        **pair.about,
    )


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
    failed = failed_tasks([a, b], taxonomy)
    return paired_difference(*rows, clusters=groups, resamples=resamples, seed=seed, failed=failed)


def _flips(pair: _Runs) -> list[Flip]:
    right_a, right_b = (cells.right() for cells in pair.rows)
    return [
        Flip(id=x.id, dataset=x.dataset, target=x.target, a=x.label or x.answer, b=y.label or y.answer, gained=bool(rb))
        for x, y, ra, rb in zip(*pair.predictions, right_a, right_b, strict=True)
        if ra != rb
    ]


def paired_difference(
    a: Rows,
    b: Rows,
    *,
    clusters: Clusters | None = None,
    resamples: int = 2000,
    seed: int = 0,
    published: bool = False,
    failed: Mapping[str, str] | None = None,
) -> Paired:
    """Compare two runs over the same rows in the same order; 95 % intervals over `resamples` draws.

    `clusters` gives each row's group key, None for a row of its own. `failed` are the tasks that are not to be
    compared, with the reason. Raises InputError when dataset or target of a row differ, and as `statistics.bootstrap`
    does.
    """
    pair, failed = _same_rows([a, b]), failed or {}
    how: dict[str, Any] = {"resamples": resamples, "seed": seed, "published": published}
    found = _drawn(pair, clusters, lambda mine: [1, 0] if _turned(mine) else [0, 1], **how)
    test, layout = _Test(resamples, seed, found), pair[0].layout

    def line(mine: Sequence[_Dataset], note: str | None) -> Difference:
        return _or_failed(_difference(mine, pair[0], test), note)

    tasks, mean = _lines(found, layout.taxonomy, failed, line)
    datasets = {each.first.key: line([each], None) for each in found}
    return Paired(tasks=_with_holm(tasks), mean=mean and replace(mean, metric=MEAN), datasets=datasets)


class _Test:
    """The permutation test of lines that rest on few rows; what a dataset's answers exchange to is computed once."""

    def __init__(self, draws: int, seed: int, found: Sequence[_Dataset]) -> None:
        self.draws, self.seed = draws, seed
        self._found = {each.first.key: each for each in found}
        self._nulls: dict[str, Null] = {}

    def p_value(self, shares: Mapping[str, float], observed: float) -> float:
        """Of the sum of the datasets' differences with these shares."""
        nulls = [(share, self._null(key)) for key, share in shares.items()]
        return permutation(observed, nulls, self.draws, rng_of(self.seed, "exchanged"))

    def _null(self, key: str) -> Null:
        if key not in self._nulls:
            dataset, rng = self._found[key], rng_of(self.seed, f"{key}, exchanged")
            turned = _turned(dataset.parts)
            first, second = reversed(dataset.parts) if turned else dataset.parts
            columns = [(part.cells_M, part.size) for part in (first, second)]
            null = exchanged(columns, first.score, second.score, dataset.groups_M, self.draws, rng)
            self._nulls[key] = null._replace(values=-null.values) if turned else null
        return self._nulls[key]


def _difference(found: Sequence[_Dataset], rows: Rows, test: _Test) -> Difference:
    """One line of the comparison, of the datasets `found`: a dataset, a task or the mean over tasks."""
    known = _defined(found)
    line = {each.first.key: each.apart(1) for each in known}
    drawn_R, components = line_of(rows.layout, line)
    score_a, score_b = (
        value(mean_of_tasks(rows.layout, {each.first.key: each.scores_K[k : k + 1] for each in known})) for k in (0, 1)
    )
    right = [[part.right_M for part in each.parts] for each in found]
    gained, lost = sum(int((~a & b).sum()) for a, b in right), sum(int((a & ~b).sum()) for a, b in right)
    first, units = found[0], min(each.units for each in found)
    exact = len(found) == 1 and first.groups_M is None and first.first.metric in ACCURACIES
    known_R = drawn_R[~np.isnan(drawn_R)]
    name = "mcnemar" if exact else "permutation" if units < FEW else "bootstrap"
    p_value = difference = None
    if score_a is not None and score_b is not None:
        difference = score_b - score_a
        if exact:
            p_value = mcnemar(gained, lost)
        elif units < FEW:
            p_value = test.p_value(shares_of(rows.layout, line), difference)
        elif known_R.size:
            p_value = bootstrap_p(known_R)
    return Difference(
        metric=first.first.metric,
        a=score_a,
        b=score_b,
        difference=difference,
        ci95=None if difference is None else interval(drawn_R, components),
        p_value=p_value,
        test=name,
        n=sum(len(each.first.members_M) for each in found),
        gained=gained,
        lost=lost,
        n_independent=units,
    )


# ------------------------------------------------------------------------------------------- several runs of a model


@dataclass(frozen=True, kw_only=True)
class Spread:
    """One task over K runs; None where a score is not defined. `sd` is the sample standard deviation.

    `ci95_runs` (Student's t over the runs) is what another seed or prompt would give on these rows, `ci95_rows` (the
    bootstrap, with the same draws of rows for every run) what other rows would give these runs on average. `agreement`
    is the share of rows that all runs answer alike, right or wrong.
    """

    metric: str
    scores: list[float | None]
    mean: float | None
    sd: float | None
    ci95_runs: Interval | None
    ci95_rows: Interval | None
    agreement: float
    n: int
    n_independent: float
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Variance(Recorded):
    """`hba compare --seeds`: tasks, and the mean over those that are scored."""

    runs: list[str]
    tasks: dict[str, Spread]
    mean: Spread | None
    failed: dict[str, list[int]]
    num_rows: int
    num_asked: int | None
    left_out: list[int]


def run_variance(
    folders: Sequence[Path], *, allow_other_data: bool = False, resamples: int = 2000, seed: int = 0
) -> Variance:
    """Spread of the scores of two or more run folders over the rows that all have answered."""
    if len(folders) < 2:
        raise InputError("one run has no spread", fix="Give two or more runs of the same model.")
    several = _matched(folders, allow_other_data, by_id=True)
    rows_KN = [[p.label or (p.answer or "").strip().lower() for p in mine] for mine in several.predictions]
    alike_N = np.array([len(set(row)) == 1 for row in zip(*rows_KN, strict=True)], dtype=float)
    found = _drawn(several.rows, several.clusters, _by_cells, resamples=resamples, seed=seed)
    taxonomy, line = several.runs[0].taxonomy, partial(_spread, rows=several.rows[0], alike_N=alike_N)
    tasks, mean = _lines(found, taxonomy, several.failed, line)
    return Variance(runs=[run.name for run in several.runs], tasks=tasks, mean=mean, **several.about)


def _spread(found: Sequence[_Dataset], note: str | None, *, rows: Rows, alike_N: Floats) -> Spread:
    known = _defined(found)
    mean = {e.first.key: Drawn(e.scores_K.mean(keepdims=True), e.drawn_KR.mean(0), e.units) for e in known}
    scores = [None if note else value(score[None]) for score in _scores(known, rows)]
    defined = [score for score in scores if score is not None]
    members_M = np.concatenate([each.first.members_M for each in found])
    return Spread(
        metric=found[0].first.metric,
        scores=scores,
        mean=fmean(defined) if defined else None,
        sd=stdev(defined) if len(defined) > 1 else None,
        ci95_runs=student_interval(defined),
        ci95_rows=interval(*line_of(rows.layout, mean)) if defined else None,
        agreement=float(alike_N[members_M].mean()),
        n=len(members_M),
        n_independent=min(each.units for each in found),
        note=note,
    )


# ---------------------------------------------------------------------------------------- several runs with several


@dataclass(frozen=True, kw_only=True)
class SeedDifference:
    """The mean of the runs of b minus that of the runs of a in one metric; None where a score is not defined.

    `sd_a` and `sd_b` are over the runs of a side. `se` is the standard error of the difference over rows and runs,
    `se_rows` that over rows alone; `freedom` are the degrees of freedom of `se`. The rest is as in `Difference`.
    """

    metric: str
    scores_a: list[float | None]
    scores_b: list[float | None]
    a: float | None
    b: float | None
    difference: float | None = None
    ci95: Interval | None = None
    p_value: float | None = None
    sd_a: float | None = None
    sd_b: float | None = None
    se: float | None = None
    se_rows: float | None = None
    freedom: float | None = None
    n: int
    n_independent: float
    p_holm: float | None = None
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class SeedComparison(Recorded):
    """`hba compare A... vs B...`: per task, and of the mean over those that are scored."""

    a: list[str]
    b: list[str]
    tasks: dict[str, SeedDifference]
    mean: SeedDifference | None
    failed: dict[str, list[int]]
    """of the runs of a, then of b"""
    num_rows: int
    num_asked: int | None
    left_out: list[int]
    clustered_by: str | None


def compare_seeds(
    a: Sequence[Path], b: Sequence[Path], *, allow_other_data: bool = False, resamples: int = 2000, seed: int = 0
) -> SeedComparison:
    """Compare two or more runs of one model with two or more of another, over the rows that all have answered.

    The variance of the difference of the means is that over rows (the bootstrap, the same draws for all runs) plus
    that over runs (s^2 / K of each side). What seeds and rows do only together is in both; it is estimated from how
    much less the mean of K runs varies over rows than one run, and taken off once. Interval and p-value are those of
    Student's t with Satterthwaite's degrees of freedom. With rows that matter little it is Welch's test of the runs'
    scores. Raises InputError for a side of one run, and for what is refused (see the module).
    """
    if min(len(a), len(b)) < 2:
        fix = "Give two or more runs on either side of `vs`, or compare one run with one: hba compare A B."
        raise InputError("one run does not say how far seeds spread", where="RUNS", fix=fix)
    several = _matched([*a, *b], allow_other_data, by_id=True)
    found = _drawn(several.rows, several.clusters, _by_cells, resamples=resamples, seed=seed)

    def line(mine: Sequence[_Dataset], note: str | None) -> SeedDifference:
        return _or_failed(_of_sides(mine, several.rows[0], len(a)), note)

    tasks, mean = _lines(found, several.runs[0].taxonomy, several.failed, line)
    names = [run.name for run in several.runs]
    return SeedComparison(
        a=names[: len(a)],
        b=names[len(a) :],
        tasks=_with_holm(tasks),
        mean=mean and replace(mean, metric=MEAN),
        clustered_by=several.clustered_by,
        **several.about,
    )


def _of_sides(found: Sequence[_Dataset], rows: Rows, num_a: int) -> SeedDifference:
    known = _defined(found)
    scores_K = _scores(known, rows)
    side_a, side_b = scores_K[:num_a], scores_K[num_a:]
    mean_a, mean_b = value(side_a.mean(keepdims=True)), value(side_b.mean(keepdims=True))
    line = SeedDifference(
        metric=found[0].first.metric,
        scores_a=[value(score[None]) for score in side_a],
        scores_b=[value(score[None]) for score in side_b],
        a=mean_a,
        b=mean_b,
        n=sum(len(each.first.members_M) for each in found),
        n_independent=min(each.units for each in found),
    )
    if mean_a is None or mean_b is None:
        return line
    runs_KR = [
        line_of(rows.layout, {e.first.key: Drawn(e.scores_K[k : k + 1], e.drawn_KR[k], e.units) for e in known})[0]
        for k in range(len(scores_K))
    ]
    # The usual small-sample correction of a bootstrap variance, which divides by the number of units.
    components = line_of(rows.layout, {each.first.key: each.apart(num_a) for each in known})[1]
    over_rows = [(v * u / (u - 1), u - 1) for v, u in components if u > 1]
    over_runs = [(float(side.var(ddof=1)) / len(side), len(side) - 1.0) for side in (side_a, side_b)]
    of_rows, of_runs = (sum(variance for variance, _ in each) for each in (over_rows, over_runs))
    twice = sum(_together(np.stack(runs)) for runs in (runs_KR[:num_a], runs_KR[num_a:]))
    error = math.sqrt(max(of_rows, of_runs, of_rows + of_runs - twice))
    freedom = min(satterthwaite([*over_rows, *over_runs]), 1e9)
    difference = mean_b - mean_a
    return replace(
        line,
        difference=difference,
        ci95=student_of(difference, error, freedom) if error > 0 else None,
        p_value=student_p(difference / error, freedom) if error > 0 else None,
        sd_a=float(side_a.std(ddof=1)),
        sd_b=float(side_b.std(ddof=1)),
        se=error,
        se_rows=math.sqrt(of_rows),
        freedom=freedom,
    )


def _together(runs_KR: Floats) -> float:
    """The variance over rows of the mean of K runs that is of rows and runs together: (V_1 - V_K) / (K - 1).

    V_1 is that of one run, V_K that of their mean. It is in the variance over runs as well.
    """
    known = runs_KR[:, ~np.isnan(runs_KR).any(0)]
    if not known.size:
        return 0.0
    alone, mean = known.var(1).mean(), known.mean(0).var()
    return float(max(0.0, alone - mean) / (len(known) - 1))
