"""Batches of an atlas in the order of a plan, prepared by worker processes while the model computes.

The loader is a function of (atlas, plan, start): the same plan gives the same batches with any number of workers;
`start` continues in mid-epoch without decoding what came before. A sample whose medium cannot be read, or whose
decoding ends or hangs its worker (see below), is left out of its batch and named in `Batch.quarantined`; any other
error is raised when the turn of its batch comes. Workers are as far ahead as the memory for it allows, whatever the
size of a batch; encoded samples are kept for the next epoch as far as memory allows. Where there is a GPU, batches lie
in pinned memory, from which they are copied while it computes.
"""

from __future__ import annotations

import faulthandler
import gc
import io
import logging
import mmap
import multiprocessing
import os
import pickle
import resource
import signal
import socket
import stat
import struct
import threading
import traceback
import warnings
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from copy import copy
from dataclasses import dataclass, replace
from itertools import chain, islice
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hba.atlas import Atlas
from hba.atlas.rows import MEDIA_FIELDS, Quarantined, Sample, out_of_memory
from hba.batch.config import EncodeConfig, LoaderConfig, load_media
from hba.batch.encode import SAMPLING_RATE, Batch, Encoded, Encoder, ResizeAsProcessor, collate
from hba.batch.sampler import Indices
from hba.environment import die_with_parent
from hba.errors import HbaError, MachineError, MediaError
from hba.storage import CLOCK, SILENT_SECONDS, Clock, cache_folder, machine_fault

if TYPE_CHECKING:
    from hba.atlas.decoded import DecodedCache

# Objects with large tensors from a worker process to the main process, as bytes over a socket.
#
# An object is pickled with its tensors and arrays out of band, so that they are copied into the socket and out of it,
# and nowhere else. It takes no file descriptor beyond the socket itself, of which processes may have few, and nothing
# in /dev/shm, which containers keep small; when either side is killed the kernel frees what was on its way. An object
# that both sides hold already (the store of an atlas, with all its rows) is named instead of copied.


_ALIGNMENT = 64
_HEADER = struct.Struct("<qq")
_PARTS_AT_ONCE = 512  # sendmsg takes 1,024 at most

Bytes = npt.NDArray[np.uint8]


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, buffers: Callable[[pickle.PickleBuffer], None], shared: object) -> None:
        super().__init__(file, protocol=5, buffer_callback=buffers)
        self._shared = shared

    def persistent_id(self, obj: object) -> str | None:
        return "shared" if obj is self._shared else None

    def reducer_override(self, obj: object) -> Any:
        # By default a tensor is copied three times into the pickle, through a file format.
        if type(obj) is Tensor and obj.layout is torch.strided and obj.device.type == "cpu" and not obj.is_quantized:
            flat = obj.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
            return _tensor, (pickle.PickleBuffer(flat), obj.dtype, tuple(obj.shape))
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, buffers: list[memoryview], shared: object) -> None:
        super().__init__(file, buffers=buffers)
        self._shared = shared

    def persistent_load(self, pid: str) -> object:
        return self._shared


def _tensor(buffer: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if memoryview(buffer).nbytes == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=torch.uint8).view(dtype).reshape(shape)


def pack(value: object, shared: object) -> list[memoryview]:
    """`value` as bytes in several parts, its tensors in place. Raises what pickling raises."""
    stream = io.BytesIO()
    buffers: list[pickle.PickleBuffer] = []
    _Pickler(stream, buffers.append, shared).dump(value)
    parts = [memoryview(stream.getbuffer()), *(buffer.raw() for buffer in buffers)]
    sizes = [part.nbytes for part in parts]
    packed = [memoryview(struct.pack(f"<{len(sizes) + 1}q", len(sizes), *sizes))]
    at = packed[0].nbytes
    for part in parts:
        packed += [memoryview(bytes(-at % _ALIGNMENT)), part]
        at += -at % _ALIGNMENT + part.nbytes
    return packed


def unpack(data: Bytes, shared: object) -> Any:
    """The object of which `data` are the bytes; its tensors lie in them. `shared` takes the place of the other's."""
    view = data.data
    (count,) = struct.unpack_from("<q", view)
    at, parts = 8 * (count + 1), []
    for size in struct.unpack_from(f"<{count}q", view, 8):
        at += -at % _ALIGNMENT
        parts.append(view[at : at + size])
        at += size
    return _Unpickler(io.BytesIO(parts[0]), parts[1:], shared).load()


def send(connection: socket.socket, number: int, packed: list[memoryview]) -> None:
    """Send what `pack` made, under a number. Waits while nobody reads."""
    parts = [memoryview(_HEADER.pack(number, sum(part.nbytes for part in packed))), *packed]
    parts = [part for part in parts if part.nbytes]
    while parts:
        sent = connection.sendmsg(parts[:_PARTS_AT_ONCE])
        while parts and sent >= parts[0].nbytes:
            sent -= parts.pop(0).nbytes
        if sent:
            parts[0] = parts[0][sent:]


def receive_header(connection: socket.socket) -> tuple[int, int] | None:
    """The number and the size of what comes next; None when the other side is gone."""
    header = np.empty(_HEADER.size, np.uint8)
    if not receive(connection, header):
        return None
    number, size = _HEADER.unpack(header.data)
    return number, size


def receive(connection: socket.socket, data: Bytes) -> bool:
    """Fill `data` with what comes next; False when the other side is gone before it is full."""
    view = data.data
    while view.nbytes:
        try:
            count = connection.recv_into(view)
        except ConnectionResetError:
            return False
        if count == 0:
            return False
        view = view[count:]
    return True


# Processes that encode samples, and that may die: a decoder in C that crashes takes its process along, not the run.
#
# A worker gets row numbers and answers each, in order, with what became of the row; so when it dies, the row that it
# was at is known. That row is tried once more in a fresh process, since a crash may have another cause; when it ends
# the second one, too, or twice takes longer than the time limit, it is quarantined with the reason. Time that a worker
# waits for storage or for the reader of its answers does not count. The rows behind it go to the fresh process, and are
# first there: every row that was asked for gets exactly one outcome.
#
# What the machine lacks is never the fault of a row. A worker that is killed (SIGKILL: memory was short), or cannot be
# started, is done without, and a warning says so; the last one is started again, and when it is killed time after time
# the run stops. What a worker raises (no file descriptors, storage that is away) stops the run as well.
#
# A thread for each worker reads its answers, so that up to `ahead_bytes` of them lie ready here and no worker waits for
# the main process to look. Workers are forked: a fresh one is there in milliseconds with the atlas and the encoder in
# its memory, and a script needs no `__main__` guard. A child of a process with threads may find a lock held for ever;
# it then counts as hanging, and its row is tried again. Workers die with the thread that started them, `kill -9`
# included. Linux only.


ATTEMPTS = 2
DEATHS_WITHOUT_RESULT = 20
KILLS_OF_THE_LAST = 3
_TICK_SECONDS = 0.5
_ROW_BYTES = 8

_log = logging.getLogger(__name__)


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

    def __init__(self, process: BaseProcess, connection: socket.socket, memory: mmap.mmap) -> None:
        self.process, self.connection = process, connection
        self.rows: deque[int] = deque()
        self.clock = Clock()
        self.clock.share(memoryview(memory))
        self.reader: threading.Thread | None = None
        self.gone = self.ending = False  # gone: all that it has answered is here

    def send(self, row: int) -> None:
        self.rows.append(row)
        with suppress(BrokenPipeError, ConnectionResetError):  # it has died, which its reader sees
            self.connection.sendall(row.to_bytes(_ROW_BYTES, "little"))

    def end(self) -> int:
        """Kill the process if it lives; its exit code. What it has sent is read to the end, if it is `ending`."""
        self.process.kill()
        self.process.join()
        code = self.process.exitcode or 0
        self.process.close()
        if self.reader is not None:
            self.reader.join()
        self.connection.close()
        return code


class WorkerPool:
    """Encodes the rows of an atlas in `workers` processes. A context manager; nothing of it outlives it."""

    def __init__(
        self,
        atlas: Atlas,
        encoder: Encoder,
        *,
        workers: int,
        timeout_seconds: float,
        ahead_bytes: int,
    ) -> None:
        """`ahead_bytes` of answers lie ready at most, and one of each worker beyond. Raises MachineError when not even
        one process can be started."""
        self._atlas, self._encoder, self._timeout, self._ahead_bytes = atlas, encoder, timeout_seconds, ahead_bytes
        self._shared = atlas[0].source
        self._strikes: Counter[int] = Counter()
        self._condemned: dict[int, Quarantined] = {}
        self._deaths = self._kills = 0
        self._changed = threading.Condition()
        self._arrived: dict[int, Bytes] = {}
        self._held = 0
        self._awaited: Collection[int] = ()
        self._memory_is_short = False
        self._workers: list[_Worker] = []
        for _ in range(workers):
            self._start()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            for worker in self._workers:
                worker.ending = True
            self._changed.notify_all()
        for worker in self._workers:
            worker.end()
        self._workers.clear()
        self._arrived.clear()

    def request(self, row: int) -> None:
        """Have a row encoded; its outcome comes from `outcome`."""
        with self._changed:
            if row not in self._condemned:
                min(self._workers, key=lambda worker: len(worker.rows)).send(row)

    def outcome(self, row: int) -> Outcome:
        """Wait for the outcome of a row that was asked for. A row that ended workers before is answered at once.

        Raises HbaError when worker after worker dies and no row is ever finished, MachineError when memory is short.
        """
        return self.first((row,))[1]

    def first(self, rows: Collection[int]) -> tuple[int, Outcome]:
        """Wait for whichever of these rows is there first, and its outcome. Another thread may ask for rows meanwhile,
        and add them to `rows`. Raises what `outcome` raises."""
        with self._changed:
            self._awaited = rows
            self._changed.notify_all()
            while (found := next((r for r in tuple(rows) if r in self._arrived or r in self._condemned), None)) is None:
                if not self._tend():
                    self._changed.wait(_TICK_SECONDS)
            self._awaited = ()
            data = self._arrived.pop(found, None)
            if data is None:
                return found, self._condemned[found]
            self._held -= data.nbytes
            self._changed.notify_all()
        outcome: Outcome = unpack(data, self._shared)
        return found, outcome

    def _read(self, worker: _Worker) -> None:
        """The life of a reader: answers in, until the worker is gone."""
        try:
            while (header := receive_header(worker.connection)) is not None:
                number, size = header
                with self._changed:
                    while self._is_full(worker):
                        self._changed.wait()
                data = np.empty(size, np.uint8)
                if not receive(worker.connection, data):
                    break
                with self._changed:
                    self._arrived[number] = data
                    self._held += size
                    self._deaths = self._kills = 0
                    worker.rows.popleft()
                    self._changed.notify_all()
        except MemoryError:
            self._memory_is_short = True
        finally:
            with self._changed:
                worker.gone = True
                self._changed.notify_all()

    def _is_full(self, worker: _Worker) -> bool:
        """Whether an answer of the worker must wait: never one that stands between the main process and its row."""
        awaited = any(row in worker.rows for row in tuple(self._awaited))
        return self._held >= self._ahead_bytes and not awaited and not worker.ending

    def _tend(self) -> bool:
        """Do without one worker that died or hangs, if there is one; whether there was."""
        for worker in self._workers:
            hung = worker.clock.seconds > self._timeout
            if self._memory_is_short:
                self._stop(worker, "memory is short in the main process")
            if not worker.gone and worker.clock.is_stuck:
                self._stop(worker, f"storage has not answered for {SILENT_SECONDS:,.0f} s")
            if worker.gone or hung:
                row = worker.rows[0] if worker.rows and worker.clock.seconds > 0 else None
                worker.ending = True
                self._changed.notify_all()
                self._changed.release()  # its reader must come to its end
                try:
                    code = worker.end()
                finally:
                    self._changed.acquire()
                self._workers.remove(worker)
                self._bury(worker, code, row if worker.rows and worker.rows[0] == row else None, hung=hung)
                return True
        return False

    def _bury(self, worker: _Worker, code: int, row: int | None, *, hung: bool) -> None:
        """Do without a worker. The row that it was at, if any, is tried again, or given up; the others go on."""
        killed = code == -signal.SIGKILL and not hung
        reason = f"decoding ends its process: {_why(code)}"
        if hung:
            reason = f"decoding takes longer than {self._timeout:g} s"
        if killed or row is None:
            self._kills += 1
            if self._kills >= (DEATHS_WITHOUT_RESULT if self._workers else KILLS_OF_THE_LAST):
                self._stop(worker, f"worker processes were ended {self._kills} times, last by {_why(code)}")
        else:
            self._strikes[row] += 1
            self._deaths += 1
            if self._deaths >= DEATHS_WITHOUT_RESULT:
                what = f"{self._deaths} worker processes failed and no sample was finished; last: {reason}"
                fix = "Free memory or use fewer workers; loader.workers=0 shows what happens, in the main process."
                raise HbaError(what, where=self._atlas[row].where, fix=fix)
            if self._strikes[row] == ATTEMPTS:
                worker.rows.popleft()
                self._condemned[row] = _condemn(self._atlas[row], f"{reason} ({ATTEMPTS} attempts)")
        if killed and self._workers:
            place = "" if row is None else f" at {self._atlas[row].where}"
            left = len(self._workers)
            _log.warning("A worker process was killed%s, perhaps for want of memory: going on with %d.", place, left)
        else:
            self._start()
        heir = min(self._workers, key=lambda other: len(other.rows))
        for each in sorted(worker.rows, key=lambda other: other == row):  # those that waited behind it come first
            heir.send(each)

    def _stop(self, worker: _Worker, what: str) -> None:
        where = self._atlas[worker.rows[0]].where if worker.rows else ""
        fix = "Free memory, or use fewer loader.workers; a disk or file server that is away must be mounted again."
        raise MachineError(what, where=where, fix=f"{fix} Then run the same command again.")

    def _start(self) -> None:
        """Start one more worker, or say why the others must do."""
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:
            self._do_without(error)
            return
        others = [ours, *(worker.connection for worker in self._workers)]
        try:
            memory = mmap.mmap(-1, mmap.PAGESIZE)  # shared with the child
            process = multiprocessing.get_context("fork").Process(
                target=_work,
                args=(theirs, others, os.getpid(), self._atlas, self._encoder, self._shared, memory),
                name="hba-loader",
                daemon=True,
            )
            worker = _Worker(process, ours, memory)
            worker.clock.start()  # a child that hangs before it gets to its first row hangs at that row
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # forks of a process with threads: see above
                process.start()
        except (OSError, MemoryError) as error:
            ours.close()
            theirs.close()
            self._do_without(error)
            return
        theirs.close()
        worker.reader = threading.Thread(target=self._read, args=(worker,), name="hba-reader", daemon=True)
        worker.reader.start()
        self._workers.append(worker)

    def _do_without(self, error: BaseException) -> None:
        if not self._workers:
            fault = machine_fault(error, "a worker process")
            cannot = MachineError(f"a worker process cannot start ({error})", fix="Use loader.workers=0.")
            raise fault or cannot from None
        _log.warning("A worker process cannot start (%s): going on with %d.", error, len(self._workers))


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


def encode_row(atlas: Atlas, encoder: Encoder, row: int) -> Encoded | Quarantined:
    """Encode a row; Quarantined when a medium of it cannot be read.

    Any other error is the caller's; MachineError when memory is short, or storage away.
    """
    sample = atlas[row]
    try:
        return encoder.encode(sample)
    except MemoryError as error:
        fault = out_of_memory(error, sample.where)
        if isinstance(fault, MediaError):
            return sample.quarantined(fault)
        raise fault from None
    except MediaError as error:
        return sample.quarantined(error)


def _work(
    connection: socket.socket,
    others: Sequence[socket.socket],
    parent: int,
    atlas: Atlas,
    encoder: Encoder,
    shared: object,
    memory: mmap.mmap,
) -> None:
    """The life of a worker: rows in, outcomes out, until the main process closes the connection."""
    _settle(parent)
    CLOCK.share(memoryview(memory))
    for inherited in others:
        inherited.close()
    CLOCK.stop()
    message = np.empty(_ROW_BYTES, np.uint8)
    while receive(connection, message):
        row = int.from_bytes(message.tobytes(), "little")
        outcome: Outcome
        CLOCK.start()
        try:
            outcome = encode_row(atlas, encoder, row)
        except Exception as error:  # noqa: BLE001 - the boundary of one sample; the main process raises it again
            outcome = Failure(_portable(error), traceback.format_exc())
        packed = pack(outcome, shared)
        CLOCK.stop()  # the wait for a reader is no work on the row
        send(connection, row, packed)


def _settle(parent: int) -> None:
    """Make a forked copy of the main process a worker: it dies with its parent and keeps its hands off what it got."""
    die_with_parent(parent)
    gc.freeze()  # no finalizer of the parent's objects may run here
    # The main process, which gets the same signals, decides and ends its workers; a scheduler sends them to all.
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(each, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.disable()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    _let_go_of_connections()


def _let_go_of_connections() -> None:
    """Connections of the main process, ports that it listens at included, become /dev/null: as long as a child has a
    copy of one, whoever is at its other end does not see that it was closed."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in [int(each.name) for each in Path("/proc/self/fd").iterdir()]:
        with suppress(OSError):  # it was that of the listing
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                with socket.socket(fileno=os.dup(fd)) as copied:
                    if copied.family in (socket.AF_INET, socket.AF_INET6):
                        os.dup2(null, fd)
    os.close(null)


def _portable(error: Exception) -> Exception:
    """The error itself if it survives pickling, else one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - made by this very line
    except (pickle.PicklingError, TypeError, AttributeError, ValueError):
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


# --- the loader -------------------------------------------------------------------------------------------------------


Outcomes: TypeAlias = Generator[Outcome, None, None]

MAX_ROWS_AHEAD = 256
"""rows that workers are given; how many of them lie ready is a matter of their bytes"""


class _Cache:
    """Least recently used encoded samples, bounded by their bytes."""

    def __init__(self, megabytes: int) -> None:
        self._limit = megabytes << 20
        self._held = 0
        self._items: OrderedDict[int, Encoded] = OrderedDict()

    def get(self, row: int) -> Encoded | None:
        if row in self._items:
            self._items.move_to_end(row)
        return self._items.get(row)

    def put(self, row: int, outcome: Outcome) -> None:
        if isinstance(outcome, Encoded) and outcome.num_bytes <= self._limit and row not in self._items:
            self._items[row] = outcome
            self._held += outcome.num_bytes
            while self._held > self._limit:
                _, oldest = self._items.popitem(last=False)
                self._held -= oldest.num_bytes


def load_batches(
    atlas: Atlas, encoder: Encoder, plan: Sequence[Indices], config: LoaderConfig, *, start: int = 0
) -> Iterator[Batch]:
    """Yield the batches of `plan` from number `start` on, in order.

    Raises ConfigError for workers elsewhere than on Linux, HbaError when workers die whatever they decode, and any
    error other than MediaError that encoding raises.
    """
    if config.decode_once:
        encoder = copy(encoder)
        encoder.decoded = open_decoded(encoder.processor, encoder.config, config)
    rows = map(int, chain.from_iterable(islice(plan, start, None)))
    count = sum(map(len, islice(plan, start, None)))
    outcomes = _outcomes(rows, count, atlas, encoder, config)
    pinned = torch.cuda.is_available()
    try:
        with closing(outcomes):
            for batch in islice(plan, start, None):
                made = _assemble(islice(outcomes, len(batch)), encoder)
                for sample in made.quarantined:
                    atlas.refuse(sample)
                yield made.pinned() if pinned else made
    finally:  # training takes the batches that it needs, and no more
        encoder.silent.say()


def open_decoded(
    processor: Any, encode: EncodeConfig, loader: LoaderConfig, *, strict: bool = False
) -> DecodedCache:
    """Where media are kept that were decoded once. Raises StorageError when the folder cannot be made or read."""
    from hba.atlas.decoded import DecodedCache  # which loads the decoders

    folder = Path(loader.decoded_folder).expanduser() if loader.decoded_folder else cache_folder() / "decoded"
    resize = ResizeAsProcessor.of(processor, encode)
    return DecodedCache(folder, int(loader.decoded_gigabytes * 1e9), resize=resize, strict=strict)


class _Decoder:
    """In the place of an encoder: decodes, so that the media are kept, and hands over nothing."""

    def __init__(self, config: EncodeConfig, decoded: DecodedCache) -> None:
        self.config, self.decoded = config, decoded

    def encode(self, sample: Sample) -> Encoded:
        load_media(sample, self.config, SAMPLING_RATE, windows=True, decoded=self.decoded)
        return Encoded(sample=sample, input_ids_T=torch.zeros(1, dtype=torch.long))


def prepare(
    atlas: Atlas, processor: Any, encode: EncodeConfig, loader: LoaderConfig, progress: Callable[[int, int], None]
) -> DecodedCache:
    """Decode the sounds and clips of all rows that are not kept yet; the cache that then keeps them.

    A row whose medium cannot be read is in `atlas.quarantine`. Killed, it goes on where it was. Raises StorageError
    when the disk or the cache is full, and what `load_batches` raises.
    """
    decoded = open_decoded(processor, encode, loader, strict=True)
    kinds = tuple(kind for kind in encode.modalities if kind != "image")
    decoder: Any = _Decoder(replace(encode, modalities=kinds), decoded)
    rows, loader = iter(range(len(atlas))), replace(loader, cache_megabytes=0)
    with closing(_outcomes(rows, len(atlas), atlas, decoder, loader)) as outcomes:
        for done, outcome in enumerate(outcomes, 1):
            if isinstance(outcome, Failure):
                raise_failure(outcome)
            if isinstance(outcome, Quarantined):
                atlas.refuse(outcome)
            progress(done, len(atlas))
    return decoded


def _outcomes(rows: Iterator[int], count: int, atlas: Atlas, encoder: Encoder, config: LoaderConfig) -> Outcomes:
    """The outcomes of `count` rows in their order, prepared by the worker processes of `config`."""
    workers = min(config.resolved_workers(), count)
    cache = _Cache(config.cache_megabytes)
    if not workers:
        return _in_turn(rows, atlas, encoder, cache)
    pool = WorkerPool(
        atlas,
        encoder,
        workers=workers,
        timeout_seconds=config.decode_timeout_seconds,
        ahead_bytes=config.prefetch_megabytes << 20,
    )
    return _prefetched(rows, pool, cache, MAX_ROWS_AHEAD if config.prefetch_megabytes else 2 * workers)


def _in_turn(rows: Iterator[int], atlas: Atlas, encoder: Encoder, cache: _Cache) -> Outcomes:
    """The outcomes of `rows`, each encoded in this process when it is asked for."""
    for row in rows:
        outcome = cache.get(row) or encode_row(atlas, encoder, row)
        cache.put(row, outcome)
        yield outcome


def _prefetched(rows: Iterator[int], pool: WorkerPool, cache: _Cache, ahead: int) -> Outcomes:
    """The outcomes of `rows` in their order, while workers are up to `ahead` rows further."""
    coming: deque[int] = deque()
    wanted: Counter[int] = Counter()  # how often each row stands in `coming`, since a plan may repeat rows
    ready: dict[int, Outcome] = {}
    with pool:
        while True:
            for row in islice(rows, ahead - len(coming)):
                coming.append(row)
                wanted[row] += 1
                if wanted[row] == 1:
                    known = cache.get(row)
                    if known is not None:
                        ready[row] = known
                    else:
                        pool.request(row)
            if not coming:
                return
            row = coming.popleft()
            outcome = ready.pop(row, None) or pool.outcome(row)
            wanted[row] -= 1
            if wanted[row]:
                ready[row] = outcome
            else:
                del wanted[row]
                cache.put(row, outcome)
            yield outcome


def _assemble(outcomes: Iterable[Outcome], encoder: Encoder) -> Batch:
    encoded: list[Encoded] = []
    quarantined: list[Quarantined] = []
    for outcome in outcomes:
        if isinstance(outcome, Failure):
            raise_failure(outcome)
        elif isinstance(outcome, Quarantined):
            quarantined.append(outcome)
        else:
            encoded.append(outcome)
            if outcome.silent_clips:
                encoder.silent.add(outcome.sample)
    return collate(encoded, pad_token_id=encoder.pad_token_id, taxonomy=encoder.taxonomy, quarantined=quarantined)
