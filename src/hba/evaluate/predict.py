"""From an atlas to predictions.jsonl, through any backend.

A backend (`hba.evaluate.backends`) answers rows in its own order; this module owns the rest: which rows, resume by
sample id, files, quarantine. A prediction is appended as soon as it is there, so that a killed run goes on where it
stopped. A sample whose medium cannot be read gets no prediction; it is quarantined and counted. A row to which a
service gave no answer gets none either: it stays open, and the same command asks it again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from hba.atlas import Atlas, data_record, open_atlas
from hba.atlas.config import WINDOWS_ARE_FOR_HEADS, EncodeConfig
from hba.atlas.sample import Quarantined
from hba.atlas.sampler import Indices
from hba.errors import ConfigError, InputError
from hba.evaluate.answers import READING_VERSION, read
from hba.evaluate.backends import LOCAL, WORDLESS, detect, known, open_backend
from hba.evaluate.backends.interface import Answered, Backend, Unanswered
from hba.evaluate.config import DEFAULT_FORMAT, Opening, PredictConfig
from hba.evaluate.groups import sample_groups
from hba.evaluate.predictions import Prediction, PredictionLog, read_predictions, write_predictions
from hba.evaluate.results import was_cut
from hba.evaluate.runs import ids_sha256
from hba.evaluate.selection import EVERYTHING, Selection
from hba.evaluate.shards import Shard, done_elsewhere, merge, merge_when_done
from hba.evaluate.tally import Tally
from hba.quarantine import QuarantineLog
from hba.remote import ServiceError
from hba.run import locked_folder
from hba.storage import read_json, write_json
from hba.taxonomy import BUILTIN, Taxonomy, save_beside

Predicted: TypeAlias = Prediction | Quarantined | Unanswered
_DEFAULT_ENCODE: dict[str, Any] = json.loads(json.dumps(asdict(EncodeConfig())))


def answerable(atlas: Atlas, backend: Backend) -> Indices:
    """Row numbers that `backend` can answer."""
    columns, taxonomy = atlas.columns, atlas.taxonomy
    labelled_N = columns.label_codes >= 0
    if backend.domains is None:
        return np.flatnonzero(labelled_N | backend.free_form)
    known = np.array([taxonomy.dataset(key).domain in backend.domains for key in columns.datasets], dtype=bool)
    return np.flatnonzero(np.where(labelled_N, known[columns.dataset_codes], backend.free_form))


def predict(atlas: Atlas, rows: Indices, backend: Backend, done: Set[str] = frozenset()) -> Iterator[Predicted]:
    """Yield the prediction of each of `rows` but for the samples whose ids are `done`, in the backend's order.

    A sample whose media cannot be read comes as its quarantine record, one that a service did not answer as it is.
    """
    for result in backend.answers(atlas, rows, done):
        yield _prediction(result) if isinstance(result, Answered) else result


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
        rule=output.rule,
        finish=output.finish,
        model=output.model,
        left_out=output.left_out,
    )


class PredictSummary(NamedTuple):
    """What one call of `predict_run` leaves: the counts of the run (of the shard, if it is one), and what is missing.

    `skipped` rows have no trained head; `merged` is False while other shards of the run have rows left. `unnamed_heads`
    says that the rows were answered by heads of which nobody knows whether they were trained. `note` is what the user
    should know of the format in which the model was asked.
    """

    tally: Tally
    predicted: int
    skipped: int
    quarantined: Sequence[dict[str, Any]]
    merged: bool
    unnamed_heads: bool
    note: str | None = None


def predict_run(
    model: str,
    folder: Path,
    *,
    atlas: str,
    split: str,
    config: PredictConfig,
    progress: Callable[[Tally], None],
    backend: str | None = None,
    selection: Selection = EVERYTHING,
    shard: Shard | None = None,
    retry_failed: bool = False,
) -> PredictSummary:
    """Predict a split into `folder` (predictions.jsonl, predict.json, quarantine.jsonl), going on where it stopped.

    `backend` is a name of `hba.evaluate.backends`; None means the one that the model is made for. `shard` predicts a
    share of the rows; the last one merges (see `shards`). `retry_failed` asks again what failed before. Raises
    InputError when the backend cannot use the model, and when the folder holds predictions of another model, atlas,
    split or prompt; FolderInUseError when another process predicts here.
    """
    opening = open_rows(model, atlas, split=split, config=config, backend=backend, selection=selection)
    if opening.backend in LOCAL:
        _prepare(shard)
    answering = open_backend(opening.backend, opening)
    own = folder if shard is None else shard.folder(folder)
    with ExitStack() as locks:
        with locked_folder(folder) if shard is not None else nullcontext():
            locks.enter_context(locked_folder(own))
            rows = answerable(opening.atlas, answering)
            settings = {**_settings(opening, split, answering, rows), "selection": asdict(selection)}
            start_predictions(folder, settings, opening.atlas.taxonomy)
            save_beside(opening.atlas.taxonomy, folder)
            read_anew(folder, opening.atlas, alone=shard is None)
            if retry_failed and shard is not None:  # what earlier shards have merged; the first that comes takes it out
                forget_failed(folder / "predictions.jsonl", opening.atlas.taxonomy)
        if shard is None:
            merge(folder, opening.atlas.taxonomy)
        if retry_failed:
            forget_failed(own / "predictions.jsonl", opening.atlas.taxonomy)
        share = rows if shard is None else rows[shard.number - 1 :: shard.count]
        summary = _append_predictions(folder, own, opening.atlas, share, answering, progress)
    summary = summary._replace(note=opening.note)
    if shard is None:
        return summary
    wanted = {opening.atlas.ids[int(row)] for row in rows}
    return summary._replace(merged=merge_when_done(folder, wanted, opening.atlas.taxonomy))


def _prepare(shard: Shard | None) -> None:
    """Seeds, threads and the GPU of a model that runs in this process."""
    import torch  # not before it is needed: it takes seconds and half a gigabyte

    from hba.process import prepare_process

    prepare_process(seed=0)
    if shard is not None and shard.device is not None and torch.cuda.is_available():
        torch.cuda.set_device(shard.device % torch.cuda.device_count())


def open_rows(
    model: str, atlas: str, *, split: str, config: PredictConfig, backend: str | None, selection: Selection
) -> Opening:
    """The chosen rows, and how they reach the model. Raises InputError for a bad backend, atlas or selection."""
    name = detect(model) if backend is None else known(backend)
    rows = selection.rows(open_atlas(atlas, split=split))
    encode = config.encode or (_trained_encode(model) if name in LOCAL else None) or EncodeConfig()
    chosen = selection.media(encode)
    if chosen.long_audio == "windows" and name not in WORDLESS:
        found = "windows of a sound are averaged by heads, and this backend answers in words"
        raise ConfigError(found, where="encode.long_audio", fix=WINDOWS_ARE_FOR_HEADS)
    config, note = _in_format(model, name, config)
    return Opening(model=model, backend=name, place=atlas, atlas=rows, config=config, encode=chosen, note=note)


def _trained_encode(model: str) -> EncodeConfig | None:
    from hba.model import checkpoint  # imports torch

    return checkpoint.encode_config(model)


def _trained_formats(model: str) -> tuple[str, ...] | None:
    from hba.model import checkpoint  # imports torch

    return checkpoint.answer_formats(model)


def _in_format(model: str, backend: str, config: PredictConfig) -> tuple[PredictConfig, str | None]:
    """`config` with the format that a checkpoint was trained in where none is named, and what the user should know."""
    trained = _trained_formats(model) if backend in ("hf", "vllm") else None
    asked = config.generation.format
    if trained is None:
        return config, None
    known = " and ".join(trained)
    if asked is not None:
        other = f"asked in the format {asked}, but {model} was trained in {known}"
        return config, other if trained and asked not in trained else None
    chosen = trained[0] if trained else DEFAULT_FORMAT
    note = None if len(trained) == 1 else f"{model} was trained in {known}; it is asked in {chosen}"
    if not trained:
        note = f"{model} does not say in which format it was trained; it is asked in {chosen}"
    return replace(config, generation=replace(config.generation, format=chosen)), note


def _settings(opening: Opening, split: str, backend: Backend, rows: Indices) -> dict[str, Any]:
    settings = {
        "model": opening.model,
        "backend": opening.backend,
        "identity": dict(backend.identity()),
        "split": split,
        "data": data_record(opening.place, opening.atlas),
        "encode": asdict(opening.encode),
        "asked": _by_dataset(opening.atlas, rows),
        "asked_ids": ids_sha256(opening.atlas.ids[int(row)] for row in rows),
        "skipped": _by_dataset(opening.atlas, np.setdiff1d(np.arange(len(opening.atlas)), rows)),
        "reading": READING_VERSION,
    }
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def _by_dataset(atlas: Atlas, rows: Indices) -> dict[str, int]:
    """How many of `rows` each dataset has; those without any are left out."""
    columns = atlas.columns
    counts = np.bincount(columns.dataset_codes[rows], minlength=len(columns.datasets))
    return {key: int(count) for key, count in zip(columns.datasets, counts, strict=True) if count}


def _append_predictions(
    run: Path, own: Path, atlas: Atlas, rows: Indices, backend: Backend, progress: Callable[[Tally], None]
) -> PredictSummary:
    """Predict what is left of `rows` into the folder `own`, which is that of the run or of a shard of it."""
    path, tally = own / "predictions.jsonl", Tally(total=len(rows), meter=backend.meter)

    def count(prediction: Prediction) -> None:
        tally.add(prediction, labelled=_labelled(prediction, atlas), fresh=False)

    with PredictionLog(path, atlas.taxonomy, count) as log, QuarantineLog(own) as quarantine:
        done = log.done_ids() | done_elsewhere(run, besides=path)
        tally.done = sum(atlas.ids[row] in done for row in rows.tolist())
        left = tally.done < len(rows)
        groups = sample_groups(atlas) if left else {}
        progress(tally)
        try:
            for step in predict(atlas, rows, backend, done) if left else ():
                if isinstance(step, Quarantined):
                    quarantine.add(step)
                    tally.quarantine()
                elif isinstance(step, Unanswered):
                    tally.unanswered[step.reason] += 1
                else:
                    log.append(replace(step, group=groups.get(step.id)))
                    tally.add(step, labelled=_labelled(step, atlas), fresh=True)
                progress(tally)
        except ServiceError as error:
            what = f"{error.what}; {len(log.done_ids()):,} of {len(rows):,} rows are answered and kept in {own}"
            raise ServiceError(what, where=error.where, fix=error.fix) from None
        left_out = [r for r in quarantine.records(atlas.split) if r["id"] not in log.done_ids()]
        skipped = len(atlas) - len(answerable(atlas, backend))
        unnamed = backend.name == "heads" and backend.domains is None
        return PredictSummary(tally, len(log.done_ids()), skipped, left_out, merged=True, unnamed_heads=unnamed)


def _labelled(prediction: Prediction, atlas: Atlas) -> bool:
    return not atlas.taxonomy.dataset(prediction.dataset).free_form


def forget_failed(path: Path, taxonomy: Taxonomy) -> int:
    """Take the failed predictions out of a file, so that they are asked again; how many there were."""
    if not path.is_file():
        return 0
    found = _kept(path, taxonomy)
    kept = [prediction for prediction in found if not prediction.failed]
    if len(kept) < len(found):
        write_predictions(path, kept)
    return len(found) - len(kept)


def read_anew(folder: Path, atlas: Atlas, *, alone: bool) -> None:
    """Read answers in words that an older version read by the rules of this one; what models said stays as it is.

    Raises InputError unless this process is `alone` in the run: other shards may be writing.
    """
    path = folder / "predict.json"
    settings = read_json(path)
    files = [f for f in (folder / "predictions.jsonl", *folder.glob("shards/*/predictions.jsonl")) if f.is_file()]
    in_words = "format" in (settings.get("identity") or {})
    if settings.get("reading") == READING_VERSION or not files or not in_words:
        return
    if not alone:
        what = "answers were read by an older version of hba, and would be mixed with others"
        raise InputError(what, where=str(folder), fix="Run the command once without shards: it reads them anew.")
    prompts = {key: row.problem for key, row, _ in atlas.said()}
    for file in files:
        found = []
        for old in _kept(file, atlas.taxonomy):
            if old.output is not None and old.probs is None and old.id in prompts:
                prompt, cut = prompts[old.id], was_cut(old.finish)
                rule, answer, label = read(old.output, old.dataset, atlas.taxonomy, prompt=prompt, cut=cut)
                old = replace(old, rule=rule, answer=answer, label=label)
            found.append(old)
        write_predictions(file, found)
    write_json(path, {**settings, "reading": READING_VERSION})


def start_predictions(folder: Path, settings: dict[str, Any], taxonomy: Taxonomy = BUILTIN) -> None:
    """Write predict.json, or check that it says the same. Raises InputError naming what differs.

    Where model and atlas lie may differ, their content may not. A folder in which nothing was ever answered is free:
    whatever was tried there came to nothing, and its failures go.
    """
    path = folder / "predict.json"
    if path.is_file():
        before, now = _identity(read_json(path)), _identity(settings)
        differing = [key for key in {**now, **before} if before.get(key) != now.get(key)]
        if not differing:
            return
        files = [folder / "predictions.jsonl", *folder.glob("shards/*/predictions.jsonl")]
        answered = [file for file in files if file.is_file() and any(not p.failed for p in _kept(file, taxonomy))]
        if answered:
            fix = "Choose another --run, or remove predictions.jsonl and predict.json."
            raise InputError(f"holds predictions with another {', '.join(differing)}", where=str(folder), fix=fix)
        for file in files:
            file.unlink(missing_ok=True)
    write_json(path, settings)


def _kept(file: Path, taxonomy: Taxonomy) -> list[Prediction]:
    PredictionLog(file, taxonomy).close()  # cuts off a line that a kill left torn
    return read_predictions(file, taxonomy)


def _identity(settings: dict[str, Any]) -> dict[str, Any]:
    """What decides the predictions, under the names that a message uses.

    A key of `encode` that an older version did not have was what its default is now.
    """
    kept = {key: settings.get(key) for key in ("backend", "split")}
    encode = {f"encode.{key}": value for key, value in {**_DEFAULT_ENCODE, **(settings.get("encode") or {})}.items()}
    data = settings.get("data") or {}
    return {**(settings.get("identity") or {}), **kept, **encode, "data": data.get("fingerprint")}
