"""How far a judge agrees with people or with another judge (accuracy, Cohen's kappa), and what is had without one.

kappa = (p_o - p_e) / (1 - p_e), with p_o the share of equal verdicts and p_e the share expected if both gave theirs
independently at their own rates (Cohen 1960). Intervals are 95 % percentiles of a bootstrap over the items; a resample
in which kappa is undefined (both gave one verdict throughout) is left out. Only items that both have judged are
compared; the others are counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hba.embedding import MINILM, Embedder
from hba.errors import InputError
from hba.evaluate.judge.items import FILE, Item, read_judgements
from hba.evaluate.judge.run import free_form
from hba.evaluate.metrics import Floats
from hba.evaluate.runs import open_run
from hba.evaluate.statistics import interval, listed, mean_interval, variance
from hba.storage import read_jsonl, write_json
from hba.taxonomy import BUILTIN

CANARIES = Path(__file__).with_name("canaries.jsonl")
SHOWN = 20


def kappa(both: int, first: int, second: int, neither: int) -> float | None:
    """Cohen's kappa of two raters from the counts: both said yes, only the first, only the second, neither.

    None if it is undefined (no items, or both raters gave one and the same verdict throughout).
    """
    value = float(_kappas(np.array([[both, first, second, neither]], float))[0])
    return None if np.isnan(value) else value


def agreement(
    judged: Mapping[str, bool | None], labelled: Mapping[str, bool | None], *, resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """What `judged` and `labelled` agree on, by id.

    {"n", "n_unjudged": items of `labelled` without a verdict on either side, "n_agree", "accuracy", "accuracy_ci95",
    "kappa", "kappa_ci95", "true_positive", "false_positive", "false_negative", "true_negative", "disagreements": ids}.
    A positive is a verdict "correct" of `judged`.
    """
    pairs = [(key, judged.get(key), label) for key, label in labelled.items()]
    known = [(key, bool(a), bool(b)) for key, a, b in pairs if a is not None and b is not None]
    cells = ((True, True), (True, False), (False, True), (False, False))
    counts_4 = np.array([sum((a, b) == cell for _, a, b in known) for cell in cells])
    found: dict[str, Any] = {"n": len(known), "n_unjudged": len(pairs) - len(known)}
    names = ("true_positive", "false_positive", "false_negative", "true_negative")
    found |= dict(zip(names, map(int, counts_4), strict=True))
    found |= {"n_agree": int(counts_4[0] + counts_4[3]), "accuracy": None, "accuracy_ci95": None}
    found |= {"kappa": kappa(*map(int, counts_4)), "kappa_ci95": None}
    if known:
        draws_R4 = np.random.default_rng(seed).multinomial(len(known), counts_4 / len(known), size=resamples)
        found["accuracy"] = found["n_agree"] / len(known)
        for name, values_R in (
            ("accuracy", (draws_R4[:, 0] + draws_R4[:, 3]) / len(known)),
            ("kappa", _kappas(draws_R4.astype(float))),
        ):
            found[f"{name}_ci95"] = listed(interval(values_R, [(variance(values_R), len(known))]))
    return found | {"disagreements": [key for key, a, b in known if a is not b]}


def _kappas(counts_R4: Floats) -> Floats:
    both, first, second, neither = counts_R4.T
    total = counts_R4.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        observed = (both + neither) / total
        yes, yes_other = (both + first) / total, (both + second) / total
        expected = yes * yes_other + (1 - yes) * (1 - yes_other)
        values: Floats = np.where(expected < 1, (observed - expected) / (1 - expected), np.nan)
    return values


def read_labels(path: Path) -> dict[str, bool | None]:
    """{id: correct} of a file of labels or of judgements; `correct` null is an item without a label.

    Raises InputError naming file, line and field.
    """
    if path.name == FILE:
        return {key: judgement.correct for key, judgement in read_judgements(path).items()}
    found: dict[str, bool | None] = {}
    for line in read_jsonl(path):
        where = f"{path}:{line.number}"
        key, correct = _text(line.record, "id", where), line.record.get("correct")
        if not isinstance(correct, bool) and not ("correct" in line.record and correct is None):
            raise InputError("expected true, false or null", where=f"{where}, correct", fix="Write the label.")
        if key in found:
            raise InputError(f"id {key!r} occurs twice", where=f"{where}, id", fix="Keep one line per item.")
        found[key] = correct
    if not found:
        raise InputError("no label", where=str(path), fix='Write lines such as {"id": "a", "correct": true}.')
    return found


def read_items(path: Path) -> list[Item] | None:
    """The items that a file of labels carries with it (dataset, question, reference, answer); None if it has none.

    Raises InputError naming file, line and field if only some lines have them.
    """
    lines = list(read_jsonl(path))
    if path.name == FILE or not any("answer" in line.record for line in lines):
        return None
    items = []
    for line in lines:
        where = f"{path}:{line.number}"
        texts = {name: _text(line.record, name, where) for name in ("id", "dataset", "question", "reference", "answer")}
        known = BUILTIN.datasets.get(texts["dataset"])
        items.append(Item(task=known.task if known else None, **texts))
    return items


def _text(record: Mapping[str, Any], name: str, where: str) -> str:
    value = record.get(name)
    if not isinstance(value, str) or not value:
        raise InputError(f"expected a text, found {value!r}", where=f"{where}, {name}", fix="Write one.")
    return value


# The offline fallback: how near answers are to their references by sentence embedding. Not judge accuracy.
#
# A cosine knows nothing of the question, of negation or of who did what: "she is happy" and "she is not happy" are
# near. The figure has a name of its own (embedding_similarity), enters no task score, and is comparable with nothing
# but itself under the same encoder. Rows without an answer count with similarity 0.


METRIC = "embedding_similarity"
SIMILARITY_FILE = "embedding_similarity.json"
NOTE = "not comparable with judge accuracy: cosines of sentence embeddings, blind to question, negation and roles"
RESAMPLES = 2000


def judge_offline(run: Path, *, out: Path | None = None) -> dict[str, Any]:
    """Compare the free-form answers of a run with their references; writes embedding_similarity.json and returns it.

    {"metric", "note", "encoder", "datasets": {key: {"n", "n_empty", "embedding_similarity", "ci95"}}, "rows": {id:
    cosine}}, with a bootstrap interval over the rows.
    Raises InputError for a run without free-form answers and for an encoder that cannot be had.
    """
    predictions = free_form(open_run(run))
    said = [p for p in predictions if p.spoken]
    cosines = Embedder(MINILM).similarity([p.spoken or "" for p in said], [p.truth for p in said])
    rows = dict.fromkeys((p.id for p in predictions), 0.0)
    rows |= {p.id: float(cosine) for p, cosine in zip(said, cosines, strict=True)}
    datasets = {}
    for key in dict.fromkeys(p.dataset for p in predictions):
        values_M = np.array([rows[p.id] for p in predictions if p.dataset == key])
        datasets[key] = {
            "n": len(values_M),
            "n_empty": sum(p.dataset == key and not p.spoken for p in predictions),
            METRIC: float(values_M.mean()),
            "ci95": listed(mean_interval(values_M, resamples=RESAMPLES, seed=0)),
        }
    found = {"metric": METRIC, "note": NOTE, "encoder": MINILM, "datasets": datasets, "rows": rows}
    write_json((out or run) / SIMILARITY_FILE, found)
    return found
