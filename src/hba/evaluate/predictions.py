"""predictions.jsonl: one line a sample, append-only, the contract of whoever predicts with whoever scores; its counts.

Reading checks every line against the schema and the taxonomy and refuses the first that is wrong with file,
line and field: malformed or truncated JSON, a missing field, a wrong type, an id that occurs twice, an
unknown dataset, a target, label or probability outside the dataset's domain. Labels may be written in any spelling of
the taxonomy and are read as its own. Unknown extra fields are ignored.

Invariant: a log holds each id once and only whole lines, so that `done_ids` of a killed run is exactly what
is on disk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from hba.errors import InputError, TaxonomyError
from hba.storage import AppendLog, json_sha256, plural, write_jsonl
from hba.taxonomy import BUILTIN, Taxonomy

if TYPE_CHECKING:
    from hba.remote.cost import Meter

PREDICTIONS, ANSWERS = "predictions.jsonl", "answers.csv"
JUDGEMENTS, JUDGE_SETTINGS = "judgements.jsonl", "judge.json"  # what a judge adds: see judge/items.py
READING_VERSION = 3  # of `hba.evaluate.answers`: raised when it may read a text as another label than before
# What servers say of an answer that was cut off at a limit of length, and of one that a filter stopped.
CUT = frozenset({"length", "max_tokens", "max_output_tokens", "model_length", "model_context_window_exceeded"})
FILTERED = frozenset(
    {"content_filter", "content_filtered", "filter", "refusal", "safety", "recitation", "blocklist", "spii"}
    | {"prohibited_content", "image_safety", "guardrail_intervened", "sensitive"}
)
_OPTIONAL = ("probs", "group", "modality", "rule", "finish", "model", "left_out")

MERGE = "Run the same `hba predict` command once more, without --shard: it merges the shards and answers what is left."


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a model said about one sample.

    `target` and `label` are canonical labels; for a free-form row `target` is the row's answer and `label`
    None. `target` is None for a row without an answer, which is in no score. `label` is None if the answer could not be
    mapped. `error` is None unless the sample failed; with an error and no output it counts as wrong. `latency_s` is in
    seconds, `tokens_in` and `tokens_out` are counts, None if unknown. `probs` are the heads' probabilities. Rows with
    one `group` share a speaker or a video and are resampled together. `modality` is the row's signature, such as
    text_audio. `rule` names the rule of `answers.RULES` by which an answer in words was read. `finish` is how the
    answer ended, in the word of whoever gave it: stop, length, content_filter, ...; None if unknown. `model` is the
    version that a service says has answered, `left_out` what of the request it refused.
    """

    id: str
    dataset: str
    task: str
    split: str
    target: str | None
    output: str | None
    answer: str | None
    label: str | None
    error: str | None
    latency_s: float | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    probs: dict[str, float] | None = None
    group: str | None = None
    modality: str | None = None
    rule: str | None = None
    finish: str | None = None
    model: str | None = None
    left_out: tuple[str, ...] = ()

    @property
    def failed(self) -> bool:
        """Whether the sample ended in an error without any output or answer."""
        return _failed(self)

    @property
    def truth(self) -> str:
        """The target, which who scores has. Raises InputError for a row without an answer."""
        if self.target is None:
            raise InputError("the row has no answer to compare with", where=self.id, fix="Leave it out of the score.")
        return self.target

    @property
    def spoken(self) -> str | None:
        """The answer; None where nothing is in it."""
        return self.answer if (self.answer or "").strip() else None

    def record(self) -> dict[str, Any]:
        """The line of predictions.jsonl; what not every contract has, from `probs` on, only where it is known."""
        return {key: value for key, value in asdict(self).items() if key not in _OPTIONAL or value not in (None, ())}


class Line(msgspec.Struct):
    """What of a line says whether its sample is done: for counting a file of which nothing else is asked."""

    id: str
    output: str | None = None
    answer: str | None = None
    label: str | None = None
    error: str | None = None

    @property
    def failed(self) -> bool:
        """As that of a `Prediction`."""
        return _failed(self)


def _failed(line: Prediction | Line) -> bool:
    words = (line.output or "").strip() or (line.answer or "").strip()
    return line.error is not None and line.label is None and not words


def was_cut(finish: str | None) -> bool:
    """Whether an answer that ended so reached a limit of length."""
    return (finish or "").lower() in CUT


def ended_by(words: Set[str], finish: Mapping[str, int]) -> int:
    """How many answers ended by one of `words`, of those that `finish` counts by the word for it."""
    return sum(n for reason, n in finish.items() if reason.lower() in words)


class Asked(Protocol):
    """A record of what a service was asked; tokens are None where it did not say them."""

    @property
    def model(self) -> str | None: ...
    @property
    def left_out(self) -> tuple[str, ...]: ...
    @property
    def tokens_in(self) -> int | None: ...
    @property
    def tokens_out(self) -> int | None: ...


def answered_by(records: Iterable[Asked]) -> dict[str, Any]:
    """Which versions of a model answered, and what of the requests was not sent, with the number of records; what is
    not known is not there."""
    models: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    for record in records:
        models.update([record.model] if record.model else [])
        left_out.update(record.left_out)
    found = {"answered_by": dict(models), "left_out": dict(left_out)}
    return {name: counts for name, counts in found.items() if counts}


_decode = msgspec.json.Decoder(Prediction).decode


def read_predictions(path: str | Path, taxonomy: Taxonomy = BUILTIN) -> list[Prediction]:
    """Every prediction of the file, in its order. Raises what `each_prediction` raises."""
    return list(each_prediction(path, taxonomy))


def each_prediction(path: str | Path, taxonomy: Taxonomy = BUILTIN) -> Iterator[Prediction]:
    """Yield the predictions of the file, in its order.

    Raises InputError naming file, line and field for a missing file or a line that is not as the contract
    says, TaxonomyError (an InputError) for an unknown dataset or a target or label outside the dataset's
    domain.
    """
    path = Path(path)
    line_of: dict[str, int] = {}
    canonical: dict[tuple[str, str | None], str | None] = {}
    spelled: set[tuple[str, str | None, str | None, tuple[str, ...] | None]] = set()  # as the taxonomy has them
    for number, prediction in _lines(path):
        first = line_of.setdefault(prediction.id, number)
        if first != number:
            what = f"id {prediction.id!r} occurs twice (first in line {first})"
            raise InputError(what, where=f"{path}:{number}, id", fix="Keep one line per sample.")
        shares = prediction.probs
        words = (prediction.dataset, prediction.target, prediction.label, None if shares is None else tuple(shares))
        if words in spelled:
            yield prediction
            continue
        right = _canonical(prediction, f"{path}:{number}", taxonomy, canonical)
        if right is prediction and not taxonomy.dataset(prediction.dataset).free_form:  # answers in words rarely repeat
            spelled.add(words)
        yield right


def _lines(path: Path) -> Any:
    if not path.is_file():
        shards = sorted(path.parent.glob(f"shards/*/{PREDICTIONS}"))
        if shards:
            what = f"the predictions lie in {plural(len(shards), 'shard', 'that is|that are')} not merged"
            raise InputError(what, where=str(path.parent / "shards"), fix=MERGE)
        raise InputError("no such file", where=str(path), fix="Run `hba predict` first, or check the path.")
    with path.open("rb") as handle:
        for number, raw in enumerate(handle, 1):
            if raw.strip():
                yield number, _prediction(raw, f"{path}:{number}")


def _prediction(raw: bytes, where: str) -> Prediction:
    try:
        return _decode(raw)
    except msgspec.ValidationError as error:
        what, _, place = str(error).partition(" - at `$")
        missing = what.startswith("Object missing required field")
        field = what.split("`")[1] if missing else place.strip("`.").split("[")[0].split(".")[0]
        where = f"{where}, {field}" if field else where
        what = what.replace("str | null", "str") if field == "target" else what
        fix = "Write every field; what is unknown is null." if missing else "Write the type it asks for."
        raise InputError(what, where=where, fix=fix) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        fix = "Repair the line; if it is the last, run `hba predict` again: it cuts it off and resumes."
        raise InputError(f"not valid JSON ({error})", where=where, fix=fix) from None


def _canonical(
    prediction: Prediction, where: str, taxonomy: Taxonomy, known: dict[tuple[str, str | None], str | None]
) -> Prediction:
    """A prediction with its target, its label and the labels of its probabilities as the taxonomy spells them.

    `known` holds what was looked up before.
    """
    key, field = prediction.dataset, "dataset"

    def label(raw: str | None) -> str | None:
        if (key, raw) not in known:
            known[key, raw] = None if raw is None else taxonomy.require_label(key, raw)
        return known[key, raw]

    try:
        if taxonomy.dataset(key).free_form:
            return prediction
        field = "target"
        changed: dict[str, Any] = {"target": label(prediction.target)}
        field = "label"
        changed["label"] = label(prediction.label)
        field = "probs"
        if prediction.probs is not None:
            probs: dict[str, float] = {}
            for raw, share in prediction.probs.items():
                probs[str(label(raw))] = probs.get(str(label(raw)), 0.0) + share
            changed["probs"] = probs
    except TaxonomyError as error:
        raise TaxonomyError(error.what, where=f"{where}, {field}", fix=error.fix) from None
    same = all(getattr(prediction, name) == value for name, value in changed.items())
    return prediction if same else replace(prediction, **changed)


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Replace the file by these predictions, whole or not at all. Raises StorageError on a full disk."""
    write_jsonl(path, (prediction.record() for prediction in predictions))


class PredictionLog:
    """Appends predictions to a file; opened again after a kill it goes on behind the last whole line.

    Raises InputError when the file already holds something that is not a prediction, StorageError on a full
    disk.
    """

    def __init__(
        self, path: str | Path, taxonomy: Taxonomy = BUILTIN, found: Callable[[Prediction], None] | None = None
    ) -> None:
        """`found` is told of each prediction that is in the file."""
        self._log = AppendLog(path)
        self._done: set[str] = set()
        try:
            for prediction in each_prediction(path, taxonomy):
                self._done.add(prediction.id)
                if found is not None:
                    found(prediction)
        except InputError:
            self._log.close()
            raise

    def done_ids(self) -> set[str]:
        """The ids that are in the file."""
        return set(self._done)

    def append(self, prediction: Prediction) -> None:
        """Write one line. Raises InputError if the id is already in the file."""
        if prediction.id in self._done:
            fix = "Skip what `done_ids` names."
            raise InputError(f"id {prediction.id!r} is already predicted", where=str(self._log.path), fix=fix)
        self._log.append(prediction.record())
        self._done.add(prediction.id)

    def close(self) -> None:
        """Flush to the disk and close."""
        self._log.close()

    def __enter__(self) -> PredictionLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# The counts of a run while it goes on, for whoever shows them.


@dataclass(kw_only=True)
class Tally:
    """What a run has done so far. Tokens and `fresh` count this session alone, everything else the whole run."""

    total: int
    done: int = 0  # predictions and quarantined samples
    failed: int = 0
    reasons: Counter[str] = field(default_factory=Counter)  # why samples failed
    invalid: int = 0  # answers of labelled rows that mean no label
    quarantined: int = 0
    unanswered: Counter[str] = field(default_factory=Counter)  # rows that the service left open, by the reason
    finish: Counter[str] = field(default_factory=Counter)  # how answers ended
    fresh: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    meter: Meter | None = None

    def add(self, prediction: Prediction, *, labelled: bool, fresh: bool) -> None:
        """Count a prediction; `fresh` says that it was made in this session, `labelled` that a label was asked for."""
        self.done += 1
        self.failed += prediction.failed
        self.reasons.update([prediction.error] if prediction.failed and prediction.error is not None else [])
        self.finish.update([prediction.finish] if prediction.finish else [])
        self.invalid += labelled and prediction.label is None and not prediction.failed
        if fresh:
            self.fresh += 1
            self.tokens_in += prediction.tokens_in or 0
            self.tokens_out += prediction.tokens_out or 0

    @property
    def n_cut(self) -> int:
        """Answers that were cut off at a limit of length."""
        return ended_by(CUT, self.finish)

    @property
    def n_filtered(self) -> int:
        """Answers that a filter stopped."""
        return ended_by(FILTERED, self.finish)

    def quarantine(self) -> None:
        """Count a sample that was left out."""
        self.done += 1
        self.quarantined += 1
        self.fresh += 1


def ids_sha256(ids: Iterable[str]) -> str:
    """Hash of a set of sample ids, for predict.json: by it other rows of the same number are known."""
    return json_sha256(sorted(set(ids)))
