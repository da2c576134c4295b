"""Models behind an API: any OpenAI-compatible server, and Anthropic's.

A sample becomes one chat request: the problem in the answer format, each medium where its tag stands. Sound goes as a
16 kHz wav (input_audio), an image as a lossless PNG of at most `encode.max_pixels`, a clip as the frames that the
loader takes, with their times, or as its file (`video=file`). Requests go out as the client's adaptive limit allows; a
request that is refused, or fails at every attempt, gives an output with its error, and a medium that cannot be read
quarantines its sample. A server of which nothing can be expected stops the run, which can be resumed.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from hba.atlas import Atlas
from hba.atlas.answer_format import FormatMix
from hba.atlas.batch import messages_of
from hba.atlas.sample import Quarantined, Sample
from hba.atlas.sampler import Indices
from hba.errors import InputError, MediaError
from hba.evaluate.backends.interface import Answered, Output, Result, choices, samples, spoken
from hba.evaluate.backends.wire import WIRE_VERSION, filled, media_parts
from hba.evaluate.config import Opening
from hba.remote import ChatRequest, RemoteClient, Reply, RequestError, Schema, bounded
from hba.taxonomy import Taxonomy

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class _Question:
    """A sample, ready to be sent."""

    sample: Sample
    request: ChatRequest


class RemoteBackend:
    """A `Backend` over one remote model. Raises ConfigError for a bad URL or a missing key."""

    free_form = True
    domains = None

    def __init__(self, name: str, opening: Opening) -> None:
        self.name, self._opening = name, opening
        self._settings, self._encode = opening.config.generation, opening.encode
        self._wording = FormatMix([self._settings.asked])
        self._client = RemoteClient(opening.model, replace(opening.config.remote, provider=name))  # type: ignore[arg-type]
        self.meter = self._client.meter

    def identity(self) -> Mapping[str, Any]:
        """Model, prompt and sampling; not where the server runs, which a restart may change."""
        media = {"video": self._opening.config.video, "wire": WIRE_VERSION}
        bound = {} if self._settings.constrain == "none" else {"constrain_by": self._settings.constrain_by}
        return {"model": self._opening.model, **self._settings.identity(), **media, **bound}

    def answers(self, atlas: Atlas, rows: Indices, done: Set[str]) -> Iterator[Result]:
        """In the order in which replies come."""
        return drained(self._answers(atlas, rows, done))

    async def _answers(self, atlas: Atlas, rows: Indices, done: Set[str]) -> AsyncGenerator[Result, None]:
        async def ask(question: _Question | Quarantined) -> Result:
            return question if isinstance(question, Quarantined) else await self._ask(question, atlas.taxonomy)

        async with self._client:
            width = self._opening.config.remote.max_concurrency
            async for result in bounded(self._questions(atlas, rows, done), ask, width):
                yield result

    def _questions(self, atlas: Atlas, rows: Indices, done: Set[str]) -> Iterator[_Question | Quarantined]:
        for sample in samples(atlas, rows, done):
            try:
                yield _Question(sample=sample, request=self.request(sample))
            except MediaError as error:
                yield sample.quarantined(error)

    def request(self, sample: Sample) -> ChatRequest:
        """What is sent for a sample. Raises MediaError for a medium that cannot be read."""
        parts = media_parts(sample, self._encode, video=self._opening.config.video)
        settings = self._settings
        sampled = settings.temperature != 0
        bound = _bound(self.offered(sample), settings.constrain_by)
        return ChatRequest(
            messages=filled(messages_of(sample, self._encode, self._wording), parts),
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p if sampled and settings.top_p < 1 else None,
            draw=settings.seed if sampled else 0,
            schema=bound.get("schema"),
            extra={
                **({"seed": settings.seed} if sampled and self.name == "openai" else {}),
                **bound.get("extra", {}),
                **(settings.extra or {}),
            },
        )

    def offered(self, sample: Sample) -> dict[str, str]:
        """The answers that a row may be given, label -> text; empty where it may be given any."""
        if self._settings.constrain == "none":
            return {}
        return choices(sample, self._opening.atlas.taxonomy, self._wording)

    async def _ask(self, question: _Question, taxonomy: Taxonomy) -> Result:
        try:
            reply = await self._client.complete(question.request)
        except RequestError as error:
            return Answered(question.sample, Output(text=None, answer=None, label=None, error=error.what))
        _require_bound(self.offered(question.sample), reply, self._settings.constrain_by)
        counts = {"tokens_in": reply.tokens_in, "tokens_out": reply.tokens_out, "seconds": reply.seconds}
        return Answered(question.sample, spoken(question.sample, reply.text, taxonomy, **counts))


def _bound(offered: Mapping[str, str], form: str) -> dict[str, Any]:
    """What a request has that lets the server give nothing but the offered texts, in the form that the server takes."""
    texts = list(offered.values())
    if not texts:
        return {}
    if form == "json_schema":
        answer = {"type": "string", "enum": texts}
        whole = {"type": "object", "properties": {"answer": answer}, "required": ["answer"]}
        return {"schema": Schema(name="answer", schema={**whole, "additionalProperties": False})}
    if form == "grammar":
        rule = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
        return {"extra": {"grammar": f"root ::= {rule}"}}
    return {"extra": {"structured_outputs": {"choice": texts}} if form == "choice" else {"guided_choice": texts}}


def _require_bound(offered: Mapping[str, str], reply: Reply, form: str) -> None:
    """Raises InputError for a reply that is none of the offered texts, nor the start of one that a limit cut off: the
    server does not do what it was asked. What a filter stopped says nothing of that."""
    finish = (reply.finish or "stop").lower()
    if not offered or finish not in ("stop", "end_turn", "tool_use", "length", "max_tokens"):
        return
    said, texts = reply.text.strip(), list(offered.values())
    cut = finish in ("length", "max_tokens")
    if form == "json_schema" and not cut:
        try:
            said = json.loads(said)["answer"]
        except (ValueError, KeyError, TypeError):
            said = ""
    fits = said.startswith("{") if form == "json_schema" else any(text.startswith(said) for text in texts)
    if said not in texts and not (cut and fits):
        what = f"the server does not hold to generation.constrain_by={form}: it said {reply.text[:80]!r}"
        fix = "Use another of json_schema, choice, guided_choice and grammar, or generation.constrain=none."
        raise InputError(what, where="generation.constrain", fix=fix)


def drained(source: AsyncGenerator[T, None]) -> Iterator[T]:
    """What an asynchronous generator yields, for a caller that is not asynchronous. Closed with its work cancelled."""
    loop = asyncio.new_event_loop()
    try:
        while True:
            try:
                item = loop.run_until_complete(anext(source))
            except StopAsyncIteration:
                return
            yield item
    finally:
        loop.run_until_complete(source.aclose())
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


def check_media(name: str, opening: Opening) -> None:
    """Raises InputError when the API cannot take the media of the rows."""
    if name != "anthropic":
        return
    refused = {"audio": opening.atlas.columns.num_audios, "video": opening.atlas.columns.num_videos}
    if opening.config.video == "frames":
        del refused["video"]
    for modality, counts_N in refused.items():
        if modality in opening.encode.modalities and counts_N.any():
            fix = "Leave it out with --modalities video (the prompt keeps its text)."
            raise InputError(f"the anthropic API takes no {modality}, but rows have it", where="--backend", fix=fix)


def open_backend(name: str, opening: Opening) -> RemoteBackend:
    """The remote model. Raises InputError when the API cannot take the media of the rows, or how it is to be bound."""
    check_media(name, opening)
    generation = opening.config.generation
    if generation.read == "likelihood":
        what = "a chat server gives no log-probabilities of a given answer"
        fix = "Use --backend hf, or generation.constrain=labels."
        raise InputError(what, where="generation.read", fix=fix)
    if generation.constrain == "labels" and name != "openai" and generation.constrain_by != "json_schema":
        what = f"the {name} API takes no {generation.constrain_by}"
        raise InputError(what, where="generation.constrain_by", fix="Use generation.constrain_by=json_schema.")
    return RemoteBackend(name, opening)
