"""Options and progress that commands share, and the two ways in which each answers: for people and with --json."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hba.errors import InputError, nearest

if TYPE_CHECKING:
    from hba.evaluate.predictions import Tally
    from hba.remote.cost import Meter
    from hba.run import RunFolder
    from hba.train.state import Progress


JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Config values, such as train.epochs=2.")
]
ConfigOption = Annotated[
    str | None, typer.Option("--config", help="A YAML file, or the name of a bundled recipe such as sft or sft_tiny.")
]
AllowQuarantined = Annotated[
    int, typer.Option("--allow-quarantined", min=0, help="Exit 0 although up to so many samples were left out.")
]

BaseUrl = Annotated[
    str | None,
    typer.Option("--base-url", help="Server of a remote model, such as http://localhost:8000/v1 (remote.base_url)."),
]

RECIPES = Path(__file__).parent.parent / "recipes"


def recipe_path(name: str | None) -> Path | None:
    """The file that --config means: a path, or a bundled recipe. Raises InputError listing the recipes."""
    if name is None or Path(name).is_file():
        return None if name is None else Path(name)
    bundled = RECIPES / f"{name}.yaml"
    if not bundled.is_file():
        known = [path.stem for path in RECIPES.glob("*.yaml")]
        raise InputError(f"no config file or recipe {name!r}", where="--config", fix=nearest(name, known))
    return bundled


def served(base_url: str | None) -> list[str]:
    """The override that --base-url stands for."""
    return [] if base_url is None else [f"remote.base_url={json.dumps(base_url)}"]


def answer(result: dict[str, Any], *, as_json: bool, show: Callable[[], None], once: bool = True) -> None:
    """Print `result` as JSON, or call `show`; `once`, although a launcher runs the command on several ranks."""
    if once and os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        sys.stdout.write(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    else:
        show()


def say(text: str) -> None:
    """One line of rich markup on standard output."""
    from rich.console import Console

    Console(soft_wrap=True, highlight=False).print(text)


def say_written(files: Iterable[Path]) -> None:
    """One line a file that a command was asked to write."""
    for file in files:
        say(f"Wrote {bold(file)}.")


def say_beside(text: str) -> None:
    """One line on standard error, as it is."""
    sys.stderr.write(f"{text}\n")


def warn(text: str) -> None:
    """One line on standard error; once, although a launcher runs the command on several ranks."""
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"warning: {text}.\n")


def bold(value: object) -> str:
    """Rich markup for a path or name, whatever brackets it has."""
    from rich.markup import escape

    return f"[bold]{escape(str(value))}[/bold]"


@contextmanager
def training(run: Path, settings: Any, command: str) -> Iterator[RunFolder]:
    """The folder of a training run, made or resumed; says which it is, and how to choose another, before it trains."""
    from hba.train.state import training_run

    resumed = (run / "config.yaml").is_file()
    with training_run(run, config=settings, command=command, seed=settings.train.seed) as folder:
        if folder.is_main:
            state = "goes on with the run in it" if resumed else "new"
            sys.stderr.write(f"Run folder: {run} ({state}; --run chooses another).\n")
        yield folder


def trained(
    run: Path,
    progress: Progress,
    quarantined: Sequence[dict[str, Any]],
    allowed: int,
    *,
    as_json: bool,
    best: str = "validation mean",
    sign: int = 1,
) -> None:
    """The answer of every training command; `best` says what the best checkpoint is best in, `sign` which way."""
    shown = ("step", "samples_seen", "best_step", "best_score")
    result = {"run": str(run), **{name: getattr(progress, name) for name in shown}, "quarantined": len(quarantined)}
    text = f"Trained {progress.step} steps in {bold(run)}: best {best} "
    if progress.best_score is None:
        text = f"Trained {progress.step} steps in {bold(run)}; no task of the validation has a score."
    else:
        text += f"{sign * progress.best_score:.3f} at step {progress.best_step}."
    answer(result, as_json=as_json, show=lambda: say(text))
    finish(quarantined, allowed)


def finish(quarantined: Sequence[dict[str, Any]], allowed: int, *, once: bool = True) -> None:
    """Name every quarantined sample on standard error, `once`, although a launcher runs the command on several ranks;
    exit 2 when there are more than `allowed`."""
    told = sys.stderr.write if not once or os.environ.get("RANK", "0") == "0" else str
    for record in quarantined:
        told(f"quarantined {record['id']}: {record['where']}: {record['reason']}\n")
    if len(quarantined) > allowed:
        fix = f"Repair the files, or accept this with --allow-quarantined {len(quarantined)}."
        told(f"error: {len(quarantined)} samples were left out; everything else is done. Fix: {fix}\n")
        raise typer.Exit(2)


# A progress bar on standard error for work that can be counted.


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
    facts += [f"{tally.n_cut:,} cut off"] if tally.n_cut else []
    facts += [] if tally.meter is None else [tally_cost(tally.meter)]
    if tally.tokens_in + tally.tokens_out:
        facts.append(f"{(tally.tokens_in + tally.tokens_out) / max(seconds, 1e-3):,.0f} tokens/s")
    return " · ".join(facts)


def tally_cost(meter: Meter) -> str:
    """What was spent in this session, in dollars; 'cost unknown' without a price or token counts."""
    return "cost unknown" if meter.cost_usd is None else f"${meter.cost_usd:,.2f}"
