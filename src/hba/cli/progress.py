"""A progress bar on standard error for work that can be counted."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hba.evaluate.tally import Tally
    from hba.remote.cost import Meter

OnProgress = Callable[[int, int], None]


@contextmanager
def counted(description: str) -> Iterator[OnProgress]:
    """A bar; call the yielded function with (done, total)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    silent = os.environ.get("RANK", "0") != "0"  # one bar, although a launcher runs the command on several ranks
    with Progress(*columns, console=Console(stderr=True), disable=silent) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def tallied(description: str, *, shown: bool = True) -> Iterator[Callable[[Tally], None]]:
    """A bar of predictions with their failures, cost, speed and time left; call the yielded function with a tally."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    started = monotonic()

    class Facts(ProgressColumn):
        """Read at each refresh, so that it says what is waited for while nothing comes."""

        def render(self, task: Task) -> Text:
            tally: Tally | None = task.fields["tally"]
            return Text("" if tally is None else tally_facts(tally, monotonic() - started))

    with Progress(*columns[:3], Facts(), columns[3], console=Console(stderr=True), disable=not shown) as bar:
        task = None

        def show(tally: Tally) -> None:
            nonlocal task
            if task is None:  # what an earlier session did is no part of this one's speed
                task = bar.add_task(description, total=tally.total, completed=tally.done - tally.fresh, tally=tally)
            bar.update(task, completed=tally.done, total=tally.total)

        yield show


def tally_facts(tally: Tally, seconds: float) -> str:
    """Failures, cost and speed in a few words; what is unknown is said so."""
    facts = [tally.meter.trouble] if tally.meter is not None and tally.meter.trouble else []
    facts += [f"{tally.failed:,} failed"] if tally.failed else []
    facts += [f"{tally.unanswered.total():,} without an answer"] if tally.unanswered else []
    facts += [f"{tally.quarantined:,} left out"] if tally.quarantined else []
    facts += [f"{tally.endings.n_cut:,} cut off"] if tally.endings.n_cut else []
    facts += [] if tally.meter is None else [tally_cost(tally.meter)]
    if tally.tokens_in + tally.tokens_out:
        facts.append(f"{(tally.tokens_in + tally.tokens_out) / max(seconds, 1e-3):,.0f} tokens/s")
    return " · ".join(facts)


def tally_cost(meter: Meter) -> str:
    """What was spent in this session, in dollars; 'cost unknown' without a price or token counts."""
    return "cost unknown" if meter.cost_usd is None else f"${meter.cost_usd:,.2f}"
