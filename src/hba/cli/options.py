"""Options and progress that commands share, and the two ways in which each answers: for people and with --json."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar

import typer
from typer.core import TyperGroup

from hba.errors import InputError, nearest
from hba.storage import plural

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress, ProgressColumn

    from hba.evaluate.predictions import Tally
    from hba.remote.cost import Meter

T = TypeVar("T")
Show = Callable[[], Iterable["RenderableType"]]
OnProgress = Callable[[int, int], None]

MODEL_HELP = "Run folder, checkpoint, Hugging Face model, or name of a remote model."
ATLAS_HELP = "Atlas: a folder, or org/name on the hub."
ROWS_HELP = "Atlas: a folder, one file of rows, or org/name on the hub."
SCORED_HELP = "Run folder that hba score has scored."
PREDICTED_HELP = "Run folder with predictions."
SLICES = "Slices work: test[:100]."
ALLOW_FAILED_HELP = "Accept up to N rows that failed (else exit code 1)."


# What may stand on a command line. Each says what the help shows; its name and its default are those of the parameter.


def takes(metavar: str, help: str, *names: str, default: str | bool = True) -> Any:
    """An option with a value; `default` says in words what holds without it."""
    return typer.Option(*names, metavar=metavar, help=help, show_default=default)


def flag(name: str, help: str) -> Any:
    """An option without a value."""
    return typer.Option(name, help=help)


def number(help: str, *names: str, least: float = 0, most: float | None = None, default: str | bool = True) -> Any:
    """An option with a number from `least` to `most`."""
    return typer.Option(*names, min=least, max=most, help=help, show_default=default)


def keys_such_as(example: str) -> Any:
    """The argument of config values, with one that this command knows as the example."""
    return typer.Argument(metavar="KEY=VALUE", help=f"Config values, such as {example}.", show_default=False)


JsonFlag = Annotated[bool, flag("--json", "Print the result as JSON.")]
Overrides = Annotated[list[str] | None, keys_such_as("train.epochs=2")]
ConfigOption = Annotated[str | None, takes("RECIPE", "Recipe, such as sft_tiny, or a YAML file.", "--config")]
AllowQuarantined = Annotated[
    int, number("Accept up to N samples that cannot be read (else exit code 2).", "--allow-quarantined")
]
BaseUrl = Annotated[
    str | None, takes("URL", "Address of a model server, such as http://localhost:8000/v1.", "--base-url")
]
Backend = Annotated[
    str | None,
    takes(
        "NAME",
        "How to ask it: heads, hf, vllm, openai, anthropic or google.",
        default="heads or hf, as MODEL was trained",
    ),
]
SetKey = Annotated[
    list[str] | None, takes("KEY=VALUE", "Config value, such as generation.max_tokens=64. Repeat for more.", "--set")
]
PerDataset = Annotated[int | None, number("At most N rows of each dataset.", least=1)]
Host = Annotated[str, takes("ADDRESS", "Address to listen on; 0.0.0.0 lets the network in.")]
Port = Annotated[int, number("Port; 0 takes a free one.", most=65535)]
Splits = Annotated[list[str] | None, takes("SPLIT", "Only this split. Repeat for more.", "--split", default="all")]
Workers = Annotated[int, number("Number of processes.", least=1, default="one a core")]


class Commands(TyperGroup):
    """A group whose help suits 80 columns and newcomers: what to type stands above the options, not below them, and
    kinds of values take little room. `PANELS` says in which order its commands are shown, `OPTIONS` what some options
    of a long command are about."""

    PANELS: ClassVar[dict[str, tuple[str, ...]]] = {}
    OPTIONS: ClassVar[dict[str, dict[str, tuple[str, ...]]]] = {}

    def __init__(self, **attrs: Any) -> None:
        super().__init__(**attrs)
        for each in (self, *self.commands.values()):
            if each.epilog:
                whole = [" ".join(part.split()) for part in (each.help or "").split("\n\n")]
                each.short_help, each.help, each.epilog = whole[0], "\n\n".join([*whole, each.epilog]), None
            for param in each.params:
                if getattr(param, "is_flag", False):
                    param.metavar = ""
                elif param.param_type_name == "argument":
                    param.metavar = param.metavar or (param.name or "").upper()
                elif getattr(param, "min", None) is not None:
                    param.metavar = "N"
        for panel, names in self.PANELS.items():
            for name in names:
                self.commands[name].rich_help_panel = panel  # type: ignore[attr-defined]
        for command, panels in self.OPTIONS.items():
            params = {param.name: param for param in self.commands[command].params}
            for panel, names in panels.items():
                for name in names:
                    params[name].rich_help_panel = panel  # type: ignore[attr-defined]

    def list_commands(self, ctx: Any) -> list[str]:
        """The names in the order of the panels."""
        return [name for names in self.PANELS.values() for name in names] or super().list_commands(ctx)


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


def configured(kind: type[T], config: str | None, overrides: Sequence[str] | None, chosen: Sequence[str] = ()) -> T:
    """The config of a command from --config, KEY=VALUE and the overrides that its other options stand for."""
    from hba.config import load_config

    return load_config(kind, recipe_path(config), [*(overrides or []), *chosen])


def served(base_url: str | None) -> list[str]:
    """The override that --base-url stands for."""
    return [] if base_url is None else [f"remote.base_url={json.dumps(base_url)}"]


# --- answers ----------------------------------------------------------------------------------------------------------


def is_first() -> bool:
    """Whether this process speaks, of those on which a launcher runs the command."""
    return os.environ.get("RANK", "0") == "0"


def answer(result: dict[str, Any], show: str | Show, *, as_json: bool, once: bool = True) -> None:
    """Print `result` as JSON, or for people: a line of rich markup, or what `show` gives, each such line or a table.

    `once`, although a launcher runs the command on several ranks.
    """
    if once and not is_first():
        return
    if as_json:
        sys.stdout.write(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        return
    from rich.console import Console

    for each in [show] if isinstance(show, str) else show():
        if isinstance(each, str):
            Console(soft_wrap=True, highlight=False).print(each)
        else:
            Console().print(each)


def say(text: str) -> None:
    """One line of rich markup on standard output."""
    answer({}, text, as_json=False, once=False)


def written(*files: Path) -> list[str]:
    """A line for each file that a command was asked to write."""
    return [f"Wrote {bold(file)}." for file in files]


def beside(text: str) -> None:
    """One line on standard error, as it is."""
    sys.stderr.write(f"{text}\n")


def warn(text: str) -> None:
    """One line on standard error; once, although a launcher runs the command on several ranks."""
    if is_first():
        beside(f"warning: {text}.")


def bold(value: object) -> str:
    """Rich markup for a path or name, whatever brackets it has."""
    from rich.markup import escape

    return f"[bold]{escape(str(value))}[/bold]"


def finish(quarantined: Sequence[dict[str, Any]], allowed: int, *, once: bool = True) -> None:
    """Name every quarantined sample on standard error, `once`, although a launcher runs the command on several ranks;
    exit 2 when there are more than `allowed`."""
    told = beside if not once or is_first() else str
    for record in quarantined:
        told(f"quarantined {record['id']}: {record['where']}: {record['reason']}")
    if len(quarantined) > allowed:
        fix = f"Repair the files, or accept this: --allow-quarantined {len(quarantined)}."
        told(f"error: {plural(len(quarantined), 'sample', 'was|were')} left out; everything else is done. Fix: {fix}")
        raise typer.Exit(2)


# --- progress bars on standard error ----------------------------------------------------------------------------------


@contextmanager
def _bar(columns: Sequence[ProgressColumn], *, shown: bool) -> Iterator[Progress]:
    """A display of bars. A bar that has counted nothing goes at the end: a refused command shows its reason alone."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not shown) as bar:
        try:
            yield bar
        finally:
            for task in bar.tasks:
                if task.total is None:
                    bar.remove_task(task.id)
            console.quiet = not bar.tasks and not console.is_terminal  # in a file it would end with an empty line


@contextmanager
def counted(description: str) -> Iterator[OnProgress]:
    """A bar; call the yielded function with (done, total)."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    from hba.run import Pulse

    columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with _bar(columns, shown=is_first()) as bar:
        task, pulse = bar.add_task(description, total=None), Pulse(bar.console)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            if not bar.disable:
                pulse.beat(lambda: f"{description}: {done:,} of {total:,}")

        yield show


@contextmanager
def tallied(description: str, *, shown: bool = True) -> Iterator[Callable[..., None]]:
    """A bar of predictions with their failures, cost, speed and time left; call the yielded function with a tally, and
    where what is done has a name of its own, with that."""
    from rich import progress
    from rich.text import Text

    from hba.run import Pulse

    started = monotonic()

    class Facts(progress.ProgressColumn):
        """Read at each refresh, so that it says what is waited for while nothing comes."""

        def render(self, task: progress.Task) -> Text:
            tally: Tally | None = task.fields["tally"]
            return Text("" if tally is None else tally_facts(tally, monotonic() - started))

    columns = (
        progress.TextColumn("[bold]{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        Facts(),
        progress.TimeRemainingColumn(),
    )
    with _bar(columns, shown=shown) as bar:
        task, pulse = None, Pulse(bar.console)

        def show(tally: Tally, named: str = description) -> None:
            nonlocal task
            if task is None:  # what an earlier session did is no part of this one's speed
                task = bar.add_task(description, total=tally.total, completed=tally.done - tally.fresh, tally=tally)
            bar.update(task, completed=tally.done, total=tally.total, description=named)
            if shown:
                far = f"{named}: {tally.done:,} of {tally.total:,}"
                pulse.beat(lambda: " · ".join(filter(None, (far, tally_facts(tally, monotonic() - started)))))

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
