"""`hba judge RUN`: a verdict for every free-form answer of a run, through one model.

Requests run concurrently, each verdict is appended as soon as it is there, and a killed command goes on with the
answers that have none. A reply that is no verdict is asked for again under another code; after `attempts` of them, or
when the server refuses the request, the answer is recorded as unjudged, and the others go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from hba.config import option
from hba.errors import InputError
from hba.evaluate.judge.items import Item, items_of
from hba.evaluate.judge.judgements import Judgement, JudgementLog
from hba.evaluate.judge.prompt import code_of, read_verdict, request_for, rubrics_sha256
from hba.evaluate.tally import Tally
from hba.remote import ChatRequest, ClientConfig, RemoteClient, Reply, RequestError, UnusableReplyError, bounded
from hba.remote.client import describe
from hba.run import locked_folder

WIDTH = 2  # items under way for each request slot: those that wait for another attempt hold none
Progress = Callable[[Tally], None]


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """How answers are judged."""

    client: ClientConfig = field(default_factory=ClientConfig)
    max_tokens: Annotated[int, Field(ge=16)] = option(2048, "most tokens of a reply, a model's reasoning included")
    temperature: float | None = option(0.0, "of the judge; null for models that take none")
    attempts: Annotated[int, Field(ge=1)] = option(3, "replies asked for before an answer is unjudged")
    structured: bool = option(True, "ask for JSON by a schema; false for servers that know none")


class Judged(NamedTuple):
    """What a command leaves: the judgements of its items, and what this call of it used."""

    judgements: list[Judgement]
    usage: dict[str, Any]

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
    expected; everything judged until then is kept.
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
        usage = asyncio.run(_judge_all(todo, tally, log, model, config, progress))
        return Judged([log.known[item.id] for item in items], usage)


def settings_of(model: str, config: JudgeConfig) -> dict[str, Any]:
    """What decides the verdicts, for judge.json."""
    return describe(config.client, model) | {
        "temperature": config.temperature,
        "max_tokens": config.max_tokens,
        "attempts": config.attempts,
        "structured": config.structured,
        "rubrics_sha256": rubrics_sha256(),
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
    return request_for(
        item,
        attempt,
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        structured=config.structured,
    )


async def _judge_all(
    todo: Sequence[Item], tally: Tally, log: JudgementLog, model: str, config: JudgeConfig, progress: Progress
) -> dict[str, Any]:
    async with RemoteClient(model, config.client) as client:
        tally.meter = client.meter

        async def judge(item: Item) -> Judgement:
            return await judge_item(client, item, config)

        progress(tally)
        async for judgement in bounded(todo, judge, WIDTH * config.client.max_concurrency):
            log.append(judgement)
            tally.done += 1
            tally.fresh += 1
            tally.failed += judgement.correct is None
            tally.tokens_in += judgement.tokens_in or 0
            tally.tokens_out += judgement.tokens_out or 0
            progress(tally)
        return client.meter.record()


async def judge_item(client: RemoteClient, item: Item, config: JudgeConfig) -> Judgement:
    """One judgement. Raises ServiceError only."""
    replies: list[Reply] = []
    error = ""
    for attempt in range(config.attempts):
        code = code_of(item, attempt)
        request = asked(item, attempt, config)

        def accept(reply: Reply, code: str = code) -> None:
            replies.append(reply)
            read_verdict(reply, code)

        try:
            reply = await client.complete(request, accept)
            if reply.cached:
                replies.append(reply)
            verdict = read_verdict(reply, code)
        except UnusableReplyError as unusable:
            error = f"no verdict in {attempt + 1} replies (the last: {unusable.what})"
        except RequestError as failed:
            error = failed.what
            break
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
    )


def _total(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None
