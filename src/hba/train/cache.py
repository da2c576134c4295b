"""What a frozen backbone says about each sample, computed once and read by every epoch, stage, seed and sweep after.

A cache is a folder: `card.json` says what the features were computed with (weights, data, encoding, code), then come
`shard_00000.safetensors`, .... Shards appear whole or not at all, so that a killed computation goes on with the first
that is missing; they are memory-mapped, never read whole. A card that says anything else than it should is named in a
warning, and everything is computed again: stale features are never read.

Shapes: N samples, L states of all samples in a row, H hidden size.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hba.atlas.sample import Quarantined
from hba.errors import InputError
from hba.storage import atomic_write, read_json, write_json

FORMAT = 1
CARD = "card.json"
_log = logging.getLogger(__name__)


class Feature(NamedTuple):
    """One sample: its pooled state [1, H], or the states that predict the tokens of its answer, and these."""

    states_LH: Tensor
    tokens_L: Tensor | None


class Shard(NamedTuple):
    """What one shard holds: features by the number of their row in the split, and what could not be read."""

    features: Mapping[int, Feature]
    quarantined: Sequence[Quarantined]


class _Place(NamedTuple):
    shard: int
    start: int
    length: int


class FeatureCache:
    """The features of one dataset in one split, by row number."""

    def __init__(self, folder: Path, num_shards: int) -> None:
        """Map the shards of a finished cache. Raises InputError naming a shard that is missing or damaged."""
        self.quarantined: dict[str, Quarantined] = {}
        self._states: list[Tensor] = []
        self._tokens: list[Tensor | None] = []
        self._places: dict[int, _Place] = {}
        for index in range(num_shards):
            self._map(shard_path(folder, index))

    def _map(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as shard:  # type: ignore[no-untyped-call]
                about = json.loads((shard.metadata() or {})["quarantined"])
                numbers, lengths = shard.get_tensor("numbers").tolist(), shard.get_tensor("lengths").tolist()
                self._states.append(shard.get_tensor("states"))
                self._tokens.append(shard.get_tensor("tokens") if "tokens" in shard.keys() else None)  # noqa: SIM118
        except (OSError, SafetensorError, KeyError) as error:
            fix = "Remove the file; it is computed again."
            raise InputError(f"not a shard of features ({error})", where=str(path), fix=fix) from error
        start = 0
        for number, length in zip(numbers, lengths, strict=True):
            self._places[number] = _Place(len(self._states) - 1, start, length)
            start += length
        self.quarantined |= {record["id"]: Quarantined(**record) for record in about}

    def __len__(self) -> int:
        return len(self._places)

    def get(self, number: int) -> Feature | None:
        """The features of row `number` of the split, None where its media could not be read."""
        place = self._places.get(number)
        if place is None:
            return None
        span, tokens = slice(place.start, place.start + place.length), self._tokens[place.shard]
        return Feature(self._states[place.shard][span], None if tokens is None else tokens[span])


def shard_path(folder: Path, index: int) -> Path:
    """Where shard `index` of a cache lies."""
    return folder / f"shard_{index:05d}.safetensors"


def start_cache(folder: Path, identity: Mapping[str, Any]) -> None:
    """Make the folder of a cache with its card, or keep it where the card says the same.

    Where it says something else, name in a warning what has changed and remove the shards.
    """
    card = json.loads(json.dumps({"format": FORMAT, **identity}))  # as it reads from the file
    path = folder / CARD
    before = read_json(path) if path.is_file() else None
    if before == card:
        return
    if before is not None:
        changed = ", ".join(sorted(key for key in {*before, *card} if before.get(key) != card.get(key)))
        _log.warning("features in %s were computed with another %s: computing them again", folder, changed)
    for shard in folder.glob("shard_*.safetensors"):
        shard.unlink()
    write_json(path, card)


def missing_shards(folder: Path, num_shards: int) -> list[int]:
    """The shards that are still to be computed."""
    return [index for index in range(num_shards) if not shard_path(folder, index).is_file()]


def write_shards(folder: Path, indices: Sequence[int], shards: Iterable[Shard]) -> Iterator[int]:
    """Write each shard as it comes, whole or not at all; yields the number of its samples."""
    for index, shard in zip(indices, shards, strict=True):
        features = list(shard.features.values())
        tensors = {
            "numbers": torch.tensor(list(shard.features), dtype=torch.long),
            "lengths": torch.tensor([len(feature.states_LH) for feature in features], dtype=torch.long),
            "states": torch.cat([feature.states_LH for feature in features]) if features else torch.zeros(0, 1),
        }
        tokens = [feature.tokens_L for feature in features if feature.tokens_L is not None]
        if tokens:
            tensors["tokens"] = torch.cat(tokens)
        about = {"quarantined": json.dumps([record._asdict() for record in shard.quarantined])}
        with atomic_write(shard_path(folder, index), "wb") as handle:
            handle.write(save(tensors, about))
        yield len(features) + len(shard.quarantined)
