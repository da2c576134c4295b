"""What a response that is no reply means: try again, give up on the request, or stop the command."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import NamedTuple

from hba.errors import HbaError
from hba.remote.errors import RequestError, ServiceError, TransientError

RETRIED = (408, 409, 425, 429)
MESSAGE_CHARACTERS = 300
Redact = Callable[[str], str]


class Response(NamedTuple):
    """One response, whole."""

    status: int
    headers: Mapping[str, str]
    raw: bytes


def of_response(response: Response, redact: Redact, where: str, *, answered: bool) -> Exception:
    """The exception for a response that is no reply. `where` is the URL, which holds no secret.

    `answered` says that the service has answered before: then a 403 or 404 is about this request (a filter on its way
    refused its text), and not about key or model.
    """
    status, headers, raw = response
    error = _error_object(raw, redact)
    stopped = service_fault(error, redact, where)
    if stopped is not None:
        return stopped
    if status in RETRIED or status >= 500:
        return TransientError(f"HTTP {status}", retry_after_seconds(headers))
    said = _message(error, redact)
    what = f"HTTP {status}: {said}" if said else f"HTTP {status}"
    fixes = {401: "Check the API key.", 403: "Check what the API key may do.", 404: "Check base URL and model name."}
    if status in fixes and not (answered and status != 401):
        return ServiceError(what, where=where, fix=fixes[status])
    if 300 <= status < 400:
        return ServiceError(f"{what} (redirects are not followed)", where=where, fix="Give the final base URL.")
    return RequestError(what, where=where)


def service_fault(error: Mapping[str, object], redact: Redact, where: str) -> HbaError | None:
    """ServiceError for an account that is empty, which some services call a rate limit; else None."""
    if "insufficient_quota" in (error.get("code"), error.get("type")):
        return ServiceError(_message(error, redact) or "quota used up", where=where, fix="Add credit, then resume.")
    return None


def retry_after_seconds(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """The wait that `retry-after-ms` or `retry-after` (seconds or an HTTP date) asks for; None for anything else."""
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        text = headers.get(name)
        if text is None:
            continue
        try:
            seconds = float(text) * scale
        except ValueError:
            seconds = _until(text, now or datetime.now(timezone.utc))
        if math.isfinite(seconds) and seconds >= 0:
            return seconds
    return None


def _until(text: str, now: datetime) -> float:
    try:
        then = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError):
        return math.nan
    then = then if then.tzinfo else then.replace(tzinfo=timezone.utc)
    return max(0.0, (then - now).total_seconds())


def _error_object(raw: bytes, redact: Redact) -> Mapping[str, object]:
    try:
        data = json.loads(raw)
    except ValueError:
        return {"message": redact(raw.decode(errors="replace"))[: 4 * MESSAGE_CHARACTERS]}
    error = data.get("error", data) if isinstance(data, dict) else data
    return error if isinstance(error, dict) else {"message": str(error)}


def _message(error: Mapping[str, object], redact: Redact) -> str:
    """The server's words on one line, without control characters (a terminal would obey them).

    Keys are cut out before the words are cut short: a part of a key would no longer be known as one.
    """
    text = redact(str(error.get("message") or error.get("detail") or ""))
    printable = "".join(letter if letter.isprintable() else " " for letter in text)
    return " ".join(printable.split())[:MESSAGE_CHARACTERS]
