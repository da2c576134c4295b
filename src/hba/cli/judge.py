"""`hba judge`: verdicts of a language model on free-form answers, and how far they can be trusted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hba.cli.options import (
    PREDICTED_HELP,
    BaseUrl,
    JsonFlag,
    answer,
    beside,
    bold,
    configured,
    flag,
    keys_such_as,
    number,
    served,
    takes,
    tallied,
    warn,
)
from hba.cli.predict import show_estimate
from hba.errors import InputError
from hba.storage import cache_folder, plural, write_json

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hba.evaluate.judge.items import Item
    from hba.evaluate.judge.run import JudgeConfig, Judged

JUDGE_EXAMPLE = "Example: hba judge runs/mine --model gpt-5-nano"
CANARIES = "canaries"


def judge_command(
    run: Annotated[Path | None, typer.Argument(help=PREDICTED_HELP)] = None,
    overrides: Annotated[list[str] | None, keys_such_as("remote.max_concurrency=64")] = None,
    model: Annotated[str | None, takes("MODEL", "The model that judges.")] = None,
    backend: Annotated[
        str,
        takes(
            "NAME", "How to ask it: openai (or any compatible server), anthropic or google.", "--backend", "--provider"
        ),
    ] = "openai",
    base_url: BaseUrl = None,
    atlas: Annotated[str | None, takes("ATLAS", "Atlas that has the questions.", default="the run's own")] = None,
    calibrate: Annotated[
        Path | None, takes("FILE", "Compare the judge with these labels or judgements, or test it with 'canaries'.")
    ] = None,
    offline: Annotated[bool, flag("--offline", "Ask no judge: similarity of texts, no score to compare.")] = False,
    out: Annotated[Path | None, takes("FOLDER", "Folder for the results.", default="RUN")] = None,
    retry_unjudged: Annotated[bool, flag("--retry-unjudged", "Ask again where the judge gave no verdict.")] = False,
    dry_run: Annotated[bool, flag("--dry-run", "Count requests, tokens and cost; ask nothing.")] = False,
    allow_unjudged: Annotated[int, number("Accept up to N answers without a verdict (else exit code 1).")] = 0,
    cache: Annotated[bool, typer.Option(help="Keep replies in your cache and reuse them.")] = True,
    json: JsonFlag = False,
) -> None:
    """Judge free-form answers with a language model.

    Set OPENAI_API_KEY, ANTHROPIC_API_KEY or GEMINI_API_KEY first; for another server, the variable that
    remote.api_key_env names. Run it again to resume. Next: hba score RUN.
    """
    if run is not None and "=" in str(run):  # an override that came first, as there is no RUN
        run, overrides = None, [str(run), *(overrides or [])]
    if dry_run and (offline or (calibrate is not None and run is not None)):
        fix = "Leave --dry-run out."
        raise InputError("nothing is asked here, so nothing can be counted", where="--dry-run", fix=fix)
    if offline:
        return _offline(_required(run, "RUN"), out, json)
    if calibrate is not None and run is not None:
        return _compare(run, calibrate, json)
    from hba.evaluate.judge.run import JudgeConfig, estimate_judging, items_of, judge_run
    from hba.remote.providers import provider

    given = [f"remote.provider={provider(backend).name}", *served(base_url)]
    given += [f"remote.cache={cache_folder() / 'responses'}"] if cache else []
    settings = configured(JudgeConfig, None, [*given, *(overrides or [])])
    asked = _required(model, "--model")
    if dry_run:
        items = items_of(_required(run, "RUN"), atlas) if calibrate is None else _labelled_items(calibrate)
        folder = out or _required(run, "--out")
        expected = estimate_judging(items, folder, model=asked, config=settings, retry_unjudged=retry_unjudged)
        return show_estimate(expected, "judge", as_json=json)
    if calibrate is not None:
        return _calibrate(calibrate, asked, settings, _required(out, "--out"), json)
    place = _required(run, "RUN")
    with tallied("judge") as progress:
        judged = judge_run(
            place, model=asked, config=settings, progress=progress, atlas=atlas, out=out, retry_unjudged=retry_unjudged
        )
    result = {"judgements": str((out or place) / "judgements.jsonl"), **_summary(judged)}
    answer(result, lambda: _shown(result), as_json=json)
    for text in judged.warnings:
        warn(text)
    for judgement in judged.unjudged[:20]:
        beside(f"unjudged {judgement.id}: {judgement.error}")
    if len(judged.unjudged) > allow_unjudged:
        fix = "Ask again with --retry-unjudged; until then their datasets have bounds and no score."
        fix = "Run the same command again: it asks those without a reply." if judged.unanswered else fix
        beside(f"error: {plural(len(judged.unjudged), 'answer', 'has|have')} no verdict; all others do. Fix: {fix}")
        raise typer.Exit(1)
    return None


def _required(value: Any, name: str) -> Any:
    if value is None:
        raise InputError("is missing", where=name, fix=JUDGE_EXAMPLE.replace("Example:", "Write for example"))
    return value


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


def _shown(result: dict[str, Any]) -> Iterator[RenderableType]:
    from hba.report.tables import Table

    rows = [
        (key, *map(str, (entry["n_correct"], entry["n"] - entry["n_unjudged"], entry["n_unjudged"])))
        for key, entry in result["datasets"].items()
    ]
    yield Table(title="Judgements", head=("dataset", "judged correct", "of", "unjudged"), rows=rows)
    usage = result["usage"]
    cost = "unknown (no price for this model)" if usage["cost_usd"] is None else f"${usage['cost_usd']:.4f}"
    asked, cached = plural(usage["requests"], "request"), plural(usage["cached"], "reply|replies")
    yield f"{asked}, {cached} from the cache, cost {cost}."
    yield f"Verdicts are in {bold(result['judgements'])}; `hba score` uses them."


# --- how far the judge is to be trusted -------------------------------------------------------------------------------


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
    from hba.evaluate.judge.agreement import agreement, read_labels
    from hba.evaluate.judge.run import judge_items

    items = _labelled_items(calibrate)
    labels = read_labels(_labels_path(calibrate))
    with tallied("judge") as progress:
        judged = judge_items(items, out, model=model, config=settings, progress=progress)
    found = agreement({j.id: j.correct for j in judged.judgements}, labels)
    result = {"labels": str(calibrate), "model": model, **found, "usage": judged.usage}
    write_json(out / "calibration.json", result)
    answer(result, lambda: _agreement(result), as_json=json)
    one_sided = len(set(labels.values())) == 1  # labels of which all are equal want equal verdicts
    for text in judged.warnings:
        if not (one_sided and text.startswith("all ")):
            warn(text)
    if not result["n"]:
        last = next((j.error for j in judged.unjudged), "no label")
        beside(f"error: not one verdict to compare ({last}). Fix: Ask another judge, or see `replies`.")
        raise typer.Exit(1)


def _compare(run: Path, calibrate: Path, json: bool) -> None:
    """Compare judgements that are there with labels, or with another judge's; asks nobody."""
    from hba.evaluate.judge.agreement import agreement, read_labels

    own = run / "judgements.jsonl" if run.is_dir() else run
    result = {"labels": str(calibrate), **agreement(read_labels(own), read_labels(calibrate))}
    answer(result, lambda: _agreement(result), as_json=json)


def _agreement(result: dict[str, Any]) -> Iterator[RenderableType]:
    from hba.report.tables import Table

    rows = []
    for name in ("accuracy", "kappa"):
        value = result[name]
        rows.append((name, "undefined" if value is None else f"{value:.3f}", _reach(result[f"{name}_ci95"])))
    for name in ("n", "n_unjudged", "true_positive", "false_positive", "false_negative", "true_negative"):
        rows.append((name, str(result[name]), ""))
    yield Table(title="Agreement", head=("figure", "value", "95% interval"), rows=rows)


def _reach(ci95: Sequence[float] | None) -> str:
    return "" if ci95 is None else f"{ci95[0]:.3f} to {ci95[1]:.3f}"


def _offline(run: Path, out: Path | None, json: bool) -> None:
    from hba.evaluate.judge.agreement import METRIC, SIMILARITY_FILE, judge_offline

    result = judge_offline(run, out=out)

    def show() -> Iterator[RenderableType]:
        from hba.report.tables import Table

        found = result["datasets"].items()
        rows = [(key, f"{entry[METRIC]:.3f}", _reach(entry["ci95"]), str(entry["n"])) for key, entry in found]
        head = ("dataset", "embedding similarity", "95% interval", "n")
        yield Table(title=f"Offline: {result['note']}", head=head, rows=rows)
        yield f"Wrote {bold((out or run) / SIMILARITY_FILE)}."

    answer({key: value for key, value in result.items() if key != "rows"}, show, as_json=json)
