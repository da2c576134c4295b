"""Confusion matrices: what was answered for each true label, per domain and per dataset.

Counts are those of the scorer (`hba.evaluate.confusion`), so that the page cannot disagree with metrics.json. Rows are
true labels, columns answers, both in the order of the global class indices; labels that occur nowhere are left out. An
answer that is no label of the domain counts in the last column, 'no label', so that every row sums to its samples.
Free-form datasets have no matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hba.evaluate.confusion import Ints, encode
from hba.evaluate.predictions import Prediction
from hba.taxonomy import BUILTIN, Taxonomy

NO_LABEL = "no label"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """`share` is the count over its row's sum, in [0, 1]."""

    count: int
    share: float
    correct: bool
    tip: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """The samples of one true label; `cells` lie in the order of the matrix's columns."""

    target: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """`name` is a dataset key, or several joined by commas; `n` counts samples."""

    name: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    n: int


@dataclass(frozen=True, kw_only=True)
class DomainMatrices:
    """`pooled` is over the whole domain; `datasets` holds one a dataset when there are several, else nothing."""

    name: str
    pooled: Matrix
    datasets: tuple[Matrix, ...]


def matrices(predictions: Sequence[Prediction], taxonomy: Taxonomy = BUILTIN) -> list[DomainMatrices]:
    """One entry a domain that has predictions, in the order of the taxonomy.

    Raises TaxonomyError for an unknown dataset or a target outside its domain.
    """
    rows = encode([p.label for p in predictions], [p.target for p in predictions],
                  [p.dataset for p in predictions], taxonomy)  # fmt: skip
    counts_DCP, layout = rows.confusion(), rows.layout
    found = []
    for domain in taxonomy.domains.values():
        local = {
            key: _local(counts_DCP[layout.code[key]], np.array(domain.indices))
            for key in sorted(layout.classified)
            if layout.domain(key) == domain.name and counts_DCP[layout.code[key]].any()
        }
        if local:
            pooled = np.sum(list(local.values()), axis=0)
            several = tuple(_matrix(key, counts, domain.labels) for key, counts in local.items())
            found.append(
                DomainMatrices(
                    name=domain.name.replace("_", " "),
                    pooled=_matrix(", ".join(local), pooled, domain.labels),
                    datasets=several if len(several) > 1 else (),
                )
            )
    return found


def _local(counts_CP: Ints, indices_K: Ints) -> Ints:
    """[K, K + 1]: the domain's own rows and columns, every other answer in the last column."""
    inside = counts_CP[np.ix_(indices_K, indices_K)]
    outside = counts_CP[indices_K].sum(1) - inside.sum(1)
    return np.concatenate([inside, outside[:, None]], axis=1)


def _matrix(name: str, counts: Ints, labels: Sequence[str]) -> Matrix:
    num_labels = len(labels)
    seen = [k for k in range(num_labels) if counts[k].any() or counts[:, k].any()]
    columns = seen + [num_labels] * bool(counts[:, num_labels].any())
    names = [*labels, NO_LABEL]
    rows = tuple(
        Row(target=names[k], cells=tuple(_cell(counts, k, column, names) for column in columns))
        for k in seen
        if counts[k].any()
    )
    return Matrix(name=name, columns=tuple(names[k] for k in columns), rows=rows, n=int(counts.sum()))


def _cell(counts: Ints, target: int, column: int, names: Sequence[str]) -> Cell:
    count, total = int(counts[target, column]), int(counts[target].sum())
    tip = f"{names[target]} answered as {names[column]}: {count} of {total}"
    return Cell(count=count, share=round(count / total, 4), correct=column == target, tip=tip)
