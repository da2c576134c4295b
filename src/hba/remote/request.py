"""A chat request and its reply, in a form that belongs to no provider.

Message content is a text or a list of parts, in the form of OpenAI's chat API, from which the providers translate:
`{"type": "text", "text"}`, `{"type": "image_url", "image_url": {"url"}}` (a data URL for local images),
`{"type": "input_audio", "input_audio": {"data": base64, "format"}}`, `{"type": "video_url", "video_url": {"url"}}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

Part = dict[str, Any]


class Message(TypedDict):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str | list[Part]


@dataclass(frozen=True, kw_only=True)
class Schema:
    """The JSON schema that a reply must follow. `name` has letters, digits, _ and - only."""

    name: str
    schema: Mapping[str, Any]


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
    not say them; `seconds` is the time of the attempt that succeeded, 0 from the cache.
    """

    text: str
    finish: str | None
    tokens_in: int | None
    tokens_out: int | None
    model: str | None
    seconds: float = 0.0
    cached: bool = False


def count(value: Any) -> int | None:
    """A token count as servers give it, or None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
