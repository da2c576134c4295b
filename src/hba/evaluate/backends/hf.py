"""Any transformers chat model that hears or sees, answering in words on this machine.

The model is a hub id, a folder, or a run or checkpoint of ours, adapter included. Batches are of one modality signature
and similar length. A sampled answer depends on the seed and on the batch that it is drawn in, and the plan of batches
on the rows and `batch_size` alone: a run that was killed goes on with the answers of an uninterrupted one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

import torch

from hba.atlas import Atlas
from hba.batch.encode import Batch, Encoder, encoder_for
from hba.batch.prompt import FormatMix
from hba.batch.sampler import Indices
from hba.evaluate.answers import opened_thinking
from hba.evaluate.backends.interface import (
    Output,
    Result,
    batched_answers,
    choices,
    evaluation_plan,
    likeliest,
    refuse_settings_of_servers,
    spoken,
)
from hba.model import checkpoint
from hba.model.generate import end_token_ids
from hba.model.omni import OmniSapiens

if TYPE_CHECKING:
    from hba.evaluate.config import GenerationConfig, Opening, PredictConfig
    from hba.remote.cost import Meter

TAG_TOKENS = 16  # at the end of a prompt, in which a tag of thinking would stand


class ChatBackend:
    """A `Backend` over a loaded model. `origin` is the identity of the model and of what it computes in.

    Rows that have no labels, or may have several, are answered in words whatever is asked of the others.
    """

    name = "hf"
    free_form = True
    domains = None
    meter: Meter | None = None

    def __init__(self, model: OmniSapiens, encoder: Encoder, config: PredictConfig, origin: Mapping[str, Any]) -> None:
        self.model, self.encoder, self.config, self.origin = model, encoder, config, origin
        self.wording = FormatMix([config.generation.asked])

    def identity(self) -> Mapping[str, Any]:
        """Weights, format, sampling; the size of batches where it decides what is drawn."""
        drawn = {"batch_size": self.config.batch_size} if self.config.generation.temperature else {}
        return {**self.origin, **self.config.generation.identity(), **drawn}

    def batches(self, atlas: Atlas, rows: Indices) -> Sequence[Indices]:
        return evaluation_plan(atlas, rows, self.config.batch_size)

    def answers(self, atlas: Atlas, batches: Sequence[Indices], done: Set[str]) -> Iterator[Result]:
        how: dict[str, Any] = {"encoder": self.encoder, "answer": self.generate, "loader": self.config.loader}
        return batched_answers(atlas, batches, done, **how)

    def generate(self, batch: Batch) -> Sequence[Output]:
        """One answer a sample."""
        generation, taxonomy = self.config.generation, self.encoder.taxonomy
        batch = batch.to(self.model.device)
        offered = [choices(s, taxonomy, self.wording) if generation.bound else {} for s in batch.samples]
        texts = [list(of.values()) for of in offered]
        if generation.read == "likelihood" and all(offered):
            return [likeliest(*each) for each in zip(offered, self.model.logps(batch, texts), strict=True)]
        torch.manual_seed(_seed(generation, batch))
        said = self.model.say(
            batch,
            max_new_tokens=generation.max_tokens,
            temperature=generation.temperature or 0.0,
            top_p=generation.top_p,
            choices=texts if generation.constrain == "labels" else (),
        )
        ends = end_token_ids(self.model.transformer, self.model.processor)
        opened = "" if generation.bound else begun_turn(self.model.processor, batch)
        outputs = [
            spoken(sample, opened + one.text, taxonomy, tokens_out=one.tokens, finish=one.finish(ends))
            for sample, one in zip(batch.samples, said, strict=True)
        ]
        if generation.read == "likelihood" and any(offered):
            logps = self.model.logps(batch, texts)
            rows = zip(offered, logps, outputs, strict=True)
            return [likeliest(of, each) if of else words for of, each, words in rows]
        return outputs


def begun_turn(processor: Any, batch: Batch) -> str:
    """What of the model's turn the chat template has begun: a tag of thinking, without which an answer that never ends
    it reads as one that was spoken."""
    return opened_thinking(processor.tokenizer.decode(batch.inputs["input_ids"][0, -TAG_TOKENS:]))


def open_backend(_name: str, opening: Opening) -> ChatBackend:
    """A chat model. Raises InputError when transformers does not know it, and for settings that only servers take."""
    config, taxonomy = opening.config, opening.atlas.taxonomy
    refuse_settings_of_servers(config.generation)
    checkpoint.require_attention(config.attention, config.dtype)
    checkpoint.require_perceived(opening.model, opening.encode, opening.atlas)
    how: dict[str, Any] = {"dtype": config.dtype, "attention": config.attention, "quantization": config.quantization}
    model = OmniSapiens.from_pretrained(opening.model, heads=False, **how).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    wording = FormatMix([config.generation.asked])
    encoder = encoder_for(model.processor, opening.encode, taxonomy, wording=wording)
    origin = checkpoint.identity(opening.model, **how)
    return ChatBackend(model, encoder, config, origin)


def _seed(generation: GenerationConfig, batch: Batch) -> int:
    ids = [generation.seed, *(sample.id for sample in batch.samples)]
    return int.from_bytes(hashlib.sha256(repr(ids).encode()).digest()[:7], "big")
