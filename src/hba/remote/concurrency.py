"""How many requests are under way: a limit that follows what the server bears, and a stream of bounded work.

The limit grows by one for each full round of replies (doubling until the first overload) and shrinks, once a round,
by half of the share of overloaded replies in it: L <- L (1 - share / 2) + 1, at least 1. That is the additive increase
and multiplicative decrease of DCTCP (Alizadeh et al. 2010); a plain halving at every fault would leave a server
that fails one request in ten with a limit of five.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")
START = 4
PAUSE_SPREAD = 0.1  # requests that waited together start over a tenth more of the pause
_END = object()


class AdaptiveLimit:
    """Slots for at most `maximum` requests at once, fewer while the server is overloaded. For one event loop."""

    def __init__(self, maximum: int) -> None:
        self.maximum = maximum
        self.limit = float(min(START, maximum))
        self._active = 0
        self._doubling = True
        self._replies = self._overloads = 0
        self._resume_at = 0.0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Hold one slot; waits while all are taken or the server has asked for a pause."""
        await self._acquire()
        try:
            yield
        finally:
            self._active -= 1
            self._wake()

    def report(self, *, overloaded: bool) -> None:
        """Count one reply; `overloaded` says that the server refused or could not keep up."""
        self._replies += 1
        self._overloads += overloaded
        if self._replies >= self.limit:
            share = self._overloads / self._replies
            self._doubling = self._doubling and not self._overloads
            grown = 2 * self.limit if self._doubling else self.limit * (1 - share / 2) + 1
            self.limit = min(float(self.maximum), max(1.0, grown - (share == 1.0)))
            self._replies = self._overloads = 0
            self._wake()

    def pause(self, seconds: float) -> None:
        """Start nothing for that long: the server's Retry-After is for all requests, not for one."""
        self._resume_at = max(self._resume_at, asyncio.get_running_loop().time() + seconds)

    async def _acquire(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            pause = self._resume_at - loop.time()
            if pause > 0:
                await asyncio.sleep(pause * (1 + random.uniform(0, PAUSE_SPREAD)))
            elif self._active < int(self.limit):
                self._active += 1
                return
            else:
                await self._turn(loop.create_future())

    async def _turn(self, waiter: asyncio.Future[None]) -> None:
        self._waiting.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            else:
                self._wake()  # the turn that this one no longer takes
            raise

    def _wake(self) -> None:
        free = int(self.limit) - self._active
        while free > 0 and self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                free -= 1


async def bounded(items: Iterable[T], work: Callable[[T], Awaitable[R]], width: int) -> AsyncIterator[R]:
    """Results of `work` over `items` in the order in which they are ready, at most `width` at once.

    Items of an iterator are drawn one by one in a thread, so that preparing them (decoding media) holds up no request;
    those of a sequence are there already. Never more than `width` ahead. The first exception of `items` or `work`
    cancels the rest and is raised.
    """
    ready, source = isinstance(items, Sequence), iter(items)
    draw: asyncio.Task[object] | None = None
    running: set[asyncio.Task[R]] = set()
    more = True
    try:
        while more or running:
            while ready and more and len(running) < width:
                item = next(source, _END)
                more = item is not _END
                running |= {asyncio.ensure_future(_run(work, item))} if more else set()
            if more and draw is None and len(running) < width:
                draw = asyncio.ensure_future(asyncio.to_thread(next, source, _END))
            tasks: list[asyncio.Task[Any]] = [*running, *([draw] if draw else [])]
            if not tasks:
                break
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            done = [task for task in running if task.done()]
            for task in sorted(done, key=_failed):  # what came is handed out before an error ends it all
                running.remove(task)
                yield task.result()
            if draw is not None and draw.done():
                item, draw = draw.result(), None
                more = item is not _END
                running |= {asyncio.ensure_future(_run(work, item))} if more else set()
    finally:
        left: list[asyncio.Task[Any]] = [*running, *([draw] if draw else [])]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)


def _failed(task: asyncio.Task[Any]) -> bool:
    return task.exception() is not None


async def _run(work: Callable[[T], Awaitable[R]], item: Any) -> R:
    return await work(item)
