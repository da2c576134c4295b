"""What a run would do and cost, without asking a model anything: `hba predict --dry-run`.

Tokens are those of the predictions that the folder already has, a pilot's (`--limit`) for instance, as means a row;
without any, they come from rough figures a medium, and the answer is taken to be as long as it may be. A cost is an
upper bound at list prices; a model without a known price has none, and that is said.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hba.atlas import Atlas
from hba.evaluate.config import Opening
from hba.evaluate.predictions import read_predictions
from hba.evaluate.shards import done_elsewhere
from hba.remote.client import is_official
from hba.remote.cost import find_price
from hba.remote.provider import PROVIDERS
from hba.storage import read_json

CHARACTERS_A_TOKEN = 3
TOKENS_A_PICTURE = 85  # OpenAI's figure for an image at low detail
AUDIO_BYTES_A_TOKEN = 3200  # ten tokens a second of 16 kHz sound in 16 bits
FORMAT_TOKENS = 40


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Rows by dataset, how many are left, their tokens and what they cost at most in US dollars (None: unknown)."""

    datasets: dict[str, int]
    rows: int
    left: int
    tokens_in: int
    tokens_out_at_most: int
    measured: bool
    cost_usd_at_most: float | None
    note: str

    def record(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)


def estimate(opening: Opening, folder: Path) -> Estimate:
    """The estimate for the rows that `folder` has no prediction of. No backend is opened, no key is needed."""
    atlas = opening.atlas
    done = done_elsewhere(folder) if _same_rows(folder, atlas) else set()
    left = np.array([sample.id not in done for sample in atlas], bool)
    measured = _measured(folder, atlas)
    if measured is None:
        tokens_in = int(_rough_tokens(opening)[left].sum())
        tokens_out = int(left.sum()) * opening.config.generation.max_tokens
    else:
        tokens_in, tokens_out = (round(mean * int(left.sum())) for mean in measured)
    cost, note = _cost(opening, tokens_in, tokens_out)
    names = Counter(atlas.columns.datasets[code] for code in atlas.columns.dataset_codes.tolist())
    return Estimate(
        datasets=dict(sorted(names.items())),
        rows=len(atlas),
        left=int(left.sum()),
        tokens_in=tokens_in,
        tokens_out_at_most=tokens_out,
        measured=measured is not None,
        cost_usd_at_most=cost,
        note=note,
    )


def _same_rows(folder: Path, atlas: Atlas) -> bool:
    """Whether the folder's run is on these rows, and not a pilot on some of them."""
    path = folder / "predict.json"
    return path.is_file() and read_json(path)["data"]["fingerprint"] == atlas.fingerprint


def _measured(folder: Path, atlas: Atlas) -> tuple[float, float] | None:
    """Mean tokens in and out of the predictions that are there; None where no prediction says its tokens."""
    path = folder / "predictions.jsonl"
    found = read_predictions(path, atlas.taxonomy) if path.is_file() else []
    known = [(p.tokens_in, p.tokens_out) for p in found if p.tokens_in is not None and p.tokens_out is not None]
    return (sum(i for i, _ in known) / len(known), sum(o for _, o in known) / len(known)) if known else None


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


def _cost(opening: Opening, tokens_in: int, tokens_out: int) -> tuple[float | None, str]:
    if opening.backend not in PROVIDERS:
        return 0.0, "nothing is paid for this backend"
    remote = opening.config.remote
    official = is_official(opening.backend, remote.base_url)
    price = find_price(opening.backend, opening.model, official=official, file=remote.prices)
    if price is None:
        return None, f"the price of {opening.model} is not known; give it with remote.prices=FILE"
    return price.cost(tokens_in, tokens_out), f"at {price.input:g} and {price.output:g} dollars a million tokens"
