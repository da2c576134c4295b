"""What requests cost: tokens counted as the server says them, prices from `prices.yaml` or a file of the user's.

An unknown price or a reply without token counts makes the cost unknown (None), never zero.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from hba import yaml_core
from hba.errors import ConfigError
from hba.remote.request import Reply

BUILTIN = Path(__file__).with_name("prices.yaml")
_DATED = re.compile(r"-(\d{8}|\d{4}-\d{2}-\d{2})$")


class Price(NamedTuple):
    """US dollars a million tokens."""

    input: float
    output: float

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        """In US dollars."""
        return (tokens_in * self.input + tokens_out * self.output) / 1e6


def find_price(provider: str, model: str, *, official: bool, file: Path | None = None) -> Price | None:
    """The price of a model, None if unknown. Built-in prices are for the `official` service only.

    Raises ConfigError naming the file for an entry that is no pair of prices.
    """
    for path in filter(None, (file, BUILTIN if official else None)):
        entries = (yaml_core.read(path) or {}).get(provider) or {}
        entry = entries.get(model, entries.get(_DATED.sub("", model)))
        if entry is not None:
            try:
                return Price(float(entry["input"]), float(entry["output"]))
            except (TypeError, KeyError, ValueError):
                fix = "Write {input: dollars, output: dollars} a million tokens."
                raise ConfigError("no pair of prices", where=f"{path}, {provider}.{model}", fix=fix) from None
    return None


@dataclass
class Meter:
    """What a client has used so far. Counts are of this process; replies from the cache cost nothing."""

    price: Price | None
    requests: int = 0
    replies: int = 0
    cached: int = 0
    failed: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    uncounted: int = 0  # replies whose server did not say their tokens
    retries: Counter[str] = field(default_factory=Counter)

    def add(self, reply: Reply) -> None:
        """Count a reply that came from the server."""
        self.replies += 1
        self.tokens_in += reply.tokens_in or 0
        self.tokens_out += reply.tokens_out or 0
        self.uncounted += reply.tokens_in is None or reply.tokens_out is None

    @property
    def cost_usd(self) -> float | None:
        """In US dollars; None when the price, or the tokens of a reply, are unknown."""
        if self.price is None or self.uncounted:
            return None
        return self.price.cost(self.tokens_in, self.tokens_out)

    def record(self) -> dict[str, Any]:
        """For --json and run folders."""
        counts = ("requests", "replies", "cached", "failed", "tokens_in", "tokens_out", "uncounted")
        return {name: getattr(self, name) for name in counts} | {
            "retries": dict(sorted(self.retries.items())),
            "cost_usd": None if self.cost_usd is None else round(self.cost_usd, 6),
        }
