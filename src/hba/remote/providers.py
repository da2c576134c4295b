"""The services by the API that they speak: where requests go, what carries the key, how bodies and replies read.

OpenAI's chat API is that of most servers (vLLM, SGLang, llama.cpp, Azure, gateways); Anthropic's and Google's are their
own. A reply that says less than it should is read as far as it goes: an empty answer that ended for a reason is an
answer, a body that is no reply raises ValueError, KeyError, TypeError, IndexError or AttributeError.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple, Protocol

import httpx

from hba.errors import ConfigError, InputError, nearest
from hba.remote.request import AZURE_HOSTS, AZURE_QUERY, ChatRequest, Choice, Message, Part, Reply, TokenReply, is_azure

MOST_TOKENS = 1 << 53  # what a JSON number holds exactly


class Urls(NamedTuple):
    """Where a service takes chats, and where it lists its models."""

    chat: str
    models: str


class ErrorInReplyError(Exception):
    """A reply whose choice is an error, as gateways send it; `error` is as the service gave it."""

    def __init__(self, error: Mapping[str, Any]) -> None:
        super().__init__(error)
        self.error = error


class Provider(Protocol):
    """One HTTP API. Everything that can fail in transport is the client's, not the provider's."""

    name: str
    base_url: str  # of the official service

    def key_env(self, base: str) -> str | None:
        """The variable with the key of the official service at `base`; None for anybody else's."""
        ...

    def urls(self, base: str, model: str) -> Urls:
        """Where requests go, below the base URL."""
        ...

    def headers(self, key: str, base: str) -> dict[str, str]:
        """The headers that carry the key and the version."""
        ...

    def body(self, model: str, request: ChatRequest, *, official: bool) -> dict[str, Any]:
        """The JSON body of a request. Raises InputError for a part that the API does not take."""
        ...

    def read(self, data: Any) -> Reply:
        """The reply in a decoded body."""
        ...


def count(value: Any) -> int | None:
    """A token count as servers give it, or None for anything else."""
    known = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MOST_TOKENS
    return value if known else None


def word(value: Any) -> str | None:
    """A name or reason as servers give it, or None for anything else."""
    return value if isinstance(value, str) and value else None


def _sampling(request: ChatRequest, top_p: str = "top_p") -> dict[str, Any]:
    """What of a request's sampling is not left to the server, where `top_p` is called so."""
    found = {"temperature": request.temperature, top_p: request.top_p}
    return {name: value for name, value in found.items() if value is not None}


def _turns(request: ChatRequest, *, system: bool) -> list[Message]:
    """The messages that are the system's, or those that are not."""
    return [message for message in request.messages if (message["role"] == "system") == system]


def _inline(url: str) -> tuple[str, str] | None:
    """Type and base64 data of a data URL; None for another address."""
    kind, _, data = url.removeprefix("data:").partition(";base64,")
    return (kind, data) if url.startswith("data:") else None


# --- OpenAI, Azure, and every server that speaks their API ---


class OpenAI:
    """A `Provider`. On OpenAI's own host the token limit is named as its current models want it.

    Azure's addresses are taken in each of their forms: the resource (https://R.openai.azure.com), which has the current
    API at /openai/v1 and, with `?api-version=V`, a deployment by the model's name; a deployment's own address; and the
    whole target that the portal shows. Its key goes as `api-key`, a token of Entra ID as a bearer.
    """

    name = "openai"
    base_url = "https://api.openai.com/v1"

    def key_env(self, base: str) -> str | None:
        """OpenAI's own, and Azure's at its hosts (not at a gateway that only has the form)."""
        if base == self.base_url:
            return "OPENAI_API_KEY"
        return "AZURE_OPENAI_API_KEY" if httpx.URL(base).host.endswith(AZURE_HOSTS) else None

    def urls(self, base: str, model: str) -> Urls:
        """Below the base URL, whose query stays; of Azure's resource, the path that it leaves out."""
        url = httpx.URL(base)
        chat = models = url.path.rstrip("/").removesuffix("/chat/completions")
        if is_azure(url):
            if chat in ("", "/openai"):
                chat = f"/openai/deployments/{model}" if AZURE_QUERY in url.params else "/openai/v1"
            models = chat.partition("/deployments/")[0]
        targets = (f"{chat}/chat/completions", f"{models}/models")
        return Urls(*(str(url.copy_with(path=path)) for path in targets))

    def headers(self, key: str, base: str) -> dict[str, str]:
        token = key.startswith("eyJ") and key.count(".") == 2
        return {"api-key": key} if is_azure(httpx.URL(base)) and not token else {"authorization": f"Bearer {key}"}

    def body(self, model: str, request: ChatRequest, *, official: bool) -> dict[str, Any]:
        limit = "max_completion_tokens" if official else "max_tokens"  # other servers know the older name
        body: dict[str, Any] = {"model": model, "messages": list(request.messages), limit: request.max_tokens}
        body |= _sampling(request)
        if request.schema is not None:
            named = {"name": request.schema.name, "schema": dict(request.schema.schema), "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": named}
        return body | dict(request.extra)

    def read(self, data: Any) -> Reply:
        choice = data["choices"][0]
        finish = word(choice.get("finish_reason"))
        if finish == "error" or isinstance(choice.get("error"), dict):
            raise ErrorInReplyError(choice.get("error") or {"message": "the choice ended with an error"})
        message = choice["message"]
        content, refusal = message.get("content"), message.get("refusal")
        if isinstance(content, list):
            content = "".join(part["text"] for part in content if part.get("type") == "text")
        if content is None and word(refusal):
            content, finish = refusal, "refusal"
        if content is None and finish is not None:
            content = ""  # nothing was said: all tokens went into thinking, or the answer was withheld
        if not isinstance(content, str):
            raise ValueError(f"message.content is {type(content).__name__}")
        usage = data.get("usage") or {}
        return Reply(
            text=content,
            finish=finish,
            tokens_in=count(usage.get("prompt_tokens")),
            tokens_out=count(usage.get("completion_tokens")),
            model=word(data.get("model")),
        )


class TokenChat(OpenAI):
    """OpenAI's API token by token, as vLLM extends it and training on a server's samples needs it.

    With `return_token_ids` and `logprobs` a reply names the tokens of its prompt, and of each of its `n` choices the
    tokens and their log-probabilities. A server that knows neither leaves them out, which is for the reader to refuse.
    """

    def read(self, data: Any) -> TokenReply:
        prompt = data.get("prompt_token_ids")
        return TokenReply(
            **asdict(super().read(data)),
            prompt_token_ids=None if prompt is None else tuple(map(int, prompt)),
            prompt_logps=_prompt_logps(data.get("prompt_logprobs"), prompt),
            choices=tuple(_choice(each) for each in sorted(data["choices"], key=lambda choice: choice["index"])),
        )


def _choice(choice: Any) -> Choice:
    ids, content = choice.get("token_ids"), (choice.get("logprobs") or {}).get("content")
    return Choice(
        token_ids=None if ids is None else tuple(map(int, ids)),
        logps=None if content is None else tuple(float(token["logprob"]) for token in content),
        finish=choice.get("finish_reason"),
    )


def _prompt_logps(told: Any, ids: Sequence[Any] | None) -> tuple[float | None, ...] | None:
    """The log-probability of each token of a prompt, of which a server names the likeliest beside it."""
    if told is None or ids is None:
        return None
    pairs = zip(told, ids, strict=True)
    return tuple(None if each is None else float(each[str(token)]["logprob"]) for each, token in pairs)


# --- Anthropic ---


class Anthropic:
    """A `Provider` for text and images. A structured reply is the input of a tool that must be called."""

    name = "anthropic"
    base_url = "https://api.anthropic.com/v1"
    version = "2023-06-01"

    def key_env(self, base: str) -> str | None:
        return "ANTHROPIC_API_KEY" if base == self.base_url else None

    def urls(self, base: str, model: str) -> Urls:
        base = base.rstrip("/").removesuffix("/messages")
        return Urls(f"{base}/messages", f"{base}/models")

    def headers(self, key: str, base: str) -> dict[str, str]:
        return {"x-api-key": key, "anthropic-version": self.version}

    def body(self, model: str, request: ChatRequest, *, official: bool) -> dict[str, Any]:
        system = [_anthropic_text(message) for message in _turns(request, system=True)]
        turns = [
            {"role": message["role"], "content": _anthropic_content(message["content"])}
            for message in _turns(request, system=False)
        ]
        body: dict[str, Any] = {"model": model, "messages": turns, "max_tokens": request.max_tokens}
        body |= _sampling(request)
        if system:
            body["system"] = "\n\n".join(system)
        if request.schema is not None:
            named = {"name": request.schema.name, "input_schema": dict(request.schema.schema)}
            body["tools"] = [named | {"description": "Give the answer."}]
            body["tool_choice"] = {"type": "tool", "name": request.schema.name}
        return body | dict(request.extra)

    def read(self, data: Any) -> Reply:
        """The reply in a decoded body; thinking is no part of it."""
        calls, texts = [], []
        for block in data["content"]:
            if block["type"] == "tool_use":
                calls.append(json.dumps(block["input"], ensure_ascii=False))
            elif block["type"] == "text":
                texts.append(block["text"])
        finish = word(data.get("stop_reason"))
        if finish is None and not calls and not texts:
            raise ValueError("neither a text nor the reason of its absence")
        usage = data.get("usage") or {}
        return Reply(
            text="\n".join(calls) if calls else "".join(texts),
            finish=finish,
            tokens_in=_anthropic_tokens_in(usage),
            tokens_out=count(usage.get("output_tokens")),
            model=word(data.get("model")),
        )


def _anthropic_tokens_in(usage: dict[str, Any]) -> int | None:
    """Input tokens with those that went through the provider's own prompt cache."""
    names = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    counts = [count(usage.get(name)) for name in names]
    return None if counts[0] is None else sum(value or 0 for value in counts)


def _anthropic_text(message: Message) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _anthropic_content(content: str | list[Part]) -> str | list[Part]:
    return content if isinstance(content, str) else [_anthropic_part(part) for part in content]


def _anthropic_part(part: Part) -> Part:
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    if part["type"] != "image_url":
        fix = "Give frames as images, or choose another provider."
        raise InputError(f"the anthropic API takes no {part['type']}", fix=fix)
    url = part["image_url"]["url"]
    if (inline := _inline(url)) is None:
        return {"type": "image", "source": {"type": "url", "url": url}}
    return {"type": "image", "source": {"type": "base64", "media_type": inline[0], "data": inline[1]}}


# --- Google ---


class Google:
    """A `Provider` for the Gemini API (generateContent): text, images, sound and clips, all inline."""

    name = "google"
    base_url = "https://generativelanguage.googleapis.com/v1beta"
    roles = {"user": "user", "assistant": "model"}  # noqa: RUF012 - read only

    def key_env(self, base: str) -> str | None:
        return "GEMINI_API_KEY" if base == self.base_url else None

    def urls(self, base: str, model: str) -> Urls:
        base, name = base.rstrip("/"), model.removeprefix("models/")
        return Urls(f"{base}/models/{name}:generateContent", f"{base}/models")

    def headers(self, key: str, base: str) -> dict[str, str]:
        return {"x-goog-api-key": key}

    def body(self, model: str, request: ChatRequest, *, official: bool) -> dict[str, Any]:
        system = _turns(request, system=True)
        turns = [
            {"role": self.roles[message["role"]], "parts": _google_parts(message)}
            for message in _turns(request, system=False)
        ]
        settings: dict[str, Any] = {"maxOutputTokens": request.max_tokens} | _sampling(request, "topP")
        if request.schema is not None:
            settings |= {"responseMimeType": "application/json", "responseJsonSchema": dict(request.schema.schema)}
        body: dict[str, Any] = {"contents": turns, "generationConfig": settings}
        if system:
            body["systemInstruction"] = {"parts": [part for message in system for part in _google_parts(message)]}
        return body | dict(request.extra)

    def read(self, data: Any) -> Reply:
        """The reply in a decoded body; a prompt that was blocked has an empty text and the reason of the block."""
        usage = data.get("usageMetadata") or {}
        blocked = word((data.get("promptFeedback") or {}).get("blockReason"))
        candidate = {} if blocked and not data.get("candidates") else data["candidates"][0]
        finish = word(candidate.get("finishReason")) or blocked
        parts = (candidate.get("content") or {}).get("parts")
        if parts is None and finish is None:
            raise ValueError("neither a text nor the reason of its absence")
        answer = count(usage.get("candidatesTokenCount"))
        thought = count(usage.get("thoughtsTokenCount")) or 0  # paid as output, too
        return Reply(
            text="".join(part.get("text", "") for part in parts or () if not part.get("thought")),
            finish=finish,
            tokens_in=count(usage.get("promptTokenCount")),
            tokens_out=None if answer is None else answer + thought,
            model=word(data.get("modelVersion")),
        )


def _google_parts(message: Message) -> list[Part]:
    content = message["content"]
    return [{"text": content}] if isinstance(content, str) else [_google_part(part) for part in content]


def _google_part(part: Part) -> Part:
    kind = part["type"]
    if kind == "text":
        return {"text": part["text"]}
    if kind == "input_audio":
        sound = part["input_audio"]
        return {"inlineData": {"mimeType": f"audio/{sound['format']}", "data": sound["data"]}}
    if (inline := _inline(part[kind]["url"])) is None:
        raise InputError("the google API takes media inline", fix="Give a data URL.")
    return {"inlineData": {"mimeType": inline[0], "data": inline[1]}}


PROVIDERS: dict[str, Provider] = {"openai": OpenAI(), "anthropic": Anthropic(), "google": Google()}


def provider(name: str) -> Provider:
    """The provider of that name. Raises ConfigError listing the known ones."""
    if name not in PROVIDERS:
        raise ConfigError(f"no provider {name!r}", where="--backend", fix=nearest(name, PROVIDERS))
    return PROVIDERS[name]
