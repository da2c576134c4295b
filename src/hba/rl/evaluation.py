"""How good a policy is on held-out rows: sampled responses and a greedy one to each, the same draws every time.

One sampled response says little of what a policy does with a row on average: a record has the mean over `draws` of
them. Records lie in `evaluation_log`, so that two evaluations can be compared prompt by prompt. Reward parts are those
of training; `right` is the evaluation's own judgement of the answer (the canonical label, or the normalised exact match
of a free-form answer), whatever the reward is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from hba.atlas import Atlas
from hba.atlas.batch import SampleEncoder
from hba.atlas.config import LoaderConfig
from hba.atlas.loader import load_batches
from hba.atlas.sample import Sample
from hba.errors import InputError
from hba.evaluate.answers import read, same_answer, without_latex
from hba.evaluate.backends.batches import evaluation_plan
from hba.model.chat import ChatModel
from hba.quarantine import QuarantineLog
from hba.rl.config import RolloutConfig
from hba.rl.evaluation_log import WAYS, mean_parts
from hba.rl.rewards import well_formed
from hba.rl.sampler import Draws, Sampler, texts_of
from hba.rl.scoring import Scorer
from hba.taxonomy import Taxonomy


def evaluate(
    sampler: Sampler,
    policy: ChatModel,
    atlas: Atlas,
    encoder: SampleEncoder,
    scorer: Scorer,
    rollout: RolloutConfig,
    accelerator: Accelerator,
    quarantine: QuarantineLog,
    *,
    draws: int,
    batch_size: int,
    seed: int,
) -> list[dict[str, Any]]:
    """One record a row of `atlas`, in the atlas' order, on every rank: its id, task, dataset and the parts both ways.

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
        batch = batch.to(accelerator.device)
        for way in WAYS:
            temperature, count = (rollout.temperature, draws) if way == "sampled" else (0.0, 1)
            wanted = Draws(f"{seed}/evaluation", rollout.max_new_tokens, temperature, count)
            (drawn,) = sampler.draw([batch], wanted)
            samples = [sample for sample in batch.samples for _ in range(count)]
            parts = _judged(samples, texts_of(drawn, policy), drawn.lengths, scorer, encoder.taxonomy)
            for i, record in enumerate(made):
                record[way] = mean_parts(parts[i * count : (i + 1) * count])
        records += made
    done: list[dict[str, Any]] = sorted(gather_object(records), key=lambda record: record["number"])
    if not done:
        fix = "Repair the media named in quarantine.jsonl."
        raise InputError(f"no sample of split {atlas.split!r} can be read", where=str(atlas.root), fix=fix)
    return done


def _judged(
    samples: Sequence[Sample], texts: Sequence[str], lengths: Sequence[int], scorer: Scorer, taxonomy: Taxonomy
) -> list[dict[str, float]]:
    """Of each response the parts of its reward, whether it is right and well formed, and its tokens."""
    scores = scorer(texts, samples, lengths)
    return [
        {**parts, "right": float(is_right(s, text, taxonomy)), "format": float(well_formed(text)), "tokens": length}
        for s, text, length, parts in zip(samples, texts, lengths, scores, strict=True)
    ]


def is_right(sample: Sample, text: str, taxonomy: Taxonomy) -> bool:
    """Whether the evaluation would call the response right."""
    _, answer, label = read(text, sample.dataset, taxonomy, prompt=sample.problem)
    if sample.label is not None:
        return label == sample.label
    return same_answer(without_latex(answer), sample.target)
