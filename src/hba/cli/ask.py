"""`hba ask`: from a clip, a sound, a picture, a text, or a folder of them, to an answer."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hba.cli.options import (
    MODEL_HELP,
    Backend,
    BaseUrl,
    JsonFlag,
    SetKey,
    answer,
    beside,
    configured,
    counted,
    flag,
    served,
    takes,
    written,
)
from hba.errors import InputError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hba.evaluate.ask import Reply

ASK_EXAMPLE = "Example: hba ask runs/demo/sft clip.mp4"


def ask_command(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    files: Annotated[list[Path], typer.Argument(help="Clips, sounds, pictures or texts, or folders of them.")],
    task: Annotated[
        str | None,
        takes("TASKS", "Ask about these tasks, such as EMO,SEN.", default="all that the model has heads for"),
    ] = None,
    dataset: Annotated[str | None, takes("DATASETS", "Offer the labels of these datasets, such as cremad.")] = None,
    question: Annotated[str | None, takes("TEXT", "Ask this in place of the task's question.")] = None,
    transcript: Annotated[str | None, takes("TEXT", "The words spoken in the file.")] = None,
    transcribe: Annotated[
        str | None,
        takes("MODEL", "Find the spoken words with this speech recognition model, or a service's: openai:whisper-1."),
    ] = None,
    transcribe_url: Annotated[str | None, takes("URL", "Server of --transcribe openai:NAME.", default="OpenAI")] = None,
    transcribe_key_env: Annotated[
        str | None,
        takes(
            "VARIABLE",
            "Environment variable with the key of that server.",
            default="OPENAI_API_KEY at OpenAI, none elsewhere",
        ),
    ] = None,
    every: Annotated[str | None, takes("SECONDS", "Ask about each window of a clip or sound, such as 5s.")] = None,
    backend: Backend = None,
    base_url: BaseUrl = None,
    key: SetKey = None,
    csv: Annotated[bool, flag("--csv", "Print the answers as CSV.")] = False,
    out: Annotated[Path | None, takes("FILE", "With --every: page of curves over time to write, .html.")] = None,
    json: JsonFlag = False,
) -> None:
    """Ask a model about your own files.

    A file that cannot be read is named; the others are answered.
    """
    if csv and json:
        raise InputError("--csv and --json exclude each other", where="hba ask", fix="Give one of them.")
    if out is not None and out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"no page is written as {out.suffix or out.name!r}", where="--out", fix="Name a file.html.")
    from hba.evaluate.backends.interface import require_backend
    from hba.evaluate.config import PredictConfig

    require_backend(model, backend)
    settings = configured(PredictConfig, None, [*served(base_url), *(key or [])])
    from hba.evaluate.ask import ask

    with counted("answers") as told:
        replies = ask(
            model,
            files,
            tasks=_names(task, "--task"),
            datasets=_names(dataset, "--dataset"),
            question=question,
            transcript=transcript,
            transcribe=transcribe,
            transcribe_url=transcribe_url,
            transcribe_key_env=transcribe_key_env,
            every=_seconds(every),
            backend=backend,
            config=settings,
            progress=told,
        )
    if out is not None:
        from hba.report.page import write_asked

        write_asked(replies, out, model=model)
    pages = [] if out is None else [out]
    if csv:
        sys.stdout.write(_csv(replies))
    else:
        values = {"answers": [asdict(reply) for reply in replies]} | ({} if out is None else {"page": str(out)})
        answer(values, lambda: [*_shown(replies), *written(*pages)], as_json=json)
    failed = {reply.file: reply.error for reply in replies if reply.error is not None}
    for file, reason in failed.items():
        beside(f"error: {file}: {reason}")
    if failed:
        raise typer.Exit(2)


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return float(text.strip().removesuffix("s"))
    except ValueError:
        raise InputError(f"{text!r} is no number of seconds", where="--every", fix="Write 5s, or 2.5.") from None


def _names(listed: str | None, option: str) -> list[str] | None:
    if listed is None:
        return None
    names = [name.strip() for name in listed.split(",") if name.strip()]
    if not names:
        raise InputError(f"{listed!r} names nothing", where=option, fix="Write keys, such as EMO,SEN, or leave it out.")
    return names


def _shown(replies: list[Reply]) -> Iterator[RenderableType]:
    from hba.report import words
    from hba.report.tables import Table
    from hba.taxonomy import CARE

    rows: list[tuple[str, ...]] = []
    windows = any(reply.start is not None for reply in replies)
    tasks = any(reply.task or reply.dataset for reply in replies)  # a question alone is of none
    for reply in replies:
        if reply.error is None:
            said = reply.answer if reply.answer is not None else f"no label in: {reply.text}"
            when = (words.when(reply.start, reply.end),) if windows else ()
            about = (reply.task or reply.dataset,) if tasks else ()
            rows.append((reply.file, *when, *about, said, words.likeliest(reply.probs)))
    if rows:
        head = ("file", *(("when",) if windows else ()), *(("task",) if tasks else ()), "answer", "probabilities")
        yield Table(title="", head=head, rows=rows, align="l")
        yield f"A model's guess about how people seem. {CARE}"


def _csv(replies: list[Reply]) -> str:
    from hba.storage import to_csv

    rows = []
    for reply in replies:
        share = (reply.probs or {}).get(reply.answer or "")
        kept = [reply.file, reply.task, reply.dataset, reply.answer]
        words = [reply.text, reply.error]
        when = [reply.start, reply.end, reply.transcript]
        rows.append([*kept, "" if share is None else f"{share:.6f}", *words, *when])
    head = ["file", "task", "dataset", "answer", "probability", "text", "error", "start", "end", "transcript"]
    return to_csv(head, rows)
