"""What lies in more than one split: media of the same content, and rows that ask the same about the same media.

Content decides, not the name: media are the same when their bytes are. Only media whose size occurs in several splits
can be, so that `to_hash` keeps the others from being hashed. Descriptors do not count, since clips without a face have
equal ones. A leak that touches training data is an error, one between validation and test a warning; the same clip
within one split is nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence

from hba.atlas.findings import Finding, Level, at_places
from hba.atlas.probe import Facts
from hba.atlas.rowfiles import MediumName
from hba.atlas.rowscan import Asked, Catalogue, Place, Use
from hba.atlas.survey import UNKNOWN, Medium, Outcome

TRAINING = "train"
_FIX = "Remove the rows from one of the splits."


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


def find_leaks(catalogue: Catalogue, outcomes: Mapping[int, Outcome]) -> Iterator[Finding]:
    """A finding for each content and each question that lies in more than one split."""
    contents = {number: _content(number, outcomes.get(number)) for number in range(len(catalogue.uses))}
    yield from _media_leaks(catalogue, contents)
    yield from _row_leaks(catalogue, contents)


def _content(number: int, outcome: Outcome | None) -> Hashable:
    hashed = outcome.sha256 if isinstance(outcome, Facts) else None
    return hashed if hashed is not None else number


def _media_leaks(catalogue: Catalogue, contents: Mapping[int, Hashable]) -> Iterator[Finding]:
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for number, use in enumerate(catalogue.uses):
        if not use.field.startswith("ext_"):
            groups[contents[number]].append(number)
    for numbers in groups.values():
        named = sorted({(place, number) for number in numbers for place in catalogue.uses[number].places})
        if len({place.split for place, _ in named}) > 1:
            rows = [place for place, _ in named]
            same = _same([catalogue.uses[number].name for number in numbers])
            message = f"{same} in the splits {_splits(catalogue, rows)}"
            places = [catalogue.where(place, catalogue.uses[number].field) for place, number in named]
            yield at_places(_level(catalogue, rows), "media-leak", places, message, _FIX)


def _row_leaks(catalogue: Catalogue, contents: Mapping[int, Hashable]) -> Iterator[Finding]:
    groups: dict[Hashable, list[Asked]] = defaultdict(list)
    for asked in catalogue.asked:
        groups[asked.problem, tuple(contents[number] for number in asked.media)].append(asked)
    for rows in groups.values():
        if len({row.place.split for row in rows}) > 1:
            places = sorted(row.place for row in rows)
            what = "the same prompt with the same media" if rows[0].media else "the same prompt"
            message = f"{what} is in the splits {_splits(catalogue, places)}"
            where = [catalogue.where(place) for place in places]
            yield at_places(_level(catalogue, places), "row-leak", where, message, _FIX)


def _splits(catalogue: Catalogue, places: Sequence[Place]) -> str:
    names = dict.fromkeys(catalogue.splits[place.split].name for place in places)
    return " and ".join(names)


def _level(catalogue: Catalogue, places: Sequence[Place]) -> Level:
    return "error" if any(catalogue.splits[place.split].name == TRAINING for place in places) else "warning"


def _same(names: Sequence[MediumName]) -> str:
    files = sorted({name for name in names if isinstance(name, str)})
    if len(names) == 1:
        return f"{files[0]} is" if files else "this medium is"
    return f"{' and '.join(files[:3])} are the same and lie" if files else "these media are the same and lie"
