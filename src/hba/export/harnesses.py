"""`hba export inspect` and `lmms-eval`: the atlas as tasks of other harnesses, one a behavioural task of the taxonomy.

Rows become documents, one JSONL file a task, which hold the parts of their prompt in order (text, image, video, audio),
so that no harness has a prompt of its own. Refused: an atlas whose media are no files, and one that is on the hub; such
an atlas is converted first. What is written calls this module in the harness' own environment, which needs numpy,
msgspec and PyYAML, neither torch nor a decoder; Inspect is imported when it calls, nothing of lmms-eval ever. Prompts,
answers and metrics are those of hba. A task that needs a judge is scored by exact match there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from hba.atlas import Atlas, Sample, open_atlas
from hba.atlas.rows import Field
from hba.batch.prompt import AS_WRITTEN, Modality, build_messages
from hba.errors import InputError
from hba.evaluate.answers import read, same_answer
from hba.evaluate.metrics import mean_of, score
from hba.evaluate.predictions import was_cut
from hba.storage import atomic_write, read_jsonl, write_data, write_jsonl
from hba.taxonomy import Taxonomy, of_folder, save_beside

FIELD_OF: dict[Modality, Field] = {"image": "images", "video": "videos", "audio": "audios"}
FIX = "Convert it to files with `hba atlas convert --to jsonl`."


def write_documents(place: str, split: str, out: Path) -> dict[str, int]:
    """Write `out`/rows/TASK.jsonl and the taxonomy; return the number of documents of every task that has rows.

    Raises InputError for an atlas without media files, and for a sample of no task.
    """
    atlas = open_atlas(place, split=split).with_answers()
    by_task: dict[str, list[dict[str, Any]]] = {}
    for document in _documents(atlas, out.resolve()):
        by_task.setdefault(document["task"], []).append(document)
    (out / "rows").mkdir(parents=True, exist_ok=True)
    save_beside(atlas.taxonomy, out)
    found = {key: by_task[key] for key in atlas.taxonomy.tasks if key in by_task}
    for key, documents in found.items():
        write_jsonl(out / "rows" / f"{key}.jsonl", documents)
    return {key: len(documents) for key, documents in found.items()}


def _documents(atlas: Atlas, out: Path) -> Iterator[dict[str, Any]]:
    for sample in atlas:
        task = atlas.taxonomy.dataset(sample.dataset).task
        if task is None:
            fix = "Name the dataset under a task in taxonomy.yaml."
            raise InputError(f"dataset {sample.dataset!r} is of no task", where=sample.where, fix=fix)
        yield {
            "id": sample.id,
            "dataset": sample.dataset,
            "task": task,
            "target": sample.target,
            "parts": list(_parts(sample)),
            "taxonomy": str(out),
        }


def _parts(sample: Sample) -> Iterator[dict[str, str]]:
    counts: dict[Modality, int] = {kind: getattr(sample, field) for kind, field in FIELD_OF.items()}
    messages = build_messages(AS_WRITTEN.question(sample), counts, where=sample.where)
    used = dict.fromkeys(FIELD_OF, 0)
    for item in messages[-1]["content"]:
        kind = item["type"]
        if kind == "text":
            yield {"type": "text", "text": item["text"]}
            continue
        where = sample.place(FIELD_OF[kind])
        source = sample.source.medium(sample.number, FIELD_OF[kind], used[kind], where=where)
        if not isinstance(source, Path):
            raise InputError("the atlas has its media in shards, not in files", where=where, fix=FIX)
        yield {"type": kind, "path": str(source)}
        used[kind] += 1


# --- how such a document is answered and scored, whatever harness asks -----------------------------------------------


JUDGED_METRIC = "exact_match"


@lru_cache(maxsize=8)
def taxonomy_of(folder: str) -> Taxonomy:
    """The taxonomy of an export."""
    return of_folder(folder)


def read_answer(document: Mapping[str, Any], text: str, *, cut: bool = False) -> dict[str, Any]:
    """One scored row: dataset, target, and the label (free-form: the answer) that the model's `text` gives, or None.

    `cut`: it reached a limit of length.
    """
    taxonomy = taxonomy_of(document["taxonomy"])
    free_form = taxonomy.dataset(document["dataset"]).free_form
    prompt = "".join(part.get("text", "") for part in document["parts"]) if "parts" in document else None
    _, answer, label = read(text, document["dataset"], taxonomy, prompt=prompt, cut=cut)
    said = (answer or None) if free_form else label
    return {name: document[name] for name in ("dataset", "target", "task", "taxonomy")} | {"answer": said}


def task_metric(taxonomy: Taxonomy, task: str) -> str:
    """The metric that a harness can compute alone: that of the task, exact match where a judge would be needed."""
    return JUDGED_METRIC if taxonomy.tasks[task].judged else taxonomy.tasks[task].metric


def task_score(rows: Sequence[Mapping[str, Any]]) -> float:
    """The score of the rows of one task by `task_metric`, as `hba score` computes it; NaN where it is not defined."""
    if not rows:
        return float("nan")
    taxonomy = taxonomy_of(rows[0]["taxonomy"])
    answers, targets, datasets = ([row[name] for row in rows] for name in ("answer", "target", "dataset"))
    scored = score(answers, targets, datasets, taxonomy=taxonomy)
    task = rows[0]["task"]
    if taxonomy.tasks[task].judged:
        value = mean_of([entry[JUDGED_METRIC] for entry in scored["datasets"].values()])
    else:
        value = scored["tasks"][task]["score"]
    return float("nan") if value is None else value


def invalid_share(rows: Sequence[Mapping[str, Any]]) -> float:
    """The share of rows whose answer means no label; NaN without rows."""
    return sum(row["answer"] is None for row in rows) / len(rows) if rows else float("nan")


# --- Inspect ----------------------------------------------------------------------------------------------------------


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

    Raises InputError as `write_documents` does, and for media in a format that Inspect does not take.
    """
    counts = write_documents(place, split, out)
    taxonomy = taxonomy_of(str(out.resolve()))
    for key in counts:
        for line in read_jsonl(out / "rows" / f"{key}.jsonl"):
            _check_formats(line.record)
    tasks = (_TASK.format(lower=key.lower(), key=key, name=taxonomy.tasks[key].name or key) for key in counts)
    write_data(out / "hba_tasks.py", "".join([_HEAD, *tasks]))
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

    documents = [line.record for line in read_jsonl(folder / "rows" / f"{key}.jsonl")]
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


# --- lmms-eval: a group of tasks, given with --include_path; its utils.py calls this module --------------------------


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

    Raises InputError as `write_documents` does.
    """
    counts = write_documents(place, split, out)
    taxonomy = taxonomy_of(str(out.resolve()))
    for key in counts:
        config = _task(key, task_metric(taxonomy, key), out.resolve() / "rows" / f"{key}.jsonl", max_new_tokens)
        _write(out / f"{_name(key)}.yaml", config)
    _write(out / f"{GROUP}.yaml", {"group": GROUP, "task": [_name(key) for key in counts]})
    write_data(out / "utils.py", _UTILS)
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


aggregate_score, aggregate_invalid = task_score, invalid_share  # the names that utils.py of an export has


def _loaded(part: Mapping[str, Any]) -> Any:
    """What models of lmms-eval take: an image, the samples of a sound with their rate, the path of a clip."""
    if part["type"] == "image":
        from PIL import Image

        return Image.open(part["path"]).convert("RGB")
    if part["type"] == "audio":
        import soundfile

        from hba.atlas.audio import mean_of_channels

        samples, rate = soundfile.read(part["path"], dtype="float32", always_2d=True)
        return {"array": mean_of_channels(samples.T), "sampling_rate": rate}
    return part["path"]
