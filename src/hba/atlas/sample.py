"""Rows and samples: what one line of the atlas says, before and after it is checked against the taxonomy.

`Row` is the published schema as it lies on disk. `Sample` is a row with its id, its canonical label and its place
(file and line), whose media are opened only when asked for. A sample never decodes anything by itself and never
hands out a path outside its atlas.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import msgspec

from hba.atlas import media
from hba.errors import HbaError, MachineError, MediaError
from hba.storage import machine_fault

Field = Literal["images", "videos", "audios", "ext_video_feats", "ext_audio_feats"]
_KINDS = {"images": "image", "videos": "video", "audios": "audio"}
MEDIA_FIELDS: tuple[Field, ...] = ("images", "videos", "audios", "ext_video_feats", "ext_audio_feats")


class Row(msgspec.Struct, kw_only=True, frozen=True, gc=False):
    """The published schema of a JSONL row; fields that are not named here are kept in `Sample.extra`."""

    problem: str
    answer: str
    dataset: str
    task: str
    modality_signature: str
    class_label: str | None = None
    images: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()
    audios: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    ext_video_feats: tuple[str, ...] = ()
    ext_audio_feats: tuple[str, ...] = ()
    id: str | None = None


class Said(NamedTuple):
    """What a row says: its id, the published fields, and the others."""

    id: str
    row: Row
    extra: Mapping[str, Any]


class Quarantined(NamedTuple):
    """A sample that was left out, with the place and the reason; one line of quarantine.jsonl."""

    id: str
    split: str
    dataset: str
    where: str
    field: str
    reason: str


def out_of_memory(error: MemoryError, where: str) -> MachineError | MediaError:
    """What a lack of memory means: the machine is short of it, or else the medium asks for what nobody has."""
    fix = "Restore the medium, or remove the row."
    return machine_fault(error, where) or MediaError("asks for more memory than there is", where=where, fix=fix)


class MediaSource(Protocol):
    """What a store gives a sample to open its media with."""

    def medium(self, number: int, name: Field, index: int, *, where: str) -> media.Source:
        """The file or bytes of medium `index` of field `name` of row `number`. Raises MediaError."""
        ...


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One row of the atlas. `label` is canonical, None for free-form rows; `where` is 'file:line'."""

    id: str
    split: str
    where: str
    number: int
    problem: str
    answer: str
    dataset: str
    task: str
    modality_signature: str
    label: str | None
    images: int
    videos: int
    audios: int
    texts: tuple[str, ...]
    ext_video_feats: int
    ext_audio_feats: int
    extra: Mapping[str, Any] = field(default_factory=dict)
    source: MediaSource
    refused: dict[str, Quarantined] = field(default_factory=dict, repr=False, compare=False)
    """where a medium that cannot be read is recorded: the quarantine of the atlas that gave the sample"""

    @property
    def target(self) -> str:
        """What a model should answer: the canonical label, or the row's free-form answer."""
        return self.label if self.label is not None else self.answer

    def place(self, name: Field) -> str:
        """'file:line, field' for messages about a medium of this sample."""
        return f"{self.where}, {name}"

    def _sources(self, name: Field) -> list[media.Source]:
        count: int = getattr(self, name)
        kind = _KINDS.get(name)
        if kind is not None and (kind in self.modality_signature.split("_")) != (count > 0):
            # Elsewhere a row is refused for it when the atlas is opened; of a shard without an index nobody knew.
            what = f"the row has {count} of them, but its modality_signature is {self.modality_signature!r}"
            raise MediaError(what, where=self.place(name), fix="Restore the media, or correct the signature.")
        return [self.source.medium(self.number, name, i, where=self.place(name)) for i in range(count)]

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        try:
            yield
        except MediaError as error:
            self.refused[self.id] = self.quarantined(error)
            raise
        except MemoryError as error:
            raise out_of_memory(error, self.where) from None

    @contextmanager
    def blamed(self, name: Field | Literal["problem"] | None = None) -> Iterator[None]:
        """The boundary of one sample: whatever its content raises inside, in any library, is its own MediaError.

        `name`: the field that is read, where one alone can be the cause. Errors of hba stay what they are: what the
        machine lacks and what a user set wrong are no fault of a sample.
        """
        where = self.where if name is None else f"{self.where}, {name}"
        try:
            yield
        except HbaError:
            raise
        except MemoryError as error:
            raise out_of_memory(error, where) from None
        except Exception as error:
            fault = machine_fault(error, where)
            if fault is not None:
                raise fault from error
            said = [type(error).__name__, *str(error).strip().splitlines()[:1]]
            at = traceback.extract_tb(error.__traceback__)[-1]
            what = f"cannot be encoded ({': '.join(said)[:240]}; {Path(at.filename).name}:{at.lineno})"
            raise MediaError(what, where=where, fix="Look at the row; mend it, or remove it.") from error

    def load_audios(self, limits: media.Limits = media.DEFAULT_LIMITS) -> list[media.Audio]:
        """Decode every audio to 16 kHz mono. Raises MediaError naming file, line and field."""
        with self._recorded():
            return [media.load_audio(s, where=self.place("audios"), limits=limits) for s in self._sources("audios")]

    def load_videos(
        self, num_frames: int, limits: media.Limits = media.DEFAULT_LIMITS, frames: media.Frames = "exact"
    ) -> list[media.Video]:
        """Decode `num_frames` evenly spaced frames of every video. Raises MediaError naming the place."""
        with self._recorded():
            where, sources = self.place("videos"), self._sources("videos")
            return [media.load_video(s, num_frames, where=where, limits=limits, frames=frames) for s in sources]

    def read_videos(self, limits: media.Limits = media.DEFAULT_LIMITS) -> list[bytes]:
        """The bytes of every video as it is stored, not decoded. Raises MediaError naming the place."""
        with self._recorded():
            where = self.place("videos")
            return [media.load_bytes(s, where=where, limits=limits) for s in self._sources("videos")]

    def load_images(self, limits: media.Limits = media.DEFAULT_LIMITS) -> list[media.Image]:
        """Decode every image. Raises MediaError naming the place."""
        with self._recorded():
            return [media.load_image(s, where=self.place("images"), limits=limits) for s in self._sources("images")]

    def load_descriptors(self, name: Literal["ext_video_feats", "ext_audio_feats"]) -> list[media.Descriptor]:
        """Load every `.pt` descriptor of a field without unpickling code. Raises MediaError naming the place."""
        with self._recorded():
            return [media.load_descriptor(s, where=self.place(name)) for s in self._sources(name)]

    def quarantined(self, error: MediaError) -> Quarantined:
        """The quarantine record of this sample for an error raised while its media were read."""
        name = next((f for f in (*MEDIA_FIELDS, "problem") if error.where.endswith(f", {f}")), "row")
        return Quarantined(self.id, self.split, self.dataset, error.where or self.where, name, error.what)
