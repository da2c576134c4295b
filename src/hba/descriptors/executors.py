"""Where items are worked on: processes of this machine, or actors of a Ray cluster.

Both take the same function and items and yield each item once with its result, or with `Died` and a reason when its
process crashed, was killed or took too long; the rest goes on in a new one. On a cluster every node needs hba, the
environment for landmarks, and the atlas under the same path.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, TypeVar

from hba.errors import HbaError, InputError, MachineError, nearest
from hba.parallel import Died, Done, each, outcome

Work = TypeVar("Work")
Result = TypeVar("Result")

EXECUTORS = ("processes", "ray")
_TICK_SECONDS = 5.0


def run(
    function: Callable[[Work], Result],
    items: Iterable[Work],
    *,
    executor: str,
    workers: int,
    patience: Callable[[Work], float],
    gpu: bool = False,
) -> Generator[Done[Work, Result], None, None]:
    """Yield `function` of every item, in the order of completion; `items` are drawn as they are needed.

    `gpu` asks Ray for one a worker, where the cluster has any. Raises InputError for an unknown executor, HbaError when
    workers cannot start.
    """
    if executor not in EXECUTORS:
        raise InputError(f"unknown executor {executor!r}", where="--executor", fix=nearest(executor, EXECUTORS))
    if executor == "processes":
        yield from each(function, items, workers=workers, patience=patience)
    else:
        yield from _each_on_ray(function, items, workers=workers, patience=patience, gpu=gpu)


class _Hand:
    """What an actor holds: the function with all that it has loaded."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function

    def work(self, item: Any) -> Any:
        return outcome(self._function, item)


def _each_on_ray(
    function: Callable[[Work], Result],
    items: Iterable[Work],
    *,
    workers: int,
    patience: Callable[[Work], float],
    gpu: bool,
) -> Iterator[Done[Work, Result]]:
    ray = _load_ray()
    ours = not ray.is_initialized()
    if ours:
        ray.init(log_to_driver=False)  # the cluster of RAY_ADDRESS, or one on this machine
    resources = ray.cluster_resources()
    gpus = int(gpu and resources.get("GPU", 0) >= 1)
    hand = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0)(_Hand)
    places = int(resources.get("GPU" if gpus else "CPU", 1))  # an actor without one would wait for ever
    idle = [hand.remote(function) for _ in range(max(1, min(workers, places)))]
    waiting, busy = iter(items), {}
    try:
        while True:
            while idle and (item := next(waiting, None)) is not None:
                actor = idle.pop()
                busy[actor.work.remote(item)] = (actor, item, time.monotonic())
            if not busy:
                return
            ready, _ = ray.wait(list(busy), num_returns=1, timeout=_TICK_SECONDS)
            late = [ref for ref, (_, item, since) in busy.items() if time.monotonic() - since > patience(item)]
            for ref in ready or late[:1]:
                actor, item, _ = busy.pop(ref)
                result = _result(ray, ref) if ready else Died(f"took more than {patience(item):,.0f} s")
                if isinstance(result, MachineError):
                    raise result
                if isinstance(result, Died):  # whatever the actor is now, a new one is sound
                    ray.kill(actor)
                    actor = hand.remote(function)
                idle.append(actor)
                yield Done(item, result)
    finally:
        for actor in [*idle, *(actor for actor, _, _ in busy.values())]:
            ray.kill(actor)
        if ours:
            ray.shutdown()


def _result(ray: Any, ref: Any) -> Any:
    try:
        return ray.get(ref)
    except ray.exceptions.RayError as error:
        return Died(f"its Ray worker was lost ({type(error).__name__})")


def _load_ray() -> Any:
    try:
        import ray  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        fix = "pip install 'ray[default]' on every node, or use --executor processes."
        raise HbaError("ray is not installed", where="--executor ray", fix=fix) from None
    return ray
