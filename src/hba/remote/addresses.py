"""Where requests go and which variable holds the key, checked before any of it can be written down.

Refuses whatever carries a secret itself: a base URL with a user or a query, a key in place of the name of its variable.
A message about such a value never repeats it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from hba.errors import ConfigError, InputError

ADDRESS_VARIABLES = "HTTPS_PROXY, HTTP_PROXY, ALL_PROXY or HF_ENDPOINT"


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
    if url.userinfo or url.query or url.fragment:
        fix = "Put the key into an environment variable and name that with api_key_env."
        raise ConfigError("the base URL carries a user, a query or a fragment", where="base_url", fix=fix)


def shown(address: str) -> str:
    """A URL of the user's environment without user and password, for messages; what is no URL is not shown."""
    try:
        return str(httpx.URL(address).copy_with(username=None, password=None))
    except httpx.InvalidURL:
        return "(no URL)"


def unusable_proxy() -> InputError:
    """What is said in place of httpx, whose own words may hold a part of a proxy's password."""
    fix = "Write %2F for / and %40 for @ in a password; for a SOCKS proxy: pip install 'httpx[socks]'."
    return InputError("no address that can be used", where=ADDRESS_VARIABLES, fix=fix)


@contextmanager
def proxies_checked() -> Iterator[None]:
    """Around the opening of a client: an InputError for proxies of the environment that httpx cannot use."""
    try:
        yield
    except (httpx.InvalidURL, ValueError, ImportError):
        raise unusable_proxy() from None
