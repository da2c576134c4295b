"""The build: what a wheel holds, what the constraints pin, and what the Makefile and CI run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from hba.doctor import declared

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = ROOT / "constraints-cpu.txt"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")


def pins(python: str) -> dict[str, str]:
    """name: version of the constraints that hold on Linux x86_64 for a Python release."""
    where = {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    found: dict[str, str] = {}
    for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(where):
            name = canonicalize_name(requirement.name)
            assert name not in found, f"{name} has two pins for {python}"
            (specifier,) = requirement.specifier
            assert specifier.operator == "=="
            found[name] = specifier.version
    return found


def closure(requirements: list[Requirement]) -> set[str]:
    """Every distribution that the requirements bring in this environment."""
    found: set[str] = set()
    todo = [(r.name, extra) for r in requirements for extra in ("", *r.extras)]
    seen = set(todo)
    while todo:
        name, extra = todo.pop()
        found.add(canonicalize_name(name))
        for line in metadata.requires(name) or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                new = {(requirement.name, inner) for inner in ("", *requirement.extras)} - seen
                seen |= new
                todo += new
    return found


def installed() -> list[Requirement]:
    """What `make install` asks for."""
    extras = re.search(r"-e '\.\[(.*)\]'", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert extras is not None
    return [*declared(), *(each for extra in extras[1].split(",") for each in declared(extra))]


@pytest.mark.parametrize("python", PYTHONS)
def test_torch_and_torchvision_are_the_pair_that_works(python: str) -> None:
    assert (pins(python)["torch"], pins(python)["torchvision"]) == ("2.14.1", "0.29.1")


@pytest.mark.parametrize("python", PYTHONS)
def test_every_declared_dependency_is_pinned_within_its_range(python: str) -> None:
    pinned = pins(python)
    for requirement in installed():
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement.name


def test_every_transitive_dependency_is_pinned() -> None:
    pinned = pins(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert closure(installed()) - set(pinned) == set()


def test_the_constraints_name_no_host() -> None:
    text = CONSTRAINTS.read_text(encoding="utf-8")
    assert "://" not in text
    assert not re.search(r"^\s*-", text, re.MULTILINE)


def test_the_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "-w", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("human_behavior_atlas-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    sources = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src" / "hba").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert sources - held == set()
    assert any(name.endswith("licenses/LICENSE") for name in held)


needs_wheel = pytest.mark.skipif("HBA_WHEEL" not in os.environ, reason="installs packages: make test-wheel")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", str(folder), str(ROOT)], check=True)
    (found,) = folder.glob("human_behavior_atlas-*.whl")
    return found


def empty_environment(folder: Path) -> Path:
    """The programs of a new environment in which nothing but pip is."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    if sys.version_info < (3, 12):  # whose venv brings an old setuptools
        subprocess.run([str(folder / "bin" / "pip"), "uninstall", "-q", "-y", "setuptools"], check=True)
    return folder / "bin"


def link_what_is_declared(programs: Path, wheel: Path, extra: str) -> None:
    """Let an environment see what a wheel says it needs, and what that needs, in the files that are here already."""
    (info,) = (each for each in zipfile.Path(wheel).iterdir() if each.name.endswith(".dist-info"))
    asked = [Requirement(line) for line in metadata.PathDistribution(info).requires or ()]
    asked = [each for each in asked if each.marker is None or each.marker.evaluate({"extra": extra})]
    declared = programs.parent / "declared"
    declared.mkdir()
    for name in closure(asked):
        found = metadata.distribution(name)
        for top in {file.parts[0] for file in found.files or ()} - {".."}:
            if not (declared / top).exists():
                (declared / top).symlink_to(Path(str(found.locate_file(top))))
    (places,) = programs.parent.glob("lib/python*/site-packages")
    (places / "declared.pth").write_text(f"{declared}\n", encoding="utf-8")


@pytest.mark.slow
@needs_wheel
def test_the_wheel_trains_in_an_empty_environment_from_another_folder(tmp_path: Path, wheel: Path) -> None:
    """pip installs the wheel. What it declares is linked from here, so that pip has to find all of it without an index;
    HBA_WHEEL=whole takes it from the index."""
    programs = empty_environment(tmp_path / "empty")
    how = ["-c", str(CONSTRAINTS)]
    if os.environ["HBA_WHEEL"] != "whole":
        link_what_is_declared(programs, wheel, "train")
        how = ["--no-index"]
    subprocess.run([str(programs / "pip"), "install", "-q", *how, f"{wheel}[train]"], check=True)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    demo = [str(programs / "hba"), "demo", "--size", "tiny", "--json"]
    done = subprocess.run(demo, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (folder / json.loads(done.stdout)["report"]).is_file()


@pytest.mark.slow
@needs_wheel
def test_the_light_wheel_is_small_and_works_without_torch(tmp_path: Path, wheel: Path) -> None:
    """With the newest versions that it allows, as a person gets it: no constraints."""
    programs = empty_environment(tmp_path / "light")
    subprocess.run([str(programs / "pip"), "install", "-q", str(wheel)], check=True)
    listed = subprocess.run([str(programs / "pip"), "list", "--format=json"], capture_output=True, check=True)
    names = {each["name"] for each in json.loads(listed.stdout)}
    assert not names & {"torch", "transformers", "scipy", "scikit-learn"}
    size = sum(path.lstat().st_size for path in (tmp_path / "light").rglob("*") if path.is_file())
    assert size < 550e6, f"{size / 1e6:.0f} MB"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    commands = ["atlas mini atlas --size tiny", "atlas validate atlas", "predict majority --atlas atlas --run run"]
    for words in (*commands, "score run", "report run --atlas atlas"):
        done = subprocess.run(
            [str(programs / "hba"), *words.split()], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{words}: {done.stderr}"
    assert (tmp_path / "run" / "report.html").is_file()


def test_every_folder_with_code_is_a_package() -> None:
    # setuptools leaves a folder without __init__.py out of the wheel; an editable install hides that.
    folders = {path.parent for path in (ROOT / "src" / "hba").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def make(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PATH": path or os.environ["PATH"]}
    env.pop("MAKEFLAGS", None)
    command = [shutil.which("make") or "make", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", ["demo", "test", "check", "bench", "clean"])
def test_the_makefile_has_its_targets(target: str) -> None:
    done = make("--dry-run", target)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("version", ["3.10.18", "3.15.0", "none"])
def test_a_python_that_does_not_fit_is_one_clear_message(tmp_path: Path, version: str) -> None:
    python = tmp_path / "python-of-test"
    if version != "none":
        python.write_text(f'#!/bin/sh\n[ "$1" = -V ] && echo "Python {version}" && exit 0\nexit 1\n')
        python.chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "constraints-cpu.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    done = make("-C", str(tmp_path), "demo", f"PYTHON={python}")
    assert done.returncode != 0
    assert "hba needs Python 3.11, 3.12, 3.13 or 3.14" in done.stderr
    assert "make PYTHON=python3.12 demo" in done.stderr
    if version != "none":
        assert version in done.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("refusals", [2, 99])
def test_the_browser_waits_for_another_apt_and_for_nothing_else(tmp_path: Path, refusals: int) -> None:
    """Two programs that stand in for the machine's: apt's list lock is taken twice, then the archive may be away."""
    away = refusals == 99
    refusal = "Temporary failure resolving" if away else "Could not get lock /var/lib/apt/lists/lock. It is held"
    programs = {
        "apt-get": f'echo "$*" >> calls; [ $(wc -l < calls) -gt {refusals} ] || {{ echo "E: {refusal}"; exit 100; }}',
        "id": "echo 0",
        "sleep": "true",
    }
    for name, script in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\ncd {tmp_path}\n{script}\n")
        (tmp_path / name).chmod(0o755)
    for name in ("sh", "seq", "wc", "tail", "make"):
        (tmp_path / name).symlink_to(shutil.which(name) or name)
    done = make("browser", path=str(tmp_path))
    assert done.returncode == 0, done.stderr
    calls = [line.split()[0] for line in (tmp_path / "calls").read_text().splitlines()]
    assert calls == (["update"] if away else ["update"] * 3 + ["install"])
    assert ("No Chromium" in done.stdout) == away
    assert ("Waiting for another apt" in done.stdout) != away


# --- what others read: the citation, the workflows, the hooks, the images ---------------------------------------------


def read_yaml(name: str) -> dict[str, Any]:
    return yaml.load((ROOT / name).read_text(encoding="utf-8"), Loader=yaml.BaseLoader)


def test_the_citation_is_the_paper_of_the_readme() -> None:
    paper = read_yaml("CITATION.cff")["preferred-citation"]
    entry = re.sub(r"\s+", " ", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert f"{{{paper['title']}}}" in entry
    assert " and ".join(f"{each['given-names']} {each['family-names']}" for each in paper["authors"]) in entry
    assert paper["identifiers"][0]["value"] in entry


def test_workflows_call_the_makefile_on_every_supported_python() -> None:
    jobs = read_yaml(".github/workflows/ci.yml")["jobs"]
    assert tuple(jobs["test"]["strategy"]["matrix"]["python"]) == PYTHONS
    calls = {step["run"].split()[1] for job in jobs.values() for step in job["steps"] if "make " in step.get("run", "")}
    assert calls == {"check", "docs", "test"}
    assert all(re.search(rf"(?m)^{call}:", (ROOT / "Makefile").read_text(encoding="utf-8")) for call in calls)
    build = read_yaml(".github/workflows/release.yml")["jobs"]["build"]
    taken = [step for job in (*jobs.values(), build) for step in job["steps"] if "checkout" in step.get("uses", "")]
    assert len(taken) == 4 and all(
        step["with"] == {"fetch-depth": "0", "persist-credentials": "false"} for step in taken
    )
    release = read_yaml(".github/workflows/release.yml")["jobs"]["publish"]
    assert release["permissions"] == {"id-token": "write"} and "secrets." not in json.dumps(release)


def test_hooks_are_what_make_check_runs() -> None:
    (repo,) = read_yaml(".pre-commit-config.yaml")["repos"]
    recipe = make("--dry-run", "check").stdout
    assert repo["hooks"] and all(hook["entry"] in recipe for hook in repo["hooks"])


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_an_image_copies_what_is_there_and_not_ignored(name: str) -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {each for line in re.findall(r"(?m)^COPY (.*) \S+$", (ROOT / name).read_text()) for each in line.split()}
    assert copied == allowed and all((ROOT / each).exists() for each in copied)
    version = re.search(r"ARG VERSION=(\S+)", (ROOT / name).read_text())
    assert version is not None and f'fallback_version = "{version[1]}"' in (ROOT / "pyproject.toml").read_text()


def test_an_image_takes_from_another_index_what_it_names_and_nothing_that_is_pinned_beside_it() -> None:
    """PyTorch's index has few versions of torch's own needs: with their pins no answer there would fit."""
    other = re.findall(r"pip install .*--index-url.*", (ROOT / "Dockerfile").read_text())
    assert other and all("--no-deps" in each for each in other)
    pinned = (ROOT / "constraints-cpu.txt").read_text()
    assert all(f"\n{name}==" in pinned for name in ("torch", "torchvision"))


def test_ci_runs_the_checks_and_the_tests_and_nothing_else() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    assert lines == ["set -euo pipefail", 'cd "$(dirname "${BASH_SOURCE[0]}")/.."', "make check", "make test"]
