"""From samples to model inputs: the real processor once a sample, then padding to the longest of the batch.

An `Encoder` turns one `Sample` into unpadded features (`Encoded`); `collate` pads a list of them into a `Batch`.
Encoding a sample alone and padding afterwards is what makes batches tight, cacheable and independent of their
neighbours. A sample whose medium cannot be read is not replaced, it travels in `Batch.quarantined`.

What a processor takes (images, videos, sound), which tokens stand for media and which token ends an answer are asked of
the processor; what one needs beyond that says its `Family`. A video goes to a model without a video processor as its
frames, each an image; its sound track is heard where `encode.sound_of_clips` asks for it. A medium that the model
cannot take is an error that names the modality filter; nothing is left out silently, and no sound is cut.

Shapes: B samples, T tokens, A audios, M mel frames, F mel bins, P vision patches, D patch values.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jinja2 import TemplateError
from torch import Tensor

from hba.atlas.rows import MEDIA_FIELDS, Columns, Field, Quarantined, Sample, SilentClips
from hba.batch.config import (
    WINDOWS_ARE_FOR_HEADS,
    EncodeConfig,
    LongAudio,
    Media,
    heard_in,
    load_media,
    messages_of,
)
from hba.batch.pool import DescriptorConfig, pooled_descriptors
from hba.batch.prompt import AS_WRITTEN, MODALITIES, Message, Modality, PlainText, Wording, taught
from hba.environment import installed_version
from hba.errors import ConfigError, InputError, MediaError
from hba.storage import plural
from hba.taxonomy import BUILTIN, Taxonomy

if TYPE_CHECKING:
    from hba.atlas.decoded import DecodedCache

SAMPLING_RATE = 16000  # of the atlas' decoded sound
_MARK = "ANSWER"
_ODD_RATIO = 100  # processors refuse pictures that are 200 times as long as wide
_FILTER = "Leave the modality out: encode.modalities=[image, video] or the like (hba predict: --modalities video)."


def _uncut(processor: Any, audios: Sequence[np.ndarray[Any, Any]]) -> dict[str, Any]:
    return {"truncation": False}


def _one_window_more(processor: Any, audios: Sequence[np.ndarray[Any, Any]]) -> dict[str, Any]:
    # The extractor's own window (30 or 300 s) pads short clips and silently cuts long ones. One FFT window of
    # zeros behind the longest clip gives the same valid frames as any longer padding does.
    extractor = processor.feature_extractor
    hop = int(extractor.hop_length)
    longest: int = max(map(len, audios)) + int(extractor.n_fft)
    return {"max_length": math.ceil(longest / hop) * hop}


class Family(NamedTuple):
    """What the processors of a family need beyond what all take."""

    sound: Callable[[Any, Sequence[np.ndarray[Any, Any]]], dict[str, Any]] = _uncut  # options that keep sound whole
    times: bool = False  # the model is told how many seconds a step of a clip's patches takes, which is exact here
    whole_clips: bool = False  # the area of a clip is that of all its frames together
    interleaves: bool = False  # the sound of a clip may stand among its frames
    seconds_a_token: float | None = None  # of sound, where each has `audio_seq_length` tokens, whatever its length
    packed: tuple[str, ...] = ()  # features of several media stand beside each other along the last dimension
    still_frames: int = 0  # a picture is resized as a clip of so many frames, by the area of all together
    written: bool = False  # frames of clips stand in a prompt as pictures do
    apart: bool = False  # a prompt has pictures or clips, which are a list of their own; of both, clips are frames
    even_clips: bool = False  # all clips of a batch have as many frames


FAMILIES = {
    "Qwen2_5OmniProcessor": Family(sound=_one_window_more, times=True, interleaves=True),
    "Qwen3OmniMoeProcessor": Family(times=True, interleaves=True),
    "Qwen3VLProcessor": Family(whole_clips=True),
    "Gemma3nProcessor": Family(seconds_a_token=0.16),
    "Glm4vProcessor": Family(whole_clips=True, still_frames=2, written=True),
    "InternVLProcessor": Family(written=True),
    "SmolVLMProcessor": Family(written=True, apart=True),
    "LlavaOnevisionProcessor": Family(even_clips=True),
    "VoxtralProcessor": Family(),
    "MiniCPMV4_6Processor": Family(packed=("pixel_values", "pixel_values_videos")),
}


def features_of(
    processor: Any,
    text: str,
    audios: Sequence[np.ndarray[Any, Any]],
    images: Sequence[Any],
    clips: Sequence[Tensor],
    spans_seconds: Sequence[float],
    *,
    pixels: Mapping[str, int],
    clip_pixels: int | None = None,
    interleaved: bool = False,
) -> dict[str, Tensor]:
    """What the model takes of one prompt, `input_ids` [1, T] and the features of its media.

    `clips` are frames [N, 3, H, W], each evenly spaced over its span; `pixels` are min_pixels and max_pixels, for
    processors that resize by area: others have a size that their model needs. `clip_pixels` is the largest area of all
    frames of a clip together, for those that count so. `interleaved`: the sounds are those of the clips, which all have
    one frame rate, and stand among their frames.
    """
    family, bos = FAMILIES.get(type(processor).__name__, Family()), processor.tokenizer.bos_token
    call: dict[str, Any] = {"text": [text], "return_tensors": "pt"}
    if bos is not None and text.startswith(bos):
        call["text_kwargs"] = {"add_special_tokens": False}
    if audios:
        whole = family.sound(processor, audios)
        call |= {"audio": list(audios), "audio_kwargs": {"sampling_rate": SAMPLING_RATE, **whole}}
    if images:
        # Without its name, a picture of one or three lines is taken for one of one or three channels.
        options = _by_area(processor.image_processor, pixels) | {"input_data_format": "channels_last"}
        if family.still_frames:
            least, most = (family.still_frames * pixels[name] for name in ("min_pixels", "max_pixels"))
            options["size"] = {"shortest_edge": least, "longest_edge": most}
        call |= {"images": [list(images)], "images_kwargs": options}
    if clips:
        # Processors that tell the model of time ask for the rate of the frames.
        metadata = [
            {"total_num_frames": len(clip), "fps": len(clip) / span, "frames_indices": list(range(len(clip)))}
            for clip, span in zip(clips, spans_seconds, strict=True)
        ]
        options = {"do_sample_frames": False, "video_metadata": metadata}
        area = _by_area(processor.video_processor, pixels)
        if family.whole_clips:
            least, most = (max(map(len, clips)) * pixels[name] for name in ("min_pixels", "max_pixels"))
            area = {"size": {"shortest_edge": least, "longest_edge": min(most, clip_pixels or most)}}
        if interleaved:  # by the times of frames, which the processor reckons from their rate
            options |= {"use_audio_in_video": True, "fps": len(clips[0]) / spans_seconds[0]}
        call |= {"videos": [list(clips)] if family.apart else list(clips), "videos_kwargs": options | area}
    features = {name: torch.as_tensor(value) for name, value in processor(**call).items()}
    if audios and "audio_input_features" in features:  # Phi-4's; one sound alone is given no mask, which a batch needs
        frames_AM = features["audio_input_features"][..., 0]
        features.setdefault("audio_attention_mask", torch.ones_like(frames_AM, dtype=torch.bool))
    if clips and family.times:
        patch = processor.video_processor.temporal_patch_size
        steps = [patch / len(clip) * span for clip, span in zip(clips, spans_seconds, strict=True)]
        features["video_second_per_grid"] = torch.tensor(steps, dtype=torch.float32)
    return features


def _by_area(part: Any, pixels: Mapping[str, int]) -> dict[str, Any]:
    return dict(pixels) if "min_pixels" in getattr(part.valid_kwargs, "__annotations__", {}) else {}


# Padding of unpadded samples to the longest of a batch: text on the left, so that every answer ends at the last token;
# sound on the right.
#
# Shapes: B samples, T tokens, A audios, M mel frames, F mel bins.


# --- a batch -------------------------------------------------------------------------


IGNORED = -100


def token_ids(ids: Sequence[Tensor], pad_token_id: int) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` [B, T]."""
    longest = max(map(len, ids))
    input_ids_BT = torch.full((len(ids), longest), pad_token_id, dtype=torch.long)
    attention_mask_BT = torch.zeros((len(ids), longest), dtype=torch.long)
    for i, row_T in enumerate(ids):
        input_ids_BT[i, longest - len(row_T) :] = row_T
        attention_mask_BT[i, longest - len(row_T) :] = 1
    return {"input_ids": input_ids_BT, "attention_mask": attention_mask_BT}


def per_token(values: Sequence[Tensor], answers: Sequence[Tensor | None], input_ids_BT: Tensor) -> Tensor:
    """Values of the prompts' tokens [B, T]; 0, which stands for text, at padding and answers."""
    padded_BT = torch.zeros_like(input_ids_BT)
    for row_T, value_T, answer_T in zip(padded_BT, values, answers, strict=True):
        end = len(row_T) - (0 if answer_T is None else len(answer_T))
        row_T[end - len(value_T) : end] = value_T
    return padded_BT


def labels(answers: Sequence[Tensor | None], input_ids_BT: Tensor) -> Tensor:
    """The answers' tokens at their own positions [B, T] (no shift), IGNORED everywhere else."""
    labels_BT = torch.full_like(input_ids_BT, IGNORED)
    for row_T, answer_T in zip(labels_BT, answers, strict=True):
        if answer_T is not None:
            row_T[-len(answer_T) :] = answer_T
    return labels_BT


def mel_frames(mels: Sequence[Tensor]) -> dict[str, Tensor]:
    """`input_features` [A, F, M] and `feature_attention_mask` [A, M] of audios [F, M]."""
    longest = max(mel.shape[1] for mel in mels)
    features_AFM = torch.zeros(len(mels), mels[0].shape[0], longest)
    mask_AM = torch.zeros(len(mels), longest, dtype=torch.long)
    for i, mel_FM in enumerate(mels):
        features_AFM[i, :, : mel_FM.shape[1]] = mel_FM
        mask_AM[i, : mel_FM.shape[1]] = 1
    return {"input_features": features_AFM, "feature_attention_mask": mask_AM}


def concatenated(parts: Sequence[Tensor]) -> Tensor:
    """Parts one behind the other; what differs in its other dimensions (frames of sound) is padded with zeros."""
    if len({part.shape[1:] for part in parts}) == 1:
        return torch.cat(list(parts))
    largest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    whole = parts[0].new_zeros(sum(map(len, parts)), *largest)
    start = 0
    for part in parts:
        whole[(slice(start, start + len(part)), *map(slice, part.shape[1:]))] = part
        start += len(part)
    return whole


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One sample after the processor, unpadded."""

    sample: Sample
    input_ids_T: Tensor
    mels: tuple[Tensor, ...] = ()  # each [F, M]
    media: dict[str, Tensor] = field(default_factory=dict)  # patches [P, D], grids [n, 3], named as the model does
    packed: tuple[str, ...] = ()  # those of `media` of which several samples' stand along the last dimension
    interleaved: bool = False  # whether its sounds stand among the frames of its clips
    silent_clips: int = 0  # clips whose sound was wanted and that have no sound track
    per_token: dict[str, Tensor] = field(default_factory=dict)  # [T] each, such as the kinds of tokens
    answer_ids_T: Tensor | None = None  # the target and the end token, where the answer is trained as text
    descriptors: Mapping[str, Tensor] = field(default_factory=dict)  # pooled, [F] by modality, where adapters read them

    windows: tuple[Encoded, ...] = ()  # the same prompt with each further part of a long sound

    @property
    def num_bytes(self) -> int:
        """Memory held by the tensors."""
        named = (self.media, self.per_token, self.descriptors)
        tensors = (self.input_ids_T, *self.mels, self.answer_ids_T, *(t for group in named for t in group.values()))
        own = sum(t.numel() * t.element_size() for t in tensors if t is not None)
        return own + sum(window.num_bytes for window in self.windows)


class Window(NamedTuple):
    """A further part of the sounds of some samples, the `rows_R` of the batch, as inputs of the model."""

    rows_R: Tensor
    inputs: dict[str, Tensor]

    def each(self, change: Callable[[Tensor], Tensor]) -> Window:
        """The same window with changed tensors."""
        return Window(change(self.rows_R), {name: change(tensor) for name, tensor in self.inputs.items()})


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples ready for the model. `inputs` are its keyword arguments, left-padded, attention_mask [B, T] included.

    With answers, each row is its prompt and then its answer; `labels_BT` holds the answer's tokens at their own
    positions (no shift) and IGNORED everywhere else.
    """

    samples: tuple[Sample, ...]
    inputs: dict[str, Tensor]
    class_index_B: Tensor  # global class index of the label, IGNORED for free-form rows
    domain_names: tuple[str | None, ...]
    labels_BT: Tensor | None = None
    descriptors: tuple[Mapping[str, Tensor], ...] = ()  # of each sample, pooled, [F] by modality
    quarantined: tuple[Quarantined, ...] = ()
    windows: tuple[Window, ...] = ()  # parts of long sounds behind the first, which is in `inputs`

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def num_tokens(self) -> Tensor:
        """Tokens of each sample [B], those of all its windows."""
        tokens_B = self.inputs["attention_mask"].sum(1)
        for window in self.windows:
            tokens_B = tokens_B.index_add(0, window.rows_R, window.inputs["attention_mask"].sum(1))
        return tokens_B

    @property
    def prompt_mask(self) -> Tensor:
        """1 at the prompt's tokens, 0 at padding and answers, [B, T]."""
        mask_BT = self.inputs["attention_mask"]
        return mask_BT if self.labels_BT is None else mask_BT * (self.labels_BT == IGNORED)

    def pinned(self) -> Batch:
        """The same batch in page-locked memory, from which a GPU takes it while it computes."""
        return replace(
            self,
            windows=tuple(window.each(Tensor.pin_memory) for window in self.windows),
            inputs={name: tensor.pin_memory() for name, tensor in self.inputs.items()},
            class_index_B=self.class_index_B.pin_memory(),
            labels_BT=None if self.labels_BT is None else self.labels_BT.pin_memory(),
            descriptors=tuple({name: t.pin_memory() for name, t in each.items()} for each in self.descriptors),
        )

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()}
        return replace(
            self,
            inputs=moved,
            windows=tuple(window.each(lambda tensor: tensor.to(device, non_blocking=True)) for window in self.windows),
            class_index_B=self.class_index_B.to(device, non_blocking=True),
            labels_BT=None if self.labels_BT is None else self.labels_BT.to(device, non_blocking=True),
        )


class ResizeAsProcessor:
    """Frames at the size that the processor gives them, by the processor's own code: what it makes of them is the same.

    For processors that cut frames as Qwen2-VL does; `of` is None for others, whose frames are kept as they are. Where
    all frames of a clip have a budget, which a processor of this kind does not know, they are fitted to it.
    """

    def __init__(self, video_processor: Any, config: EncodeConfig) -> None:
        self._processor, self._config = video_processor, config
        self._factor = video_processor.patch_size * video_processor.merge_size
        versions = {name: installed_version(name) for name in ("torch", "torchvision", "transformers")}
        pixels = (config.min_pixels, config.max_pixels, config.clip_pixels)
        about = {"factor": self._factor, "pixels": pixels, "resample": int(video_processor.resample)}
        self.key: dict[str, Any] = about | versions

    @classmethod
    def of(cls, processor: Any, config: EncodeConfig) -> ResizeAsProcessor | None:
        """That of a processor, None where it is not known to be one of these."""
        from transformers import Qwen2VLVideoProcessor

        part: Any = getattr(processor, "video_processor", None)
        known = getattr(type(part), "_preprocess", None) is Qwen2VLVideoProcessor._preprocess
        return cls(part, config) if known and part.do_resize else None

    def __call__(self, frames: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Frames [N, H, W, 3], uint8; as they are where they would not get smaller, or be resized once more."""
        from transformers.image_utils import SizeDict

        height, width = frames.shape[1:3]
        if max(height, width) > _ODD_RATIO * min(height, width):
            return frames  # the processor refuses it
        size = self._size(height, width, self._config.pixels_of(len(frames)))
        again = self._size(*size, self._config.max_pixels)
        if size[0] * size[1] >= height * width or (again != size and self._config.clip_pixels is None):
            return frames
        stacked = torch.stack([torch.from_numpy(frames).permute(0, 3, 1, 2)])
        height, width = size
        smaller = self._processor.resize(
            image=stacked, size=SizeDict(height=height, width=width), resample=self._processor.resample
        )
        return np.ascontiguousarray(smaller[0].permute(0, 2, 3, 1).numpy())

    def _size(self, height: int, width: int, most: int) -> tuple[int, int]:
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        least = self._config.min_pixels
        size: tuple[int, int] = smart_resize(height, width, factor=self._factor, min_pixels=least, max_pixels=most)
        return size


def windows_of(media: Media, sample: Sample, longest: int) -> list[Media]:
    """The media once for each window of a long sound: as few equal parts as are no longer than `longest` samples.

    Raises MediaError for a row of several sounds, one of which is long.
    """
    if all(len(audio) <= longest for audio in media.audios):
        return [media]
    if len(media.audios) > 1:
        found = f"holds {len(media.audios)} sounds, one of them long, which cannot be heard in windows"
        fix = "Join the sounds, or use encode.long_audio=head."
        raise MediaError(found, where=sample.place(heard_in(sample)), fix=fix)
    (audio,) = media.audios
    count = -(-len(audio) // longest)
    bounds = [len(audio) * number // count for number in range(count + 1)]
    return [media._replace(audios=[audio[start:end]]) for start, end in pairwise(bounds)]


def require_short(input_ids_T: Tensor, sample: Sample, config: EncodeConfig) -> None:
    """Raises MediaError for a prompt of more than `max_tokens` tokens."""
    if len(input_ids_T) > config.max_tokens:
        found = f"the prompt has {plural(len(input_ids_T), 'token')}, more than max_tokens={config.max_tokens}"
        raise MediaError(found, where=f"{sample.where}, problem", fix="Raise max_tokens or lower max_pixels.")


def suspect(media: Media, heard: Field = "audios") -> Field | None:
    """The field whose medium a processor refuses, as far as it is known: the only one, or the one of odd shape.

    `heard` is the field of the audios.
    """
    shapes = [("images", image.shape[:2]) for image in media.images]
    shapes += [("videos", video.frames.shape[1:3]) for video in media.videos]
    odd = [name for name, sides in shapes if max(sides) > _ODD_RATIO * min(sides)]
    fields = ((heard, media.audios), ("images", media.images), ("videos", media.videos))
    present = [name for name, each in fields if each]
    named: list[Field] = [name for name in MEDIA_FIELDS if name in (odd or present)]
    return named[0] if len(named) == 1 else None


def require_finite(features: Mapping[str, Tensor], sample: Sample) -> None:
    """Raises MediaError for a medium whose features are no numbers, such as sound of absurd loudness."""
    for name, values in features.items():
        if not values.is_floating_point() or not values.numel():
            continue
        ends = torch.stack(torch.aminmax(values))  # NaN is both; a twentieth of the time of asking each value
        if not bool(torch.isfinite(ends).all()):
            medium: Field = heard_in(sample) if "feature" in name else "images" if sample.images else "videos"
            raise MediaError(f"gives {name} of NaN or infinity", where=sample.place(medium), fix="Restore the medium.")


def answer_ids(tokenizer: Any, text: str, end_token_id: int) -> Tensor:
    """An answer and the end token, as they stand behind a prompt; names of special tokens in the answer are text."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return torch.tensor([*ids, end_token_id], dtype=torch.long)


def _valid_mels(features: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """The frames of each sound that its mask calls sound, [F, M]."""
    frames = features["feature_attention_mask"].sum(-1).tolist()
    return tuple(mel[:, :n].contiguous() for mel, n in zip(features["input_features"], frames, strict=True))


def collate(
    encoded: Sequence[Encoded],
    *,
    pad_token_id: int,
    taxonomy: Taxonomy = BUILTIN,
    quarantined: Sequence[Quarantined] = (),
) -> Batch:
    """Pad encoded samples on the left to the longest. An empty list gives an empty batch that carries `quarantined`."""
    samples = tuple(e.sample for e in encoded)
    answers = [e.answer_ids_T for e in encoded]
    inputs = _inputs(encoded, pad_token_id)
    windows = []
    for number in range(max((len(e.windows) for e in encoded), default=0)):
        rows = [row for row, e in enumerate(encoded) if len(e.windows) > number]
        parts = [encoded[row].windows[number] for row in rows]
        windows.append(Window(torch.tensor(rows), _inputs(parts, pad_token_id)))
    labelled = encoded and answers[0] is not None
    indices = [taxonomy.global_index(s.dataset, s.label) if s.label is not None else IGNORED for s in samples]
    return Batch(
        samples=samples,
        inputs=inputs,
        class_index_B=torch.tensor(indices, dtype=torch.long),
        domain_names=tuple(taxonomy.dataset(s.dataset).domain for s in samples),
        labels_BT=labels(answers, inputs["input_ids"]) if labelled else None,
        descriptors=tuple(e.descriptors for e in encoded),
        quarantined=tuple(quarantined),
        windows=tuple(windows),
    )


def _inputs(encoded: Sequence[Encoded], pad_token_id: int) -> dict[str, Tensor]:
    """The model's keyword arguments for these samples, padded."""
    answers = [e.answer_ids_T for e in encoded]
    rows = [e.input_ids_T if e.answer_ids_T is None else torch.cat([e.input_ids_T, e.answer_ids_T]) for e in encoded]
    inputs = token_ids(rows, pad_token_id) if rows else {}
    mels = [mel for e in encoded for mel in e.mels]
    if mels:
        inputs |= mel_frames(mels)
    for name in sorted({name for e in encoded for name in e.media}):
        parts = [e.media[name] for e in encoded if name in e.media]
        packed = any(name in e.packed for e in encoded)
        inputs[name] = torch.cat(parts, -1) if packed else concatenated(parts)
    if any(e.interleaved for e in encoded):  # one value a row, as `omni.interleaving_by_row` reads it
        inputs["use_audio_in_video"] = torch.tensor([e.interleaved for e in encoded])
    for name in encoded[0].per_token if encoded else ():
        inputs[name] = per_token([e.per_token[name] for e in encoded], answers, inputs["input_ids"])
    return inputs


# --- the encoder ------------------------------------------------------------------------------------------------------
#
# Every feature that a processor gives is either one value a token (kept beside the tokens) or a row a medium (put
# behind those of the other samples). Encoding alone and padding afterwards gives what a processor makes of a batch.


def encoder_for(
    processor: Any,
    config: EncodeConfig,
    taxonomy: Taxonomy = BUILTIN,
    *,
    answers: bool = False,
    wording: Wording = AS_WRITTEN,
) -> Encoder:
    """The encoder of a model that answers in words. Raises ConfigError for sounds in windows, which are for heads."""
    if config.long_audio == "windows":
        found = "windows of a sound are averaged by heads, and this model answers in words"
        raise ConfigError(found, where="encode.long_audio", fix=WINDOWS_ARE_FOR_HEADS)
    return Encoder(processor, config, taxonomy, answers=answers, wording=wording)


_AS_ONE_TEXT = """\
{%- set flat = namespace(turns=[]) -%}
{%- for turn in messages -%}
{%- if turn.content is string or turn.role not in ROLES -%}
{%- set flat.turns = flat.turns + [turn] -%}
{%- else -%}
{%- set said = namespace(text='') -%}
{%- for part in turn.content -%}
{%- set said.text = said.text ~ (part.text if part.type == 'text' else MEDIA[part.type]) -%}
{%- endfor -%}
{%- set flat.turns = flat.turns + [{'role': turn.role, 'content': said.text}] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = flat.turns -%}
"""


def give_template(processor: Any) -> None:
    """Give a processor without a chat template that of its tokenizer; where that takes a turn as one text, or those of
    a role (GLM-4.1V's system prompt), media stand in the text as the tokens that the processor looks for."""
    template = getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)
    if not isinstance(template, str):
        return
    processor.chat_template = template
    texts = [{"role": role, "content": [{"type": "text", "text": _MARK}]} for role in ("system", "user", "assistant")]
    system, asked, answer = texts

    def shows(turns: list[Message]) -> bool:
        try:
            shown = processor.apply_chat_template(turns, tokenize=False)
        except (TypeError, TemplateError):
            return False  # it adds texts; others show the list as Python has it, or nothing
        return shown.count(_MARK) >= len(turns) and "'type'" not in shown

    roles = ["system", "user", "assistant"]
    if shows([asked]):
        shown_so = {"system": shows([system, asked]), "assistant": shows([asked, answer])}
        roles = [role for role, whole in shown_so.items() if not whole]
    if roles:
        tokens = {kind: getattr(processor, f"{kind}_token", None) for kind in MODALITIES}
        named = json.dumps({kind: token for kind, token in tokens.items() if isinstance(token, str)})
        flat = _AS_ONE_TEXT.replace("MEDIA", named).replace("ROLES", json.dumps(roles))
        processor.chat_template = flat + template


class TextProcessor:
    """The processor of a chat model of text alone: its tokenizer, behind what processors have. It takes no media."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @property
    def chat_template(self) -> Any:
        """That of the tokenizer."""
        return self.tokenizer.chat_template

    def apply_chat_template(self, messages: Sequence[Message], **options: Any) -> Any:
        """The tokenizer's, whose templates take a turn's content as one text."""
        texts = [{**turn, "content": "".join(part["text"] for part in turn["content"])} for turn in messages]
        return self.tokenizer.apply_chat_template(texts, **options)

    def __call__(self, text: Sequence[str], *, text_kwargs: Mapping[str, Any] | None = None, **options: Any) -> Any:
        """The tokens of texts."""
        return self.tokenizer(list(text), **options, **(text_kwargs or {}))

    def save_pretrained(self, folder: Any) -> None:
        """Write the tokenizer."""
        self.tokenizer.save_pretrained(folder)


class VoxtralProcessor:
    """Voxtral's: each sound in windows of the length of its extractor, as many as it fills, padded with silence.

    transformers' own gives prompts and sound to mistral-common together, which takes sound as files; it has neither
    tokens for a prompt with a sound in it nor a template. This one has the same tokens, by the fast tokenizer that
    transformers makes of tekken.json.
    """

    _FRAMES_A_TOKEN = 8  # of mel: two convolutions make one of two, and the projector takes four together

    def __init__(self, feature_extractor: Any, tokenizer: Any) -> None:
        """`tokenizer` is that of `tekken_tokenizer`, or one that was saved."""
        self.feature_extractor, self.tokenizer = feature_extractor, tokenizer
        self.audio_token, self.audio_bos_token = "[AUDIO]", "[BEGIN_AUDIO]"
        tokenizer.chat_template = self.chat_template = _VOXTRAL_TEMPLATE

    def apply_chat_template(self, messages: Sequence[Message], **options: Any) -> Any:
        """That of the tokenizer."""
        return self.tokenizer.apply_chat_template(messages, **options)

    def __call__(
        self,
        text: Sequence[str],
        audio: Sequence[np.ndarray[Any, Any]] = (),
        *,
        text_kwargs: Mapping[str, Any] | None = None,
        audio_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """`input_ids` of one text, and the windows of its sounds, one behind the other, `input_features` [A, F, M]."""
        extractor, windows = self.feature_extractor, []
        parts = text[0].split(self.audio_token)
        for number, sound in enumerate(audio):
            how = {"padding": True, "pad_to_multiple_of": extractor.n_samples, **options, **(audio_kwargs or {})}
            (mel_FM,) = extractor(sound, **how)["input_features"]
            windows += mel_FM.split(extractor.nb_max_frames, -1)
            parts[number] += self.audio_token * (mel_FM.shape[-1] // self._FRAMES_A_TOKEN)
        features = dict(self.tokenizer(["".join(parts)], **options, **(text_kwargs or {})))
        return features | ({"input_features": torch.stack(windows)} if windows else {})

    def save_pretrained(self, folder: Any) -> None:
        """Write the tokenizer, as transformers does, and the settings of the extractor."""
        self.tokenizer.init_kwargs["processor_class"] = "VoxtralProcessor"
        self.tokenizer.save_pretrained(folder)
        self.feature_extractor.save_pretrained(folder)


_VOXTRAL_TEMPLATE = """\
{{- bos_token -}}
{%- for turn in messages -%}
{%- set said = namespace(text=turn.content if turn.content is string else '') -%}
{%- for part in ([] if turn.content is string else turn.content) -%}
{%- set said.text = said.text ~ ('[BEGIN_AUDIO][AUDIO]' if part.type == 'audio' else part.text | default('')) -%}
{%- endfor -%}
{%- if turn.role == 'assistant' -%}{{ said.text + eos_token }}
{%- elif turn.role == 'system' -%}{{ '[SYSTEM_PROMPT]' + said.text + '[/SYSTEM_PROMPT]' }}
{%- else -%}{{ '[INST]' + said.text + '[/INST]' }}{%- endif -%}
{%- endfor -%}
"""


def tekken_tokenizer(file: Path) -> Any:
    """The tokenizer of a tekken.json. Raises KeyError, TypeError or ValueError for a file that is none."""
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.mistral import MistralConverter

    read = json.loads(file.read_text(encoding="utf-8"))
    config, named = read["config"], {each["rank"]: each["token_str"] for each in read["special_tokens"]}
    count, size = config["default_num_special_tokens"], config["default_vocab_size"]
    special = [named.get(rank, f"<SPECIAL_{rank}>") for rank in range(count)]
    ids: dict[str | bytes, int] = {token: rank for rank, token in enumerate(special)}
    ids |= {base64.b64decode(each["token_bytes"]): each["rank"] for each in read["vocab"][: size - count]}
    converter = MistralConverter(vocab=ids, pattern=config["pattern"], additional_special_tokens=special)
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    known = {role: token for role, token in roles.items() if token in special}
    return PreTrainedTokenizerFast(tokenizer_object=converter.converted(), padding_side="left", **known)


class Encoder:
    """Applies a chat model's processor to one sample at a time. Picklable, so that worker processes can hold it."""

    decoded: DecodedCache | None = None
    """where media are kept that were decoded once; set by the loader"""

    def __init__(
        self,
        processor: Any,
        config: EncodeConfig,
        taxonomy: Taxonomy = BUILTIN,
        *,
        answers: bool = False,
        wording: Wording = AS_WRITTEN,
        descriptors: Mapping[str, DescriptorConfig] | None = None,
        dims: Mapping[str, Mapping[str, int]] | None = None,
    ) -> None:
        """With `answers`, every sample carries its answer as text behind the prompt, to be trained on.

        Samples of the datasets in `descriptors` also carry their pooled descriptors, for adapters, which read vectors
        of the sizes `dims`.
        """
        self.processor, self.config, self.taxonomy = processor, config, taxonomy
        self.answers, self.wording, self.descriptors, self.dims = answers, wording, descriptors or {}, dims or {}
        self.silent = SilentClips()

    @property
    def pad_token_id(self) -> int:
        """Id that `collate` pads with."""
        tokenizer = self.processor.tokenizer
        return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)

    @cached_property
    def end_token_id(self) -> int:
        """The token behind an answer."""
        return end_token_id(self.processor)

    @cached_property
    def resize(self) -> ResizeAsProcessor | None:
        """What fits the frames of a clip to a budget of theirs, where there is one and the processor does not know it.

        Raises ConfigError for a processor whose frames have one size.
        """
        return clip_resize(self.processor, self.config)

    @cached_property
    def _plain(self) -> PlainText:
        return PlainText(self.processor)

    def encode(self, sample: Sample) -> Encoded:
        """Decode the media of a sample and run the processor, once for each window of a long sound.

        Raises MediaError naming the place when a medium cannot be read or encoded, is longer than `max_audio_seconds`
        or than the model takes, or the prompt has more than `max_tokens` tokens; InputError when the model does not
        take this kind of medium at all.
        """
        config, labelled = self._hearing(sample), self.taxonomy.dataset(sample.dataset).domain is not None
        how: dict[str, Any] = {"windows": labelled, "decoded": self.decoded, "resize": self.resize}
        media = load_media(sample, config, SAMPLING_RATE, **how)
        self._require_taken(media, sample)
        parts = windows_of(media, sample, int(config.heard_seconds * SAMPLING_RATE))
        first, *later = (self._perceived(sample, part) for part in parts)
        answer = None
        if self.answers:
            with sample.blamed():
                said = self.wording.answer(sample, taught(sample, self.taxonomy))
                answer = answer_ids(self.processor.tokenizer, said, self.end_token_id)
        wanted = self.descriptors.get(sample.dataset)
        return replace(
            first,
            windows=tuple(later),
            answer_ids_T=answer,
            descriptors={} if wanted is None else pooled_descriptors(sample, wanted, self.dims.get(sample.dataset)),
        )

    def _perceived(self, sample: Sample, media: Media) -> Encoded:
        """The prompt with these media."""
        self._require_within_window(media, sample)
        with sample.blamed(suspect(media, heard_in(sample))):
            features = self._call(self.messages(sample, len(media.audios)), media)
            require_finite(features, sample)
        input_ids_T = features.pop("input_ids")[0]
        features.pop("attention_mask", None)
        require_short(input_ids_T, sample, self.config)
        self._require_placed(input_ids_T, media, sample)
        mels: tuple[Tensor, ...] = ()
        if "feature_attention_mask" in features and self._audio_window_seconds is None:
            mels = _valid_mels(features)
            del features["input_features"], features["feature_attention_mask"]
        per_token = {k: v[0] for k, v in features.items() if k.endswith("token_type_ids")}
        named = {k: v for k, v in features.items() if k not in per_token}
        return Encoded(
            sample=sample,
            input_ids_T=input_ids_T,
            mels=mels,
            media=named,
            per_token=per_token,
            packed=FAMILIES.get(self._name, Family()).packed,
            interleaved=media.interleaved,
            silent_clips=media.silent_clips,
        )

    def messages(self, sample: Sample, sounds: int | None = None) -> list[Message]:
        """The chat messages of a sample, whose text is text; `sounds` as in `messages_of`."""
        return messages_of(sample, self.config, self.wording, self._plain, sounds=sounds)

    def text(self, sample: Sample) -> str:
        """The prompt as the chat template renders it, media still as single placeholders."""
        return self._rendered(self.messages(sample))

    def _call(self, messages: list[Message], media: Media) -> dict[str, Tensor]:
        """The processor's features of one prompt and its media."""
        messages, media = self._shown(messages, media)
        return features_of(
            self.processor,
            self._rendered(messages),
            media.audios,
            media.images,
            [torch.from_numpy(video.frames).permute(0, 3, 1, 2) for video in media.videos],
            [video.duration_seconds for video in media.videos],
            pixels={"min_pixels": self.config.min_pixels, "max_pixels": self.config.max_pixels},
            clip_pixels=self.config.clip_pixels,
            interleaved=media.interleaved,
        )

    def _hearing(self, sample: Sample) -> EncodeConfig:
        """The config with the model's own limit of a sound, where that is shorter and sounds may be cut."""
        config = self.config
        heard = sample.audios or (sample.videos and config.sound_of_clips != "off")
        limit = self._audio_window_seconds if heard else None
        if limit is None or config.long_audio == "refuse" or limit >= config.heard_seconds:
            return config
        kept: LongAudio = "windows" if config.long_audio == "windows" else "head"
        return replace(config, long_audio=kept, max_audio_seconds=limit)

    def _shown(self, messages: list[Message], media: Media) -> tuple[list[Message], Media]:
        return _as_frames(messages, media) if media.videos and self._shows_frames(media) else (messages, media)

    def _shows_frames(self, media: Media) -> bool:
        """Whether clips go to the model as pictures, beside the pictures of the row."""
        return not self._takes("video") or bool(media.images and FAMILIES.get(self._name, Family()).apart)

    def _rendered(self, messages: list[Message]) -> str:
        text: str = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return text

    @property
    def _name(self) -> str:
        return type(self.processor).__name__

    def _takes(self, modality: Modality) -> bool:
        return takes(self.processor, modality)

    def _require_taken(self, media: Media, sample: Sample) -> None:
        if media.audios and not self._takes("audio"):
            raise InputError(f"{self._name} takes no audio", where=sample.place(heard_in(sample)), fix=_FILTER)
        seen: Field = "images" if media.images else "videos"
        if (media.images or media.videos) and not (self._takes("image") or self._takes("video")):
            raise InputError(f"{self._name} takes no {seen}", where=sample.place(seen), fix=_FILTER)

    def _require_within_window(self, media: Media, sample: Sample) -> None:
        limit = self._audio_window_seconds if media.audios else None
        for audio in media.audios:
            if limit is not None and len(audio) > limit * SAMPLING_RATE:
                seconds = len(audio) / SAMPLING_RATE
                found = f"audio of {seconds:.1f} s, more than the {limit:g} s that {self._name} takes"
                fix = "Split the clip, or use another model."
                raise MediaError(found, where=sample.place(heard_in(sample)), fix=fix)

    def _require_placed(self, input_ids_T: Tensor, media: Media, sample: Sample) -> None:
        """A chat template that does not know a kind of medium leaves it out; the model would never see it."""
        fields: dict[Modality, Field] = {"image": "images", "video": "videos", "audio": heard_in(sample)}
        counts = {"image": len(media.images), "video": len(media.videos), "audio": len(media.audios)}
        for modality in MODALITIES:
            kind: Modality = "image" if modality == "video" and self._shows_frames(media) else modality
            seen: Modality = "image" if kind == "video" and FAMILIES.get(self._name, Family()).written else kind
            ids = media_placeholders(self.processor, kind)
            stand = media_placeholders(self.processor, seen)
            if not counts[modality] or not ids or any(int((input_ids_T == i).sum()) for i in stand):
                continue
            rendered = self._rendered(self._shown(self.messages(sample, len(media.audios)), media)[0])
            if any(self.processor.tokenizer.convert_ids_to_tokens(i) in rendered for i in ids):
                found = f"is too small or too short for {self._name}, which makes no token of it"
                raise MediaError(found, where=sample.place(fields[modality]), fix="Remove the row.")
            found = f"the chat template of {self._name} has no place for a medium of type {modality}"
            raise InputError(found, where=sample.where, fix=_FILTER)

    @cached_property
    def _audio_window_seconds(self) -> float | None:
        """The length to which the processor pads every sound, which its model then insists on, or for which it has
        tokens; None without one."""
        of_token = FAMILIES.get(self._name, Family()).seconds_a_token
        if of_token is not None:
            return float(self.processor.audio_seq_length * of_token)
        extractor = getattr(self.processor, "feature_extractor", None)
        samples = getattr(extractor, "n_samples", None)
        if samples is None or self._name in FAMILIES:
            return None
        message: Message = {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "."}]}
        lengths = (SAMPLING_RATE // 10, SAMPLING_RATE // 2)
        short, long = (self._call([message], Media([np.zeros(n, np.float32)], [], [])) for n in lengths)
        same = all(short[k].shape == long[k].shape for k in short if "feature" in k)
        return samples / SAMPLING_RATE if same else None


def takes(processor: Any, modality: Modality) -> bool:
    """Whether a processor has a part for that kind of medium; clips may also be shown as their frames."""
    sound = ("feature_extractor", "audio_processor")
    parts = {"image": ("image_processor",), "video": ("video_processor",), "audio": sound}
    return any(getattr(processor, name, None) is not None for name in parts[modality])


def perceived(processor: Any) -> tuple[Modality, ...]:
    """The modalities that reach a model: those of its processor, as far as its chat template has a place for them."""

    def rendered(*media: Modality) -> str:
        content = [{"type": kind} for kind in media] + [{"type": "text", "text": _MARK}]
        text: str = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        return text

    own = [kind for kind in MODALITIES if takes(processor, kind)]
    placed = {kind for kind in own if rendered(kind) != rendered()}
    if "image" in placed and "video" not in own:
        placed.add("video")  # as its frames
    return tuple(kind for kind in MODALITIES if kind in placed)


def require_perceived(processor: Any, config: EncodeConfig, columns: Columns, *, where: str) -> None:
    """Raises InputError for rows with media of a kind that the model does not take, before any of them is read."""
    known = perceived(processor)
    counts = {"image": columns.num_images, "video": columns.num_videos, "audio": columns.num_audios}
    name = type(processor).__name__
    for modality in config.modalities:
        rows = int((counts[modality] > 0).sum())
        if rows and modality not in known:
            noun = "audio" if modality == "audio" else f"{modality}s"
            found = f"{name} takes no {noun}, and {plural(rows, 'row', 'has|have')} some"
            raise InputError(found, where=where, fix=_FILTER)
    if config.sound_of_clips != "off" and "audio" in config.modalities and bool((columns.num_videos > 0).any()):
        if "audio" not in known:
            fix = "Leave encode.sound_of_clips off."
            raise InputError(f"{name} takes no audio, so that it hears no clip", where=where, fix=fix)
        if config.sound_of_clips == "interleaved" and not FAMILIES.get(name, Family()).interleaves:
            fix = "Use encode.sound_of_clips=separate."
            raise InputError(f"{name} takes no sound among the frames of a clip", where=where, fix=fix)
    if config.fps is not None and "video" in config.modalities and FAMILIES.get(name, Family()).even_clips:
        found = f"{name} takes clips of one number of frames together"
        raise ConfigError(found, where="encode.fps", fix="Leave it out: each clip then has encode.num_frames.")
    clip_resize(processor, config)


def clip_resize(processor: Any, config: EncodeConfig) -> ResizeAsProcessor | None:
    """What fits the frames of a clip to `config.clip_pixels`; None without that, or where the processor does it itself.

    Raises ConfigError for a processor whose frames have a size of their own.
    """
    if config.clip_pixels is None or FAMILIES.get(type(processor).__name__, Family()).whole_clips:
        return None
    resize = ResizeAsProcessor.of(processor, config)
    if resize is None and "video" in config.modalities and (takes(processor, "video") or takes(processor, "image")):
        found = f"{type(processor).__name__} does not make the frames of a clip smaller together"
        raise ConfigError(found, where="encode.clip_pixels", fix="Leave it out, or lower encode.num_frames.")
    return resize


def _as_frames(messages: list[Message], media: Media) -> tuple[list[Message], Media]:
    """Every video as its frames, which are images, in the place of the video."""
    images, videos = iter(media.images), iter(media.videos)
    ordered: list[Any] = []
    changed = []
    for message in messages:
        content: list[dict[str, str]] = []
        for item in message["content"]:
            if item["type"] == "video":
                frames = list(next(videos).frames)
                ordered += frames
                content += [{"type": "image"}] * len(frames)
                continue
            if item["type"] == "image":
                ordered.append(next(images))
            content.append(item)
        changed.append({**message, "content": content})
    return changed, media._replace(images=ordered, videos=[])


def media_placeholders(processor: Any, modality: Modality) -> list[int]:
    """Ids of the tokens that stand for a medium in the prompt; empty where the processor does not tell."""
    ids = [i for i in getattr(processor, f"{modality}_token_ids", None) or [] if i is not None]
    if not ids:
        token = getattr(processor, f"{modality}_token", None)
        ids = known_ids(processor.tokenizer, [token] if isinstance(token, str) else [])
    return [int(i) for i in ids]


def known_ids(tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """Ids of those tokens that a tokenizer has; it takes others for its unknown one."""
    ids = [tokenizer.convert_tokens_to_ids(token) for token in tokens]
    return [
        int(i)
        for i, token in zip(ids, tokens, strict=True)
        if i is not None and tokenizer.convert_ids_to_tokens(i) == token
    ]


def end_token_id(processor: Any) -> int:
    """The token that ends an answer: the first special one that the chat template writes behind the assistant's text.

    It need not be the tokenizer's own end of a text (Gemma ends a turn with another token).
    """
    tokenizer = processor.tokenizer
    turns = [("user", "."), ("assistant", _MARK)]
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    _, found, behind = processor.apply_chat_template(messages, tokenize=False).rpartition(_MARK)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"] if found else []
    return next((int(i) for i in ids if i in special), int(tokenizer.eos_token_id))
