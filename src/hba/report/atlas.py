"""What `hba atlas validate` and `hba atlas info` show: one self-contained HTML file each, and tables for the terminal.

Like a report they load nothing, run no script and escape every text of the atlas. The same result gives the same
bytes: no time and no machine stands on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from rich.bar import Bar
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from hba.atlas.info import NO_TASK, AtlasInfo, Durations, Seconds, histogram, summary
from hba.atlas.scan import CODES, LEVELS
from hba.atlas.validate import MediaSummary, Validation
from hba.environment import hba_version
from hba.report import charts, words
from hba.report.charts import Part, size, span, stacked
from hba.report.html import environment, style
from hba.report.words import count, plural
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
class LabelBar:
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
    return charts.histogram(shape.edges, shape.counts, text=span, label=label)


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


def _bars(info: AtlasInfo, kind: str) -> list[LabelBar]:
    totals = info.totals(kind)
    largest = max(totals.values(), default=0)
    made = []
    for name, number in totals.items():
        parts = [Part(split.name, getattr(split, kind).get(name, 0), i) for i, split in enumerate(info.splits)]
        task = kind == "tasks" and name != NO_TASK
        dataset = info.taxonomy.datasets.get(name) if kind == "datasets" else None
        made.append(
            LabelBar(
                key=name if task else "",
                name=_said(info, kind, name),
                task=(dataset.task or "") if dataset else "",
                count=number,
                share=f"{100 * number / info.rows:.1f} %",
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


# What `hba atlas validate` and `hba atlas info` print: tables and small bar charts for the terminal.
#
# Every text of an atlas is printed as it is, never read as rich markup, and without control characters that a terminal
# would obey.


MAX_PER_CODE = 5
BAR_CELLS = 16
STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}


def show_validation(result: Validation) -> Iterator[RenderableType]:
    """The media, the findings (the first few of each code), and the verdict last, where the eye is."""
    if result.media:
        yield _media_table(result)
    if result.findings:
        yield _findings_table(result)
    yield _verdict(result)


def _media_table(result: Validation) -> Table:
    table = Table(title="Media", title_justify="left")
    table.add_column("field")
    for name in ("files", "refused", "stored", "length"):
        table.add_column(name, justify="right", no_wrap=True)
    for field, entry in result.media.items():
        length = span(entry.seconds) if entry.seconds else ""
        refused = Text(count(entry.num_refused), style="bold red" if entry.num_refused else "")
        table.add_row(field, count(entry.num_files), refused, size(entry.num_bytes), length)
    return table


def _findings_table(result: Validation) -> Table:
    table = Table(title="Findings", title_justify="left", show_lines=False)
    table.add_column("level", no_wrap=True)
    table.add_column("where", overflow="fold")
    table.add_column("what", overflow="fold")
    for code, findings in result.codes().items():
        for finding in findings[:MAX_PER_CODE]:
            more = f" (and {plural(finding.num_places - 1, 'more row')})" if finding.num_places > 1 else ""
            what = Text(_plain(finding.message + more))
            table.add_row(Text(finding.level, style=STYLES[finding.level]), Text(_plain(finding.where)), what)
        if len(findings) > MAX_PER_CODE:
            left = len(findings) - MAX_PER_CODE
            table.add_row("", "", Text(f"and {left:,} more", style="dim"))
        fixes = dict.fromkeys(finding.fix for finding in findings[:MAX_PER_CODE])
        table.add_row("", Text(code, style="dim"), Text(_plain("Fix: " + " ".join(fixes)), style="dim"))
        table.add_section()
    return table


def _verdict(result: Validation) -> Text:
    files = sum(entry.num_files for entry in result.media.values())
    checked = f"{plural(sum(result.rows.values()), 'row')} and {plural(files, 'file')}"
    how = " Headers only: nothing was decoded." if result.quick else ""
    if not result.findings:
        return Text(f"Nothing is wrong with {checked}.{how}", style="green")
    return Text(f"{counted(result)} in {checked}.{how}", style="green" if result.ok else "bold red")


def show_info(info: AtlasInfo) -> Iterator[RenderableType]:
    """Rows by split, then tasks, modalities, datasets with their labels, and durations where they are known."""
    yield Text(f"{plural(info.rows, 'row')}: " + ", ".join(f"{s.name} {s.rows:,}" for s in info.splits))
    for title, kind in (("Tasks", "tasks"), ("Modalities", "signatures"), ("Datasets", "datasets")):
        yield _counts_table(title, info, kind)
    yield _labels_table(info)
    if info.durations is not None:
        yield from _duration_tables(info.durations)


def _counts_table(title: str, info: AtlasInfo, kind: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(kind.removesuffix("s"), no_wrap=True)
    for split in info.splits:
        table.add_column(split.name, justify="right", no_wrap=True)
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("", max_width=BAR_CELLS)  # alone may shrink: a narrow terminal takes bars, never figures
    totals = info.totals(kind)
    largest = max(totals.values(), default=1)
    for name, total in totals.items():
        parts = [count(getattr(split, kind).get(name, 0)) for split in info.splits]
        table.add_row(Text(_plain(name)), *parts, count(total), _bar(total, largest))
    return table


def _labels_table(info: AtlasInfo) -> Table:
    table = Table(title="Labels", title_justify="left")
    table.add_column("dataset", overflow="fold")
    table.add_column("labels", overflow="fold")
    for dataset, labels in info.labels().items():
        table.add_row(Text(_plain(dataset)), Text(_plain(", ".join(f"{name} {n:,}" for name, n in labels.items()))))
    return table


def _duration_tables(durations: Durations) -> Iterator[Table]:
    shape = durations.histogram()
    table = Table(title="Durations", title_justify="left")
    table.add_column("from", justify="right")
    table.add_column("rows", justify="right")
    table.add_column("", max_width=BAR_CELLS)
    for edge, number in zip(shape.edges, shape.counts, strict=False):
        table.add_row(span(edge), count(number), _bar(number, max(shape.counts)))
    yield table
    yield _lengths_table({**dict(sorted(durations.datasets.items())), "all": durations.all}, durations.unknown)


def _lengths_table(lengths: Mapping[str, Seconds], unknown: int) -> Table:
    caption = f"{plural(unknown, 'row')} with a medium of unknown length left out" if unknown else None
    table = Table(title="Durations by dataset", title_justify="left", caption=caption)
    table.add_column("dataset", overflow="fold")
    for name in ("rows", "hours", "5 %", "median", "95 %", "longest"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, values in lengths.items():
        said = summary(values)
        texts = [span(said[key]) for key in ("p5", "median", "p95", "longest") if key in said]
        table.add_row(Text(_plain(name)), count(int(said["rows"])), f"{said.get('hours', 0):.2f}", *texts)
    return table


def _bar(number: int, largest: int) -> Bar:
    return Bar(largest or 1, 0, number, color="blue")


def _plain(text: str) -> str:
    return "".join(char if char.isprintable() else "\ufffd" for char in text)
