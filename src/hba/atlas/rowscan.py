"""Every row of every split against schema and taxonomy: all that is wrong, where opening an atlas stops at the first.

The checks are those of `rows`, applied one by one to a row that does not pass them together, and a few that opening
leaves out: tags without media, empty prompts and answers, labels that the taxonomy does not list for a dataset. A
`Catalogue` remembers of the good rows what the checks across splits need: which media they name, and what they ask.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from hba.atlas.columns import Columns
from hba.atlas.findings import Finding, at_places
from hba.atlas.rowfiles import MediumName, RawRow, read_rows
from hba.atlas.rows import PATH_FIELDS, RowChecker, check_fields, decode_row, label_of, signature_of
from hba.atlas.sample import MEDIA_FIELDS, Field, Row
from hba.atlas.split import SplitFiles, find_files, parse_split, present_splits
from hba.errors import InputError
from hba.storage import check_relative
from hba.taxonomy import PUBLISHED, Taxonomy, of_folder

_TAGS = (("<image>", "images"), ("<video>", "videos"), ("<audio>", "audios"))
_SUFFIXES: dict[str, list[str]] = PUBLISHED["task_suffixes"]


class Place(NamedTuple):
    """A row: numbers of its split and its file in the catalogue, and its line (or row of a shard), from 1."""

    split: int
    file: int
    line: int


class Asked(NamedTuple):
    """What makes two rows the same question: the prompt's hash and the numbers of the row's media."""

    place: Place
    dataset: str
    problem: bytes
    media: tuple[int, ...]


@dataclass
class Use:
    """A medium, the rows that name it, and the dataset of the first."""

    field: Field
    name: MediumName
    dataset: str
    places: list[Place]


@dataclass(frozen=True)
class SplitRows:
    """What was read of one split; `columns` hold the good rows, one entry a file."""

    name: str
    num_rows: int
    num_bad: int
    columns: tuple[Columns, ...]


@dataclass
class Catalogue:
    """Everything that the rows of an atlas say, as far as the checks after them need it."""

    root: Path
    taxonomy: Taxonomy
    files: list[str] = field(default_factory=list)
    splits: list[SplitRows] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    _numbers: dict[tuple[Field, MediumName], int] = field(default_factory=dict)
    _ids: dict[str, Place] = field(default_factory=dict)
    _unlisted: dict[tuple[int, str, str], list[Place]] = field(default_factory=dict)
    _suffixes: dict[tuple[int, str, str], list[Place]] = field(default_factory=dict)

    def where(self, place: Place, name: str | None = None) -> str:
        """'file:line, field', the file relative to the atlas."""
        text = f"{self.files[place.file]}:{place.line}"
        return f"{text}, {name}" if name else text

    def add_split(self, found: SplitFiles) -> None:
        """Read the rows of one split. What is wrong with them becomes findings; nothing is raised."""
        number, num_bad, num_rows, columns = len(self.splits), 0, 0, []
        for path in found.files:
            file = (path.parent.resolve() / path.name).relative_to(self.root).as_posix()
            self.files.append(file)
            checker = RowChecker(self.taxonomy, split=found.name, file=file)
            try:
                for raw in read_rows(path, file):
                    num_rows += 1
                    num_bad += not self._add(raw, checker, Place(number, len(self.files) - 1, raw.line))
            except InputError as error:  # of the file as a whole
                self._report("split-unreadable", error.where or file, error.what, error.fix)
            columns.append(checker.columns.build())
        if num_rows == 0:
            self._report("split-unreadable", self.files[-1], "has no rows", "Write at least one row.")
        self.splits.append(SplitRows(found.name, num_rows, num_bad, tuple(columns)))

    def _report(self, code: str, where: str, message: str, fix: str) -> None:
        self.findings.append(Finding(level="error", code=code, where=where, message=message, fix=fix))

    def _add(self, raw: RawRow, checker: RowChecker, place: Place) -> bool:
        """Check a row and note what it names; whether it is good."""
        before = len(self.findings)
        if isinstance(raw.text, InputError):
            self._report("row-json", raw.text.where, raw.text.what, raw.text.fix)
            return False
        try:
            row = decode_row(raw.text, self.files[place.file], raw.line)
            check_fields(raw.text, self.where(place))
        except InputError as error:
            no_object = error.what.startswith(("not valid JSON", "expected a JSON object"))
            code = "row-json" if no_object else "row-schema"
            self._report(code, error.where, error.what, error.fix)
            return False
        try:
            checker.check(row, raw.line)
        except InputError as error:
            self.findings.extend(self._faults(row, place, error))
        self._check_words(row, place)
        self._check_id(row, place)
        good = len(self.findings) == before
        self._note_media(row, raw, place, good=good)
        return good

    def _faults(self, row: Row, place: Place, first: InputError) -> Iterator[Finding]:
        """Each thing that is wrong with a row, one finding a field."""
        where = self.where(place)
        checks: list[tuple[str, Callable[[], object]]] = [
            ("row-dataset", partial(self.taxonomy.dataset, row.dataset)),
            ("row-label", partial(label_of, row, self.taxonomy, where)),
            ("row-signature", partial(signature_of, row, where)),
        ]
        for name in PATH_FIELDS:
            for path in getattr(row, name):
                checks.append(("row-path", partial(check_relative, path, where=f"{where}, {name}")))
        found = 0
        for code, check in checks:
            if code == "row-label" and found:
                continue  # without its dataset a row has no labels
            try:
                check()
            except InputError as error:
                found += 1
                what = f"field 'dataset': {error.what}" if code == "row-dataset" else error.what
                yield Finding(level="error", code=code, where=error.where or where, message=what, fix=error.fix)
        if not found:  # what is left is the id, or a check that opening has and this list lacks
            yield Finding(level="error", code="row-id", where=where, message=first.what, fix=first.fix)

    def _check_id(self, row: Row, place: Place) -> None:
        if row.id is None:
            return
        first = self._ids.setdefault(row.id, place)
        if first != place and (first.split, first.file) != (place.split, place.file):  # those of a file are found above
            what = f"field 'id': {row.id!r} is also the id of {self.where(first)}"
            self._report("row-id", self.where(place), what, "Give every row its own id.")

    def _check_words(self, row: Row, place: Place) -> None:
        if "<" in row.problem:
            for tag, name in _TAGS:
                tags, media = row.problem.count(tag), len(getattr(row, name))
                if tags > media:
                    what = f"field 'problem': has {tags} {tag} tags for {media} {name}"
                    self._report("row-tags", self.where(place), what, "Remove the tag or add the medium.")
        if not row.problem.strip():
            self._report("row-empty", self.where(place), "field 'problem': is empty", "Write the prompt.")
        dataset = self.taxonomy.datasets.get(row.dataset)
        if dataset is None:
            return
        if dataset.free_form and not row.answer.strip():
            self._report("row-empty", self.where(place), "field 'answer': is empty", "Write the answer.")
        listed = () if dataset.multilabel else dataset.labels
        self._note_oddities(row, place, free_form=dataset.free_form, listed=listed)

    def _note_oddities(self, row: Row, place: Place, *, free_form: bool, listed: tuple[str, ...]) -> None:
        """What is counted and reported once a split: labels beyond the listed ones, contradicting task names."""
        suffix = row.task.lower().replace("-", "_").split("_")[-1]
        if suffix in _SUFFIXES["classification" if free_form else "free_form"]:
            self._suffixes.setdefault((place.split, row.dataset, row.task), []).append(place)
        if not free_form and listed:
            label = self.taxonomy.canonical_label(row.dataset, row.class_label or row.answer)
            if label is not None and label not in listed:
                self._unlisted.setdefault((place.split, row.dataset, label), []).append(place)

    def oddities(self) -> Iterator[Finding]:
        """One warning a split, dataset and label (or task name) that is not as the taxonomy has it."""
        for (_, dataset, label), places in self._unlisted.items():
            what = f"{len(places):,} rows of {dataset} carry {label!r}, which the taxonomy does not list for it"
            yield at_places(
                "warning", "label-unlisted", [self.where(p) for p in places], what, "Check the source of the labels."
            )
        for (_, dataset, task), places in self._suffixes.items():
            kind = "free-form answers" if self.taxonomy.dataset(dataset).free_form else "labels"
            what = f"{len(places):,} rows have the task {task!r}, but {dataset} has {kind}"
            yield at_places(
                "warning", "task-suffix", [self.where(p) for p in places], what, "Correct the task or the dataset."
            )

    def _note_media(self, row: Row, raw: RawRow, place: Place, *, good: bool) -> None:
        numbers: list[int] = []
        for name in MEDIA_FIELDS:
            for index, path in enumerate(getattr(row, name)):
                if not good and _leaves(path):
                    continue
                number = self._number(name, raw.medium(name, index, path), row.dataset)
                self.uses[number].places.append(place)
                if not name.startswith("ext_"):
                    numbers.append(number)
        if not good:
            return
        digest = hashlib.blake2b(row.problem.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        self.asked.append(Asked(place, row.dataset, digest, tuple(numbers)))

    def _number(self, name: Field, medium: MediumName, dataset: str) -> int:
        number = self._numbers.setdefault((name, medium), len(self.uses))
        if number == len(self.uses):
            self.uses.append(Use(name, medium, dataset, []))
        return number

    def labels(self) -> Counter[tuple[str, str]]:
        """How often each (dataset, label) occurs among the good rows."""
        counts: Counter[tuple[str, str]] = Counter()
        for split in self.splits:
            for columns in split.columns:
                for dataset, code in zip(columns.dataset_codes.tolist(), columns.label_codes.tolist(), strict=True):
                    if code >= 0:
                        counts[columns.datasets[dataset], self.taxonomy.class_names[code]] += 1
        return counts


def read_catalogue(path: Path, splits: Sequence[str] | None, taxonomy: Taxonomy | None) -> Catalogue:
    """The rows of whole splits at `path` (a folder, or one file); `splits` None takes all that are there.

    `taxonomy` None is the published one with what `taxonomy.yaml` beside the rows adds. Raises InputError when
    there is no atlas, a split is not there, or its files lie in several folders.
    """
    for spec in splits or ():
        if parse_split(spec) != (spec, None, None):
            raise InputError(f"{spec!r} is a part of a split", where=str(path), fix="Name whole splits.")
    found = [find_files(path, name) for name in dict.fromkeys(splits or present_splits(path))]
    roots = {file.parent.resolve() for files in found for file in files.files}
    if len(roots) > 1:
        listed = ", ".join(sorted(map(str, roots)))
        raise InputError(f"its splits lie in several folders: {listed}", where=str(path), fix="Name one of them.")
    root = roots.pop()
    catalogue = Catalogue(root, taxonomy or of_folder(root))
    for files in found:
        catalogue.add_split(files)
    return catalogue


def _leaves(path: str) -> bool:
    try:
        check_relative(path, where="")
    except InputError:
        return True
    return False
