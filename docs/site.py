"""Hooks of mkdocs: the pages of the site that stand nowhere as a file, and formulas.

The home page is README.md; CONTRIBUTING.md and CHANGELOG.md are pages, too. The reference is made of the parser of the
command line, of the configuration's dataclasses and of docstrings, so that it cannot fall behind the code. Formulas
(fences named `math`, which GitHub renders, too) become MathML here: a browser shows them without a script. Nothing is
fetched from a network.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from hba.batch.config import PrepareConfig
from hba.cli import app
from hba.config import describe
from hba.evaluate.config import PredictConfig
from hba.evaluate.judge.run import JudgeConfig
from hba.rl.config import RlConfig
from hba.train.config import BamConfig, LmConfig, QaConfig, SftConfig

ROOT = Path(__file__).resolve().parents[1]
CONFIGS: dict[str, type[Any]] = {
    "hba train sft, hba transfer, hba fit": SftConfig,
    "hba train qa": QaConfig,
    "hba train bam": BamConfig,
    "hba train lm": LmConfig,
    "hba train rl": RlConfig,
    "hba predict, hba eval": PredictConfig,
    "hba judge": JudgeConfig,
    "hba atlas prepare": PrepareConfig,
}
# What a person calls, by the room that it is in.
PYTHON = {
    "Data": [
        *("hba.atlas.open_atlas", "hba.atlas.Atlas", "hba.atlas.rows.Sample", "hba.batch.sampler.subsample"),
        *("hba.atlas.validate.validate_atlas", "hba.atlas.convert.convert_atlas"),
        *("hba.descriptors.pool", "hba.descriptors.sequence"),
    ],
    "Models": ["hba.evaluate.ask.ask", "hba.model.omni.OmniSapiens"],
    "Results": [
        *("hba.evaluate.runs.open_run", "hba.evaluate.runs.Run", "hba.evaluate.predictions.Prediction"),
        *("hba.evaluate.results.read_metrics", "hba.evaluate.results.Metrics", "hba.evaluate.results.TaskScore"),
        *("hba.evaluate.answers.read", "hba.evaluate.answers.extract", "hba.evaluate.compare.compare_predictions"),
    ],
    "Reinforcement learning": [
        *("hba.rl.rewards.grpo_reward", "hba.rl.rewards.harpo_reward", "hba.rl.advantages.grpo"),
        "hba.rl.advantages.Harpo",
    ],
    "Errors": ["hba.errors"],
}


def home() -> str:
    """README.md, with its links as seen from docs/."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"\]\(docs/", "](", text).replace("(CONTRIBUTING.md)", "(contributing.md)")
    return text.replace(
        "`make docs` adds commands, configuration and Python",
        "[commands](reference/commands.md), [configuration](reference/configuration.md), [Python](reference/python.md)",
    )


def commands() -> str:
    """Every command, as `--help` has it."""
    return "\n".join(["# Commands", "", "The same text as `hba COMMAND --help`.", "", *_command(HBA, "hba")])


def _command(command: Any, name: str) -> Iterator[str]:
    inner = getattr(command, "commands", {})
    if not inner:
        hints = get_type_hints(command.callback)
        arguments = [_name(each) for each in command.params if not each.opts[0].startswith("-")]
        usage = " ".join([name, *arguments, "[OPTIONS]"])
        said, _, example = (command.help or "").partition("\n\nExample: ")
        first, *before = [line.split(":  ")[-1].strip() for line in example.splitlines()]
        typed = [*before, first]
        yield from ("", f"## {name}", "", "\n\n".join(_cell(part) for part in said.split("\n\n")), "")
        yield from ("```bash", *typed, "```", "", f"`{usage}`", "")
        rows = [_parameter(each, hints.get(each.name)) for each in command.params if not each.hidden]
        yield from ("| option | value | default | meaning |", "|---|---|---|---|", *rows)
    for key, each in inner.items():
        yield from _command(each, f"{name} {key}")


def _name(each: Any) -> str:
    return (each.metavar or each.name.upper()) + ("..." if each.nargs == -1 and "..." not in each.metavar else "")


def _parameter(each: Any, hint: Any) -> str:
    flags = ", ".join(f"`{flag}`" for flag in (*each.opts, *each.secondary_opts) if flag.startswith("-"))
    words = get_args(hint) if get_origin(hint) is Literal else ()
    kind = ", ".join(f"`{word}`" for word in words) or (f"`{each.metavar}`" if flags and each.metavar else "")
    default = each.default
    empty = default is None or default is False or default in ((), [], "")
    shown = "required" if each.required else "" if empty else f"`{default}`"
    shown = each.show_default if isinstance(each.show_default, str) else shown
    return f"| {flags or f'`{_name(each)}`'} | {kind} | {_cell(shown)} | {_cell(each.help or '')} |"


def configuration() -> str:
    """Every key of every command, its type, default and meaning."""
    lines = [
        "# Configuration",
        "",
        "A key is written as `key=value` behind the command, or in the YAML file of `--config`. Keys without a default",
        "must be given. `config.yaml` in a run folder has every value of the run.",
    ]
    for name, config in CONFIGS.items():
        lines += ["", f"## {name}", "", "| key | type | default | meaning |", "|---|---|---|---|"]
        for key in describe(config):
            default = "" if key.default is None else f"`{key.default}`"
            lines.append(f"| `{key.key}` | `{key.type}` | {_cell(default)} | {_cell(key.doc)} |")
    return "\n".join(lines)


def python() -> str:
    """What a person calls from Python, from its docstrings."""
    lines = ["# Python", "", "Begin with `hba.open_atlas`, `hba.Atlas`, `hba.ask` and `hba.OmniSapiens`."]
    for title, names in PYTHON.items():
        lines += ["", f"## {title}", *(f"\n::: {name}" for name in names)]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Text that stands in a cell of a table, or in a paragraph, as it is: in marked code nothing is escaped."""
    spans = re.split(r"(`[^`]*`)", re.sub(r"\s+", " ", text))
    return "".join(s if s[:1] == "`" else s.replace("|", "\\|").replace("<", "&lt;") for s in spans)


HBA = typer.main.get_command(app)
GENERATED: dict[str, Callable[[], str]] = {
    "index.md": home,
    "contributing.md": lambda: (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
    "changelog.md": lambda: (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
    "reference/commands.md": commands,
    "reference/configuration.md": configuration,
    "reference/python.md": python,
}


def mathml(text: str) -> str:
    """The page with each fence of LaTeX as MathML."""
    return re.sub(
        r"(?ms)^```math\n(.*?)^```$",
        lambda found: '<div style="margin: 1.5em 0">' + convert(found[1].strip(), display="block") + "</div>",
        text,
    )


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """mkdocs asks for this: the files of the site."""
    for name, made in GENERATED.items():
        files.append(File.generated(config, name, content=made()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """mkdocs asks for this: a page before it becomes HTML. What lies outside of docs/ is named, not linked."""
    markdown = re.sub(r"\[([^\]]*)\]\(\.\./[^)]*\)", r"\1", markdown)
    return mathml(markdown)
