"""The pages: atlas, samples and quarantine, then judge review, predictions, RL, runs, scores, and a page as a file."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Match

from hba.atlas.rows import MEDIA_FIELDS, Sample
from hba.config import flat, inline_yaml, read_yaml
from hba.errors import InputError, MediaError
from hba.evaluate.runs import Event, Run
from hba.explorer import drawings, media
from hba.explorer.app import PAGES, SHARED, Explorer, explorer_of, form_of
from hba.explorer.index import PAGE_SIZE, PAIRS, VERDICTS, Form, find_predictions, find_samples
from hba.explorer.media import media_response, source_of
from hba.explorer.runs import DECISIONS, RunEntry, exact, whole_lines
from hba.report.charts import Curves, Matrix, bar, curves, matrices, reliability
from hba.report.rl import rl_part
from hba.report.words import warnings
from hba.storage import atomic_write

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
            return JSONResponse(explorer.decoder.call(media.landmarks, source, where))
        if kind == "playable":
            mime, data = explorer.decoder.call(media.playable, source, where)
            return Response(data, media_type=mime)
        if kind == "sound":
            sound = drawings.waveform(explorer.decoder.call(media.sound_pictures, source, where))
            return explorer.page(request, "sound.html.jinja", "Sound", **sound)
        parts = drawings.descriptor_curves(explorer.decoder.call(media.curves, source, where))
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


# Judge review: a person says of each verdict whether it is right; the file is what `hba judge --calibrate` reads.
#
# human_verdicts.jsonl in the run folder holds one line an answer, with everything that a judge is shown, and is written
# whole at each decision. A decision is about the answer, not about a judge, so that it serves to calibrate every judge.


CHOICES = {"right": True, "wrong": False}
MAX_BODY_BYTES = 10_000
# A failed or empty answer is wrong without anybody's judgement.
ANSWERED = "p.correct IS NULL AND p.error IS NULL AND trim(coalesce(p.answer, '')) <> ''"
_DECIDING = threading.Lock()  # two decisions at once must not write over each other


def judge(request: Request) -> Response:
    """The free-form answers of a run with the judge's verdicts and the person's."""
    explorer, form = explorer_of(request), form_of(request)
    runs = explorer.runs.predicted()
    if not runs:
        return explorer.page(request, "judge.html.jinja", "Judge review", runs=[], run=None)
    run = explorer.runs.load(form.text("run") or runs[0].name)
    query = f"""SELECT p.*, j.judge, j.correct AS judged, j.reason, s.problem, s.number FROM runs.prediction p
      LEFT JOIN runs.judgement j ON j.run = p.run AND j.id = p.id
      LEFT JOIN rows.sample s ON s.id = p.id AND s.split = p.split
      WHERE p.run = ? AND {ANSWERED} ORDER BY p.dataset, p.id LIMIT ? OFFSET ?"""  # noqa: S608  a condition of ours
    rows = explorer.database.all(query, (run.name, PAGE_SIZE, (form.page - 1) * PAGE_SIZE))
    counted = f"SELECT count(*) FROM runs.prediction p WHERE p.run = ? AND {ANSWERED}"  # noqa: S608
    total = explorer.database.number(counted, (run.name,))
    query = "SELECT id, correct FROM runs.decision WHERE run = ?"
    said = {row["id"]: bool(row["correct"]) for row in explorer.database.all(query, (run.name,))}
    shown = [
        {"row": row, "exact": exact(row["answer"], row["target"]), "said": said.get(row["id"]), **drawings.answer(row)}
        for row in rows
    ]
    pages = max(1, -(-total // PAGE_SIZE))
    return explorer.page(
        request, "judge.html.jinja", "Judge review", runs=runs, run=run, rows=shown, total=total, pages=pages,
        decided=len(said),
    )  # fmt: skip


async def save(request: Request) -> Response:
    """Append one decision: `run`, `id`, `decision` of a form.

    Raises InputError for an id that the run has no free-form answer for.
    """
    body = await request.body()
    if len(body) > MAX_BODY_BYTES:
        return PlainTextResponse("The request is too long.\n", 413)
    return await run_in_threadpool(_save, request, dict(parse_qsl(body.decode("utf-8", "replace"))))


def _save(request: Request, form: dict[str, str]) -> Response:
    values = {name: form.get(name, "") for name in ("run", "id", "decision", "page")}
    explorer = explorer_of(request)
    run = explorer.runs.load(values["run"])
    query = f"""SELECT p.*, s.problem FROM runs.prediction p
      LEFT JOIN rows.sample s ON s.id = p.id AND s.split = p.split WHERE p.run = ? AND p.id = ? AND {ANSWERED}"""  # noqa: S608
    row = explorer.database.one(query, (run.name, values["id"]))
    if row is None or values["decision"] not in CHOICES:
        what = f"no free-form answer {values['id']!r} to decide on, or no decision {values['decision']!r}"
        raise InputError(what, where=run.name, fix="Decide on the page of the judge review.")
    if row["problem"] is None:
        what = f"the question of {values['id']!r} is not known here"
        raise InputError(what, where=run.name, fix="Start with --atlas and the atlas of the run.")
    _decide(run.path / DECISIONS, _record(row, CHOICES[values["decision"]]))
    if request.headers.get("hx-request"):
        return explorer.page(request, "decided.html.jinja", "Saved", decision=values["decision"])
    query = urlencode({"run": run.name, "page": values["page"] or 1})
    return RedirectResponse(f"/judge?{query}", 303)


def _record(row: Any, correct: bool) -> dict[str, Any]:
    asked = {"question": row["problem"], "reference": row["target"], "answer": row["answer"]}
    return {"id": row["id"], "dataset": row["dataset"], **asked, "correct": correct}


def _decide(path: Path, decision: dict[str, Any]) -> None:
    with _DECIDING:
        kept = [record for record in whole_lines(path) if record.get("id") != decision["id"]]
        with atomic_write(path) as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in [*kept, decision])


# The predictions of a run, or of two beside each other, with filters that find the mistakes.


def predictions(request: Request) -> Response:
    """A page of predictions."""
    explorer, form = explorer_of(request), form_of(request)
    runs = explorer.runs.predicted()
    if not runs:
        return explorer.page(request, "predictions.html.jinja", "Predictions", runs=[], found=None)
    form = Form({**form.values, "a": form.text("a") or runs[0].name})
    for side in ("a", "b"):
        if form.text(side):
            explorer.runs.load(form.text(side))
    found = find_predictions(explorer.database, form)
    rows = [_shown(row, form) for row in found.rows]
    return explorer.page(
        request, "predictions.html.jinja", "Predictions", runs=runs, found=found, rows=rows, asked=form,
        values=_values(explorer, form), verdicts=list(VERDICTS), pairs=list(PAIRS),
    )  # fmt: skip


def _shown(row: Any, form: Form) -> dict[str, Any]:
    shown = {"row": row, "exact": exact(row["answer"], row["target"]), **drawings.answer(row)}
    shown["state"] = state_of(row["correct"], row["judged"], row["error"], row["invalid"])
    if form.text("b"):
        shown["b_state"] = state_of(row["b_correct"], row["b_judged"], row["b_error"], 0)
    return shown


def state_of(correct: int | None, judged: int | None, error: str | None, invalid: int) -> str:
    """One word for what became of a sample: right, wrong, invalid, error or unjudged."""
    if error:
        return "error"
    if invalid:
        return "invalid"
    verdict = judged if correct is None else correct
    return "unjudged" if verdict is None else "right" if verdict else "wrong"


def _values(explorer: Any, form: Form) -> dict[str, list[str]]:
    run = form.text("a")
    known: dict[str, list[str]] = {}
    for name in ("dataset", "task", "split", "target"):
        query = f"SELECT DISTINCT {name} FROM runs.prediction WHERE run = ? ORDER BY 1"  # noqa: S608  a name of ours
        condition = [run]
        if name == "target":
            query = "SELECT DISTINCT target FROM runs.prediction WHERE run = ? AND correct IS NOT NULL ORDER BY 1"
        known[name] = [row[0] for row in explorer.database.all(query, condition)]
    return known


def prediction(request: Request) -> Response:
    """From the id of a prediction to its sample's page."""
    explorer, form = explorer_of(request), form_of(request)
    query = "SELECT split, number FROM rows.sample WHERE split = ? AND id = ?"
    found = explorer.database.one(query, (form.text("split"), form.text("id")))
    if found is None:
        what = f"the atlas has no sample {form.text('id')!r} in split {form.text('split')!r}"
        raise InputError(what, fix="Open the atlas that the run was predicted on with --atlas.")
    return RedirectResponse(f"/sample/{found['split']}/{found['number']}")


# RL: what a run's reward and policy did, as in its report, and the rollouts of one prompt over the steps.


FILE = "rollouts.jsonl"
MAX_SHOWN = 200


def rl(request: Request) -> Response:
    """The figures of a run over its steps, and the rollouts of the chosen prompt."""
    explorer, form = explorer_of(request), form_of(request)
    runs = [run for run in explorer.runs.all() if run.has(FILE)]
    if not runs:
        return explorer.page(request, "rollouts.html.jinja", "RL", runs=[], run=None)
    run = explorer.runs.get(form.text("run") or runs[0].name)
    rollouts = list(whole_lines(run.path / FILE))
    prompts = sorted({str(each.get("id")) for each in rollouts})
    chosen = form.text("id") or (prompts[0] if prompts else "")
    shown = [each for each in rollouts if str(each.get("id")) == chosen][:MAX_SHOWN]
    return explorer.page(
        request, "rollouts.html.jinja", "RL", runs=runs, run=run, prompts=prompts, chosen=chosen, rollouts=shown,
        rl=rl_part(run.path),
    )  # fmt: skip


# The runs: a list, one run with its curves while it trains, and configs side by side.


SHOWN_FACTS = (
    *("command", "started_at", "hba_version", "git_commit", "python", "platform", "cpu", "cpu_cores", "gpus", "seed"),
)


def runs(request: Request) -> Response:
    """Every run with its command, its score and its age."""
    explorer = explorer_of(request)
    return explorer.page(request, "runs.html.jinja", "Runs", runs=[_summary(run) for run in explorer.runs.all()])


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


def run(request: Request) -> Response:
    """One run: curves, configuration, environment, and where to go from here."""
    explorer = explorer_of(request)
    shown = explorer.runs.get(form_of(request).text("run"))
    environment = shown.opened.environment or {}
    return explorer.page(
        request, "run.html.jinja", shown.name, run=shown, curves=_curves(shown),
        config=shown.opened.config,
        facts={name: environment[name] for name in SHOWN_FACTS if name in environment},
        packages=environment.get("packages", {}), data=environment.get("data", {}),
    )  # fmt: skip


def run_curves(request: Request) -> Response:
    """The curves of one run, for the page that asks again while the run goes on."""
    explorer = explorer_of(request)
    shown = explorer.runs.get(form_of(request).text("run"))
    return explorer.page(request, "curves_live.html.jinja", shown.name, run=shown, curves=_curves(shown))


def _curves(shown: RunEntry) -> Curves | None:
    events = []
    for record in whole_lines(shown.path / "log.jsonl"):
        kept = {k: v for k, v in record.items() if k in Event.__dataclass_fields__}
        events.append(msgspec.convert({"kind": "", **kept}, Event))
    if not events:
        return None
    return curves(events, shown.opened.metrics.tasks if shown.has("metrics.json") else {})


def side_by_side(request: Request) -> Response:
    """The configs of the chosen runs, one line a key, those that differ first."""
    explorer = explorer_of(request)
    names = request.query_params.getlist("run")
    chosen = [explorer.runs.get(name) for name in names]
    configs = [flat(read_yaml(run.path / "config.yaml")) if run.has("config.yaml") else {} for run in chosen]
    rows = []
    for key in sorted({key for config in configs for key in config}):
        values = [inline_yaml(config[key]) if key in config else "–" for config in configs]
        rows.append({"key": key, "values": values, "differs": len(set(values)) > 1})
    rows.sort(key=lambda row: (not row["differs"], row["key"]))
    return explorer.page(request, "side_by_side.html.jinja", "Side by side", runs=chosen, rows=rows)


# Scores with intervals, confusion matrices that open their samples, calibration, slices, and two runs compared.


def scores(request: Request) -> Response:
    """The metrics of a run."""
    explorer, form = explorer_of(request), form_of(request)
    runs = [run for run in explorer.runs.all() if run.has("metrics.json")]
    if not runs:
        return explorer.page(request, "scores.html.jinja", "Scores", runs=[], run=None)
    shown = explorer.runs.get(form.text("run") or runs[0].name)
    metrics = shown.opened.metrics
    shown_matrices = _matrices(shown.opened) if shown.has("predictions.jsonl") else []
    plot = reliability(metrics.calibration.all) if metrics.calibration else None
    bars = {key: bar(task, name=key) for key, task in metrics.tasks.items() if task.score is not None}
    return explorer.page(
        request, "scores.html.jinja", "Scores", runs=runs, run=shown, metrics=metrics, bars=bars,
        warnings=warnings(metrics, stale=shown.opened.stale), matrices=shown_matrices, reliability=plot, zip=zip,
        link=lambda **values: Form(values).link(),
    )  # fmt: skip


def _matrices(run: Run) -> list[Matrix]:
    """One matrix a dataset, so that a cell says which samples it means."""
    return [
        matrix
        for key in sorted({each.dataset for each in run.predictions})
        for domain in matrices([each for each in run.predictions if each.dataset == key], run.taxonomy)
        for matrix in [domain.pooled]
    ]


def compare(request: Request) -> Response:
    """Paired differences of run B to run A, and the samples that flipped."""
    from hba.evaluate.compare import compare_runs
    from hba.report.comparison import comparison

    explorer, form = explorer_of(request), form_of(request)
    runs = explorer.runs.predicted()
    if not (form.text("a") and form.text("b")):
        return explorer.page(request, "compare.html.jinja", "Compare", runs=runs, found=None)
    a, b = (explorer.runs.get(form.text(side)) for side in ("a", "b"))
    found = compare_runs(a.path, b.path, allow_other_data=form.text("other_data") == "1")
    return explorer.page(
        request, "compare.html.jinja", "Compare", runs=runs, found=found, table=comparison(found), a=a, b=b
    )


# A page as one file to share: its style inside, no script, no form, no player.
#
# The page is made anew with `live` off, and its links, which would lead nowhere, are taken out. Sounds and clips are
# not part of it: a table of scores may be shown to others, the recordings behind it often may not.


SHOWN = (*(path for path, _ in PAGES), "/run", "/runs/side-by-side")
_ADDRESS = re.compile(r'(<a\b[^>]*?)\shref="[^"]*"')  # values are escaped: no quote ends one early


def snapshot(request: Request) -> Response:
    """The page whose address stands in `of`, as a file. Raises InputError for an address that is none of the pages."""
    asked = urlsplit(form_of(request).text("of"))
    if asked.netloc or not (asked.path in SHOWN or asked.path.startswith("/sample/")):
        raise InputError(f"no page {asked.path!r} to share", where="of", fix="Use the link on a page.")
    scope = {**request.scope, "path": asked.path, "raw_path": asked.path.encode(), "query_string": asked.query.encode()}
    explorer_of(request)
    for route in request.app.routes:
        match, child = route.matches(scope)
        if match is Match.FULL:
            page = child["endpoint"](Request({**scope, **child, SHARED: True}))
            name = re.sub(r"\W+", "-", asked.path).strip("-")
            headers = {"content-disposition": f'attachment; filename="hba-{name}.html"'}
            return HTMLResponse(_ADDRESS.sub(r"\1", page.body.decode()), headers=headers)
    raise InputError(f"no page {asked.path!r} to share", where="of", fix="Use the link on a page.")
