"""Chat completions token by token: what vLLM adds to OpenAI's API, and training on a server's samples needs.

With `return_token_ids` and `logprobs` a reply names the tokens of its prompt, and of each of its `n` choices the tokens
and their log-probabilities. A server that knows neither leaves them out, which is for the reader to refuse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hba.remote.openai import OpenAI
from hba.remote.request import Reply


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One answer of several to the same prompt; None for what the server does not say."""

    token_ids: tuple[int, ...] | None
    logps: tuple[float, ...] | None  # of these tokens, natural logarithm
    finish: str | None


@dataclass(frozen=True, kw_only=True)
class TokenReply(Reply):
    """A reply whose tokens are known; its text is that of the first choice."""

    prompt_token_ids: tuple[int, ...] | None
    choices: tuple[Choice, ...]


class TokenChat(OpenAI):
    """A `Provider` whose replies are `TokenReply`."""

    def read(self, data: Any) -> TokenReply:
        """The reply in a decoded body. Raises ValueError, KeyError, TypeError or IndexError when it is none."""
        prompt = data.get("prompt_token_ids")
        return TokenReply(
            **asdict(super().read(data)),
            prompt_token_ids=None if prompt is None else _ids(prompt),
            choices=tuple(_choice(each) for each in sorted(data["choices"], key=lambda choice: choice["index"])),
        )


def _choice(choice: Any) -> Choice:
    ids, content = choice.get("token_ids"), (choice.get("logprobs") or {}).get("content")
    return Choice(
        token_ids=None if ids is None else _ids(ids),
        logps=None if content is None else tuple(float(token["logprob"]) for token in content),
        finish=choice.get("finish_reason"),
    )


def _ids(values: Sequence[Any]) -> tuple[int, ...]:
    return tuple(int(value) for value in values)
