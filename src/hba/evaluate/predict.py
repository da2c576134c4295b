"""From an atlas to predictions.jsonl, through any backend, in one process or in several.

A backend (`hba.evaluate.backends`) answers rows in its own order; this module owns the rest: which rows, who of several
processes asks which, resume by sample id, files, quarantine. A prediction is appended as soon as it is there, so that a
killed run goes on where it stopped. A sample whose medium cannot be read gets no prediction; it is quarantined and
counted. A row to which a service gave no answer gets none either: it stays open, and the same command asks it again.

Shard i of N takes every N-th batch of the rows that are asked together. It writes `shards/i-of-N/` of the run folder;
whoever finds all rows done, the last shard or a later run without shards, puts everything into the run's own files and
removes the folder `shards`. What any shard has done counts as done for all, so that a run may go on with another N. The
machines must share the run folder, on a file system with locks. Nothing that a shard finds ends it with a failure,
since a launcher then ends the others: whoever merges speaks for the run, its exit code included.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence, Set
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np

from hba.atlas import Atlas, data_record, open_atlas
from hba.atlas.rows import UNNAMED, Quarantined
from hba.batch.config import WINDOWS_ARE_FOR_HEADS, EncodeConfig
from hba.batch.prompt import Modality
from hba.batch.sampler import Indices, subsample
from hba.errors import ConfigError, InputError, nearest
from hba.evaluate.backends.interface import (
    LOCAL,
    WORDLESS,
    Backend,
    Unanswered,
    answerable,
    detect,
    known,
    open_backend,
    predict,
    require_backend,
)
from hba.evaluate.config import DEFAULT_FORMAT, Opening, PredictConfig
from hba.evaluate.predictions import (
    ANSWERS,
    PREDICTIONS,
    READING_VERSION,
    Line,
    Prediction,
    PredictionLog,
    Tally,
    each_prediction,
    ids_sha256,
    read_predictions,
    was_cut,
    write_predictions,
)
from hba.remote import ServiceError
from hba.run import FolderInUseError, QuarantineLog, locked_folder, record_predicting
from hba.storage import AppendLog, read_json, to_csv, whole, write_data, write_json
from hba.taxonomy import Taxonomy, save_beside

T = TypeVar("T")


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
        path = next((p for p in (*row.videos[:1], *row.audios[:1], *row.images[:1]) if p != UNNAMED), None)
        if path is not None:
            pattern = atlas.taxonomy.dataset(row.dataset).group
            told = re.search(pattern, PurePosixPath(path).name) if pattern else None
            (named if told else shared)[key] = f"file name: {told[1]}" if told else path
    found = named | shared
    # Groups are drawn within a dataset: a clip that one row of each of two datasets has joins nothing.
    sizes = Counter((datasets[key], group) for key, group in found.items())
    return {key: group for key, group in found.items() if sizes[datasets[key], group] > 1}


# Which process asks what: its share of the batches, and its GPUs.


# (rank, number of processes, rank on its machine) as torchrun and accelerate launch, and as srun say it. A batch script
# has SLURM_NTASKS too, without being one of the tasks.
LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)
VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Shard:
    """Shard `number` (from 1) of `count`; `device` is its place among the processes that a launcher started on this
    machine, None without a launcher."""

    number: int
    count: int
    device: int | None = None

    @property
    def name(self) -> str:
        """Such as 2-of-4."""
        return f"{self.number}-of-{self.count}"

    def folder(self, run: Path) -> Path:
        """Where its predictions go."""
        return run / "shards" / self.name

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Every N-th of the items."""
        return items[self.number - 1 :: self.count]


def parse_shard(text: str) -> Shard:
    """The shard that 'i/N' names, i from 1 to N. Raises InputError for anything else."""
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise InputError(f"no shard {text!r}", where="--shard", fix="Write i/N with i from 1 to N, such as 1/4.")
    return Shard(int(number), int(count))


def launched_shard(environment: Mapping[str, str] = os.environ) -> Shard | None:
    """The share of this process under torchrun, accelerate launch or srun; None for one process alone."""
    for rank, world, local in LAUNCHERS:
        if int(environment.get(world, "1")) > 1 and rank in environment:
            return Shard(int(environment[rank]) + 1, int(environment[world]), int(environment.get(local, "0")))
    return None


def take_gpus(shard: Shard, each: int, *, shared: bool, environment: MutableMapping[str, str] = os.environ) -> None:
    """Show this process its own `each` GPUs alone, of those that its machine shows to all, by CUDA_VISIBLE_DEVICES.

    Names in that list may be numbers, UUIDs or MIG devices. Where srun has dealt out GPUs already, nothing changes.
    With `shared`, processes may have a GPU together where there are too few. Nothing happens where there is none.
    Raises ConfigError for too few GPUs, and when CUDA has started, which reads the list once.
    """
    seen = _visible(environment)
    dealt_out = "LOCAL_RANK" not in environment and ("SLURM_GPUS_PER_TASK" in environment or len(seen) == each)
    if not seen or dealt_out:
        return
    if each > len(seen):
        what = f"{each} GPUs are wanted for each process, but {len(seen)} can be seen"
        raise ConfigError(what, where=VISIBLE, fix=f"Set vllm.tensor_parallel_size={len(seen)} or less.")
    first = (shard.device or 0) * each
    if first + each > len(seen):
        if not shared:
            fits = len(seen) // each
            what = f"{len(seen)} GPUs are enough for {fits} processes of {each}, and this is number {first // each + 1}"
            raise ConfigError(what, where=VISIBLE, fix=f"Start {fits} on this machine (--nproc-per-node {fits}).")
        first %= len(seen)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise ConfigError("CUDA has started already", where=VISIBLE, fix="Predict before anything uses a GPU.")
    environment[VISIBLE] = ",".join(seen[first : first + each])


def _visible(environment: Mapping[str, str]) -> list[str]:
    """The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES has; CUDA does not start for it."""
    if VISIBLE not in environment:
        import torch  # asks the driver's library, which starts nothing

        return [str(number) for number in range(torch.cuda.device_count())]
    named: list[str] = []
    for name in map(str.strip, environment[VISIBLE].split(",")):
        if not name or name.startswith("-"):  # CUDA, too, reads no further
            break
        named.append(name)
    return named


# --- the run of predictions -------------------------------------------------------------------------------------------


SINCE = ("settings", "dtype", "attention", "backbone")
"""what the identity of a backend has not always said; runs that do not say it go on"""

_DEFAULT_ENCODE: dict[str, Any] = json.loads(json.dumps(asdict(EncodeConfig())))


class PredictSummary(NamedTuple):
    """What one call of `predict_run` leaves: counts of the run, or of a shard that is not `merged`; what is missing.

    `skipped` rows have no trained head; `merged` is False while other shards of the run have rows left, and where
    another process has put all together. `unnamed_heads` says that the rows were answered by heads of which nobody
    knows whether they were trained. `note` is what the user should know of the format in which the model was asked.
    `unlabelled` are the predictions of rows without an answer, which are in answers.csv, too. `addresses` counts the
    servers at which rows of the run were asked.
    """

    tally: Tally
    predicted: int
    skipped: int
    quarantined: Sequence[dict[str, Any]]
    merged: bool
    unnamed_heads: bool
    note: str | None = None
    unlabelled: Sequence[Prediction] = ()
    addresses: int = 0


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
    """Predict a split into `folder` (predictions.jsonl, predict.json, environment.json, quarantine.jsonl), going on
    where it stopped.

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
    settings = _settings(opening, split, answering, rows)
    batches = answering.batches(opening.atlas, rows)
    own = folder if shard is None else shard.folder(folder)
    wanted = {opening.atlas.ids[row] for row in rows.tolist()}
    with ExitStack() as locks:
        with nullcontext() if shard is None else locked_folder(folder, PATIENCE_SECONDS):
            locks.enter_context(locked_folder(own))
            start_predictions(folder, settings, opening.atlas)
            save_beside(taxonomy, folder)
            read_anew(folder, opening.atlas, alone=shard is None)
        if shard is None:
            merge(folder, taxonomy)
        if retry_failed:
            forget_failed(own / PREDICTIONS, taxonomy)
        done = done_elsewhere(folder, own / PREDICTIONS, failed=not retry_failed)
        share = batches if shard is None else shard.share(batches)
        launched = shard is not None and shard.device is not None
        if came_late := launched and not retry_failed and merged_since(folder, began):
            share = []  # others found the run whole before this process had loaded its model

        def record(began: bool) -> None:
            how: dict[str, Any] = {"seed": settings["identity"].get("seed"), "data": settings["data"]}
            with nullcontext() if shard is None else locked_folder(folder, PATIENCE_SECONDS):
                record_predicting(folder, command="predict", began=began, shared=shard is not None, **how)
                record_address(folder, opening)

        summary = _append_predictions(own, opening.atlas, share, answering, done, progress, record)
        if shard is not None:
            with locked_folder(folder, PATIENCE_SECONDS):
                leave_nothing(folder, shard)
    asked_at = len(read_json(folder / "predict.json").get("addresses", ()))
    if shard is None:
        return summary._replace(note=opening.note, addresses=asked_at, unlabelled=write_answers(folder, opening.atlas))
    merged = merge_when_done(folder, wanted, taxonomy, retry_failed=retry_failed)
    if not merged and (shard.device is None or shard.number == 1) and not came_late:  # all was there when it came
        merged = not (folder / "shards").is_dir() and wanted <= done_elsewhere(folder, failed=not retry_failed)
    if merged:
        summary = _whole_run(folder, len(rows), opening.atlas, answering)
        summary = summary._replace(unlabelled=write_answers(folder, opening.atlas))
    return summary._replace(merged=merged, note=opening.note, addresses=asked_at)


def record_address(folder: Path, opening: Opening) -> None:
    """Keep a hash of the address at which a remote model is asked: another one may serve another model by this name.

    The address itself is nobody else's business. The caller holds the lock of the folder.
    """
    from hba.remote.providers import PROVIDERS

    if opening.backend in PROVIDERS:
        address = (opening.config.remote.base_url or PROVIDERS[opening.backend].base_url).rstrip("/")
        known, settings = hashlib.sha256(address.encode()).hexdigest()[:12], read_json(folder / "predict.json")
        if known not in (asked_at := settings.get("addresses", [])):
            write_json(folder / "predict.json", {**settings, "addresses": [*asked_at, known]})


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
    require_backend(model, backend)
    name = detect(model) if backend is None else known(backend)
    rows = selection.rows(open_atlas(atlas, split=split))
    formats: tuple[str, ...] | None = None
    if name in LOCAL:
        from hba.model import checkpoint  # imports torch

        formats = checkpoint.answer_formats(model) if name not in WORDLESS else None
    chosen = selection.media(encoding_of(model, name, config))
    if chosen.long_audio == "windows" and name not in WORDLESS:
        found = "windows of a sound are averaged by heads, and this backend answers in words"
        raise ConfigError(found, where="encode.long_audio", fix=WINDOWS_ARE_FOR_HEADS)
    config, note = _in_format(model, formats, config)
    about: dict[str, Any] = {"place": atlas, "atlas": rows, "note": note, "selection": asdict(selection)}
    return Opening(model=model, backend=name, config=config, encode=chosen, **about)


def encoding_of(model: str, backend: str, config: PredictConfig) -> EncodeConfig:
    """How rows reach a model: as `config` says, or else as in its training, which a plain backbone does not know."""
    trained = None
    if config.encode is None and backend in LOCAL:
        from hba.model import checkpoint  # imports torch

        trained = checkpoint.encode_config(model)
    return config.encode or trained or EncodeConfig()


def _in_format(model: str, trained: tuple[str, ...] | None, config: PredictConfig) -> tuple[PredictConfig, str | None]:
    """`config` with the format that a checkpoint was `trained` in where none is named, and what the user should know.

    None is for what is no checkpoint of ours."""
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
    known = opening.atlas.answered[rows]
    settings = {
        "model": opening.model,
        "backend": opening.backend,
        "identity": dict(backend.identity()),
        "split": split,
        "data": data_record(opening.place, opening.atlas),
        "encode": asdict(opening.encode),
        "asked": _by_dataset(opening.atlas, rows[known]),
        "asked_ids": ids_sha256(opening.atlas.ids[int(row)] for row in rows[known]),
        "skipped": _by_dataset(opening.atlas, np.setdiff1d(np.arange(len(opening.atlas)), rows)),
        "reading": READING_VERSION,
        "selection": opening.selection,
    }
    if not known.all():
        settings["unlabelled"] = _by_dataset(opening.atlas, rows[~known])
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
    record: Callable[[bool], None],
) -> PredictSummary:
    """Predict what is left of `batches` into the folder `own`, which is that of the run or of a shard of it.

    `elsewhere` are ids that are done in other files of the run. `record` is called before the first row is kept, with
    whether rows were predicted before: what is asked in vain, such as a medium that nobody can read, is no predicting.
    """
    rows = np.concatenate(batches).tolist() if batches else []
    tally = Tally(total=len(rows), meter=backend.meter)

    def count(prediction: Prediction, *, fresh: bool = False) -> None:
        tally.add(prediction, labelled=_labelled(prediction, atlas.taxonomy), fresh=fresh)

    with PredictionLog(own / PREDICTIONS, atlas.taxonomy, count) as log, QuarantineLog(own) as quarantine:
        done = log.done_ids() | elsewhere
        tally.done = sum(atlas.ids[row] in done for row in rows)
        left = tally.done < len(rows)
        groups = sample_groups(atlas) if left else {}
        recorded = False
        progress(tally)
        try:
            for step in predict(atlas, batches, backend, done) if left else ():
                if isinstance(step, Quarantined):
                    quarantine.add(step)
                    tally.quarantine()
                elif isinstance(step, Unanswered):
                    tally.unanswered[step.reason] += 1
                else:
                    if not recorded:
                        record(bool(done))
                        recorded = True
                    log.append(replace(step, group=groups.get(step.id)))
                    count(step, fresh=True)
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


def write_answers(folder: Path, atlas: Atlas) -> list[Prediction]:
    """Write answers.csv, what the model says of the rows without an answer, and return these predictions.

    A line names the row's first file, or its id where the row has none. No file where all rows have an answer.
    """
    if atlas.answered.all() or not (folder / PREDICTIONS).is_file():
        return []
    found = [p for p in each_prediction(folder / PREDICTIONS, atlas.taxonomy) if p.target is None]
    wanted, files = {p.id for p in found}, {}
    for key, row, _ in atlas.said() if found else ():
        paths = (*row.videos, *row.audios, *row.images)
        files[key] = paths[0] if key in wanted and paths and paths[0] != UNNAMED else key
    head = ["file", "dataset", "answer", "probability", "text", "error", "id"]
    found = [p for p in found if p.id in files]
    lines = [[files[p.id], p.dataset, *said_of(p), whole(p.output or ""), p.error, p.id] for p in found]
    write_data(folder / ANSWERS, to_csv(head, lines))
    return found


def said_of(prediction: Prediction) -> tuple[str, str]:
    """Answer and probability of a prediction as tables show them; what is not known is empty."""
    answer = prediction.label or prediction.answer or ""
    share = (prediction.probs or {}).get(answer)
    return answer, "" if share is None else f"{share:.4f}"


def _labelled(prediction: Prediction, taxonomy: Taxonomy) -> bool:
    return prediction.target is not None and not taxonomy.dataset(prediction.dataset).free_form


def _whole_run(folder: Path, total: int, atlas: Atlas, backend: Backend) -> PredictSummary:
    """The summary of a run of `total` rows whose shards are merged."""
    tally, answered = Tally(total=total, meter=backend.meter), set()
    for prediction in each_prediction(folder / PREDICTIONS, atlas.taxonomy):
        tally.add(prediction, labelled=_labelled(prediction, atlas.taxonomy), fresh=False)
        answered.add(prediction.id)
    return _summary(tally, answered, QuarantineLog(folder), atlas, backend)


# --- the files of a run, its own and those of its shards --------------------------------------------------------------


FILES = (PREDICTIONS, "quarantine.jsonl")
PATIENCE_SECONDS = 120.0
"""for the run's lock, which processes of one run hold for moments, or for as long as one puts everything together"""
_line = msgspec.json.Decoder(Line)


def _written(run: Path) -> list[Path]:
    """The predictions of the run and of its shards, where there are any."""
    return [file for file in (run / PREDICTIONS, *sorted(run.glob(f"shards/*/{PREDICTIONS}"))) if file.is_file()]


def _mended(file: Path, taxonomy: Taxonomy) -> list[Prediction]:
    AppendLog(file).close()  # cuts off a line that a kill left torn
    return read_predictions(file, taxonomy)


def done_elsewhere(run: Path, besides: Path | None = None, *, failed: bool = True) -> set[str]:
    """The ids with a prediction in the run's own file or in that of any shard, whoever is writing there.

    The file `besides` is left out, and unless `failed`, what failed.
    """
    lines = (line for file in _written(run) if file != besides for line in _whole_lines(file))
    return {line.id for line in lines if failed or not line.failed}


def _settled(run: Path, *, retry_failed: bool) -> set[str]:
    """The ids of which this command has nothing more to say: answered, or failed or quarantined in a shard.

    What the run itself has in quarantine was left out by an earlier command and is tried again; so is what failed
    there, with `retry_failed`.
    """
    found = done_elsewhere(run, failed=not retry_failed)
    return found | {line.id for name in FILES for file in run.glob(f"shards/*/{name}") for line in _whole_lines(file)}


def _whole_lines(file: Path) -> Iterator[Line]:
    """The lines that are written to their end."""
    with suppress(FileNotFoundError), file.open("rb") as handle:  # who merges may have removed it by now
        yield from (_line.decode(line) for line in handle if line.endswith(b"\n"))


def merge(run: Path, taxonomy: Taxonomy) -> bool:
    """Put what all shards have into the run's own files and remove theirs; False where there is none.

    The caller holds the run's lock. Killed at any point, it can be done again. Raises FolderInUseError when a shard is
    still being predicted.
    """
    folders = sorted(path for path in run.glob("shards/*") if path.is_dir())
    if not folders:
        return False
    with ExitStack() as locks:
        for folder in folders:
            locks.enter_context(locked_folder(folder))
        kept: dict[str, Prediction] = {}
        for file in _written(run):
            for prediction in _mended(file, taxonomy):
                if prediction.id not in kept or kept[prediction.id].failed:  # a row that failed was asked again
                    kept[prediction.id] = prediction
        write_predictions(run / PREDICTIONS, kept.values())
        _merge_quarantines(run, folders)
        shutil.rmtree(run / "shards", ignore_errors=True)
    return True


def _merge_quarantines(run: Path, folders: Sequence[Path]) -> None:
    with QuarantineLog(run) as own:
        for folder in folders:
            with QuarantineLog(folder) as log:
                for record in log.records():
                    own.add(Quarantined(**{name: record.get(name, "") for name in Quarantined._fields}))


def merge_when_done(run: Path, wanted: set[str], taxonomy: Taxonomy, *, retry_failed: bool) -> bool:
    """Merge if every id of `wanted` is predicted or quarantined; False while shards are at work, and where another did.

    Shards that end together may each find the other's lock taken; each lets go of its own before, so that one merges.
    """
    if not wanted <= _settled(run, retry_failed=retry_failed):
        return False
    try:
        with locked_folder(run):
            return merge(run, taxonomy)
    except FolderInUseError:  # by another process, which is about to do the same
        return False


def merged_since(run: Path, began: float) -> bool:
    """Whether shards were merged after `began`, in seconds since the epoch, and no shard has been at work since.

    The processes of a launcher do not start at once: one may come when the others have found that all is done.
    """
    merged = run / PREDICTIONS
    at_work = any((run / "shards").glob("*/*.jsonl"))
    return merged.is_file() and merged.stat().st_mtime >= began and not at_work


def leave_nothing(run: Path, shard: Shard) -> None:
    """Remove the folder of a shard that had nothing to do; the run may have been merged before it came.

    The caller holds both locks.
    """
    own = shard.folder(run)
    if not any((own / name).is_file() and (own / name).stat().st_size for name in FILES):
        shutil.rmtree(own, ignore_errors=True)
        if not any((run / "shards").glob("*")):
            shutil.rmtree(run / "shards", ignore_errors=True)


def forget_failed(path: Path, taxonomy: Taxonomy) -> None:
    """Take the failed predictions out of a file, so that they are asked again."""
    found = _mended(path, taxonomy) if path.is_file() else []
    kept = [prediction for prediction in found if not prediction.failed]
    if len(kept) < len(found):
        write_predictions(path, kept)


def read_anew(folder: Path, atlas: Atlas, *, alone: bool) -> None:
    """Read answers in words that an older version read by the rules of this one; what models said stays as it is.

    Raises InputError unless this process is `alone` in the run: other shards may be writing.
    """
    path = folder / "predict.json"
    settings = read_json(path)
    files = _written(folder)
    in_words = "format" in (settings.get("identity") or {})
    if settings.get("reading") == READING_VERSION or not files or not in_words:
        return
    if not alone:
        what = "answers were read by an older version of hba, and would be mixed with others"
        raise InputError(what, where=str(folder), fix="Run the command once without shards: it reads them anew.")
    from hba.evaluate.answers import read

    prompts = {key: row.problem for key, row, _ in atlas.said()}
    for file in files:
        found = []
        for old in _mended(file, atlas.taxonomy):
            if old.output is not None and old.probs is None and old.id in prompts:
                prompt, cut = prompts[old.id], was_cut(old.finish)
                rule, answer, label = read(old.output, old.dataset, atlas.taxonomy, prompt=prompt, cut=cut)
                old = replace(old, rule=rule, answer=answer, label=label)
            found.append(old)
        write_predictions(file, found)
    write_json(path, {**settings, "reading": READING_VERSION})


def grown(before: Mapping[str, Any], atlas: Atlas, selection: Mapping[str, Any] | None, known: Set[str]) -> bool:
    """Whether `atlas` holds the rows for which predict.json says `before`, word for word, and others beside them.

    Those rows are the first ones, or the ones whose ids are `known` (answered, or in quarantine). A pilot of chosen
    rows does not grow into the whole: the selection is the same.
    """
    data = before.get("data") or {}
    rows, fingerprint = data.get("rows"), data.get("fingerprint")
    if before.get("selection") != selection or not isinstance(rows, int) or rows >= len(atlas):
        return False
    if atlas[:rows].fingerprint == fingerprint:
        return True
    there = np.flatnonzero([key in known for key in atlas.ids])
    return len(there) == rows and atlas.select(there).fingerprint == fingerprint


def start_predictions(folder: Path, settings: dict[str, Any], atlas: Atlas) -> None:
    """Write predict.json, or check that it says the same. Raises InputError naming what differs.

    Where rows have come to those of before, and nothing else is different, the new ones are asked beside them.

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
        taxonomy, files = atlas.taxonomy, _written(folder)
        if differing == ["data"]:
            known = {line.id for name in FILES for file in folder.rglob(name) for line in _whole_lines(file)}
            earlier = read_json(path)
            if grown(earlier, atlas, settings["selection"], known):
                write_json(path, settings | {key: earlier[key] for key in ("addresses",) if key in earlier})
                return
        if any(not p.failed for file in files for p in _mended(file, taxonomy)):
            fix = "Choose another --run, or remove predictions.jsonl and predict.json."
            rows = (read_json(path).get("data") or {}).get("rows")
            counts = f" ({rows:,} rows; now {len(atlas):,} are asked for)" if "data" in differing and rows else ""
            what = f"holds predictions with another {', '.join(differing)}{counts}"
            raise InputError(what, where=str(folder), fix=fix)
        for file in files:
            file.unlink(missing_ok=True)
    write_json(path, settings)


def _identity(settings: dict[str, Any]) -> dict[str, Any]:
    """What decides the predictions, under the names that a message uses. How a checkpoint is called does not.

    A key of `encode` that an older version did not have was what its default is now.
    """
    known = {key: value for key, value in (settings.get("identity") or {}).items() if key != "checkpoint"}
    kept = {key: settings.get(key) for key in ("backend", "split")}
    encode = {f"encode.{key}": value for key, value in {**_DEFAULT_ENCODE, **(settings.get("encode") or {})}.items()}
    data = settings.get("data") or {}
    return {**known, **kept, **encode, "data": data.get("fingerprint")}
