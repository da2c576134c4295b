"""Behaviour adapters (BAM): descriptors of one dataset move the hidden state that its head or lm_head reads.

An adapter is a small MLP over the pooled descriptor of one modality; its output, times a learned alpha, is added to the
pooled state of a classification row, or to every last hidden state of a free-form row (formulas, "BAM"). Video comes
first, then audio, each a residual. A sample without a modality keeps its state to the bit, whatever stands beside it in
the batch. Many adapters sit in one `Bam`, each for its dataset. State-dict keys of a dataset are those of the release:
`video_adapter.*` and `audio_adapter.*` with `alpha`, `ln_feats`, `mlp.0`, `mlp.2`.

Shapes: B samples, F descriptor values, A hidden size of the adapter, H hidden size of the backbone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors.torch import save_file
from torch import Tensor, nn

from hba.batch.pool import DescriptorConfig
from hba.errors import InputError, nearest
from hba.model.weights import read_tensors
from hba.storage import read_json, write_json

FOLDER = "bam"
MODALITIES = ("video", "audio")
Pooled = Mapping[str, Tensor]
"""The pooled descriptors of one sample by modality, each [F]; a modality that it lacks is not there."""


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """What one dataset's adapters are; saved beside their weights."""

    dataset: str
    dims: dict[str, int]  # F of each modality that has an adapter
    hidden: int
    dropout: float
    modality_dropout: float
    layer_norm: bool
    descriptors: DescriptorConfig


class DescriptorAdapter(nn.Module):
    """delta = alpha * MLP(Dropout(Norm(f))) for descriptors f of one modality.

    Norm standardises with `center` and `scale`, buffers measured on the training rows (0 and 1 as released), then
    LayerNorm if asked.
    """

    center: Tensor
    scale: Tensor

    def __init__(self, dim: int, hidden: int, out: int, *, dropout: float = 0.0, layer_norm: bool = False) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))
        self.ln_feats = nn.LayerNorm(dim) if layer_norm else None
        self.dropout = nn.Dropout(dropout)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, out))
        self.alpha = nn.Parameter(torch.ones(1))

    def forward(self, f_BF: Tensor) -> Tensor:
        """Delta [B, H] of descriptors [B, F]."""
        x_BF = (f_BF - self.center) / self.scale
        if self.ln_feats is not None:
            x_BF = self.ln_feats(x_BF)
        delta_BH: Tensor = self.alpha * self.mlp(self.dropout(x_BF))
        return delta_BH

    def start(self, f_NF: Tensor | None) -> None:
        """Begin without any effect (the last layer is zero); standardise by the training rows [N, F] where given.

        A value that never varies is only centred.
        """
        for parameter in self.mlp[2].parameters():
            nn.init.zeros_(parameter)
        if f_NF is not None:
            spread_F = f_NF.std(0, correction=0)
            self.center.copy_(f_NF.mean(0))
            self.scale.copy_(torch.where(spread_F > 1e-6, spread_F, 1.0))


class DatasetAdapters(nn.Module):
    """The adapters of one dataset, one a modality."""

    def __init__(self, spec: AdapterSpec, hidden_size: int) -> None:
        super().__init__()
        self.spec = spec
        options: dict[str, Any] = {"dropout": spec.dropout, "layer_norm": spec.layer_norm}
        for name, dim in spec.dims.items():
            setattr(self, f"{name}_adapter", DescriptorAdapter(dim, spec.hidden, hidden_size, **options))

    def adapter(self, modality: str) -> DescriptorAdapter | None:
        """The adapter of 'video' or 'audio', None where the dataset has none."""
        return getattr(self, f"{modality}_adapter", None)

    def forward(self, base_BH: Tensor, descriptors: Sequence[Pooled]) -> Tensor:
        """`base_BH` plus the deltas of each sample's own descriptors, in the precision of the adapters.

        In training each modality of each sample is left out with `modality_dropout`. Raises InputError for a
        descriptor of another size than the adapter's.
        """
        state_BH = base_BH.float()
        for modality in MODALITIES:
            adapter = self.adapter(modality)
            if adapter is None:
                continue
            has_B = torch.tensor([modality in each for each in descriptors])
            if self.training:
                has_B &= torch.rand(len(descriptors)) >= self.spec.modality_dropout
            rows = has_B.nonzero().flatten().tolist()
            if rows:
                f_RF = self._stacked([descriptors[row][modality] for row in rows], modality).to(state_BH.device)
                state_BH = state_BH.index_add(0, torch.tensor(rows, device=state_BH.device), adapter(f_RF))
            else:
                # A batch without the modality has a gradient, too (zero), of all parameters: sharded ranks exchange
                # those of every adapter that one of them runs.
                state_BH = state_BH + 0.0 * adapter(state_BH.new_zeros(1, self.spec.dims[modality]))
        return state_BH

    def _stacked(self, vectors: Sequence[Tensor], modality: str) -> Tensor:
        expected = self.spec.dims[modality]
        for vector in vectors:
            if len(vector) != expected:
                fix = "Extract all descriptors of a dataset with the same settings."
                what = f"a pooled {modality} descriptor has {len(vector)} values, the adapter reads {expected}"
                raise InputError(what, where=f"dataset {self.spec.dataset}", fix=fix)
        return torch.stack(list(vectors)).float()


class Bam(nn.Module):
    """Adapters by dataset; a dataset without adapters passes through unchanged."""

    def __init__(self, specs: Iterable[AdapterSpec], hidden_size: int) -> None:
        super().__init__()
        self.datasets = nn.ModuleDict({spec.dataset: DatasetAdapters(spec, hidden_size) for spec in specs})

    @property
    def descriptors(self) -> dict[str, DescriptorConfig]:
        """How the descriptors of each dataset with adapters are read."""
        return {key: self.adapters(key).spec.descriptors for key in self.datasets}

    @property
    def dims(self) -> dict[str, dict[str, int]]:
        """Size of the pooled descriptors that the adapters of each dataset read, by modality."""
        return {key: self.adapters(key).spec.dims for key in self.datasets}

    def adapters(self, dataset: str) -> DatasetAdapters:
        """The adapters of a dataset. Raises InputError naming those that there are."""
        if dataset not in self.datasets:
            raise InputError(f"no adapters for dataset {dataset!r}", fix=nearest(dataset, self.datasets))
        found = self.datasets[dataset]
        assert isinstance(found, DatasetAdapters)  # what the module dict was filled with
        return found

    def forward(self, base_BH: Tensor, datasets: Sequence[str], descriptors: Sequence[Pooled]) -> Tensor:
        """The states [B, H] with each sample's own dataset's deltas added, float32."""
        state_BH = base_BH.float()
        for key in sorted(set(datasets) & set(self.datasets)):
            rows = [row for row, dataset in enumerate(datasets) if dataset == key]
            index_R = torch.tensor(rows, device=state_BH.device)
            adapted_RH = self.adapters(key)(state_BH[index_R], [descriptors[row] for row in rows])
            state_BH = state_BH.index_copy(0, index_R, adapted_RH)
        return state_BH


def save_bam(bam: Bam, folder: Path) -> None:
    """Write `folder/bam/KEY.safetensors` and `KEY.json` of every dataset."""
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    for key in bam.datasets:
        tensors = {name: tensor.contiguous().cpu() for name, tensor in bam.adapters(key).state_dict().items()}
        save_file(tensors, folder / FOLDER / f"{key}.safetensors")
        write_json(folder / FOLDER / f"{key}.json", asdict(bam.adapters(key).spec))


def load_bam(folder: Path, hidden_size: int) -> Bam | None:
    """The adapters of a checkpoint folder, None where it has none.

    Adapters in the released layout lack `center` and `scale`: they are 0 and 1. Raises InputError naming the file that
    cannot be loaded.
    """
    files = sorted((folder / FOLDER).glob("*.json"))
    if not files:
        return None
    specs = [TypeAdapter(AdapterSpec).validate_python(read_json(file)) for file in files]
    bam = Bam(specs, hidden_size)
    for spec in specs:
        file, adapters = folder / FOLDER / f"{spec.dataset}.safetensors", bam.adapters(spec.dataset)
        fix = "Use another checkpoint, or train again."
        tensors, measured = read_tensors(file, "the adapters", fix), dict(adapters.named_buffers())
        try:
            # All of a released file's are absent; a part of them is a file that is not whole.
            adapters.load_state_dict(tensors if measured.keys() & tensors.keys() else measured | tensors)
        except RuntimeError as error:
            what = f"cannot load the adapters ({' '.join(str(error).split())})"
            raise InputError(what, where=str(file), fix=fix) from error
    return bam
