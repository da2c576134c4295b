"""The offline fallback: how near answers are to their references by sentence embedding. Not judge accuracy.

A cosine knows nothing of the question, of negation or of who did what: "she is happy" and "she is not happy" are near.
The figure has a name of its own (embedding_similarity), enters no task score, and is comparable with nothing but itself
under the same encoder. Rows without an answer count with similarity 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hba.embedding import MINILM, Embedder
from hba.evaluate.judge.items import answered, free_form
from hba.evaluate.statistics import listed, mean_interval
from hba.storage import write_json

METRIC = "embedding_similarity"
FILE = "embedding_similarity.json"
NOTE = "not comparable with judge accuracy: cosines of sentence embeddings, blind to question, negation and roles"
RESAMPLES = 2000


def judge_offline(run: Path, *, out: Path | None = None, embedder: str = MINILM, seed: int = 0) -> dict[str, Any]:
    """Compare the free-form answers of a run with their references; writes embedding_similarity.json and returns it.

    {"metric", "note", "encoder", "datasets": {key: {"n", "n_empty", "embedding_similarity", "ci95"}}, "rows": {id:
    cosine}}, with a bootstrap interval over the rows.
    Raises InputError for a run without free-form answers and for an encoder that cannot be had.
    """
    predictions = free_form(run)
    said = [p for p in predictions if answered(p)]
    cosines = Embedder(embedder).similarity([p.answer or "" for p in said], [p.target for p in said])
    rows = dict.fromkeys((p.id for p in predictions), 0.0)
    rows |= {p.id: float(cosine) for p, cosine in zip(said, cosines, strict=True)}
    datasets = {}
    for key in dict.fromkeys(p.dataset for p in predictions):
        values_M = np.array([rows[p.id] for p in predictions if p.dataset == key])
        datasets[key] = {
            "n": len(values_M),
            "n_empty": sum(p.dataset == key and not answered(p) for p in predictions),
            METRIC: float(values_M.mean()),
            "ci95": listed(mean_interval(values_M, resamples=RESAMPLES, seed=seed)),
        }
    found = {"metric": METRIC, "note": NOTE, "encoder": embedder, "datasets": datasets, "rows": rows}
    write_json((out or run) / FILE, found)
    return found
