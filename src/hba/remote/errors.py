"""What can go wrong with a remote model: with one request, with one reply, with the service as a whole."""

from __future__ import annotations

from hba.errors import HbaError


class RequestError(HbaError):
    """One request has no reply and will have none: refused, or failed at every attempt. The others go on."""


class UnusableReplyError(HbaError):
    """A reply came whole, but its reader cannot use it. It is not cached, so that another attempt can be made."""


class ServiceError(HbaError):
    """No request can be answered (key, model name, quota, server down): the command stops and can be resumed."""


class TransientError(Exception):
    """An attempt failed in a way that may pass; never leaves the client.

    `wait_seconds` is what the server asked for, None if nothing.
    """

    def __init__(self, reason: str, wait_seconds: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.wait_seconds = reason, wait_seconds
