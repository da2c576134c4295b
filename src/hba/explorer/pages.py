"""The pages: what they share, then atlas, samples, quarantine, judge review, predictions, RL, runs, scores, and a page
as a file.

Each is a function of what was `Asked`: a request, its form, and the `Explorer` with the atlas, the runs and the
database behind them. `server` says which address gives which page.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from itertools import combinations
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qs, parse_qsl, urlencode, urlsplit

import msgspec
from jinja2 import Environment
from markupsafe import Markup
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Match

from hba.atlas.build import Medium, row_of
from hba.atlas.rows import MEDIA_FIELDS, Sample
from hba.atlas.source import Source, head
from hba.config import flat, inline_yaml, read_yaml
from hba.errors import HbaError, InputError, MediaError, nearest
from hba.evaluate.answers import same_answer
from hba.evaluate.ask import FREE, MIN_WINDOW, Reply, datasets_of, reply_of
from hba.evaluate.predictions import Prediction
from hba.evaluate.runs import Event, Run
from hba.explorer import media
from hba.explorer.index import (
    COLUMNS,
    DECISIONS,
    FREE_FORM,
    PAIRS,
    PREDICTED,
    VERDICTS,
    WITH_QUESTION,
    AtlasIndex,
    Database,
    Form,
    Row,
    RunEntry,
    Runs,
    find_answers,
    find_predictions,
    find_samples,
    whole_lines,
)
from hba.explorer.media import Decoder, media_response, source_of
from hba.report import words
from hba.report.charts import Curves, Matrix, bar, bundle, curves, matrices, over_time, reliability, share_bar, waveform
from hba.report.rl import rl_part
from hba.storage import alone, atomic_write, write_jsonl
from hba.taxonomy import Taxonomy, save_beside

HERE = Path(__file__).parent
PAGES: tuple[tuple[str, str], ...] = (
    ("/atlas", "Atlas"), ("/runs", "Runs"), ("/predictions", "Predictions"), ("/scores", "Scores"),
    ("/compare", "Compare"), ("/rl", "RL"), ("/judge", "Judge review"), ("/quarantine", "Quarantine"),
)  # fmt: skip
TRY = ("/try", "Try")
SHARED = "hba.shared"  # set in the scope of a page that is made to be saved
_CLIP = re.compile(r"[0-9a-f]{24}")
_THINK = re.compile(r"\s*<think>(.*?)</think>\s*(.*)", re.DOTALL | re.IGNORECASE)


class Answering(Protocol):
    """A model that is open; `hba.evaluate.desk.Desk` is one."""

    model: str
    taxonomy: Taxonomy

    def asks(
        self, path: Path, *, task: str | None = None, question: str | None = None
    ) -> list[tuple[str, Future[Prediction]]]:
        """What it answers of a file, by dataset."""
        ...


@dataclass(frozen=True)
class Tries:
    """What the Try page has: models by name, a private folder for clips, and where rows are kept, if they are."""

    models: Mapping[str, Answering]
    folder: Path
    keep: Path | None
    said: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    """what each model answered last, by clip and dataset"""

    @property
    def taxonomy(self) -> Taxonomy:
        """That of the first model."""
        return next(iter(self.models.values())).taxonomy

    def clip(self, name: str) -> Path:
        """The file of a clip, kept or not. Raises InputError for one that is not there."""
        places = [self.folder, *([self.keep / "media"] if self.keep else [])]
        found = [path for place in places for path in place.glob(f"{name}.*")] if _CLIP.fullmatch(name) else []
        if not found:
            raise InputError(f"no clip {name[:40]!r}", fix="Drop or record it again.")
        return found[0]


@dataclass(frozen=True)
class Explorer:
    """What pages are made from. `index` is None when no atlas was given; what takes seconds to decode has a process
    of its own, `long_decoder`."""

    index: AtlasIndex | None
    runs: Runs
    database: Database
    decoder: Decoder
    long_decoder: Decoder
    folder: Path
    """private, for what lives as long as the explorer"""
    tries: Tries | None = None

    def close(self) -> None:
        """End the decoders, remove the folder. A second time does nothing."""
        self.decoder.close()
        self.long_decoder.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def atlas(self) -> AtlasIndex:
        """The atlas. Raises InputError when none was given."""
        if self.index is None:
            raise InputError("no atlas is open", fix="Start with `hba explore --atlas FOLDER`.")
        return self.index

    @cached_property
    def templates(self) -> Environment:
        """Jinja over the explorer's own templates and those of reports."""
        return words.environment(HERE / "templates")


class Asked:
    """One request: its `form` are the values of the address."""

    def __init__(self, request: Request) -> None:
        self.request, self.form = request, Form(dict(request.query_params))
        self.explorer: Explorer = request.app.state.explorer

    def sample(self) -> Sample:
        """The sample that the address names."""
        params = self.request.path_params
        return self.explorer.atlas().sample(params["split"], params["number"])

    def page(self, template: str, title: str, **values: Any) -> HTMLResponse:
        """A page of the app: the template with navigation, title and the form of the address around it."""
        path, live = self.request.url.path, SHARED not in self.request.scope
        navigation = PAGES if self.explorer.tries is None else (TRY, *PAGES)
        common = {"title": title, "navigation": navigation, "path": path, "form": self.form}
        common |= {"index": self.explorer.index, "here": path + self.form.link(), "live": live, "sheet": sheet()}
        return HTMLResponse(self.explorer.templates.get_template(template).render(**common, **values))


@cache
def sheet() -> Markup:
    """The style of every page: that of the report and the explorer's own."""
    return words.style("style.css", HERE / "static" / "explorer.css")


def _told(output: str | None, probs: Mapping[str, float] | None) -> dict[str, Any]:
    """What a model thought and what it said, and its probabilities, the largest first."""
    match = _THINK.match(output or "")
    ranked = sorted((probs or {}).items(), key=lambda pair: -pair[1])
    return {
        "thinking": match.group(1).strip() if match else "",
        "spoken": match.group(2).strip() if match else output or "",
        "probs": [{"label": label, "p": p, "bar": share_bar(p)} for label, p in ranked],
    }


def _said(row: Row) -> dict[str, Any]:
    """A prediction as pages show it, and whether a free-form answer is the target to the letter."""
    exact = row["answer"] is not None and same_answer(row["answer"], row["target"])
    return {"row": row, "exact": exact, **_told(row["output"], json.loads(row["probs"] or "{}"))}


# --- try: a clip of one's own, asked and labelled ---------------------------------------------------------------------
#
# Clips come as bodies of their own, to a private folder that goes with the server. "Keep" puts one beside the rows of
# an atlas, which is written whole each time: a row says who gave which label and what each model had answered. Its
# answer is what all annotators say; where they differ it has none. A clip is named by its content.


KEPT = "kept.jsonl"
MOST_CLIP_BYTES = 200 << 20
PATIENCE_SECONDS = 300.0
_KEEPING = threading.Lock()
Posted = Mapping[str, list[str]]


def tried(asked: Asked) -> Response:
    """The page: a clip, its models, their answers, and what was kept."""
    tries = _tries(asked.explorer)
    tasks = [name for name in tries.taxonomy.tasks if _labels(tries.taxonomy, _of_task(tries.taxonomy, name))]
    clip = asked.form.text("clip")
    task = asked.form.text("task") or ("EMO" if "EMO" in tasks else next(iter(tasks), ""))
    named = {name: _named(tries.taxonomy, name) for name in tasks}
    shown: dict[str, Any] = {"tasks": named, "task": task, "models": list(tries.models), "clip": clip}
    kind = media.media_type(head(tries.clip(clip), 16, where=clip)) if clip else ""
    shown |= {"kind": kind, "keep": tries.keep, "kept": _kept(tries), "just": None}
    return asked.page("try.html.jinja", "Try", **shown, **_agreement(tries))


def _tries(explorer: Explorer) -> Tries:
    if explorer.tries is None:
        raise InputError("no model is open", fix="Start with `hba explore --models runs/sft`.")
    return explorer.tries


def _of_task(taxonomy: Taxonomy, task: str) -> str:
    """The dataset whose labels stand for a task. Raises InputError for an unknown task."""
    return datasets_of(taxonomy, [task], None, None)[0]


def _named(taxonomy: Taxonomy, task: str) -> str:
    """A task as a reader knows it: EMO, emotion recognition."""
    return ", ".join(filter(None, [task, taxonomy.tasks[task].name]))


def _labels(taxonomy: Taxonomy, dataset: str) -> tuple[str, ...]:
    about = taxonomy.dataset(dataset)
    return tuple(about.labels or (taxonomy.domains[about.domain].labels if about.domain else ()))


async def put_clip(request: Request) -> Response:
    """Take a clip, the body of the request; its name as JSON, and who has labelled it for the `task` of the query. 413
    while one comes that is too long."""
    tries = _tries(request.app.state.explorer)
    ending = Path(request.query_params.get("name", "")).suffix.lower()
    ending = ending if re.fullmatch(r"\.[a-z0-9]{1,6}", ending) else ".webm"
    digest, size = hashlib.sha256(), 0
    with tempfile.NamedTemporaryFile(dir=tries.folder, prefix="coming-") as file:
        async for chunk in request.stream():
            size += len(chunk)
            if size > MOST_CLIP_BYTES:
                return PlainTextResponse(f"The clip is larger than {MOST_CLIP_BYTES >> 20} MB.\n", 413)
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        name = digest.hexdigest()[:24]
        place = tries.folder / f"{name}{ending}"
        if not place.exists():
            os.link(file.name, place)
    task = request.query_params.get("task")
    row = f"{name}-{_of_task(tries.taxonomy, task)}" if task else ""
    labels: dict[str, str] = next((each.get("labels", {}) for each in _kept(tries) if each["id"] == row), {})
    return JSONResponse({"clip": name, "labels": labels})


def clip(asked: Asked) -> Response:
    """The bytes of a clip, by ranges."""
    path = _tries(asked.explorer).clip(asked.request.path_params["clip"])
    return media_response(path, asked.request.headers.get("range"), where=path.name)


def clip_sound(asked: Asked) -> Response:
    """Waveform and spectrogram of a clip."""
    path = _tries(asked.explorer).clip(asked.request.path_params["clip"])
    try:
        return _sound(asked, path, path.name)
    except MediaError as error:
        return asked.page("refused.html.jinja", "Cannot be drawn", said=error.what)


def clip_landmarks(asked: Asked) -> Response:
    """Landmarks of the person in a clip, as JSON; a sentence where there are none, or MediaPipe is not set up."""
    path = _tries(asked.explorer).clip(asked.request.path_params["clip"])
    try:
        return JSONResponse(asked.explorer.long_decoder.call(media.found_landmarks, path, path.name))
    except HbaError as error:
        said = f"No landmarks: {error.what}." + ("" if isinstance(error, MediaError) else f" {error.fix}")
        return asked.page("refused.html.jinja", "No landmarks", said=said)


def posted(page: Callable[[Asked, Posted], Response]) -> Callable[[Request], Awaitable[Response]]:
    """A page of a form in the body of its request. Raises InputError for a long one."""

    async def answered(request: Request) -> Response:
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise InputError("the request is too long", fix="Ask in fewer words.")
        return await run_in_threadpool(page, Asked(request), parse_qs(body.decode("utf-8", "replace")))

    return answered


@posted
def ask_over_time(asked: Asked, form: Posted) -> Response:
    """What the chosen models answer of the windows of a clip: the form of `ask_models`, and `every` in seconds."""
    tries = _tries(asked.explorer)
    path, seconds = tries.clip(_one(form, "clip")), _one(form, "every")
    every = float(seconds) if re.fullmatch(r"\d{1,4}(\.\d{1,3})?", seconds) else 0.0
    if every < MIN_WINDOW:
        raise InputError(f"windows of {seconds[:20] or 'no'} seconds", fix=f"Give seconds, {MIN_WINDOW:g} or more.")
    _, about = _what_is_asked(tries, form)
    said = []
    with tempfile.TemporaryDirectory(dir=tries.folder, prefix="windows-") as place:
        cut = partial(media.windows, folder=Path(place), every=every)
        parts = asked.explorer.long_decoder.call(cut, path, path.name)
        if not parts:
            raise InputError("a picture has no time", fix="Ask a clip or a sound over time.")
        waiting = [
            (chosen, [_asked_of(tries, form, chosen, part.path) for part in parts]) for chosen in form.get("models", ())
        ]
        for chosen, answers in waiting:
            replies = [_reply_of(path.name, part, answer) for part, answer in zip(parts, answers, strict=True)]
            said.append((chosen, replies, over_time(replies)))
    return asked.page("try_curve.html.jinja", "Over time", said=said, about=about)


def _reply_of(file: str, part: media.Part, answer: Future[Prediction] | HbaError) -> Reply:
    return reply_of(_answer_of(answer), file=file, task="", dataset="", start=part.start, end=part.end)


def _what_is_asked(tries: Tries, form: Posted) -> tuple[str, str]:
    """The dataset whose rows ask it, and its words for a reader. Raises InputError where nothing, or an unknown task,
    is asked."""
    if question := _one(form, "question"):
        return FREE, question
    task = _one(form, "task")
    if not task:
        raise InputError("nothing is asked", fix="Choose a task, or write a question.")
    return _of_task(tries.taxonomy, task), _named(tries.taxonomy, task)


def _asked_of(tries: Tries, form: Posted, chosen: str, path: Path) -> Future[Prediction] | HbaError:
    """What a model answers of a file, or why it is not asked. Raises InputError for a model that is not open."""
    if chosen not in tries.models:
        raise InputError(f"no model {chosen!r} is open", fix=nearest(chosen, tries.models))
    question = _one(form, "question") or None
    task = None if question else _one(form, "task")
    try:
        ((_, answer),) = tries.models[chosen].asks(path, task=task, question=question)
    except HbaError as error:
        return error
    return answer


@posted
def ask_models(asked: Asked, form: Posted) -> Response:
    """What the chosen models answer of a clip: `clip`, `task`, `question`, `models` of a form."""
    tries = _tries(asked.explorer)
    name, task = _one(form, "clip"), _one(form, "task")
    path = tries.clip(name)
    dataset, about = _what_is_asked(tries, form)
    waiting = {chosen: _asked_of(tries, form, chosen, path) for chosen in form.get("models", ())}
    shown: list[dict[str, Any]] = []
    for chosen, answer in waiting.items():
        told = _answer_of(answer)
        if isinstance(told, str):
            shown.append({"model": chosen, "label": None, "error": told})
        else:
            said = _told(told.output, told.probs)
            shown.append({"model": chosen, "label": told.label, "error": told.error, **said})
    tries.said[name, dataset] = {
        one["model"]: {
            "answer": one["label"] or one["spoken"],
            "probs": {each["label"]: each["p"] for each in one["probs"]},
        }
        for one in shown
        if not one["error"]
    }
    return asked.page("try_answers.html.jinja", "Answers", answers=shown, labels=_labels(tries.taxonomy, dataset),
                      clip=name, task=task, about=about, question=_one(form, "question"), keep=tries.keep)  # fmt: skip


def _answer_of(answer: Future[Prediction] | HbaError) -> Prediction | str:
    """The answer, or what to say where there is none."""
    if isinstance(answer, HbaError):
        return answer.what
    try:
        failed = answer.exception(PATIENCE_SECONDS)
    except TimeoutError:
        return "gave no answer in time"
    if failed is None:
        return answer.result()
    return failed.what if isinstance(failed, HbaError) else f"the model failed ({type(failed).__name__})"


def _one(form: Posted, name: str) -> str:
    return form.get(name, [""])[0].strip()


@posted
def keep(asked: Asked, form: Posted) -> Response:
    """Keep a clip as a row with a person's label: `clip`, `task`, `label`, `annotator` of a form."""
    tries = _tries(asked.explorer)
    if tries.keep is None:
        raise InputError("nothing is kept here", fix="Start with `hba explore --models runs/sft --keep FOLDER`.")
    name, label, annotator = _one(form, "clip"), _one(form, "label"), _one(form, "annotator")[:40] or "me"
    path, taxonomy = tries.clip(name), tries.taxonomy
    dataset = _of_task(taxonomy, _one(form, "task"))
    if label not in _labels(taxonomy, dataset):
        raise InputError(f"no label {label!r} of {dataset}", fix=nearest(label, _labels(taxonomy, dataset)))
    inside = f"media/{path.name}"
    medium = Medium(path, asked.explorer.decoder.call(media.kinds, path, path.name))
    row = row_of(medium, inside, dataset, taxonomy, question=None, transcript=None)
    (tries.keep / "media").mkdir(parents=True, exist_ok=True)
    with _KEEPING, alone(tries.keep / ".keep.lock"):
        if not (tries.keep / inside).exists():
            with atomic_write(tries.keep / inside, "wb") as file, path.open("rb") as source:
                shutil.copyfileobj(source, file)
        save_beside(taxonomy, tries.keep)
        rows = {each["id"]: each for each in _kept(tries)}
        before = rows.get(f"{name}-{dataset}", {})
        labels = {**before.get("labels", {}), annotator: label}
        agreed = label if len(set(labels.values())) == 1 else None
        about = {"answer": agreed, "class_label": agreed, "labels": labels, "id": f"{name}-{dataset}"}
        said = tries.said.get((name, dataset)) or before.get("said", {})
        rows[f"{name}-{dataset}"] = {k: v for k, v in (row | about | {"said": said}).items() if v is not None}
        write_jsonl(tries.keep / KEPT, rows.values())
    shown = {"kept": _kept(tries), "just": f"{annotator}: {label}"}
    return asked.page("try_kept.html.jinja", "Kept", **shown, **_agreement(tries))


def _kept(tries: Tries) -> list[dict[str, Any]]:
    path = tries.keep / KEPT if tries.keep else None
    return [] if path is None or not path.is_file() else list(whole_lines(path))


def _agreement(tries: Tries) -> dict[str, Any]:
    """Cohen's kappa of the two annotators who share the most clips, over all labels; None where it is not defined."""
    shared: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for row in _kept(tries):
        for pair in combinations(sorted(row.get("labels", {})), 2):
            shared[pair].append((row["labels"][pair[0]], row["labels"][pair[1]]))
    if not shared:
        return {"pair": None}
    pair, both = max(shared.items(), key=lambda each: len(each[1]))
    return {"pair": pair, "n": len(both), "kappa": kappa_of(both)}


def kappa_of(pairs: Sequence[tuple[str, str]]) -> float | None:
    """Cohen's kappa, (p_o - p_e) / (1 - p_e), of two raters' labels of the same things; None where both gave one label
    throughout."""
    n = len(pairs)
    first, second = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    expected = sum(first[label] * second[label] for label in first) / n**2
    return None if expected == 1 else (sum(a == b for a, b in pairs) / n - expected) / (1 - expected)


# --- the atlas and its samples ----------------------------------------------------------------------------------------


DRAWN = {
    "sound": ("audios", "videos"),
    "curves": ("ext_video_feats", "ext_audio_feats"),
    "landmarks": ("ext_video_feats",),
    "playable": ("videos", "audios", "images"),
}


def atlas(asked: Asked) -> Response:
    """Search, filters and a page of cards."""
    index = asked.explorer.atlas()
    found = find_samples(asked.explorer.database, asked.form)
    return asked.page("atlas.html.jinja", "Atlas", found=found, values=index.known_values(), state=index.state)


def progress(asked: Asked) -> Response:
    """How far the index is, for the line that asks again every second."""
    return asked.page("progress.html.jinja", "Index", state=asked.explorer.atlas().state)


def sample(asked: Asked) -> Response:
    """One sample: media, waveform, spectrogram, pose, descriptors, prompt, answer, and what every run said of it."""
    explorer, shown = asked.explorer, asked.sample()
    near = {
        step: explorer.database.one(
            "SELECT split, number FROM rows.sample WHERE split = ? AND number = ?", (shown.split, shown.number + step)
        )
        for step in (-1, 1)
    }
    said: list[dict[str, Any]] = []
    for run in explorer.runs.predicted():
        explorer.runs.load(run.name)
        query = f"SELECT {COLUMNS} FROM {PREDICTED} WHERE p.run = ? AND p.id = ? AND p.split = ?"  # noqa: S608
        said += map(_said, explorer.database.all(query, (run.name, shown.id, shown.split)))
    return asked.page(
        "sample.html.jinja",
        shown.id,
        sample=shown,
        media=[(field, place) for field in MEDIA_FIELDS for place in range(getattr(shown, field))],
        near=near,
        said=said,
        extra={key: str(value) for key, value in shown.extra.items()},
        back=asked.form.text("back"),
    )


def medium(asked: Asked) -> Response:
    """The bytes of a medium, by ranges."""
    shown, params = asked.sample(), asked.request.path_params
    source, where = source_of(shown, params["field"], params["place"]), f"{shown.where}, {params['field']}"
    return media_response(source, asked.request.headers.get("range"), where=where)


def picture(asked: Asked) -> Response:
    """What is made of a medium: `sound` and `curves` (HTML), `landmarks` (JSON), `playable` (what browsers play)."""
    params, decoder = asked.request.path_params, asked.explorer.decoder
    kind, field = params["kind"], params["field"]
    if field not in DRAWN.get(kind, ()):
        raise InputError(f"nothing is drawn as {kind!r} of {field!r}", fix="See the sample's own page.")
    shown = asked.sample()
    source, where = source_of(shown, field, params["place"]), f"{shown.where}, {field}"
    try:
        if kind == "landmarks":
            return JSONResponse(decoder.call(media.landmarks, source, where))
        if kind == "playable":
            mime, data = asked.explorer.long_decoder.call(media.playable, source, where)
            return Response(data, media_type=mime)
        if kind == "sound":
            return _sound(asked, source, where)
        parts = [
            {"name": name, "shape": " x ".join(map(str, shape)), "svg": bundle(name, values)}
            for name, shape, values in decoder.call(media.curves, source, where)
        ]
        return asked.page("curves.html.jinja", "Descriptors", parts=parts)
    except MediaError as error:
        silent = field == "videos" and "no sound track" in error.what
        said = "This clip has no sound track." if silent else str(error)
        return asked.page("refused.html.jinja", "Cannot be drawn", said=said)


def _sound(asked: Asked, source: Source, where: str) -> Response:
    """Waveform and spectrogram. Raises MediaError."""
    seconds, peaks, spectrogram = asked.explorer.decoder.call(media.sound_pictures, source, where)
    image = f"data:image/png;base64,{base64.b64encode(spectrogram).decode()}"
    drawn = {"svg": waveform(peaks, seconds), "seconds": seconds, "spectrogram": image}
    return asked.page("sound.html.jinja", "Sound", **drawn)


def quarantine(asked: Asked) -> Response:
    """Every sample that a run or this server could not read, with place and reason."""
    explorer = asked.explorer
    records = (
        [] if explorer.index is None else [{"run": "this server", **r._asdict()} for r in explorer.index.quarantine]
    )
    for run in explorer.runs.all():
        records += [{"run": run.name, **record} for record in whole_lines(run.path / "quarantine.jsonl")]
    query = "SELECT split, number FROM rows.sample WHERE split = ? AND id = ?"
    keys = {(str(record.get("split")), str(record.get("id"))) for record in records}
    places = {key: explorer.database.one(query, key) for key in keys}
    return asked.page("quarantine.html.jinja", "Quarantine", records=records, places=places)


# --- judge review: a person says of each verdict whether it is right --------------------------------------------------
#
# human_verdicts.jsonl in the run folder holds one line an answer, with everything that a judge is shown, and is written
# whole at each decision: it is what `hba judge --calibrate` reads. A decision is about the answer, not about a judge,
# so that it serves to calibrate every judge.


CHOICES = {"right": True, "wrong": False}
MAX_BODY_BYTES = 10_000
_DECIDING = threading.Lock()  # two decisions at once must not write over each other


def judge(asked: Asked) -> Response:
    """The free-form answers of a run with the judge's verdicts and the person's."""
    database, runs = asked.explorer.database, asked.explorer.runs.predicted()
    if not runs:
        return asked.page("judge.html.jinja", "Judge review", runs=[], run=None)
    run = asked.explorer.runs.load(asked.form.text("run") or runs[0].name)
    found = find_answers(database, asked.form, run.name)
    query = "SELECT id, correct FROM runs.decision WHERE run = ?"
    decided = {row["id"]: bool(row["correct"]) for row in database.all(query, (run.name,))}
    rows = [{**_said(row), "said": decided.get(row["id"])} for row in found.rows]
    return asked.page(
        "judge.html.jinja", "Judge review", runs=runs, run=run, rows=rows, found=found, decided=len(decided)
    )


async def save(request: Request) -> Response:
    """Append one decision: `run`, `id`, `decision` of a form.

    Raises InputError for an id that the run has no free-form answer for.
    """
    body = await request.body()
    if len(body) > MAX_BODY_BYTES:
        return PlainTextResponse("The request is too long.\n", 413)
    return await run_in_threadpool(_save, Asked(request), dict(parse_qsl(body.decode("utf-8", "replace"))))


def _save(asked: Asked, form: dict[str, str]) -> Response:
    values = {name: form.get(name, "") for name in ("run", "id", "decision", "page")}
    run = asked.explorer.runs.load(values["run"])
    query = f"SELECT p.*, s.problem FROM {WITH_QUESTION} WHERE p.run = ? AND p.id = ? AND {FREE_FORM}"  # noqa: S608
    row = asked.explorer.database.one(query, (run.name, values["id"]))
    if row is None or values["decision"] not in CHOICES:
        what = f"no free-form answer {values['id']!r} to decide on, or no decision {values['decision']!r}"
        raise InputError(what, where=run.name, fix="Decide on the page of the judge review.")
    if row["problem"] is None:
        what = f"the question of {values['id']!r} is not known here"
        raise InputError(what, where=run.name, fix="Start with --atlas and the atlas of the run.")
    shown = {"question": row["problem"], "reference": row["target"], "answer": row["answer"]}
    decision = {"id": row["id"], "dataset": row["dataset"], **shown, "correct": CHOICES[values["decision"]]}
    with _DECIDING:
        path = run.path / DECISIONS
        kept = [record for record in whole_lines(path) if record.get("id") != decision["id"]]
        write_jsonl(path, [*kept, decision])
    if asked.request.headers.get("hx-request"):
        return asked.page("decided.html.jinja", "Saved", decision=values["decision"])
    query = urlencode({"run": run.name, "page": values["page"] or 1})
    return RedirectResponse(f"/judge?{query}", 303)


# --- predictions of a run, or of two beside each other, with filters that find the mistakes ---------------------------


def predictions(asked: Asked) -> Response:
    """A page of predictions."""
    explorer, form = asked.explorer, asked.form
    runs = explorer.runs.predicted()
    if not runs:
        return asked.page("predictions.html.jinja", "Predictions", runs=[], found=None)
    form = Form({**form.values, "a": form.text("a") or runs[0].name})
    for side in ("a", "b"):
        if form.text(side):
            explorer.runs.load(form.text(side))
    found = find_predictions(explorer.database, form)
    rows = []
    for row in found.rows:
        shown = {**_said(row), "state": _state(row["correct"], row["judged"], row["error"], row["invalid"])}
        if form.text("b"):
            shown["b_state"] = _state(row["b_correct"], row["b_judged"], row["b_error"], 0)
        rows.append(shown)
    known = {}
    for name, condition in (("dataset", ""), ("task", ""), ("split", ""), ("target", "AND correct IS NOT NULL")):
        query = f"SELECT DISTINCT {name} FROM runs.prediction WHERE run = ? {condition} ORDER BY 1"  # noqa: S608
        known[name] = [row[0] for row in explorer.database.all(query, [form.text("a")])]
    return asked.page(
        "predictions.html.jinja",
        "Predictions",
        runs=runs,
        found=found,
        rows=rows,
        asked=form,
        values=known,
        verdicts=list(VERDICTS),
        pairs=list(PAIRS),
    )


def _state(correct: int | None, judged: int | None, error: str | None, invalid: int) -> str:
    """One word for what became of a sample: right, wrong, invalid, error or unjudged."""
    if error or invalid:
        return "error" if error else "invalid"
    verdict = judged if correct is None else correct
    return "unjudged" if verdict is None else "right" if verdict else "wrong"


def prediction(asked: Asked) -> Response:
    """From the id of a prediction to its sample's page."""
    split, key = asked.form.text("split"), asked.form.text("id")
    query = "SELECT split, number FROM rows.sample WHERE split = ? AND id = ?"
    found = asked.explorer.database.one(query, (split, key))
    if found is None:
        what = f"the atlas has no sample {key!r} in split {split!r}"
        raise InputError(what, fix="Open the atlas that the run was predicted on with --atlas.")
    return RedirectResponse(f"/sample/{found['split']}/{found['number']}")


# --- RL: what a run's reward and policy did, as in its report, and the rollouts of one prompt over the steps ----------


FILE = "rollouts.jsonl"
MAX_SHOWN = 200


def rl(asked: Asked) -> Response:
    """The figures of a run over its steps, and the rollouts of the chosen prompt."""
    runs = [run for run in asked.explorer.runs.all() if run.has(FILE)]
    if not runs:
        return asked.page("rollouts.html.jinja", "RL", runs=[], run=None)
    run = asked.explorer.runs.get(asked.form.text("run") or runs[0].name)
    rollouts = list(whole_lines(run.path / FILE))
    prompts = sorted({str(each.get("id")) for each in rollouts})
    chosen = asked.form.text("id") or (prompts[0] if prompts else "")
    shown = [each for each in rollouts if str(each.get("id")) == chosen][:MAX_SHOWN]
    values = {"prompts": prompts, "chosen": chosen, "rollouts": shown, "rl": rl_part(run.path)}
    return asked.page("rollouts.html.jinja", "RL", runs=runs, run=run, **values)


# --- the runs: a list, one run with its curves while it trains, and configs side by side ------------------------------


SHOWN_FACTS = (
    *("command", "started_at", "hba_version", "git_commit", "python", "platform", "cpu", "cpu_cores", "gpus", "seed"),
)


def runs(asked: Asked) -> Response:
    """Every run with its command, its score and its age."""
    return asked.page("runs.html.jinja", "Runs", runs=[_summary(run) for run in asked.explorer.runs.all()])


def _summary(run: RunEntry) -> dict[str, Any]:
    environment = run.opened.environment or {}
    last = max((int(record.get("step", 0)) for record in whole_lines(run.path / "log.jsonl")), default=None)
    score, part = None, ""
    if run.has("metrics.json"):
        try:
            metrics = run.opened.metrics
            score, part = metrics.mean.score, metrics.aggregate.rows if metrics.aggregate.n_missing else ""
        except InputError as error:  # of this run alone; its own page says it in full
            part = error.what
    return {
        "run": run,
        "command": environment.get("command", "predict" if run.has("predict.json") else ""),
        "started": environment.get("started_at", ""),
        "score": score,
        "part": part,
        "step": last,
    }


def run(asked: Asked) -> Response:
    """One run: curves, configuration, environment, and where to go from here."""
    shown = asked.explorer.runs.get(asked.form.text("run"))
    environment = shown.opened.environment or {}
    return asked.page(
        "run.html.jinja",
        shown.name,
        run=shown,
        curves=_curves(shown),
        config=shown.opened.config,
        facts={name: environment[name] for name in SHOWN_FACTS if name in environment},
        packages=environment.get("packages", {}),
        data=environment.get("data", {}),
    )


def run_curves(asked: Asked) -> Response:
    """The curves of one run, for the page that asks again while the run goes on."""
    shown = asked.explorer.runs.get(asked.form.text("run"))
    return asked.page("curves_live.html.jinja", shown.name, run=shown, curves=_curves(shown))


def _curves(shown: RunEntry) -> Curves | None:
    events = []
    for record in whole_lines(shown.path / "log.jsonl"):
        kept = {k: v for k, v in record.items() if k in Event.__dataclass_fields__}
        events.append(msgspec.convert({"kind": "", **kept}, Event))
    if not events:
        return None
    return curves(events, shown.opened.metrics.tasks if shown.has("metrics.json") else {})


def side_by_side(asked: Asked) -> Response:
    """The configs of the chosen runs, one line a key, those that differ first."""
    chosen = [asked.explorer.runs.get(name) for name in asked.request.query_params.getlist("run")]
    configs = [flat(read_yaml(run.path / "config.yaml")) if run.has("config.yaml") else {} for run in chosen]
    rows = []
    for key in sorted({key for config in configs for key in config}):
        values = [inline_yaml(config[key]) if key in config else "–" for config in configs]
        rows.append({"key": key, "values": values, "differs": len(set(values)) > 1})
    rows.sort(key=lambda row: (not row["differs"], row["key"]))
    return asked.page("side_by_side.html.jinja", "Side by side", runs=chosen, rows=rows)


# --- scores with intervals, confusion matrices that open their samples, calibration, slices; and two runs compared ----


def scores(asked: Asked) -> Response:
    """The metrics of a run."""
    runs = [run for run in asked.explorer.runs.all() if run.has("metrics.json")]
    if not runs:
        return asked.page("scores.html.jinja", "Scores", runs=[], run=None)
    shown = asked.explorer.runs.get(asked.form.text("run") or runs[0].name)
    metrics = shown.opened.metrics
    return asked.page(
        "scores.html.jinja",
        "Scores",
        runs=runs,
        run=shown,
        metrics=metrics,
        bars={key: bar(task, name=key) for key, task in metrics.tasks.items() if task.score is not None},
        warnings=words.warnings(metrics, stale=shown.opened.stale),
        matrices=list(_matrices(shown.opened)) if shown.has("predictions.jsonl") else [],
        reliability=reliability(metrics.calibration.all) if metrics.calibration else None,
        zip=zip,
        link=lambda **values: Form(values).link(),
    )


def _matrices(run: Run) -> Iterable[Matrix]:
    """One matrix a dataset, so that a cell says which samples it means."""
    for key in sorted({each.dataset for each in run.predictions}):
        for domain in matrices([each for each in run.predictions if each.dataset == key], run.taxonomy):
            yield domain.pooled


def compare(asked: Asked) -> Response:
    """Paired differences of run B to run A, and the samples that flipped."""
    from hba.evaluate.compare import compare_runs
    from hba.report.comparison import comparison

    form, runs = asked.form, asked.explorer.runs.predicted()
    if not (form.text("a") and form.text("b")):
        return asked.page("compare.html.jinja", "Compare", runs=runs, found=None)
    a, b = (asked.explorer.runs.get(form.text(side)) for side in ("a", "b"))
    found = compare_runs(a.path, b.path, allow_other_data=form.text("other_data") == "1")
    return asked.page("compare.html.jinja", "Compare", runs=runs, found=found, table=comparison(found), a=a, b=b)


# --- a page as one file to share: its style inside, no script, no form, no player -------------------------------------
#
# The page is made anew with `live` off, and its links, which would lead nowhere, are taken out. Sounds and clips are
# not part of it: a table of scores may be shown to others, the recordings behind it often may not.


SHOWN = (*(path for path, _ in PAGES), "/run", "/runs/side-by-side")
_ADDRESS = re.compile(r'(<a\b[^>]*?)\shref="[^"]*"')  # values are escaped: no quote ends one early


def snapshot(asked: Asked) -> Response:
    """The page whose address stands in `of`, as a file. Raises InputError for an address that is none of the pages."""
    of, request = urlsplit(asked.form.text("of")), asked.request
    if not of.netloc and (of.path in SHOWN or of.path.startswith("/sample/")):
        place = {"path": of.path, "raw_path": of.path.encode(), "query_string": of.query.encode()}
        scope = {**request.scope, **place}
        for route in request.app.routes:
            match, child = route.matches(scope)
            if match is Match.FULL:
                page = child["endpoint"](Request({**scope, **child, SHARED: True}))
                name = re.sub(r"\W+", "-", of.path).strip("-")
                headers = {"content-disposition": f'attachment; filename="hba-{name}.html"'}
                return HTMLResponse(_ADDRESS.sub(r"\1", page.body.decode()), headers=headers)
    raise InputError(f"no page {of.path!r} to share", where="of", fix="Use the link on a page.")
