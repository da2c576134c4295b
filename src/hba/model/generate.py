"""Answers of a chat model, token by token: the one place that calls transformers' `generate`.

Media tokens, those of their borders included, are never said: they would stand for no medium. Nothing of a model's own
generation config but its end tokens decides: greedy is the most probable token, sampling is from the model's
distribution at the temperature. Samples are drawn one a prompt; several of one prompt are several rows of the batch,
since `num_return_sequences` mixes up the patches of videos.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hba.atlas.chat_encoder import end_token_id

BANNED_BIAS = -100.0  # of a media token in a server's sampling, as far down as logit_bias goes
_MEDIA_ID = re.compile(r"(audio|image|video|vision|boi|eoi|boa|eoa)(_\w+)?_token_(id|index)")
_MEDIA_TOKEN = re.compile(r"(audio|image|video|vision|boi|eoi|boa|eoa)(_\w+)?_token")


class Said(NamedTuple):
    """One answer and its tokens, the end token included."""

    text: str
    ids: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """How many they are."""
        return len(self.ids)


class SaidTokens(NamedTuple):
    """The tokens of answers, padded on the right, and how many of each row are answer, the end token included."""

    ids_BL: Tensor
    lengths: list[int]


def generate(model: Any, processor: Any, inputs: Mapping[str, Tensor], **options: Any) -> list[Said]:
    """One answer for each left-padded row of `inputs`; `options` are those of `generate_tokens`."""
    said = generate_tokens(model, processor, inputs, **options)
    texts = processor.tokenizer.batch_decode(said.ids_BL, skip_special_tokens=True)
    rows = zip(texts, said.lengths, said.ids_BL.tolist(), strict=True)
    return [Said(text, tuple(ids[:length])) for text, length, ids in rows]


@torch.inference_mode()
def generate_tokens(
    model: Any,
    processor: Any,
    inputs: Mapping[str, Tensor],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> SaidTokens:
    """`generate`, before its tokens become text: greedy at temperature 0.

    Sampling is from the most probable tokens that together have the share `top_p` of the probability. A model that is
    being trained is set to evaluate meanwhile: layers that are computed twice drop what generation keeps of a prompt.
    """
    tokenizer = processor.tokenizer
    ends = end_token_ids(model, processor)
    sampling: dict[str, Any] = {"do_sample": temperature > 0, "top_k": None, "top_p": None, "temperature": None}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_k": 0, "top_p": top_p}
    with _evaluating(model):
        tokens_BT = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            suppress_tokens=media_token_ids(model.config, processor),
            pad_token_id=ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            eos_token_id=ends,
            repetition_penalty=1.0,
            **sampling,
        )
    answers_BL = tokens_BT[:, inputs["input_ids"].shape[1] :]
    ended_BL = torch.isin(answers_BL, torch.tensor(ends, device=answers_BL.device))
    lengths = [int(row_L.nonzero()[0]) + 1 if row_L.any() else len(row_L) for row_L in ended_BL]
    return SaidTokens(answers_BL, lengths)


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
    for name, token in vars(processor).items() if processor is not None else ():
        if _MEDIA_TOKEN.fullmatch(name) and isinstance(token, str):
            ids.add(int(processor.tokenizer.convert_tokens_to_ids(token)))
    return sorted(ids)
