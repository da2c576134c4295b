"""What the mini-atlas holds before anything is drawn: its clips (media to make) and its rows (published schema).

`make_plan` walks over the sources of `scenes`, each with random numbers of its own (seed, source, split), so that no
source changes another. Names are hashes of (seed, source, split, number); lengths are drawn before and without the
label; the rows of a split are shuffled together; a clip belongs to one split only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hba.atlas.mini import words
from hba.errors import HbaError
from hba.taxonomy import BUILTIN

SPLITS = ("train", "validation", "test")
LENGTHS = ((18, 8), (20, 9), (23, 10))  # (blocks of 505 samples, frames): 1.14 s, 1.26 s, 1.45 s
MOST_DRAWS = 1000  # of one prompt without media, until it is new
_ANSWERS = {"sarcasm": "true", "not sarcasm": "false", "humour": "true", "not humour": "false"}
_ANSWERS |= {"ptsd": "PTSD", "no ptsd": "no PTSD"}


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One recorded person: what to synthesise. `stem` is the folder and the file name without its ending.

    `voice` is a key of VOICES, 'ambience' or None (no sound); `motion` a key of MOTIONS or None (no camera).
    """

    stem: tuple[str, str]
    key: tuple[int, ...]
    length: int
    voice: str | None
    motion: str | None
    laughter: bool | None = None
    described: bool = True

    def path(self, kind: str) -> str:
        """The file of `kind` audios, videos, opensmile or pose, relative to the atlas."""
        folder, name = self.stem
        audio, video = f"{folder}/audios/{name}.wav", f"{folder}/videos/{name}.mp4"
        paths = {"audios": audio, "videos": video, "opensmile": f"opensmile/{audio}.pt", "pose": f"pose/{video}.pt"}
        return paths[kind]


@dataclass(frozen=True)
class Plan:
    """All clips, and the rows of each split in their final order."""

    clips: list[Clip]
    rows: dict[str, list[dict[str, Any]]]


class Studio:
    """Hands out clips of one source and split: their names, their lengths and their random numbers."""

    def __init__(self, seed: int, source: str, split: str, rng: np.random.Generator, written: set[str]) -> None:
        """`written` holds the prompts without media of all splits; it grows as rows are made."""
        self.seed, self.source, self.split, self.rng = seed, source, split, rng
        self.clips: list[Clip] = []
        self._written = written

    def clip(
        self,
        voice: str | None,
        motion: str | None,
        *,
        laughter: bool | None = None,
        described: bool = True,
        length: int | None = None,
    ) -> Clip:
        """A new clip of a length drawn now, or of that `length` (an index into LENGTHS)."""
        number = len(self.clips)
        name = hashlib.sha256(f"{self.seed}/{self.source}/{self.split}/{number}".encode()).hexdigest()
        drawn = int(self.rng.integers(len(LENGTHS))) if length is None else length
        made = Clip(
            stem=(self.source, name[:16]),
            key=(self.seed, int(name[16:24], 16), int(name[24:32], 16)),
            length=drawn,
            voice=voice,
            motion=motion,
            laughter=laughter,
            described=described,
        )
        self.clips.append(made)
        return made

    def fresh(self, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A row without media from `make`, drawn again while its prompt stands in the atlas already."""
        for _ in range(MOST_DRAWS):
            made = make()
            if made["problem"] not in self._written:
                self._written.add(made["problem"])
                return made
        raise HbaError(f"no new prompt in {MOST_DRAWS} draws", where=self.source, fix="Make fewer rows.")


def balanced(options: Sequence[Any], count: int, rng: np.random.Generator) -> list[Any]:
    """`count` options in random order, each as often as the others (the remainder drawn without repetition)."""
    drawn = [options[i] for i in range(len(options)) for _ in range(count // len(options))]
    drawn += [options[i] for i in rng.permutation(len(options))[: count % len(options)]]
    return [drawn[i] for i in rng.permutation(len(drawn))]


def row(
    dataset: str,
    question: str,
    answer: str,
    *,
    rng: np.random.Generator,
    transcript: str = "",
    noun: str = "",
    video: Clip | None = None,
    audio: Clip | None = None,
) -> dict[str, Any]:
    """A row of the published schema; `answer` is a canonical label, or free text for a dataset of the kind 'qa'."""
    about = BUILTIN.dataset(dataset)
    tags = [tag for tag, clip in (("<video>", video), ("<audio>", audio)) if clip is not None]
    name = question.split()[0]
    made: dict[str, Any] = {
        "problem": words.problem(question, transcript, about.labels, tags, rng, noun),
        "answer": _ANSWERS.get(answer, answer) if about.domain else answer,
        "images": [],
        "videos": [video.path("videos")] if video else [],
        "audios": [audio.path("audios")] if audio else [],
        "texts": [],
        "dataset": dataset,
        "task": f"{name}_{'cls' if about.domain else 'qa'}",
        "modality_signature": "_".join(["text", *(["video"] if video else []), *(["audio"] if audio else [])]),
        "ext_video_feats": [video.path("pose")] if video and video.described else [],
        "ext_audio_feats": [audio.path("opensmile")] if audio and audio.described else [],
    }
    if about.domain:
        made["class_label"] = answer
    return made


def make_plan(size: str, seed: int) -> Plan:
    """The clips and rows of the mini-atlas of that size (a key of SIZES) and seed; equal arguments, equal plan."""
    from hba.atlas.mini.scenes import SIZES, SOURCES

    clips: list[Clip] = []
    rows: dict[str, list[dict[str, Any]]] = {}
    written: set[str] = set()
    for s, split in enumerate(SPLITS):
        gathered: list[dict[str, Any]] = []
        for source, count in _counts(SIZES[size], s):
            number = int(hashlib.sha256(source.encode()).hexdigest()[:8], 16)
            studio = Studio(seed, source, split, np.random.default_rng([seed, number, s]), written)
            gathered.extend(SOURCES[source](studio, count))
            clips.extend(studio.clips)
        order = np.random.default_rng([seed, 7, s]).permutation(len(gathered))
        rows[split] = [gathered[i] for i in order]
    return Plan(clips, rows)


def _counts(size: dict[str, tuple[int, int, int]], split: int) -> Iterator[tuple[str, int]]:
    for source in sorted(size):
        yield source, size[source][split]
