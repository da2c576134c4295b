"""Chat requests to remote models: one client layer for API predictions and for the judge.

`RemoteClient` sends a `ChatRequest` and gives its `Reply`, through faults: it retries, waits when it is told to, finds
out how many requests the server takes at once, and never asks twice for what its cache holds. A request that cannot
be answered raises `RequestError`; a service of which nothing can be expected raises `ServiceError`.
"""

from __future__ import annotations

from hba.remote.client import ClientConfig, RemoteClient, bounded
from hba.remote.request import (
    ChatRequest,
    Reply,
    RequestError,
    Schema,
    ServiceError,
    UnansweredError,
    UnusableReplyError,
)

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
]
