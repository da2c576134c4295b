"""The RL part of a report: what reward, policy and advantages did, by task and dataset, and what came of it.

Evaluations before and after are compared prompt by prompt: the mean difference with a bootstrap interval over the
prompts, for sampled responses (a prompt's value is the mean over all of them) and for greedy ones, whatever it is.
Curves are those of log.jsonl; the table of rollouts is the last one of rollouts.jsonl.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hba.evaluate.statistics import mean_interval
from hba.report import words
from hba.report.charts import Chart, Points, Series, line_chart, nice_axis
from hba.report.tables import Table
from hba.storage import read_jsonl

RESAMPLES = 10_000
MAX_ROLLOUTS = 40
NAMES = {
    "score": "reward",
    "standard_score": "exact answers",
    "format_score": "format",
    "similarity_score": "similarity",
    "overlong_score": "length penalty",
    "abs_advantage": "mean |advantage|",
    "entropy": "entropy, nats a token",
    "kl": "KL from the start, nats a token",
    "sampler_gap": "sampler gap: |sampler - update|, nats a token",
    "importance": "importance weight of the sampling, mean",
    "clipped": "share of clipped tokens",
    "tokens": "tokens a response",
    "silent_groups": "share of groups without signal",
    "dropped_groups": "groups dropped for want of signal",
    "top_answer": "share of the most frequent answer",
    "signal": "HARPO signal of the task",
    "task_factor": "HARPO task factor",
    "sample_factor": "HARPO sample factor, mean",
    "grad_norm": "gradient norm",
}
COUNTS = ("rollouts", "samples_seen", "step", "loss", "learning_rate", "rollout_seconds", "update_seconds")


@dataclass(frozen=True, kw_only=True)
class Change:
    """A figure of the evaluations, before and after; `low` and `high` are the 95 % interval of the difference.

    The value of each of the `n` prompts is a mean over `draws` responses to it.
    """

    name: str
    before: float
    after: float
    difference: float
    low: float
    high: float
    n: int
    draws: int


@dataclass(frozen=True, kw_only=True)
class RlPart:
    """Everything that the template shows."""

    algorithm: str
    steps: int
    changes: tuple[Change, ...]
    chance: float | None  # of right answers on the held-out prompts, None for runs of before it was written
    charts: tuple[Chart, ...]
    tasks: Mapping[str, Sequence[Chart]]  # by quantity, one small chart a task
    datasets: Mapping[str, Sequence[Chart]]
    warnings: tuple[str, ...]
    rollouts: tuple[Mapping[str, Any], ...]


def rl_part(run: Path) -> RlPart | None:
    """The RL part of the run folder `run`, None when it holds no RL run. Raises InputError for a malformed file."""
    log = run / "log.jsonl"
    records = [line.record for line in read_jsonl(log)] if log.is_file() else []
    steps = list({r["step"]: r for r in records if r.get("kind") == "rl"}.values())
    if not steps:
        return None
    evaluations = {r["step"]: r["figures"] for r in records if r.get("kind") == "evaluation"}
    return RlPart(
        algorithm=str(_config(run).get("algorithm", "")),
        steps=int(steps[-1]["step"]),
        changes=tuple(changes(run)),
        chance=evaluations[max(evaluations)].get("chance") if evaluations else None,
        charts=(*_evaluation_charts(evaluations), *_overall(steps)),
        tasks=_by(steps, "tasks"),
        datasets=_by(steps, "datasets"),
        warnings=tuple(f"step {r['step']}: {r['message']}" for r in records if r.get("kind") == "warning"),
        rollouts=_rollouts(run / "rollouts.jsonl"),
    )


def rl_page(run: Path, part: RlPart) -> str:
    """The page of an RL run that has not been scored."""
    return words.page("rl_page.html.jinja", name=run.resolve().name, rl=part)


def changes(run: Path) -> list[Change]:
    """The first and the last evaluation of a run, compared prompt by prompt."""
    from hba.rl.evaluation_log import WAYS, read_evaluations

    by_step, sampled = read_evaluations(run), int(_config(run).get("validation_draws", 1))
    if len(by_step) < 2:
        return []
    first, last = (by_step[step] for step in (min(by_step), max(by_step)))
    after = {record["id"]: record for record in last}
    pairs = [(record, after[record["id"]]) for record in first if record["id"] in after]
    found = []
    for way in WAYS:
        for name, part in (("reward", "score"), ("format", "format"), ("right answers", "right"), ("tokens", "tokens")):
            values = np.array([[one[way][part], other[way][part]] for one, other in pairs], np.float64)
            difference_N = values[:, 1] - values[:, 0]
            only = float(difference_N.mean())  # of a single prompt, which has no interval
            low, high = mean_interval(difference_N, resamples=RESAMPLES) or (only, only)
            found.append(
                Change(
                    name=f"{name}, {way}",
                    before=float(values[:, 0].mean()),
                    after=float(values[:, 1].mean()),
                    difference=only,
                    low=low,
                    high=high,
                    n=len(difference_N),
                    draws=sampled if way == "sampled" else 1,
                )
            )
    return found


def changes_table(found: Mapping[str, Sequence[Change]]) -> Table:
    """What each algorithm changed on held-out prompts."""
    draws = max((row.draws for rows in found.values() for row in rows), default=1)
    said = [f"Sampled: the mean of {draws} responses to each prompt."] if draws > 1 else []
    rows = [
        (algorithm, row.name, f"{row.before:.3f}", f"{row.after:.3f}", f"{row.difference:+.3f}",
         f"{row.low:+.3f} to {row.high:+.3f}")
        for algorithm, changed in found.items()
        for row in changed
    ]  # fmt: skip
    head = ("algorithm", "figure", "start", "end", "difference", "95 % interval")
    title = "RL: held-out prompts before and after"
    return Table(title=title, head=head, rows=rows, warnings=said, align="llr")


def _config(run: Path) -> Mapping[str, Any]:
    from hba.config import read_yaml

    config = run / "config.yaml"
    return read_yaml(config) if config.is_file() else {}


def _evaluation_charts(evaluations: Mapping[int, Mapping[str, float]]) -> list[Chart]:
    steps = sorted(evaluations.items())
    charts = []
    for name in ("reward", "format", "right") if len(evaluations) > 1 else ():
        series = [
            Series("sampled", [(float(step), figures[f"sampled_{name}"]) for step, figures in steps], "marked"),
            Series("greedy", [(float(step), figures[f"greedy_{name}"]) for step, figures in steps], "chance"),
        ]
        chances = [(float(step), figures["chance"]) for step, figures in steps if "chance" in figures]
        if name == "right" and chances:
            series.append(Series("chance", chances, "faint"))
        charts.append(_chart(f"Held-out {name}", series))
    return charts


def _overall(steps: Sequence[Mapping[str, Any]]) -> list[Chart]:
    return [_chart(NAMES.get(n, n), [Series(n, _points(steps, n))]) for n in _quantities(steps)]


def _by(steps: Sequence[Mapping[str, Any]], kind: str) -> dict[str, list[Chart]]:
    """Of each quantity a small chart a task or dataset."""
    keys = sorted({key for step in steps for key in step[kind]})
    parts = {key: [{"step": s["step"], **s[kind][key]} for s in steps if key in s[kind]] for key in keys}
    names = dict.fromkeys(name for part in parts.values() for name in _quantities(part))
    return {
        NAMES.get(name, name): [
            _chart(key, [Series(name, points)], small=True) for key in keys if (points := _points(parts[key], name))
        ]
        for name in names
    }


def _quantities(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    present = {name for step in steps for name, value in step.items() if isinstance(value, float)} - set(COUNTS)
    if not any(step.get("dropped_groups") for step in steps):
        present.discard("dropped_groups")  # of dapo alone
    order = list(NAMES)
    return sorted(present, key=lambda name: (order.index(name) if name in order else len(order), name))


def _points(steps: Sequence[Mapping[str, Any]], name: str) -> Points:
    return [(float(step["step"]), float(step[name])) for step in steps if isinstance(step.get(name), (int, float))]


def _chart(title: str, series: Sequence[Series], *, small: bool = False) -> Chart:
    values = [y for line in series for _, y in line.points]
    last = max(int(x) for line in series for x, _ in line.points)
    axis = nice_axis(min(0.0, *values), max(*values, 1e-3), count=2 if small else 4)
    note = f"{series[0].points[-1][1]:.3g}" if len(series) == 1 else ""
    return line_chart(title, series, axis, last_step=last, label="over steps", small=small, note=note)


def _rollouts(path: Path) -> tuple[Mapping[str, Any], ...]:
    records = [line.record for line in read_jsonl(path)] if path.is_file() else []
    last = max((record["step"] for record in records), default=0)
    return tuple(record for record in records if record["step"] == last)[:MAX_ROLLOUTS]
