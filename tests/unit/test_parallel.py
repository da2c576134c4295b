"""Processes that crash, raise or hang cost one item each, never the run. `eval` does whatever an item says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hba import storage
from hba.atlas.source import Slice, read_bytes
from hba.errors import MachineError
from hba.parallel import Died, each

CRASH = "__import__('os').kill(__import__('os').getpid(), {})"


def run(items: list[str], workers: int = 1, hangs: str = "") -> dict[str, object]:
    done = list(each(eval, items, workers=workers, patience=lambda item: 1.0 if item == hangs else 600.0))
    assert sorted(item for item, _ in done) == sorted(items), "every item comes back exactly once"
    return dict(done)


def test_results_belong_to_their_items() -> None:
    assert run([f"{i} * 2" for i in range(30)], workers=2) == {f"{i} * 2": 2 * i for i in range(30)}
    assert run([]) == {}


def test_a_crash_costs_one_item() -> None:
    crash, kill = CRASH.format(int(signal.SIGSEGV)), CRASH.format(int(signal.SIGKILL))
    found = run(["1", crash, "2", "3", kill, "4", "5", "6", "7"])
    assert found[crash] == Died("crashed (SIGSEGV)")
    assert isinstance(found[kill], Died)
    assert "SIGKILL" in found[kill].reason
    assert [found[str(i)] for i in range(1, 8)] == list(range(1, 8))


def test_what_an_item_raises_or_leaves_with_is_its_result() -> None:
    found = run(["1 / 0", "__import__('os')._exit(3)", "5"])
    assert found == {
        "1 / 0": Died("raised ZeroDivisionError: division by zero"),
        "__import__('os')._exit(3)": Died("ended (exit code 3)"),
        "5": 5,
    }


def test_an_item_that_hangs_is_given_up() -> None:
    hang = "__import__('time').sleep(3600)"
    assert run([hang, "1"], hangs=hang) == {hang: Died("took more than 1 s"), "1": 1}


def test_items_are_drawn_as_they_are_needed() -> None:
    drawn: list[int] = []

    def items() -> object:
        for i in range(100):
            drawn.append(i)
            yield str(i)

    results = each(eval, items(), workers=1, patience=lambda _: 60.0)  # type: ignore[arg-type]
    next(iter(results))
    assert len(drawn) < 20
    results.close()  # type: ignore[attr-defined]


def test_a_process_that_cannot_start_is_an_error(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text(
        "import os\n"
        "if __name__ != '__main__': os._exit(7)\n"
        "from hba.parallel import each\n"
        "from hba.errors import HbaError\n"
        "try: list(each(abs, [1], workers=1, patience=lambda _: 60.0))\n"
        "except HbaError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=900, check=True)
    assert "could not start: it ended (exit code 7)" in done.stdout


def test_workers_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    script, pids = tmp_path / "parent.py", tmp_path / "pids"
    script.write_text(
        "import sys\n"
        "from hba.parallel import each\n"
        "if __name__ == '__main__':\n"
        "    code = f\"open({sys.argv[1]!r}, 'a').write(str(__import__('os').getpid()) + chr(10))\"\n"
        "    items = [code, '__import__(\\'time\\').sleep(1)'] * 500\n"
        "    list(each(eval, items, workers=2, patience=lambda _: 60.0))\n"
    )
    parent = subprocess.Popen([sys.executable, str(script), str(pids)])
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and (not pids.is_file() or len(set(pids.read_text().split())) < 2):
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    workers = set(map(int, pids.read_text().split()))
    assert len(workers) == 2
    while time.monotonic() < deadline and any(_lives(pid) for pid in workers):
        time.sleep(0.05)
    assert not any(_lives(pid) for pid in workers)


def _lives(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("workers", [1, 3])
def test_more_workers_than_items(workers: int) -> None:
    assert run(["1"], workers=workers) == {"1": 1}
    assert os.getpid() not in run(["__import__('os').getpid()"], workers=workers).values()


# --- what is no fault of an item -------------------------------------------------------------------------------------


def hangs(item: bytes) -> int:
    """The first item makes its process hang; 100 MB that are on their way to it fill every buffer."""
    if item == b"hang":
        time.sleep(3600)
    return len(item)


def test_patience_is_kept_while_a_large_item_is_on_its_way_to_a_process_that_hangs() -> None:
    large = bytes(50_000_000)
    patience = lambda item: 1.0 if item == b"hang" else 600.0  # noqa: E731
    found = [result for _, result in each(hangs, [b"hang", large, b"12"], workers=1, patience=patience)]
    assert found == [Died("took more than 1 s"), 50_000_000, 2]


def waits(seconds: float) -> str:
    with storage.CLOCK.waiting():
        time.sleep(seconds)
    return "done"


def test_time_that_an_item_waits_for_storage_does_not_count() -> None:
    assert list(each(waits, [5.0], workers=1, patience=lambda _: 2.5)) == [(5.0, "done")]


def reads(path: str) -> bytes:
    part = Slice(Path(path), 0, 10)  # the kernel gives EIO for the first byte of a process's memory
    return read_bytes(part, where="a place")


def test_a_disk_that_does_not_answer_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HBA_STORAGE_PATIENCE", "0.3")
    with pytest.raises(MachineError, match=r"a place: cannot be read \(Input/output error\): its storage"):
        list(each(reads, ["/proc/self/mem"] * 3, workers=2, patience=lambda _: 60.0))


def test_an_item_whose_process_was_killed_says_so() -> None:
    kill = CRASH.format(int(signal.SIGKILL))
    found = run([kill, CRASH.format(int(signal.SIGSEGV))])
    assert [result.killed for result in found.values()] == [True, False]  # type: ignore[attr-defined]
