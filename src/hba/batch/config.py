"""How rows become batches: what of a sample reaches the model, and where batches are prepared.

Configs lie apart from the code that they configure where that code needs torch: a wrong key is then reported before
torch is imported, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, TypeAlias

import numpy as np
from pydantic import Field

from hba.atlas.rows import Sample
from hba.atlas.source import Frames, require_audible
from hba.batch.prompt import MODALITIES, Message, Modality, Wording, build_messages
from hba.config import option
from hba.environment import kernel_ends_children, usable_cores
from hba.errors import ConfigError, MediaError

if TYPE_CHECKING:
    from hba.atlas.decoded import DecodedCache
    from hba.atlas.media import Image, Video

LongAudio: TypeAlias = Literal["refuse", "head", "windows", "published"]
PUBLISHED_AUDIO_SECONDS = 10.0
"""where the released code cuts every sound"""
WINDOWS_ARE_FOR_HEADS = "Use encode.long_audio=refuse or head: words are said of one sound, which windows would divide."


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """How a sample becomes tokens, mel frames and patches."""

    num_frames: Annotated[int, Field(ge=2, multiple_of=2)] = option(8, "frames taken from each video, an even number")
    frames: Frames = option("exact", "exact frames, or nearest_keyframe: inexact, faster where keyframes are close")
    min_pixels: Annotated[int, Field(ge=784)] = option(3136, "smallest area of a frame or image after resizing")
    max_pixels: Annotated[int, Field(ge=784)] = option(50176, "largest area of a frame or image after resizing")
    max_audio_seconds: Annotated[float, Field(gt=0)] = option(300.0, "longest audio; what becomes of a longer one:")
    long_audio: LongAudio = option(
        "refuse",
        "refuse: its sample is quarantined; head: its beginning is heard; windows: all of it, in equal parts whose "
        "logits heads average; published: the first 10 s of every audio",
    )
    max_tokens: Annotated[int, Field(ge=1)] = option(32768, "a longer prompt quarantines its sample; nothing is cut")
    modalities: tuple[Modality, ...] = option(MODALITIES, "media that reach the model; the others are left out")
    system_prompt: str | None = option(None, "system message put in front of every prompt")

    @property
    def heard_seconds(self) -> float:
        """How much of an audio is heard at once."""
        return PUBLISHED_AUDIO_SECONDS if self.long_audio == "published" else self.max_audio_seconds

    def __post_init__(self) -> None:
        if self.max_pixels < self.min_pixels:
            what = f"encode.max_pixels is {self.max_pixels}, below encode.min_pixels of {self.min_pixels}"
            raise ConfigError(what, fix="Raise max_pixels or lower min_pixels.")


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """Where batches are prepared."""

    RETIRED: ClassVar[tuple[str, ...]] = ("prefetch",)

    workers: Annotated[int, Field(ge=-1)] = option(
        -1, "worker processes; 0 prepares in the main process, -1 is one a spare core, at most 8", affects_result=False
    )
    prefetch_megabytes: Annotated[int, Field(ge=0)] = option(
        512, "encoded samples that workers prepare ahead, in all", affects_result=False
    )
    cache_megabytes: Annotated[int, Field(ge=0)] = option(
        256, "encoded samples that are kept for the next epoch, 0 for none", affects_result=False
    )
    decode_once: bool = option(
        False, "keep decoded clips and sounds on the disk for later epochs and other runs", affects_result=False
    )
    decoded_folder: str | None = option(
        None, "where; `decoded` in $HBA_CACHE or ~/.cache/hba by default", affects_result=False
    )
    decoded_gigabytes: Annotated[float, Field(gt=0)] = option(
        100.0, "bound of that folder, over all that use it; about 1.1 MB a clip", affects_result=False
    )
    decode_timeout_seconds: Annotated[float, Field(gt=0)] = option(
        60.0, "a sample that twice takes longer to read and decode is quarantined; needs workers", affects_result=False
    )

    def resolved_workers(self) -> int:
        """Number of worker processes on this machine. Raises ConfigError for workers elsewhere than on Linux."""
        if not kernel_ends_children():
            if self.workers > 0:
                raise ConfigError("worker processes need Linux", where="loader.workers", fix="Use loader.workers=0.")
            return 0
        return min(8, max(0, usable_cores() - 1)) if self.workers < 0 else self.workers


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What `hba atlas prepare` decodes, and for which model."""

    model: str = option(doc="model, checkpoint or run whose processor sets the size of frames: a folder or a hub id")
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)


# What a config lets through of a sample, for models here and on servers alike: no torch.


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


def load_media(
    sample: Sample,
    config: EncodeConfig,
    sampling_rate: int,
    *,
    windows: bool = False,
    decoded: DecodedCache | None = None,
) -> Media:
    """Decode the media of a sample, long audios as `config.long_audio` says; with `windows`, those stay whole.

    Sounds and clips that `decoded` keeps are taken from there. Raises MediaError for a medium that cannot be read, is
    too long or too short.
    """
    wanted = config.modalities
    audios = [a.samples for a in sample.load_audios(decoded=decoded)] if "audio" in wanted else []
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
    videos: list[Video] = []
    if "video" in wanted:
        videos = sample.load_videos(config.num_frames, frames=config.frames, decoded=decoded)
    return Media(audios, images, videos)
