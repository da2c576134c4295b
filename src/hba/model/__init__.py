"""OmniSapiens: backbone, heads, checkpoints."""

from hba.model.omni import OmniSapiens

__all__ = ["OmniSapiens"]
