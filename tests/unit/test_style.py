"""What CONTRIBUTING says about the code, measured: one word for one thing, no mention of where it was written."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import hba

SOURCE = Path(hba.__file__).parent
ROOT = SOURCE.parents[1]
FILES = sorted(SOURCE.rglob("*.py"))


def test_every_module_says_what_it_is():
    assert [path for path in FILES if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))] == []


def test_nobody_repeats_a_function():
    """Two functions of the same body are one function. (Bodies of three lines and less may agree.)"""
    seen: dict[str, str] = {}
    twice = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body = node.body[1 if ast.get_docstring(node) else 0 :]
                code = "\n".join(map(ast.unparse, body))
                place = f"{path.relative_to(SOURCE)}: {node.name}"
                if code.count("\n") >= 3 and seen.setdefault(code, place) != place:
                    twice.append((seen[code], place))
    assert twice == []


def test_no_path_of_a_machine_is_named():
    paths = re.compile(r"(?<![\w.])/(?:work|root)/|/tmp/\w+/\w+")
    texts = [path for kind in ("*.py", "*.md", "*.yaml", "*.toml", "*.txt") for path in ROOT.glob(f"[!.]*/**/{kind}")]
    texts += [path for path in ROOT.iterdir() if path.suffix in (".md", ".toml", ".txt") or path.name == "Makefile"]
    found = {}
    for path in texts:
        if not {"runs", ".venv"} & set(path.parts) and path != Path(__file__):
            hits = paths.findall(path.read_text(encoding="utf-8"))
            if hits:
                found[str(path.relative_to(ROOT))] = hits
    assert found == {}


def test_one_word_for_one_thing():
    """Texts that people read and search: two spellings of a term are two terms to a search."""
    other = re.compile(r"\bdata[ _-]sets?\b|\blearnt\b|\bmini atlas\b|\bcheck[ -]points?\b", re.IGNORECASE)
    pages = [*FILES, *SOURCE.rglob("*.yaml"), *(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md"]
    found = [(path.name, match[0]) for path in pages for match in other.finditer(path.read_text(encoding="utf-8"))]
    assert found == []
