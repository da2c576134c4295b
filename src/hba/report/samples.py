"""The best and the worst samples of a run, and judged answers, with their prompts and media inside the page.

Worst is what was answered wrongly with the least probability on the true label, best what was answered rightly with
the most; no dataset takes a second place before every dataset has had one. Free-form answers, which need a judge, are
not ranked. Prompts and media come from the atlas; a medium that cannot be read, or a row that is not the one that was
evaluated, is named on its card and never fatal.

Invariant: the choice depends on the predictions alone, ties go by id.
"""

from __future__ import annotations

import base64
import io
import wave
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import av
import numpy as np
from PIL import Image

from hba.atlas import media, open_atlas
from hba.atlas.rows import Field, Sample
from hba.atlas.source import check_source, head, open_container, video_track
from hba.atlas.video import read_frames
from hba.errors import InputError, MediaError
from hba.evaluate.judge.items import Judgement
from hba.evaluate.predictions import Prediction
from hba.taxonomy import BUILTIN, Taxonomy

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame


# Media as data: URIs that a browser plays from inside the page.
#
# Audio becomes 16-bit PCM wav at 16 kHz (browsers do not play ADPCM and other legacy wav), images JPEG. A video that
# browsers play as it is (H.264 4:2:0 in mp4, VP8/VP9/AV1 in webm) and that is small passes through; any other becomes
# an H.264 mp4 of its first seconds without sound. What is cut says so. A `Budget` bounds the bytes of a page: a medium
# that does not fit is named instead of embedded. Encoders run on one thread, so that the same medium gives the same
# bytes.


MAX_PAGE_BYTES = 8 << 20
MAX_MEDIUM_BYTES = 2 << 20
MAX_AUDIO_SECONDS = 20.0
MAX_VIDEO_SECONDS = 12.0
VIDEO_HEIGHT_PIXELS = 288
VIDEO_FRAMES_PER_SECOND = 15.0
IMAGE_PIXELS = 480
PIXEL_FORMATS = ("yuv420p", "yuvj420p")
PLAYABLE: dict[str, tuple[frozenset[str], frozenset[str]]] = {  # mime: video codecs, audio codecs
    "video/mp4": (frozenset({"h264"}), frozenset({"aac", "mp3"})),
    "video/webm": (frozenset({"vp8", "vp9", "av1"}), frozenset({"opus", "vorbis"})),
}
Kind = Literal["audio", "video", "image"]
FIELDS: tuple[tuple[Kind, Field], ...] = (("video", "videos"), ("audio", "audios"), ("image", "images"))


@dataclass(frozen=True, kw_only=True)
class Medium:
    """One medium of a card. `uri` is a data: URI, None when the medium is not embedded; `note` says how or why not."""

    kind: Kind
    uri: str | None
    note: str


class Encoded(NamedTuple):
    """Bytes that a browser plays, with what a reader should know about them."""

    mime: str
    data: bytes
    note: str


class Budget:
    """How many more bytes a page may take; counts them as they stand in the page, in base64."""

    def __init__(self, total_bytes: int = MAX_PAGE_BYTES, medium_bytes: int = MAX_MEDIUM_BYTES) -> None:
        self.left_bytes, self.medium_bytes = total_bytes, medium_bytes

    def take(self, encoded: Encoded) -> str | None:
        """The data: URI, or None when it does not fit any more."""
        length = 4 * -(-len(encoded.data) // 3)
        if length > self.left_bytes or length > self.medium_bytes:
            return None
        self.left_bytes -= length
        return f"data:{encoded.mime};base64,{base64.b64encode(encoded.data).decode()}"


def embed_media(sample: Sample, budget: Budget) -> tuple[Medium, ...]:
    """Every video, audio and image of a sample. One that cannot be read or does not fit has a note and no URI."""
    return tuple(
        _embed(sample, kind, name, index, budget) for kind, name in FIELDS for index in range(getattr(sample, name))
    )


def _embed(sample: Sample, kind: Kind, name: Field, index: int, budget: Budget) -> Medium:
    try:
        with sample.blamed(name):
            encoded = _encode(sample, kind, name, index, budget)
    except MediaError as error:
        return Medium(kind=kind, uri=None, note=f"cannot be shown: {error.what}")
    uri = budget.take(encoded)
    if uri is None:
        size = f"{len(encoded.data) / (1 << 20):.1f} MB"
        return Medium(kind=kind, uri=None, note=f"not embedded ({size}): the page holds a limited number of bytes")
    return Medium(kind=kind, uri=uri, note=encoded.note)


def _encode(sample: Sample, kind: Kind, name: Field, index: int, budget: Budget) -> Encoded:
    where = sample.place(name)
    source = sample.source.medium(sample.number, name, index, where=where)
    if kind == "audio":
        return encode_audio(media.load_audio(source, where=where, limits=media.DEFAULT_LIMITS))
    if kind == "image":
        return encode_image(media.load_image(source, where=where, limits=media.DEFAULT_LIMITS))
    return encode_video(source, where=where, max_bytes=budget.medium_bytes * 3 // 4)


def encode_audio(audio: media.Audio) -> Encoded:
    """16-bit PCM wav of at most MAX_AUDIO_SECONDS seconds."""
    kept = audio.samples[: int(MAX_AUDIO_SECONDS * audio.sample_rate)]
    pcm = np.round(np.clip(kept, -1.0, 1.0) * 32767).astype("<i2")
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as handle:
        handle.setnchannels(1)
        handle.setsampwidth(2)
        handle.setframerate(audio.sample_rate)
        handle.writeframes(pcm.tobytes())
    return Encoded(
        "audio/wav", buffer.getvalue(), _length_note(len(audio.samples) / audio.sample_rate, MAX_AUDIO_SECONDS)
    )


def encode_image(image: media.Image) -> Encoded:
    """JPEG of at most IMAGE_PIXELS pixels a side."""
    picture = Image.fromarray(image)
    picture.thumbnail((IMAGE_PIXELS, IMAGE_PIXELS))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82)
    return Encoded("image/jpeg", buffer.getvalue(), f"{image.shape[1]}×{image.shape[0]} pixels")


def _length_note(seconds: float, limit: float) -> str:
    return f"{seconds:.1f} s" if seconds <= limit else f"first {limit:.0f} s of {seconds:.0f} s"


def encode_video(source: media.Source, *, where: str, max_bytes: int) -> Encoded:
    """The video itself if browsers play it and it is at most `max_bytes`, else an H.264 excerpt without sound.

    Raises MediaError when it cannot be decoded.
    """
    with open_container(source, where=where) as container:
        stream = video_track(container, where)
        seconds = _seconds(container)
        mime = _playable_as(container, head(source, 64, where=where))
        size = check_source(source, where=where, limits=media.DEFAULT_LIMITS)
        if mime is not None and size <= max_bytes:
            # A header alone can look sound in a file that is cut off.
            if next(container.decode(stream), None) is None:
                raise MediaError("the video has no frame", where=where, fix="Replace the file.")
            return Encoded(mime, head(source, size, where=where), f"{seconds:.1f} s" if seconds else "length unknown")
        note = _excerpt_note(container, seconds)
    return Encoded("video/mp4", _encode_h264(_excerpt(source, where)), note)


def _seconds(container: InputContainer) -> float:
    return float(container.duration / av.time_base) if container.duration else 0.0


def _excerpt_note(container: InputContainer, seconds: float) -> str:
    silent = ", picture only" if container.streams.audio else ""
    return f"{_length_note(seconds, MAX_VIDEO_SECONDS)}, re-encoded for the page{silent}"


def _playable_as(container: InputContainer, first_bytes: bytes) -> str | None:
    webm = b"webm" in first_bytes
    mp4 = "mp4" in container.format.name and container.metadata.get("major_brand", "").strip() != "qt"
    mime = "video/webm" if webm else "video/mp4" if mp4 else None
    if mime is None:
        return None
    video_codecs, audio_codecs = PLAYABLE[mime]
    video_plays = all(
        stream.codec_context.codec.canonical_name in video_codecs and stream.codec_context.pix_fmt in PIXEL_FORMATS
        for stream in container.streams.video
    )
    audio_plays = all(stream.codec_context.codec.canonical_name in audio_codecs for stream in container.streams.audio)
    return mime if video_plays and audio_plays else None


def _excerpt(source: media.Source, where: str) -> list[VideoFrame]:
    """Frames of the first MAX_VIDEO_SECONDS, thinned in time, upright and made small; their pts are milliseconds."""
    frames: list[VideoFrame] = []
    for seconds, pixels in read_frames(source, where=where, frames_per_second=VIDEO_FRAMES_PER_SECOND):
        if seconds > MAX_VIDEO_SECONDS:
            break
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        scale = min(1.0, VIDEO_HEIGHT_PIXELS / frame.height)
        width, height = (max(2, round(side * scale / 2) * 2) for side in (frame.width, frame.height))
        small = frame.reformat(width=width, height=height, format="yuv420p")
        small.pts, small.time_base = round(seconds * 1000), Fraction(1, 1000)
        frames.append(small)
    if not frames:
        raise MediaError("the video has no frame", where=where, fix="Replace the file.")
    return frames


def _encode_h264(frames: Sequence[VideoFrame]) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        # x264's macroblock tree reads memory that nobody wrote: with it, one in four runs differs in a few bits.
        options = {"crf": "27", "x264-params": "mbtree=0"}
        stream = out.add_stream("libx264", rate=int(VIDEO_FRAMES_PER_SECOND), options=options)
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        stream.codec_context.thread_count = 1
        for frame in frames:
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return buffer.getvalue()


# --- the best and the worst samples -----------------------------------------------------------------------------------


NUM_EACH = 6
MAX_SHOWN_LABELS = 4


@dataclass(frozen=True, kw_only=True)
class Share:
    """A label's probability, in [0, 1]."""

    label: str
    probability: float
    target: bool
    answered: bool


@dataclass(frozen=True, kw_only=True)
class Card:
    """One sample as shown. `prompt` is None when the atlas does not have it; `notes` say what is missing and why."""

    prediction: Prediction
    target: str
    answer: str
    right: bool
    shares: tuple[Share, ...]
    num_hidden_labels: int
    prompt: str | None
    media: tuple[Medium, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Predictions to show. `ranked` is False when they carry no probabilities and stand in the order of their ids.

    `num_answered` labelled rows did not fail.
    """

    worst: tuple[Prediction, ...]
    best: tuple[Prediction, ...]
    ranked: bool
    num_answered: int


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The cards of a page. `note` says why prompts and media are missing, empty when they are not."""

    worst: tuple[Card, ...]
    best: tuple[Card, ...]
    ranked: bool
    num_answered: int
    note: str


def choose(predictions: Sequence[Prediction], taxonomy: Taxonomy = BUILTIN, num_each: int = NUM_EACH) -> Chosen:
    """At most `num_each` confident wrong and `num_each` confident right predictions of classification datasets."""
    labelled = [p for p in predictions if taxonomy.dataset(p.dataset).domain is not None and not p.failed]
    ranked = [p for p in labelled if p.probs]
    pool = ranked or labelled
    surety = {p.id: (p.probs or {}).get(_target(p, taxonomy), 0.0) for p in pool}
    right = [p for p in pool if p.label == _target(p, taxonomy)]
    wrong = [p for p in pool if p.label != _target(p, taxonomy)]
    return Chosen(
        worst=spread(sorted(wrong, key=lambda p: (surety[p.id], p.id)), num_each),
        best=spread(sorted(right, key=lambda p: (-surety[p.id], p.id)), num_each),
        ranked=bool(ranked),
        num_answered=len(labelled),
    )


def _target(prediction: Prediction, taxonomy: Taxonomy) -> str:
    return taxonomy.require_label(prediction.dataset, prediction.target)


def spread(ordered: Iterable[Prediction], limit: int) -> tuple[Prediction, ...]:
    """The first of every dataset, then the second of every dataset, and so on."""
    taken: dict[str, int] = defaultdict(int)
    turns = []
    for place, prediction in enumerate(ordered):
        turns.append((taken[prediction.dataset], place, prediction))
        taken[prediction.dataset] += 1
    return tuple(prediction for _, _, prediction in sorted(turns, key=lambda turn: turn[:2])[:limit])


def gather(
    chosen: Chosen, root: Path | None, *, required: bool, budget: Budget, taxonomy: Taxonomy = BUILTIN
) -> Samples:
    """The cards of `chosen`, with prompts and media from the atlas at `root` as far as `budget` goes.

    An atlas that cannot be opened is an InputError if `required`, else a note.
    """
    wanted = [*chosen.worst, *chosen.best]
    rows: Mapping[str, Sample] = {}
    note = "" if root is not None else "The run does not say where its atlas lies."
    if root is not None and wanted:
        try:
            rows = find_rows(root, wanted, taxonomy)
        except InputError as error:
            if required:
                raise
            note = f"The atlas {root} could not be opened ({error.what}); name its folder with --atlas."
    # Worst and best take turns, so that the bytes of the page do not all go to one side.
    turns = [p for pair in zip_longest(chosen.worst, chosen.best) for p in pair if p is not None]
    cards = {p.id: _card(p, rows.get(p.id), note, budget, taxonomy) for p in turns}
    return Samples(
        worst=tuple(cards[p.id] for p in chosen.worst),
        best=tuple(cards[p.id] for p in chosen.best),
        ranked=chosen.ranked,
        num_answered=chosen.num_answered,
        note=note,
    )


def find_rows(root: Path, wanted: Sequence[Prediction], taxonomy: Taxonomy = BUILTIN) -> dict[str, Sample]:
    """The rows of the atlas that have the ids of `wanted`. Raises InputError when the atlas cannot be opened."""
    found: dict[str, Sample] = {}
    for split in sorted({p.split for p in wanted}):
        missing = {p.id for p in wanted if p.split == split}
        atlas = open_atlas(root, split=split, taxonomy=taxonomy)
        found |= {key: atlas[number] for number, key in enumerate(atlas.ids) if key in missing}
    return found


def _card(prediction: Prediction, sample: Sample | None, note: str, budget: Budget, taxonomy: Taxonomy) -> Card:
    target = _target(prediction, taxonomy)
    notes = []
    if sample is None:
        notes += [] if note else ["The atlas has no row with this id."]
    elif sample.dataset != prediction.dataset or sample.target != target:
        notes.append("The atlas's row of this id is another one than was evaluated; it is not shown.")
        sample = None
    ordered = sorted((prediction.probs or {}).items(), key=lambda item: (-item[1], item[0]))
    return Card(
        prediction=prediction,
        target=target,
        answer=prediction.label or prediction.answer or prediction.output or "no answer",
        right=prediction.label == target,
        shares=_shares(ordered, target, prediction.label),
        num_hidden_labels=max(0, len(ordered) - MAX_SHOWN_LABELS),
        prompt=sample.problem if sample is not None else None,
        media=embed_media(sample, budget) if sample is not None else (),
        notes=tuple(notes),
    )


def _shares(ordered: Sequence[tuple[str, float]], target: str, answer: str | None) -> tuple[Share, ...]:
    """The likeliest labels, the true one always among them."""
    kept = list(ordered[:MAX_SHOWN_LABELS])
    if kept and target not in dict(kept):
        kept[-1] = next((item for item in ordered if item[0] == target), (target, 0.0))
    return tuple(
        Share(label=label, probability=p, target=label == target, answered=label == answer) for label, p in kept
    )


# The judge's verdicts of a run as a page shows them: what was asked for, what was said, what the judge made of it.
#
# Unjudged answers come first, then wrong and right ones, every dataset in turn; the choice depends on the files alone.



NUM_JUDGED = 8
VERDICTS: dict[bool | None, str] = {None: "unjudged", False: "incorrect", True: "correct"}


@dataclass(frozen=True, kw_only=True)
class JudgedAnswer:
    """One row of the page's table. `said` is the judge's reason, or why there is no verdict."""

    prediction: Prediction
    verdict: str
    said: str


@dataclass(frozen=True, kw_only=True)
class JudgedAnswers:
    """The table, and how many judgements of each verdict the run has."""

    rows: tuple[JudgedAnswer, ...]
    counts: Mapping[str, int]


def judged_answers(
    predictions: Sequence[Prediction], judgements: Mapping[str, Judgement], num_each: int = NUM_JUDGED
) -> JudgedAnswers:
    """At most `num_each` answers of each verdict."""
    rows, counts = [], {}
    for correct, verdict in VERDICTS.items():
        found = [p for p in predictions if p.id in judgements and judgements[p.id].correct is correct]
        counts[verdict] = len(found)
        for p in spread(sorted(found, key=lambda p: p.id), num_each):
            said = judgements[p.id].reason or judgements[p.id].error or ""
            rows.append(JudgedAnswer(prediction=p, verdict=verdict, said=said))
    return JudgedAnswers(rows=tuple(rows), counts=counts)
