"""`hba ask`: from a clip, a sound, a picture, a text, or a folder of them, to an answer."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hba.cli.options import BaseUrl, JsonFlag, answer, beside, configured, counted, served
from hba.errors import InputError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hba.evaluate.ask import Reply

ASK_EXAMPLE = "Example: hba ask runs/demo/sft clip.mp4"
SHOWN = 3  # labels whose probability a table shows


def ask_command(
    model: Annotated[str, typer.Argument(help="Run folder, checkpoint, Hugging Face model, or name of a remote one.")],
    files: Annotated[list[Path], typer.Argument(help="Clips, sounds, pictures, texts, or folders of them.")],
    task: Annotated[str | None, typer.Option(help="Task keys such as EMO,SEN; by default all that heads know.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Dataset keys whose labels are offered, such as cremad.")] = None,
    question: Annotated[str | None, typer.Option(help="Ask this, in place of the task's own question.")] = None,
    transcript: Annotated[str | None, typer.Option(help="What is said in the file.")] = None,
    backend: Annotated[str | None, typer.Option(help="How the model answers, as in hba predict.")] = None,
    base_url: BaseUrl = None,
    key: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A config value; give it again for more.")
    ] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Print the answers as CSV.")] = False,
    json: JsonFlag = False,
) -> None:
    """Ask a model about files of your own. A file that cannot be read is named, and the others go on."""
    if csv and json:
        raise InputError("--csv and --json exclude each other", where="hba ask", fix="Give one of them.")
    from hba.evaluate.backends.interface import require_backend
    from hba.evaluate.config import PredictConfig

    require_backend(model, backend)
    settings = configured(PredictConfig, None, [*served(base_url), *(key or [])])
    from hba.evaluate.ask import ask

    with counted("answers") as told:
        replies = ask(
            model,
            files,
            tasks=_names(task),
            datasets=_names(dataset),
            question=question,
            transcript=transcript,
            backend=backend,
            config=settings,
            progress=told,
        )
    if csv:
        sys.stdout.write(_csv(replies))
    else:
        answer({"answers": [asdict(reply) for reply in replies]}, lambda: _shown(replies), as_json=json)
    failed = {reply.file: reply.error for reply in replies if reply.error is not None}
    for file, reason in failed.items():
        beside(f"error: {file}: {reason}")
    if failed:
        raise typer.Exit(2)


def _names(listed: str | None) -> list[str] | None:
    return None if listed is None else [name.strip() for name in listed.split(",") if name.strip()]


def _shown(replies: list[Reply]) -> Iterator[RenderableType]:
    from hba.report.tables import Table
    from hba.taxonomy import CARE

    rows = []
    for reply in replies:
        if reply.error is None:
            said = reply.answer if reply.answer is not None else f"no label in: {reply.text}"
            rows.append((reply.file, reply.task or reply.dataset or "", said, _likeliest(reply)))
    if rows:
        yield Table(title="", head=("file", "task", "answer", "probabilities"), rows=rows, align="l")
        yield f"A model's guess about how people seem. {CARE}"


def _likeliest(reply: Reply) -> str:
    probs = sorted((reply.probs or {}).items(), key=lambda pair: -pair[1])
    return ", ".join(f"{label} {share:.2f}" for label, share in probs[:SHOWN])


def _csv(replies: list[Reply]) -> str:
    from hba.storage import to_csv

    rows = []
    for reply in replies:
        share = (reply.probs or {}).get(reply.answer or "")
        kept = [reply.file, reply.task, reply.dataset, reply.answer]
        rows.append([*kept, "" if share is None else f"{share:.6f}", reply.text, reply.error])
    return to_csv(["file", "task", "dataset", "answer", "probability", "text", "error"], rows)
