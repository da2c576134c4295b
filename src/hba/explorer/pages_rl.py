"""RL: what a run's reward and policy did, as in its report, and the rollouts of one prompt over the steps."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from hba.explorer.app import explorer_of, form_of
from hba.explorer.runs import whole_lines
from hba.report.rl import rl_part

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
