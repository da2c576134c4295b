"""What a response that is no reply means, and what a connection that fails: try again, leave a parameter out, give up
on the request, or stop the command.

A service's words are always shown, on one line and without keys. What the account or the machine lacks (balance, key,
model, route) stops the command; it is never an error of the sample that was asked about.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

import httpx

from hba.remote.request import RequestError, ServiceError, TransientError

RETRIED = (408, 409, 425, 429)
MESSAGE_CHARACTERS = 300
PROBE_SECONDS = 2.0
RESUME = "then run the same command again: it goes on."
Redact = Callable[[str], str]

# An account without money, as its services say it. Words count where no limit of rate is meant (429).
_EMPTY_CODES = {
    "insufficient_quota",
    "insufficient_balance",
    "insufficient_credits",
    "billing_error",
    "billing_not_active",
    "billing_hard_limit_reached",
    "credit_balance_too_low",
}
_EMPTY_WORDS = re.compile(
    r"credit balance|insufficient (?:balance|credits?|funds|quota)|out of credits|exceeded your current quota"
    r"|billing (?:hard )?limit|billing (?:is )?(?:disabled|not active)|payment required",
    re.IGNORECASE,
)
# A server that fails (5xx) because it cannot do what is asked, and never will.
_CANNOT_WORDS = re.compile(
    r"not (?:supported|implemented)|unsupported|no support for|(?:does|do|is)(?: not|n['’]t) (?:support|able to)",
    re.IGNORECASE,
)
# A parameter that is refused for itself, not for its value.
_REFUSED_WORDS = re.compile(
    r"unsupported|not supported|(?:does|do|is)(?: not|n['’]t) (?:support|allow|permit)|not permitted|not allowed"
    r"|deprecated|no longer|unrecogni[sz]ed|unknown|unexpected|extra (?:inputs|fields)|extra_forbidden|unavailable"
    r"|cannot (?:both )?be (?:specified|set|used|combined)|may (?:only|not) be|only the default",
    re.IGNORECASE,
)
# What may be left out of a body, or sent under another name, by the words that a refusal has for it. In this order:
# where a service takes only one of two, the first goes.
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "top_p": ("top_p",),
    "topP": ("topP", "top_p"),
    "seed": ("seed",),
    "stop": ("stop",),
    "temperature": ("temperature",),
    "response_format": ("response_format", "json_schema", "structured output"),
    "tool_choice": ("tool_choice",),
    "max_tokens": ("max_tokens",),
    "max_completion_tokens": ("max_completion_tokens",),
}
_RENAMED = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}


class Response(NamedTuple):
    """One response, whole."""

    status: int
    headers: Mapping[str, str]
    raw: bytes


class Caller(NamedTuple):
    """Who asked, for messages: the URL, which holds no secret, what cuts keys out, the key's variable (None: no key was
    sent), whether the service has answered before, and the models that it lists."""

    url: str
    redact: Redact
    key_variable: str | None = None
    answered: bool = False
    offered: tuple[str, ...] = ()


class Refused(NamedTuple):
    """A parameter that a service does not take: left out, or sent under the name `instead`."""

    name: str
    instead: str | None
    words: str

    @property
    def shown(self) -> str:
        """Such as "temperature left out"."""
        return f"{self.name} left out" if self.instead is None else f"{self.name} sent as {self.instead}"


def of_response(response: Response, caller: Caller) -> Exception:
    """The exception for a response that is no reply.

    After an answer a 403 or 404 is about this request (a filter on its way refused its text), and not about key or
    model.
    """
    return of_error(response.status, error_object(response.raw), caller, response.headers)


def of_error(status: int, error: Mapping[str, Any], caller: Caller, headers: Mapping[str, str]) -> Exception:
    """The exception for an error object, whatever it came in; a status of 200 counts as the object's own code."""
    code = error.get("code")
    if status == 200:
        status = code if isinstance(code, int) and 400 <= code < 600 else 500
    said = words_of(error, caller.redact)
    what = f"HTTP {status}: {said}" if said else f"HTTP {status}"
    codes = {str(error.get(name)).lower() for name in ("code", "type")}
    unpaid = status in (400, 403) and _EMPTY_WORDS.search(said)
    if status == 402 or codes & _EMPTY_CODES or unpaid:
        return ServiceError(what, where=caller.url, fix=f"The balance or quota is used up: add credit, {RESUME}")
    if status in RETRIED or (status >= 500 and status != 501 and not _CANNOT_WORDS.search(said)):
        wait = retry_after_seconds(headers)
        return TransientError(f"HTTP {status}", said, _delay_in(error) if wait is None else wait)
    if status == 401 or (status in (403, 404) and not caller.answered):
        no_key = " (no key was sent)" if status in (401, 403) and caller.key_variable is None else ""
        return ServiceError(f"{what}{no_key}", where=caller.url, fix=_fix(status, caller))
    if 300 <= status < 400:
        what = f"{what} (redirects are not followed)"
        return ServiceError(what, where=caller.url, fix="Give the final address with remote.base_url.")
    return RequestError(what, where=caller.url)


def _fix(status: int, caller: Caller) -> str:
    if status == 404:
        offered = f" The server offers {', '.join(caller.offered[:8])}." if caller.offered else ""
        return f"Check the model's name, and remote.base_url, which most servers want with /v1.{offered}"
    if caller.key_variable is None:
        return "export MY_KEY=..., then add remote.api_key_env=MY_KEY."
    return f"Check the key in {caller.key_variable}" + (" and what it may do." if status == 403 else ".")


def refused_parameter(response: Response, sent: Mapping[str, Any], redact: Redact) -> Refused | None:
    """The parameter of the body `sent` that a service refuses for itself and that can be done without, or None.

    What the user wrote for one model alone (reasoning_effort, ...) is not among them, nor is a value out of range.
    """
    if response.status not in (400, 422):
        return None
    error = error_object(response.raw)
    said = words_of(error, redact, characters=4 * MESSAGE_CHARACTERS)
    if not (_REFUSED_WORDS.search(said) or str(error.get("code")).startswith("unsupported")):
        return None
    for name, spelled in _OPTIONAL.items():
        named = error.get("param") == name or any(re.search(rf"\b{re.escape(word)}\b", said) for word in spelled)
        if name in fields(sent) and named:
            return Refused(name, _RENAMED.get(name), said[:MESSAGE_CHARACTERS])
    return None


def fields(body: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a body, wherever the API has them."""
    return {**body, **body.get("generationConfig", {})}


def without(body: Mapping[str, Any], refused: Mapping[str, Refused]) -> dict[str, Any]:
    """`body` with the refused parameters left out or renamed."""
    left: dict[str, Any] = {}
    for name, value in body.items():
        change = refused.get(name)
        if change is None:
            left[name] = without(value, refused) if name == "generationConfig" else value
        elif change.instead is not None:
            left[change.instead] = value
    return left


def error_object(raw: bytes) -> Mapping[str, Any]:
    """The error in a response's body as it came; its text where there is none."""
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError):
        return {"message": raw.decode(errors="replace")[: 8 * MESSAGE_CHARACTERS]}
    if isinstance(data, list) and data:  # Google's, at times
        data = data[0]
    error = data.get("error", data) if isinstance(data, dict) else data
    return error if isinstance(error, dict) else {"message": str(error)}


def words_of(error: Mapping[str, Any], redact: Redact, characters: int = MESSAGE_CHARACTERS) -> str:
    """The server's words on one line, without control characters (a terminal would obey them).

    Keys are cut out before the words are cut short: a part of a key would no longer be known as one.
    """
    text = redact(str(error.get("message") or error.get("detail") or error.get("error") or ""))
    printable = "".join(letter if letter.isprintable() else " " for letter in text)
    return " ".join(printable.split())[:characters]


def retry_after_seconds(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """The wait that `retry-after-ms` or `retry-after` (seconds or an HTTP date) asks for; None for anything else."""
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        text = headers.get(name)
        if text is None:
            continue
        try:
            seconds = float(text) * scale
        except ValueError:
            seconds = _until(text, now or datetime.now(UTC))
        if math.isfinite(seconds) and seconds >= 0:
            return seconds
    return None


def _delay_in(error: Mapping[str, Any]) -> float | None:
    """The wait that Google puts into the body ("retryDelay": "34s")."""
    details = error.get("details")
    for detail in details if isinstance(details, list) else ():
        told = re.fullmatch(r"(\d+(?:\.\d+)?)s", str(detail.get("retryDelay"))) if isinstance(detail, dict) else None
        if told:
            return float(told[1])
    return None


def _until(text: str, now: datetime) -> float:
    try:
        then = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError):
        return math.nan
    then = then if then.tzinfo else then.replace(tzinfo=UTC)
    return max(0.0, (then - now).total_seconds())


def same_model(asked: str, said: str) -> bool:
    """Whether a reply's model may be the one that was asked for: itself, a dated version of it, a path to it."""

    def bare(name: str) -> str:
        return re.sub(r"(-latest|:latest|\.gguf)$", "", name.lower().rstrip("/").rpartition("/")[2])

    first, second = bare(asked), bare(said)
    return first.startswith(second) or second.startswith(first)


# --- connections ---


def connection_words(error: BaseException) -> str:
    """What is wrong with a connection, as far as its exception says."""
    for cause in _causes(error):
        if isinstance(cause, ConnectionRefusedError):
            return "refused"
        if isinstance(cause, socket.gaierror):
            return "unknown host"
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"its certificate is not trusted ({cause.verify_message})"
        if isinstance(cause, ssl.SSLError):
            return "no TLS"
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror.lower()
    return type(error).__name__


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen, waiting = set(), [error]
    while waiting:
        cause = waiting.pop()
        if id(cause) not in seen:
            seen.add(id(cause))
            yield cause
            waiting += [each for each in (cause.__context__, cause.__cause__) if each is not None]
            waiting += getattr(cause, "exceptions", ())


async def unreachable(url: str, error: Exception) -> ServiceError | None:
    """The error that a first connection says for good; None for what may pass, or is not known."""
    target = httpx.URL(url)
    port = target.port or (443 if target.scheme == "https" else 80)
    words, place = connection_words(error), f"{target.host}:{port}"
    other = "http" if target.scheme == "https" else "https"
    broken = (httpx.ConnectTimeout, httpx.ReadError, httpx.RemoteProtocolError)
    if (words == "no TLS" or isinstance(error, broken)) and await _speaks(other, target.host, port):
        fix = f"remote.base_url={other}://{place}{target.path.removesuffix('/models')}"
        return ServiceError(f"the server speaks {other}, not {target.scheme}", where=place, fix=fix)
    fixes = {
        "refused": "Start the server, or check the port of remote.base_url.",
        "unknown host": "Check the host of remote.base_url, and the network.",
        "no TLS": "Check remote.base_url: is it http://?",
    }
    fix = fixes.get(words, "export SSL_CERT_FILE=FILE with the authority's certificate." if "trusted" in words else "")
    if not isinstance(error, httpx.ConnectError) or not fix:
        return None
    what = "nothing listens there: the connection was refused" if words == "refused" else f"no connection: {words}"
    return ServiceError(what, where=place, fix=fix)


async def _speaks(scheme: str, host: str, port: int) -> bool:
    """Whether a server answers in plain HTTP, or begins TLS. Nothing but an empty request is sent."""
    context = None
    if scheme == "https":
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is trusted to it

    async def try_it() -> bool:
        reader, writer = await asyncio.open_connection(host, port, ssl=context)
        try:
            if context is not None:
                return True
            writer.write(f"GET / HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode())
            return (await reader.read(5)).startswith(b"HTTP/")
        finally:
            writer.close()

    try:
        return await asyncio.wait_for(try_it(), PROBE_SECONDS)
    except ssl.SSLError as error:  # refused, but by TLS's own alert
        return error.reason is not None and "ALERT" in error.reason
    except (TimeoutError, OSError, ValueError):
        return False
