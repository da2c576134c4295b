"""OmniSapiens: backbone, heads, checkpoints. The class, and torch with it, is loaded at its first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hba.model.omni import OmniSapiens

__all__ = ["OmniSapiens"]


def __getattr__(name: str) -> Any:
    if name == "OmniSapiens":
        from hba.environment import require_extra

        require_extra("train", "OmniSapiens")
        from hba.model import omni

        return omni.OmniSapiens
    raise AttributeError(f"module 'hba.model' has no attribute {name!r}")
