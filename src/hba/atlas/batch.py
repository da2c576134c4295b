"""From samples to model inputs: the real processor once a sample, then padding to the longest of the batch.

A `SampleEncoder` turns one `Sample` into unpadded features (`Encoded`); `collate` pads a list of them into a `Batch`.
Encoding a sample alone and padding afterwards is what makes batches tight, cacheable and independent of their
neighbours. `Encoder` is that of Qwen2.5-Omni, which OmniSapiens stands on: audio is never cut and never padded to the
processor's window. `chat_encoder.ChatEncoder` is that of every other chat model. A sample whose medium cannot be read
is not replaced, it travels in `Batch.quarantined`.

Shapes: B samples, T tokens, A audios, M mel frames, F mel bins, P vision patches, D patch values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from hba.atlas import padding
from hba.atlas.config import EncodeConfig
from hba.atlas.media import Image, Video
from hba.atlas.omni_features import MEDIA_FEATURES, omni_features
from hba.atlas.prompt import AS_WRITTEN, Message, Modality, PlainText, Wording, build_messages, taught
from hba.atlas.sample import MEDIA_FIELDS, Field, Quarantined, Sample
from hba.atlas.source import require_audible
from hba.descriptors.pooled import DescriptorConfig, pooled_descriptors
from hba.errors import MediaError
from hba.taxonomy import BUILTIN, Taxonomy

IGNORED = padding.IGNORED
_ODD_RATIO = 100  # processors refuse pictures that are 200 times as long as wide


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One sample after the processor, unpadded."""

    sample: Sample
    input_ids_T: Tensor
    mels: tuple[Tensor, ...] = ()  # each [F, M]
    media: dict[str, Tensor] = field(default_factory=dict)  # patches [P, D], grids [n, 3], named as the model does
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


class SampleEncoder(Protocol):
    """What makes model inputs of samples. Picklable, so that worker processes can hold it."""

    processor: Any
    config: EncodeConfig
    taxonomy: Taxonomy
    wording: Wording

    @property
    def pad_token_id(self) -> int:
        """Id that `collate` pads with."""
        ...

    def messages(self, sample: Sample) -> list[Message]:
        """The chat messages of a sample."""
        ...

    def encode(self, sample: Sample) -> Encoded:
        """Decode the media of a sample and run the processor. Raises MediaError naming what cannot be encoded."""
        ...


class Encoder:
    """Applies a Qwen2.5-Omni processor to one sample at a time."""

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

    @property
    def pad_token_id(self) -> int:
        """Id that `collate` pads with."""
        return int(self.processor.tokenizer.pad_token_id)

    @cached_property
    def _plain(self) -> PlainText:
        return PlainText(self.processor)

    def messages(self, sample: Sample) -> list[Message]:
        """The chat messages of a sample, whose text is text."""
        return messages_of(sample, self.config, self.wording, self._plain)

    def text(self, sample: Sample) -> str:
        """The prompt as the chat template renders it, media still as single placeholders."""
        rendered: str = self.processor.apply_chat_template(
            self.messages(sample), add_generation_prompt=True, tokenize=False
        )
        return rendered

    def encode(self, sample: Sample) -> Encoded:
        """Decode the media of a sample and run the processor, once for each window of a long sound.

        Raises MediaError naming the place when a medium cannot be read or encoded, is longer than `max_audio_seconds`,
        or the prompt has more than `max_tokens` tokens.
        """
        rate = self.processor.feature_extractor.sampling_rate
        labelled = self.taxonomy.dataset(sample.dataset).domain is not None
        media = load_media(sample, self.config, rate, windows=labelled)
        first, *later = (
            self._heard(sample, window) for window in windows_of(media, sample, int(self.config.heard_seconds * rate))
        )
        answer = None
        if self.answers:
            with sample.blamed():
                said = self.wording.answer(sample, taught(sample, self.taxonomy))
                answer = answer_ids(self.processor.tokenizer, said, self.processor.tokenizer.eos_token_id)
        wanted = self.descriptors.get(sample.dataset)
        return replace(
            first,
            windows=tuple(later),
            answer_ids_T=answer,
            descriptors={} if wanted is None else pooled_descriptors(sample, wanted, self.dims.get(sample.dataset)),
        )

    def _heard(self, sample: Sample, media: Media) -> Encoded:
        """The prompt with these media."""
        with sample.blamed(suspect(media)):
            features = omni_features(
                self.processor,
                self.text(sample),
                media.audios,
                media.images,
                [torch.from_numpy(v.frames).permute(0, 3, 1, 2) for v in media.videos],
                [v.duration_seconds for v in media.videos],
                pixels={"min_pixels": self.config.min_pixels, "max_pixels": self.config.max_pixels},
            )
            require_finite(features, sample)
            mels = _valid_mels(features)
        input_ids_T = features["input_ids"][0]
        require_short(input_ids_T, sample, self.config)
        named = {k: v for k, v in features.items() if k.startswith(MEDIA_FEATURES)}
        return Encoded(sample=sample, input_ids_T=input_ids_T, mels=mels, media=named)


def messages_of(
    sample: Sample, config: EncodeConfig, wording: Wording, plain: Callable[[str], str] = str
) -> list[Message]:
    """The chat messages of a sample, media in the order of their tags. Raises MediaError for a tag without a medium."""
    counts: dict[Modality, int] = {"image": sample.images, "video": sample.videos, "audio": sample.audios}
    return build_messages(
        wording.question(sample),
        counts,
        where=sample.where,
        modalities=config.modalities,
        system_prompt=config.system_prompt,
        plain=plain,
    )


class Media(NamedTuple):
    """The decoded media of a sample, of the modalities that the config lets through."""

    audios: list[np.ndarray[Any, Any]]
    images: list[Image]
    videos: list[Video]


def load_media(sample: Sample, config: EncodeConfig, sampling_rate: int, *, windows: bool = False) -> Media:
    """Decode the media of a sample, long audios as `config.long_audio` says; with `windows`, those stay whole.

    Raises MediaError for one that cannot be read, is too long or too short.
    """
    wanted = config.modalities
    audios = [a.samples for a in sample.load_audios()] if "audio" in wanted else []
    longest = int(config.heard_seconds * sampling_rate)
    for number, audio in enumerate(audios):
        require_audible(len(audio) / sampling_rate, sample.place("audios"))
        if len(audio) <= longest or (config.long_audio == "windows" and windows):
            continue
        if config.long_audio in ("refuse", "windows"):
            limit = config.max_audio_seconds
            found = f"audio of {len(audio) / sampling_rate:.1f} s, more than max_audio_seconds={limit}"
            fix = "Raise max_audio_seconds, split the clip, or choose encode.long_audio (docs/data.md)."
            raise MediaError(found, where=sample.place("audios"), fix=fix)
        audios[number] = audio[:longest].copy()  # not a view, which would keep the whole
    images = list(sample.load_images()) if "image" in wanted else []
    videos = sample.load_videos(config.num_frames, frames=config.frames) if "video" in wanted else []
    return Media(audios, images, videos)


def windows_of(media: Media, sample: Sample, longest: int) -> list[Media]:
    """The media once for each window of a long sound: as few equal parts as are no longer than `longest` samples.

    Raises MediaError for a row of several sounds, one of which is long.
    """
    if all(len(audio) <= longest for audio in media.audios):
        return [media]
    if len(media.audios) > 1:
        found = f"holds {len(media.audios)} sounds, one of them long, which cannot be heard in windows"
        raise MediaError(found, where=sample.place("audios"), fix="Join the sounds, or use encode.long_audio=head.")
    (audio,) = media.audios
    count = -(-len(audio) // longest)
    bounds = [len(audio) * number // count for number in range(count + 1)]
    return [media._replace(audios=[audio[start:end]]) for start, end in pairwise(bounds)]


def require_short(input_ids_T: Tensor, sample: Sample, config: EncodeConfig) -> None:
    """Raises MediaError for a prompt of more than `max_tokens` tokens."""
    if len(input_ids_T) > config.max_tokens:
        found = f"the prompt has {len(input_ids_T)} tokens, more than max_tokens={config.max_tokens}"
        raise MediaError(found, where=f"{sample.where}, problem", fix="Raise max_tokens or lower max_pixels.")


def suspect(media: Media) -> Field | None:
    """The field whose medium a processor refuses, as far as it is known: the only one, or the one of odd shape."""
    shapes = [("images", image.shape[:2]) for image in media.images]
    shapes += [("videos", video.frames.shape[1:3]) for video in media.videos]
    odd = [name for name, sides in shapes if max(sides) > _ODD_RATIO * min(sides)]
    present = [name for name, each in zip(("audios", "images", "videos"), media, strict=True) if each]
    named: list[Field] = [name for name in MEDIA_FIELDS if name in (odd or present)]
    return named[0] if len(named) == 1 else None


def require_finite(features: Mapping[str, Tensor], sample: Sample) -> None:
    """Raises MediaError for a medium whose features are no numbers, such as sound of absurd loudness."""
    for name, values in features.items():
        if values.is_floating_point() and not bool(torch.isfinite(values).all()):
            medium: Field = "audios" if "feature" in name else "images" if sample.images else "videos"
            raise MediaError(f"gives {name} of NaN or infinity", where=sample.place(medium), fix="Restore the medium.")


def answer_ids(tokenizer: Any, text: str, end_token_id: int) -> Tensor:
    """An answer and the end token, as they stand behind a prompt; names of special tokens in the answer are text."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return torch.tensor([*ids, end_token_id], dtype=torch.long)


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
        labels_BT=padding.labels(answers, inputs["input_ids"]) if labelled else None,
        descriptors=tuple(e.descriptors for e in encoded),
        quarantined=tuple(quarantined),
        windows=tuple(windows),
    )


def _inputs(encoded: Sequence[Encoded], pad_token_id: int) -> dict[str, Tensor]:
    """The model's keyword arguments for these samples, padded."""
    answers = [e.answer_ids_T for e in encoded]
    rows = [e.input_ids_T if e.answer_ids_T is None else torch.cat([e.input_ids_T, e.answer_ids_T]) for e in encoded]
    inputs = padding.token_ids(rows, pad_token_id) if rows else {}
    mels = [mel for e in encoded for mel in e.mels]
    if mels:
        inputs |= padding.mel_frames(mels)
    for name in sorted({name for e in encoded for name in e.media}):
        inputs[name] = padding.concatenated([e.media[name] for e in encoded if name in e.media])
    for name in encoded[0].per_token if encoded else ():
        inputs[name] = padding.per_token([e.per_token[name] for e in encoded], answers, inputs["input_ids"])
    return inputs
