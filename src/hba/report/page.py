"""The report of a run: one HTML file with its scores, curves, best and worst samples, judged answers and origin.

The page loads nothing: style and charts are inline, media are data: URIs, there is no script, and a content security
policy forbids the rest. Every text from the run and the atlas is escaped by the template. The same run folder and
atlas give the same bytes: the page carries no time or path of its own making.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import wave
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import av
import numpy as np
from PIL import Image

from hba.atlas import open_atlas
from hba.atlas.rows import Field, Sample
from hba.atlas.source import DEFAULT_LIMITS, Source, check_source, head, open_container, video_track
from hba.environment import hba_version
from hba.errors import InputError, MediaError
from hba.evaluate.predictions import Prediction
from hba.evaluate.results import Metrics
from hba.evaluate.runs import PREDICTIONS, Run, open_run
from hba.report import words
from hba.report.charts import Reference, bar, curves, matrices, over_time, reliability
from hba.storage import write_data
from hba.taxonomy import BUILTIN, CARE, Taxonomy, published_table

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame

    from hba.atlas import media
    from hba.evaluate.ask import Reply
    from hba.evaluate.judge.items import Judgement
    from hba.report.rl import RlPart

MAX_QUARANTINE_ROWS = 200
PUBLISHED_TABLE = "hba_iclr2026"
PUBLISHED_SOURCE = "arXiv 2510.04899, multi-task table"
DATASET_FIGURES = (
    *("weighted_f1", "macro_f1", "micro_accuracy", "emotion_weighted_accuracy_mean"),
    *("ACC2", "F1w2", "ACC3", "ACC5", "ACC7", "F1w7", "exact_match", "llm_judge_accuracy"),
)
SECRETS = re.compile(r"(?im)^(\s*(?:[\w.-]*_)?(?:api_?key|secret|password|token)\s*:[ \t]*)(?!null\b|~)\S.*$")


def write_report(run: Path, atlas_root: Path | None = None, out: Path | None = None) -> Path:
    """Write the report of the run folder `run` to `out` (default: report.html in it) and return its path.

    Prompts and media come from the atlas at `atlas_root`, by default from where the run says that its atlas lies.
    An RL run that has not been scored has a page of its training alone. Raises InputError for any other folder without
    metrics.json, for a malformed file (naming line and field), and for an `atlas_root` that is no atlas; StorageError
    when the disk is full. Nothing is written then.
    """
    opened, part = open_run(run), None
    if any(event.kind == "rl" for event in opened.events or ()):
        from hba.report.rl import rl_page, rl_part

        part = rl_part(run)
    if part is not None and not opened.has("metrics.json"):
        html = rl_page(run, part)
    else:
        html = render(opened, atlas_root, rl=part)
    path = out if out is not None else run / "report.html"
    write_data(path, html)
    return path


def write_asked(replies: Sequence[Reply], path: Path, *, model: str) -> None:
    """Write what a model said of files as a page, with a curve a label where windows were asked."""
    files: dict[str, dict[str, list[Reply]]] = defaultdict(lambda: defaultdict(list))
    for reply in replies:
        files[reply.file][reply.task or reply.dataset].append(reply)
    about = {"model": Path(model).name, "care": CARE, "version": hba_version(), "over_time": over_time}
    # Two files of one name are told apart by their folders, as far up as these differ.
    places = {file: Path(file).absolute() for file in files}
    above = os.path.commonpath([place.parent for place in places.values()]) if places else ""
    said = [(places[file].relative_to(above).as_posix(), list(parts.items())) for file, parts in files.items()]
    timed = any(each.start is not None for each in replies)
    write_data(path, words.page("asked.html.jinja", files=said, timed=timed, **about))


def render(
    run: Run,
    atlas_root: Path | None = None,
    *,
    rl: RlPart | None = None,
    alone: bool = False,
    notes: Sequence[str] = (),
) -> str:
    """The page of a run as text, with the RL part of its folder if it has one; see `write_report`.

    `alone`: of a run from elsewhere, whose records lead to no atlas of this machine; of its scores by field it shows
    those that follow from the predictions. `notes` say what else a reader should know.
    """
    metrics, stages = run.metrics, None
    if alone:
        parts = {name: part for name, part in metrics.breakdowns.items() if name in ("modality", "language")}
        metrics = replace(metrics, aggregate=replace(metrics.aggregate, breakdowns=parts))
    predictions = run.predictions if run.has(PREDICTIONS) else None
    shown: dict[str, Any] = {"confused": None, "samples": None, "judged": None}
    if predictions is not None:
        shown["confused"] = matrices(predictions, run.taxonomy)
        shown["samples"] = chosen = choose(predictions, run.taxonomy)
        root = atlas_root or (Path(run.atlas_path) if run.atlas_path and not alone else None)
        required = atlas_root is not None
        shown["cards"], shown["note"] = gather(chosen, root, required=required, taxonomy=run.taxonomy)
        shown["note"] = "A bundle has no media." if alone else shown["note"]
        if predictions and run.judgements:
            shown["judged"] = judged_answers(predictions, run.judgements)
    if run.has("stages.json"):
        from hba.report.comparison import read_stages

        stages = read_stages(run.folder)
    published = None if run.synthetic is not False else published_results(metrics)
    return words.page(
        "page.html.jinja",
        run=run,
        metrics=metrics,
        verdict=verdict(run),
        warnings=[*words.warnings(metrics, stale=run.stale), *(f"Not verified: {note}." for note in notes)],
        bars={
            key: bar(task, name=f"{key} {task.title}", references=published.references(key) if published else ())
            for key, task in metrics.tasks.items()
            if task.score is not None
        },
        published=published,
        dataset_figures={
            name: words.metric_name(name)
            for name in DATASET_FIGURES
            if any(name in entry.figures for entry in metrics.datasets.values())
        },
        reliability=reliability(metrics.calibration.all) if metrics.calibration else None,
        curves=curves(run.events, metrics.tasks) if run.events else None,
        stages=stages,
        rl=rl,
        quarantine=(run.quarantine or ())[:MAX_QUARANTINE_ROWS],
        config=SECRETS.sub(r"\1(hidden)", run.config) if run.config is not None else None,
        environment_text=json.dumps(run.environment, indent=2, ensure_ascii=False, sort_keys=True),
        facts=facts(run),
        **shown,
    )


def verdict(run: Run) -> dict[str, int]:
    """The counts of the headline, from metrics.json; the quarantine file where metrics.json gives no count.

    `num_compared` tasks have score, interval and chance.
    """
    tasks, counts = run.metrics.tasks.values(), run.metrics.aggregate
    compared = [task.above_chance for task in tasks if task.above_chance is not None]
    return {
        "num_tasks": len(tasks),
        "num_scored": sum(task.score is not None for task in tasks),
        "num_compared": len(compared),
        "num_above": sum(compared),
        "num_samples": counts.n or sum(task.n for task in tasks),
        "num_quarantined": len(run.quarantine or ()) if counts.n_quarantined is None else counts.n_quarantined,
        "num_invalid": sum(task.n_invalid or 0 for task in tasks) if counts.n_invalid is None else counts.n_invalid,
        "num_failed": sum(task.n_failed or 0 for task in tasks) if counts.n_failed is None else counts.n_failed,
    }


@dataclass(frozen=True, kw_only=True)
class Published:
    """Published figures for the tasks of a run: `rows` maps a model to its score by task, in [0, 1].

    `apart` says why they cannot be compared with the run's; empty where they can.
    """

    source: str
    tasks: tuple[str, ...]
    rows: Mapping[str, Mapping[str, float]]
    apart: tuple[str, ...] = ()

    def references(self, task: str) -> list[Reference]:
        """The published figures of one task; none where they say nothing beside it."""
        if self.apart:
            return []
        return [Reference(model, scores[task]) for model, scores in self.rows.items() if task in scores]


def published_results(metrics: Metrics) -> Published:
    """The paper's figures for the tasks of `metrics`."""
    from hba.evaluate.leaderboard import not_comparable

    table = published_table(PUBLISHED_TABLE)
    columns = table["columns"]
    rows = {name: dict(zip(columns, row, strict=True)) for name, row in table.items() if name != "columns"}
    tasks = tuple(key for key in metrics.tasks if key in columns)
    return Published(source=PUBLISHED_SOURCE, tasks=tasks, rows=rows, apart=tuple(not_comparable(metrics, tasks)))


def facts(run: Run) -> list[tuple[str, str]]:
    """What made the run, as (name, value) pairs; what is not recorded is left out."""
    said, environment = run.metrics.provenance, run.environment or {}
    pairs = [
        ("Command", said.command or environment.get("command")),
        ("Model", said.model),
        ("Judge", (said.judge or {}).get("model")),
        ("Split", said.scope if said.asked_split or said.split else None),
        ("Seed", said.seed if said.seed is not None else environment.get("seed")),
        ("Data", run.atlas_path),
        ("Data fingerprint", said.data_fingerprint or run.fingerprint),
        ("hba", said.hba_version or environment.get("hba_version")),
        ("Git commit", environment.get("git_commit")),
        ("Python", environment.get("python")),
        ("Platform", environment.get("platform")),
        ("CPU", environment.get("cpu")),
        ("GPUs", ", ".join(map(str, environment.get("gpus") or ())) or None),
        ("Started", environment.get("started_at")),
        ("Scored", said.created_at),
    ]
    return [(name, str(value)) for name, value in pairs if value not in (None, "")]


# --- the best and the worst samples, and judged answers ---------------------------------------------------------------
#
# Worst is what was answered wrongly with the least probability on the true label, best what was answered rightly with
# the most; no dataset takes a second place before every dataset has had one. Free-form answers, which need a judge, are
# not ranked. The choice depends on the predictions alone, ties go by id. Prompts and media come from the atlas; a
# medium that cannot be read, or a row that is not the one that was evaluated, is named on its card and never fatal.


NUM_EACH = 6
NUM_JUDGED = 8
MAX_SHOWN_LABELS = 4


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
class Card:
    """One sample as shown. `shares` are the likeliest labels with their probabilities, the true one always among them.
    `prompt` is None when the atlas does not have it; `notes` say what is missing and why."""

    prediction: Prediction
    target: str
    shares: tuple[tuple[str, float], ...]
    num_hidden_labels: int
    prompt: str | None
    media: tuple[Medium, ...]
    notes: tuple[str, ...]


def choose(predictions: Sequence[Prediction], taxonomy: Taxonomy = BUILTIN, num_each: int = NUM_EACH) -> Chosen:
    """At most `num_each` confident wrong and `num_each` confident right predictions of classification datasets."""
    labelled = [p for p in predictions if taxonomy.dataset(p.dataset).domain is not None and not p.failed]
    ranked = [p for p in labelled if p.probs]
    pool = ranked or labelled
    targets = {p.id: taxonomy.require_label(p.dataset, p.truth) for p in pool}
    surety = {p.id: (p.probs or {}).get(targets[p.id], 0.0) for p in pool}
    right = [p for p in pool if p.label == targets[p.id]]
    wrong = [p for p in pool if p.label != targets[p.id]]
    return Chosen(
        worst=_spread(sorted(wrong, key=lambda p: (surety[p.id], p.id)), num_each),
        best=_spread(sorted(right, key=lambda p: (-surety[p.id], p.id)), num_each),
        ranked=bool(ranked),
        num_answered=len(labelled),
    )


def _spread(ordered: Iterable[Prediction], limit: int) -> tuple[Prediction, ...]:
    """The first of every dataset, then the second of every dataset, and so on."""
    taken: dict[str, int] = defaultdict(int)
    turns = []
    for place, prediction in enumerate(ordered):
        turns.append((taken[prediction.dataset], place, prediction))
        taken[prediction.dataset] += 1
    return tuple(prediction for _, _, prediction in sorted(turns, key=lambda turn: turn[:2])[:limit])


def gather(
    chosen: Chosen, root: Path | None, *, required: bool, taxonomy: Taxonomy = BUILTIN
) -> tuple[dict[str, Card], str]:
    """The cards of `chosen` by id, with prompts and media from the atlas at `root` as far as a page's bytes go.

    Also why prompts and media are missing, empty when they are not. An atlas that cannot be opened is an InputError if
    `required`.
    """
    wanted, budget = [*chosen.worst, *chosen.best], Budget()
    rows: dict[str, Sample] = {}
    note = "" if root is not None else "The run does not say where its atlas lies."
    try:
        for split in sorted({p.split for p in wanted}):
            if root is None:
                break
            missing = {p.id for p in wanted if p.split == split}
            atlas = open_atlas(root, split=split, taxonomy=taxonomy)
            rows |= {key: atlas[number] for number, key in enumerate(atlas.ids) if key in missing}
    except InputError as error:
        if required:
            raise
        rows, note = {}, f"The atlas {root} could not be opened ({error.what}); name its folder with --atlas."
    # Worst and best take turns, so that the bytes of the page do not all go to one side.
    turns = [p for pair in zip_longest(chosen.worst, chosen.best) for p in pair if p is not None]
    return {p.id: _card(p, rows.get(p.id), note, budget, taxonomy) for p in turns}, note


def _card(prediction: Prediction, sample: Sample | None, note: str, budget: Budget, taxonomy: Taxonomy) -> Card:
    target = taxonomy.require_label(prediction.dataset, prediction.truth)
    notes = []
    if sample is None:
        notes += [] if note else ["The atlas has no row with this id."]
    elif sample.dataset != prediction.dataset or sample.target != target:
        notes.append("The atlas's row of this id is another one than was evaluated; it is not shown.")
        sample = None
    ordered = sorted((prediction.probs or {}).items(), key=lambda item: (-item[1], item[0]))
    shares = ordered[:MAX_SHOWN_LABELS]
    if shares and target not in dict(shares):
        shares[-1] = next((item for item in ordered if item[0] == target), (target, 0.0))
    return Card(
        prediction=prediction,
        target=target,
        shares=tuple(shares),
        num_hidden_labels=max(0, len(ordered) - MAX_SHOWN_LABELS),
        prompt=sample.problem if sample is not None else None,
        media=embed_media(sample, budget) if sample is not None else (),
        notes=tuple(notes),
    )


def judged_answers(predictions: Sequence[Prediction], judgements: Mapping[str, Judgement]) -> dict[str, Any]:
    """`rows` of a prediction, the verdict on it and the judge's reason (or why there is none), every dataset in turn;
    `counts` says how many judgements of each verdict the run has."""
    rows, counts = [], {}
    for correct, verdict in ((None, "unjudged"), (False, "incorrect"), (True, "correct")):
        found = [p for p in predictions if p.id in judgements and judgements[p.id].correct is correct]
        counts[verdict] = len(found)
        for p in _spread(sorted(found, key=lambda p: p.id), NUM_JUDGED):
            rows.append((p, verdict, judgements[p.id].reason or judgements[p.id].error or ""))
    return {"rows": rows, "counts": counts}


# --- media as data: URIs that a browser plays from inside the page ----------------------------------------------------
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


class Medium(NamedTuple):
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
    found = []
    for kind, name in FIELDS:
        for index in range(getattr(sample, name)):
            try:
                with sample.blamed(name):
                    where = sample.place(name)
                    source = sample.source.medium(sample.number, name, index, where=where)
                    encoded = encode(kind, source, where=where, max_bytes=budget.medium_bytes * 3 // 4)
            except MediaError as error:
                found.append(Medium(kind, None, f"cannot be shown: {error.what}"))
                continue
            uri, size = budget.take(encoded), f"{len(encoded.data) / (1 << 20):.1f} MB"
            left_out = f"not embedded ({size}): the page holds a limited number of bytes"
            found.append(Medium(kind, uri, encoded.note if uri is not None else left_out))
    return tuple(found)


def encode(kind: Kind, source: Source, *, where: str, max_bytes: int) -> Encoded:
    """A medium as browsers show it; a video that is larger than `max_bytes` becomes an excerpt. Raises MediaError."""
    if kind == "audio":
        from hba.atlas.audio import load_audio

        return encode_audio(load_audio(source, where=where, limits=DEFAULT_LIMITS))
    if kind == "image":
        from hba.atlas.media import load_image

        return encode_image(load_image(source, where=where, limits=DEFAULT_LIMITS))
    return encode_video(source, where=where, max_bytes=max_bytes)


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
    note = _length_note(len(audio.samples) / audio.sample_rate, MAX_AUDIO_SECONDS)
    return Encoded("audio/wav", buffer.getvalue(), note)


def encode_image(image: media.Image) -> Encoded:
    """JPEG of at most IMAGE_PIXELS pixels a side."""
    picture = Image.fromarray(image)
    picture.thumbnail((IMAGE_PIXELS, IMAGE_PIXELS))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82)
    return Encoded("image/jpeg", buffer.getvalue(), f"{image.shape[1]}×{image.shape[0]} pixels")


def _length_note(seconds: float, limit: float) -> str:
    return f"{seconds:.1f} s" if seconds <= limit else f"first {limit:.0f} s of {seconds:.0f} s"


def encode_video(source: Source, *, where: str, max_bytes: int) -> Encoded:
    """The video itself if browsers play it and it is at most `max_bytes`, else an H.264 excerpt without sound.

    Raises MediaError when it cannot be decoded.
    """
    with open_container(source, where=where) as container:
        stream = video_track(container, where)
        seconds = float(container.duration / av.time_base) if container.duration else 0.0
        mime = _playable_as(container, head(source, 64, where=where))
        size = check_source(source, where=where, limits=DEFAULT_LIMITS)
        if mime is not None and size <= max_bytes:
            # A header alone can look sound in a file that is cut off.
            if next(container.decode(stream), None) is None:
                raise MediaError("the video has no frame", where=where, fix="Replace the file.")
            return Encoded(mime, head(source, size, where=where), f"{seconds:.1f} s" if seconds else "length unknown")
        silent = ", picture only" if container.streams.audio else ""
        note = f"{_length_note(seconds, MAX_VIDEO_SECONDS)}, re-encoded for the page{silent}"
    return Encoded("video/mp4", _encode_h264(_excerpt(source, where)), note)


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


def _excerpt(source: Source, where: str) -> list[VideoFrame]:
    """Frames of the first MAX_VIDEO_SECONDS, thinned in time, upright and made small; their pts are milliseconds."""
    from hba.atlas.video import read_frames

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
