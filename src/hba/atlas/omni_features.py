"""The one place that calls a Qwen2.5-Omni processor: exact sizes, exact times, no sound cut or padded to a window.

Shapes: T tokens, A audios, M mel bins, F mel frames, V videos, N frames of a video.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

MEDIA_FEATURES = ("pixel_values", "image_grid", "video_grid", "video_second_per_grid")


def omni_features(
    processor: Any,
    text: str,
    audios: Sequence[np.ndarray[Any, Any]],
    images: Sequence[Any],
    clips: Sequence[Tensor],
    spans_seconds: Sequence[float],
    *,
    pixels: Mapping[str, int],
) -> dict[str, Tensor]:
    """What the model takes of one prompt: input_ids [1, T], input_features [A, M, F], patches and grids.

    `clips` are frames [N, 3, H, W], each evenly spaced over its span; `pixels` are min_pixels and max_pixels, which the
    processor otherwise replaces by its defaults.
    """
    call: dict[str, Any] = {"text": [text], "return_tensors": "pt"}
    if audios:
        call |= {"audio": list(audios), "audio_kwargs": {"max_length": _window(processor.feature_extractor, audios)}}
    if images:
        # Without its name, a picture of one or three lines is taken for one of one or three channels.
        call |= {"images": list(images), "images_kwargs": dict(pixels) | {"input_data_format": "channels_last"}}
    if clips:
        call |= {"videos": list(clips), "videos_kwargs": dict(pixels) | {"do_sample_frames": False}}
    features: dict[str, Tensor] = dict(processor(**call))
    if clips:
        patch = processor.video_processor.temporal_patch_size
        steps = [patch / len(clip) * span for clip, span in zip(clips, spans_seconds, strict=True)]
        features["video_second_per_grid"] = torch.tensor(steps, dtype=torch.float32)
    return features


def _window(extractor: Any, audios: Sequence[np.ndarray[Any, Any]]) -> int:
    # The extractor's own window (30 or 300 s) pads short clips and silently cuts long ones. One FFT window of
    # zeros behind the longest clip gives the same valid frames as any longer padding does.
    hop = int(extractor.hop_length)
    longest: int = max(map(len, audios)) + int(extractor.n_fft)
    return math.ceil(longest / hop) * hop
