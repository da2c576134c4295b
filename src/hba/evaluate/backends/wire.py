"""Media of a sample as the parts of a chat request.

Everything is a function of the decoded medium, so that the same sample gives the same bytes and a response cache finds
them. Nothing is cut unless `encode.long_audio` says so: a longer sound is refused, as in training.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import soundfile

from hba.atlas.media import SAMPLE_RATE, Image, Video
from hba.atlas.rows import Sample
from hba.batch.config import EncodeConfig, Media, load_media
from hba.batch.prompt import Message, Modality
from hba.errors import MediaError
from hba.remote.request import Message as RemoteMessage
from hba.remote.request import Part

WIRE_VERSION = 1  # raised when the same sample would be sent in another form

Parts = Mapping[Modality, list[list[Part]]]


def media_parts(sample: Sample, encode: EncodeConfig, *, video: str) -> Parts:
    """The parts of each medium by modality, in the order of the row. Raises MediaError for one that cannot be read."""
    decoded = load_media(sample, encode, SAMPLE_RATE)  # also where files are sent: what is broken is found here
    if video == "file" and decoded.videos:
        clips = [[_file(data)] for data in sample.read_videos()]
    else:
        clips = [_frames(clip, encode.pixels_of(len(clip.frames))) for clip in decoded.videos]
    return {
        "audio": [[_sound(samples)] for samples in decoded.audios],
        "image": [[_picture(image, encode.max_pixels)] for image in decoded.images],
        "video": clips,
    }


def decoded_parts(media: Media) -> Parts:
    """The parts of decoded media, bit for bit: for a server that shall see what a model here sees.

    Sound goes as float samples, images as they are, and a clip as one video of PNG frames in the form in which vLLM
    takes frames (`video/jpeg`, whatever they are compressed with); sizes and times are for the server's processor.
    """
    clips = [",".join(_base64(_png(PIL.Image.fromarray(frame))) for frame in clip.frames) for clip in media.videos]
    return {
        "audio": [[_wav(samples, "FLOAT")] for samples in media.audios],
        "image": [[_image_url(_png(PIL.Image.fromarray(image)))] for image in media.images],
        "video": [[{"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{clip}"}}] for clip in clips],
    }


def filled(messages: list[Message], parts: Parts) -> list[RemoteMessage]:
    """`messages` with every placeholder replaced by the parts of its medium; text alone stays a plain string."""
    waiting: dict[str, Iterator[list[Part]]] = {modality: iter(each) for modality, each in parts.items()}
    sent: list[RemoteMessage] = []
    for message in messages:
        content: list[Part] = []
        for item in message["content"]:
            content += [dict(item)] if item["type"] == "text" else next(waiting[item["type"]])
        plain = all(part["type"] == "text" for part in content)
        text = "".join(part["text"] for part in content) if plain else content
        sent.append({"role": message["role"], "content": text})
    return sent


def _sound(samples: npt.NDArray[Any]) -> Part:
    # libsndfile scales floats by 32767 when it writes and by 32768 when it reads: whole numbers come back as they were.
    return _wav(np.clip(np.round(samples * 32768.0), -32768, 32767).astype(np.int16), "PCM_16")


def _wav(samples: npt.NDArray[Any], subtype: str) -> Part:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, SAMPLE_RATE, format="WAV", subtype=subtype)
    return {"type": "input_audio", "input_audio": {"data": _base64(buffer.getvalue()), "format": "wav"}}


def _frames(clip: Video, max_pixels: int) -> list[Part]:
    times = ", ".join(f"{seconds:.1f}" for seconds in clip.timestamps_seconds)
    said = f"[A video of {clip.duration_seconds:.1f} s; its frames at {times} s:]"
    return [{"type": "text", "text": said}, *(_picture(frame, max_pixels) for frame in clip.frames)]


def _picture(image: Image, max_pixels: int) -> Part:
    picture = PIL.Image.fromarray(image)
    scale = math.sqrt(max_pixels / (picture.width * picture.height))
    if scale < 1:
        size = (max(1, int(picture.width * scale)), max(1, int(picture.height * scale)))
        picture = picture.resize(size, PIL.Image.Resampling.BICUBIC)
    return _image_url(_png(picture))


def _image_url(png: bytes) -> Part:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_base64(png)}"}}


def _png(picture: PIL.Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def _file(data: bytes) -> Part:
    kinds = ((4, b"ftyp", "mp4"), (0, b"\x1a\x45\xdf\xa3", "webm"), (8, b"AVI ", "x-msvideo"))
    kind = next((name for at, magic, name in kinds if data[at : at + len(magic)] == magic), "mp4")
    return {"type": "video_url", "video_url": {"url": f"data:video/{kind};base64,{_base64(data)}"}}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def frame_rate(rates_hz: Sequence[float], where: str = "") -> dict[str, float]:
    """`fps`, from which vLLM's processor takes the times of all videos of a prompt; nothing without videos.

    `rates_hz` are the frames of each video by the seconds that they span. Raises MediaError where these differ:
    one number cannot say them all.
    """
    different = {round(rate, 6) for rate in rates_hz}
    if len(different) > 1:
        fix = "Take rows of one video, or let transformers answer: --backend hf, rollout.sampler=generate."
        raise MediaError(f"videos of one prompt have {len(different)} different frame rates", where=where, fix=fix)
    return {"fps": rates_hz[0]} if different else {}  # rounded, it would move positions by one
