"""Judge review: a person says of each verdict whether it is right; the file is what `hba judge --calibrate` reads.

human_verdicts.jsonl in the run folder holds one line an answer, with everything that a judge is shown, and is written
whole at each decision. A decision is about the answer, not about a judge, so that it serves to calibrate every judge.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response

from hba.errors import InputError
from hba.explorer import drawings
from hba.explorer.app import explorer_of, form_of
from hba.explorer.query import PAGE_SIZE
from hba.explorer.runs import DECISIONS, exact, whole_lines
from hba.storage import atomic_write

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
