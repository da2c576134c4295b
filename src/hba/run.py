"""The run folder: where a command leaves config, logs, results and what it left out, and finds them again to go on.

`RunFolder.open` makes the folder or resumes it. It refuses a folder that another process uses, and one that holds a
run with another config, seed, command or data: going on there would mix two experiments. A key that the version of hba
which began the run did not have counts as its default. Under `accelerate launch` the first rank alone locks and
records; other ranks only add to the quarantine.

Invariants: config.yaml and environment.json are those of the run's start; after `truncate_log(step)` the log holds
what an uninterrupted run had logged by that step; a sample stands in quarantine.jsonl once.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from hba.atlas.rows import Quarantined
from hba.config import defaults, flat, inline_yaml, keys_without_effect, read_yaml, renamed, to_dict, to_yaml
from hba.environment import environment, now
from hba.errors import ConfigError, HbaError, InputError
from hba.storage import AppendLog, Lock, StorageError, alone, read_json, read_jsonl, write_data, write_json, write_jsonl

if TYPE_CHECKING:
    from rich.console import Console

class Pulse:
    """Lines that say how far a long command is, where no bar can move: in the log of a batch job, or in a pipe.

    The first comes after FIRST seconds, each next one after twice as long, up to LONGEST. A terminal gets none.
    """

    FIRST, LONGEST = 60.0, 600.0

    def __init__(self, console: Console, clock: Callable[[], float] = monotonic) -> None:
        self._console, self._clock, self._wait = console, clock, self.FIRST
        self._silent = console.is_terminal or console.is_jupyter
        self._last = clock()

    def beat(self, said: Callable[[], str]) -> None:
        """Print what `said` says, if it is time."""
        if not self._silent and (at := self._clock()) - self._last >= self._wait:
            self._last, self._wait = at, min(2 * self._wait, self.LONGEST)
            self._console.print(said(), markup=False, highlight=False, soft_wrap=True)


# quarantine.jsonl: the samples that a run left out, each once, with the place and the reason.
#
# A sample is quarantined, never replaced. The log is append-only and deduplicated by id, so that a resumed run names
# the same samples as an uninterrupted one. The ranks of a run share the file: whoever adds a sample has it alone, and
# looks first at what the others have added.


class QuarantineLog:
    """The quarantine of one run folder; the file is made with the first sample."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "quarantine.jsonl"
        self._log: AppendLog | None = None
        self._known: set[str] = set()
        self._num_read = 0  # bytes of the file that `_known` is of

    def add(self, sample: Quarantined) -> None:
        """Record a sample unless it is there already. Raises StorageError on a full disk."""
        if sample.id in self._known:
            return
        with alone(self.path):
            if self._log is None:
                self._log = AppendLog(self.path)
                self.records()  # names a line that is none of a quarantine
            self._read_new()
            if sample.id not in self._known:
                self._log.append(sample._asdict())
                self._read_new()

    def _read_new(self) -> None:
        with self.path.open("rb") as handle:
            handle.seek(self._num_read)
            self._known |= {json.loads(line)["id"] for line in handle}
            self._num_read = handle.tell()

    def add_all(self, samples: Iterable[Quarantined]) -> None:
        """Record each sample that is not there already."""
        for sample in samples:
            self.add(sample)

    def records(self, split: str | None = None) -> list[dict[str, Any]]:
        """What has been left out so far, in one split or in all, other ranks and earlier sessions included.

        Raises InputError naming file, line and field for a line that is none of a quarantine.
        """
        found: list[dict[str, Any]] = []
        lines = read_jsonl(self.path) if self.path.is_file() else ()
        for line in lines:
            missing = [name for name in ("id", "split") if not isinstance(line.record.get(name), str)]
            if missing:
                where = f"{self.path}:{line.number}, {missing[0]}"
                raise InputError("expected a text", where=where, fix="Repair the line, or remove it.")
            if split is None or line.record["split"] == split:
                found.append(line.record)
        return found

    def close(self) -> None:
        """Flush to the disk and close."""
        if self._log is not None:
            self._log.close()
            self._log = None

    def __enter__(self) -> QuarantineLog:
        if self.path.is_file():
            AppendLog(self.path).close()  # cuts off a line that a kill left torn, before anyone reads it
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# --- the run folder ---------------------------------------------------------------------------------------------------


MACHINE_FACTS = ("hba_version", "git_commit", "python", "platform", "cpu", "cpu_cores", "gpus", "packages")
# A killed process holds its lock until it is torn down, and a worker forked in that moment until it starts.
LOCK_GRACE_SECONDS = 1.0
ELSEWHERE = "Name another run folder with --run, or give the old values to resume this one."


class FolderInUseError(HbaError):
    """Another process holds the folder's lock."""


class RunFolder:
    """A run folder that is open in this process: made by `open`, used as a context manager."""

    def __init__(self, path: Path, lock: Lock | None) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.environment = path / "environment.json"
        self.checkpoints = path / "checkpoints"
        self.predictions = path / "predictions.jsonl"
        self.metrics = path / "metrics.json"
        self.report = path / "report.html"
        self.rollouts = path / "rollouts.jsonl"
        self._log_path = path / "log.jsonl"
        self._lock = lock
        self._log: AppendLog | None = None
        self.quarantine = QuarantineLog(path)

    @classmethod
    def open(
        cls, path: str | Path, *, config: Any, command: str, seed: int, data: Mapping[str, Any] | None = None
    ) -> RunFolder:
        """Make the folder with config.yaml and environment.json, or resume the run that it holds.

        `config` is a config dataclass. Raises ConfigError naming the keys in which the folder's config differs (keys
        that change no result may), HbaError when another process uses the folder, StorageError when it cannot be
        written.
        """
        path = Path(path)
        if int(os.environ.get("RANK", "0")) != 0:
            return cls(path, None)
        run = cls(path, _lock(path))
        try:
            run._start_or_resume(config, command, seed)
            if data is not None:
                run.record_data(data)
        except BaseException:
            run.close()
            raise
        return run

    @property
    def is_main(self) -> bool:
        """Whether this process keeps the folder's records: the first rank, while the folder is open."""
        return self._lock is not None

    def log(self, record: Mapping[str, Any]) -> None:
        """Add a line to log.jsonl; nothing on ranks other than the first. NaN is refused (ValueError)."""
        if self.is_main:
            self._log = self._log or AppendLog(self._log_path)
            self._log.append(dict(record))

    def truncate_log(self, step: int) -> None:
        """Drop the lines of later steps than `step`, that of the checkpoint from which a run goes on, from all logs.

        Lines of `step` itself stay: log them before the checkpoint is written. Lines without a step stay, too.
        """
        self._close_log()
        for path in (self._log_path, self.rollouts):
            if not self.is_main or not path.is_file():
                continue
            lines = [line.record for line in read_jsonl(path)]
            kept = [record for record in lines if record.get("step", step) <= step]
            if len(kept) < len(lines):
                write_jsonl(path, kept)

    def record_data(self, data: Mapping[str, Any]) -> None:
        """Write the data's record (path, fingerprint, synthetic) into environment.json; nothing on other ranks.

        Raises ConfigError when the run was started on data with another fingerprint.
        """
        if not self.is_main:
            return
        recorded = read_json(self.environment)
        before = recorded.get("data")
        if before is None:
            write_json(self.environment, {**recorded, "data": dict(data)})
        elif before.get("fingerprint") != data.get("fingerprint"):
            what = f"the run was started on other data ({before.get('path')}, now {data.get('path')})"
            raise ConfigError(what, where=str(self.environment), fix="Use another run folder, or restore the data.")

    def close(self) -> None:
        """Close the logs and let other processes have the folder."""
        self._close_log()
        self.quarantine.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _close_log(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None

    def _start_or_resume(self, config: Any, command: str, seed: int) -> None:
        here = environment(command=command, seed=seed)
        if self.config.is_file():
            self._require_same(config, command, seed)
        if self.environment.is_file() and self.config.is_file():  # without a config it is of predictions in this folder
            _note_resume(self.environment, here)
        else:
            before = read_json(self.environment) if self.environment.is_file() else None
            write_json(self.environment, here if before is None else {**here, "resumed": _as_resumed(before, here)})
        if not self.config.is_file():
            write_data(self.config, to_yaml(config))
        for log in (self._log_path, self.rollouts, self.quarantine.path):
            if log.is_file():
                AppendLog(log).close()  # cuts off a line that a kill left torn, before anyone reads it

    def _require_same(self, config: Any, command: str, seed: int) -> None:
        given = flat(to_dict(config))
        # A key that an older version did not have was what its default is now.
        recorded = {renamed(type(config), key): value for key, value in flat(read_yaml(self.config)).items()}
        recorded = {key: value for key, value in defaults(type(config)).items() if key in given} | recorded
        if self.environment.is_file():
            of_run = read_json(self.environment)
            recorded |= {"seed (of the run)": of_run["seed"], "command (of the run)": of_run["command"]}
            given |= {"seed (of the run)": seed, "command (of the run)": command}
        changed = [
            f"{key} was {_shown(recorded, key)}, is {_shown(given, key)}"
            for key in sorted({*recorded, *given} - keys_without_effect(type(config)))
            if _shown(recorded, key) != _shown(given, key)
        ]
        if changed:
            what = f"the folder holds a run with another config: {'; '.join(changed)}"
            raise ConfigError(what, where=str(self.config), fix=ELSEWHERE)


def record_predicting(
    folder: Path, *, command: str, seed: int | None, data: Mapping[str, Any], began: bool, shared: bool
) -> None:
    """Write on what rows are predicted, and which, into environment.json of `folder`.

    `began` says that rows were predicted here before: this is where and when predicting went on, or, where nothing says
    on what they were, nothing is written. With `shared` others predict beside this process, and it is noted where it
    has another machine. In the folder of a training, whose record stays, all is noted beside it. The caller holds the
    folder's lock.
    """
    path, here = folder / "environment.json", {**environment(command=command, seed=seed), "data": dict(data)}
    recorded = read_json(path) if path.is_file() else None
    own = recorded is not None and recorded.get("command") == command
    if recorded is None or (own and not began and not shared):
        if recorded is not None or not began:
            write_json(path, here)
        return
    if own and recorded.get("data") != here["data"]:
        write_json(path, {**recorded, "data": here["data"]})  # rows have come since
    _note_resume(path, here, only_changes=shared and own)


def _note_resume(path: Path, here: Mapping[str, Any], *, only_changes: bool = False) -> None:
    """Add when the run was resumed, by which command and over what rows if by another, and what of the machine or its
    packages had changed since it began; with `only_changes`, where something had."""
    recorded = read_json(path)
    changed = {fact: here[fact] for fact in MACHINE_FACTS if recorded.get(fact) != here[fact]}
    if only_changes and not changed:
        return
    other = {} if recorded.get("command") == here["command"] else {"command": here["command"], "data": here["data"]}
    resumed = [*recorded.get("resumed", []), {**other, "started_at": now(), "changed": changed}]
    write_json(path, {**recorded, "resumed": resumed})


def _as_resumed(before: Mapping[str, Any], here: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The record `before` of what was done in a folder, as one beside that of `here`."""
    changed = {fact: before[fact] for fact in MACHINE_FACTS if fact in before and before[fact] != here[fact]}
    about = {key: before[key] for key in ("command", "data", "started_at") if key in before}
    return [{**about, "changed": changed}, *before.get("resumed", [])]


def wandb_run(path: Path) -> dict[str, str]:
    """Name and id of the Weights & Biases run of a run folder: one of its own, and the same after a resume."""
    known = path / "wandb.json"
    if not known.is_file():
        write_json(known, {"id": uuid.uuid4().hex})
    place = path.resolve()
    return {"name": f"{place.parent.name}/{place.name}", "id": str(read_json(known)["id"])}


def _lock(path: Path, patience_seconds: float = LOCK_GRACE_SECONDS) -> Lock:
    """The lock of a run folder, which is made if need be."""
    if path.exists() and not path.is_dir():
        raise ConfigError("the run folder is a file", where=str(path), fix="Name a folder.")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what, fix = f"cannot make the run folder ({error.strerror})", "Choose a writable place."
        raise StorageError(what, where=str(path), fix=fix) from None

    file = path / ".lock"
    try:
        lock = Lock(file, patience_seconds=patience_seconds)
    except BlockingIOError:
        holder = file.read_text(encoding="utf-8", errors="replace").strip() or "unknown"
        what = f"another process (id {holder}) uses this run folder"
        fix = "Wait for it to end, end it, or use another run folder."
        raise FolderInUseError(what, where=str(path), fix=fix) from None
    file.write_text(f"{os.getpid()}\n", encoding="utf-8")
    return lock


@contextmanager
def locked_folder(path: Path, patience_seconds: float = LOCK_GRACE_SECONDS) -> Iterator[None]:
    """Make the folder if need be and keep other commands out of it.

    Raises FolderInUseError when one is in it and stays for longer than `patience_seconds`.
    """
    with closing(_lock(path, patience_seconds)):
        yield


def _shown(values: Mapping[str, Any], key: str) -> str:
    return inline_yaml(values[key]) if key in values else "not there"
