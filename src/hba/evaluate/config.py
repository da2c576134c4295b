"""How predictions are made: the config of `hba predict`, and what a backend is opened with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from hba.atlas import Atlas
from hba.atlas.batch import EncodeConfig
from hba.atlas.loader import LoaderConfig
from hba.config import option


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """How predictions are made. Samples are encoded as in the checkpoint's training unless `encode` is given."""

    batch_size: Annotated[int, Field(ge=1)] = option(16, "samples in a batch")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "of the weights")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = option("sdpa", "attention implementation")
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    encode: EncodeConfig | None = option(None, "how samples become tokens, frames and patches")


@dataclass(frozen=True, kw_only=True)
class Opening:
    """What a backend is opened with: a model, the rows that it will answer, and the settings.

    `place` is where the atlas lies, for a backend that looks at another of its splits. `encode` says which media
    reach the model, and in which form.
    """

    model: str
    place: str
    atlas: Atlas
    config: PredictConfig
    encode: EncodeConfig
