"""`hba predict`: from a model to predictions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hba.cli.options import (
    ALLOW_FAILED_HELP,
    ATLAS_HELP,
    MODEL_HELP,
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
    tally_cost,
    warn,
    written,
)
from hba.errors import InputError
from hba.storage import plural

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hba.evaluate.estimate import Estimate
    from hba.evaluate.predict import PredictSummary, Shard


SHOWN_ANSWERS = 20


def predict_command(
    model: Annotated[str, typer.Argument(help=f"{MODEL_HELP} Or a baseline: majority, random.")],
    overrides: Annotated[list[str] | None, keys_such_as("generation.max_tokens=64")] = None,
    atlas: Annotated[str, takes("ATLAS", ATLAS_HELP)] = ...,  # type: ignore[assignment]
    split: Annotated[str, takes("SPLIT", f"Split to answer. {SLICES}")] = "test",
    backend: Backend = None,
    base_url: BaseUrl = None,
    run: Annotated[Path | None, takes("FOLDER", "Run folder to write.", default="the model's own")] = None,
    modalities: Annotated[
        str | None, takes("KINDS", "Give the model only these media: audio, video or audio,video; text for none.")
    ] = None,
    datasets: Annotated[str | None, takes("DATASETS", "Only these datasets, such as tess,mmsd.")] = None,
    limit: Annotated[int | None, number("Only the first N rows.", least=1)] = None,
    per_dataset: PerDataset = None,
    shard: Annotated[str | None, takes("i/N", "Only part i of N. torchrun and Slurm set it.")] = None,
    retry_failed: Annotated[bool, flag("--retry-failed", "Ask the rows that failed again.")] = False,
    dry_run: Annotated[bool, flag("--dry-run", "Count rows, tokens and cost; ask nothing.")] = False,
    allow_failed: Annotated[int, number(ALLOW_FAILED_HELP)] = 0,
    allow_quarantined: AllowQuarantined = 0,
    json: JsonFlag = False,
) -> None:
    """Answer every row of a split with a model.

    Writes predictions.jsonl. Run it again to resume. Next: hba score RUN.
    """
    from hba.evaluate.backends.interface import require_backend
    from hba.evaluate.config import PredictConfig
    from hba.evaluate.predict import Selection, launched_shard, open_rows, parse_shard, predict_run

    require_backend(model, backend)
    settings = configured(PredictConfig, None, [*served(base_url), *(overrides or [])])
    folder = run or _run_folder(model)
    selection = Selection(limit=limit, per_dataset=per_dataset, channels=_names(modalities), datasets=_names(datasets))
    if dry_run:
        from hba.evaluate.estimate import estimate

        opened = open_rows(model, atlas, split=split, config=settings, backend=backend, selection=selection)
        expected = estimate(opened, folder)
        return show_estimate(expected, "predict", as_json=json)
    share = launched_shard() if shard is None else parse_shard(shard)
    first = share is None or share.device is None or share.number == 1  # of those that a launcher has started
    with tallied("predict" if share is None else f"predict {share.number}/{share.count}", shown=first) as progress:
        summary = predict_run(
            model,
            folder,
            atlas=atlas,
            split=split,
            config=settings,
            progress=progress,
            backend=backend,
            selection=selection,
            shard=share,
            retry_failed=retry_failed,
        )
    warn_of(summary, model, first=first)
    # Of the processes of a launcher the one that merges speaks for all: a failure of one makes it end the others.
    speaks = share is None or share.device is None or summary.merged
    if speaks:
        answer(_record(summary, folder), lambda: _shown(summary, folder, share), as_json=json, once=False)
    _finish_failed(summary, allow_failed, known=speaks)
    return finish(summary.quarantined if speaks else (), allow_quarantined, once=False)


def warn_of(summary: PredictSummary, model: str, *, first: bool = True) -> None:
    """What a user should know of how the rows were answered; what holds for all processes the `first` one says."""
    if summary.unnamed_heads and first:
        warn(f"{model} does not say which heads were trained: all are used, and an untrained one answers at random")
    if not summary.predicted and summary.skipped and first:
        what = f"{model} answered no row: it was trained for other labels than these rows have"
        warn(f"{what}. Train on rows like them (hba train), or ask a model that answers in words (--backend hf)")
    if summary.note and first:
        warn(f"{summary.note}. Choose another with generation.format=NAME")
    if summary.addresses > 1 and first:
        where = f"rows of this run were asked at {summary.addresses} addresses"
        warn(f"{where}, under one name: nothing tells whether the same model answered at all of them")
    for text in summary.tally.meter.warnings() if summary.tally.meter else ():
        warn(text)


def _names(listed: str | None) -> tuple[str, ...] | None:
    return None if listed is None else tuple(name.strip() for name in listed.split(","))


def _record(summary: PredictSummary, folder: Path) -> dict[str, object]:
    tally = summary.tally
    return {
        "run": str(folder),
        "predicted": summary.predicted,
        "failed": tally.failed,
        "unanswered": tally.unanswered.total(),
        "invalid": tally.invalid,
        "cut": tally.n_cut,
        "filtered": tally.n_filtered,
        "skipped": summary.skipped,
        "quarantined": len(summary.quarantined),
        "merged": summary.merged,
        "unlabelled": len(summary.unlabelled),
        "answers": str(folder / "answers.csv") if summary.unlabelled else None,
        "remote": None if tally.meter is None else tally.meter.record(),
    }


def _shown(summary: PredictSummary, folder: Path, share: Shard | None) -> Iterator[RenderableType]:
    yield _said(summary, folder, share)
    if summary.unlabelled:
        from hba.evaluate.predict import said_of
        from hba.report.tables import Table

        rows = [(p.id, *said_of(p)) for p in summary.unlabelled[:SHOWN_ANSWERS]]
        yield Table(title="", head=("row", "answer", "probability"), rows=rows, align="llr")
        more = len(summary.unlabelled) - len(rows)
        verbs = "has no answer, and is in no score|have no answer, and are in no score"
        rest = f"; {plural(more, 'more is|more are')} in the file." if more else "."
        yield plural(len(summary.unlabelled), "row", verbs) + rest
        yield from written(folder / "answers.csv")


def _said(summary: PredictSummary, folder: Path, share: Shard | None) -> str:
    tally = summary.tally
    facts = [f"{plural(summary.predicted, 'prediction')} in {bold(folder)}"]
    skipped = plural(summary.skipped, "row")
    verbs = "means no label and counts as wrong|mean no label and count as wrong"
    facts += [f"{skipped} left out that the model is not trained to answer"] if summary.skipped else []
    facts += [plural(tally.invalid, "answer", verbs)] if tally.invalid else []
    facts += [plural(tally.n_cut, "answer", "was|were") + " cut off at generation.max_tokens"] if tally.n_cut else []
    facts += [plural(tally.n_filtered, "answer", "was|were") + " stopped by a filter"] if tally.n_filtered else []
    of = "" if share is None else f" of one of {share.count} processes"
    facts += [] if tally.meter is None else [f"{tally_cost(tally.meter)} in this session{of}"]
    facts += [] if summary.merged else ["other shards are not done yet: the last one merges all"]
    return "; ".join(facts) + "."


def _finish_failed(summary: PredictSummary, allowed: int, *, known: bool) -> None:
    """Say what failed, unless that is not `known` of the whole run yet, and which rows stay open; exit 1 for either."""
    failed, unanswered = summary.tally.failed if known else 0, summary.tally.unanswered
    if unanswered:
        fix = "Run the same command again: it asks them."
        what = plural(unanswered.total(), "row", "got no answer and stays open|got no answer and stay open")
        what += f" ({_most(unanswered)}); everything else is done"
        beside(f"error: {what}. Fix: {fix}")
    if failed > allowed:
        fix = f"Ask again with --retry-failed, or accept this with --allow-failed {failed}."
        what = plural(failed, "sample", "failed and counts as wrong|failed and count as wrong")
        what += f" ({_most(summary.tally.reasons)}); everything else is done"
        beside(f"error: {what}. Fix: {fix}")
    if failed + unanswered.total() > allowed:
        raise typer.Exit(1)


def _most(reasons: Counter[str]) -> str:
    """The most frequent reason, and for how many it holds if not for all."""
    ((reason, times),) = reasons.most_common(1)
    return f"{times} of them: {reason}" if times < reasons.total() else reason


def _run_folder(model: str) -> Path:
    """Where predictions go without --run: the model's own run folder, and no other place is guessed."""
    from hba.model.config import require_place

    if not (Path(model) / "checkpoints").is_dir():
        require_place(model)
        fix = "Check the path, or say with --run where the predictions go."
        raise InputError("no run folder of a training", where=model, fix=fix)
    return Path(model)


def show_estimate(expected: Estimate, verb: str, *, as_json: bool) -> None:
    """Answer `--dry-run` of `hba predict` or `hba judge` with what it would do; `verb` is what is left to do."""
    from hba.report.tables import Table

    rows = [(dataset, plural(count, "row")) for dataset, count in expected.datasets.items()]
    rows.append((f"left to {verb}", f"{expected.left:,} of {plural(expected.rows, 'row')}"))
    again, cost, once = expected.requests_at_most > expected.left, expected.cost_usd_at_most, ""
    if again:
        why = f"{expected.requests_at_most // expected.left} a row, since useless replies are asked for again"
        rows.append(("requests", f"{expected.left:,}; {expected.requests_at_most:,} at most, {why}"))
    how = "as measured on this folder's records" if expected.measured else "roughly; records in it would measure it"
    rows.append(("tokens in", f"{expected.tokens_in:,} {how}"))
    rows.append(("tokens out", f"{expected.tokens_out_at_most:,}" + ("" if expected.measured else " at most")))
    if cost is not None and again and not expected.measured:
        once = f" (${cost * expected.left / expected.requests_at_most:,.2f} with one request a row)"
    spent = f"unknown: {expected.note}" if cost is None else f"${cost:,.2f} at most{once}, {expected.note}"
    table = Table(title="Dry run: nothing was asked", rows=[*rows, ("cost", spent)], align="l")
    answer(expected.record(), lambda: [table], as_json=as_json)
