"""Processes that encode samples, and that may die: a decoder in C that crashes takes its process along, not the run.

A worker gets row numbers and answers each, in order, with what became of the row; so when it dies, the row that it was
at is known. That row is tried once more in a fresh process, since a kill may have another cause (memory was short);
when it ends the second one, too, or takes longer than the time limit twice, it is quarantined with the reason. The rows
behind it go to the fresh process: every row that was asked for gets exactly one outcome.

Workers are forked: a fresh one is there in milliseconds with the atlas and the encoder in its memory, and a script
needs no `__main__` guard. A child of a process with threads may find a lock held for ever; it then counts as hanging,
and its row is tried again. Workers die with the thread that started them, `kill -9` included. Linux only.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import resource
import signal
import socket
import time
import traceback
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import TypeAlias

import torch

from hba.atlas import Atlas
from hba.atlas.batch import Encoded, SampleEncoder
from hba.atlas.handover import pack, unpack
from hba.atlas.sample import MEDIA_FIELDS, Quarantined, Sample
from hba.errors import HbaError, MediaError
from hba.lifeline import die_with_parent

ATTEMPTS = 2
DEATHS_WITHOUT_RESULT = 20
_ROW_BYTES = 8


@dataclass(frozen=True)
class Failure:
    """An error that ends the run, raised when the turn of its row comes; `trace` is where it happened."""

    error: Exception
    trace: str


Outcome: TypeAlias = Encoded | Quarantined | Failure


class _WorkerError(Exception):
    """Shows where in the worker process an error was raised; the cause of the error, never raised by itself."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def raise_failure(failure: Failure) -> None:
    """Raise the error of a worker here, with its traceback as the cause."""
    raise failure.error from _WorkerError(failure.trace)


class _Worker:
    """One process, and the rows that it was given and has not answered; it is at the first of them."""

    def __init__(self, process: BaseProcess, connection: socket.socket) -> None:
        self.process, self.connection = process, connection
        self.rows: deque[int] = deque()
        self.since = time.monotonic()  # the start of the first row, as far as the main process can know
        self._exit_code: int | None = None

    def send(self, row: int) -> None:
        if not self.rows:
            self.since = time.monotonic()
        self.rows.append(row)
        try:
            self.connection.send(row.to_bytes(_ROW_BYTES, "little"))
        except (BrokenPipeError, ConnectionResetError):
            return  # it has died, which is seen where its answers are read

    def end(self) -> int:
        """Kill the process if it lives; its exit code."""
        if self._exit_code is None:
            self.process.kill()
            self.process.join()
            self._exit_code = self.process.exitcode or 0
            self.process.close()
            self.connection.close()
        return self._exit_code


class WorkerPool:
    """Encodes the rows of an atlas in `workers` processes. A context manager; nothing of it outlives it."""

    def __init__(self, atlas: Atlas, encoder: SampleEncoder, *, workers: int, timeout_seconds: float) -> None:
        self._atlas, self._encoder, self._timeout = atlas, encoder, timeout_seconds
        self._shared = atlas[0].source
        self._strikes: Counter[int] = Counter()
        self._condemned: dict[int, Quarantined] = {}
        self._deaths = 0
        self._workers: list[_Worker] = []
        for _ in range(workers):
            self._workers.append(self._start())

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.end()
        self._workers.clear()

    def request(self, row: int) -> Quarantined | None:
        """Have a row encoded; its outcome comes from `results`. A row that ended workers before is answered at once."""
        if row in self._condemned:
            return self._condemned[row]
        worker = min(self._workers, key=lambda worker: len(worker.rows))
        if not worker.rows and not worker.process.is_alive():  # died while it had nothing to do
            worker.end()
            worker = self._replace(worker)
        worker.send(row)
        return None

    def finished(self) -> dict[int, Outcome]:
        """The outcomes that are there by now, without waiting. Raises HbaError as `results` does."""
        found: dict[int, Outcome] = {}
        while some := self._collect(wait_seconds=0.0):
            found.update(some)
        return found

    def results(self) -> list[tuple[int, Outcome]]:
        """Wait until something happens to the rows asked for; the outcomes that this gave, with their rows.

        Raises HbaError when worker after worker dies and no row is ever finished.
        """
        oldest = min(worker.since for worker in self._workers if worker.rows)
        return self._collect(wait_seconds=max(0.0, oldest + self._timeout - time.monotonic()))

    def _collect(self, wait_seconds: float) -> list[tuple[int, Outcome]]:
        busy = [worker for worker in self._workers if worker.rows]
        readable = set(wait([worker.connection for worker in busy], timeout=wait_seconds))
        found: list[tuple[int, Outcome]] = []
        for worker in busy:
            if worker.connection in readable:
                answer = self._receive(worker)
                found += [answer] if answer is not None else self._bury(worker, hung=False)
            elif time.monotonic() - worker.since > self._timeout:
                found += self._bury(worker, hung=True)
        return found

    def _receive(self, worker: _Worker) -> tuple[int, Outcome] | None:
        """The next answer of a worker; None when it has died."""
        try:
            message, descriptors, _, _ = socket.recv_fds(worker.connection, _ROW_BYTES, 1)
        except ConnectionResetError:
            return None
        if not message:
            return None
        outcome: Outcome = unpack(descriptors[0], self._shared)
        os.close(descriptors[0])
        self._deaths = 0
        worker.since = time.monotonic()
        worker.rows.popleft()
        return int.from_bytes(message, "little"), outcome

    def _bury(self, worker: _Worker, *, hung: bool) -> list[tuple[int, Outcome]]:
        """Replace a worker that died or hangs. Its first row is tried again, or given up; the others go on."""
        code = worker.end()
        limit = f"{self._timeout:g} s"
        reason = f"decoding takes longer than {limit}" if hung else f"decoding ends its process: {_why(code)}"
        row = worker.rows[0]
        self._strikes[row] += 1
        self._deaths += 1
        if self._deaths >= DEATHS_WITHOUT_RESULT:
            what = f"{self._deaths} worker processes failed and no sample was finished; last: {reason}"
            fix = "Free memory or use fewer workers; loader.workers=0 shows what happens, in the main process."
            raise HbaError(what, where=self._atlas[row].where, fix=fix)
        given_up: list[tuple[int, Outcome]] = []
        if self._strikes[row] == ATTEMPTS:
            worker.rows.popleft()
            self._condemned[row] = _condemn(self._atlas[row], f"{reason} ({ATTEMPTS} attempts)")
            given_up.append((row, self._condemned[row]))
        self._replace(worker)
        return given_up

    def _replace(self, old: _Worker) -> _Worker:
        new = self._workers[self._workers.index(old)] = self._start(without=old)
        for row in old.rows:
            new.send(row)
        return new

    def _start(self, without: _Worker | None = None) -> _Worker:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        others = [ours, *(worker.connection for worker in self._workers if worker is not without)]
        process = multiprocessing.get_context("fork").Process(
            target=_work,
            args=(theirs, others, os.getpid(), self._atlas, self._encoder, self._shared),
            name="hba-loader",
            daemon=True,
        )
        process.start()
        theirs.close()
        return _Worker(process, ours)


def _why(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"exit code {code}"
    known = {int(each): each.name for each in signal.Signals}
    name = known.get(-code, f"signal {-code}")
    return f"{name}, perhaps for want of memory" if name == "SIGKILL" else name


def _condemn(sample: Sample, reason: str) -> Quarantined:
    present = [name for name in MEDIA_FIELDS[:3] if getattr(sample, name)]
    field = present[0] if len(present) == 1 else "row"
    return Quarantined(sample.id, sample.split, sample.dataset, sample.where, field, reason)


def encode_row(atlas: Atlas, encoder: SampleEncoder, row: int) -> Encoded | Quarantined:
    """Encode a row; Quarantined when a medium of it cannot be read. Any other error is the caller's."""
    sample = atlas[row]
    try:
        return encoder.encode(sample)
    except MediaError as error:
        return sample.quarantined(error)


def _work(
    connection: socket.socket,
    others: Sequence[socket.socket],
    parent: int,
    atlas: Atlas,
    encoder: SampleEncoder,
    shared: object,
) -> None:
    """The life of a worker: rows in, outcomes out, until the main process closes the connection."""
    _settle(parent)
    for inherited in others:
        inherited.close()
    while message := connection.recv(_ROW_BYTES):
        outcome: Outcome
        try:
            outcome = encode_row(atlas, encoder, int.from_bytes(message, "little"))
        except Exception as error:  # noqa: BLE001 - the boundary of one sample; the main process raises it again
            outcome = Failure(_portable(error), traceback.format_exc())
        descriptor = pack(outcome, shared)
        socket.send_fds(connection, [message], [descriptor])
        os.close(descriptor)


def _settle(parent: int) -> None:
    """Make a forked copy of the main process a worker: it dies with its parent and keeps its hands off what it got."""
    die_with_parent(parent)
    gc.freeze()  # no finalizer of the parent's objects may run here
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process, which gets the same ctrl-C, ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.disable()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)


def _portable(error: Exception) -> Exception:
    """The error itself if it survives pickling, else one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - made by this very line
    except (pickle.PicklingError, TypeError, AttributeError, ValueError):
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
