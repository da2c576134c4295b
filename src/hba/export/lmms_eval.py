"""`hba export lmms-eval`: the atlas as a group of lmms-eval tasks, one a behavioural task of the taxonomy.

The folder is given to lmms-eval with --include_path. Its utils.py calls this module, which imports nothing of
lmms-eval: prompts, answers and metrics are those of hba. A task that needs a judge is scored by exact match there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hba.export.documents import invalid_share, read_answer, task_metric, task_score, taxonomy_of
from hba.export.rows import write_documents
from hba.storage import atomic_write

GROUP = "hba"
INVALID = "invalid"
_UTILS = '''"""Written by `hba export lmms-eval`. Answers are read and scored by hba itself."""

from hba.export.lmms_eval import (
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
    """The task's score; see `documents.task_score`."""
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
