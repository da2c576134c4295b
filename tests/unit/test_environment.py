"""How many cores and how much memory a process may use: affinity, control groups of both versions, ranks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hba import environment
from hba.environment import memory_bytes, usable_cores


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 64 cores whose control groups lie in a folder."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(environment, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(environment, "CGROUPS_OF_PROCESS", tmp_path / "of_process")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def test_cores_are_divided_by_the_ranks_of_the_machine(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for ranks in ("1", "8", "100", ""):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        found.append(usable_cores())
    assert found == [64, 8, 1, 64]


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", 64), ("1600000 100000", 16), ("50000 100000", 1)])
def test_a_quota_of_version_2_counts_wherever_it_stands(machine: Path, quota: str, cores: int) -> None:
    write(machine / "of_process", "0::/slurm/job_7/step_0")
    write(machine / "cgroup/slurm/job_7/step_0/cpu.max", "max 100000")
    write(machine / "cgroup/slurm/job_7/cpu.max", quota)
    assert usable_cores() == cores


def test_a_quota_of_version_1(machine: Path) -> None:
    write(machine / "of_process", "4:memory:/docker/a\n1:cpu,cpuacct:/docker/a\n0::/")
    for folder, quota in (("cgroup/cpu/docker/a", "-1"), ("cgroup/cpu", "400000")):  # as seen from inside and outside
        write(machine / folder / "cpu.cfs_quota_us", quota)
        write(machine / folder / "cpu.cfs_period_us", "100000")
    write(machine / "cgroup/memory/docker/a/memory.limit_in_bytes", str(1 << 30))
    assert usable_cores() == 4
    assert memory_bytes() == 1 << 30


def test_affinity_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
