"""What the server refuses before a page is asked: other hosts' names, other sites' requests, strangers without a token.

On loopback every program and every web page of this machine's browser can send requests. A name that is not this
server's (DNS rebinding) and a request that another site started are refused; a page may load only what this server
gives, runs no script but the server's own files, and cannot be framed. Bound elsewhere, the server wants a token, which
comes once in the address and stays in a cookie that scripts cannot read.
"""

from __future__ import annotations

import hmac
import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "hba_token"
POLICY = "; ".join((
    "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self' data:", "media-src 'self'",
    "connect-src 'self'", "form-action 'self'", "frame-ancestors 'none'", "base-uri 'none'",
))  # fmt: skip
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Guard:
    """ASGI middleware around the app. `token` is None where the server is bound to loopback."""

    def __init__(self, app: ASGIApp, *, token: str | None) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse the request, or pass it on and add the headers that bind the browser."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def bound(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {name.lower() for name, _ in message["headers"]}
                added = [(k.encode(), v.encode()) for k, v in HEADERS.items() if k.encode() not in present]
                message["headers"] = [*message["headers"], *added]
            await send(message)

        refused = self._refuse(Request(scope))
        await (refused or self._app)(scope, receive, bound)

    def _refuse(self, request: Request) -> Response | None:
        if self._token is None and not is_loopback(request.url.hostname or ""):
            return PlainTextResponse("This server answers to localhost alone.\n", 421)
        if _foreign(request.headers):
            return PlainTextResponse("A page of another site asked for this: refused.\n", 403)
        return None if self._token is None else self._check_token(request, self._token)

    def _check_token(self, request: Request, token: str) -> Response | None:
        given = request.query_params.get("token")
        if given is not None and hmac.compare_digest(given.encode(), token.encode()):
            query = request.url.remove_query_params("token")
            response = RedirectResponse(query.path + (f"?{query.query}" if query.query else ""), 303)
            response.set_cookie(COOKIE, token, httponly=True, samesite="strict")
            return response
        kept = request.cookies.get(COOKIE, "")
        if hmac.compare_digest(kept.encode(), token.encode()):
            return None
        return PlainTextResponse("Open the address that `hba explore` printed: it carries the token.\n", 401)


def _foreign(headers: Headers) -> bool:
    """Whether another site's page sent the request. A link that a person followed is not a request of that site."""
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != headers.get("host"):
        return True
    followed = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    return headers.get("sec-fetch-site") in ("cross-site", "same-site") and not followed
