"""The pooled descriptors of a sample, as stage 3 reads them: one vector a modality, missing where it has none.

A row that has a medium but no descriptor of it misses one: its sample is refused by name, unless `allow_missing` lets
it go unchanged. A row without the medium misses nothing. Nothing is filled with zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from hba.config import option
from hba.descriptors.pool import pool, sequence
from hba.errors import InputError, MediaError

if TYPE_CHECKING:
    from torch import Tensor

    from hba.atlas.media import Descriptor
    from hba.atlas.sample import Sample

Mode = Literal["none", "mean", "meanstd", "meanstdp25p75"]
Norm = Literal["l2", "zscore"]


class Source(NamedTuple):
    """Where a modality's descriptors lie, and the medium that they describe."""

    field: Literal["ext_video_feats", "ext_audio_feats"]
    medium: Literal["videos", "audios"]


SOURCES = {"video": Source("ext_video_feats", "videos"), "audio": Source("ext_audio_feats", "audios")}


@dataclass(frozen=True, kw_only=True)
class DescriptorConfig:
    """How the descriptors [T, D] of a sample become one vector a modality."""

    mode: Mode = option("meanstd", "statistics over time")
    norm: Norm | None = option(None, "over the pooled vector of a sample: none, l2 or zscore")
    confidence: bool = option(True, "keep the confidence of landmarks")
    published: bool = option(False, "quartiles and landmarks as the released scripts have them")
    allow_missing: bool = option(False, "leave a sample whose descriptors are missing unchanged")


def missing(sample: Sample) -> list[str]:
    """The modalities of which a sample has the medium but no descriptor."""
    return [name for name, (field, medium) in SOURCES.items() if getattr(sample, medium) and not getattr(sample, field)]


def pooled_descriptors(
    sample: Sample, config: DescriptorConfig, dims: Mapping[str, int] | None = None
) -> dict[str, Tensor]:
    """{'video': [F], 'audio': [F]}, float32, without a modality that the sample has no descriptor of.

    Several descriptors of one modality are averaged after pooling. Raises MediaError naming the place when one is
    missing (unless allowed), cannot be read or cannot be pooled, or gives another size than its adapter reads (`dims`).
    """
    for name in missing(sample) if not config.allow_missing else ():
        fix = "Run `hba atlas describe`, or leave such samples unchanged with --allow-missing."
        raise MediaError(f"has no {name} descriptor", where=sample.place(SOURCES[name].field), fix=fix)
    import torch

    found = {}
    for name, (field, _) in SOURCES.items():
        with sample.blamed(field):
            vectors = [_vector(loaded, config, sample.place(field)) for loaded in sample.load_descriptors(field)]
            if vectors:
                found[name] = torch.stack(vectors).mean(0)
        if found.get(name) is not None and dims is not None and len(found[name]) != dims.get(name, len(found[name])):
            raise MediaError(unlike(len(found[name]), dims[name]), where=sample.place(field), fix=ALIKE)
    return found


ALIKE = "Extract all descriptors of a dataset with the same settings."


def unlike(size: int, expected: int) -> str:
    """What is wrong with a pooled descriptor of another size than those of its dataset."""
    return f"the pooled descriptor has {size} values, those of its dataset have {expected}"


def _vector(loaded: Descriptor, config: DescriptorConfig, where: str) -> Tensor:
    import torch

    try:
        frames_TD = sequence(loaded, where=where, confidence=config.confidence, published=config.published)
        return torch.from_numpy(pool(frames_TD, config.mode, config.norm, config.published))
    except InputError as error:
        raise MediaError(error.what, where=where, fix=error.fix) from None
