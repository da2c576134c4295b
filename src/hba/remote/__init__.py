"""Chat requests to remote models: one client layer for API predictions and for the judge.

`RemoteClient` sends a `ChatRequest` and gives its `Reply`, through faults: it retries, waits when it is told to, finds
out how many requests the server takes at once, and never asks twice for what its cache holds. A request that cannot
be answered raises `RequestError`; a service of which nothing can be expected raises `ServiceError`. What asks nobody
imports no client.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hba.remote.request import (
    ChatRequest,
    ClientConfig,
    Reply,
    RequestError,
    Schema,
    ServiceError,
    UnansweredError,
    UnusableReplyError,
)

if TYPE_CHECKING:
    from hba.remote.client import RemoteClient, bounded, settled

__all__ = [
    "ChatRequest",
    "ClientConfig",
    "RemoteClient",
    "Reply",
    "RequestError",
    "Schema",
    "ServiceError",
    "UnansweredError",
    "UnusableReplyError",
    "bounded",
    "settled",
]


def __getattr__(name: str) -> Any:
    if name in ("RemoteClient", "bounded", "settled"):
        from hba.remote import client

        return getattr(client, name)
    raise AttributeError(f"module 'hba.remote' has no attribute {name!r}")
