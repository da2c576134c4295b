"""Work on many items in processes that may crash, hang or be killed without ending the run.

A native decoder that meets a broken file can take its whole process with it. `each` notices: the item that was being
worked on comes back as `Died` with the reason, a new process goes on with the items behind it. Every item comes back
exactly once, in the order of completion. Processes are spawned, never forked, and end with the one that started them.
Time that a process waits for storage, or for a download, does not count against its item.

It does not retry, order or store anything: whoever calls it does.
"""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from queue import SimpleQueue
from typing import Any, Generic, NamedTuple, TypeVar

from hba.errors import HbaError, MachineError
from hba.storage import CLOCK, SILENT_SECONDS, Clock, machine_fault

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 4  # items that lie ready for a process, so that it never waits for the main one
START_SECONDS = 300.0  # a busy machine takes long to import
TICK_SECONDS = 1.0
JOIN_SECONDS = 5.0


class _Started:
    """What a process sends first."""


class Died(NamedTuple):
    """What became of an item whose process crashed, was killed, raised, or took too long.

    `killed`: by SIGKILL and not for its time, which says more about the machine's memory than about the item.
    """

    reason: str
    killed: bool = False


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
    Raises HbaError when a process cannot start, and the MachineError of an item, which is no fault of the item.
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
        memory = context.RawArray("b", Clock.SIZE)
        self.clock = Clock()
        self.clock.share(memoryview(memory))
        try:
            self.connection, theirs = context.Pipe()
            self.process = context.Process(target=_serve, args=(theirs, self.function, memory), daemon=True)
            self.process.start()
        except (OSError, MemoryError) as error:
            fault = machine_fault(error, "a worker process")
            raise fault or MachineError(f"a worker process cannot start ({error})", fix="Use fewer workers.") from None
        theirs.close()  # only then does the end of the process show as the end of the pipe
        self.started, self.since = False, time.monotonic()
        self.outbox: SimpleQueue[Any] = SimpleQueue()
        self.sender = threading.Thread(target=_send_all, args=(self.connection, self.outbox), daemon=True)
        self.sender.start()

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
        # By a thread: a process that hangs reads nothing, and its patience is for this one to see.
        self.outbox.put(ForkingPickler.dumps(item))

    def receive(self) -> Iterator[Done[Item, Result]]:
        """What the process has sent, or what its death means."""
        try:
            message = self.connection.recv()
        except (EOFError, OSError, pickle.UnpicklingError):
            code = self._reap()
            yield from self._died(_cause(code), killed=code == -signal.SIGKILL)
            return
        self.since = time.monotonic()
        if isinstance(message, _Started):
            self.started = True
            return
        if isinstance(message, MachineError):
            raise message
        yield Done(self.queue.popleft(), message)

    def check_time(self) -> Iterator[Done[Item, Result]]:
        """Give up the item in work when it has taken too long."""
        seconds = self.patience(self.queue[0]) if self.started else START_SECONDS
        if self.clock.is_stuck:
            what = f"storage has not answered for {SILENT_SECONDS:,.0f} s"
            raise MachineError(what, where=str(self.queue[0])[:200], fix="Check the disk or the file server.")
        if time.monotonic() - self.since - self.clock.waited > seconds:
            self.process.kill()
            self._reap()
            yield from self._died(f"took more than {seconds:,.0f} s")

    def _died(self, reason: str, *, killed: bool = False) -> Iterator[Done[Item, Result]]:
        if not self.started:
            fix = "Free memory; in a script of your own, call it below `if __name__ == '__main__':`."
            raise HbaError(f"a worker process could not start: it {reason}", fix=fix)
        item = self.queue.popleft()
        self._start()
        for left in self.queue:
            self._send(left)
        yield Done(item, Died(reason, killed))

    def _reap(self) -> int | None:
        self.process.join(JOIN_SECONDS)
        self.outbox.put(None)
        self.sender.join(JOIN_SECONDS)
        self.connection.close()
        return self.process.exitcode

    def stop(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self._reap()


def _cause(exit_code: int | None) -> str:
    if exit_code is None or exit_code >= 0:
        return f"ended (exit code {exit_code})"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    return f"was killed ({name}), perhaps for lack of memory" if name == "SIGKILL" else f"crashed ({name})"


def _send_all(connection: Connection, outbox: SimpleQueue[Any]) -> None:
    """The thread that sends: one item after the other. When the process has died, `receive` of its worker says so."""
    while (data := outbox.get()) is not None:
        try:
            connection.send_bytes(data)
        except OSError:
            return


def _serve(connection: Connection, function: Callable[[Item], Result], memory: Any) -> None:
    """The process: one item after the other until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which then closes the pipe
    CLOCK.share(memoryview(memory))
    connection.send(_Started())
    try:
        while True:
            item = connection.recv()
            CLOCK.start()
            connection.send(outcome(function, item))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def outcome(function: Callable[[Item], Result], item: Item) -> Result | Died | MachineError:
    """What becomes of an item: `function` of it, or what it raises. A MachineError is no fault of the item."""
    try:
        return function(item)
    except MachineError as error:
        return error
    except MemoryError as error:
        return machine_fault(error, str(item)[:200]) or Died(f"raised MemoryError: {error}")
    except Exception as error:  # noqa: BLE001 -- the boundary of one item: what a decoder raises must not end the run
        return Died(f"raised {type(error).__name__}: {error}")
