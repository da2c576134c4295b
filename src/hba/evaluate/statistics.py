"""How sure a figure is: intervals, chance levels, and tests of a difference. The one place where rows are resampled.

Rows are resampled within their dataset (stratified), so that every resample has the datasets' own sizes. Rows that
share a group (a speaker, a video) are drawn together. Both are exact and never touch single rows: rows, or groups, with
equal counts are one type, the number of draws of each type is multinomial, and the metric is computed from the
resampled counts of all resamples at once.

Few units (rows, or groups) make percentiles too narrow, and uneven groups count for fewer than they are: their
effective number is (sum m)^2 / sum m^2 over the sizes m, which is Satterthwaite's degrees of freedom, plus one, of a
variance over groups. Below FEW units an interval takes the expanded percentiles of Hesterberg (2015), those of
Student's t for that number, and a difference is tested by permutation; from FEW on the expansion is smaller than the
noise of 2,000 resamples, and is left out.

Limits: groups are drawn per dataset, so that a speaker who occurs in two datasets is taken for two. An interval has no
width where all rows are right. Invariant: the same rows and seed give the same numbers, and one dataset's draws do not
depend on the others. Shape suffixes: M rows of one dataset, R resamples, E cells, T types, K classes of a domain.

References: Hesterberg, What teachers should know about the bootstrap, The American Statistician 69 (2015).
Satterthwaite, Biometrics Bulletin 2 (1946). Carter, Schnepel and Steigerwald, Review of Economics and Statistics 99
(2017), on the effective number of groups. Phipson and Smyth, Permutation p-values should never be zero (2010).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from statistics import NormalDist, fmean, stdev
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hba.errors import InputError
from hba.evaluate.metrics import METRIC as MULTILABEL
from hba.evaluate.metrics import RIGHT, Floats, Ints, Layout, Rows, primary

LEVEL = 0.95
EXACT_MATCH = "exact_match"
CHANCE_RESAMPLES = 1000
FEW = 50
MAX_LISTED = 3_000_000  # counts, and a third of it sums, that an exact test lists
_DRAWS_AT_ONCE = 4_000_000
_MAX_CODE = 2**62

Interval = tuple[float, float]
Scorer = Callable[[Ints], Floats]
Clusters = Sequence[str | None]


class Part(NamedTuple):
    """One dataset's rows as cells in [0, size), with the score of counts [..., size] -> [...]."""

    key: str
    metric: str
    members_M: Ints
    cells_M: Ints
    right_M: npt.NDArray[np.bool_]
    size: int
    score: Scorer
    in_task: bool
    """whether the score is the one of the dataset's task: not for free-form rows that no judge has seen"""

    def real(self) -> Floats:
        """The score of the rows themselves, [1]; NaN where it is not defined."""
        return self.score(np.bincount(self.cells_M, minlength=self.size)[None])


class Drawn(NamedTuple):
    """A dataset's figure: on the real rows [1], in the resamples [R], and on how many independent units it rests."""

    real: Floats
    values_R: Floats
    units: float


# ---------------------------------------------------------------------------------------------------- rows to counts


def parts(rows: Rows, published: bool = False) -> list[Part]:
    """The datasets with rows and with a score: those of a task, by its metric, and free-form ones by exact match."""
    layout, tasks = rows.layout, rows.layout.taxonomy.tasks
    found = []
    for code in rows.scored_codes():
        key = layout.classified[code]
        task = layout.taxonomy.dataset(key).task
        if task is None or tasks[task].judged:
            continue
        metric, classes = tasks[task].metric, len(layout.indices[code])
        members_M = rows.members(code)
        cells_M = rows.local_cells(code, members_M)
        right_M = cells_M // (classes + 1) == cells_M % (classes + 1)
        score = partial(_of_confusion, classes=classes, score=primary(metric, published))
        found.append(Part(key, metric, members_M, cells_M, right_M, classes * (classes + 1), score, True))
    for number, key in enumerate(layout.freeform):
        start = layout.freeform_start + 3 * number
        members_M = np.flatnonzero((rows.cells >= start) & (rows.cells < start + 3))
        if len(members_M):
            task = layout.taxonomy.dataset(key).task
            judged = key in rows.judged and task is not None
            metric = tasks[task].metric if judged and task else EXACT_MATCH
            cells_M = rows.cells[members_M] - start
            found.append(Part(key, metric, members_M, cells_M, cells_M == RIGHT, 3, _share_right, judged))
    for key in rows.multilabel_keys():
        members_M, cells_M, table = rows.multilabel(key)
        right_M, size = table.equal_T[cells_M], len(table.equal_T)
        found.append(Part(key, MULTILABEL, members_M, cells_M, right_M, size, table.macro_f1, True))
    return found


def _of_confusion(counts: Ints, *, classes: int, score: Scorer) -> Floats:
    return score(counts.reshape(-1, classes, classes + 1))


def _share_right(counts: Ints) -> Floats:
    share: Floats = counts[..., RIGHT] / counts.sum(-1)
    return share


# -------------------------------------------------------------------------------------------------------- resampling


def rng_of(seed: int, key: str) -> np.random.Generator:
    """The generator of one dataset's draws."""
    return np.random.default_rng([seed, zlib.crc32(key.encode())])


def groups_of(clusters: Clusters | None, members_M: Ints, rows: Rows) -> Ints | None:
    """Group number of each row [M], or None when every row stands alone. Raises InputError for a wrong length."""
    if clusters is None:
        return None
    if len(clusters) != len(rows.cells):
        fix = "Give one key, or None, for each row."
        raise InputError(f"{len(clusters)} group keys for {len(rows.cells)} rows", fix=fix)
    numbers: dict[Any, int] = {}
    keys = ((row, None) if clusters[row] is None else clusters[row] for row in members_M.tolist())
    groups = np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)
    return groups if len(numbers) < len(groups) else None


def effective_units(groups_M: Ints | None, num_rows: int) -> float:
    """How many rows, or groups of even size, the rows are worth: (sum m)^2 / sum m^2 over the sizes m of the groups."""
    if groups_M is None:
        return float(num_rows)
    sizes_G = np.bincount(groups_M).astype(float)
    return float(sizes_G.sum() ** 2 / (sizes_G**2).sum())


def resample(
    columns: Sequence[tuple[Ints, int]], groups_M: Ints | None, resamples: int, rng: np.random.Generator
) -> list[Ints]:
    """Resampled counts [R, E] of each column (cells [M], E) over the same draws of rows, or of groups of rows.

    As many rows (groups) are drawn as there are, with replacement. Raises InputError for fewer than 100 resamples.
    """
    if resamples < 100:
        raise InputError(f"{resamples} resamples give no interval", fix="Use 100 or more; 2000 is usual.")
    counts_TE, frequency_T = _types(columns, groups_M)
    total = int(frequency_T.sum())
    block = max(1, _DRAWS_AT_ONCE // len(frequency_T))
    drawn = []
    for start in range(0, resamples, block):
        draws = rng.multinomial(total, frequency_T / total, size=min(block, resamples - start))
        # Counts are far below 2**53, and the float product is much faster than the integer one.
        drawn.append((draws.astype(float) @ counts_TE.astype(float)).round().astype(np.int64))
    edges = np.cumsum([size for _, size in columns])[:-1]
    return np.split(np.concatenate(drawn), edges, axis=1)


def _types(columns: Sequence[tuple[Ints, int]], groups_M: Ints | None) -> tuple[Ints, Ints]:
    """The distinct counts [T, sum E] of rows, one of a cell a column, or of groups, and how many have each, [T]."""
    if groups_M is not None:
        return _group_types(columns, groups_M)
    joint_M, reach = np.zeros_like(columns[0][0]), 1
    for cells_M, size in columns:
        if reach * size > _MAX_CODE:  # many columns: number the rows that there are, in their order
            joint_M = np.unique(joint_M, return_inverse=True)[1].reshape(-1)
            reach = int(joint_M.max()) + 1
        joint_M, reach = joint_M * size + cells_M, reach * size
    _, first_T, frequency_T = np.unique(joint_M, return_index=True, return_counts=True)
    counts_TE = np.zeros((len(first_T), sum(size for _, size in columns)), dtype=np.int64)
    start = 0
    for cells_M, size in columns:
        counts_TE[np.arange(len(first_T)), start + cells_M[first_T]] = 1
        start += size
    return counts_TE, frequency_T


def _group_types(columns: Sequence[tuple[Ints, int]], groups_M: Ints) -> tuple[Ints, Ints]:
    """The distinct counts [T, sum E] of the groups and how many groups have each, [T]."""
    counts_GE = np.zeros((int(groups_M.max()) + 1, sum(size for _, size in columns)), dtype=np.int64)
    start = 0
    for cells_M, size in columns:
        np.add.at(counts_GE, (groups_M, start + cells_M), 1)
        start += size
    types_TE, frequency_T = np.unique(counts_GE, axis=0, return_counts=True)
    return types_TE, frequency_T


# --------------------------------------------------------------------------------------------------------- intervals


def over_tasks(layout: Layout, scores: Mapping[str, Floats]) -> tuple[dict[str, Floats], Floats | None]:
    """Task scores [R] as the mean of their datasets', and the mean over tasks [R] (None without a task).

    `scores` are those of the datasets that have one. A resample in which one is not defined (NaN) gives no mean.
    """
    tasks = {}
    for task in layout.taxonomy.tasks.values():
        found = [scores[key] for key in task.datasets if key in scores]
        if found:
            tasks[task.key] = np.stack(found).mean(0)
    return tasks, np.stack(list(tasks.values())).mean(0) if tasks else None


def mean_of_tasks(layout: Layout, scores: Mapping[str, Floats]) -> Floats:
    """The mean over the tasks of these datasets; a dataset that is of no task stands for itself."""
    mean = over_tasks(layout, scores)[1]
    return next(iter(scores.values())) if mean is None else mean


def interval(values_R: Floats, parts_of_it: Iterable[tuple[float, float]] = ()) -> Interval | None:
    """The 95 % percentile interval of resampled values; NaN are left out, None without any.

    `parts_of_it` are (variance, units) of the independent parts that the values are the sum of: few units make the
    interval wider (see the module). Nothing can be said of a single unit: None.
    """
    known = values_R[~np.isnan(values_R)]
    components = [(of, units) for of, units in parts_of_it if not math.isnan(of)]
    if not known.size or (components and all(units <= 1 for _, units in components)):
        return None
    tail = _tail(components)
    low, high = np.quantile(known, [tail, 1 - tail])
    return float(low), float(high)


def _tail(components: Sequence[tuple[float, float]]) -> float:
    """The share of resamples beyond either end of an interval: (1 - LEVEL) / 2, and less where units are few."""
    plain = (1 - LEVEL) / 2
    varying = [(of, units) for of, units in components if of > 0 and units > 1]
    if not varying:
        return plain
    widened = [of * units / (units - 1) for of, units in varying]
    freedom = satterthwaite([(v, units - 1) for v, (_, units) in zip(widened, varying, strict=True)])
    if freedom + 1 >= FEW:
        return plain
    reach = math.sqrt(sum(widened) / sum(of for of, _ in varying)) * student_reach(freedom)
    return NormalDist().cdf(-reach)


def satterthwaite(variances: Sequence[tuple[float, float]]) -> float:
    """The degrees of freedom of a sum of independent variances, given as (variance, degrees of freedom)."""
    below = sum(of**2 / freedom for of, freedom in variances if of > 0)
    return sum(of for of, _ in variances) ** 2 / below if below else math.inf


def shares_of(layout: Layout, keys: Collection[str]) -> dict[str, float]:
    """The share of each dataset in the mean over the tasks of all of them; one that is of no task stands for itself."""
    tasks = [mine for task in layout.taxonomy.tasks.values() if (mine := [key for key in task.datasets if key in keys])]
    found = {key: 1 / (len(tasks) * len(mine)) for mine in tasks for key in mine}
    return found or dict.fromkeys(list(keys)[:1], 1.0)


def line_of(layout: Layout, found: Mapping[str, Drawn]) -> tuple[Floats, list[tuple[float, float]]]:
    """The mean over the tasks of these datasets: its resampled values [R], and its parts for `interval`.

    A dataset whose real score is not defined takes no part.
    """
    found = {key: drawn for key, drawn in found.items() if not np.isnan(drawn.real[0])} or dict(found)
    shares = shares_of(layout, found)
    components = [(share**2 * variance(found[key].values_R), found[key].units) for key, share in shares.items()]
    return mean_of_tasks(layout, {key: found[key].values_R for key in shares}), components


def variance(values_R: Floats) -> float:
    """The variance of resampled values without NaN; NaN without any."""
    known = values_R[~np.isnan(values_R)]
    return float(known.var()) if known.size else math.nan


def listed(ci95: Interval | None) -> list[float] | None:
    """An interval as JSON has it."""
    return None if ci95 is None else list(ci95)


def value(values: Floats) -> float | None:
    """The first of `values`, None for NaN."""
    return None if np.isnan(values[0]) else float(values[0])


class Intervals(NamedTuple):
    """95 % intervals: per task, of the mean over tasks, and per dataset; None where nothing could be scored."""

    tasks: dict[str, Interval | None]
    mean: Interval | None
    datasets: dict[str, Interval | None]


def bootstrap(
    rows: Rows,
    *,
    clusters: Clusters | None = None,
    resamples: int = 2000,
    seed: int = 0,
    published: bool = False,
    tasks: Collection[str] | None = None,
) -> Intervals:
    """95 % percentile intervals of every task score and of their mean, `resamples` draws.

    `published` scores as the released scripts do; `clusters` gives each row's group key or None (a group of
    its own). `tasks` are those that have a score: no other has an interval, and the mean has one if they all do;
    without it all tasks count that the rows have. Raises InputError for a wrong length or fewer than 100 resamples.
    """
    found = {part.key: part for part in parts(rows, published)}
    drawn = {}
    for key, part in found.items():
        groups_M = groups_of(clusters, part.members_M, rows)
        (counts,) = resample([(part.cells_M, part.size)], groups_M, resamples, rng_of(seed, key))
        drawn[key] = Drawn(part.real(), part.score(counts), effective_units(groups_M, len(part.cells_M)))
    of_tasks: dict[str, dict[str, Drawn]] = {}
    for task in rows.layout.taxonomy.tasks.values():
        mine = {key: drawn[key] for key in task.datasets if key in found and found[key].in_task}
        if mine and (tasks is None or task.key in tasks):
            of_tasks[task.key] = mine
    intervals = {key: interval(*line_of(rows.layout, mine)) for key, mine in of_tasks.items()}
    scored = {k: d for mine in of_tasks.values() for k, d in mine.items() if not np.isnan(d.real[0])}
    missing = tasks is not None and set(tasks) - {key for key, mine in of_tasks.items() if mine}
    mean = interval(*line_of(rows.layout, scored)) if scored and not missing else None
    alone = {key: interval(each.values_R, [(variance(each.values_R), each.units)]) for key, each in drawn.items()}
    return Intervals(intervals, mean, alone)


def units_of(rows: Rows, clusters: Clusters | None = None) -> dict[str, float]:
    """On how many independent rows (or groups of even size) the figures of each dataset rest."""
    return {
        part.key: effective_units(groups_of(clusters, part.members_M, rows), len(part.members_M))
        for part in parts(rows)
    }


def mean_interval(values_M: Floats, *, resamples: int, seed: int = 0) -> Interval | None:
    """The 95 % percentile interval of the mean of independent values; None of a single one."""
    size, rng = len(values_M), np.random.default_rng(seed)
    means = []
    for start in range(0, resamples, block := max(1, _DRAWS_AT_ONCE // size)):
        draws = rng.multinomial(size, np.full(size, 1 / size), min(block, resamples - start))
        means.append(draws @ values_M / size)
    means_R = np.concatenate(means)
    return interval(means_R, [(variance(means_R), size)])


def student_interval(values: Sequence[float]) -> Interval | None:
    """mean +- t_{0.975, K-1} sd / sqrt(K) of K values; None of fewer than two."""
    if len(values) < 2:
        return None
    half = student_reach(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def student_of(difference: float, error: float, freedom: float) -> Interval:
    """The 95 % interval of a difference of two scores with a standard error, within [-1, 1]."""
    half = student_reach(freedom) * error
    return max(-1.0, difference - half), min(1.0, difference + half)


@lru_cache(maxsize=1024)
def student_reach(freedom: float) -> float:
    """How many standard errors a 95 % interval reaches to either side: where `student_p` is 1 - LEVEL, by bisection.

    NaN of no degree of freedom, of which nothing can be said."""
    if not freedom > 0:
        return math.nan
    low, high = 0.0, 2.0
    while student_p(high, freedom) > 1 - LEVEL:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if student_p(middle, freedom) > 1 - LEVEL else (low, middle)
    return middle


def student_p(t: float, freedom: float) -> float:
    """The two-sided p-value of Student's t: the incomplete beta function I_x(freedom / 2, 1 / 2), x = f / (f + t^2).

    NaN where t is, and of no degree of freedom."""
    if math.isnan(t) or not freedom > 0:
        return math.nan
    if freedom > 1e9:
        return 2 * NormalDist().cdf(-abs(t))
    square, half = t * t, freedom / 2
    if math.isinf(square):
        return 0.0
    x, rest = freedom / (freedom + square), square / (freedom + square)
    if x < (half + 1) / (half + 2.5):
        return min(1.0, _beta_share(x, rest, half, 0.5))
    return 1.0 - _beta_share(rest, x, 0.5, half)


def _beta_share(x: float, rest: float, a: float, b: float) -> float:
    """I_x(a, b) for x below its mean, with rest = 1 - x: the continued fraction of Abramowitz and Stegun 26.5.8, by
    Lentz's method. scipy has it, and is as large as everything else here without pyarrow."""
    if x == 0:
        return 0.0
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(rest)) / a
    whole, over, under, step = 1.0, 1.0, 0.0, 0
    while True:
        m = step // 2
        if step == 0:
            factor = 1.0
        elif step % 2:
            factor = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            factor = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        under = 1 / (1 + factor * under)
        over = 1 + factor / over
        whole *= over * under
        step += 1
        if abs(over * under - 1) < 1e-15:
            return front * (whole - 1)


# ------------------------------------------------------------------------------------------------------------ chance


class Chance(NamedTuple):
    """What can be reached without looking: per task, the mean over tasks, and per dataset."""

    tasks: dict[str, float | None]
    mean: float | None
    datasets: dict[str, float | None]


def chance(rows: Rows, *, resamples: int = CHANCE_RESAMPLES, seed: int = 0, published: bool = False) -> Chance:
    """The chance level of each dataset's task metric on these very targets; a task's is the mean of its datasets'.

    Of a dataset, the larger of (a) the expected score of answers drawn at random from the dataset's own label
    frequencies, independent of the row (mean of `resamples` simulations), and (b) the best score that one
    constant answer reaches (for weighted F1 the majority label; for mean weighted accuracy every label
    reaches 0.5). Free-form datasets have none here: cells do not hold their targets.
    """
    levels: dict[str, Floats] = {}
    for part in parts(rows, published):
        if part.key in rows.layout.multilabel:
            counts_T = np.bincount(part.cells_M, minlength=part.size)
            levels[part.key] = np.array([rows.multilabel(part.key)[2].blind(counts_T)])
        if part.key not in rows.layout.code:
            continue
        guesses = len(rows.layout.indices[rows.layout.code[part.key]]) + 1
        support_K = np.bincount(part.cells_M // guesses, minlength=guesses - 1)
        constant = np.zeros((guesses - 1, guesses - 1, guesses), dtype=np.int64)
        for label in range(guesses - 1):
            constant[label, :, label] = support_K
        random = np.zeros((resamples, guesses - 1, guesses), dtype=np.int64)
        rng = rng_of(seed, part.key)
        for label, count in enumerate(support_K):
            random[:, label, :-1] = rng.multinomial(count, support_K / support_K.sum(), size=resamples)
        blind = part.score(constant).max(keepdims=True), part.score(random).mean(keepdims=True)
        levels[part.key] = np.maximum(*blind)
    known = {key: level for key, level in levels.items() if not np.isnan(level[0])}
    tasks, mean = over_tasks(rows.layout, known)
    of_tasks = {rows.layout.taxonomy.dataset(key).task for key in levels}
    return Chance(
        {key: value(tasks[key]) if key in tasks else None for key in rows.layout.taxonomy.tasks if key in of_tasks},
        None if mean is None else value(mean),
        {key: value(level) for key, level in levels.items()},
    )


# ------------------------------------------------------------------------------------------------------------- tests


class Null(NamedTuple):
    """The differences that chance alone could give, with their probabilities; `exact` when they are all there are."""

    values: Floats
    weights: Floats
    exact: bool


def exchanged(
    columns: Sequence[tuple[Ints, int]],
    score_a: Scorer,
    score_b: Scorer,
    groups_M: Ints | None,
    draws: int,
    rng: np.random.Generator,
) -> Null:
    """The score of run b minus that of run a when every row (or group) may have its two answers exchanged.

    If the runs do not differ, which answer is whose is a coin's throw for each row: the differences over all exchanges
    are what chance gives. All are listed where they are few (rows of one kind are interchangeable), else `draws` are
    drawn. `columns` are the cells of a and of b [M] with their number; both runs number the same outcome alike.
    """
    size = columns[0][1]
    counts_TE, frequency_T = _types(columns, groups_M)
    a_TE, b_TE = counts_TE[:, :size], counts_TE[:, size:]
    total_a, total_b = frequency_T @ a_TE, frequency_T @ b_TE
    moving = (a_TE != b_TE).any(1)
    change_TE, frequency_T = (b_TE - a_TE)[moving], frequency_T[moving]
    shape = tuple((frequency_T + 1).tolist())
    exact = math.prod(shape) * size <= MAX_LISTED
    if exact:
        swapped_RT = np.indices(shape).reshape(len(shape), math.prod(shape)).T
        weights = np.ones(len(swapped_RT))
        for number, count in enumerate(frequency_T.tolist()):
            weights *= np.array([math.comb(count, k) for k in range(count + 1)])[swapped_RT[:, number]] / 2.0**count
    else:
        swapped_RT = rng.binomial(frequency_T, 0.5, size=(draws, len(frequency_T)))
        weights = np.full(draws, 1 / draws)
    moved_RE = swapped_RT @ change_TE
    return Null(score_b(total_b - moved_RE) - score_a(total_a + moved_RE), weights, exact)


def permutation(observed: float, nulls: Sequence[tuple[float, Null]], draws: int, rng: np.random.Generator) -> float:
    """The two-sided p-value of `observed`, a sum of differences with the given shares and independent nulls.

    Exact where all nulls are and their sums are few enough to be listed, else (1 + hits) / (1 + draws).
    """
    slack = 1e-9
    if all(null.exact for _, null in nulls):
        sums, weights = np.zeros(1), np.ones(1)
        for share, null in nulls:
            values, of = _merged(share * null.values, null.weights)
            if len(sums) * len(values) > MAX_LISTED // 3:
                break
            sums, weights = _merged(np.add.outer(sums, values).ravel(), np.multiply.outer(weights, of).ravel())
        else:
            return min(1.0, float(weights[np.abs(sums) >= abs(observed) - slack].sum()))
    drawn = np.zeros(draws)
    for share, null in nulls:
        picked = rng.choice(len(null.values), draws, p=null.weights / null.weights.sum()) if null.exact else slice(None)
        drawn += share * null.values[picked]
    return float((1 + (np.abs(drawn) >= abs(observed) - slack).sum()) / (1 + draws))


def _merged(values: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Equal values once, with the sum of their weights."""
    found, inverse = np.unique(values.round(12), return_inverse=True)
    return found, np.bincount(inverse.reshape(-1), weights, minlength=len(found)).astype(float)


def bootstrap_p(drawn_R: Floats) -> float:
    """2 min(P(d <= 0), P(d >= 0)) over resampled differences with one added to both counts, at most 1."""
    below, above = int((drawn_R <= 0).sum()) + 1, int((drawn_R >= 0).sum()) + 1
    return min(1.0, 2 * min(below, above) / (drawn_R.size + 1))


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided McNemar p-value of the rows that changed sides: 2 P(X <= min) for X ~ Bin(n, 1/2), at most 1."""
    changed, fewer = gained + lost, min(gained, lost)
    ways = once = 1
    for row in range(fewer):
        once = once * (changed - row) // (row + 1)
        ways += once
    return min(1.0, 2 * ways / 2**changed) if changed else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the j-th smallest of m is multiplied by m - j + 1, made monotone, at most 1."""
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected
