"""Which samples are no independent evidence: those of one speaker, dialogue or video.

The release has no field for it. In this order: a field of the row that names a speaker, participant, dialogue or video
(`GROUP_FIELDS`, or one of the user's own with `hba score --cluster`); what the file name tells where the source names
files by speaker or dialogue (`group` of the dataset in taxonomy.yaml); a clip, sound or image that several rows share.
A row of which nothing is known stands alone: a group is never guessed from what a row says.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import PurePosixPath

from hba.atlas import Atlas
from hba.atlas.sample import Row

GROUP_FIELDS = (
    *("speaker_id", "speaker", "participant_id", "participant", "subject_id", "subject"),
    *("dialogue_id", "video_id"),
)
UNNAMED = "-"  # what a shard gives for the path of a medium that it does not tell


def sample_groups(atlas: Atlas) -> dict[str, str]:
    """The group of every sample that shares one with another of its dataset, by id. Reads rows, opens no medium."""
    named: dict[str, str] = {}
    shared: dict[str, str] = {}
    datasets: dict[str, str] = {}
    for key, row, extra in atlas.said():
        datasets[key] = row.dataset
        field = next((name for name in GROUP_FIELDS if extra.get(name) not in (None, "")), None)
        if field is not None:
            named[key] = f"{field}: {extra[field]}"
            continue
        path = _first_medium(row)
        if path is not None:
            told = _told_by_name(atlas.taxonomy.dataset(row.dataset).group, path)
            (named if told else shared)[key] = told or path
    found = named | shared
    # Groups are drawn within a dataset: a clip that one row of each of two datasets has joins nothing.
    sizes = Counter((datasets[key], group) for key, group in found.items())
    return {key: group for key, group in found.items() if sizes[datasets[key], group] > 1}


def _first_medium(row: Row) -> str | None:
    paths = (*row.videos[:1], *row.audios[:1], *row.images[:1])
    return next((path for path in paths if path != UNNAMED), None)


def _told_by_name(pattern: str | None, path: str) -> str | None:
    found = re.search(pattern, PurePosixPath(path).name) if pattern else None
    return f"file name: {found[1]}" if found else None
