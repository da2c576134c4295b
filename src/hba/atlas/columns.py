"""What a sampler needs to know of every row, as compact columns.

Built once while an atlas is opened; 100,000 rows take about 3 MB. `select` makes the columns of a view. Codes index the
tuple of names beside them.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from hba.taxonomy import Taxonomy

Codes = npt.NDArray[np.int16]
Counts = npt.NDArray[np.int32]

NO_TASK = ""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """One entry a row in every array; `label_codes` is the global class index, -1 for free-form rows."""

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


class ColumnsBuilder:
    """Collects one row after the other; codes are given in the order of first sight."""

    def __init__(self, taxonomy: Taxonomy) -> None:
        self._taxonomy = taxonomy
        self._datasets: dict[str, int] = {}
        self._signatures: dict[str, int] = {}
        self._flat = array("i")

    def add(
        self, dataset: str, signature: str, label: int, problem: str, answer: str, media: tuple[int, int, int]
    ) -> None:
        """Add a row; `media` counts images, videos, audios; `label` is a global class index or -1."""
        self._flat.extend(
            (
                self._datasets.setdefault(dataset, len(self._datasets)),
                self._signatures.setdefault(signature, len(self._signatures)),
                label,
                len(problem),
                len(answer),
                *media,
            )
        )

    def build(self) -> Columns:
        """The finished columns."""
        values_KN = np.ascontiguousarray(np.frombuffer(self._flat, np.int32).reshape(-1, 8).T)
        return make_columns(self._taxonomy, tuple(self._datasets), tuple(self._signatures), values_KN)


def make_columns(
    taxonomy: Taxonomy, datasets: tuple[str, ...], signatures: tuple[str, ...], values_KN: npt.NDArray[np.int32]
) -> Columns:
    """Columns of N rows from [8, N]: codes of `datasets` and `signatures`, label codes, characters of problem and
    answer, counts of images, videos, audios."""
    dataset_codes, signature_codes, label_codes = values_KN[:3].astype(np.int16)
    task_of = [taxonomy.dataset(key).task or NO_TASK for key in datasets]
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
