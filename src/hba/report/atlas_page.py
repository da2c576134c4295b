"""The pages of `hba atlas validate` and `hba atlas info`: one self-contained HTML file each, in the report's style.

Like a report they load nothing, run no script and escape every text of the atlas. The same result gives the same
bytes: no time and no machine stands on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from hba.atlas.findings import CODES, LEVELS
from hba.atlas.histogram import histogram
from hba.atlas.info import NO_TASK, AtlasInfo, Durations, summary
from hba.atlas.validate import MediaSummary, Validation
from hba.environment import hba_version
from hba.report import counts, words
from hba.report.counts import Part, size, span, stacked
from hba.report.html import environment, style
from hba.storage import atomic_write

MAX_FINDINGS = 200  # of one code on the page; validate.json has them all
MAX_KINDS = 3
TITLES = {"audios": "Sounds by length", "videos": "Clips by length"}


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawn chart with its caption."""

    title: str
    note: str
    svg: Markup


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One line of a chart of counts. `key` is a short name in front, '' for none; `share` is of all rows."""

    key: str
    name: str
    task: str
    count: int
    share: str
    svg: Markup


@dataclass(frozen=True, kw_only=True)
class Label:
    """A label of a dataset with its share of the dataset's rows."""

    name: str
    count: int
    percent: float


@dataclass(frozen=True, kw_only=True)
class LabelCard:
    """The labels of one dataset."""

    name: str
    count: int
    entries: tuple[Label, ...]


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """How long the rows of a dataset last, put into words: together, 5 %, median, 95 %, longest."""

    name: str
    rows: int
    texts: tuple[str, ...]


def write_validation(result: Validation, path: Path) -> Path:
    """Write the page of a validation to `path` and return it. Raises StorageError when the disk refuses."""
    return _write(path, render_validation(result))


def write_info(info: AtlasInfo, path: Path) -> Path:
    """Write the page of what an atlas holds to `path` and return it. Raises StorageError when the disk refuses."""
    return _write(path, render_info(info))


def _write(path: Path, html: str) -> Path:
    with atomic_write(path) as handle:
        handle.write(html)
    return path


def render_validation(result: Validation) -> str:
    """The page of a validation as text."""
    media = result.media.values()
    largest = max(result.signatures.values(), default=0)
    return (
        environment()
        .get_template("validate.html.jinja")
        .render(
            style=style("style.css", "atlas.css"),
            name=_name(result.root),
            result=result,
            said=counted(result),
            codes=result.codes(),
            meanings=CODES,
            max_rows=MAX_FINDINGS,
            num_rows=sum(result.rows.values()),
            num_bad=sum(result.bad_rows.values()),
            num_files=sum(entry.num_files for entry in media),
            num_refused=sum(entry.num_refused for entry in media),
            num_bytes=sum(entry.num_bytes for entry in media),
            signature_bars={
                key: stacked([Part("rows", count, 0)], largest=largest, name=key)
                for key, count in result.signatures.items()
            },
            kinds={field: _kinds(entry) for field, entry in result.media.items()},
            lengths=[
                _length_chart(TITLES[field], entry) for field, entry in result.media.items() if len(entry.lengths)
            ],
            size=size,
            span=span,
            version=hba_version(),
        )
    )


def counted(result: Validation) -> str:
    """'2 errors and 1 warning'."""
    levels = [words.plural(result.count(level), level) for level in LEVELS if result.count(level)]
    return " and ".join([", ".join(levels[:-1]), levels[-1]] if len(levels) > 1 else levels)


def _name(root: Path) -> str:
    return root.resolve().name


def _kinds(entry: MediaSummary) -> str:
    """The sample rates or sizes of a field's files, the most frequent first."""
    found: Mapping[str, int] = entry.sample_rates or entry.sizes
    named = [f"{kind} ({number:,})" if len(found) > 1 else kind for kind, number in found.items()]
    more = f" and {len(named) - MAX_KINDS:,} more" if len(named) > MAX_KINDS else ""
    return ", ".join(named[:MAX_KINDS]) + more


def _length_chart(title: str, entry: MediaSummary) -> Chart:
    return Chart(title=title, note=words.plural(len(entry.lengths), "file"), svg=_drawn(entry.lengths, title))


def _drawn(seconds: Sequence[float], title: str) -> Markup:
    import numpy as np

    shape = histogram(np.asarray(seconds, np.float64))
    label = f"{title}, from {span(min(seconds))} to {span(max(seconds))}"
    return counts.histogram(shape.edges, shape.counts, text=span, label=label)


def render_info(info: AtlasInfo) -> str:
    """The page of what an atlas holds as text."""
    tasks = _bars(info, "tasks")
    durations = info.durations
    together = float(durations.all.sum()) if durations else 0.0
    return (
        environment()
        .get_template("info.html.jinja")
        .render(
            style=style("style.css", "atlas.css"),
            name=_name(info.root),
            info=info,
            tasks=tasks,
            num_tasks=sum(entry.key != "" for entry in tasks),
            datasets=_bars(info, "datasets"),
            num_datasets=len(info.totals("datasets")),
            signatures=_bars(info, "signatures"),
            labels=[_label_card(name, labels) for name, labels in info.labels().items()],
            durations=durations,
            hours=span(together) if together else "",
            histogram=_drawn(durations.all.tolist(), "Rows by duration") if durations and together else None,
            lengths=_lengths(durations) if durations else [],
            version=hba_version(),
        )
    )


def _bars(info: AtlasInfo, kind: str) -> list[Bar]:
    totals = info.totals(kind)
    largest = max(totals.values(), default=0)
    made = []
    for name, count in totals.items():
        parts = [Part(split.name, getattr(split, kind).get(name, 0), i) for i, split in enumerate(info.splits)]
        task = kind == "tasks" and name != NO_TASK
        dataset = info.taxonomy.datasets.get(name) if kind == "datasets" else None
        made.append(
            Bar(
                key=name if task else "",
                name=_said(info, kind, name),
                task=(dataset.task or "") if dataset else "",
                count=count,
                share=f"{100 * count / info.rows:.1f} %",
                svg=stacked(parts, largest=largest, name=name),
            )
        )
    return made


def _said(info: AtlasInfo, kind: str, name: str) -> str:
    """The name of a task in words, a signature with its modalities apart, anything else as it is."""
    if kind == "tasks" and name in info.taxonomy.tasks:
        return info.taxonomy.tasks[name].name
    return name.replace("_", " + ") if kind == "signatures" else name


def _label_card(name: str, labels: Mapping[str, int]) -> LabelCard:
    total = sum(labels.values())
    entries = tuple(Label(name=label, count=count, percent=100 * count / total) for label, count in labels.items())
    return LabelCard(name=name, count=total, entries=entries)


def _lengths(durations: Durations) -> list[Lengths]:
    made = []
    for name, values in sorted(durations.datasets.items()):
        said = summary(values)
        texts = tuple(span(said[key]) for key in ("p5", "median", "p95", "longest"))
        made.append(Lengths(name=name, rows=len(values), texts=(span(float(values.sum())), *texts)))
    return made
