"""Work on many items in processes that may crash, hang or be killed without ending the run.

A native decoder that meets a broken file can take its whole process with it. `each` notices: the item that was being
worked on comes back as `Died` with the reason, a new process goes on with the items behind it. Every item comes back
exactly once, in the order of completion. Processes are spawned, never forked, and end with the one that started them.

It does not retry, order or store anything: whoever calls it does.
"""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Generic, NamedTuple, TypeVar

from hba.errors import HbaError

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 4  # items that lie ready for a process, so that it never waits for the main one
START_SECONDS = 300.0  # a busy machine takes long to import
TICK_SECONDS = 1.0
JOIN_SECONDS = 5.0


class _Started:
    """What a process sends first."""


class Died(NamedTuple):
    """What became of an item whose process crashed, was killed, raised, or took too long."""

    reason: str


class Done(NamedTuple, Generic[Item, Result]):
    """An item and what the function made of it."""

    item: Item
    result: Result | Died


def each(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int,
    patience: Callable[[Item], float],
) -> Iterator[Done[Item, Result]]:
    """Yield `function` of every item from `workers` processes; `items` is drawn as they are needed.

    `function`, items and results must be picklable. An item that takes more than `patience(item)` seconds is given up.
    Raises HbaError when a process cannot start.
    """
    waiting = iter(items)
    crew = [_Worker(function, patience) for _ in range(workers)]
    try:
        for worker in crew:
            worker.fill(waiting)
        while any(worker.queue for worker in crew):
            busy = {worker.connection: worker for worker in crew if worker.queue}
            ready = wait(list(busy), TICK_SECONDS)
            for connection, worker in busy.items():
                yield from worker.receive() if connection in ready else worker.check_time()
                worker.fill(waiting)
    finally:
        for worker in crew:
            worker.stop()


class _Worker(Generic[Item, Result]):
    """One process, the items that lie ready for it (the first is being worked on), and since when."""

    def __init__(self, function: Callable[[Item], Result], patience: Callable[[Item], float]) -> None:
        self.function, self.patience = function, patience
        self.queue: deque[Item] = deque()
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.function), daemon=True)
        self.process.start()
        theirs.close()  # only then does the end of the process show as the end of the pipe
        self.started, self.since = False, time.monotonic()

    def fill(self, waiting: Iterator[Item]) -> None:
        """Lay items ready, as many as there are."""
        while len(self.queue) < AHEAD:
            item = next(waiting, None)
            if item is None:
                return
            if not self.queue and self.started:
                self.since = time.monotonic()
            self.queue.append(item)
            self._send(item)

    def _send(self, item: Item) -> None:
        # When the process has died, `receive` says so and sends again what was not worked on.
        with suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(item)

    def receive(self) -> Iterator[Done[Item, Result]]:
        """What the process has sent, or what its death means."""
        try:
            message = self.connection.recv()
        except (EOFError, OSError, pickle.UnpicklingError):
            yield from self._died(_cause(self._reap()))
            return
        self.since = time.monotonic()
        if isinstance(message, _Started):
            self.started = True
            return
        yield Done(self.queue.popleft(), message)

    def check_time(self) -> Iterator[Done[Item, Result]]:
        """Give up the item in work when it has taken too long."""
        seconds = self.patience(self.queue[0]) if self.started else START_SECONDS
        if time.monotonic() - self.since > seconds:
            self.process.kill()
            self._reap()
            yield from self._died(f"took more than {seconds:,.0f} s")

    def _died(self, reason: str) -> Iterator[Done[Item, Result]]:
        if not self.started:
            fix = "Free memory; in a script of your own, call it below `if __name__ == '__main__':`."
            raise HbaError(f"a worker process could not start: it {reason}", fix=fix)
        item = self.queue.popleft()
        self._start()
        for left in self.queue:
            self._send(left)
        yield Done(item, Died(reason))

    def _reap(self) -> int | None:
        self.process.join(JOIN_SECONDS)
        self.connection.close()
        return self.process.exitcode

    def stop(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.join(JOIN_SECONDS)
        self.connection.close()


def _cause(exit_code: int | None) -> str:
    if exit_code is None or exit_code >= 0:
        return f"ended (exit code {exit_code})"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    return f"was killed ({name}), perhaps for lack of memory" if name == "SIGKILL" else f"crashed ({name})"


def _serve(connection: Connection, function: Callable[[Item], Result]) -> None:
    """The process: one item after the other until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which then closes the pipe
    connection.send(_Started())
    try:
        while True:
            connection.send(_one(function, connection.recv()))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _one(function: Callable[[Item], Result], item: Item) -> Result | Died:
    try:
        return function(item)
    except Exception as error:  # noqa: BLE001 -- the boundary of one item: what a decoder raises must not end the run
        return Died(f"raised {type(error).__name__}: {error}")
