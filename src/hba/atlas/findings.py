"""What a check of an atlas has to say: findings with a level, a code, a place and a fix.

An error makes the atlas unfit (a bad row, a broken file, a leak between splits), a warning asks for a look, a note is
for information. Codes are stable names for scripts; `CODES` says in one sentence what each means. Findings have one
order, whatever order the work was done in, so that an interrupted check ends with the same list as any other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

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
    return tuple(sorted(findings, key=_order))


def _order(finding: Finding) -> tuple[Any, ...]:
    codes = list(CODES)
    where = tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", finding.where))
    return LEVELS.index(finding.level), codes.index(finding.code), where, finding.message
