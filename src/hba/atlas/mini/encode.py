"""Arrays to the bytes of real .wav, .mp4 and .pt files whose size says nothing about their content.

WAV is IMA ADPCM (constant rate); MP4 is H.264 with every version and time stamp left out, padded by a `free` box to
one common size; `.pt` goes through memory, since torch.save writes the archive's name into the file. The same arrays
give the same bytes in every run. A video that does not fit the common size is encoded again at lower quality.
"""

from __future__ import annotations

import io
from fractions import Fraction
from typing import Any

import av
import numpy as np
import soundfile
from numpy.typing import NDArray

from hba.atlas.mini.figure import FRAMES_PER_SECOND
from hba.atlas.mini.voice import SAMPLE_RATE
from hba.errors import HbaError

ADPCM_BLOCK_SAMPLES = 505  # of libsndfile at 8 kHz; whole blocks leave no padding behind the last sample
MP4_BYTES = 2560
_QUALITIES = (28, 32, 36, 40, 44)


def wav_bytes(samples: NDArray[np.float64]) -> bytes:
    """A WAV file (8 kHz mono, IMA ADPCM, 4 bits a sample) of samples [T] in -1..1."""
    target = io.BytesIO()
    soundfile.write(target, np.clip(samples, -0.99, 0.99), SAMPLE_RATE, format="WAV", subtype="IMA_ADPCM")
    return target.getvalue()


def mp4_bytes(frames: NDArray[np.uint8]) -> bytes:
    """An MP4 file (H.264) of frames [T, H, W, 3], always MP4_BYTES long."""
    for quality in _QUALITIES:
        raw = _h264_mp4(frames, quality)
        room = MP4_BYTES - len(raw)
        if room >= 8:
            return raw + room.to_bytes(4, "big") + b"free" + bytes(room - 8)
    found = f"{len(frames)} frames do not fit {MP4_BYTES} bytes"
    raise HbaError(found, where="mini-atlas video", fix="Draw fewer frames.")


def pt_bytes(arrays: dict[str, NDArray[Any]]) -> bytes:
    """A `.pt` file holding a dict of tensors; the tensors share one storage, which keeps the file small."""
    import torch

    flat = torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays.values()]))
    tensors, start = {}, 0
    for name, array in arrays.items():
        tensors[name] = flat[start : start + array.size].view(array.shape)
        start += array.size
    target = io.BytesIO()
    torch.save(tensors, target)
    return target.getvalue()


def _h264_mp4(frames: NDArray[np.uint8], quality: int) -> bytes:
    target = io.BytesIO()
    with av.open(target, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        # Macroblock trees differ by a few bits between two encodings of the same frames, even on one thread.
        same = {"x264-params": "mbtree=0", "flags": "+bitexact", "bf": "0"}
        options = {"crf": str(quality), "preset": "medium", **same}
        stream = container.add_stream("libx264", rate=Fraction(FRAMES_PER_SECOND), options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        # The encoder writes its version and options into an SEI unit (type 6) of the stream.
        keep = av.BitStreamFilterContext("filter_units=remove_types=6", stream)
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")):
                container.mux(keep.filter(packet))
        for packet in stream.encode():
            container.mux(keep.filter(packet))
        container.mux(keep.filter(None))
    return target.getvalue()
