"""`hba serve`: a checkpoint of ours, or a chat model, answers over HTTP.

Around a `Desk`, which keeps the model, `create_app` puts `/v1/chat/completions`, which speaks as OpenAI's does, for its
client and all that is built on it, and `/v1/classify`, which gives labels and probabilities for files. Files come as
data, never as addresses: nothing is fetched.

What a client may cost is bounded before it is read: a token, the number of requests under way, the bytes of one body
and of all, the seconds of an upload and of an answer. A body that is not small goes to the disk as it comes; one such
body at a time is held in memory, while it is parsed.
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
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any, TypeVar

import h11
import msgspec
import uvicorn
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers.convert_slow_tokenizer import bytes_to_unicode
from uvicorn.protocols.http.h11_impl import H11Protocol

from hba.errors import HbaError, InputError, MediaError
from hba.evaluate.ask import reply_of
from hba.evaluate.desk import Desk, Inquiry, Part, Question, Saying, Turn
from hba.evaluate.predictions import Prediction
from hba.explorer.server import foreign, is_loopback, is_same
from hba.model.generate import Ranked
from hba.storage import machine_fault, plural

_log = logging.getLogger(__name__)


# --- HTTP around a desk: who is let in, and what it may cost ----------------------------------------------------------


MEGABYTE = 1 << 20
HEADER_SECONDS = 15.0
LINGER_SECONDS = 2.0  # for which a body that was refused is still read, so that its sender gets to read why
BODIES_AT_ONCE = 16  # of the largest size
SMALL_BYTES = 1 << 16  # a body of so many is read in memory at once
RETRY_SECONDS = 2
MOST_SAID = 2000  # letters of a refusal, which may repeat a name of the client's
PATHS = ("/health", "/metrics", "/v1/models", "/v1/chat/completions", "/v1/classify")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one client, and all together, may cost."""

    body_bytes: int = 100 * MEGABYTE
    waiting: int = 256
    seconds: float = 120.0
    """of an upload, and then of its answer"""


class _Refused(Exception):  # noqa: N818 - an answer to a request, in the shape of OpenAI's errors
    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry: bool = False,
        allow: str = "",
    ) -> None:
        super().__init__(message)
        message = message[:MOST_SAID]
        self.status = status
        told = {"retry-after": str(RETRY_SECONDS) if retry else "", "allow": allow}
        self.headers = {name: value for name, value in told.items() if value}
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.error = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> Response:
        who = {"www-authenticate": "Bearer"} if self.status == 401 else {}
        return _as_json(self.error, self.status, self.headers | who)


def _as_refusal(error: BaseException) -> _Refused:
    """What went wrong, without paths of this machine."""
    if isinstance(error, _Refused):
        return error
    if isinstance(error, HTTPException):  # the framework's own
        allow = ", ".join(sorted((error.headers or {}).get("Allow", "").split(", ")))
        what = f"this address takes {allow} alone" if allow else error.detail
        return _Refused(error.status_code, what, code="method_not_allowed" if allow else "invalid_request", allow=allow)
    error = machine_fault(error, "") or error  # such as a full disk, for which the model can nothing
    if isinstance(error, MediaError):
        return _Refused(400, f"a file cannot be read: {error.what}", code="invalid_media")
    if isinstance(error, InputError):
        return _Refused(400, f"{error.what}. {error.fix}".strip(), code="invalid_value")
    if isinstance(error, HbaError):
        return _Refused(503, error.what, code="overloaded", retry=True)
    return _Refused(500, f"the model failed ({type(error).__name__})", code="internal_error")


def _as_json(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, media_type="application/json")


class _Gate:
    """ASGI middleware: refuses strangers and more than can be borne, and counts a body while it comes in."""

    def __init__(self, app: ASGIApp, limits: Limits, token: str | None, *, only_loopback: bool) -> None:
        self._app, self.limits, self._token, self._only_loopback = app, limits, token, only_loopback
        self.under_way = self.bytes_held = self.received = 0
        self.answers: Counter[tuple[str, int]] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        clock = asyncio.get_running_loop().time
        started, held, whole, begun_answer = clock(), 0, False, False
        deadline = started + self.limits.seconds
        path = scope["path"] if scope["path"] in PATHS else "other"

        async def counted() -> Message:
            nonlocal held, whole
            if whole:  # what comes now is the end of the connection
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                what = f"the body did not come within {self.limits.seconds:g} seconds"
                raise _Refused(408, what, code="timeout") from None
            if message["type"] == "http.request":
                size = len(message.get("body", b""))
                held += size
                self.bytes_held += size
                self.received += size
                self._require_small(held)
                self._require_room()
                whole = not message.get("more_body")
            return message

        async def noted(message: Message) -> None:
            nonlocal begun_answer
            if message["type"] == "http.response.start":
                begun_answer = True
                self.answers[path, message["status"]] += 1
                message["headers"] = [*message["headers"], (b"cache-control", b"no-store")]
            await send(message)

        self.under_way += 1
        scope["app"] = self  # so that the framework raises what it refuses, in place of answering in words of its own
        try:
            self._admit(Request(scope))
            await self._app(scope, counted, noted)
        except ClientDisconnect:
            self.answers[path, 499] += 1
        except Exception as error:
            if begun_answer:
                raise
            if not isinstance(error, _Refused | HbaError | HTTPException):  # the words of these may be the client's
                _log.exception("a request failed")
            self.bytes_held -= held  # before it is read on: what is refused leaves its room to the others
            held = 0
            await self._refuse(_as_refusal(error), scope, receive, noted, all_came=whole)
        finally:
            self.under_way -= 1
            self.bytes_held -= held
            self.seconds[path] += clock() - started

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


# --- the pages of the API ---------------------------------------------------------------------------------------------


MOST_ROWS = 64  # files times tasks of one request
MOST_SEED = (1 << 63) - 1
MOST_ANSWERS = 16  # to one talk
MOST_STOPS = 4
MOST_ALTERNATIVES = 20
ENDINGS = {"image": ".png", "video": ".mp4", "audio": ".wav"}
BATCH_BOUNDS = (1, 2, 4, 8, 16, 32, 64)
# Parameters of OpenAI's that say what is done anyway.
AS_IT_IS: dict[str, tuple[Any, ...]] = {
    "tools": (None, []), "user": (),
    "presence_penalty": (0, 0.0), "frequency_penalty": (0, 0.0), "response_format": ({"type": "text"},),
    "stream_options": (), "metadata": (), "store": (False,), "modalities": (["text"],),
}  # fmt: skip
TAKEN = ("model", "messages", "max_tokens", "max_completion_tokens", "temperature", "seed", "stream", "top_p", "stop",
         "n", "logprobs", "top_logprobs")  # fmt: skip


class _Files:
    """The files of one request, in a folder that is there once the first comes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._count = folder, itertools.count()

    def new(self, ending: str) -> tuple[str, Path]:
        """A name below the desk's folder, and the path of a file that may be written there."""
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"{next(self._count)}{ending}"
        return f"{self.folder.name}/{path.name}", path


class Server:
    """The pages of the API over a desk."""

    def __init__(self, desk: Desk, limits: Limits) -> None:
        self.desk, self.limits, self.started = desk, limits, int(time.time())
        self.gate: _Gate | None = None
        self._reading = asyncio.Lock()  # one large body at a time is in memory

    async def health(self, request: Request) -> Response:
        """Whether requests are taken."""
        alive = self.desk.alive
        return _as_json({"status": "ok" if alive else "stopping"}, 200 if alive else 503)

    async def models(self, request: Request) -> Response:
        """The one model."""
        about = {"id": self.desk.model, "object": "model", "created": self.started, "owned_by": "hba"}
        return _as_json({"object": "list", "data": [about]})

    async def metrics(self, request: Request) -> Response:
        """Counts in Prometheus' text format."""
        assert self.gate is not None
        gate, counts, sizes = self.gate, self.desk.counts, tuple(self.desk.batch_sizes)
        answers = {f'{{path="{path}",status="{status}"}}': n for (path, status), n in sorted(gate.answers.items())}
        seconds = {f'{{path="{path}"}}': n for path, n in sorted(gate.seconds.items())}
        tokens = {f'{{direction="{way}"}}': counts[f"tokens_{way}"] for way in ("in", "out")}
        buckets = {f'{{le="{bound}"}}': sum(size <= bound for size in sizes) for bound in BATCH_BOUNDS}
        told: list[tuple[str, str, Mapping[str, float] | float]] = [
            ("requests_total", "Requests by path and status.", answers),
            ("request_seconds_total", "Seconds that requests took, uploads included.", seconds),
            ("requests_under_way", "Requests that are not answered yet.", gate.under_way),
            ("rows_waiting", "Rows that the model has not answered yet.", self.desk.waiting),
            ("received_bytes_total", "Bytes of bodies.", gate.received),
            ("rows_total", "Rows that the model has answered.", counts["rows"]),
            ("refused_total", "Files that could not be read.", counts["refused"]),
            ("tokens_total", "Tokens read and said.", tokens),
            ("model_seconds_total", "Seconds in which the model was busy.", counts["model_microseconds"] / 1e6),
            ("recent_batch_size", "How many of the last batches had so many rows or fewer.", buckets),
            ("batches_total", "Batches that the model has answered.", counts["batches"]),
        ]
        lines = []
        for name, said, values in told:
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += [f"# HELP hba_{name} {said}", f"# TYPE hba_{name} {kind}"]
            labelled = values if isinstance(values, Mapping) else {"": values}
            lines += [f"hba_{name}{labels} {value:g}" for labels, value in labelled.items()]
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    # --- talks

    async def chat(self, request: Request) -> Response:
        """The next turn of a talk."""
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[str | None]()
        with self._files() as files:
            asked, question, sayings = await self._json(request, lambda asked: self._talk_of(asked, files))

            def tell(piece: str) -> None:
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

            streamed = bool(asked.get("stream"))
            inquiries = [Inquiry(question, saying, tell if streamed else None) for saying in sayings]
            answers = self.desk.ask_together(inquiries, files.folder)
        about = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": self.desk.model}
        try:
            if streamed:
                whole = asyncio.wrap_future(answers[0])
                whole.add_done_callback(lambda _: pieces.put_nowait(None))
                first = await self._awaited(request, pieces.get())
                if first is None and (failed := whole.exception()) is not None:
                    raise _as_refusal(failed)  # what fails before anything is said is no stream
                about["object"] = "chat.completion.chunk"
                options = asked.get("stream_options")
                usage = isinstance(options, dict) and bool(options.get("include_usage"))
                events = self._events(about, first, pieces, whole, usage=usage)
                return _Listened(inquiries[0], events)
            found = await self._answers(request, answers)
        except BaseException:
            for inquiry, answer in zip(inquiries, answers, strict=True):
                inquiry.gone = True
                answer.cancel()
            raise
        predictions = []
        for each in found:
            if isinstance(each, Exception):
                raise _as_refusal(each)
            predictions.append(each)
        choices = [self._choice(number, inquiry, answered)
                   for number, (inquiry, answered) in enumerate(zip(inquiries, predictions, strict=True))]  # fmt: skip
        return _as_json({**about, "object": "chat.completion", "choices": choices, "usage": _usage(predictions)})

    def _choice(self, number: int, inquiry: Inquiry, answered: Prediction) -> dict[str, Any]:
        """One of several answers, as OpenAI says it."""
        assert inquiry.saying is not None
        logprobs = None if inquiry.saying.alternatives is None else self._logprobs(inquiry.ranked)
        said = {"role": "assistant", "content": answered.output or "", "refusal": None}
        finish = answered.finish or "stop"
        return {"index": number, "message": said, "finish_reason": finish, "logprobs": logprobs}

    async def _events(
        self,
        chunk: Mapping[str, Any],
        piece: str | None,
        pieces: asyncio.Queue[str | None],
        whole: asyncio.Future[Prediction],
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
            late = isinstance(error, TimeoutError)
            yield f"data: {json.dumps((self._late() if late else _as_refusal(error)).error)}\n\n"
            return
        yield event({}, prediction.finish or "stop")
        if usage:
            yield f"data: {json.dumps({**chunk, 'choices': [], 'usage': _usage([prediction])})}\n\n"
        yield "data: [DONE]\n\n"

    def _logprobs(self, ranked: Sequence[Ranked]) -> dict[str, Any]:
        """What is known of the tokens of an answer, as OpenAI says it."""
        tokenizer = self.desk.backend.model.processor.tokenizer

        def told(token: int, logprob: float) -> dict[str, Any]:
            text = tokenizer.decode([token])
            return {"token": text, "logprob": logprob, "bytes": _bytes_of(tokenizer.convert_ids_to_tokens(token), text)}

        content = [told(*said) | {"top_logprobs": [told(*each) for each in others]} for said, *others in ranked]
        return {"content": content, "refusal": None}

    def _talk_of(self, asked: dict[str, Any], files: _Files) -> tuple[dict[str, Any], Question, list[Saying]]:
        """What a body asks, and how each answer to it is drawn."""
        if not self.desk.talks:
            what = f"{self.desk.model} answers with labels, not in words: POST /v1/classify"
            raise _Refused(400, what, param="model", code="unsupported_model")
        self._require_model(asked)
        asked = {name: value for name, value in asked.items() if value is not None}
        for name in asked.keys() - set(TAKEN):
            kept = AS_IT_IS.get(name)
            if kept is None or (kept and asked[name] not in kept):
                what = f"{name!r} is not supported here" + (f" but as {kept[0]!r}" if kept else "")
                raise _Refused(400, what, param=name, code="unsupported_parameter")
        generation, most = self.desk.config.generation, self.desk.config.generation.max_tokens
        longest = asked.get("max_completion_tokens", asked.get("max_tokens", most))
        said = f"must be from 1 to {most} (--set generation.max_tokens=... of the server)"
        _require(_is_whole(longest, 1, most), "max_tokens", said)
        temperature = asked.get("temperature", generation.temperature or 0.0)
        _require(_is_number(temperature) and 0 <= temperature <= 2, "temperature", "must be from 0 to 2")
        seed = asked.get("seed", secrets.randbits(48))
        _require(_is_whole(seed, -MOST_SEED, MOST_SEED), "seed", "must be a whole number")
        top_p = asked.get("top_p", generation.top_p)
        _require(_is_number(top_p) and 0 < top_p <= 1, "top_p", "must be above 0, and 1 at most")
        stop = asked.get("stop", [])
        stops = list(filter(None, [stop])) if isinstance(stop, str) else stop
        fits = isinstance(stops, list) and len(stops) <= MOST_STOPS and all(isinstance(x, str) and x for x in stops)
        _require(fits, "stop", f"must be a text or up to {MOST_STOPS} texts")
        stream, logprobs = asked.get("stream", False), asked.get("logprobs", False)
        for name, flag in (("stream", stream), ("logprobs", logprobs)):
            _require(isinstance(flag, bool), name, "must be true or false")
        wanted = asked.get("top_logprobs", 0)
        fits = _is_whole(wanted, 0, MOST_ALTERNATIVES) and (logprobs or not wanted)
        _require(fits, "top_logprobs", f"must be from 0 to {MOST_ALTERNATIVES}, with logprobs")
        number = asked.get("n", 1)
        _require(_is_whole(number, 1, MOST_ANSWERS), "n", f"must be from 1 to {MOST_ANSWERS}")
        _require(not (stream and number > 1), "n", "must be 1 for a stream")
        _require(not (stream and logprobs), "logprobs", "are not told in a stream")
        question = Question(turns=tuple(_turns(asked.get("messages"), files)))
        how: dict[str, Any] = {"top_p": float(top_p), "stop": tuple(stops)}
        how["alternatives"] = wanted if logprobs else None
        # Each of several answers is that which its own seed draws alone.
        seeds = [seed + i if seed + i <= MOST_SEED else seed - i for i in range(number)]
        return asked, question, [Saying(longest, float(temperature), each, **how) for each in seeds]

    # --- labels

    async def classify(self, request: Request) -> Response:
        """Labels and probabilities of files."""
        with self._files() as files:
            if request.headers.get("content-type", "").startswith("multipart/form-data"):
                asked, given = await self._form(request, files)
            else:
                asked, given = await self._json(request, lambda asked: (asked, _files_of(asked, files)))
            self._require_model(asked)
            tasks, datasets = (_names(asked.get(name), name) for name in ("tasks", "datasets"))
            question, transcript = (_words(asked.get(name), name) for name in ("question", "transcript"))
            keys = self.desk.datasets(tasks, datasets, question)
            if not 0 < len(given) * len(keys) <= MOST_ROWS:
                many = f"{plural(len(given), 'file')} and {plural(len(keys), 'task')}"
                what = f"{many}: at least one, and at most {MOST_ROWS} answers"
                raise _Refused(400, what, param="files", code="invalid_value")
            asks = [(file, key, Inquiry(Question(dataset=key, name=name, question=question, transcript=transcript)))
                    for file, name in given for key in keys]  # fmt: skip
            answers = self.desk.ask_together([inquiry for *_, inquiry in asks], files.folder)
        found = await self._answers(request, answers)
        broken = [each for each in found if isinstance(each, Exception)]
        hard = [each for each in broken if not isinstance(each, MediaError)]
        if hard or len(broken) == len(found):
            raise _as_refusal((hard or broken)[0])
        results = []
        for (file, key, _), told in zip(asks, found, strict=True):
            about = {"task": self.desk.taxonomy.dataset(key).task or "", "dataset": key}
            if question is not None and tasks is None and datasets is None:
                about = {"task": "", "dataset": ""}
            assert isinstance(told, Prediction | MediaError)
            results.append(reply_of(told if isinstance(told, Prediction) else told.what, file=file, **about))
        return _as_json({"object": "list", "model": self.desk.model, "results": results})

    # --- what they share

    def _require_model(self, asked: Mapping[str, Any]) -> None:
        named = asked.get("model")
        if named not in (None, "", self.desk.model):
            what = f"no model {str(named)[:100]!r} here; it is {self.desk.model!r}"
            raise _Refused(404, what, param="model", code="model_not_found")

    @contextmanager
    def _files(self) -> Iterator[_Files]:
        """Where the files of one request lie, until the desk has them."""
        files = _Files(self.desk.place())
        try:
            yield files
        except BaseException:
            shutil.rmtree(files.folder, ignore_errors=True)
            raise

    async def _json(self, request: Request, made: Callable[[dict[str, Any]], T]) -> T:
        """What `made` makes of the body, an object. A large one comes to the disk, and one at a time is read."""
        with SpooledTemporaryFile(SMALL_BYTES, dir=str(self.desk.folder)) as file:
            async for chunk in request.stream():
                file.write(chunk)
            small = file.tell() <= SMALL_BYTES
            file.seek(0)

            def read() -> T:
                try:
                    value = msgspec.json.decode(file.read())
                except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                    raise _Refused(400, f"the body is no JSON ({str(error)[:200]})", code="invalid_json") from None
                if not isinstance(value, dict):
                    raise _Refused(400, "the body is no JSON object", code="invalid_json")
                return made(value)

            if small:
                return read()
            async with self._reading:
                return await run_in_threadpool(read)

    async def _form(self, request: Request, files: _Files) -> tuple[dict[str, Any], list[tuple[str, str]]]:
        fields: dict[str, Any] = {}
        given: list[tuple[str, str]] = []
        try:
            async with request.form(max_files=MOST_ROWS, max_fields=MOST_ROWS) as form:
                for field_name, value in form.multi_items():
                    if isinstance(value, UploadFile):
                        said = value.filename or field_name
                        name, path = files.new(_ending(said))
                        with path.open("wb") as target:
                            await run_in_threadpool(shutil.copyfileobj, value.file, target, MEGABYTE)
                        given.append((said, name))
                    else:
                        fields[field_name] = value
        except (MultiPartException, HTTPException) as error:
            said = error.detail if isinstance(error, HTTPException) else error.message
            raise _Refused(400, f"the form cannot be read ({said})", code="invalid_form") from None
        return fields, given

    def _late(self) -> _Refused:
        what = f"no answer within {self.limits.seconds:g} seconds (--timeout)"
        return _Refused(504, what, code="timeout", retry=True)

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
            raise ClientDisconnect if gone.done() else self._late()
        finally:
            gone.cancel()
            waiting.cancel()
            await asyncio.gather(gone, waiting, return_exceptions=True)


class _Listened(StreamingResponse):
    """An answer while it is said. Once it has ended nobody listens any more, and the model does not go on: also where
    the client has left before the first event, and `events` never begin."""

    def __init__(self, inquiry: Inquiry, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._inquiry = inquiry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._inquiry.gone = True


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


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


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _turns(messages: Any, files: _Files) -> Iterator[Turn]:
    """The turns of a talk; what is data in them is put into `files`."""
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
        parts = tuple(_part(each, f"{param}.{i}", files) for i, each in enumerate(content))
        _require(roles[number] == "user" or all(not part.kind for part in parts), param, "must be text alone")
        yield Turn(str(roles[number]).replace("developer", "system"), parts)


def _part(part: Any, param: str, files: _Files) -> Part:
    """Text, or a medium, as OpenAI and vLLM name them."""
    kind = part.get("type") if isinstance(part, dict) else None
    inside = part.get(kind) if isinstance(kind, str) else None
    if kind == "text":
        _require(isinstance(inside, str), param, "must have a text")
        return Part(text=str(inside))
    if kind == "input_audio" and isinstance(inside, dict):
        modality, data = "audio", inside.get("data")
        _require(isinstance(data, str), param, "must have data in base64")
        raw = _decoded(str(data).partition(";base64,")[2] if str(data).startswith("data:") else str(data), param)
    elif kind in ("image_url", "video_url", "audio_url") and isinstance(inside, dict):
        modality = kind.removesuffix("_url")
        raw = _of_data_url(inside.get("url"), param)
    else:
        what = f"{param} must be text, input_audio, image_url or video_url"
        raise _Refused(400, what, param=param, code="invalid_value")
    name, path = files.new(ENDINGS[modality])
    path.write_bytes(raw)
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


def _files_of(asked: Mapping[str, Any], files: _Files) -> list[tuple[str, str]]:
    """The files of a body in JSON, [{"name": "clip.mp4", "data": "data:video/mp4;base64,..."}], by the client's name
    and ours."""
    given = asked.get("files")
    if not isinstance(given, list):
        raise _Refused(400, "files must be a list of objects with name and data", param="files", code="invalid_value")
    found = []
    for number, each in enumerate(given):
        param = f"files.{number}"
        _require(isinstance(each, dict) and isinstance(each.get("name"), str), param, "must have a name and data")
        raw = _of_data_url(each.get("data"), f"{param}.data")
        name, path = files.new(_ending(each["name"]))
        path.write_bytes(raw)
        found.append((each["name"], name))
    return found


def _ending(name: str) -> str:
    """The ending of a client's file, where it is a plain one."""
    ending = Path(name.replace("\\", "/").rpartition("/")[2]).suffix.lower()
    return ending if ending[1:].isascii() and ending[1:].isalnum() and len(ending) < 8 else ""


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

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is refused as everything else is."""
        response = _Refused(400, msg, code="invalid_http").response()
        headers = [*response.raw_headers, (b"connection", b"close")]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=bytes(response.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

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
