"""What a provider's module says about its API: where requests go, what they carry, how replies read."""

from __future__ import annotations

from typing import Any, Protocol

from hba.errors import ConfigError, nearest
from hba.remote.anthropic import Anthropic
from hba.remote.google import Google
from hba.remote.openai import OpenAI
from hba.remote.request import ChatRequest, Reply


class Provider(Protocol):
    """One HTTP API. Everything that can fail in transport is the client's, not the provider's."""

    name: str
    key_env: str  # the environment variable with the key of the official service
    base_url: str  # of the official service

    def path(self, model: str) -> str:
        """Where requests go, below the base URL."""
        ...

    def headers(self, key: str) -> dict[str, str]:
        """The headers that carry the key and the version."""
        ...

    def body(self, model: str, request: ChatRequest, *, official: bool) -> dict[str, Any]:
        """The JSON body of a request."""
        ...

    def read(self, data: Any) -> Reply:
        """The reply in a decoded body. Raises ValueError, KeyError, TypeError or IndexError when it is none."""
        ...


PROVIDERS: dict[str, Provider] = {"openai": OpenAI(), "anthropic": Anthropic(), "google": Google()}


def provider(name: str) -> Provider:
    """The provider of that name. Raises ConfigError listing the known ones."""
    if name not in PROVIDERS:
        raise ConfigError(f"no provider {name!r}", fix=nearest(name, PROVIDERS))
    return PROVIDERS[name]
