"""The client: from a request to a reply, through everything that a network and a loaded server do.

Before the first request the connection is checked, so that a wrong port or protocol is said within seconds. Faults that
may pass (429, 408, 425, 5xx, timeouts, dropped connections, bodies that are cut or malformed) are tried again after an
exponential backoff with full jitter, not before the time that a Retry-After gives, which holds for all requests. A
parameter that the service does not take is left out, once for all requests. A request that the server refuses (other
4xx), or that fails at every attempt, raises `RequestError`. A bad key, an unknown model, an empty account, or a server
that fails one request after the other raises `ServiceError`.

Keys come from the environment alone, go into a header, and are cut out of every message of the server. Redirects are
not followed, so that a key reaches no other host.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, replace
from hashlib import sha256
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import httpx
from anyio import CapacityLimiter

from hba.errors import ConfigError
from hba.remote import faults
from hba.remote.cost import Meter, find_price
from hba.remote.faults import RESUME, Caller, Response
from hba.remote.providers import ErrorInReplyError, Provider, provider, word
from hba.remote.request import (
    LOOPBACK,
    ChatRequest,
    ClientConfig,
    Reply,
    RequestError,
    ServiceError,
    TransientError,
    UnansweredError,
    proxies_checked,
)
from hba.storage import AppendLog, Lock, named_os_errors, whole

# How many requests are under way: a limit that follows what the server bears, and a stream of bounded work.
#
# The limit grows by one for each full round of replies (doubling until the first overload) and shrinks, once a round,
# by half of the share of overloaded replies in it: L <- L (1 - share / 2) + 1, at least 1. That is the additive
# increase and multiplicative decrease of DCTCP (Alizadeh et al. 2010); a plain halving at every fault would leave a
# server that fails one request in ten with a limit of five.


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
        self._slots = CapacityLimiter(int(self.limit))
        self._doubling = True
        self._replies = self._overloads = 0
        self._resume_at = 0.0

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Hold one slot; waits while all are taken or the server has asked for a pause."""
        now = asyncio.get_running_loop().time
        while True:
            while (pause := self._resume_at - now()) > 0:
                await asyncio.sleep(pause * (1 + random.uniform(0, PAUSE_SPREAD)))
            async with self._slots:
                if self._resume_at <= now():  # a pause may have begun while this one waited for its turn
                    yield
                    return

    def report(self, *, overloaded: bool) -> None:
        """Count one reply; `overloaded` says that the server refused or could not keep up."""
        self._replies += 1
        self._overloads += overloaded
        if self._replies >= self.limit:
            share = self._overloads / self._replies
            self._doubling = self._doubling and not self._overloads
            grown = 2 * self.limit if self._doubling else self.limit * (1 - share / 2) + 1
            self.limit = min(float(self.maximum), max(1.0, grown - (share == 1.0)))
            self._slots.total_tokens = int(self.limit)
            self._replies = self._overloads = 0

    def pause(self, seconds: float) -> None:
        """Start nothing for that long: the server's Retry-After is for all requests, not for one."""
        self._resume_at = max(self._resume_at, asyncio.get_running_loop().time() + seconds)


async def bounded(items: Iterable[T], work: Callable[[T], Awaitable[R]], width: int) -> AsyncIterator[R]:
    """Results of `work` over `items` in the order in which they are ready, at most `width` at once.

    Items of an iterator are drawn one by one in a thread, so that preparing them (decoding media) holds up no request;
    those of a sequence are there already. Never more than `width` ahead. The first exception of `items` or `work`
    cancels the rest and is raised.
    """
    ready, source = isinstance(items, Sequence), iter(items)
    draw: asyncio.Task[Any] | None = None
    running: set[asyncio.Task[R]] = set()
    more = not ready
    try:
        while True:
            free = width - len(running)
            if ready:
                running |= {asyncio.ensure_future(work(item)) for item in islice(source, free)}
            elif more and draw is None and free > 0:
                draw = asyncio.ensure_future(asyncio.to_thread(next, source, _END))
            if not running and draw is None:
                return
            await asyncio.wait([*running, *([draw] if draw else [])], return_when=asyncio.FIRST_COMPLETED)
            done = [task for task in running if task.done()]
            for task in sorted(done, key=lambda task: task.exception() is not None):  # what came, before an error
                running.remove(task)
                yield task.result()
            if draw is not None and draw.done():
                item, draw = draw.result(), None
                more = item is not _END
                running |= {asyncio.ensure_future(work(item))} if more else set()
    finally:
        left: list[asyncio.Task[Any]] = [*running, *([draw] if draw else [])]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)


# Replies by the content hash of their requests: what was asked and answered once is not asked again.
#
# A folder of append-only segments. Each process appends to a segment of its own (the first that no other process has
# locked) and reads all, so that several commands share a cache. A line that a kill tore is cut off by the next owner of
# its segment and ignored by everyone else. The key hashes provider, URL, body and draw; keys of services are in
# neither, nor is any part of a request stored.


KEPT = ("text", "finish", "tokens_in", "tokens_out", "model")


class _Place(NamedTuple):
    segment: Path
    offset: int
    length: int


class ResponseCache:
    """The cache in `folder`; its memory is an index of keys, replies stay on disk. Used as a context manager."""

    def __init__(self, folder: Path) -> None:
        with named_os_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._lock, segment = _own_segment(folder)
        self._log = AppendLog(segment)
        self._end = segment.stat().st_size
        self._places: dict[str, _Place] = {}
        for path in sorted(folder.glob("segment-*.jsonl")):
            self._places |= _index(path)

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: str) -> Reply | None:
        """The reply to the request of that hash, or None."""
        place = self._places.get(key)
        if place is None:
            return None
        with place.segment.open("rb") as handle:
            handle.seek(place.offset)
            record = _record(handle.read(place.length))
        if record is None or record["key"] != key:  # the segment was replaced under us
            return None
        left_out = tuple(record.get("left_out", ()))
        return Reply(cached=True, left_out=left_out, **{name: record[name] for name in KEPT})

    def put(self, key: str, reply: Reply) -> None:
        """Keep a reply. Raises StorageError on a full disk."""
        kept = asdict(reply)
        left_out = {"left_out": list(reply.left_out)} if reply.left_out else {}
        self._log.append({"key": key} | {name: kept[name] for name in KEPT} | left_out)
        end = self._log.path.stat().st_size
        self._places[key] = _Place(self._log.path, self._end, end - self._end)
        self._end = end

    def close(self) -> None:
        """Flush to the disk and give the segment free."""
        self._log.close()
        self._lock.close()

    def __enter__(self) -> ResponseCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _own_segment(folder: Path) -> tuple[Lock, Path]:
    """The first segment that no process has locked, with its lock."""
    for number in count():
        segment = folder / f"segment-{number}.jsonl"
        with named_os_errors(segment):
            segment.touch(0o600)
        with suppress(BlockingIOError):
            return Lock(segment, patience_seconds=0.0), segment
    raise AssertionError("there is always another number")


def _record(raw: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(record, dict) and isinstance(record.get("key"), str) and set(KEPT) <= record.keys()
    return record if whole else None


def _index(segment: Path) -> dict[str, _Place]:
    places, offset = {}, 0
    with segment.open("rb") as handle:
        for raw in handle:
            if (record := _record(raw)) is not None:
                places[str(record["key"])] = _Place(segment, offset, len(raw))
            offset += len(raw)
    return places


# --- the client -------------------------------------------------------------------------------------------------------


CONNECT_SECONDS = 10.0
CHECK_SECONDS = 5.0  # for the connection that is tried before a run
MAX_REPLY_BYTES = 32 << 20
SILENT_AFTER = 8  # attempts that run out of time, and none that is answered, after which a server is silent
WITNESSES = 3  # attempts during which others were answered, after which a failure is the request's own
Accept = Callable[[Reply], object]


class _Prepared(NamedTuple):
    method: str
    url: str
    body: Mapping[str, Any] | None
    read: Callable[[Any], Any] | None  # of the decoded body, fails for one that is no reply; None: any body will do
    encoded: bytes = b""
    key: str = ""
    needed: tuple[str, ...] = ()  # what must not be left out of the body
    kind: str = "application/json"


class RemoteClient:
    """One connection pool, limit, cache and meter for all requests to one model; an async context manager.

    Raises ConfigError for a key that is not in the environment.
    """

    def __init__(self, model: str, config: ClientConfig, api: Provider | None = None) -> None:
        """`api` reads more from replies than the one of `config.provider`, whose URL and keys it shares."""
        self.model, self.config = model, config
        self._provider = api or provider(config.provider)
        self._base = (config.base_url or self._provider.base_url).rstrip("/")
        self._url, self._listing = self._provider.urls(self._base, model)
        self._key_variable = config.api_key_env or self._provider.key_env(self._base)
        self._secret = _key(self._key_variable)
        self.meter = Meter(find_price(config.provider, model, self._base, config.prices), asked=model)
        self.limit = AdaptiveLimit(config.max_concurrency)
        self.failed_in_a_row = 0
        self._silent = 0  # attempts without an answer in time, while there was none at all
        self._checked = False
        self._checking = asyncio.Lock()
        self._offered: tuple[str, ...] = ()
        self._cache: ResponseCache | None = None
        self._http: httpx.AsyncClient | None = None

    async def __aenter__(self) -> RemoteClient:
        self._cache = None if self.config.cache is None else ResponseCache(self.config.cache)
        most = self.config.max_concurrency
        with proxies_checked():
            self._http = httpx.AsyncClient(
                timeout=httpx.Timeout(self.config.timeout_seconds, connect=CONNECT_SECONDS, pool=None),
                limits=httpx.Limits(max_connections=most, max_keepalive_connections=most),
                trust_env=httpx.URL(self._url).host not in LOOPBACK,  # a proxy does not reach this machine's loopback
            )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._http is not None:
            await self._http.aclose()
        if self._cache is not None:
            self._cache.close()

    async def complete(self, request: ChatRequest, accept: Accept | None = None) -> Reply:
        """The reply to `request`, from the cache or the server.

        `accept` may raise UnusableReplyError for a reply that its reader cannot use; such a reply costs, but is not
        cached.
        Raises RequestError when this request has no reply (UnansweredError when nobody else had one either),
        ServiceError when no request will have one.
        """
        prepared = self._prepare(request)
        if self._cache is not None and (kept := self._cache.get(prepared.key)) is not None:
            self.meter.saw(kept)
            return kept
        try:
            reply: Reply = await self._until_answered(prepared)
        except RequestError:
            self.meter.failed += 1
            raise
        self.meter.saw(reply)
        if accept is not None:
            accept(reply)
        if self._cache is not None:
            self._cache.put(prepared.key, reply)
        return reply

    async def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON that a server gives beyond the chat API, None for a body of another kind; as patient as `complete`.

        `path` stands below the server's root, the base URL without a last `/v1`. Raises as `complete` does.
        """
        url = self._base.removesuffix("/v1") + path
        return await self._until_answered(_Prepared(method, url, body, None, b"" if body is None else _encoded(body)))

    async def hear(self, sound: bytes, *, name: str) -> str:
        """What is said in a sound, the bytes of a file called `name`: /audio/transcriptions of OpenAI's API, which vLLM
        and speech servers have, too. Raises as `complete` does."""
        url = self._url.replace("/chat/completions", "/audio/transcriptions")
        said = {"model": self.model, "response_format": "json"}
        form = httpx.Request("POST", url, data=said, files={"file": (name, sound)})
        kind = form.headers["content-type"]
        heard: str = await self._until_answered(_Prepared("POST", url, {}, _words, form.read(), kind=kind))
        return heard

    def _prepare(self, request: ChatRequest) -> _Prepared:
        official = self._base == self._provider.base_url
        body = self._provider.body(self.model, request, official=official)
        encoded = _encoded(body)
        identity = f"{self.config.provider}\n{self._url}\n{request.draw}\n".encode()
        key = sha256(identity + encoded).hexdigest()
        needed = ("response_format", "tool_choice") if request.schema and request.schema.needed else ()
        return _Prepared("POST", self._url, body, self._provider.read, encoded, key, needed)

    async def check(self) -> None:
        """Try the connection, once, by asking for the list of models, which need not be offered.

        Raises ServiceError for what says for good that no request can be answered: nobody listens, the host is not
        known, the other protocol is spoken, the key is wrong. Whatever else happens is left to the requests.
        """
        async with self._checking:
            if self._checked:
                return
            try:
                listing = self._exchange("GET", self._listing, b"", CHECK_SECONDS)
                response = await asyncio.wait_for(listing, 2 * CHECK_SECONDS)
            except (TimeoutError, httpx.TransportError) as error:
                fault = await faults.unreachable(self._listing, error)
                if fault is not None:
                    raise fault from None
            except (httpx.HTTPError, RequestError):
                pass
            else:
                if re.search(rb"HTTP request (?:was sent )?to (?:an )?HTTPS", response.raw):
                    raise ServiceError("the server speaks https, not http", where=self._base, fix="Write https://...")
                if response.status == 401:
                    raise faults.of_response(response, self._caller(self._listing))
                self._offered = _names(response)
            self._checked = True

    async def _until_answered(self, prepared: _Prepared) -> Any:
        if not self._checked:
            await self.check()
        faults_seen: list[TransientError] = []
        witnessed = 0
        while len(faults_seen) < self.config.max_attempts:
            answered = self.meter.replies
            try:
                reply = await self._attempt(prepared)
            except TransientError as fault:
                faults_seen.append(fault)
                self._require_a_sign(fault)
                witnessed += self.meter.replies > answered
                await self._wait(fault, len(faults_seen))
            except RequestError as error:
                self._count_failure(error.what, prepared.url)
                raise
            else:
                self.failed_in_a_row = 0
                return reply
        what = f"no reply after {self.config.max_attempts} attempts (the last: {faults_seen[-1]})"
        self._count_failure(what, prepared.url)
        raise (RequestError if witnessed >= WITNESSES else UnansweredError)(what, where=prepared.url)

    async def _wait(self, fault: TransientError, attempts: int) -> None:
        """After the failed attempt of that number: what the server asked for, for all requests, and a backoff."""
        most = self.config.max_attempts
        self.meter.retries[fault.kind] += 1
        if fault.wait_seconds is not None:
            if fault.wait_seconds > self.config.longest_wait_seconds:
                what = f"the server asks to wait {fault.wait_seconds:.0f} s ({fault})"
                raise ServiceError(what, where=self._url, fix=f"Wait that long, {RESUME}")
            self.limit.pause(fault.wait_seconds)
        if attempts < most:
            self.meter.trouble = f"attempt {attempts + 1} of {most} ({fault})"
            # Full jitter: anything up to first * 2^n seconds, so that clients do not come back together.
            longest = self.config.first_backoff_seconds * 2 ** (attempts - 1)
            await asyncio.sleep(random.uniform(0, min(self.config.longest_backoff_seconds, longest)))

    def _require_a_sign(self, fault: TransientError) -> None:
        """Raises ServiceError for a server that takes requests and answers none: each would be waited for as often."""
        self._silent = 0 if self.meter.replies or fault.kind != "timeout" else self._silent + 1
        if self._silent >= SILENT_AFTER:
            seconds = f"{self.config.timeout_seconds:g} s"
            what = f"none of {SILENT_AFTER} requests was answered within {seconds}"
            fix = f"Check the server, or wait longer (remote.timeout_seconds=600), {RESUME}"
            raise ServiceError(what, where=self._url, fix=fix)

    def _count_failure(self, what: str, url: str) -> None:
        """Raises ServiceError where one request after the other fails: what repeats is not the requests' fault."""
        self.failed_in_a_row += 1
        if self.failed_in_a_row < self.config.stop_after:
            return
        many = self.config.stop_after  # others that were under way may have failed since: not in order to be counted
        if what.startswith("no reply"):
            said = f"{many} requests in a row had {what}"
        elif self.meter.replies:
            said = f"{many} requests in a row were refused, the last: {what}"
        else:
            said = f"every one of {many} requests failed, the last: {what}"
        fix = f"Check server, model and settings, {RESUME} If only these rows fail, raise remote.stop_after."
        raise ServiceError(said, where=url, fix=fix)

    async def _attempt(self, prepared: _Prepared) -> Any:
        """One exchange, and another at once without a parameter that the service refuses.

        Raises TransientError, RequestError or ServiceError.
        """
        while True:
            started = time.perf_counter()
            response, sent, gone = await self._answer(prepared)
            if response.status == 200:
                reply = self._read(response, prepared)
                if isinstance(reply, Reply):
                    reply = replace(reply, seconds=time.perf_counter() - started, left_out=gone)
                return reply
            parameter = None if prepared.read is None else faults.refused_parameter(response, sent, self.redacted)
            renamed = [one.instead for one in self.meter.refused.values()]
            if parameter is None or parameter.name in (*prepared.needed, *renamed):
                raise faults.of_response(response, self._caller(prepared.url))
            self.meter.refused.setdefault(parameter.name, parameter)

    async def _answer(self, prepared: _Prepared) -> tuple[Response, Mapping[str, Any], tuple[str, ...]]:
        """One exchange in a slot of the limit: the response, the body as it was sent, and what of it was not, since the
        service refuses that by then. Raises TransientError."""
        async with self.limit.slot():
            sent, encoded = prepared.body or {}, prepared.encoded
            gone: tuple[str, ...] = ()
            if self.meter.refused and prepared.read is not None:
                asked = faults.fields(sent)
                gone = tuple(one.shown for name, one in self.meter.refused.items() if name in asked)
                sent = faults.without(sent, self.meter.refused)
                encoded = _encoded(sent)
            self.meter.requests += 1
            overloaded = True
            try:
                # httpx bounds the time between two bytes, this the whole of an attempt: slow bytes end, too.
                exchange = self._exchange(prepared.method, prepared.url, encoded, kind=prepared.kind)
                response = await asyncio.wait_for(exchange, self.config.timeout_seconds)
                overloaded = response.status == 429 or response.status >= 500
            except (TimeoutError, httpx.TimeoutException):
                raise TransientError("timeout") from None
            except httpx.TransportError as error:
                raise TransientError("connection", faults.connection_words(error)) from None
            except httpx.HTTPError as error:
                raise TransientError("body", type(error).__name__) from None
            finally:
                self.limit.report(overloaded=overloaded)
            return response, sent, gone

    async def _exchange(
        self, method: str, url: str, content: bytes, seconds: float | None = None, kind: str = "application/json"
    ) -> Response:
        if self._http is None:
            raise RuntimeError("use the client in `async with`")
        patience = self._http.timeout if seconds is None else httpx.Timeout(seconds)
        headers = {"content-type": kind}
        if self._secret is not None:
            headers |= self._provider.headers(self._secret, self._base)
        stream = self._http.stream(method, url, content=content or None, headers=headers, timeout=patience)
        async with stream as response:
            parts, size = [], 0
            async for part in response.aiter_bytes():
                size += len(part)
                if size > MAX_REPLY_BYTES:
                    raise RequestError(f"a reply of more than {MAX_REPLY_BYTES >> 20} MiB", where=url)
                parts.append(part)
            return Response(response.status_code, response.headers, b"".join(parts))

    def _read(self, response: Response, prepared: _Prepared) -> Any:
        """Raises TransientError for a body that is no reply (cut, malformed, of another kind), or what its error is."""
        try:
            data = json.loads(response.raw)
        except (ValueError, RecursionError):
            if prepared.read is None:
                return None
            raise TransientError("body", "not JSON") from None
        try:
            if isinstance(data, dict) and data.get("error"):  # an error that came as 200
                raise ErrorInReplyError(faults.error_object(response.raw))
            reply = data if prepared.read is None else prepared.read(data)
        except ErrorInReplyError as found:
            raise faults.of_error(200, found.error, self._caller(prepared.url), response.headers) from None
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise TransientError("body", "no reply") from None
        return _sound(reply) if isinstance(reply, Reply) else reply

    def _caller(self, url: str) -> Caller:
        variable = self._key_variable if self._secret is not None else None
        return Caller(url, self.redacted, variable, self.meter.replies > 0, self._offered)

    def redacted(self, text: str) -> str:
        """`text` without the key, or anything that looks like one, for messages."""
        if self._secret:
            text = text.replace(self._secret, "[key]")
        return re.sub(r"\b(?:sk|pk|key)-[\w*.-]{6,}", "[key]", text)


def _words(data: Any) -> str:
    """Of a transcription."""
    if not isinstance(data["text"], str):
        raise TypeError
    return whole(data["text"])


def _encoded(body: Mapping[str, Any]) -> bytes:
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    try:
        return text.encode()
    except UnicodeEncodeError:
        return whole(text).encode()


def _sound(reply: Reply) -> Reply:
    """`reply` with texts that every file can hold."""
    texts = {"text": reply.text, "finish": reply.finish, "model": reply.model}
    mended = {name: whole(text) for name, text in texts.items() if text is not None and whole(text) != text}
    return replace(reply, **mended) if mended else reply  # type: ignore[arg-type]


def _names(response: Response) -> tuple[str, ...]:
    """The models of a listing; none where the response is something else."""
    try:
        data = json.loads(response.raw) if response.status == 200 else {}
    except (ValueError, RecursionError):
        return ()
    listed = data.get("data") or data.get("models") if isinstance(data, dict) else None
    found = [each.get("id") or each.get("name") for each in listed or () if isinstance(each, dict)]
    return tuple(name for name in map(word, found) if name)


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    value = os.environ.get(variable, "").strip()
    if not value:
        raise ConfigError("no API key in the environment", where=variable, fix=f"export {variable}=...")
    if not value.isascii() or not value.isprintable():
        raise ConfigError("the API key has characters that no header can carry", where=variable, fix="Set it again.")
    return value


async def settled(client: RemoteClient, results: AsyncIterator[R], refused: Callable[[R], bool]) -> AsyncIterator[R]:
    """`results` of requests, those that are `refused` once the server has answered another request.

    Refusals of a run that the server stops (a parameter, an empty account) are nobody's own, and never come.
    """
    held: list[R] = []
    async for result in results:
        if refused(result):
            held.append(result)
        else:
            yield result
        if not client.failed_in_a_row:
            for one in held:
                yield one
            held.clear()
    for one in held:
        yield one
