"""Adapters that the authors released, put beside those of a model. Their keys in a state dict, one group a modality:

    video_adapter.alpha, .mlp.0.weight|bias, .mlp.2.weight|bias and, with layer norm, .ln_feats.weight|bias
    audio_adapter.*     the same

A state dict tells neither the dataset nor how descriptors were pooled over time: both are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from hba.descriptors.pooled import DescriptorConfig, Mode
from hba.errors import InputError
from hba.model.bam import MODALITIES, AdapterSpec, Bam, DatasetAdapters
from hba.taxonomy import BUILTIN, Taxonomy

PREFIXES = tuple(f"{name}_adapter." for name in MODALITIES)
PUBLISHED_MODALITY_DROPOUT = 0.3
_MEASURED = ("center", "scale")  # buffers of our adapters that the released ones lack: 0 and 1


def released_adapters(
    bam: Bam | None,
    hidden_size: int,
    state: Mapping[str, Tensor],
    *,
    dataset: str,
    pooling: Mode,
    path: Path,
    taxonomy: Taxonomy = BUILTIN,
) -> Bam:
    """The adapters in `state` for `dataset`, beside those of `bam`; they replace earlier ones of it.

    Raises InputError for an unknown dataset, and for unknown, missing or wrongly shaped keys, which it names.
    """
    spec = _spec(state, taxonomy.dataset(dataset).key, pooling, path)
    fresh = DatasetAdapters(spec, hidden_size)
    expected = {name: tensor for name, tensor in fresh.state_dict().items() if name.split(".")[1] not in _MEASURED}
    unknown, missing = sorted(state.keys() - expected.keys()), sorted(expected.keys() - state.keys())
    wrong = [
        f"{name} is {list(state[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    for what, names in (("unknown keys", unknown), ("missing keys", missing), ("wrong shapes", wrong)):
        if names:
            raise InputError(f"{what}: {', '.join(names)}", where=str(path), fix="Check the file and the backbone.")
    fresh.load_state_dict(dict(state), strict=False)
    others = [] if bam is None else [bam.adapters(key) for key in bam.datasets if key != spec.dataset]
    together = [*others, fresh]
    joined = Bam([each.spec for each in together], hidden_size)
    for each in together:
        joined.datasets[each.spec.dataset] = each
    return joined


def _spec(state: Mapping[str, Tensor], dataset: str, pooling: Mode, path: Path) -> AdapterSpec:
    dims: dict[str, int] = {}
    hidden: set[int] = set()
    for name in MODALITIES:
        weight = state.get(f"{name}_adapter.mlp.0.weight")
        if weight is not None and weight.ndim == 2:
            hidden.add(weight.shape[0])
            dims[name] = weight.shape[1]
    if len(hidden) != 1:
        what = "no adapter: expected video_adapter.mlp.0.weight or audio_adapter.mlp.0.weight"
        found = f"adapters of different hidden sizes {sorted(hidden)}" if hidden else what
        raise InputError(found, where=str(path), fix="Check that it is a BAM checkpoint.")
    return AdapterSpec(
        dataset=dataset,
        dims=dims,
        hidden=hidden.pop(),
        dropout=0.0,
        modality_dropout=PUBLISHED_MODALITY_DROPOUT,
        layer_norm=any(".ln_feats." in name for name in state),
        descriptors=DescriptorConfig(mode=pooling, published=True),
    )
