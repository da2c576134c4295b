"""Rewards: those of the published runs, GRPO's (OmniSapiens-7B RL) and HARPO's (OmniSapiens 2.0), and a user's own.

Both are pure functions from texts to numbers. The answer is what `hba.evaluate.answers.read` finds, as in the
evaluation, where the datasets of the responses are known; similarity is the cosine of all-MiniLM-L6-v2 embeddings
(`hba.embedding`). Lengths are tokens, and only the caller knows them: without lengths there is no length penalty,
characters are never counted instead.

`published=True` reproduces the released functions to the number, their quirks included: white space around ``<``, ``>``
and ``/`` removed, the first box wins and ends at its first brace, an empty box earns format and similarity, an unknown
task is a classification, length is counted in characters when none is given. The default earns nothing by form: a box
must hold something to count as format, an empty answer is similar to nothing, and where the target is a class only an
answer that names one class of its domain has a similarity, so that reciting the labels or pleading with the grader
pays nothing.

Every text has a score: empty, of 100 kB, in any script. Shapes: N responses.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from hashlib import sha256
from numbers import Real
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from hba.atlas.rows import Sample
from hba.config import option
from hba.embedding import MINILM, Embedder
from hba.errors import ConfigError, HbaError, InputError, nearest
from hba.evaluate.answers import Reading, bare, extract, last_box, named_label, read, same_answer, without_latex
from hba.taxonomy import BUILTIN, PUBLISHED, Taxonomy

Parts: TypeAlias = dict[str, float]
Kind = Literal["classification", "free_form"]

FORMAT_WEIGHT = 0.2
GRPO_SIMILARITY_WEIGHT = 0.5
HARPO_ANSWER_WEIGHT = 0.8
MAX_RESPONSE_TOKENS = 812
OVERLONG_BUFFER_TOKENS = 128
OVERLONG_WEIGHT = 0.75

_SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "classification": (*PUBLISHED["task_suffixes"]["classification"], "classification"),
    "free_form": (*PUBLISHED["task_suffixes"]["free_form"], "q&a"),
}
_REASONED = re.compile(r"\s*<\s*think\s*>.*<\s*/\s*think\s*>(.*)", re.IGNORECASE | re.DOTALL)


def grpo_reward(
    responses: Sequence[str],
    targets: Sequence[str],
    published: bool = False,
    *,
    datasets: Sequence[str] | None = None,
    prompts: Sequence[str] | None = None,
    taxonomy: Taxonomy = BUILTIN,
    embedder: Embedder | None = None,
) -> list[Parts]:
    """score = exact + 0.2 * format + 0.5 * cos, cos clipped to [0, 1]; one dict a response.

    Keys: score [0, 1.7], standard_score and format_score (0 or 1), similarity_score [0, 1]. `datasets` (a key a
    response) makes responses be read as the evaluation reads them: a synonym of a target's label counts as it, and so
    does a sentence that says it; `prompts` are what was asked. Raises InputError for lists of unequal length.
    """
    _same_length(responses, targets=targets, datasets=datasets, prompts=prompts)
    if published:
        texts = [_respaced(text) for text in responses]
        answers = [extract(text, published=True) for text in texts]
        exact = [answer.lower() == target.lower() for answer, target in zip(answers, targets, strict=True)]
        formats = [_published_format(text) for text in texts]
        compared = [True] * len(texts)
    else:
        found = _readings(responses, datasets, prompts, taxonomy)
        answers = [reading.answer for reading in found]
        exact = _exact(found, targets, datasets, taxonomy)
        formats = [well_formed(text) for text in responses]
        compared = _comparable(found, targets, datasets, taxonomy)
    cosines = _cosines(answers, targets, compared, embedder)
    scores = []
    for right, formed, cosine in zip(exact, formats, cosines, strict=True):
        standard, form, similarity = float(right), float(formed), 0.0 if cosine is None else max(0.0, cosine)
        score = standard + FORMAT_WEIGHT * form + GRPO_SIMILARITY_WEIGHT * similarity
        scores.append(_parts(score, standard, form, similarity))
    return scores


def harpo_reward(
    responses: Sequence[str],
    targets: Sequence[str],
    tasks: Sequence[str],
    lengths: Sequence[int] | None = None,
    published: bool = False,
    *,
    max_response_tokens: int = MAX_RESPONSE_TOKENS,
    overlong_buffer_tokens: int = OVERLONG_BUFFER_TOKENS,
    overlong_weight: float = OVERLONG_WEIGHT,
    datasets: Sequence[str] | None = None,
    prompts: Sequence[str] | None = None,
    taxonomy: Taxonomy = BUILTIN,
    embedder: Embedder | None = None,
) -> list[Parts]:
    """Classification: 0.8 * exact + 0.2 * format. Free-form: 0.8 * (cos + 1) / 2 + 0.2 * format. One dict a response.

    To both, `overlong_weight` times the penalty of `overlong` is added, over `lengths` in tokens. `tasks` are the rows'
    task ids, of which the suffix decides (see `task_kind`). Keys: score, standard_score (0 for free-form),
    format_score, similarity_score ((cos + 1) / 2, 0 for classification), overlong_score [-1, 0]. Raises InputError for
    lists of unequal length and for a task that is neither kind.
    """
    _same_length(responses, targets=targets, tasks=tasks, lengths=lengths, datasets=datasets, prompts=prompts)
    kinds = [task_kind(task, published=published) for task in tasks]
    if published:
        texts = [_respaced(text) for text in responses]
        answers = [extract(text, published=True).strip().lower() for text in texts]
        wanted = [target.strip().lower() for target in targets]
        exact = [answer == target for answer, target in zip(answers, wanted, strict=True)]
        formats = [_published_format(text) for text in texts]
        lengths = [len(text) for text in responses] if lengths is None else lengths
    else:
        found = _readings(responses, datasets, prompts, taxonomy)
        answers, wanted = [reading.answer for reading in found], list(targets)
        exact = _exact(found, wanted, datasets, taxonomy)
        formats = [well_formed(text) for text in responses]
    compared = [
        kind == "free_form" and (published or bool(answer)) for kind, answer in zip(kinds, answers, strict=True)
    ]
    cosines = _cosines(answers, wanted, compared, embedder)
    scores = []
    for i, kind in enumerate(kinds):
        standard = float(exact[i]) if kind == "classification" else 0.0
        cosine = cosines[i]
        similarity = 0.0 if cosine is None else (cosine + 1) / 2
        penalty = 0.0 if lengths is None else overlong(lengths[i], max_response_tokens, overlong_buffer_tokens)
        score = HARPO_ANSWER_WEIGHT * (standard + similarity) + FORMAT_WEIGHT * formats[i] + overlong_weight * penalty
        scores.append({**_parts(score, standard, float(formats[i]), similarity), "overlong_score": penalty})
    return scores


def overlong(length_tokens: int, max_tokens: int, buffer_tokens: int) -> float:
    """0 up to `max_tokens - buffer_tokens`, falling linearly to -1 at `max_tokens`, -1 beyond (DAPO, section 3.4)."""
    over = length_tokens - (max_tokens - buffer_tokens)
    return 0.0 if over <= 0 else -1.0 if length_tokens >= max_tokens else -over / buffer_tokens


def task_kind(task: str, *, published: bool = False) -> Kind:
    """What the suffix of a task id such as emotion_cls or siq2_qa says.

    Raises InputError for another suffix; `published` takes every such task for a classification, and q&a too. White
    space and then underscores around a task do not count for it: `_qa_` is free-form, `qa-` is not.
    """
    if published:
        last = re.split(r"[_\W]+", task.strip().strip("_").lower())[-1]
        return "free_form" if last in ("qa", "qna") else "classification"
    suffix = re.split(r"[^a-z0-9&]+", task.lower())[-1]
    for kind, suffixes in _SUFFIXES.items():
        if suffix in suffixes:
            return kind
    known = ", ".join(f"_{suffix}" for suffixes in _SUFFIXES.values() for suffix in suffixes)
    raise InputError(f"task {task!r} is neither a classification nor free-form", fix=f"End it in one of {known}.")


def _parts(score: float, standard: float, form: float, similarity: float) -> Parts:
    return {"score": score, "standard_score": standard, "format_score": form, "similarity_score": similarity}


def _readings(
    responses: Sequence[str], datasets: Sequence[str] | None, prompts: Sequence[str] | None, taxonomy: Taxonomy
) -> list[Reading]:
    """What each response answers; without `datasets` no labels are known, and the answer is what `extract` gives."""
    if datasets is None:
        return [Reading("", extract(text), None) for text in responses]
    asked: Sequence[str | None] = prompts or [None] * len(responses)
    rows = zip(responses, datasets, asked, strict=True)
    return [read(text, dataset, taxonomy, prompt=prompt) for text, dataset, prompt in rows]


def _exact(
    found: Sequence[Reading], targets: Sequence[str], datasets: Sequence[str] | None, taxonomy: Taxonomy
) -> list[bool]:
    """Whether each answer is its target; where `datasets` are given, a class by the label that is read."""
    classes = _class_datasets(taxonomy)
    same = []
    for i, (reading, target) in enumerate(zip(found, targets, strict=True)):
        label = None if datasets is None else named_label(datasets[i], target, taxonomy)
        if label is not None:
            same.append(reading.label == label)
        elif bare(target) in classes:
            same.append(bare(reading.answer) == bare(target))
        else:
            same.append(same_answer(without_latex(reading.answer), target))
    return same


def _comparable(
    found: Sequence[Reading], targets: Sequence[str], datasets: Sequence[str] | None, taxonomy: Taxonomy
) -> list[bool]:
    """Whether similarity says something: the answer is not empty, and names one class where the target is a class."""
    classes = _class_datasets(taxonomy)
    compared = []
    for reading, target in zip(found, targets, strict=True):
        known = classes.get(bare(target))
        if known is None:
            named = True
        elif datasets is None:
            named = any(named_label(dataset, reading.answer, taxonomy) for dataset in known)
        else:
            named = reading.label is not None
        compared.append(bool(reading.answer) and named)
    return compared


def _class_datasets(taxonomy: Taxonomy) -> dict[str, list[str]]:
    """Each class label with one dataset of each domain that has it: 'neutral' is a class of two."""
    of_domain = {dataset.domain: key for key, dataset in taxonomy.datasets.items() if dataset.domain is not None}
    classes: dict[str, list[str]] = {}
    for domain, dataset in of_domain.items():
        for label in taxonomy.domains[domain].labels:
            classes.setdefault(label, []).append(dataset)
    return classes


def _cosines(
    answers: Sequence[str], targets: Sequence[str], compared: Sequence[bool], embedder: Embedder | None
) -> list[float | None]:
    """The cosine of each compared pair, None of the others; all texts in one call, so that they are batched."""
    rows = [i for i, wanted in enumerate(compared) if wanted]
    found: list[float | None] = [None] * len(answers)
    if rows:
        model = default_embedder() if embedder is None else embedder
        cosines = model.similarity([answers[i] for i in rows], [targets[i] for i in rows])
        for i, cosine in zip(rows, cosines.tolist(), strict=True):
            found[i] = cosine
    return found


@cache
def default_embedder() -> Embedder:
    """The one all-MiniLM-L6-v2 of the process, loaded when first asked for."""
    return Embedder()


def well_formed(text: str) -> bool:
    """<think>...</think> ... \\boxed{...}: reasoning first, then a box with something in it."""
    reasoned = _REASONED.match(text)
    return reasoned is not None and bool((last_box(reasoned[1]) or "").strip())


def _published_format(text: str) -> bool:
    r"""Whether ``<think>.*</think>.*\\boxed\{.*\}.*`` matches the whole text, in linear time on any text."""
    end = text.find("</think>", len("<think>")) if text.startswith("<think>") else -1
    box = text.find("\\boxed{", end) if end >= 0 else -1
    return box >= 0 and text.find("}", box) >= 0


def _respaced(text: str) -> str:
    """The released clean-up: no white space around <, > and /."""
    pieces = re.split("([<>/])", text)
    inner = [piece.strip() for piece in pieces[1:-1]]
    return pieces[0].rstrip() + "".join(inner) + pieces[-1].lstrip() if len(pieces) > 1 else text


def _same_length(responses: Sequence[str], **others: Sequence[object] | None) -> None:
    for name, values in others.items():
        if values is not None and len(values) != len(responses):
            what = f"{len(responses)} responses, but {len(values)} {name}"
            raise InputError(what, fix="Give one for each response.")


# A function of the user's own, named `module:function` or `file.py:function`: a reward, or advantages.
#
# Whatever it raises, when it is imported and when it is called, ends the run with the user's own traceback, on every
# engine: an HbaError whose text ends where the user's code did.


def load_function(name: str, *, key: str, known: Iterable[str]) -> Callable[..., Any]:
    """The function that the config key `key` names, with its errors as HbaErrors that name the line.

    Raises InputError with the `known` names when there is none, and when its module cannot be imported.
    """
    module_name, colon, function_name = name.rpartition(":")
    names = list(known)
    fix = f"Use {', '.join(names)}, module:function or file.py:function."
    if not colon:
        close = get_close_matches(name, names, n=1)
        raise InputError(f"no function {name!r}", where=key, fix=f"Did you mean {close[0]!r}? {fix}" if close else fix)
    try:
        module = _load_file(Path(module_name)) if module_name.endswith(".py") else importlib.import_module(module_name)
    except (ImportError, OSError) as error:
        raise InputError(f"cannot import {module_name!r} ({error})", where=key, fix=fix) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a module of the user's own does when it is run
        raise InputError(f"{module_name!r} {raised(error)}", where=key, fix="Mend it.") from error
    function: Callable[..., Any] | None = getattr(module, function_name, None)
    if not callable(function):
        there = [found for found, value in vars(module).items() if callable(value) and not found.startswith("_")]
        what = f"{module_name!r} has no function {function_name!r}"
        raise InputError(what, where=key, fix=nearest(function_name, there))
    return _Guarded(function, f"{key}={name}")


class _Guarded:
    """Calls a function of the user's own. A third boundary beside command and sample: what it raises is its own."""

    def __init__(self, function: Callable[..., Any], where: str) -> None:
        self._function, self._where = function, where

    def __call__(self, **given: Any) -> Any:
        try:
            return self._function(**given)
        except (HbaError, KeyboardInterrupt):
            raise
        except BaseException as error:  # asyncio's CancelledError is no Exception, nor is sys.exit()'s
            fix = "Repair it, then run the same command again: it goes on from the last checkpoint."
            raise HbaError(raised(error), where=self._where, fix=fix) from error


def raised(error: BaseException) -> str:
    """The error with the lines of the traceback that are not ours, the last of which is where it was raised."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    frames = [frame for frame in frames if "importlib" not in frame.filename]
    lines = "".join(traceback.format_list(frames)).rstrip()
    said = "".join(traceback.format_exception_only(error)).strip()
    return f"raised {said}\n{lines}\n" if lines else f"raised {said}"


def _load_file(path: Path) -> Any:
    # Dataclasses look their module up by name. A file that is named twice, for reward and advantages, is one module.
    name = f"hba_own_{path.stem}_{sha256(bytes(path.resolve()) + path.read_bytes()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


# Which reward a run uses: a published one, or a function of the user's own.
#
# A user's function is named as `module:function` or `file.py:function` and is called with lists of equal length:
# `function(responses=..., targets=..., tasks=..., datasets=..., lengths=...)`. It gives a number a response, or a dict
# of named parts with `score` among them. What it gives is checked before it reaches an advantage: a wrong count, a
# missing score or a number that is not finite is an error that names function and sample, never a silent zero; what it
# raises ends the run with its own traceback.


PUBLISHED_REWARDS = ("grpo", "harpo")
Tokens = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """How a response is rewarded."""

    function: str = option("harpo", "the reward: grpo, harpo, or your own as module:function or file.py:function")
    published: bool = option(
        False, "compute the rewards as the released code does, its errors included, to compare with published runs"
    )
    synonyms: bool = option(
        True, "count a synonym of a label as the label, as the evaluation does. false: the label alone counts"
    )
    max_response_tokens: Tokens = option(
        MAX_RESPONSE_TOKENS, "harpo: a response of this many tokens gets the whole length penalty"
    )
    overlong_buffer_tokens: Tokens = option(
        OVERLONG_BUFFER_TOKENS, "harpo: the length penalty rises over this many tokens before it is whole"
    )
    overlong_weight: Annotated[float, Field(ge=0)] = option(OVERLONG_WEIGHT, "harpo: weight of the length penalty")
    embedder: str = option(MINILM, "sentence encoder that compares free-form answers: a hub id or a folder")

    def __post_init__(self) -> None:
        if self.overlong_buffer_tokens > self.max_response_tokens:
            what = f"reward.overlong_buffer_tokens is {self.overlong_buffer_tokens}, above reward.max_response_tokens"
            raise ConfigError(what, fix=f"Use at most {self.max_response_tokens}.")


class Scorer:
    """Rewards responses to samples. Raises InputError when the function or the embedder cannot be had."""

    def __init__(self, config: RewardConfig, taxonomy: Taxonomy = BUILTIN) -> None:
        self.config, self._taxonomy = config, taxonomy
        own = config.function not in PUBLISHED_REWARDS
        self._own = load_function(config.function, key="reward.function", known=PUBLISHED_REWARDS) if own else None
        self._embedder = None if own else Embedder(config.embedder)

    def __call__(
        self, responses: Sequence[str], samples: Sequence[Sample], lengths_tokens: Sequence[int]
    ) -> list[Parts]:
        """One dict of parts a response, `score` among them, all finite. `samples` repeat, one a response."""
        targets = [sample.target for sample in samples]
        tasks, datasets = [sample.task for sample in samples], [sample.dataset for sample in samples]
        if self._own is not None:
            given = self._own(
                responses=list(responses), targets=targets, tasks=tasks, datasets=datasets, lengths=list(lengths_tokens)
            )
            return self._checked(given, samples)
        config = self.config
        if not config.published:  # the dataset decides, whatever a row's task is called
            tasks = ["qa" if sample.label is None else "cls" for sample in samples]
        shared: dict[str, Any] = {
            "datasets": datasets if config.synonyms else None,
            "prompts": [sample.problem for sample in samples],
            "taxonomy": self._taxonomy,
            "embedder": self._embedder,
            "published": config.published,
        }
        if config.function == "grpo":
            return grpo_reward(responses, targets, **shared)
        return harpo_reward(
            responses,
            targets,
            tasks,
            lengths_tokens,
            max_response_tokens=config.max_response_tokens,
            overlong_buffer_tokens=config.overlong_buffer_tokens,
            overlong_weight=config.overlong_weight,
            **shared,
        )

    def _checked(self, given: Any, samples: Sequence[Sample]) -> list[Parts]:
        name = self.config.function
        if not isinstance(given, Iterable) or isinstance(given, (str, Mapping)):
            raise InputError(f"gave {type(given).__name__}, not a list of rewards", where=name, fix="Give one each.")
        rewards = list(given)
        if len(rewards) != len(samples):
            what = f"gave {len(rewards)} rewards for {len(samples)} responses"
            raise InputError(what, where=name, fix="Give one each.")
        checked = []
        for value, sample in zip(rewards, samples, strict=True):
            where = f"{name}, sample {sample.id}"
            parts = dict(value) if isinstance(value, Mapping) else {"score": value}
            if "score" not in parts or not all(isinstance(part, str) for part in parts):
                raise InputError(f"a reward without 'score': {parts}", where=where, fix="Return a number, or add it.")
            for part, number in parts.items():
                if not isinstance(number, Real) or not math.isfinite(number):
                    fix = "Return finite numbers; a response that cannot be scored may get the lowest one."
                    raise InputError(f"reward {part!r} is {number!r}", where=where, fix=fix)
            checked.append({part: float(number) for part, number in parts.items()})
        return checked
