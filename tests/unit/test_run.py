"""The run folder: what it records, when it resumes, and what it refuses to mix."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import pytest
from rich.console import Console

from hba.atlas.rows import Quarantined
from hba.config import load_config, option
from hba.environment import environment
from hba.errors import ConfigError, HbaError, InputError
from hba.run import Pulse, QuarantineLog, RunFolder
from hba.train.config import SftConfig
from hba.train.state import training_run

DATA = {"path": "atlas", "fingerprint": "abc", "synthetic": True}


@dataclass(frozen=True, kw_only=True)
class Inner:
    learning_rate: float = option(1e-4, "peak rate")


@dataclass(frozen=True, kw_only=True)
class Settings:
    inner: Inner = field(default_factory=Inner)
    atlas: str = option("atlas", "the data")
    workers: int = option(1, "processes", affects_result=False)


def open_run(path: Path, config: Settings | None = None, seed: int = 0) -> RunFolder:
    return RunFolder.open(path, config=config or Settings(), command="train sft", seed=seed)


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


HOLD = """
import os, sys, time
from pathlib import Path
from tests_settings import Settings
from hba.run import QuarantineLog
from hba.run import RunFolder
run = RunFolder.open(Path(sys.argv[1]), config=Settings(), command="train sft", seed=0)
run.log({"step": 1, "loss": 0.5})
child = os.fork() if sys.argv[2:] == ["fork"] else -1
if child != 0:
    os.write(1, f"open {child}\\n".encode())
time.sleep(60)
os._exit(0)
"""


def holding_process(tmp_path: Path, run: Path, *arguments: str) -> subprocess.Popen[str]:
    (tmp_path / "tests_settings.py").write_text(Path(__file__).read_text())
    script = tmp_path / "hold.py"
    script.write_text(HOLD)
    return subprocess.Popen([sys.executable, str(script), str(run), *arguments], stdout=subprocess.PIPE, text=True)


def test_a_new_folder_holds_the_resolved_config_and_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "one"
    with RunFolder.open(path, config=Settings(), command="train sft", seed=7, data=DATA) as run:
        assert run.path == path
        assert run.is_main
    assert load_config(Settings, path / "config.yaml", []) == Settings()
    recorded = json.loads((path / "environment.json").read_text())
    assert recorded["seed"] == 7
    assert recorded["command"] == "train sft"
    assert recorded["data"] == DATA
    assert recorded["packages"]["torch"]
    keys = {"hba_version", "git_commit", "python", "platform", "cpu", "cpu_cores", "gpus", "packages", "started_at"}
    assert keys <= set(recorded)


def test_no_environment_variable_is_recorded_and_torch_is_not_imported(tmp_path: Path) -> None:
    code = (
        "import json, sys; from hba.environment import environment;"
        "print(json.dumps(environment(command='x', seed=0))); sys.exit('torch' in sys.modules)"
    )
    secret = "hf_a-very-secret-value"
    env = {**os.environ, "HF_TOKEN": secret, "WANDB_API_KEY": secret}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert secret not in done.stdout


def test_the_commit_is_that_of_the_checkout() -> None:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        pytest.skip("not a checkout")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
    commit = environment(command="x", seed=0)["git_commit"]
    assert commit.removesuffix("-dirty") == head.stdout.strip()


def test_the_same_config_resumes_and_the_first_record_stays(tmp_path: Path) -> None:
    open_run(tmp_path).close()
    first = json.loads((tmp_path / "environment.json").read_text())
    with open_run(tmp_path, replace(Settings(), workers=8)):
        pass
    again = json.loads((tmp_path / "environment.json").read_text())
    assert {key: again[key] for key in first} == first
    assert [resume["changed"] for resume in again["resumed"]] == [{}]
    assert load_config(Settings, tmp_path / "config.yaml", []).workers == 1


def test_a_resume_on_other_versions_says_which(tmp_path: Path) -> None:
    open_run(tmp_path).close()
    file = tmp_path / "environment.json"
    recorded = json.loads(file.read_text())
    file.write_text(json.dumps({**recorded, "python": "3.9.0"}))
    open_run(tmp_path).close()
    assert list(json.loads(file.read_text())["resumed"][0]["changed"]) == ["python"]


def test_a_training_in_a_folder_of_predictions_keeps_what_they_were_made_on(tmp_path: Path) -> None:
    predicted = {**environment(command="predict", seed=None), "python": "3.9.0", "data": DATA}
    (tmp_path / "environment.json").write_text(json.dumps(predicted))
    open_run(tmp_path).close()
    found = json.loads((tmp_path / "environment.json").read_text())
    (before,) = found["resumed"]
    assert found["command"] != "predict" and found["python"] != "3.9.0"
    assert (before["command"], before["data"], before["changed"]) == ("predict", DATA, {"python": "3.9.0"})


def test_another_config_is_refused_and_the_keys_named(tmp_path: Path) -> None:
    open_run(tmp_path).close()
    with pytest.raises(ConfigError) as caught:
        open_run(tmp_path, Settings(inner=Inner(learning_rate=1e-3), workers=8))
    message = str(caught.value)
    assert str(tmp_path / "config.yaml") in message
    assert "inner.learning_rate was 0.0001, is 0.001" in message
    assert "workers" not in message
    assert "atlas" not in message
    open_run(tmp_path).close()  # the refusal released the lock and changed nothing


@dataclass(frozen=True, kw_only=True)
class NewerInner:
    learning_rate: float = option(1e-4, "peak rate")
    decay: float = option(0.01, "of matrices")


@dataclass(frozen=True, kw_only=True)
class Newer:
    """Settings as a later version has them: a key more inside a section and outside, and a section that may be None."""

    inner: NewerInner = field(default_factory=NewerInner)
    atlas: str = option("atlas", "the data")
    workers: int = option(1, "processes", affects_result=False)
    formats: tuple[str, ...] = option(("plain",), "a list")
    server: Inner | None = option(None, "a section")


def test_a_run_of_an_older_version_goes_on_while_new_keys_have_their_defaults(tmp_path: Path) -> None:
    open_run(tmp_path).close()
    before = (tmp_path / "config.yaml").read_text()
    RunFolder.open(tmp_path, config=Newer(), command="train sft", seed=0).close()
    assert (tmp_path / "config.yaml").read_text() == before
    for changed, message in (
        (Newer(inner=NewerInner(decay=0.1)), r"inner\.decay was 0\.01, is 0\.1"),
        (Newer(formats=("boxed",)), r"formats was \[plain\], is \[boxed\]"),
    ):
        with pytest.raises(ConfigError, match=message):
            RunFolder.open(tmp_path, config=changed, command="train sft", seed=0)
    with pytest.raises(ConfigError, match="server"):
        RunFolder.open(tmp_path, config=Newer(server=Inner()), command="train sft", seed=0)


def test_another_seed_is_refused(tmp_path: Path) -> None:
    open_run(tmp_path).close()
    with pytest.raises(ConfigError, match=r"seed.* was 0, is 1"):
        open_run(tmp_path, seed=1)


def test_a_config_of_another_kind_is_refused(tmp_path: Path) -> None:
    open_run(tmp_path).close()
    with pytest.raises(ConfigError, match=r"inner\.learning_rate was 0\.0001, is not there"):
        RunFolder.open(tmp_path, config=Inner(learning_rate=1.0), command="other", seed=0)
    other = r'another config: command \(of the run\) was train sft, is train sft --engine verl'
    with pytest.raises(ConfigError, match=other):
        RunFolder.open(tmp_path, config=Settings(), command="train sft --engine verl", seed=0)


def test_other_data_are_refused(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.record_data(DATA)
        run.record_data({**DATA, "path": "moved"})
        with pytest.raises(ConfigError, match="other data"):
            run.record_data({**DATA, "fingerprint": "xyz"})
    with pytest.raises(ConfigError, match="other data"):
        RunFolder.open(tmp_path, config=Settings(), command="train sft", seed=0, data={**DATA, "fingerprint": "xyz"})
    assert json.loads((tmp_path / "environment.json").read_text())["data"] == DATA


def test_a_folder_in_use_is_refused_and_free_after_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "run"
    holder = holding_process(tmp_path, path)
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "open -1\n"
        with pytest.raises(HbaError, match=rf"another process \(id {holder.pid}\) uses this run folder"):
            open_run(path)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    with open_run(path) as run:
        run.log({"step": 2, "loss": 0.25})
    assert [line["step"] for line in lines(path / "log.jsonl")] == [1, 2]


def test_a_worker_that_outlives_its_killed_parent_does_not_keep_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "run"
    holder = holding_process(tmp_path, path, "fork")
    assert holder.stdout is not None
    child = int(holder.stdout.readline().removeprefix("open "))
    try:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        os.kill(child, 0)  # still alive
        open_run(path).close()
    finally:
        holder.kill()
        holder.wait()
        os.kill(child, signal.SIGKILL)
        holder.stdout.close()


def test_a_child_that_ends_does_not_free_its_parents_folder(tmp_path: Path) -> None:
    with open_run(tmp_path):
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        with pytest.raises(HbaError, match="uses this run folder"):
            open_run(tmp_path)


def test_the_log_of_a_resumed_run_equals_that_of_an_uninterrupted_one(tmp_path: Path) -> None:
    def train(run: RunFolder, first: int, last: int) -> None:
        for step in range(first, last + 1):
            run.log({"step": step, "kind": "train", "loss": 1 / 3 / step})
            if step % 2 == 0:
                run.log({"step": step, "kind": "validation", "metrics": {"EMO": 0.1 * step, "SEN": None}})

    with open_run(tmp_path / "whole") as run:
        train(run, 1, 6)
    with open_run(tmp_path / "cut") as run:
        train(run, 1, 5)
    with (tmp_path / "cut" / "log.jsonl").open("a") as handle:
        handle.write('{"step": 6, "kind": "tr')  # the line that kill -9 tore
    with open_run(tmp_path / "cut") as run:
        run.truncate_log(4)
        train(run, 5, 6)
    assert (tmp_path / "cut" / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()


def test_truncating_between_log_lines_keeps_the_log_usable(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.truncate_log(0)
        run.log({"step": 1})
        run.truncate_log(0)
        run.log({"step": 1, "again": True})
    assert lines(tmp_path / "log.jsonl") == [{"step": 1, "again": True}]


def test_a_log_refuses_nan(tmp_path: Path) -> None:
    with open_run(tmp_path) as run, pytest.raises(ValueError, match="JSON"):
        run.log({"step": 1, "loss": float("nan")})


LOST = Quarantined("train/3", "train", "tess", "train.jsonl:3, audios", "audios", "no such file")


def test_a_sample_stands_in_the_quarantine_once(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        assert run.quarantine.records() == []
        run.quarantine.add(LOST)
        run.quarantine.add(LOST)
    with open_run(tmp_path) as run:
        run.quarantine.add(LOST._replace(reason="still not there"))
        run.quarantine.add(LOST._replace(id="test/4", split="test"))
        assert [entry["id"] for entry in run.quarantine.records()] == ["train/3", "test/4"]
        assert [entry["id"] for entry in run.quarantine.records("test")] == ["test/4"]
    assert lines(tmp_path / "quarantine.jsonl")[0] == LOST._asdict()


def test_other_ranks_share_the_folder_and_only_quarantine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_run(tmp_path) as main:
        monkeypatch.setenv("RANK", "1")
        with open_run(tmp_path) as other:
            assert not other.is_main
            other.log({"step": 1})
            other.truncate_log(0)
            other.record_data(DATA)
            other.quarantine.add(LOST)
        assert [entry["id"] for entry in main.quarantine.records()] == ["train/3"]
    assert not (tmp_path / "log.jsonl").exists()
    assert json.loads((tmp_path / "environment.json").read_text())["data"] is None


def test_a_rank_says_why_it_was_refused_when_the_first_has_removed_the_folder_already(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    run = training_run(tmp_path / "run", config=Settings(), command="train sft", seed=0)
    with pytest.raises(InputError, match="no row is left"), run:
        raise InputError("no row is left")
    assert not (tmp_path / "run").exists()


def test_ranks_that_meet_the_same_samples_at_once_record_each_once(tmp_path: Path) -> None:
    """Repeated rows reach several ranks; each had read the file before the others wrote."""
    go, start = os.pipe()
    children = []
    for rank in range(6):
        child = os.fork()
        if child == 0:
            os.close(start)
            log = QuarantineLog(tmp_path)
            log.add(LOST._replace(id=f"test/{rank}"))  # all have the file open before the first goes on
            os.read(go, 1)
            for number in range(rank, rank + 40):
                log.add(LOST._replace(id=f"train/{number % 40}"))
            os._exit(0)
        children.append(child)
    os.close(start)
    assert {os.waitpid(child, 0)[1] for child in children} == {0}
    found = [str(line["id"]) for line in lines(tmp_path / "quarantine.jsonl")]
    assert sorted(found) == sorted([*(f"train/{i}" for i in range(40)), *(f"test/{i}" for i in range(6))])


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    open_run(tmp_path).close()
    (tmp_path / "environment.json").write_text("{")
    with pytest.raises(InputError, match=r"environment\.json:1"):
        open_run(tmp_path)


def test_a_place_that_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        open_run(tmp_path / "file")
    with pytest.raises(InputError, match="cannot make the run folder"):
        open_run(tmp_path / "file" / "below")


def test_an_interrupted_start_is_completed(tmp_path: Path) -> None:
    open_run(tmp_path).close()
    (tmp_path / "config.yaml").unlink()
    open_run(tmp_path).close()
    assert load_config(Settings, tmp_path / "config.yaml", []) == Settings()


def test_a_run_of_before_goes_on_when_a_key_that_changed_no_result_is_gone(tmp_path: Path) -> None:
    config = load_config(SftConfig, None, ["atlas=x"])
    with RunFolder.open(tmp_path, config=config, command="train sft", seed=0) as run:
        pass
    run.config.write_text(run.config.read_text().replace("  prefetch_megabytes: 512\n", "  prefetch: 4\n"))
    assert "prefetch: 4" in run.config.read_text()
    with RunFolder.open(tmp_path, config=config, command="train sft", seed=0):
        pass


@dataclass(frozen=True, kw_only=True)
class Renamed:
    RENAMED: ClassVar[dict[str, str]] = {"inner.learning_rate": "rate", "inner": "newer"}

    newer: Inner = field(default_factory=Inner)
    rate: float = option(1e-4, "peak rate")
    atlas: str = option("atlas", "the data")
    workers: int = option(1, "processes", affects_result=False)


def test_a_run_of_an_older_version_goes_on_under_new_names_of_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with RunFolder.open(path, config=Settings(inner=Inner(learning_rate=0.5)), command="train sft", seed=0):
        pass
    with RunFolder.open(path, config=replace(Renamed(), rate=0.5), command="train sft", seed=0):
        pass
    with pytest.raises(ConfigError, match=r"rate was 0\.5, is 0\.25"):
        RunFolder.open(path, config=replace(Renamed(), rate=0.25), command="train sft", seed=0)
    for written in (["inner.learning_rate=1.0"], ["inner={learning_rate: 1.0}"]):
        with pytest.raises(ConfigError, match=r"'inner.learning_rate' has another name now. Fix: Write rate="):
            load_config(Renamed, None, written)
    file = tmp_path / "old.yaml"
    file.write_text("inner:\n  other: 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"old.yaml:1.*'inner.other' has another name now. Fix: Write newer.other"):
        load_config(Renamed, file)


@pytest.mark.parametrize("terminal", [False, True])
def test_the_log_of_a_job_says_now_and_then_how_far_it_is(terminal):
    out, clock = io.StringIO(), iter(range(0, 3601, 10))
    pulse = Pulse(Console(file=out, force_terminal=terminal, force_jupyter=False, width=20), lambda: next(clock))
    for number in range(1, 361):
        pulse.beat(lambda: "training: step, and more words than are in a line")
        if terminal or number * 10 not in (60, 180, 420, 900, 1500, 2100, 2700, 3300):
            assert not out.getvalue()
        else:
            assert out.getvalue() == "training: step, and more words than are in a line\n"
        out.truncate(out.seek(0))
