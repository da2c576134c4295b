"""How rows become batches: what of a sample reaches the model, and where batches are prepared.

Configs lie apart from the code that they configure where that code needs torch: a wrong key is then reported before
torch is imported, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, TypeAlias

import numpy as np
from pydantic import Field

from hba.atlas.rows import Field as MediaField
from hba.atlas.rows import Sample
from hba.atlas.source import Frames, require_audible
from hba.batch.prompt import MODALITIES, Message, Modality, Wording, build_messages
from hba.config import option
from hba.environment import kernel_ends_children, usable_cores
from hba.errors import ConfigError, MediaError

if TYPE_CHECKING:
    from hba.atlas.decoded import DecodedCache, Resize
    from hba.atlas.media import Image, Video

LongAudio: TypeAlias = Literal["refuse", "head", "windows", "published"]
SoundOfClips: TypeAlias = Literal["off", "separate", "interleaved"]
PUBLISHED_AUDIO_SECONDS = 10.0
"""where the released code cuts every sound"""
WINDOWS_ARE_FOR_HEADS = "Use encode.long_audio=refuse or encode.long_audio=head."


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """How a sample becomes tokens, mel frames and patches."""

    num_frames: Annotated[int, Field(ge=2, multiple_of=2)] = option(8, "frames taken from each clip, an even number")
    fps: Annotated[float, Field(gt=0)] | None = option(
        None, "frames a second instead of a fixed number. A clip has at least 2 and at most num_frames"
    )
    frames: Frames = option(
        "exact", "exact: the frames at the exact times; nearest_keyframe: the closest keyframes, which decodes faster"
    )
    min_pixels: Annotated[int, Field(ge=784)] = option(
        3136, "smallest area of a frame or picture, in pixels. Smaller ones are enlarged"
    )
    max_pixels: Annotated[int, Field(ge=784)] = option(
        50176, "largest area of a frame or picture, in pixels. Larger ones are made smaller"
    )
    clip_pixels: Annotated[int, Field(ge=1568)] | None = option(
        None, "largest area of all frames of a clip together, in pixels. Where it is more, each frame is made smaller"
    )
    sound_of_clips: SoundOfClips = option(
        "off",
        "the sound track of a clip whose row names no audio. off: it is not heard; separate: it is heard as an "
        "audio; interleaved: it is heard among the frames (Qwen-Omni's use_audio_in_video)",
    )
    max_audio_seconds: Annotated[float, Field(gt=0)] = option(
        300.0, "longest audio in seconds. long_audio says what becomes of a longer one"
    )
    long_audio: LongAudio = option(
        "refuse",
        "what becomes of an audio that is too long. refuse: its sample is quarantined; head: its beginning is "
        "heard; windows: all is heard in equal parts, whose logits the heads average; published: of every audio "
        "the first 10 s are heard",
    )
    max_tokens: Annotated[int, Field(ge=1)] = option(
        32768, "longest prompt in tokens. A sample with a longer one is quarantined; nothing is cut"
    )
    modalities: tuple[Modality, ...] = option(MODALITIES, "media that the model gets. The others are left out")
    system_prompt: str | None = option(None, "system message in front of every prompt")

    @property
    def heard_seconds(self) -> float:
        """How much of an audio is heard at once."""
        return PUBLISHED_AUDIO_SECONDS if self.long_audio == "published" else self.max_audio_seconds

    def __post_init__(self) -> None:
        if self.max_pixels < self.min_pixels:
            what = f"encode.max_pixels is {self.max_pixels}, below encode.min_pixels of {self.min_pixels}"
            raise ConfigError(what, fix="Raise max_pixels or lower min_pixels.")
        if self.clip_pixels is not None and self.clip_pixels < self.num_frames * self.min_pixels:
            least = self.num_frames * self.min_pixels
            what = f"{self.clip_pixels} pixels are fewer than num_frames * min_pixels, which is {least}"
            fix = "Raise clip_pixels, or lower encode.num_frames or encode.min_pixels."
            raise ConfigError(what, where="encode.clip_pixels", fix=fix)
        if self.sound_of_clips == "interleaved" and self.long_audio == "windows":
            found = "a sound that stands among the frames of its clip cannot be cut into windows"
            fix = "Use encode.sound_of_clips=separate, or encode.long_audio=refuse or head."
            raise ConfigError(found, where="encode.sound_of_clips", fix=fix)

    def pixels_of(self, num_frames: int) -> int:
        """The largest area of each frame of a clip of so many."""
        return self.max_pixels if self.clip_pixels is None else min(self.max_pixels, self.clip_pixels // num_frames)


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """Where batches are prepared."""

    RETIRED: ClassVar[tuple[str, ...]] = ("prefetch",)

    workers: Annotated[int, Field(ge=-1)] = option(
        -1,
        "processes that prepare batches. 0: the main process does it; -1: one for each spare core, at most 8",
        affects_result=False,
    )
    prefetch_megabytes: Annotated[int, Field(ge=0)] = option(
        512, "how much the workers prepare ahead, in megabytes, all together", affects_result=False
    )
    cache_megabytes: Annotated[int, Field(ge=0)] = option(
        256, "encoded samples that are kept for the next epoch, in megabytes. 0: none", affects_result=False
    )
    decode_once: bool = option(
        False, "keep decoded clips and sounds on the disk, for later epochs and other runs", affects_result=False
    )
    decoded_folder: str | None = option(
        None, "folder of decode_once. null: `decoded` in $HBA_CACHE or ~/.cache/hba", affects_result=False
    )
    decoded_gigabytes: Annotated[float, Field(gt=0)] = option(
        100.0, "largest size of that folder, for all runs that use it. A clip takes about 1.1 MB", affects_result=False
    )
    decode_timeout_seconds: Annotated[float, Field(gt=0)] = option(
        60.0,
        "longest time to read and decode a sample. One that takes longer twice is quarantined. Needs workers",
        affects_result=False,
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

    model: str = option(
        doc="the model, checkpoint or run to prepare for: a folder or a hub id. Its processor sets the size of frames"
    )
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)


# What a config lets through of a sample, for models here and on servers alike: no torch.


def messages_of(
    sample: Sample,
    config: EncodeConfig,
    wording: Wording,
    plain: Callable[[str], str] = str,
    *,
    sounds: int | None = None,
) -> list[Message]:
    """The chat messages of a sample, media in the order of their tags. Raises MediaError for a tag without a medium.

    `sounds` is how many the sample has, where its clips were looked at for sound tracks. Interleaved sounds have no
    place of their own.
    """
    how = sound_of_clips(sample, config)
    counts: dict[Modality, int] = {"image": sample.images, "video": sample.videos, "audio": sample.audios}
    if how != "off":
        counts["audio"] = sample.videos if sounds is None else sounds
    return build_messages(
        wording.question(sample),
        counts,
        where=sample.where,
        modalities=[kind for kind in config.modalities if kind != "audio" or how != "interleaved"],
        system_prompt=config.system_prompt,
        plain=plain,
    )


class Media(NamedTuple):
    """The decoded media of a sample, of the modalities that the config lets through."""

    audios: list[np.ndarray[Any, Any]]  # of the row, or of its clips
    images: list[Image]
    videos: list[Video]
    interleaved: bool = False  # whether the audios, one a video, stand among the frames
    silent_clips: int = 0  # clips whose sound is wanted and that have no sound track


def sound_of_clips(sample: Sample, config: EncodeConfig) -> SoundOfClips:
    """How the sound of the clips of a sample is heard: not at all where its row names other sounds.

    Sounds that are the row's clips themselves may be interleaved; without frames there is nothing to interleave.
    Raises MediaError for media that are not there.
    """
    if config.sound_of_clips == "off" or not sample.videos or "audio" not in config.modalities:
        return "off"
    how = config.sound_of_clips if "video" in config.modalities else "separate"
    if sample.audios and (how == "separate" or not sample.hears_its_videos):
        return "off"
    return how


def heard_in(sample: Sample) -> MediaField:
    """The field whose media a sample is heard by."""
    return "audios" if sample.audios else "videos"


def load_media(
    sample: Sample,
    config: EncodeConfig,
    sampling_rate: int,
    *,
    windows: bool = False,
    decoded: DecodedCache | None = None,
    resize: Resize | None = None,
) -> Media:
    """Decode the media of a sample, long audios as `config.long_audio` says; with `windows`, those stay whole.

    Sounds and clips that `decoded` keeps are taken from there. `resize` makes the frames of clips smaller that exceed
    `config.clip_pixels`. Raises MediaError for a medium that cannot be read, is too long or too short, and for a row of
    several clips some of which have no sound that could stand among their frames.
    """
    wanted, how = config.modalities, sound_of_clips(sample, config)
    silent = 0
    if how == "off":
        audios = [a.samples for a in sample.load_audios(decoded=decoded)] if "audio" in wanted else []
    else:
        tracks = sample.load_sounds_of_videos(decoded=decoded)
        audios = [track.samples for track in tracks if track is not None]
        silent = len(tracks) - len(audios)
        if how == "interleaved" and audios and silent:
            found = f"{silent} of {len(tracks)} clips have no sound track to stand among their frames"
            fix = "Use encode.sound_of_clips=separate, or give each clip a row of its own."
            raise MediaError(found, where=sample.place("videos"), fix=fix)
    longest = int(config.heard_seconds * sampling_rate)
    for number, audio in enumerate(audios):
        require_audible(len(audio) / sampling_rate, sample.place(heard_in(sample)))
        if len(audio) <= longest or (config.long_audio == "windows" and windows):
            continue
        if config.long_audio in ("refuse", "windows"):
            limit = config.max_audio_seconds
            found = f"audio of {len(audio) / sampling_rate:.1f} s, more than max_audio_seconds={limit}"
            fix = "Raise max_audio_seconds, split the clip, or choose encode.long_audio (docs/data.md)."
            raise MediaError(found, where=sample.place(heard_in(sample)), fix=fix)
        audios[number] = audio[:longest].copy()  # not a view, which would keep the whole
    images = list(sample.load_images()) if "image" in wanted else []
    videos: list[Video] = []
    if "video" in wanted:
        videos = sample.load_videos(config.num_frames, frames=config.frames, fps=config.fps, decoded=decoded)
    if config.clip_pixels is not None and resize is not None:
        videos = [replace(video, frames=resize(video.frames)) for video in videos]
    interleaved = how == "interleaved" and bool(audios)
    if interleaved and len({round(video.rate_hz, 6) for video in videos}) > 1:
        found = "clips of different frame rates in one prompt: their sound cannot stand among their frames"
        fix = "Use encode.sound_of_clips=separate, or give each clip a row of its own."
        raise MediaError(found, where=sample.place("videos"), fix=fix)
    return Media(audios, images, videos, interleaved, silent)
