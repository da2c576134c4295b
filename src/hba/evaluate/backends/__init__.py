"""The backends by name. Each is a module with `open_backend(name, Opening) -> Backend`, imported when asked for.

To add one, write the module after `interface.Backend` and name it in `MODULES`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from hba.errors import InputError, nearest
from hba.model.config import require_place

if TYPE_CHECKING:
    from hba.evaluate.backends.interface import Backend
    from hba.evaluate.config import Opening

MODULES = {
    "heads": "hba.evaluate.backends.heads",
    "hf": "hba.evaluate.backends.hf",
    "openai": "hba.evaluate.backends.remote",
    "anthropic": "hba.evaluate.backends.remote",
    "google": "hba.evaluate.backends.remote",
    "vllm": "hba.evaluate.backends.vllm",
    "majority": "hba.evaluate.backends.baselines",
    "random": "hba.evaluate.backends.baselines",
}

# Over models on this machine: one of ours, merged ones included, says how its samples were encoded.
LOCAL = ("heads", "hf", "vllm")
# They answer without a word.
WORDLESS = ("heads", "majority", "random")


def open_backend(name: str, opening: Opening) -> Backend:
    """The backend of that name, one of `MODULES`, over a model. Raises InputError for a model that it cannot use."""
    backend: Backend = import_module(MODULES[name]).open_backend(name, opening)
    return backend


def known(name: str) -> str:
    """The name of a backend. Raises InputError for another."""
    if name not in MODULES:
        raise InputError(f"no backend {name!r}", where="--backend", fix=nearest(name, MODULES))
    return name


def detect(model: str) -> str:
    """The backend for `model` when none is named: a baseline by its name, else what its checkpoint was trained for.

    Heads, which refuses what has none, for everything else: nothing is guessed. Raises InputError for a name that is
    neither a folder nor an id of the hub: a remote model needs its backend.
    """
    if model in ("majority", "random"):
        return model
    require_place(model, also="; with --backend also the name of a remote model")
    from hba.model import checkpoint  # not before it is needed: it imports torch

    folder = checkpoint.resolve(model)
    return "hf" if folder is not None and checkpoint.read_card(folder)["columns"] is None else "heads"
