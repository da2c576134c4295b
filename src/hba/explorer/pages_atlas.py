"""The atlas page, a sample's own page with everything that can be seen and heard of it, and the quarantine."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from hba.atlas.sample import MEDIA_FIELDS, Sample
from hba.errors import InputError, MediaError
from hba.explorer import decode, drawings
from hba.explorer.app import Explorer, explorer_of, form_of
from hba.explorer.query import find_samples
from hba.explorer.runs import exact, whole_lines
from hba.explorer.serve_media import media_response, source_of

DRAWN = {
    "sound": ("audios", "videos"),
    "curves": ("ext_video_feats", "ext_audio_feats"),
    "landmarks": ("ext_video_feats",),
    "playable": ("videos", "audios", "images"),
}


def atlas(request: Request) -> Response:
    """Search, filters and a page of cards."""
    explorer, form = explorer_of(request), form_of(request)
    index = explorer.atlas()
    found = find_samples(explorer.database, form)
    shown = {"found": found, "values": index.known_values(), "state": index.state}
    return explorer.page(request, "atlas.html.jinja", "Atlas", **shown)


def progress(request: Request) -> Response:
    """How far the index is, for the line that asks again every second."""
    explorer = explorer_of(request)
    return explorer.page(request, "progress.html.jinja", "Index", state=explorer.atlas().state)


def sample(request: Request) -> Response:
    """One sample: media, waveform, spectrogram, pose, descriptors, prompt, answer, and what every run said of it."""
    explorer, form = explorer_of(request), form_of(request)
    shown = _sample(explorer, request)
    near = {step: explorer.database.one(
        "SELECT split, number FROM rows.sample WHERE split = ? AND number = ?", (shown.split, shown.number + step)
    ) for step in (-1, 1)}  # fmt: skip
    media = [(field, place) for field in MEDIA_FIELDS for place in range(getattr(shown, field))]
    return explorer.page(
        request, "sample.html.jinja", shown.id, sample=shown, media=media, near=near, said=_said(explorer, shown),
        extra={key: str(value) for key, value in shown.extra.items()}, back=form.text("back"),
    )  # fmt: skip


def _sample(explorer: Explorer, request: Request) -> Sample:
    params = request.path_params
    return explorer.atlas().sample(params["split"], params["number"])


def _said(explorer: Explorer, shown: Sample) -> list[dict[str, Any]]:
    """The prediction of every run for a sample."""
    said = []
    for run in explorer.runs.predicted():
        explorer.runs.load(run.name)
        query = """SELECT p.*, j.judge, j.correct AS judged, j.reason FROM runs.prediction p
          LEFT JOIN runs.judgement j ON j.run = p.run AND j.id = p.id WHERE p.run = ? AND p.id = ? AND p.split = ?"""
        for row in explorer.database.all(query, (run.name, shown.id, shown.split)):
            said.append({"row": row, "exact": exact(row["answer"], row["target"]), **drawings.answer(row)})
    return said


def medium(request: Request) -> Response:
    """The bytes of a medium, by ranges."""
    explorer, params = explorer_of(request), request.path_params
    shown = _sample(explorer, request)
    where = f"{shown.where}, {params['field']}"
    return media_response(source_of(shown, params["field"], params["place"]), request.headers.get("range"), where=where)


def picture(request: Request) -> Response:
    """What is made of a medium: `sound` and `curves` (HTML), `landmarks` (JSON), `playable` (what browsers play)."""
    explorer, params = explorer_of(request), request.path_params
    kind, field = params["kind"], params["field"]
    if field not in DRAWN.get(kind, ()):
        raise InputError(f"nothing is drawn as {kind!r} of {field!r}", fix="See the sample's own page.")
    shown = _sample(explorer, request)
    source, where = source_of(shown, field, params["place"]), f"{shown.where}, {field}"
    try:
        if kind == "landmarks":
            return JSONResponse(explorer.decoder.call(decode.landmarks, source, where))
        if kind == "playable":
            mime, data = explorer.decoder.call(decode.playable, source, where)
            return Response(data, media_type=mime)
        if kind == "sound":
            sound = drawings.waveform(explorer.decoder.call(decode.sound_pictures, source, where))
            return explorer.page(request, "sound.html.jinja", "Sound", **sound)
        parts = drawings.descriptor_curves(explorer.decoder.call(decode.curves, source, where))
        return explorer.page(request, "curves.html.jinja", "Descriptors", parts=parts)
    except MediaError as error:
        silent = field == "videos" and "no sound track" in error.what
        said = "This clip has no sound track." if silent else str(error)
        return explorer.page(request, "refused.html.jinja", "Cannot be drawn", said=said)


def quarantine(request: Request) -> Response:
    """Every sample that a run or this server could not read, with place and reason."""
    explorer = explorer_of(request)
    records = [
        {"run": run.name, **record}
        for run in explorer.runs.all()
        for record in whole_lines(run.path / "quarantine.jsonl")
    ]
    here = [] if explorer.index is None else [{"run": "this server", **r._asdict()} for r in explorer.index.quarantine]
    places = {}
    for record in [*here, *records]:
        key = (str(record.get("split")), str(record.get("id")))
        query = "SELECT split, number FROM rows.sample WHERE split = ? AND id = ?"
        places[key] = explorer.database.one(query, key)
    return explorer.page(request, "quarantine.html.jinja", "Quarantine", records=[*here, *records], places=places)
