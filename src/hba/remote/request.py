"""A chat request, where it goes, its reply and what can go wrong, in a form that belongs to no provider.

Message content is a text or a list of parts, in the form of OpenAI's chat API, from which the providers translate:
`{"type": "text", "text"}`, `{"type": "image_url", "image_url": {"url"}}` (a data URL for local images),
`{"type": "input_audio", "input_audio": {"data": base64, "format"}}`, `{"type": "video_url", "video_url": {"url"}}`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import httpx
from pydantic import Field

from hba.config import flat, option
from hba.errors import ConfigError, HbaError, InputError

Part = dict[str, Any]


class Message(TypedDict):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str | list[Part]


@dataclass(frozen=True, kw_only=True)
class Schema:
    """The JSON schema that a reply must follow. `name` has letters, digits, _ and - only.

    A schema that is `needed` is never left out for a service that does not take it.
    """

    name: str
    schema: Mapping[str, Any]
    needed: bool = False


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """One question to a model.

    `temperature` and `top_p` are left to the server when None. `draw` tells repeated draws of one sampled request
    apart in the cache. `extra` goes into the body as it is (reasoning_effort, seed, ...).
    """

    messages: Sequence[Message]
    max_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    schema: Schema | None = None
    draw: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the model said. Structured replies are JSON text; nothing says yet that they follow the schema.

    `finish` is the provider's word (stop, length, end_turn, refusal, ...). Token counts are None if the server does
    not say them; `model` is the version that it says has answered; `left_out` names the parameters of the request that
    the server refused and was not sent; `seconds` is the time of the attempt that succeeded, 0 from the cache.
    """

    text: str
    finish: str | None
    tokens_in: int | None
    tokens_out: int | None
    model: str | None
    left_out: tuple[str, ...] = ()
    seconds: float = 0.0
    cached: bool = False


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One answer of several to the same prompt, token by token; None for what the server does not say."""

    token_ids: tuple[int, ...] | None
    logps: tuple[float, ...] | None  # of these tokens, natural logarithm
    finish: str | None


@dataclass(frozen=True, kw_only=True)
class TokenReply(Reply):
    """A reply whose tokens are known; its text is that of the first choice."""

    prompt_token_ids: tuple[int, ...] | None
    prompt_logps: tuple[float | None, ...] | None = None  # of these tokens; the first has none
    choices: tuple[Choice, ...]


class RequestError(HbaError):
    """One request has no reply and will have none: refused, or failed at every attempt. The others go on."""


class UnansweredError(RequestError):
    """No attempt of a request was answered while nobody else was answered either: the service's fault, not its own."""


class UnusableReplyError(HbaError):
    """A reply came whole, but its reader cannot use it. It is not cached, so that another attempt can be made."""


class ServiceError(HbaError):
    """No request can be answered (key, model name, balance, server down): the command stops and can be resumed."""


class TransientError(Exception):
    """An attempt failed in a way that may pass; never leaves the client.

    `kind` is what is counted (HTTP 429, timeout), `words` what the server said, `wait_seconds` what it asked for.
    """

    def __init__(self, kind: str, words: str = "", wait_seconds: float | None = None) -> None:
        super().__init__(f"{kind}: {words}" if words else kind)
        self.kind, self.words, self.wait_seconds = kind, words, wait_seconds


# Where requests go and which variable holds the key, checked before any of it can be written down.
#
# Refuses whatever carries a secret itself: a base URL with a user or a query, a key in place of the name of its
# variable. A message about such a value never repeats it. The one query that is taken is Azure's `api-version`.


ADDRESS_VARIABLES = "HTTPS_PROXY, HTTP_PROXY, ALL_PROXY or HF_ENDPOINT"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
# Of its services; anybody can have a machine below azure.com.
AZURE_HOSTS = tuple(
    f".{service}.azure.{end}"
    for service in ("openai", "cognitiveservices", "services.ai")
    for end in ("com", "us", "cn")
)
AZURE_QUERY = "api-version"


@dataclass(frozen=True, kw_only=True)
class ClientConfig:
    """Where requests go, and how patiently."""

    provider: Literal["openai", "anthropic", "google"] = option("openai", "API that the server speaks")
    base_url: str | None = option(
        None, "address of the server, such as http://localhost:8000/v1. null: the official one", affects_result=False
    )
    api_key_env: str | None = option(
        None,
        "environment variable that holds the key. null: the usual one for an official address, none for others",
        affects_result=False,
    )
    max_concurrency: Annotated[int, Field(ge=1)] = option(32, "most requests at once", affects_result=False)
    timeout_seconds: Annotated[float, Field(gt=0)] = option(120.0, "longest time for one attempt", affects_result=False)
    max_attempts: Annotated[int, Field(ge=1)] = option(
        8, "attempts before a request counts as failed", affects_result=False
    )
    first_backoff_seconds: Annotated[float, Field(gt=0)] = option(
        1.0, "longest pause before the second attempt. It doubles with each attempt", affects_result=False
    )
    longest_backoff_seconds: Annotated[float, Field(gt=0)] = option(
        60.0, "longest pause between two attempts", affects_result=False
    )
    longest_wait_seconds: Annotated[float, Field(gt=0)] = option(
        900.0,
        "longest Retry-After of a server that is waited for. A longer one stops the command",
        affects_result=False,
    )
    stop_after: Annotated[int, Field(ge=1)] = option(
        20,
        "stop the command after this many requests in a row that were refused or failed at every attempt",
        affects_result=False,
    )
    cache: Path | None = option(None, "folder that keeps replies. null: none is kept", affects_result=False)
    prices: Path | None = option(
        None,
        "YAML file with your own prices, such as openai: {my-model: {input: 0.1, output: 0.4}}",
        affects_result=False,
    )

    def __post_init__(self) -> None:
        """Raises ConfigError for a base URL that is none, and for a secret where its place is not."""
        check_variable(self.api_key_env)
        check_base_url(self.base_url)


def check_variable(name: str | None) -> None:
    """Raises ConfigError for what is no name of a variable, which may be the key itself."""
    if name is not None and re.fullmatch(r"[A-Z_][A-Z0-9_]*", name) is None:
        what = "is not the name of an environment variable in capitals (not shown, since it may be a key)"
        raise ConfigError(what, where="api_key_env", fix="export MY_KEY=..., then api_key_env=MY_KEY.")


def check_base_url(base: str | None) -> None:
    """Raises ConfigError for a base URL that is none, or that must not stand in logs. None: the official one."""
    if base is None:
        return
    try:
        url = httpx.URL(base)
    except (httpx.InvalidURL, TypeError):
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError("not an http(s) URL", where="base_url", fix="Write it like http://localhost:8000/v1.")
    if url.userinfo or url.fragment or set(url.params) - {AZURE_QUERY}:
        fix = "Put the key into an environment variable and name that with api_key_env."
        raise ConfigError("the base URL carries a user, a query or a fragment", where="base_url", fix=fix)


def check_extra(extra: Mapping[str, Any] | None, where: str) -> None:
    """Raises ConfigError for a key among the further fields of a request, since they are written into a folder."""
    for name in flat(extra or {}):
        if re.search(r"(api_?key|access_?token|auth_?token|authorization|secret|password)$", name.lower()):
            fix = "Put it into an environment variable and name that with remote.api_key_env."
            raise ConfigError(f"{name!r} would stand in the run folder", where=where, fix=fix)


def is_azure(url: httpx.URL) -> bool:
    """Whether a URL is of Azure OpenAI: by its host, or by the form of its path and query (a gateway's)."""
    return url.host.endswith(AZURE_HOSTS) or "/openai/deployments/" in url.path or AZURE_QUERY in url.params


def shown(address: str) -> str:
    """A URL of the user's environment without user and password, for messages; what is no URL is not shown."""
    try:
        return str(httpx.URL(address).copy_with(username=None, password=None))
    except httpx.InvalidURL:
        return "(no URL)"


NO_ANSWER = (httpx.HTTPError, OSError)  # what a service that cannot be reached raises
BROKEN_OFF = (httpx.ReadError, httpx.ReadTimeout, httpx.RemoteProtocolError)  # what one that was reached raises


@contextmanager
def proxies_checked() -> Iterator[None]:
    """Around whatever opens an httpx client, the hub's included: an InputError for a proxy that it cannot use.

    In place of httpx, whose own words may hold a part of the proxy's password.
    """
    try:
        yield
    except (ImportError, httpx.InvalidURL, ValueError) as error:
        words = str(error).lower()
        if isinstance(error, ImportError) and "socks" in words:
            fix = "pip install 'httpx[socks]', or unset the variable (export NO_PROXY=HOST leaves out one host)."
            what = "a SOCKS proxy is set, and the package for it is missing"
        elif isinstance(error, httpx.InvalidURL) or (isinstance(error, ValueError) and "proxy" in words):
            fix = "Write http://HOST:PORT or socks5://HOST:PORT, with %2F for / and %40 for @ in a password."
            what = "no address that can be used"
        else:
            raise
        raise InputError(what, where=ADDRESS_VARIABLES, fix=fix) from None
