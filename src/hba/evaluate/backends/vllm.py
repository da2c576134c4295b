"""vLLM's offline engine: a chat model on this machine's GPUs, batched by the engine itself.

The prompt is what the model's own processor makes of the messages, with one placeholder a medium; media go beside it as
the loader decodes them (sound as (samples, rate), images as PIL, clips as frames [N, H, W, 3]), so that the engine sees
what training saw. It is fed as it goes: as many requests are under way as it takes at once, up to a number of bytes,
while threads decode the next samples. What it refuses of a sample, a prompt that is too long for it for instance, is
that sample's failure.

A LoRA run is served as it is, its backbone with the adapter beside it. `vllm` is an extra; weights and settings of the
engine come from `vllm.*`. Under a launcher each process has an engine of its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import PIL.Image
from safetensors.torch import load_file

from hba.atlas import Atlas
from hba.atlas.media import SAMPLE_RATE
from hba.atlas.rows import Sample, SilentClips
from hba.batch.config import EncodeConfig, load_media, messages_of
from hba.batch.encode import clip_resize, end_token_id
from hba.batch.prompt import FormatMix, PlainText, Wording
from hba.batch.sampler import Indices
from hba.environment import usable_cores
from hba.errors import ConfigError, InputError, MachineError, MediaError
from hba.evaluate.answers import opened_thinking
from hba.evaluate.backends.interface import (
    Answered,
    Output,
    Result,
    choices,
    one_by_one,
    refuse_settings_of_servers,
    samples,
    spoken,
)
from hba.evaluate.backends.wire import frame_rate
from hba.model import checkpoint
from hba.model.bam import FOLDER
from hba.model.generate import BANNED_BIAS, media_token_ids
from hba.model.merge import name_as_released
from hba.storage import machine_fault, read_json, temporary_folder
from hba.taxonomy import Taxonomy

if TYPE_CHECKING:
    from hba.evaluate.config import Opening
    from hba.remote.cost import Meter

DECODERS = 8
MOST_BYTES = 4 << 30  # of the media of requests that are under way
PROBE = "The speaker sighs, looks away and says: it does not matter, it never did."
MOST_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's `max_lora_rank` may be
# What a launcher tells its processes of each other. An engine is no part of that: it would wait for them.
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_")
# Nobody's log mixes with an answer in JSON, a child that is forked cannot use a GPU that its parent has looked at.
ENGINE = {
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}


@dataclass(frozen=True, kw_only=True)
class Question:
    """A sample as the engine takes it, its media of `size_bytes`; `opened` is the tag of thinking with which its prompt
    ends, `started` when it was handed over, by `time.perf_counter`."""

    sample: Sample
    inputs: dict[str, Any]
    size_bytes: int
    opened: str
    started: float = 0.0


class VllmBackend:
    """A `Backend` over `engine`, a `vllm.LLM`, sampled with `params`, a `vllm.SamplingParams`.

    `adapter` is a `vllm.lora.request.LoRARequest`, where the model is a backbone with an adapter; `origin` the identity
    of the model.
    """

    name = "vllm"
    free_form = True
    domains = None
    meter: Meter | None = None

    def __init__(
        self,
        opening: Opening,
        engine: Any,
        params: Any,
        processor: Any,
        origin: Mapping[str, Any],
        adapter: Any = None,
    ) -> None:
        self._opening, self._engine, self._params, self._processor = opening, engine, params, processor
        self._origin, self._adapter = origin, adapter
        self._wording, self._silent = FormatMix([opening.config.generation.asked]), SilentClips()
        self._threads = min(DECODERS, usable_cores())

    def identity(self) -> Mapping[str, Any]:
        """Model, prompt and sampling."""
        return {**self._origin, **self._opening.config.generation.identity()}

    def batches(self, _atlas: Atlas, rows: Indices) -> Sequence[Indices]:
        return one_by_one(rows)

    def answers(self, atlas: Atlas, batches: Sequence[Indices], done: Set[str]) -> Iterator[Result]:
        """In the order in which the engine ends them."""
        waiting, engine = samples(atlas, batches, done), self._engine.llm_engine
        at_once = engine.vllm_config.scheduler_config.max_num_seqs + self._threads  # so that it never waits for us
        coming: list[Future[Question | Result]] = []
        asked: dict[str, Question] = {}
        pool = ThreadPoolExecutor(self._threads)
        try:
            while True:
                while len(coming) < 2 * self._threads and (sample := next(waiting, None)) is not None:
                    coming.append(pool.submit(self._prepared, sample))
                if not asked and not coming:
                    return
                if not asked:
                    wait(coming, return_when=FIRST_COMPLETED)
                for ready in [future for future in coming if future.done()]:
                    question = ready.result()
                    if not isinstance(question, Question):
                        yield question
                    elif asked and (
                        len(asked) == at_once
                        or sum(one.size_bytes for one in asked.values()) + question.size_bytes > MOST_BYTES
                    ):
                        continue
                    elif refused := self._hand_over(question, asked, atlas.taxonomy):
                        yield refused
                    coming.remove(ready)
                if asked:
                    with _alive():
                        replies = engine.step()
                    for reply in replies:
                        yield self._answered(asked.pop(reply.request_id), reply, atlas.taxonomy)
        finally:
            pool.shutdown(cancel_futures=True)
            self._silent.say()

    def _prepared(self, sample: Sample) -> Question | Result:
        try:
            with sample.blamed():
                inputs = engine_inputs(sample, self._processor, self._opening.encode, self._wording, self._silent)
            opened = "" if self._opening.config.generation.bound else opened_thinking(inputs["prompt"])
            size_bytes = _media_bytes(inputs["multi_modal_data"])
            return Question(sample=sample, inputs=inputs, size_bytes=size_bytes, opened=opened)
        except MediaError as error:
            return sample.quarantined(error)

    def _hand_over(self, question: Question, asked: dict[str, Question], taxonomy: Taxonomy) -> Answered | None:
        """Let the engine have it; what it refuses is the sample's failure."""
        bos = self._processor.tokenizer.bos_token
        written = bos is not None and question.inputs["prompt"].startswith(bos)
        try:
            with _alive():
                (key,) = self._engine.enqueue(
                    [question.inputs],
                    self._sampled(question.sample, taxonomy),
                    lora_request=self._adapter,
                    tokenization_kwargs={"add_special_tokens": False} if written else None,
                    use_tqdm=False,
                )
        except (ValueError, TypeError, RuntimeError, KeyError, IndexError) as error:
            if fault := machine_fault(error, question.sample.where):
                raise fault from error
            said = str(error).strip() or type(error).__name__
            return _failed(question.sample, f"vLLM refuses it ({said.splitlines()[0]})")
        # Replies have the number that the engine's own, longer key begins with.
        asked[key.partition("-")[0]] = replace(question, inputs={}, started=time.perf_counter())
        return None

    def _sampled(self, sample: Sample, taxonomy: Taxonomy) -> Any:
        """The sampling parameters of a sample, which may bind it to its labels. Its draw depends on seed and id."""
        generation, params = self._opening.config.generation, self._params.clone()
        if generation.temperature:
            seed = sha256(f"{generation.seed}/{sample.id}".encode()).digest()
            params.seed = int.from_bytes(seed[:4], "big")
        offered = choices(sample, taxonomy, self._wording)
        if generation.constrain != "none" and offered:
            from vllm.sampling_params import StructuredOutputsParams

            params.structured_outputs = StructuredOutputsParams(choice=list(offered.values()))
        return params

    def _answered(self, question: Question, reply: Any, taxonomy: Taxonomy) -> Answered:
        said, sample = reply.outputs[0], question.sample
        if said.finish_reason in ("abort", "error"):
            return _failed(sample, f"vLLM has ended its answer ({said.finish_reason})")
        # The engine's own text lacks a character that the last token cuts.
        text = question.opened + self._processor.tokenizer.decode(said.token_ids, skip_special_tokens=True)
        known = {
            "tokens_in": len(reply.prompt_token_ids),
            "tokens_out": len(said.token_ids),
            "seconds": time.perf_counter() - question.started,
            "finish": said.finish_reason,
        }
        return Answered(sample, spoken(sample, text, taxonomy, **known))


def _media_bytes(media: Mapping[str, Sequence[Any]]) -> int:
    """How much decoded media take, as they are handed over."""
    sounds = sum(int(samples.nbytes) for samples, _ in media.get("audio", ()))
    images = sum(3 * int(image.width * image.height) for image in media.get("image", ()))
    return sounds + images + sum(int(frames.nbytes) for frames in media.get("video", ()))


def _failed(sample: Sample, why: str) -> Answered:
    return Answered(sample, Output(error=why))


@contextmanager
def _alive() -> Iterator[None]:
    """What ends the engine is no fault of the sample that is at hand. Raises MachineError."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        fix = "See what it wrote above; the same command goes on where it stopped."
        raise MachineError("vLLM's engine has ended", where="--backend vllm", fix=fix) from error


def engine_inputs(
    sample: Sample, processor: Any, encode: EncodeConfig, wording: Wording, silent: SilentClips | None = None
) -> dict[str, Any]:
    """What vLLM takes for a sample. A clip without a sound that was to be heard is noted in `silent`.

    Raises MediaError for a medium that cannot be read, and for videos of different frame rates.
    """
    media = load_media(sample, encode, SAMPLE_RATE, resize=clip_resize(processor, encode))
    if media.silent_clips and silent is not None:
        silent.add(sample)
    given: dict[str, list[Any]] = {
        "audio": [(audio, SAMPLE_RATE) for audio in media.audios],
        "image": [PIL.Image.fromarray(image) for image in media.images],
        "video": [video.frames for video in media.videos],
    }
    messages = messages_of(sample, encode, wording, PlainText(processor), sounds=len(media.audios))
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = {"prompt": prompt, "multi_modal_data": {name: items for name, items in given.items() if items}}
    if media.videos:  # frames alone say nothing of when they were
        inputs["mm_processor_kwargs"] = frame_rate([video.rate_hz for video in media.videos], sample.place("videos"))
    return inputs


class Served(NamedTuple):
    """What the engine loads: a model as it was released or merged, and the checkpoint of an adapter beside it."""

    model: str
    adapter: Path | None = None
    rank: int = 0


def served(name: str, *, whole: bool = False) -> Served:
    """How vLLM gets the model, run or checkpoint `name`. Raises InputError for one that has to be merged first.

    With `whole` LoRA that was trained on a quantised backbone is served on the backbone as it was.
    """
    folder = checkpoint.resolve(name)
    model = name if folder is None else checkpoint.base_of(folder)
    if folder is not None:
        checkpoint.require_config(folder, model)
    if folder is not None and (folder / FOLDER).is_dir():
        fix = "Use --backend heads, or the run of the stage before."
        raise InputError("the checkpoint has BAM adapters, which a chat model ignores", where=str(folder), fix=fix)
    if checkpoint.read_config(model).model_type == "qwen2_5_omni_thinker":
        if folder is None:
            fix = "Use the whole model as it was released, or --backend hf."
            raise InputError("vLLM does not serve a thinker alone", where=name, fix=fix)
        raise _unmerged(name, "a thinker without the frame of its whole model")
    if folder is not None and (folder / checkpoint.LM_HEAD).is_file():
        raise _unmerged(name, "a language head of its own beside its backbone")
    if folder is None or checkpoint.read_card(folder)["strategy"] != "lora":
        return Served(model)
    kind = checkpoint.quantization_of(checkpoint.read_card(folder))
    if kind != "none" and not whole:
        raise _unmerged(name, f"LoRA of a backbone in {kind}")
    config = read_json(folder / "adapter_config.json")
    more = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias", "target_parameters")
    odd = [key for key in (*more, "trainable_token_indices") if config.get(key)]
    odd += [f"bias={config['bias']}"] if config.get("bias", "none") != "none" else []
    odd += [f"rank {config['r']}"] if config["r"] > MOST_RANKS[-1] else []
    if odd or config["peft_type"] != "LORA":
        raise _unmerged(name, f"an adapter of kind {config['peft_type']} with {', '.join(odd) or 'no more'}")
    return Served(model, folder, next(rank for rank in MOST_RANKS if rank >= config["r"]))


def _unmerged(name: str, what: str) -> InputError:
    fix = f"Merge it (`hba merge {name} FOLDER`) and predict with FOLDER, or use --backend hf."
    return InputError(f"vLLM does not serve {what}", where=name, fix=fix)


def open_backend(_name: str, opening: Opening) -> VllmBackend:
    """Start the engine. Raises ConfigError when vllm is not installed, or for a setting that only servers take, and
    InputError for a checkpoint that has to be merged first."""
    config, columns, encode = opening.config, opening.atlas.columns, opening.encode
    generation = config.generation
    refuse_settings_of_servers(generation)
    if generation.read == "likelihood":
        fix = "Use --backend hf, or generation.constrain=labels."
        raise ConfigError("the vllm backend reads no likelihoods", where="generation.read", fix=fix)
    if config.quantization not in ("auto", "none"):
        fix = "Use --backend hf, or serve it quantised and use --backend openai."
        raise ConfigError("the vllm backend quantises nothing", where="quantization", fix=fix)
    if encode.sound_of_clips == "interleaved":
        fix = "Use --backend hf or heads; a model that was not trained so hears clips with separate."
        raise ConfigError("the vllm backend interleaves no sound", where="encode.sound_of_clips", fix=fix)
    for name, value in ENGINE.items():
        os.environ.setdefault(name, value)
    try:
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest
    except ImportError as error:
        fix = "pip install 'human-behavior-atlas[vllm]' where there is a GPU, or serve the model and use openai."
        raise ConfigError(f"vllm cannot be imported ({error})", where="--backend vllm", fix=fix) from None
    from hba.model.checkpoint import load_processor

    model = served(opening.model, whole=config.quantization == "none")
    origin = checkpoint.identity(opening.model, dtype=config.dtype)
    processor = load_processor(str(checkpoint.resolve(opening.model) or opening.model))
    clip_resize(processor, encode)  # refused before the engine starts
    most = {"audio": columns.num_audios, "image": columns.num_images, "video": columns.num_videos}
    if encode.sound_of_clips != "off":
        most["audio"] = np.maximum(columns.num_audios, columns.num_videos)
    with _not_launched():
        engine = LLM(
            model=model.model,
            dtype=origin["dtype"],
            seed=generation.seed,
            tensor_parallel_size=config.vllm.tensor_parallel_size,
            gpu_memory_utilization=config.vllm.gpu_memory_utilization,
            max_model_len=config.vllm.max_model_len,
            limit_mm_per_prompt={
                name: int(count_N.max(initial=0)) if name in encode.modalities else 0 for name, count_N in most.items()
            },
            mm_processor_kwargs={"min_pixels": encode.min_pixels, "max_pixels": encode.max_pixels},
            use_tqdm_on_load=False,
            **({"enable_lora": True, "max_lora_rank": model.rank} if model.adapter else {}),
        )
    adapter = None
    if model.adapter is not None:
        adapter = _loaded(engine, model.adapter, opening.model, LoRARequest)
        probe = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        asked = {"prompt_token_ids": processor.tokenizer(PROBE)["input_ids"]}
        with_it, without = (
            engine.generate([asked], probe, lora_request=each, use_tqdm=False)[0].prompt_logprobs
            for each in (adapter, None)
        )
        if with_it == without and _adapts(model.adapter):  # vLLM ignores layers whose names it does not know
            raise _unmerged(opening.model, "this adapter: what it says is what the backbone says")
    known = checkpoint.read_config(model.model)
    params = SamplingParams(
        temperature=generation.temperature,
        top_p=generation.top_p,
        max_tokens=generation.max_tokens,
        stop_token_ids=[end_token_id(processor)],  # beside those that the model was published with
        logit_bias=dict.fromkeys(media_token_ids(getattr(known, "thinker_config", known), processor), BANNED_BIAS),
    )
    return VllmBackend(opening, engine, params, processor, origin, adapter)


def _adapts(checkpoint_folder: Path) -> bool:
    """Whether an adapter changes anything; one that was not trained yet has zeros in it."""
    tensors = load_file(checkpoint_folder / checkpoint.ADAPTER)
    return any(bool(tensor.any()) for name, tensor in tensors.items() if "lora_B" in name)


@contextmanager
def _not_launched() -> Iterator[None]:
    """Within, processes that are started do not know of a launcher."""
    kept = {name: value for name, value in os.environ.items() if name.startswith(LAUNCHED)}
    for name in kept:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(kept)


def _loaded(engine: Any, folder: Path, name: str, request: Any) -> Any:
    """The LoRA request of the adapter of a checkpoint, which the engine has loaded. Raises InputError if it did not."""
    with temporary_folder("adapter") as temporary:
        place = folder
        if checkpoint.is_thinker(checkpoint.read_config(checkpoint.base_of(folder))):
            place = temporary
            name_as_released(folder, place)
        adapter = request("adapter", 1, str(place))
        try:
            with _alive():
                engine.llm_engine.add_lora(adapter)
        except Exception as error:
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise _unmerged(name, f"this adapter ({said})") from error
    return adapter
