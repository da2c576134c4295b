"""`hba atlas validate`: is everything in this atlas as it must be, and may its splits be trusted?

Three passes: every row against schema and taxonomy (`scan`), every medium decoded (`survey`), then what only shows
across rows and splits: leaks, descriptors of odd shapes, counts against the published ones. Nothing is repaired and
nothing in the atlas is written. Equal data give an equal result, with any number of workers, killed in between or not.
What a run leaves out because it cannot be read, its quarantine, is kept by `hba.run`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from hba.atlas.names import CARD, hub_id_of, read_card
from hba.atlas.probe import UNKNOWN, Facts, Medium, Outcome, Refused, locate, survey
from hba.atlas.rows import MEDIA_FIELDS, count_codes
from hba.atlas.scan import (
    LEVELS,
    Asked,
    Catalogue,
    Finding,
    Level,
    MediumName,
    Place,
    Use,
    at_places,
    in_order,
    read_catalogue,
)
from hba.environment import hba_version
from hba.errors import InputError
from hba.storage import write_json
from hba.taxonomy import BUILTIN, PUBLISHED, Taxonomy

LOG, RESULT = "media.jsonl", "validate.json"
OnProgress = Callable[[int, int], None]

# What only shows once all rows are read and all media probed. Everything here is a function of a `Catalogue` and of
# what a survey found; nothing is opened.


def _media_findings(catalogue: Catalogue, outcomes: Mapping[int, Outcome]) -> Iterator[Finding]:
    """One finding for each medium that was refused or holds nothing, with the rows that name it."""
    for number, outcome in outcomes.items():
        use = catalogue.uses[number]
        if isinstance(outcome, Refused):
            yield at_places("error", outcome.code, _places(catalogue, use), _named(use.name, outcome.what), outcome.fix)
        elif outcome.blank:
            what = "is silent from end to end" if use.field == "audios" else "is of one colour throughout"
            fix = "Look at its source: undecodable media are sometimes stored so."
            yield at_places("warning", "media-blank", _places(catalogue, use), _named(use.name, what), fix)


def _places(catalogue: Catalogue, use: Use) -> list[str]:
    return [catalogue.where(place, use.field) for place in use.places]


def _named(name: MediumName, what: str) -> str:
    return what if not isinstance(name, str) or name in what else f"{name} {what}"


def _shape_findings(catalogue: Catalogue, outcomes: Mapping[int, Outcome]) -> Iterator[Finding]:
    """Descriptors whose shape, but for the number of frames, is not that of most others of their dataset."""
    groups: dict[tuple[str, str], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for number, outcome in outcomes.items():
        if isinstance(outcome, Facts) and outcome.shapes is not None:
            use = catalogue.uses[number]
            groups[use.field, use.dataset][shape_text(outcome.shapes)].append(number)
    for shapes in groups.values():
        usual = max(shapes, key=lambda shape: (len(shapes[shape]), shape))
        for shape, numbers in shapes.items():
            for number in numbers if shape != usual else ():
                use = catalogue.uses[number]
                what = _named(use.name, f"has the shape {shape}, where {len(shapes[usual]):,} others have {usual}")
                fix = "Extract all descriptors of a kind with the same settings."
                yield at_places("error", "descriptor-shape", _places(catalogue, use), what, fix)


def shape_text(shapes: Mapping[str, Sequence[int]]) -> str:
    """Shapes with T for the number of frames; a vector has none."""
    texts = []
    for name, shape in sorted(shapes.items()):
        sides = [str(side) for side in shape] if len(shape) == 1 else ["T", *map(str, shape[1:])]
        texts.append(f"{name} [{', '.join(sides)}]".strip())
    return ", ".join(texts)


def count_signatures(catalogue: Catalogue) -> Counter[str]:
    """Good rows by modality signature."""
    counts = Counter[str]()
    for columns in catalogue.columns:
        counts.update(count_codes(columns.signature_codes, columns.signatures))
    return counts


def _count_findings(catalogue: Catalogue, *, complete: bool, release: bool) -> Iterator[Finding]:
    """Where the counts are other than published: errors for the release, else one note in all."""
    size: dict[str, Any] = PUBLISHED["size"]
    rows = {split.name: split.num_rows for split in catalogue.splits}
    have = {name: rows.get(name, 0) for name in PUBLISHED["splits_jsonl"] if complete or name in rows}
    if complete:
        have |= {name: count for name, count in count_signatures(catalogue).items() if name in size}
        have |= {name: 0 for name in ("text", "text_audio", "text_video_audio") if name not in have}
        have |= {"total": sum(rows.values())}
    wrong = [f"{name} {number:,} for {size[name]:,}" for name, number in have.items() if number != size[name]]
    finding = partial(Finding, where=catalogue.files[0])
    if wrong and not release:
        message = f"is not the published release, nor all of it: {', '.join(wrong)} rows"
        yield finding(level="note", code="release-size", message=message, fix="None is needed.")
    if not release:
        return
    again = "Download it again."
    for text in wrong:
        message = f"rows of the published release: found {text}"
        yield finding(level="error", code="release-size", message=message, fix=again)
    present: dict[str, set[str]] = {key: set() for columns in catalogue.columns for key in columns.datasets}
    for columns in catalogue.columns:
        for key, labels in columns.labels(catalogue.taxonomy.class_names).items():
            present[key] |= labels.keys()
    for key in sorted(present):
        for label in catalogue.taxonomy.dataset(key).labels:
            if label not in present[key]:
                yield finding(level="error", code="label-absent", message=f"{label!r} never occurs in {key}", fix=again)


# What lies in more than one split: media of the same content, and rows that ask the same about the same media.
#
# Content decides, not the name: media are the same when their bytes are. Only media whose size occurs in several splits
# can be, so that `to_hash` keeps the others from being hashed. Descriptors do not count, since clips without a face
# have equal ones. A leak that touches training data is an error, one between validation and test a warning; the same
# clip within one split is nothing.


TRAINING = "train"


def to_hash(media: Iterable[Medium], uses: Sequence[Use]) -> list[Medium]:
    """The media, with `hashed` set on those whose size occurs in more than one split."""
    media = list(media)
    splits_of: dict[int, set[int]] = defaultdict(set)
    for medium in media:
        if not medium.field.startswith("ext_"):
            splits_of[medium.num_bytes].update(place.split for place in uses[medium.number].places)
    unknown = any(medium.num_bytes == UNKNOWN for medium in media)
    several = {size for size, splits in splits_of.items() if len(splits) > 1}
    return [m._replace(hashed=(unknown or m.num_bytes in several) and not m.field.startswith("ext_")) for m in media]


def _leaks(catalogue: Catalogue, outcomes: Mapping[int, Outcome]) -> Iterator[Finding]:
    """A finding for each content and each question that lies in more than one split."""
    contents: dict[int, Hashable] = {}
    for number in range(len(catalogue.uses)):
        outcome = outcomes.get(number)
        contents[number] = (outcome.sha256 if isinstance(outcome, Facts) else None) or number
    yield from _media_leaks(catalogue, contents)
    yield from _row_leaks(catalogue, contents)


def _media_leaks(catalogue: Catalogue, contents: Mapping[int, Hashable]) -> Iterator[Finding]:
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for number, use in enumerate(catalogue.uses):
        if not use.field.startswith("ext_"):
            groups[contents[number]].append(number)
    for numbers in groups.values():
        uses = [catalogue.uses[number] for number in numbers]
        if len({place.split for use in uses for place in use.places}) > 1:
            rows = sorted({(place, number) for number, use in zip(numbers, uses, strict=True) for place in use.places})
            places = [(place, catalogue.uses[number].field) for place, number in rows]
            yield _leak(catalogue, "media-leak", places, _same([use.name for use in uses]))


def _row_leaks(catalogue: Catalogue, contents: Mapping[int, Hashable]) -> Iterator[Finding]:
    groups: dict[Hashable, list[Asked]] = defaultdict(list)
    for asked in catalogue.asked:
        groups[asked.problem, tuple(contents[number] for number in asked.media)].append(asked)
    for rows in groups.values():
        if len({row.place.split for row in rows}) > 1:
            what = "the same prompt with the same media is" if rows[0].media else "the same prompt is"
            yield _leak(catalogue, "row-leak", [(place, None) for place in sorted(row.place for row in rows)], what)


def _leak(catalogue: Catalogue, code: str, places: Sequence[tuple[Place, str | None]], what: str) -> Finding:
    names = dict.fromkeys(catalogue.splits[place.split].name for place, _ in places)
    message = f"{what} in the splits {' and '.join(names)}"
    where = [catalogue.where(place, field) for place, field in places]
    level: Level = "error" if TRAINING in names else "warning"
    return at_places(level, code, where, message, "Remove the rows from one of the splits.")


def _same(names: Sequence[MediumName]) -> str:
    files = sorted({name for name in names if isinstance(name, str)})
    if len(names) == 1:
        return f"{files[0]} is" if files else "this medium is"
    return f"{' and '.join(files[:3])} are the same and lie" if files else "these media are the same and lie"


# --- the validation ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MediaSummary:
    """The media of one field. `seconds` is the length of all together; a file that many rows name counts once."""

    num_files: int
    num_refused: int
    num_bytes: int
    seconds: float
    lengths: tuple[float, ...]
    """of each file in seconds, ascending"""
    sample_rates: Mapping[str, int]
    sizes: Mapping[str, int]
    """'640x360' to number of files; of a descriptor, its shape"""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What was found. `rows` maps a split to its rows, `bad_rows` to those with findings of their own."""

    root: Path
    quick: bool
    release: bool
    synthetic: bool
    rows: Mapping[str, int]
    bad_rows: Mapping[str, int]
    signatures: Mapping[str, int]
    media: Mapping[str, MediaSummary]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return self.count("error") == 0

    def count(self, level: str) -> int:
        """Number of findings of a level."""
        return sum(finding.level == level for finding in self.findings)

    def codes(self) -> dict[str, list[Finding]]:
        """Findings by code, in their order."""
        grouped: dict[str, list[Finding]] = {}
        for finding in self.findings:
            grouped.setdefault(finding.code, []).append(finding)
        return grouped

    def to_json(self) -> dict[str, Any]:
        """The content of validate.json."""
        media = {name: msgspec.to_builtins(entry) for name, entry in self.media.items()}
        for entry in media.values():
            del entry["lengths"]
        return {
            "hba_version": hba_version(),
            "root": str(self.root),
            "ok": self.ok,
            "mode": "quick" if self.quick else "full",
            "release": self.release,
            "synthetic": self.synthetic,
            "summary": {
                "rows": dict(self.rows),
                "bad_rows": dict(self.bad_rows),
                "signatures": dict(self.signatures),
                "media": media,
                "findings": {level: self.count(level) for level in LEVELS},
                "codes": {code: len(findings) for code, findings in self.codes().items()},
            },
            "findings": [finding.to_json() for finding in self.findings],
        }


def validate_atlas(
    path: str | Path,
    *,
    splits: Sequence[str] | None = None,
    out: str | Path | None = None,
    quick: bool = False,
    release: bool = False,
    fresh: bool = False,
    workers: int = 1,
    progress: OnProgress | None = None,
    taxonomy: Taxonomy | None = None,
) -> Validation:
    """Check the atlas at `path` (a folder, one file of rows, or a dataset on the hub) and say all that is wrong.

    A dataset on the hub is downloaded to the cache first, since every medium is opened.

    `splits` None takes all that are there. With `out`, a folder, validate.json is written there, and media.jsonl, by
    which an interrupted check resumes; `fresh` checks every file again. `quick` reads headers of media alone. `release`
    expects the published release. `progress(done, total)` is told of each medium. Raises InputError when there is no
    atlas, or a split is not there; what is wrong within it is a finding.
    """
    out, wanted = None if out is None else Path(out), hub_id_of(path)
    if wanted is not None:
        from hba.atlas.hub import local_copy  # the hub's client takes as long to load as a small atlas to open

        path = local_copy(wanted, splits, progress)
    path = Path(path)
    catalogue = read_catalogue(path, splits, taxonomy)
    media, outcomes = locate(catalogue)
    log = None if out is None else out / LOG
    if log is not None and fresh:
        log.unlink(missing_ok=True)
    media = to_hash(media, catalogue.uses)
    outcomes |= survey(media, log=log, quick=quick, workers=workers, progress=progress)
    synthetic, findings = False, [*catalogue.findings, *catalogue.oddities()]
    try:
        synthetic = read_card(catalogue.root).get("synthetic", False)
    except InputError as error:
        fix = "Repair the file; commands that need to know refuse the atlas."
        findings.append(Finding(level="error", code="card-broken", where=CARD, message=error.what, fix=fix))
    # A user's own datasets are not compared with the release.
    published = any(key in BUILTIN.datasets for columns in catalogue.columns for key in columns.datasets)
    if release or (published and not synthetic):
        findings += _count_findings(catalogue, complete=splits is None, release=release)
    for find in (_media_findings, _shape_findings, _leaks):
        findings += find(catalogue, outcomes)
    result = Validation(
        root=path,
        quick=quick,
        release=release,
        synthetic=synthetic,
        rows={split.name: split.num_rows for split in catalogue.splits},
        bad_rows={split.name: split.num_bad for split in catalogue.splits},
        signatures=dict(sorted(count_signatures(catalogue).items())),
        media=_summaries(media, outcomes, catalogue.uses),
        findings=in_order(findings),
    )
    if out is not None:
        write_json(out / RESULT, result.to_json())
    return result


def _summaries(
    media: Sequence[Medium], outcomes: Mapping[int, Outcome], uses: Sequence[Use]
) -> dict[str, MediaSummary]:
    num_bytes = {medium.number: max(medium.num_bytes, 0) for medium in media}
    made: dict[str, MediaSummary] = {}
    for field in MEDIA_FIELDS:
        numbers = [number for number, use in enumerate(uses) if use.field == field]
        facts = [fact for number in numbers if isinstance(fact := outcomes[number], Facts)]
        lengths = sorted(fact.seconds for fact in facts if fact.seconds is not None)
        sizes = Counter(f"{fact.width}x{fact.height}" for fact in facts if fact.width is not None)
        sizes += Counter(shape_text(fact.shapes) for fact in facts if fact.shapes is not None)
        if numbers:
            made[field] = MediaSummary(
                num_files=len(numbers),
                num_refused=len(numbers) - len(facts),
                num_bytes=sum(num_bytes.get(number, 0) for number in numbers),
                seconds=round(sum(lengths), 1),
                lengths=tuple(lengths),
                sample_rates=dict(sorted(Counter(f"{f.sample_rate} Hz" for f in facts if f.sample_rate).items())),
                sizes=dict(sizes.most_common()),
            )
    return made
