"""What requests cost and what became of them: tokens counted as the server says them, list prices of genai-prices.

Prices are looked up by the service's address, so that a gateway's are its own; a file of the user's goes before them.
They are without discounts for batches or cached prompts. An unknown price or a reply without token counts makes the
cost unknown (None), never zero.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from hba.config import read_yaml
from hba.errors import ConfigError
from hba.remote.faults import Refused, same_model
from hba.remote.request import LOOPBACK, Reply


class Price(NamedTuple):
    """US dollars a million tokens, as far as a prompt's first tier goes; `tiers` are genai-prices' where there are."""

    input: float
    output: float
    source: str = ""
    tiers: Any = None

    def cost(self, tokens_in: int, tokens_out: int, requests: int = 1) -> float:
        """Of so many tokens in so many requests of equal size, in US dollars."""
        if self.tiers is None:
            return (tokens_in * self.input + tokens_out * self.output) / 1e6
        from genai_prices import Usage

        each = Usage(input_tokens=round(tokens_in / requests), output_tokens=round(tokens_out / requests))
        return requests * float(self.tiers.calc_price(each)["total_price"])


def find_price(provider: str, model: str, base_url: str, file: Path | None = None) -> Price | None:
    """The price of a model at a service's address, None if unknown.

    `file` is YAML of the user's: {provider: {model: {input, output}}}. Raises ConfigError naming it for an entry that
    is no pair of prices.
    """
    if file is not None:
        entry = ((read_yaml(file) or {}).get(provider) or {}).get(model)
        if entry is not None:
            try:
                return Price(float(entry["input"]), float(entry["output"]), str(file))
            except (TypeError, KeyError, ValueError):
                fix = "Write {input: dollars, output: dollars} a million tokens."
                raise ConfigError("no pair of prices", where=f"{file}, {provider}.{model}", fix=fix) from None
    return _listed(model, base_url)


def _listed(model: str, base_url: str) -> Price | None:
    if httpx.URL(base_url).host in LOOPBACK:
        return None  # and a fifth of a second is not spent on it
    from genai_prices.data_snapshot import get_snapshot
    from genai_prices.types import TieredPrices

    try:
        _, found = get_snapshot().find_provider_model(model, None, None, base_url)
    except LookupError:
        return None
    prices = found.get_prices(datetime.now(UTC))
    dollars_in, dollars_out = prices.input_mtok, prices.output_mtok
    if dollars_in is None or dollars_out is None:
        return None
    tiers = prices if isinstance(dollars_in, TieredPrices) or isinstance(dollars_out, TieredPrices) else None
    first = [float(each.base if isinstance(each, TieredPrices) else each) for each in (dollars_in, dollars_out)]
    return Price(first[0], first[1], f"genai-prices {version('genai-prices')}", tiers)


@dataclass
class Meter:
    """What a client has used so far, and what its user should know of it.

    Counts are of this process; replies from the cache cost nothing. `trouble` says what the client is waiting for at
    the moment ("" when it is not), `refused` which parameters the service does not take, `left_out` how many replies
    were made without them, `models` who has answered.
    """

    price: Price | None
    asked: str = ""
    requests: int = 0
    replies: int = 0
    cached: int = 0
    failed: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    uncounted: int = 0  # replies whose server did not say their tokens
    dollars: float = 0.0
    retries: Counter[str] = field(default_factory=Counter)
    models: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    refused: dict[str, Refused] = field(default_factory=dict)
    trouble: str = ""

    def saw(self, reply: Reply) -> None:
        """Count a reply, from the server or from the cache."""
        self.models.update([reply.model] if reply.model else [])
        self.left_out.update(reply.left_out)
        if reply.cached:
            self.cached += 1
            return
        self.replies += 1
        self.trouble = ""
        self.tokens_in += reply.tokens_in or 0
        self.tokens_out += reply.tokens_out or 0
        if reply.tokens_in is None or reply.tokens_out is None:
            self.uncounted += 1
        elif self.price is not None:
            self.dollars += self.price.cost(reply.tokens_in, reply.tokens_out)

    @property
    def cost_usd(self) -> float | None:
        """In US dollars; None when the price, or the tokens of a reply, are unknown."""
        return None if self.price is None or self.uncounted else self.dollars

    def warnings(self) -> list[str]:
        """What a user should know about the replies: parameters that were not sent, another model's name."""
        words = {one.shown: f" ({one.words})" for one in self.refused.values()}
        said = [f"the service refuses a parameter: {name}{words.get(name, '')}" for name in self.left_out]
        others = [name for name in self.models if not same_model(self.asked, name)]
        return said + [f"{self.asked} was asked for, and replies say that {name} answered" for name in others]

    def record(self) -> dict[str, Any]:
        """For --json and run folders."""
        counts = ("requests", "replies", "cached", "failed", "tokens_in", "tokens_out", "uncounted")
        return {name: getattr(self, name) for name in counts} | {
            "retries": dict(sorted(self.retries.items())),
            "cost_usd": None if self.cost_usd is None else round(self.cost_usd, 6),
            "models": dict(self.models),
            "left_out": dict(self.left_out),
        }
