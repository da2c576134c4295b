"""The messages API of Anthropic: text and images; a structured reply is the input of a tool that must be called."""

from __future__ import annotations

import json
from typing import Any

from hba.errors import InputError
from hba.remote.request import ChatRequest, Message, Part, Reply, count

VERSION = "2023-06-01"


class Anthropic:
    """A `Provider`."""

    name = "anthropic"
    key_env = "ANTHROPIC_API_KEY"
    base_url = "https://api.anthropic.com/v1"

    def path(self, model: str) -> str:
        """Below the base URL."""
        return "/messages"

    def headers(self, key: str) -> dict[str, str]:
        """What carries the key."""
        return {"x-api-key": key, "anthropic-version": VERSION}

    def body(self, model: str, request: ChatRequest, *, official: bool) -> dict[str, Any]:
        """The JSON body. Raises InputError for a part that the API does not take (audio, video)."""
        system = [_text(message) for message in request.messages if message["role"] == "system"]
        turns = [
            {"role": message["role"], "content": _content(message["content"])}
            for message in request.messages
            if message["role"] != "system"
        ]
        body: dict[str, Any] = {"model": model, "messages": turns, "max_tokens": request.max_tokens}
        sampling = {"temperature": request.temperature, "top_p": request.top_p}
        body |= {name: value for name, value in sampling.items() if value is not None}
        if system:
            body["system"] = "\n\n".join(system)
        if request.schema is not None:
            named = {"name": request.schema.name, "input_schema": dict(request.schema.schema)}
            body["tools"] = [named | {"description": "Give the answer."}]
            body["tool_choice"] = {"type": "tool", "name": request.schema.name}
        return body | dict(request.extra)

    def read(self, data: Any) -> Reply:
        """The reply in a decoded body. Raises ValueError, KeyError, TypeError or IndexError when it is none."""
        calls, texts = [], []
        for block in data["content"]:
            if block["type"] == "tool_use":
                calls.append(json.dumps(block["input"], ensure_ascii=False))
            elif block["type"] == "text":
                texts.append(block["text"])
        usage = data.get("usage") or {}
        return Reply(
            text="\n".join(calls) if calls else "".join(texts),
            finish=data.get("stop_reason"),
            tokens_in=_tokens_in(usage),
            tokens_out=count(usage.get("output_tokens")),
            model=data.get("model"),
        )


def _tokens_in(usage: dict[str, Any]) -> int | None:
    """Input tokens with those that went through the provider's own prompt cache."""
    names = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    counts = [count(usage.get(name)) for name in names]
    return None if counts[0] is None else sum(value or 0 for value in counts)


def _text(message: Message) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _content(content: str | list[Part]) -> str | list[Part]:
    return content if isinstance(content, str) else [_part(part) for part in content]


def _part(part: Part) -> Part:
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    if part["type"] != "image_url":
        fix = "Give frames as images, or choose another provider."
        raise InputError(f"the anthropic API takes no {part['type']}", fix=fix)
    url = part["image_url"]["url"]
    if not url.startswith("data:"):
        return {"type": "image", "source": {"type": "url", "url": url}}
    kind, _, data = url.removeprefix("data:").partition(";base64,")
    return {"type": "image", "source": {"type": "base64", "media_type": kind, "data": data}}
