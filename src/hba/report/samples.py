"""The best and the worst samples of a run, with their prompts and media.

Worst is what was answered wrongly with the least probability on the true label, best what was answered rightly with
the most; no dataset takes a second place before every dataset has had one. Free-form answers, which need a judge, are
not ranked. Prompts and media come from the atlas; a medium that cannot be read, or a row that is not the one that was
evaluated, is named on its card and never fatal.

Invariant: the choice depends on the predictions alone, ties go by id.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from hba.atlas import open_atlas
from hba.atlas.sample import Sample
from hba.errors import InputError
from hba.evaluate.predictions import Prediction
from hba.report.embed import Budget, Medium, embed_media
from hba.taxonomy import BUILTIN, Taxonomy

NUM_EACH = 6
MAX_SHOWN_LABELS = 4


@dataclass(frozen=True, kw_only=True)
class Share:
    """A label's probability, in [0, 1]."""

    label: str
    probability: float
    target: bool
    answered: bool


@dataclass(frozen=True, kw_only=True)
class Card:
    """One sample as shown. `prompt` is None when the atlas does not have it; `notes` say what is missing and why."""

    prediction: Prediction
    target: str
    answer: str
    right: bool
    shares: tuple[Share, ...]
    num_hidden_labels: int
    prompt: str | None
    media: tuple[Medium, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Predictions to show. `ranked` is False when they carry no probabilities and stand in the order of their ids.

    `num_answered` labelled rows did not fail.
    """

    worst: tuple[Prediction, ...]
    best: tuple[Prediction, ...]
    ranked: bool
    num_answered: int


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The cards of a page. `note` says why prompts and media are missing, empty when they are not."""

    worst: tuple[Card, ...]
    best: tuple[Card, ...]
    ranked: bool
    num_answered: int
    note: str


def choose(predictions: Sequence[Prediction], taxonomy: Taxonomy = BUILTIN, num_each: int = NUM_EACH) -> Chosen:
    """At most `num_each` confident wrong and `num_each` confident right predictions of classification datasets."""
    labelled = [p for p in predictions if taxonomy.dataset(p.dataset).domain is not None and not p.failed]
    ranked = [p for p in labelled if p.probs]
    pool = ranked or labelled
    surety = {p.id: (p.probs or {}).get(_target(p, taxonomy), 0.0) for p in pool}
    right = [p for p in pool if p.label == _target(p, taxonomy)]
    wrong = [p for p in pool if p.label != _target(p, taxonomy)]
    return Chosen(
        worst=spread(sorted(wrong, key=lambda p: (surety[p.id], p.id)), num_each),
        best=spread(sorted(right, key=lambda p: (-surety[p.id], p.id)), num_each),
        ranked=bool(ranked),
        num_answered=len(labelled),
    )


def _target(prediction: Prediction, taxonomy: Taxonomy) -> str:
    return taxonomy.require_label(prediction.dataset, prediction.target)


def spread(ordered: Iterable[Prediction], limit: int) -> tuple[Prediction, ...]:
    """The first of every dataset, then the second of every dataset, and so on."""
    taken: dict[str, int] = defaultdict(int)
    turns = []
    for place, prediction in enumerate(ordered):
        turns.append((taken[prediction.dataset], place, prediction))
        taken[prediction.dataset] += 1
    return tuple(prediction for _, _, prediction in sorted(turns, key=lambda turn: turn[:2])[:limit])


def gather(
    chosen: Chosen, root: Path | None, *, required: bool, budget: Budget, taxonomy: Taxonomy = BUILTIN
) -> Samples:
    """The cards of `chosen`, with prompts and media from the atlas at `root` as far as `budget` goes.

    An atlas that cannot be opened is an InputError if `required`, else a note.
    """
    wanted = [*chosen.worst, *chosen.best]
    rows: Mapping[str, Sample] = {}
    note = "" if root is not None else "The run does not say where its atlas lies."
    if root is not None and wanted:
        try:
            rows = find_rows(root, wanted, taxonomy)
        except InputError as error:
            if required:
                raise
            note = f"The atlas {root} could not be opened ({error.what}); name its folder with --atlas."
    # Worst and best take turns, so that the bytes of the page do not all go to one side.
    turns = [p for pair in zip_longest(chosen.worst, chosen.best) for p in pair if p is not None]
    cards = {p.id: _card(p, rows.get(p.id), note, budget, taxonomy) for p in turns}
    return Samples(
        worst=tuple(cards[p.id] for p in chosen.worst),
        best=tuple(cards[p.id] for p in chosen.best),
        ranked=chosen.ranked,
        num_answered=chosen.num_answered,
        note=note,
    )


def find_rows(root: Path, wanted: Sequence[Prediction], taxonomy: Taxonomy = BUILTIN) -> dict[str, Sample]:
    """The rows of the atlas that have the ids of `wanted`. Raises InputError when the atlas cannot be opened."""
    found: dict[str, Sample] = {}
    for split in sorted({p.split for p in wanted}):
        missing = {p.id for p in wanted if p.split == split}
        atlas = open_atlas(root, split=split, taxonomy=taxonomy)
        found |= {key: atlas[number] for number, key in enumerate(atlas.ids) if key in missing}
    return found


def _card(prediction: Prediction, sample: Sample | None, note: str, budget: Budget, taxonomy: Taxonomy) -> Card:
    target = _target(prediction, taxonomy)
    notes = []
    if sample is None:
        notes += [] if note else ["The atlas has no row with this id."]
    elif sample.dataset != prediction.dataset or sample.target != target:
        notes.append("The atlas's row of this id is another one than was evaluated; it is not shown.")
        sample = None
    ordered = sorted((prediction.probs or {}).items(), key=lambda item: (-item[1], item[0]))
    return Card(
        prediction=prediction,
        target=target,
        answer=prediction.label or prediction.answer or prediction.output or "no answer",
        right=prediction.label == target,
        shares=_shares(ordered, target, prediction.label),
        num_hidden_labels=max(0, len(ordered) - MAX_SHOWN_LABELS),
        prompt=sample.problem if sample is not None else None,
        media=embed_media(sample, budget) if sample is not None else (),
        notes=tuple(notes),
    )


def _shares(ordered: Sequence[tuple[str, float]], target: str, answer: str | None) -> tuple[Share, ...]:
    """The likeliest labels, the true one always among them."""
    kept = list(ordered[:MAX_SHOWN_LABELS])
    if kept and target not in dict(kept):
        kept[-1] = next((item for item in ordered if item[0] == target), (target, 0.0))
    return tuple(
        Share(label=label, probability=p, target=label == target, answered=label == answer) for label, p in kept
    )
