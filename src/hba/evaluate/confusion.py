"""Rows to confusion counts: every scored row becomes one integer, and one `bincount` gives every count there is.

A row of a classification dataset becomes the cell (dataset, target, prediction) in the global class space,
where one more prediction column holds invalid answers. A row of a free-form dataset becomes (dataset, wrong |
right | none). Scores, intervals, chance levels and paired comparisons are all functions of these cells.

Refused: lengths that differ (InputError), an unknown dataset or a target outside its dataset's domain
(TaxonomyError naming the index). Never refused: a prediction. None, an unknown word or a class of another
domain is a wrong answer.

Shape suffixes: N rows, D classification datasets, C global classes, P = C + 1 predictions, K classes of one
domain.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from hba.errors import InputError, TaxonomyError
from hba.evaluate.answers import same_answer
from hba.evaluate.multilabel import Pair, Table
from hba.taxonomy import BUILTIN, Taxonomy

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_WORDS = "Datasets and targets are str, predictions str or None."
WRONG, RIGHT, NO_ANSWER = 0, 1, 2


class Layout:
    """Where each dataset's cells lie for one taxonomy. Immutable."""

    def __init__(self, taxonomy: Taxonomy) -> None:
        self.taxonomy = taxonomy
        self.num_classes = taxonomy.num_classes
        datasets = taxonomy.datasets.values()
        self.classified = tuple(d.key for d in datasets if d.domain is not None)
        self.freeform = tuple(d.key for d in datasets if d.free_form)
        self.multilabel = frozenset(d.key for d in datasets if d.multilabel)
        self.block = self.num_classes * (self.num_classes + 1)
        self.freeform_start = len(self.classified) * self.block
        self.size = self.freeform_start + 3 * len(self.freeform)
        self.code = {key: i for i, key in enumerate(self.classified)}
        self.freeform_code = {key: i for i, key in enumerate(self.freeform)}
        names = taxonomy.class_names
        self.unambiguous = {name: i for i, name in enumerate(names) if names.count(name) == 1}
        self.indices = tuple(np.array(taxonomy.domains[self.domain(key)].indices) for key in self.classified)

    def domain(self, key: str) -> str:
        """The domain of a classification dataset."""
        return str(self.taxonomy.dataset(key).domain)

    def to_local(self, code: int) -> Ints:
        """Map a global prediction, [C + 1], to its position in the domain of dataset `code`; K for any other."""
        indices = self.indices[code]
        local = np.full(self.num_classes + 1, len(indices), dtype=np.int64)
        local[indices] = np.arange(len(indices))
        return local


@lru_cache(maxsize=8)
def layout_of(taxonomy: Taxonomy) -> Layout:
    """The layout of a taxonomy, made once."""
    return Layout(taxonomy)


class _CellTable(dict[tuple[str, str, "str | None"], int]):
    """(dataset, target, prediction) -> cell; a triple is resolved when it is first met."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.pairs: dict[Pair, int] = {}

    def __missing__(self, row: tuple[str, str, str | None]) -> int:
        dataset, target, prediction = row
        if not isinstance(target, str) or not (prediction is None or isinstance(prediction, str)):
            found = f"target {target!r} ({type(target).__name__}), prediction {prediction!r}"
            raise InputError(f"{found} ({type(prediction).__name__})", fix=_WORDS)
        layout = self.layout
        freeform = layout.freeform_code.get(dataset)
        if freeform is not None:  # not kept: free-form answers rarely repeat
            return layout.freeform_start + 3 * freeform + _verdict(target, prediction)
        if dataset in layout.multilabel:
            said = None if prediction is None else layout.taxonomy.canonical_label(dataset, prediction)
            pair = Pair(dataset, layout.taxonomy.require_label(dataset, target), said)
            cell = self[row] = layout.size + self.pairs.setdefault(pair, len(self.pairs))
            return cell
        truth = layout.taxonomy.global_index(dataset, target)
        guess = self._guess(dataset, prediction)
        cell = (layout.code[dataset] * layout.num_classes + truth) * (layout.num_classes + 1) + guess
        self[row] = cell
        return cell

    def _guess(self, dataset: str, prediction: str | None) -> int:
        invalid = self.layout.num_classes
        if prediction is None:
            return invalid
        label = self.layout.taxonomy.canonical_label(dataset, prediction)
        if label is not None:
            return self.layout.taxonomy.global_index(dataset, label)
        return self.layout.unambiguous.get(" ".join(prediction.lower().split()), invalid)


def _first_refused(triples: Iterable[Any], table: _CellTable) -> int:
    """Index of the row at which encoding stopped."""
    for index, row in enumerate(triples):
        try:
            table[row]
        except (TypeError, InputError):
            return index
    raise AssertionError("encoding stopped at a row that can be encoded")


def _verdict(target: str, answer: str | None) -> int:
    if answer is None:
        return NO_ANSWER
    return RIGHT if same_answer(answer, target) else WRONG


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Scored rows as cells. `cells` [N] are int64: in [0, layout.size), or layout.size plus the number of a pair in
    `pairs` for a row of a multilabel dataset.

    `judged` names the free-form datasets whose cells say what a judge found, not whether the answer matched.
    """

    layout: Layout
    cells: Ints
    judged: frozenset[str] = frozenset()
    pairs: tuple[Pair, ...] = ()

    def counts(self) -> Ints:
        """How many rows lie in each cell, [layout.size + pairs]."""
        return np.bincount(self.cells, minlength=self.layout.size + len(self.pairs))

    def confusion(self) -> Ints:
        """Counts [D, C, P] of the classification datasets in the order of `layout.classified`."""
        c = self.layout.num_classes
        return self.counts()[: self.layout.freeform_start].reshape(-1, c, c + 1)

    def members(self, code: int) -> Ints:
        """Positions of the rows of classification dataset `code`."""
        return np.flatnonzero(self.cells // self.layout.block == code)

    def multilabel(self, key: str) -> tuple[Ints, Ints, Table]:
        """Of a multilabel dataset: positions of its rows [M], their cells [M] in its table of pairs, the table.

        The table is sorted, so that what is drawn from it does not depend on the order of the rows.
        """
        mine = [number for number, pair in enumerate(self.pairs) if pair.dataset == key]
        mine.sort(key=lambda number: (self.pairs[number].true, self.pairs[number].predicted or ""))
        cells_M = np.full(len(self.pairs), -1, dtype=np.int64)
        cells_M[mine] = np.arange(len(mine))
        rows_M = np.flatnonzero(self.cells >= self.layout.size)
        local_M = cells_M[self.cells[rows_M] - self.layout.size]
        table = Table([self.pairs[number] for number in mine], self.layout.taxonomy.dataset(key).labels)
        return rows_M[local_M >= 0], local_M[local_M >= 0], table

    def multilabel_keys(self) -> list[str]:
        """Multilabel datasets that have rows."""
        present = {
            self.pairs[cell].dataset
            for cell in np.unique(self.cells[self.cells >= self.layout.size] - self.layout.size).tolist()
        }
        return [key for key in self.layout.taxonomy.datasets if key in present]

    def local_cells(self, code: int, rows_M: Ints) -> Ints:
        """target * (K + 1) + prediction within the dataset's domain, for the given rows of dataset `code`."""
        local = self.layout.to_local(code)
        target_M, prediction_M = np.divmod(self.cells[rows_M] % self.layout.block, self.layout.num_classes + 1)
        return local[target_M] * (len(self.layout.indices[code]) + 1) + local[prediction_M]

    def right(self) -> npt.NDArray[np.bool_]:
        """Whether each row is right, [N]: the true label, or for a free-form row the right answer."""
        start, size = self.layout.freeform_start, self.layout.size
        truth_N, guess_N = np.divmod(self.cells % self.layout.block, self.layout.num_classes + 1)
        equal_T = np.array([pair.true == pair.predicted for pair in self.pairs] or [False])
        right: npt.NDArray[np.bool_] = np.select(
            [self.cells < start, self.cells < size],
            [truth_N == guess_N, (self.cells - start) % 3 == RIGHT],
            equal_T[np.maximum(self.cells - size, 0).clip(max=len(equal_T) - 1)],
        )
        return right

    def scored_codes(self) -> list[int]:
        """Classification datasets that have rows."""
        present = np.unique(self.cells[self.cells < self.layout.freeform_start] // self.layout.block)
        return [int(code) for code in present]


def encode(
    predictions: Sequence[str | None],
    targets: Sequence[str],
    datasets: Sequence[str],
    taxonomy: Taxonomy = BUILTIN,
) -> Rows:
    """Turn labels (free-form: answers) into cells. All three have N items.

    A prediction is read within its dataset's domain; a word that is a class of exactly one other domain keeps
    that class (wrong, and a false positive of that class in the aggregate), everything else is invalid.
    Raises InputError for unequal lengths or wrong types, TaxonomyError for a target outside its domain or an
    unknown dataset; both name the index.
    """
    check_lengths(predictions=predictions, targets=targets, datasets=datasets)
    layout = layout_of(taxonomy)
    table = _CellTable(layout)
    triples = zip(datasets, targets, predictions, strict=True)
    try:
        cells = np.fromiter(map(table.__getitem__, triples), np.int64, len(targets))
        return Rows(layout=layout, cells=cells, pairs=tuple(table.pairs))
    except TypeError as error:  # a list or dict, which no table can look up
        problem = InputError(f"not a word ({error})", fix=_WORDS)
    except InputError as error:
        problem = error
    index = _first_refused(zip(datasets, targets, predictions, strict=True), table)
    raise type(problem)(problem.what, where=f"index {index}", fix=problem.fix)


def encode_indices(
    predictions: Sequence[int], targets: Sequence[int], datasets: Sequence[str], taxonomy: Taxonomy = BUILTIN
) -> Rows:
    """`encode` for global class indices; a prediction outside 0..C-1 (such as -1) is invalid.

    Raises InputError for unequal lengths, TaxonomyError for an unknown or free-form dataset or a target
    outside the dataset's domain, naming the index.
    """
    check_lengths(predictions=predictions, targets=targets, datasets=datasets)
    layout = layout_of(taxonomy)
    for key in dict.fromkeys(datasets):
        if taxonomy.dataset(key).domain is None:
            raise TaxonomyError(f"dataset {key!r} has free-form answers", fix="Score its answers, not class indices.")
    code_N = np.fromiter(map(layout.code.__getitem__, datasets), np.int64, len(datasets))
    truth_N, guess_N = np.asarray(targets, dtype=np.int64), np.asarray(predictions, dtype=np.int64)
    c = layout.num_classes
    allowed = np.zeros((len(layout.classified), c + 1), dtype=bool)
    for code, indices in enumerate(layout.indices):
        allowed[code, indices] = True
    wrong = ~allowed[code_N, np.where((truth_N < 0) | (truth_N >= c), c, truth_N)]
    if wrong.any():
        index = int(wrong.argmax())
        known = layout.indices[code_N[index]].tolist()
        what = f"class index {truth_N[index]} is not in the domain of {datasets[index]!r}"
        raise TaxonomyError(what, where=f"index {index}", fix=f"Give one of {known}, its classes.")
    guess_N = np.where((guess_N < 0) | (guess_N >= c), c, guess_N)
    return Rows(layout=layout, cells=(code_N * c + truth_N) * (c + 1) + guess_N)


def pooled_confusion(predictions: Sequence[int], targets: Sequence[int], taxonomy: Taxonomy = BUILTIN) -> Ints:
    """Counts [C, P] of global class indices whatever their dataset; a prediction outside 0..C-1 is invalid.

    Raises InputError for unequal lengths, TaxonomyError for a target that is no class, naming the index.
    """
    check_lengths(predictions=predictions, targets=targets)
    c = taxonomy.num_classes
    truth_N, guess_N = np.asarray(targets, dtype=np.int64), np.asarray(predictions, dtype=np.int64)
    wrong = (truth_N < 0) | (truth_N >= c)
    if wrong.any():
        index = int(wrong.argmax())
        raise TaxonomyError(f"no class {truth_N[index]}", where=f"index {index}", fix=f"Give one from 0 to {c - 1}.")
    guess_N = np.where((guess_N < 0) | (guess_N >= c), c, guess_N)
    return np.bincount(truth_N * (c + 1) + guess_N, minlength=c * (c + 1)).reshape(c, c + 1)


def check_lengths(**sequences: Sequence[Any]) -> None:
    """Raise InputError naming the lengths unless all are equal."""
    lengths = {name: len(items) for name, items in sequences.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{count} {name}" for name, count in lengths.items())
        raise InputError(f"lengths differ: {found}", fix="Give one item per row.")
