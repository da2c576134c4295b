"""The descriptors that stage 3 trains on: which datasets have some, one pooled vector a sample and modality.

Refused by name: a dataset without any descriptor, and rows that have a medium but no descriptor of it, unless that is
allowed. A descriptor that cannot be read quarantines its sample, as a medium would.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hba.atlas import Atlas
from hba.atlas.sample import Quarantined
from hba.descriptors.pooled import ALIKE, SOURCES, DescriptorConfig, missing, pooled_descriptors, unlike
from hba.errors import InputError, MediaError
from hba.train.frozen import Descriptors

NAMED = 10  # samples in a message
_log = logging.getLogger(__name__)


def described_datasets(atlas: Atlas, wanted: Sequence[str] | None) -> list[str]:
    """The datasets to adapt: those `wanted`, or all that have descriptors; the others are named in a warning.

    Raises InputError for a wanted dataset without rows or descriptors, and when no dataset has any.
    """
    with_some: set[str] = set()
    present: set[str] = set()
    for index in range(len(atlas)):
        row = atlas.row(index)
        present.add(row.dataset)
        if row.ext_video_feats or row.ext_audio_feats:
            with_some.add(row.dataset)
    keys = sorted(present) if wanted is None else [atlas.taxonomy.dataset(key).key for key in wanted]
    without = [key for key in keys if key not in with_some]
    fix = "Run `hba atlas describe` on the atlas."
    if without and (wanted is not None or len(without) == len(keys)):
        raise InputError(f"no descriptors in {', '.join(without)}", where=f"{atlas.root}, {atlas.split}", fix=fix)
    if without:
        _log.warning("without descriptors, hence without adapters: %s", ", ".join(without))
    return [key for key in keys if key in with_some]


def read_descriptors(rows: Atlas, config: DescriptorConfig) -> Descriptors:
    """The pooled descriptors of every row by its number in the split, or why a sample has to be left out.

    Raises InputError naming the samples that lack a descriptor, unless `allow_missing`.
    """
    lacking = [] if config.allow_missing else [sample for sample in rows if missing(sample)]
    if lacking:
        names = ", ".join(f"{s.id} ({' and '.join(missing(s))})" for s in lacking[:NAMED])
        more = f" and {len(lacking) - NAMED} more" if len(lacking) > NAMED else ""
        what = f"{len(lacking)} samples have a medium but no descriptor of it: {names}{more}"
        fix = "Run `hba atlas describe`, or leave such samples unchanged with --allow-missing."
        raise InputError(what, where=f"{rows.root}, {rows.split}", fix=fix)
    found: dict[int, Mapping[str, Tensor] | Quarantined] = {}
    for sample, number in zip(rows, rows.numbers.tolist(), strict=True):
        try:
            found[number] = pooled_descriptors(sample, config)
        except MediaError as error:
            found[number] = sample.quarantined(error)
    return found


def training_matrix(rows: Atlas, vectors: Descriptors, dataset: str) -> dict[str, Tensor]:
    """{'video': [N, F], 'audio': [N, F]} of the rows of a dataset, without a modality that none of them has.

    F is the size that most have; rows of another are left out (see `fitting`). Raises InputError naming a sample where
    more than a tenth of the rows have another size.
    """
    found: dict[str, Tensor] = {}
    for modality in SOURCES:
        parts = {
            number: vector[modality]
            for number, vector in ((number, vectors[number]) for number in _numbers(rows, dataset))
            if not isinstance(vector, Quarantined) and modality in vector
        }
        if not parts:
            continue
        (size, count), *_ = Counter(map(len, parts.values())).most_common()
        if len(parts) - count > len(parts) // 10:
            number = next(number for number, part in parts.items() if len(part) != size)
            sample = next(sample for sample, each in zip(rows, rows.numbers.tolist(), strict=True) if each == number)
            what = f"{unlike(len(parts[number]), size)}; so have {len(parts) - count} of {len(parts)} samples"
            raise InputError(what, where=sample.place(SOURCES[modality].field), fix=ALIKE)
        found[modality] = torch.stack([part for part in parts.values() if len(part) == size])
    return found


def _numbers(rows: Atlas, dataset: str) -> list[int]:
    return [int(number) for number in rows.filter(datasets=[dataset]).numbers]


def fitting(rows: Atlas, vectors: Descriptors, dims: Mapping[str, Mapping[str, int]]) -> Descriptors:
    """The descriptors that their adapters can read; a sample with another is left out, named."""
    fit = dict(vectors)
    for sample, number in zip(rows, rows.numbers.tolist(), strict=True):
        vector, expected = vectors[number], dims[sample.dataset]
        for name, values in vector.items() if not isinstance(vector, Quarantined) else ():
            if len(values) != expected.get(name, len(values)):
                error = MediaError(
                    unlike(len(values), expected[name]), where=sample.place(SOURCES[name].field), fix=ALIKE
                )
                fit[number] = sample.quarantined(error)
    return fit
