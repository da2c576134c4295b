"""`hba ask`: what a model makes of somebody's own clips, sounds, pictures and texts.

The files become rows of an atlas that lives as long as the question, one a file and question, and are answered as
`hba predict` answers rows: the same encoding, the same backends, the same reading of words. The rows carry an answer
only because the schema wants one; nothing compares it with anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from hba.atlas.build import Medium, bring, look_at, row_of
from hba.atlas.rows import Quarantined
from hba.errors import InputError, MediaError, nearest
from hba.evaluate.backends.interface import (
    LOCAL,
    WORDLESS,
    Predicted,
    Unanswered,
    answerable,
    detect,
    known,
    open_backend,
    predict,
    require_backend,
)
from hba.evaluate.config import PredictConfig
from hba.evaluate.predict import EVERYTHING, encoding_of, open_rows
from hba.storage import atomic_write
from hba.taxonomy import BUILTIN, FILE, Taxonomy, of_folder, save_beside

FREE = "siq2"  # a dataset without labels, whose rows are answered in words
FEW_ROWS = 64  # for these no worker process is started: that takes longer than to decode them


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a model says of a file. With an `error` it says nothing.

    `answer` is the label, or the model's words where there are no labels; `probs` gives the probability of each label
    of the dataset's domain, which only heads and `generation.read=likelihood` know. `text` is all that the model said.
    """

    file: str
    task: str
    dataset: str
    answer: str | None
    probs: dict[str, float] | None = None
    text: str | None = None
    error: str | None = None


def ask(
    model: str | Path,
    files: str | Path | Sequence[str | Path],
    *,
    tasks: Sequence[str] | None = None,
    datasets: Sequence[str] | None = None,
    question: str | None = None,
    transcript: str | None = None,
    backend: str | None = None,
    config: PredictConfig | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Reply]:
    """What `model` answers of each of `files` (or of a folder of them), in their order.

    `tasks` are keys such as EMO, `datasets` keys such as cremad, whose labels are then offered; a model with heads is
    asked about everything that it was trained for where neither is given. `question` is asked in place of a task's own;
    alone, it is answered in words. `transcript` is what is said in the file.

    A file that cannot be read has an error in its replies. Raises InputError for a path that is missing, a folder
    without media, an unknown task, and a question that the model cannot be asked.
    """
    require_backend(str(model), backend)
    paths = found_files([files] if isinstance(files, str | Path) else files)
    taxonomy = taxonomy_of(str(model))
    config = config or PredictConfig()
    media, broken = _looked_at(paths)
    name = known(backend) if backend else detect(str(model))
    if encoding_of(str(model), name, config).sound_of_clips != "off":
        # The rows name clips alone, as those of its training did: how their sound is heard is for the encoding to say.
        media = [one._replace(kinds=("video",)) if "video" in one.kinds else one for one in media]
    named = tasks is not None or datasets is not None
    keys = datasets_of(taxonomy, tasks, datasets, question)
    rows = [(medium, key) for medium in media for key in keys]
    if len(rows) <= FEW_ROWS:
        config = replace(config, loader=replace(config.loader, workers=0))
    replies: dict[Path, dict[str, Reply]] = {path: {} for path in paths}
    for path, reason in broken.items():
        replies[path][""] = Reply(file=str(path), task="", dataset="", answer=None, error=reason)
    if rows:
        with atlas_of(rows, taxonomy, question, transcript) as folder:
            steps = _answered(str(model), folder, config, backend, explicit=named or question is not None)
            for done, step in enumerate(steps, start=1):
                about = step.sample if isinstance(step, Unanswered) else step
                medium, key = rows[int(about.id)]
                replies[medium.path][key] = reply_of(step, medium.path, key, taxonomy)
                progress(done, len(rows))
            progress(len(rows), len(rows))  # those that the model has no head for are left out
    return [replies[path][key] for path in paths for key in ("", *keys) if key in replies[path]]


def found_files(given: Iterable[str | Path]) -> list[Path]:
    """The files meant: each as it is, of a folder its files in order of their names, hidden ones left out.

    Raises InputError for a path that does not exist, and for a folder without files.
    """
    paths: list[Path] = []
    for each in map(Path, given):
        if each.is_dir():
            inside = sorted(path for path in each.iterdir() if path.is_file() and not path.name.startswith("."))
            if not inside:
                raise InputError("no files in this folder", where=str(each), fix="Give a folder of clips, or files.")
            paths += inside
        elif each.is_file():
            paths.append(each)
        else:
            raise InputError("no such file or folder", where=str(each), fix="Check the path.")
    if not paths:
        raise InputError("no file is given", where="hba ask", fix="Name one, such as clip.mp4.")
    return list(dict.fromkeys(paths))


def taxonomy_of(model: str) -> Taxonomy:
    """The tasks and labels that a run was made with, where it kept them; else the published ones."""
    return of_folder(model) if (Path(model) / FILE).is_file() else BUILTIN


def datasets_of(
    taxonomy: Taxonomy, tasks: Sequence[str] | None, datasets: Sequence[str] | None, question: str | None
) -> list[str]:
    """Keys of the datasets whose rows are asked: those that are named, and of each task the one whose labels say the
    most; where none is named one without labels for a question, else one of every task."""
    if tasks is None and datasets is None:
        return [FREE] if question else _one_each(taxonomy)
    keys = [taxonomy.dataset(key).key for key in datasets or ()]
    for name in tasks or ():
        if name not in taxonomy.tasks:
            raise InputError(f"unknown task {name!r}", where="--task", fix=nearest(name, taxonomy.tasks))
        keys.append(_widest(taxonomy, name))
    return list(dict.fromkeys(keys))


def _one_each(taxonomy: Taxonomy) -> list[str]:
    """A dataset of every task that has labels; two tasks of one domain are one question."""
    by_domain: dict[str, str] = {}
    for name in taxonomy.tasks:
        key = _widest(taxonomy, name)
        domain = taxonomy.dataset(key).domain
        if domain is not None:
            by_domain.setdefault(domain, key)
    return list(by_domain.values())


def _widest(taxonomy: Taxonomy, task: str) -> str:
    """The dataset of a task with the most labels, of several an English one."""
    keys = [key for key, about in taxonomy.datasets.items() if about.task == task]
    about = sorted((taxonomy.dataset(key) for key in keys), key=lambda one: (one.language == "en", len(one.labels)))
    return about[-1].key


def _looked_at(paths: Sequence[Path]) -> tuple[list[Medium], dict[Path, str]]:
    """What each file holds, and why some cannot be read."""
    media, broken = [], {}
    for path in paths:
        try:
            media.append(look_at(path))
        except MediaError as error:
            broken[path] = error.what
    return media, broken


@contextmanager
def atlas_of(
    rows: Sequence[tuple[Medium, str]], taxonomy: Taxonomy, question: str | None, transcript: str | None
) -> Iterator[Path]:
    """A folder with the rows as an atlas; media are linked into it, or copied from another disk. Gone afterwards."""
    with TemporaryDirectory(prefix="hba-ask-") as name:
        folder = Path(name).resolve()
        inside: dict[Path, str] = {}
        for medium, _ in rows:
            if medium.kinds and medium.path not in inside:
                inside[medium.path] = f"media/{len(inside)}{medium.path.suffix.lower()}"
                bring(medium.path, folder / inside[medium.path])
        with atomic_write(folder / "asked.jsonl") as handle:
            for number, (medium, key) in enumerate(rows):
                place = inside.get(medium.path, "")
                row = row_of(medium, place, key, taxonomy, question=question, transcript=transcript)
                handle.write(json.dumps(row | {"id": str(number)}, ensure_ascii=False) + "\n")
        save_beside(taxonomy, folder)
        yield folder


def _answered(
    model: str, folder: Path, config: PredictConfig, backend: str | None, *, explicit: bool
) -> Iterator[Predicted]:
    """What becomes of each row, in the backend's order. With `explicit` one that the model cannot answer is an error,
    without it is left out."""
    opening = open_rows(model, str(folder), split="asked", config=config, backend=backend, selection=EVERYTHING)
    atlas = opening.atlas
    if not explicit and opening.backend not in WORDLESS:
        what = f"{model} answers in words: it has to be asked something"
        raise InputError(what, where="hba ask", fix="Give --task EMO (or others), or --question.")
    if opening.backend in LOCAL:
        from hba.model.process import prepare_process

        prepare_process(seed=0)
    answering = open_backend(opening.backend, opening)
    rows = answerable(atlas, answering)
    if explicit:
        left = np.setdiff1d(np.arange(len(atlas)), rows)
        if len(left):
            task = atlas[int(left[0])].dataset
            what = f"{model} was not trained to answer rows of {task}"
            fix = "Ask another task, or a model that answers in words (--backend hf, or --backend openai)."
            raise InputError(what, where="hba ask", fix=fix)
    yield from predict(atlas, answering.batches(atlas, rows), answering)


def reply_of(step: Predicted, file: Path, dataset: str, taxonomy: Taxonomy) -> Reply:
    about: dict[str, Any] = {"file": str(file), "task": taxonomy.dataset(dataset).task or "", "dataset": dataset}
    if isinstance(step, Unanswered | Quarantined):
        return Reply(**about, answer=None, error=step.reason)
    if step.error is not None:
        return Reply(**about, answer=None, text=step.output, error=step.error)
    answer = step.label if step.label is not None else step.answer
    return Reply(**about, answer=answer, probs=step.probs, text=step.output)
