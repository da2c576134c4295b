"""A chat request, its reply and what can go wrong between them, in a form that belongs to no provider.

Message content is a text or a list of parts, in the form of OpenAI's chat API, from which the providers translate:
`{"type": "text", "text"}`, `{"type": "image_url", "image_url": {"url"}}` (a data URL for local images),
`{"type": "input_audio", "input_audio": {"data": base64, "format"}}`, `{"type": "video_url", "video_url": {"url"}}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from hba.errors import HbaError

Part = dict[str, Any]


class Message(TypedDict):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str | list[Part]


@dataclass(frozen=True, kw_only=True)
class Schema:
    """The JSON schema that a reply must follow. `name` has letters, digits, _ and - only.

    A schema that is `needed` is never left out for a service that does not take it.
    """

    name: str
    schema: Mapping[str, Any]
    needed: bool = False


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """One question to a model.

    `temperature` and `top_p` are left to the server when None. `draw` tells repeated draws of one sampled request
    apart in the cache. `extra` goes into the body as it is (reasoning_effort, seed, ...).
    """

    messages: Sequence[Message]
    max_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    schema: Schema | None = None
    draw: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the model said. Structured replies are JSON text; nothing says yet that they follow the schema.

    `finish` is the provider's word (stop, length, end_turn, refusal, ...). Token counts are None if the server does
    not say them; `model` is the version that it says has answered; `left_out` names the parameters of the request that
    the server refused and was not sent; `seconds` is the time of the attempt that succeeded, 0 from the cache.
    """

    text: str
    finish: str | None
    tokens_in: int | None
    tokens_out: int | None
    model: str | None
    left_out: tuple[str, ...] = ()
    seconds: float = 0.0
    cached: bool = False


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One answer of several to the same prompt, token by token; None for what the server does not say."""

    token_ids: tuple[int, ...] | None
    logps: tuple[float, ...] | None  # of these tokens, natural logarithm
    finish: str | None


@dataclass(frozen=True, kw_only=True)
class TokenReply(Reply):
    """A reply whose tokens are known; its text is that of the first choice."""

    prompt_token_ids: tuple[int, ...] | None
    prompt_logps: tuple[float | None, ...] | None = None  # of these tokens; the first has none
    choices: tuple[Choice, ...]


class RequestError(HbaError):
    """One request has no reply and will have none: refused, or failed at every attempt. The others go on."""


class UnansweredError(RequestError):
    """No attempt of a request was answered while nobody else was answered either: the service's fault, not its own."""


class UnusableReplyError(HbaError):
    """A reply came whole, but its reader cannot use it. It is not cached, so that another attempt can be made."""


class ServiceError(HbaError):
    """No request can be answered (key, model name, balance, server down): the command stops and can be resumed."""


class TransientError(Exception):
    """An attempt failed in a way that may pass; never leaves the client.

    `kind` is what is counted (HTTP 429, timeout), `words` what the server said, `wait_seconds` what it asked for.
    """

    def __init__(self, kind: str, words: str = "", wait_seconds: float | None = None) -> None:
        super().__init__(f"{kind}: {words}" if words else kind)
        self.kind, self.words, self.wait_seconds = kind, words, wait_seconds
