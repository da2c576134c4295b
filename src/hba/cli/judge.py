"""`hba judge`: verdicts of a language model on free-form answers, and how far they can be trusted."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hba.cli.options import BaseUrl, JsonFlag, answer, bold, say, served, warn
from hba.errors import InputError

if TYPE_CHECKING:
    from hba.evaluate.judge.items import Item
    from hba.evaluate.judge.run import JudgeConfig, Judged

JUDGE_EXAMPLE = "Example: hba judge runs/mine --model gpt-5-nano"
CANARIES = "canaries"


def judge_command(
    run: Annotated[Path | None, typer.Argument(help="Run folder with predictions.jsonl.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Config values, such as remote.max_concurrency=64.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model that judges.")] = None,
    backend: Annotated[
        str, typer.Option("--backend", "--provider", help="API: openai (any compatible server), anthropic or google.")
    ] = "openai",
    base_url: BaseUrl = None,
    atlas: Annotated[str | None, typer.Option(help="Atlas with the questions; the predicted one by default.")] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(help="Labelled items or judgements to compare with; 'canaries' for the bundled injections."),
    ] = None,
    offline: Annotated[bool, typer.Option(help="Embedding similarity without a judge; not comparable.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for the results; RUN by default.")] = None,
    retry_unjudged: Annotated[bool, typer.Option(help="Ask again for answers recorded as unjudged.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count requests, tokens and cost, and stop.")] = False,
    allow_unjudged: Annotated[int, typer.Option(min=0, help="Exit 0 although so many answers have no verdict.")] = 0,
    cache: Annotated[bool, typer.Option(help="Keep replies in the user's cache and take them from there.")] = True,
    json: JsonFlag = False,
) -> None:
    """Judge the free-form answers of a run with a language model; resumes where it stopped.

    Keys come from the environment (OPENAI_API_KEY, ANTHROPIC_API_KEY; for another server the variable that
    remote.api_key_env names).
    """
    if run is not None and "=" in str(run):  # an override that came first, as there is no RUN
        run, overrides = None, [str(run), *(overrides or [])]
    if dry_run and (offline or (calibrate is not None and run is not None)):
        raise InputError("no model would be asked, so that there is nothing to count", where="--dry-run")
    if offline:
        return _offline(_required(run, "RUN"), out, json)
    if calibrate is not None and run is not None:
        return _compare(run, calibrate, json)
    settings = _settings(overrides or [], backend, base_url, cache)
    asked = _required(model, "--model")
    if dry_run:
        items, folder = _items(run, atlas, calibrate), out or _required(run, "--out")
        return _estimate(items, folder, asked, settings, retry_unjudged, json)
    if calibrate is not None:
        return _calibrate(calibrate, asked, settings, _required(out, "--out"), json)
    return _judge(_required(run, "RUN"), asked, settings, atlas, out, retry_unjudged, allow_unjudged, json)


def _required(value: Any, name: str) -> Any:
    if value is None:
        raise InputError("is missing", where=name, fix=JUDGE_EXAMPLE)
    return value


def _settings(overrides: list[str], backend: str, base_url: str | None, cache: bool) -> JudgeConfig:
    from hba.config import load_config
    from hba.evaluate.judge.run import JudgeConfig
    from hba.remote.providers import provider
    from hba.storage import cache_folder

    given = [f"remote.provider={provider(backend).name}", *served(base_url)]
    given += [f"remote.cache={cache_folder() / 'responses'}"] if cache else []
    return load_config(JudgeConfig, None, [*given, *overrides])


def _items(run: Path | None, atlas: str | None, calibrate: Path | None) -> Sequence[Item]:
    """What a call would judge: labelled items, or the answers of a run."""
    from hba.evaluate.judge.run import items_of

    return items_of(_required(run, "RUN"), atlas) if calibrate is None else _labelled_items(calibrate)


def _estimate(
    items: Sequence[Item], folder: Path, model: str, settings: JudgeConfig, retry_unjudged: bool, json: bool
) -> None:
    from hba.cli.predict import show_estimate
    from hba.evaluate.judge.run import estimate_judging

    expected = estimate_judging(items, folder, model=model, config=settings, retry_unjudged=retry_unjudged)
    show_estimate(expected, "judge", as_json=json)


def _judge(
    run: Path,
    model: str,
    settings: JudgeConfig,
    atlas: str | None,
    out: Path | None,
    retry_unjudged: bool,
    allow_unjudged: int,
    json: bool,
) -> None:
    from hba.cli.options import tallied
    from hba.evaluate.judge.run import judge_run

    with tallied("judge") as progress:
        judged = judge_run(
            run, model=model, config=settings, progress=progress, atlas=atlas, out=out, retry_unjudged=retry_unjudged
        )
    result = {"judgements": str((out or run) / "judgements.jsonl"), **_summary(judged)}
    answer(result, as_json=json, show=lambda: _show(result))
    _finish(judged, allow_unjudged)


def _summary(judged: Judged) -> dict[str, Any]:
    """Counts over the whole run and per dataset; `usage` is of this call alone."""
    datasets: dict[str, dict[str, int]] = {}
    for judgement in judged.judgements:
        entry = datasets.setdefault(judgement.dataset, {"n": 0, "n_correct": 0, "n_unjudged": 0})
        entry["n"] += 1
        entry["n_correct"] += judgement.correct is True
        entry["n_unjudged"] += judgement.correct is None
    counts = {"n": len(judged.judgements), "n_unjudged": len(judged.unjudged), "n_unanswered": len(judged.unanswered)}
    return counts | {"datasets": datasets, "usage": judged.usage}


def _show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("dataset", "judged correct", "of", "unjudged", title="Judgements")
    for key, entry in result["datasets"].items():
        judged = entry["n"] - entry["n_unjudged"]
        table.add_row(key, str(entry["n_correct"]), str(judged), str(entry["n_unjudged"]))
    Console().print(table)
    usage = result["usage"]
    cost = "unknown (no price for this model)" if usage["cost_usd"] is None else f"${usage['cost_usd']:.4f}"
    say(f"{usage['requests']} requests, {usage['cached']} replies from the cache, cost {cost}.")
    say(f"Verdicts are in {bold(result['judgements'])}; `hba score` uses them.")


def _finish(judged: Judged, allowed: int) -> None:
    for text in judged.warnings:
        warn(text)
    for judgement in judged.unjudged[:20]:
        sys.stderr.write(f"unjudged {judgement.id}: {judgement.error}\n")
    if len(judged.unjudged) > allowed:
        fix = "Ask again with --retry-unjudged; until then their datasets have bounds and no score."
        fix = "Run the same command again: it asks those without a reply." if judged.unanswered else fix
        sys.stderr.write(f"error: {len(judged.unjudged)} answers have no verdict; all others do. Fix: {fix}\n")
        raise typer.Exit(1)


def _labels_path(calibrate: Path) -> Path:
    from hba.evaluate.judge import agreement

    return agreement.CANARIES if str(calibrate) == CANARIES and not calibrate.exists() else calibrate


def _labelled_items(calibrate: Path) -> Sequence[Item]:
    from hba.evaluate.judge.agreement import read_items

    path = _labels_path(calibrate)
    items = read_items(path)
    if items is None:
        fix = "Give dataset, question, reference and answer for each item, or a RUN whose judgements are compared."
        raise InputError("the file has labels without items", where=str(path), fix=fix)
    return items


def _calibrate(calibrate: Path, model: str, settings: JudgeConfig, out: Path, json: bool) -> None:
    """Ask the judge about labelled items, then compare."""
    from hba.cli.options import tallied
    from hba.evaluate.judge.agreement import agreement, read_labels
    from hba.evaluate.judge.run import judge_items
    from hba.storage import write_json

    items = _labelled_items(calibrate)
    labels = read_labels(_labels_path(calibrate))
    with tallied("judge") as progress:
        judged = judge_items(items, out, model=model, config=settings, progress=progress)
    found = agreement({j.id: j.correct for j in judged.judgements}, labels)
    result = {"labels": str(calibrate), "model": model, **found, "usage": judged.usage}
    write_json(out / "calibration.json", result)
    answer(result, as_json=json, show=lambda: _show_agreement(result))
    one_sided = len(set(labels.values())) == 1  # labels of which all are equal want equal verdicts
    for text in judged.warnings:
        if not (one_sided and text.startswith("all ")):
            warn(text)
    if not result["n"]:
        last = next((j.error for j in judged.unjudged), "no label")
        sys.stderr.write(f"error: not one verdict to compare ({last}). Fix: Ask another judge, or see `replies`.\n")
        raise typer.Exit(1)


def _compare(run: Path, calibrate: Path, json: bool) -> None:
    """Compare judgements that are there with labels, or with another judge's; asks nobody."""
    from hba.evaluate.judge.agreement import agreement, read_labels

    own = run / "judgements.jsonl" if run.is_dir() else run
    result = {"labels": str(calibrate), **agreement(read_labels(own), read_labels(calibrate))}
    answer(result, as_json=json, show=lambda: _show_agreement(result))


def _show_agreement(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "value", "95% interval", title="Agreement")
    for name in ("accuracy", "kappa"):
        value, interval = result[name], result[f"{name}_ci95"]
        shown = "undefined" if value is None else f"{value:.3f}"
        table.add_row(name, shown, "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}")
    for name in ("n", "n_unjudged", "true_positive", "false_positive", "false_negative", "true_negative"):
        table.add_row(name, str(result[name]), "")
    Console().print(table)


def _offline(run: Path, out: Path | None, json: bool) -> None:
    from hba.evaluate.judge.agreement import METRIC, SIMILARITY_FILE, judge_offline

    result = judge_offline(run, out=out)

    def show() -> None:
        from rich.console import Console
        from rich.table import Table

        table = Table("dataset", "embedding similarity", "95% interval", "n", title=f"Offline: {result['note']}")
        for key, entry in result["datasets"].items():
            reach = "" if entry["ci95"] is None else "{:.3f} to {:.3f}".format(*entry["ci95"])
            table.add_row(key, f"{entry[METRIC]:.3f}", reach, str(entry["n"]))
        Console().print(table)
        say(f"Wrote {bold((out or run) / SIMILARITY_FILE)}.")

    answer({key: value for key, value in result.items() if key != "rows"}, as_json=json, show=show)
