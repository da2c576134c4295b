"""The rules of the house: an arrow points down, no two files need each other, and a question has one room.

An import counts wherever it stands, also in a function and for types alone.
"""

import ast
import re
from pathlib import Path

import pytest

import hba

SOURCE = Path(hba.__file__).parent
CONTRIBUTING = SOURCE.parents[1] / "CONTRIBUTING.md"

# From the ground up. What stands on one line knows nothing of its neighbours.
FLOORS = (
    ("errors",),
    ("storage", "environment", "config"),
    ("taxonomy", "parallel", "remote"),
    ("atlas",),
    ("run", "batch", "mini"),
    ("model",),
    ("doctor", "embedding"),
    ("descriptors",),
    ("evaluate",),
    ("train",),
    ("rl",),
    ("report", "fit"),
    ("export", "explorer"),
    ("serve",),
    ("__init__",),  # the front door: what `import hba` offers
    ("cli",),
    ("__main__",),
)


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = ("hba", *path.relative_to(SOURCE).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that a file imports."""
    wanted = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            wanted |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: an import says from where, 'from hba...'"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                wanted.add(inner if inner in known else str(node.module))
    return wanted & set(known)


@pytest.fixture(scope="module")
def arrows() -> dict[str, set[str]]:
    known = modules()
    return {name: imports_of(path, known) - {name} for name, path in known.items()}


def package_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def test_every_package_has_a_floor() -> None:
    placed = [package for floor in FLOORS for package in floor]
    assert sorted(placed) == sorted({package_of(name) for name in modules()})


def test_arrows_point_down(arrows: dict[str, set[str]]) -> None:
    floor = {package: number for number, packages in enumerate(FLOORS) for package in packages}
    wrong = [
        f"{name} imports {other}"
        for name, others in arrows.items()
        for other in others
        if package_of(other) != package_of(name) and floor[package_of(other)] >= floor[package_of(name)]
    ]
    assert wrong == []


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """What is left once everything goes that needs nothing, or that nothing needs, again and again."""
    left = {name: set(others) for name, others in arrows.items()}
    while True:
        needed = set().union(*left.values()) if left else set()
        gone = {name for name, others in left.items() if not others or name not in needed}
        if not gone:
            return [sorted(left)] if left else []
        left = {name: others - gone for name, others in left.items() if name not in gone}


def test_no_circle_between_files(arrows: dict[str, set[str]]) -> None:
    assert circles(arrows) == []


def test_the_search_for_circles_finds_one() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


def test_where_to_find_what_names_files_that_are_there() -> None:
    section = CONTRIBUTING.read_text(encoding="utf-8").split("## Where to find what")[1].split("\n## ")[0]
    named = re.findall(r"`(src/hba/[\w./]+)`", section)
    assert len(named) >= 5
    assert [path for path in named if not (SOURCE.parents[1] / path).exists()] == []
