"""Every row of every split against schema and taxonomy: all that is wrong, where opening an atlas stops at the first.

The checks are those of `rows.RowChecker`, and a few that opening leaves out: tags without media, empty prompts and
answers, labels that the taxonomy does not list for a dataset. A `Catalogue` remembers of the good rows what the checks
across splits need: which media they name, and what they ask. A row of a shard comes as the JSON that it would be in
JSONL, so that one set of checks serves both; its embedded media come as slices of the shard, as its index part tells.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import msgspec

from hba.atlas.jsonl import read_lines
from hba.atlas.names import SplitFiles, find_files, parse_split, present_splits
from hba.atlas.rows import MEDIA_FIELDS, UNNAMED, Columns, Field, Row, RowChecker, check_fields, decode_row
from hba.atlas.source import PLACES, Slice, Source
from hba.errors import InputError, MediaError
from hba.storage import check_relative, machine_fault, plural
from hba.taxonomy import PUBLISHED, Taxonomy, of_folder

if TYPE_CHECKING:
    from hba.atlas.parquet import ShardMedia

_BATCH_ROWS = 1024


class Embedded(NamedTuple):
    """A medium of a shard without an index part, or in a compressed column: whoever wants its bytes looks for them."""

    shard: Path
    row: int
    name: Field
    entry: int


MediumName: TypeAlias = str | Slice | Embedded
"""a path relative to the folder of the rows, or where a medium lies in a shard"""


class RawRow(NamedTuple):
    """One row as it is stored, or what is wrong with its line; `embedded` holds the media of a row of a shard."""

    line: int
    text: bytes | InputError
    embedded: dict[Field, list[MediumName]] | None = None


def read_rows(path: Path, file: str) -> Iterator[RawRow]:
    """Yield every row of a file, which messages call `file`. Raises InputError when the whole file cannot be read."""
    try:
        if path.suffix == ".jsonl":
            yield from (RawRow(line, text) for line, _, text in read_lines(path, file))
        else:
            yield from _shard_rows(path)
    except OSError as error:
        refused = InputError(f"cannot be read ({error.strerror})", where=file, fix="Restore the file.")
        raise machine_fault(error, file) or refused from None


def _shard_rows(shard: Path) -> Iterator[RawRow]:
    from hba.atlas import parquet  # pyarrow takes as long to load as a small atlas to open

    table = parquet.read_index(shard)
    if table is None:
        with parquet.open_shard(shard) as file:
            table = parquet.read_light(file, shard)
    for start in range(0, table.num_rows, _BATCH_ROWS):
        for row, values in enumerate(table.slice(start, _BATCH_ROWS).to_pylist(), start):
            places = {name: _places(values, name, shard, row) for name in MEDIA_FIELDS}
            said = {name: values[name] for name in Row.__struct_fields__ if values.get(name) is not None}
            said |= {name: [UNNAMED] * len(media) for name, media in places.items()}
            yield RawRow(row + 1, msgspec.json.encode(said, enc_hook=repr), places)


def embedded_medium(medium: Embedded) -> Source:
    """The bytes of a medium of a shard without an index, or in a compressed column. Raises MediaError."""
    return _media_of(medium.shard).medium(medium.row, medium.name, medium.entry, where="")


@lru_cache(maxsize=4)
def _media_of(shard: Path) -> ShardMedia:
    """The media of a shard, open while they are read: processes that check them go from row to row."""
    from hba.atlas.pages import KeptPages
    from hba.atlas.parquet import ShardMedia

    return ShardMedia(shard, KeptPages())


def _places(values: dict[str, Any], name: Field, shard: Path, row: int) -> list[MediumName]:
    offsets, sizes, checksums = (values.get(f"{name}_{what}") for what in PLACES)
    if offsets is None or sizes is None or checksums is None:
        try:
            count = _media_of(shard).count(row, name, where="")
        except MediaError:  # which is raised again when the medium is looked at
            count = 1
        return [Embedded(shard, row, name, index) for index in range(count)]
    return [
        Slice(shard, offset, size, crcs) if offset >= 0 else Embedded(shard, row, name, index)
        for index, (offset, size, crcs) in enumerate(zip(offsets, sizes, checksums, strict=True))
    ]


# What a check of an atlas has to say: findings with a level, a code, a place and a fix.
#
# An error makes the atlas unfit (a bad row, a broken file, a leak between splits), a warning asks for a look, a note is
# for information. Codes are stable names for scripts; `CODES` says in one sentence what each means. Findings have one
# order, whatever order the work was done in, so that an interrupted check ends with the same list as any other.


Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note")
MAX_PLACES = 20

CODES = {
    "split-unreadable": "A split cannot be read at all.",
    "card-broken": "atlas.json is no card of an atlas.",
    "row-json": "A line is no JSON object.",
    "row-schema": "A field is missing or of another type than published.",
    "row-dataset": "A dataset is not in the taxonomy.",
    "row-label": "A label is not one of its dataset's domain, or contradicts the answer.",
    "row-signature": "A modality signature is unknown, or other than the row's media.",
    "row-path": "A path leads out of the atlas.",
    "row-id": "An id occurs more than once.",
    "row-tags": "A prompt has more media tags than the row has media.",
    "row-empty": "A prompt, or a free-form answer, is empty.",
    "row-unlabelled": "Rows have no answer: they can be predicted, and are neither trained on nor scored.",
    "row-leak": "The same prompt with the same media lies in more than one split.",
    "media-missing": "A file is not there, is empty, or cannot be opened.",
    "media-outside": "A file is a link out of the atlas.",
    "media-broken": "A file is cut off, corrupt, of another kind or shape, or beyond the limits.",
    "media-crash": "A file crashes or stalls its decoder.",
    "media-leak": "Files of the same content lie in more than one split.",
    "media-blank": "A sound is silent, or a picture of one colour, from end to end.",
    "descriptor-shape": "A descriptor has another shape than most of its dataset's.",
    "label-unlisted": "A label is in the domain, but not among those that the taxonomy lists for the dataset.",
    "label-absent": "A label that the taxonomy lists for a dataset never occurs.",
    "task-suffix": "A task's name says classification for free-form answers, or the other way round.",
    "release-size": "The number of rows is other than published.",
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong. `where` is 'file:line, field', relative to the atlas; `also` are further places."""

    level: Level
    code: str
    where: str
    message: str
    fix: str
    also: tuple[str, ...] = ()
    num_places: int = 1

    def to_json(self) -> dict[str, Any]:
        """As it stands in validate.json."""
        return asdict(self) | {"also": list(self.also)}


def at_places(level: Level, code: str, places: Sequence[str], message: str, fix: str) -> Finding:
    """A finding that concerns several places, the first of which leads."""
    also = tuple(places[1 : MAX_PLACES + 1])
    return Finding(level=level, code=code, where=places[0], message=message, fix=fix, also=also, num_places=len(places))


def in_order(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Errors first, then by code, then by file and line."""
    codes = list(CODES)

    def order(finding: Finding) -> tuple[Any, ...]:
        where = tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", finding.where))
        return LEVELS.index(finding.level), codes.index(finding.code), where, finding.message

    return tuple(sorted(findings, key=order))


# --- every row of every split -----------------------------------------------------------------------------------------


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
    _odd: dict[tuple[str, int, str, str], list[Place]] = field(default_factory=dict)
    """rows by code, split, dataset and its label or task: what is counted and reported once"""

    def where(self, place: Place, name: str | None = None) -> str:
        """'file:line, field', the file relative to the atlas."""
        text = f"{self.files[place.file]}:{place.line}"
        return f"{text}, {name}" if name else text

    @property
    def columns(self) -> Iterator[Columns]:
        """Of the good rows, one for each file."""
        return chain.from_iterable(split.columns for split in self.splits)

    def add_split(self, found: SplitFiles) -> None:
        """Read the rows of one split. What is wrong with them becomes findings; nothing is raised."""
        number, before = len(self.splits), len(self.findings)
        num_bad, num_rows, columns = 0, 0, []
        for path in found.files:
            file = (path.parent.resolve() / path.name).relative_to(self.root).as_posix()
            self.files.append(file)
            checker = RowChecker(self.taxonomy, split=found.name, place=partial("{}:{}".format, file))
            try:
                for raw in read_rows(path, file):
                    num_rows += 1
                    num_bad += not self._add(raw, checker, Place(number, len(self.files) - 1, raw.line))
            except InputError as error:  # of the file as a whole
                self._report("split-unreadable", error.where or file, error.what, error.fix)
            columns.append(checker.columns())
        if num_rows == 0 and len(self.findings) == before:
            self._report("split-unreadable", self.files[-1], "has no rows", "Write at least one row.")
        self.splits.append(SplitRows(found.name, num_rows, num_bad, tuple(columns)))

    def _report(self, code: str, where: str, message: str, fix: str) -> None:
        self.findings.append(Finding(level="error", code=code, where=where, message=message, fix=fix))

    def _add(self, raw: RawRow, checker: RowChecker, place: Place) -> bool:
        """Check a row and note what it names; whether it is good."""
        before, where = len(self.findings), self.where(place)
        try:
            if isinstance(raw.text, InputError):
                raise raw.text
            row = decode_row(raw.text, self.files[place.file], raw.line)
            check_fields(raw.text, where)
        except InputError as error:
            no_object = error is raw.text or error.what.startswith(("not valid JSON", "expected a JSON object"))
            self._report("row-json" if no_object else "row-schema", error.where, error.what, error.fix)
            return False
        try:
            checker.check(row, raw.line)
        except InputError:
            for code, fault in checker.faults(row, raw.line):
                self._report(code, fault.where, fault.what, fault.fix)
        first = place if row.id is None else self._ids.setdefault(row.id, place)
        if (first.split, first.file) != (place.split, place.file):  # those of one file are found above
            what = f"field 'id': {row.id!r} is also the id of {self.where(first)}"
            self._report("row-id", where, what, "Give every row its own id.")
        self._check_words(row, place, where)
        good = len(self.findings) == before
        self._note_media(row, raw, place, good=good)
        return good

    def _check_words(self, row: Row, place: Place, where: str) -> None:
        """What opening does not look at: tags, empty texts, and labels and tasks that are at odds with the dataset."""
        for tag, name in _TAGS if "<" in row.problem else ():
            tags, media = row.problem.count(tag), len(getattr(row, name))
            if tags > media:
                what = f"field 'problem': has {tags} {tag} tags for {media} {name}"
                self._report("row-tags", where, what, "Remove the tag or add the medium.")
        if not row.problem.strip():
            self._report("row-empty", where, "field 'problem': is empty", "Write the prompt.")
        dataset = self.taxonomy.datasets.get(row.dataset)
        if dataset is None:
            return
        if row.answer is None and (dataset.domain is None or not row.class_label):
            self._odd.setdefault(("row-unlabelled", place.split, row.dataset, ""), []).append(place)
        elif dataset.free_form and not (row.answer or "").strip():
            self._report("row-empty", where, "field 'answer': is empty", "Write the answer.")
        suffix = row.task.lower().replace("-", "_").split("_")[-1]
        if suffix in _SUFFIXES["classification" if dataset.free_form else "free_form"]:
            self._odd.setdefault(("task-suffix", place.split, row.dataset, row.task), []).append(place)
        if dataset.domain is not None and dataset.labels:
            label = self.taxonomy.canonical_label(row.dataset, row.class_label or row.answer or "")
            if label is not None and label not in dataset.labels:
                self._odd.setdefault(("label-unlisted", place.split, row.dataset, label), []).append(place)

    def oddities(self) -> Iterator[Finding]:
        """One warning a split, dataset and label (or task name) that is not as the taxonomy has it; one note for rows
        without an answer."""
        for (code, _, dataset, word), places in self._odd.items():
            level: Level = "warning"
            if code == "row-unlabelled":
                level, what = "note", f"of {dataset} have no answer: they can be predicted, and are in no score"
                fix = "None is needed; write 'answer' where it is known."
            elif code == "label-unlisted":
                what = f"of {dataset} carry {word!r}, which the taxonomy does not list for it"
                fix = "Check the source of the labels."
            else:
                kind = "free-form answers" if self.taxonomy.dataset(dataset).free_form else "labels"
                what, fix = f"have the task {word!r}, but {dataset} has {kind}", "Correct the task or the dataset."
            yield at_places(level, code, [self.where(p) for p in places], f"{plural(len(places), 'row')} {what}", fix)

    def _note_media(self, row: Row, raw: RawRow, place: Place, *, good: bool) -> None:
        numbers: list[int] = []
        for name in MEDIA_FIELDS:
            for index, path in enumerate(getattr(row, name)):
                if not good and _leaves(path):
                    continue
                medium = path if raw.embedded is None else raw.embedded[name][index]
                number = self._numbers.setdefault((name, medium), len(self.uses))
                if number == len(self.uses):
                    self.uses.append(Use(name, medium, row.dataset, []))
                self.uses[number].places.append(place)
                if not name.startswith("ext_"):
                    numbers.append(number)
        if good:
            digest = hashlib.blake2b(row.problem.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            self.asked.append(Asked(place, row.dataset, digest, tuple(numbers)))


def _leaves(path: str) -> bool:
    try:
        check_relative(path, where="")
    except InputError:
        return True
    return False


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
