"""Puts the parts of a report together and writes it as one HTML file.

The page loads nothing: style and charts are inline, media are data: URIs, there is no script, and a content security
policy forbids the rest. Every text from the run and the atlas is escaped by the template. The same run folder and
atlas give the same bytes: the page carries no time or path of its own making.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from hba.evaluate.leaderboard import not_comparable
from hba.evaluate.results import Metrics
from hba.evaluate.runs import PREDICTIONS, Run, open_run
from hba.report import words
from hba.report.charts import Reference, bar, curves, matrices, reliability
from hba.report.comparison import read_stages
from hba.report.html import environment, style
from hba.report.rl import RlPart, rl_page, rl_part
from hba.report.samples import Budget, choose, gather, judged_answers
from hba.storage import atomic_write
from hba.taxonomy import BUILTIN, Taxonomy, of_folder, published_table

MAX_QUARANTINE_ROWS = 200
PUBLISHED_TABLE = "hba_iclr2026"
PUBLISHED_SOURCE = "arXiv 2510.04899, multi-task table"
DATASET_FIGURES = (
    *("weighted_f1", "macro_f1", "micro_accuracy", "emotion_weighted_accuracy_mean"),
    *("ACC2", "F1w2", "ACC3", "ACC5", "ACC7", "F1w7", "exact_match", "llm_judge_accuracy"),
)
SECRETS = re.compile(r"(?im)^(\s*(?:[\w.-]*_)?(?:api_?key|secret|password|token)\s*:[ \t]*)(?!null\b|~)\S.*$")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The counts of the one-line verdict. `num_compared` tasks have score, interval and chance."""

    num_tasks: int
    num_scored: int
    num_compared: int
    num_above: int
    num_samples: int
    num_quarantined: int
    num_invalid: int
    num_failed: int


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


def write_report(
    run: Path, atlas_root: Path | None = None, out: Path | None = None, *, taxonomy: Taxonomy | None = None
) -> Path:
    """Write the report of the run folder `run` to `out` (default: report.html in it) and return its path.

    Prompts and media come from the atlas at `atlas_root`, by default from where the run says that its atlas lies.
    An RL run that has not been scored has a page of its training alone. Raises InputError for any other folder without
    metrics.json, for a malformed file (naming line and field), and for an `atlas_root` that is no atlas; StorageError
    when the disk is full. Nothing is written then.
    """
    taxonomy = taxonomy or of_folder(run)
    part = rl_part(run)
    if part is not None and not (run / "metrics.json").is_file():
        html = rl_page(run, part)
    else:
        html = render(open_run(run, taxonomy), atlas_root, taxonomy, rl=part)
    path = out if out is not None else run / "report.html"
    with atomic_write(path) as handle:
        handle.write(html)
    return path


def render(run: Run, atlas_root: Path | None = None, taxonomy: Taxonomy = BUILTIN, *, rl: RlPart | None = None) -> str:
    """The page of a run as text, with the RL part of its folder if it has one; see `write_report`."""
    predictions = run.predictions if run.has(PREDICTIONS) else None
    recorded = Path(run.atlas_path) if run.atlas_path else None
    samples = confused = None
    if predictions is not None:
        confused = matrices(predictions, taxonomy)
        root, required = (atlas_root, True) if atlas_root is not None else (recorded, False)
        samples = gather(choose(predictions, taxonomy), root, required=required, budget=Budget(), taxonomy=taxonomy)
    metrics = run.metrics
    published = None if run.synthetic is not False else published_results(metrics)
    return (
        environment()
        .get_template("page.html.jinja")
        .render(
            style=style("style.css"),
            run=run,
            metrics=metrics,
            verdict=verdict(run),
            warnings=words.warnings(metrics, stale=run.stale),
            bars=_bars(run, published),
            published=published,
            dataset_figures=[n for n in DATASET_FIGURES if any(n in d.figures for d in metrics.datasets.values())],
            confused=confused,
            reliability=reliability(metrics.calibration.all) if metrics.calibration else None,
            curves=curves(run.events, metrics.tasks) if run.events else None,
            samples=samples,
            stages=read_stages(run.folder),
            rl=rl,
            judged=judged_answers(predictions, run.judgements) if predictions and run.judgements else None,
            quarantine=(run.quarantine or ())[:MAX_QUARANTINE_ROWS],
            config=SECRETS.sub(r"\1(hidden)", run.config) if run.config is not None else None,
            environment_text=json.dumps(run.environment, indent=2, ensure_ascii=False, sort_keys=True),
            facts=facts(run),
        )
    )


def _bars(run: Run, published: Published | None) -> dict[str, Markup]:
    """The chart of every task with a score."""
    return {
        key: bar(task, name=f"{key} {task.title}", references=published.references(key) if published else ())
        for key, task in run.metrics.tasks.items()
        if task.score is not None
    }


def verdict(run: Run) -> Verdict:
    """The counts of the headline, from metrics.json; the quarantine file where metrics.json gives no count."""
    tasks, counts = run.metrics.tasks.values(), run.metrics.aggregate
    compared = [task.above_chance for task in tasks if task.above_chance is not None]
    return Verdict(
        num_tasks=len(tasks),
        num_scored=sum(task.score is not None for task in tasks),
        num_compared=len(compared),
        num_above=sum(compared),
        num_samples=counts.n or sum(task.n for task in tasks),
        num_quarantined=len(run.quarantine or ()) if counts.n_quarantined is None else counts.n_quarantined,
        num_invalid=sum(task.n_invalid or 0 for task in tasks) if counts.n_invalid is None else counts.n_invalid,
        num_failed=sum(task.n_failed or 0 for task in tasks) if counts.n_failed is None else counts.n_failed,
    )


def published_results(metrics: Metrics) -> Published:
    """The paper's figures for the tasks of `metrics`."""
    table = published_table(PUBLISHED_TABLE)
    columns = table["columns"]
    rows = {name: dict(zip(columns, row, strict=True)) for name, row in table.items() if name != "columns"}
    tasks = tuple(key for key in metrics.tasks if key in columns)
    return Published(source=PUBLISHED_SOURCE, tasks=tasks, rows=rows, apart=tuple(not_comparable(metrics, tasks)))


def facts(run: Run) -> list[tuple[str, str]]:
    """What made the run, as (name, value) pairs; what is not recorded is left out."""
    said, environment = run.metrics.provenance, run.environment or {}
    judge = said.judge or {}
    pairs = [
        ("Command", said.command or environment.get("command")),
        ("Model", said.model),
        ("Judge", judge.get("model")),
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
