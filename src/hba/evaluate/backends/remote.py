"""Models behind an API: any OpenAI-compatible server, Anthropic's, Google's.

A sample becomes one chat request: the problem in the answer format, each medium where its tag stands. Sound goes as a
16 kHz wav (input_audio), an image as a lossless PNG of at most `encode.max_pixels`, a clip as the frames that the
loader takes, with their times, or as its file (`video=file`). Media are prepared by as many threads as there are cores
while requests go out as the client's adaptive limit allows.

What fails for one sample is that sample's: a request that the server refuses gives an output with its error, a medium
that cannot be read quarantines its sample. What fails for all is nobody's: refusals are handed out once the server has
answered another request, so that those of a run that it stops (a parameter, an empty account) are never kept.
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import current_thread, main_thread
from types import FrameType
from typing import Any, TypeVar

from hba.atlas import Atlas
from hba.atlas.rows import Quarantined, Sample, SilentClips
from hba.batch.config import messages_of, sound_of_clips
from hba.batch.prompt import FormatMix
from hba.batch.sampler import Indices
from hba.environment import usable_cores
from hba.errors import ConfigError, InputError, MediaError
from hba.evaluate.backends.interface import (
    Answered,
    Output,
    Result,
    Unanswered,
    choices,
    likeliest,
    one_by_one,
    samples,
    spoken,
)
from hba.evaluate.backends.wire import WIRE_VERSION, filled, media_parts
from hba.evaluate.config import Opening
from hba.remote import (
    ChatRequest,
    ClientConfig,
    RemoteClient,
    Reply,
    RequestError,
    Schema,
    UnansweredError,
    bounded,
    settled,
)
from hba.remote.providers import PROVIDERS, TokenChat
from hba.remote.request import Message, TokenReply
from hba.taxonomy import Taxonomy

T = TypeVar("T")


class RemoteBackend:
    """A `Backend` over one remote model. Raises ConfigError for a bad URL or a missing key."""

    free_form = True
    domains = None

    def __init__(self, name: str, opening: Opening) -> None:
        self.name, self._opening = name, opening
        self._settings, self._encode = opening.config.generation, opening.encode
        self._wording, self._silent = FormatMix([self._settings.asked]), SilentClips()
        remote: ClientConfig = replace(opening.config.remote, provider=name)  # type: ignore[arg-type]
        weighs = self._settings.read == "likelihood"  # the cache keeps no tokens
        self._client = RemoteClient(
            opening.model, replace(remote, cache=None) if weighs else remote, TokenChat() if weighs else None
        )
        self.meter = self._client.meter

    def identity(self) -> Mapping[str, Any]:
        """Model, prompt and sampling; not where the server runs, which a restart may change."""
        media = {"video": self._opening.config.video, "wire": WIRE_VERSION}
        bound = {} if self._settings.constrain == "none" else {"constrain_by": self._settings.constrain_by}
        return {"model": self._opening.model, **self._settings.identity(), **media, **bound}

    def batches(self, _atlas: Atlas, rows: Indices) -> Sequence[Indices]:
        return one_by_one(rows)

    def answers(self, atlas: Atlas, batches: Sequence[Indices], done: Set[str]) -> Iterator[Result]:
        """In the order in which replies come."""
        return drained(self._answers(atlas, batches, done))

    async def _answers(self, atlas: Atlas, batches: Sequence[Indices], done: Set[str]) -> AsyncGenerator[Result, None]:
        threads = usable_cores()
        ready = asyncio.Semaphore(threads)

        async def ask(sample: Sample) -> Result:
            async with ready:
                request = await asyncio.get_running_loop().run_in_executor(pool, self._prepared, sample)
            return request if isinstance(request, Quarantined) else await self._ask(sample, request, atlas.taxonomy)

        pool = ThreadPoolExecutor(threads)
        try:
            async with self._client:
                width = self._opening.config.remote.max_concurrency + threads
                results = bounded(samples(atlas, batches, done), ask, width)
                async for result in settled(self._client, results, _is_refused):
                    yield result
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            self._silent.say()

    def _prepared(self, sample: Sample) -> ChatRequest | Quarantined:
        try:
            with sample.blamed():
                return self.request(sample)
        except MediaError as error:
            return sample.quarantined(error)

    def request(self, sample: Sample) -> ChatRequest:
        """What is sent for a sample. Raises MediaError for a medium that cannot be read."""
        parts = media_parts(sample, self._encode, video=self._opening.config.video)
        sounds = len(parts["audio"])
        if sounds < sample.videos and sound_of_clips(sample, self._encode) != "off":
            self._silent.add(sample)
        settings = self._settings
        sampled = settings.temperature != 0
        bound = _bound(self.offered(sample), settings.constrain_by)
        return ChatRequest(
            messages=filled(messages_of(sample, self._encode, self._wording, sounds=sounds), parts),
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
        if self._settings.constrain == "none" or self._settings.read == "likelihood":
            return {}
        return choices(sample, self._opening.atlas.taxonomy, self._wording)

    async def _ask(self, sample: Sample, request: ChatRequest, taxonomy: Taxonomy) -> Result:
        try:
            if self._settings.read == "likelihood":
                texts = choices(sample, taxonomy, self._wording)
                if texts:
                    return Answered(sample, likeliest(texts, await self._logps(request, list(texts.values()))))
            reply = await self._client.complete(request)
        except UnansweredError as error:
            return Unanswered(sample, error.what)
        except RequestError as error:
            return Answered(sample, Output(error=error.what))
        _require_bound(self.offered(sample), reply, self._settings.constrain_by)
        known = {name: getattr(reply, name) for name in ("tokens_in", "tokens_out", "seconds", "finish", "model")}
        known["left_out"] = reply.left_out
        return Answered(sample, spoken(sample, reply.text, taxonomy, **known))

    async def _logps(self, request: ChatRequest, texts: Sequence[str]) -> list[float]:
        """The log-probability of each text as the answer to a request, the end of the turn included, in nats.

        vLLM tells the log-probabilities of a prompt, of which a given answer is a part. Raises InputError for a server
        that does not, and for a chat template that asks otherwise where an answer is given.
        """

        async def told(*said: str, **how: Any) -> TokenReply:
            answer: list[Message] = [{"role": "assistant", "content": text} for text in said]
            extra = {**request.extra, "return_token_ids": True, **how}
            asked = replace(request, messages=[*request.messages, *answer], max_tokens=1, extra=extra)
            reply = await self._client.complete(asked)
            if not isinstance(reply, TokenReply) or reply.prompt_token_ids is None:
                raise InputError("the server does not tell the tokens of a prompt", where="generation.read", fix=_VLLM)
            return reply

        prompt = (await told()).prompt_token_ids or ()
        found = []
        for text in texts:
            whole = await told(text, prompt_logprobs=0, add_generation_prompt=False)
            open_ended = await told(text, add_generation_prompt=False, continue_final_message=True)
            end = len(open_ended.prompt_token_ids or ())
            ids, logps = whole.prompt_token_ids or (), whole.prompt_logps
            if logps is None:
                what = "the server gives no log-probabilities of a prompt"
                raise InputError(what, where="generation.read", fix=_VLLM)
            if ids[: len(prompt)] != prompt or end <= len(prompt) or ids[:end] != open_ended.prompt_token_ids:
                what = "the chat template writes a given answer otherwise than one that it asks for"
                raise InputError(what, where="generation.read", fix=_VLLM)
            found.append(sum(logp or 0.0 for logp in logps[len(prompt) : end + 1]))
        return found


def _is_refused(result: Result) -> bool:
    return isinstance(result, Answered) and result.output.error is not None


_VLLM = "Serve the model with vLLM, or use --backend hf or generation.constrain=labels."


def _bound(offered: Mapping[str, str], form: str) -> dict[str, Any]:
    """What a request has that lets the server give nothing but the offered texts, in the form that the server takes."""
    texts = list(offered.values())
    if not texts:
        return {}
    if form == "json_schema":
        answer = {"type": "string", "enum": texts}
        whole = {"type": "object", "properties": {"answer": answer}, "required": ["answer"]}
        return {"schema": Schema(name="answer", schema={**whole, "additionalProperties": False}, needed=True)}
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
        except (ValueError, KeyError, TypeError, RecursionError):
            said = ""
    fits = said.startswith("{") if form == "json_schema" else any(text.startswith(said) for text in texts)
    if said not in texts and not (cut and fits):
        what = f"the server does not hold to generation.constrain_by={form}: it said {reply.text[:80]!r}"
        fix = "Use another of json_schema, choice, guided_choice and grammar, or generation.constrain=none."
        raise InputError(what, where="generation.constrain", fix=fix)


def drained(source: AsyncGenerator[T, None]) -> Iterator[T]:
    """What an asynchronous generator yields, for a caller that is not asynchronous.

    Ctrl-C cancels the work that is under way and lets it come to its own ending before it is raised; a second one is
    raised at once.
    """
    loop = asyncio.new_event_loop()
    drawing: asyncio.Task[T | None] | None = None
    interrupted = False

    async def draw() -> T | None:
        return await anext(source, None)

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted:
            signal.default_int_handler(number, frame)
        interrupted = True
        if drawing is not None:
            drawing.cancel()
        loop.call_soon_threadsafe(lambda: None)  # wakes it

    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler and current_thread() is main_thread()
    if ours:
        signal.signal(signal.SIGINT, interrupt)
    try:
        while not interrupted:
            drawing = loop.create_task(draw())
            try:
                item = loop.run_until_complete(drawing)
            except asyncio.CancelledError:
                break
            if item is None:
                return
            yield item
        raise KeyboardInterrupt
    finally:
        loop.run_until_complete(source.aclose())
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def check_media(name: str, opening: Opening) -> None:
    """Raises InputError when the API cannot take the media of the rows, or their sound as it is asked for."""
    encode, columns = opening.encode, opening.atlas.columns
    heard = encode.sound_of_clips != "off" and "audio" in encode.modalities
    if name in PROVIDERS and heard and columns.num_videos.any():
        if encode.sound_of_clips == "interleaved":
            what, fix = "no API takes sound among the frames of a clip", "Use encode.sound_of_clips=separate."
            raise InputError(what, where="encode.sound_of_clips", fix=fix)
        if opening.config.video == "file":
            what, fix = "with video=file a clip brings its sound along", "Leave encode.sound_of_clips off."
            raise InputError(what, where="encode.sound_of_clips", fix=fix)
    if name != "anthropic":
        return
    sounds = columns.num_audios + columns.num_videos if heard else columns.num_audios
    refused = {"audio": sounds, "video": columns.num_videos}
    if opening.config.video == "frames":
        del refused["video"]
    for modality, counts_N in refused.items():
        if modality in encode.modalities and counts_N.any():
            fix = "Leave it out with --modalities video (the prompt keeps its text)."
            raise InputError(f"the anthropic API takes no {modality}, but rows have it", where="--backend", fix=fix)


def open_backend(name: str, opening: Opening) -> RemoteBackend:
    """The remote model. Raises InputError when the API cannot take the media of the rows, or how it is to be bound."""
    spoken_there = opening.config.remote.provider
    if spoken_there not in (ClientConfig().provider, name):
        fix = f"Leave it out: --backend says which API is spoken, here {name}."
        raise ConfigError(f"the API of {spoken_there}, not of the backend", where="remote.provider", fix=fix)
    check_media(name, opening)
    generation = opening.config.generation
    if generation.read == "likelihood" and name != "openai":
        what = f"the {name} API gives no log-probabilities of a prompt"
        raise InputError(what, where="generation.read", fix=_VLLM)
    if generation.constrain == "labels" and name != "openai" and generation.constrain_by != "json_schema":
        what = f"the {name} API takes no {generation.constrain_by}"
        raise InputError(what, where="generation.constrain_by", fix="Use generation.constrain_by=json_schema.")
    return RemoteBackend(name, opening)
