"""What the server refuses before a page is asked: other hosts' names, other sites' requests, strangers without a token.

On loopback every user of this machine, and every web page of its browsers, can send requests. The server wants a token,
which comes once in the address and stays in a cookie that scripts cannot read. A name that is not this server's (DNS
rebinding) and a request that another site started are refused; a page may load only what this server gives, runs no
script but the server's own files, and cannot be framed.
"""

from __future__ import annotations

import hmac
import html
import ipaddress
import re
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

STRANGER = """<!doctype html><html lang="en"><meta charset="utf-8"><title>hba explore: no token</title>
<h1>This address lacks its token</h1>
<p>Open the whole address that <code>hba explore</code> printed: it ends with <code>?token=...</code>.
Each start has another token. What somebody else started is theirs alone to open.</p></html>
"""
ENTERED = """<!doctype html><html lang="en"><meta charset="utf-8"><title>hba explore</title>
<meta http-equiv="refresh" content="0; url={place}"><p><a href="{place}">Go on</a></p></html>
"""
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
    """ASGI middleware around the app. `token` is None where whoever reaches the server may read everything;
    `only_loopback` refuses names other than this machine's."""

    def __init__(self, app: ASGIApp, *, token: str | None, only_loopback: bool) -> None:
        self._app, self._token, self._only_loopback = app, token, only_loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse the request, or pass it on and add the headers that bind the browser."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # a WebSocket: there are none
            await send({"type": "websocket.close", "code": 1008})
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
        if self._only_loopback and not is_loopback(request.url.hostname or ""):
            return PlainTextResponse("This server answers to localhost alone.\n", 421)
        if _foreign(request.headers):
            return PlainTextResponse("A page of another site asked for this: refused.\n", 403)
        return None if self._token is None else self._check_token(request, self._token)

    def _check_token(self, request: Request, token: str) -> Response | None:
        # Cookies do not tell ports, of which others may have explorers. The browser's port may be that of a tunnel.
        cookie = "hba_token_" + re.sub(r"\D", "", request.headers.get("host", "").rpartition(":")[2])
        given = request.query_params.get("token")
        if given is not None and _is_same(given, token):
            # No redirect: a browser that comes from elsewhere would not send a strict cookie along with it.
            query = request.url.remove_query_params("token").query
            place = "/" + quote(request.scope["path"].lstrip("/\\")) + (f"?{query}" if query else "")
            entered = ENTERED.format(place=html.escape(place))
            response = HTMLResponse(entered, headers={"referrer-policy": "no-referrer"})
            response.set_cookie(cookie, token, httponly=True, samesite="strict")
            return response
        if _is_same(request.cookies.get(cookie, ""), token):
            return None
        return HTMLResponse(STRANGER, 403)


def _is_same(given: str, token: str) -> bool:
    """Whether it is the token, in a time that does not depend on where it differs."""
    return hmac.compare_digest(given.encode(errors="replace"), token.encode())


def _foreign(headers: Headers) -> bool:
    """Whether another site's page sent the request. A link that a person followed is not a request of that site."""
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != headers.get("host"):
        return True
    followed = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    return headers.get("sec-fetch-site") in ("cross-site", "same-site") and not followed
