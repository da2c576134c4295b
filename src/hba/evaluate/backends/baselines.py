"""What can be had without looking: the most frequent answer of each dataset, and one drawn at random.

`majority` answers with the most frequent label of the training rows, its frequencies as probabilities; of a free-form
dataset, with the most frequent answer (compared as exact match does). `random` draws from the labels that occur in the
training rows, each equally likely; of a free-form dataset, from its training answers. A draw depends on the seed and
the sample's id alone, not on order, shards or resume. No medium is opened.

It refuses a dataset of which the training split has no row.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

from hba.atlas import Atlas, open_atlas
from hba.batch.sampler import Indices
from hba.errors import InputError
from hba.evaluate.answers import plain
from hba.evaluate.backends.interface import Answered, Output, Result, one_by_one, samples
from hba.storage import json_sha256

if TYPE_CHECKING:
    from hba.evaluate.config import Opening
    from hba.remote.cost import Meter


class Baseline:
    """A `Backend`. `counts` has, by dataset key, how often each training answer occurs, the most frequent first."""

    free_form = True
    domains = None
    meter: Meter | None = None

    def __init__(self, name: str, counts: Mapping[str, Mapping[str, int]], seed: int) -> None:
        self.name, self.counts, self.seed = name, counts, seed

    def identity(self) -> Mapping[str, Any]:
        """Hash of what was counted; the seed where it matters."""
        seed = {"seed": self.seed} if self.name == "random" else {}
        return {"model": json_sha256({key: dict(counted) for key, counted in self.counts.items()}), **seed}

    def batches(self, _atlas: Atlas, rows: Indices) -> Sequence[Indices]:
        return one_by_one(rows)

    def answers(self, atlas: Atlas, batches: Sequence[Indices], done: Set[str]) -> Iterator[Result]:
        for sample in samples(atlas, batches, done):
            counted = self.counts[sample.dataset]
            if self.name == "majority":
                answer, weights = next(iter(counted)), dict(counted)
            else:
                answer = random.Random(f"{self.seed}/{sample.id}").choice(sorted(counted))
                weights = dict.fromkeys(counted, 1)
            total = sum(weights.values())
            domain = atlas.taxonomy.dataset(sample.dataset).domain
            probs = {label: weight / total for label, weight in weights.items()} if domain else None
            label = atlas.taxonomy.canonical_label(sample.dataset, answer)
            yield Answered(sample, Output(text=answer, answer=answer, label=label, probs=probs))


def open_backend(name: str, opening: Opening) -> Baseline:
    """Count the answers of the training split. Raises InputError naming datasets of which it has no row."""
    split = opening.config.fit_split
    counts = training_counts(open_atlas(opening.place, split=split, taxonomy=opening.atlas.taxonomy))
    columns = opening.atlas.columns
    wanted = {columns.datasets[code] for code in set(columns.dataset_codes.tolist())}
    if unseen := sorted(wanted - counts.keys()):
        fix = "Name another split with fit_split=..., or leave these datasets out."
        raise InputError(f"no row of {', '.join(unseen)} to learn from", where=f"split {split!r}", fix=fix)
    return Baseline(name, counts, opening.config.generation.seed)


def training_counts(atlas: Atlas) -> dict[str, dict[str, int]]:
    """How often each label, or free-form answer, occurs in each dataset; most frequent first, then by name.

    Free-form answers that match exactly count as one, written as it is written most often.
    """
    found: dict[str, Counter[str]] = {}
    written: dict[tuple[str, str], Counter[str]] = {}
    for sample in atlas.with_answers():
        said = str(sample.answer if sample.answer is not None else sample.label)
        label = atlas.taxonomy.canonical_label(sample.dataset, said)
        key = label or plain(said)
        found.setdefault(sample.dataset, Counter())[key] += 1
        written.setdefault((sample.dataset, key), Counter())[label or said] += 1
    counts = {}
    for dataset, counter in sorted(found.items()):
        ranked = sorted(counter.items(), key=lambda entry: (-entry[1], entry[0]))
        counts[dataset] = {_usual(written[dataset, key]): number for key, number in ranked}
    return counts


def _usual(spellings: Counter[str]) -> str:
    return min(spellings, key=lambda text: (-spellings[text], text))
