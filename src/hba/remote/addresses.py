"""Where requests go and which variable holds the key, checked before any of it can be written down.

Refuses whatever carries a secret itself: a base URL with a user or a query, a key in place of the name of its variable.
A message about such a value never repeats it. The one query that is taken is Azure's `api-version`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx

from hba.config import flat
from hba.errors import ConfigError, InputError

ADDRESS_VARIABLES = "HTTPS_PROXY, HTTP_PROXY, ALL_PROXY or HF_ENDPOINT"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
# Of its services; anybody can have a machine below azure.com.
AZURE_HOSTS = tuple(
    f".{service}.azure.{end}"
    for service in ("openai", "cognitiveservices", "services.ai")
    for end in ("com", "us", "cn")
)
AZURE_QUERY = "api-version"


def check_variable(name: str | None) -> None:
    """Raises ConfigError for what is no name of a variable, which may be the key itself."""
    if name is not None and re.fullmatch(r"[A-Z_][A-Z0-9_]*", name) is None:
        what = "is not the name of an environment variable in capitals (not shown, since it may be a key)"
        raise ConfigError(what, where="api_key_env", fix="export MY_KEY=..., then api_key_env=MY_KEY.")


def check_base_url(base: str | None) -> None:
    """Raises ConfigError for a base URL that is none, or that must not stand in logs. None: the official one."""
    if base is None:
        return
    try:
        url = httpx.URL(base)
    except (httpx.InvalidURL, TypeError):
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError("not an http(s) URL", where="base_url", fix="Write it like http://localhost:8000/v1.")
    if url.userinfo or url.fragment or set(url.params) - {AZURE_QUERY}:
        fix = "Put the key into an environment variable and name that with api_key_env."
        raise ConfigError("the base URL carries a user, a query or a fragment", where="base_url", fix=fix)


def check_extra(extra: Mapping[str, Any] | None, where: str) -> None:
    """Raises ConfigError for a key among the further fields of a request, since they are written into a folder."""
    for name in flat(extra or {}):
        if re.search(r"(api_?key|access_?token|auth_?token|authorization|secret|password)$", name.lower()):
            fix = "Put it into an environment variable and name that with remote.api_key_env."
            raise ConfigError(f"{name!r} would stand in the run folder", where=where, fix=fix)


def is_azure(url: httpx.URL) -> bool:
    """Whether a URL is of Azure OpenAI: by its host, or by the form of its path and query (a gateway's)."""
    return url.host.endswith(AZURE_HOSTS) or "/openai/deployments/" in url.path or AZURE_QUERY in url.params


def shown(address: str) -> str:
    """A URL of the user's environment without user and password, for messages; what is no URL is not shown."""
    try:
        return str(httpx.URL(address).copy_with(username=None, password=None))
    except httpx.InvalidURL:
        return "(no URL)"


@contextmanager
def proxies_checked() -> Iterator[None]:
    """Around whatever opens an httpx client, the hub's included: an InputError for a proxy that it cannot use.

    In place of httpx, whose own words may hold a part of the proxy's password.
    """
    try:
        yield
    except (ImportError, httpx.InvalidURL, ValueError) as error:
        words = str(error).lower()
        if isinstance(error, ImportError) and "socks" in words:
            fix = "pip install 'httpx[socks]', or unset the variable (export NO_PROXY=HOST leaves out one host)."
            what = "a SOCKS proxy is set, and the package for it is missing"
        elif isinstance(error, httpx.InvalidURL) or (isinstance(error, ValueError) and "proxy" in words):
            fix = "Write http://HOST:PORT or socks5://HOST:PORT, with %2F for / and %40 for @ in a password."
            what = "no address that can be used"
        else:
            raise
        raise InputError(what, where=ADDRESS_VARIABLES, fix=fix) from None
