"""`hba export inspect`: the atlas as Inspect tasks, one a behavioural task of the taxonomy.

The file that is written calls `build_task` of this module, which imports Inspect when it is called, in Inspect's own
environment. Prompts, answers and metrics are those of hba. A task that needs a judge is scored by exact match there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hba.errors import InputError
from hba.evaluate.answers import same_answer
from hba.evaluate.results import was_cut
from hba.export.documents import invalid_share, read_answer, task_metric, task_score, taxonomy_of
from hba.export.rows import write_documents
from hba.storage import atomic_write

FORMATS = {"audio": ("wav", "mp3"), "video": ("mp4", "mpeg", "mov")}
_HEAD = '''"""Written by `hba export inspect`: run `inspect eval hba_tasks.py --model MODEL` in this folder."""

from pathlib import Path

from inspect_ai import Task, task

from hba.export.inspect_ai import build_task

HERE = Path(__file__).parent
'''
_TASK = '''

@task
def hba_{lower}() -> Task:
    """{name}."""
    return build_task(HERE, "{key}")
'''


def export_inspect(place: str, split: str, out: Path) -> dict[str, int]:
    """Write rows and hba_tasks.py into `out`; return the rows of every task.

    Raises InputError as `rows.write_documents` does, and for media in a format that Inspect does not take.
    """
    counts = write_documents(place, split, out)
    taxonomy = taxonomy_of(str(out.resolve()))
    for key in counts:
        for line in (out / "rows" / f"{key}.jsonl").read_text(encoding="utf-8").splitlines():
            _check_formats(json.loads(line))
    with atomic_write(out / "hba_tasks.py") as handle:
        handle.write(_HEAD)
        for key in counts:
            handle.write(_TASK.format(lower=key.lower(), key=key, name=taxonomy.tasks[key].name or key))
    return counts


def _check_formats(document: Mapping[str, Any]) -> None:
    for part in document["parts"]:
        known = FORMATS.get(part["type"])
        if known and Path(part["path"]).suffix.lstrip(".").lower() not in known:
            what = f"Inspect takes {part['type']} as {', '.join(known)}, not {Path(part['path']).name}"
            raise InputError(what, where=document["id"], fix="Re-encode the file.")


def build_task(folder: Path, key: str) -> Any:
    """The Inspect task of one behavioural task of an export."""
    from inspect_ai import Task
    from inspect_ai.dataset import MemoryDataset, Sample
    from inspect_ai.model import ChatMessageUser

    lines = (folder / "rows" / f"{key}.jsonl").read_text(encoding="utf-8").splitlines()
    documents = [json.loads(line) for line in lines]
    samples = [
        Sample(
            id=document["id"],
            input=[ChatMessageUser(id=document["id"], content=[_content(part) for part in document["parts"]])],
            target=document["target"],
            metadata={name: document[name] for name in ("dataset", "target", "task", "taxonomy")},
        )
        for document in documents
    ]
    return Task(dataset=MemoryDataset(samples, name=f"hba_{key.lower()}"), scorer=_scorer(key, folder))


def _content(part: Mapping[str, str]) -> Any:
    from inspect_ai.model import ContentAudio, ContentImage, ContentText, ContentVideo

    if part["type"] == "text":
        return ContentText(text=part["text"])
    if part["type"] == "image":
        return ContentImage(image=part["path"])
    kind: Any = ContentAudio if part["type"] == "audio" else ContentVideo
    return kind(**{part["type"]: part["path"], "format": Path(part["path"]).suffix.lstrip(".").lower()})


def _scorer(key: str, folder: Path) -> Any:
    """A scorer that marks each row right or wrong, with the task's own metric and the share of invalid answers."""
    from inspect_ai.scorer import Score, scorer

    async def score(state: Any, target: Any) -> Any:
        row = read_answer(state.metadata, state.output.completion, cut=was_cut(state.output.stop_reason))
        right = row["answer"] is not None and same_answer(row["answer"], row["target"])
        return Score(value=float(right), answer=row["answer"] or state.output.completion, metadata=row)

    metrics = [_metric(task_metric(taxonomy_of(str(folder)), key), task_score), _metric("invalid", invalid_share)]

    def hba() -> Any:
        return score

    return scorer(metrics=metrics, name="hba")(hba)()


def _metric(name: str, function: Callable[[Sequence[Mapping[str, Any]]], float]) -> Any:
    """An Inspect metric over the rows that `_scorer` leaves in the scores' metadata."""
    from inspect_ai.scorer import SampleScore, metric

    def compute(scores: Any) -> float:
        return function([each.score.metadata for each in scores])

    # Inspect tells the two forms of a metric apart by this annotation, at run time.
    compute.__annotations__ = {"scores": list[SampleScore], "return": float}
    return metric(name=name)(lambda: compute)()
