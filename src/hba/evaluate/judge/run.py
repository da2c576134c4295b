"""`hba judge RUN`: a verdict for every free-form answer of a run, through one model.

The question comes from the atlas row with the prediction's id, never from a row with the same answer: answers repeat,
and a question found by its answer is that of another sample. A prediction whose row is not there, or says something
else, is an error; so is an atlas with another fingerprint. An empty answer needs no judge: it is wrong.

Requests run concurrently, each verdict is appended as soon as it is there, and a killed command goes on with the
answers that have none. A reply that is no verdict is asked for again under another code; after `attempts` of them, or
when the server refuses the request, the answer is recorded as unjudged, and the others go on. An answer that the server
left without a reply while it was away is not recorded: the same command asks again. A judge that gives no verdict on
its first answers is none, and the command stops.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

import numpy as np
from pydantic import Field

from hba.config import option
from hba.errors import HbaError, InputError
from hba.evaluate.estimate import CHARACTERS_A_TOKEN, FORMAT_TOKENS, Estimate, Payee, expected
from hba.evaluate.judge.items import Item, Judgement, JudgementLog, known_judgements
from hba.evaluate.judge.prompt import code_of, read_verdict, request_for, rubrics_sha256
from hba.evaluate.predictions import PREDICTIONS, Prediction, Tally
from hba.evaluate.runs import Run, open_run
from hba.remote import (
    ChatRequest,
    ClientConfig,
    RemoteClient,
    Reply,
    RequestError,
    ServiceError,
    UnansweredError,
    UnusableReplyError,
    bounded,
    settled,
)
from hba.remote.request import check_extra
from hba.run import locked_folder

if TYPE_CHECKING:
    from hba.atlas import Atlas

WIDTH = 2  # items under way for each request slot: those that wait for another attempt hold none
HOPELESS_AFTER = 20  # items without a verdict, and none with one, after which a judge is none
SAME_FROM = 20  # verdicts that are all equal, from which on that is worth a warning
REPLY_CHARACTERS = 20_000  # of a raw reply that is kept
Progress = Callable[[Tally], None]
_TAGS = re.compile(r"<(?:image|video|audio)>")


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """How answers are judged."""

    RENAMED: ClassVar[Mapping[str, str]] = {"client": "remote"}

    remote: ClientConfig = field(default_factory=ClientConfig)
    max_tokens: Annotated[int, Field(ge=16)] = option(2048, "longest reply in tokens, the judge's reasoning included")
    temperature: float | None = option(0.0, "temperature of the judge. null: what the server chooses")
    attempts: Annotated[int, Field(ge=1)] = option(3, "replies asked for before an answer counts as unjudged")
    structured: bool = option(True, "ask for JSON by a schema. false: for servers that know no schemas")
    extra: dict[str, Any] | None = option(
        None, "more fields of each request, such as {reasoning_effort: low} or vLLM's chat_template_kwargs"
    )

    def __post_init__(self) -> None:
        """Raises ConfigError for a key in `extra`, since that is written into judge.json."""
        check_extra(self.extra, "extra")


# What is judged.


def free_form(run: Run) -> list[Prediction]:
    """The free-form predictions of a run. Raises InputError for a bad file, and if there are none."""
    found = [p for p in run.predictions if run.taxonomy.dataset(p.dataset).free_form]
    if not found:
        fix = "Predict with a backend that answers in words; class labels need no judge."
        raise InputError("no free-form answer to judge", where=str(run.predictions_path), fix=fix)
    return found


def items_of(run: Path, atlas: str | None = None) -> list[Item]:
    """The items of a run. `atlas` says where the rows are if predict.json does not, or no longer.

    Raises InputError naming id and field for a prediction that does not fit its row.
    """
    opened = open_run(run)
    predictions = [p for p in free_form(opened) if p.spoken]
    if atlas is None and (opened.asked.get("data") or {}).get("path") is None:
        raise InputError("nothing says which atlas was predicted", where=str(run), fix="Give it with --atlas.")
    asked = opened.asked.get("split")
    questions: dict[tuple[str, str], str] = {}
    for split in [asked] if asked else sorted({p.split for p in predictions}):
        rows = opened.rows(atlas, split)
        questions |= _questions(rows, [p for p in predictions if p.split == rows.split])
    return [
        Item(
            id=p.id,
            dataset=p.dataset,
            task=opened.taxonomy.dataset(p.dataset).task,
            question=questions[p.split, p.id],
            reference=p.truth,
            answer=p.spoken or "",
        )
        for p in predictions
    ]


def _questions(atlas: Atlas, predictions: Sequence[Prediction]) -> dict[tuple[str, str], str]:
    """The question of every prediction, by (split, id)."""
    wanted = {p.id: p for p in predictions}
    found = {}
    for row in np.flatnonzero(atlas.columns.label_codes < 0):
        sample = atlas[int(row)]
        prediction = wanted.pop(sample.id, None)
        if prediction is None:
            continue
        for name in ("dataset", "target"):
            if getattr(prediction, name) != getattr(sample, name):
                what = f"{name} is {getattr(prediction, name)!r}, in the atlas {getattr(sample, name)!r}"
                raise InputError(what, where=f"prediction {sample.id}, {name}", fix="Predict this atlas anew.")
        found[sample.split, sample.id] = " ".join(_TAGS.sub(" ", sample.problem).split())
    if wanted:
        what = f"no free-form row has the id {next(iter(wanted))!r} ({len(wanted)} such predictions)"
        raise InputError(what, where=str(atlas.root), fix="Give the atlas that was predicted with --atlas.")
    return found


# Who judges it.


class Judged(NamedTuple):
    """What a command leaves: the judgements of its items, what this call of it used, what its user should know.

    `unanswered` are the ids whose judgement says why there was no reply, and stands in no file.
    """

    judgements: list[Judgement]
    usage: dict[str, Any]
    warnings: list[str]
    unanswered: frozenset[str] = frozenset()

    @property
    def unjudged(self) -> list[Judgement]:
        """Those without a verdict."""
        return [j for j in self.judgements if j.correct is None]


def judge_run(
    run: Path,
    *,
    model: str,
    config: JudgeConfig,
    progress: Progress,
    atlas: str | None = None,
    out: Path | None = None,
    retry_unjudged: bool = False,
) -> Judged:
    """Judge every free-form answer of `run` that has no verdict yet; judgements.jsonl goes into `out` or the run.

    Raises InputError for a run that cannot be judged and a folder of another judge, ServiceError when no reply can be
    expected, HbaError when no reply is a verdict; everything judged until then is kept.
    """
    return judge_items(
        items_of(run, atlas), out or run, model=model, config=config, progress=progress, retry_unjudged=retry_unjudged
    )


def judge_items(
    items: Sequence[Item],
    folder: Path,
    *,
    model: str,
    config: JudgeConfig,
    progress: Progress,
    retry_unjudged: bool = False,
) -> Judged:
    """Judge `items` into the judgements.jsonl of `folder`, going on where it stopped."""
    with locked_folder(folder), JudgementLog(folder, settings_of(model, config)) as log:
        todo = open_items(items, log.known, folder, retry_unjudged=retry_unjudged)
        known = [log.known[item.id] for item in items if item.id in log.known]
        unjudged = sum(judgement.correct is None for judgement in known)
        tally = Tally(total=len(items), done=len(items) - len(todo), failed=0 if retry_unjudged else unjudged)
        client = RemoteClient(model, config.remote)
        unanswered = asyncio.run(_judge_all(client, todo, tally, log, config, progress))
        judgements = [log.known.get(item.id) or unanswered[item.id] for item in items]
        warnings = client.meter.warnings() + _all_equal(judgements)
        return Judged(judgements, client.meter.record(), warnings, frozenset(unanswered))


def _all_equal(judgements: Sequence[Judgement]) -> list[str]:
    verdicts = [judgement.correct for judgement in judgements if judgement.correct is not None]
    if len(verdicts) < SAME_FROM or len(set(verdicts)) > 1:
        return []
    word = "correct" if verdicts[0] else "incorrect"
    return [f"all {len(verdicts)} verdicts are {word!r}. Such a judge may judge nothing: read some of its reasons"]


def settings_of(model: str, config: JudgeConfig) -> dict[str, Any]:
    """What decides the verdicts, and where the judge ran, for judge.json. Nothing secret."""
    return {
        "model": model,
        "provider": config.remote.provider,
        "base_url": config.remote.base_url,
        "temperature": config.temperature,
        "max_tokens": config.max_tokens,
        "attempts": config.attempts,
        "structured": config.structured,
        "rubrics_sha256": rubrics_sha256(),
        **({"extra": config.extra} if config.extra else {}),
    }


def open_items(items: Sequence[Item], known: dict[str, Judgement], folder: Path, *, retry_unjudged: bool) -> list[Item]:
    """The items to ask about. Raises InputError when a verdict of `folder` is about another answer."""
    for item in items:
        judgement = known.get(item.id)
        if judgement is not None and judgement.answer_sha256 != item.answer_sha256:
            fix = "Remove judgements.jsonl and judge.json, or write elsewhere with --out."
            raise InputError(f"the verdict on {item.id!r} is about another answer", where=str(folder), fix=fix)
    return [i for i in items if i.id not in known or (retry_unjudged and known[i.id].correct is None)]


def asked(item: Item, attempt: int, config: JudgeConfig) -> ChatRequest:
    """The request for a verdict on `item`."""
    how = {name: getattr(config, name) for name in ("max_tokens", "temperature", "structured", "extra")}
    return request_for(item, attempt, **how)


async def _judge_all(
    client: RemoteClient,
    todo: Sequence[Item],
    tally: Tally,
    log: JudgementLog,
    config: JudgeConfig,
    progress: Progress,
) -> dict[str, Judgement]:
    """Judge `todo` into `log`; what became of the items to which the server gave no reply, by id."""
    tally.meter = client.meter
    unanswered: dict[str, Judgement] = {}

    async def judge(item: Item) -> tuple[Judgement, RequestError | None]:
        try:
            return await judge_item(client, item, config), None
        except RequestError as error:
            return _judgement(item, [], error=error.what), error

    def keep(judgement: Judgement) -> None:
        log.append(judgement)
        tally.done += 1
        tally.fresh += 1
        tally.failed += judgement.correct is None
        tally.tokens_in += judgement.tokens_in or 0
        tally.tokens_out += judgement.tokens_out or 0

    try:
        async with client:
            progress(tally)
            results = bounded(todo, judge, WIDTH * config.remote.max_concurrency)
            async for judgement, error in settled(client, results, _is_refused):
                if isinstance(error, UnansweredError):
                    unanswered[judgement.id] = judgement
                    tally.unanswered[error.what] += 1
                else:
                    keep(judgement)
                    if error is None:
                        _require_verdicts(log)
                progress(tally)
    except ServiceError as error:
        what = f"{error.what}; {tally.done:,} of {tally.total:,} answers are done and kept"
        raise ServiceError(what, where=error.where, fix=error.fix) from None
    return unanswered


def _is_refused(result: tuple[Judgement, RequestError | None]) -> bool:
    return result[1] is not None and not isinstance(result[1], UnansweredError)


def _require_verdicts(log: JudgementLog) -> None:
    """Raises HbaError for a judge that says something else each time."""
    known = log.known.values()
    if len(known) >= HOPELESS_AFTER and not any(judgement.correct is not None for judgement in known):
        last = next(reversed(known))
        fix = "Read `replies` in judgements.jsonl. A reply that was cut off wants a larger max_tokens, prose "
        fix += "structured=true, a small model another judge; each starts this folder anew."
        what = f"no verdict on the first {len(known)} answers: {last.error}"
        raise HbaError(what, where=last.model or "judge", fix=fix)


async def judge_item(client: RemoteClient, item: Item, config: JudgeConfig) -> Judgement:
    """One judgement. Raises RequestError for an item that the server refuses or does not answer, ServiceError."""
    replies: list[Reply] = []
    error = ""
    for attempt in range(config.attempts):
        code = code_of(item, attempt)

        def accept(reply: Reply, code: str = code) -> None:
            replies.append(reply)
            read_verdict(reply, code)

        try:
            reply = await client.complete(asked(item, attempt, config), accept)
            if reply.cached:
                replies.append(reply)
            verdict = read_verdict(reply, code)
        except UnusableReplyError as unusable:
            error = f"no verdict in {attempt + 1} replies (the last: {unusable.what})"
        else:
            return _judgement(item, replies, correct=verdict.correct, reason=verdict.reason)
    return _judgement(item, replies, error=error)


def _judgement(
    item: Item,
    replies: Sequence[Reply],
    *,
    correct: bool | None = None,
    reason: str | None = None,
    error: str | None = None,
) -> Judgement:
    return Judgement(
        id=item.id,
        dataset=item.dataset,
        answer_sha256=item.answer_sha256,
        correct=correct,
        reason=reason,
        error=error,
        attempts=len(replies),
        tokens_in=_total([reply.tokens_in for reply in replies]),
        tokens_out=_total([reply.tokens_out for reply in replies]),
        model=replies[-1].model if replies else None,
        left_out=replies[-1].left_out if replies else (),
        replies=tuple(reply.text[:REPLY_CHARACTERS] for reply in replies),
    )


def _total(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


# What judging would cost, without asking the judge: `hba judge --dry-run`.
#
# Every answer without a verdict is one request; a reply that is no verdict is asked for again, so that the bound is
# `attempts` requests an answer, each as long as a reply may be. Judgements that the folder has, of a command that was
# stopped, give the mean tokens of an answer, all its attempts included, in the place of the rough ones.


def items_ahead(atlas: Atlas, folder: Path) -> list[Item]:
    """The items that a run on these rows will have: those of its predictions, and those of the other
    free-form rows, with their reference in the place of an answer that is not there yet."""
    there = items_of(folder) if (folder / PREDICTIONS).is_file() else []
    known = {item.id for item in there}
    ahead = []
    for key, row, _ in atlas.said():
        about = atlas.taxonomy.dataset(row.dataset)
        if about.free_form and row.answer is not None and key not in known:
            said = {"question": row.problem, "reference": row.answer, "answer": row.answer}
            ahead.append(Item(id=key, dataset=row.dataset, task=about.task, **said))
    return [*there, *ahead]


def estimate_judging(
    items: Sequence[Item], folder: Path, *, model: str, config: JudgeConfig, retry_unjudged: bool = False
) -> Estimate:
    """The estimate for the items that `folder` has no verdict on. Writes nothing, needs no key.

    Raises InputError for a folder of another judge, as judging does.
    """
    known = known_judgements(folder, settings_of(model, config))
    todo = open_items(items, known, folder, retry_unjudged=retry_unjudged)
    requests = len(todo) * config.attempts
    letters = (sum(len(str(message["content"])) for message in asked(item, 0, config).messages) for item in todo)
    tokens_in = sum(each // CHARACTERS_A_TOKEN + FORMAT_TOKENS for each in letters) * config.attempts
    return expected(
        Payee(config.remote.provider, model, config.remote),
        (item.dataset for item in items),
        left=len(todo),
        requests=requests,
        tokens=(tokens_in, requests * config.max_tokens),
        before=[known[item.id] for item in items if item.id in known],
    )
