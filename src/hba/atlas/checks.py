"""What only shows once all rows are read and all media probed: findings that need more than one row to see.

Media that could not be read or hold nothing, with every row that names them; descriptors whose shape is not that of the
others of their dataset; row and label counts against the published ones. Everything here is a function of a
`Catalogue` and of what a survey found; nothing is opened.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hba.atlas.findings import Finding, at_places
from hba.atlas.probe import Facts
from hba.atlas.rowfiles import MediumName
from hba.atlas.rowscan import Catalogue
from hba.atlas.survey import Outcome, Refused
from hba.taxonomy import PUBLISHED


def media_findings(catalogue: Catalogue, outcomes: Mapping[int, Outcome]) -> Iterator[Finding]:
    """One finding for each medium that was refused or holds nothing, with the rows that name it."""
    for number, outcome in outcomes.items():
        use = catalogue.uses[number]
        places = [catalogue.where(place, use.field) for place in use.places]
        if isinstance(outcome, Refused):
            yield at_places("error", outcome.code, places, _named(use.name, outcome.what), outcome.fix)
        elif outcome.blank:
            what = "is silent from end to end" if use.field == "audios" else "is of one colour throughout"
            fix = "Look at its source: undecodable media are sometimes stored so."
            yield at_places("warning", "media-blank", places, _named(use.name, what), fix)


def _named(name: MediumName, what: str) -> str:
    return what if not isinstance(name, str) or name in what else f"{name} {what}"


def shape_findings(catalogue: Catalogue, outcomes: Mapping[int, Outcome]) -> Iterator[Finding]:
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
                places = [catalogue.where(place, use.field) for place in use.places]
                what = _named(use.name, f"has the shape {shape}, where {len(shapes[usual]):,} others have {usual}")
                fix = "Extract all descriptors of a kind with the same settings."
                yield at_places("error", "descriptor-shape", places, what, fix)


def shape_text(shapes: Mapping[str, Sequence[int]]) -> str:
    """Shapes with T for the number of frames; a vector has none."""
    texts = []
    for name, shape in sorted(shapes.items()):
        sides = [str(side) for side in shape] if len(shape) == 1 else ["T", *map(str, shape[1:])]
        texts.append(f"{name} [{', '.join(sides)}]".strip())
    return ", ".join(texts)


def count_signatures(catalogue: Catalogue) -> Counter[str]:
    """Good rows by modality signature."""
    counts: Counter[str] = Counter()
    for split in catalogue.splits:
        for columns in split.columns:
            codes, numbers = np.unique(columns.signature_codes, return_counts=True)
            for code, number in zip(codes.tolist(), numbers.tolist(), strict=True):
                counts[columns.signatures[code]] += number
    return counts


def count_findings(catalogue: Catalogue, *, complete: bool, release: bool) -> Iterator[Finding]:
    """Where the counts are other than published: errors for the release, else one note in all."""
    size: dict[str, Any] = PUBLISHED["size"]
    rows = {split.name: split.num_rows for split in catalogue.splits}
    have = {name: rows.get(name, 0) for name in PUBLISHED["splits_jsonl"] if complete or name in rows}
    if complete:
        have |= {name: count for name, count in count_signatures(catalogue).items() if name in size}
        have |= {name: 0 for name in ("text", "text_audio", "text_video_audio") if name not in have}
        have |= {"total": sum(rows.values())}
    wrong = [f"{name} {number:,} for {size[name]:,}" for name, number in have.items() if number != size[name]]
    where = catalogue.files[0]
    if wrong and not release:
        message = f"is not the published release, nor all of it: {', '.join(wrong)} rows"
        yield Finding(level="note", code="release-size", where=where, message=message, fix="None is needed.")
        return
    for text in wrong if release else ():
        message = f"rows of the published release: found {text}"
        yield Finding(level="error", code="release-size", where=where, message=message, fix="Download it again.")
    if release:
        yield from _absent_labels(catalogue, where)


def _absent_labels(catalogue: Catalogue, where: str) -> Iterator[Finding]:
    counts = catalogue.labels()
    present = {key for split in catalogue.splits for columns in split.columns for key in columns.datasets}
    for key in sorted(present):
        for label in catalogue.taxonomy.dataset(key).labels:
            if (key, label) not in counts:
                message = f"{label!r} never occurs in {key}"
                yield Finding(
                    level="error", code="label-absent", where=where, message=message, fix="Download it again."
                )
