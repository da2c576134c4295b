"""What every harness needs of the atlas: its rows as documents, one JSONL file a task, media by their paths.

A document holds the parts of its prompt in order (text, image, video, audio), so that no harness has a prompt of its
own. Refused: an atlas whose media are no files, and one that is on the hub; such an atlas is converted first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hba.atlas import Atlas, Sample, open_atlas
from hba.atlas.prompt import AS_WRITTEN, Modality, build_messages
from hba.atlas.sample import Field
from hba.errors import InputError
from hba.storage import atomic_write
from hba.taxonomy import save_beside

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
