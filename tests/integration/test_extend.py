"""docs/extend.md, run as it stands: the Python block, the YAML block, the commands."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from hba import open_atlas
from hba.cli import main
from hba.errors import TaxonomyError

PAGE = (Path(__file__).parents[2] / "docs/extend.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def classroom(tmp_path, monkeypatch):
    """A folder as the page makes it, and the current directory of the test."""
    monkeypatch.chdir(tmp_path)
    (python,) = blocks("python")
    exec(python, {})
    (entry,) = blocks("yaml")
    Path("runs/classroom/taxonomy.yaml").write_text(entry)
    return tmp_path


def test_the_page_runs_as_it_stands(classroom, monkeypatch):
    (commands,) = blocks("bash")
    for command in commands.strip().splitlines():
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        try:
            main()
        except SystemExit as leave:
            assert leave.code in (0, None), command
    metrics = json.loads(Path("runs/classroom-sft/metrics.json").read_text())
    task = metrics["tasks"]["ENG"]
    assert task["n"] == 48 and task["ci95"][0] > task["chance"]
    assert "engagement" in Path("runs/classroom-sft/report.html").read_text()


def test_synonyms_of_the_entry_count(classroom):
    taxonomy = open_atlas("runs/classroom", split="test").taxonomy
    assert taxonomy.canonical_label("classroom", "Attentive") == "high"
    assert taxonomy.global_index("classroom", "high") == 26 and taxonomy.num_classes == 27
    assert taxonomy.global_index("tess", "anger") == 7


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("[]", "Expected `object`"),
        ("datasets: {x: {}}", "missing required field `domain`"),
        ("datasets: {tess: {domain: emotion}}", "dataset 'tess': is already in the taxonomy"),
        ("domains: {eng: {5: low}}", "would redefine published classes"),
        ("domains: {eng: {25: low, 27: high}}", "class indices have a gap"),
        ("tasks: {ENG: {datasets: [nothing]}}", "unknown dataset 'nothing'"),
        ("tasks: {ENG: {datasets: [], metric: magic}}", "Invalid enum value 'magic'"),
        ("colour: red", "unknown field `colour`"),
        (": :", "not a taxonomy"),
    ],
)
def test_a_wrong_entry_is_one_error_that_names_the_file(classroom, entry, message):
    Path("runs/classroom/taxonomy.yaml").write_text(entry)
    with pytest.raises(TaxonomyError, match=re.escape(message)) as error:
        open_atlas("runs/classroom", split="train")
    assert "taxonomy.yaml" in str(error.value)
