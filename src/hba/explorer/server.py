"""Bind a port, make the address with its token, serve the app there until it is interrupted."""

from __future__ import annotations

import os
import secrets
import socket
import sys
import webbrowser
from pathlib import Path
from typing import NamedTuple

import uvicorn
from starlette.applications import Starlette

from hba.errors import InputError
from hba.explorer.guard import is_loopback

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
