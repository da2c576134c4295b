"""vLLM's offline engine: a chat model on this machine's GPUs, batched by the engine itself.

The prompt is what the model's own processor makes of the messages, with one placeholder a medium; media go beside it as
the loader decodes them (sound as (samples, rate), images as PIL, clips as frames [N, H, W, 3]), so that the engine sees
what training saw. While the engine works on one chunk of samples, threads decode the next. `vllm` is an extra; weights
and settings of the engine come from `vllm.*`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import PIL.Image

from hba.atlas import Atlas
from hba.atlas.answer_format import FormatMix
from hba.atlas.batch import load_media, messages_of
from hba.atlas.config import EncodeConfig
from hba.atlas.media import SAMPLE_RATE
from hba.atlas.prompt import PlainText, Wording
from hba.atlas.sample import Quarantined, Sample
from hba.atlas.sampler import Indices
from hba.errors import ConfigError, MediaError
from hba.evaluate.backends.interface import Answered, Result, choices, samples, spoken
from hba.evaluate.backends.wire import frame_rate
from hba.evaluate.config import Opening
from hba.remote.cost import Meter
from hba.taxonomy import Taxonomy

T = TypeVar("T")
CHUNK = 128  # samples handed over at once; the engine fills its own batches from them
DECODERS = 8


@dataclass(frozen=True, kw_only=True)
class Question:
    """A sample as the engine takes it."""

    sample: Sample
    inputs: dict[str, Any]


class VllmBackend:
    """A `Backend` over `engine`, a `vllm.LLM`, sampled with `params`, a `vllm.SamplingParams`."""

    name = "vllm"
    free_form = True
    domains = None
    meter: Meter | None = None

    def __init__(self, opening: Opening, engine: Any, params: Any, processor: Any) -> None:
        self._opening, self._engine, self._params, self._processor = opening, engine, params, processor
        self._wording = FormatMix([opening.config.generation.asked])

    def identity(self) -> Mapping[str, Any]:
        """Model, prompt and sampling."""
        return {"model": self._opening.model, **self._opening.config.generation.identity()}

    def answers(self, atlas: Atlas, rows: Indices, done: Set[str]) -> Iterator[Result]:
        """A chunk after the other."""
        with ThreadPoolExecutor(DECODERS) as pool:
            waiting = chunks(samples(atlas, rows, done))
            coming = [pool.submit(self._prepared, sample) for sample in next(waiting, [])]
            while coming:
                ready = [future.result() for future in coming]
                coming = [pool.submit(self._prepared, sample) for sample in next(waiting, [])]
                yield from (item for item in ready if isinstance(item, Quarantined))
                yield from self._ask([item for item in ready if isinstance(item, Question)], atlas.taxonomy)

    def _prepared(self, sample: Sample) -> Question | Quarantined:
        try:
            with sample.blamed():
                inputs = engine_inputs(sample, self._processor, self._opening.encode, self._wording)
        except MediaError as error:
            return sample.quarantined(error)
        return Question(sample=sample, inputs=inputs)

    def _bound(self, sample: Sample, taxonomy: Taxonomy) -> Any:
        """The sampling parameters of a sample, which may bind it to its labels."""
        offered = choices(sample, taxonomy, self._wording)
        if self._opening.config.generation.constrain == "none" or not offered:
            return self._params
        from vllm.sampling_params import StructuredOutputsParams

        bound = self._params.clone()
        bound.structured_outputs = StructuredOutputsParams(choice=list(offered.values()))
        return bound

    def _ask(self, questions: Sequence[Question], taxonomy: Taxonomy) -> Iterator[Result]:
        if not questions:
            return
        started = time.perf_counter()
        params = [self._bound(question.sample, taxonomy) for question in questions]
        replies = self._engine.generate([q.inputs for q in questions], params, use_tqdm=False)
        seconds = (time.perf_counter() - started) / len(questions)
        decode = self._processor.tokenizer.decode  # the engine's own text lacks a character that the last token cuts
        for question, reply in zip(questions, replies, strict=True):
            said = reply.outputs[0]
            text = decode(said.token_ids, skip_special_tokens=True)
            counts = {"tokens_in": len(reply.prompt_token_ids), "tokens_out": len(said.token_ids), "seconds": seconds}
            known = {**counts, "finish": said.finish_reason}
            yield Answered(question.sample, spoken(question.sample, text, taxonomy, **known))


def engine_inputs(sample: Sample, processor: Any, encode: EncodeConfig, wording: Wording) -> dict[str, Any]:
    """What `LLM.generate` takes for a sample. Raises MediaError for a medium that cannot be read."""
    media = load_media(sample, encode, SAMPLE_RATE)
    given: dict[str, list[Any]] = {
        "audio": [(audio, SAMPLE_RATE) for audio in media.audios],
        "image": [PIL.Image.fromarray(image) for image in media.images],
        "video": [video.frames for video in media.videos],
    }
    messages = messages_of(sample, encode, wording, PlainText(processor))
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = {"prompt": prompt, "multi_modal_data": {name: items for name, items in given.items() if items}}
    if media.videos:  # frames alone say nothing of when they were
        inputs["mm_processor_kwargs"] = frame_rate([video.rate_hz for video in media.videos], sample.place("videos"))
    return inputs


def chunks(items: Iterator[T]) -> Iterator[list[T]]:
    """Lists of at most CHUNK items."""
    while chunk := list(islice(items, CHUNK)):
        yield chunk


def open_backend(_name: str, opening: Opening) -> VllmBackend:
    """Start the engine. Raises ConfigError when vllm is not installed, or for a setting that only servers take."""
    config, columns = opening.config, opening.atlas.columns
    generation = config.generation
    if generation.temperature is None or generation.extra:
        fix = "Set generation.temperature, and leave generation.extra out."
        raise ConfigError("a setting for servers, not for an engine on this machine", where="generation", fix=fix)
    if generation.read == "likelihood":
        fix = "Use --backend hf, or generation.constrain=labels."
        raise ConfigError("the vllm backend reads no likelihoods", where="generation.read", fix=fix)
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        fix = "pip install 'human-behavior-atlas[vllm]' where there is a GPU, or serve the model and use openai."
        raise ConfigError(f"vllm cannot be imported ({error})", where="--backend vllm", fix=fix) from None
    from hba.model.chat import load_processor

    most = {"audio": columns.num_audios, "image": columns.num_images, "video": columns.num_videos}
    engine = LLM(
        model=opening.model,
        dtype=config.dtype,
        seed=generation.seed,
        tensor_parallel_size=config.vllm.tensor_parallel_size,
        gpu_memory_utilization=config.vllm.gpu_memory_utilization,
        max_model_len=config.vllm.max_model_len,
        limit_mm_per_prompt={name: int(count_N.max()) for name, count_N in most.items()},
        mm_processor_kwargs={"min_pixels": opening.encode.min_pixels, "max_pixels": opening.encode.max_pixels},
    )
    params = SamplingParams(
        temperature=generation.temperature,
        top_p=generation.top_p,
        max_tokens=generation.max_tokens,
        seed=generation.seed,
    )
    return VllmBackend(opening, engine, params, load_processor(opening.model))
