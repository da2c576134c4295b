"""Where figures come from: the facts that a run folder's files tell about its model and its data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hba import __version__
from hba.errors import InputError
from hba.evaluate.predictions import Prediction
from hba.storage import json_sha256, read_json

KEYS = ("hba_version", "data_fingerprint", "split", "model", "seed", "created_at", "synthetic")


def _fingerprint(predictions: Sequence[Prediction]) -> str:
    """Hash of what was scored, whatever the order of the lines and the time they took."""
    return json_sha256(sorted((p.id, p.dataset, p.target, str(p.label), str(p.answer)) for p in predictions))


def run_facts(folder: Path) -> dict[str, Any]:
    """What predict.json and environment.json of a run folder say of model, backend, seed and data; None if unknown.

    Raises InputError for a malformed file.
    """
    environment, predict = (run_record(folder / name) for name in ("environment.json", "predict.json"))
    data = predict.get("data") or environment.get("data") or {}
    model = predict.get("model")
    return {
        "data_fingerprint": data.get("fingerprint"),
        # A local model by its folder's name: where a run lies must not change its metrics.json.
        "model": Path(model).name if isinstance(model, str) and Path(model).is_dir() else model,
        "backend": predict.get("backend"),
        "seed": environment.get("seed"),
        "synthetic": data.get("synthetic"),
    }


def provenance_of(folder: Path, predictions: Sequence[Prediction], given: Mapping[str, Any]) -> dict[str, Any]:
    """What is known about the run; the keys of the contract are always there, null if unknown."""
    found = {
        "hba_version": __version__,
        "split": "+".join(sorted({p.split for p in predictions})),
        "created_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "answers_sha256": _fingerprint(predictions),
    }
    return dict.fromkeys(KEYS) | run_facts(folder) | found | dict(given)


def run_record(path: Path) -> dict[str, Any]:
    """environment.json or predict.json of a run, empty without one. Raises InputError for a malformed file."""
    facts = read_json(path) if path.is_file() else {}
    if not isinstance(facts, dict) or not isinstance(facts.get("data") or {}, dict):
        raise InputError("expected an object with an object `data`", where=str(path), fix="Restore or remove the file.")
    return facts
