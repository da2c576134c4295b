"""The damaged media as an atlas, and that atlas through `load_batches` with two workers (used by fault_campaign.py)."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import fault_sandbox
from fault_media import FIELDS, SUFFIX, Damaged
from hba.atlas import Atlas, Sample
from hba.atlas import media as reader
from hba.batch.config import EncodeConfig, LoaderConfig
from hba.batch.encode import Encoded, Encoder
from hba.batch.loader import load_batches
from hba.errors import MediaError
from hba.run import QuarantineLog

NUM_FRAMES = 4
BATCH_ROWS = 8
_SIGNATURES = {"audios": "text_audio", "videos": "text_video", "images": "text_image"}


class Answer(NamedTuple):
    """What a sample gave: a digest of all that it serves, or the refusal."""

    digest: str | None
    refused: str | None


class Rows(NamedTuple):
    """Row numbers of the damaged media in their order, and the kinds of the intact ones by row."""

    damaged: list[int]
    intact: dict[int, str]


class Loaded(NamedTuple):
    """What the loader gave: digests and quarantine records by id, peaks of memory and time a row."""

    served: dict[str, str]
    quarantined: dict[str, dict[str, Any]]
    megabytes: list[float]
    seconds: list[float]


def load(kind: str, data: bytes) -> tuple[Any, str]:
    """An intact medium as hba serves it, and its digest."""
    field, where = FIELDS[kind], f"intact {kind}"
    served: Any
    if field == "audios":
        served = reader.load_audio(data, where=where)
    elif field == "videos":
        served = reader.load_video(data, NUM_FRAMES, where=where)
    elif field == "images":
        served = reader.load_image(data, where=where)
    else:
        served = reader.load_descriptor(data, where=where)
    return served, _digest([served])


def twice(sound: reader.Audio) -> str:
    """Digest of a sound that is heard twice."""
    return _digest([reader.Audio(np.concatenate([sound.samples, sound.samples]))])


def _digest(served: Sequence[Any]) -> str:
    digest = hashlib.sha256()
    for value in served:
        if isinstance(value, reader.Audio):
            parts = [value.samples]
        elif isinstance(value, reader.Video):
            parts = [value.frames, value.timestamps_seconds, np.array(value.duration_seconds)]
        elif isinstance(value, dict):
            parts = [np.asarray(tensor) for _, tensor in sorted(value.items())]
        else:
            parts = [np.asarray(value)]
        for part in parts:
            digest.update(f"{part.shape} {part.dtype}".encode() + np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()


def _load_all(sample: Sample) -> list[Any]:
    served: list[Any] = [*sample.load_audios(), *sample.load_images(), *sample.load_videos(NUM_FRAMES)]
    return [*served, *sample.load_descriptors("ext_video_feats"), *sample.load_descriptors("ext_audio_feats")]


def serve(sample: Sample) -> Answer:
    """Load everything that a sample has."""
    try:
        return Answer(_digest(_load_all(sample)), None)
    except MediaError as error:
        return Answer(None, str(error))


def write_atlas(folder: Path, items: Sequence[Damaged], media: dict[str, bytes]) -> Rows:
    """Write an atlas of the damaged media, with an intact one of each kind in turn behind every ninth."""
    (folder / "media").mkdir(parents=True)
    kinds, lines = list(media), []
    found = Rows([], {})
    for item in items:
        found.damaged.append(len(lines))
        lines.append(_row(folder, f"{item.number}", item.kind, item.data))
        if item.number % 9 == 8:
            kind = kinds[len(found.intact) % len(kinds)]
            found.intact[len(lines)] = kind
            lines.append(_row(folder, f"intact{len(lines)}", kind, media[kind]))
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return found


def _row(folder: Path, name: str, kind: str, data: bytes) -> dict[str, Any]:
    path = f"media/{name}.{SUFFIX.get(kind, kind)}"
    (folder / path).write_bytes(data)
    field = FIELDS[kind]
    row = {"problem": "How does the speaker feel?", "answer": "anger", "dataset": "cremad", "task": "emotion_cls"}
    return row | {"modality_signature": _SIGNATURES.get(field, "text"), field: [path], "id": name}


class DigestEncoder(Encoder):
    """Encodes a sample as the digest of its media; peak of memory and time of each row go to a log."""

    pad_token_id = 0

    def __init__(self, log: Path) -> None:
        super().__init__(None, EncodeConfig())
        self._log, self._limited = log, 0

    def encode(self, sample: Sample) -> Encoded:
        """Raises MediaError as loading does."""
        if self._limited != os.getpid():
            fault_sandbox.limit_memory()
            fault_sandbox.silence()
            self._limited = os.getpid()
        peak, start = fault_sandbox.Peak(), time.monotonic()
        try:
            digest = _digest(_load_all(sample))
        finally:
            with (self._log / f"{os.getpid()}.log").open("a") as log:
                log.write(f"{peak.megabytes()} {time.monotonic() - start}\n")
        return Encoded(sample=sample, input_ids_T=torch.tensor(list(bytes.fromhex(digest))))


def run_loader(atlas: Atlas, run: Path) -> Loaded:
    """The whole atlas in shuffled batches, prepared by two workers, with a quarantine.jsonl as a run keeps it."""
    run.mkdir()
    order = np.random.default_rng(0).permutation(len(atlas))
    plan = [order[at : at + BATCH_ROWS] for at in range(0, len(order), BATCH_ROWS)]
    config = LoaderConfig(workers=2, decode_timeout_seconds=fault_sandbox.SECONDS)
    served: dict[str, str] = {}
    with QuarantineLog(run) as quarantine:
        for batch in load_batches(atlas, DigestEncoder(run), plan, config):
            for sample, ids_T in zip(batch.samples, batch.inputs.get("input_ids", ()), strict=True):
                served[sample.id] = bytes(ids_T.tolist()).hex()
            for record in batch.quarantined:
                quarantine.add(record)
        records = {record["id"]: record for record in quarantine.records()}
    figures = [line.split() for path in run.glob("*.log") for line in path.read_text().splitlines()]
    return Loaded(served, records, [float(f[0]) for f in figures], [float(f[1]) for f in figures])
