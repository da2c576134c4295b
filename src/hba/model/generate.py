"""Answers of a chat model, token by token: the one place that calls transformers' `generate`.

Media tokens, those of their borders included, are never said: they would stand for no medium. Nothing of a model's own
generation config but its end tokens decides: greedy is the most probable token, sampling is from the model's
distribution at the temperature. Samples are drawn one a prompt; several of one prompt are several rows of the batch,
since `num_return_sequences` mixes up the patches of videos.

Shapes: B rows of a batch, L answer tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from hba.batch.encode import end_token_id, known_ids

BANNED_BIAS = -100.0  # of a media token in a server's sampling, as far down as logit_bias goes
_MEDIA_ID = re.compile(r"(\w+_)?(audio|image|video|vision|boi|eoi|boa|eoa)(_\w+)?_token_(id|index)")
_MEDIA_TOKEN = re.compile(r"(\w+_)?(audio|image|video|vision|boi|eoi|boa|eoa)(_\w+)?_token")

Ranked = tuple[tuple[int, float], ...]
"""tokens of one position and their log-probabilities: that which was said, then the most probable ones"""


class Said(NamedTuple):
    """One answer and its tokens, the end token included, and where `uniforms_BL` decided their log-probabilities.

    `ranked` has an entry a token where `alternatives` were asked for.
    """

    text: str
    ids: tuple[int, ...]
    logps: tuple[float, ...] = ()
    ranked: tuple[Ranked, ...] = ()

    @property
    def tokens(self) -> int:
        """How many they are."""
        return len(self.ids)

    def finish(self, ends: Collection[int]) -> str:
        """How it ended, in the words of servers: 'stop' at one of the end tokens, 'length' where it was cut off."""
        return "stop" if self.ids and self.ids[-1] in ends else "length"


class SaidTokens(NamedTuple):
    """The tokens of answers, padded on the right, and how many of each row are answer, the end token included.

    `logps_BL` are their log-probabilities at the temperature, where `uniforms_BL` decided. `ranked_L` has, for each
    position, the tokens [B, 1+K] of `Said.ranked` and their log-probabilities.
    """

    ids_BL: Tensor
    lengths: list[int]
    logps_BL: Tensor | None = None
    ranked_L: Sequence[tuple[Tensor, Tensor]] = ()


def generate(model: Any, processor: Any, inputs: Mapping[str, Tensor], **options: Any) -> list[Said]:
    """One answer for each left-padded row of `inputs`; `options` are those of `generate_tokens`."""
    said = generate_tokens(model, processor, inputs, **options)
    texts = processor.tokenizer.batch_decode(said.ids_BL, skip_special_tokens=True)
    logps = [[]] * len(texts) if said.logps_BL is None else said.logps_BL.tolist()
    ranked: list[list[Ranked]] = [[] for _ in texts]
    for ids_BK, logps_BK in said.ranked_L:
        for row, ids, own in zip(ranked, ids_BK.tolist(), logps_BK.tolist(), strict=True):
            row.append(tuple(zip(ids, own, strict=True)))
    rows = zip(texts, said.lengths, said.ids_BL.tolist(), logps, ranked, strict=True)
    return [Said(text, tuple(ids[:n]), tuple(own[:n]), tuple(of[:n])) for text, n, ids, own, of in rows]


@torch.inference_mode()
def generate_tokens(
    model: Any,
    processor: Any,
    inputs: Mapping[str, Tensor],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    choices: Sequence[Sequence[Sequence[int]]] = (),
    uniforms_BL: Tensor | None = None,
    alternatives: int | None = None,
    over: Callable[[Tensor], Tensor] | None = None,
) -> SaidTokens:
    """`generate`, before its tokens become text: greedy at temperature 0.

    `choices` are, for each row, the answers that it may give, as token ids with their end token; a row with none may
    say anything. Sampling is from the most probable tokens that together have the share `top_p` of the probability.
    `uniforms_BL`, numbers in [0, 1), one a row and token, decide in place of torch's random numbers: what a row draws
    does not depend on the rows beside it. With `alternatives` the model's log-probabilities (at temperature 1) of what
    is said, and of so many of the most probable tokens, are kept. `over` is called after each token with all that was
    said so far [B, L], rows that have ended padded, and says which rows [B] end here. A model that is being trained is
    set to evaluate meanwhile: layers that are computed twice drop what generation keeps of a prompt.
    """
    tokenizer = processor.tokenizer
    ends = end_token_ids(model, processor)
    sampling: dict[str, Any] = {}
    decided: _Decided | None = None
    prompt_length = inputs["input_ids"].shape[1]
    processors = LogitsProcessorList([_Unsaid(media_token_ids(model.config, processor))])
    if choices:
        processors.append(_Choices(choices, prompt_length))
    ending = _Ending(over, prompt_length) if over is not None else None
    if alternatives is not None or (temperature > 0 and uniforms_BL is not None):
        if temperature > 0 and uniforms_BL is None:
            raise ValueError("log-probabilities of a sample want its random numbers")
        drawn_BL = None if uniforms_BL is None else uniforms_BL.to(inputs["input_ids"].device, torch.float64)
        decided = _Decided(drawn_BL if temperature > 0 else None, temperature, top_p, alternatives)
        processors.append(decided)
    elif temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": top_p}
    # As a whole: given key by key, each call builds the model's configuration anew, to compare it with its defaults.
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        pad_token_id=ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        eos_token_id=ends,
        repetition_penalty=1.0,
        **{"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0} | sampling,
    )
    with _evaluating(model), _last_positions(model, 1), _by(settings, model):
        tokens_BT = model.generate(
            **inputs,
            generation_config=settings,
            synced_gpus=False,  # ranks generate as often as each has prompts; a sharded model is gathered meanwhile
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList([] if ending is None else [ending]),
        )
    answers_BL = tokens_BT[:, prompt_length:]
    ended_BL = torch.isin(answers_BL, torch.tensor(ends, device=answers_BL.device))
    lengths = [int(row_L.nonzero()[0]) + 1 if row_L.any() else len(row_L) for row_L in ended_BL]
    if ending is not None:
        lengths = [min(length, ending.lengths.get(row, length)) for row, length in enumerate(lengths)]
    logps = [] if decided is None else decided.logps
    ranked_L = () if decided is None else decided.ranked
    return SaidTokens(answers_BL, lengths, torch.stack(logps, 1) if logps else None, ranked_L)


class _Unsaid(LogitsProcessor):  # type: ignore[misc]
    """Leaves these tokens no probability. transformers' `suppress_tokens` looks each word of the vocabulary up."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = ids
        self._known: Tensor | None = None  # those that the model has logits for

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._known is None:
            known = [i for i in self._ids if i < scores.shape[-1]]
            self._known = torch.tensor(known, dtype=torch.long, device=scores.device)
        return scores.index_fill(-1, self._known, -torch.inf)


class _Decided(LogitsProcessor):  # type: ignore[misc]
    """Leaves one token of each row: where the row's number falls in the cumulative distribution at the temperature, of
    the most probable tokens that together have the share `top_p`; without numbers the most probable one."""

    def __init__(
        self, uniforms_BL: Tensor | None, temperature: float, top_p: float, alternatives: int | None
    ) -> None:
        self._uniforms_BL, self._temperature = uniforms_BL, temperature
        self._top_p, self._alternatives = top_p, alternatives
        self.logps: list[Tensor] = []  # [B] of each token so far, where numbers decide
        self.ranked: list[tuple[Tensor, Tensor]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._uniforms_BL is None:
            chosen_B1 = scores.argmax(-1, keepdim=True)
        else:
            chosen_B1 = self._drawn(scores, self._uniforms_BL[:, len(self.logps), None])
        if self._alternatives is not None:
            logps_BV = torch.log_softmax(scores.float(), -1)
            best_BK = logps_BV.topk(min(self._alternatives, scores.shape[-1]), -1).indices
            ids_BK = torch.cat([chosen_B1, best_BK], -1)
            self.ranked.append((ids_BK, logps_BV.gather(-1, ids_BK)))
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen_B1, 0.0)

    def _drawn(self, scores: Tensor, uniforms_B1: Tensor) -> Tensor:
        logps_BV = torch.log_softmax(scores.float() / self._temperature, -1)
        shares_BV = logps_BV.double().exp()
        if self._top_p < 1:
            sorted_BV, order_BV = shares_BV.sort(dim=-1, descending=True, stable=True)
            kept_BV = sorted_BV.cumsum(-1) - sorted_BV < self._top_p
            shares_BV = torch.zeros_like(shares_BV).scatter_(-1, order_BV, sorted_BV * kept_BV)
        upto_BV = shares_BV.cumsum(-1)
        wanted_B1 = uniforms_B1 * upto_BV[:, -1:]
        # Right of equal values: a token without probability is never where a number falls.
        chosen_B1 = torch.searchsorted(upto_BV, wanted_B1, right=True).clamp_max(scores.shape[-1] - 1)
        self.logps.append(logps_BV.gather(-1, chosen_B1).squeeze(-1))
        return chosen_B1


class _Ending(StoppingCriteria):  # type: ignore[misc]
    """Asks `over` after each token, and keeps at how many tokens a row was told to end."""

    def __init__(self, over: Callable[[Tensor], Tensor], prompt_length: int) -> None:
        self._over, self._prompt_length = over, prompt_length
        self.lengths: dict[int, int] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor, **more: Any) -> Tensor:
        said_BL = input_ids[:, self._prompt_length :]
        over_B = self._over(said_BL).to(input_ids.device)
        for row in over_B.nonzero()[:, 0].tolist():
            self.lengths.setdefault(row, said_BL.shape[1])
        return over_B


class _Choices(LogitsProcessor):  # type: ignore[misc]
    """Lets each row say the tokens alone with which one of its choices goes on."""

    def __init__(self, choices: Sequence[Sequence[Sequence[int]]], prompt_length: int) -> None:
        self.choices, self.prompt_length = choices, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        said = input_ids[:, self.prompt_length :].tolist()
        for row, choices in enumerate(self.choices):
            length = len(said[row])
            going_on = {choice[length] for choice in choices if len(choice) > length and choice[:length] == said[row]}
            if going_on:  # else the row is free, or has ended and is padded
                allowed = torch.tensor(sorted(going_on), device=scores.device)
                kept = scores[row, allowed]
                scores[row] = -torch.inf
                scores[row, allowed] = kept
        return scores


@torch.inference_mode()
def choice_logps(
    model: Any, inputs: Mapping[str, Tensor], choices: Sequence[Sequence[Sequence[int]]]
) -> list[list[float]]:
    """The log-probability of each choice of each row as the answer to its prompt: the sum over its tokens, in nats.

    `choices` are token ids with their end token; rows may have different ones, or none. The prompts are read once, and
    every choice goes on from their keys and values. Positions are those that `generate` gives the model.
    """
    state: dict[str, Any] = dict(inputs)
    prompt_BT: Tensor = state.pop("input_ids")
    state |= {"use_cache": True, "position_ids": model._prepare_position_ids_for_generation(prompt_BT, dict(inputs))}

    def of_last(count: int) -> dict[str, int]:  # Gemma would take its default, None, for a dimension more
        return {"logits_to_keep": count} if model._supports_logits_to_keep() else {}

    # Short convolutions (LFM2) go on from what they keep by one token alone.
    alone = "conv" in (getattr(model.config.get_text_config(), "layer_types", None) or ())
    found: list[list[float]] = [[] for _ in choices]
    with _evaluating(model):
        with _last_positions(model, 1):
            first = state | of_last(1)
            read = model(**model.prepare_inputs_for_generation(prompt_BT, is_first_iteration=True, **first))
        first_BV = read.logits[:, -1].float().log_softmax(-1)
        for number in range(max(map(len, choices), default=0)):
            answers = [of[number] if number < len(of) else [0, 0] for of in choices]
            length = max(map(len, answers)) - 1
            padded = [[*answer[:-1], *[0] * (length + 1 - len(answer))] for answer in answers]
            whole_BT = torch.cat([prompt_BT, torch.tensor(padded, device=prompt_BT.device)], 1)
            parts: list[Tensor] = []
            going_on, said = dict(state), read
            count = 1 if alone else length
            for end in range(prompt_BT.shape[1] + count, whole_BT.shape[1] + 1, count or 1):
                going_on = model._update_model_kwargs_for_generation(said, going_on, num_new_tokens=count)
                if not parts:
                    going_on["past_key_values"] = copy.deepcopy(going_on["past_key_values"])
                going_on |= of_last(count)
                given = model.prepare_inputs_for_generation(whole_BT[:, :end], next_sequence_length=count, **going_on)
                with _last_positions(model, count):
                    said = model(**given)
                parts.append(said.logits.float().log_softmax(-1))
            logps_BLV = torch.cat(parts, 1)
            for row, answer in enumerate(answers):
                if number < len(choices[row]):
                    rest = sum(float(logps_BLV[row, i, token]) for i, token in enumerate(answer[1:]))
                    found[row].append(float(first_BV[row, answer[0]]) + rest)
    return found


@contextmanager
def _last_positions(model: Any, count: int) -> Iterator[None]:
    """Within, the language head is handed the states of the last `count` positions alone: of the logits of a prompt
    those of its last token are read. Not every model takes `logits_to_keep` (Qwen2.5-Omni does not)."""
    handle = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: (args[0][:, -count:], *args[1:]) if args[0].ndim == 3 else None
    )
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _by(settings: GenerationConfig, model: Any) -> Iterator[None]:
    """Within, these are the model's own, too: transformers fills what is not set (bans, beams) from there."""
    own, model.generation_config = model.generation_config, settings
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def end_token_ids(model: Any, processor: Any) -> list[int]:
    """The token that ends a turn, the tokenizer's end, and those that the model was published with."""
    own = getattr(model.generation_config, "eos_token_id", None)
    published = own if isinstance(own, list) else [own]
    found = [end_token_id(processor), processor.tokenizer.eos_token_id, *published]
    return list(dict.fromkeys(int(i) for i in found if i is not None))


def media_token_ids(config: Any, processor: Any = None) -> list[int]:
    """Ids of the tokens that stand for media or their borders, as a model's config and its processor name them."""
    named = {name: value for name, value in config.to_dict().items() if _MEDIA_ID.fullmatch(name)}
    ids = {int(value) for value in named.values() if isinstance(value, int)}
    own = {} if processor is None else vars(processor)
    tokens = [token for name, token in own.items() if _MEDIA_TOKEN.fullmatch(name) and isinstance(token, str)]
    return sorted(ids.union(known_ids(processor.tokenizer, tokens)) if tokens else ids)
