"""What a run would do and cost, without asking a model anything: `--dry-run` of `hba predict` and `hba judge`.

Tokens are those of the records that the folder already has, a pilot's (`--limit`) for instance, as means a row;
without any, they come from rough figures a medium, and the answer is taken to be as long as it may be. A cost is an
upper bound at list prices; a model without a known price has none, and that is said. `expected` makes an estimate of
counts and rough tokens; what these are of a judge is said in `judge/estimate.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hba.evaluate.backends.remote import check_media
from hba.evaluate.config import Opening
from hba.evaluate.predict import done_elsewhere, grown
from hba.evaluate.predictions import PREDICTIONS, Asked, read_predictions
from hba.remote import ClientConfig
from hba.remote.cost import find_price
from hba.remote.providers import PROVIDERS
from hba.storage import read_json

CHARACTERS_A_TOKEN = 3
TOKENS_A_PICTURE = 85  # OpenAI's figure for an image at low detail
AUDIO_BYTES_A_TOKEN = 3200  # ten tokens a second of 16 kHz sound in 16 bits
FORMAT_TOKENS = 40


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Rows by dataset, how many are left, their tokens and what they cost at most in US dollars (None: unknown).

    `seconds` is what is left at the pace of the records before; None without any. A row is one request, but
    `requests_at_most` where its reply may be asked for again; tokens are of all of these.
    """

    datasets: dict[str, int]
    rows: int
    left: int
    requests_at_most: int
    tokens_in: int
    tokens_out_at_most: int
    measured: bool
    cost_usd_at_most: float | None
    note: str
    seconds: float | None = None

    def record(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)


class Payee(NamedTuple):
    """Who is asked: a backend (free unless it is a provider's), a model, and where its client finds prices."""

    backend: str
    model: str
    client: ClientConfig


def expected(
    payee: Payee,
    datasets: Iterable[str],
    *,
    left: int,
    requests: int,
    tokens: tuple[int, int],
    before: Iterable[Asked],
) -> Estimate:
    """The estimate for `left` of the rows whose datasets are given, in `requests` requests at most.

    `tokens` in and out are the rough ones of all of them; the mean of the records `before` takes their place.
    """
    names = Counter(datasets)
    known = [(r.tokens_in, r.tokens_out) for r in before if r.tokens_in is not None and r.tokens_out is not None]
    tokens_in, tokens_out = tokens
    if known:
        tokens_in, tokens_out = (round(sum(each) / len(known) * left) for each in zip(*known, strict=True))
    cost, note = _cost(payee, requests, tokens_in, tokens_out)
    return Estimate(
        datasets=dict(sorted(names.items())),
        rows=names.total(),
        left=left,
        requests_at_most=requests,
        tokens_in=tokens_in,
        tokens_out_at_most=tokens_out,
        measured=bool(known),
        cost_usd_at_most=cost,
        note=note,
    )


def estimate(opening: Opening, folder: Path) -> Estimate:
    """The estimate for the rows that `folder` has no prediction of. No backend is opened, no key is needed.

    Raises InputError for media that an API would refuse.
    """
    check_media(opening.backend, opening)
    atlas = opening.atlas
    asked = folder / "predict.json"
    # A pilot on some of the rows says nothing of which are done.
    before_it = read_json(asked) if asked.is_file() else {}
    done = done_elsewhere(folder)
    if (before_it.get("data") or {}).get("fingerprint") != atlas.fingerprint:
        done = done if grown(before_it, atlas, opening.selection, done) else set()
    left = np.array([key not in done for key in atlas.ids], bool)
    count = int(left.sum())
    tokens = (int(_rough_tokens(opening)[left].sum()), count * opening.config.generation.max_tokens)
    datasets = (atlas.columns.datasets[code] for code in atlas.columns.dataset_codes.tolist())
    path = folder / PREDICTIONS
    before = read_predictions(path, atlas.taxonomy) if path.is_file() else []
    payee = Payee(opening.backend, opening.model, opening.config.remote)
    found = expected(payee, datasets, left=count, requests=count, tokens=tokens, before=before)
    paces = [each.latency_s for each in before if each.latency_s is not None]
    at_once = payee.client.max_concurrency if opening.backend in PROVIDERS else 1
    return replace(found, seconds=sum(paces) / len(paces) * count / at_once if paces else None)


def _rough_tokens(opening: Opening) -> np.ndarray[Any, Any]:
    columns, wanted = opening.atlas.columns, opening.encode.modalities
    tokens_N = columns.problem_chars // CHARACTERS_A_TOKEN + FORMAT_TOKENS
    if "image" in wanted:
        tokens_N = tokens_N + columns.num_images * TOKENS_A_PICTURE
    if "video" in wanted:
        tokens_N = tokens_N + columns.num_videos * opening.encode.num_frames * TOKENS_A_PICTURE
    if "audio" in wanted and columns.num_audios.any():
        tokens_N = tokens_N + opening.atlas.audio_bytes // AUDIO_BYTES_A_TOKEN
    return tokens_N


def _cost(payee: Payee, requests: int, tokens_in: int, tokens_out: int) -> tuple[float | None, str]:
    if payee.backend not in PROVIDERS:
        return 0.0, "nothing is paid for this backend"
    address = payee.client.base_url or PROVIDERS[payee.backend].base_url
    price = find_price(payee.backend, payee.model, address, payee.client.prices)
    if price is None:
        return None, f"the price of {payee.model} is not known; give it with remote.prices=FILE"
    note = f"at {price.input:g} and {price.output:g} dollars a million tokens ({price.source})"
    return price.cost(tokens_in, tokens_out, max(1, requests)), note
