"""The client: from a request to a reply, through everything that a network and a loaded server do.

Faults that may pass (429, 408, 425, 5xx, timeouts, dropped connections, bodies that are cut or malformed) are tried
again after an exponential backoff with full jitter, not before the time that a Retry-After gives, which holds for all
requests. A request that the server refuses (other 4xx), or that fails at every attempt, raises `RequestError`. A bad
key, an unknown model, an empty account, or a server that fails one request after the other raises `ServiceError`.

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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import httpx
from pydantic import Field

from hba.config import option
from hba.errors import ConfigError
from hba.remote.addresses import check_base_url, check_variable, proxies_checked
from hba.remote.cache import ResponseCache
from hba.remote.concurrency import AdaptiveLimit
from hba.remote.cost import Meter, find_price
from hba.remote.errors import RequestError, ServiceError, TransientError
from hba.remote.faults import Response, of_response, service_fault
from hba.remote.provider import Provider, provider
from hba.remote.request import ChatRequest, Reply

CONNECT_SECONDS = 10.0
MAX_REPLY_BYTES = 32 << 20
LOOPBACK = ("localhost", "127.0.0.1", "::1")
Accept = Callable[[Reply], object]


@dataclass(frozen=True, kw_only=True)
class ClientConfig:
    """Where requests go, and how patiently."""

    provider: Literal["openai", "anthropic", "google"] = option("openai", "API that the server speaks")
    base_url: str | None = option(None, "of the server, such as http://localhost:8000/v1; null: the official one")
    api_key_env: str | None = option(
        None, "environment variable with the key; null: the usual one officially, none elsewhere", affects_result=False
    )
    max_concurrency: Annotated[int, Field(ge=1)] = option(32, "most requests at once", affects_result=False)
    timeout_seconds: Annotated[float, Field(gt=0)] = option(120.0, "for one attempt", affects_result=False)
    max_attempts: Annotated[int, Field(ge=1)] = option(8, "attempts before a request has failed", affects_result=False)
    first_backoff_seconds: Annotated[float, Field(gt=0)] = option(
        1.0, "longest pause before the second attempt; doubles from there", affects_result=False
    )
    longest_backoff_seconds: Annotated[float, Field(gt=0)] = option(60.0, "where doubling ends", affects_result=False)
    longest_wait_seconds: Annotated[float, Field(gt=0)] = option(
        900.0, "a Retry-After beyond it stops the command", affects_result=False
    )
    stop_after: Annotated[int, Field(ge=1)] = option(
        20, "requests that fail at every attempt, with no reply in between, stop the command", affects_result=False
    )
    cache: Path | None = option(None, "folder of the response cache; null: none", affects_result=False)
    prices: Path | None = option(None, "YAML file with prices of your own", affects_result=False)

    def __post_init__(self) -> None:
        """Raises ConfigError for a base URL that is none, and for a secret where its place is not."""
        check_variable(self.api_key_env)
        check_base_url(self.base_url)


class _Prepared(NamedTuple):
    method: str
    url: str
    body: bytes | None
    read: Callable[[Any], Any] | None  # of the decoded body, fails for one that is no reply; None: any body will do
    key: str = ""


class RemoteClient:
    """One connection pool, limit, cache and meter for all requests to one model; an async context manager.

    Raises ConfigError for a key that is not in the environment.
    """

    def __init__(self, model: str, config: ClientConfig, api: Provider | None = None) -> None:
        """`api` reads more from replies than the one of `config.provider`, whose URL and keys it shares."""
        self.model, self.config = model, config
        self._provider = api or provider(config.provider)
        self._base = (config.base_url or self._provider.base_url).rstrip("/")
        self.official = is_official(config.provider, config.base_url)
        self._url = self._base + self._provider.path(model)
        self._secret = _key(config.api_key_env or (self._provider.key_env if self.official else None))
        self.meter = Meter(find_price(config.provider, model, official=self.official, file=config.prices))
        self.limit = AdaptiveLimit(config.max_concurrency)
        self._failed_in_a_row = 0
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
        Raises RequestError when this request has no reply, ServiceError when no request will have one.
        """
        prepared = self._prepare(request)
        if self._cache is not None and (kept := self._cache.get(prepared.key)) is not None:
            self.meter.cached += 1
            return kept
        try:
            reply: Reply = await self._until_answered(prepared)
        except RequestError as error:
            self.meter.failed += 1
            if not self.meter.replies and self.meter.failed >= self.config.stop_after:
                fix = "Check model, settings and server; then run the same command again."
                what = f"every one of {self.meter.failed} requests failed, the last: {error.what}"
                raise ServiceError(what, where=self._url, fix=fix) from None
            raise
        self.meter.add(reply)
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
        encoded = None if body is None else json.dumps(body).encode()
        return await self._until_answered(_Prepared(method, url, encoded, None))

    def _prepare(self, request: ChatRequest) -> _Prepared:
        body = self._provider.body(self.model, request, official=self.official)
        encoded = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
        identity = f"{self.config.provider}\n{self._url}\n{request.draw}\n".encode()
        key = sha256(identity + encoded).hexdigest()
        return _Prepared("POST", self._url, encoded, self._provider.read, key)

    async def _until_answered(self, prepared: _Prepared) -> Any:
        reason = ""
        for attempt in range(self.config.max_attempts):
            try:
                reply = await self._attempt(prepared)
            except TransientError as fault:
                reason = fault.reason
                self.meter.retries[reason] += 1
                self._honour(fault)
                if attempt + 1 < self.config.max_attempts:
                    await asyncio.sleep(self._backoff(attempt))
            else:
                self._failed_in_a_row = 0
                return reply
        self._failed_in_a_row += 1
        what = f"no reply after {self.config.max_attempts} attempts (the last: {reason})"
        if self._failed_in_a_row >= self.config.stop_after:
            fix = "Check the server; then run the same command again to resume."
            raise ServiceError(f"{self._failed_in_a_row} requests in a row had {what}", where=prepared.url, fix=fix)
        raise RequestError(what, where=prepared.url)

    def _honour(self, fault: TransientError) -> None:
        """Let all requests wait as long as the server asked for."""
        wait = fault.wait_seconds
        if wait is None:
            return
        if wait > self.config.longest_wait_seconds:
            fix = "Run the same command again then; it resumes."
            raise ServiceError(f"the server asks to wait {wait:.0f} s ({fault.reason})", where=self._url, fix=fix)
        self.limit.pause(wait)

    def _backoff(self, attempt: int) -> float:
        """Full jitter: anything up to first * 2^attempt seconds, so that clients do not come back together."""
        longest = min(self.config.longest_backoff_seconds, self.config.first_backoff_seconds * 2**attempt)
        return random.uniform(0, longest)

    async def _attempt(self, prepared: _Prepared) -> Any:
        """One exchange. Raises TransientError, RequestError or ServiceError."""
        async with self.limit.slot():
            self.meter.requests += 1
            started = time.perf_counter()
            overloaded = True
            try:
                # httpx bounds the time between two bytes, this the whole of an attempt: slow bytes end, too.
                response = await asyncio.wait_for(self._exchange(prepared), self.config.timeout_seconds)
                overloaded = response.status == 429 or response.status >= 500
            except (asyncio.TimeoutError, httpx.TimeoutException):  # two classes before Python 3.11
                raise TransientError("timeout") from None
            except httpx.TransportError as error:
                raise TransientError(f"connection: {type(error).__name__}") from None
            except httpx.HTTPError as error:
                raise TransientError(f"body: {type(error).__name__}") from None
            finally:
                self.limit.report(overloaded=overloaded)
        if response.status != 200:
            raise of_response(response, self.redacted, prepared.url, answered=self.meter.replies > 0)
        reply = self._read(response.raw, prepared)
        return replace(reply, seconds=time.perf_counter() - started) if isinstance(reply, Reply) else reply

    async def _exchange(self, prepared: _Prepared) -> Response:
        if self._http is None:
            raise RuntimeError("use the client in `async with`")
        headers = {"content-type": "application/json"}
        if self._secret is not None:
            headers |= self._provider.headers(self._secret)
        async with self._http.stream(prepared.method, prepared.url, content=prepared.body, headers=headers) as response:
            parts, size = [], 0
            async for part in response.aiter_bytes():
                size += len(part)
                if size > MAX_REPLY_BYTES:
                    raise RequestError(f"a reply of more than {MAX_REPLY_BYTES >> 20} MiB", where=prepared.url)
                parts.append(part)
            return Response(response.status_code, response.headers, b"".join(parts))

    def _read(self, raw: bytes, prepared: _Prepared) -> Any:
        """Raises TransientError for a body that is no reply: cut, malformed, or of another kind."""
        try:
            data = json.loads(raw)
        except ValueError:
            if prepared.read is None:
                return None
            raise TransientError("body: not JSON") from None
        if isinstance(data, dict) and isinstance(data.get("error"), dict):  # an error that came as 200
            raise service_fault(data["error"], self.redacted, prepared.url) or TransientError("body: an error")
        try:
            return data if prepared.read is None else prepared.read(data)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise TransientError("body: no reply") from None

    def redacted(self, text: str) -> str:
        """`text` without the key, or anything that looks like one, for messages."""
        if self._secret:
            text = text.replace(self._secret, "[key]")
        return re.sub(r"\b(?:sk|pk|key)-[\w*.-]{6,}", "[key]", text)


def is_official(name: str, base_url: str | None) -> bool:
    """Whether requests go to the provider's own service, whose prices are known."""
    return (base_url or provider(name).base_url).rstrip("/") == provider(name).base_url


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    value = os.environ.get(variable, "").strip()
    if not value:
        raise ConfigError("no API key in the environment", where=variable, fix=f"export {variable}=...")
    if not value.isascii() or not value.isprintable():
        raise ConfigError("the API key has characters that no header can carry", where=variable, fix="Set it again.")
    return value


def describe(config: ClientConfig, model: str) -> dict[str, Any]:
    """What a run folder records of a remote model: nothing secret, nothing that changes no reply."""
    return {"model": model, "provider": config.provider, "base_url": config.base_url}
