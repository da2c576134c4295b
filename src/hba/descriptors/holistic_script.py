"""Runs in the environment of MediaPipe, not in that of hba: frames come on standard input, landmarks go out.

It imports nothing of hba. In: for each frame height and width (two little-endian uint32) and height x width x 3 bytes
RGB; height 0 begins a new clip. Out: one line with the version of MediaPipe; then for each frame 543 x 3 little-endian
float32, (x, y, confidence) of 33 pose, 468 face, 21 left and 21 right hand points. x and y are in units of the frame's
width and height. A part that is not found has confidence 0 at x = y = 0; face and hands, for which MediaPipe gives no
confidence of a point, have 1 where they are found. `--check` processes one grey frame and ends.
"""

from __future__ import annotations

import os
import struct
import sys
from typing import Any, BinaryIO

os.environ.setdefault("GLOG_minloglevel", "2")

import mediapipe as mp  # type: ignore[import-not-found,unused-ignore]
import numpy as np

PARTS = (("pose", 33), ("face", 468), ("left_hand", 21), ("right_hand", 21))
HEADER = struct.Struct("<II")


def points(results: Any) -> np.ndarray:
    """The landmarks of one frame, float32 [543, 3]."""
    parts = []
    for name, count in PARTS:
        found = getattr(results, f"{name}_landmarks")
        part = np.zeros((count, 3), "<f4")
        if found is not None:
            part[:] = [(p.x, p.y, p.visibility if name == "pose" else 1.0) for p in found.landmark]
        parts.append(part)
    return np.concatenate(parts)


def serve(frames: BinaryIO, out: BinaryIO) -> None:
    """Answer every frame until the input ends."""
    holistic = mp.solutions.holistic.Holistic(static_image_mode=False, model_complexity=1)
    out.write(f"{mp.__version__}\n".encode())
    out.flush()
    while len(header := frames.read(HEADER.size)) == HEADER.size:
        height, width = HEADER.unpack(header)
        if height == 0:
            holistic.reset()  # what was tracked in the last clip must not lead the search in this one
            continue
        pixels = frames.read(height * width * 3)
        if len(pixels) < height * width * 3:
            return
        image = np.frombuffer(pixels, np.uint8).reshape(height, width, 3)
        out.write(points(holistic.process(image)).tobytes())
        out.flush()


def main() -> None:
    """Serve standard input, or check that MediaPipe runs."""
    if "--check" in sys.argv:
        mp.solutions.holistic.Holistic(model_complexity=1).process(np.full((64, 64, 3), 127, np.uint8))
        return
    # Native libraries print to descriptor 1; what they say must not get between the landmarks.
    private = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, private)


if __name__ == "__main__":
    main()
