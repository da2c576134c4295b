"""What a backend is, a way to answer rows of an atlas; which there are; and predictions of their answers. Runs:
`hba.evaluate.predict`.

A backend says which rows it asks together (`batches`), draws the batches that it is given in an order of its own choice
and yields one result a row: what it said (`Answered`, an error included), that the sample's media cannot be read
(`Quarantined`), or that the service it asks gave nobody an answer (`Unanswered`), which is not kept and is asked again.
Order, batching and concurrency are its own; resume, files, counts, display and who of several processes asks what are
the run's. A backend that takes tensor batches builds on `batched_answers`, one that takes samples loops over
`samples`. To add one, write a module with `open_backend(name, Opening) -> Backend` and name it in `MODULES`; it is
imported when it is asked for.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from hba.atlas import Atlas
from hba.atlas.rows import Quarantined, Sample
from hba.batch.config import LoaderConfig
from hba.batch.prompt import FormatMix
from hba.batch.sampler import Indices, plan_batches
from hba.environment import require_extra
from hba.errors import ConfigError, InputError, nearest
from hba.evaluate.predictions import Prediction, was_cut
from hba.model.config import require_place
from hba.storage import halved, room
from hba.taxonomy import Taxonomy

if TYPE_CHECKING:
    from hba.batch.encode import Batch, Encoder
    from hba.evaluate.config import GenerationConfig, Opening
    from hba.remote.cost import Meter

MODULES = {
    "heads": "hba.evaluate.backends.heads",
    "hf": "hba.evaluate.backends.hf",
    "openai": "hba.evaluate.backends.remote",
    "anthropic": "hba.evaluate.backends.remote",
    "google": "hba.evaluate.backends.remote",
    "vllm": "hba.evaluate.backends.vllm",
    "majority": "hba.evaluate.backends.baselines",
    "random": "hba.evaluate.backends.baselines",
}

# Over models on this machine: one of ours, merged ones included, says how its samples were encoded.
LOCAL = ("heads", "hf", "vllm")
BASELINES = ("majority", "random")
# They answer without a word.
WORDLESS = ("heads", *BASELINES)


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a backend says about one sample. With an `error` there is no output, and the sample counts as wrong.

    `text` is as the model gave it, `rule` names the rule of `answers` that found its answer, `finish` is the reason for
    which it ended, as the model or its service calls it. `model` is the version that a service says has answered,
    `left_out` the parameters that it refused. `seconds` is the time of this sample, or its share of its batch's.
    """

    text: str | None = None
    answer: str | None = None
    label: str | None = None
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
Predicted: TypeAlias = Prediction | Quarantined | Unanswered


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


def open_backend(name: str, opening: Opening) -> Backend:
    """The backend of that name, one of `MODULES`, over a model. Raises InputError for a model that it cannot use."""
    backend: Backend = import_module(MODULES[name]).open_backend(name, opening)
    return backend


def known(name: str) -> str:
    """The name of a backend. Raises InputError for another."""
    if name not in MODULES:
        raise InputError(f"no backend {name!r}", where="--backend", fix=nearest(name, MODULES))
    return name


def require_backend(model: str, name: str | None) -> None:
    """Raises InputError for a model in this process where torch is not installed: services and baselines need none.

    None is for a backend that the model decides.
    """
    if name in LOCAL or (name is None and model not in WORDLESS):
        also = ", or ask a service: --backend openai, anthropic or google"
        require_extra("train", "a model in this process", also=also)


def detect(model: str) -> str:
    """The backend for `model` when none is named: a baseline by its name, else what its checkpoint was trained for.

    Heads, which refuses what has none, for everything else: nothing is guessed. Raises InputError for a name that is
    neither a folder nor an id of the hub: a remote model needs its backend.
    """
    if model in BASELINES:
        return model
    require_place(model, also="; with --backend also the name of a remote model")
    from hba.model import checkpoint  # not before it is needed: it imports torch

    folder = checkpoint.resolve(model)
    return "hf" if folder is not None and checkpoint.read_card(folder)["columns"] is None else "heads"


def has_classes(atlas: Atlas) -> npt.NDArray[np.bool_]:
    """Whether each row [N] is of a dataset with classes, whether or not it says which is right."""
    columns = atlas.columns
    return np.array([atlas.taxonomy.dataset(key).domain is not None for key in columns.datasets], bool)[
        columns.dataset_codes
    ]


def answerable(atlas: Atlas, backend: Backend) -> Indices:
    """Row numbers that `backend` can answer."""
    columns, taxonomy = atlas.columns, atlas.taxonomy
    labelled_N = has_classes(atlas)
    if backend.domains is None:
        return np.flatnonzero(labelled_N | backend.free_form)
    known = np.array([taxonomy.dataset(key).domain in backend.domains for key in columns.datasets], dtype=bool)
    return np.flatnonzero(np.where(labelled_N, known[columns.dataset_codes], backend.free_form))


def predict(
    atlas: Atlas, batches: Sequence[Indices], backend: Backend, done: Set[str] = frozenset()
) -> Iterator[Predicted]:
    """Yield the prediction of each row of `batches` but for the samples whose ids are `done`, in the backend's order.

    A sample whose media cannot be read comes as its quarantine record, one that a service did not answer as it is.
    """
    for result in backend.answers(atlas, batches, done):
        yield prediction_of(result) if isinstance(result, Answered) else result


_AS_SAID = ("answer", "label", "tokens_in", "tokens_out", "error", "probs", "rule", "finish", "model", "left_out")


def prediction_of(answered: Answered) -> Prediction:
    """The prediction that says what was answered."""
    sample, output = answered
    said: dict[str, Any] = {name: getattr(output, name) for name in _AS_SAID}
    return Prediction(
        id=sample.id,
        dataset=sample.dataset,
        task=sample.task,
        split=sample.split,
        target=sample.target if sample.answered else None,
        modality=sample.modality_signature,
        output=output.text,
        latency_s=None if output.seconds is None else round(output.seconds, 4),
        **said,
    )


def refuse_settings_of_servers(generation: GenerationConfig) -> None:
    """Raises ConfigError for what only a server takes, in place of a model on this machine."""
    if generation.temperature is None or generation.extra:
        key = "extra" if generation.extra else "temperature=null"
        fix = "Set generation.temperature, and leave generation.extra out."
        raise ConfigError("a setting for servers, not for a model on this machine", where=f"generation.{key}", fix=fix)


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
    from hba.evaluate import answers  # where nobody answers in words, no rule of reading is compiled

    cut = was_cut(known.get("finish"))
    try:
        rule, answer, label = answers.read(text, sample.dataset, taxonomy, prompt=sample.problem, cut=cut)
    except Exception as error:  # noqa: BLE001 - the boundary of one reply: whatever a model says, the others go on
        known["error"] = f"the answer cannot be read ({type(error).__name__}: {error})"
        return Output(text=text, **known)
    return Output(text=text, answer=answer, label=label, rule=rule, **known)


# The path of backends that take tensor batches: plan them by signature and length, load them, ask the model.
#
# The plan depends on the rows alone, never on what is done already nor on how many processes share it: a batch that is
# done in part is computed whole, so that its padding, and with it the last bits of every number, are those of an
# uninterrupted run of one process.


def batched_answers(
    atlas: Atlas,
    batches: Sequence[Indices],
    done: Set[str],
    *,
    encoder: Encoder,
    answer: Callable[[Batch], Sequence[Output]],
    loader: LoaderConfig,
    size_key: str = "batch_size",
) -> Iterator[Result]:
    """The results of `batches` of an `evaluation_plan`; `answer` gives one output a sample, in the batch's order.

    `size_key` says how many samples are answered at once. Raises MachineError where the device has no room for them.

    Time and input tokens are measured here unless `answer` gives them.
    """
    from hba.batch.loader import load_batches  # imports torch, which other backends do without

    if done:
        batches = [batch for batch in batches if any(atlas.ids[int(row)] not in done for row in batch)]
    for batch in load_batches(atlas, encoder, batches, loader):
        yield from batch.quarantined
        if not len(batch):
            continue
        started = time.perf_counter()
        with room(batch, halved(size_key, batch)):
            outputs = answer(batch)
        seconds = (time.perf_counter() - started) / len(batch)
        tokens_B = batch.num_tokens.tolist()
        for sample, output, tokens_in in zip(batch.samples, outputs, tokens_B, strict=True):
            if sample.id not in done:
                measured = {"tokens_in": tokens_in, "seconds": seconds}
                missing = {name: value for name, value in measured.items() if getattr(output, name) is None}
                yield Answered(sample, replace(output, **missing))


def evaluation_plan(atlas: Atlas, rows: Indices, batch_size: int) -> list[Indices]:
    """Batches of the given rows, grouped by signature and length, in a fixed order."""
    columns = atlas.columns
    lengths_N = atlas.estimated_tokens[rows]
    batches = plan_batches(
        columns.signature_codes[rows], lengths_N, batch_size=batch_size, seed=0, epoch=0, shuffle=False
    )
    return [rows[batch] for batch in batches]
