"""What every harness needs of the atlas: its rows as documents, one JSONL file a task, and how these are scored.

A document holds the parts of its prompt in order (text, image, video, audio), so that no harness has a prompt of its
own. Refused: an atlas whose media are no files, and one that is on the hub; such an atlas is converted first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from hba.atlas import Atlas, Sample, open_atlas
from hba.atlas.rows import Field
from hba.batch.prompt import AS_WRITTEN, Modality, build_messages
from hba.errors import InputError
from hba.evaluate.answers import read
from hba.evaluate.metrics import mean_of, score
from hba.storage import atomic_write
from hba.taxonomy import Taxonomy, of_folder, save_beside

FIELD_OF: dict[Modality, Field] = {"image": "images", "video": "videos", "audio": "audios"}
FIX = "Convert it to files with `hba atlas convert --to jsonl`."


def write_documents(place: str, split: str, out: Path) -> dict[str, int]:
    """Write `out`/rows/TASK.jsonl and the taxonomy; return the number of documents of every task that has rows.

    Raises InputError for an atlas without media files, and for a sample of no task.
    """
    atlas = open_atlas(place, split=split)
    by_task: dict[str, list[dict[str, Any]]] = {}
    for document in _documents(atlas, out.resolve()):
        by_task.setdefault(document["task"], []).append(document)
    (out / "rows").mkdir(parents=True, exist_ok=True)
    save_beside(atlas.taxonomy, out)
    found = {key: by_task[key] for key in atlas.taxonomy.tasks if key in by_task}
    for key, documents in found.items():
        with atomic_write(out / "rows" / f"{key}.jsonl") as handle:
            handle.writelines(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
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


# How such a document is answered and scored, whatever harness asks.
#
# Needs numpy, msgspec and PyYAML, neither torch nor a decoder, so that it runs in the harness' own environment.


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
