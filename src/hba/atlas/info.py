"""`hba atlas info`: what an atlas holds, by dataset, task, label, modality and split, and how long its clips last.

Counts come from the columns of an opened atlas; no medium is touched and 100,000 rows take about a second. Durations
need the headers of all sounds and clips: they are read in parallel and remembered, and nothing is decoded. A row lasts
as long as its sounds together or its clips together, whichever is more. A medium without a known length is counted.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hba.atlas import Atlas, open_atlas
from hba.atlas.names import HubId, hub_id_of, parse_split, present_splits
from hba.atlas.probe import Facts, locate, survey
from hba.atlas.rows import count_codes
from hba.atlas.scan import Catalogue, read_catalogue
from hba.environment import hba_version
from hba.errors import InputError
from hba.taxonomy import Taxonomy

# Bins for a histogram of lengths: a dozen, with edges that people would choose, and every value in one of them.


Seconds = npt.NDArray[np.float64]

LOG_STEPS = (1.0, 2.0, 5.0)
MAX_RATIO = 30.0  # of the longest to the shortest: beyond it, bins grow with the length
NUM_BINS = 12


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """`counts[i]` values lie from `edges[i]` up to `edges[i + 1]` (in the last bin, up to and with it)."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


def histogram(values: Seconds) -> Histogram:
    """About a dozen bins with round edges: equal ones, or growing ones when lengths differ a lot. In seconds."""
    if len(values) == 0:
        return Histogram(edges=(), counts=())
    low, high = float(values.min()), float(values.max())
    edges = _growing(low, high) if high > MAX_RATIO * low else _equal(low, high)
    counts, _ = np.histogram(values, edges)
    return Histogram(edges=tuple(edges), counts=tuple(counts.tolist()))


def _growing(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(max(low, 0.1))), math.ceil(math.log10(high)) + 1)
    steps = [0.0, *(round(step * 10.0**power, 6) for power in powers for step in LOG_STEPS)]
    first = max(i for i, edge in enumerate(steps) if edge <= low)
    last = next(i for i, edge in enumerate(steps) if edge >= high)
    return steps[first : max(last, first + 1) + 1]


def _equal(low: float, high: float) -> list[float]:
    rough = max((high - low) / NUM_BINS, 1e-3)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 6) for i in range(first, max(last, first + 1) + 1)]


# --- what an atlas holds ----------------------------------------------------------------------------------------------


Counts = dict[str, int]

NO_TASK = "no task"


@dataclass(frozen=True, kw_only=True)
class SplitCounts:
    """The rows of one split (or a slice of one), counted."""

    name: str
    rows: int
    datasets: Counts
    tasks: Counts
    signatures: Counts
    labels: Mapping[str, Counts]
    """by dataset; free-form datasets have none"""


@dataclass(frozen=True, kw_only=True)
class Durations:
    """How long rows with media last, in seconds; `unknown` of them have a medium without a known length."""

    datasets: Mapping[str, Seconds]
    unknown: int

    @property
    def all(self) -> Seconds:
        """Of every row, ascending."""
        return np.sort(np.concatenate([*self.datasets.values(), np.zeros(0)]))

    def histogram(self) -> Histogram:
        """Over all rows."""
        return histogram(self.all)


@dataclass(frozen=True, kw_only=True)
class AtlasInfo:
    """What an atlas holds; `durations` None where they were not asked for."""

    root: Path
    synthetic: bool
    taxonomy: Taxonomy
    splits: tuple[SplitCounts, ...]
    durations: Durations | None

    @property
    def rows(self) -> int:
        """Of all splits."""
        return sum(split.rows for split in self.splits)

    def totals(self, kind: str) -> Counts:
        """`kind` (datasets, tasks or signatures) over all splits, the most frequent first."""
        total: Counter[str] = Counter()
        for split in self.splits:
            total.update(getattr(split, kind))
        return dict(sorted(total.items(), key=lambda entry: (-entry[1], entry[0])))

    def labels(self) -> dict[str, Counts]:
        """By dataset, over all splits, in the order of the class space."""
        total: dict[str, Counter[str]] = {}
        for split in self.splits:
            for dataset, labels in split.labels.items():
                total.setdefault(dataset, Counter()).update(labels)
        return {dataset: dict(labels) for dataset, labels in sorted(total.items())}

    def to_json(self) -> dict[str, Any]:
        """As --json prints it."""
        splits = {split.name: asdict(split) for split in self.splits}
        for split in splits.values():
            del split["name"]
        made: dict[str, Any] = {
            "hba_version": hba_version(),
            "root": str(self.root),
            "synthetic": self.synthetic,
            "rows": self.rows,
            "splits": splits,
        }
        if self.durations is not None:
            shape = self.durations.histogram()
            made["durations"] = {
                "all": summary(self.durations.all),
                "datasets": {name: summary(values) for name, values in sorted(self.durations.datasets.items())},
                "unknown": self.durations.unknown,
                "histogram": {"edges": list(shape.edges), "counts": list(shape.counts)},
            }
        return made


def atlas_info(
    path: str | Path,
    *,
    splits: Sequence[str] | None = None,
    durations: bool = False,
    cache: Path | None = None,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> AtlasInfo:
    """Count the rows of the atlas at `path`; `splits` None takes all that are there, slices work for counts.

    `durations` reads the headers of all sounds and clips with `workers` processes and remembers them in the folder
    `cache`; `progress(done, total)` is told of each. Of a dataset on the hub the rows are fetched, and for durations
    everything. Raises InputError as `open_atlas` does, for a bad row too, and
    for durations of a slice.
    """
    hub_id = hub_id_of(path)
    if hub_id is not None and durations:
        from hba.atlas.hub import local_copy  # the hub's client takes as long to load as a small atlas to open

        path = local_copy(hub_id, splits, progress)
        hub_id = None
    specs = tuple(dict.fromkeys(splits or splits_at(path)))
    opened = [_open_rows(path, hub_id, spec) for spec in specs]
    path, lasting = Path(path), None
    if durations:
        catalogue = read_catalogue(path, specs, None)
        lengths: dict[str, list[float]] = {}
        unknown = 0
        for dataset, seconds in _timed(catalogue, cache=cache, workers=workers, progress=progress):
            if seconds is None:
                unknown += 1
            elif seconds > 0:
                lengths.setdefault(dataset, []).append(seconds)
        lasting = Durations(datasets={name: np.sort(values) for name, values in lengths.items()}, unknown=unknown)
    return AtlasInfo(
        root=path,
        synthetic=any(atlas.synthetic for atlas in opened),
        taxonomy=opened[0].taxonomy,
        splits=tuple(_count(atlas, spec) for spec, atlas in zip(specs, opened, strict=True)),
        durations=lasting,
    )


def splits_at(path: str | Path) -> Sequence[str]:
    """The splits of the atlas at `path`, a folder, a file or a dataset on the hub. Raises InputError without any."""
    hub_id = hub_id_of(path)
    if hub_id is None:
        return present_splits(Path(path))
    from hba.atlas.hub import splits_of
    from hba.atlas.hub_client import list_repo  # takes as long to load as a small atlas to open

    return splits_of(list_repo(hub_id).names)


def _open_rows(path: str | Path, hub_id: HubId | None, spec: str) -> Atlas:
    """The rows of a split; of a dataset on the hub nothing else is fetched."""
    if hub_id is None:
        return open_atlas(path, spec)
    from hba.atlas.hub import open_rows

    wanted = parse_split(spec)
    store = open_rows(hub_id, wanted)
    return Atlas(store, np.array(wanted.rows(len(store)), np.int64))


def _count(atlas: Atlas, name: str) -> SplitCounts:
    columns = atlas.columns
    return SplitCounts(
        name=name,
        rows=len(atlas),
        datasets=count_codes(columns.dataset_codes, columns.datasets),
        tasks=count_codes(columns.task_codes, [task or NO_TASK for task in columns.tasks]),
        signatures=count_codes(columns.signature_codes, columns.signatures),
        labels=columns.labels(atlas.taxonomy.class_names),
    )


def row_seconds(path: Path, split: str, *, cache: Path) -> list[float | None]:
    """How long each row of a split lasts, in order: 0 without sounds and clips, None where a length is not known.

    Headers are remembered in the folder `cache`. Raises InputError for a bad row.
    """
    catalogue = read_catalogue(path, [split], None)
    for finding in catalogue.findings:
        if finding.level == "error":
            raise InputError(finding.message, where=finding.where, fix=finding.fix)
    return [seconds for _, seconds in _timed(catalogue, cache=cache, workers=1, progress=None)]


def _timed(
    catalogue: Catalogue, *, cache: Path | None, workers: int, progress: Callable[[int, int], None] | None
) -> Iterator[tuple[str, float | None]]:
    """The dataset and the length of every row."""
    media, _ = locate(catalogue)
    timed = [medium for medium in media if medium.field in ("audios", "videos")]
    name = hashlib.sha256(str(catalogue.root).encode()).hexdigest()[:16]
    log = None if cache is None else cache / f"headers-{name}.jsonl"
    outcomes = survey(timed, log=log, quick=True, workers=workers, progress=progress)
    for asked in catalogue.asked:
        total = {"audios": 0.0, "videos": 0.0}
        for number in asked.media:
            field = catalogue.uses[number].field
            if field in total:
                found = outcomes.get(number)
                seconds = found.seconds if isinstance(found, Facts) else None
                total[field] += math.nan if seconds is None else seconds
        yield asked.dataset, None if any(map(math.isnan, total.values())) else max(total.values())


def summary(values: Seconds) -> dict[str, float]:
    """Number of rows, total hours, and quantiles in seconds."""
    if len(values) == 0:
        return {"rows": 0}
    low, median, high = (round(float(q), 3) for q in np.quantile(values, (0.05, 0.5, 0.95)))
    hours, longest = round(float(values.sum()) / 3600, 4), round(float(values.max()), 3)
    return {"rows": len(values), "hours": hours, "p5": low, "median": median, "p95": high, "longest": longest}
