"""Bind a port, say the address, serve the app on it until it is interrupted."""

from __future__ import annotations

import secrets
import socket
from typing import NamedTuple

import uvicorn
from starlette.applications import Starlette

from hba.errors import InputError
from hba.explorer.guard import is_loopback

TOKEN_BYTES = 24
BACKLOG = 128


class Bound(NamedTuple):
    """A listening socket, with the token that a server beyond loopback asks for."""

    socket: socket.socket
    host: str
    url: str
    token: str | None


def bind(host: str, port: int) -> Bound:
    """Listen on a port; 0 takes a free one. Raises InputError when it is taken or the address is not this machine's."""
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
    token = None if is_loopback(host) else secrets.token_urlsafe(TOKEN_BYTES)
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listening.getsockname()[1]}/"
    return Bound(listening, host, address if token is None else f"{address}?token={token}", token)


def serve(bound: Bound, app: Starlette) -> None:
    """Serve until interrupted."""
    # No access log: it would hold the token of the first request.
    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
    uvicorn.Server(config).run(sockets=[bound.socket])
