"""From an atlas to predictions.jsonl, through any backend.

A backend (`hba.evaluate.backends`) answers rows in its own order; this module owns the rest: which rows, resume by
sample id, files, quarantine. A prediction is appended as soon as it is there, so that a killed run goes on where it
stopped. A sample whose medium cannot be read gets no prediction; it is quarantined and counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from hba.atlas import Atlas, open_atlas
from hba.atlas.batch import EncodeConfig
from hba.atlas.sample import Quarantined
from hba.atlas.sampler import Indices
from hba.errors import InputError
from hba.evaluate.backends import detect, open_backend
from hba.evaluate.backends.interface import Answered, Backend
from hba.evaluate.config import Opening, PredictConfig
from hba.evaluate.groups import sample_groups
from hba.evaluate.predictions import Prediction, PredictionLog
from hba.model import checkpoint
from hba.process import data_record, prepare_process
from hba.quarantine import QuarantineLog
from hba.run import locked_folder
from hba.storage import read_json, write_json
from hba.taxonomy import save_beside

Predicted: TypeAlias = Prediction | Quarantined


def answerable(atlas: Atlas, backend: Backend) -> Indices:
    """Row numbers that `backend` can answer."""
    labelled_N = atlas.columns.label_codes >= 0
    return np.flatnonzero(labelled_N | backend.free_form)


def predict(atlas: Atlas, rows: Indices, backend: Backend, done: Set[str] = frozenset()) -> Iterator[Predicted]:
    """Yield the prediction of each of `rows` but for the samples whose ids are `done`, in the backend's order.

    A sample whose media cannot be read comes as its quarantine record.
    """
    for result in backend.answers(atlas, rows, done):
        yield result if isinstance(result, Quarantined) else _prediction(result)


def _prediction(answered: Answered) -> Prediction:
    sample, output = answered
    return Prediction(
        id=sample.id,
        dataset=sample.dataset,
        task=sample.task,
        split=sample.split,
        target=sample.target,
        output=output.text,
        answer=output.answer,
        label=output.label,
        latency_s=None if output.seconds is None else round(output.seconds, 4),
        tokens_in=output.tokens_in,
        tokens_out=output.tokens_out,
        error=output.error,
        probs=output.probs,
        modality=sample.modality_signature,
    )


class PredictSummary(NamedTuple):
    """What one call of `predict_run` leaves: all predictions of the run, rows without a head, samples left out."""

    predicted: int
    skipped: int
    quarantined: Sequence[dict[str, Any]]


def predict_run(
    model: str,
    folder: Path,
    *,
    atlas: str,
    split: str,
    config: PredictConfig,
    progress: Callable[[int, int], None],
    backend: str | None = None,
) -> PredictSummary:
    """Predict a split into `folder` (predictions.jsonl, predict.json, quarantine.jsonl), going on where it stopped.

    `backend` is a name of `hba.evaluate.backends`; None means the one that the model is made for. Raises InputError
    when the backend cannot use the model, and when the folder holds predictions of another model, atlas or split.
    """
    prepare_process(seed=0)
    name = backend or detect(model)
    opened = open_atlas(atlas, split=split)
    encode = config.encode or (checkpoint.encode_config(model) if name == "heads" else None) or EncodeConfig()
    opening = Opening(model=model, place=atlas, atlas=opened, config=config, encode=encode)
    opened_backend = open_backend(name, opening)
    settings = {
        "model": model,
        "backend": name,
        "identity": dict(opened_backend.identity()),
        "split": split,
        "data": data_record(atlas, opened),
        "encode": asdict(encode),
    }
    with locked_folder(folder):
        start_predictions(folder, json.loads(json.dumps(settings)))
        save_beside(opened.taxonomy, folder)
        return _append_predictions(folder, opened, opened_backend, progress)


def _append_predictions(
    folder: Path, atlas: Atlas, backend: Backend, progress: Callable[[int, int], None]
) -> PredictSummary:
    with PredictionLog(folder / "predictions.jsonl", atlas.taxonomy) as log, QuarantineLog(folder) as quarantine:
        rows, done = answerable(atlas, backend), log.done_ids()
        groups = sample_groups(atlas)
        for finished, step in enumerate(predict(atlas, rows, backend, done), len(done) + 1):
            if isinstance(step, Quarantined):
                quarantine.add(step)
            else:
                log.append(replace(step, group=groups.get(step.id)))
            progress(finished, len(rows))
        left_out = [r for r in quarantine.records(atlas.split) if r["id"] not in log.done_ids()]
        return PredictSummary(len(log.done_ids()), len(atlas) - len(rows), left_out)


def start_predictions(folder: Path, settings: dict[str, Any]) -> None:
    """Write predict.json, or check that it says the same. Raises InputError naming what differs.

    Where model and atlas lie may differ, their content may not.
    """
    path = folder / "predict.json"
    if path.is_file():
        before, now = _identity(read_json(path)), _identity(settings)
        differing = [key for key in {**now, **before} if before.get(key) != now.get(key)]
        if differing:
            fix = "Choose another --run, or remove predictions.jsonl and predict.json."
            raise InputError(f"holds predictions with another {', '.join(differing)}", where=str(folder), fix=fix)
    else:
        write_json(path, settings)


def _identity(settings: dict[str, Any]) -> dict[str, Any]:
    """What decides the predictions, under the names that a message uses."""
    kept = {key: settings.get(key) for key in ("backend", "split", "encode")}
    data = settings.get("data") or {}
    return {**(settings.get("identity") or {}), **kept, "data": data.get("fingerprint")}
