"""A vLLM server as the sampler: the policy's prompts and media over HTTP, and the very tokens that were drawn.

One request a prompt with `n` choices, seeded by the draws' name and the prompt's place, so that a resumed run asks for
what an uninterrupted one does. Media go bit for bit as the policy's own encoder gets them. The server says which tokens
it saw and drew: prompts that are not the policy's, tokens that were not asked for and answers without tokens end the
run with one error. Nothing is tokenised again and no reply is cached.

A server that is overloaded or away for a while is asked again (`hba.remote`); one that stays away ends the run, whose
last checkpoint stands.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import secrets
import shutil
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from hba.atlas.rows import Sample
from hba.batch.config import load_media
from hba.batch.encode import SAMPLING_RATE, Encoder, media_placeholders
from hba.batch.prompt import MODALITIES
from hba.errors import HbaError
from hba.evaluate.backends.wire import decoded_parts, filled, frame_rate
from hba.model.checkpoint import is_thinker, resolve_dtype
from hba.model.config import ModelConfig
from hba.model.generate import BANNED_BIAS, end_token_ids, media_token_ids
from hba.model.merge import name_as_released, write_thinker
from hba.model.omni import OmniSapiens
from hba.remote import ChatRequest, RemoteClient, RequestError, ServiceError, bounded
from hba.remote.providers import TokenChat
from hba.remote.request import Choice, TokenReply
from hba.rl.config import RlConfig
from hba.rl.rollout import Drawn, Draws, Place, PolicySampler, Prompts, Sampler
from hba.storage import atomic_folder
from hba.train.ranks import Ranks, whole_weights

# The policy's weights on a vLLM server: written to a folder that both see, then loaded by name.
#
# LoRA: an adapter folder a version, loaded under a name of its own (`/v1/load_lora_adapter`), so that a server that
# does not have this version cannot answer for it. Full: the whole model in the backbone's names, loaded in place while
# the server is paused (`/pause`, which also empties its caches of prefixes and encoded media; `/collective_rpc` with
# `reload_weights`; `/resume`). These have no name: a probe before and after shows that answers have changed where
# weights have. Both need what the documentation of vLLM calls development mode; a server for users should not have it.


LORA_START = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve MODEL --enable-lora --max-lora-rank RANK"
FULL_START = "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL, without --enable-lora"
PROBE_TOKENS = 32


def served_folder(run: Path, shared: str | None) -> Path:
    """Where the run in the folder `run` hands over its weights: there, or in a folder of its own below `shared`."""
    if shared is None:
        return run / "served"
    place = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:8]  # runs of one name stand in other folders
    return Path(shared) / f"hba-{run.name}-{place}"


class ServedWeights:
    """Keeps the weights of the server behind `client` those of `policy`. `name` is the model to ask for."""

    def __init__(self, client: RemoteClient, policy: OmniSapiens, config: ModelConfig, folder: Path) -> None:
        self._client, self._policy, self._config = client, policy, config
        self._folder = folder.resolve()
        self._mark = secrets.token_hex(4)  # a server may still have adapters of a run that was killed
        self._loaded: Path | None = None
        self._checksum: float | None = None
        self.name = ""

    async def renew(self, version: int) -> None:
        """Write the weights of `version` and let the server load them.

        Raises HbaError when the server refuses, or answers as before although weights have changed.
        """
        folder = self._folder / f"{self._mark}-{version}"
        with atomic_folder(folder) as new:
            self.write(new)
        if self._config.strategy == "lora":
            await self._load_adapter(folder)
        else:
            await self._load_full(folder)
        if self._loaded is not None and self._loaded != folder:
            shutil.rmtree(self._loaded, ignore_errors=True)
        self._loaded = folder

    def write(self, folder: Path) -> None:
        """Write what the server loads into `folder`: an adapter, or the whole model."""
        transformer = self._policy.transformer
        thinker = is_thinker(transformer.config)
        if self._config.strategy == "full" and thinker:
            write_thinker(transformer, folder, dtype=resolve_dtype(self._config.dtype))
            return
        transformer.save_pretrained(folder)
        if self._config.strategy == "lora" and thinker:
            name_as_released(folder, folder)

    def remove(self) -> None:
        """Remove what was written, here and by a run that was killed."""
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _load_adapter(self, folder: Path) -> None:
        name, old = f"hba-{folder.name}", self.name
        body = {"lora_name": name, "lora_path": str(folder)}
        try:
            await self._client.call("POST", "/v1/load_lora_adapter", body)
        except RequestError as error:
            if "already been loaded" not in error.what:  # the reply to an attempt before was lost
                raise _refused(error, LORA_START) from None
        except ServiceError as error:
            raise _refused(error, LORA_START) from None
        self.name = name
        if old:
            with suppress(RequestError):  # a server that was started anew never had it
                await self._client.call("POST", "/v1/unload_lora_adapter", {"lora_name": old})

    async def _load_full(self, folder: Path) -> None:
        checksum = self._sum()
        changed = self._checksum is not None and self._checksum != checksum
        try:
            self.name = self.name or await self._base_model()
            before = await self._probe() if changed else None
            await self._client.call("POST", "/pause?mode=abort")
            try:
                reload = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
                await self._client.call("POST", "/collective_rpc", reload)
            finally:
                await self._client.call("POST", "/resume")
        except (RequestError, ServiceError) as error:
            raise _refused(error, FULL_START) from None
        if before is not None and before == await self._probe():
            what = f"the server still answers with the old weights, after it was given {folder.name}"
            fix = "Use one server, not a proxy before several; start it anew, and run the same command again."
            raise HbaError(what, where=self._client.config.base_url or "", fix=fix)
        self._checksum = checksum

    @torch.no_grad()
    def _sum(self) -> float:
        """A number that tells weights apart, those that the policy trains."""
        trained = [p for p in self._policy.transformer.parameters() if p.requires_grad]
        return sum(float(parameter.double().abs().sum()) for parameter in trained)

    async def _base_model(self) -> str:
        models = (await self._client.call("GET", "/v1/models"))["data"]
        return str(next(model["id"] for model in models if not model.get("parent")))

    async def _probe(self) -> list[Any]:
        """Tokens and log-probabilities of one short greedy answer."""
        extra = {"model": self.name, "logprobs": True, "ignore_eos": True, "return_token_ids": True}
        request = ChatRequest(
            messages=[{"role": "user", "content": "How do people feel?"}],
            max_tokens=PROBE_TOKENS,
            temperature=0.0,
            extra=extra,
        )
        reply = await self._client.complete(request)
        assert isinstance(reply, TokenReply)  # the client speaks TokenChat
        return [(choice.token_ids, choice.logps) for choice in reply.choices]


def _refused(error: HbaError, start: str) -> HbaError:
    how = f"See its log, and how docs/rl.md starts it ({start} ...)."
    fix = f"The last checkpoint stands. {how} Then run the same command again."
    return HbaError(f"the server did not take the weights: {error.what}", where=error.where, fix=fix)


# --- the server as a sampler ------------------------------------------------------------------------------------------


T = TypeVar("T")
# What a server would otherwise take from the model's generation config.
PLAIN = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
RESUME = "The last checkpoint stands. Check the server, then run the same command again."


class _Question(NamedTuple):
    """A prompt, and which responses to its batch are asked for."""

    batch: int
    places: tuple[int, ...]
    sample: Sample
    prompt_ids: tuple[int, ...]
    request: ChatRequest


class ServerSampler:
    """A `Sampler` behind `remote.base_url`, for the run in the folder `run`.

    Raises ConfigError for a bad URL, or a key that is not in the environment.
    """

    def __init__(self, config: RlConfig, policy: OmniSapiens, encoder: Encoder, ranks: Ranks, run: Path) -> None:
        self._config, self._policy = config.remote, policy
        self._encoder, self._ranks = encoder, ranks
        self._client = RemoteClient("", config.remote, TokenChat())
        self._weights = ServedWeights(self._client, policy, config.model, served_folder(run, config.rollout.weights))
        self._model, self._version = "", -1
        self._banned = media_token_ids(policy.transformer.config, policy.processor)
        self._ends = end_token_ids(policy.transformer, policy.processor)
        self._loop = asyncio.new_event_loop()
        self._run(self._client.__aenter__())
        if ranks.is_first:
            self._weights.remove()

    def renew(self, version: int) -> None:
        """Let the server load the policy's weights, unless it has those of this version."""
        if version == self._version:
            return

        def name() -> list[str]:
            if not self._ranks.is_first:
                return []
            self._run(self._weights.renew(version))
            return [self._weights.name]

        with whole_weights(self._policy, self._ranks.accelerator):
            (self._model,) = self._ranks.collect(name)
        self._version = version

    def draw(self, prompts: Sequence[Prompts], draws: Draws) -> list[Drawn]:
        """All batches at once, as the server bears. Raises HbaError naming the sample of a reply that is of no use."""
        found: list[list[Choice | None]] = [[None] * (len(each) * draws.per_row) for each in prompts]

        async def ask_all() -> None:
            width = self._config.max_concurrency
            async for question, choices in bounded(self._questions(prompts, draws), self._ask, width):
                for place, choice in zip(question.places, choices, strict=True):
                    found[question.batch][place] = choice

        self._run(ask_all())
        return [_drawn([choice for choice in choices if choice is not None]) for choices in found]

    def close(self) -> None:
        """Close connections; remove what was handed over."""
        self._run(self._client.__aexit__())
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()
        if self._ranks.is_first:
            self._weights.remove()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(work)

    def _questions(self, prompts: Sequence[Prompts], draws: Draws) -> Iterator[_Question]:
        for number, (batch, places) in enumerate(prompts):
            shown_BT = batch.inputs["attention_mask"].bool().cpu()
            ids_BT = batch.inputs["input_ids"].cpu()
            for place, group in groupby(range(len(batch)), key=lambda row: places[row]):
                rows = tuple(group)
                sample = batch.samples[rows[0]]
                ids = tuple(ids_BT[rows[0]][shown_BT[rows[0]]].tolist())
                answers = tuple(row * draws.per_row + i for row in rows for i in range(draws.per_row))
                yield _Question(number, answers, sample, ids, self.request(sample, place, draws, len(answers)))

    def request(self, sample: Sample, place: Place, draws: Draws, count: int) -> ChatRequest:
        """What is sent for `count` responses to a sample. Raises MediaError for a medium that cannot be read."""
        encode = self._encoder.config
        media = load_media(sample, encode, SAMPLING_RATE, resize=self._encoder.resize)
        seed = int.from_bytes(draws.seed_of(place)[:4], "big") >> 1
        extra: dict[str, Any] = {"model": self._model, "n": count, "seed": seed, **PLAIN}
        extra |= {"logprobs": True, "return_token_ids": True, "stop_token_ids": self._ends}
        extra["logit_bias"] = {str(token): BANNED_BIAS for token in self._banned}
        if media.images or media.videos:
            pixels = {"min_pixels": encode.min_pixels, "max_pixels": encode.max_pixels}
            rates_hz = [video.rate_hz for video in media.videos]
            extra["mm_processor_kwargs"] = pixels | frame_rate(rates_hz, sample.place("videos"))
        if media.videos:
            extra["media_io_kwargs"] = {"video": {"num_frames": -1}}
        return ChatRequest(
            messages=filled(self._encoder.messages(sample, len(media.audios)), decoded_parts(media)),
            max_tokens=draws.max_new_tokens,
            temperature=draws.temperature,
            top_p=1.0,
            extra=extra,
        )

    async def _ask(self, question: _Question) -> tuple[_Question, tuple[Choice, ...]]:
        try:
            reply = await self._client.complete(question.request)
        except (RequestError, ServiceError) as error:
            what = f"the sampling server gave no response to sample {question.sample.id}: {error.what}"
            raise HbaError(what, where=error.where, fix=RESUME) from None
        assert isinstance(reply, TokenReply)  # the client speaks TokenChat
        if (unfit := self._unfit(question, reply)) is not None:
            what, fix = unfit
            raise HbaError(what, where=f"{self._config.base_url}, sample {question.sample.id}", fix=fix)
        return question, reply.choices

    def _unfit(self, question: _Question, reply: TokenReply) -> tuple[str, str] | None:
        """Why the policy must not be trained on a reply, and what to do; None where it may."""
        known = all(choice.token_ids and choice.logps is not None for choice in reply.choices)
        if reply.prompt_token_ids is None or not known:
            fix = "Use vLLM 0.10.2 or later: the update needs the sampled tokens (return_token_ids) and their logprobs."
            return "the server gives no token ids, or no log-probabilities", fix
        if reply.prompt_token_ids != question.prompt_ids:
            return self._difference(question.prompt_ids, reply.prompt_token_ids), PROMPT_FIX
        if len(reply.choices) != len(question.places):
            return f"{len(reply.choices)} responses, {len(question.places)} were asked for", RESUME
        for choice in reply.choices:
            tokens, logps = choice.token_ids or (), choice.logps or ()
            if len(tokens) != len(logps) or len(tokens) > question.request.max_tokens:
                return f"{len(tokens)} tokens with {len(logps)} log-probabilities", RESUME
            ended = tokens[-1] in self._ends
            whole = ended if choice.finish == "stop" else len(tokens) == question.request.max_tokens
            if choice.finish not in ("stop", "length") or not whole:
                what = f"a response of {len(tokens)} tokens ended with {choice.finish!r} at token {tokens[-1]}"
                return what, f"It must go on to one of the tokens {self._ends} or to the longest length: {LONGER}"
            if banned := set(tokens) & set(self._banned):
                fix = "Use a server that obeys logit_bias, and a lower rollout.temperature."
                return f"media tokens {sorted(banned)} in a response", fix
        return None

    def _difference(self, ours: Sequence[int], theirs: Sequence[int]) -> str:
        processor = self._policy.processor
        for modality in MODALITIES:
            tokens = set(media_placeholders(processor, modality))
            here, there = (sum(Counter(ids)[token] for token in tokens) for ids in (ours, theirs))
            if here != there:
                return f"the server sees {there} tokens of {modality} in the prompt, the policy {here}"
        at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), -1)
        where = min(len(ours), len(theirs)) if at < 0 else at
        said = [processor.tokenizer.decode(list(ids[where : where + 8])) for ids in (ours, theirs)]
        return f"the server's prompt differs from the policy's at token {where}: {said[1]!r} instead of {said[0]!r}"


LONGER = "raise --max-model-len."
PROMPT_FIX = (
    "Serve the backbone that the run trains, with its own chat template and processor; encode.min_pixels and "
    "max_pixels are sent with each request."
)


def build_sampler(config: RlConfig, policy: OmniSapiens, encoder: Encoder, ranks: Ranks, run: Path) -> Sampler:
    """The sampler of `rollout.sampler`."""
    if config.rollout.sampler == "generate":
        return PolicySampler(policy, ranks.accelerator.autocast)
    return ServerSampler(config, policy, encoder, ranks, run)


def require_small_gap(gaps: Sequence[float], config: RlConfig) -> None:
    """Raises HbaError when the server's log-probabilities are on average too far from the policy's (NaN: not known)."""
    known = [gap for gap in gaps if not math.isnan(gap)]
    mean = sum(known) / len(known) if known else 0.0
    most = config.rollout.max_gap
    if mean > most:
        what = f"log-probabilities of server and policy differ by {mean:.3g} nats, more than max_gap={most:g}"
        fix = (
            "The last checkpoint stands. Start the server with the same model, processor and --logprobs-mode "
            "processed_logprobs, alone behind its URL; or raise rollout.max_gap."
        )
        raise HbaError(what, where=str(config.remote.base_url), fix=fix)


def _drawn(choices: Sequence[Choice]) -> Drawn:
    tokens = [torch.tensor(choice.token_ids) for choice in choices]
    return Drawn(tokens, [torch.tensor(choice.logps, dtype=torch.float32) for choice in choices])
