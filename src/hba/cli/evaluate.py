"""`hba eval`, `hba score`, `hba report`, `hba compare`, `hba leaderboard`: numbers, pages and comparisons."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from hba.cli.options import (
    ALLOW_FAILED_HELP,
    ATLAS_HELP,
    MODEL_HELP,
    PREDICTED_HELP,
    SCORED_HELP,
    SLICES,
    AllowQuarantined,
    Backend,
    BaseUrl,
    JsonFlag,
    PerDataset,
    answer,
    beside,
    bold,
    configured,
    finish,
    flag,
    keys_such_as,
    number,
    served,
    takes,
    tallied,
    warn,
    written,
)
from hba.cli.predict import warn_of
from hba.errors import InputError, nearest
from hba.storage import plural, write_json

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hba.evaluate.config import Opening, PredictConfig, Setting, Suite
    from hba.evaluate.predict import PredictSummary, Selection
    from hba.evaluate.predictions import Tally
    from hba.evaluate.results import Metrics
    from hba.report.comparison import SuiteTables
    from hba.report.tables import Table

AGAINST = "vs"
EVAL_EXAMPLE = "Example: hba eval gpt-5-mini --backend openai --atlas runs/mini --judge gpt-5-nano"


def eval_command(
    model: Annotated[str, typer.Argument(help=f"{MODEL_HELP} Or a suite.yaml with several.")],
    overrides: Annotated[list[str] | None, keys_such_as("generation.max_tokens=64")] = None,
    atlas: Annotated[str | None, takes("ATLAS", ATLAS_HELP, default="required, or the suite's")] = None,
    split: Annotated[str, takes("SPLIT", f"Split to answer. {SLICES}")] = "test",
    backend: Backend = None,
    base_url: BaseUrl = None,
    judge: Annotated[str | None, takes("MODEL", "Model that judges free-form answers.", default="none")] = None,
    judge_url: Annotated[str | None, takes("URL", "Address of the judge's server.", default="OpenAI")] = None,
    run: Annotated[Path | None, takes("FOLDER", "Run folder to write.", default="runs/eval/MODEL")] = None,
    per_dataset: PerDataset = None,
    dry_run: Annotated[bool, flag("--dry-run", "Count rows, tokens and cost; ask nothing.")] = False,
    allow_failed: Annotated[int, number(ALLOW_FAILED_HELP)] = 0,
    allow_quarantined: AllowQuarantined = 0,
    json: JsonFlag = False,
) -> None:
    """Evaluate a model: predict, judge, score, report and rank in one command.

    Run it again to resume.
    """
    from hba.evaluate.config import Setting, Suite, read_suite

    several = Path(model).suffix in (".yaml", ".yml")
    if several:
        if backend or base_url or split != "test":
            fix = "Leave it out here, and write it into the suite, below the settings that need it."
            raise InputError("--backend, --base-url and --split are for one model", where="hba eval", fix=fix)
        suite = read_suite(Path(model))
        typed: dict[str, Any] = {"atlas": atlas, "judge": judge, "judge_url": judge_url, "per_dataset": per_dataset}
        suite = replace(suite, **{key: value for key, value in typed.items() if value})
        folder = run or Path(suite.run or Path("runs/eval") / Path(model).stem)
    else:
        if atlas is None:
            raise InputError("no atlas is named", where="hba eval", fix="Add --atlas FOLDER, or --atlas org/name.")
        settings = (Setting(name=model, model=model, backend=backend, overrides=tuple(served(base_url))),)
        about: dict[str, Any] = {"split": split, "per_dataset": per_dataset, "judge": judge, "judge_url": judge_url}
        suite = Suite(atlas=atlas, baseline=model, settings=settings, **about)
        folder = run or Path("runs/eval") / re.sub(r"[^\w.-]+", "-", model).strip("-.")
    folders = {each: folder / each.name if several else folder for each in suite.settings}
    parts = [_opened(suite, setting, place, overrides or []) for setting, place in folders.items()]
    ahead = _ahead(suite, parts)
    if dry_run:
        return answer({"run": str(folder), "ahead": ahead}, lambda: [_ahead_table(ahead)], as_json=json)
    if not several:
        beside(f"{_in_words(ahead[0], parts[0])}; everything goes into {folder}")
    elif not json:
        beside("\n".join([*map(_in_words, ahead, parts), f"Everything goes into {folder}."]))
    with tallied("eval") as show:
        progress = _Progress(sum(each["rows"] + each["judged"] for each in ahead), show)
        summaries = [_predicted(suite, part, each, progress) for part, each in zip(parts, ahead, strict=True)]
        judged = [_judged(suite, part, each, progress) for part, each in zip(parts, ahead, strict=True)]
    from hba.evaluate.leaderboard import DEFAULT_TABLES, build_leaderboard
    from hba.evaluate.score import score_run
    from hba.report.comparison import LeaderboardTables, write_leaderboard
    from hba.report.page import write_report

    metrics, pages, root = [], [], Path(suite.atlas)
    for part in parts:
        metrics.append(score_run(part.folder))
        pages.append(write_report(part.folder, atlas_root=root if root.is_dir() else None))
    names = {part.folder: part.setting.name for part in parts}
    board = build_leaderboard(list(names), tables=DEFAULT_TABLES, names=names, allow_other_data=several)
    write_leaderboard(board, folder / "leaderboard.html")
    differences = _differences(suite, parts, folder, metrics) if several else None

    def show_all() -> Iterator[RenderableType]:
        from hba.report.tables import metrics_table

        if differences is None:
            yield metrics_table(metrics[0])
            yield LeaderboardTables(board)
        else:
            yield differences[1]
        yield from written(*([folder / "suite.md"] if several else []), *pages, folder / "leaderboard.html")
        unjudged = any(task.note and "judge" in task.note for each in metrics for task in each.tasks.values())
        if suite.judge is None and unjudged:
            yield f"Free-form answers have no score yet: add {bold('--judge MODEL')}."

    values: dict[str, Any] = {"run": str(folder), "leaderboard": board.record(), "ahead": ahead}
    found = [
        {"run": str(part.folder), "report": str(page), "metrics": each.record(), "judged": verdicts}
        for part, page, each, verdicts in zip(parts, pages, metrics, judged, strict=True)
    ]
    if differences is None:
        values |= found[0]
    else:
        values |= {"settings": dict(zip(names.values(), found, strict=True)), "differences": differences[0]}
        write_json(folder / "suite.json", values)
    answer(values, show_all, as_json=json)
    failed = sum(each.tally.failed + each.tally.unanswered.total() for each in summaries)
    if failed > allow_failed:
        fix = "Run the same command again; `hba predict --retry-failed` also asks those that failed."
        said = plural(failed, "sample", "has no answer and counts as wrong|have no answer and count as wrong")
        beside(f"error: {said}. Fix: {fix}")
        raise typer.Exit(1)
    finish([record for each in summaries for record in each.quarantined], allow_quarantined)
    return None


class _Part(NamedTuple):
    """One model of an evaluation, in one way of asking it: where it goes, and the rows that it will answer."""

    setting: Setting
    folder: Path
    config: PredictConfig
    selection: Selection
    opening: Opening


def _opened(suite: Suite, setting: Setting, folder: Path, overrides: list[str]) -> _Part:
    """Raises what opening rows, config and model's name raise, before anything is asked."""
    from hba.evaluate.backends.interface import require_backend
    from hba.evaluate.config import PredictConfig
    from hba.evaluate.predict import Selection, open_rows

    require_backend(setting.model, setting.backend)
    config = configured(PredictConfig, None, [*setting.overrides, *overrides])
    selection = Selection(per_dataset=suite.per_dataset, channels=setting.modalities)
    how: dict[str, Any] = {"split": suite.split, "config": config, "backend": setting.backend, "selection": selection}
    opening = open_rows(setting.model, suite.atlas, **how)
    if len(opening.atlas) and not opening.atlas.answered.any():
        fix = "Give rows with an 'answer', or ask these with hba predict, which scores nothing."
        what = f"no row of split {suite.split!r} has an answer to compare with"
        raise InputError(what, where=suite.atlas, fix=fix)
    return _Part(setting, folder, config, selection, opening)


def _ahead(suite: Suite, parts: Sequence[_Part]) -> list[dict[str, Any]]:
    """What is left of each part: rows, tokens, dollars (None: unknown) and seconds (None: nothing is measured yet)."""
    from hba.evaluate.estimate import estimate

    found = []
    for part in parts:
        expected = estimate(part.opening, part.folder)
        about: dict[str, Any] = {"setting": part.setting.name, "rows": expected.rows, "left": expected.left}
        about |= {"tokens_in": expected.tokens_in, "tokens_out_at_most": expected.tokens_out_at_most}
        about |= {"measured": expected.measured}
        about |= {"cost_usd_at_most": expected.cost_usd_at_most, "seconds": expected.seconds, "judged": 0}
        if suite.judge is not None:
            from hba.evaluate.judge.run import JudgeConfig, estimate_judging, items_ahead

            judging = configured(JudgeConfig, None, served(suite.judge_url))
            items = items_ahead(part.opening.atlas, part.folder)
            verdicts = estimate_judging(items, part.folder, model=suite.judge, config=judging) if items else None
            if verdicts is not None:
                costs = (expected.cost_usd_at_most, verdicts.cost_usd_at_most)
                about["cost_usd_at_most"] = None if None in costs else sum(cost or 0.0 for cost in costs)
                about |= {"judged": verdicts.left, "tokens_in": expected.tokens_in + verdicts.tokens_in}
                about["tokens_out_at_most"] += verdicts.tokens_out_at_most
                about["measured"] &= verdicts.measured
        found.append(about)
    return found


def _in_words(ahead: dict[str, Any], part: _Part) -> str:
    cost, seconds, judged = ahead["cost_usd_at_most"], ahead["seconds"], ahead["judged"]
    price = ", cost unknown" if cost is None else f", ${cost:,.2f} at most" if cost else ""
    time = "" if not seconds else f", {_minutes(seconds)}"
    if seconds is None and ahead["left"] > Pace(at_once(part.opening), ahead["left"]).rows:
        time = ", time unknown until its first rows are answered"
    verdicts = f", {plural(judged, 'answer')} to judge" if judged else ""
    said = (ahead["tokens_in"], ahead["tokens_out_at_most"])
    bound = ", as the first rows took" if ahead["measured"] else " at most"
    tokens = f", {said[0]:,} tokens in and {said[1]:,} out{bound}" if ahead["left"] or judged else ""
    left = f"{ahead['left']:,} of {plural(ahead['rows'], 'row', 'is|are')} left to ask"
    return f"{ahead['setting']}: {left}{verdicts}{tokens}{price}{time}"


def _ahead_table(ahead: Sequence[dict[str, Any]]) -> Table:
    from hba.report.tables import Table

    rows = []
    for each in ahead:
        cost = "unknown" if each["cost_usd_at_most"] is None else f"${each['cost_usd_at_most']:,.2f}"
        time = "unknown" if each["seconds"] is None else f"{each['seconds'] / 60:,.1f} min"
        left = f"{each['left']:,} of {each['rows']:,}"
        tokens = (f"{each['tokens_in']:,}", f"{each['tokens_out_at_most']:,}")
        rows.append((each["setting"], left, f"{each['judged']:,}", *tokens, cost, time))
    head = ("name", "rows left", "to judge", "tokens in", "out at most", "cost at most", "time")
    return Table(title="Nothing was asked", head=head, rows=rows, tight=True)


MEASURED_ROWS = 8


def at_once(opening: Opening) -> int:
    """How many rows are answered together: requests of a service, rows of a batch."""
    from hba.evaluate.backends.interface import LOCAL
    from hba.remote.providers import PROVIDERS

    together = opening.config.batch_size if opening.backend in LOCAL else 1
    return opening.config.remote.max_concurrency if opening.backend in PROVIDERS else together


class Pace:
    """How long `left` rows take, by the first `rows` of them, twice as many as are answered together (`wave`).

    The first wave counts as it was: a service is asked more and more at once, a batch waits for the first kernels.
    The second says how the others will go.
    """

    def __init__(self, wave: int, left: int) -> None:
        self.rows, self._left = max(MEASURED_ROWS, 2 * wave), left
        self._before: float | None = None  # seconds until half of them were answered
        self._half = 0

    def seconds(self, answered: int, elapsed: float) -> float | None:
        """Of all rows, where `answered` took `elapsed` seconds; None before there are enough."""
        if self._before is None and 2 * answered >= self.rows:
            self._before, self._half = elapsed, answered
        if self._before is None or answered < max(self.rows, self._half + 1):
            return None
        return elapsed + (elapsed - self._before) / (answered - self._half) * (self._left - answered)


class _Progress:
    """What a whole evaluation has done, of all settings and of the judge, as one tally and one bar."""

    COUNTS = ("done", "failed", "invalid", "quarantined", "fresh", "tokens_in", "tokens_out")

    def __init__(self, total: int, show: Callable[[Tally, str], None]) -> None:
        from hba.evaluate.predictions import Tally

        self._whole, self._show = Tally(total=total), show

    def part(self, name: str, *, expected: int) -> Callable[[Tally], None]:
        """What to tell of a part, whose own tally begins at nothing; `expected` of it are in the total already."""
        whole, others = self._whole, self._whole.total - expected
        before = {count: getattr(whole, count) for count in self.COUNTS}
        kept = Counter(whole.unanswered), Counter(whole.finish)

        def told(tally: Tally) -> None:
            for count, value in before.items():
                setattr(whole, count, value + getattr(tally, count))
            whole.total = others + tally.total
            whole.meter = tally.meter
            whole.unanswered, whole.finish = kept[0] + tally.unanswered, kept[1] + tally.finish
            self._show(whole, name)

        return told


def _predicted(suite: Suite, part: _Part, ahead: dict[str, Any], progress: _Progress) -> PredictSummary:
    """Predict a part. Where no earlier record says how long it takes, its first rows do."""
    from hba.evaluate.predict import predict_run

    name = part.setting.name
    tell = progress.part(f"predict {name}", expected=ahead["rows"])
    began: float | None = None
    pace = Pace(at_once(part.opening), ahead["left"])

    def told(tally: Tally) -> None:
        nonlocal began
        began = monotonic() if began is None else began  # the model is loaded
        if ahead["seconds"] is None and (seconds := pace.seconds(tally.fresh, monotonic() - began)) is not None:
            ahead["seconds"] = seconds
            rows = plural(ahead["left"], "row")
            beside(f"{name}: {_minutes(seconds)} for {rows}, at the pace of the first {tally.fresh}")
        tell(tally)

    about: dict[str, Any] = {"atlas": suite.atlas, "split": suite.split, "config": part.config}
    about |= {"backend": part.setting.backend, "selection": part.selection}
    summary = predict_run(part.setting.model, part.folder, progress=told, **about)
    warn_of(summary, part.setting.model)
    return summary


def _minutes(seconds: float) -> str:
    return "less than a minute" if seconds < 45 else f"about {plural(max(1, round(seconds / 60)), 'minute')}"


def _differences(
    suite: Suite, parts: Sequence[_Part], folder: Path, metrics: Sequence[Metrics]
) -> tuple[dict[str, Any], SuiteTables]:
    """Every setting against the baseline, as records and as one table, which suite.md has, too."""
    from hba.evaluate.compare import compare_runs
    from hba.report.comparison import SuiteTables, suite_table
    from hba.report.tables import write_table

    names = [part.setting.name for part in parts]
    base, own = parts[names.index(suite.baseline)].folder, metrics[names.index(suite.baseline)]
    found = {
        part.setting.name: compare_runs(base, part.folder) for part in parts if part.setting.name != suite.baseline
    }
    table = suite_table(names, found, suite.baseline, own)
    write_table(table, folder / "suite.md")
    records = {name: each.record() for name, each in found.items()}
    for record in records.values():
        del record["flips"]
    return records, SuiteTables(table, suite.baseline)


def _judged(suite: Suite, part: _Part, ahead: dict[str, Any], progress: _Progress) -> dict[str, int] | None:
    """Counts of verdicts on the free-form answers of a run; None where nobody judges."""
    if suite.judge is None:
        return None
    from hba.evaluate.judge.run import JudgeConfig, judge_run
    from hba.storage import cache_folder

    given = [*served(suite.judge_url), f"remote.cache={cache_folder() / 'responses'}"]
    tell = progress.part(f"judge {part.setting.name}", expected=ahead["judged"])
    judged = judge_run(part.folder, model=suite.judge, config=configured(JudgeConfig, None, given), progress=tell)
    for text in judged.warnings:
        warn(text)
    if judged.unjudged:
        beside(f"warning: {plural(len(judged.unjudged), 'answer', 'has|have')} no verdict: bounds and no score.")
    return {"verdicts": len(judged.judgements), "unjudged": len(judged.unjudged)}


def score_command(
    run: Annotated[Path, typer.Argument(help=PREDICTED_HELP)],
    resamples: Annotated[int, number("Bootstrap resamples for the intervals.", least=100)] = 2000,
    seed: Annotated[int, takes("N", "Seed of the bootstrap.")] = 0,
    by: Annotated[
        list[str] | None, takes("FIELD", "Also score each value of this field of the rows. Repeat for more.")
    ] = None,
    cluster: Annotated[
        str, takes("FIELD", "Resample rows with the same value together: auto, none, or a field of the rows.")
    ] = "auto",
    atlas: Annotated[Path | None, takes("ATLAS", "Atlas that has these fields.", default="the run's own")] = None,
    partial: Annotated[bool, flag("--partial", "Accept rows without a prediction (else exit code 1).")] = False,
    published: Annotated[
        bool, flag("--published", "Score as the released code does, with its errors: docs/flaws.md.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Score predictions: the published metrics, 95% intervals and chance.

    Writes metrics.json. Next: hba report RUN.
    """
    from hba.evaluate.predictions import MERGE
    from hba.evaluate.score import score_run

    how: dict[str, Any] = {"resamples": resamples, "seed": seed, "published": published}
    metrics = score_run(run, **how, by=by or (), cluster=cluster, atlas=atlas)

    def show() -> list[Table]:
        from hba.report.tables import breakdown_tables, metrics_table, unmapped_table

        tables = (metrics_table(metrics), unmapped_table(metrics), *breakdown_tables(metrics))
        return [table for table in tables if table is not None]

    answer(metrics.record(), show, as_json=json)
    # Rows that were asked for and are missing are an error, unless that was allowed.
    if metrics.aggregate.other_rows:
        fix = "Predict into another folder with --run, or put back the predict.json of these predictions."
        what = "the predictions are of other rows than those that predict.json was written for"
        beside(f"{'warning' if partial else 'error'}: {what}. Fix: {fix}")
        if not partial:
            raise typer.Exit(1)
    if not metrics.aggregate.n_missing:
        return None
    folder = run if run.is_dir() else run.parent
    shards = sorted(path.parent.name for path in folder.glob("shards/*/predictions.jsonl"))
    part = f"only {metrics.aggregate.rows} have a prediction, and these are the scores of a part"
    unmerged = f"; predictions of shards are not merged ({', '.join(shards[:8])})" if shards else ""
    fix = MERGE if shards else "Run the same `hba predict` command again: it answers the rest."
    if partial:
        return beside(f"warning: {part}{unmerged}.")
    beside(f"error: {part}{unmerged}. Fix: {fix} Or accept a part with --partial.")
    raise typer.Exit(1)


def report_command(
    run: Annotated[Path, typer.Argument(help=SCORED_HELP)],
    atlas: Annotated[Path | None, takes("ATLAS", "Atlas folder whose samples play in the page.")] = None,
    out: Annotated[Path | None, takes("FILE", "File to write.", default="RUN/report.html")] = None,
    json: JsonFlag = False,
) -> None:
    """Write one HTML page of a run: scores, mistakes, curves and samples."""
    from hba.report.page import write_report

    page = write_report(run, atlas_root=atlas, out=out)
    answer({"report": str(page)}, lambda: written(page), as_json=json)


def bundle_command(
    run: Annotated[Path, typer.Argument(help=SCORED_HELP)],
    out: Annotated[Path | None, typer.Argument(help="File to write.", show_default="RUN.zip")] = None,
    atlas: Annotated[str | None, takes("ATLAS", "Atlas that has the prompts.", default="the run's own")] = None,
    prompts: Annotated[bool, typer.Option(help="Pack the prompts, with the transcripts in them.")] = True,
    json: JsonFlag = False,
) -> None:
    """Pack a scored run into one file with which others can check its numbers.

    In it: predictions, metrics, the judge's verdicts, records, prompts and hashes. Next: hba verify RUN.zip.
    """
    from hba.evaluate.bundle import pack

    place = out or run.resolve().with_name(f"{run.resolve().name}.zip")
    notes = pack(run, place, atlas=atlas, prompts=prompts)
    for note in notes:
        warn(note)
    answer({"bundle": str(place), "notes": notes}, lambda: written(place), as_json=json)


def verify_command(
    bundle: Annotated[Path, typer.Argument(help="File that hba bundle wrote.")],
    atlas: Annotated[str | None, takes("ATLAS", "Also compare the rows with this atlas.")] = None,
    json: JsonFlag = False,
) -> None:
    """Score a bundle again and compare with the numbers in it.

    Exit code 0: the numbers follow. 1: they do not. 2: the file is no bundle, or is unsafe to open.
    """
    from dataclasses import asdict

    from hba.evaluate.bundle import verify

    found = verify(bundle, atlas=atlas)
    for note in found.notes:
        warn(note)
    said = f"{bold(bundle)} ({found.run}): the numbers follow ({', '.join(found.checked)})."
    answer(asdict(found), said if found.differs is None else "", as_json=json) if json or not found.differs else None
    if found.differs is not None:
        beside(f"error: {bundle}: the numbers do not follow. {found.differs}")
        raise typer.Exit(1)


def compare_command(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUNS... [vs RUNS...]",
            help="Run folders with predictions: A B, or several seeds of A vs several of B.",
        ),
    ],
    seeds: Annotated[
        bool, flag("--seeds", "The runs are one model with several seeds or prompts: show their spread.")
    ] = False,
    allow_other_data: Annotated[
        bool, flag("--allow-other-data", "Compare the rows that both have, of runs on different data.")
    ] = False,
    out: Annotated[list[Path] | None, takes("FILE", "File to write: .md or .tex. Repeat for more.")] = None,
    flips: Annotated[int, number("Print N of the rows that became right or wrong.")] = 0,
    resamples: Annotated[int, number("Bootstrap resamples for the intervals.", least=100)] = 2000,
    seed: Annotated[int, takes("N", "Seed of the bootstrap.")] = 0,
    json: JsonFlag = False,
) -> None:
    """Tell whether run B is better than run A on the same rows.

    A B compares two runs, A1 A2 vs B1 B2 several seeds of each; --seeds shows the spread of one model's runs.
    """
    from hba.evaluate.compare import Comparison, compare_runs, compare_seeds, run_variance
    from hba.report.comparison import comparison, flips_table, seed_comparison, variance
    from hba.report.tables import WRITERS, write_table, writer_of

    for path in out or ():
        writer_of(path, WRITERS)  # refused before minutes of resampling
    how: dict[str, Any] = {"allow_other_data": allow_other_data, "resamples": resamples, "seed": seed}
    a, b = _sides(runs)
    found: Any
    table_of: Callable[[Any], Table]
    if b is not None and (len(a) > 1 or len(b) > 1):
        found, table_of = compare_seeds(a, b, **how), seed_comparison
    elif seeds:
        found, table_of = run_variance(runs, **how), variance
    elif len(a) + len(b or ()) == 2:
        found, table_of = compare_runs(*a, *(b or ()), **how), comparison
    else:
        fix = "Write hba compare A B, or hba compare A1 A2 vs B1 B2; or add --seeds if all are one model."
        raise InputError(f"{plural(len(runs), 'run')} to compare, expected 2", fix=fix)
    table = table_of(found)
    for path in out or ():
        write_table(table, path)

    def show() -> Iterator[RenderableType]:
        yield table
        if flips and isinstance(found, Comparison):
            yield flips_table(found, flips)
        yield from written(*(out or ()))

    answer(found.record(), show, as_json=json)


def _sides(runs: list[Path]) -> tuple[list[Path], list[Path] | None]:
    """The runs before and behind `vs`; None without it. Raises InputError for a side without a run."""
    marks = [number for number, run in enumerate(runs) if str(run) == AGAINST]
    if not marks:
        return runs, None
    a, b = runs[: marks[0]], runs[marks[0] + 1 :]
    if len(marks) > 1 or not a or not b:
        fix = "Write hba compare A1 A2 vs B1 B2, and ./vs for a folder of that name."
        raise InputError("`vs` stands between the runs of A and those of B", where="RUNS", fix=fix)
    return a, b


def leaderboard_command(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUNS...", help="Scored run folders. With --site: bundles, or folders of them."),
    ],
    out: Annotated[
        list[Path] | None, takes("FILE", "File to write: .html, .md, .tex or .csv. Repeat for more.")
    ] = None,
    published: Annotated[list[str] | None, takes("TABLE", "Published table to show, or none. Repeat for more.")] = None,
    tasks: Annotated[str, takes("TASKS", "Tasks to rank by, such as EMO,SEN.", default="those of every run")] = "",
    name: Annotated[
        list[str] | None, takes("RUN=NAME", "Name of a run in the table; NAME alone for a single run. Repeat for more.")
    ] = None,
    max_quarantined: Annotated[float, number("Rank a run only if it left out at most this share.", most=1)] = 0.01,
    allow_other_data: Annotated[bool, flag("--allow-other-data", "Also rank runs on different data, marked.")] = False,
    site: Annotated[Path | None, takes("FOLDER", "Write a static site of bundles into this folder.")] = None,
    json: JsonFlag = False,
) -> None:
    """Rank scored runs by task and by mean rank, beside the published results."""
    from hba.evaluate.leaderboard import DEFAULT_TABLES, build_leaderboard

    if site is not None:
        chosen = {"tables": published, "tasks": tasks, "name": name, "out": out}
        if any(chosen.values()):
            fix = "Leave --out, --published, --tasks and --name out."
            raise InputError("a site shows all that the bundles say", where="--site", fix=fix)
        return _site(runs, site, json=json, max_quarantined=max_quarantined)
    tables = DEFAULT_TABLES if published is None else [table for table in published if table != "none"]
    board = build_leaderboard(
        runs,
        tables=tables,
        tasks=[key.strip() for key in tasks.split(",") if key.strip()],
        names=_names(runs, name or []),
        allow_other_data=allow_other_data,
        max_quarantined=max_quarantined,
    )
    from hba.report.comparison import LeaderboardTables, write_leaderboard

    for path in out or ():
        write_leaderboard(board, path)
    for skipped in board.skipped:
        warn(f"skipped {skipped}")
    return answer(board.record(), lambda: [LeaderboardTables(board), *written(*(out or ()))], as_json=json)


def _site(places: list[Path], site: Path, *, json: bool, max_quarantined: float) -> None:
    """Write the site of bundles; those whose numbers do not follow are named, and stand in no page. Exit 1 for them."""
    from hba.evaluate.bundle import pages_of
    from hba.report.comparison import write_site
    from hba.report.page import render

    bundles = [path for place in places for path in (sorted(place.glob("*.zip")) if place.is_dir() else [place])]
    if not bundles:
        raise InputError("no bundles here", where=str(places[0]), fix="Give files that `hba bundle` wrote.")
    if site.exists() and (not site.is_dir() or any(site.iterdir())):
        raise InputError("is not empty", where=str(site), fix="Choose another folder, or remove it.")
    with pages_of(bundles) as found:
        board = write_site(found, site, render, max_quarantined=max_quarantined)
    for refused in found.refused:
        beside(f"error: {refused}")
    answer(board.record() | {"site": str(site)}, lambda: written(site / "index.html"), as_json=json)
    if found.refused:
        raise typer.Exit(1)


def _names(runs: list[Path], given: list[str]) -> dict[Path, str]:
    """What runs are called by --name. Raises InputError for a run that is not there."""
    found, known = {}, {run.name: run for run in runs} | {str(run): run for run in runs}
    for text in given:
        mine = [key for key in known if text.startswith(f"{key}=")]
        key = max(mine, key=len) if mine else str(runs[0]) if len(runs) == 1 and "=" not in text else None
        shown = text.removeprefix(f"{key}=")
        if key is None or not shown:
            fix = f"Write RUN=NAME, such as --name {runs[0]}=Ours. {nearest(text.partition('=')[0], known)}"
            raise InputError("names no run", where=f"--name {text}", fix=fix)
        found[known[key]] = shown
    return found
