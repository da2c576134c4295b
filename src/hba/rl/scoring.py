"""Which reward a run uses: a published one, or a function of the user's own.

A user's function is named as `module:function` or `file.py:function` and is called with lists of equal length:
`function(responses=..., targets=..., tasks=..., datasets=..., lengths=...)`. It gives a number a response, or a dict
of named parts with `score` among them. What it gives is checked before it reaches an advantage: a wrong count, a
missing score or a number that is not finite is an error that names function and sample, never a silent zero; what it
raises ends the run with its own traceback (`own`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Annotated, Any

from pydantic import Field

from hba.atlas.sample import Sample
from hba.config import option
from hba.embedding import MINILM, Embedder
from hba.errors import ConfigError, InputError
from hba.rl.own import load_function
from hba.rl.rewards import (
    MAX_RESPONSE_TOKENS,
    OVERLONG_BUFFER_TOKENS,
    OVERLONG_WEIGHT,
    Parts,
    grpo_reward,
    harpo_reward,
)
from hba.taxonomy import BUILTIN, Taxonomy

PUBLISHED_REWARDS = ("grpo", "harpo")
Tokens = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """How a response is rewarded."""

    function: str = option("harpo", "grpo, harpo, or your own as module:function or file.py:function")
    published: bool = option(False, "reproduce the released rewards with their quirks, to compare published runs")
    synonyms: bool = option(True, "any synonym of a class counts as it, as in the evaluation; else its label alone")
    max_response_tokens: Tokens = option(MAX_RESPONSE_TOKENS, "harpo: a response of so many tokens is penalised fully")
    overlong_buffer_tokens: Tokens = option(OVERLONG_BUFFER_TOKENS, "harpo: the penalty rises over so many tokens")
    overlong_weight: Annotated[float, Field(ge=0)] = option(OVERLONG_WEIGHT, "harpo: weight of the length penalty")
    embedder: str = option(MINILM, "sentence encoder of the similarity: a hub id or a folder")

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
