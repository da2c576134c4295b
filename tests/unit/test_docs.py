"""The documentation speaks of what is there: commands, options and config keys, files, and tests that are named."""

from __future__ import annotations

import ast
import pkgutil
import re
import shlex
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import typer
import yaml

import hba
from hba.batch.config import PrepareConfig
from hba.cli import app
from hba.config import describe, load_config
from hba.evaluate.config import PredictConfig
from hba.evaluate.judge.run import JudgeConfig
from hba.rl.config import RlConfig
from hba.train.config import BamConfig, LmConfig, QaConfig, SftConfig

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
HBA = typer.main.get_command(app)
CONFIGS = {
    "train sft": SftConfig, "train qa": QaConfig, "train bam": BamConfig, "train lm": LmConfig, "train rl": RlConfig,
    "transfer": SftConfig, "predict": PredictConfig, "judge": JudgeConfig, "atlas prepare": PrepareConfig,
    "fit": SftConfig, "eval": PredictConfig,
}  # fmt: skip
KEYS = {name: {key.key for key in describe(config)} for name, config in CONFIGS.items()}
SECTIONS = {key.partition(".")[0] for names in KEYS.values() for key in names if "." in key}
FILE_ENDINGS = (".jsonl", ".parquet", ".json", ".yaml")
# Options in the text that belong to other programs.
OF_OTHERS = {"--dist", "--use_fsdp"}
# Those that messages name: of pip, vLLM, torchrun, lmms-eval, Hydra, and of a script in an environment of its own.
OF_OTHER_PROGRAMS = {
    *("--force-reinstall", "--only-binary", "--logprobs-mode", "--max-model-len", "--enable-lora", "--max-lora-rank"),
    *("--include_path", "--check", "--install", "--nproc-per-node"),
}


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


@pytest.mark.parametrize("recipe", sorted((ROOT / "src/hba/recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_a_config_of_the_stage_that_its_name_begins_with(recipe):
    stage = recipe.stem.partition("_")[0]
    config = CONFIGS[f"train {'lm' if stage == 'speak' else stage}"]
    keys = describe(config)
    given = [f"{key.key}=x" for key in keys if (key.default is None and "." not in key.key) or key.key == "model.name"]
    assert load_config(config, recipe, given).atlas == "x"


def inline(text):
    """What stands between backticks outside of code blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"(?ms)^```.*?^```", "", text))


def all_commands(command=HBA, path=()):
    """Every command by its name, groups included."""
    found = {" ".join(path): command}
    for name, inner in getattr(command, "commands", {}).items():
        found |= all_commands(inner, (*path, name))
    return found


def flags_of(command):
    """The options of a command: how each is written, and the words that it takes, None for any."""
    hints = get_type_hints(command.callback) if command.callback else {}
    found = {"--help": None}
    for param in command.params:
        kind = hints.get(param.name)
        words = get_args(kind) if get_origin(kind) is Literal else None
        found |= dict.fromkeys((*param.opts, *param.secondary_opts), words)
    return found


OPTIONS = {flag for command in all_commands().values() for flag in flags_of(command)}


def wrong_calls(text):
    """What a text says to type and no command takes: a command, an option of it, one of the few words of an option."""
    wrong = []
    for call in re.findall(r"(?<![\w./-])hba ([a-z][^`\n\"]*)", text):
        command, name, rest = command_of(call.split())
        if not name:
            wrong += [f"hba {call}"] if re.match(r"[a-z-]+( --|$)", call) else []
            continue
        for word, after in zip(rest, [*rest[1:], ""], strict=False):
            flag, said, known = re.match(r"--[a-z][a-z-]*", word), after.strip(".,;:)"), flags_of(command)
            if flag and (flag[0] not in known or (said.islower() and said not in (known[flag[0]] or [said]))):
                wrong.append(f"hba {call}")
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_options_and_keys_in_the_text_are_there(page):
    text = page.read_text(encoding="utf-8")
    wrong = [call for piece in inline(text) for call in wrong_calls(piece)]
    for piece in inline(text):
        if re.match(r"(hba |--)", piece):
            flags = re.findall(r"(?<!\S)--[a-z][\w-]*", piece)
            wrong += [piece for flag in flags if flag not in OPTIONS | OF_OTHERS]
        if (key := re.fullmatch(r"(\w+(?:\.\w+)+)(=[^=].*)?", piece)) is not None:
            section = key[1].partition(".")[0]
            known = {name for names in KEYS.values() for name in names}
            if key[2] or (section in SECTIONS and not piece.endswith(FILE_ENDINGS)):
                wrong += [piece] if key[1] not in known else []
    assert wrong == []


def messages():
    """Every text of the package that a person may read: strings of the source, with X for what is filled in, and
    templates."""
    for path in sorted((ROOT / "src/hba").rglob("*")):
        if path.suffix == ".jinja":
            yield path.name, path.read_text(encoding="utf-8")
        if path.suffix == ".py":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    yield (
                        path.name,
                        "".join(each.value if isinstance(each, ast.Constant) else "X" for each in node.values),
                    )
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield path.name, node.value


def test_what_a_message_says_to_type_is_there():
    """`hba atlas convert --to files` was advised, and is no form of an atlas."""
    texts = list(messages())
    assert len(texts) > 3000
    assert wrong_calls("Convert it with `hba atlas convert --to files`.")
    assert not wrong_calls("Convert it with `hba atlas convert --to jsonl`.")
    assert wrong_calls("Run `hba predictt` first.") and wrong_calls("use hba score --retry-failed")
    assert [(file, call) for file, text in texts for call in wrong_calls(text)] == []
    of_ours = r"(?<![\w-])--[a-z][\w-]*"
    sentences = [text for file, text in texts if " " in text and file.endswith(".py")]  # no variables of CSS
    unknown = {flag for text in sentences for flag in re.findall(of_ours, text)} - OPTIONS
    assert unknown == OF_OTHER_PROGRAMS


AROUND = [*(ROOT / ".github").rglob("*.*"), *ROOT.glob("Dockerfile*"), ROOT / "SECURITY.md", ROOT / "Makefile"]


@pytest.mark.parametrize("path", AROUND + PAGES, ids=lambda path: path.name)
def test_commands_targets_and_files_that_forms_workflows_and_images_name_are_there(path):
    text = path.read_text(encoding="utf-8")
    targets = re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert [call for call in re.findall(r"(?:`|run: |&& |^)make ([a-z-]+)", text) if call not in targets] == []
    if path not in PAGES:
        said = re.sub(r"[\"`]", "\n", re.sub(r"(?m)#.*?(?=hba|$)", "", text))
        assert [call for line in said.splitlines() for call in wrong_calls(line)] == []
        files = re.findall(r"`((?:src|tests|docs|benchmarks|notebooks)/[\w/.-]*)`", text)
        assert [file for file in files if not (ROOT / file).exists()] == []


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


def generated_pages():
    """Pages of the site that docs/site.py makes when it is built: the keys of its GENERATED."""
    for node in ast.parse((ROOT / "docs/site.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "GENERATED":
            return {key.value for key in node.value.keys}
    raise AssertionError("docs/site.py has no GENERATED")


GENERATED = generated_pages()


def leaves(nav):
    values = [] if isinstance(nav, str) else [value for entry in nav for value in entry.values()]
    return [leaf for value in values for leaf in leaves(value)] or [nav]


def test_the_site_has_every_page_in_its_navigation():
    """A new page wants a line in mkdocs.yml, or `make docs` has no way to it."""
    nav = leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(nav) == sorted([page.name for page in (ROOT / "docs").glob("*.md")] + [*GENERATED])


def anchors(page):
    """What a link into the page may name: its headings, as Python-Markdown writes them, and ids of its own."""
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"(?ms)^```.*?^```", "", text)
    titles = [re.sub(r"[`*]|\]\([^)]*\)|\[", "", title) for title in re.findall(r"(?m)^#+ (.+)$", prose)]
    slugs = [re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles]
    return {*slugs, *re.findall(r'id="([^"]+)"', text)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_headings_that_are_there(page):
    text, wrong = page.read_text(encoding="utf-8"), []
    for link in re.findall(r"\]\(([^)\s]+#[^)\s]+|#[^)\s]+)\)", text):
        file, _, anchor = link.partition("#")
        if "://" not in link and file not in GENERATED:
            wrong += [] if anchor in anchors(page.parent / file if file else page) else [link]
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_that_are_named_are_there(page):
    text = page.read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and link not in GENERATED and not (page.parent / link).exists()] == []
    files = re.findall(r"`((?:src|tests|docs|benchmarks)/[\w/.-]+)`", text)
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_every_page_is_in_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if page.parent.name == "docs" and f"docs/{page.name}" not in text] == []


def test_the_page_of_licences_has_a_line_for_every_dataset_and_says_what_info_says():
    lines = (ROOT / "docs/licences.md").read_text(encoding="utf-8").splitlines()
    for dataset in hba.taxonomy.DATASETS.values():
        (line,) = [line for line in lines if line.startswith("| ") and f"`{dataset.key}`" in line.split("|")[1]]
        what, licence, users, consent = line.split("|")[2:6]
        for column, said in ((licence, dataset.licence), (users, dataset.users), (consent, dataset.consent)):
            assert "unknown" in column or said != "unknown", (dataset.key, column)
        place = re.search(r"[\w.]+/[\w./-]+|arXiv:[\d.]+|[\w.]+\.edu", dataset.source)
        assert place and place[0].removeprefix("doi:") in what, dataset.key


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
