"""How good a policy is on held-out rows: one sampled and one greedy response to each, the same draws every time.

Each evaluation is a file `evaluations/step_N.jsonl`, a line a row, so that two of them can be compared prompt by
prompt. Reward parts are those of training; `right` is the evaluation's own judgement of the answer (the canonical
label, or the normalised exact match of a free-form answer), whatever the reward is.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from hba.atlas import Atlas
from hba.atlas.batch import SampleEncoder
from hba.atlas.loader import LoaderConfig, load_batches
from hba.atlas.sample import Sample
from hba.errors import InputError
from hba.evaluate.answers import extract, same_answer, to_label, without_latex
from hba.evaluate.backends.batches import evaluation_plan
from hba.model.chat import ChatModel
from hba.model.generate import generate
from hba.quarantine import QuarantineLog
from hba.rl.rewards import well_formed
from hba.rl.rollout import RolloutConfig
from hba.rl.scoring import Scorer
from hba.storage import atomic_write, read_jsonl
from hba.taxonomy import Taxonomy

FOLDER = "evaluations"
WAYS = ("sampled", "greedy")


def evaluate(
    policy: ChatModel,
    atlas: Atlas,
    encoder: SampleEncoder,
    scorer: Scorer,
    rollout: RolloutConfig,
    accelerator: Accelerator,
    quarantine: QuarantineLog,
    *,
    batch_size: int,
    seed: int,
) -> list[dict[str, Any]]:
    """One record a row of `atlas`, in the atlas' order, on every rank: its id, task, dataset and both responses' parts.

    Raises InputError when no row can be read.
    """
    torch.manual_seed(seed + accelerator.process_index)
    rows = np.arange(len(atlas))[accelerator.process_index :: accelerator.num_processes]
    records: list[dict[str, Any]] = []
    for batch in load_batches(atlas, encoder, evaluation_plan(atlas, rows, batch_size), LoaderConfig(workers=0)):
        for refused in batch.quarantined:
            quarantine.add(refused)
        if not len(batch):
            continue
        made = [{"id": s.id, "task": s.task, "dataset": s.dataset, "number": s.number} for s in batch.samples]
        inputs = batch.to(accelerator.device).inputs
        for way in WAYS:
            temperature = rollout.temperature if way == "sampled" else 0.0
            options = {"max_new_tokens": rollout.max_new_tokens, "temperature": temperature}
            said = generate(policy.transformer, policy.processor, inputs, **options)  # type: ignore[arg-type]
            texts, lengths = [each.text for each in said], [each.tokens for each in said]
            scores = scorer(texts, batch.samples, lengths)
            for record, sample, text, length, parts in zip(made, batch.samples, texts, lengths, scores, strict=True):
                right = is_right(sample, text, encoder.taxonomy)
                record[way] = {**parts, "right": float(right), "format": float(well_formed(text)), "tokens": length}
        records += made
    done: list[dict[str, Any]] = sorted(gather_object(records), key=lambda record: record["number"])
    if not done:
        fix = "Repair the media named in quarantine.jsonl."
        raise InputError(f"no sample of split {atlas.split!r} can be read", where=str(atlas.root), fix=fix)
    return done


def is_right(sample: Sample, text: str, taxonomy: Taxonomy) -> bool:
    """Whether the evaluation would call the response right."""
    if sample.label is not None:
        return to_label(sample.dataset, text, taxonomy) == sample.label
    return same_answer(without_latex(extract(text)), sample.target)


def summary(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over the rows: reward, right and format of both ways, and `right` of the greedy responses by task."""
    means: dict[str, list[float]] = defaultdict(list)
    for record in records:
        for way in WAYS:
            for name, part in (("reward", "score"), ("right", "right"), ("format", "format"), ("tokens", "tokens")):
                means[f"{way}_{name}"].append(record[way][part])
        means[f"greedy_right/{record['task']}"].append(record["greedy"]["right"])
    return {name: float(np.mean(values)) for name, values in sorted(means.items())}


def write_evaluation(run: Path, step: int, records: Sequence[dict[str, Any]]) -> None:
    """Keep the records of an evaluation at `step`."""
    with atomic_write(run / FOLDER / f"step_{step}.jsonl") as handle:
        handle.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def read_evaluations(run: Path) -> dict[int, list[dict[str, Any]]]:
    """The records of every evaluation of a run, by step."""
    files = {int(path.stem.removeprefix("step_")): path for path in (run / FOLDER).glob("step_*.jsonl")}
    return {step: [line.record for line in read_jsonl(files[step])] for step in sorted(files)}
