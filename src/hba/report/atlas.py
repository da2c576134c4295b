"""What `hba atlas validate` and `hba atlas info` show: one self-contained HTML file each, and tables for the terminal.

Like a report they load nothing, run no script and escape every text of the atlas. The same result gives the same
bytes: no time and no machine stands on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from hba.atlas.info import NO_TASK, AtlasInfo, Seconds, histogram, summary
from hba.atlas.scan import CODES, LEVELS
from hba.atlas.validate import MediaSummary, Validation
from hba.environment import hba_version
from hba.report import charts, words
from hba.report.charts import Chart, stacked
from hba.report.tables import Cell, Row, Table
from hba.report.words import count, plural, size, span
from hba.storage import write_data
from hba.taxonomy import CARE

if TYPE_CHECKING:
    from rich.console import RenderableType

MAX_FINDINGS = 200  # of one code on the page; validate.json has them all
MAX_PER_CODE = 5  # in the terminal
MAX_KINDS = 3
TERMS = ("dataset", "licence", "who may use it", "consent", "source")
TITLES = {"audios": "Sounds by length", "videos": "Clips by length"}
STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}


# --- a validation -----------------------------------------------------------------------------------------------------


def write_validation(result: Validation, path: Path) -> None:
    """Write the page of a validation to `path`. Raises StorageError when the disk refuses."""
    write_data(path, render_validation(result))


def render_validation(result: Validation) -> str:
    """The page of a validation as text."""
    media = result.media.values()
    largest = max(result.signatures.values(), default=0)
    return words.page(
        "validate.html.jinja",
        name=result.root.resolve().name,
        result=result,
        said=counted(result),
        meanings=CODES,
        max_rows=MAX_FINDINGS,
        num_rows=sum(result.rows.values()),
        num_bad=sum(result.bad_rows.values()),
        num_files=sum(entry.num_files for entry in media),
        num_refused=sum(entry.num_refused for entry in media),
        num_bytes=sum(entry.num_bytes for entry in media),
        signature_bars={
            key: stacked({"rows": count}, largest=largest, name=key) for key, count in result.signatures.items()
        },
        kinds={field: _kinds(entry) for field, entry in result.media.items()},
        lengths=[
            Chart(TITLES[field], plural(len(entry.lengths), "file"), _lengths_drawn(entry.lengths, TITLES[field]))
            for field, entry in result.media.items()
            if len(entry.lengths)
        ],
        version=hba_version(),
    )


def counted(result: Validation) -> str:
    """'2 errors and 1 warning'."""
    levels = [plural(result.count(level), level) for level in LEVELS if result.count(level)]
    return " and ".join([", ".join(levels[:-1]), levels[-1]] if len(levels) > 1 else levels)


def _kinds(entry: MediaSummary) -> str:
    """The sample rates or sizes of a field's files, the most frequent first."""
    found: Mapping[str, int] = entry.sample_rates or entry.sizes
    named = [f"{kind} ({number:,})" if len(found) > 1 else kind for kind, number in found.items()]
    more = f" and {len(named) - MAX_KINDS:,} more" if len(named) > MAX_KINDS else ""
    return ", ".join(named[:MAX_KINDS]) + more


def _lengths_drawn(seconds: Sequence[float] | Seconds, title: str) -> Markup:
    shape = histogram(np.asarray(seconds, np.float64))
    label = f"{title}, from {span(min(seconds))} to {span(max(seconds))}"
    return charts.histogram(shape.edges, shape.counts, text=span, label=label)


def show_validation(result: Validation) -> Iterator[RenderableType]:
    """The media, the findings (the first few of each code), and the verdict last, where the eye is."""
    from rich.text import Text

    if result.media:
        media = [
            (field, count(entry.num_files), Cell(count(entry.num_refused), "bold red" if entry.num_refused else ""),
             size(entry.num_bytes), span(entry.seconds) if entry.seconds else "")
            for field, entry in result.media.items()
        ]  # fmt: skip
        yield Table(title="Media", head=("field", "files", "refused", "stored", "length"), rows=media)
    if result.findings:
        rows: list[Row] = []
        for code, findings in result.codes().items():
            for finding in findings[:MAX_PER_CODE]:
                more = f" (and {plural(finding.num_places - 1, 'more row')})" if finding.num_places > 1 else ""
                rows.append((Cell(finding.level, STYLES[finding.level]), finding.where, finding.message + more))
            if len(findings) > MAX_PER_CODE:
                rows.append(("", "", Cell(f"and {len(findings) - MAX_PER_CODE:,} more", "dim")))
            fixes = dict.fromkeys(finding.fix for finding in findings[:MAX_PER_CODE])
            rows += [("", Cell(code, "dim"), Cell("Fix: " + " ".join(fixes), "dim")), ()]
        yield Table(title="Findings", head=("level", "where", "what"), rows=rows, align="l")
    files = sum(entry.num_files for entry in result.media.values())
    checked = f"{plural(sum(result.rows.values()), 'row')} and {plural(files, 'file')}"
    how = " Headers only: nothing was decoded." if result.quick else ""
    if not result.findings:
        yield Text(f"Nothing is wrong with {checked}.{how}", style="green")
    else:
        yield Text(f"{counted(result)} in {checked}.{how}", style="green" if result.ok else "bold red")


# --- what an atlas holds ----------------------------------------------------------------------------------------------


def write_info(info: AtlasInfo, path: Path) -> None:
    """Write the page of what an atlas holds to `path`. Raises StorageError when the disk refuses."""
    write_data(path, render_info(info))


def render_info(info: AtlasInfo) -> str:
    """The page of what an atlas holds as text."""
    durations = info.durations
    together = float(durations.all.sum()) if durations else 0.0
    lengths = []
    for name, values in sorted(durations.datasets.items()) if durations else ():
        said = summary(values)
        quantiles = [span(said[key]) for key in ("p5", "median", "p95", "longest")]
        lengths.append((name, [count(len(values)), span(float(values.sum())), *quantiles]))
    return words.page(
        "info.html.jinja",
        name=info.root.resolve().name,
        info=info,
        tasks=_bars(info, "tasks"),
        datasets=_bars(info, "datasets"),
        signatures=_bars(info, "signatures"),
        num_tasks=len(info.totals("tasks").keys() - {NO_TASK}),
        hours=span(together) if together else "",
        histogram=_lengths_drawn(durations.all, "Rows by duration") if durations and together else None,
        lengths=lengths,
        heads=TERMS,
        terms=terms(info),
        care=CARE if mental_health(info) else "",
        version=hba_version(),
    )


def terms(info: AtlasInfo) -> list[tuple[str, ...]]:
    """Each dataset that is there with its `TERMS`, as its source states them. Generated data have none."""
    there = [] if info.synthetic else [info.taxonomy.datasets[name] for name in sorted(info.totals("datasets"))]
    return [(each.key, each.licence, each.users, each.consent, each.source) for each in there]


def mental_health(info: AtlasInfo) -> bool:
    """Whether some of the rows have labels of mental health."""
    return any(info.taxonomy.datasets[name].mental_health for name in info.totals("datasets"))


def _bars(info: AtlasInfo, kind: str) -> list[dict[str, Any]]:
    """The lines of a chart of counts: `key` (a short name in front, '' for none), `name`, `task`, `count` and `svg`."""
    totals, taxonomy = info.totals(kind), info.taxonomy
    largest = max(totals.values(), default=0)
    made = []
    for name, number in totals.items():
        said = name.replace("_", " + ") if kind == "signatures" else name
        if kind == "tasks" and name in taxonomy.tasks:
            said = taxonomy.tasks[name].name
        dataset = taxonomy.datasets.get(name) if kind == "datasets" else None
        parts = {split.name: getattr(split, kind).get(name, 0) for split in info.splits}
        made.append(
            {
                "key": name if kind == "tasks" and name != NO_TASK else "",
                "name": said,
                "task": (dataset.task or "") if dataset else "",
                "count": number,
                "svg": stacked(parts, largest=largest, name=name),
            }
        )
    return made


def show_info(info: AtlasInfo) -> Iterator[RenderableType]:
    """Rows by split, then tasks, modalities, datasets with their labels, and durations where they are known."""
    from rich.text import Text

    yield Text(f"{plural(info.rows, 'row')}: " + ", ".join(f"{s.name} {s.rows:,}" for s in info.splits))
    for title, kind in (("Tasks", "tasks"), ("Modalities", "signatures"), ("Datasets", "datasets")):
        totals = info.totals(kind)
        largest = max(totals.values(), default=1) or 1
        rows: list[Row] = [
            (name, *(count(getattr(s, kind).get(name, 0)) for s in info.splits), count(total), total / largest)
            for name, total in totals.items()
        ]
        head = (kind.removesuffix("s"), *(split.name for split in info.splits), "rows", "")
        yield Table(title=title, head=head, rows=rows, align="l" + "r" * (len(head) - 2) + "b")
    labels = [(name, ", ".join(f"{x} {n:,}" for x, n in found.items())) for name, found in info.labels().items()]
    yield Table(title="Labels", head=("dataset", "labels"), rows=labels, align="l")
    if told := terms(info):
        notes = ["As the sources' own pages state; unknown is unknown, not free: docs/licences.md."]
        rows = [
            (name if what == TERMS[1] else "", what, text)
            for name, *said in told
            for what, text in zip(TERMS[1:], said, strict=True)
        ]
        yield Table(title="Licences", head=("dataset", "of it", "as stated"), rows=rows, align="l", warnings=notes)
    if mental_health(info):
        yield Text(CARE, style="bold")
    if info.durations is None:
        return
    shape = info.durations.histogram()
    longest = max(shape.counts, default=1) or 1
    bins = [(span(edge), count(n), n / longest) for edge, n in zip(shape.edges, shape.counts, strict=False)]
    yield Table(title="Durations", head=("from", "rows", ""), rows=bins, align="rrb")
    rows = []
    for name, values in {**dict(sorted(info.durations.datasets.items())), "all": info.durations.all}.items():
        said = summary(values)
        texts = [span(said[key]) if key in said else "" for key in ("p5", "median", "p95", "longest")]
        rows.append((name, count(int(said["rows"])), f"{said.get('hours', 0):.2f}", *texts))
    unknown = info.durations.unknown
    left_out = [f"{plural(unknown, 'row')} with a medium of unknown length left out"] if unknown else []
    head = ("dataset", "rows", "hours", "5 %", "median", "95 %", "longest")
    yield Table(title="Durations by dataset", head=head, rows=rows, warnings=left_out)
