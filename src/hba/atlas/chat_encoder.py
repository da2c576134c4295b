"""From samples to the inputs of any transformers chat model, through its own processor and chat template.

Nothing here knows a model by name: what a processor takes (images, videos, sound), which tokens stand for media and
which token ends an answer are asked of the processor. A video goes to a model without a video processor as its frames,
each an image. A medium that the model cannot take is an error that names the modality filter; nothing is left out
silently, and no sound is cut.

Every feature that a processor gives is either one value a token (kept beside the tokens) or a row a medium (put behind
those of the other samples). Encoding alone and padding afterwards gives what a processor makes of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hba.atlas.batch import (
    Encoded,
    Encoder,
    Media,
    SampleEncoder,
    answer_ids,
    load_media,
    messages_of,
    require_finite,
    require_short,
    suspect,
)
from hba.atlas.config import WINDOWS_ARE_FOR_HEADS, EncodeConfig
from hba.atlas.media import Video
from hba.atlas.prompt import AS_WRITTEN, MODALITIES, Message, Modality, PlainText, Wording, taught
from hba.atlas.sample import Field, Sample
from hba.errors import ConfigError, InputError, MediaError
from hba.taxonomy import BUILTIN, Taxonomy

SAMPLING_RATE = 16000  # of the atlas' decoded sound
_MARK = "ANSWER"


def encoder_for(
    processor: Any,
    config: EncodeConfig,
    taxonomy: Taxonomy = BUILTIN,
    *,
    answers: bool = False,
    wording: Wording = AS_WRITTEN,
) -> SampleEncoder:
    """The encoder of a processor: OmniSapiens' own for Qwen2.5-Omni, `ChatEncoder` for all others."""
    from transformers import Qwen2_5OmniProcessor

    kind = Encoder if isinstance(processor, Qwen2_5OmniProcessor) else ChatEncoder
    return kind(processor, config, taxonomy, answers=answers, wording=wording)


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


class ChatEncoder:
    """Applies a chat model's processor to one sample at a time."""

    def __init__(
        self,
        processor: Any,
        config: EncodeConfig,
        taxonomy: Taxonomy = BUILTIN,
        *,
        answers: bool = False,
        wording: Wording = AS_WRITTEN,
    ) -> None:
        """With `answers`, every sample carries its answer as text behind the prompt, to be trained on.

        Raises ConfigError for sounds in windows, which are for heads.
        """
        if config.long_audio == "windows":
            found = "windows of a sound are averaged by heads, and this model answers in words"
            raise ConfigError(found, where="encode.long_audio", fix=WINDOWS_ARE_FOR_HEADS)
        self.processor, self.config, self.taxonomy = processor, config, taxonomy
        self.answers, self.wording = answers, wording
        self.end_token_id = end_token_id(processor)

    @property
    def pad_token_id(self) -> int:
        """Id that `collate` pads with."""
        tokenizer = self.processor.tokenizer
        return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)

    def encode(self, sample: Sample) -> Encoded:
        """Decode the media of a sample and run the processor.

        Raises MediaError naming the place when a medium cannot be read or is longer than the model takes, InputError
        when the model does not take this kind of medium at all.
        """
        media = load_media(sample, self._hearing(sample), SAMPLING_RATE)
        self._require_taken(media, sample)
        with sample.blamed(suspect(media)):
            features = self._call(self.messages(sample), media)
            require_finite(features, sample)
        input_ids_T = features.pop("input_ids")[0]
        features.pop("attention_mask", None)
        require_short(input_ids_T, sample, self.config)
        self._require_placed(input_ids_T, media, sample)
        per_token = {k: v[0] for k, v in features.items() if k.endswith("token_type_ids")}
        answer = None
        if self.answers:
            with sample.blamed():
                said = self.wording.answer(sample, taught(sample, self.taxonomy))
                answer = answer_ids(self.processor.tokenizer, said, self.end_token_id)
        return Encoded(
            sample=sample,
            input_ids_T=input_ids_T,
            media={k: v for k, v in features.items() if k not in per_token},
            per_token=per_token,
            answer_ids_T=answer,
        )

    @cached_property
    def _plain(self) -> PlainText:
        return PlainText(self.processor)

    def messages(self, sample: Sample) -> list[Message]:
        """The chat messages of a sample, whose text is text."""
        return messages_of(sample, self.config, self.wording, self._plain)

    def _call(self, messages: list[Message], media: Media) -> dict[str, Tensor]:
        """The processor's features of one prompt and its media."""
        messages, media = self._shown(messages, media)
        text = self._rendered(messages)
        bos = self.processor.tokenizer.bos_token
        call: dict[str, Any] = {"text": [text], "return_tensors": "pt"}
        if bos is not None and text.startswith(bos):
            call["text_kwargs"] = {"add_special_tokens": False}
        if media.audios:
            call |= {"audio": media.audios, "audio_kwargs": {"sampling_rate": SAMPLING_RATE, "truncation": False}}
        if media.images:
            pixels = self._pixels(self.processor.image_processor)
            call |= {"images": [media.images], "images_kwargs": pixels | {"input_data_format": "channels_last"}}
        if media.videos:
            call |= self._videos(media.videos)
        return {k: torch.as_tensor(v) for k, v in self.processor(**call).items()}

    def _hearing(self, sample: Sample) -> EncodeConfig:
        """The config with the model's own limit of a sound, where that is shorter and sounds may be cut."""
        limit = self._audio_window_seconds if sample.audios and self._takes("audio") else None
        if limit is None or self.config.long_audio == "refuse" or limit >= self.config.heard_seconds:
            return self.config
        return replace(self.config, long_audio="head", max_audio_seconds=limit)

    def _shown(self, messages: list[Message], media: Media) -> tuple[list[Message], Media]:
        return _as_frames(messages, media) if media.videos and not self._takes("video") else (messages, media)

    def _rendered(self, messages: list[Message]) -> str:
        text: str = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return text

    def _videos(self, videos: Sequence[Video]) -> dict[str, Any]:
        # The frames are evenly spread over the clip; processors that tell the model of time ask for their rate.
        rates = [video.rate_hz for video in videos]
        metadata = [
            {"total_num_frames": len(v.frames), "fps": rate, "frames_indices": list(range(len(v.frames)))}
            for v, rate in zip(videos, rates, strict=True)
        ]
        frames = [torch.from_numpy(video.frames).permute(0, 3, 1, 2) for video in videos]
        options = {"do_sample_frames": False, "video_metadata": metadata}
        return {"videos": frames, "videos_kwargs": options | self._pixels(self.processor.video_processor)}

    def _pixels(self, processor: Any) -> dict[str, int]:
        """The area of an image, for processors that resize by area; others have a size that their model needs."""
        if "min_pixels" not in getattr(processor.valid_kwargs, "__annotations__", {}):
            return {}
        return {"min_pixels": self.config.min_pixels, "max_pixels": self.config.max_pixels}

    @property
    def _name(self) -> str:
        return type(self.processor).__name__

    def _takes(self, modality: Modality) -> bool:
        parts = {"image": "image_processor", "video": "video_processor", "audio": "feature_extractor"}
        return getattr(self.processor, parts[modality], None) is not None

    def _require_taken(self, media: Media, sample: Sample) -> None:
        if media.audios and not self._takes("audio"):
            raise InputError(f"{self._name} takes no audio", where=sample.place("audios"), fix=_FILTER)
        seen: Field = "images" if media.images else "videos"
        if (media.images or media.videos) and not (self._takes("image") or self._takes("video")):
            raise InputError(f"{self._name} takes no {seen}", where=sample.place(seen), fix=_FILTER)
        limit = self._audio_window_seconds if media.audios else None
        for audio in media.audios:
            if limit is not None and len(audio) > limit * SAMPLING_RATE:
                seconds = len(audio) / SAMPLING_RATE
                found = f"audio of {seconds:.1f} s, more than the {limit:g} s that {self._name} takes"
                raise MediaError(found, where=sample.place("audios"), fix="Split the clip, or use another model.")

    def _require_placed(self, input_ids_T: Tensor, media: Media, sample: Sample) -> None:
        """A chat template that does not know a kind of medium leaves it out; the model would never see it."""
        fields: dict[Modality, Field] = {"image": "images", "video": "videos", "audio": "audios"}
        counts = {"image": len(media.images), "video": len(media.videos), "audio": len(media.audios)}
        for modality in MODALITIES:
            kind: Modality = "image" if modality == "video" and not self._takes("video") else modality
            ids = media_placeholders(self.processor, kind)
            if not counts[modality] or not ids or any(int((input_ids_T == i).sum()) for i in ids):
                continue
            rendered = self._rendered(self._shown(self.messages(sample), media)[0])
            if any(self.processor.tokenizer.convert_ids_to_tokens(i) in rendered for i in ids):
                found = f"is too small or too short for {self._name}, which makes no token of it"
                raise MediaError(found, where=sample.place(fields[modality]), fix="Remove the row.")
            found = f"the chat template of {self._name} has no place for a medium of type {modality}"
            raise InputError(found, where=sample.where, fix=_FILTER)

    @cached_property
    def _audio_window_seconds(self) -> float | None:
        """The length to which the processor pads every sound, which its model then insists on; None without one."""
        samples = getattr(self.processor.feature_extractor, "n_samples", None)
        if samples is None:
            return None
        message: Message = {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "."}]}
        lengths = (SAMPLING_RATE // 10, SAMPLING_RATE // 2)
        short, long = (self._call([message], Media([np.zeros(n, np.float32)], [], [])) for n in lengths)
        same = all(short[k].shape == long[k].shape for k in short if "feature" in k)
        return samples / SAMPLING_RATE if same else None


_FILTER = "Leave the modality out: encode.modalities=[image, video] or the like (hba predict: --modalities video)."


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
    return changed, Media(media.audios, ordered, [])


def media_placeholders(processor: Any, modality: Modality) -> list[int]:
    """Ids of the tokens that stand for a medium in the prompt; empty where the processor does not tell."""
    ids = [i for i in getattr(processor, f"{modality}_token_ids", None) or [] if i is not None]
    if not ids:
        token = getattr(processor, f"{modality}_token", None)
        ids = [processor.tokenizer.convert_tokens_to_ids(token)] if isinstance(token, str) else []
    return [int(i) for i in ids]


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
