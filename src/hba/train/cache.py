"""What a frozen backbone says about each sample, computed once and read by every epoch, stage, seed and sweep after.

A cache is a folder: `card.json` says what the features were computed with (weights, data, encoding, code), then come
`shard_00000.safetensors`, .... Shards appear whole or not at all, so that a killed computation goes on with those that
are missing; they are memory-mapped, never read whole. A card that says anything else than it should is named in a
warning, and everything is computed again: stale features are never read, nor those that a process wrote which had
begun before the card changed.

Processes share the work by claims: whoever locks a shard's byte in `.claims` computes it. The system frees the lock of
a process that ends, however it ends, so that another computes its shard; nobody waits for the dead.

Shapes: N samples, L states of all samples in a row, H hidden size.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hba.atlas.sample import Quarantined
from hba.errors import InputError
from hba.storage import StorageError, atomic_write, json_sha256, read_json, remove_abandoned, write_json

FORMAT = 2
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

    def __init__(self, folder: Path, num_shards: int, key: str) -> None:
        """Map the shards of a finished cache that were computed under `key`, as `start_cache` gave it.

        Raises InputError naming a shard that is missing, damaged, or of another key.
        """
        self._key = key
        self.quarantined: dict[str, Quarantined] = {}
        self._states: list[Tensor] = []
        self._tokens: list[Tensor | None] = []
        self._places: dict[int, _Place] = {}
        for index in range(num_shards):
            self._map(shard_path(folder, index))

    def _map(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as shard:  # type: ignore[no-untyped-call]
                header = shard.metadata() or {}
                about, key = json.loads(header["quarantined"]), header["key"]
                numbers, lengths = shard.get_tensor("numbers").tolist(), shard.get_tensor("lengths").tolist()
                self._states.append(shard.get_tensor("states"))
                self._tokens.append(shard.get_tensor("tokens") if "tokens" in shard.keys() else None)  # noqa: SIM118
        except (OSError, SafetensorError, KeyError) as error:
            fix = "Remove the file; it is computed again."
            raise InputError(f"not a shard of features ({error})", where=str(path), fix=fix) from error
        if key != self._key:
            what = "features of another command, which shares the folder"
            raise InputError(what, where=str(path), fix="Remove the file, or give each command a features.folder.")
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


def start_cache(folder: Path, identity: Mapping[str, Any]) -> str:
    """Make the folder of a cache with its card, or keep it where the card says the same; gives the key of its shards.

    Where it says something else, name in a warning what has changed and remove the shards.
    """
    card = json.loads(json.dumps({"format": FORMAT, **identity}))  # as it reads from the file
    path = folder / CARD
    remove_abandoned(folder)
    before = read_json(path) if path.is_file() else None
    if before == card:
        return json_sha256(card)
    if before is not None:
        changed = ", ".join(sorted(key for key in {*before, *card} if before.get(key) != card.get(key)))
        _log.warning("features in %s were computed with another %s: computing them again", folder, changed)
    for shard in folder.glob("shard_*.safetensors"):
        shard.unlink()
    write_json(path, card)
    return json_sha256(card)


def write_shard(path: Path, shard: Shard, key: str) -> None:
    """Write a shard, whole or not at all."""
    features = list(shard.features.values())
    tensors = {
        "numbers": torch.tensor(list(shard.features), dtype=torch.long),
        "lengths": torch.tensor([len(feature.states_LH) for feature in features], dtype=torch.long),
        "states": torch.cat([feature.states_LH for feature in features]) if features else torch.zeros(0, 1),
    }
    tokens = [feature.tokens_L for feature in features if feature.tokens_L is not None]
    if tokens:
        tensors["tokens"] = torch.cat(tokens)
    about = {"quarantined": json.dumps([record._asdict() for record in shard.quarantined]), "key": key}
    with atomic_write(path, "wb") as handle:
        handle.write(save(tensors, about))


class Claims:
    """The shards of a cache that this process computes. A context manager; closing it frees them all.

    Record locks belong to a process and not to an open file: forked workers do not hold them, and a process of which
    nothing is left holds none, on other machines that share the folder, too.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / ".claims"
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise StorageError(f"cannot write ({error.strerror})", where=str(path), fix="Check the folder.") from None

    def take(self, shard: int) -> bool:
        """Whether the shard is this process's now: no other is at it."""
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, shard)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            fix = "Choose a folder on a file system with locks (features.folder)."
            raise StorageError(f"cannot lock ({error.strerror})", where="features", fix=fix) from None
        return True

    def free(self, shard: int) -> None:
        """Let others have it."""
        fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, shard)

    def __enter__(self) -> Claims:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)
