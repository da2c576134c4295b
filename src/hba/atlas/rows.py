"""The checks that every row passes when an atlas is opened, whatever store it comes from.

A row is decoded with strict types (`Row`), its dataset and label are in the taxonomy, its modality signature is known
and agrees with its media, its paths stay below the atlas folder, and its id occurs once. Each failure is an InputError
that names file and line, the field, what was expected, what was found, and a fix.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import msgspec

from hba.atlas.columns import ColumnsBuilder
from hba.atlas.sample import MEDIA_FIELDS, Row
from hba.errors import InputError, TaxonomyError, nearest
from hba.labelsets import visible
from hba.storage import check_relative
from hba.taxonomy import Taxonomy

_FIX_JSON = "Repair the line; if it is the last one, the file was cut off."
_KINDS = ("image", "video", "audio")
# Every order of the same modalities is one signature; the published order is the one that is kept.
SIGNATURES: dict[frozenset[str], str] = {
    frozenset(kind for kind, there in zip(_KINDS, mask, strict=True) if there): "_".join(
        ["text", *(kind for kind, there in zip(_KINDS, mask, strict=True) if there)]
    )
    for mask in product((False, True), repeat=3)
}
PATH_FIELDS = (*MEDIA_FIELDS, "texts")
NAME_FIELDS = ("dataset", "task", "modality_signature")
KNOWN_FIELDS = frozenset(Row.__struct_fields__)
_decoder = msgspec.json.Decoder(Row, strict=True)
_canonical_encoder = msgspec.json.Encoder(order="sorted", enc_hook=repr)


class Label(NamedTuple):
    """A row's canonical label and its global class index; None and -1 for free-form rows."""

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
    text = (said["problem"], said["answer"])
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
    what = f"field {field!r}: {found}" if field else found
    return InputError(what, where=where, fix="Write the value with the type of the published schema.")


class RowChecker:
    """Checks the rows of one split in turn and remembers what it has seen.

    Almost every row is right and says what another said before, so places are put into words on failure alone.
    """

    def __init__(self, taxonomy: Taxonomy, *, split: str, file: str) -> None:
        self._taxonomy, self._split, self._file = taxonomy, split, file
        self._labels: dict[tuple[str, str | None, str], Label] = {}
        self._signatures: dict[tuple[str, bool, bool, bool], str] = {}
        self._ids: dict[str, int] = {}
        self.columns = ColumnsBuilder(taxonomy)

    def check(self, row: Row, line: int) -> None:
        """Check the row of a line and add it to the columns. Raises InputError naming file, line and field."""
        images, videos, audios = len(row.images), len(row.videos), len(row.audios)
        media = (row.modality_signature, images > 0, videos > 0, audios > 0)
        signature = self._signatures.get(media)
        if signature is None:
            signature = self._signatures[media] = signature_of(row, self._where(line))
        said = (row.dataset, row.class_label or None, row.answer)
        label = self._labels.get(said)
        if label is None:
            label = label_of(row, self._taxonomy, self._where(line))
            if label.name is not None:  # free-form answers hardly ever repeat
                self._labels[said] = label
        if _is_suspect(row):
            check_paths(row, self._where(line))
        self._check_id(row, line)
        self.columns.add(row.dataset, signature, label.code, row.problem, row.answer, (images, videos, audios))

    def _where(self, line: int) -> str:
        return f"{self._file}:{line}"

    def _check_id(self, row: Row, line: int) -> None:
        identity = row.id if row.id is not None else f"{self._split}/{line}"
        if not identity.strip():
            fix = "Remove it, or give every row its own."
            raise InputError("field 'id': is empty", where=self._where(line), fix=fix)
        first = self._ids.setdefault(identity, line)
        if first != line:
            what = f"field 'id': {identity!r} is also the id of line {first}"
            raise InputError(what, where=self._where(line), fix="Give every row its own id.")


def label_of(row: Row, taxonomy: Taxonomy, where: str) -> Label:
    """The label of a row. Raises InputError for an unknown dataset or label, or contradicting fields."""
    try:
        dataset = taxonomy.dataset(row.dataset)
    except TaxonomyError as error:
        raise InputError(f"field 'dataset': {error.what}", where=where, fix=error.fix) from None
    if dataset.free_form:
        return Label(None, -1)
    field = "class_label" if row.class_label else "answer"
    try:
        name = taxonomy.require_label(row.dataset, row.class_label or row.answer)
    except TaxonomyError as error:
        raise InputError(f"field {field!r}: {error.what}", where=where, fix=error.fix) from None
    said = taxonomy.canonical_label(row.dataset, row.answer) if row.answer.strip() else name
    if said != name:
        what = f"field 'class_label': {name!r} contradicts the answer {row.answer!r}"
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
    for field in PATH_FIELDS:
        for path in getattr(row, field):
            check_relative(path, where=f"{where}, {field}")
