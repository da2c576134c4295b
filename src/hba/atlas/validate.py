"""`hba atlas validate`: is everything in this atlas as it must be, and may its splits be trusted?

Three passes: every row against schema and taxonomy (`rowscan`), every medium decoded (`survey`), then what only shows
across rows and splits: leaks, descriptors of odd shapes, counts against the published ones. Nothing is repaired and
nothing in the atlas is written. Equal data give an equal result, with any number of workers, killed in between or not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from hba.atlas.checks import count_findings, count_signatures, media_findings, shape_findings, shape_text
from hba.atlas.findings import LEVELS, Finding, in_order
from hba.atlas.hub_id import local_copy
from hba.atlas.leaks import find_leaks, to_hash
from hba.atlas.probe import Facts
from hba.atlas.rowscan import Catalogue, Use, read_catalogue
from hba.atlas.sample import MEDIA_FIELDS
from hba.atlas.survey import Medium, Outcome, locate, survey
from hba.environment import hba_version
from hba.errors import InputError
from hba.storage import read_json, write_json
from hba.taxonomy import BUILTIN, Taxonomy

LOG, RESULT = "media.jsonl", "validate.json"
OnProgress = Callable[[int, int], None]


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
        media = {name: {**msgspec.to_builtins(entry)} for name, entry in self.media.items()}
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
    path, out = local_copy(path, splits, progress), None if out is None else Path(out)
    catalogue = read_catalogue(path, splits, taxonomy)
    media, outcomes = locate(catalogue)
    log = None if out is None else out / LOG
    if log is not None and fresh:
        log.unlink(missing_ok=True)
    media = to_hash(media, catalogue.uses)
    outcomes |= survey(media, log=log, quick=quick, workers=workers, progress=progress)
    card = _read_card(catalogue.root)
    compared = release or (not card.synthetic and _has_published(catalogue))
    counts = count_findings(catalogue, complete=splits is None, release=release) if compared else ()
    result = Validation(
        root=path,
        quick=quick,
        release=release,
        synthetic=card.synthetic,
        rows={split.name: split.num_rows for split in catalogue.splits},
        bad_rows={split.name: split.num_bad for split in catalogue.splits},
        signatures=dict(sorted(count_signatures(catalogue).items())),
        media=_summaries(media, outcomes, catalogue.uses),
        findings=in_order([*card.findings, *counts, *_findings(catalogue, outcomes)]),
    )
    if out is not None:
        write_json(out / RESULT, result.to_json())
    return result


def _findings(catalogue: Catalogue, outcomes: Mapping[int, Outcome]) -> Iterator[Finding]:
    yield from catalogue.findings
    yield from catalogue.oddities()
    yield from media_findings(catalogue, outcomes)
    yield from shape_findings(catalogue, outcomes)
    yield from find_leaks(catalogue, outcomes)


def _has_published(catalogue: Catalogue) -> bool:
    """Whether any dataset is a published one; a user's own are not compared with the release."""
    return any(key in BUILTIN.datasets for split in catalogue.splits for c in split.columns for key in c.datasets)


class _Card(NamedTuple):
    """What atlas.json says of the data, and what is wrong with it."""

    synthetic: bool
    findings: tuple[Finding, ...] = ()


def _read_card(root: Path) -> _Card:
    path = root / "atlas.json"
    if not path.is_file():
        return _Card(synthetic=False)
    what = "'synthetic': expected true or false"
    try:
        card = read_json(path)
        if isinstance(card, dict) and isinstance(card.get("synthetic", False), bool):
            return _Card(synthetic=card.get("synthetic", False))
    except InputError as error:
        what = error.what
    fix = "Repair the file; commands that need to know refuse the atlas."
    return _Card(False, (Finding(level="error", code="card-broken", where=path.name, message=what, fix=fix),))


def _summaries(
    media: Sequence[Medium], outcomes: Mapping[int, Outcome], uses: Sequence[Use]
) -> dict[str, MediaSummary]:
    there = {medium.number: medium for medium in media}
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
                num_bytes=sum(max(there[number].num_bytes, 0) for number in numbers if number in there),
                seconds=round(sum(lengths), 1),
                lengths=tuple(lengths),
                sample_rates=dict(sorted(Counter(f"{f.sample_rate} Hz" for f in facts if f.sample_rate).items())),
                sizes=dict(sizes.most_common()),
            )
    return made
