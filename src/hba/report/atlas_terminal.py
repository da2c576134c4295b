"""What `hba atlas validate` and `hba atlas info` print: tables and small bar charts for the terminal.

Every text of an atlas is printed as it is, never read as rich markup, and without control characters that a terminal
would obey.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.bar import Bar
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from hba.atlas.histogram import Seconds
from hba.atlas.info import AtlasInfo, Durations, summary
from hba.atlas.validate import Validation
from hba.report.atlas_page import counted
from hba.report.counts import size, span
from hba.report.words import count, plural

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
