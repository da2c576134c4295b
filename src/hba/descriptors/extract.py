"""Measure one medium and write its file: what a worker process does.

The file appears under its name whole or not at all, and only after the medium was decoded to its end. What is wrong
with a medium comes back as `Failed`; what is wrong with the machine (disk full, extractor broken) as `Fatal`, since
every other item would meet it too.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from hba.atlas.media import load_audio
from hba.atlas.probe import probe
from hba.atlas.source import DEFAULT_LIMITS, Limits
from hba.atlas.video import read_frames
from hba.descriptors.items import Item, Settings
from hba.descriptors.landmarks import Holistic
from hba.descriptors.ledger import Extracted, Failed
from hba.descriptors.opensmile import Opensmile
from hba.descriptors.transcribe import Transcriber
from hba.errors import HbaError, InputError, MediaError
from hba.storage import atomic_write, confined_path

if TYPE_CHECKING:
    from torch import Tensor


class Fatal(NamedTuple):
    """What stops the run."""

    error: HbaError


class Extract:
    """Measures items with the extractors of `settings`, each loaded when it is first needed. Picklable."""

    def __init__(self, settings: Settings, limits: Limits = DEFAULT_LIMITS) -> None:
        self.settings, self.limits = settings, limits
        self._loaded: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": {}}

    def __call__(self, item: Item) -> Extracted | Failed | Fatal:
        """Write the file of an item. A failure writes nothing."""
        try:
            source = confined_path(Path(item.root), item.medium, where=item.where)
        except InputError as error:
            return Failed(error.what)
        try:
            return self._extract(item, source)
        except MediaError as error:
            return Failed(error.what)
        except HbaError as error:
            return Fatal(error)

    def close(self) -> None:
        """End the extractors that are processes."""
        if "video" in self._loaded:
            self._loaded.pop("video").close()

    def _extract(self, item: Item, source: Path) -> Extracted:
        began, status = time.perf_counter(), source.stat()
        field: Literal["videos", "audios"] = "videos" if item.kind == "video" else "audios"
        facts = probe(source, field, where=item.where, quick=True, hashed=True, limits=self.limits)
        made = self._measure(item, source)
        data = made.encode() + b"\n" if isinstance(made, str) else _packed(made, self.settings.out_format)
        with atomic_write(Path(item.root, item.output), "wb") as handle:
            handle.write(data)
        return Extracted(
            medium_bytes=status.st_size,
            medium_mtime_ns=status.st_mtime_ns,
            medium_sha256=facts.sha256 or "",
            output_bytes=len(data),
            shapes={} if isinstance(made, str) else {name: list(tensor.shape) for name, tensor in made.items()},
            medium_seconds=facts.seconds,
            work_seconds=round(time.perf_counter() - began, 4),
        )

    def _measure(self, item: Item, source: Path) -> dict[str, Tensor] | str:
        if item.kind == "video":
            rate = self.settings.frames_per_second
            frames = read_frames(source, where=item.where, frames_per_second=rate, limits=self.limits)
            return self._holistic().extract((frame.pixels for frame in frames), where=item.where)
        audio = load_audio(source, where=item.where, limits=self.limits)
        if item.kind not in self._loaded:
            made = Opensmile(self.settings.audio or "") if item.kind == "audio" else None
            self._loaded[item.kind] = made or Transcriber(self.settings.transcripts or "")
        extractor: Opensmile | Transcriber = self._loaded[item.kind]
        return extractor.extract(audio, where=item.where)

    def _holistic(self) -> Holistic:
        running: Holistic | None = self._loaded.get("video")
        if running is None or not running.alive:
            running = self._loaded["video"] = Holistic()
        return running


def _packed(tensors: Mapping[str, Tensor], out_format: str) -> bytes:
    if out_format == "safetensors":
        from safetensors.torch import save

        return bytes(save(dict(tensors)))
    import io

    import torch

    buffer = io.BytesIO()
    torch.save(dict(tensors), buffer)
    return buffer.getvalue()
