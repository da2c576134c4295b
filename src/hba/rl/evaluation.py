"""How good a policy is on held-out rows: sampled responses and a greedy one to each, the same draws every time.

One sampled response says little of what a policy does with a row on average: a record has the mean over `draws` of
them. Records lie in `evaluation_log`, so that two evaluations can be compared prompt by prompt. Reward parts are those
of training; `right` is the evaluation's own judgement of the answer (the canonical label, or the normalised exact match
of a free-form answer), whatever the reward is; `answer` is the greedy one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hba.atlas import Atlas
from hba.atlas.rows import Sample
from hba.batch.config import LoaderConfig
from hba.batch.encode import Encoder
from hba.batch.loader import load_batches
from hba.errors import InputError
from hba.evaluate.answers import read, same_answer, without_latex
from hba.evaluate.backends.interface import evaluation_plan
from hba.model.omni import OmniSapiens
from hba.rl.config import RolloutConfig
from hba.rl.evaluation_log import WAYS, mean_parts
from hba.rl.rewards import Scorer, well_formed
from hba.rl.rollout import Draws, Place, Prompts, Sampler, texts_of
from hba.run import QuarantineLog
from hba.taxonomy import Taxonomy
from hba.train.ranks import Ranks


def evaluate(
    sampler: Sampler,
    policy: OmniSapiens,
    atlas: Atlas,
    encoder: Encoder,
    scorer: Scorer,
    rollout: RolloutConfig,
    ranks: Ranks,
    quarantine: QuarantineLog,
    *,
    draws: int,
    batch_size: int,
    seed: int,
) -> list[dict[str, Any]]:
    """One record a row of `atlas`, in the atlas' order, on every rank: its id, task, dataset, target, greedy answer and
    the parts both ways.

    Raises InputError when no row can be read.
    """

    def own_records() -> list[dict[str, Any]]:
        rows = np.arange(len(atlas))[ranks.rank :: ranks.world]
        records: list[dict[str, Any]] = []
        for batch in load_batches(atlas, encoder, evaluation_plan(atlas, rows, batch_size), LoaderConfig(workers=0)):
            quarantine.add_all(batch.quarantined)
            if not len(batch):
                continue
            made: list[dict[str, Any]] = [
                {"id": s.id, "task": s.task, "dataset": s.dataset, "number": s.number, "target": s.target}
                for s in batch.samples
            ]
            prompts = Prompts(batch.to(ranks.device), tuple(Place(0, sample.number) for sample in batch.samples))
            for way in WAYS:
                temperature, count = (rollout.temperature, draws) if way == "sampled" else (0.0, 1)
                wanted = Draws(f"{seed}/evaluation", rollout.max_new_tokens, temperature, count)
                wanted = wanted._replace(size_key="validation_batch_size")
                (drawn,) = sampler.draw([prompts], wanted)
                samples, texts = [sample for sample in batch.samples for _ in range(count)], texts_of(drawn, policy)
                parts = _judged(samples, texts, drawn.lengths, scorer, encoder.taxonomy)
                for i, record in enumerate(made):
                    record[way] = mean_parts(parts[i * count : (i + 1) * count])
            for record, sample, text in zip(made, batch.samples, texts, strict=True):
                record["answer"] = answer_of(sample, text, encoder.taxonomy)
            records += made
        return records

    done = sorted(ranks.collect(own_records), key=lambda record: int(record["number"]))
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


def answer_of(sample: Sample, text: str, taxonomy: Taxonomy) -> str:
    """What the evaluation reads in a response: the canonical label where it finds one, else the text of the answer."""
    _, answer, label = read(text, sample.dataset, taxonomy, prompt=sample.problem)
    return answer if label is None else label


def is_right(sample: Sample, text: str, taxonomy: Taxonomy) -> bool:
    """Whether the evaluation would call the response right."""
    _, answer, label = read(text, sample.dataset, taxonomy, prompt=sample.problem)
    if sample.label is not None:
        return label == sample.label
    return same_answer(without_latex(answer), sample.target)
