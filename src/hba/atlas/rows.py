"""Rows and samples, their columns, and the checks that every row passes when an atlas is opened, whatever its store.

A row is decoded with strict types (`Row`), its dataset and label are in the taxonomy, its modality signature is known
and agrees with its media, its paths stay below the atlas folder, and its id occurs once. Each failure is an InputError
that names file and line, the field, what was expected, what was found, and a fix.
"""

from __future__ import annotations

import json
import logging
import re
import traceback
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import compress, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from hba.atlas.source import Source
from hba.errors import HbaError, InputError, MachineError, MediaError, NoSoundTrackError, TaxonomyError, nearest
from hba.storage import check_relative, machine_fault
from hba.taxonomy import Taxonomy, visible

if TYPE_CHECKING:
    from hba.atlas.decoded import DecodedCache
    from hba.atlas.media import Audio, Descriptor, Frames, Image, Video

T = TypeVar("T")
_log = logging.getLogger(__name__)
_SHOWN = 3  # samples that a warning names

# Rows and samples: what one line of the atlas says, before and after it is checked against the taxonomy.
#
# `Row` is the published schema as it lies on disk. `Sample` is a row with its id, its canonical label and its place
# (file and line), whose media are opened only when asked for. A sample never decodes anything by itself and never
# hands out a path outside its atlas.


Field = Literal["images", "videos", "audios", "ext_video_feats", "ext_audio_feats"]
KINDS = {"images": "image", "videos": "video", "audios": "audio"}
UNNAMED = "-"
"""stands for the path of an embedded medium whose shard does not tell it"""
MEDIA_FIELDS: tuple[Field, ...] = ("images", "videos", "audios", "ext_video_feats", "ext_audio_feats")


class Row(msgspec.Struct, kw_only=True, frozen=True, gc=False):
    """The published schema of a JSONL row; fields that are not named here are kept in `Sample.extra`.

    An `answer` that is null or left out is not known: such a row can be predicted, and nothing else."""

    problem: str
    dataset: str
    task: str
    modality_signature: str
    answer: str | None = None
    class_label: str | None = None
    images: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()
    audios: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    ext_video_feats: tuple[str, ...] = ()
    ext_audio_feats: tuple[str, ...] = ()
    id: str | None = None


class Said(NamedTuple):
    """What a row says: its id, the published fields, and the others."""

    id: str
    row: Row
    extra: Mapping[str, Any]


class Quarantined(NamedTuple):
    """A sample that was left out, with the place and the reason; one line of quarantine.jsonl."""

    id: str
    split: str
    dataset: str
    where: str
    field: str
    reason: str


def out_of_memory(error: MemoryError, where: str) -> MachineError | MediaError:
    """What a lack of memory means: the machine is short of it, or else the medium asks for what nobody has."""
    fix = "Restore the medium, or remove the row."
    return machine_fault(error, where) or MediaError("asks for more memory than there is", where=where, fix=fix)


class MediaSource(Protocol):
    """What a store gives a sample to open its media with."""

    def medium(self, number: int, name: Field, index: int, *, where: str) -> Source:
        """The file or bytes of medium `index` of field `name` of row `number`. Raises MediaError."""
        ...


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One row of the atlas. `label` is canonical, None for free-form rows; `answer` is None where nobody knows it;
    `where` is 'file:line'."""

    id: str
    split: str
    where: str
    number: int
    problem: str
    answer: str | None
    dataset: str
    task: str
    modality_signature: str
    label: str | None
    images: int
    videos: int
    audios: int
    texts: tuple[str, ...]
    ext_video_feats: int
    ext_audio_feats: int
    extra: Mapping[str, Any] = field(default_factory=dict)
    source: MediaSource
    refused: dict[str, Quarantined] = field(default_factory=dict, repr=False, compare=False)
    """where a medium that cannot be read is recorded: the quarantine of the atlas that gave the sample"""

    @classmethod
    def of(cls, said: Said, taxonomy: Taxonomy, where: str, **about: Any) -> Sample:
        """The sample that a checked row makes; `about`: split, number, source and the number of media by field."""
        row = said.row
        return cls(
            id=said.id,
            where=where,
            problem=row.problem,
            answer=row.answer,
            dataset=row.dataset,
            task=row.task,
            texts=row.texts,
            modality_signature=signature_of(row, where, check_media=False),
            label=label_of(row, taxonomy, where).name,
            extra=said.extra,
            **about,
        )

    @property
    def target(self) -> str:
        """What a model should answer: the canonical label, or the row's free-form answer.

        Raises InputError for a row without an answer, which can be predicted and nothing else."""
        if self.label is None and self.answer is None:
            raise InputError("the row has no answer", where=self.where, fix="Write 'answer', or leave the row out.")
        return self.label if self.label is not None else str(self.answer)

    @property
    def answered(self) -> bool:
        """Whether the row says what is right."""
        return self.label is not None or self.answer is not None

    def place(self, name: Field) -> str:
        """'file:line, field' for messages about a medium of this sample."""
        return f"{self.where}, {name}"

    def _sources(self, name: Field) -> list[Source]:
        count: int = getattr(self, name)
        kind = KINDS.get(name)
        if kind is not None and (kind in self.modality_signature.split("_")) != (count > 0):
            # Elsewhere a row is refused for it when the atlas is opened; of a shard without an index nobody knew.
            what = f"the row has {count} of them, but its modality_signature is {self.modality_signature!r}"
            raise MediaError(what, where=self.place(name), fix="Restore the media, or correct the signature.")
        return [self.source.medium(self.number, name, i, where=self.place(name)) for i in range(count)]

    @contextmanager
    def blamed(self, name: Field | Literal["problem"] | None = None) -> Iterator[None]:
        """The boundary of one sample: whatever its content raises inside, in any library, is its own MediaError.

        `name`: the field that is read, where one alone can be the cause. Errors of hba stay what they are: what the
        machine lacks and what a user set wrong are no fault of a sample.
        """
        where = self.where if name is None else f"{self.where}, {name}"
        try:
            yield
        except HbaError:
            raise
        except MemoryError as error:
            raise out_of_memory(error, where) from None
        except Exception as error:
            fault = machine_fault(error, where)
            if fault is not None:
                raise fault from error
            said = [type(error).__name__, *str(error).strip().splitlines()[:1]]
            at = traceback.extract_tb(error.__traceback__)[-1]
            what = f"cannot be encoded ({': '.join(said)[:240]}; {Path(at.filename).name}:{at.lineno})"
            raise MediaError(what, where=where, fix="Repair the row, or remove it.") from error

    def _loaded(self, name: Field, load: Callable[..., T]) -> list[T]:
        """`load` of every medium of a field. Decoders are imported by who wants one: rows are opened without them."""
        try:
            return [load(source, where=self.place(name)) for source in self._sources(name)]
        except MediaError as error:
            self.refused[self.id] = self.quarantined(error)
            raise
        except MemoryError as error:
            raise out_of_memory(error, self.where) from None

    def load_audios(self, *, decoded: DecodedCache | None = None) -> list[Audio]:
        """Decode every audio to 16 kHz mono, or take it from `decoded`. Raises MediaError naming file, line, field."""
        from hba.atlas.media import load_audio

        return self._loaded("audios", load_audio if decoded is None else decoded.audio)

    def load_videos(
        self,
        num_frames: int,
        *,
        frames: Frames = "exact",
        fps: float | None = None,
        decoded: DecodedCache | None = None,
    ) -> list[Video]:
        """Decode `num_frames` evenly spaced frames of every video, or `fps` a second and at most so many.

        From `decoded` they come at the size in which it keeps them. Raises MediaError naming the place.
        """
        from hba.atlas.media import load_video

        load = load_video if decoded is None else decoded.video
        return self._loaded("videos", partial(load, num_frames=num_frames, frames=frames, fps=fps))

    @property
    def hears_its_videos(self) -> bool:
        """Whether the sounds that the row names are its videos themselves, as `hba atlas build` writes rows of clips.

        Raises MediaError for media that are not there.
        """
        return self.audios == self.videos > 0 and self._sources("audios") == self._sources("videos")

    def load_sounds_of_videos(self, *, decoded: DecodedCache | None = None) -> list[Audio | None]:
        """The sound track of every video as `load_audios` gives sounds; None for a video that has none."""
        from hba.atlas.media import load_audio

        def load(source: Source, *, where: str) -> Audio | None:
            try:
                return (load_audio if decoded is None else decoded.audio)(source, where=where)
            except NoSoundTrackError:
                return None

        return self._loaded("videos", load)

    def read_videos(self) -> list[bytes]:
        """The bytes of every video as it is stored, not decoded. Raises MediaError naming the place."""
        from hba.atlas.media import load_bytes

        return self._loaded("videos", load_bytes)

    def load_images(self) -> list[Image]:
        """Decode every image. Raises MediaError naming the place."""
        from hba.atlas.media import load_image

        return self._loaded("images", load_image)

    def load_descriptors(self, name: Literal["ext_video_feats", "ext_audio_feats"]) -> list[Descriptor]:
        """Load every `.pt` descriptor of a field without unpickling code. Raises MediaError naming the place."""
        from hba.atlas.media import load_descriptor

        return self._loaded(name, load_descriptor)

    def quarantined(self, error: MediaError) -> Quarantined:
        """The quarantine record of this sample for an error raised while its media were read."""
        name = next((f for f in (*MEDIA_FIELDS, "problem") if error.where.endswith(f", {f}")), "row")
        return Quarantined(self.id, self.split, self.dataset, error.where or self.where, name, error.what)


class SilentClips:
    """Says of which samples a clip has no sound track, where it was to be heard: the first by name, then how many."""

    def __init__(self) -> None:
        self._samples: set[str] = set()
        self._said = 0

    def add(self, sample: Sample) -> None:
        """One more. The first is named at once."""
        self._samples.add(f"{sample.split}/{sample.id}")
        if not self._said:
            self._said = 1
            told = "%s: the clip has no sound track. It is seen alone, as others of its kind are."
            _log.warning(told, sample.place("videos"))

    def say(self) -> None:
        """How many there are, unless that was said."""
        if len(self._samples) > self._said:
            self._said = len(self._samples)
            some = ", ".join(sorted(self._samples)[:_SHOWN])
            _log.warning("%d samples have clips without a sound track, which are seen alone: %s", self._said, some)


# What a sampler needs to know of every row, as compact columns.
#
# Built once while an atlas is opened; 100,000 rows take about 3 MB. `select` makes the columns of a view. Codes index
# the tuple of names beside them.


Codes = npt.NDArray[np.int16]
Counts = npt.NDArray[np.int32]

UNLABELLED = -2
"""the label code of a row whose answer nobody knows: it can be predicted, and is neither trained on nor scored"""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """One entry a row in every array; `label_codes` is the global class index, -1 for free-form rows, UNLABELLED for
    rows without an answer, whatever their dataset."""

    datasets: tuple[str, ...]
    dataset_codes: Codes
    tasks: tuple[str, ...]
    """task keys such as EMO; '' stands for datasets of no task"""
    task_codes: Codes
    signatures: tuple[str, ...]
    signature_codes: Codes
    label_codes: Codes
    problem_chars: Counts
    answer_chars: Counts
    num_images: Counts
    num_videos: Counts
    num_audios: Counts

    def __len__(self) -> int:
        return len(self.dataset_codes)

    def select(self, rows: npt.NDArray[np.integer]) -> Columns:
        """The columns of the given rows, in their order."""
        taken: dict[str, Any] = {}
        for each in fields(self):
            value = getattr(self, each.name)
            taken[each.name] = value[rows] if isinstance(value, np.ndarray) else value
        return Columns(**taken)

    def labels(self, class_names: Sequence[str]) -> dict[str, dict[str, int]]:
        """How often each label occurs, by dataset; free-form datasets have none."""
        labels: dict[str, dict[str, int]] = {}
        for code, dataset in enumerate(self.datasets):
            chosen = self.label_codes[self.dataset_codes == code]
            counts = count_codes(chosen[chosen >= 0], class_names)
            if counts:
                labels[dataset] = counts
        return labels


def count_codes(codes: npt.NDArray[np.integer], names: Sequence[str]) -> dict[str, int]:
    """How often each name occurs, in the order of the codes; one that does not occur is left out."""
    found, numbers = np.unique(codes, return_counts=True)
    return {names[code]: number for code, number in zip(found.tolist(), numbers.tolist(), strict=True)}


def make_columns(
    taxonomy: Taxonomy, datasets: tuple[str, ...], signatures: tuple[str, ...], values_KN: npt.NDArray[np.int32]
) -> Columns:
    """Columns of N rows from [8, N]: codes of `datasets` and `signatures`, label codes, characters of problem and
    answer, counts of images, videos, audios."""
    dataset_codes, signature_codes, label_codes = values_KN[:3].astype(np.int16)
    task_of = [taxonomy.dataset(key).task or "" for key in datasets]
    tasks = tuple(dict.fromkeys(task_of))
    return Columns(
        datasets=datasets,
        tasks=tasks,
        signatures=signatures,
        task_codes=np.array([tasks.index(task) for task in task_of], np.int16)[dataset_codes],
        dataset_codes=dataset_codes,
        signature_codes=signature_codes,
        label_codes=label_codes,
        problem_chars=values_KN[3],
        answer_chars=values_KN[4],
        num_images=values_KN[5],
        num_videos=values_KN[6],
        num_audios=values_KN[7],
    )


# --- the checks of a row ----------------------------------------------------------------------------------------------


_FIX_JSON = "Repair the line; if it is the last one, the file was cut off."
# Every order of the same modalities is one signature; the published order is the one that is kept.
SIGNATURES: dict[frozenset[str], str] = {
    frozenset(kinds): "_".join(["text", *kinds])
    for mask in product((False, True), repeat=3)
    for kinds in [tuple(compress(KINDS.values(), mask))]
}
PATH_FIELDS = (*MEDIA_FIELDS, "texts")
NAME_FIELDS = ("dataset", "task", "modality_signature")
KNOWN_FIELDS = frozenset(Row.__struct_fields__)
_decoder = msgspec.json.Decoder(Row, strict=True)
_canonical_encoder = msgspec.json.Encoder(order="sorted", enc_hook=repr)


class Label(NamedTuple):
    """A row's canonical label and its global class index; None and -1 for free-form rows, None and UNLABELLED for rows
    without an answer."""

    name: str | None
    code: int


def decode_row(raw: bytes, file: str, line: int) -> Row:
    """One JSON line as a Row. Raises InputError naming file, line and field."""
    try:
        if not raw.isascii():
            raw.decode()  # the decoder does not look at the text of fields that it does not know
        return _visible(_decoder.decode(raw))
    except msgspec.ValidationError as error:
        raise _schema_error(str(error), f"{file}:{line}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"not valid JSON ({error})", where=f"{file}:{line}", fix=_FIX_JSON) from None


def _visible(row: Row) -> Row:
    """The row with its names as a reader sees them; what else it says is its own."""
    if row.dataset.isascii() and row.modality_signature.isascii() and row.task.isascii():
        return row
    return msgspec.structs.replace(row, **{name: visible(getattr(row, name)) for name in NAME_FIELDS})


def canonical(identity: str, said: Mapping[str, Any], extra: Mapping[str, Any]) -> bytes:
    """What a row says, in the same bytes whatever form it is stored in; media are named by their paths.

    `said` holds the published fields of a row with the id `identity`; those that may be left out may be left out.
    """
    get = said.get
    names = (visible(said[name]) for name in NAME_FIELDS)
    paths = [get(name) or () for name in PATH_FIELDS]
    text = (said["problem"], get("answer"))
    return _canonical_encoder.encode((identity, *text, *names, get("class_label") or None, paths, extra))


def decode_fields(raw: bytes, where: str) -> dict[str, Any]:
    """All fields of a JSON line. Raises InputError naming the place for a number that no computer holds."""
    try:
        fields: dict[str, Any] = msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InputError(f"an extra field cannot be read ({error})", where=where, fix=_FIX_JSON) from None
    return fields


def check_fields(raw: bytes, where: str) -> None:
    """What is wrong with a line that decodes as a row: InputError for a number as above, or a key that stands twice."""
    decode_fields(raw, where)
    try:
        json.loads(raw, object_pairs_hook=partial(_once, where))
    except RecursionError:
        return  # deeper than Python's reader goes


def _once(where: str, pairs: list[tuple[str, Any]]) -> None:
    names = [name for name, _ in pairs]
    for number, name in enumerate(names):
        if name in names[:number]:
            fix = "Keep one of the two; readers take the last."
            raise InputError(f"field {name!r}: stands twice in the row", where=where, fix=fix)


def _schema_error(message: str, where: str) -> InputError:
    missing = re.search(r"missing required field `(\w+)`", message)
    if missing:
        what = f"field {missing[1]!r}: is missing"
        return InputError(what, where=where, fix=f"Add {missing[1]!r}; see the schema of a row in docs.")
    place = re.search(r" - at `\$\.?(.*?)`$", message)
    field = place[1] if place else ""
    found = message[: place.start()] if place else message
    found = found.replace("Expected", "expected").replace("got", "found").replace("`", "")
    found = found.replace("expected object", "expected a JSON object")
    if field == "answer":
        found = found.replace("str | null", "str")
    what = f"field {field!r}: {found}" if field else found
    return InputError(what, where=where, fix="Write the value with the type of the published schema.")


class RowChecker:
    """Checks the rows of one split, in whatever form they lie, and remembers what it has seen.

    `place` names the row of a line ('file:line', lines from 1). Almost every row is right and says what another said
    before, so it is asked on failure alone.
    """

    def __init__(self, taxonomy: Taxonomy, *, split: str, place: Callable[[int], str]) -> None:
        self._taxonomy, self._split, self._place = taxonomy, split, place
        self._labels: dict[tuple[str, str | None, str | None], Label] = {}
        self._signatures: dict[tuple[str, bool, bool, bool, bool], str] = {}
        self._ids: dict[str, int] = {}
        self._codes: tuple[dict[str, int], dict[str, int]] = ({}, {})
        self._flat = array("i")

    def check(self, row: Row, line: int) -> None:
        """Check the row of a line and add it to the columns. Raises InputError naming file, line and field."""
        said, label = self.meaning(row, line)
        if _is_suspect(row):
            check_paths(row, self._place(line))
        self.check_id(row.id, line)
        datasets, signatures = self._codes
        dataset = datasets.setdefault(row.dataset, len(datasets))
        signature = signatures.setdefault(said, len(signatures))
        counts = (len(row.images), len(row.videos), len(row.audios))
        self._flat.extend((dataset, signature, label, len(row.problem), len(row.answer or ""), *counts))

    def meaning(self, row: Row, line: int, *, media_known: bool = True) -> tuple[str, int]:
        """Signature and label code of a row. Raises InputError for what is unknown or contradicts another field; the
        media of the row count only where they are known here."""
        media = (row.modality_signature, bool(row.images), bool(row.videos), bool(row.audios), media_known)
        signature = self._signatures.get(media)
        if signature is None:
            signature = signature_of(row, self._place(line), check_media=media_known)
            self._signatures[media] = signature
        said = (row.dataset, row.class_label or None, row.answer)
        label = self._labels.get(said)
        if label is None:
            label = label_of(row, self._taxonomy, self._place(line))
            if label.name is not None:  # free-form answers hardly ever repeat
                self._labels[said] = label
        return signature, label.code

    def check_id(self, given: str | None, line: int) -> None:
        """Raise InputError for an id that is empty or is that of another row, too."""
        identity = given if given is not None else f"{self._split}/{line}"
        if not identity.strip():
            fix = "Remove it, or give every row its own."
            raise InputError("field 'id': is empty", where=self._place(line), fix=fix)
        first = self._ids.setdefault(identity, line)
        if first != line:
            (file, _, number), where = self._place(first).rpartition(":"), self._place(line)
            other = f"line {number}" if where.rpartition(":")[0] == file else f"{file}:{number}"
            what = f"field 'id': {identity!r} is also the id of {other}"
            raise InputError(what, where=where, fix="Give every row its own id.")

    def faults(self, row: Row, line: int) -> Iterator[tuple[str, InputError]]:
        """All that is wrong with a row that `check` refuses, each with its code in `scan.CODES`."""
        where = self._place(line)
        label = "row-label" if row.dataset in self._taxonomy.datasets else "row-dataset"
        checks: list[tuple[str, Callable[[], object]]] = [
            (label, partial(label_of, row, self._taxonomy, where)),
            ("row-signature", partial(signature_of, row, where)),
        ]
        for name in PATH_FIELDS:
            for path in getattr(row, name):
                checks.append(("row-path", partial(check_relative, path, where=f"{where}, {name}")))
        found = False
        for code, check in checks:
            try:
                check()
            except InputError as error:
                found = True
                yield code, error
        if not found:
            try:
                self.check_id(row.id, line)
            except InputError as error:
                yield "row-id", error

    def columns(self) -> Columns:
        """Those of the rows that passed."""
        values_KN = np.ascontiguousarray(np.frombuffer(self._flat, np.int32).reshape(-1, 8).T)
        datasets, signatures = map(tuple, self._codes)
        return make_columns(self._taxonomy, datasets, signatures, values_KN)


def label_of(row: Row, taxonomy: Taxonomy, where: str) -> Label:
    """The label of a row. Raises InputError for an unknown dataset or label, or contradicting fields."""
    try:
        dataset = taxonomy.dataset(row.dataset)
    except TaxonomyError as error:
        raise InputError(f"field 'dataset': {error.what}", where=where, fix=error.fix) from None
    if row.answer is None and (dataset.domain is None or not row.class_label):
        return Label(None, UNLABELLED)
    if dataset.free_form:
        return Label(None, -1)
    given = row.answer or ""
    field = "class_label" if row.class_label else "answer"
    try:
        name = taxonomy.require_label(row.dataset, row.class_label or given)
    except TaxonomyError as error:
        raise InputError(f"field {field!r}: {error.what}", where=where, fix=error.fix) from None
    said = taxonomy.canonical_label(row.dataset, given) if given.strip() else name
    if said != name:
        what = f"field 'class_label': {name!r} contradicts the answer {given!r}"
        raise InputError(what, where=where, fix="Make the two say the same label.")
    if dataset.multilabel:  # checked, but no class of any head
        return Label(None, -1)
    return Label(name, taxonomy.global_index(row.dataset, name))


def signature_kinds(signature: str) -> frozenset[str]:
    """The modalities of a signature beside text: image, video, audio."""
    return frozenset(signature.split("_")[1:])


def signature_of(row: Row, where: str, *, check_media: bool = True) -> str:
    """The signature in its published order. Raises InputError when it is unknown or contradicts the row's media.

    `check_media` off: the media of the row are not known here.
    """
    first, *rest = row.modality_signature.split("_")
    signature = SIGNATURES.get(frozenset(rest)) if first == "text" and len(set(rest)) == len(rest) else None
    if signature is None:
        what = f"field 'modality_signature': unknown {row.modality_signature!r}"
        raise InputError(what, where=where, fix=nearest(row.modality_signature, SIGNATURES.values()))
    lists = {"image": row.images, "video": row.videos, "audio": row.audios}
    actual = SIGNATURES[frozenset(kind for kind, entries in lists.items() if entries)]
    if check_media and actual != signature:
        what = f"field 'modality_signature': is {row.modality_signature!r}, but the row's media are {actual!r}"
        raise InputError(what, where=where, fix="Correct the signature, or add or remove the media.")
    return signature


def _is_suspect(row: Row) -> bool:
    """Whether any path needs the full check, which is slow; what joins the paths also shows how each begins."""
    parts = (*row.images, *row.videos, *row.audios, *row.texts, *row.ext_video_feats, *row.ext_audio_feats)
    if not parts:
        return False
    joined = "\n" + "\n".join(parts) + "\n"
    begins = "\n/" in joined or "\n\n" in joined
    return begins or ".." in joined or ":" in joined or "\\" in joined or "\0" in joined


def check_paths(row: Row, where: str) -> None:
    """Raise InputError for a path of the row that leaves the atlas folder."""
    for name in PATH_FIELDS:
        for path in getattr(row, name):
            check_relative(path, where=f"{where}, {name}")
