"""The notebooks of notebooks/ run from their first cell to their last, as a reader runs them, but for the install.

Cells run in this process; `!hba ...` is the command's entry point. Outputs are not kept in the repository: they would
age, and a reader's own come in minutes.
"""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from hba.cli import main

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def cells(name):
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]


def run(source, names, monkeypatch):
    """Execute a cell. A line that begins with ! is a command of hba, and {name} in it a variable."""

    def command(line):
        monkeypatch.setattr(sys, "argv", shlex.split(re.sub(r"\{(\w+)\}", lambda found: str(names[found[1]]), line)))
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code, line

    lines = (re.sub(r"^!(.*)$", r"__command(r'''\1''')", line) for line in source.splitlines())
    names["__command"] = command
    exec(compile("\n".join(lines), "cell", "exec"), names)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HBA_CACHE", str(tmp_path / "cache"))
    names = {"__name__": "__main__"}
    for number, cell in enumerate(cells(name)):
        if cell["cell_type"] == "code" and "install" not in cell["metadata"].get("tags", ()):
            capsys.readouterr()
            try:
                run("".join(cell["source"]), names, monkeypatch)
            except BaseException as error:
                error.add_note(f"cell {number} of {name}: {''.join(cell['source'])}\n{capsys.readouterr().err}")
                raise
    report = {"quickstart": "runs/eval/report.html", "evaluate_your_model": "runs/mine/report.html"}[name]
    assert (tmp_path / report).stat().st_size > 10_000


@pytest.mark.parametrize("name", NOTEBOOKS)
@pytest.mark.parametrize("there", ["hba", "wheel", "clone", "nothing"])
def test_the_first_cell_installs_what_there_is(name, there, tmp_path, monkeypatch):
    """`%pip` stands for pip: what it is asked for. In Colab nothing is there until a wheel is uploaded."""
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    if there != "hba":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    if there == "wheel":
        Path("human_behavior_atlas-0.1.0-py3-none-any.whl").touch()
    if there in ("wheel", "clone"):
        Path("../pyproject.toml").touch()
    (cell, *_) = (cell for cell in cells(name) if cell["cell_type"] == "code")
    source, asked = "".join(cell["source"]), []
    names = {"pip": lambda line, names: asked.append(shlex.split(line.format(**names))[-1])}
    exec(re.sub(r"(?m)^( *)%pip (.*)$", r"\1pip(r'''\2''', globals())", source), names)
    extra = "[train]" if name == "quickstart" else ""
    found = {"wheel": "human_behavior_atlas-0.1.0-py3-none-any.whl", "clone": "..", "nothing": "human-behavior-atlas"}
    assert asked == ([] if there == "hba" else [found[there] + extra])


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_installs_first_and_keeps_no_output(name):
    code = [cell for cell in cells(name) if cell["cell_type"] == "code"]
    assert code[0]["metadata"]["tags"] == ["install"] and "%pip install" in "".join(code[0]["source"])
    assert not [cell for cell in code if cell["outputs"] or cell["execution_count"]]
    assert "colab-badge.svg" in "".join(cells(name)[0]["source"])
