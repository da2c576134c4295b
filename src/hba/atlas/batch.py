"""From samples to model inputs: the real processor once a sample, then padding to the longest of the batch.

`Encoder` turns one `Sample` into unpadded features (`Encoded`); `collate` pads a list of them into a `Batch`. Encoding
a sample alone and padding afterwards is what makes batches tight, cacheable and independent of their neighbours. Audio
is never cut and never padded to the processor's window; a sample whose medium cannot be read is not replaced, it
travels in `Batch.quarantined`.

Shapes: B samples, T tokens, A audios, M mel frames, F mel bins, P vision patches, D patch values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from hba.atlas.media import Frames
from hba.atlas.prompt import MODALITIES, Modality, build_messages
from hba.atlas.sample import Quarantined, Sample
from hba.config import option
from hba.errors import ConfigError, MediaError
from hba.taxonomy import BUILTIN, Taxonomy

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """How a sample becomes tokens, mel frames and patches."""

    num_frames: Annotated[int, Field(ge=2, multiple_of=2)] = option(8, "frames taken from each video, an even number")
    frames: Frames = option("exact", "exact frames, or nearest_keyframe: inexact, faster where keyframes are close")
    min_pixels: Annotated[int, Field(ge=784)] = option(3136, "smallest area of a frame or image after resizing")
    max_pixels: Annotated[int, Field(ge=784)] = option(50176, "largest area of a frame or image after resizing")
    max_audio_seconds: Annotated[float, Field(gt=0)] = option(
        300.0, "a longer audio quarantines its sample; nothing is cut"
    )
    max_tokens: Annotated[int, Field(ge=1)] = option(32768, "a longer prompt quarantines its sample; nothing is cut")
    modalities: tuple[Modality, ...] = option(MODALITIES, "media that reach the model; the others are left out")
    system_prompt: str | None = option(None, "system message put in front of every prompt")

    def __post_init__(self) -> None:
        if self.max_pixels < self.min_pixels:
            what = f"encode.max_pixels is {self.max_pixels}, below encode.min_pixels of {self.min_pixels}"
            raise ConfigError(what, fix="Raise max_pixels or lower min_pixels.")


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One sample after the processor, unpadded."""

    sample: Sample
    input_ids_T: Tensor
    mels: tuple[Tensor, ...] = ()  # each [F, M]
    vision: dict[str, Tensor] = field(default_factory=dict)  # patches [P, D] and grids [n, 3], named as the model does
    answer_ids_T: Tensor | None = None  # the target and the end token, where the answer is trained as text

    @property
    def num_bytes(self) -> int:
        """Memory held by the tensors."""
        tensors = (self.input_ids_T, *self.mels, *self.vision.values(), self.answer_ids_T)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


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
    quarantined: tuple[Quarantined, ...] = ()

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def prompt_mask(self) -> Tensor:
        """1 at the prompt's tokens, 0 at padding and answers, [B, T]."""
        mask_BT = self.inputs["attention_mask"]
        return mask_BT if self.labels_BT is None else mask_BT * (self.labels_BT == IGNORED)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()}
        return replace(
            self,
            inputs=moved,
            class_index_B=self.class_index_B.to(device, non_blocking=True),
            labels_BT=None if self.labels_BT is None else self.labels_BT.to(device, non_blocking=True),
        )


class Encoder:
    """Applies a Qwen2.5-Omni processor to one sample at a time. Picklable, so that worker processes can hold it."""

    def __init__(
        self, processor: Any, config: EncodeConfig, taxonomy: Taxonomy = BUILTIN, *, answers: bool = False
    ) -> None:
        """With `answers`, every sample carries its target as text behind the prompt, to be trained on."""
        self.processor, self.config, self.taxonomy, self.answers = processor, config, taxonomy, answers

    @property
    def pad_token_id(self) -> int:
        """Id that `collate` pads with."""
        return int(self.processor.tokenizer.pad_token_id)

    def text(self, sample: Sample) -> str:
        """The prompt as the chat template renders it, media still as single placeholders."""
        counts: dict[Modality, int] = {"image": sample.images, "video": sample.videos, "audio": sample.audios}
        messages = build_messages(
            sample.problem,
            counts,
            where=sample.where,
            modalities=self.config.modalities,
            system_prompt=self.config.system_prompt,
        )
        rendered: str = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return rendered

    def encode(self, sample: Sample) -> Encoded:
        """Decode the media of a sample and run the processor.

        Raises MediaError naming the place when a medium cannot be read, is longer than `max_audio_seconds`, or the
        prompt has more than `max_tokens` tokens.
        """
        audios, images, videos = self._media(sample)
        spans = [v.duration_seconds for v in videos]
        call: dict[str, Any] = {"text": [self.text(sample)], "return_tensors": "pt"}
        if audios:
            call |= {"audio": audios, "audio_kwargs": {"max_length": self._window(audios)}}
        pixels = {"min_pixels": self.config.min_pixels, "max_pixels": self.config.max_pixels}
        if images:
            call |= {"images": images, "images_kwargs": pixels}
        if videos:
            frames = [torch.from_numpy(v.frames).permute(0, 3, 1, 2) for v in videos]
            call |= {"videos": frames, "videos_kwargs": pixels | {"do_sample_frames": False}}
        features = self.processor(**call)
        vision = {k: v for k, v in features.items() if k.startswith(("pixel_values", "image_grid", "video_grid"))}
        if videos:
            step = self.processor.video_processor.temporal_patch_size / self.config.num_frames
            vision["video_second_per_grid"] = torch.tensor([step * span for span in spans], dtype=torch.float32)
        input_ids_T = features["input_ids"][0]
        if len(input_ids_T) > self.config.max_tokens:
            found = f"the prompt has {len(input_ids_T)} tokens, more than max_tokens={self.config.max_tokens}"
            raise MediaError(found, where=f"{sample.where}, problem", fix="Raise max_tokens or lower max_pixels.")
        answer = self._answer(sample) if self.answers else None
        mels = _valid_mels(features)
        return Encoded(sample=sample, input_ids_T=input_ids_T, mels=mels, vision=vision, answer_ids_T=answer)

    def _answer(self, sample: Sample) -> Tensor:
        tokenizer = self.processor.tokenizer
        ids: list[int] = tokenizer(sample.target, add_special_tokens=False)["input_ids"]
        return torch.tensor([*ids, tokenizer.eos_token_id], dtype=torch.long)

    def _media(self, sample: Sample) -> tuple[list[np.ndarray[Any, Any]], list[Any], list[Any]]:
        wanted = self.config.modalities
        audios = [a.samples for a in sample.load_audios()] if "audio" in wanted else []
        rate = self.processor.feature_extractor.sampling_rate
        for audio in audios:
            if len(audio) / rate > self.config.max_audio_seconds:
                limit = self.config.max_audio_seconds
                found = f"audio of {len(audio) / rate:.1f} s, more than max_audio_seconds={limit}"
                raise MediaError(found, where=sample.place("audios"), fix="Raise max_audio_seconds or split the clip.")
        images = list(sample.load_images()) if "image" in wanted else []
        videos = sample.load_videos(self.config.num_frames, frames=self.config.frames) if "video" in wanted else []
        return audios, images, videos

    def _window(self, audios: Sequence[np.ndarray[Any, Any]]) -> int:
        # The extractor's own window (30 or 300 s) pads short clips and silently cuts long ones. One FFT window of
        # zeros behind the longest clip gives the same valid frames as any longer padding does.
        extractor = self.processor.feature_extractor
        hop = int(extractor.hop_length)
        longest: int = max(map(len, audios)) + int(extractor.n_fft)
        return math.ceil(longest / hop) * hop


def _valid_mels(features: Any) -> tuple[Tensor, ...]:
    if "input_features" not in features:
        return ()
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
    rows = [e.input_ids_T if e.answer_ids_T is None else torch.cat([e.input_ids_T, e.answer_ids_T]) for e in encoded]
    inputs = _pad_text(rows, pad_token_id) if rows else {}
    mels = [mel for e in encoded for mel in e.mels]
    if mels:
        inputs |= _pad_mels(mels)
    for name in sorted({name for e in encoded for name in e.vision}):
        inputs[name] = torch.cat([e.vision[name] for e in encoded if name in e.vision])
    indices = [taxonomy.global_index(s.dataset, s.label) if s.label is not None else IGNORED for s in samples]
    return Batch(
        samples=samples,
        inputs=inputs,
        class_index_B=torch.tensor(indices, dtype=torch.long),
        domain_names=tuple(taxonomy.dataset(s.dataset).domain for s in samples),
        labels_BT=_labels(encoded, inputs["input_ids"]) if encoded and encoded[0].answer_ids_T is not None else None,
        quarantined=tuple(quarantined),
    )


def _pad_text(ids: Sequence[Tensor], pad_token_id: int) -> dict[str, Tensor]:
    longest = max(map(len, ids))
    input_ids_BT = torch.full((len(ids), longest), pad_token_id, dtype=torch.long)
    attention_mask_BT = torch.zeros((len(ids), longest), dtype=torch.long)
    for i, row_T in enumerate(ids):
        input_ids_BT[i, longest - len(row_T) :] = row_T
        attention_mask_BT[i, longest - len(row_T) :] = 1
    return {"input_ids": input_ids_BT, "attention_mask": attention_mask_BT}


def _labels(encoded: Sequence[Encoded], input_ids_BT: Tensor) -> Tensor:
    labels_BT = torch.full_like(input_ids_BT, IGNORED)
    for row, each in enumerate(encoded):
        if each.answer_ids_T is not None:
            labels_BT[row, -len(each.answer_ids_T) :] = each.answer_ids_T
    return labels_BT


def _pad_mels(mels: Sequence[Tensor]) -> dict[str, Tensor]:
    longest = max(mel.shape[1] for mel in mels)
    features_AFM = torch.zeros(len(mels), mels[0].shape[0], longest)
    mask_AM = torch.zeros(len(mels), longest, dtype=torch.long)
    for i, mel_FM in enumerate(mels):
        features_AFM[i, :, : mel_FM.shape[1]] = mel_FM
        mask_AM[i, : mel_FM.shape[1]] = 1
    return {"input_features": features_AFM, "feature_attention_mask": mask_AM}
