"""Training stages side by side: the score of each, and its difference from the stage before with an interval.

`stages.json` lies in the run folder of the last stage; the terminal and the page show the same `Stages`. A difference
counts as sure when Holm's correction over the tasks leaves it below 5 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from hba.errors import InputError
from hba.evaluate.compare import Difference
from hba.evaluate.statistics import EXACT_MATCH
from hba.report.words import DASH, count, figure, interval, metric_name
from hba.storage import read_json, write_json

if TYPE_CHECKING:
    from hba.evaluate.compare import Comparison

FILE = "stages.json"
LEVEL = 0.05


@dataclass(frozen=True, kw_only=True)
class Step:
    """One task in one stage; the difference is from the stage before, None in the first. Scores are in [0, 1]."""

    score: float | None
    difference: float | None = None
    ci95: tuple[float, float] | None = None
    p_value: float | None = None
    same: bool = False

    @property
    def sure(self) -> bool:
        """Whether the difference is significant."""
        return self.p_value is not None and self.p_value < LEVEL and bool(self.difference)

    @property
    def text(self) -> str:
        """The difference for people: '=' where no sample changed."""
        if self.same:
            return "="
        return DASH if self.difference is None else f"{self.difference:+.3f} ({interval(self.ci95, 2)})"


@dataclass(frozen=True, kw_only=True)
class Stages:
    """The stages in their order; a row for each task by its name, the mean over tasks last."""

    names: tuple[str, ...]
    rows: dict[str, tuple[Step, ...]]
    num_rows: int


def stages(found: Sequence[Comparison]) -> Stages:
    """The columns of a chain of comparisons, each of a run with the next."""
    rows = {}
    for key, first in found[0].paired.tasks.items():
        name = f"{key} ({metric_name(first.metric)})" if first.metric == EXACT_MATCH else key
        lines = [each.paired.tasks[key] for each in found]
        rows[name] = (Step(score=first.a), *(_step(line, line.p_holm) for line in lines))
    means = [each.paired.mean for each in found]
    if means[0] is not None:
        rows["mean over tasks"] = (Step(score=means[0].a), *(_step(m, m.p_value) for m in means if m is not None))
    return Stages(names=(found[0].a, *(each.b for each in found)), rows=rows, num_rows=found[0].num_rows)


def _step(line: Difference, p_value: float | None) -> Step:
    same = line.difference == 0 and line.gained == line.lost == 0
    return Step(score=line.b, difference=line.difference, ci95=line.ci95, p_value=p_value, same=same)


def write_stages(found: Stages, run: Path) -> None:
    """Write stages.json into the run folder."""
    write_json(run / FILE, asdict(found))


def read_stages(run: Path) -> Stages | None:
    """stages.json of a run folder, None without one. Raises InputError when it is malformed."""
    path = run / FILE
    if not path.is_file():
        return None
    record = read_json(path)
    try:
        rows = {name: tuple(map(_read_step, steps)) for name, steps in record["rows"].items()}
        return Stages(names=tuple(record["names"]), rows=rows, num_rows=int(record["num_rows"]))
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        fix = "Run `hba demo` again, or remove the file."
        raise InputError("not the stages of a run", where=str(path), fix=fix) from None


def _read_step(record: dict[str, Any]) -> Step:
    reach = record["ci95"]
    return Step(**{**record, "ci95": None if reach is None else (float(reach[0]), float(reach[1]))})


def stages_table(found: Stages) -> Table:
    """One column a stage, each but the first with its difference; a sure one is coloured."""
    title = f"Stage by stage; {count(found.num_rows)} common rows, differences with their 95% intervals"
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("task", overflow="fold")
    for number, name in enumerate(found.names):
        table.add_column(name, justify="right", no_wrap=True)
        if number:
            table.add_column("difference", justify="right", no_wrap=True)
    for name, (first, *later) in found.rows.items():
        cells = [Text(figure(first.score))]
        for step in later:
            style = ("green" if (step.difference or 0) > 0 else "red") if step.sure else ""
            cells += [Text(figure(step.score)), Text(step.text, style=style)]
        table.add_row(Text(name), *cells)
    return table
