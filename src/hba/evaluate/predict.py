"""From an atlas to predictions.jsonl, through any backend.

A backend turns a batch into outputs; this module owns the rest: order, batching, resume by sample id, quarantine. A
prediction is appended as soon as its batch is done, so that a killed run goes on where it stopped. A sample whose
medium cannot be read gets no prediction; it is quarantined and counted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from pydantic import Field

from hba.atlas import Atlas, open_atlas
from hba.atlas.batch import Batch, EncodeConfig, Encoder
from hba.atlas.loader import LoaderConfig, load_batches
from hba.atlas.sample import Quarantined, Sample
from hba.atlas.sampler import Indices, plan_batches
from hba.config import option
from hba.errors import InputError
from hba.evaluate.predictions import Prediction, PredictionLog
from hba.model import checkpoint
from hba.model.omni import OmniSapiens
from hba.process import data_record, prepare_process
from hba.quarantine import QuarantineLog
from hba.run import locked_folder
from hba.storage import file_sha256, read_json, write_json
from hba.taxonomy import Taxonomy, save_beside


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """How predictions are made. Samples are encoded as in the checkpoint's training unless `encode` is given."""

    batch_size: Annotated[int, Field(ge=1)] = option(16, "samples in a batch")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "of the weights")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = option("sdpa", "attention implementation")
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    encode: EncodeConfig | None = option(None, "how samples become tokens, frames and patches")


class Output(NamedTuple):
    """What a backend says about one sample."""

    output: str  # as the model gave it
    answer: str
    label: str | None
    probs: dict[str, float] | None
    tokens_out: int


class Backend(Protocol):
    """A way to answer batches. `free_form` says whether it can answer rows that have no classes."""

    name: str
    free_form: bool

    def predict(self, batch: Batch) -> list[Output]:
        """One output a sample of the batch, in its order."""
        ...


class HeadsBackend:
    """OmniSapiens' classification heads: the most probable label of the row's domain, with all probabilities."""

    name = "heads"
    free_form = False

    def __init__(self, model: OmniSapiens, taxonomy: Taxonomy) -> None:
        self.model, self.taxonomy = model, taxonomy

    def predict(self, batch: Batch) -> list[Output]:
        """Softmax over the domain's classes."""
        probabilities_BC = torch.softmax(self.model.classify(batch.to(self.model.device)), dim=-1).cpu().numpy()
        outputs = []
        for row_C, name in zip(probabilities_BC, batch.domain_names, strict=True):
            domain = self.taxonomy.domains[str(name)]
            probs = {label: float(row_C[i]) for label, i in zip(domain.labels, domain.indices, strict=True)}
            best = max(probs, key=lambda label: probs[label])
            outputs.append(Output(best, best, best, probs, 0))
        return outputs


class Predicted(NamedTuple):
    """One finished batch: predictions, and the samples that had to be left out."""

    predictions: list[Prediction]
    quarantined: Sequence[Quarantined]


def evaluation_plan(atlas: Atlas, rows: Indices, batch_size: int) -> list[Indices]:
    """Batches of the given rows, grouped by signature and length, in a fixed order."""
    columns = atlas.columns
    lengths_N = atlas.estimated_tokens[rows]
    batches = plan_batches(
        columns.signature_codes[rows], lengths_N, batch_size=batch_size, seed=0, epoch=0, shuffle=False
    )
    return [rows[batch] for batch in batches]


def answerable(atlas: Atlas, backend: Backend) -> Indices:
    """Row numbers that `backend` can answer."""
    labelled_N = atlas.columns.label_codes >= 0
    return np.flatnonzero(labelled_N | backend.free_form)


def predict(
    atlas: Atlas,
    rows: Indices,
    backend: Backend,
    encoder: Encoder,
    *,
    batch_size: int,
    loader: LoaderConfig,
    done: Set[str] = frozenset(),
) -> Iterator[Predicted]:
    """Yield the predictions of `rows`, a batch at a time, but for the samples whose ids are `done`.

    A batch that is done in part is computed whole: its padding, and with it the last bits of every probability, are
    then those of an uninterrupted run.
    """
    plan = evaluation_plan(atlas, rows, batch_size)
    if done:
        plan = [batch for batch in plan if any(atlas[int(row)].id not in done for row in batch)]
    for batch in load_batches(atlas, encoder, plan, loader):
        started = time.perf_counter()
        outputs = backend.predict(batch) if len(batch) else []
        seconds = (time.perf_counter() - started) / max(1, len(batch))
        tokens_B = batch.inputs["attention_mask"].sum(1).tolist() if len(batch) else []
        predictions = [
            _prediction(sample, output, tokens, seconds)
            for sample, output, tokens in zip(batch.samples, outputs, tokens_B, strict=True)
            if sample.id not in done
        ]
        yield Predicted(predictions, batch.quarantined)


def _prediction(sample: Sample, output: Output, tokens_in: int, latency_s: float) -> Prediction:
    return Prediction(
        id=sample.id,
        dataset=sample.dataset,
        task=sample.task,
        split=sample.split,
        target=sample.target,
        output=output.output,
        answer=output.answer,
        label=output.label,
        latency_s=round(latency_s, 4),
        tokens_in=tokens_in,
        tokens_out=output.tokens_out,
        error=None,
        probs=output.probs,
    )


class PredictSummary(NamedTuple):
    """What one call of `predict_run` leaves: all predictions of the run, rows without a head, samples left out."""

    predicted: int
    skipped: int
    quarantined: Sequence[dict[str, Any]]


def predict_run(
    model_name: str,
    folder: Path,
    *,
    atlas: str,
    split: str,
    config: PredictConfig,
    progress: Callable[[int, int], None],
) -> PredictSummary:
    """Predict a split into `folder` (predictions.jsonl, predict.json, quarantine.jsonl), going on where it stopped.

    Raises InputError when the model has no trained heads, and when the folder holds predictions of another model, atlas
    or split.
    """
    prepare_process(seed=0)
    trained = checkpoint.resolve(model_name)
    if trained is None:
        fix = "Give a checkpoint, or the run folder of `hba train sft`."
        raise InputError("a backbone without trained heads: its answers would be random", where=model_name, fix=fix)
    opened = open_atlas(atlas, split=split)
    taxonomy = opened.taxonomy
    model = checkpoint.load(model_name, dtype=config.dtype, attention=config.attention, taxonomy=taxonomy).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    encode = config.encode or checkpoint.encode_config(model_name) or EncodeConfig()
    backend = HeadsBackend(model, taxonomy)
    settings = {
        "model": model_name,
        "checkpoint": checkpoint.describe(model_name),
        "heads_sha256": file_sha256(trained / "heads.safetensors"),
        "backend": backend.name,
        "split": split,
        "data": data_record(atlas, opened),
        "encode": asdict(encode),
    }
    with locked_folder(folder):
        start_predictions(folder, json.loads(json.dumps(settings)))
        save_beside(taxonomy, folder)
        encoder = Encoder(model.processor, encode, taxonomy)
        return _append_predictions(folder, opened, backend, encoder, config, progress)


def _append_predictions(
    folder: Path,
    opened: Atlas,
    backend: Backend,
    encoder: Encoder,
    config: PredictConfig,
    progress: Callable[[int, int], None],
) -> PredictSummary:
    with PredictionLog(folder / "predictions.jsonl", opened.taxonomy) as log, QuarantineLog(folder) as quarantine:
        rows, done = answerable(opened, backend), log.done_ids()
        finished = len(done)
        options: dict[str, Any] = {"batch_size": config.batch_size, "loader": config.loader, "done": done}
        for step in predict(opened, rows, backend, encoder, **options):
            for prediction in step.predictions:
                log.append(prediction)
            for record in step.quarantined:
                quarantine.add(record)
            finished += len(step.predictions) + len(step.quarantined)
            progress(finished, len(rows))
        left_out = [r for r in quarantine.records(opened.split) if r["id"] not in log.done_ids()]
        return PredictSummary(len(log.done_ids()), len(opened) - len(rows), left_out)


def start_predictions(folder: Path, settings: dict[str, Any]) -> None:
    """Write predict.json, or check that it says the same. Raises InputError naming what differs.

    Where model and atlas lie may differ, their content may not.
    """
    path = folder / "predict.json"
    if path.is_file():
        before, now = _identity(read_json(path)), _identity(settings)
        differing = [key for key in now if before.get(key) != now[key]]
        if differing:
            fix = "Choose another --run, or remove predictions.jsonl and predict.json."
            raise InputError(f"holds predictions with another {', '.join(differing)}", where=str(folder), fix=fix)
    else:
        write_json(path, settings)


def _identity(settings: dict[str, Any]) -> dict[str, Any]:
    """What decides the predictions, under the names that a message uses."""
    kept = {key: settings.get(key) for key in ("checkpoint", "backend", "split", "encode")}
    data = settings.get("data") or {}
    return {"model": settings.get("heads_sha256"), **kept, "data": data.get("fingerprint")}
