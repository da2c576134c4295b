"""Bind a port, make the address with its token, serve the app there until it is interrupted."""

from __future__ import annotations

import hmac
import html
import ipaddress
import os
import re
import secrets
import shutil
import socket
import sys
import webbrowser
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hba.errors import HbaError, InputError
from hba.explorer import pages
from hba.explorer.index import AtlasIndex, Database, Runs, index_name, located
from hba.explorer.media import Decoder
from hba.explorer.pages import HERE, Answering, Asked, Explorer, Tries, sheet
from hba.storage import begun, named_os_errors, remove_abandoned

# What the server refuses before a page is asked: other hosts' names, other sites' requests, strangers without a token.
#
# On loopback every user of this machine, and every web page of its browsers, can send requests. The server wants a
# token, which comes once in the address and stays in a cookie that scripts cannot read. A name that is not this
# server's (DNS rebinding) and a request that another site started are refused; a page may load only what this server
# gives, runs no script but the server's own files, and cannot be framed.


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
        if foreign(request.headers):
            return PlainTextResponse("A page of another site asked for this: refused.\n", 403)
        return None if self._token is None else self._check_token(request, self._token)

    def _check_token(self, request: Request, token: str) -> Response | None:
        # Cookies do not tell ports, of which others may have explorers. The browser's port may be that of a tunnel.
        cookie = "hba_token_" + re.sub(r"\D", "", request.headers.get("host", "").rpartition(":")[2])
        given = request.query_params.get("token")
        if given is not None and is_same(given, token):
            # No redirect: a browser that comes from elsewhere would not send a strict cookie along with it.
            query = request.url.remove_query_params("token").query
            place = "/" + quote(request.scope["path"].lstrip("/\\")) + (f"?{query}" if query else "")
            entered = ENTERED.format(place=html.escape(place))
            response = HTMLResponse(entered, headers={"referrer-policy": "no-referrer"})
            response.set_cookie(cookie, token, httponly=True, samesite="strict")
            return response
        if is_same(request.cookies.get(cookie, ""), token):
            return None
        return HTMLResponse(STRANGER, 403)


def is_same(given: str, token: str) -> bool:
    """Whether it is the token, in a time that does not depend on where it differs."""
    return hmac.compare_digest(given.encode(errors="replace"), token.encode())


def foreign(headers: Headers) -> bool:
    """Whether another site's page sent the request. A link that a person followed is not a request of that site."""
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2] != headers.get("host"):
        return True
    followed = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    return headers.get("sec-fetch-site") in ("cross-site", "same-site") and not followed


# --- the server -------------------------------------------------------------------------------------------------------


TOKEN_BYTES = 24
BACKLOG = 128
GO_TO = '<!doctype html><meta http-equiv="refresh" content="0; url={url}"><p><a href="{url}">Go on</a>'


class Bound(NamedTuple):
    """A listening socket, its address with the token, and the token that every request must know; None for none."""

    socket: socket.socket
    host: str
    url: str
    token: str | None


def bind(host: str, port: int, *, with_token: bool = True) -> Bound:
    """Listen on a port; 0 takes a free one.

    Raises InputError when it is taken or the address is not this machine's, and for no token beyond loopback.
    """
    if not with_token and not is_loopback(host):
        fix = "Leave out --no-token, or leave out --host and use an SSH tunnel."
        raise InputError("without a token the whole network could read the data", where=f"--host {host}", fix=fix)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # asyncio sets it only where a socket names its protocol; without it answers on a kept connection wait 40 ms.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        listening.bind((host, port))
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        fix = "Choose another --port, or 0 for a free one."
        raise InputError(f"cannot listen there ({error.strerror})", where=f"{host}:{port}", fix=fix) from None
    token = secrets.token_urlsafe(TOKEN_BYTES) if with_token else None
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listening.getsockname()[1]}/"
    return Bound(listening, host, address if token is None else f"{address}?token={token}", token)


def open_browser(bound: Bound, folder: Path) -> None:
    """Open the address in the user's browser, by way of a page in `folder` that nobody else can read: everybody on the
    machine sees the arguments of a program."""
    page = folder / "open.html"
    page.touch(mode=0o600)
    page.write_text(GO_TO.format(url=bound.url), encoding="utf-8")
    webbrowser.open(page.as_uri())


def has_screen() -> bool:
    """Whether the person at the terminal sees this machine's screen, as far as can be told."""
    local = sys.stdout.isatty() and "SSH_CONNECTION" not in os.environ
    return local and (sys.platform == "darwin" or bool({"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()))


def serve(bound: Bound, app: Starlette) -> None:
    """Serve until interrupted."""
    # No access log: it would hold the token of the first request.
    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
    uvicorn.Server(config).run(sockets=[bound.socket])


# The app: which address gives which page.


def create_app(
    *,
    atlas: str | Path | None,
    runs: Path | None,
    cache_folder: Path,
    token: str | None = None,
    only_loopback: bool = True,
    models: Mapping[str, Answering] | None = None,
    keep: Path | None = None,
) -> Starlette:
    """The app over an atlas (a folder, or org/name on the hub) and a folder of runs; `cache_folder` keeps the index.
    With `models` there is the Try page, which keeps rows in the folder `keep`.

    Without a `token` everybody who reaches the server may read everything. `only_loopback` answers to the names of this
    machine alone. What lives as long as the app lies in a private folder below `cache_folder`, which goes with
    `app.state.explorer.close()`, at the end of the lifespan at the latest. That of a process that was killed goes now.
    Raises InputError for a folder that holds no atlas, and for a dataset on the hub that cannot be had.
    """
    root = located(atlas) if atlas else None
    kept = cache_folder / "explorer"
    with named_os_errors(kept):
        remove_abandoned(kept)
        folder = begun(kept / f"open-{secrets.token_hex(4)}")
        folder.mkdir(parents=True, mode=0o700)
    try:
        rows = kept / index_name(root) if root else folder / "rows.sqlite"
        database = Database(rows, folder / "runs.sqlite")
        index = AtlasIndex(root, database, cache_folder) if root else None
        clips = folder / "clips"
        clips.mkdir()
    except BaseException:
        shutil.rmtree(folder)
        raise
    tries = Tries(models, clips, keep) if models else None
    explorer = Explorer(index, Runs(runs, database), database, Decoder(), Decoder(), folder, tries)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        if index is not None:
            index.start()
        yield
        explorer.close()

    guard = Middleware(Guard, token=token, only_loopback=only_loopback)
    app = Starlette(routes=_routes(), middleware=[guard], lifespan=lifespan, exception_handlers={HbaError: _error_page})
    app.state.explorer = explorer
    return app


def _routes() -> list[BaseRoute]:
    get: dict[str, Callable[[Asked], Response]] = {
        "/": lambda asked: RedirectResponse(_first(asked.explorer)),
        "/atlas": pages.atlas,
        "/atlas/progress": pages.progress,
        "/sample/{split}/{number:int}": pages.sample,
        "/media/{split}/{number:int}/{field}/{place:int}": pages.medium,
        "/picture/{kind}/{split}/{number:int}/{field}/{place:int}": pages.picture,
        "/quarantine": pages.quarantine,
        "/runs": pages.runs,
        "/runs/side-by-side": pages.side_by_side,
        "/run": pages.run,
        "/run/curves": pages.run_curves,
        "/predictions": pages.predictions,
        "/prediction": pages.prediction,
        "/scores": pages.scores,
        "/compare": pages.compare,
        "/rl": pages.rl,
        "/judge": pages.judge,
        "/snapshot": pages.snapshot,
        "/try": pages.tried,
        "/try/clip/{clip}": pages.clip,
        "/try/sound/{clip}": pages.clip_sound,
        "/try/landmarks/{clip}": pages.clip_landmarks,
        "/style.css": lambda asked: Response(sheet(), media_type="text/css"),
    }

    def answering(page: Callable[[Asked], Response]) -> Callable[[Request], Response]:
        return lambda request: page(Asked(request))

    return [
        *(Route(path, answering(page), methods=["GET"]) for path, page in get.items()),
        Route("/judge", pages.save, methods=["POST"]),
        Route("/try/clip", pages.put_clip, methods=["POST"]),
        Route("/try/ask", pages.ask_models, methods=["POST"]),
        Route("/try/curve", pages.ask_over_time, methods=["POST"]),
        Route("/try/keep", pages.keep, methods=["POST"]),
        Mount("/static", StaticFiles(directory=HERE / "static")),
    ]


def _first(explorer: Explorer) -> str:
    return "/try" if explorer.tries else "/atlas" if explorer.index else "/runs"


def _error_page(request: Request, error: Exception) -> Response:
    assert isinstance(error, HbaError)
    response = Asked(request).page("error.html.jinja", "That did not work", error=error)
    response.status_code = 404 if isinstance(error, InputError) else 500
    return response
