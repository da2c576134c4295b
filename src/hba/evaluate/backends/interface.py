"""What a backend is: a way to answer rows of an atlas. The run that uses it is `hba.evaluate.predict`.

A backend says which rows it asks together (`batches`), draws the batches that it is given in an order of its own choice
and yields one result a row: what it said (`Answered`, an error included), that the sample's media cannot be read
(`Quarantined`), or that the service it asks gave nobody an answer (`Unanswered`), which is not kept and is asked again.
Order, batching and concurrency are its own; resume, files, counts, display and who of several processes asks what are
the run's. A backend that takes tensor batches builds on `batches.batched_answers`, one that takes samples loops over
`samples`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, Protocol, TypeAlias

from hba.atlas import Atlas
from hba.atlas.answer_format import FormatMix
from hba.atlas.sample import Quarantined, Sample
from hba.atlas.sampler import Indices
from hba.evaluate import answers
from hba.evaluate.results import was_cut
from hba.remote.cost import Meter
from hba.taxonomy import Taxonomy


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a backend says about one sample. With an `error` there is no output, and the sample counts as wrong.

    `text` is as the model gave it, `rule` names the rule of `answers` that found its answer, `finish` is the reason for
    which it ended, as the model or its service calls it. `model` is the version that a service says has answered,
    `left_out` the parameters that it refused. `seconds` is the time of this sample, or its share of its batch's.
    """

    text: str | None
    answer: str | None
    label: str | None
    rule: str | None = None
    probs: dict[str, float] | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    seconds: float | None = None
    error: str | None = None
    finish: str | None = None
    model: str | None = None
    left_out: tuple[str, ...] = ()


class Answered(NamedTuple):
    """A sample and what was said about it."""

    sample: Sample
    output: Output


class Unanswered(NamedTuple):
    """A sample whose request no attempt got an answer to, while nobody else's got one either."""

    sample: Sample
    reason: str


Result: TypeAlias = Answered | Quarantined | Unanswered


class Backend(Protocol):
    """A way to answer rows.

    `free_form` says whether it can answer rows that have no classes, `domains` of which domains it can answer rows that
    have some; None: of all. `meter` counts what a paid service has used so far; None where nothing is paid.
    """

    name: str
    free_form: bool
    domains: frozenset[str] | None
    meter: Meter | None

    def identity(self) -> Mapping[str, Any]:
        """What decides its answers besides data, split and encoding, by the names that a message uses.

        Plain JSON values: hashes of weights, prompts, sampling. Never where something lies, never a secret.
        """
        ...

    def batches(self, atlas: Atlas, rows: Indices) -> Sequence[Indices]:
        """The row numbers `rows` of `atlas` in the parts that are asked together: a function of the rows alone.

        Processes share a run out by these, so that no answer depends on how many they are.
        """
        ...

    def answers(self, atlas: Atlas, batches: Sequence[Indices], done: Set[str]) -> Iterator[Result]:
        """One result for each row of `batches`, which are some of its own, whose sample's id is not in `done`."""
        ...


def one_by_one(rows: Indices) -> Sequence[Indices]:
    """Batches of one row, for a backend whose answers know nothing of each other."""
    return list(rows.reshape(-1, 1))


def samples(atlas: Atlas, batches: Sequence[Indices], done: Set[str]) -> Iterator[Sample]:
    """The samples of `batches` that are not done, in the order of the rows; media are not decoded."""
    for row in chain.from_iterable(batches):
        if atlas.ids[int(row)] not in done:
            yield atlas[int(row)]


def choices(sample: Sample, taxonomy: Taxonomy, wording: FormatMix) -> dict[str, str]:
    """The answers that a row may be given where nothing but its labels may be said: label -> text, in the words of its
    prompt and in its format. Empty for rows without labels, and for those that may have several."""
    if taxonomy.dataset(sample.dataset).domain is None:
        return {}
    response = wording.format_of(sample).response
    return {label: response(word) for label, word in taxonomy.worded(sample.dataset, sample.problem).items()}


def likeliest(texts: Mapping[str, str], logps: Sequence[float]) -> Output:
    """The most probable of the answers `texts` (label -> text), with the share of each label among them."""
    top = max(logps)
    shares = [math.exp(logp - top) for logp in logps]
    probs = {label: share / sum(shares) for label, share in zip(texts, shares, strict=True)}
    best = max(probs, key=lambda label: probs[label])
    return Output(text=texts[best], answer=best, label=best, probs=probs, tokens_out=0)


def spoken(sample: Sample, text: str, taxonomy: Taxonomy, **known: Any) -> Output:
    """The output of a model that answered in words, read by `answers.read`. `known` are further fields of `Output`.

    What its `finish` says was cut off at a limit is read as that. An answer that cannot even be read is an error of its
    own, with its text.
    """
    cut = was_cut(known.get("finish"))
    try:
        rule, answer, label = answers.read(text, sample.dataset, taxonomy, prompt=sample.problem, cut=cut)
    except Exception as error:  # noqa: BLE001 - the boundary of one reply: whatever a model says, the others go on
        known["error"] = f"the answer cannot be read ({type(error).__name__}: {error})"
        return Output(text=text, answer=None, label=None, **known)
    return Output(text=text, answer=answer, label=label, rule=rule, **known)
