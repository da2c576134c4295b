"""The chat completions API of OpenAI, and of every server that speaks it (vLLM, SGLang, `transformers serve`, ...)."""

from __future__ import annotations

from typing import Any

from hba.remote.request import ChatRequest, Reply, count


class OpenAI:
    """A `Provider`. On OpenAI's own host the token limit is named as its current models want it."""

    name = "openai"
    key_env = "OPENAI_API_KEY"
    base_url = "https://api.openai.com/v1"

    def path(self, model: str) -> str:
        """Below the base URL."""
        return "/chat/completions"

    def headers(self, key: str) -> dict[str, str]:
        """What carries the key."""
        return {"authorization": f"Bearer {key}"}

    def body(self, model: str, request: ChatRequest, *, official: bool) -> dict[str, Any]:
        """The JSON body."""
        limit = "max_completion_tokens" if official else "max_tokens"  # other servers know the older name
        body: dict[str, Any] = {"model": model, "messages": list(request.messages), limit: request.max_tokens}
        sampling = {"temperature": request.temperature, "top_p": request.top_p}
        body |= {name: value for name, value in sampling.items() if value is not None}
        if request.schema is not None:
            named = {"name": request.schema.name, "schema": dict(request.schema.schema), "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": named}
        return body | dict(request.extra)

    def read(self, data: Any) -> Reply:
        """The reply in a decoded body. Raises ValueError, KeyError, TypeError or IndexError when it is none."""
        choice = data["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        content, refusal = message.get("content"), message.get("refusal")
        if isinstance(content, list):
            content = "".join(part["text"] for part in content if part.get("type") == "text")
        if content is None and isinstance(refusal, str):
            content, finish = refusal, "refusal"
        if content is None and finish in ("length", "content_filter"):
            content = ""  # all tokens went into reasoning, or the answer was withheld
        if not isinstance(content, str):
            raise ValueError(f"message.content is {type(content).__name__}")
        usage = data.get("usage") or {}
        return Reply(
            text=content,
            finish=finish,
            tokens_in=count(usage.get("prompt_tokens")),
            tokens_out=count(usage.get("completion_tokens")),
            model=data.get("model"),
        )
