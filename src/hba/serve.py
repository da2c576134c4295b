"""`hba serve`: a checkpoint of ours, or a chat model, stays open and answers over HTTP.

`Desk` keeps a model: what is asked comes in at any time, becomes a row by the code of `hba ask`, and is encoded and
answered by the backends of `hba predict`, so that the numbers are theirs; only who is asked together differs. The
explorer's Try page has desks, too. Around one `create_app` puts `/v1/chat/completions`, which speaks as OpenAI's does,
for its client and all that is built on it, and `/v1/classify`, which gives labels and probabilities for files. Files
come as data, never as addresses: nothing is fetched.

A request's way: its files are linked into a folder of its own; a worker process of the loader looks at them, makes the
row and encodes it (a decoder that crashes or hangs costs that request alone); the folder goes; the one thread that has
the model takes the oldest request that is ready, and those like it, waits `window_seconds` for more where the batch is
not full, and answers them. What was asked together is answered once all of it is ready: whoever asked waits for the
last of it anyway.

What a client may cost is bounded before it is read: a token, the number of requests under way, the bytes of one body
and of all, the seconds of an upload and of an answer. A body goes to the disk as it comes; one body at a time is held
in memory, while it is parsed.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import itertools
import json
import logging
import re
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, TypeVar

import msgspec
import torch
import uvicorn
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode
from uvicorn.protocols.http.h11_impl import H11Protocol

from hba.atlas import open_atlas
from hba.atlas.build import Medium, bring, look_at, row_of
from hba.atlas.rows import Quarantined, Sample
from hba.batch.config import sound_of_clips
from hba.batch.encode import Batch, Encoded, Encoder, collate
from hba.batch.loader import Failure, Outcome, WorkerPool, encode_row
from hba.batch.prompt import PlainText
from hba.descriptors.describe import Extract, link_rows
from hba.descriptors.items import FOLDER as DESCRIBED
from hba.descriptors.items import Failed, Settings, make_plan
from hba.descriptors.landmarks import python_of_environment
from hba.environment import kernel_ends_children
from hba.errors import HbaError, InputError, MachineError, MediaError
from hba.evaluate.ask import FREE, Reply, atlas_of, datasets_of, descriptors_of, taxonomy_of
from hba.evaluate.backends.heads import HeadsBackend
from hba.evaluate.backends.hf import ChatBackend, begun_turn
from hba.evaluate.backends.interface import Answered, Output, open_backend, prediction_of, spoken
from hba.evaluate.config import PredictConfig
from hba.evaluate.predict import EVERYTHING, open_rows
from hba.evaluate.predictions import Prediction
from hba.explorer.server import foreign, is_loopback, is_same
from hba.model.generate import Ranked, Said, end_token_ids
from hba.model.process import prepare_process
from hba.storage import begun, halved, plural, remove_abandoned, room
from hba.taxonomy import save_beside

_log = logging.getLogger(__name__)
ASKED = "asked.json"
HERE = ("heads", "hf")  # backends over a model in this process
BATCHES_REMEMBERED = 4096


class Part(msgspec.Struct, frozen=True):
    """A part of a turn: its `text`, or the `kind` of a medium (image, video, audio) that lies in the file `name`."""

    text: str = ""
    kind: str = ""
    name: str = ""


class Turn(msgspec.Struct, frozen=True):
    """What one side has said: `role` is system, user or assistant."""

    role: str
    parts: tuple[Part, ...]


class Question(msgspec.Struct, frozen=True):
    """What is asked of a model: about the file `name`, as `hba ask` does, or, with `turns`, how a talk goes on."""

    dataset: str = FREE
    name: str = ""
    question: str | None = None
    transcript: str | None = None
    turns: tuple[Turn, ...] = ()


class Saying(NamedTuple):
    """How an answer to a talk is drawn. The same seed draws the same answer, whatever is answered beside it.

    It ends before the first of the texts `stop`. With `alternatives` the log-probabilities of its tokens are kept, and
    those of so many others at each place.
    """

    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    alternatives: int | None = None


class Hearing:
    """Who hears an answer while it is said, and what is known of its tokens once it is."""

    def __init__(self, tell: Callable[[str], None] | None = None) -> None:
        """`tell` is called with each piece of the answer, in the thread that has the model."""
        self.told, self.gone = "", False
        self.ranked: tuple[Ranked, ...] = ()
        self.tell = tell

    def hear(self, text: str) -> None:
        """What has been said so far."""
        if self.tell is not None and len(text) > len(self.told) and text.startswith(self.told):
            self.tell(text[len(self.told) :])
            self.told = text


class FullError(MachineError):
    """As much waits for the model as may."""


@dataclass(eq=False)
class _Request:
    question: Question
    classes: bool  # whether labels answer it
    saying: Saying | None
    coming: set[int]  # numbers of those that were asked together with it, itself too, until they are ready
    hearing: Hearing = field(default_factory=Hearing)
    answer: Future[Prediction] = field(default_factory=Future)
    encoded: Encoded | None = None
    ready_at: float = 0.0
    _claiming: threading.Lock = field(default_factory=threading.Lock)

    @property
    def alike(self) -> tuple[object, ...]:
        """What requests of one batch have in common."""
        assert self.encoded is not None
        drawn = None if self.saying is None else (self.saying.temperature, self.saying.top_p)
        return self.encoded.sample.modality_signature, self.classes, drawn

    def claim(self) -> bool:
        """Whether whoever calls is to answer: the first who does, and nobody once nobody waits any more."""
        with self._claiming:
            taken = self.answer.running() or self.answer.done()
            return not taken and self.answer.set_running_or_notify_cancel()


class _Pool(Protocol):
    def request(self, row: int) -> None: ...
    def first(self, rows: Collection[int]) -> tuple[int, Outcome]: ...


class Desk:
    """A model and its queue. Raises what opening the model raises. Close it: its threads and files go."""

    def __init__(
        self,
        model: str,
        *,
        folder: Path,
        backend: str | None = None,
        config: PredictConfig | None = None,
        most_waiting: int = 256,
        window_seconds: float = 0.05,
        decode_seconds: float | None = None,
    ) -> None:
        """`folder` is where files lie until they are decoded; what a killed process left there is removed. A batch has
        `config.batch_size` rows at most. A row that twice takes longer than `decode_seconds` to decode is refused."""
        self.model, self.taxonomy = model, taxonomy_of(model)
        self.most_waiting, self.window_seconds = most_waiting, window_seconds
        config = config or PredictConfig()
        prepare_process(seed=0)
        with atlas_of([(Medium(Path("words.txt"), (), "Hello."), FREE)], self.taxonomy, None, None) as atlas:
            how: dict[str, Any] = {"split": "asked", "config": config, "backend": backend, "selection": EVERYTHING}
            opening = open_rows(model, str(atlas), **how)
            if opening.backend not in HERE:
                fix = f"Choose among {', '.join(HERE)}; a server or vLLM is asked where it is."
                raise InputError(f"the backend {opening.backend} has no model in this process", where=model, fix=fix)
            answering = open_backend(opening.backend, opening)
        assert isinstance(answering, HeadsBackend | ChatBackend)
        self.config, self.backend = opening.config, answering
        self._descriptors = {key: _measuring(key, of, model) for key, of in answering.encoder.dims.items()}
        self.counts: Counter[str] = Counter()
        self.batch_sizes: deque[int] = deque(maxlen=BATCHES_REMEMBERED)
        remove_abandoned(folder)
        self.folder = begun(folder / f"desk-{id(self):x}")
        self.folder.mkdir(parents=True, mode=0o700)
        measured = {key: how for key, how in self._descriptors.items() if isinstance(how, Settings)}
        self._reader = _Reader(self.folder, answering.encoder, measured)
        loader = self.config.loader
        spare = loader.resolved_workers()  # of one core none is; what strangers send is decoded beside the model, still
        self._workers = max(1, spare) if loader.workers < 0 and kernel_ends_children() else spare
        self._decode_seconds = decode_seconds or loader.decode_timeout_seconds
        self._most_bytes = loader.prefetch_megabytes << 20
        self._numbers = itertools.count(1)
        self._changed = threading.Condition()
        self._asked: deque[int] = deque()  # not yet given to a decoder
        self._decoding: dict[int, _Request] = {}  # given to a decoder
        self._requests: dict[int, _Request] = {}  # all that wait for an answer
        self._ready: list[_Request] = []  # in the order in which they became ready
        self._pool: _Pool | None = None
        self._closing = False
        self._threads = [threading.Thread(target=run, name=f"hba-desk-{run.__name__}", daemon=True)
                         for run in (self._decode, self._answer)]  # fmt: skip
        for thread in self._threads:
            thread.start()

    # --- asking -------------------------------------------------------------------------------------------------------

    @property
    def talks(self) -> bool:
        """Whether the model answers in words."""
        return self.backend.free_form

    @property
    def waiting(self) -> int:
        """Requests without an answer yet."""
        return len(self._requests)

    @property
    def alive(self) -> bool:
        """Whether requests are taken and answered."""
        return not self._closing and all(thread.is_alive() for thread in self._threads)

    def datasets(
        self, tasks: Sequence[str] | None, datasets: Sequence[str] | None, question: str | None = None
    ) -> list[str]:
        """Keys of the datasets whose rows ask that, as `hba ask` chooses them; what heads have not learned is left out
        where nothing is named. Raises InputError for what is unknown, or what this model cannot be asked."""
        explicit = tasks is not None or datasets is not None or question is not None
        if not explicit and not isinstance(self.backend, HeadsBackend):
            what = f"{self.model} answers in words: it has to be asked something"
            raise InputError(what, fix="Name a task such as EMO, or a question.")
        keys = datasets_of(self.taxonomy, tasks, datasets, question)
        for key in keys:
            lacking = self._descriptors.get(key)
            if isinstance(lacking, HbaError):
                what = f"the adapters of {key} read descriptors, and {lacking.what}"
                raise InputError(what, fix=f"{lacking.fix} Or ask another dataset.")
        known = [key for key in keys if self._can(key)]
        if explicit and len(known) < len(keys):
            other = next(key for key in keys if key not in known)
            what = f"{self.model} was not trained to answer rows of {other}"
            raise InputError(what, fix="Ask another task, or a model that answers in words.")
        return known

    def _can(self, key: str) -> bool:
        domain = self.taxonomy.dataset(key).domain
        if domain is None:
            return self.talks
        return self.backend.domains is None or domain in self.backend.domains

    def ask(
        self, question: Question, files: Mapping[str, Path] | None = None, saying: Saying | None = None
    ) -> Future[Prediction]:
        """What the model answers. `files` are those that the question names; they may go once this returns.

        The future raises MediaError for a file that cannot be read, InputError for one that the model does not take,
        MachineError for what the machine lacks. Raises FullError when too many wait, or the desk is closing.
        """
        return self.ask_together([(question, files or {})], [saying])[0]

    def ask_together(
        self,
        asked: Sequence[tuple[Question, Mapping[str, Path]]],
        sayings: Sequence[Saying | None] = (),
        hearings: Sequence[Hearing] = (),
    ) -> list[Future[Prediction]]:
        """`ask` for questions of one person, who waits for all of the answers: the model is given those that are alike
        in one batch, as far as it goes. Where one cannot be asked none is. `sayings` and `hearings` are one a question,
        or none."""
        coming: set[int] = set()
        with self._changed:
            waiting = len(self._requests)
            if self._closing or (waiting and waiting + len(asked) > self.most_waiting):
                what = "the server is stopping" if self._closing else f"{waiting} requests wait already"
                raise FullError(what, where=self.model, fix="Ask again later.")
            requests = {}
            for (question, _), saying, hearing in zip_longest(asked, sayings, hearings):
                classes = self.taxonomy.dataset(question.dataset).domain is not None
                requests[next(self._numbers)] = _Request(question, classes, saying, coming, hearing or Hearing())
            coming.update(requests)
            self._requests |= requests
        try:
            for (number, request), (_, files) in zip(requests.items(), asked, strict=True):
                place = self.folder / str(number)
                place.mkdir()
                for name, path in files.items():
                    bring(path, place / name)
                (place / ASKED).write_bytes(msgspec.json.encode(request.question))
        except OSError:
            with self._changed:
                for number in requests:
                    self._discard(number)
                self._changed.notify_all()
            raise
        with self._changed:
            self._asked += requests
            self._hand_over()
        return [request.answer for request in requests.values()]

    def asks(
        self, path: Path, *, task: str | None = None, question: str | None = None
    ) -> list[tuple[str, Future[Prediction]]]:
        """What the model answers of a file to a task or a question, by dataset. Raises what `ask` and `datasets` do."""
        keys = self.datasets([task] if task else None, None, question)
        name = f"medium{path.suffix}"
        asked = [(Question(dataset=key, name=name, question=question), {name: path}) for key in keys]
        return list(zip(keys, self.ask_together(asked), strict=True))

    def close(self, patience_seconds: float = 0.0) -> None:
        """Take nothing more, answer what waits for so long and what the model is at, end the threads, remove files."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._requests, patience_seconds)
            left, self._requests = list(self._requests.values()), {}
            self._asked.clear()
            self._changed.notify_all()
        for request in left:
            _fail(request, FullError("the server has stopped", where=self.model, fix="Ask again later."))
        with self._changed:
            self._changed.notify_all()  # what was ready, and has been told, is waited for by nobody
        for thread in self._threads:
            thread.join(self._decode_seconds)
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- decoding, in processes ---------------------------------------------------------------------------------------

    def _hand_over(self) -> None:
        """Give decoders what waits, as long as little is ready. The lock is held."""
        most = 4 * max(1, self._workers)
        while self._asked and self._pool is not None and len(self._decoding) < most and not self._holds_much():
            number = self._asked.popleft()
            request = self._requests.get(number)
            if request is None or request.answer.cancelled():
                self._discard(number)
                continue
            self._decoding[number] = request
            self._pool.request(number)
        self._changed.notify_all()

    def _holds_much(self) -> bool:
        """Whether so much is ready that nothing more is decoded before the model has answered some."""
        return sum(each.encoded.num_bytes for each in self._ready if each.encoded is not None) >= self._most_bytes

    def _discard(self, number: int) -> None:
        """Nobody is to answer that one. The lock is held."""
        shutil.rmtree(self.folder / str(number), ignore_errors=True)
        request = self._requests.pop(number, None)
        if request is not None:
            request.coming.discard(number)

    def _decode(self) -> None:
        """The life of the thread whose worker processes decode."""
        while not self._over():
            with ExitStack() as stack:
                try:
                    pool = self._open_pool(stack)
                    with self._changed:
                        self._pool = pool
                        self._hand_over()
                    while not self._over():
                        with self._changed:
                            if not self._decoding:
                                self._changed.wait(1)
                                continue
                        self._decoded(*pool.first(self._decoding))
                except Exception as error:  # noqa: BLE001 - the boundary of a pool: those it had are told, another is made
                    self._lose_pool(error)

    def _over(self) -> bool:
        return self._closing and not self._requests

    def _open_pool(self, stack: ExitStack) -> _Pool:
        rows = _Rows(self.folder)
        if not self._workers:
            return _InTurn(rows, self._reader)
        made: Any = WorkerPool(
            rows,  # type: ignore[arg-type]  # of an atlas a pool needs the rows alone
            self._reader,  # type: ignore[arg-type]
            workers=self._workers,
            timeout_seconds=self._decode_seconds,
            ahead_bytes=self._most_bytes,
        )
        pool: _Pool = stack.enter_context(made)
        return pool

    def _lose_pool(self, error: Exception) -> None:
        _log.warning("Decoding had to begin anew: %s", error)
        with self._changed:
            self._pool = None
            lost, self._decoding = self._decoding, {}
            for number in lost:
                self._discard(number)
        for request in lost.values():
            _fail(request, error)
        time.sleep(0.1)

    def _decoded(self, number: int, outcome: Outcome) -> None:
        shutil.rmtree(self.folder / str(number), ignore_errors=True)
        with self._changed:
            request = self._decoding.pop(number)
            request.coming.discard(number)
            if isinstance(outcome, Encoded):
                request.encoded, request.ready_at = outcome, time.monotonic()
                self._ready.append(request)
            else:
                self._requests.pop(number, None)
            self._hand_over()
        if isinstance(outcome, Quarantined):
            self.counts["refused"] += 1
            _fail(request, MediaError(outcome.reason))
        elif isinstance(outcome, Failure):
            if not isinstance(outcome.error, HbaError):  # its words may be the client's
                _log.error("a row could not be encoded (%s)", type(outcome.error).__name__)
            _fail(request, outcome.error)

    # --- answering, in the thread that has the model ------------------------------------------------------------------

    def _answer(self) -> None:
        """The life of the thread that asks the model."""
        prepare_process(seed=0)  # how the processor treats denormal numbers is a matter of each thread
        while (batch := self._next()) is not None:
            started = time.monotonic()
            settled = self._settled([each for each in batch if each.claim()])
            self.counts["model_microseconds"] += int(1e6 * (time.monotonic() - started))
            self._let_go(batch)
            for request, outcome in settled:
                if request.answer.done():  # while its neighbours still spoke
                    continue
                if isinstance(outcome, Prediction):
                    request.answer.set_result(outcome)
                else:
                    request.answer.set_exception(outcome)

    def _let_go(self, requests: Sequence[_Request]) -> None:
        """These wait no more. It is called before they are told: who has an answer waits no more."""
        with self._changed:
            for request in requests:
                assert request.encoded is not None
                self._requests.pop(int(request.encoded.sample.id), None)
            self._hand_over()

    def _next(self) -> list[_Request] | None:
        """The oldest request that is ready, with all that was asked together with it, and those like it; None when all
        is done and the desk closes."""
        most = self.config.batch_size
        with self._changed:
            while True:
                for each in [each for each in self._ready if each.answer.done()]:
                    self._ready.remove(each)
                    assert each.encoded is not None
                    self._requests.pop(int(each.encoded.sample.id), None)
                if not self._ready and self._over():
                    return None
                like: list[_Request] = []
                for first in self._ready:
                    like = [each for each in self._ready if each.alike == first.alike][:most]
                    if len(like) == most or not first.coming or self._holds_much():
                        break
                else:
                    self._changed.wait(1)
                    continue
                wait = first.ready_at + self.window_seconds - time.monotonic()
                if len(like) < most and wait > 0 and (self._asked or self._decoding):
                    self._changed.wait(wait)
                    continue
                for each in like:
                    self._ready.remove(each)
                return like

    def _settled(self, requests: Sequence[_Request]) -> Iterable[tuple[_Request, Prediction | Exception]]:
        """What becomes of requests that are asked together; where that fails each is asked alone, so that none fails
        for its neighbour."""
        if not requests:
            return ()
        try:
            return list(zip(requests, self._predictions(requests), strict=True))
        except Exception as error:  # noqa: BLE001 - the boundary of a batch: whoever asked is told, the server goes on
            if isinstance(error, MachineError):
                _log.warning("%s", error)
            elif not isinstance(error, HbaError):
                _log.exception("the model failed on a batch of %s", plural(len(requests), "row"))
            # The frames of a traceback, and of that of what it came of, would keep the batch's tensors.
            error.__traceback__ = error.__context__ = error.__cause__ = None
            if len(requests) == 1:
                return [(requests[0], error)]
        # Out of `except`, where what has failed is still held.
        return [pair for each in requests if not each.answer.done() for pair in self._settled([each])]

    def _predictions(self, requests: Sequence[_Request]) -> list[Prediction]:
        encoded = [request.encoded for request in requests if request.encoded is not None]
        encoder = self.backend.encoder
        batch = collate(encoded, pad_token_id=encoder.pad_token_id, taxonomy=self.taxonomy)
        outputs: Sequence[Output]
        with room(batch, halved("batch_size", batch)):
            if requests[0].saying is not None:
                outputs = self._said(batch, requests)
            elif isinstance(self.backend, ChatBackend):
                outputs = self.backend.generate(batch)
            elif requests[0].classes:
                outputs = self.backend.classify(batch)
            else:
                outputs = self.backend.speak(batch)
        self.batch_sizes.append(len(batch))
        tokens = batch.num_tokens.tolist()
        self.counts.update(batches=1, rows=len(batch), tokens_in=sum(tokens))
        self.counts["tokens_out"] += sum(output.tokens_out or 0 for output in outputs)
        return [_predicted(batch, row, output) for row, output in enumerate(outputs)]

    def _said(self, batch: Batch, requests: Sequence[_Request]) -> list[Output]:
        """What the model says next in each talk. Whose answer is over while others go on is told at once, but for
        those who asked for log-probabilities, which are known at the end."""
        model = self.backend.model
        tokenizer, ends = model.processor.tokenizer, end_token_ids(model.transformer, model.processor)
        sayings = [request.saying for request in requests if request.saying is not None]
        temperature, longest = sayings[0].temperature, max(saying.max_tokens for saying in sayings)
        uniforms_BL = torch.zeros(len(sayings), longest, dtype=torch.float64)
        for row, saying in enumerate(sayings):
            drawn = torch.Generator().manual_seed(saying.seed)
            uniforms_BL[row, : saying.max_tokens] = torch.rand(saying.max_tokens, generator=drawn, dtype=torch.float64)
        batch = batch.to(model.device)

        def output(row: int, one: Said) -> Output:
            request, saying = requests[row], sayings[row]
            text, stopped = _until(one.text, saying.stop)
            known: dict[str, Any] = {"tokens_out": one.tokens, "finish": "stop" if stopped else one.finish(ends)}
            shown = one.ranked[:-1] if one.finish(ends) == "stop" else one.ranked
            if stopped and shown:
                shown = shown[: _tokens_of(text, one.ids, tokenizer)]
            request.hearing.ranked = tuple(each[: 1 + (saying.alternatives or 0)] for each in shown)
            request.hearing.hear(talking.opened + text)
            return spoken(batch.samples[row], talking.opened + text, self.taxonomy, **known)

        def early(row: int, ids: Sequence[int]) -> None:
            if sayings[row].alternatives is None:
                one = Said(tokenizer.decode(ids, skip_special_tokens=True), tuple(ids))
                prediction = _predicted(batch, row, output(row, one))
                self._let_go([requests[row]])
                requests[row].answer.set_result(prediction)

        talking = _Talking(requests, tokenizer, ends, begun_turn(model.processor, batch), early)
        wanted = [saying.alternatives for saying in sayings if saying.alternatives is not None]
        how: dict[str, Any] = {"top_p": sayings[0].top_p, "alternatives": max(wanted, default=None)}
        how |= {"uniforms_BL": uniforms_BL if temperature > 0 else None, "over": talking.over}
        said = model.say(batch, max_new_tokens=longest, temperature=temperature, **how)
        return [output(row, one) for row, one in enumerate(said)]


def _predicted(batch: Batch, row: int, output: Output) -> Prediction:
    return prediction_of(Answered(batch.samples[row], replace(output, tokens_in=int(batch.num_tokens[row]))))


class _Talking:
    """Follows talks token by token: whoever listens is told, and an answer ends where its own limits say."""

    def __init__(
        self,
        requests: Sequence[_Request],
        tokenizer: Any,
        ends: Collection[int],
        opened: str,
        early: Callable[[int, Sequence[int]], None],
    ) -> None:
        """`opened` is what of each answer the prompt has begun. `early` is called with the number of a row and its
        tokens, the end token included, when it is over and another is not."""
        self._requests, self._tokenizer, self._ends, self.opened = requests, tokenizer, ends, opened
        self._early, self._ended = early, [False] * len(requests)

    def over(self, ids_BL: Tensor) -> Tensor:
        """Which rows [B] end after these tokens, or have ended."""
        rows = ids_BL.tolist()
        now = [row for row, ids in enumerate(rows) if not self._ended[row] and self._is_over(self._requests[row], ids)]
        for row in now:
            self._ended[row] = True
        if not all(self._ended):
            for row in now:
                self._early(row, rows[row])
        return torch.tensor(self._ended)

    def _is_over(self, request: _Request, ids: Sequence[int]) -> bool:
        saying, hearing = request.saying, request.hearing
        assert saying is not None
        if ids[-1] in self._ends or len(ids) >= saying.max_tokens or hearing.gone:
            return True
        if hearing.tell is None and not saying.stop:
            return False
        text, stopped = _until(self._tokenizer.decode(ids, skip_special_tokens=True), saying.stop)
        if not stopped:
            text = text.rstrip("\ufffd")  # half a character
            # What may be the beginning of a text that ends the answer is not told yet.
            begun = (n for stop in saying.stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
            text = text[: len(text) - max(begun, default=0)]
        hearing.hear(self.opened + text)
        return stopped


def _until(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """A text up to the first of `stops`, and whether there is one."""
    places = [place for place in map(text.find, stops) if place >= 0]
    return (text[: min(places)], True) if places else (text, False)


def _tokens_of(text: str, ids: Sequence[int], tokenizer: Any) -> int:
    """How many of the tokens `ids` a text has that is the beginning of theirs; one that it has in part counts."""
    heads = (tokenizer.decode(ids[:count], skip_special_tokens=True) for count in range(len(ids)))
    return next((count for count, head in enumerate(heads) if head.startswith(text)), len(ids))


def _measuring(dataset: str, dims: Mapping[str, int], model: str) -> Settings | HbaError:
    """What measures the descriptors that adapters read, or why nothing does."""
    try:
        settings = descriptors_of(dataset, dims, model)
        settings.extractors()
        if settings.video:
            python_of_environment()
    except HbaError as error:
        return error
    return settings


def _fail(request: _Request, error: Exception) -> None:
    if request.claim():
        request.answer.set_exception(error)


# --- what worker processes do -----------------------------------------------------------------------------------------


class _Nowhere:
    """The media of a sample that has been encoded: they are gone."""

    def medium(self, number: int, name: str, index: int, *, where: str) -> Any:
        raise MediaError("its media were removed once they were decoded", where=where)


class _Rows:
    """In the place of an atlas: a row of any number, of which nothing is known before a worker looks."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._source = folder, _Nowhere()

    def __getitem__(self, number: int) -> Sample:
        known: dict[str, Any] = dict.fromkeys(("problem", "answer", "dataset", "task", "modality_signature"), "")
        known |= dict.fromkeys(("images", "videos", "audios", "ext_video_feats", "ext_audio_feats"), 0)
        about: dict[str, Any] = {"id": str(number), "split": "asked", "where": f"request {number}", "number": number}
        return Sample(**about, **known, label=None, texts=(), source=self._source)


class _InTurn:
    """Where there are no worker processes: rows are decoded in the desk's own thread."""

    def __init__(self, rows: _Rows, reader: _Reader) -> None:
        self._rows, self._reader = rows, reader

    def request(self, row: int) -> None:
        """Nothing is done before it is waited for."""

    def first(self, rows: Collection[int]) -> tuple[int, Outcome]:
        number, rows_, reader = next(iter(tuple(rows))), self._rows, self._reader
        try:
            return number, encode_row(rows_, reader, number)  # type: ignore[arg-type]
        except Exception as error:  # noqa: BLE001 - the boundary of one request, as in a worker
            return number, Failure(error, "")


class _Reader:
    """In the place of an encoder: makes the row that is asked, and encodes it."""

    def __init__(self, folder: Path, encoder: Encoder, measured: Mapping[str, Settings]) -> None:
        """`measured` says what measures the descriptors of a dataset that has adapters."""
        self._folder, self._encoder = folder, encoder
        self._extract = {key: Extract(settings) for key, settings in measured.items()}
        how: dict[str, Any] = {"descriptors": encoder.descriptors, "dims": encoder.dims}
        self._talk = _Talk(encoder.processor, encoder.config, encoder.taxonomy, **how)

    def encode(self, asked: Sample) -> Encoded:
        """What the model is given. Raises MediaError for a file that is none, or cannot be read."""
        folder, encoder = self._folder / asked.id, self._encoder
        question = msgspec.json.decode((folder / ASKED).read_bytes(), type=Question)
        if question.turns:
            encoder, row = self._talk, self._row_of_talk(question, folder)
        else:
            medium = self._looked_at(folder / question.name)
            how: dict[str, Any] = {"question": question.question, "transcript": question.transcript}
            row = row_of(medium, question.name, question.dataset, encoder.taxonomy, **how)
        # Not atomic_write: it waits for the disk, and this is read at once and removed.
        (folder / "asked.jsonl").write_bytes(msgspec.json.encode(row | {"id": asked.id}))
        if question.dataset in self._extract and not question.turns:
            self._describe(folder, self._extract[question.dataset])
        sample = open_atlas(folder, split="asked", taxonomy=encoder.taxonomy)[0]
        encoded = encoder.encode(sample)
        own = replace(sample, source=asked.source, refused={})
        windows = tuple(replace(window, sample=own) for window in encoded.windows)
        return replace(encoded, sample=own, windows=windows)

    def _describe(self, folder: Path, extract: Extract) -> None:
        """Measure what the adapters read, and name it in the row, as `hba ask` does."""
        save_beside(self._encoder.taxonomy, folder)
        plan, kept = make_plan(folder, ["asked"], extract.settings, ()), folder / DESCRIBED
        kept.mkdir()
        for item in plan.items.values():
            made = extract(item)
            if isinstance(made, HbaError):
                raise made
            if isinstance(made, Failed):
                raise MediaError(f"no descriptors: {made.reason}")
        for rows in plan.files:
            link_rows(rows, set(plan.items), kept)

    def _looked_at(self, path: Path) -> Medium:
        """What a file holds; where the encoding says how the sound of clips is heard, clips are clips alone."""
        medium = look_at(path)
        alone = self._encoder.config.sound_of_clips != "off" and "video" in medium.kinds
        return medium._replace(kinds=("video",)) if alone else medium

    def _row_of_talk(self, question: Question, folder: Path) -> dict[str, Any]:
        """The row of a talk; what of each medium is taken is known once it has been looked at."""
        media: dict[str, list[str]] = {"image": [], "video": [], "audio": []}
        turns = []
        for turn in question.turns:
            parts: list[tuple[str, str]] = []
            for part in turn.parts:
                if not part.kind:
                    parts.append(("text", part.text))
                    continue
                path = folder / part.name
                found = self._looked_at(path).kinds if part.kind == "video" else look_at(path).kinds
                if part.kind not in found:
                    what = f"is no {part.kind}" if not found else f"holds {' and '.join(found)}, and no {part.kind}"
                    raise MediaError(what, where=part.name, fix="Give it as what it is.")
                # As `hba ask` does, the sound of a clip is heard, too.
                for kind in found if part.kind == "video" else (part.kind,):
                    parts.append((kind, ""))
                    media[kind].append(part.name)
            turns.append((turn.role, parts))
        return {
            "problem": "A talk.",
            "answer": None,
            "dataset": question.dataset,
            "task": "talk_qa",
            "modality_signature": "_".join(["text", *(kind for kind, names in media.items() if names)]),
            "turns": turns,
        } | {f"{kind}s": names for kind, names in media.items()}


class _Talk(Encoder):
    """Encodes a talk of several turns, whose media stand where they were given."""

    def messages(self, sample: Sample, sounds: int | None = None) -> list[dict[str, Any]]:
        """The turns, with the config's system prompt where the talk has none. Sounds of clips stand in front, as in a
        row's prompt."""
        config, how = self.config, sound_of_clips(sample, self.config)
        plain, messages = PlainText(self.processor), []
        kinds = [kind for kind in config.modalities if kind != "audio" or how != "interleaved"]
        for role, parts in sample.extra["turns"]:
            content = [{"type": "text", "text": plain(text)} if kind == "text" else {"type": kind}
                       for kind, text in parts if kind == "text" or kind in kinds]  # fmt: skip
            messages.append({"role": role, "content": content})
        if how == "separate":
            first = next(turn for turn in messages if turn["role"] == "user")
            first["content"] = [{"type": "audio"}] * (sample.videos if sounds is None else sounds) + first["content"]
        if config.system_prompt is not None and messages[0]["role"] != "system":
            system = [{"type": "text", "text": config.system_prompt}]
            messages.insert(0, {"role": "system", "content": system})
        return messages


# --- HTTP around a desk -----------------------------------------------------------------------------------------------


MEGABYTE = 1 << 20
HEADER_SECONDS = 15.0
LINGER_SECONDS = 2.0  # for which a body that was refused is still read, so that its sender gets to read why
BODIES_AT_ONCE = 16  # of the largest size
RETRY_SECONDS = 2
MOST_ROWS = 64  # files times tasks of one request
MOST_SEED = (1 << 63) - 1
ENDINGS = {"image": ".png", "video": ".mp4", "audio": ".wav"}
T = TypeVar("T")
BATCH_BOUNDS = (1, 2, 4, 8, 16, 32, 64)
# Parameters of OpenAI's that say what is done anyway.
AS_IT_IS: dict[str, tuple[Any, ...]] = {
    "tools": (None, []), "user": (),
    "presence_penalty": (0, 0.0), "frequency_penalty": (0, 0.0), "response_format": ({"type": "text"},),
    "stream_options": (), "metadata": (), "store": (False,), "modalities": (["text"],),
}  # fmt: skip
TAKEN = ("model", "messages", "max_tokens", "max_completion_tokens", "temperature", "seed", "stream", "top_p", "stop",
         "n", "logprobs", "top_logprobs")  # fmt: skip
MOST_ANSWERS = 16  # to one talk
MOST_STOPS = 4
MOST_ALTERNATIVES = 20


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one client, and all together, may cost."""

    body_bytes: int = 100 * MEGABYTE
    waiting: int = 256
    seconds: float = 120.0
    """of an upload, and then of its answer"""


class _Refused(Exception):  # noqa: N818 - an answer to a request, in the shape of OpenAI's errors
    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry: bool = False
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry = status, param, code, retry

    def response(self) -> Response:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        headers = {"retry-after": str(RETRY_SECONDS)} if self.retry else {}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return JSONResponse({"error": error}, self.status, headers)


class _Gate:
    """ASGI middleware: refuses strangers and more than can be borne, and counts a body while it comes in."""

    def __init__(self, app: ASGIApp, limits: Limits, token: str | None, *, only_loopback: bool) -> None:
        self._app, self.limits, self._token, self._only_loopback = app, limits, token, only_loopback
        self.under_way = self.bytes_held = 0
        self.answers: Counter[tuple[str, int]] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.received = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        started, came, began = asyncio.get_running_loop().time(), 0, False
        path = scope["path"] if scope["path"] in PATHS else "other"
        deadline = started + self.limits.seconds

        async def counted() -> Message:
            nonlocal came
            if came < 0:  # all of it is there: what comes now is the end of the connection
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                what = f"the body did not come within {self.limits.seconds:g} seconds"
                raise _Refused(408, what, code="timeout") from None
            if message["type"] == "http.request":
                size = len(message.get("body", b""))
                came += size
                self.bytes_held += size
                self.received += size
                self._require_small(came)
                self._require_room()
                if not message.get("more_body"):
                    ended.append(came)
                    came = -1
            return message

        def let_go() -> None:
            nonlocal came
            self.bytes_held -= ended.pop() if ended else max(came, 0)
            came = min(came, 0)

        async def noted(message: Message) -> None:
            nonlocal began
            if message["type"] == "http.response.start":
                began = True
                self.answers[path, message["status"]] += 1
                message["headers"] = [*message["headers"], (b"cache-control", b"no-store")]
            await send(message)

        ended: list[int] = []
        self.under_way += 1
        try:
            try:
                self._admit(Request(scope))
                await self._app(scope, counted, noted)
            except _Refused as refused:
                if began:
                    raise
                let_go()  # before it is read on: what is refused leaves its room to the others
                await self._refuse(refused, scope, receive, noted, all_came=came < 0)
            except ClientDisconnect:
                self.answers[path, 499] += 1
            except Exception as error:
                if began:
                    raise
                _log.exception("a request failed")
                await self._refuse(_as_refusal(error), scope, receive, noted, all_came=came < 0)
        finally:
            self.under_way -= 1
            let_go()
            self.seconds[path] += asyncio.get_running_loop().time() - started

    def _admit(self, request: Request) -> None:
        if self._only_loopback and not is_loopback(request.url.hostname or ""):
            raise _Refused(421, "this server answers to localhost alone", code="wrong_host")
        if foreign(request.headers):
            raise _Refused(403, "a page of another site asked for this", code="foreign_origin")
        if request.url.path == "/health":
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self._token is not None and not is_same(given, self._token):
            raise _Refused(401, "no token, or a wrong one: send Authorization: Bearer ...", code="invalid_api_key")
        if request.method != "POST":
            return
        if self.under_way > self.limits.waiting:
            what = f"{self.limits.waiting} requests are under way already"
            raise _Refused(429, what, code="rate_limit_exceeded", retry=True)
        declared = request.headers.get("content-length", "0")
        self._require_small(int(declared) if declared.isdigit() and len(declared) < 20 else 0)
        self._require_room()

    def _require_room(self) -> None:
        if self.bytes_held > BODIES_AT_ONCE * self.limits.body_bytes:
            raise _Refused(503, "too many bytes are under way already", code="overloaded", retry=True)

    def _require_small(self, size: int) -> None:
        if size > self.limits.body_bytes:
            most = self.limits.body_bytes / MEGABYTE
            raise _Refused(413, f"the body is larger than {most:g} MB (--max-body)", code="body_too_large")

    async def _refuse(self, refused: _Refused, scope: Scope, receive: Receive, send: Send, *, all_came: bool) -> None:
        """Send the refusal while the body still comes, and read on a little: whoever writes does not read."""
        response = refused.response()
        if all_came or scope["method"] == "GET":
            await response(scope, receive, send)
            return
        headers = [*response.raw_headers, (b"connection", b"close")]
        await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
        await send({"type": "http.response.body", "body": response.body, "more_body": True})
        try:
            async with asyncio.timeout(LINGER_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] != "http.request" or not message.get("more_body"):
                        break
        except TimeoutError:
            pass
        await send({"type": "http.response.body", "body": b""})


# --- the app ----------------------------------------------------------------------------------------------------------


class _Asked(NamedTuple):
    """A talk, how each answer to it is drawn, and whether it is streamed (None: no) and then tells the usage."""

    question: Question
    files: dict[str, Path]
    sayings: list[Saying]
    streamed: bool | None


class Server:
    """The pages of the API over a desk."""

    def __init__(self, desk: Desk, limits: Limits) -> None:
        self.desk, self.limits, self.started = desk, limits, time.time()
        self.gate: _Gate | None = None
        self._reading = asyncio.Lock()  # one body at a time is in memory

    # Health, metrics, models

    async def health(self, request: Request) -> Response:
        """Whether requests are taken."""
        alive = self.desk.alive
        return JSONResponse({"status": "ok" if alive else "stopping"}, 200 if alive else 503)

    async def models(self, request: Request) -> Response:
        """The one model."""
        about = {"id": self.desk.model, "object": "model", "created": int(self.started), "owned_by": "hba"}
        return JSONResponse({"object": "list", "data": [about]})

    async def metrics(self, request: Request) -> Response:
        """Counts in Prometheus' text format."""
        assert self.gate is not None
        desk, gate = self.desk, self.gate
        lines: list[str] = []

        def tell(name: str, kind: str, said: str, values: Mapping[str, float]) -> None:
            lines.extend((f"# HELP hba_{name} {said}", f"# TYPE hba_{name} {kind}"))
            lines.extend(f"hba_{name}{labels} {value:g}" for labels, value in values.items())

        answers = {f'{{path="{path}",status="{status}"}}': n for (path, status), n in sorted(gate.answers.items())}
        tell("requests_total", "counter", "Requests by path and status.", answers)
        seconds = {f'{{path="{path}"}}': n for path, n in sorted(gate.seconds.items())}
        tell("request_seconds_total", "counter", "Seconds that requests took, uploads included.", seconds)
        tell("requests_under_way", "gauge", "Requests that are not answered yet.", {"": gate.under_way})
        tell("rows_waiting", "gauge", "Rows that the model has not answered yet.", {"": desk.waiting})
        tell("received_bytes_total", "counter", "Bytes of bodies.", {"": gate.received})
        counts = desk.counts
        tell("rows_total", "counter", "Rows that the model has answered.", {"": counts["rows"]})
        tell("refused_total", "counter", "Files that could not be read.", {"": counts["refused"]})
        tell("tokens_total", "counter", "Tokens read and said.",
             {'{direction="in"}': counts["tokens_in"], '{direction="out"}': counts["tokens_out"]})  # fmt: skip
        busy = counts["model_microseconds"] / 1e6
        tell("model_seconds_total", "counter", "Seconds in which the model was busy.", {"": busy})
        sizes = tuple(desk.batch_sizes)
        buckets = {f'{{le="{bound}"}}': sum(size <= bound for size in sizes) for bound in BATCH_BOUNDS}
        tell("recent_batch_size", "gauge", "How many of the last batches had so many rows or fewer.", buckets)
        tell("batches_total", "counter", "Batches that the model has answered.", {"": counts["batches"]})
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    # Chat

    async def chat(self, request: Request) -> Response:
        """The next turn of a talk."""
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[str | None]()
        with self._folder() as folder:
            talk = await self._json(request, lambda asked: self._talk_of(asked, folder))

            def tell(piece: str) -> None:
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

            hearings = [Hearing(None if talk.streamed is None else tell) for _ in talk.sayings]
            answers = self._put([(talk.question, talk.files)] * len(talk.sayings), talk.sayings, hearings)
        about = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": self.desk.model}
        if talk.streamed is not None:
            whole = asyncio.wrap_future(answers[0])
            whole.add_done_callback(lambda _: pieces.put_nowait(None))
            try:
                first = await self._awaited(request, pieces.get())
            except BaseException:
                hearings[0].gone = True
                whole.cancel()
                raise
            if first is None and (error := whole.exception()) is not None:
                raise _as_refusal(error if isinstance(error, Exception) else MediaError("was given up"))
            about["object"] = "chat.completion.chunk"
            events = self._events(about, first, pieces, whole, hearings[0], usage=talk.streamed)
            return StreamingResponse(events, media_type="text/event-stream")
        try:
            found = await self._answers(request, answers)
        except BaseException:
            for hearing in hearings:
                hearing.gone = True
            raise
        for each in found:
            if isinstance(each, Exception):
                raise _as_refusal(each)
        predictions = [each for each in found if isinstance(each, Prediction)]
        choices = []
        for number, (prediction, hearing) in enumerate(zip(predictions, hearings, strict=True)):
            said = {"role": "assistant", "content": prediction.output or "", "refusal": None}
            logprobs = None if talk.sayings[0].alternatives is None else self._logprobs(hearing)
            choices.append({"index": number, "message": said, "finish_reason": prediction.finish or "stop",
                            "logprobs": logprobs})  # fmt: skip
        usage = _usage(predictions)
        return JSONResponse({**about, "object": "chat.completion", "choices": choices, "usage": usage})

    async def _events(
        self,
        chunk: Mapping[str, Any],
        piece: str | None,
        pieces: asyncio.Queue[str | None],
        whole: asyncio.Future[Prediction],
        hearing: Hearing,
        *,
        usage: bool,
    ) -> AsyncIterator[str]:
        """An answer while it is said. `piece` is its first."""
        deadline = asyncio.get_running_loop().time() + self.limits.seconds

        def event(delta: Mapping[str, Any], finish: str | None = None) -> str:
            choice = {"index": 0, "delta": delta, "finish_reason": finish}
            return f"data: {json.dumps({**chunk, 'choices': [choice]})}\n\n"

        try:
            yield event({"role": "assistant", "content": ""})
            while piece is not None:
                yield event({"content": piece})
                async with asyncio.timeout_at(deadline):
                    piece = await pieces.get()
            prediction = await whole
        except Exception as error:  # noqa: BLE001 - it has begun with 200: what went wrong is its last event
            late = _Refused(504, f"no answer within {self.limits.seconds:g} seconds (--timeout)", code="timeout")
            refused = late if isinstance(error, TimeoutError) else _as_refusal(error)
            yield f"data: {bytes(refused.response().body).decode()}\n\n"
            return
        finally:
            hearing.gone = True  # where nobody listens any more the model does not go on
        yield event({}, prediction.finish or "stop")
        if usage:
            yield f"data: {json.dumps({**chunk, 'choices': [], 'usage': _usage([prediction])})}\n\n"
        yield "data: [DONE]\n\n"

    def _logprobs(self, hearing: Hearing) -> dict[str, Any]:
        """What is known of the tokens of an answer, as OpenAI says it."""
        tokenizer = self.desk.backend.model.processor.tokenizer

        def told(token: int, logprob: float) -> dict[str, Any]:
            text = tokenizer.decode([token])
            return {"token": text, "logprob": logprob, "bytes": _bytes_of(tokenizer.convert_ids_to_tokens(token), text)}

        content = [told(*said) | {"top_logprobs": [told(*each) for each in others]} for said, *others in hearing.ranked]
        return {"content": content, "refusal": None}

    def _talk_of(self, asked: Mapping[str, Any], folder: Path) -> _Asked:
        """What a body asks."""
        if not self.desk.talks:
            what = f"{self.desk.model} answers with labels, not in words: POST /v1/classify"
            raise _Refused(400, what, param="model", code="unsupported_model")
        self._require_model(asked)
        for name, value in asked.items():
            if name in TAKEN or value is None:
                continue
            kept = AS_IT_IS.get(name)
            if kept is None or (kept and value not in kept):
                what = f"{name!r} is not supported here" + (f" but as {kept[0]!r}" if kept else "")
                raise _Refused(400, what, param=name, code="unsupported_parameter")
        generation = self.desk.config.generation
        given = (asked.get(name) for name in ("max_completion_tokens", "max_tokens"))
        longest = next((each for each in given if each is not None), generation.max_tokens)
        most = generation.max_tokens
        said = f"must be from 1 to {most} (--set generation.max_tokens=... of the server)"
        _require(isinstance(longest, int) and 1 <= longest <= most, "max_tokens", said)
        temperature = asked.get("temperature")
        temperature = (generation.temperature or 0.0) if temperature is None else temperature
        _require(isinstance(temperature, int | float) and 0 <= temperature <= 2, "temperature", "must be from 0 to 2")
        seed = asked.get("seed")
        seed = secrets.randbits(48) if seed is None else seed
        _require(isinstance(seed, int) and -MOST_SEED <= seed <= MOST_SEED, "seed", "must be a whole number")
        top_p = generation.top_p if asked.get("top_p") is None else asked["top_p"]
        _require(isinstance(top_p, int | float) and 0 < top_p <= 1, "top_p", "must be above 0, and 1 at most")
        stop = asked.get("stop") or []
        stops = [stop] if isinstance(stop, str) else stop
        fits = isinstance(stops, list) and len(stops) <= MOST_STOPS and all(isinstance(x, str) and x for x in stops)
        _require(fits, "stop", f"must be a text or up to {MOST_STOPS} texts")
        flags = {name: asked.get(name) or False for name in ("stream", "logprobs")}
        for name, value in flags.items():
            _require(isinstance(value, bool), name, "must be true or false")
        streamed, wanted = flags["stream"], asked.get("top_logprobs") or 0
        fits = isinstance(wanted, int) and 0 <= wanted <= MOST_ALTERNATIVES and (flags["logprobs"] or not wanted)
        _require(fits, "top_logprobs", f"must be from 0 to {MOST_ALTERNATIVES}, with logprobs")
        number = 1 if asked.get("n") is None else asked["n"]
        _require(isinstance(number, int) and 1 <= number <= MOST_ANSWERS, "n", f"must be from 1 to {MOST_ANSWERS}")
        _require(not (streamed and number > 1), "n", "must be 1 for a stream")
        _require(not (streamed and flags["logprobs"]), "logprobs", "are not told in a stream")
        options = asked.get("stream_options") or {}
        files: dict[str, Path] = {}
        question = Question(turns=tuple(_turns(asked.get("messages"), folder, files)))
        told = bool(isinstance(options, dict) and options.get("include_usage"))
        how: dict[str, Any] = {"top_p": float(top_p), "stop": tuple(stops)}
        how["alternatives"] = wanted if flags["logprobs"] else None
        # Each of several answers is that which its own seed draws alone.
        seeds = [seed + i if seed + i <= MOST_SEED else seed - i for i in range(number)]
        sayings = [Saying(longest, float(temperature), each, **how) for each in seeds]
        return _Asked(question, files, sayings, told if streamed else None)

    # Classify

    async def classify(self, request: Request) -> Response:
        """Labels and probabilities of files."""
        with self._folder() as folder:
            if request.headers.get("content-type", "").startswith("multipart/form-data"):
                fields, files = await self._form(request, folder)
            else:
                fields, files = await self._json(request, lambda asked: _files_of(asked, folder))
            self._require_model(fields)
            chosen = {name: _names(fields.get(name), name) for name in ("tasks", "datasets")}
            question, transcript = (_words(fields.get(name), name) for name in ("question", "transcript"))
            try:
                keys = self.desk.datasets(chosen["tasks"], chosen["datasets"], question)
            except InputError as error:
                raise _as_refusal(error) from None
            if not 0 < len(files) * len(keys) <= MOST_ROWS:
                what = f"{len(files)} files and {len(keys)} tasks: at least one, and at most {MOST_ROWS} answers"
                raise _Refused(400, what, param="files", code="invalid_value")
            free = question is not None and chosen["tasks"] is None and chosen["datasets"] is None
            asks = [(name, path, key) for name, path in files for key in keys]
            how: dict[str, Any] = {"question": question, "transcript": transcript}
            answers = self._put([(Question(dataset=key, name=path.name, **how), {path.name: path})
                                 for _, path, key in asks])  # fmt: skip
        found = await self._answers(request, answers)
        broken = [each for each in found if isinstance(each, Exception)]
        hard = next((each for each in broken if not isinstance(each, MediaError)), None)
        if hard is not None or len(broken) == len(found):
            raise _as_refusal(hard or broken[0])
        replies = [self._reply(name, key, told) for (name, _, key), told in zip(asks, found, strict=True)]
        results = [asdict(reply) | ({"task": "", "dataset": ""} if free else {}) for reply in replies]
        return JSONResponse({"object": "list", "model": self.desk.model, "results": results})

    def _reply(self, file: str, key: str, told: Prediction | Exception) -> Reply:
        about: dict[str, Any] = {"file": file, "task": self.desk.taxonomy.dataset(key).task or "", "dataset": key}
        if isinstance(told, Exception):
            return Reply(**about, answer=None, error=told.what if isinstance(told, HbaError) else str(told))
        answer = told.label if told.label is not None else told.answer
        return Reply(**about, answer=answer, probs=told.probs, text=told.output, error=told.error)

    # What they share

    def _require_model(self, asked: Mapping[str, Any]) -> None:
        named = asked.get("model")
        if named not in (None, "", self.desk.model):
            what = f"no model {str(named)[:100]!r} here; it is {self.desk.model!r}"
            raise _Refused(404, what, param="model", code="model_not_found")

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        """Where the files of one request lie until the desk has them."""
        folder = Path(tempfile.mkdtemp(prefix="upload-", dir=self.desk.folder))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    async def _json(self, request: Request, made: Callable[[dict[str, Any]], T]) -> T:
        """What `made` makes of the body, an object. It comes to the disk; one at a time is read into memory."""
        with tempfile.TemporaryFile(dir=self.desk.folder) as file:
            async for chunk in request.stream():
                file.write(chunk)

            def read() -> T:
                file.seek(0)
                try:
                    value = msgspec.json.decode(file.read())
                except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                    raise _Refused(400, f"the body is no JSON ({str(error)[:200]})", code="invalid_json") from None
                if not isinstance(value, dict):
                    raise _Refused(400, "the body is no JSON object", code="invalid_json")
                return made(value)

            async with self._reading:
                return await run_in_threadpool(read)

    async def _form(self, request: Request, folder: Path) -> tuple[dict[str, Any], list[tuple[str, Path]]]:
        fields: dict[str, Any] = {}
        files: list[tuple[str, Path]] = []
        try:
            async with request.form(max_files=MOST_ROWS, max_fields=MOST_ROWS) as form:
                for name, value in form.multi_items():
                    if isinstance(value, UploadFile):
                        place = folder / _safe(value.filename or name, len(files))
                        await run_in_threadpool(_copied, value.file, place)
                        files.append((value.filename or name, place))
                    else:
                        fields[name] = value
        except (MultiPartException, HTTPException) as error:
            said = error.detail if isinstance(error, HTTPException) else error.message
            raise _Refused(400, f"the form cannot be read ({said})", code="invalid_form") from None
        return fields, files

    def _put(
        self,
        asked: Sequence[tuple[Question, Mapping[str, Path]]],
        sayings: Sequence[Saying] = (),
        hearings: Sequence[Hearing] = (),
    ) -> list[Future[Prediction]]:
        try:
            return self.desk.ask_together(asked, sayings, hearings)
        except HbaError as error:
            raise _as_refusal(error) from None

    async def _answers(self, request: Request, answers: Sequence[Future[Prediction]]) -> list[Prediction | Exception]:
        """What comes of all. Raises what `_awaited` raises."""
        waiting = asyncio.gather(*map(asyncio.wrap_future, answers), return_exceptions=True)
        return [each if isinstance(each, Exception | Prediction) else MediaError("was given up")
                for each in await self._awaited(request, waiting)]  # fmt: skip

    async def _awaited(self, request: Request, coming: Awaitable[T]) -> T:
        """What comes. Raises _Refused after the limit of time, ClientDisconnect when nobody waits any more."""
        waiting = asyncio.ensure_future(coming)
        gone = asyncio.ensure_future(_until_gone(request))
        try:
            both: set[asyncio.Future[Any]] = {waiting, gone}
            await asyncio.wait(both, timeout=self.limits.seconds, return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                return waiting.result()
            if gone.done():
                raise ClientDisconnect
            what = f"no answer within {self.limits.seconds:g} seconds (--timeout)"
            raise _Refused(504, what, code="timeout", retry=True)
        finally:
            gone.cancel()
            waiting.cancel()
            await asyncio.gather(gone, waiting, return_exceptions=True)


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _as_refusal(error: Exception) -> _Refused:
    """What went wrong, without paths of this machine."""
    if isinstance(error, _Refused):
        return error
    if isinstance(error, FullError):
        return _Refused(503, error.what, code="overloaded", retry=True)
    if isinstance(error, MediaError):
        return _Refused(400, f"a file cannot be read: {error.what}", code="invalid_media")
    if isinstance(error, InputError):
        return _Refused(400, f"{error.what}. {error.fix}".strip(), code="invalid_value")
    if isinstance(error, HbaError):
        return _Refused(503, error.what, code="overloaded", retry=True)
    return _Refused(500, f"the model failed ({type(error).__name__})", code="internal_error")


def _bytes_of(piece: str | None, text: str) -> list[int] | None:
    """The bytes of a token that a vocabulary writes as `piece`, None where they are unknown: a part of a character has
    bytes, and no text of its own."""
    fallback, table = re.fullmatch("<0x([0-9A-Fa-f]{2})>", piece or ""), _bytes_of_letters()
    raws = [bytes.fromhex(fallback[1])] if fallback else []
    if all(letter in table for letter in piece or ""):
        raws.append(bytes(table[letter] for letter in piece or ""))
    for raw in raws:
        if raw.decode(errors="replace") == text:  # else the vocabulary is of another kind
            return list(raw)
    return None if "\ufffd" in text else list(text.encode())


@cache
def _bytes_of_letters() -> dict[str, int]:
    """The byte for which each letter of a byte-level vocabulary stands."""
    return {letter: byte for byte, letter in bytes_to_unicode().items()}


def _usage(predictions: Sequence[Prediction]) -> dict[str, int]:
    """Tokens of a talk and of the answers to it."""
    usage = {"prompt_tokens": predictions[0].tokens_in or 0}
    usage["completion_tokens"] = sum(prediction.tokens_out or 0 for prediction in predictions)
    return usage | {"total_tokens": sum(usage.values())}


# --- what is asked ----------------------------------------------------------------------------------------------------


def _require(holds: bool, param: str, said: str) -> None:
    if not holds:
        raise _Refused(400, f"{param} {said}", param=param, code="invalid_value")


def _turns(messages: Any, folder: Path, files: dict[str, Path]) -> Iterator[Turn]:
    """The turns of a talk; what is data in them is put into `folder` and `files`."""
    _require(isinstance(messages, list) and bool(messages), "messages", "must be a list of messages")
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    talk = roles[1:] if roles[0] in ("system", "developer") else roles
    fits = talk and all(role == ("user", "assistant")[i % 2] for i, role in enumerate(talk)) and talk[-1] == "user"
    _require(bool(fits), "messages", "must be a system message or none, then user and assistant in turn, a user last")
    for number, message in enumerate(messages):
        param = f"messages.{number}.content"
        content = message.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        _require(isinstance(content, list) and bool(content), param, "must be text or a list of parts")
        parts = tuple(_part(each, f"{param}.{i}", folder, files) for i, each in enumerate(content))
        _require(roles[number] == "user" or all(not part.kind for part in parts), param, "must be text alone")
        yield Turn(str(roles[number]).replace("developer", "system"), parts)


def _part(part: Any, param: str, folder: Path, files: dict[str, Path]) -> Part:
    """Text, or a medium, as OpenAI and vLLM name them."""
    kind = part.get("type") if isinstance(part, dict) else None
    inside = part.get(kind) if isinstance(part, dict) and isinstance(kind, str) else None
    if kind == "text":
        _require(isinstance(inside, str), param, "must have a text")
        return Part(text=str(inside))
    if not isinstance(inside, dict):
        kind, inside = None, {}
    if kind == "input_audio":
        modality, data = "audio", inside.get("data")
        _require(isinstance(data, str), param, "must have data in base64")
        raw = _decoded(str(data).partition(";base64,")[2] if str(data).startswith("data:") else str(data), param)
    elif kind in ("image_url", "video_url", "audio_url"):
        modality, url = kind.removesuffix("_url"), inside.get("url")
        raw = _of_data_url(url, param)
    else:
        what = f"{param} must be text, input_audio, image_url or video_url"
        raise _Refused(400, what, param=param, code="invalid_value")
    name = f"{len(files)}{ENDINGS[modality]}"
    files[name] = folder / name
    files[name].write_bytes(raw)
    return Part(kind=modality, name=name)


def _of_data_url(url: Any, param: str) -> bytes:
    if not (isinstance(url, str) and url.startswith("data:") and ";base64," in url[:200]):
        what = f"{param} must be a data URL in base64 (data:video/mp4;base64,...): addresses are not fetched"
        raise _Refused(400, what, param=param, code="unsupported_url")
    return _decoded(url.partition(";base64,")[2], param)


def _decoded(text: str, param: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise _Refused(400, f"{param} is no base64", param=param, code="invalid_base64") from None


def _files_of(asked: Mapping[str, Any], folder: Path) -> tuple[dict[str, Any], list[tuple[str, Path]]]:
    """The files of a body in JSON: [{"name": "clip.mp4", "data": "data:video/mp4;base64,..."}]."""
    given = asked.get("files")
    _require(isinstance(given, list), "files", "must be a list of objects with name and data")
    files = []
    for number, each in enumerate(given or ()):
        param = f"files.{number}"
        _require(isinstance(each, dict) and isinstance(each.get("name"), str), param, "must have a name and data")
        raw = _of_data_url(each.get("data"), f"{param}.data")
        place = folder / _safe(each["name"], number)
        place.write_bytes(raw)
        files.append((each["name"], place))
    return {name: value for name, value in asked.items() if name != "files"}, files


def _safe(name: str, number: int) -> str:
    """A name of our own with the ending of the client's."""
    ending = Path(name.replace("\\", "/").rpartition("/")[2]).suffix.lower()
    return f"{number}{ending if ending[1:].isascii() and ending[1:].isalnum() and len(ending) < 8 else ''}"


def _copied(source: IO[bytes], place: Path) -> None:
    with place.open("wb") as target:
        shutil.copyfileobj(source, target, MEGABYTE)


def _names(given: Any, param: str) -> list[str] | None:
    if given is None or given == "":
        return None
    names = given.split(",") if isinstance(given, str) else given
    _require(isinstance(names, list) and all(isinstance(name, str) for name in names), param, "must be a list of keys")
    return [name.strip() for name in names if name.strip()] or None


def _words(given: Any, param: str) -> str | None:
    _require(given is None or isinstance(given, str), param, "must be text")
    return given or None


# --- serving ----------------------------------------------------------------------------------------------------------


PATHS = ("/health", "/metrics", "/v1/models", "/v1/chat/completions", "/v1/classify")


def create_app(desk: Desk, *, limits: Limits, token: str | None, only_loopback: bool = True) -> ASGIApp:
    """The API over a desk, which is closed with it. Without a `token` whoever reaches the server is answered."""
    server = Server(desk, limits)

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(desk.close, limits.seconds)

    async def nowhere(scope: Scope, receive: Receive, send: Send) -> None:
        raise _Refused(404, f"nothing is at {scope['path'][:100]}; see {', '.join(PATHS)}", code="not_found")

    gets = {"/health": server.health, "/metrics": server.metrics, "/v1/models": server.models}
    posts = {"/v1/chat/completions": server.chat, "/v1/classify": server.classify}
    routes = [Route(path, page) for path, page in gets.items()]
    routes += [Route(path, page, methods=["POST"]) for path, page in posts.items()]
    # No Starlette around it: what is raised goes to the gate, which knows whether the body is still coming.
    server.gate = _Gate(Router(routes, default=nowhere, lifespan=lifespan), limits, token, only_loopback=only_loopback)
    return server.gate


class _Protocol(H11Protocol):
    """uvicorn's, with a limit on the time in which a connection has no request under way: a client that sends its
    headers byte by byte would hold it for ever."""

    _watch: asyncio.TimerHandle | None = None
    _seen: object = None
    _idle = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._watch is not None:
            self._watch.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        busy = self.cycle is not None and not self.cycle.response_complete
        self._idle = 0 if busy or self.cycle is not self._seen else self._idle + 1
        self._seen = self.cycle
        if self._idle > 2:
            self.transport.close()
            return
        self._watch = self.loop.call_later(HEADER_SECONDS / 2, self._look)


def run(app: ASGIApp, listening: socket.socket, limits: Limits) -> None:
    """Serve until SIGTERM or Ctrl-C; what is under way then is answered, for as long as an answer may take."""
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        log_level="error",
        access_log=False,  # it would say who asked
        server_header=False,
        timeout_graceful_shutdown=int(limits.seconds) + 1,
    )
    # uvicorn ends by sending itself the signal once more: all is done by then.
    signal.signal(signal.SIGTERM, lambda *_: None)
    uvicorn.Server(config).run(sockets=[listening])
