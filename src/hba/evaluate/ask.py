"""`hba ask`: what a model makes of somebody's own clips, sounds, pictures and texts.

The files become rows of an atlas that lives as long as the question, one a file and question, and are answered as
`hba predict` answers rows: the same encoding, the same backends, the same reading of words. They have no answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import soundfile

from hba.atlas.build import Medium, bring, look_at, media_below, row_of
from hba.atlas.rows import Quarantined
from hba.errors import ConfigError, InputError, MediaError, nearest
from hba.evaluate.backends.interface import (
    BASELINES,
    LOCAL,
    WORDLESS,
    Predicted,
    Unanswered,
    answerable,
    detect,
    known,
    open_backend,
    predict,
    require_backend,
)
from hba.evaluate.config import PredictConfig
from hba.evaluate.predict import EVERYTHING, encoding_of, open_rows
from hba.evaluate.predictions import Prediction
from hba.storage import atomic_write, json_line, read_json, temporary_folder
from hba.taxonomy import BUILTIN, FILE, Taxonomy, of_folder, save_beside

if TYPE_CHECKING:
    from hba.atlas.video import TimedFrame
    from hba.descriptors.items import Settings
    from hba.descriptors.sound import RemoteTranscriber, Transcriber
    from hba.remote import ClientConfig

MIN_WINDOW = 0.5  # seconds
WINDOW_FRAMES = 8  # of a second of clip that a window keeps
NO_SPEECH = "no speech was recognised"
FREE = "siq2"  # a dataset without labels, whose rows are answered in words
FEW_ROWS = 64  # for these no worker process is started: that takes longer than to decode them


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a model says of a file, or of a part of it. With an `error` it says nothing.

    `task` and `dataset` are empty where a question alone was asked. `answer` is the label, or the model's words where
    there are no labels; `probs` gives the probability of each label of the dataset's domain, which only heads and
    `generation.read=likelihood` know. `text` is all that the model said. `start` and `end` are in seconds, None where
    the file was not asked in windows. `transcript` is what a recogniser heard, where one was asked.
    """

    file: str
    task: str
    dataset: str
    answer: str | None
    probs: dict[str, float] | None = None
    text: str | None = None
    error: str | None = None
    start: float | None = None
    end: float | None = None
    transcript: str | None = None


class Piece(NamedTuple):
    """What is asked about: a file, or a window of it whose media lie in `files`, by image, video and audio."""

    medium: Medium
    files: Mapping[str, Path]
    start: float | None = None
    end: float | None = None
    transcript: str | None = None


def ask(
    model: str | Path,
    files: str | Path | Sequence[str | Path],
    *,
    tasks: Sequence[str] | None = None,
    datasets: Sequence[str] | None = None,
    question: str | None = None,
    transcript: str | None = None,
    transcribe: str | None = None,
    transcribe_url: str | None = None,
    transcribe_key_env: str | None = None,
    every: float | None = None,
    backend: str | None = None,
    config: PredictConfig | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Reply]:
    """What `model` answers of each of `files` (or of a folder of them), in their order.

    `tasks` are keys such as EMO, `datasets` keys such as cremad, whose labels are then offered; a model with heads is
    asked about everything that it was trained for where neither is given. `question` is asked in place of a task's own;
    alone, it is answered in words. `transcript` is what is said in the file; without it `transcribe`, a speech
    recognition model, hears it: one of Hugging Face, or `openai:NAME` of the service at `transcribe_url`, with the key
    in the environment variable `transcribe_key_env` (OPENAI_API_KEY where none is named, and that at OpenAI alone); it
    is as patient as `config.remote`, whose key and address are the model's. With `every` a clip or sound is asked in
    windows of so many seconds. Descriptors are extracted for datasets that the model has adapters for.

    A file that cannot be read has an error in its replies. Raises InputError for a path that is missing, a folder
    without media, an unknown task, and a question that the model cannot be asked; HbaError where an extractor that
    adapters need is not installed.
    """
    require_backend(str(model), backend)
    if every is not None and not MIN_WINDOW <= every < math.inf:
        fix = f"Give seconds, {MIN_WINDOW:g} or more, such as 5s."
        raise InputError(f"{every:g} seconds are no length of a window", where="--every", fix=fix)
    if transcript is not None and (transcribe is not None or every is not None):
        fix = "Leave --transcript out, or --every and --transcribe."
        raise InputError("--transcript is the text of a whole file", where="hba ask", fix=fix)
    paths = found_files([files] if isinstance(files, str | Path) else files)
    name = known(backend) if backend else detect(str(model))
    if name in BASELINES:
        fix = "Ask a run, a model or a service; hba predict takes baselines."
        raise InputError(f"the baseline {name} looks at no file", where="hba ask", fix=fix)
    taxonomy = taxonomy_of(str(model))
    config = config or PredictConfig()
    heard_in_clips = encoding_of(str(model), name, config).sound_of_clips != "off"
    named = tasks is not None or datasets is not None
    keys = datasets_of(taxonomy, tasks, datasets, question)
    with temporary_folder("ask") as folder:
        with _recogniser(transcribe, transcribe_url, transcribe_key_env, config.remote) as hear:
            pieces, broken = _pieces(paths, folder / "windows", every, transcript, hear)
        if heard_in_clips:
            # The rows name clips alone, as those of its training did: how their sound is heard is for the encoding.
            pieces = [_silent(piece) if "video" in piece.files else piece for piece in pieces]
        rows = [(piece, key) for piece in pieces for key in keys]
        if len(rows) <= FEW_ROWS:
            config = replace(config, loader=replace(config.loader, workers=0))
        replies: dict[Path, list[tuple[float, int, Reply]]] = {path: [] for path in paths}
        for path, reason in broken.items():
            replies[path].append((0.0, 0, Reply(file=str(path), task="", dataset="", answer=None, error=reason)))
        if rows:
            _write_atlas(folder, rows, taxonomy, question)
            failed = _describe(str(model), folder, rows)
            explicit = named or question is not None
            for done, step in enumerate(_answered(str(model), folder, config, backend, explicit=explicit), start=1):
                about = step.sample if isinstance(step, Unanswered) else step
                number = int(about.id)
                piece, key = rows[number]
                reply = _reply(step, piece, key, taxonomy)
                if question is not None and not named:
                    reply = replace(reply, task="", dataset="")
                if number in failed:
                    reply = replace(reply, answer=None, probs=None, text=None, error=failed[number])
                replies[piece.medium.path].append((piece.start or 0.0, keys.index(key), reply))
                progress(done, len(rows))
            progress(len(rows), len(rows))  # those that the model has no head for are left out
    return [reply for path in paths for *_, reply in sorted(replies[path], key=lambda each: each[:2])]


def found_files(given: Iterable[str | Path]) -> list[Path]:
    """The files meant: each as it is; of a folder all below it, by their names, but hidden ones and tables of labels.

    Raises InputError for a path that does not exist, and for a folder without files.
    """
    paths: list[Path] = []
    for each in map(Path, given):
        if each.is_dir():
            inside = media_below(each)
            if not inside:
                raise InputError("no files in this folder", where=str(each), fix="Give a folder of clips, or files.")
            paths += inside
        elif each.is_file():
            paths.append(each)
        else:
            raise InputError("no such file or folder", where=str(each), fix="Check the path.")
    if not paths:
        raise InputError("no file is given", where="hba ask", fix="Name one, such as clip.mp4.")
    return list(dict.fromkeys(paths))


def taxonomy_of(model: str) -> Taxonomy:
    """The tasks and labels that a run was made with, where it kept them; else the published ones."""
    return of_folder(model) if (Path(model) / FILE).is_file() else BUILTIN


def datasets_of(
    taxonomy: Taxonomy, tasks: Sequence[str] | None, datasets: Sequence[str] | None, question: str | None
) -> list[str]:
    """Keys of the datasets whose rows are asked: those that are named, and of each task the one whose labels say the
    most; where none is named one without labels for a question, else one of every task."""
    if tasks is None and datasets is None:
        return [FREE] if question else _one_each(taxonomy)
    keys = [taxonomy.dataset(key).key for key in datasets or ()]
    for name in tasks or ():
        if name not in taxonomy.tasks:
            raise InputError(f"unknown task {name!r}", where="--task", fix=nearest(name, taxonomy.tasks))
        keys.append(_widest(taxonomy, name))
    if not keys:
        raise InputError("no task and no dataset is named", fix="Name one, such as EMO, or give None for all.")
    return list(dict.fromkeys(keys))


def _one_each(taxonomy: Taxonomy) -> list[str]:
    """A dataset of every task that has labels; two tasks of one domain are one question."""
    by_domain: dict[str, str] = {}
    for name in taxonomy.tasks:
        key = _widest(taxonomy, name)
        domain = taxonomy.dataset(key).domain
        if domain is not None:
            by_domain.setdefault(domain, key)
    return list(by_domain.values())


def _widest(taxonomy: Taxonomy, task: str) -> str:
    """The dataset of a task with the most labels, of several an English one."""
    keys = [key for key, about in taxonomy.datasets.items() if about.task == task]
    about = sorted((taxonomy.dataset(key) for key in keys), key=lambda one: (one.language == "en", len(one.labels)))
    return about[-1].key


def _pieces(
    paths: Sequence[Path], folder: Path, every: float | None, transcript: str | None, hear: Hear | None
) -> tuple[list[Piece], dict[Path, str]]:
    """What is asked of each file, and why some cannot be read. The media of windows are written into `folder`."""
    pieces: list[Piece] = []
    broken: dict[Path, str] = {}
    for path in paths:
        try:
            medium = look_at(path)
            whole = Piece(medium, dict.fromkeys(medium.kinds, path), transcript=transcript)
            timed = every is not None and bool({"video", "audio"} & set(medium.kinds))
            mine = list(windows_of(medium, folder / str(len(pieces)), every or 0.0)) if timed else [whole]
            for piece in mine:
                if hear is not None and "audio" in piece.files:
                    piece = piece._replace(transcript=hear(piece))
                pieces.append(piece)
        except MediaError as error:
            broken[path] = error.what
    return pieces, broken


def _silent(piece: Piece) -> Piece:
    """The piece with its clip alone, which holds its sound."""
    return piece._replace(medium=piece.medium._replace(kinds=("video",)), files={"video": piece.files["video"]})


Hear = Callable[[Piece], str | None]


@contextmanager
def _recogniser(
    model: str | None, base_url: str | None, key_env: str | None, remote: ClientConfig
) -> Iterator[Hear | None]:
    """What hears a piece, opened for the first one; None without a model. A service's is asked as patiently as
    `remote` says, and never gets the model's key, nor an address of it."""
    service = (model or "").startswith("openai:")
    for option, given in (("--transcribe-url", base_url), ("--transcribe-key-env", key_env)):
        if given is not None and not service:
            fix = "Name the service's model, such as --transcribe openai:whisper-1."
            raise InputError("is for a recogniser of a service", where=option, fix=fix)
    if model is None:
        yield None
        return
    own: dict[str, Any] = {"provider": "openai", "base_url": base_url, "api_key_env": key_env}
    try:
        client = replace(remote, **own, cache=None, prices=None)
    except ConfigError as error:
        from hba.descriptors.sound import in_options_of_recogniser

        in_options_of_recogniser(error)
    opened: list[Transcriber | RemoteTranscriber] = []

    def hear(piece: Piece) -> str | None:
        from hba.descriptors.sound import REMOTE, RemoteTranscriber, Transcriber  # the latter imports torch

        if not opened:
            opened.append(RemoteTranscriber(model.removeprefix(REMOTE), client) if service else Transcriber(model))
        return _heard(opened[0], piece)

    try:
        yield hear
    finally:
        for each in opened:
            each.close()


def _heard(recogniser: Transcriber | RemoteTranscriber, piece: Piece) -> str | None:
    """The words of a piece; None where nothing is said in it."""
    from hba.atlas.audio import load_audio

    where = str(piece.medium.path)
    audio = load_audio(piece.files["audio"], where=where)
    try:
        return recogniser.extract(audio, where=where)
    except MediaError as error:
        if error.what == NO_SPEECH:
            return None
        raise


def windows_of(medium: Medium, folder: Path, every: float) -> Iterator[Piece]:
    """The windows of a clip or sound, in their order; a rest of less than half a window belongs to the last.

    Sounds are cut to the sample, of clips up to WINDOW_FRAMES frames a second are kept; those of one window are in
    memory at a time.
    """
    from hba.atlas.audio import SAMPLE_RATE, load_audio
    from hba.atlas.video import TimedFrame, load_video, read_frames

    where = str(medium.path)
    sound = load_audio(medium.path, where=where).samples if "audio" in medium.kinds else None
    seconds = 0.0 if sound is None else len(sound) / SAMPLE_RATE
    frames: Iterator[TimedFrame] = iter(())
    if "video" in medium.kinds:
        seconds = max(seconds, load_video(medium.path, num_frames=1, where=where).duration_seconds)
        frames = read_frames(medium.path, where=where, frames_per_second=WINDOW_FRAMES)
    folder.mkdir(parents=True, exist_ok=True)
    count = max(1, math.floor(seconds / every + 0.5))
    ahead = next(frames, None)
    for number in range(count):
        start, end = number * every, seconds if number == count - 1 else (number + 1) * every
        files: dict[str, Path] = {}
        part = None if sound is None else sound[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)]
        if part is not None and len(part):
            files["audio"] = folder / f"{number}.wav"
            soundfile.write(files["audio"], part, SAMPLE_RATE, subtype="FLOAT")
        shown: list[TimedFrame] = []
        while ahead is not None and (ahead.seconds < end or number == count - 1):
            shown.append(TimedFrame(ahead.seconds - start, ahead.pixels))
            ahead = next(frames, None)
        if shown:
            files["video"] = folder / f"{number}.mov"
            _write_clip(files["video"], shown, part)
        kinds = tuple(kind for kind in medium.kinds if kind in files)
        if kinds:
            yield Piece(medium._replace(kinds=kinds), files, round(start, 3), round(end, 3))


def _write_clip(file: Path, frames: Sequence[TimedFrame], sound: npt.NDArray[np.float32] | None) -> None:
    """A clip of `frames`, each shown from its second on, with its sound [N] where there is any."""
    import av

    from hba.atlas.audio import SAMPLE_RATE

    height, width = (side - side % 2 or 2 for side in frames[0].pixels.shape[:2])
    with av.open(str(file), "w", format="mov") as out:
        options = {"crf": "12", "preset": "veryfast", "x264-params": "mbtree=0"}
        stream = out.add_stream("libx264", rate=WINDOW_FRAMES, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        track = None
        if sound is not None and len(sound):
            track = out.add_stream("pcm_f32le", rate=SAMPLE_RATE, layout="mono")
        for at, pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame = frame.reformat(width=width, height=height, format="yuv420p")
            frame.pts, frame.time_base = round(at * 1000), Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        if track is not None and sound is not None:
            heard = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound)[None], format="flt", layout="mono")
            heard.sample_rate, heard.pts, heard.time_base = SAMPLE_RATE, 0, Fraction(1, SAMPLE_RATE)
            out.mux(track.encode(heard))
            out.mux(track.encode(None))


@contextmanager
def atlas_of(
    rows: Sequence[tuple[Medium, str]], taxonomy: Taxonomy, question: str | None, transcript: str | None
) -> Iterator[Path]:
    """A folder with an atlas of whole files, each asked with a dataset's labels. Gone afterwards."""
    with temporary_folder("ask") as folder:
        pieces = [(Piece(m, dict.fromkeys(m.kinds, m.path), transcript=transcript), key) for m, key in rows]
        _write_atlas(folder, pieces, taxonomy, question)
        yield folder


def _write_atlas(folder: Path, rows: Sequence[tuple[Piece, str]], taxonomy: Taxonomy, question: str | None) -> None:
    """The rows as an atlas; media are linked into it, or copied from another disk."""
    inside: dict[Path, str] = {}
    with atomic_write(folder / "asked.jsonl") as handle:
        for number, (piece, key) in enumerate(rows):
            for path in piece.files.values():
                if path not in inside:
                    inside[path] = f"media/{len(inside)}{path.suffix.lower()}"
                    bring(path, folder / inside[path])
            row = row_of(piece.medium, "", key, taxonomy, question=question, transcript=piece.transcript)
            row |= {f"{kind}s": [inside[path]] for kind, path in piece.files.items()}
            handle.write(json_line(row | {"id": str(number)}))
    save_beside(taxonomy, folder)


def _describe(model: str, folder: Path, rows: Sequence[tuple[Piece, str]]) -> dict[int, str]:
    """Extract the descriptors that adapters of the datasets that are asked about read; by row, why there are none.

    Raises HbaError where an extractor is not installed, InputError for adapters over descriptors of nobody's here.
    """
    place = Path(model)
    if not place.is_dir():
        return {}
    found = {path.stem: path for path in (*place.glob("bam/*.json"), *place.glob("checkpoints/*/bam/*.json"))}
    if not found:
        return {}
    from hba.model import checkpoint

    trained = checkpoint.resolve(model)
    specs = [read_json(trained / "bam" / f"{key}.json") for key in sorted({key for _, key in rows} & found.keys())
             if trained is not None and (trained / "bam" / f"{key}.json").is_file()]  # fmt: skip
    if not specs:
        return {}
    from hba.descriptors.describe import describe
    from hba.descriptors.items import Settings

    wanted = [descriptors_of(str(spec["dataset"]), spec["dims"], model) for spec in specs]
    video: Any = "holistic" if any(each.video for each in wanted) else None
    failed: dict[int, str] = {}
    keys = {str(spec["dataset"]) for spec in specs}
    audios: list[str | None] = [*sorted({each.audio for each in wanted if each.audio})]
    for audio in audios or [None]:
        done = describe(folder, Settings(audio=audio, video=video), splits=["asked"], workers=1)
        for failure in done.failures:
            number = int(str(failure["where"]).partition(",")[0].rpartition(":")[2]) - 1
            medium = rows[number][0].medium.path
            for row, (piece, key) in enumerate(rows):
                if piece.medium.path == medium and key in keys:
                    failed[row] = f"no descriptors: {failure['reason']}"
        video = None
    return failed


def descriptors_of(dataset: str, dims: Mapping[str, int], model: str) -> Settings:
    """What measures the descriptors of these sizes, which the adapters of a dataset read. Raises InputError where
    nothing here does."""
    from hba.descriptors.items import Settings
    from hba.descriptors.sound import FEATURE_SETS

    dim = dims.get("audio")
    # As it is, mean and spread, and two quantiles beside them.
    fitting = [name for name, about in FEATURE_SETS.items() if dim in [k * about.num_values for k in (1, 2, 4)]]
    if dim is not None and not fitting:
        what = f"the adapters of {dataset} read {dim} values of sound, which no extractor here gives"
        raise InputError(what, where=model, fix="Predict an atlas that has these descriptors.")
    return Settings(audio=next(iter(fitting), None), video="holistic" if "video" in dims else None)


def _answered(
    model: str, folder: Path, config: PredictConfig, backend: str | None, *, explicit: bool
) -> Iterator[Predicted]:
    """What becomes of each row, in the backend's order. With `explicit` one that the model cannot answer is an error,
    without it is left out."""
    opening = open_rows(model, str(folder), split="asked", config=config, backend=backend, selection=EVERYTHING)
    atlas = opening.atlas
    if not explicit and opening.backend not in WORDLESS:
        what = f"{model} answers in words: it has to be asked something"
        raise InputError(what, where="hba ask", fix="Give --task EMO (or others), or --question.")
    if opening.backend in LOCAL:
        from hba.model.process import prepare_process

        prepare_process(seed=0)
    answering = open_backend(opening.backend, opening)
    rows = answerable(atlas, answering)
    if explicit:
        left = np.setdiff1d(np.arange(len(atlas)), rows)
        if len(left):
            task = atlas[int(left[0])].dataset
            what = f"{model} was not trained to answer rows of {task}"
            fix = "Ask another task, or a model that answers in words (--backend hf, or --backend openai)."
            raise InputError(what, where="hba ask", fix=fix)
    yield from predict(atlas, answering.batches(atlas, rows), answering)


def _reply(step: Predicted, piece: Piece, dataset: str, taxonomy: Taxonomy) -> Reply:
    about: dict[str, Any] = {"file": str(piece.medium.path), "task": taxonomy.dataset(dataset).task or ""}
    about |= {"dataset": dataset, "start": piece.start, "end": piece.end, "transcript": piece.transcript}
    return reply_of(step.reason if isinstance(step, Unanswered | Quarantined) else step, **about)


def reply_of(told: Prediction | str, **about: Any) -> Reply:
    """What a model says of a file, or why it says nothing. `about`: the other fields of a reply."""
    if isinstance(told, str):
        return Reply(**about, answer=None, error=told)
    if told.error is not None:
        return Reply(**about, answer=None, text=told.output, error=told.error)
    answer = told.label if told.label is not None else told.answer
    return Reply(**about, answer=answer, probs=told.probs, text=told.output)
