"""What a clip costs when it was decoded before: the loader's work a sample, kept against decoded, one core.

    python benchmarks/decode_once.py [MODEL]

Clips of ten seconds at 720p (h264, a keyframe every two seconds) with their sound (mp3) are generated, ROWS of them in
one atlas. Lines of JSON: CPU milliseconds a sample, medians of TRIALS rounds in which all ways take turns, so that a
busy machine slows all alike; `x` is decoded / kept. "media" is what the cache stands for, "sample" the encoder's whole
work (prompt, mel frames and patches included), "first" an epoch that fills the cache. Batches are compared to the bit.
MODEL is a backbone whose processor is used; a tiny one is made when it is not given.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile
import torch

from hba.atlas import Atlas, open_atlas
from hba.batch.config import EncodeConfig, LoaderConfig, load_media
from hba.batch.encode import Encoded, Encoder
from hba.batch.loader import open_decoded
from hba.model.checkpoint import load_processor

ROWS, TRIALS, SECONDS, RATE = 4, 5, 10, 25


def make_atlas(folder: Path) -> Atlas:
    """Rows of a clip and a sound each."""
    folder.mkdir(parents=True)
    row = {"problem": "How?", "answer": "anger", "dataset": "cremad", "task": "t"}
    with (folder / "train.jsonl").open("w") as lines:
        for k in range(ROWS):
            make_clip(folder / f"{k}.mp4", k)
            noise = np.random.default_rng(k).normal(0, 0.1, (44100 * SECONDS, 2))
            soundfile.write(folder / f"{k}.mp3", noise, 44100)
            media = {"videos": [f"{k}.mp4"], "audios": [f"{k}.mp3"], "modality_signature": "text_video_audio"}
            lines.write(json.dumps(row | media) + "\n")
    return open_atlas(folder, split="train")


def make_clip(path: Path, seed: int) -> None:
    """Motion and noise, as a camera gives them."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 255, (90, 160, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=Fraction(RATE), options={"g": "50", "preset": "veryfast"})
        stream.width, stream.height = 1280, 720
        for i in range(RATE * SECONDS):
            pixels = np.roll(base, 3 * i, axis=1) // 2 + rng.integers(0, 12, base.shape, dtype=np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode())


def equal(one: Encoded, other: Encoded) -> bool:
    """Whether the model would be given the same."""
    same = one.media.keys() == other.media.keys() and len(one.mels) == len(other.mels)
    return same and all(
        torch.equal(a, b)
        for a, b in [
            (one.input_ids_T, other.input_ids_T),
            *zip(one.mels, other.mels, strict=True),
            *((one.media[name], other.media[name]) for name in one.media),
        ]
    )


def main() -> None:
    """Print the costs."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        atlas = make_atlas(work / "atlas")
        model = Path(sys.argv[1]) if len(sys.argv) > 1 else tiny(work, atlas)
        processor, config = load_processor(model), EncodeConfig(num_frames=8)

        def encoder(name: str | None) -> Encoder:
            made = Encoder(processor, config)
            if name is not None:
                loader = LoaderConfig(decode_once=True, decoded_folder=str(work / name))
                made.decoded = open_decoded(processor, config, loader)
            return made

        plain, kept = encoder(None), encoder("kept")
        same = [equal(kept.encode(sample), plain.encode(sample)) for sample in atlas]  # fills it
        same += [equal(kept.encode(sample), plain.encode(sample)) for sample in atlas]
        if not all(same):
            raise SystemExit("samples differ")

        def first() -> None:
            fresh = encoder("first")
            for sample in atlas:
                fresh.encode(sample)
            shutil.rmtree(work / "first")

        def each(work: Callable[..., object]) -> Callable[[], None]:
            return lambda: [work(sample) for sample in atlas] and None

        ways: dict[str, Callable[[], None]] = {
            "media decoded": each(lambda sample: load_media(sample, config, 16000)),
            "media kept": each(lambda sample: load_media(sample, config, 16000, decoded=kept.decoded)),
            "sample decoded": each(plain.encode),
            "sample kept": each(kept.encode),
            "sample first": first,
        }
        spent: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(TRIALS):
            for name, way in ways.items():
                began = time.process_time()
                way()
                spent[name].append(1000 * (time.process_time() - began) / ROWS)
        cost = {name: statistics.median(times) for name, times in spent.items()}
        for kind in ("media", "sample"):
            decoded, again = cost[f"{kind} decoded"], cost[f"{kind} kept"]
            print(json.dumps({kind: {"decoded_ms": decoded, "kept_ms": again, "x": decoded / again}}))
        about = {"first_over_decoded": cost["sample first"] / cost["sample decoded"]}
        assert kept.decoded is not None
        print(json.dumps(about | {"megabytes_a_row": kept.decoded.num_bytes / ROWS / 1e6}))


def tiny(work: Path, atlas: Atlas) -> Path:
    """A tiny backbone, whose processor is of the real kind."""
    from hba.model.tiny import atlas_texts, build_tiny

    return build_tiny(work / "tiny", atlas_texts(atlas), seed=0)


if __name__ == "__main__":
    main()
