"""`hba serve`: a checkpoint of ours, or a chat model, behind HTTP.

`/v1/chat/completions` speaks as OpenAI's does, for its client and all that is built on it; `/v1/classify` gives the
labels and probabilities of heads for files. Both put questions on a `hba.evaluate.desk.Desk`, which answers by the code
of `hba ask`. Files come as data, never as addresses: nothing is fetched.

What a client may cost is bounded before it is read: a token, the number of requests under way, the bytes of one body
and of all, the seconds of an upload and of an answer. A body goes to the disk as it comes; one body at a time is held
in memory, while it is parsed.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
import secrets
import shutil
import signal
import socket
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import msgspec
import uvicorn
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from hba.errors import HbaError, InputError, MediaError
from hba.evaluate.ask import Reply
from hba.evaluate.desk import Desk, FullError, Part, Question, Saying, Turn
from hba.evaluate.predictions import Prediction
from hba.explorer.server import foreign, is_loopback, is_same

_log = logging.getLogger(__name__)
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
    "n": (1,), "top_p": (1, 1.0), "logprobs": (False,), "stop": (None, []), "tools": (None, []), "user": (),
    "presence_penalty": (0, 0.0), "frequency_penalty": (0, 0.0), "response_format": ({"type": "text"},),
    "stream_options": (), "metadata": (), "store": (False,), "modalities": (["text"],),
}  # fmt: skip
TAKEN = ("model", "messages", "max_tokens", "max_completion_tokens", "temperature", "seed", "stream")


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
        self._app, self._limits, self._token, self._only_loopback = app, limits, token, only_loopback
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
        deadline = started + self._limits.seconds

        async def counted() -> Message:
            nonlocal came
            if came < 0:  # all of it is there: what comes now is the end of the connection
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                what = f"the body did not come within {self._limits.seconds:g} seconds"
                raise _Refused(408, what, code="timeout") from None
            if message["type"] == "http.request":
                size = len(message.get("body", b""))
                came += size
                self.bytes_held += size
                self.received += size
                self._require_small(came)
                if not message.get("more_body"):
                    ended.append(came)
                    came = -1
            return message

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
            self.bytes_held -= ended[0] if ended else max(came, 0)
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
        if self.under_way > self._limits.waiting:
            what = f"{self._limits.waiting} requests are under way already"
            raise _Refused(429, what, code="rate_limit_exceeded", retry=True)
        declared = request.headers.get("content-length", "0")
        self._require_small(int(declared) if declared.isdigit() and len(declared) < 20 else 0)
        if self.bytes_held > BODIES_AT_ONCE * self._limits.body_bytes:
            raise _Refused(503, "too many bytes are under way already", code="overloaded", retry=True)

    def _require_small(self, size: int) -> None:
        if size > self._limits.body_bytes:
            most = self._limits.body_bytes / MEGABYTE
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
        with self._folder() as folder:
            talk = await self._json(request, lambda asked: self._talk_of(asked, folder))
            question, files, saying, streamed = talk
            answer = self._put(question, files, saying)
        prediction = (await self._answers(request, [answer]))[0]
        if isinstance(prediction, Exception):
            raise _as_refusal(prediction)
        about = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": self.desk.model}
        usage = {"prompt_tokens": prediction.tokens_in or 0, "completion_tokens": prediction.tokens_out or 0}
        usage["total_tokens"] = sum(usage.values())
        said = {"role": "assistant", "content": prediction.output or ""}
        if streamed is not None:
            return _streamed(about, said, prediction.finish or "stop", usage if streamed else None)
        choice = {"index": 0, "message": said | {"refusal": None}, "finish_reason": prediction.finish or "stop"}
        choice["logprobs"] = None
        return JSONResponse({**about, "object": "chat.completion", "choices": [choice], "usage": usage})

    def _talk_of(self, asked: Mapping[str, Any], folder: Path) -> tuple[Question, dict[str, Path], Saying, bool | None]:
        """What a body asks. The last value says whether it is streamed, and then whether with the usage."""
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
        longest = asked.get("max_completion_tokens", asked.get("max_tokens")) or generation.max_tokens
        most = generation.max_tokens
        said = f"must be from 1 to {most} (--set generation.max_tokens=... of the server)"
        _require(isinstance(longest, int) and 1 <= longest <= most, "max_tokens", said)
        temperature = asked.get("temperature")
        temperature = (generation.temperature or 0.0) if temperature is None else temperature
        _require(isinstance(temperature, int | float) and 0 <= temperature <= 2, "temperature", "must be from 0 to 2")
        seed = asked.get("seed")
        seed = secrets.randbits(48) if seed is None else seed
        _require(isinstance(seed, int) and -MOST_SEED <= seed <= MOST_SEED, "seed", "must be a whole number")
        streamed = asked.get("stream") or False
        _require(isinstance(streamed, bool), "stream", "must be true or false")
        options = asked.get("stream_options") or {}
        files: dict[str, Path] = {}
        question = Question(turns=tuple(_turns(asked.get("messages"), folder, files)))
        told = bool(isinstance(options, dict) and options.get("include_usage"))
        return question, files, Saying(longest, float(temperature), seed), told if streamed else None

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
            if not files or len(files) * len(keys) > MOST_ROWS:
                what = f"{len(files)} files and {len(keys)} tasks: at least one, and at most {MOST_ROWS} answers"
                raise _Refused(400, what, param="files", code="invalid_value")
            asks = [(name, path, key) for name, path in files for key in keys]
            answers = []
            try:
                for _, path, key in asks:
                    about = Question(dataset=key, name=path.name, question=question, transcript=transcript)
                    answers.append(self._put(about, {path.name: path}))
            except _Refused:
                for answer in answers:
                    answer.cancel()
                raise
        found = await self._answers(request, answers)
        broken = [each for each in found if isinstance(each, Exception)]
        hard = next((each for each in broken if not isinstance(each, MediaError)), None)
        if hard is not None or len(broken) == len(found):
            raise _as_refusal(hard or broken[0])
        replies = [self._reply(name, key, told) for (name, _, key), told in zip(asks, found, strict=True)]
        results = [asdict(reply) for reply in replies]
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

    def _put(self, question: Question, files: Mapping[str, Path], saying: Saying | None = None) -> Future[Prediction]:
        try:
            return self.desk.ask(question, files, saying)
        except HbaError as error:
            raise _as_refusal(error) from None

    async def _answers(self, request: Request, answers: Sequence[Future[Prediction]]) -> list[Prediction | Exception]:
        """What comes of all. Raises _Refused after the limit of time, ClientDisconnect when nobody waits any more."""
        waiting = asyncio.gather(*map(asyncio.wrap_future, answers), return_exceptions=True)
        gone = asyncio.ensure_future(_until_gone(request))
        try:
            both: set[asyncio.Future[Any]] = {waiting, gone}
            await asyncio.wait(both, timeout=self.limits.seconds, return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                return [each if isinstance(each, Exception | Prediction) else MediaError("was given up")
                        for each in waiting.result()]  # fmt: skip
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


def _streamed(about: Mapping[str, Any], said: Mapping[str, Any], finish: str, usage: Any) -> Response:
    """The answer as a stream of one piece: for clients that know no other way."""
    chunk = {**about, "object": "chat.completion.chunk"}
    parts: list[dict[str, Any]] = [
        chunk | {"choices": [{"index": 0, "delta": said, "finish_reason": None}]},
        chunk | {"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]},
    ]
    if usage is not None:
        parts.append(chunk | {"choices": [], "usage": usage})

    async def events() -> AsyncIterator[str]:
        for part in parts:
            yield f"data: {json.dumps(part)}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


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
    return [name.strip() for name in names if name.strip()]


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
