"""Open the Human Behavior Atlas, train OmniSapiens models on it, evaluate any multimodal model, read the results.

Importing `hba` loads nothing heavy: `open_atlas` is looked up at its first use.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hba.atlas import Atlas, open_atlas

try:
    __version__ = version("human-behavior-atlas")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["Atlas", "__version__", "open_atlas"]


def __getattr__(name: str) -> Any:
    if name in ("Atlas", "open_atlas"):
        from hba import atlas

        return getattr(atlas, name)
    raise AttributeError(f"module 'hba' has no attribute {name!r}")
