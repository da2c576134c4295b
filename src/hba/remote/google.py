"""The Gemini API of Google (generateContent): text, images, sound and clips, all inline."""

from __future__ import annotations

from typing import Any

from hba.errors import InputError
from hba.remote.request import ChatRequest, Message, Part, Reply, count

ROLES = {"user": "user", "assistant": "model"}


class Google:
    """A `Provider`."""

    name = "google"
    key_env = "GEMINI_API_KEY"
    base_url = "https://generativelanguage.googleapis.com/v1beta"

    def path(self, model: str) -> str:
        """Below the base URL."""
        return f"/models/{model}:generateContent"

    def headers(self, key: str) -> dict[str, str]:
        """What carries the key."""
        return {"x-goog-api-key": key}

    def body(self, model: str, request: ChatRequest, *, official: bool) -> dict[str, Any]:
        """The JSON body. Raises InputError for a medium that is not inline."""
        system = [part for message in request.messages if message["role"] == "system" for part in _parts(message)]
        turns = [
            {"role": ROLES[message["role"]], "parts": _parts(message)}
            for message in request.messages
            if message["role"] != "system"
        ]
        settings: dict[str, Any] = {"maxOutputTokens": request.max_tokens}
        sampling = {"temperature": request.temperature, "topP": request.top_p}
        settings |= {name: value for name, value in sampling.items() if value is not None}
        if request.schema is not None:
            settings |= {"responseMimeType": "application/json", "responseJsonSchema": dict(request.schema.schema)}
        body: dict[str, Any] = {"contents": turns, "generationConfig": settings}
        if system:
            body["systemInstruction"] = {"parts": system}
        return body | dict(request.extra)

    def read(self, data: Any) -> Reply:
        """The reply in a decoded body. Raises ValueError, KeyError, TypeError or IndexError when it is none."""
        usage = data.get("usageMetadata") or {}
        text, finish = _said(data)
        return Reply(
            text=text,
            finish=finish,
            tokens_in=count(usage.get("promptTokenCount")),
            tokens_out=_tokens_out(usage),
            model=data.get("modelVersion"),
        )


def _said(data: Any) -> tuple[str, str | None]:
    """Text and the reason of its end; a prompt that was blocked has an empty text and the reason of the block."""
    blocked = (data.get("promptFeedback") or {}).get("blockReason")
    if blocked is not None and not data.get("candidates"):
        return "", str(blocked)
    candidate = data["candidates"][0]
    finish = candidate.get("finishReason")
    parts = (candidate.get("content") or {}).get("parts")
    if parts is None and finish is None:
        raise ValueError("neither a text nor the reason of its absence")
    return "".join(part.get("text", "") for part in parts or () if not part.get("thought")), finish


def _tokens_out(usage: dict[str, Any]) -> int | None:
    """Tokens of the answer and of the thinking, which is paid as output, too."""
    answer = count(usage.get("candidatesTokenCount"))
    return None if answer is None else answer + (count(usage.get("thoughtsTokenCount")) or 0)


def _parts(message: Message) -> list[Part]:
    content = message["content"]
    return [{"text": content}] if isinstance(content, str) else [_part(part) for part in content]


def _part(part: Part) -> Part:
    kind = part["type"]
    if kind == "text":
        return {"text": part["text"]}
    if kind == "input_audio":
        sound = part["input_audio"]
        return {"inlineData": {"mimeType": f"audio/{sound['format']}", "data": sound["data"]}}
    url = part[kind]["url"]
    if not url.startswith("data:"):
        raise InputError("the google API takes media inline", fix="Give a data URL.")
    mime, _, data = url.removeprefix("data:").partition(";base64,")
    return {"inlineData": {"mimeType": mime, "data": data}}
