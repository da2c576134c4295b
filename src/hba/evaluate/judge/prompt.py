"""From an item to the judge's request, and from its reply to a verdict.

The candidate answer is data. Every text stands on a line of its own as a JSON string in which line breaks, brackets,
angle brackets and everything invisible are escaped, so that it cannot end its line or imitate another; each line
begins with a code, the hash of the item's content and the attempt, which an author cannot know: an answer with its own
code in it would be a fixed point of SHA-256. The reply must carry the code. What a judge copies from an answer, says in
free text, or says of another item is no verdict.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hba.evaluate.judge.items import Item
from hba.remote import ChatRequest, Reply, Schema, UnusableReplyError
from hba.storage import json_sha256, whole

RUBRICS = Path(__file__).with_name("rubrics")
GENERAL = "general"
CODE_LETTERS = 16
SHOWN_CHARACTERS = 4000
REASON_CHARACTERS = 500
QUOTED_CHARACTERS = 120
_FENCED = re.compile(r"```(?:json)?\s*(\{.*\})\s*```", re.DOTALL)
_MARKS = "<>[]{}&`"  # of markup, of codes, of JSON, of templates

SCHEMA = Schema(
    name="verdict",
    schema={
        "type": "object",
        "properties": {"code": {"type": "string"}, "reason": {"type": "string"}, "correct": {"type": "boolean"}},
        "required": ["code", "reason", "correct"],
        "additionalProperties": False,
    },
)


class Verdict(NamedTuple):
    """What a judge decided."""

    correct: bool
    reason: str


def rubric_of(task: str | None) -> str:
    """The rubric for a task key such as SOC; a task without one has the general rubric."""
    name = (task or GENERAL).lower()
    return name if (RUBRICS / f"{name}.jinja").is_file() and name not in ("protocol", "item") else GENERAL


def rubrics_sha256() -> str:
    """Hash of everything that a judge is told."""
    return json_sha256({path.name: path.read_text(encoding="utf-8") for path in sorted(RUBRICS.glob("*.jinja"))})


@lru_cache(maxsize=1)
def _templates() -> Environment:
    # Not HTML: what is not ours goes through `quoted`.
    loader = FileSystemLoader(RUBRICS)
    return Environment(loader=loader, undefined=StrictUndefined, autoescape=False, trim_blocks=True)  # noqa: S701


@lru_cache(maxsize=16)
def instructions(rubric: str) -> str:
    """What the judge is told before it sees an item."""
    return _templates().get_template("protocol.jinja").render(rubric=f"{rubric}.jinja").strip()


def code_of(item: Item, attempt: int) -> str:
    """The code of the item at this attempt: 16 hex letters, the same in every process."""
    content = [item.id, item.question, item.reference, item.answer, item.task, attempt]
    return sha256(json.dumps(content).encode()).hexdigest()[:CODE_LETTERS]


def quoted(text: str) -> str:
    r"""`text` as one JSON string on one line, without markup or anything invisible: all such is a \u escape."""
    hidden = len(text) - SHOWN_CHARACTERS
    shown = text if hidden <= 0 else f"{text[:SHOWN_CHARACTERS]} (cut: {hidden} more characters)"
    return "".join(_escape(letter) for letter in json.dumps(shown, ensure_ascii=False))


def _escape(letter: str) -> str:
    if letter.isprintable() and letter not in _MARKS:
        return letter
    units = letter.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))


def request_for(
    item: Item,
    attempt: int,
    *,
    max_tokens: int,
    temperature: float | None,
    structured: bool,
    extra: Mapping[str, Any] | None = None,
) -> ChatRequest:
    """The request that asks for the verdict on `item`; another attempt is another request."""
    texts = {"item": item.id, "question": item.question, "reference": item.reference, "candidate": item.answer}
    data = {name: quoted(text) for name, text in texts.items()}
    message = _templates().get_template("item.jinja").render(code=code_of(item, attempt), **data)
    return ChatRequest(
        messages=[
            {"role": "system", "content": instructions(rubric_of(item.task))},
            {"role": "user", "content": message},
        ],
        max_tokens=max_tokens,
        temperature=temperature,
        schema=SCHEMA if structured else None,
        extra=extra or {},
    )


def read_verdict(reply: Reply, code: str) -> Verdict:
    """The verdict in a reply: exactly one JSON object with the item's `code`, a reason and true or false.

    A fence around the whole of it is allowed. Raises UnusableReplyError, which quotes the reply, for everything else,
    free text with the word "true" in it, several objects, repeated or further keys, and another item's verdict
    included.
    """
    text = reply.text.strip()
    fenced = _FENCED.fullmatch(text)
    try:
        found = json.loads(fenced[1] if fenced else text, object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        raise _unusable("not one JSON object", reply) from None
    if not isinstance(found, dict) or found.keys() != {"code", "reason", "correct"}:
        raise _unusable("not an object of code, reason and correct", reply)
    if found["code"] != code:
        raise _unusable("a verdict with another code", reply)
    if not isinstance(found["correct"], bool) or not isinstance(found["reason"], str):
        raise _unusable("correct is neither true nor false, or reason no text", reply)
    return Verdict(found["correct"], whole(found["reason"][:REASON_CHARACTERS]))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def _unusable(what: str, reply: Reply) -> UnusableReplyError:
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in reply.text).split())
    cut = f"{text[:QUOTED_CHARACTERS]}..." if len(text) > QUOTED_CHARACTERS else text
    ended = f" (it ended by {reply.finish})" if reply.finish else ""
    return UnusableReplyError(f"{what}: {cut!r}{ended}" if text else f"an empty reply{ended}")
