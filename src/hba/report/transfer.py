"""The transfer table: pretrained against not pretrained on each held-out dataset, beside the published figures."""

from __future__ import annotations

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from hba.report.words import figure, interval, metric_name
from hba.train.transfer import Scored, TransferResult

HEAD = ("dataset", "task", "metric", "n", "epochs", "pretrained", "direct", "difference", "p", "published †")
NOTE = "† pretrained / direct of the 7B models in the paper, quoted and not measured here"
SYNTHETIC = "Synthetic data: these figures say that the protocol runs, not what the atlas is worth."


def transfer_table(result: TransferResult) -> Group:
    """For the terminal."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for name in HEAD:
        table.add_column(name, overflow="fold")
    for cells in _rows(result):
        table.add_row(*map(Text, cells))
    return Group(table, *map(Text, _notes(result)))


def transfer_markdown(result: TransferResult) -> str:
    """A GitHub table with its notes."""
    lines = [HEAD, ["---"] * len(HEAD), *_rows(result)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return "\n\n".join([table, *_notes(result)]) + "\n"


def _rows(result: TransferResult) -> list[list[str]]:
    return [
        [
            row.dataset,
            row.task,
            metric_name(row.metric),
            str(row.n),
            str(row.epochs),
            _scored(row.pretrained),
            _scored(row.direct),
            _scored(row.difference),
            figure(row.p_value),
            " / ".join(figure(value) for value in row.published.values()) if row.published else figure(None),
        ]
        for row in result.rows
    ]


def _scored(scored: Scored) -> str:
    return f"{figure(scored.score)} ({interval(scored.ci95)})"


def _notes(result: TransferResult) -> list[str]:
    absent = [f"Not in this atlas: {', '.join(result.not_in_atlas)}."] if result.not_in_atlas else []
    return [NOTE, *absent, *([SYNTHETIC] if result.synthetic else [])]
