"""The documentation speaks of what is there: commands, options and config keys, files, and tests that are named."""

from __future__ import annotations

import ast
import pkgutil
import re
import shlex
from pathlib import Path

import pytest
import typer

import hba
from hba.cli import app
from hba.config import describe
from hba.evaluate.config import PredictConfig
from hba.evaluate.judge.run import JudgeConfig
from hba.rl.config import RlConfig
from hba.train.config import BamConfig, LmConfig, QaConfig, SftConfig

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
HBA = typer.main.get_command(app)
CONFIGS = {
    "train sft": SftConfig, "train qa": QaConfig, "train bam": BamConfig, "train lm": LmConfig, "train rl": RlConfig,
    "transfer": SftConfig, "predict": PredictConfig, "judge": JudgeConfig,
}  # fmt: skip
KEYS = {name: {key.key for key in describe(config)} for name, config in CONFIGS.items()}
SECTIONS = {key.partition(".")[0] for names in KEYS.values() for key in names if "." in key}
FILE_ENDINGS = (".jsonl", ".parquet", ".json", ".yaml")
# Options in the text that belong to other programs.
OF_OTHERS = {"--dist", "--use_fsdp"}


def blocks(text):
    return [code for kind, code in re.findall(r"(?ms)^```(\w*)\n(.*?)^```", text) if kind in ("", "bash")]


def code_calls(text):
    """Words behind `hba` of every call in the code blocks: behind launchers and &&, over several lines, in quotes."""
    for block in blocks(text):
        for line in block.replace("\\\n", " ").splitlines():
            for call in re.findall(r"(?:^|(?<=\s))hba ([a-z].*?)(?= && |$)", line):
                yield shlex.split(call.rstrip('"') if call.count('"') % 2 else call, comments=True)


def command_of(words):
    """The click command that the words call, its name, and the rest of the words."""
    command, name = HBA, []
    while hasattr(command, "commands") and words and words[0] in command.commands:
        command, name, words = command.commands[words[0]], [*name, words[0]], words[1:]
    return command, " ".join(name), words


CALLS = [(page.name, words) for page in PAGES for words in code_calls(page.read_text(encoding="utf-8"))]


def test_the_pages_have_calls():
    assert len(CALLS) > 50
    assert {page for page, _ in CALLS} >= {"README.md", "train.md", "evaluate.md", "scale.md", "rl.md"}


@pytest.mark.parametrize(("page", "words"), CALLS, ids=[f"{page}: {' '.join(words)}"[:90] for page, words in CALLS])
def test_a_call_in_a_code_block_is_one_that_hba_takes(page, words):
    """Parsed by the command itself, which then is not run: unknown options and missing arguments are errors."""
    command, name, rest = command_of(words)
    assert not hasattr(command, "commands"), f"no command hba {' '.join(words)}"
    values = command.make_context(name, list(rest)).params
    keys = [value.partition("=")[0] for value in values.get("overrides") or () if value != "..."]
    assert [key for key in keys if key not in KEYS[name]] == []
    recipe = values.get("config")
    assert recipe is None or (ROOT / "src/hba/recipes" / f"{recipe}.yaml").is_file()


def inline(text):
    """What stands between backticks outside of code blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"(?ms)^```.*?^```", "", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_options_and_keys_in_the_text_are_there(page):
    options, todo = {"--help", *OF_OTHERS}, [HBA]
    while todo:
        command = todo.pop()
        todo += getattr(command, "commands", {}).values()
        options |= {flag for param in command.params for flag in (*param.opts, *param.secondary_opts)}
    wrong = []
    for piece in inline(page.read_text(encoding="utf-8")):
        if piece.startswith("hba "):
            words = piece.split()[1:]
            if words[0][0] not in "-{." and not command_of(words)[1]:
                wrong.append(piece)
        if re.match(r"(hba |--)", piece):
            flags = re.findall(r"(?<!\S)--[a-z][\w-]*", piece)
            wrong += [piece for flag in flags if flag not in options]
        if (key := re.fullmatch(r"(\w+(?:\.\w+)+)(=[^=].*)?", piece)) is not None:
            section = key[1].partition(".")[0]
            known = {name for names in KEYS.values() for name in names}
            if key[2] or (section in SECTIONS and not piece.endswith(FILE_ENDINGS)):
                wrong += [piece] if key[1] not in known else []
    assert wrong == []


PYTHON = [
    (page.name, code)
    for page in PAGES
    for kind, code in re.findall(r"(?ms)^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"))
    if kind == "python"
]


@pytest.mark.parametrize(("page", "code"), PYTHON, ids=[page for page, _ in PYTHON])
def test_what_a_python_block_takes_from_hba_is_there(page, code):
    tree, known = ast.parse(code), {"hba": hba}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("hba"):
            known |= {
                each.asname or each.name: pkgutil.resolve_name(f"{node.module}:{each.name}") for each in node.names
            }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known:
            assert hasattr(known[node.value.id], node.attr), ast.unparse(node)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_that_are_named_are_there(page):
    text = page.read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (page.parent / link).exists()] == []
    files = re.findall(r"`((?:src|tests|docs|benchmarks)/[\w/.-]+)`", text)
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_every_page_is_in_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if page.parent.name == "docs" and f"docs/{page.name}" not in text] == []


def test_every_flaw_names_tests_that_are_there():
    """docs/flaws.md: one line a flaw, with the tests that would fail if we had it."""
    lines = (ROOT / "docs/flaws.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| Flaw")]
    assert len(rows) >= 40
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", row)
        assert named, row
        for file, test in named:
            tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
            assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (file, test)
