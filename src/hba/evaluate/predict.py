"""From an atlas to predictions.jsonl, through any backend.

A backend (`hba.evaluate.backends`) answers rows in its own order; this module owns the rest: which rows, resume by
sample id, files, quarantine. A prediction is appended as soon as it is there, so that a killed run goes on where it
stopped. A sample whose medium cannot be read gets no prediction; it is quarantined and counted. A row to which a
service gave no answer gets none either: it stays open, and the same command asks it again.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from hba.atlas import Atlas, data_record, open_atlas
from hba.atlas.rows import Quarantined, Row
from hba.batch.config import WINDOWS_ARE_FOR_HEADS, EncodeConfig
from hba.batch.prompt import Modality
from hba.batch.sampler import Indices, subsample
from hba.errors import ConfigError, InputError, nearest
from hba.evaluate.answers import READING_VERSION, read
from hba.evaluate.backends import LOCAL, WORDLESS, detect, known, open_backend
from hba.evaluate.backends.interface import Backend, Unanswered, answerable, predict
from hba.evaluate.config import DEFAULT_FORMAT, Opening, PredictConfig
from hba.evaluate.predictions import (
    Prediction,
    PredictionLog,
    Tally,
    each_prediction,
    ids_sha256,
    read_predictions,
    write_predictions,
)
from hba.evaluate.results import was_cut
from hba.evaluate.shards import (
    PATIENCE_SECONDS,
    Shard,
    done_elsewhere,
    leave_nothing,
    merge,
    merge_when_done,
    merged_since,
    take_gpus,
)
from hba.remote import ServiceError
from hba.run import QuarantineLog, locked_folder
from hba.storage import read_json, write_json
from hba.taxonomy import BUILTIN, Taxonomy, save_beside

# Which rows of a split are predicted, and which media of theirs reach the model.
#
# A selection makes another atlas with another fingerprint, so that its predictions cannot be taken for those of the
# whole split. An ablation leaves media out and takes their tags away; the prompt keeps its text, in which the question
# stands, and with it a transcript where the row has one. "Audio alone" is therefore the question with the sound.


CHANNELS: dict[str, tuple[Modality, ...]] = {"text": (), "audio": ("audio",), "video": ("image", "video")}


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What of a split is predicted; None leaves everything in.

    The rows of `datasets` alone; at most `per_dataset` rows of each dataset, drawn so that its labels keep their shares
    (a dataset with fewer rows gives all); then the first `limit` rows. `channels` are those of CHANNELS that reach the
    model.
    """

    limit: int | None = None
    per_dataset: int | None = None
    channels: tuple[str, ...] | None = None
    datasets: tuple[str, ...] | None = None

    def rows(self, atlas: Atlas, seed: int = 0) -> Atlas:
        """The chosen rows of `atlas`, in their order. The same seed draws the same rows."""
        if self.datasets is not None:
            atlas = atlas.filter(datasets=self.datasets)
        if self.per_dataset is not None:
            codes_N = atlas.columns.dataset_codes
            chosen = []
            for code in np.unique(codes_N):
                rows = np.flatnonzero(codes_N == code)
                if len(rows) > self.per_dataset:
                    of_dataset = atlas.columns.select(rows)
                    rows = rows[subsample(of_dataset, self.per_dataset, seed=seed, by=("label",))]
                chosen.append(rows)
            atlas = atlas.select(np.sort(np.concatenate(chosen)))
        return atlas if self.limit is None else atlas[: self.limit]

    def media(self, encode: EncodeConfig) -> EncodeConfig:
        """`encode` with the media of the chosen channels alone. Raises InputError for an unknown channel."""
        return encode if self.channels is None else replace(encode, modalities=reaching(self.channels))


EVERYTHING = Selection()


def predicted_rows(facts: Mapping[str, Any], place: str, split: str) -> Atlas:
    """The rows of `split` of the atlas at `place` that a run was asked to predict; `facts` are its predict.json.

    Raises InputError when their fingerprint is not the one that the run recorded.
    """
    atlas = Selection(**facts.get("selection") or {}).rows(open_atlas(place, split=split))
    if (facts.get("data") or {}).get("fingerprint") not in (None, atlas.fingerprint):
        fix = "Say with --atlas which one it was."
        raise InputError("is not the atlas that was predicted (another fingerprint)", where=place, fix=fix)
    return atlas


def reaching(channels: Sequence[str]) -> tuple[Modality, ...]:
    """The media modalities of the channels text, audio and video; video is everything that is seen, text none.

    Raises InputError for another name.
    """
    for name in channels:
        if name not in CHANNELS:
            raise InputError(f"unknown modality {name!r}", where="--modalities", fix=nearest(name, CHANNELS))
    kept = {modality for name in channels for modality in CHANNELS[name]}
    order: tuple[Modality, ...] = ("image", "video", "audio")
    return tuple(modality for modality in order if modality in kept)


# Which samples are no independent evidence: those of one speaker, dialogue or video.
#
# The release has no field for it. In this order: a field of the row that names a speaker, participant, dialogue or
# video (`GROUP_FIELDS`, or one of the user's own with `hba score --cluster`); what the file name tells where the source
# names files by speaker or dialogue (`group` of the dataset in taxonomy.yaml); a clip, sound or image that several rows
# share. A row of which nothing is known stands alone: a group is never guessed from what a row says.


GROUP_FIELDS = (
    *("speaker_id", "speaker", "participant_id", "participant", "subject_id", "subject"),
    *("dialogue_id", "video_id"),
)
UNNAMED = "-"  # what a shard gives for the path of a medium that it does not tell


def sample_groups(atlas: Atlas) -> dict[str, str]:
    """The group of every sample that shares one with another of its dataset, by id. Reads rows, opens no medium."""
    named: dict[str, str] = {}
    shared: dict[str, str] = {}
    datasets: dict[str, str] = {}
    for key, row, extra in atlas.said():
        datasets[key] = row.dataset
        field = next((name for name in GROUP_FIELDS if extra.get(name) not in (None, "")), None)
        if field is not None:
            named[key] = f"{field}: {extra[field]}"
            continue
        path = _first_medium(row)
        if path is not None:
            told = _told_by_name(atlas.taxonomy.dataset(row.dataset).group, path)
            (named if told else shared)[key] = told or path
    found = named | shared
    # Groups are drawn within a dataset: a clip that one row of each of two datasets has joins nothing.
    sizes = Counter((datasets[key], group) for key, group in found.items())
    return {key: group for key, group in found.items() if sizes[datasets[key], group] > 1}


def _first_medium(row: Row) -> str | None:
    paths = (*row.videos[:1], *row.audios[:1], *row.images[:1])
    return next((path for path in paths if path != UNNAMED), None)


def _told_by_name(pattern: str | None, path: str) -> str | None:
    found = re.search(pattern, PurePosixPath(path).name) if pattern else None
    return f"file name: {found[1]}" if found else None


# --- the run of predictions -------------------------------------------------------------------------------------------


SINCE = ("settings", "dtype", "attention", "backbone")
"""what the identity of a backend has not always said; runs that do not say it go on"""

_DEFAULT_ENCODE: dict[str, Any] = json.loads(json.dumps(asdict(EncodeConfig())))


class PredictSummary(NamedTuple):
    """What one call of `predict_run` leaves: counts of the run, or of a shard that is not `merged`; what is missing.

    `skipped` rows have no trained head; `merged` is False while other shards of the run have rows left, and where
    another process has put all together. `unnamed_heads` says that the rows were answered by heads of which nobody
    knows whether they were trained. `note` is what the user should know of the format in which the model was asked.
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
    began = time.time()
    opening = open_rows(model, atlas, split=split, config=config, backend=backend, selection=selection)
    if opening.backend in LOCAL:
        _prepare(opening, shard)
    answering = open_backend(opening.backend, opening)
    rows, taxonomy = answerable(opening.atlas, answering), opening.atlas.taxonomy
    # What is hashed is hashed before a lock is taken that every process of the run waits for.
    settings = {**_settings(opening, split, answering, rows), "selection": asdict(selection)}
    batches = answering.batches(opening.atlas, rows)
    own = folder if shard is None else shard.folder(folder)
    with ExitStack() as locks:
        with nullcontext() if shard is None else locked_folder(folder, PATIENCE_SECONDS):
            locks.enter_context(locked_folder(own))
            start_predictions(folder, settings, taxonomy)
            save_beside(taxonomy, folder)
            read_anew(folder, opening.atlas, alone=shard is None)
        if shard is None:
            merge(folder, taxonomy)
        if retry_failed:
            forget_failed(own / "predictions.jsonl", taxonomy)
        done = done_elsewhere(folder, own / "predictions.jsonl", failed=not retry_failed)
        share = batches if shard is None else shard.share(batches)
        launched = shard is not None and shard.device is not None
        if came_late := launched and not retry_failed and merged_since(folder, began):
            share = []  # others found the run whole before this process had loaded its model
        summary = _append_predictions(own, opening.atlas, share, answering, done, progress)
        if shard is not None:
            with locked_folder(folder, PATIENCE_SECONDS):
                leave_nothing(folder, shard)
    if shard is None:
        return summary._replace(note=opening.note)
    wanted = {opening.atlas.ids[row] for row in rows.tolist()}
    merged = merge_when_done(folder, wanted, taxonomy, retry_failed=retry_failed)
    if not merged and (shard.device is None or shard.number == 1) and not came_late:  # all was there when it came
        merged = not (folder / "shards").is_dir() and wanted <= done_elsewhere(folder, failed=not retry_failed)
    if merged:
        summary = _whole_run(folder, len(rows), opening.atlas, answering)
    return summary._replace(merged=merged, note=opening.note)


def _prepare(opening: Opening, shard: Shard | None) -> None:
    """GPUs, seeds and threads of a model that runs in this process. Raises ConfigError for too few GPUs."""
    if shard is not None and shard.device is not None:
        alone = opening.backend == "vllm"  # its engine wants nearly all memory of its GPUs
        each = opening.config.vllm.tensor_parallel_size if alone else 1
        take_gpus(shard, each, shared=not alone)
    from hba.model.process import prepare_process  # not before it is needed: torch takes seconds and half a gigabyte

    prepare_process(seed=0)


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
    own: Path,
    atlas: Atlas,
    batches: Sequence[Indices],
    backend: Backend,
    elsewhere: Set[str],
    progress: Callable[[Tally], None],
) -> PredictSummary:
    """Predict what is left of `batches` into the folder `own`, which is that of the run or of a shard of it.

    `elsewhere` are ids that are done in other files of the run.
    """
    rows = np.concatenate(batches).tolist() if batches else []
    path, tally = own / "predictions.jsonl", Tally(total=len(rows), meter=backend.meter)

    def count(prediction: Prediction) -> None:
        tally.add(prediction, labelled=_labelled(prediction, atlas), fresh=False)

    with PredictionLog(path, atlas.taxonomy, count) as log, QuarantineLog(own) as quarantine:
        done = log.done_ids() | elsewhere
        tally.done = sum(atlas.ids[row] in done for row in rows)
        left = tally.done < len(rows)
        groups = sample_groups(atlas) if left else {}
        progress(tally)
        try:
            for step in predict(atlas, batches, backend, done) if left else ():
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
        return _summary(tally, log.done_ids(), quarantine, atlas, backend)


def _summary(
    tally: Tally, answered: Set[str], quarantine: QuarantineLog, atlas: Atlas, backend: Backend
) -> PredictSummary:
    return PredictSummary(
        tally=tally,
        predicted=len(answered),
        skipped=len(atlas) - len(answerable(atlas, backend)),
        quarantined=[record for record in quarantine.records(atlas.split) if record["id"] not in answered],
        merged=True,
        unnamed_heads=backend.name == "heads" and backend.domains is None,
    )


def _whole_run(folder: Path, total: int, atlas: Atlas, backend: Backend) -> PredictSummary:
    """The summary of a run of `total` rows whose shards are merged."""
    tally, answered = Tally(total=total, meter=backend.meter), set()
    for prediction in each_prediction(folder / "predictions.jsonl", atlas.taxonomy):
        tally.add(prediction, labelled=_labelled(prediction, atlas), fresh=False)
        answered.add(prediction.id)
    return _summary(tally, answered, QuarantineLog(folder), atlas, backend)


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

    Where model and atlas lie may differ, their content may not, nor what the model computes in. A folder in which
    nothing was ever answered is free: whatever was tried there came to nothing, and its failures go.
    """
    path = folder / "predict.json"
    if path.is_file():
        before, now = _identity(read_json(path)), _identity(settings)
        unsaid = {key for key in SINCE if key not in before}  # by an older version
        differing = [key for key in {**now, **before} if before.get(key) != now.get(key) and key not in unsaid]
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
    """What decides the predictions, under the names that a message uses. How a checkpoint is called does not.

    A key of `encode` that an older version did not have was what its default is now.
    """
    known = {key: value for key, value in (settings.get("identity") or {}).items() if key != "checkpoint"}
    kept = {key: settings.get(key) for key in ("backend", "split")}
    encode = {f"encode.{key}": value for key, value in {**_DEFAULT_ENCODE, **(settings.get("encode") or {})}.items()}
    data = settings.get("data") or {}
    return {**known, **kept, **encode, "data": data.get("fingerprint")}
