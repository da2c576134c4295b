"""`hba export inspect` and `lmms-eval`: the atlas as tasks of other harnesses, one a behavioural task of the taxonomy.

The file that is written calls `build_task` of this module, which imports Inspect when it is called, in Inspect's own
environment. Prompts, answers and metrics are those of hba. A task that needs a judge is scored by exact match there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hba.errors import InputError
from hba.evaluate.answers import same_answer
from hba.evaluate.predictions import was_cut
from hba.export.rows import invalid_share, read_answer, task_metric, task_score, taxonomy_of, write_documents
from hba.storage import atomic_write

FORMATS = {"audio": ("wav", "mp3"), "video": ("mp4", "mpeg", "mov")}
_HEAD = '''"""Written by `hba export inspect`: run `inspect eval hba_tasks.py --model MODEL` in this folder."""

from pathlib import Path

from inspect_ai import Task, task

from hba.export.harnesses import build_task

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


# `hba export lmms-eval`: the atlas as a group of lmms-eval tasks, one a behavioural task of the taxonomy.
#
# The folder is given to lmms-eval with --include_path. Its utils.py calls this module, which imports nothing of
# lmms-eval: prompts, answers and metrics are those of hba. A task that needs a judge is scored by exact match there.


GROUP = "hba"
INVALID = "invalid"
_UTILS = '''"""Written by `hba export lmms-eval`. Answers are read and scored by hba itself."""

from hba.export.harnesses import (
    aggregate_invalid,
    aggregate_score,
    doc_to_messages,
    doc_to_target,
    doc_to_text,
    doc_to_visual,
    process_results,
)
'''


class _Function(str):
    """A reference that lmms-eval resolves in utils.py."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(_Function, lambda dumper, name: dumper.represent_scalar("!function", f"utils.{name}"))


def export_lmms_eval(place: str, split: str, out: Path, *, max_new_tokens: int = 512) -> dict[str, int]:
    """Write rows, utils.py, a yaml a task and that of the group into `out`; return the rows of every task.

    Raises InputError as `rows.write_documents` does.
    """
    counts = write_documents(place, split, out)
    taxonomy = taxonomy_of(str(out.resolve()))
    for key in counts:
        config = _task(key, task_metric(taxonomy, key), out.resolve() / "rows" / f"{key}.jsonl", max_new_tokens)
        _write(out / f"{_name(key)}.yaml", config)
    _write(out / f"{GROUP}.yaml", {"group": GROUP, "task": [_name(key) for key in counts]})
    with atomic_write(out / "utils.py") as handle:
        handle.write(_UTILS)
    return counts


def _name(task: str) -> str:
    return f"{GROUP}_{task.lower()}"


def _task(key: str, metric: str, rows: Path, max_new_tokens: int) -> dict[str, Any]:
    functions = {name: _Function(name) for name in ("doc_to_visual", "doc_to_text", "doc_to_messages", "doc_to_target")}
    metrics = [(metric, "aggregate_score", True), (INVALID, "aggregate_invalid", False)]
    return {
        "task": _name(key),
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "output_type": "generate_until",
        **functions,
        "process_results": _Function("process_results"),
        "generation_kwargs": {"max_new_tokens": max_new_tokens, "do_sample": False, "temperature": 0},
        "metric_list": [
            {"metric": name, "aggregation": _Function(function), "higher_is_better": higher}
            for name, function, higher in metrics
        ],
        "metadata": {"version": 1.0},
    }


def _write(path: Path, config: Mapping[str, Any]) -> None:
    with atomic_write(path) as handle:
        yaml.dump(dict(config), handle, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def doc_to_messages(document: Mapping[str, Any], lmms_eval_specific_kwargs: Any = None) -> list[dict[str, Any]]:
    """The prompt as chat messages: text and media in the order of the row."""
    content = [
        {"type": "text", "text": part["text"]}
        if part["type"] == "text"
        else {"type": part["type"], "url": _loaded(part)}
        for part in document["parts"]
    ]
    return [{"role": "user", "content": content}]


def doc_to_visual(document: Mapping[str, Any]) -> list[Any]:
    """The media, for models that take them beside the text."""
    return [_loaded(part) for part in document["parts"] if part["type"] != "text"]


def doc_to_text(document: Mapping[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    """The text of the prompt."""
    return "".join(part["text"] for part in document["parts"] if part["type"] == "text")


def doc_to_target(document: Mapping[str, Any]) -> str:
    """The true label, or the free-form answer."""
    return str(document["target"])


def process_results(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """What the aggregations get of one row."""
    row = read_answer(document, results[0])
    return {task_metric(taxonomy_of(document["taxonomy"]), document["task"]): row, INVALID: row}


def aggregate_score(rows: Sequence[Mapping[str, Any]]) -> float:
    """The task's score; see `rows.task_score`."""
    return task_score(rows)


def aggregate_invalid(rows: Sequence[Mapping[str, Any]]) -> float:
    """The share of invalid answers."""
    return invalid_share(rows)


def _loaded(part: Mapping[str, Any]) -> Any:
    """What models of lmms-eval take: an image, the samples of a sound with their rate, the path of a clip."""
    if part["type"] == "image":
        from PIL import Image

        return Image.open(part["path"]).convert("RGB")
    if part["type"] == "audio":
        import soundfile

        samples, rate = soundfile.read(part["path"], dtype="float32", always_2d=True)
        return {"array": samples.mean(1), "sampling_rate": rate}
    return part["path"]
