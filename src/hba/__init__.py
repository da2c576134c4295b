"""Open the Human Behavior Atlas, train OmniSapiens models on it, evaluate any multimodal model, read the results.

Importing `hba` loads nothing heavy: `open_atlas` and the version are looked up at their first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hba.atlas import Atlas, open_atlas

    __version__: str

__all__ = ["Atlas", "__version__", "open_atlas"]


def __getattr__(name: str) -> Any:
    if name in ("Atlas", "open_atlas"):
        from hba import atlas

        return getattr(atlas, name)
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("human-behavior-atlas")
        except PackageNotFoundError:
            return "0+unknown"  # a source tree that was never installed
    raise AttributeError(f"module 'hba' has no attribute {name!r}")
