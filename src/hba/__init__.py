"""Open the Human Behavior Atlas, train OmniSapiens models on it, evaluate any multimodal model, read the results.

    import hba

    hba.ask("runs/sft", "clip.mp4", tasks=["EMO"])
    hba.open_atlas("data/atlas", split="test")[0]
    hba.OmniSapiens.from_pretrained("runs/sft")

Importing `hba` loads nothing heavy: each name is looked up at its first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hba.atlas import Atlas, open_atlas
    from hba.evaluate.ask import ask
    from hba.model import OmniSapiens

    __version__: str

__all__ = ["Atlas", "OmniSapiens", "__version__", "ask", "open_atlas"]

_ROOMS = {"Atlas": "hba.atlas", "open_atlas": "hba.atlas", "ask": "hba.evaluate.ask", "OmniSapiens": "hba.model"}


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return getattr(import_module(_ROOMS[name]), name)
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("human-behavior-atlas")
        except PackageNotFoundError:
            return "0+unknown"  # a source tree that was never installed
    raise AttributeError(f"module 'hba' has no attribute {name!r}")
